package main

import (
	"fmt"
	"log"
	"strings"
	"time"
)

const (
	mixedTime  = 15 * time.Second // of the open loop
	searchTime = 5 * time.Second  // of the closed loop that finds the highest load
)

// mixedLoad finds the highest rate of mixed requests, and offers 70 % of it.
func mixedLoad(s *servers, o options) (string, error) {
	names := []string{service, plain}
	r, subjects, err := s.startAll(names)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("\n| subject | highest rate | offered | GET p50 ms | p99 | PUT p50 ms | p99 " +
		"| POST p50 ms | p99 | GET 503 | PUT 503 | POST 503 | no answer |\n" +
		"|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, name := range names {
		l := r.load(subjects[name], mixed)
		full := l.closedLoop(connections, o.short(searchTime))
		highest := full.where(answered).rate()
		log.Printf("mixed, %s: at most %.0f/s", name, highest)
		if err := r.settle(); err != nil {
			return "", err
		}
		got := l.openLoop(0.7*highest, o.short(mixedTime))
		fmt.Fprintf(&b, "| %s | %.0f | %.0f |", name, highest, got.rate())
		for _, k := range []kind{get, put, post} {
			p := got.of(k).percentiles(50, 99)
			fmt.Fprintf(&b, " %.2f | %.2f |", p[0], p[1])
		}
		for _, k := range []kind{get, put, post} {
			fmt.Fprintf(&b, " %d |", len(got.of(k).where(refused).samples))
		}
		fmt.Fprintf(&b, " %d |\n", len(got.where(failed).samples)+len(got.where(late).samples))
		if err := got.unexpected(); err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
	}
	return b.String(), r.finish()
}
