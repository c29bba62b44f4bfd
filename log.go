package main

// This file owns the log: the format of a line, of times and of strings in it, the writer, which
// never makes a caller wait for standard output, and the trace ids that connect lines.

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math"
	fast "math/rand/v2"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// newLogger returns a logger that writes one JSON object per line to out. The first keys are
// timestamp, level and event, then trace_id if the context has one. Lines at WARN and above are
// written at once, others within logDelay.
func newLogger(out *logWriter, level slog.Level) *slog.Logger {
	return slog.New(&logHandler{level: level, out: out})
}

// logHandler is a slog.Handler. It takes a fifth of the time of slog.JSONHandler with ReplaceAttr,
// which would have to rename the keys, twice per request.
type logHandler struct {
	level slog.Level
	attrs []slog.Attr // appended to every record
	out   *logWriter
}

// Enabled implements slog.Handler.
func (h *logHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.level
}

// Handle implements slog.Handler.
func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	return h.log(ctx, r.Level, r.Time, r.Message, slices.Collect(r.Attrs))
}

// log does not wait until the line is written, and fails with errLineDropped if it never will be.
func (h *logHandler) log(ctx context.Context, level slog.Level, at time.Time, event string,
	attrs []slog.Attr) error {
	return h.out.writeLine(level >= slog.LevelWarn, func(buffer []byte) []byte {
		buffer = appendLine(buffer, traceID(ctx), level, at, event)
		for _, a := range h.attrs {
			buffer = appendAttr(buffer, a)
		}
		for _, a := range attrs {
			buffer = appendAttr(buffer, a)
		}
		return append(buffer, "}\n"...)
	})
}

// logAt logs an event at the given time. The methods of slog.Logger would look up the source line,
// which is never shown. It fails with errLineDropped.
func logAt(ctx context.Context, log *slog.Logger, level slog.Level, at time.Time, event string,
	attrs ...slog.Attr) error {
	h := log.Handler().(*logHandler) // newLogger returns no other
	if !h.Enabled(ctx, level) {
		return nil
	}
	return h.log(ctx, level, at, event, attrs)
}

// flushLog waits until the lines of a log are written. It fails as logWriter.flush.
func flushLog(log *slog.Logger) error { return log.Handler().(*logHandler).out.flush() }

// appendLine appends the start of a line. Its attributes and a closing brace follow.
func appendLine(line []byte, traceID string, level slog.Level, at time.Time, event string) []byte {
	line = timestamp{at}.appendJSON(append(line, `{"timestamp":`...))
	line = append(append(append(line, `,"level":"`...), level.String()...), '"')
	line = appendJSONString(append(line, `,"event":`...), event)
	if traceID != "" {
		line = appendJSONString(append(line, `,"trace_id":`...), traceID)
	}
	return line
}

// appendAttr appends a comma, the key and the value. Values that are not numbers or booleans become
// strings.
func appendAttr(line []byte, a slog.Attr) []byte {
	line = append(appendJSONString(append(line, ','), a.Key), ':')
	v := a.Value.Resolve()
	switch v.Kind() {
	case slog.KindInt64:
		return strconv.AppendInt(line, v.Int64(), 10)
	case slog.KindFloat64:
		if x := v.Float64(); !math.IsNaN(x) && !math.IsInf(x, 0) {
			return strconv.AppendFloat(line, x, 'f', -1, 64)
		}
	case slog.KindBool:
		return strconv.AppendBool(line, v.Bool())
	}
	return appendJSONString(line, v.String()) // also for errors, NaN and infinities
}

// WithAttrs implements slog.Handler.
func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &logHandler{level: h.level, attrs: slices.Concat(h.attrs, attrs), out: h.out}
}

// WithGroup returns h: the keys of a line are flat.
func (h *logHandler) WithGroup(string) slog.Handler { return h }

var (
	// errLineDropped reports that a line is lost, because the buffer of the log is full.
	errLineDropped = errors.New("a log line was dropped")
	// errLogStuck reports that lines are still in the buffer.
	errLogStuck = errors.New("the log cannot be written, or not fast enough")
)

const (
	logDelay = 20 * time.Millisecond  // a line below WARN is written after this
	logRetry = 100 * time.Millisecond // the pause after a write that failed
	logBrief = 50 * time.Millisecond  // for a line while the process is about to end
	logWait  = 400 * time.Millisecond // for the lines of an event, or the last ones of the process
	logBatch = 64 << 10               // bytes that are written without a delay

	// logCapacity limits each of the two buffers, in bytes. A service at its limit logs about 8 MB
	// a second, and a reader may pause for 100 ms.
	logCapacity = 1 << 20
)

