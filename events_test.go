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

func TestEventJSON(t *testing.T) {
	t.Parallel()
	e := newEvent(userCreated, 7, 1)
	e.ID = "01890a5d-ac96-774b-bcce-b302099a8057"
	const want = `{"event_id":"01890a5d-ac96-774b-bcce-b302099a8057","event_type":"user.created",` +
		`"data":{"user_id":7,"version":1},"trace_id":"trace-1","occurred_at":"2026-01-01T12:00:00.123456Z"}`
	if got := string(encode(t, e)); got != want {
		t.Errorf("%s\nnot\n%s", got, want)
	}
}

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
		"a version in words":  {replace(`"version":1`, `"version":"1"`), false},
		"no JSON":             {"not JSON", false},
		"an empty body":       {"", false},
		"another value":       {"[]", false},
		"an empty object":     {"{}", false},
		"a truncated body":    {good[:len(good)-1], false},
		"the largest body":    {good + strings.Repeat(" ", maxEventBytes-len(good)), true},
		"one byte over it":    {good + strings.Repeat(" ", maxEventBytes-len(good)+1), false},
		"a strange trace id":  {replace("trace-1", `\u0000\n`), true},
		"an invalid time":     {replace("2026-01-01T", "2026-13-01T"), false},
		"two events in a row": {good + good, false},
	} {
		_, err := parseEvent([]byte(test.body))
		if (err == nil) != test.ok || err != nil && !errors.Is(err, errUnreadable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// fakeBroker takes what its verdict says: how many events of a window, and with what error.
type fakeBroker struct {
	mu        sync.Mutex
	published []string // "user/version" of every event that was sent
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

// TestRelayRemovesWhatTheBrokerHas refuses the third event once: what came before it is
// gone for good, and the rest is sent again from there on.
func TestRelayRemovesWhatTheBrokerHas(t *testing.T) {
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
			t.Errorf("published %v, not %v", b.published, want)
		}
		if n := len(m.events); n != 0 {
			t.Errorf("%d events are left", n)
		}
		if r.published.Get() != 5 {
			t.Errorf("events_published_total is %d", r.published.Get())
		}
		if lost, back := log.lines("Event connection lost"), log.lines("Event connection restored"); len(lost) != 1 ||
			len(back) != 1 || lost[0]["level"] != "WARN" {
			t.Errorf("one loss is not told once:\n%s", log)
		}
	})
}

// TestRelayTellsALongLossOnce lets the broker be away for an hour.
func TestRelayTellsALongLossOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		mustCreate(t, m, "John")
		start := time.Now()
		attempts := 0
		b := &fakeBroker{verdict: func(sent int) (int, error) {
			if attempts++; time.Since(start) < time.Hour {
				return 0, errors.New("away")
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
			t.Error("the event was not sent within 11 s after the broker was back")
		}
		if attempts < 360 || attempts > 3600 {
			t.Errorf("%d attempts in an hour", attempts)
		}
		warnings := 0
		for _, line := range log.lines("") {
			if line["level"] == "WARN" {
				warnings++
			}
		}
		if warnings != 1 {
			t.Errorf("%d warnings for one loss", warnings)
		}
	})
}

// TestRelayDrains ends the relay while events are pending: they are sent first.
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
			t.Errorf("%d events are left, %d were sent", len(m.events), len(b.published))
		}
	})
}

func newTestConsumer(log *logBuffer) *consumer {
	out := &logWriter{w: log}
	return newConsumer(newLogger(out, slog.LevelDebug), out, metrics.NewSet())
}

