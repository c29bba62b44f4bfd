package main

import (
	"math"
	"testing"
	"testing/fstest"
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