// logWriter writes lines in the background, so that no caller waits for standard output: a reader
// that stops reading would stop all requests. It also saves a write per line, which is most of what
// a log costs. Its methods may be called at the same time.
//
// Callers append lines to a buffer. The method write exchanges it for an empty one, and writes it
// without holding the lock. A timer starts it in a goroutine, at most one at a time. Lines are
// dropped while the buffer is full. The line after the buffer's tells how many.
type logWriter struct {
	w       io.Writer
	dropped atomic.Uint64 // lines

	mu         sync.Mutex
	buffer     []byte        // lines that have not been written
	lost       int           // lines dropped since write took the buffer
	writing    []byte        // older lines. While write runs, only it uses their bytes
	written    int           // bytes
	err        error         // of the last write
	progress   chan struct{} // closed after the next write, if not nil
	scheduled  bool          // write runs, or a timer will start it
	delay      *time.Timer   // starts write after logDelay
	atOnce     bool          // the buffer should be written without that delay
	unbuffered bool          // each line should
}

// writeLine adds the line that appendTo appends to the buffer, to be written at once or after
// logDelay. It fails with errLineDropped if the buffer is full. After stopBuffering it waits until
// the line is written, for logBrief at most and, if that is not enough, never again.
func (l *logWriter) writeLine(atOnce bool, appendTo func(buffer []byte) []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	buffer := appendTo(l.buffer)
	if len(buffer) > logCapacity {
		l.dropped.Add(1)
		l.lost++
		l.schedule(true)
		return errLineDropped
	}
	l.buffer = buffer
	l.schedule(atOnce || len(l.buffer) >= logBatch)
	if l.unbuffered && l.await(logBrief) != nil {
		l.unbuffered = false
	}
	return nil
}

// flush waits until the lines in the buffer are written. It fails after logWait, and the lines stay
// in the buffer.
func (l *logWriter) flush() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.await(logWait)
}

// await waits until the lines in the buffer are written, and fails after a timeout. The caller holds
// the lock, which await releases while it waits.
func (l *logWriter) await(atMost time.Duration) error {
	timeout, expired := time.After(atMost), false
	for end := l.written + len(l.writing) + len(l.buffer); l.written < end; {
		if expired {
			return errors.Join(errLogStuck, l.err)
		}
		l.schedule(true)
		if l.progress == nil {
			l.progress = make(chan struct{})
		}
		progress := l.progress
		l.mu.Unlock()
		select {
		case <-progress:
		case <-timeout:
			expired = true
		}
		l.mu.Lock()
	}
	return nil
}

// stopBuffering makes write take the lines in the buffer at once, and from then on each line: the
// process may end at any moment.
func (l *logWriter) stopBuffering() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unbuffered = true
	if len(l.buffer) > 0 {
		l.schedule(true)
	}
}

// schedule makes sure that write will take the buffer. After an error, it waits for logRetry in any
// case. The caller holds the lock.
func (l *logWriter) schedule(atOnce bool) {
	l.atOnce = l.atOnce || atOnce || l.unbuffered
	if !l.scheduled {
		l.scheduled = true
		l.delay = time.AfterFunc(logDelay, l.write)
	}
	if l.atOnce && l.delay.Stop() {
		go l.write()
	}
}

// write writes the lines in the buffer, or what an error has left of earlier ones, and schedules
// what follows.
func (l *logWriter) write() {
	lines := l.take()
	n, err := l.w.Write(lines)

	l.mu.Lock()
	defer l.mu.Unlock()
	l.writing = append(lines[:0], lines[n:]...)
	l.written += n
	l.err = err
	if l.progress != nil {
		close(l.progress)
		l.progress = nil
	}
	if err != nil {
		time.AfterFunc(logRetry, l.write)
		return
	}
	l.scheduled = false
	if len(l.buffer) > 0 || l.lost > 0 {
		l.schedule(false)
	}
}

// take returns the lines that should be written next.
func (l *logWriter) take() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.writing) > 0 { // after an error
		return l.writing
	}
	l.buffer, l.writing = l.writing, l.buffer
	l.atOnce = false
	if l.lost > 0 {
		l.writing = appendLine(l.writing, "", slog.LevelWarn, time.Now(), "Log lines dropped")
		l.writing = append(appendAttr(l.writing, slog.Int("lines", l.lost)), "}\n"...)
		l.lost = 0
	}
	return l.writing
}

// timestamp is a time in the format of every time that leaves the service: RFC 3339 in UTC with six
// fractional digits.
type timestamp struct{ time.Time }

// nowAfter returns the current time, or t plus a microsecond if the clock has not passed t.
func nowAfter(t timestamp) timestamp {
	now := time.Now().Truncate(time.Microsecond)
	if next := t.Add(time.Microsecond); now.Before(next) {
		now = next
	}
	return timestamp{now}
}

