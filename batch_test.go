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
		patience: 10 * time.Second,
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

// TestGroupReadsNothingStale asks again while a batch runs: the answer must not come from
// that one.
func TestGroupReadsNothingStale(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		state := "old"
		g := &Group[int, string]{patience: time.Minute}
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

// TestGroupLetsCallersGo has one caller leave, one lose patience, and the others answered.
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
		g.patience = time.Millisecond
		if _, _, err := g.Do(t.Context(), 3); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the impatient caller got %v", err)
		}
		g.patience = time.Minute
		if value, ok, err := g.Do(t.Context(), 4); value != "4" || !ok || err != nil {
			t.Errorf("the patient caller got %q, %t, %v", value, ok, err)
		}
	})
}

// TestGroupSurvivesFailures has batches fail and panic, the first alone and the second
// shared: their callers are told, and the next batch runs.
func TestGroupSurvivesFailures(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := &Group[string, int]{patience: time.Minute}
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
