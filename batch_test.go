package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// slowGroup returns a Group that returns the text of each positive key after a second, and fails for
// negative keys. It appends the keys of each batch to batches.
func slowGroup(batches *[][]int) *Group[int, string] {
	return &Group[int, string]{
		budget: time.Minute, batchLimits: batchLimits{1, 1},
		run: func(_ context.Context, keys []int) (map[int]string, error) {
			*batches = append(*batches, slices.Clone(keys))
			time.Sleep(time.Second)
			values := make(map[int]string)
			for _, key := range keys {
				if key < 0 {
					return nil, fmt.Errorf("key %d", key)
				}
				if key > 0 {
					values[key] = fmt.Sprint(key)
				}
			}
			return values, nil
		},
	}
}

// TestGroupSharesNextBatch checks that calls during a batch share the next one.
func TestGroupSharesNextBatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var batches [][]int
		g := slowGroup(&batches)
		var callers sync.WaitGroup
		for _, key := range []int{7, 1, 2, 2, 0, 3} {
			callers.Go(func() {
				value, ok, err := g.Do(t.Context(), key)
				if err != nil || ok != (key != 0) || ok && value != fmt.Sprint(key) {
					t.Errorf("Do(%d): got %q, %t, %v", key, value, ok, err)
				}
			})
			synctest.Wait() // so that the calls come in this order
		}
		callers.Wait()
		if got, want := fmt.Sprint(batches), "[[7] [1 2 2 0 3]]"; got != want {
			t.Errorf("batches: got %s, want %s", got, want)
		}
		if g.Do(t.Context(), 8); len(batches) != 3 {
			t.Errorf("batches after another call: got %d, want 3", len(batches))
		}
	})
}

// TestGroupRunsCallsAlone checks that the first two calls run alone, that later calls share a batch, and
// that no call runs alone while a shared batch runs.
func TestGroupRunsCallsAlone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var batches [][]int
		g := slowGroup(&batches)
		g.alone = 2
		var callers sync.WaitGroup
		for i := range 7 {
			callers.Go(func() { g.Do(t.Context(), i+1) })
			synctest.Wait()
			time.Sleep(300 * time.Millisecond)
		}
		callers.Wait()
		if got, want := fmt.Sprint(batches), "[[1] [2] [3 4] [5 6 7]]"; got != want {
			t.Errorf("batches: got %s, want %s", got, want)
		}
	})
}

// TestGroupLimitsBatches checks that calls during two batches share a third one, which begins when the
// first of the two ends.
func TestGroupLimitsBatches(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var batches [][]int
		g := slowGroup(&batches)
		g.alone, g.batches = 2, 1
		start := time.Now()
		var took [5]time.Duration
		var callers sync.WaitGroup
		for i := range 5 {
			callers.Go(func() {
				g.Do(t.Context(), i+1)
				took[i] = time.Since(start)
			})
			synctest.Wait()
			time.Sleep(100 * time.Millisecond)
		}
		callers.Wait()
		const want = "[[1] [2] [3 4 5]] [1s 1.1s 2s 2s 2s]"
		if got := fmt.Sprint(batches, took); got != want {
			t.Errorf("batches and the time of each answer: got %s, want %s", got, want)
		}
	})
}

// TestGroupReturnsNewState checks that a call does not get the result of a batch that began before it.
func TestGroupReturnsNewState(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		state := "old"
		g := &Group[int, string]{budget: time.Minute, batchLimits: batchLimits{1, 1}}
		g.run = func(context.Context, []int) (map[int]string, error) {
			seen := state
			time.Sleep(time.Second)
			return map[int]string{1: seen}, nil
		}
		go g.Do(t.Context(), 1)
		synctest.Wait()
		state = "new"
		if value, _, _ := g.Do(t.Context(), 1); value != "new" {
			t.Errorf("Do: got the %s state, want the new one", value)
		}
	})
}

// TestGroupCallerContext checks that a call returns when its context is canceled or times out, and that
// the other calls of its batch are answered.
func TestGroupCallerContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var batches [][]int
		g := slowGroup(&batches)
		go g.Do(t.Context(), 1)
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		canceled := make(chan error, 1)
		go func() {
			_, _, err := g.Do(ctx, 2)
			canceled <- err
		}()
		synctest.Wait()
		cancel()
		synctest.Wait()
		if err := <-canceled; !errors.Is(err, context.Canceled) {
			t.Errorf("canceled call: got %v, want context.Canceled", err)
		}
		ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, _, err := g.Do(ctx, 3); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("timed-out call: got %v, want context.DeadlineExceeded", err)
		}
		if value, ok, err := g.Do(t.Context(), 4); value != "4" || !ok || err != nil {
			t.Errorf("other call: got %q, %t, %v, want 4", value, ok, err)
		}
	})
}

// TestGroupBudget checks that calls fail when the budget of their batch ends. The budget begins with the
// first call of the batch.
func TestGroupBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := &Group[int, string]{budget: 4 * time.Second, batchLimits: batchLimits{1, 1}}
		g.run = func(ctx context.Context, _ []int) (map[int]string, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		start := time.Now()
		var took [4]time.Duration
		var callers sync.WaitGroup
		for i := range took {
			callers.Go(func() {
				if _, _, err := g.Do(t.Context(), i); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Do(%d): got %v, want context.DeadlineExceeded", i, err)
				}
				took[i] = time.Since(start)
			})
			synctest.Wait()
			time.Sleep(time.Second)
		}
		callers.Wait()
		if got, want := fmt.Sprint(took), "[4s 5s 5s 5s]"; got != want {
			t.Errorf("times of the answers: got %s, want %s", got, want)
		}
	})
}

// TestGroupFailures checks that calls return the error or panic of their batch, alone or shared, and that
// the next batch runs.
func TestGroupFailures(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := &Group[string, int]{budget: time.Minute, batchLimits: batchLimits{1, 1}}
		g.run = func(_ context.Context, keys []string) (map[string]int, error) {
			time.Sleep(time.Second)
			switch keys[0] {
			case "panic":
				panic("broken")
			case "fail":
				return nil, errors.New("failed")
			}
			return map[string]int{"ok": 1}, nil
		}
		for _, keys := range [][]string{{"panic", "fail", "ok"}, {"fail", "panic", "ok"}} {
			var callers sync.WaitGroup
			for _, key := range keys[:2] {
				callers.Go(func() {
					_, ok, err := g.Do(t.Context(), key)
					_, panicked := errors.AsType[*panicError](err)
					if ok || err == nil || panicked != (key == "panic") {
						t.Errorf("Do(%s): got %t, %v", key, ok, err)
					}
				})
				synctest.Wait()
			}
			callers.Wait()
			if value, ok, err := g.Do(t.Context(), "ok"); value != 1 || !ok || err != nil {
				t.Errorf("Do after %v: got %d, %t, %v, want 1", keys[:2], value, ok, err)
			}
		}
	})
}
