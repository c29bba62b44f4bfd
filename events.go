package main

// This file owns events: the relay, which moves them from the outbox to a broker, and the consumer.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

const (
	userCreated = "user.created"
	userUpdated = "user.updated"
	userDeleted = "user.deleted"

	sqlActor = "sql:" // begins the actor of a change by SQL; the role follows

	maxEventBytes   = 64 << 10
	maxTraceIDBytes = 255     // of an AMQP short string
	maxVersions     = 100_000 // users whose newest version the consumer remembers
)

// event reports that a user has changed, and to which version. The versions of a user's events have
// no gaps; a deletion has the version after the last one.
type event struct {
	outboxID   int64
	ID         string    `json:"event_id"`
	Type       string    `json:"event_type"`
	Data       eventData `json:"data"`
	TraceID    string    `json:"trace_id"`
	OccurredAt timestamp `json:"occurred_at"`

	// These are headers of the message; the body stays as the predecessor's.
	actor       string // the name of an API key, the subject of a token, or sqlActor and a role
	traceParent string // of the request, or ""
	traceState  string
}

type eventData struct {
	UserID  int64 `json:"user_id"`
	Version int64 `json:"version"`
}

// eventPattern matches the types that queues are bound to.
var eventPattern = regexp.MustCompile(`^user\.[a-z_]{1,64}$`)

// check fails with errUnreadable for an event that no broker could deliver.
func (e event) check() error {
	if !eventPattern.MatchString(e.Type) || len(e.TraceID) > maxTraceIDBytes ||
		len(e.actor)+len(e.traceParent)+len(e.traceState) > maxEventBytes {
		return fmt.Errorf("%w: its type or one of its headers cannot be sent", errUnreadable)
	}
	return nil
}

// headers returns the headers of the event's message: the trace, the actor, and the attributes of
// CloudEvents (its AMQP binding, section 3.1.3.1), whose source is the service.
func (e event) headers(appName string) map[string]any {
	h := map[string]any{
		"trace_id":                e.TraceID,
		"cloudEvents:specversion": "1.0",
		"cloudEvents:id":          e.ID,
		"cloudEvents:source":      "/" + url.PathEscape(appName),
		"cloudEvents:type":        e.Type,
		"cloudEvents:subject":     strconv.FormatInt(e.Data.UserID, 10),
		"cloudEvents:time":        e.OccurredAt.String(),
	}
	for name, value := range map[string]string{
		"actor": e.actor, "traceparent": e.traceParent, "tracestate": e.traceState,
	} {
		if value != "" {
			h[name] = value
		}
	}
	return h
}

// logSetAside logs an event that is removed without having been published. The line is its only
// copy, so the event stays if this fails, with errLineDropped, or if the log cannot be flushed.
func logSetAside(ctx context.Context, log *slog.Logger, e event, err error) error {
	id := e.TraceID[:min(len(e.TraceID), maxTraceIDBytes)]
	return logAt(withTraceID(ctx, id), log, slog.LevelError, time.Now(), "Undeliverable event removed",
		slog.Any("error", err), slog.String("event_id", e.ID), slog.String("event_type", e.Type),
		slog.Int64("user_id", e.Data.UserID), slog.Int64("version", e.Data.Version))
}

// broker delivers events to consumers, at least once and in order.
type broker interface {
	// publisher connects. The caller closes the publisher.
	publisher(ctx context.Context) (publisher, error)
	// consume connects, calls onReady once, and then passes messages to handler until ctx or the
	// connection ends.
	consume(ctx context.Context, onReady func(), handler messageHandler) error
	// state is shown by /readyz.
	state() state
}

// publisher is a connection that publishes. It is not safe for concurrent use.
type publisher interface {
	// publish takes up to relayWindow events of different users, and returns how many, from the
	// first one on, the broker has confirmed. After an error the publisher can only be closed.
	publish(ctx context.Context, events []event) (int, error)
	// closed reports whether the connection has ended. It may lag behind the broker; publish
	// reports the loss in any case.
	closed() bool
	close()
}

var errBrokerGone = errors.New("the broker closed the connection")

// messageHandler receives each message at least once.
type messageHandler interface {
	// handle handles messages, and returns the indexes of those that are unreadable and should be
	// put aside. If it fails, none counts as handled, and all are delivered again.
	handle(ctx context.Context, messages []message) (unreadable []int, err error)
}

// message is what a consumer receives.
type message struct {
	body  []byte
	actor string // of the header; "" in messages of older releases
}

// errUnreadable reports a message that no consumer of this version can handle.
var errUnreadable = errors.New("unreadable message")