func TestConsumerSkipsDuplicates(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	c := newTestConsumer(log)
	sent := make(map[eventData]event)
	for _, d := range []eventData{{1, 1}, {1, 1}, {2, 1}, {1, 2}, {1, 1}, {1, 3}, {2, 2}} {
		if _, again := sent[d]; !again {
			sent[d] = newEvent(userUpdated, d.UserID, d.Version)
		}
		if unreadable, err := c.handle(t.Context(), [][]byte{encode(t, sent[d])}); err != nil || unreadable != nil {
			t.Error(unreadable, err)
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
	if want := []string{"1/1 INFO", "2/1 INFO", "1/2 INFO", "1/3 INFO", "2/2 INFO"}; !slices.Equal(received, want) {
		t.Errorf("received %v, not %v", received, want)
	}
	if want := []string{"1/1 DEBUG", "1/1 DEBUG"}; !slices.Equal(skipped, want) {
		t.Errorf("skipped %v, not %v", skipped, want)
	}
	if c.consumed.Get() != 5 || c.skipped.Get() != 2 {
		t.Errorf("consumed %d, skipped %d", c.consumed.Get(), c.skipped.Get())
	}
}

// TestConsumerReportsConflicts gives it another event of a version that it has: the database was
// restored, or failed over with a loss.
func TestConsumerReportsConflicts(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	c := newTestConsumer(log)
	for _, version := range []int64{1, 2, 2, 1, 3} {
		body := encode(t, newEvent(userUpdated, 7, version))
		if unreadable, err := c.handle(t.Context(), [][]byte{body}); err != nil || unreadable != nil {
			t.Error(unreadable, err)
		}
	}
	var conflicts []logLine
	for _, line := range log.lines("") {
		if line["level"] == "WARN" {
			conflicts = append(conflicts, line)
		}
	}
	if len(conflicts) != 1 || conflicts[0]["user_id"] != 7.0 || conflicts[0]["version"] != 2.0 {
		t.Errorf("one conflict was reported as %v", conflicts)
	}
	if c.consumed.Get() != 3 || c.skipped.Get() != 2 {
		t.Errorf("consumed %d, skipped %d", c.consumed.Get(), c.skipped.Get())
	}
}

func TestVersionsStayBounded(t *testing.T) {
	t.Parallel()
	v := recent[int64, int64]{max: maxVersions}
	for id := range int64(3 * maxVersions) {
		v.put(id+1, 1)
		if len(v.newer)+len(v.older) > maxVersions {
			t.Fatalf("%d versions after %d users", len(v.newer)+len(v.older), id)
		}
	}
	for id := int64(3*maxVersions - maxVersions/2 + 1); id <= 3*maxVersions; id++ {
		if version, ok := v.get(id); !ok || version != 1 {
			t.Fatalf("user %d is forgotten", id)
		}
	}
}

// connState says whether a connection is closed.
type connState bool

func (c connState) IsClosed() bool { return bool(c) }

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("disk full") }

// TestConsumerKeepsWhatItCannotLog gives the consumer a log that cannot be written: its
// events must come again, not be acknowledged.
func TestConsumerKeepsWhatItCannotLog(t *testing.T) {
	t.Parallel()
	writer := &logWriter{w: brokenWriter{}}
	c := newConsumer(newLogger(writer, 0), writer, metrics.NewSet())
	for version := range int64(2) {
		e := newEvent(userCreated, 1, version+1)
		if n, err := (inProcess{c, c.log}).publish(t.Context(), []event{e}); err == nil || n != 0 {
			t.Errorf("%d events whose lines were not written are acknowledged: %v", n, err)
		}
		e = newEvent(userCreated, 2, version+1)
		var acks acknowledger
		d := amqp.Delivery{Acknowledger: &acks, DeliveryTag: 1, Body: encode(t, e)}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		b := &rabbitMQ{log: c.log}
		if err := b.settle(ctx, connState(false), []amqp.Delivery{d}, c); err == nil || len(acks) > 0 {
			t.Errorf("an event whose line was not written: %v, %v", acks, err)
		}
	}
}

// TestConsumerTriesAgain fills a log that cannot be written until a line is lost: when it can
// be written again, the event comes again and gets its line.
func TestConsumerTriesAgain(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	out := &switchedWriter{to: log}
	out.broken.Store(true)
	writer := &logWriter{w: out}
	logger := newLogger(writer, slog.LevelDebug)
	c := newConsumer(logger, writer, metrics.NewSet())
	for range logCapacity / 100 {
		logger.Info("A line that makes the buffer full", "text", strings.Repeat("x", 100))
	}
	events := []event{newEvent(userCreated, 1, 1)}
	if n, err := (inProcess{c, c.log}).publish(t.Context(), events); err == nil || n != 0 {
		t.Errorf("%d events are acknowledged: %v", n, err)
	}
	c.logEvent(t.Context(), events[0]) // this line is lost, and the next flush says so
	out.broken.Store(false)
	for healed := range 2 {
		if _, err := c.handle(t.Context(), nil); (err == nil) != (healed == 1) {
			t.Errorf("flush %d: %v", healed, err)
		}
	}
	if n, err := (inProcess{c, c.log}).publish(t.Context(), events); err != nil || n != 1 {
		t.Errorf("%d events are acknowledged: %v", n, err)
	}
	if n := len(log.lines("Received event user.created with user_id=1")); n != 1 {
		t.Errorf("%d lines of the event", n)
	}
}

// TestSettleWaitsForTheLog gives the consumer good and unreadable messages while its log cannot be
// written. It keeps them, and settles each once when the log can be written again.
func TestSettleWaitsForTheLog(t *testing.T) {
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
			t.Errorf("settled although no line can be written: %q", acks)
		}
		out.broken.Store(false)
		time.Sleep(maxPause)
		synctest.Wait()
		if err := <-settled; err != nil {
			t.Error(err)
		}
		if want := (acknowledger{"reject 2 false", "ack 3 true"}); !slices.Equal(acks, want) {
			t.Errorf("%q, want %q", acks, want)
		}
		for _, event := range []string{"Received event user.created with user_id=1",
			"Received event user.updated with user_id=1"} {
			if len(log.lines(event)) == 0 {
				t.Errorf("no line %q", event)
			}
		}
		if c.consumed.Get() != 2 {
			t.Errorf("consumed %d, want 2", c.consumed.Get())
		}
	})
}

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

