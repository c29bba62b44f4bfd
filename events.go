package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

const (
	userCreated = "user.created"
	userUpdated = "user.updated"
	userDeleted = "user.deleted"
)

const (
	relayRead     = 5000 // events at once: each time, the dead rows are passed over
	relayWindow   = 500  // events that are published before their confirms are awaited
	relayPoll     = 100 * time.Millisecond
	relayDrain    = 2 * time.Second
	leadInterval  = 500 * time.Millisecond // between two attempts to take the lead
	maxEventBytes = 64 << 10
	maxVersions   = 100_000 // users whose newest version the consumer remembers
)

// A backlog competes for the processors with the requests that come in. Where they are few
// it gives way to them, at most half of the time; where they are many it has to keep up.
const (
	relayAside = 100 // events, instead of relayWindow
	relayYield = 50 * time.Millisecond
	relayFlood = 50 // requests during a window
)

// event says that a user changed, and to which version. For one user the versions of
// the events have no gaps; a deletion is the version after the last one.
type event struct {
	outboxID   int64
	ID         string    `json:"event_id"`
	Type       string    `json:"event_type"`
	Data       eventData `json:"data"`
	TraceID    string    `json:"trace_id"`
	OccurredAt timestamp `json:"occurred_at"`
}

type eventData struct {
	UserID  int64 `json:"user_id"`
	Version int64 `json:"version"`
}

// outbox is where the relay gets the events of committed changes.
type outbox interface {
	// open connects to the backlog, which is the caller's to close.
	open(ctx context.Context) (backlog, error)
	// size counts the events that are pending, and how long the oldest has been.
	size(ctx context.Context) (pending int64, oldest time.Duration, err error)
	// changed receives soon after a change of this process was committed.
	changed() <-chan struct{}
}

// backlog holds the events that were not removed yet: what is in it is pending.
type backlog interface {
	// lead says whether this process is the one that relays. If so, it is until the
	// backlog fails or is closed.
	lead(ctx context.Context) (bool, error)
	// pending returns up to limit events, for each user in the order of versions.
	pending(ctx context.Context, limit int) ([]event, error)
	remove(ctx context.Context, events []event) error
	close()
}

// broker takes events to consumers, at least once and in their order.
type broker interface {
	// publisher connects; the publisher is the caller's to close.
	publisher(ctx context.Context) (publisher, error)
	// consume calls connected once and then hands over message after message, until ctx
	// or the connection ends.
	consume(ctx context.Context, connected func(), to messageHandler) error
	// status is for /readyz.
	status() string
}

type publisher interface {
	// publish returns how many events, from the first on, the broker has for certain.
	// After an error the publisher is of no more use.
	publish(ctx context.Context, events []event) (int, error)
	// closed says whether the connection is gone.
	closed() bool
	close()
}

var errBrokerGone = errors.New("the broker closed the connection")

// messageHandler gets each message at least once.
type messageHandler interface {
	// handle fails with errUnreadable for a message that is to be put aside.
	handle(ctx context.Context, body []byte) error
	// commit makes certain what was done about all messages so far. They are acknowledged
	// after it, or come again where it fails.
	commit() error
}

// errUnreadable is a message that no consumer of this version can handle.
var errUnreadable = errors.New("unreadable message")

// poke makes a channel of capacity 1 ready to receive.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// relay moves events from the outbox to the broker. Any number may run; one leads.
type relay struct {
	outbox    outbox
	broker    broker
	traffic   *traffic
	log       *slog.Logger
	leads     *metrics.Gauge
	published *metrics.Counter
}

func newRelay(o outbox, b broker, t *traffic, log *slog.Logger, set *metrics.Set) *relay {
	return &relay{
		outbox:    o,
		broker:    b,
		traffic:   t,
		log:       log,
		leads:     set.NewGauge("relay_leader", nil),
		published: set.NewCounter("events_published_total"),
	}
}

// run relays until ctx ends. Then it publishes what is pending, for relayDrain at most.
func (r *relay) run(ctx context.Context) {
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	context.AfterFunc(ctx, func() { time.AfterFunc(relayDrain, cancel) })
	keepUp(ctx, r.log, "relay", func(restored func()) error {
		return r.session(ctx, work, restored)
	})
}

