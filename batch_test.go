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

// slowGroup answers each key with its text, a second later, and notes the batches.
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

func TestGroupSharesTheNextBatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var batches [][]int
		g := slowGroup(&batches)
		var callers sync.WaitGroup
		for _, key := range []int{7, 1, 2, 2, 0, 3} {
			callers.Go(func() {
				value, ok, err := g.Do(t.Context(), key)
				if err != nil || ok != (key != 0) || ok && value != fmt.Sprint(key) {
					t.Errorf("key %d: %q, %t, %v", key, value, ok, err)
				}
			})
			synctest.Wait() // so that the calls come in this order
		}
		callers.Wait()
		if got := fmt.Sprint(batches); got != "[[7] [1 2 2 0 3]]" {
			t.Errorf("the batches are %s", got)
		}
		if g.Do(t.Context(), 8); len(batches) != 3 {
			t.Errorf("a lone call made %d batches of 2", len(batches))
		}
	})
}

// TestGroupRunsAFewAlone has calls come one by one: two run alone, the rest shares, and while
// that batch runs nobody runs alone.
func TestGroupRunsAFewAlone(t *testing.T) {
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
		if got := fmt.Sprint(batches); got != "[[1] [2] [3 4] [5 6 7]]" {
			t.Errorf("the batches are %s", got)
		}
	})
}

// TestGroupKeepsToItsLimit has calls come while two batches run: they share the third, which
// begins when the first of the two ends.
func TestGroupKeepsToItsLimit(t *testing.T) {
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
		if got := fmt.Sprint(batches, took); got != "[[1] [2] [3 4 5]] [1s 1.1s 2s 2s 2s]" {
			t.Errorf("the batches and their ends are %s", got)
		}
	})
}

// TestGroupReadsNothingStale asks again while a batch runs: the answer must not come from
// that one.
func TestGroupReadsNothingStale(t *testing.T) {
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
			t.Errorf("a call got what was %s before it was made", value)
		}
	})
}

// TestGroupLetsCallersGo has one caller leave, one run out of time, and the others answered.
func TestGroupLetsCallersGo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var batches [][]int
		g := slowGroup(&batches)
		go g.Do(t.Context(), 1)
		synctest.Wait()
		ctx, leave := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() {
			_, _, err := g.Do(ctx, 2)
			left <- err
		}()
		synctest.Wait()
		leave()
		synctest.Wait()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("the caller that left got %v", err)
		}
		impatient, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, _, err := g.Do(impatient, 3); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the impatient caller got %v", err)
		}
		if value, ok, err := g.Do(t.Context(), 4); value != "4" || !ok || err != nil {
			t.Errorf("the patient caller got %q, %t, %v", value, ok, err)
		}
	})
}

// TestGroupKeepsToItsBudget has batches that never end by themselves: each caller is answered
// when the budget of its batch ends, which began with the batch's first call.
func TestGroupKeepsToItsBudget(t *testing.T) {
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
					t.Errorf("caller %d got %v", i, err)
				}
				took[i] = time.Since(start)
			})
			synctest.Wait()
			time.Sleep(time.Second)
		}
		callers.Wait()
		if got := fmt.Sprint(took); got != "[4s 5s 5s 5s]" {
			t.Errorf("callers were answered after %s", got)
		}
	})
}

// TestGroupSurvivesFailures has batches fail and panic, the first alone and the second
// shared: their callers are told, and the next batch runs.
func TestGroupSurvivesFailures(t *testing.T) {
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
						t.Errorf("%s: %t, %v", key, ok, err)
					}
				})
				synctest.Wait()
			}
			callers.Wait()
			if value, ok, err := g.Do(t.Context(), "ok"); value != 1 || !ok || err != nil {
				t.Errorf("after %v: %d, %t, %v", keys[:2], value, ok, err)
			}
		}
	})
}