// acknowledger remembers what a broker would be told.
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

// TestSettle has good, unreadable and duplicate messages wait at once: what is told to the
// broker is one acknowledgement, after every line is written.
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
		{"one", [][]byte{good(1)}, acknowledger{"ack 1 true"}},
		{"three", [][]byte{good(2), good(3), good(4)}, acknowledger{"ack 3 true"}},
		{"a bad one first", [][]byte{bad, good(5)}, acknowledger{"reject 1 false", "ack 2 true"}},
		{"a bad one last", [][]byte{good(6), bad}, acknowledger{"reject 2 false", "ack 1 true"}},
		{"bad ones only", [][]byte{bad, bad}, acknowledger{"reject 1 false", "reject 2 false"}},
		{"a duplicate", [][]byte{good(6), good(7), good(7)}, acknowledger{"ack 3 true"}},
	} {
		var acks acknowledger
		deliveries := make(chan amqp.Delivery, len(test.bodies))
		for i, body := range test.bodies {
			deliveries <- amqp.Delivery{Acknowledger: &acks, DeliveryTag: uint64(i + 1), Body: body}
		}
		b := &rabbitMQ{log: c.log}
		if err := b.settle(t.Context(), connState(false), received(<-deliveries, deliveries), c); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if !slices.Equal(acks, test.want) {
			t.Errorf("%s: %q, want %q", test.name, acks, test.want)
		}
	}
	received := 0
	for _, line := range log.lines("") {
		if strings.HasPrefix(line["event"].(string), "Received event") {
			received++
		}
	}
	if received != 7 {
		t.Errorf("%d lines, want 7", received)
	}
}

