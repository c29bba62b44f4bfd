package main

// Tests of events.go and rabbitmq.go: the relay, the consumer, and both brokers.

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/VictoriaMetrics/metrics"
	amqp "github.com/rabbitmq/amqp091-go"
)

// newEvent returns an event with a new id, the trace id trace-1 and a fixed time.
func newEvent(eventType string, userID, version int64) event {
	return event{
		ID:         newUUIDv7(),
		Type:       eventType,
		Data:       eventData{userID, version},
		TraceID:    "trace-1",
		OccurredAt: timestamp{time.Date(2026, 1, 1, 12, 0, 0, 123456000, time.UTC)},
	}
}

func encode(t *testing.T, e event) []byte {
	t.Helper()
	body, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// TestEventJSON checks the JSON of an event, which other services read.
func TestEventJSON(t *testing.T) {
	t.Parallel()
	e := newEvent(userCreated, 7, 1)
	e.ID = "01890a5d-ac96-774b-bcce-b302099a8057"
	const want = `{"event_id":"01890a5d-ac96-774b-bcce-b302099a8057","event_type":"user.created",` +
		`"data":{"user_id":7,"version":1},"trace_id":"trace-1","occurred_at":"2026-01-01T12:00:00.123456Z"}`
	if got := string(encode(t, e)); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// TestParseEvent checks which messages are readable.
func TestParseEvent(t *testing.T) {
	t.Parallel()
	good := string(encode(t, newEvent(userCreated, 7, 1)))
	replace := func(old, new string) string { return strings.Replace(good, old, new, 1) }
	for name, test := range map[string]struct {
		body string
		ok   bool
	}{
		"an event":            {good, true},
		"an unknown member":   {replace("{", `{"new": [1],`), true},
		"an unknown type":     {replace("user.created", "user.renamed"), false},
		"no type":             {replace("event_type", "kind"), false},
		"no id":               {replace("event_id", "id"), false},
		"no user":             {replace("user_id", "id"), false},
		"a version of 0":      {replace(`"version":1`, `"version":0`), false},
		"a version as text":   {replace(`"version":1`, `"version":"1"`), false},
		"invalid JSON":        {"not JSON", false},
		"an empty body":       {"", false},
		"an array":            {"[]", false},
		"an empty object":     {"{}", false},
		"a truncated body":    {good[:len(good)-1], false},
		"the largest body":    {good + strings.Repeat(" ", maxEventBytes-len(good)), true},
		"one byte more":       {good + strings.Repeat(" ", maxEventBytes-len(good)+1), false},
		"control characters":  {replace("trace-1", `\u0000\n`), true},
		"an invalid time":     {replace("2026-01-01T", "2026-13-01T"), false},
		"two events in a row": {good + good, false},
	} {
		_, err := parseEvent([]byte(test.body))
		if (err == nil) != test.ok || err != nil && !errors.Is(err, errUnreadable) {
			t.Errorf("%s: got error %v, want ok %t", name, err, test.ok)
		}
	}
}

// fakeBroker is a broker and its publisher. verdict returns the result of publish for a number of events.
type fakeBroker struct {
	mu        sync.Mutex
	published []string // "user/version" of every event passed to publish
	verdict   func(sent int) (int, error)
}

func (b *fakeBroker) publisher(context.Context) (publisher, error) { return b, nil }
func (b *fakeBroker) consume(context.Context, func(), messageHandler) error {
	return errors.New("not in this test")
}
func (b *fakeBroker) state() state { return stateUp }
func (b *fakeBroker) closed() bool { return false }
func (b *fakeBroker) close()       {}

func (b *fakeBroker) publish(_ context.Context, events []event) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range events {
		b.published = append(b.published, fmt.Sprintf("%d/%d", e.Data.UserID, e.Data.Version))
	}
	return b.verdict(len(events))
}

// TestRelayRemovesConfirmedEvents checks that, after the broker has refused the third event once, the
// relay removes the first two and publishes the others again, in order.
func TestRelayRemovesConfirmedEvents(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for range 5 {
			mustCreate(t, m, "John")
		}
		refusals := 0
		b := &fakeBroker{verdict: func(sent int) (int, error) {
			if refusals++; refusals == 1 {
				return 2, errors.New("refused")
			}
			return sent, nil
		}}
		log := &logBuffer{}
		r := newRelay(m, b, newLogger(&logWriter{w: log}, 0), metrics.NewSet())
		ctx, cancel := context.WithCancel(t.Context())
		go r.run(ctx)
		time.Sleep(time.Minute)
		cancel()
		synctest.Wait()
		want := []string{"1/1", "2/1", "3/1", "4/1", "5/1", "3/1", "4/1", "5/1"}
		if !slices.Equal(b.published, want) {
			t.Errorf("published: got %v, want %v", b.published, want)
		}
		if n := len(m.events); n != 0 {
			t.Errorf("outbox: got %d events, want none", n)
		}
		if r.published.Get() != 5 {
			t.Errorf("events_published_total: got %d, want 5", r.published.Get())
		}
		lost, restored := log.lines("Event connection lost"), log.lines("Event connection restored")
		if len(lost) != 1 || len(restored) != 1 || lost[0]["level"] != "WARN" {
			t.Errorf("got %d lost and %d restored connections, want one each, the loss at WARN:\n%s",
				len(lost), len(restored), log)
		}
	})
}

// choosyBroker takes or refuses each event by chance, also one after a refused one.
type choosyBroker struct {
	fakeBroker
	random *rand.Rand
	taken  []eventData
}

func (b *choosyBroker) publisher(context.Context) (publisher, error) { return b, nil }

func (b *choosyBroker) publish(_ context.Context, events []event) (int, error) {
	confirmed, err := len(events), error(nil)
	for i, e := range events {
		if b.random.IntN(15) > 0 {
			b.taken = append(b.taken, e.Data)
		} else if err == nil {
			confirmed, err = i, errors.New("refused")
		}
	}
	return confirmed, err
}

// TestRelayAwaitsEarlierVersions checks that the versions of each user reach a broker in order although
// it refuses events and takes later ones.
func TestRelayAwaitsEarlierVersions(t *testing.T) {
	t.Parallel()
	const users, changes = 10, 20
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			m := newMemory()
			for range users {
				mustCreate(t, m, "John")
			}
			for i := range int64(users * changes) {
				id := min(i%(2*users)+1, users) // the last user has half of the changes
				in := input(fmt.Sprint("name ", i), "", "")
				if _, err := m.updateUser(t.Context(), "test", id, in, nil); err != nil {
					t.Fatal(err)
				}
			}
			b := &choosyBroker{random: rand.New(rand.NewPCG(seed, 0))}
			ctx, cancel := context.WithCancel(t.Context())
			go newRelay(m, b, newLogger(&logWriter{w: io.Discard}, 0), metrics.NewSet()).run(ctx)
			time.Sleep(time.Hour)
			cancel()
			synctest.Wait()
			last := make(map[int64]int64)
			for _, d := range b.taken {
				if d.Version > last[d.UserID]+1 {
					t.Errorf("version %d of user %d follows %d", d.Version, d.UserID, last[d.UserID])
				}
				last[d.UserID] = max(last[d.UserID], d.Version)
			}
			if n := len(m.events); n != 0 || len(last) != users {
				t.Errorf("got %d events pending and those of %d users, want none and %d",
					n, len(last), users)
			}
		})
	}
}

