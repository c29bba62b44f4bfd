package main

// This file owns every limit of the service: how long things may take, how many may happen at the
// same time or per second, and who goes first. Whatever depends on the machine derives from the
// number of cores and the memory limit; times derive from the budget of one request. TestBudgets
// checks the inequalities that the comments state.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/http"
	"os"
	"path"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// requestBudget is how long a request may take once its body has arrived. The contract promises an
// answer within 5 s, also when the database does not answer.
const requestBudget = 5 * time.Second

// Shares of the request budget. workBudget limits the sum of those that follow each other.
const (
	workBudget      = requestBudget * 9 / 10 // all statements and waits of a change
	statementBudget = requestBudget * 4 / 5  // one statement, with the wait for a connection
	batchBudget     = requestBudget * 3 / 5  // a shared statement; another one may follow
	batchPatience   = requestBudget / 20     // how long it may hold up the next one
	connectBudget   = requestBudget * 2 / 5  // connecting to one database host
	allHostsBudget  = requestBudget * 3 / 5  // connecting to one of several hosts
	readyBudget     = requestBudget * 2 / 5  // a check of the database
	hashWait        = requestBudget * 2 / 5  // a password's wait for its turn
	cancelBudget    = requestBudget / 10     // the answer to a cancel request
)

// The timeouts of net/http. Zero would mean no limit.
const (
	readHeaderTimeout = 3 * time.Second
	readTimeout       = 2 * requestBudget           // a slow client may send for this long
	writeTimeout      = readTimeout + requestBudget // and then its budget
	idleTimeout       = 90 * time.Second            // load balancers keep connections for 60 s
	fullPause         = time.Second                 // between two closings of idle connections
	maxHeaderBytes    = 8 << 10
	maxBodyBytes      = 64 << 10
)

// Checks of the database. /readyz follows it within readyInterval + readyBudget, which is less than
// 3 s.
const (
	readyInterval = requestBudget / 10 // between two checks
	resetInterval = requestBudget / 5  // between two replacements of all connections
)

// The phases of a stop, in order. Together they take less than stopBudget.
const (
	stopBudget    = 10 * time.Second
	drainIdle     = requestBudget / 10               // idle connections: a client may be sending
	drainRequests = requestBudget + requestBudget/10 // requests in progress
	relayDrain    = 2 * time.Second                  // pending events
	resignWait    = requestBudget / 10               // giving up the lease
	drainConsumer = requestBudget / 10               // the messages in hand
	closeWait     = requestBudget / 10               // the connections to the database
)

// Starting against a database that does not answer.
const (
	databaseWait   = 60 * time.Second
	databaseRetry  = time.Second
	databaseReport = 10 * time.Second // between two lines in the log about the same error
	startUpkeep    = 10 * time.Second // the first run of what maintain repeats
	maxDenials     = 3                // attempts with a wrong password or a missing database
	maxRetries     = 2                // of a statement
)

// The relay. The first window after a read is always sent, so that slow reads cannot stop it; a
// further one only if its confirms arrive before the lease expires (leadInterval <= leaseTime -
// publishWait). Another replica takes over within 5 s (leaseTime + leadInterval).
const (
	leaseTime    = 3 * time.Second
	leadInterval = leaseTime / 6     // between two renewals, or two attempts to take the lease
	publishWait  = leaseTime * 2 / 3 // for the confirms of one window
	relayPoll    = 100 * time.Millisecond
	relayPause   = 5 * time.Millisecond // between two reads, so that events share their cost
	relayTurn    = relayPoll            // after which users with many events let others go first
	relayRead    = 5000                 // events of one read, which has to skip dead rows
	relayWindow  = 500                  // events in flight to the broker
)

// RabbitMQ. A heartbeat shows a frozen broker after one and a half intervals. RabbitMQ takes
// unacknowledged messages back after 30 minutes, which maxPause stays far below.
const (
	brokerTimeout    = 5 * time.Second // TCP and AMQP handshakes
	brokerWrite      = publishWait     // one write to the socket
	brokerGoodbye    = time.Second     // an orderly close
	brokerHeartbeat  = 10 * time.Second
	brokerBuffer     = 32 << 10 // bytes
	topologyInterval = 2 * time.Second
	consumerPrefetch = 64
	firstPause       = 500 * time.Millisecond // of a consumer whose log cannot be written
	maxPause         = 10 * time.Second
)

