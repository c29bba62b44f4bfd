package main

import (
	"context"
	"runtime/debug"
	"sync"
	"time"
)

// Group turns concurrent calls into one: a call that finds no batch under way runs at
// once, alone; those that come meanwhile share the next batch. Nobody waits for a timer,
// and a call never joins a batch that has started, so no answer is older than its question.
type Group[K comparable, V any] struct {
	// run answers a batch of keys, some of which may be equal. A key that it leaves out
	// has no value. Its context is not that of any caller.
	run func(ctx context.Context, keys []K) (map[K]V, error)
	// patience is how long a call waits for its batch.
	patience time.Duration

	mu   sync.Mutex
	busy bool
	next *batch[K, V] // joined by calls while busy
}

type batch[K comparable, V any] struct {
	keys   []K
	values map[K]V
	err    error
	done   chan struct{} // closed when values and err are set
}

// Do returns the value of key, and whether there is one. It fails with the error of the
// batch, which may be a *panicError, or with that of the context when its caller leaves or loses patience.
func (g *Group[K, V]) Do(ctx context.Context, key K) (V, bool, error) {
	g.mu.Lock()
	b := g.next
	if b == nil {
		b = &batch[K, V]{done: make(chan struct{})}
		g.next = b
	}
	b.keys = append(b.keys, key)
	first := !g.busy
	if first {
		g.busy, g.next = true, nil
	}
	g.mu.Unlock()

	if first {
		g.finish(context.WithoutCancel(ctx), b)
	} else {
		wait, cancel := context.WithTimeout(ctx, g.patience)
		defer cancel()
		select {
		case <-b.done:
		case <-wait.Done():
			var none V
			return none, false, wait.Err()
		}
	}
	value, ok := b.values[key]
	return value, ok, b.err
}

// finish runs b, lets its callers go, and has the batch that formed meanwhile run next.
func (g *Group[K, V]) finish(ctx context.Context, b *batch[K, V]) {
	defer func() {
		if v := recover(); v != nil {
			b.err = &panicError{value: v, stack: debug.Stack()}
		}
		close(b.done)
		g.mu.Lock()
		defer g.mu.Unlock()
		next := g.next
		g.busy, g.next = next != nil, nil
		if next != nil {
			go g.finish(ctx, next)
		}
	}()
	b.values, b.err = g.run(ctx, b.keys)
}
