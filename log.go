package main

import (
	"context"
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

// timestamp is a time as it leaves the service: RFC 3339 in UTC, always with six fractional
// digits.
type timestamp struct{ time.Time }

func (t timestamp) MarshalJSON() ([]byte, error) {
	return t.appendJSON(make([]byte, 0, 32)), nil
}

// newLogger writes one JSON object a line to w. Its first keys are timestamp, level and
// event, then trace_id where the context has one. Lines below WARN are written a moment
// later, together, or when flushLog asks for it.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(&logHandler{level: level, out: &logWriter{w: w}})
}

// logHandler formats records: two for each request, in less than half of the time that
// slog.JSONHandler takes to rename its keys.
type logHandler struct {
	level slog.Level
	attrs []slog.Attr // of every record
	out   *logWriter
}

func (h *logHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.level
}

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
	_, err := h.out.Write(append(line, "}\n"...))
	if err == nil && r.Level >= slog.LevelWarn {
		err = h.out.flush()
	}
	return err
}

// logInfo logs what happened at a time. Unlike a slog.Logger's methods it does not look up
// its caller, which is never shown.
func logInfo(ctx context.Context, log *slog.Logger, at time.Time, event string, attrs ...slog.Attr) {
	if log.Enabled(ctx, slog.LevelInfo) {
		r := slog.NewRecord(at, slog.LevelInfo, event, 0)
		r.AddAttrs(attrs...)
		_ = log.Handler().Handle(ctx, r)
	}
}

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
	return appendJSONString(line, v.String()) // also of an error, and of what is no number in JSON
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &logHandler{level: h.level, attrs: slices.Concat(h.attrs, attrs), out: h.out}
}

// WithGroup has no effect: the keys of a line are flat.
func (h *logHandler) WithGroup(string) slog.Handler { return h }

// errLinesLost reports that lines were dropped. Lines that could not be written yet are not.
var errLinesLost = errors.New("log lines were dropped")

// flushLog writes out what a logger of newLogger has not written yet. It fails with errLinesLost where
// lines were dropped since the last time.
func flushLog(log *slog.Logger) error {
	out := log.Handler().(*logHandler).out
	out.mu.Lock()
	defer out.mu.Unlock()
	lost := out.lost
	out.lost = nil
	return errors.Join(out.flushLocked(), lost)
}

// stopCollecting writes out what a logger of newLogger has not written yet, and from then on
// each line at once.
func stopCollecting(log *slog.Logger) error {
	out := log.Handler().(*logHandler).out
	out.mu.Lock()
	defer out.mu.Unlock()
	out.atOnce = true
	return out.flushLocked()
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
	atOnce bool
	lost   error // why lines were lost
}

func (l *logWriter) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.buffer)+len(line) > logCapacity {
		if err := l.flushLocked(); err != nil {
			l.lost = fmt.Errorf("%w: %w", errLinesLost, err) // this line; half a line never is
			return 0, err
		}
	}
	if len(l.buffer) == 0 && !l.atOnce {
		l.flushSoon()
	}
	l.buffer = append(l.buffer, line...)
	if l.atOnce {
		return len(line), l.flushLocked()
	}
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