// Access tokens and the keys of the identity provider.
const (
	tokenLeeway  = time.Minute // the clocks of the provider and of the service may differ by this
	maxTokens    = 10_000      // that are remembered as valid
	maxSubject   = 255         // bytes of a subject or an issuer (OpenID Connect Core, section 2)
	keyWait      = requestBudget / 5
	keyBudget    = 2 * requestBudget // one refresh of the keys
	keyInterval  = time.Hour         // between two refreshes
	keyPause     = time.Minute       // between two refreshes because of unknown keys
	keyRetry     = time.Second       // the first pause after a refresh that failed
	maxKeysBytes = 1 << 20
)

// Database connections of a replica. Behind a pooler, three replicas share its usual 20.
const (
	defaultPoolSize = 8
	minPoolSize     = 6 // the default behind a pooler
	maxPoolSize     = 16
	reservedConns   = 2 // for the relay and for probes
)

// Maintenance of the tables.
const (
	upkeepInterval = time.Second
	keySweep       = time.Hour // between two passes over the idempotency keys
	keyPages       = 500       // table pages of 8 KiB that one statement of a pass reads
	foldFrom       = 50        // rows of user_counts, below which folding is not worth a statement
	foldMost       = 200_000   // rows that one statement folds
	foldBytes      = 1 << 20   // table size above which one row moves too, for vacuum to truncate
	vacuumInterval = 10 * time.Second
	vacuumBudget   = 5 * time.Minute
	indexPause     = time.Minute // after an attempt to build an index that failed
)

// What one of each takes, in bytes.
const (
	hashMemory       = 7168 << 10 // a password that is being hashed
	connectionMemory = 16 << 10   // with its buffers and stack
	requestMemory    = 16 << 10
	smallBody        = 4 << 10  // counts as part of the request
	sendBuffer       = 32 << 10 // of a connection, which Linux doubles
)

// limits are the bounds that depend on the machine.
type limits struct {
	cores       int
	memory      int64 // bytes for the Go runtime; math.MaxInt64 is no limit
	connections int
	requests    int   // in progress; more are answered 503
	bodies      int64 // bytes of the large bodies in progress
	hashes      int   // at the same time
	hashQueue   int   // passwords of one client that wait or are being hashed
	hash        argonCost
}

// newLimits divides a machine. Connections, requests and hashing each get at most a quarter of the
// memory, and large bodies an eighth, but none less than a minimum. hashQueue exceeds what a slow
// core hashes within hashWait, so there hashWait decides.
func newLimits(cores int, memory int64) limits {
	hashes := int(min(int64(cores), max(memory/4/hashMemory, 1)))
	return limits{
		cores:       cores,
		memory:      memory,
		connections: int(min(8192, max(memory/4/connectionMemory, 256))),
		requests:    int(min(4096, max(memory/4/requestMemory, 64))),
		bodies:      min(16<<20, max(memory/8, maxBodyBytes)),
		hashes:      hashes,
		hashQueue:   hashes * 128,
		hash:        newHashCost,
	}
}

// machineLimits returns the limits of this process: of the cores that Go would use by itself, and
// of GOMEMLIMIT, else the memory limit of the cgroup, else none. The runtime gets 7/8 of a cgroup's
// limit, because it does not count the binary, and may exceed its limit for a moment.
func machineLimits() limits {
	memory := debug.SetMemoryLimit(-1)
	if os.Getenv("GOMEMLIMIT") == "" {
		if cgroup := cgroupMemory(os.DirFS("/")); cgroup < math.MaxInt64 {
			memory = cgroup / 8 * 7
		}
	}
	return newLimits(runtime.GOMAXPROCS(0), memory)
}

// heapFloor is how many bytes of garbage may accumulate before a collection. Serving reads, the
// live heap is 4 MiB, and without a floor the collector would run 16 times a second.
const heapFloor = 16 << 20

