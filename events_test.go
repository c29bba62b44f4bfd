package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
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

func newTestConsumer(log *logBuffer) *consumer {
	out := &logWriter{w: log}
	return newConsumer(newLogger(out, slog.LevelDebug), out, metrics.NewSet())
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
		unreadable, err := c.handle(t.Context(), [][]byte{encode(t, sent[d])})
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
		if unreadable, err := c.handle(t.Context(), [][]byte{body}); err != nil || unreadable != nil {
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
	c := newConsumer(newLogger(writer, 0), writer, metrics.NewSet())
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

// TestConsumerRecoversFromLogFailure checks that an event whose line was dropped, because the log was full
// and could not be written, is logged once when it is delivered again.
func TestConsumerRecoversFromLogFailure(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	out := &switchedWriter{to: log}
	out.broken.Store(true)
	writer := &logWriter{w: out}
	logger := newLogger(writer, slog.LevelDebug)
	c := newConsumer(logger, writer, metrics.NewSet())
	for range logCapacity / 100 {
		logger.Info("A line that fills the buffer", "text", strings.Repeat("x", 100))
	}
	events := []event{newEvent(userCreated, 1, 1)}
	if n, err := (inProcess{c, c.log}).publish(t.Context(), events); err == nil || n != 0 {
		t.Errorf("publish with a broken log: got %d, %v, want 0 and an error", n, err)
	}
	c.logEvent(t.Context(), events[0]) // drops the line, which the next flush reports
	out.broken.Store(false)
	if _, err := c.handle(t.Context(), nil); err == nil {
		t.Error("first flush: got no error, want one for the dropped line")
	}
	if _, err := c.handle(t.Context(), nil); err != nil {
		t.Errorf("second flush: got %v, want no error", err)
	}
	if n, err := (inProcess{c, c.log}).publish(t.Context(), events); err != nil || n != 1 {
		t.Errorf("publish with a working log: got %d, %v, want 1", n, err)
	}
	if n := len(log.lines("Received event user.created with user_id=1")); n != 1 {
		t.Errorf("lines of the event: got %d, want 1", n)
	}
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
		c := newConsumer(newLogger(writer, slog.LevelDebug), writer, metrics.NewSet())
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

func (alwaysLeads) lead(context.Context) (bool, error) { return true, nil }

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
				if _, err := s.updateUser(context.Background(), id, in, nil); err != nil {
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
