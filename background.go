package main

// This file owns what runs beside the requests: how goroutines start, wait and end.

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"
)

// start runs f in a goroutine. The caller calls stop, which ends f's context and waits for f, but
// no longer than atMost.
func start(f func(context.Context)) (stop func(atMost time.Duration)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	return func(atMost time.Duration) {
		cancel()
		select {
		case <-done:
		case <-time.After(atMost):
		}
	}
}

// sleep returns after d, or when ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// wake makes a channel of capacity 1 ready to receive.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// keepUp runs session again whenever it ends, until ctx does. It logs the first failure in a row,
// and the recovery when session calls onReady. Between attempts it waits with full jitter, up to a
// bound that doubles from 0.5 s to 5 s, so that replicas do not reconnect at the same moment.
func keepUp(ctx context.Context, log *slog.Logger, name string,
	session func(onReady func()) error) {
	failures := 0
	onReady := func() {
		if failures > 0 {
			log.Info("Event connection restored", "connection", name)
		}
		failures = 0
	}
	for ctx.Err() == nil {
		err := session(onReady)
		if ctx.Err() != nil {
			return
		}
		level := slog.LevelDebug
		if failures++; failures == 1 {
			level = slog.LevelWarn
		}
		log.Log(ctx, level, "Event connection lost", "connection", name, "error", err)
		wait := min(250*time.Millisecond<<min(failures, 5), 5*time.Second)
		sleep(ctx, rand.N(wait)) // #nosec G404 -- jitter, not a secret
	}
}
