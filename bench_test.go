package main

import (
	"context"
	"log/slog"
	"net/http/httptest"
	"testing"

	"github.com/VictoriaMetrics/metrics"
)

// BenchmarkGetUser measures a GET request from its trace id to its log lines, without the network
// and a database.
func BenchmarkGetUser(b *testing.B) {
	server := newServer(settings{}, newLogger(discard{}, slog.LevelInfo), metrics.NewSet())
	m := newMemory()
	name := "John"
	if _, err := m.createUser(b.Context(), userInput{&name, &name, &name}, ""); err != nil {
		b.Fatal(err)
	}
	server.addRoutes(openRoutes(&health{}), keyedRoutes(&api{store: m}, &health{}))
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
	g := Group[int, int]{alone: 4, limit: 1, run: func(_ context.Context, keys []int) (map[int]int, error) {
		return map[int]int{keys[0]: 1}, nil
	}}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			g.Do(b.Context(), 1)
		}
	})
}
