package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"strings"
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
	logger := newLogger(&logWriter{w: log}, slog.LevelDebug).With("always", true)
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

// FuzzLogLine writes a line of whatever a request can bring in, and what a mistake can.
func FuzzLogLine(f *testing.F) {
	for _, text := range []string{"GET", "/users", "", "a\nb\r\n", `"}{"`, `\`,
		"\x00\x1b\x7f", "\u2028\u2029", "\xff\xfe", "\xed\xa0\x80", "<&>", "😀", "timestamp"} {
		f.Add(text, text, text, text, int64(7), 0.25)
	}
	f.Add("", "", "", "", int64(math.MinInt64), math.MaxFloat64)
	f.Add("", "", "", "", int64(math.MaxInt64), math.SmallestNonzeroFloat64)
	f.Add("", "", "", "", int64(0), math.NaN())
	f.Add("", "", "", "", int64(0), math.Inf(-1))
	f.Fuzz(func(t *testing.T, message, key, text, id string, n int64, x float64) {
		log := &logBuffer{}
		out := &logWriter{w: log}
		logger := newLogger(out, slog.LevelDebug).With("always", text)
		ctx := withTraceID(context.Background(), id)
		logger.LogAttrs(ctx, slog.Level(n%20), message, slog.String("text", text), slog.Int64("n", n),
			slog.Float64("x", x), slog.Any("error", errors.New(text)), slog.Any("bytes", []byte(text)),
			slog.Uint64("u", math.Float64bits(x)), slog.Duration("d", time.Duration(n)),
			slog.Time("t", time.Unix(n, 0)),
			slog.Group("g"+key, slog.String(key, text)), slog.Any("nothing", nil), slog.Any("k"+key, id))
		out.flush()
		if slog.Level(n%20) < slog.LevelDebug {
			if log.String() != "" {
				t.Errorf("a line below the level: %s", log)
			}
			return
		}
		lines := log.String()
		if strings.Count(lines, "\n") != 1 || !strings.HasSuffix(lines, "\n") {
			t.Fatalf("not one line: %q", lines)
		}
		var line map[string]any
		decoder := json.NewDecoder(strings.NewReader(lines))
		decoder.UseNumber()
		if err := decoder.Decode(&line); err != nil {
			t.Fatalf("%v: %s", err, lines)
		}
		head := []string{"timestamp", "level", "event", "trace_id"}
		if id == "" {
			head = head[:3]
		}
		if got := keys(lines); !slices.Equal(got[:len(head)], head) {
			t.Errorf("the keys are %q", got)
		}
		want := map[string]string{"event": message, "always": text, "text": text, "error": text,
			"n": strconv.FormatInt(n, 10), "k" + key: id}
		if number, ok := line["x"].(json.Number); ok {
			if back, err := number.Float64(); err != nil || back != x {
				t.Errorf("%v is logged as %s", x, number)
			}
		} else { // JSON has no number for it
			want["x"] = slog.Float64Value(x).String()
		}
		for name, value := range want {
			// What is no UTF-8 is U+FFFD, byte for byte.
			if got := fmt.Sprint(line[string([]rune(name))]); got != string([]rune(value)) {
				t.Errorf("%q is %q, not %q", name, got, value)
			}
		}
	})
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
	log := newLogger(&logWriter{w: io.Discard}, slog.LevelInfo)
	ctx := withTraceID(context.Background(), newUUIDv4())
	b.ReportAllocs()
	for b.Loop() {
		log.LogAttrs(ctx, slog.LevelInfo, "Request completed", slog.String("method", "GET"),
			slog.String("path", "/users/7"), slog.Int("status", 200),
			slog.Float64("duration_ms", 0.123), slog.Int64("bytes", 151))
	}
}
