package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// growth measures the requests of a single client on a small and a large database, in turn.
func growth(s *servers, o options) (string, error) {
	sizes := []int{1000, o.large}
	var urls []string
	var b strings.Builder
	for i, size := range sizes {
		r, err := s.newRig(fmt.Sprint("growth_", i), size)
		if err != nil {
			return "", err
		}
		running, err := r.start(service)
		if err != nil {
			return "", err
		}
		urls = append(urls, running.url)
	}
	fmt.Fprintf(&b, "\n| request | p50 ms, %d users | p50 ms, %d users | ratio |\n|:--|--:|--:|--:|\n",
		sizes[0], sizes[1])
	for _, request := range []struct {
		method, path, body string // %d is an id or a random number
		times              int
	}{
		{"GET", "/users/%d", "", 3000},
		{"GET", "/users", "", 2000},
		{"GET", "/users?after=%d", "", 2000},
		{"GET", "/users?q=john+%d", "", 1000},        // few users
		{"GET", "/users?q=doe", "", 1000},            // all users
		{"GET", "/users?q=JOHN&after=%d", "", 1000},  // all users, from anywhere
		{"GET", "/users?q=john+1&after=%d", "", 200}, // every ninth, in blocks of consecutive ids
		{"PUT", "/users/%d", `{"name": "N%d"}`, 2000},
		{"POST", "/users", `{"name": "John", "surname": "Doe", "password": "correct horse"}`, 100},
	} {
		var elapsed [2][]float64 // ms
		for n := range 2 * request.times {
			i := (n + n/2) % 2 // each is first as often as the other
			path := withNumber(request.path, 1+rand.IntN(sizes[i]))
			body := withNumber(request.body, rand.Int())
			start := time.Now()
			if err := send(request.method, urls[i]+path, body); err != nil {
				return "", err
			}
			elapsed[i] = append(elapsed[i], time.Since(start).Seconds()*1000)
		}
		first, _, _ := spread(elapsed[0])
		second, _, _ := spread(elapsed[1])
		name := strings.Replace(request.method+" "+request.path, "/%d", "/{id}", 1)
		fmt.Fprintf(&b, "| %s | %.3f | %.3f | %.2f |\n", strings.Replace(name, "%d", "N", 1), first,
			second, second/first)
	}
	return b.String(), nil
}

func withNumber(text string, n int) string {
	return strings.Replace(text, "%d", fmt.Sprint(n), 1)
}