// relay moves events from the outbox to the broker. Every replica runs one; the lease decides which
// one works.
//
// Two may work at the same time, such as one that was frozen and its successor. That costs
// duplicates but never the order: each publishes what is pending from the first event on, and
// removes only what the broker has confirmed. So a relay that sends a version of a user has a confirm
// of the version before, or did not find it any more, because the broker already had it.
type relay struct {
	outbox    outbox
	broker    broker
	log       *slog.Logger
	leads     *metrics.Gauge
	published *metrics.Counter
	renewed   time.Time // when the lease was last taken or renewed; zero: not held
	busy      bool      // the last read found events
	done      []event   // published or set aside, and not removed yet
	skip      []event   // of users whose other events the next read leaves out
}

// newRelay registers its metrics, so a set has at most one relay.
func newRelay(o outbox, b broker, log *slog.Logger, set *metrics.Set) *relay {
	return &relay{
		outbox:    o,
		broker:    b,
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
	keepUp(ctx, r.log, "relay", func(onReady func()) error {
		return r.session(ctx, work, onReady)
	})
}

// session relays over one connection to the broker. It returns nil only when ctx has ended and
// nothing is pending, another replica leads, or this one has only just taken the lease.
func (r *relay) session(ctx, work context.Context, onReady func()) error {
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
		if led || !leads { // a new leader has not published yet
			onReady()
		}
		if n == 0 && ctx.Err() != nil {
			return nil
		}
		if p.closed() {
			return errBrokerGone
		}
		if n < relayRead {
			r.wait(ctx, leads, n)
		}
	}
}

// wait returns when there may be events to publish, or when it is time to try to lead.
func (r *relay) wait(ctx context.Context, leads bool, published int) {
	changed, pause := r.outbox.changed(), relayPoll
	if !leads {
		changed, pause = nil, leadInterval
	}
	if published > 0 { // the next call removes them
		sleep(ctx, relayPause)
		return
	}
	select {
	case <-ctx.Done():
	case <-changed:
	case <-time.After(pause):
	}
}

// relayOnce publishes the oldest events, and returns how many it has read or skipped. The next call
// removes the confirmed ones. A relay that does not lead only tries to, and reads none.
//
// Events of one user leave one after the other, so a user with many of them could hold up the others.
// When only such users are left after relayTurn, relayOnce returns. If their events have filled the
// read, the next one skips these users too. A read that is not full ends that.
func (r *relay) relayOnce(ctx context.Context, p publisher, led bool) (
	leads bool, n int, err error) {
	limit := relayRead
	if !led {
		limit = 0
	}
	events, leads, err := r.next(ctx, limit)
	if err != nil || !leads {
		return leads, 0, err
	}
	began, full, skipped := time.Now(), len(events) == relayRead, r.skip
	n, r.skip = len(events)+len(skipped), nil
	pending := r.setAside(ctx, events)
	for window, rest := nextWindow(pending); len(window) > 0; window, rest = nextWindow(rest) {
		confirmed, err := p.publish(ctx, window)
		r.published.Add(confirmed)
		r.done = append(r.done, window[:confirmed]...)
		if err != nil {
			return true, 0, err
		}
		slow := len(window) < relayWindow && len(rest) > 0 && time.Since(began) >= relayTurn
		if slow && full {
			r.skip = append(skipped, window...)
		}
		if slow || time.Since(r.renewed) >= leaseTime-publishWait {
			break // the next call renews the lease
		}
	}
	return true, n, nil
}

// nextWindow divides events, whose slice it reuses, into those that are published together and the
// rest. A window has one event of a user at most, because the broker may refuse an event and take
// later ones: RabbitMQ does so while a queue gets a new leader, or is full for a moment. So a
// version is sent when the broker has confirmed the version before.
func nextWindow(events []event) (window, rest []event) {
	users := make(map[int64]bool)
	rest = events[:0]
	for _, e := range events {
		if len(window) == relayWindow || users[e.Data.UserID] {
			rest = append(rest, e)
		} else {
			window = append(window, e)
			users[e.Data.UserID] = true
		}
	}
	return window, rest
}

// next removes the events that are done. If this process leads, it returns the oldest of the
// others. The transaction that reads events also renews the lease, and its commit waits for the
// synchronous standbys, so that after it no failover can lose what was read. While there are no
// events, the lease is renewed every leadInterval only.
func (r *relay) next(ctx context.Context, limit int) (events []event, leads bool, err error) {
	for renew := r.busy || time.Since(r.renewed) >= leadInterval; ; renew = true {
		began := time.Now()
		events, leads, err = r.outbox.next(ctx, r.done, r.skip, limit, renew)
		if err != nil {
			return nil, false, err
		}
		r.done, r.busy = nil, len(events)+len(r.skip) > 0
		switch {
		case renew && leads:
			r.renewed = began
			return events, true, nil
		case renew:
			r.renewed = time.Time{}
			return nil, false, nil
		case !r.busy:
			return nil, true, nil
		}
	}
}

