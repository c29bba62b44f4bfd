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
	"testing/fstest"
	"testing/synctest"
	"time"
)

// TestBudgets checks the inequalities that the comments of limits.go promise.
func TestBudgets(t *testing.T) {
	t.Parallel()
	const contract = 5 * time.Second // for an answer, and for the takeover of the lease
	for _, test := range []struct {
		name        string
		less, limit time.Duration
	}{
		{"a request and its deadline", requestBudget, contract},
		{"the statements of a POST and its request", creationBudget, requestBudget - 1},
		{"a statement and its request", statementBudget, requestBudget - 1},
		{"a batch and a statement after it", batchBudget + cancelBudget, statementBudget - 1},
		{"connecting and its statement", connectBudget, statementBudget - 1},
		{"connecting to several hosts and its statement", allHostsBudget, statementBudget - 1},
		{"a hash and the statements of a POST", hashWait, creationBudget - 1},
		{"readiness and its deadline", readyBudget, 3*time.Second - 1},
		{"an answer and its timeout", readTimeout + requestBudget, writeTimeout},
		{"headers and the whole request", readHeaderTimeout, readTimeout - 1},
		{"all phases of a stop", drainIdle + drainRequests + relayDrain + resignWait + drainConsumer +
			closeWait, stopBudget - 1},
		{"a request and the drain of requests", requestBudget, drainRequests - 1},
		{"waiting for confirms and the lease", leadInterval + publishWait, leaseTime},
		{"the takeover of the lease and its deadline", leaseTime + leadInterval, contract},
		{"a write to the broker and the confirms", brokerWrite, publishWait},
		{"the topology and its deadline", topologyInterval, 3*time.Second - 1},
		{"a pause of the consumer and RabbitMQ's timeout", maxPause, 30*time.Minute - 1},
	} {
		if test.less > test.limit {
			t.Errorf("%s: %v, want at most %v", test.name, test.less, test.limit)
		}
	}
	if maxPoolSize > 20 || defaultPoolSize > maxPoolSize || 3*minPoolSize > 20 ||
		minPoolSize <= reservedConns+1 {
		t.Error("the pool sizes do not fit 20 connections of a replica, or of three behind a pooler")
	}
	if relayWindow > relayRead || consumerPrefetch < 1 {
		t.Error("a window of the relay is larger than what it reads")
	}
}

// TestNewLimits checks that the machine's limits stay within its memory.
func TestNewLimits(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for _, test := range []struct {
		cores  int
		memory int64
		want   limits
	}{
		{1, math.MaxInt64, limits{requests: 4096, hashes: 1, hashQueue: 64}},
		{2, math.MaxInt64, limits{requests: 4096, hashes: 2, hashQueue: 128}},
		{64, math.MaxInt64, limits{requests: 4096, hashes: 64, hashQueue: 4096}},
		{64, 512 * mib, limits{requests: 4096, hashes: 18, hashQueue: 1152}},
		{2, 56 * mib, limits{requests: 448, hashes: 2, hashQueue: 128}},
		{2, 8 * mib, limits{requests: 64, hashes: 1, hashQueue: 64}},
	} {
		test.want.cores, test.want.memory = test.cores, test.memory
		if got := newLimits(test.cores, test.memory); got != test.want {
			t.Errorf("%d cores, %d MiB: got %+v, want %+v", test.cores, test.memory/mib, got, test.want)
		}
	}
}

// TestCgroupMemory reads the limits of containers and services as Linux shows them.
func TestCgroupMemory(t *testing.T) {
	t.Parallel()
	const none = math.MaxInt64
	for name, test := range map[string]struct {
		files map[string]string
		want  int64
	}{
		"not Linux": {nil, none},
		"version 2, container": {map[string]string{
			"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "536870912\n"}, 512 << 20},
		"version 2, no limit": {map[string]string{
			"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, none},
		"version 2, parent with a lower limit": {map[string]string{
			"proc/self/cgroup":                                   "0::/system.slice/user.service\n",
			"sys/fs/cgroup/system.slice/memory.max":              "1000\n",
			"sys/fs/cgroup/system.slice/user.service/memory.max": "2000\n"}, 1000},
		"version 1": {map[string]string{
			"proc/self/cgroup": "9:cpu:/a\n8:memory:/docker/7\n",
			"sys/fs/cgroup/memory/docker/7/memory.limit_in_bytes": "3000\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":          "9223372036854771712\n"}, 3000},
		"version 1, path of the host": {map[string]string{
			"proc/self/cgroup":                           "8:memory:/docker/7\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "4000\n"}, 4000},
		"garbage": {map[string]string{"proc/self/cgroup": "::\n\n0\n0::/../..\n"}, none},
	} {
		root := fstest.MapFS{}
		for path, content := range test.files {
			root[path] = &fstest.MapFile{Data: []byte(content)}
		}
		if got := cgroupMemory(root); got != test.want {
			t.Errorf("%s: got %d, want %d", name, got, test.want)
		}
	}
}

// TestMixedTraffic checks that the first request other than POST makes the traffic mixed, and that
// a later POST does not change that.
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
