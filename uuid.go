package main

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"time"
)

// newUUIDv4 returns a random UUID by RFC 9562, section 5.4.
func newUUIDv4() string {
	var b [16]byte
	rand.Read(b[:]) // never fails, says its documentation
	return formatUUID(b, 4)
}

// newUUIDv7 returns a UUID that sorts by the millisecond of its making, RFC 9562,
// section 5.7.
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
