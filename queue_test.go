package main

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestQueuesKeepOrder has calls for one key come one after the other, some of which do not wait to the
// end. The others get their turn in their order, another key is free, and nothing is kept afterwards.
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
			t.Errorf("another key: %v", err)
		}
		other()
		leave()
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that left: %v", err)
		}
		if err := <-results; !errors.Is(err, context.DeadlineExceeded) {
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
