package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestLogValues checks how each kind of value is logged.
func TestLogValues(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	logger := newLogger(&logWriter{w: log}, slog.LevelDebug).With("always", true)
	ctx := withTraceID(context.Background(), "trace-1")
	logger.WarnContext(ctx, "A \"line\"\n", "text", "\xff\u2028", "error", errors.New("why"), "int", -7,
		"float", 0.25, "large", 1e21, "duration", time.Second, "list", []int{1})
	var line map[string]any
	if err := json.Unmarshal([]byte(log.String()), &line); err != nil {
		t.Fatalf("line %s: %v", log, err)
	}
	for key, want := range map[string]any{"level": "WARN", "event": "A \"line\"\n", "trace_id": "trace-1",
		"always": true, "text": "\ufffd\u2028", "error": "why", "int": -7.0, "float": 0.25, "large": 1e21,
		"duration": "1s", "list": "[1]"} {
		if line[key] != want {
			t.Errorf("%s: got %#v, want %#v", key, line[key], want)
		}
	}
}

// FuzzLogLine checks that a line is one JSON object with the logged values, whatever they are.
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
				t.Errorf("record below the level: got %s, want no line", log)
			}
			return
		}
		lines := log.String()
		if strings.Count(lines, "\n") != 1 || !strings.HasSuffix(lines, "\n") {
			t.Fatalf("got %q, want one line", lines)
		}
		var line map[string]any
		decoder := json.NewDecoder(strings.NewReader(lines))
		decoder.UseNumber()
		if err := decoder.Decode(&line); err != nil {
			t.Fatalf("line %s: %v", lines, err)
		}
		head := []string{"timestamp", "level", "event", "trace_id"}
		if id == "" {
			head = head[:3]
		}
		if got := keys(lines); !slices.Equal(got[:len(head)], head) {
			t.Errorf("keys: got %q, want first %q", got, head)
		}
		want := map[string]string{"event": message, "always": text, "text": text, "error": text,
			"n": strconv.FormatInt(n, 10), "k" + key: id}
		if number, ok := line["x"].(json.Number); ok {
			if back, err := number.Float64(); err != nil || back != x {
				t.Errorf("x: got %s, want %v", number, x)
			}
		} else { // JSON has no NaN or infinity
			want["x"] = slog.Float64Value(x).String()
		}
		for name, value := range want {
			// Each invalid byte becomes U+FFFD.
			if got := fmt.Sprint(line[string([]rune(name))]); got != string([]rune(value)) {
				t.Errorf("%q: got %q, want %q", name, got, string([]rune(value)))
			}
		}
	})
}
