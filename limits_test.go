package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestMixedTraffic checks that the traffic is mixed from the first request other than POST on.
// While it is mixed, one core does not hash passwords.
func TestMixedTraffic(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	server := newHandler(testDependencies(settings{}, newMemory(), log)).(*server)
	for _, test := range []struct {
		method string
		mixed  bool
	}{{"POST", false}, {"GET", true}, {"POST", true}} {
		server.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(test.method, "/users", nil))
		if mixed := server.traffic.isMixed(); mixed != test.mixed {
			t.Errorf("after %s: mixed %t, want %t", test.method, mixed, test.mixed)
		}
	}
}

// TestHashLanesLimit checks how many passwords are hashed concurrently, alone and in mixed traffic,
// and how many wait.
func TestHashLanesLimit(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ cores, alone, mixed int }{
		{cores: 1, alone: 1, mixed: 1}, {cores: 2, alone: 2, mixed: 1},
		{cores: 3, alone: 3, mixed: 2}, {cores: 8, alone: 8, mixed: 7},
	} {
		for _, mixed := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				l := newLimits(test.cores, math.MaxInt64)
				h := newHashLanes(l, &traffic{})
				want := test.alone
				if mixed {
					want = test.mixed
					h.traffic.otherDone.Store(time.Now().UnixNano())
				}
				working := 0
				for range l.hashQueue {
					go func() {
						if leave, err := h.enter(context.Background()); err == nil {
							working++
							time.Sleep(time.Hour)
							leave()
						}
					}()
				}
				synctest.Wait()
				if working != want {
					t.Errorf("%d cores, mixed %t: %d concurrent hashes, want %d",
						test.cores, mixed, working, want)
				}
				if _, err := h.enter(t.Context()); !errors.Is(err, errBusy) {
					t.Errorf("%d cores, full queue: error %v, want errBusy", test.cores, err)
				}
				time.Sleep(2 * time.Hour)
				if !h.queue.TryAcquire(int64(l.hashQueue)) {
					t.Errorf("%d cores: the queue is not empty after all hashes", test.cores)
				}
			})
		}
	}
}

// TestHashLanesWait checks how long a call waits for a core that another call occupies.
func TestHashLanesWait(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		busy  time.Duration // how long the other call works
		leave time.Duration // when the caller leaves, 0 for never
		want  error
		after time.Duration
	}{
		"free core":       {},
		"core in time":    {busy: hashWait / 2, after: hashWait / 2},
		"no core in time": {busy: 2 * hashWait, want: errBusy, after: hashWait},
		"caller leaves": {busy: 2 * hashWait, leave: hashWait / 2, want: context.Canceled,
			after: hashWait / 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				h := newHashLanes(newLimits(1, math.MaxInt64), &traffic{})
				if test.busy > 0 {
					leave, err := h.enter(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					time.AfterFunc(test.busy, leave)
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if test.leave > 0 {
					time.AfterFunc(test.leave, cancel)
				}
				start := time.Now()
				leave, err := h.enter(ctx)
				if !errors.Is(err, test.want) || (err == nil) != (leave != nil) {
					t.Errorf("enter: error %v, want %v", err, test.want)
				}
				if waited := time.Since(start); waited != test.after {
					t.Errorf("waited %v, want %v", waited, test.after)
				}
				time.Sleep(3 * hashWait)
			})
		})
	}
}

// TestPasswordFlood sends more passwords than can be hashed in time: some are refused with 503, and
// reads succeed meanwhile.
func TestPasswordFlood(t *testing.T) {
	t.Parallel()
	const requests = 300
	s := startService(t, memorySettings())
	statuses := make(chan int, requests)
	var group sync.WaitGroup
	for range requests {
		group.Go(func() {
			body := strings.NewReader(john)
			response, err := client.Post(s.url+"/users", "application/json", body)
			if err != nil {
				t.Error(err)
				return
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			if response.StatusCode == http.StatusServiceUnavailable &&
				response.Header.Get("Retry-After") == "" {
				t.Error("status 503 without Retry-After")
			}
			statuses <- response.StatusCode
		})
	}
	flood := make(chan struct{})
	go func() {
		group.Wait()
		close(statuses)
		close(flood)
	}()
	for over := false; !over; {
		if a := s.do("GET", "/users", ""); a.status != http.StatusOK {
			t.Errorf("GET /users during the flood: status %d, want 200: %s", a.status, a.body)
		}
		select {
		case <-flood:
			over = true
		case <-time.After(10 * time.Millisecond):
		}
	}
	count := make(map[int]int)
	for status := range statuses {
		count[status]++
	}
	if count[201] == 0 || count[201]+count[503] != requests {
		t.Errorf("answers by status: %v, want only 201 and 503, %d together", count, requests)
	}
	// A machine with many cores may hash all of them in time.
	if tooMany := 2 * testLimits.hashQueue; requests > tooMany && count[503] == 0 {
		t.Errorf("answers by status: %v, want some 503", count)
	}
	total := s.do("GET", "/users?per_page=1", "").json(t, "total")
	if total != float64(count[201]) {
		t.Errorf("%v users after %d answers with 201", total, count[201])
	}
}
