package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math/rand/v2"
	"regexp"
	"slices"
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
	leadInterval  = 500 * time.Millisecond // between two attempts to take or renew the lease
	resignWait    = 500 * time.Millisecond
	maxEventBytes = 64 << 10

	maxTraceIDBytes = 255     // of an AMQP short string
	maxVersions     = 100_000 // users whose newest version the consumer remembers
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

// eventPattern fits the types that queues are bound to.
var eventPattern = regexp.MustCompile(`^user\.[a-z_]{1,64}$`)

// check fails for what no broker could take to a queue, whatever its consumers know.
func (e event) check() error {
	if !eventPattern.MatchString(e.Type) || len(e.TraceID) > maxTraceIDBytes {
		return fmt.Errorf("%w: its type or trace id cannot be sent", errUnreadable)
	}
	return nil
}

// logSetAside is all that remains of an event.
func logSetAside(ctx context.Context, log *slog.Logger, e event, err error) {
	id := e.TraceID[:min(len(e.TraceID), maxTraceIDBytes)]
	log.LogAttrs(withTraceID(ctx, id), slog.LevelError, "Event set aside",
		slog.Any("error", err), slog.String("event_id", e.ID), slog.String("event_type", e.Type),
		slog.Int64("user_id", e.Data.UserID), slog.Int64("version", e.Data.Version))
}

type eventData struct {
	UserID  int64 `json:"user_id"`
	Version int64 `json:"version"`
}

