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

// queues lets one call in for each key; further calls with the key wait in their order.
type queues[K comparable] struct {
	mu     sync.Mutex
	queues map[K]*queue
}

type queue struct {
	turn  slots // of one
	calls int   // in the queue or at work
}

// enter waits for the turn of the call until the deadline, then with errUnavailable, or until the
// caller of ctx leaves, then with the error of ctx. After nil, leave lets in the next call.
func (q *queues[K]) enter(ctx context.Context, key K, deadline time.Time) error {
	q.mu.Lock()
	if q.queues == nil {
		q.queues = make(map[K]*queue)
	}
	own := q.queues[key]
	if own == nil {
		own = &queue{turn: make(slots, 1)}
		q.queues[key] = own
	}
	own.calls++
	q.mu.Unlock()

	select {
	case own.turn <- struct{}{}:
		return nil
	default:
	}
	budget, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer cancel()
	err := own.turn.take(ctx, budget)
	if err != nil {
		q.forget(key, own)
	}
	return err
}

func (q *queues[K]) leave(key K) {
	q.mu.Lock()
	own := q.queues[key]
	q.mu.Unlock()
	own.turn.free()
	q.forget(key, own)
}

func (q *queues[K]) forget(key K, own *queue) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if own.calls--; own.calls == 0 {
		delete(q.queues, key)
	}
}