// session relays over one connection to the broker and one to the outbox. It returns nil
// only when ctx has ended and nothing is pending.
func (r *relay) session(ctx, work context.Context, restored func()) error {
	p, err := r.broker.publisher(ctx)
	if err != nil {
		return fmt.Errorf("connecting to the broker: %w", err)
	}
	defer p.close()
	b, err := r.outbox.open(ctx)
	if err != nil {
		return fmt.Errorf("connecting to the outbox: %w", err)
	}
	defer b.close()
	if err := waitForLead(ctx, p, b, restored); err != nil {
		return fmt.Errorf("taking the lead: %w", err)
	}
	r.leads.Set(1)
	defer r.leads.Set(0)
	for {
		n, err := r.relayOnce(work, p, b)
		if err != nil {
			return err
		}
		restored()
		if n == 0 && ctx.Err() != nil {
			return nil
		}
		if p.closed() {
			return errBrokerGone
		}
		if n == relayRead {
			continue
		}
		select {
		case <-ctx.Done():
		case <-r.outbox.changed():
		case <-time.After(relayPoll):
		}
	}
}

// waitForLead asks again and again instead of waiting in the lock: a statement that waits
// keeps vacuum from the rows that died since.
func waitForLead(ctx context.Context, p publisher, b backlog, restored func()) error {
	for ; ctx.Err() == nil; sleep(ctx, leadInterval) {
		leads, err := b.lead(ctx)
		if leads || err != nil {
			return err
		}
		if p.closed() {
			return errBrokerGone
		}
		restored()
	}
	return ctx.Err()
}

// relayOnce publishes the oldest events, window by window, and returns how many.
func (r *relay) relayOnce(ctx context.Context, p publisher, b backlog) (n int, err error) {
	events, err := b.pending(ctx, relayRead)
	if err != nil {
		return 0, err
	}
	requests, patience := r.traffic.begun.Load(), relayYield
	for n < len(events) {
		came := r.traffic.begun.Load() - requests
		requests += came
		aside := (came > 0 || r.traffic.underWay() > 0) && came < relayFlood
		size := relayWindow
		if aside {
			size = relayAside
		}
		began := time.Now()
		window := events[n:min(n+size, len(events))]
		if err := r.publishWindow(ctx, p, b, window); err != nil {
			return n, err
		}
		n += len(window)
		patience = min(patience+time.Since(began), relayYield)
		if aside && n < len(events) {
			patience -= r.giveWay(ctx, patience)
		}
	}
	return n, nil
}

// publishWindow publishes events and removes those that the broker has: the longest run
// from the first on, so that no event is passed over.
func (r *relay) publishWindow(ctx context.Context, p publisher, b backlog, events []event) error {
	n, publishErr := p.publish(ctx, events)
	r.published.Add(n)
	var err error
	if n > 0 {
		err = b.remove(ctx, events[:n])
	}
	return errors.Join(publishErr, err)
}

// giveWay waits for the requests under way, and returns how long.
func (r *relay) giveWay(ctx context.Context, atMost time.Duration) time.Duration {
	began := time.Now()
	for r.traffic.underWay() > 0 && time.Since(began) < atMost {
		sleep(ctx, time.Millisecond)
	}
	return time.Since(began)
}

// consumer logs the events that it has not seen.
type consumer struct {
	log      *slog.Logger
	consumed *metrics.Counter
	skipped  *metrics.Counter
	seen     recent[int64, int64] // the newest version of a user
}

func newConsumer(log *slog.Logger, set *metrics.Set) *consumer {
	return &consumer{
		log:      log,
		consumed: set.NewCounter("events_consumed_total"),
		skipped:  set.NewCounter("events_skipped_total"),
		seen:     recent[int64, int64]{max: maxVersions},
	}
}

// run consumes until ctx ends.
func (c *consumer) run(ctx context.Context, b broker) {
	keepUp(ctx, c.log, "consumer", func(restored func()) error {
		return b.consume(ctx, restored, c)
	})
}

