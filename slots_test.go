package main

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestSlotsEndWaits fills the only slot: a call waits for its budget or until its caller leaves, and
// the next one gets a slot that was given back.
func TestSlotsEndWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := make(slots, 1)
		if err := s.take(t.Context(), t.Context()); err != nil {
			t.Fatal(err)
		}
		budget, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		leaving, leave := context.WithCancel(t.Context())
		time.AfterFunc(time.Millisecond, leave)
		for _, test := range []struct {
			name string
			ctx  context.Context
			want error
		}{
			{"the caller leaves", leaving, context.Canceled},
			{"the budget ends", t.Context(), errUnavailable},
			{"the budget is that of the caller", budget, errUnavailable},
		} {
			if err := s.take(test.ctx, budget); !errors.Is(err, test.want) {
				t.Errorf("%s: %v, not %v", test.name, err, test.want)
			}
		}
		s.free()
		if err := s.take(t.Context(), t.Context()); err != nil {
			t.Errorf("a slot that was given back: %v", err)
		}
	})
}

// TestQueuesKeepOrder has calls for one key come one after the other, some of which do not wait to the
// end. The others get their turn in their order, another key is free, and nothing is kept afterwards.
func TestQueuesKeepOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := queues[int64]{keys: make(map[int64]*queue)}
		deadline := time.Now().Add(time.Hour)
		first, err := q.enter(t.Context(), 1, deadline)
		if err != nil {
			t.Fatal(err)
		}
		leaving, leave := context.WithCancel(t.Context())
		var order []int
		results := make(chan error, 6)
		for i := range cap(results) {
			go func() {
				ctx, until := t.Context(), deadline
				switch i {
				case 1:
					ctx = leaving
				case 3:
					until = time.Now().Add(time.Second)
				}
				done, err := q.enter(ctx, 1, until)
				if err == nil {
					order = append(order, i)
				}
				done()
				results <- err
			}()
			synctest.Wait()
		}
		other, err := q.enter(t.Context(), 2, deadline)
		if err != nil {
			t.Errorf("another key: %v", err)
		}
		other()
		leave()
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that left: %v", err)
		}
		if err := <-results; !errors.Is(err, errUnavailable) {
			t.Errorf("a call whose deadline has passed: %v", err)
		}
		first()
		synctest.Wait()
		if want := []int{0, 2, 4, 5}; !slices.Equal(order, want) {
			t.Errorf("the order is %v, not %v", order, want)
		}
		if len(q.keys) != 0 {
			t.Errorf("%d keys are kept", len(q.keys))
		}
	})
}
