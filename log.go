package main

import (
	"context"
	"io"
	"log/slog"
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
// event, then trace_id where the context has one.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(traceHandler{slog.NewJSONHandler(w, &slog.HandlerOptions{
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

// traceHandler puts the trace id of the context in front of a record's own attributes.
type traceHandler struct{ slog.Handler }

func (h traceHandler) Handle(ctx context.Context, r slog.Record) error {
	id := traceID(ctx)
	if id == "" {
		return h.Handler.Handle(ctx, r)
	}
	traced := slog.NewRecord(r.Time, r.Level, r.Message, r.PC)
	traced.AddAttrs(slog.String("trace_id", id))
	r.Attrs(func(a slog.Attr) bool {
		traced.AddAttrs(a)
		return true
	})
	return h.Handler.Handle(ctx, traced)
}
