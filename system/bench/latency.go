package main

import (
	"fmt"
	"log"
	"sort"
	"strings"
	"sync/atomic"
	"time"
)

const (
	latencyTime   = 10 * time.Second // of each measurement
	latencyRounds = 2
)

// putTimes gives each PUT another user, so that a user's event belongs to one PUT. Its slices have
// an entry for each id, in ns since 1970; 0 means not yet.
type putTimes struct {
	last         atomic.Int64
	due, arrived []atomic.Int64
}

func newPutTimes(users int) *putTimes {
	return &putTimes{due: make([]atomic.Int64, users+1), arrived: make([]atomic.Int64, users+1)}
}

// next returns the next id, in turn, for a PUT that is due at some time.
func (t *putTimes) next(due time.Time) int {
	id := 1 + int(t.last.Add(1)-1)%(len(t.due)-1)
	t.due[id].CompareAndSwap(0, due.UnixNano())
	return id
}

// event notes the first event of a user.
func (t *putTimes) event(e event, at time.Time) {
	if id := e.Data.UserID; id < int64(len(t.arrived)) {
		t.arrived[id].CompareAndSwap(0, at.UnixNano())
	}
}

// outcome returns the times from when a PUT was due to the arrival of its event.
func (t *putTimes) outcome() (o outcome) {
	for id := range t.due {
		due, arrived := t.due[id].Load(), t.arrived[id].Load()
		if due > 0 && arrived > 0 {
			o.samples = append(o.samples, sample{put, 200, time.Duration(arrived - due)})
		}
	}
	return o
}

// cell is a cell of the table of latencies.
type cell struct {
	what, subject string
	rate          int
}

// latency measures how long requests and events take at fixed rates.
func latency(s *servers, o options) (string, error) {
	names := []string{service, publishing}
	r, subjects, err := s.startAll(names)
	if err != nil {
		return "", err
	}
	all := make(map[cell]outcome)
	for round := range latencyRounds {
		for _, rate := range []int{1000, 5000} {
			for i := range 2 * len(names) {
				k, name := [2]kind{get, put}[i/2], names[(i+round)%2]
				if err := r.latencyOf(subjects[name], k, rate, o.short(latencyTime), all); err != nil {
					return "", fmt.Errorf("%s at %d/s: %w", name, rate, err)
				}
			}
		}
	}
	return latencyTable(all), r.finish()
}

// latencyOf offers requests of one kind, and adds the results to all.
func (r *rig) latencyOf(s *subject, k kind, rate int, d time.Duration, all map[cell]outcome) error {
	l := r.load(s, mix{})
	l.mix[k] = 100
	l.puts = newPutTimes(r.users / 2)
	stop, err := r.listen(s.database, l.puts.event)
	if err != nil {
		return err
	}
	got := l.openLoop(float64(rate), d)
	if err := r.settle(); err != nil {
		return err
	}
	stop()
	add := func(what string, o outcome) {
		c := cell{what, s.name, rate}
		sum := all[c]
		sum.samples = append(sum.samples, o.samples...)
		all[c] = sum
	}
	if k == get {
		add("GET", got)
	} else {
		events := l.puts.outcome()
		add("PUT", got)
		add("PUT to event", events)
		if missing := len(got.where(answered).samples) - len(events.samples); missing > 0 {
			log.Printf("%s at %d/s: %d events did not arrive", s.name, rate, missing)
		}
	}
	log.Printf("%v at %d/s, %s: p50, p99 %.2f ms", [kinds]string{get: "GET", put: "PUT"}[k], rate,
		s.name, got.percentiles(50, 99))
	return got.unexpected()
}

func latencyTable(all map[cell]outcome) string {
	var cells []cell
	for c := range all {
		cells = append(cells, c)
	}
	sort.Slice(cells, func(i, j int) bool {
		a, b := cells[i], cells[j]
		return fmt.Sprintf("%5d %s %s", a.rate, a.what, b.subject) <
			fmt.Sprintf("%5d %s %s", b.rate, b.what, a.subject)
	})
	var b strings.Builder
	b.WriteString("\n| requests/s | time of | subject | p50 ms | p99 ms | p99.9 ms " +
		"| not answered 2xx |\n|--:|:--|:--|--:|--:|--:|--:|\n")
	for _, c := range cells {
		p := all[c].percentiles(50, 99, 99.9)
		bad := len(all[c].samples) - len(all[c].where(answered).samples)
		fmt.Fprintf(&b, "| %d | %s | %s | %.2f | %.2f | %.2f | %d |\n", c.rate, c.what, c.subject,
			p[0], p[1], p[2], bad)
	}
	return b.String()
}