func (c *consumer) handle(ctx context.Context, body []byte) error {
	e, err := parseEvent(body)
	if err != nil {
		c.log.WarnContext(ctx, "Rejected message", "error", err, "bytes", len(body))
		return err
	}
	ctx = withTraceID(ctx, e.TraceID)
	attrs := []slog.Attr{
		slog.String("event_type", e.Type),
		slog.Int64("user_id", e.Data.UserID),
		slog.Int64("version", e.Data.Version),
		slog.String("event_id", e.ID),
	}
	if newest, ok := c.seen.get(e.Data.UserID); ok && newest >= e.Data.Version {
		c.skipped.Inc()
		c.log.LogAttrs(ctx, slog.LevelDebug, "Skipped duplicate event", attrs...)
		return nil
	}
	message := fmt.Sprintf("Received event %s with user_id=%d", e.Type, e.Data.UserID)
	c.log.LogAttrs(ctx, slog.LevelInfo, message, attrs...)
	c.seen.put(e.Data.UserID, e.Data.Version)
	c.consumed.Inc()
	return nil
}

// commit writes out the lines of the events. An event without its line is one not seen.
func (c *consumer) commit() error {
	if err := flushLog(c.log); err != nil {
		c.seen = recent[int64, int64]{max: maxVersions}
		return fmt.Errorf("logging events: %w", err)
	}
	return nil
}

// parseEvent fails with errUnreadable. Members that it does not know are no error.
func parseEvent(body []byte) (event, error) {
	if len(body) > maxEventBytes {
		return event{}, fmt.Errorf("%w: more than %d bytes", errUnreadable, maxEventBytes)
	}
	var e event
	if err := json.Unmarshal(body, &e); err != nil {
		return event{}, fmt.Errorf("%w: %w", errUnreadable, err)
	}
	switch e.Type {
	case userCreated, userUpdated, userDeleted:
	default:
		return event{}, fmt.Errorf("%w: unknown event_type", errUnreadable)
	}
	if e.ID == "" || e.Data.UserID < 1 || e.Data.Version < 1 {
		return event{}, fmt.Errorf("%w: event_id, user_id or version is missing", errUnreadable)
	}
	return e, nil
}

// inProcess is the broker of a service without RabbitMQ: what it has published has been
// handled.
type inProcess struct {
	to messageHandler
}

func (b inProcess) publisher(context.Context) (publisher, error) { return b, nil }

func (b inProcess) publish(ctx context.Context, events []event) (int, error) {
	for _, e := range events {
		body, err := json.Marshal(e)
		if err == nil {
			err = b.to.handle(ctx, body)
		}
		if err != nil {
			return 0, fmt.Errorf("handing over an event: %w", err)
		}
	}
	if err := b.to.commit(); err != nil {
		return 0, err
	}
	return len(events), nil
}

// consume has nothing to do: publish hands over.
func (b inProcess) consume(ctx context.Context, connected func(), _ messageHandler) error {
	connected()
	<-ctx.Done()
	return nil
}

func (b inProcess) closed() bool { return false }

func (b inProcess) close() {}

func (b inProcess) status() string { return "in-process" }

// keepUp runs a session again whenever it ends, until ctx does. The log has one line when
// a session fails and one when the next is restored; between attempts it waits with full
// jitter, below a bound that doubles from 0.25 s to 5 s.
func keepUp(ctx context.Context, log *slog.Logger, name string,
	session func(restored func()) error) {
	failures := 0
	restored := func() {
		if failures > 0 {
			log.Info("Event connection restored", "connection", name)
		}
		failures = 0
	}
	for ctx.Err() == nil {
		err := session(restored)
		if ctx.Err() != nil {
			return
		}
		level := slog.LevelDebug
		if failures++; failures == 1 {
			level = slog.LevelWarn
		}
		log.Log(ctx, level, "Event connection lost", "connection", name, "error", err)
		wait := min(250*time.Millisecond<<min(failures, 5), 5*time.Second)
		sleep(ctx, rand.N(wait)) // #nosec G404 -- no secret: replicas shall not come at once
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
