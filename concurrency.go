package main

// This file owns the tools for goroutines: calls that share a batch, calls that wait in a queue,
// and functions that run in the background.

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

// Group merges concurrent calls into batches. The cost of a SQL statement is the round trip, hardly
// the row, so calls that arrive together should share one.
//
// A call runs at once, alone, if no batch runs. Otherwise it joins the next batch, which starts
// when the running one ends: the slower the statements, the larger the batches. A batch that takes
// longer than batchPatience no longer holds up the next one.
//
// A call never joins a batch that has started, so the answer is never older than the call. The
// batch runs under a context of its own: a caller who leaves does not cancel the others.
type Group[K comparable, V any] struct {
	// run answers a batch of keys, some of which may be equal. Keys without a value are left out of
	// the map.
	run    func(ctx context.Context, keys []K) (map[K]V, error)
	budget time.Duration // from a batch's first call to its end, including the wait

	mu   sync.Mutex
	busy bool         // a batch runs that has not exceeded batchPatience
	next *batch[K, V] // joined by calls while busy; nil if there are none
}

// batch is the calls that one run of a Group answers. Group.mu protects keys; values and err are
// written before done is closed and read after it.
type batch[K comparable, V any] struct {
	deadline time.Time
	keys     []K
	values   map[K]V
	err      error
	done     chan struct{} // closed when values and err are set
}

// panicError is a recovered panic.
type panicError struct {
	value any
	stack []byte
}

// Error implements error. The stack is for the log only.
func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// Do returns the value of key and whether there is one. It fails with the error of the batch, which
// may be a *panicError, or with that of ctx if it ends first. A call that runs its batch itself
// returns only when the batch ends.
func (g *Group[K, V]) Do(ctx context.Context, key K) (V, bool, error) {
	g.mu.Lock()
	b := g.next
	if b == nil {
		b = &batch[K, V]{deadline: time.Now().Add(g.budget), done: make(chan struct{})}
	}
	b.keys = append(b.keys, key)
	atOnce := !g.busy
	if atOnce {
		g.busy = true
	} else {
		g.next = b
	}
	g.mu.Unlock()

	if atOnce {
		g.serve(b)
	} else {
		select {
		case <-b.done:
		case <-ctx.Done():
			var none V
			return none, false, ctx.Err()
		}
	}
	value, ok := b.values[key]
	return value, ok, b.err
}

// serve runs b and wakes its callers. It starts the next batch once: at the end, or when b is late.
func (g *Group[K, V]) serve(b *batch[K, V]) {
	ctx, cancel := context.WithDeadline(context.Background(), b.deadline)
	late := time.AfterFunc(batchPatience, g.startNext)
	defer func() {
		if v := recover(); v != nil {
			b.err = &panicError{value: v, stack: debug.Stack()}
		}
		cancel()
		close(b.done)
		if late.Stop() {
			g.startNext()
		}
	}()
	b.values, b.err = g.run(ctx, b.keys)
}

// startNext starts the batch that has formed. If there is none, the next call runs at once.
func (g *Group[K, V]) startNext() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy = g.next != nil
	if g.busy {
		go g.share()
	}
}

// joinTurns is how often a batch yields the processor before it starts, so that calls whose
// requests are just being read can join. Yields are free when nothing else can run.
const joinTurns = 8

// share runs the batch that has formed.
func (g *Group[K, V]) share() {
	for range joinTurns {
		runtime.Gosched()
	}
	g.mu.Lock()
	b := g.next
	g.next = nil
	g.mu.Unlock()
	g.serve(b)
}

// queues lets a few calls per key work at a time. Further calls with the key wait in the order in
// which they came.
type queues[K comparable] struct {
	atOnce int // calls of a key that work
	most   int // calls of a key that work or wait

	mu   sync.Mutex
	keys map[K]*queue
}

// queue is the calls of one key. queues.mu protects calls.
type queue struct {
	turn  lane
	calls int // waiting or working
}

// newQueues returns empty queues.
func newQueues[K comparable](atOnce, most int) *queues[K] {
	return &queues[K]{atOnce: atOnce, most: most, keys: make(map[K]*queue)}
}

// enter waits for the turn of a call with key until ctx ends, and fails with the cause of that. It
// fails with errBusy if too many wait. The caller calls leave in any case.
func (q *queues[K]) enter(ctx context.Context, key K) (leave func(), err error) {
	q.mu.Lock()
	own := q.keys[key]
	if own == nil {
		own = &queue{turn: lane{slots(q.atOnce)}}
		q.keys[key] = own
	}
	if own.calls >= q.most {
		q.mu.Unlock()
		return func() {}, errBusy
	}
	own.calls++
	q.mu.Unlock()

	err = own.turn.enter(ctx)
	return func() {
		if err == nil {
			own.turn.leave()
		}
		q.mu.Lock()
		defer q.mu.Unlock()
		if own.calls--; own.calls == 0 {
			delete(q.keys, key)
		}
	}, err
}

// start runs f in a goroutine. The caller calls stop, which ends f's context and waits for f, but
// no longer than atMost; stop(0) does not wait. f must return soon after its context ends.
func start(f func(context.Context)) (stop func(atMost time.Duration)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	return func(atMost time.Duration) {
		cancel()
		select {
		case <-done:
		case <-time.After(atMost):
		}
	}
}

// sleep returns after d, or when ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// wake makes a channel of capacity 1 ready to receive.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// keepUp runs session again whenever it ends, until ctx does. It logs the first failure in a row,
// and the recovery when session calls onReady. Between attempts it waits with full jitter, up to a
// bound that doubles from 0.5 s to 5 s, so that replicas do not reconnect at the same moment.
func keepUp(ctx context.Context, log *slog.Logger, name string,
	session func(onReady func()) error) {
	failures := 0
	onReady := func() {
		if failures > 0 {
			log.Info("Event connection restored", "connection", name)
		}
		failures = 0
	}
	for ctx.Err() == nil {
		err := session(onReady)
		if ctx.Err() != nil {
			return
		}
		level := slog.LevelDebug
		if failures++; failures == 1 {
			level = slog.LevelWarn
		}
		log.Log(ctx, level, "Event connection lost", "connection", name, "error", err)
		wait := min(250*time.Millisecond<<min(failures, 5), 5*time.Second)
		sleep(ctx, rand.N(wait)) // #nosec G404 -- jitter, not a secret
	}
}