// resign removes the events that are done, and lets another replica lead at once. If it fails, the
// lease expires.
func (r *relay) resign(ctx context.Context) {
	r.leads.Set(0)
	r.renewed = time.Time{}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resignWait)
	defer cancel()
	if _, _, err := r.outbox.next(ctx, r.done, nil, 0, false); err == nil {
		r.done = nil
	}
	_ = r.outbox.resign(ctx)
}

// setAside returns the deliverable events. The others are done when their log lines are written.
func (r *relay) setAside(ctx context.Context, events []event) (deliverable []event) {
	var logged []event
	deliverable = slices.DeleteFunc(events, func(e event) bool {
		err := e.check()
		if err != nil && logSetAside(ctx, r.log, e, err) == nil {
			logged = append(logged, e)
		}
		return err != nil
	})
	if len(logged) > 0 && flushLog(r.log) == nil {
		r.done = append(r.done, logged...)
	}
	return deliverable
}

// consumer logs each event once.
type consumer struct {
	log      *slog.Logger
	consumed *metrics.Counter
	skipped  *metrics.Counter
	rejected *metrics.Counter
	seed     maphash.Seed        // of the hashes of event ids
	newest   recent[int64, seen] // by user
	fresh    int                 // events since the last flush
}

// seen is the newest version of a user that the consumer has received, and a hash of the event's
// id. It has no pointers, which the garbage collector would have to follow.
type seen struct {
	version int64
	event   uint64
}

// newConsumer registers its metrics. handle must not be called concurrently.
func newConsumer(log *slog.Logger, set *metrics.Set) *consumer {
	return &consumer{
		log:      log,
		consumed: set.NewCounter("events_consumed_total"),
		skipped:  set.NewCounter("events_skipped_total"),
		rejected: set.NewCounter("events_rejected_total"),
		seed:     maphash.MakeSeed(),
		newest:   recent[int64, seen]{max: maxVersions},
	}
}

// run consumes until ctx ends.
func (c *consumer) run(ctx context.Context, b broker) {
	keepUp(ctx, c.log, "consumer", func(onReady func()) error {
		return b.consume(ctx, onReady, c)
	})
}

// handle logs the events and waits until their lines are written, for logWait at most. After a
// failure, when they are delivered again, it logs only those whose lines were dropped. It stops at
// the first of these: a later version of the same user would make it an old one.
func (c *consumer) handle(ctx context.Context, messages []message) (
	unreadable []int, err error) {
	for i, m := range messages {
		e, err := parseEvent(m.body)
		e.actor = m.actor
		if err != nil {
			unreadable = append(unreadable, i)
			err = logAt(ctx, c.log, slog.LevelWarn, time.Now(), "Rejected message",
				slog.Any("error", err), slog.Int("bytes", len(m.body)))
		} else {
			err = c.logEvent(withTraceID(ctx, e.TraceID), e)
		}
		if err != nil {
			return nil, fmt.Errorf("logging events: %w", err)
		}
	}
	if err := flushLog(c.log); err != nil {
		return nil, fmt.Errorf("logging events: %w", err)
	}
	c.consumed.Add(c.fresh)
	c.rejected.Add(len(unreadable))
	c.fresh = 0
	return unreadable, nil
}

// logEvent logs an event, or what is wrong with it. It fails with errLineDropped, and the event
// counts as not seen then.
func (c *consumer) logEvent(ctx context.Context, e event) error {
	hash := maphash.String(c.seed, e.ID)
	newest, ok := c.newest.get(e.Data.UserID)
	isNew := !ok || newest.version < e.Data.Version
	level, message := slog.LevelDebug, "Skipped duplicate event"
	switch {
	case isNew:
		level = slog.LevelInfo
		message = fmt.Sprintf("Received event %s with user_id=%d", e.Type, e.Data.UserID)
	case newest.version == e.Data.Version && newest.event != hash:
		level = slog.LevelWarn
		message = "Conflicting event: the database was restored or lost changes in a failover"
	}
	err := logAt(ctx, c.log, level, time.Now(), message,
		slog.String("event_type", e.Type),
		slog.Int64("user_id", e.Data.UserID),
		slog.Int64("version", e.Data.Version),
		slog.String("event_id", e.ID),
		slog.String("actor", e.actor))
	switch {
	case err != nil:
		return err
	case isNew:
		c.newest.put(e.Data.UserID, seen{e.Data.Version, hash})
		c.fresh++
	default:
		c.skipped.Inc()
	}
	return nil
}

// parseEvent fails with errUnreadable. It accepts unknown members.
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
