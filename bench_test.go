package main

import (
	"context"
	"io"
	"log/slog"
	"net/http/httptest"
	"testing"
	"time"
)

func BenchmarkGetUser(b *testing.B) {
	m := newMemory()
	name := "John"
	if _, err := m.createUser(b.Context(), userInput{&name, &name, &name}, ""); err != nil {
		b.Fatal(err)
	}
	log := newLogger(&logWriter{w: io.Discard}, slog.LevelInfo)
	server := newHandler(testDependencies(settings{}, m, log))
	r := httptest.NewRequest("GET", "/users/1", nil)
	b.ReportAllocs()
	for b.Loop() {
		server.ServeHTTP(httptest.NewRecorder(), r)
	}
}

func BenchmarkParseObject(b *testing.B) {
	body := []byte(`{"name": "John", "surname": "Doe", "password": "correct horse"}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseObject(body); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGroup(b *testing.B) {
	g := Group[int, int]{batchLimits: batchLimits{4, 1}}
	g.run = func(_ context.Context, keys []int) (map[int]int, error) {
		return map[int]int{keys[0]: 1}, nil
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			g.Do(b.Context(), 1)
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
