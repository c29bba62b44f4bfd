package main

import (
	"context"
	"sync"
)

// queues lets one call per key work at a time. Further calls with the key wait in the order in
// which they came.
type queues[K comparable] struct {
	mu   sync.Mutex
	keys map[K]*queue
}

type queue struct {
	turn  lane // of one slot
	calls int  // waiting or working
}

// enter waits for the turn of a call with key until ctx ends, and fails with the cause of that. The
// caller calls leave in any case.
func (q *queues[K]) enter(ctx context.Context, key K) (leave func(), err error) {
	q.mu.Lock()
	own := q.keys[key]
	if own == nil {
		own = &queue{turn: lane{slots(1)}}
		q.keys[key] = own
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
