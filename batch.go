package main

import (
	"context"
	"runtime/debug"
	"sync"
)

// Group turns concurrent calls into one: while few are under way a call runs at once, alone;
// those that come when more are share the next batch. Nobody waits for a timer, and a call
// never joins a batch that has started, so no answer is older than its question.
type Group[K comparable, V any] struct {
	// run answers a batch of keys, some of which may be equal. A key that it leaves out
	// has no value. Its context has the values and the deadline of none of the callers.
	run   func(ctx context.Context, keys []K) (map[K]V, error)
	alone int // calls that may run at the same time, while nothing is shared
	limit int // shared batches that may run at the same time

	mu      sync.Mutex
	running int          // batches, of one call or several
	shared  int          // those of them that were waited for
	next    *batch[K, V] // joined by calls that cannot run at once; nil when one can
}

type batch[K comparable, V any] struct {
	keys   []K
	values map[K]V
	err    error
	done   chan struct{} // closed when values and err are set
}

// Do returns the value of key, and whether there is one. It fails with the error of the
// batch, which may be a *panicError, or with that of ctx when it ends before the batch.
func (g *Group[K, V]) Do(ctx context.Context, key K) (V, bool, error) {
	g.mu.Lock()
	b := g.next
	if b == nil {
		b = &batch[K, V]{done: make(chan struct{})}
	}
	b.keys = append(b.keys, key)
	atOnce := g.running < g.alone && g.shared < g.limit
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

// finish runs b, lets its callers go, and has the batch that formed meanwhile run next.
func (g *Group[K, V]) finish(b *batch[K, V], shared int) {
	defer func() {
		if v := recover(); v != nil {
			b.err = &panicError{value: v, stack: debug.Stack()}
		}
		close(b.done)
		g.mu.Lock()
		defer g.mu.Unlock()
		g.running--
		g.shared -= shared
		if next := g.next; next != nil && g.shared < g.limit {
			g.running++
			g.shared++
			g.next = nil
			go g.finish(next, 1)
		}
	}()
	b.values, b.err = g.run(context.Background(), b.keys)
}