// TestNextWindow checks that a window has the first events of users, and not too many.
func TestNextWindow(t *testing.T) {
	t.Parallel()
	var events []event
	for i := range int64(relayWindow + 10) {
		events = append(events, newEvent(userUpdated, i, 1), newEvent(userUpdated, 0, i+2))
	}
	window, rest := nextWindow(events)
	if len(window) != relayWindow || len(rest) != relayWindow+20 {
		t.Fatalf("got %d and %d events, want %d and %d", len(window), len(rest),
			relayWindow, relayWindow+20)
	}
	for i, e := range window {
		if want := (eventData{int64(i), 1}); e.Data != want {
			t.Errorf("event %d of the window: got %v, want %v", i, e.Data, want)
		}
	}
	for i, e := range rest[:relayWindow] {
		if want := (eventData{0, int64(i) + 2}); e.Data != want {
			t.Errorf("event %d of the rest: got %v, want %v", i, e.Data, want)
		}
	}
	if window, rest = nextWindow(rest); len(window) != 11 || len(rest) != relayWindow+9 {
		t.Errorf("got %d and %d events, want the first of 11 users and %d", len(window), len(rest),
			relayWindow+9)
	}
}

// TestRelayLongOutage checks that the relay logs one warning while the broker fails for an hour, and
// publishes soon after.
func TestRelayLongOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		mustCreate(t, m, "John")
		start := time.Now()
		attempts := 0
		b := &fakeBroker{verdict: func(sent int) (int, error) {
			if attempts++; time.Since(start) < time.Hour {
				return 0, errors.New("unreachable")
			}
			return sent, nil
		}}
		log := &logBuffer{}
		ctx, cancel := context.WithCancel(t.Context())
		go newRelay(m, b, newLogger(&logWriter{w: log}, 0), metrics.NewSet()).run(ctx)
		time.Sleep(time.Hour + 11*time.Second)
		cancel()
		synctest.Wait()
		if len(m.events) != 0 {
			t.Error("the event was not published within 11 s after the outage")
		}
		if attempts < 360 || attempts > 3600 {
			t.Errorf("attempts in an hour: got %d, want 360 to 3600", attempts)
		}
		warnings := 0
		for _, line := range log.lines("") {
			if line["level"] == "WARN" {
				warnings++
			}
		}
		if warnings != 1 {
			t.Errorf("warnings: got %d, want 1", warnings)
		}
	})
}

// TestRelayDrains checks that the relay publishes the pending events before it stops.
func TestRelayDrains(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		for range 3*relayWindow + 1 {
			mustCreate(t, m, "John")
		}
		ctx, cancel := context.WithCancel(t.Context())
		b := &fakeBroker{verdict: func(sent int) (int, error) {
			cancel()
			return sent, nil
		}}
		newRelay(m, b, newLogger(&logWriter{w: t.Output()}, 0), metrics.NewSet()).run(ctx)
		if len(m.events) != 0 || len(b.published) != 3*relayWindow+1 {
			t.Errorf("got %d events pending and %d published, want none and %d", len(m.events),
				len(b.published), 3*relayWindow+1)
		}
	})
}

// pacedBroker takes a fixed time for each window.
type pacedBroker struct {
	*fakeBroker
	perWindow time.Duration
}

func (b pacedBroker) publisher(context.Context) (publisher, error) { return b, nil }

func (b pacedBroker) publish(ctx context.Context, events []event) (int, error) {
	time.Sleep(b.perWindow)
	return b.fakeBroker.publish(ctx, events)
}

// TestRelayServesOthers checks that a user with more events than one read returns delays nobody else's
// by more than a turn, and that all events leave in order. Each window takes as long as in RabbitMQ.
func TestRelayServesOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const busy, versions = 1, relayRead + 1000
		m := newMemory()
		m.lastID = busy
		for version := range int64(versions) {
			m.events = append(m.events, newEvent(userUpdated, busy, version+1))
		}
		const perWindow = 6 * time.Millisecond
		b := pacedBroker{&fakeBroker{verdict: func(sent int) (int, error) { return sent, nil }}, perWindow}
		ctx, cancel := context.WithCancel(t.Context())
		go newRelay(m, b, newLogger(&logWriter{w: t.Output()}, 0), metrics.NewSet()).run(ctx)
		published := func() []string {
			b.mu.Lock()
			defer b.mu.Unlock()
			return slices.Clone(b.published)
		}
		const atMost = 2*relayTurn + relayPause + 3*perWindow
		for range 5 {
			time.Sleep(time.Second)
			other := mustCreate(t, m, "John")
			time.Sleep(atMost)
			if !slices.Contains(published(), fmt.Sprintf("%d/1", other.ID)) {
				t.Errorf("the event of another user was not published within %v", atMost)
			}
		}
		if sent := len(published()); sent < 500 {
			t.Errorf("got %d events in 5 s, want 500 or more", sent)
		}
		time.Sleep(2 * versions * perWindow)
		next := 1
		for _, id := range published() {
			if user, version, _ := strings.Cut(id, "/"); user == "1" {
				if version != fmt.Sprint(next) {
					t.Fatalf("got version %s of the busy user, want %d", version, next)
				}
				next++
			}
		}
		cancel()
		synctest.Wait()
		if len(m.events) != 0 || next != versions+1 {
			t.Errorf("got %d events pending, and %d of the busy user published, want none and %d",
				len(m.events), next-1, versions)
		}
	})
}

// TestRelayKeepsUndeliverableEvent checks that an event that no broker could deliver stays while the log
// cannot take the line that replaces it, and that it delays no other event.
func TestRelayKeepsUndeliverableEvent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		out := &switchedWriter{to: log}
		out.broken.Store(true)
		writer := &logWriter{w: out}
		m := newMemory()
		m.events = []event{newEvent("not for a queue", 1, 1), newEvent(userUpdated, 2, 1)}
		b := &fakeBroker{verdict: func(sent int) (int, error) { return sent, nil }}
		ctx, cancel := context.WithCancel(t.Context())
		go newRelay(m, b, newLogger(writer, 0), metrics.NewSet()).run(ctx)
		pending := func(when string, want int) {
			t.Helper()
			if n, _, _ := m.size(t.Context()); int(n) != want {
				t.Errorf("%s: got %d events pending, want %d", when, n, want)
			}
		}
		time.Sleep(2 * time.Second)
		pending("while the log is broken", 1)
		fillLog(writer)
		time.Sleep(2 * time.Second)
		pending("while the log is full", 1)
		out.broken.Store(false)
		time.Sleep(2 * time.Second)
		pending("after that", 0)
		if lines := log.lines(""); !slices.ContainsFunc(lines, func(line logLine) bool {
			return line["event"] == "Undeliverable event removed"
		}) {
			t.Error("no line says that the event was removed")
		}
		if !slices.Equal(b.published, []string{"2/1"}) {
			t.Errorf("published: got %v, want only the other event, once", b.published)
		}
		cancel()
		synctest.Wait()
	})
}

// leasedMemory is a store whose lease another replica may hold. It returns events in any case, because
// the relay must not rely on the contrary.
type leasedMemory struct {
	*memory
	leads    func() bool
	renewals atomic.Int64
}

func (m *leasedMemory) next(ctx context.Context, done, skip []event, limit int, renew bool) (
	[]event, bool, error) {
	events, _, err := m.memory.next(ctx, done, skip, limit, renew)
	if !renew {
		return events, false, err
	}
	m.renewals.Add(1)
	return events, m.leads(), err
}

