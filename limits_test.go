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

// What hashes passwords leaves a core to the rest, so it has to know whether there is any.
func TestMixedTraffic(t *testing.T) {
	t.Parallel()
	server := newHandler(testDependencies(settings{}, newMemory(), slog.New(slog.DiscardHandler))).(*server)
	for _, test := range []struct {
		method string
		mixed  bool
	}{{"POST", false}, {"GET", true}, {"POST", true}} {
		server.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(test.method, "/users", nil))
		if mixed := server.traffic.isMixed(); mixed != test.mixed {
			t.Errorf("after a %s the traffic is mixed: %t", test.method, mixed)
		}
	}
}

// TestHashLanesLimit counts how many passwords may be hashed at the same time, alone and in mixed traffic.
func TestHashLanesLimit(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ cores, alone, mixed int }{
		{1, 1, 1}, {2, 2, 1}, {3, 3, 2}, {8, 8, 7},
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
					t.Errorf("%d cores, mixed %t: %d at the same time, not %d", test.cores, mixed, working, want)
				}
				if _, err := h.enter(t.Context()); !errors.Is(err, errBusy) {
					t.Errorf("%d cores: a password beyond the queue: %v", test.cores, err)
				}
				time.Sleep(2 * time.Hour)
				if !h.queue.TryAcquire(int64(l.hashQueue)) {
					t.Errorf("%d cores: places are still taken", test.cores)
				}
			})
		}
	}
}

// TestHashLanesWait has other calls take the cores.
func TestHashLanesWait(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		busy  time.Duration // how long the other calls work
		leave time.Duration // 0: the caller stays
		want  error
		after time.Duration
	}{
		"no wait":         {},
		"turn in time":    {busy: hashWait / 2, after: hashWait / 2},
		"no turn in time": {busy: 2 * hashWait, want: errBusy, after: hashWait},
		"caller leaves":   {busy: 2 * hashWait, leave: hashWait / 2, want: context.Canceled, after: hashWait / 2},
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
					t.Errorf("enter: %v", err)
				}
				if waited := time.Since(start); waited != test.after {
					t.Errorf("waited for %v, not %v", waited, test.after)
				}
				time.Sleep(3 * hashWait)
			})
		})
	}
}

// TestPasswordFlood sends more passwords than can be hashed in time.
func TestPasswordFlood(t *testing.T) {
	t.Parallel()
	const requests = 300
	s := startService(t, memorySettings())
	statuses := make(chan int, requests)
	var group sync.WaitGroup
	for range requests {
		group.Go(func() {
			body := `{"name": "John", "surname": "Doe", "password": "` + secret + `"}`
			response, err := client.Post(s.url+"/users", "application/json", strings.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			if response.StatusCode == http.StatusServiceUnavailable && response.Header.Get("Retry-After") == "" {
				t.Error("503 without Retry-After")
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
			t.Errorf("GET during the flood: %d %s", a.status, a.body)
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
		t.Errorf("statuses and their number: %v", count)
	}
	// A machine of many cores may take them all.
	if tooMany := 2 * testLimits.hashQueue; requests > tooMany && count[503] == 0 {
		t.Errorf("nothing was refused: %v", count)
	}
	if total := s.do("GET", "/users?per_page=1", "").json(t, "total"); total != float64(count[201]) {
		t.Errorf("%v users after %d answers 201", total, count[201])
	}
}
