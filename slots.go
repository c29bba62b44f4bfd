package main

import (
	"context"
	"errors"
	"sync"
	"time"
)

// slots limits how many calls do something at the same time: it holds a token for each of them.
type slots chan struct{}

// take waits for a slot until the budget ends, then with errUnavailable, or until the caller of ctx
// leaves, then with the error of ctx. After nil, free gives the slot back.
func (s slots) take(ctx, budget context.Context) error {
	select {
	case s <- struct{}{}:
		return nil
	default:
	}
	select {
	case s <- struct{}{}:
		return nil
	case <-budget.Done():
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) {
			return ctx.Err()
		}
	}
	return errUnavailable
}

func (s slots) free() { <-s }

// queues lets in one call for each key; further calls with the key wait in their order.
type queues[K comparable] struct {
	mu   sync.Mutex
	keys map[K]*queue
}

type queue struct {
	turn  slots // of one
	calls int   // in the queue or at work
}

// enter waits for the turn of the call until the deadline, then with errUnavailable, or until the
// caller of ctx leaves, then with the error of ctx. leave is called afterwards in any case.
func (q *queues[K]) enter(ctx context.Context, key K, deadline time.Time) (leave func(), err error) {
	q.mu.Lock()
	own := q.keys[key]
	if own == nil {
		own = &queue{turn: make(slots, 1)}
		q.keys[key] = own
	}
	own.calls++
	q.mu.Unlock()

	select {
	case own.turn <- struct{}{}:
	default:
		budget, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
		defer cancel()
		err = own.turn.take(ctx, budget)
	}
	return func() {
		if err == nil {
			own.turn.free()
		}
		q.mu.Lock()
		defer q.mu.Unlock()
		if own.calls--; own.calls == 0 {
			delete(q.keys, key)
		}
	}, err
}
