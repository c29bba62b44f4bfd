package main

// This file owns the trace id, which connects a request with its events, and the UUIDs that name
// both.

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"net/http"
	"regexp"
	"strings"
	"time"
)

type traceIDKey struct{}

func withTraceID(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, traceIDKey{}, id)
}

// traceID returns "" if ctx belongs to neither a request nor an event.
func traceID(ctx context.Context) string {
	id, _ := ctx.Value(traceIDKey{}).(string)
	return id
}

var (
	requestIDPattern   = regexp.MustCompile(`^[A-Za-z0-9._:-]{1,128}$`)
	traceparentPattern = regexp.MustCompile(
		`^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?$`)
)

// requestTraceID returns the X-Request-Id of a request, else the trace id of its traceparent, else
// a new UUID. It ignores headers that are repeated or malformed.
func requestTraceID(h http.Header) string {
	if ids := h["X-Request-Id"]; len(ids) == 1 && requestIDPattern.MatchString(ids[0]) {
		return ids[0]
	}
	if parents := h["Traceparent"]; len(parents) == 1 {
		if id := parentTraceID(parents[0]); id != "" {
			return id
		}
	}
	return newUUIDv4()
}

// parentTraceID returns the trace-id field of a traceparent header (W3C Trace Context, section
// 3.2), or "" if the header is invalid. Only versions above 00 may have a fifth field.
func parentTraceID(traceparent string) string {
	fields := traceparentPattern.FindStringSubmatch(traceparent)
	if fields == nil {
		return ""
	}
	version, id, parent, more := fields[1], fields[2], fields[3], fields[4]
	if version == "ff" || version == "00" && more != "" ||
		strings.Trim(id, "0") == "" || strings.Trim(parent, "0") == "" {
		return ""
	}
	return id
}

// newUUIDv4 returns a random UUID (RFC 9562, section 5.4).
func newUUIDv4() string {
	var b [16]byte
	rand.Read(b[:]) // never fails, see its documentation
	return formatUUID(b, 4)
}

// newUUIDv7 returns a UUID that begins with the current time in milliseconds (RFC 9562, section
// 5.7).
func newUUIDv7() string {
	var b [16]byte
	rand.Read(b[:])
	milliseconds := uint64(time.Now().UnixMilli())
	binary.BigEndian.PutUint64(b[:], milliseconds<<16|uint64(b[6])<<8|uint64(b[7]))
	return formatUUID(b, 7)
}

func formatUUID(b [16]byte, version byte) string {
	b[6] = b[6]&0x0f | version<<4
	b[8] = b[8]&0x3f | 0x80
	var text [36]byte
	hex.Encode(text[0:8], b[0:4])
	hex.Encode(text[9:13], b[4:6])
	hex.Encode(text[14:18], b[6:8])
	hex.Encode(text[19:23], b[8:10])
	hex.Encode(text[24:36], b[10:16])
	text[8], text[13], text[18], text[23] = '-', '-', '-', '-'
	return string(text[:])
}
