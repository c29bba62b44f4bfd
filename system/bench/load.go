package main

import (
	"bufio"
	"cmp"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"
)

const (
	requestTimeout = 5 * time.Second
	maxConnections = 4000 // of an open loop; further requests wait for one, and their wait counts
)

// kind is a kind of request.
type kind uint8

const (
	get kind = iota
	list
	post
	put
	del
	kinds
)

// mix is the percentage of each kind of request.
type mix [kinds]int

var (
	mixed   = mix{get: 85, list: 4, post: 1, put: 9, del: 1}
	onlyGet = mix{get: 100}
	onlyPut = mix{put: 100}
)

func (m mix) pick(r *rand.Rand) kind {
	n := r.IntN(100)
	for k, share := range m {
		if n -= share; n < 0 {
			return kind(k)
		}
	}
	return get
}

// load is what a generator sends: requests for random users with ids up to half of users. A DELETE
// takes the highest id that none has taken, so that the user exists.
type load struct {
	address      string
	mix          mix
	users        int
	deleted      *atomic.Int64
	acknowledged *atomic.Int64 // counts successful PUT requests; may be nil
	puts         *putTimes     // may be nil
}

// id returns the id of a user for a request.
func (l load) id(k kind, due time.Time, r *rand.Rand) int {
	switch {
	case k == del:
		return l.users - int(l.deleted.Add(1)) + 1
	case k == put && l.puts != nil:
		return l.puts.next(due)
	}
	return 1 + r.IntN(max(l.users/2, 1))
}

// appendRequest appends a request as HTTP/1.1 to b.
func (l load) appendRequest(b []byte, k kind, id int, r *rand.Rand) []byte {
	method, body := [kinds]string{"GET", "GET", "POST", "PUT", "DELETE"}[k], ""
	switch k {
	case post:
		body = `{"name": "John", "surname": "Doe", "password": "correct horse"}`
	case put:
		body = `{"name": "N` + strconv.Itoa(r.IntN(1e9)) + `"}`
	}
	b = append(append(b, method...), " /users"...)
	if k != list && k != post {
		b = strconv.AppendInt(append(b, '/'), int64(id), 10)
	}
	b = append(append(b, " HTTP/1.1\r\nHost: "...), l.address...)
	if body != "" {
		b = append(b, "\r\nContent-Type: application/json\r\nContent-Length: "...)
		b = strconv.AppendInt(b, int64(len(body)), 10)
	}
	b = append(b, "\r\n\r\n"...)
	return append(b, body...)
}

// sample is the outcome of one request. Its time is that from the moment at which the request was
// due to the answer.
type sample struct {
	kind   kind
	status int16 // of the answer, or one of the values below
	took   time.Duration
}

// The statuses of requests without an answer.
const (
	broken   = 0  // the connection failed
	timedOut = -1 // no answer came in time
	unsent   = -2 // no connection was free in time
)

// outcome is the result of a load.
type outcome struct {
	samples []sample
	elapsed time.Duration // from the first request to the last, without the wait for its answer
}

// connection sends one request at a time. It dials when it has to.
type connection struct {
	load     load
	conn     net.Conn
	in       *bufio.Reader
	out      []byte
	response fasthttp.Response
	random   *rand.Rand
	samples  []sample
}

func newConnection(l load) *connection {
	return &connection{load: l, random: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))}
}

// send sends a request that was due at some time, and records the outcome. It never repeats one.
func (c *connection) send(k kind, due time.Time) {
	deadline := due.Add(requestTimeout)
	if time.Now().After(deadline) {
		c.samples = append(c.samples, sample{k, unsent, requestTimeout})
		return
	}
	status := int16(broken)
	if err := c.exchange(k, due, deadline); err == nil {
		status = int16(c.response.StatusCode())
	} else if time.Now().After(deadline) {
		status = timedOut
	}
	if c.conn != nil && (status <= 0 || c.response.ConnectionClose()) {
		c.close()
	}
	c.samples = append(c.samples, sample{k, status, time.Since(due)})
}

func (c *connection) exchange(k kind, due, deadline time.Time) (err error) {
	if c.conn == nil {
		dialer := net.Dialer{Deadline: deadline}
		if c.conn, err = dialer.Dial("tcp", c.load.address); err != nil {
			return err
		}
		c.in = bufio.NewReaderSize(c.conn, 2048)
	}
	if err := c.conn.SetDeadline(deadline); err != nil {
		return err
	}
	c.out = c.load.appendRequest(c.out[:0], k, c.load.id(k, due, c.random), c.random)
	if _, err := c.conn.Write(c.out); err != nil {
		return err
	}
	return c.response.Read(c.in)
}

