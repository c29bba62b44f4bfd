package main

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestQueuesKeepOrder makes several calls with one key, two of which stop waiting. It checks that
// the others get their turn in order, that another key is free, and that no key is kept afterwards.
func TestQueuesKeepOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := queues[int64]{keys: make(map[int64]*queue)}
		first, err := q.enter(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		leaving, leave := context.WithCancel(t.Context())
		var order []int
		results := make(chan error, 6)
		for i := range cap(results) {
			go func() {
				ctx := t.Context()
				switch i {
				case 1:
					ctx = leaving
				case 3:
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, time.Second)
					defer cancel()
				}
				done, err := q.enter(ctx, 1)
				if err == nil {
					order = append(order, i)
				}
				done()
				results <- err
			}()
			synctest.Wait()
		}
		other, err := q.enter(t.Context(), 2)
		if err != nil {
			t.Errorf("call with another key: %v", err)
		}
		other()
		leave()
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Errorf("call whose caller left: error %v, want %v", err, context.Canceled)
		}
		if err := <-results; !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("call past its deadline: error %v, want %v", err, context.DeadlineExceeded)
		}
		first()
		synctest.Wait()
		if want := []int{0, 2, 4, 5}; !slices.Equal(order, want) {
			t.Errorf("order %v, want %v", order, want)
		}
		if len(q.keys) != 0 {
			t.Errorf("%d keys after all calls, want 0", len(q.keys))
		}
	})
}
