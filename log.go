package main

// This file owns the log: the format of a line, of times and of strings in it, and the buffered
// writer.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"sync"
	"time"
)

// newLogger returns a logger that writes one JSON object per line to out. The first keys are
// timestamp, level and event, then trace_id if the context has one. Lines at WARN and above are
// flushed at once.
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

// Handle implements slog.Handler. It fails if the line was dropped, or could not be flushed.
func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	var room [512]byte
	line := timestamp{r.Time}.appendJSON(append(room[:0], `{"timestamp":`...))
	line = appendJSONString(append(line, `,"level":`...), r.Level.String())
	line = appendJSONString(append(line, `,"event":`...), r.Message)
	if id := traceID(ctx); id != "" {
		line = appendJSONString(append(line, `,"trace_id":`...), id)
	}
	for _, a := range h.attrs {
		line = appendAttr(line, a)
	}
	r.Attrs(func(a slog.Attr) bool {
		line = appendAttr(line, a)
		return true
	})
	return h.out.writeLine(append(line, "}\n"...), r.Level >= slog.LevelWarn)
}

// logAt logs an event at the given time. The methods of slog.Logger would look up the source line,
// which is never shown.
func logAt(ctx context.Context, log *slog.Logger, level slog.Level, at time.Time, event string,
	attrs ...slog.Attr) {
	if log.Enabled(ctx, level) {
		r := slog.NewRecord(at, level, event, 0)
		r.AddAttrs(attrs...)
		_ = log.Handler().Handle(ctx, r)
	}
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

// errLinesLost reports that lines were dropped, in contrast to lines that are still buffered.
var errLinesLost = errors.New("log lines were dropped")

const (
	logDelay    = 20 * time.Millisecond // a line below WARN is written after this
	logCapacity = 64 << 10              // bytes
)

// logWriter buffers lines: under load, one write per line is most of what a log costs. Its methods
// may be called at the same time.
type logWriter struct {
	w io.Writer

	mu         sync.Mutex
	buffer     []byte
	unbuffered bool
	lost       error // the reason why lines were dropped since the last flush
}

// writeLine buffers a line, and flushes if atOnce is set. If the buffer is full and cannot be
// written, the line is dropped as a whole.
func (l *logWriter) writeLine(line []byte, atOnce bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.buffer)+len(line) > logCapacity {
		if err := l.flushLocked(); err != nil {
			l.lost = fmt.Errorf("%w: %w", errLinesLost, err)
			return err
		}
	}
	if len(l.buffer) == 0 && !l.unbuffered {
		l.flushSoon()
	}
	l.buffer = append(l.buffer, line...)
	if l.unbuffered || atOnce {
		return l.flushLocked()
	}
	return nil
}

// flush writes the buffered lines. It fails with errLinesLost if lines were dropped since the last
// call.
func (l *logWriter) flush() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	lost := l.lost
	l.lost = nil
	return errors.Join(l.flushLocked(), lost)
}

// stopBuffering writes the buffered lines, and from then on each line at once.
func (l *logWriter) stopBuffering() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unbuffered = true
	_ = l.flushLocked() // the lines stay in the buffer
}

// flushSoon flushes after logDelay, and again until it succeeds.
func (l *logWriter) flushSoon() {
	time.AfterFunc(logDelay, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.flushLocked() != nil {
			l.flushSoon()
		}
	})
}

// flushLocked writes the buffer and keeps what was not written. The caller holds the lock.
func (l *logWriter) flushLocked() error {
	n, err := l.w.Write(l.buffer)
	l.buffer = append(l.buffer[:0], l.buffer[n:]...)
	return err
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