func (c *connection) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// closedLoop sends requests over n connections for some time, each after the answer to the one
// before.
func (l load) closedLoop(n int, d time.Duration) outcome {
	connections := make([]*connection, n)
	begin := time.Now()
	var sending sync.WaitGroup
	for i := range connections {
		c := newConnection(l)
		connections[i] = c
		sending.Go(func() {
			defer c.close()
			for now := time.Now(); now.Sub(begin) < d; now = time.Now() {
				c.send(l.mix.pick(c.random), now)
				if c.conn == nil { // as a client would that was refused
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	sending.Wait()
	return l.gather(connections, d)
}

func (l load) gather(connections []*connection, elapsed time.Duration) (o outcome) {
	o.elapsed = elapsed
	for _, c := range connections {
		o.samples = append(o.samples, c.samples...)
	}
	if l.acknowledged != nil {
		l.acknowledged.Add(int64(len(o.of(put).where(answered).samples)))
	}
	return o
}

// arrival is a request that is due at some time.
type arrival struct {
	kind kind
	due  time.Time
}

// schedule returns the times of a Poisson process, after its start, and what arrives at them. The
// same rate and duration give the same schedule.
func schedule(m mix, rate float64, d time.Duration) (after []time.Duration, what []kind) {
	random := rand.New(rand.NewPCG(1, 2))
	for at := 0.0; ; {
		at += random.ExpFloat64() / rate
		if at >= d.Seconds() {
			return after, what
		}
		after = append(after, time.Duration(at*float64(time.Second)))
		what = append(what, m.pick(random))
	}
}

// pool gives arrivals to connections: to the one that became idle last, else to a new one, else to
// the next that becomes idle.
type pool struct {
	load load

	mu      sync.Mutex
	all     []*connection
	idle    []*connection
	waiting []arrival

	busy sync.WaitGroup
}

// openLoop sends requests at the times of a schedule, whether or not earlier ones were answered. It
// returns when all were answered or given up.
func (l load) openLoop(rate float64, d time.Duration) outcome {
	after, what := schedule(l.mix, rate, d)
	p := &pool{load: l}
	begin := time.Now()
	for i, at := range after {
		due := begin.Add(at)
		// A timer of Go may be late by 1 ms.
		for wait := time.Until(due); wait > 0; wait = time.Until(due) {
			pause := syscall.NsecToTimespec(int64(wait))
			syscall.Nanosleep(&pause, nil)
		}
		p.arrive(arrival{what[i], due})
	}
	elapsed := max(time.Since(begin), d)
	p.busy.Wait()
	for _, c := range p.all {
		c.close()
	}
	return l.gather(p.all, elapsed)
}

func (p *pool) arrive(a arrival) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var c *connection
	switch n := len(p.idle); {
	case n > 0:
		c, p.idle = p.idle[n-1], p.idle[:n-1]
	case len(p.all) < maxConnections:
		c = newConnection(p.load)
		p.all = append(p.all, c)
	default:
		p.waiting = append(p.waiting, a)
		return
	}
	p.busy.Go(func() {
		for ok := true; ok; a, ok = p.next(c) {
			c.send(a.kind, a.due)
		}
	})
}

// next returns the arrival that waits for the longest time. If none waits, c becomes idle.
func (p *pool) next(c *connection) (a arrival, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiting) == 0 {
		p.idle = append(p.idle, c)
		return a, false
	}
	a, p.waiting = p.waiting[0], p.waiting[1:]
	return a, true
}

// where returns the samples for which keep returns true.
func (o outcome) where(keep func(sample) bool) outcome {
	o.samples = slices.DeleteFunc(slices.Clone(o.samples), func(s sample) bool { return !keep(s) })
	return o
}

// of returns the samples of a kind of request.
func (o outcome) of(k kind) outcome {
	return o.where(func(s sample) bool { return s.kind == k })
}

func answered(s sample) bool { return s.status/100 == 2 }
func inTime(s sample) bool   { return answered(s) && s.took <= time.Second }
func refused(s sample) bool  { return s.status == 503 || s.status == 429 }
func failed(s sample) bool   { return s.status == broken }
func late(s sample) bool     { return s.status == timedOut || s.status == unsent }
func sent(s sample) bool     { return s.status != unsent }

// rate returns the number of samples per second.
func (o outcome) rate() float64 { return float64(len(o.samples)) / o.elapsed.Seconds() }

// percentiles returns percentiles of the times of successful requests, in ms.
func (o outcome) percentiles(ps ...float64) []float64 {
	o = o.where(answered)
	slices.SortFunc(o.samples, func(a, b sample) int { return cmp.Compare(a.took, b.took) })
	values := make([]float64, len(ps))
	for i, p := range ps {
		if n := len(o.samples); n > 0 {
			values[i] = o.samples[min(int(p/100*float64(n)), n-1)].took.Seconds() * 1000
		}
	}
	return values
}

// unexpected returns an error if a server answered with anything but success or a refusal.
func (o outcome) unexpected() error {
	for _, s := range o.samples {
		if s.status > 0 && !answered(s) && !refused(s) {
			return fmt.Errorf("unexpected answers with status %d", s.status)
		}
	}
	return nil
}
