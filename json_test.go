package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"testing"
	"time"
)

// FuzzAppendJSON holds what is encoded by hand against encoding/json.
func FuzzAppendJSON(f *testing.F) {
	for _, text := range []string{"John", "", "a\"b\\c", "<&>", "\x00\x1f\x7f", "\u2028é😀", "\xff", "\xed\xa0\x80"} {
		f.Add(int64(7), text, text, int64(1767268800123456))
	}
	f.Fuzz(func(t *testing.T, n int64, name, surname string, at int64) {
		type plainUser User // without the method
		type plainList struct {
			Users     []plainUser `json:"users"`
			Total     int64       `json:"total"`
			Page      int64       `json:"page,omitempty"`
			PerPage   int64       `json:"per_page"`
			NextAfter *int64      `json:"next_after"`
		}
		u := User{ID: n, Name: name, Surname: surname, Version: n,
			CreatedAt: timestamp{time.UnixMicro(at % 1e17)}, UpdatedAt: timestamp{time.UnixMicro(n % 1e17)}}
		page := max(n, 0)
		for list, plain := range map[*userList]plainList{
			{Users: []User{}, Total: n, Page: page, PerPage: at}: {[]plainUser{}, n, page, at, nil},
			{Users: []User{u}, Total: at, PerPage: n}:            {[]plainUser{plainUser(u)}, at, 0, n, nil},
			{Users: []User{u, u}, NextAfter: &n}:                 {[]plainUser{plainUser(u), plainUser(u)}, 0, 0, 0, &n},
		} {
			want, err := json.Marshal(plain)
			if err != nil {
				t.Fatal(err)
			}
			if got := list.appendJSON(nil); !bytes.Equal(got, want) {
				t.Errorf("%s\nnot\n%s", got, want)
			}
		}
	})
}

// TestLogValues writes every kind of value that a line can have.
func TestLogValues(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	logger := newLogger(log, slog.LevelDebug).With("always", true)
	ctx := withTraceID(context.Background(), "trace-1")
	logger.WarnContext(ctx, "A \"line\"\n", "text", "\xff\u2028", "error", errors.New("why"), "int", -7,
		"float", 0.25, "large", 1e21, "duration", time.Second, "list", []int{1})
	var line map[string]any
	if err := json.Unmarshal([]byte(log.String()), &line); err != nil {
		t.Fatalf("%v: %s", err, log)
	}
	for key, want := range map[string]any{"level": "WARN", "event": "A \"line\"\n", "trace_id": "trace-1",
		"always": true, "text": "\ufffd\u2028", "error": "why", "int": -7.0, "float": 0.25, "large": 1e21,
		"duration": "1s", "list": "[1]"} {
		if line[key] != want {
			t.Errorf("%s is %#v, not %#v", key, line[key], want)
		}
	}
}

func BenchmarkUserJSON(b *testing.B) {
	u := User{ID: 7, Name: "John", Surname: "Doe", CreatedAt: timestamp{time.Now()}, UpdatedAt: timestamp{time.Now()}}
	buffer := make([]byte, 0, 256)
	b.ReportAllocs()
	for b.Loop() {
		u.appendJSON(buffer)
	}
}

func BenchmarkLogLine(b *testing.B) {
	log := newLogger(discard{}, slog.LevelInfo)
	ctx := withTraceID(context.Background(), newUUIDv4())
	b.ReportAllocs()
	for b.Loop() {
		log.LogAttrs(ctx, slog.LevelInfo, "Request completed", slog.String("method", "GET"),
			slog.String("path", "/users/7"), slog.Int("status", 200),
			slog.Float64("duration_ms", 0.123), slog.Int64("bytes", 151))
	}
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
