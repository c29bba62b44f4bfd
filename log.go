package main

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"
)

// microseconds is how every time leaves the service: RFC 3339 in UTC, always six
// fractional digits.
const microseconds = "2006-01-02T15:04:05.000000Z"

// timestamp is a time that JSON shows in microseconds.
type timestamp struct{ time.Time }

func (t timestamp) MarshalJSON() ([]byte, error) {
	return t.UTC().AppendFormat(make([]byte, 0, 32), `"`+microseconds+`"`), nil
}

// newLogger writes one JSON object a line to w. Its first keys are timestamp, level and
// event, then trace_id where the context has one. Lines below WARN are written a moment
// later, together, or when flushLog asks for it.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	out := &logWriter{w: w}
	return slog.New(&logHandler{out: out, Handler: slog.NewJSONHandler(out, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			switch {
			case len(groups) > 0:
			case a.Key == slog.TimeKey:
				return slog.String("timestamp", a.Value.Time().UTC().Format(microseconds))
			case a.Key == slog.MessageKey:
				a.Key = "event"
			}
			return a
		},
	})})
}

// logHandler puts the trace id of the context in front of a record's own attributes.
type logHandler struct {
	slog.Handler
	out *logWriter
}

func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	if id := traceID(ctx); id != "" {
		traced := slog.NewRecord(r.Time, r.Level, r.Message, r.PC)
		traced.AddAttrs(slog.String("trace_id", id))
		r.Attrs(func(a slog.Attr) bool {
			traced.AddAttrs(a)
			return true
		})
		r = traced
	}
	err := h.Handler.Handle(ctx, r)
	if err == nil && r.Level >= slog.LevelWarn {
		err = h.out.flush()
	}
	return err
}

// flushLog writes out what a logger of newLogger has not written yet.
func flushLog(log *slog.Logger) error {
	return log.Handler().(*logHandler).out.flush()
}

const (
	logDelay    = 20 * time.Millisecond // for a line below WARN
	logCapacity = 64 << 10              // bytes
)

// logWriter collects lines: under load, a write for each of them is what a log costs.
type logWriter struct {
	w io.Writer

	mu     sync.Mutex
	buffer []byte
}

func (l *logWriter) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.buffer)+len(line) > logCapacity {
		if err := l.flushLocked(); err != nil {
			return 0, err // this line is lost; half a line never is
		}
	}
	if len(l.buffer) == 0 {
		l.flushSoon()
	}
	l.buffer = append(l.buffer, line...)
	return len(line), nil
}

func (l *logWriter) flushSoon() {
	time.AfterFunc(logDelay, func() {
		if l.flush() != nil {
			l.flushSoon()
		}
	})
}

func (l *logWriter) flush() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.flushLocked()
}

func (l *logWriter) flushLocked() error {
	n, err := l.w.Write(l.buffer)
	l.buffer = append(l.buffer[:0], l.buffer[n:]...)
	return err
}