// TestBrokerAndStoreCombine runs a change through every store and broker.
func TestBrokerAndStoreCombine(t *testing.T) {
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
				svc.do("POST", "/users", `{"name": "John", "surname": "Doe", "password": "`+secret+`"}`,
					"X-Request-Id: trace-create")
				svc.do("PUT", "/users/1", `{"name": "Jane"}`, "X-Request-Id: trace-update")
				svc.do("DELETE", "/users/1", "", "X-Request-Id: trace-delete")
				for i, verb := range []string{"create", "update", "delete"} {
					svc.waitForLine("Received event user."+verb+"d with user_id=1",
						"trace_id", "trace-"+verb, "event_type", "user."+verb+"d",
						"user_id", 1, "version", i+1)
				}
				if database {
					conn := connect(t, s.databaseURL)
					eventually(t, "an empty outbox", func() bool {
						return queryValue[int](t, conn, "SELECT count(*) FROM outbox") == 0
					})
				}
			})
		}
	}
}

// strangeEvents are rows of the outbox that no release of the service writes.
const strangeEvents = `
	SET session_replication_role = replica;
	INSERT INTO outbox (event_type, user_id, version, trace_id, occurred_at) VALUES
		('user.renamed', 1, 1, 'strange-1', now()),
		('x', 1, 1, 'strange-2', now()),
		('user.updated', 0, 1, 'strange-3', now()),
		('user.updated', 1, 2, repeat('x', 300), now()),
		('user.updated', 7, 2, 'good', now());
	RESET session_replication_role`

// TestStrangeEventsStopNobody puts events into the outbox that no consumer can read. Each is set
// aside with a line, and the others go on.
func TestStrangeEventsStopNobody(t *testing.T) {
	t.Parallel()
	for broker, aside := range map[string][]string{
		"in process": {"strange-1", "strange-2", "strange-3", strings.Repeat("x", 300)},
		"rabbitmq":   {"strange-2", strings.Repeat("x", 300)}, // others are dead letters
	} {
		t.Run(broker, func(t *testing.T) {
			t.Parallel()
			s := postgresSettings(t)
			if broker == "rabbitmq" {
				s.rabbitURL, s.exchange = testRabbitURL, newExchange(t)
			}
			svc := startService(t, s)
			svc.log.allowErrors(len(aside))
			execute(t, connect(t, asSuperuser(t, s.databaseURL)), strangeEvents)
			id := svc.createUser("John", "Doe")
			svc.waitForLine("Received event user.updated with user_id=7", "trace_id", "good")
			svc.waitForLine(fmt.Sprintf("Received event user.created with user_id=%d", id))
			conn := connect(t, s.databaseURL)
			eventually(t, "an empty outbox", func() bool {
				return queryValue[int](t, conn, "SELECT count(*) FROM outbox") == 0
			})
			for _, traceID := range aside {
				traceID = traceID[:min(len(traceID), maxTraceIDBytes)]
				line := svc.waitForLine("Undeliverable event removed", "trace_id", traceID)
				if line["level"] != "ERROR" || line["event_id"] == nil || line["version"] == nil {
					t.Errorf("what is set aside is told as %v", line)
				}
			}
		})
	}
}

// alwaysLeads is a store whose relay believes that it leads.
type alwaysLeads struct{ *postgres }

func (alwaysLeads) lead(context.Context) (bool, error) { return true, nil }

// slowBroker waits for a moment before it publishes, so that relays overtake each other.
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

// TestTwoRelaysKeepOrder has two relays that both believe that they lead publish the same outbox.
// There may be copies, but the first arrivals of each user's versions are in order and complete.
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
	checkFirstArrivals(t, events, last, users) // so that a relay works when the changes begin
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

// checkFirstArrivals waits for so many different events. Copies may come between them. Last has
// the newest version of each user that has arrived.
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

// TestOneRelayAmongReplicas lets clients change few users through three replicas on one
// database and one broker. Whoever relays, each user's versions arrive without a gap.
func TestOneRelayAmongReplicas(t *testing.T) {
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
				a := replicas[(c+i)%len(replicas)].do("PUT", path, fmt.Sprintf(`{"name": "n%d-%d"}`, c, i))
				if a.status != 200 {
					t.Errorf("%d %s", a.status, a.body)
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
	eventually(t, "each event in one replica's log", func() bool {
		return received() == users+clients*rounds
	})
}