// applyToRuntime sets what GOMEMLIMIT, GOGC and GOMAXPROCS do not. The floor of the heap is a block
// that is never touched, so that it takes no memory, but counts as live: raising GOGC instead would
// let a large heap, of passwords being hashed, grow by as much again. One thread more than cores
// lets the kernel choose between hashing and requests: on a busy core, the Go scheduler lets a
// request wait for 10 ms. The caller keeps the floor alive while the service runs.
func (l limits) applyToRuntime() (floor []byte) {
	if os.Getenv("GOGC") == "" {
		floor = make([]byte, heapFloor)
	}
	if l.memory < math.MaxInt64 {
		debug.SetMemoryLimit(l.memory + int64(len(floor)))
	}
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(l.cores + 1)
	}
	return floor
}

// cgroupMemory returns the lowest memory limit of this process's cgroup and its parents, in bytes,
// or math.MaxInt64. It reads cgroup v2 and v1.
func cgroupMemory(root fs.FS) int64 {
	lowest := int64(math.MaxInt64)
	cgroups, _ := fs.ReadFile(root, "proc/self/cgroup") // elsewhere than on Linux there is none
	for line := range strings.Lines(string(cgroups)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		mount, file := "sys/fs/cgroup", "memory.max"
		if fields[1] == "memory" {
			mount, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		}
		for dir := path.Join(mount, fields[2]); strings.HasPrefix(dir, mount); dir = path.Dir(dir) {
			text, _ := fs.ReadFile(root, path.Join(dir, file))
			limit, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
			if err == nil { // else "max", or no such file
				lowest = min(lowest, limit)
			}
		}
	}
	return lowest
}

// lane is what a call needs before it may work: a share of each of some limited resources. Calls
// get shares in the order in which they ask. Who needs fewer resources, or smaller shares, goes
// first.
type lane []share

// share is the part of a resource that a call occupies while it works.
type share struct {
	of   *semaphore.Weighted
	size int64
}

// slots returns a resource of n equal shares.
func slots(n int) share { return share{semaphore.NewWeighted(int64(max(n, 1))), 1} }

// enter waits for all shares until ctx ends, and fails with the cause of that. After nil, the
// caller calls leave when the work is done.
func (l lane) enter(ctx context.Context) error {
	for i, s := range l {
		if err := s.of.Acquire(ctx, s.size); err != nil {
			l[:i].leave()
			return context.Cause(ctx)
		}
	}
	return nil
}

// leave returns the shares that enter took.
func (l lane) leave() {
	for _, s := range l {
		s.of.Release(s.size)
	}
}

// traffic counts the requests in progress, and notices mixed traffic.
type traffic struct {
	requests  atomic.Int64 // in progress
	otherDone atomic.Int64 // when a request other than POST was last answered, in ns since 1970
}

// mixedFor is how long after a request other than POST one core stays reserved for such requests.
const mixedFor = 250 * time.Millisecond

// isMixed reports whether requests arrive that need no password hash. Requests in progress would
// not tell: while every core hashes, others wait before they are read.
func (t *traffic) isMixed() bool {
	return time.Since(time.Unix(0, t.otherDone.Load())) < mixedFor
}

// errBusy reports that more calls wait than can be served in time.
var errBusy = errors.New("too many calls are waiting")

// hashLanes decides when a password is hashed. Each client has a queue of its own, from which no
// more passwords come at a time than can be hashed: so clients take turns, however many passwords
// one of them sends.
type hashLanes struct {
	traffic      *traffic
	clients      *queues[string]
	queued       atomic.Int64 // passwords that wait or are being hashed
	patient      int64        // up to how many of them one core stays reserved
	alone, mixed lane
}

// newHashLanes lets all cores hash, but one less in mixed traffic: of cores * (cores-1) shares, a
// password takes cores-1, and in mixed traffic cores. While more passwords wait than patient, all
// cores hash in mixed traffic too, so that fewer are refused.
func newHashLanes(l limits, t *traffic) *hashLanes {
	n := int64(l.hashes)
	cores := semaphore.NewWeighted(max(n*(n-1), 1))
	return &hashLanes{
		traffic: t,
		clients: newQueues[string](l.hashes, l.hashQueue),
		patient: int64(l.hashQueue / 8),
		alone:   lane{{cores, max(n-1, 1)}},
		mixed:   lane{{cores, max(min(n, n*(n-1)), 1)}},
	}
}