// outbox holds the events of committed changes until they are removed: what is in it is pending.
type outbox interface {
	// lead takes or renews the lease of this process, and says whether it has it. What pending
	// returned before may be published only after that: lead makes sure that it cannot be lost.
	lead(ctx context.Context) (bool, error)
	// resign gives up the lease, so that another process can take it at once.
	resign(ctx context.Context) error
	// pending returns up to limit events, for each user in the order of versions.
	pending(ctx context.Context, limit int) ([]event, error)
	remove(ctx context.Context, events []event) error
	// size counts the events that are pending, and how long the oldest has been.
	size(ctx context.Context) (pending int64, oldest time.Duration, err error)
	// changed receives soon after a change of this process was committed.
	changed() <-chan struct{}
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

// wake makes a channel of capacity 1 ready to receive.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// relay moves events from the outbox to the broker. Any number may run; one leads at a time.
//
// Two may both believe that they lead, such as one that was frozen and one that took its place. That
// costs duplicates, but not the order: each publishes what is pending from the first event on, on
// one channel, and removes only what the broker has confirmed. So whoever sends a version of a user
// has sent the one before itself, or has not found it any more, because the broker had it.
type relay struct {
	outbox    outbox
	broker    broker
	traffic   *traffic
	log       *slog.Logger
	leads     *metrics.Gauge
	published *metrics.Counter
	renewed   time.Time // when the lease was last taken
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

// session relays over one connection to the broker. It returns nil only when ctx has ended and
// nothing is pending, or another replica leads.
func (r *relay) session(ctx, work context.Context, restored func()) error {
	p, err := r.broker.publisher(ctx)
	if err != nil {
		return fmt.Errorf("connecting to the broker: %w", err)
	}
	defer p.close()
	defer r.resign(work)
	for leads := false; ; {
		led, n := leads, 0
		if leads, n, err = r.relayOnce(work, p, led); err != nil {
			return err
		}
		r.leads.Set(oneIf(leads))
		if led || !leads { // a new leader has yet to publish
			restored()
		}
		if n == 0 && ctx.Err() != nil {
			return nil
		}
		if p.closed() {
			return errBrokerGone
		}
		if n == relayRead {
			continue
		}
		changed, pause := r.outbox.changed(), relayPoll
		if !leads {
			changed, pause = nil, leadInterval
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-time.After(pause):
		}
	}
}

// oneIf returns the value of a gauge of yes and no.
func oneIf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// resign lets another replica lead, whose broker may answer.
func (r *relay) resign(ctx context.Context) {
	r.leads.Set(0)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resignWait)
	defer cancel()
	_ = r.outbox.resign(ctx) // the lease ends by itself
}

// keepLead renews the lease unless that was done within leadInterval.
func (r *relay) keepLead(ctx context.Context) (leads bool, err error) {
	if time.Since(r.renewed) < leadInterval {
		return true, nil
	}
	return r.lead(ctx)
}

func (r *relay) lead(ctx context.Context) (leads bool, err error) {
	r.renewed = time.Time{}
	began := time.Now()
	if leads, err = r.outbox.lead(ctx); leads {
		r.renewed = began
	}
	return leads, err
}

// relayOnce publishes the oldest events and returns how many. First it reads them, then it renews
// the lease: after that what was read cannot be lost any more.
func (r *relay) relayOnce(ctx context.Context, p publisher, led bool) (leads bool, n int, err error) {
	if !led {
		leads, err = r.lead(ctx)
		return leads, 0, err
	}
	events, err := r.outbox.pending(ctx, relayRead)
	if err != nil {
		return false, 0, err
	}
	if len(events) == 0 {
		leads, err = r.keepLead(ctx)
		return leads, 0, err
	}
	if leads, err = r.lead(ctx); err != nil || !leads {
		return leads, 0, err
	}
	good, err := r.setAside(ctx, events)
	if err == nil {
		err = r.publishAll(ctx, p, good)
	}
	return true, len(events), err
}

// publishAll publishes events window by window, as long as this replica leads.
func (r *relay) publishAll(ctx context.Context, p publisher, events []event) error {
	requests, patience := r.traffic.begun.Load(), relayYield
	for n := 0; n < len(events); {
		if leads, err := r.keepLead(ctx); err != nil || !leads {
			return err
		}
		came := r.traffic.begun.Load() - requests
		requests += came
		aside := (came > 0 || r.traffic.underWay() > 0) && came < relayFlood
		size := relayWindow
		if aside {
			size = relayAside
		}
		began := time.Now()
		window := events[n:min(n+size, len(events))]
		if err := r.publishWindow(ctx, p, window); err != nil {
			return err
		}
		n += len(window)
		patience = min(patience+time.Since(began), relayYield)
		if aside && n < len(events) {
			patience -= r.giveWay(ctx, patience)
		}
	}
	return nil
}

// publishWindow publishes events and removes those that the broker has: the longest run
// from the first on, so that no event is passed over.
func (r *relay) publishWindow(ctx context.Context, p publisher, events []event) error {
	n, publishErr := p.publish(ctx, events)
	r.published.Add(n)
	var err error
	if n > 0 {
		err = r.outbox.remove(ctx, events[:n])
	}
	return errors.Join(publishErr, err)
}

// setAside removes what no broker could take, with a line in the log each, and returns the rest.
func (r *relay) setAside(ctx context.Context, events []event) ([]event, error) {
	var bad []event
	good := slices.DeleteFunc(events, func(e event) bool {
		err := e.check()
		if err != nil {
			logSetAside(ctx, r.log, e, err)
			bad = append(bad, e)
		}
		return err != nil
	})
	if len(bad) == 0 {
		return good, nil
	}
	return good, r.outbox.remove(ctx, bad)
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
	seed     maphash.Seed        // of the hashes of event ids
	newest   recent[int64, seen] // by user
	fresh    int                 // events since the last commit
}

// seen is the newest version of a user that the consumer got, and a hash of the event's id. It has no
// pointers, which the garbage collector would follow.
type seen struct {
	version int64
	event   uint64
}

func newConsumer(log *slog.Logger, set *metrics.Set) *consumer {
	return &consumer{
		log:      log,
		consumed: set.NewCounter("events_consumed_total"),
		skipped:  set.NewCounter("events_skipped_total"),
		seed:     maphash.MakeSeed(),
		newest:   recent[int64, seen]{max: maxVersions},
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
	if newest, ok := c.newest.get(e.Data.UserID); ok && newest.version >= e.Data.Version {
		c.skipped.Inc()
		if newest.version == e.Data.Version && newest.event != maphash.String(c.seed, e.ID) {
			c.log.LogAttrs(ctx, slog.LevelWarn,
				"Conflicting event: the database was restored or lost changes in a failover", attrs...)
			return nil
		}
		c.log.LogAttrs(ctx, slog.LevelDebug, "Skipped duplicate event", attrs...)
		return nil
	}
	message := fmt.Sprintf("Received event %s with user_id=%d", e.Type, e.Data.UserID)
	c.log.LogAttrs(ctx, slog.LevelInfo, message, attrs...)
	c.newest.put(e.Data.UserID, seen{e.Data.Version, maphash.String(c.seed, e.ID)})
	c.fresh++
	return nil
}

// commit flushes the log. If that fails because lines were dropped, the events since the last commit
// count as unseen.
func (c *consumer) commit() error {
	err := flushLog(c.log)
	if errors.Is(err, errLinesLost) {
		c.newest, c.fresh = recent[int64, seen]{max: maxVersions}, 0
	}
	if err != nil {
		return fmt.Errorf("logging events: %w", err)
	}
	c.consumed.Add(c.fresh)
	c.fresh = 0
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
// handled, or set aside where nobody could read it.
type inProcess struct {
	to  messageHandler
	log *slog.Logger
}

func (b inProcess) publisher(context.Context) (publisher, error) { return b, nil }

func (b inProcess) publish(ctx context.Context, events []event) (int, error) {
	for _, e := range events {
		body, err := json.Marshal(e)
		if err == nil {
			err = b.to.handle(ctx, body)
		}
		if errors.Is(err, errUnreadable) {
			logSetAside(ctx, b.log, e, err)
		} else if err != nil {
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