// TestRelayNeedsLease checks that a relay that loses the lease while it publishes stops after the window
// in progress, removes what it has published, and publishes the rest when it leads again. Without
// events, it renews the lease every leadInterval, not with every poll.
func TestRelayNeedsLease(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		lost := func() bool { // from the first second to the tenth
			return time.Since(start) >= time.Second && time.Since(start) < 10*time.Second
		}
		m := &leasedMemory{memory: newMemory(), leads: func() bool { return !lost() }}
		for range 3 * relayWindow {
			mustCreate(t, m, "John")
		}
		b := &fakeBroker{}
		b.verdict = func(sent int) (int, error) {
			if lost() {
				t.Errorf("events were published after %v without the lease", time.Since(start))
			}
			time.Sleep(2 * time.Second)
			return sent, nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		go newRelay(m, b, newLogger(&logWriter{w: t.Output()}, 0), metrics.NewSet()).run(ctx)
		check := func(when string, published int) {
			t.Helper()
			pending, _, _ := m.size(t.Context())
			b.mu.Lock()
			defer b.mu.Unlock()
			if len(b.published) != published || int(pending) != 3*relayWindow-published {
				t.Errorf("%s: got %d published and %d pending, want %d and %d", when,
					len(b.published), pending, published, 3*relayWindow-published)
			}
		}
		time.Sleep(9 * time.Second)
		check("after the lease was lost", relayWindow)
		time.Sleep(11 * time.Second)
		check("after the lease was taken again", 3*relayWindow)
		m.renewals.Store(0)
		time.Sleep(time.Minute)
		most := int64(time.Minute/leadInterval) + 1
		if n := m.renewals.Load(); n < most/2 || n > most {
			t.Errorf("renewals in a minute without events: got %d, want %d to %d", n, most/2, most)
		}
		cancel()
		synctest.Wait()
	})
}

func newTestConsumer(log *logBuffer) *consumer {
	return newConsumer(newLogger(&logWriter{w: log}, slog.LevelDebug), metrics.NewSet())
}

// TestConsumerSkipsDuplicates checks that the consumer logs repeated and older versions at DEBUG only.
func TestConsumerSkipsDuplicates(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	c := newTestConsumer(log)
	sent := make(map[eventData]event)
	for _, d := range []eventData{{1, 1}, {1, 1}, {2, 1}, {1, 2}, {1, 1}, {1, 3}, {2, 2}} {
		if _, again := sent[d]; !again {
			sent[d] = newEvent(userUpdated, d.UserID, d.Version)
		}
		unreadable, err := c.handle(t.Context(), []message{{body: encode(t, sent[d])}})
		if err != nil || unreadable != nil {
			t.Errorf("handle %v: got unreadable messages %v, error %v", d, unreadable, err)
		}
	}
	var received, skipped []string
	for _, line := range log.lines("") {
		text := fmt.Sprintf("%v/%v %v", line["user_id"], line["version"], line["level"])
		if strings.HasPrefix(line["event"].(string), "Received event") {
			received = append(received, text)
		} else {
			skipped = append(skipped, text)
		}
	}
	want := []string{"1/1 INFO", "2/1 INFO", "1/2 INFO", "1/3 INFO", "2/2 INFO"}
	if !slices.Equal(received, want) {
		t.Errorf("received: got %v, want %v", received, want)
	}
	if want := []string{"1/1 DEBUG", "1/1 DEBUG"}; !slices.Equal(skipped, want) {
		t.Errorf("skipped: got %v, want %v", skipped, want)
	}
	if c.consumed.Get() != 5 || c.skipped.Get() != 2 {
		t.Errorf("got %d consumed, %d skipped, want 5, 2", c.consumed.Get(), c.skipped.Get())
	}
}

// TestConsumerReportsConflicts checks the warning about two events with the same version of a user, as
// after the database was restored or lost changes in a failover.
func TestConsumerReportsConflicts(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	c := newTestConsumer(log)
	for _, version := range []int64{1, 2, 2, 1, 3} {
		body := encode(t, newEvent(userUpdated, 7, version))
		if unreadable, err := c.handle(t.Context(), []message{{body: body}}); err != nil || unreadable != nil {
			t.Errorf("handle version %d: got unreadable messages %v, error %v", version, unreadable, err)
		}
	}
	var conflicts []logLine
	for _, line := range log.lines("") {
		if line["level"] == "WARN" {
			conflicts = append(conflicts, line)
		}
	}
	if len(conflicts) != 1 || conflicts[0]["user_id"] != 7.0 || conflicts[0]["version"] != 2.0 {
		t.Errorf("warnings: got %v, want one for user 7, version 2", conflicts)
	}
	if c.consumed.Get() != 3 || c.skipped.Get() != 2 {
		t.Errorf("got %d consumed, %d skipped, want 3, 2", c.consumed.Get(), c.skipped.Get())
	}
}

// connState is a connection that is closed or open.
type connState bool

func (c connState) IsClosed() bool { return bool(c) }

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("disk full") }

// TestConsumerKeepsEventsOnLogFailure checks that events are not acknowledged while the log cannot be
// written.
func TestConsumerKeepsEventsOnLogFailure(t *testing.T) {
	t.Parallel()
	writer := &logWriter{w: brokenWriter{}}
	c := newConsumer(newLogger(writer, 0), metrics.NewSet())
	for version := range int64(2) {
		e := newEvent(userCreated, 1, version+1)
		if n, err := (inProcess{c, c.log}).publish(t.Context(), []event{e}); err == nil || n != 0 {
			t.Errorf("publish: got %d, %v, want 0 and an error", n, err)
		}
		e = newEvent(userCreated, 2, version+1)
		var acks acknowledger
		d := amqp.Delivery{Acknowledger: &acks, DeliveryTag: 1, Body: encode(t, e)}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		b := &rabbitMQ{log: c.log}
		err := b.settle(ctx, connState(false), []amqp.Delivery{d}, c)
		if err == nil || len(acks) > 0 {
			t.Errorf("settle: got acknowledgements %v, error %v, want none and an error", acks, err)
		}
	}
}

// TestConsumerRecoversFromLogFailure checks that events whose lines were dropped, because the buffer of the
// log was full, are logged once and in order when they are delivered again.
func TestConsumerRecoversFromLogFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		out := &switchedWriter{to: log}
		out.broken.Store(true)
		writer := &logWriter{w: out}
		c := newConsumer(newLogger(writer, slog.LevelInfo), metrics.NewSet())
		publish := func(events ...event) (int, error) {
			return inProcess{c, c.log}.publish(t.Context(), events)
		}
		first, created := newEvent(userCreated, 1, 1), newEvent(userCreated, 2, 1)
		updated := newEvent(userUpdated, 2, 2)
		if n, err := publish(first); !errors.Is(err, errLogStuck) || n != 0 {
			t.Errorf("publish with a broken log: got %d, %v, want 0 and %v", n, err, errLogStuck)
		}
		fillLog(writer)
		if n, err := publish(first, created, updated); !errors.Is(err, errLineDropped) || n != 0 {
			t.Errorf("publish with a full buffer: got %d, %v, want 0 and %v", n, err, errLineDropped)
		}
		out.broken.Store(false)
		time.Sleep(time.Second)
		if n, err := publish(first, created, updated); err != nil || n != 3 {
			t.Errorf("publish with a working log: got %d, %v, want 3", n, err)
		}
		var received []string
		for _, line := range log.lines("") {
			if line["event_id"] != nil {
				received = append(received, fmt.Sprintf("%v/%v", line["user_id"], line["version"]))
			}
		}
		if want := []string{"1/1", "2/1", "2/2"}; !slices.Equal(received, want) {
			t.Errorf("received: got %v, want %v", received, want)
		}
		if c.consumed.Get() != 3 {
			t.Errorf("consumed: got %d, want 3", c.consumed.Get())
		}
	})
}

