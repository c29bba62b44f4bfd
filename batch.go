package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

// Group turns concurrent calls into one: while few are under way a call runs at once, alone;
// those that come when more are share the next batch. Nobody waits for a timer, and a call
// never joins a batch that has started, so no answer is older than its question.
type Group[K comparable, V any] struct {
	// run answers a batch of keys, some of which may be equal. A key that it leaves out
	// has no value. Its context is none of the callers': it ends with the budget.
	run    func(ctx context.Context, keys []K) (map[K]V, error)
	budget time.Duration // from a batch's first call to its end, the wait included
	alone  int           // calls that may run at the same time, while nothing is shared
	limit  int           // shared batches that may run at the same time

	mu      sync.Mutex
	running int          // batches, of one call or several
	shared  int          // those of them that were waited for
	next    *batch[K, V] // joined by calls that cannot run at once; nil when one can
}

type batch[K comparable, V any] struct {
	deadline time.Time
	keys     []K
	claimed  bool // it is about to run; calls still join it
	values   map[K]V
	err      error
	done     chan struct{} // closed when values and err are set
}

// joinTurns is how often a shared batch lets other goroutines go first: where requests are
// being read just now, their calls join it. With nothing else to run it costs nothing.
const joinTurns = 8

// Do returns the value of key, and whether there is one. It fails with the error of the
// batch, which may be a *panicError, or with that of ctx when it ends before the batch.
// Its own deadline is the batch's: waiting callers need no timers.
func (g *Group[K, V]) Do(ctx context.Context, key K) (V, bool, error) {
	g.mu.Lock()
	b := g.next
	atOnce := b == nil && g.running < g.alone && g.shared < g.limit
	if b == nil {
		b = &batch[K, V]{deadline: time.Now().Add(g.budget), done: make(chan struct{})}
	}
	b.keys = append(b.keys, key)
	if atOnce {
		g.running++
	} else {
		g.next = b
	}
	g.mu.Unlock()

	if atOnce {
		g.finish(b, 0)
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

// share runs b, which others have waited for, after the last of them has joined.
func (g *Group[K, V]) share(b *batch[K, V]) {
	for range joinTurns {
		runtime.Gosched()
	}
	g.mu.Lock()
	g.next = nil
	g.mu.Unlock()
	g.finish(b, 1)
}

// finish runs b, lets its callers go, and has the batch that formed meanwhile run next.
func (g *Group[K, V]) finish(b *batch[K, V], shared int) {
	ctx, cancel := context.WithDeadline(context.Background(), b.deadline)
	defer func() {
		if v := recover(); v != nil {
			b.err = &panicError{value: v, stack: debug.Stack()}
		}
		cancel()
		close(b.done)
		g.mu.Lock()
		defer g.mu.Unlock()
		g.running--
		g.shared -= shared
		if next := g.next; next != nil && !next.claimed && g.shared < g.limit {
			g.running++
			g.shared++
			next.claimed = true
			go g.share(next)
		}
	}()
	b.values, b.err = g.run(ctx, b.keys)
}