// enter waits for the turn of a client's password. It fails with errBusy, or with the error of ctx
// when the caller leaves.
func (h *hashLanes) enter(ctx context.Context, client string) (leave func(), err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, hashWait, errBusy)
	defer cancel()
	h.queued.Add(1)
	leaveQueue, err := h.clients.enter(ctx, client)
	turn := h.alone
	if h.traffic.isMixed() && h.queued.Load() <= h.patient {
		turn = h.mixed
	}
	if err == nil {
		err = turn.enter(ctx)
	}
	if errors.Is(err, context.DeadlineExceeded) { // that of the caller
		err = errBusy
	}
	if err != nil {
		leaveQueue()
		h.queued.Add(-1)
		return nil, err
	}
	return func() {
		turn.leave()
		leaveQueue()
		h.queued.Add(-1)
	}, nil
}

// recent is a map that keeps the entries put last: at least max/2 of them, and at most max. It is
// not safe for concurrent use.
type recent[K comparable, V any] struct {
	max          int
	newer, older map[K]V
}

// get returns the value of key and whether it is still remembered.
func (r *recent[K, V]) get(key K) (V, bool) {
	if value, ok := r.newer[key]; ok {
		return value, true
	}
	value, ok := r.older[key]
	return value, ok
}

// put remembers a value, and forgets the oldest half of the entries if there are too many.
func (r *recent[K, V]) put(key K, value V) {
	if r.newer == nil || len(r.newer) >= r.max/2 {
		r.newer, r.older = make(map[K]V), r.newer
	}
	r.newer[key] = value
}

const maxClients = 100_000 // whose missing tokens a limiter remembers

// limiter gives each client tokens at a rate, up to a burst. It remembers every client that lacks
// tokens: a client that it has forgotten has all of them. When maxClients lack tokens, all further
// clients share the tokens of one.
type limiter[K comparable] struct {
	name  string        // of the policy, in the answer
	every time.Duration // between two tokens of a client
	burst int

	mu           sync.Mutex
	newer, older map[K]time.Time // when a client will have all tokens
	rotated      time.Time       // when newer became older
}

// newLimiter returns a limiter that gives each client perSecond tokens per second, and burst tokens
// at the start. name appears in the answers.
func newLimiter[K comparable](name string, perSecond float64, burst int) *limiter[K] {
	return &limiter[K]{name: name, burst: burst,
		every: time.Duration(float64(time.Second) / perSecond)}
}

// admit takes a token of the client, or fails with a 429. It sets the headers of
// draft-ietf-httpapi-ratelimit-headers, and Retry-After with the 429.
func (l *limiter[K]) admit(h http.Header, client K) error {
	lack, allowed := l.take(client, 1)
	full := time.Duration(l.burst) * l.every
	left := max(int((full-lack)/l.every), 0)
	h.Add("RateLimit-Policy", fmt.Sprintf(`%q;q=%d;w=%d`, l.name, l.burst, wholeSeconds(full)))
	h.Add("RateLimit", fmt.Sprintf(`%q;r=%d;t=%d`, l.name, left, wholeSeconds(lack)))
	if !allowed {
		h.Set("Retry-After", strconv.Itoa(max(wholeSeconds(lack+l.every-full), 1)))
		return newProblem(http.StatusTooManyRequests,
			"Too many requests; try again after Retry-After seconds")
	}
	return nil
}

// refund returns a token that admit took.
func (l *limiter[K]) refund(client K) { l.take(client, -1) }

// take takes n tokens of the client if it has them. lack is the time until the client will have all
// tokens again.
func (l *limiter[K]) take(client K, n int) (lack time.Duration, allowed bool) {
	full := time.Duration(l.burst) * l.every
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.newer == nil || now.Sub(l.rotated) > full { // all of older have all tokens
		l.newer, l.older, l.rotated = make(map[K]time.Time), l.newer, now
	}
	known := func(k K) bool { return !l.newer[k].IsZero() || !l.older[k].IsZero() }
	if len(l.newer)+len(l.older) >= maxClients && !known(client) {
		client = *new(K)
	}
	lack = max(l.newer[client].Sub(now), l.older[client].Sub(now), 0)
	next := max(lack+time.Duration(n)*l.every, 0)
	if allowed = next <= full; allowed {
		lack = next
	}
	l.newer[client] = now.Add(lack)
	if lack == 0 { // as if forgotten
		delete(l.newer, client)
		delete(l.older, client)
	}
	return lack, allowed
}

// wholeSeconds rounds up.
func wholeSeconds(d time.Duration) int { return int(math.Ceil(d.Seconds())) }