// TestSettleWaitsForLog checks that good and unreadable messages are not settled while the log cannot be
// written, and that each is settled once afterwards.
func TestSettleWaitsForLog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		out := &switchedWriter{to: log}
		out.broken.Store(true)
		writer := &logWriter{w: out}
		c := newConsumer(newLogger(writer, slog.LevelDebug), metrics.NewSet())
		var acks acknowledger
		var deliveries []amqp.Delivery
		for i, body := range [][]byte{encode(t, newEvent(userCreated, 1, 1)), []byte("not JSON"),
			encode(t, newEvent(userUpdated, 1, 2))} {
			deliveries = append(deliveries,
				amqp.Delivery{Acknowledger: &acks, DeliveryTag: uint64(i + 1), Body: body})
		}
		settled := make(chan error, 1)
		go func() {
			b := &rabbitMQ{log: c.log}
			settled <- b.settle(t.Context(), connState(false), deliveries, c)
		}()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if len(acks) > 0 || len(settled) > 0 {
			t.Errorf("with a broken log: got %q, want nothing settled", acks)
		}
		out.broken.Store(false)
		time.Sleep(maxPause)
		synctest.Wait()
		if err := <-settled; err != nil {
			t.Error(err)
		}
		if want := (acknowledger{"reject 2 false", "ack 3 true"}); !slices.Equal(acks, want) {
			t.Errorf("settled: got %q, want %q", acks, want)
		}
		for _, event := range []string{"Received event user.created with user_id=1",
			"Received event user.updated with user_id=1"} {
			if len(log.lines(event)) == 0 {
				t.Errorf("got no line %q", event)
			}
		}
		if c.consumed.Get() != 2 {
			t.Errorf("consumed: got %d, want 2", c.consumed.Get())
		}
		if c.rejected.Get() != 1 {
			t.Errorf("rejected: got %d, want 1", c.rejected.Get())
		}
	})
}

// switchedWriter writes to another writer, or fails while it is broken.
type switchedWriter struct {
	to     io.Writer
	broken atomic.Bool
}

func (w *switchedWriter) Write(p []byte) (int, error) {
	if w.broken.Load() {
		return 0, errors.New("disk full")
	}
	return w.to.Write(p)
}

// acknowledger records what is sent to the broker.
type acknowledger []string

func (a *acknowledger) Ack(tag uint64, multiple bool) error {
	*a = append(*a, fmt.Sprintf("ack %d %t", tag, multiple))
	return nil
}

func (a *acknowledger) Nack(tag uint64, multiple, requeue bool) error {
	*a = append(*a, fmt.Sprintf("nack %d %t %t", tag, multiple, requeue))
	return nil
}

func (a *acknowledger) Reject(tag uint64, requeue bool) error {
	*a = append(*a, fmt.Sprintf("reject %d %t", tag, requeue))
	return nil
}

// TestSettle checks that good, unreadable and duplicate messages that arrive together are acknowledged
// with one message to the broker.
func TestSettle(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	c := newTestConsumer(log)
	good := func(version int64) []byte { return encode(t, newEvent(userUpdated, 1, version)) }
	bad := []byte("not JSON")
	for _, test := range []struct {
		name   string
		bodies [][]byte
		want   acknowledger
	}{
		{name: "one message", bodies: [][]byte{good(1)}, want: acknowledger{"ack 1 true"}},
		{name: "three messages", bodies: [][]byte{good(2), good(3), good(4)},
			want: acknowledger{"ack 3 true"}},
		{name: "an unreadable message first", bodies: [][]byte{bad, good(5)},
			want: acknowledger{"reject 1 false", "ack 2 true"}},
		{name: "an unreadable message last", bodies: [][]byte{good(6), bad},
			want: acknowledger{"reject 2 false", "ack 1 true"}},
		{name: "unreadable messages only", bodies: [][]byte{bad, bad},
			want: acknowledger{"reject 1 false", "reject 2 false"}},
		{name: "a duplicate", bodies: [][]byte{good(6), good(7), good(7)},
			want: acknowledger{"ack 3 true"}},
	} {
		var acks acknowledger
		deliveries := make(chan amqp.Delivery, len(test.bodies))
		for i, body := range test.bodies {
			deliveries <- amqp.Delivery{Acknowledger: &acks, DeliveryTag: uint64(i + 1), Body: body}
		}
		b := &rabbitMQ{log: c.log}
		batch := received(<-deliveries, deliveries)
		if err := b.settle(t.Context(), connState(false), batch, c); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if !slices.Equal(acks, test.want) {
			t.Errorf("%s: got %q, want %q", test.name, acks, test.want)
		}
	}
	received := 0
	for _, line := range log.lines("") {
		if strings.HasPrefix(line["event"].(string), "Received event") {
			received++
		}
	}
	if received != 7 {
		t.Errorf("lines of received events: got %d, want 7", received)
	}
}

// TestStoresAndBrokers checks the events of changes with every combination of store and broker.
func TestStoresAndBrokers(t *testing.T) {
	t.Parallel()
	for _, database := range []bool{false, true} {
		for _, rabbit := range []bool{false, true} {
			t.Run(fmt.Sprintf("postgres=%t,rabbitmq=%t", database, rabbit), func(t *testing.T) {
				t.Parallel()
				s := memorySettings()
				if database {
					s = postgresSettings(t)
				}
				if rabbit {
					s.rabbitURL, s.exchange = testRabbitURL, newExchange(t)
				}
				svc := startService(t, s)
				svc.do("POST", "/users", john, "X-Request-Id: trace-create")
				svc.do("PUT", "/users/1", `{"name": "Jane"}`, "X-Request-Id: trace-update")
				svc.do("DELETE", "/users/1", "", "X-Request-Id: trace-delete")
				for i, verb := range []string{"create", "update", "delete"} {
					svc.waitForLine("Received event user."+verb+"d with user_id=1",
						"trace_id", "trace-"+verb, "event_type", "user."+verb+"d",
						"user_id", 1, "version", i+1)
				}
				if database {
					waitForEmptyOutbox(t, connect(t, s.databaseURL))
				}
			})
		}
	}
}

// unreadableEvents are rows of the outbox that no release of the service writes, and one valid row.
const unreadableEvents = `
	SET session_replication_role = replica;
	INSERT INTO outbox (event_type, user_id, version, trace_id, occurred_at) VALUES
		('user.renamed', 1, 1, 'unreadable-1', now()),
		('x', 1, 1, 'unreadable-2', now()),
		('user.updated', 0, 1, 'unreadable-3', now()),
		('user.updated', 1, 2, repeat('x', 300), now()),
		('user.updated', 7, 2, 'good', now());
	RESET session_replication_role`

// TestUnreadableEvents checks that events in the outbox that no consumer can read are removed with an
// error in the log, and that the events behind them are delivered.
func TestUnreadableEvents(t *testing.T) {
	t.Parallel()
	for broker, removed := range map[string][]string{
		"in process": {"unreadable-1", "unreadable-2", "unreadable-3", strings.Repeat("x", 300)},
		"rabbitmq":   {"unreadable-2", strings.Repeat("x", 300)}, // RabbitMQ takes the others
	} {
		t.Run(broker, func(t *testing.T) {
			t.Parallel()
			s := postgresSettings(t)
			if broker == "rabbitmq" {
				s.rabbitURL, s.exchange = testRabbitURL, newExchange(t)
			}
			svc := startService(t, s)
			svc.log.allowErrors(len(removed))
			execute(t, connect(t, asSuperuser(t, s.databaseURL)), unreadableEvents)
			id := svc.createUser("John", "Doe")
			svc.waitForLine("Received event user.updated with user_id=7", "trace_id", "good")
			svc.waitForLine(fmt.Sprintf("Received event user.created with user_id=%d", id))
			waitForEmptyOutbox(t, connect(t, s.databaseURL))
			for _, traceID := range removed {
				traceID = traceID[:min(len(traceID), maxTraceIDBytes)]
				line := svc.waitForLine("Undeliverable event removed", "trace_id", traceID)
				if line["level"] != "ERROR" || line["event_id"] == nil || line["version"] == nil {
					t.Errorf("got %v, want level ERROR with event_id and version", line)
				}
			}
		})
	}
}

// alwaysLeads is a store whose relay always holds the lease.
type alwaysLeads struct{ *postgres }

func (s alwaysLeads) next(ctx context.Context, done, skip []event, limit int, renew bool) (
	[]event, bool, error) {
	events, _, err := s.postgres.next(ctx, done, skip, limit, renew)
	return events, true, err
}

// slowBroker waits for a random time before it publishes, so that relays overtake each other.
type slowBroker struct{ *rabbitMQ }

func (b slowBroker) publisher(ctx context.Context) (publisher, error) {
	p, err := b.rabbitMQ.publisher(ctx)
	return slowPublisher{p}, err
}