// MarshalJSON implements json.Marshaler.
func (t timestamp) MarshalJSON() ([]byte, error) {
	return t.appendJSON(make([]byte, 0, 32)), nil
}

// String implements fmt.Stringer.
func (t timestamp) String() string { return strings.Trim(string(t.appendJSON(nil)), `"`) }

// appendJSON formats seconds with time.RFC3339, for which package time has a fast path, and appends
// the microseconds.
func (t timestamp) appendJSON(b []byte) []byte {
	b = t.UTC().AppendFormat(append(b, '"'), time.RFC3339)
	b[len(b)-1] = '.' // replaces the Z
	for micro, unit := t.Nanosecond()/1000, 100_000; unit > 0; unit /= 10 {
		b = append(b, '0'+byte(micro/unit%10)) // #nosec G115 -- a digit
	}
	return append(b, `Z"`...)
}

// appendJSONString appends text as a JSON string. It leaves text that needs escapes to
// encoding/json.
func appendJSONString(b []byte, text string) []byte {
	for i := range len(text) {
		switch c := text[i]; {
		case c < ' ', c >= 0x7f, c == '"', c == '\\', c == '<', c == '>', c == '&':
			quoted, _ := json.Marshal(text) // cannot fail for a string
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), text...), '"')
}

// trace connects what happens because of a request. It is the only value that contexts carry here.
type trace struct {
	id     string // in logs, answers and events
	parent string // traceparent as it was received (W3C Trace Context, section 3.2), or ""
	state  string // tracestate as it was received (section 3.3), or ""
}

// traceKey is the key of the trace in a context.
type traceKey struct{}

func withTrace(ctx context.Context, t trace) context.Context {
	return context.WithValue(ctx, traceKey{}, t)
}

func withTraceID(ctx context.Context, id string) context.Context {
	return withTrace(ctx, trace{id: id})
}

// traceOf returns an empty trace if ctx belongs to neither a request nor an event.
func traceOf(ctx context.Context) trace {
	t, _ := ctx.Value(traceKey{}).(trace)
	return t
}

func traceID(ctx context.Context) string { return traceOf(ctx).id }

var (
	requestIDPattern   = regexp.MustCompile(`^[A-Za-z0-9._:-]{1,128}$`)
	traceparentPattern = regexp.MustCompile(
		`^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?$`)
	traceStateMember = regexp.MustCompile(
		`^[ \t]*([a-z0-9][a-z0-9_*/@-]{0,255}=[ -+\--<>-~]{0,255}[!-+\--<>-~])?[ \t]*$`)
)

const (
	maxTraceParent  = 255 // bytes of a traceparent that is passed on; version 00 has 55
	maxTraceState   = 2048
	maxStateMembers = 32
)

// requestTrace returns the trace of a request. Its id is the X-Request-Id, else the trace id of the
// traceparent, else a new UUID. Headers that are repeated or malformed are ignored.
func requestTrace(h http.Header) (t trace) {
	if parents := h["Traceparent"]; len(parents) == 1 {
		if t.id = parentTraceID(parents[0]); t.id != "" && isPrintable(parents[0], maxTraceParent) {
			t.parent, t.state = parents[0], traceState(h["Tracestate"])
		}
	}
	if ids := h["X-Request-Id"]; len(ids) == 1 && requestIDPattern.MatchString(ids[0]) {
		t.id = ids[0]
	} else if t.id == "" {
		t.id = newUUIDv4()
	}
	return t
}

// traceState returns the list in tracestate headers, or "" if it is malformed or too long.
func traceState(lines []string) string {
	list := strings.Join(lines, ",")
	members := strings.Split(list, ",")
	malformed := func(member string) bool { return !traceStateMember.MatchString(member) }
	if len(list) > maxTraceState || len(members) > maxStateMembers ||
		slices.ContainsFunc(members, malformed) {
		return ""
	}
	return list
}

// isPrintable reports whether text has at most n bytes, all of them printable ASCII characters.
func isPrintable(text string, n int) bool {
	other := func(c rune) bool { return c < ' ' || c > '~' }
	return len(text) <= n && !strings.ContainsFunc(text, other)
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

// newUUIDv4 returns a random UUID (RFC 9562, section 5.4), which is no secret.
func newUUIDv4() string {
	var b [16]byte
	binary.NativeEndian.PutUint64(b[:8], fast.Uint64()) // #nosec G404 -- not a secret
	binary.NativeEndian.PutUint64(b[8:], fast.Uint64()) // #nosec G404 -- not a secret
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

// formatUUID sets the version and the variant, and returns the text of a UUID.
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