type slowPublisher struct{ publisher }

func (p slowPublisher) publish(ctx context.Context, events []event) (int, error) {
	sleep(ctx, rand.N(20*time.Millisecond))
	return p.publisher.publish(ctx, events)
}

// TestTwoRelaysKeepOrder checks that, when two relays publish the same outbox, the first copies of each
// user's versions arrive in order and without gaps.
func TestTwoRelaysKeepOrder(t *testing.T) {
	t.Parallel()
	url, exchange := newDatabase(t), newExchange(t)
	events := record(t, exchange)
	s := openTestPostgres(t, url)
	const users, clients, rounds = 5, 20, 25
	for range users {
		mustCreate(t, s, "John")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var relays, writers sync.WaitGroup
	defer func() { cancel(); relays.Wait() }()
	for range 2 {
		set := metrics.NewSet()
		log := newLogger(&logWriter{w: t.Output()}, slog.LevelWarn)
		to := settings{rabbitURL: testRabbitURL, exchange: exchange, appName: "test"}
		b := slowBroker{newRabbitMQ(to, log, set)}
		r := newRelay(alwaysLeads{openTestPostgres(t, url)}, b, log, set)
		relays.Go(func() { r.run(ctx) })
	}
	last := make(map[int64]int64)
	checkFirstArrivals(t, events, last, users) // waits until a relay works
	for c := range clients {
		writers.Go(func() {
			for i := range rounds {
				in := input(fmt.Sprint("name ", c, " ", i), "", "")
				id := int64((c+i)%users + 1)
				if _, err := s.updateUser(context.Background(), "test", id, in, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	checkFirstArrivals(t, events, last, clients*rounds)
	writers.Wait()
}

// checkFirstArrivals receives events until a number of them, not counting copies, have arrived, and checks
// the order of versions. It keeps the newest version of each user in last.
func checkFirstArrivals(t *testing.T, events *recorder, last map[int64]int64, want int) {
	t.Helper()
	copies := 0
	for n := 0; n < want; {
		switch d := events.next(t).Data; {
		case d.Version == last[d.UserID]+1:
			last[d.UserID] = d.Version
			n++
		case d.Version > last[d.UserID]:
			t.Fatalf("version %d of user %d follows %d", d.Version, d.UserID, last[d.UserID])
		default:
			copies++
		}
	}
	t.Logf("%d copies of %d events", copies, want)
}

// TestReplicasKeepOrder checks that the versions of each user arrive in order and without gaps when
// clients change them through three replicas.
func TestReplicasKeepOrder(t *testing.T) {
	t.Parallel()
	s := postgresSettings(t)
	s.rabbitURL, s.exchange = testRabbitURL, newExchange(t)
	replicas := []*service{startService(t, s), startService(t, s), startService(t, s)}
	recorder := record(t, s.exchange)
	const users, clients, rounds = 5, 12, 15
	for i := range users {
		replicas[0].createUser(fmt.Sprint("user", i), "Doe")
	}
	var group sync.WaitGroup
	for c := range clients {
		group.Go(func() {
			for i := range rounds {
				path := fmt.Sprintf("/users/%d", (c+i)%users+1)
				body := fmt.Sprintf(`{"name": "n%d-%d"}`, c, i)
				if a := replicas[(c+i)%len(replicas)].do("PUT", path, body); a.status != 200 {
					t.Errorf("PUT %s: got %d %s, want 200", path, a.status, a.body)
				}
			}
		})
	}
	group.Wait()
	last := make(map[int64]int64)
	for range users + clients*rounds {
		d := recorder.next(t).Data
		if d.Version != last[d.UserID]+1 {
			t.Errorf("version %d of user %d follows %d", d.Version, d.UserID, last[d.UserID])
		}
		last[d.UserID] = d.Version
	}
	received := func() (n int) {
		for _, r := range replicas {
			n += strings.Count(r.log.String(), `"Received event `)
		}
		return n
	}
	eventually(t, "each event in the log of one replica", func() bool {
		return received() == users+clients*rounds
	})
}

// TestFullQueueKeepsOrder checks that the versions of a user reach a queue in order although the queue
// is full again and again, and refuses events of which it takes later ones.
func TestFullQueueKeepsOrder(t *testing.T) {
	t.Parallel()
	exchange := newExchange(t)
	ch, queue := bindQueue(t, exchange, amqp.Table{"x-max-length": 3, "x-overflow": "reject-publish"})
	if err := ch.Qos(1, 0, false); err != nil {
		t.Fatal(err)
	}
	deliveries, err := ch.Consume(queue, "", false, true, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	m := newMemory()
	const users, versions = 4, 12
	for range users {
		mustCreate(t, m, "John")
	}
	for i := range int64(users * (versions - 1)) {
		in := input(fmt.Sprint("name ", i), "", "")
		if _, err := m.updateUser(t.Context(), "test", i%users+1, in, nil); err != nil {
			t.Fatal(err)
		}
	}
	set := metrics.NewSet()
	log := newLogger(&logWriter{w: t.Output()}, slog.LevelWarn)
	b := newRabbitMQ(settings{rabbitURL: testRabbitURL, exchange: exchange, appName: "test"}, log, set)
	ctx, cancel := context.WithCancel(t.Context())
	var relay sync.WaitGroup
	defer func() { cancel(); relay.Wait() }()
	relay.Go(func() { newRelay(m, b, log, set).run(ctx) })
	checkFirstArrivals(t, &recorder{acknowledged(t, deliveries)}, map[int64]int64{}, users*versions)
}

// acknowledged passes deliveries on one by one and acknowledges each, until the test ends.
func acknowledged(t *testing.T, deliveries <-chan amqp.Delivery) <-chan amqp.Delivery {
	out := make(chan amqp.Delivery)
	go func() {
		for d := range deliveries {
			select {
			case out <- d:
				_ = d.Ack(false)
			case <-t.Context().Done():
				return
			}
		}
	}()
	return out
}

// recorder consumes a queue that receives every event of an exchange.
type recorder struct {
	deliveries <-chan amqp.Delivery
}

// record returns a recorder that receives every event of the exchange from now on.
func record(t *testing.T, exchange string) *recorder {
	t.Helper()
	ch, queue := bindQueue(t, exchange, nil)
	deliveries, err := ch.Consume(queue, "", true, true, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &recorder{deliveries}
}

// bindQueue declares the exchange as the service does, and a queue that receives every event from now
// on and exists as long as its channel.
func bindQueue(t *testing.T, exchange string, arguments amqp.Table) (*amqp.Channel, string) {
	t.Helper()
	ch := openChannel(t)
	queue, err := ch.QueueDeclare("", false, true, true, false, arguments)
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.ExchangeDeclare(exchange, "topic", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if err := ch.QueueBind(queue.Name, "#", exchange, false, nil); err != nil {
		t.Fatal(err)
	}
	return ch, queue.Name
}

// openChannel opens a channel to the tests' broker. It is closed when the test ends.
func openChannel(t *testing.T) *amqp.Channel {
	t.Helper()
	ch, err := dialRabbit(t).Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

// nextMessage waits for the next message.
func (r *recorder) nextMessage(t *testing.T) amqp.Delivery {
	t.Helper()
	select {
	case d, ok := <-r.deliveries:
		if ok {
			return d
		}
		t.Fatal("the recorder lost its connection")
	case <-time.After(20 * time.Second):
		t.Fatal("no event in 20 s")
	}
	panic("not reached")
}

// next waits for the next message and returns its event.
func (r *recorder) next(t *testing.T) event {
	t.Helper()
	e, err := parseEvent(r.nextMessage(t).Body)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// startWithRabbit runs a service with RabbitMQ and users in memory. It also returns the names of
// what the service declares.
func startWithRabbit(t *testing.T) (*service, *rabbitMQ) {
	t.Helper()
	s := memorySettings()
	s.rabbitURL, s.exchange = testRabbitURL, newExchange(t)
	return startService(t, s), &rabbitMQ{exchange: s.exchange}
}

// proxy forwards connections between a service and its broker or database.
type proxy struct {
	address string

	mu    sync.Mutex
	conns []net.Conn
	up    bool
}

// newProxy returns a proxy that forwards to the host of a URL until the test ends.
func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{address: listener.Addr().String(), up: true}
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			p.forward(in, u.Host)
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		p.set(false)
	})
	return p
}

// forward connects in to the host, or closes it if the proxy is down.
func (p *proxy) forward(in net.Conn, host string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	out, err := net.Dial("tcp", host)
	if err != nil || !p.up {
		in.Close()
		return
	}
	p.conns = append(p.conns, in, out)
	go io.Copy(in, out)
	go io.Copy(out, in)
}

// set closes all connections. New ones are forwarded if up is set, else closed.
func (p *proxy) set(up bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.up = up
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

// throughProxy returns a URL whose host is the proxy.
func throughProxy(t *testing.T, target string, p *proxy) string {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = p.address
	return u.String()
}

// refusedAddress returns an address that refuses connections.
func refusedAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// withHosts returns the URL of the tests' broker with other hosts.
func withHosts(t *testing.T, hosts ...string) string {
	t.Helper()
	u, err := url.Parse(testRabbitURL)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(testRabbitURL, u.Host, strings.Join(hosts, ","), 1)
}

// TestRabbitURLs checks which values of RABBITMQ_URL are accepted, and the URL of each host.
func TestRabbitURLs(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]string{
		"amqp://h":              {"amqp://h"},
		"amqp://u:p@h:5673/%2F": {"amqp://u:p@h:5673/%2F"},
		"amqp://u:p@a:5672,b:5673/vhost": {
			"amqp://u:p@a:5672/vhost", "amqp://u:p@b:5673/vhost"},
		"amqps://a,b,c": {"amqps://a", "amqps://b", "amqps://c"},
		"amqp://u:p@[::1]:5672,[2001:db8::1]/v?heartbeat=5": {
			"amqp://u:p@[::1]:5672/v?heartbeat=5", "amqp://u:p@[2001:db8::1]/v?heartbeat=5"},
		"amqp://u:a,b@c,d/":    {"amqp://u:a,b@c/", "amqp://u:a,b@d/"},
		"amqp://u:p%2C@c,d/":   {"amqp://u:p%2C@c/", "amqp://u:p%2C@d/"},
		"amqp://a,b/one,two":   {"amqp://a/one,two", "amqp://b/one,two"},
		"amqp://a:1,a:2?x=1,2": {"amqp://a:1?x=1,2", "amqp://a:2?x=1,2"},
	} {
		s, err := loadSettings(envOf("RABBITMQ_URL", text))
		if err != nil || s.rabbitURL != text {
			t.Errorf("RABBITMQ_URL=%s: error %v, want none", text, err)
		}
		if got := splitHosts(text); !slices.Equal(got, want) {
			t.Errorf("splitHosts(%q) = %q, want %q", text, got, want)
		}
	}
	for _, text := range []string{
		"amqp://a:0,b/", "amqp://a,b:99999/", "amqp://a,b:x/", "amqp://a b,c/", "amqp://a, b/",
		"amqp://[::1,::2]/", "amqp://a,b/x y", "amqp://a,b/?heartbeat=x",
		"amqp://a,/", "amqp://,b/", "amqp://a,,b/", // an empty host means localhost
		"amqp://a,amqp://b/",
	} {
		if s, err := loadSettings(envOf("RABBITMQ_URL", text)); err == nil {
			t.Errorf("RABBITMQ_URL=%s: hosts %q, want an error", text, splitHosts(s.rabbitURL))
		}
	}
}

// TestBrokerSocketCollects checks that a corked socket writes nothing until it is uncorked or its
// buffer is full, and that an uncorked socket writes immediately.
func TestBrokerSocketCollects(t *testing.T) {
	t.Parallel()
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	arrived := make(chan int, 8)
	go func() {
		buffer := make([]byte, 2*brokerBuffer)
		for {
			n, err := far.Read(buffer)
			if err != nil {
				return
			}
			arrived <- n
		}
	}()
	s := &brokerSocket{Conn: near}
	s.cork()
	for range 3 {
		if n, err := s.Write([]byte("abcd")); n != 4 || err != nil {
			t.Fatalf("write to a corked socket: %d bytes, %v, want 4", n, err)
		}
	}
	if len(arrived) > 0 {
		t.Error("a corked socket has written")
	}
	if err := s.uncork(); err != nil || <-arrived != 12 {
		t.Errorf("uncork did not write 12 bytes: %v", err)
	}
	if _, err := s.Write([]byte("abcd")); err != nil || <-arrived != 4 {
		t.Errorf("a write to an uncorked socket did not write 4 bytes: %v", err)
	}
	s.cork()
	if _, err := s.Write(make([]byte, brokerBuffer)); err != nil || <-arrived != brokerBuffer {
		t.Errorf("a write that fills the buffer of a corked socket did not write it: %v", err)
	}
	near.Close()
	if _, err := s.Write(make([]byte, brokerBuffer)); err == nil {
		t.Error("a write to a closed socket succeeded")
	}
}

// TestMessage checks the properties and the body of a message.
func TestMessage(t *testing.T) {
	t.Parallel()
	svc, names := startWithRabbit(t)
	events := record(t, names.exchange)
	a := svc.do("POST", "/users", john, "X-Request-Id: trace-1")
	d := events.nextMessage(t)
	e, err := parseEvent(d.Body)
	if err != nil {
		t.Fatal(err)
	}
	for what, value := range map[string]struct{ got, want any }{
		"routing key":    {d.RoutingKey, "user.created"},
		"type":           {d.Type, "user.created"},
		"delivery mode":  {d.DeliveryMode, amqp.Persistent},
		"content type":   {d.ContentType, "application/json"},
		"message id":     {d.MessageId, e.ID},
		"app id":         {d.AppId, "test"},
		"timestamp":      {d.Timestamp.Unix(), e.OccurredAt.Unix()},
		"correlation id": {d.CorrelationId, "trace-1"},
		"header":         {d.Headers["trace_id"], "trace-1"},
		"trace id":       {e.TraceID, "trace-1"},
		"data":           {e.Data, eventData{1, 1}},
		"time":           {e.OccurredAt.Format(microseconds), a.json(t, "updated_at")},
		"members": {fmt.Sprint(keys(string(d.Body))),
			"[event_id event_type data trace_id occurred_at]"},
	} {
		if value.got != value.want {
			t.Errorf("%s: %v, want %v", what, value.got, value.want)
		}
	}
	if strings.Contains(string(d.Body), secret) {
		t.Errorf("the event contains the password: %s", d.Body)
	}
}

// TestMalformedMessages checks that malformed messages go to the dead letter queue, each once, and
// that the messages between them are consumed.
func TestMalformedMessages(t *testing.T) {
	t.Parallel()
	svc, names := startWithRabbit(t)
	svc.createUser("John", "Doe")
	svc.waitForLine("Received event user.created with user_id=1")
	ch := openChannel(t)
	malformed := []string{"not JSON", `{"event_type": "user.renamed"}`, strings.Repeat("x", 1<<20)}
	for i, body := range malformed {
		err := ch.Publish("", names.queue(), false, false, amqp.Publishing{Body: []byte(body)})
		if err != nil {
			t.Fatal(err)
		}
		svc.createUser("John", fmt.Sprint("Doe", i))
	}
	svc.waitForLine("Received event user.created with user_id=4")
	var got []string
	eventually(t, "all malformed messages in the dead letter queue", func() bool {
		d, ok, err := ch.Get(names.deadLetterQueue(), true)
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			got = append(got, string(d.Body))
		}
		return len(got) == len(malformed)
	})
	if fmt.Sprint(got) != fmt.Sprint(malformed) {
		t.Errorf("dead letters %.100q, want %.100q", got, malformed)
	}
	if n := len(svc.log.lines("Rejected message")); n != len(malformed) {
		t.Errorf("%d lines \"Rejected message\", want %d", n, len(malformed))
	}
	if n := svc.samples()["events_rejected_total"]; n != float64(len(malformed)) {
		t.Errorf("events_rejected_total %v, want %d", n, len(malformed))
	}
}

// TestDuplicateMessage checks that the consumer drops the second delivery of an event.
func TestDuplicateMessage(t *testing.T) {
	t.Parallel()
	svc, names := startWithRabbit(t)
	svc.waitForLine("Service started")
	svc.createUser("John", "Doe")
	svc.waitForLine("Received event user.created with user_id=1")
	ch := openChannel(t)
	body := encode(t, newEvent(userCreated, 77, 1))
	for range 2 {
		err := ch.Publish("", names.queue(), false, false, amqp.Publishing{Body: body})
		if err != nil {
			t.Fatal(err)
		}
	}
	svc.waitForLine("Skipped duplicate event", "user_id", 77, "level", "DEBUG")
	if n := len(svc.log.lines("Received event user.created with user_id=77")); n != 1 {
		t.Errorf("an event that was delivered twice was logged %d times, want 1", n)
	}
	eventually(t, "an empty queue", func() bool {
		q, err := ch.QueueDeclarePassive(names.queue(), true, false, false, false, nil)
		return err == nil && q.Messages == 0
	})
}

// TestTopologyIsRedeclared checks that the service declares its queues and exchanges again after
// all of them were deleted, and that events arrive.
func TestTopologyIsRedeclared(t *testing.T) {
	t.Parallel()
	svc, names := startWithRabbit(t)
	svc.createUser("John", "Doe")
	svc.waitForLine("Received event user.created with user_id=1")
	ch := openChannel(t)
	for _, queue := range []string{names.queue(), names.deadLetterQueue()} {
		if _, err := ch.QueueDelete(queue, false, false, false); err != nil {
			t.Fatal(err)
		}
	}
	for _, exchange := range []string{names.exchange, names.deadLetterExchange()} {
		if err := ch.ExchangeDelete(exchange, false, false); err != nil {
			t.Fatal(err)
		}
	}
	conn := dialRabbit(t)
	exists := func(check func(*amqp.Channel) error) bool {
		ch, err := conn.Channel()
		if err != nil {
			t.Fatal(err)
		}
		defer ch.Close()
		return check(ch) == nil
	}
	for _, queue := range []string{names.queue(), names.deadLetterQueue()} {
		eventually(t, "queue "+queue, func() bool {
			return exists(func(ch *amqp.Channel) error {
				_, err := ch.QueueDeclarePassive(queue, true, false, false, false, nil)
				return err
			})
		})
	}
	for exchange, kind := range map[string]string{
		names.exchange: "topic", names.deadLetterExchange(): "fanout",
	} {
		eventually(t, "exchange "+exchange, func() bool {
			return exists(func(ch *amqp.Channel) error {
				return ch.ExchangeDeclarePassive(exchange, kind, true, false, false, false, nil)
			})
		})
	}
	svc.createUser("Jane", "Doe")
	svc.waitForLine("Received event user.created with user_id=2")
}

// TestMismatchedQueue checks that the service warns once of a queue that exists with other
// arguments, and consumes it.
func TestMismatchedQueue(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.rabbitURL, s.exchange = testRabbitURL, newExchange(t)
	names := &rabbitMQ{exchange: s.exchange}
	_, err := openChannel(t).QueueDeclare(names.queue(), true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	svc := startService(t, s)
	svc.createUser("John", "Doe")
	svc.waitForLine("Received event user.created with user_id=1")
	time.Sleep(2 * topologyInterval) // the service declares everything again meanwhile
	const warning = "RabbitMQ declaration mismatch, keeping the existing one"
	if n := len(svc.log.lines(warning)); n != 1 {
		t.Errorf("%d warnings of one mismatched queue, want 1", n)
	}
	svc.waitForLine(warning, "what", "queue "+names.queue())
	svc.createUser("Jane", "Doe")
	svc.waitForLine("Received event user.created with user_id=2")
}

// TestPublishCountsReturns checks that publish counts only the events before one that the broker
// returns because no queue is bound to its routing key, and that the metric counts returned events.
func TestPublishCountsReturns(t *testing.T) {
	t.Parallel()
	b := newRabbitMQ(settings{rabbitURL: testRabbitURL, exchange: newExchange(t), appName: "test"},
		newLogger(&logWriter{w: t.Output()}, 0), metrics.NewSet())
	p, err := b.publisher(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	n, err := p.publish(t.Context(), []event{newEvent(userCreated, 1, 1)})
	if n != 1 || err != nil {
		t.Errorf("event with a queue: published %d, %v, want 1", n, err)
	}
	// Only updates have a queue, so other events are returned.
	ch := openChannel(t)
	if err := ch.QueueUnbind(b.queue(), "user.*", b.exchange, nil); err != nil {
		t.Fatal(err)
	}
	if err := ch.QueueBind(b.queue(), userUpdated, b.exchange, false, nil); err != nil {
		t.Fatal(err)
	}
	events := []event{newEvent(userUpdated, 1, 2), newEvent(userUpdated, 1, 3),
		newEvent(userDeleted, 1, 4), newEvent(userUpdated, 2, 2)}
	if n, err := p.publish(t.Context(), events); n != 2 || err == nil {
		t.Errorf("third event without a queue: published %d, %v, want 2 and an error", n, err)
	}
	if b.returned.Get() != 1 {
		t.Errorf("events_returned_total %d, want 1", b.returned.Get())
	}
}

// TestBrokerOutage closes the connections to the broker while users change. It checks that every
// request succeeds, that readiness reports the outage, and that every event arrives afterwards in
// order.
func TestBrokerOutage(t *testing.T) {
	t.Parallel()
	s := postgresSettings(t)
	s.exchange = newExchange(t)
	events := record(t, s.exchange)
	p := newProxy(t, testRabbitURL)
	s.rabbitURL = throughProxy(t, testRabbitURL, p)
	svc := startService(t, s)
	svc.createUser("John", "Doe")
	for i := range 60 {
		if i%20 == 10 {
			p.set(false)
		}
		if i%20 == 15 {
			p.set(true)
		}
		if i == 13 {
			eventually(t, "readiness with rabbitmq down", func() bool {
				a := svc.do("GET", "/readyz", "")
				return a.status == 200 && a.json(t, "rabbitmq") == "down"
			})
		}
		a := svc.do("PUT", "/users/1", fmt.Sprintf(`{"name": "name %d"}`, i))
		if a.status != 200 {
			t.Errorf("PUT /users/1: status %d, want 200: %s", a.status, a.body)
		}
	}
	for last := int64(0); last < 61; {
		switch version := events.next(t).Data.Version; {
		case version == last+1:
			last = version
		case version > last+1:
			t.Fatalf("event of version %d after version %d, want %d", version, last, last+1)
		}
	}
	svc.waitForLine("Event connection restored", "connection", "relay")
	svc.waitForLine("Event connection restored", "connection", "consumer")
	eventually(t, "readiness with rabbitmq up", func() bool {
		return svc.do("GET", "/readyz", "").json(t, "rabbitmq") == "up"
	})
}

// TestSeveralBrokerHosts checks that the service reconnects to whichever of several hosts is up.
func TestSeveralBrokerHosts(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.exchange = newExchange(t)
	first, second := newProxy(t, testRabbitURL), newProxy(t, testRabbitURL)
	second.set(false)
	s.rabbitURL = withHosts(t, refusedAddress(t), first.address, second.address)
	svc := startService(t, s)
	for i, up := range []*proxy{first, second, first} {
		for _, p := range []*proxy{first, second} {
			p.set(p == up)
		}
		id := svc.createUser("John", "Doe")
		svc.waitForLine(fmt.Sprintf("Received event user.created with user_id=%d", id))
		eventually(t, "readiness with rabbitmq up again", func() bool {
			return svc.do("GET", "/readyz", "").json(t, "rabbitmq") == "up"
		})
		if id != int64(i+1) {
			t.Errorf("user with id %d, want %d", id, i+1)
		}
	}
}

// TestUnresponsiveBroker checks that neither requests nor the stop wait for a broker that accepts
// connections and never answers, and that the metrics show it as down.
func TestUnresponsiveBroker(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	s := memorySettings()
	s.rabbitURL = "amqp://guest:guest@" + listener.Addr().String()
	svc := startService(t, s)
	svc.createUser("John", "Doe")
	if a := svc.do("GET", "/readyz", ""); a.status != 200 || a.json(t, "rabbitmq") != "down" {
		t.Errorf("GET /readyz: status %d, want 200 with rabbitmq down: %s", a.status, a.body)
	}
	samples := svc.samples()
	for series, want := range map[string]float64{"outbox_pending": 1, "broker_connected": 0,
		"relay_leader": 0, "events_published_total": 0, "events_returned_total": 0} {
		if got, ok := samples[series]; got != want || !ok {
			t.Errorf("%s: %v, want %v", series, got, want)
		}
	}
	if samples["outbox_oldest_seconds"] <= 0 {
		t.Errorf("outbox_oldest_seconds: %v, want more than 0", samples["outbox_oldest_seconds"])
	}
	if err := svc.stop(); err != nil {
		t.Error(err)
	}
}

// TestTraceContext checks which traceparent and tracestate of a request are passed on, byte for byte.
func TestTraceContext(t *testing.T) {
	t.Parallel()
	long := "a=" + strings.Repeat("x", 256)
	for _, test := range []struct {
		name    string
		parents []string
		states  []string
		parent  string
		state   string
	}{
		{name: "none"},
		{name: "valid", parents: []string{parent1}, parent: parent1},
		{name: "with a state", parents: []string{parent1}, states: []string{state1},
			parent: parent1, state: state1},
		{name: "state in lines", parents: []string{parent1}, states: []string{"b=2, c=3", "a=1"},
			parent: parent1, state: "b=2, c=3,a=1"},
		{name: "empty members", parents: []string{parent1}, states: []string{"a=1,, \t,b=2"},
			parent: parent1, state: "a=1,, \t,b=2"},
		{name: "tenant", parents: []string{parent1}, states: []string{"1a-_*/b@c=d"},
			parent: parent1, state: "1a-_*/b@c=d"},
		{name: "longest value", parents: []string{parent1}, states: []string{long},
			parent: parent1, state: long},
		{name: "value too long", parents: []string{parent1}, states: []string{long + "x"},
			parent: parent1},
		{name: "32 members", parents: []string{parent1},
			states: []string{strings.Repeat("a=1,", 31) + "b=2"},
			parent: parent1, state: strings.Repeat("a=1,", 31) + "b=2"},
		{name: "33 members", parents: []string{parent1},
			states: []string{strings.Repeat("a=1,", 32) + "b=2"}, parent: parent1},
		{name: "too long", parents: []string{parent1},
			states: []string{strings.Repeat(long+",", 7) + long}, parent: parent1},
		{name: "no value", parents: []string{parent1}, states: []string{"a"}, parent: parent1},
		{name: "upper case", parents: []string{parent1}, states: []string{"A=1"}, parent: parent1},
		{name: "control character", parents: []string{parent1}, states: []string{"a=\t1\x01"},
			parent: parent1},
		{name: "not ASCII", parents: []string{parent1}, states: []string{"a=\xe9"}, parent: parent1},
		{name: "state alone", states: []string{"a=1"}},
		{name: "state of an invalid parent", parents: []string{"x"}, states: []string{"a=1"}},
		{name: "two parents", parents: []string{parent1, parent1}, states: []string{"a=1"}},
		{name: "later version", parents: []string{"cc" + parent1[2:] + "-x y"},
			states: []string{"a=1"}, parent: "cc" + parent1[2:] + "-x y", state: "a=1"},
		{name: "later version, too long",
			parents: []string{"cc" + parent1[2:] + "-" + strings.Repeat("x", 200)}},
		{name: "later version, not ASCII", parents: []string{"cc" + parent1[2:] + "-\xff"},
			states: []string{"a=1"}},
	} {
		for _, id := range []string{"", "request-1"} {
			h := http.Header{"Traceparent": test.parents, "Tracestate": test.states}
			if id != "" {
				h.Set("X-Request-Id", id)
			}
			got := requestTrace(h)
			if got.parent != test.parent || got.state != test.state || id != "" && got.id != id {
				t.Errorf("%s: %+v, want %q and %q", test.name, got, test.parent, test.state)
			}
		}
	}
}

// TestEventHeaders checks the headers of a message.
func TestEventHeaders(t *testing.T) {
	t.Parallel()
	e := newEvent(userDeleted, 7, 3)
	want := map[string]any{
		"trace_id":                "trace-1",
		"cloudEvents:specversion": "1.0",
		"cloudEvents:id":          e.ID,
		"cloudEvents:source":      "/a%2Fb",
		"cloudEvents:type":        "user.deleted",
		"cloudEvents:subject":     "7",
		"cloudEvents:time":        "2026-01-01T12:00:00.123456Z",
	}
	if got := e.headers("a/b"); !maps.Equal(got, want) {
		t.Errorf("headers %v, want %v", got, want)
	}
	e.actor, e.traceParent, e.traceState = "ops", parent1, state1
	want["actor"], want["traceparent"], want["tracestate"] = "ops", parent1, state1
	if got := e.headers("a/b"); !maps.Equal(got, want) {
		t.Errorf("headers %v, want %v", got, want)
	}
	e.traceState = strings.Repeat("x", maxEventBytes)
	if err := e.check(); !errors.Is(err, errUnreadable) {
		t.Errorf("check of an event with a long header: %v, want errUnreadable", err)
	}
}

// TestActors checks that the consumer's line names who made a change, with and without RabbitMQ: a
// client without a key, an API key, and a role of the database.
func TestActors(t *testing.T) {
	t.Parallel()
	check := func(t *testing.T, set settings) {
		set.apiKeys = []apiKey{{name: "ops", digest: sha256.Sum256([]byte("secret")), scopes: allScopes}}
		s := startService(t, set)
		a := s.do("POST", "/users", `{"name": "A", "surname": "B", "password": "correct horse"}`,
			"Authorization: Bearer secret", "traceparent: "+parent1, "tracestate: "+state1)
		if a.status != 201 {
			t.Fatalf("POST /users: %d %s", a.status, a.body)
		}
		s.waitForLine("Received event user.created with user_id=1", "actor", "ops",
			"trace_id", parent1[3:35])
		if set.databaseURL == "" {
			return
		}
		conn := connect(t, set.databaseURL)
		execute(t, conn, "UPDATE users SET name = 'C'")
		s.waitForLine("Received event user.updated with user_id=1", "actor",
			"sql:"+queryValue[string](t, conn, "SELECT session_user::text"))
	}
	t.Run("memory", func(t *testing.T) {
		t.Parallel()
		check(t, memorySettings())
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		check(t, postgresSettings(t))
	})
	t.Run("rabbitmq", func(t *testing.T) {
		t.Parallel()
		s := postgresSettings(t)
		s.rabbitURL, s.exchange = testRabbitURL, newExchange(t)
		check(t, s)
	})
	t.Run("anonymous", func(t *testing.T) {
		t.Parallel()
		s := startService(t, memorySettings())
		s.createUser("A", "B")
		s.waitForLine("Received event user.created with user_id=1", "actor", "anonymous")
	})
}
