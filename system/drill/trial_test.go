package drill

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"

	"user-service/system/env"
)

// trial is a run of a scenario, with a database, replicas, clients and a recorder of its own.
type trial struct {
	*servers
	scenario
	t *testing.T

	db         *pgxpool.Pool // as the superuser
	dbName     string
	serviceURL string // DATABASE_URL of the replicas
	toPostgres *env.Proxy
	pair       *env.Pair      // the PostgreSQL servers of this trial, if it has its own
	bouncer    *env.PgBouncer // between the replicas and PostgreSQL, if it has one

	broker    *env.RabbitMQ
	rabbitURL string // RABBITMQ_URL of the replicas
	toRabbit  *env.Proxy

	previous bool // replicas start as the previous release from now on
	ledger   *ledger
	client   *http.Client
	begun    time.Time    // of the load
	over     time.Time    // the end of the fault: when its function returned, or what it set
	checks   []func()     // run after the load
	turns    atomic.Int64 // of the clients; also makes names unique
	outbox   atomic.Int64 // the last sample
	largest  atomic.Int64

	mu       sync.Mutex
	running  []*env.Service // by slot
	started  []*env.Service
	attempts []attempt
	problems map[string]int // number of occurrences
}

// recorderQueue is the queue that records the events. It has one active consumer: otherwise, when the
// recorder connects again, RabbitMQ may still send messages to the lost connection too, and deliver
// them again after later ones.
const recorderQueue = "drill.recorder"

func (s *servers) newTrial(t *testing.T, sc scenario) *trial {
	t.Helper()
	sc.replicas = cmp.Or(sc.replicas, 2)
	sc.clients = cmp.Or(sc.clients, 8)
	sc.pause = cmp.Or(sc.pause, 20*time.Millisecond)
	sc.timeout = cmp.Or(sc.timeout, 15*time.Second)
	r := &trial{
		servers: s, scenario: sc, t: t,
		dbName: s.newDatabase(t),
		broker: s.rabbit,
		ledger: newLedger(),
		client: &http.Client{Timeout: sc.timeout,
			Transport: &http.Transport{MaxIdleConnsPerHost: 64}},
		running:  make([]*env.Service, sc.replicas),
		problems: make(map[string]int),
	}
	r.openDB(s.postgres.URL("postgres", r.dbName))
	r.toPostgres = r.newProxy(s.postgres.URL("drill", r.dbName))
	r.toRabbit = r.newProxy(s.rabbit.URL())
	r.serviceURL, r.rabbitURL = r.toPostgres.URL, r.toRabbit.URL
	r.prepareRabbit()
	return r
}

func (r *trial) openDB(url string) {
	r.t.Helper()
	db, err := pgxpool.New(r.t.Context(), url)
	require(r.t, err)
	r.t.Cleanup(db.Close)
	r.db = db
}

func (r *trial) newProxy(target string) *env.Proxy {
	r.t.Helper()
	p, err := r.NewProxy(target)
	require(r.t, err)
	r.t.Cleanup(p.Close)
	return p
}

// run runs a scenario and returns its row.
func (s *servers) run(t *testing.T, sc scenario) result {
	r := s.newTrial(t, sc)
	if r.before != nil {
		r.before(r)
	}
	t.Cleanup(r.killReplicas)
	for slot := range r.running {
		r.startReplica(slot)
	}
	stopWatching := inBackground(t, r.record, r.sampleOutbox)
	r.begun = time.Now()
	stopLoad := inBackground(t, r.load()...)
	time.Sleep(time.Second)
	if r.fault != nil {
		r.fault(r)
	}
	if r.over.IsZero() {
		r.over = time.Now()
	}
	r.awaitRecovery()
	stopLoad()
	loaded := time.Now()
	for _, check := range r.checks {
		check()
	}
	for slot := range r.running {
		r.awaitRestored(slot)
	}
	eventually(t, "exactly one replica relays", func() bool { return r.leaders() == 1 })
	row := r.settle()
	stopWatching()
	r.killReplicas()
	row.longestGap, row.slowest = r.longestGap(loaded)
	r.judge(&row)
	r.logRow(row)
	return row
}

// awaitRecovery waits up to 60 s for an event of a change after the fault, and 2 s in any case.
func (r *trial) awaitRecovery() {
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); {
		if r.eventAfter(r.over) < never && time.Since(r.over) > 2*time.Second {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (r *trial) logRow(row result) {
	r.t.Helper()
	verdict := "passed"
	if r.t.Failed() {
		verdict = "FAILED"
		said := r.notable()
		r.t.Logf("the end of the replicas' logs: %s", said[max(0, len(said)-5000):])
	}
	r.t.Logf("%s: %s in %.1f s: %d of %d attempts ok, longest time without 2xx %v, recovered in %v",
		r.name, verdict, time.Since(r.begun).Seconds(), row.ok, row.attempts,
		row.longestGap.Round(time.Millisecond), row.recovery.Round(time.Millisecond))
}

// prepareRabbit resets the broker, and declares the exchange and the recorder's queue.
func (r *trial) prepareRabbit() {
	r.t.Helper()
	ch := r.rabbitChannel()
	for _, queue := range []string{env.Queue, env.DeadLetterQueue, recorderQueue, mirrorQueue} {
		_, err := ch.QueueDelete(queue, false, false, false)
		require(r.t, err)
	}
	for _, exchange := range []string{env.Exchange, env.DeadLetterExchange} {
		require(r.t, ch.ExchangeDelete(exchange, false, false))
	}
	_, err := ch.QueueDeclare(recorderQueue, true, false, false, false,
		amqp.Table{"x-queue-type": "quorum", "x-single-active-consumer": true})
	require(r.t, errors.Join(err,
		ch.ExchangeDeclare(env.Exchange, "topic", true, false, false, false, nil),
		bindRecorder(ch)))
}

func bindRecorder(ch *amqp.Channel) error {
	return ch.QueueBind(recorderQueue, "user.*", env.Exchange, false, nil)
}

// rabbitChannel returns a channel on a new connection, which the test closes. An error of the
// broker closes a channel, so a channel is for one use or a few.
func (r *trial) rabbitChannel() *amqp.Channel {
	r.t.Helper()
	conn, err := r.broker.Dial()
	require(r.t, err)
	r.t.Cleanup(func() { conn.CloseDeadline(time.Now().Add(time.Second)) })
	ch, err := conn.Channel()
	require(r.t, err)
	return ch
}

// ctl runs rabbitmqctl on the first node.
func (r *trial) ctl(args ...string) {
	r.t.Helper()
	_, err := r.broker.Ctl(r.t.Context(), r.broker.Nodes[0], args...)
	require(r.t, err)
}

func (r *trial) startReplica(slot int) {
	r.t.Helper()
	s, err := r.StartService(env.ServiceConfig{
		Previous: r.previous,
		OnEvent:  r.ledger.logged,
		Settings: []string{"DATABASE_URL=" + r.serviceURL, "RABBITMQ_URL=" + r.rabbitURL,
			"SHUTDOWN_DELAY=1s"},
	})
	require(r.t, err)
	go s.Probe()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running[slot], r.started = s, append(r.started, s)
}

func (r *trial) killReplicas() {
	for _, s := range r.started {
		s.Kill()
		<-s.Ended
	}
}

// notable returns what the replicas logged at WARN and above.
func (r *trial) notable() string {
	var b strings.Builder
	for _, s := range r.started {
		b.WriteString(s.Notable())
	}
	return b.String()
}

// awaitRestored expects a line in the log for each connection that was restored.
func (r *trial) awaitRestored(slot int) {
	r.t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !r.at(slot).Restored(); {
		if time.Now().After(deadline) {
			r.t.Errorf("a replica does not log that its connections are restored:\n%s",
				r.at(slot).Notable())
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (r *trial) at(slot int) *env.Service {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running[slot]
}

// terminate sends SIGTERM to a replica and expects exit code 0 within 10 s after SHUTDOWN_DELAY.
func (r *trial) terminate(slot int) {
	r.t.Helper()
	s := r.at(slot)
	s.Signal(syscall.SIGTERM)
	select {
	case <-s.Ended:
		if code := s.ExitCode(); code != 0 {
			r.t.Errorf("exit code %d after SIGTERM, want 0", code)
		}
	case <-time.After(11 * time.Second):
		r.t.Error("a replica did not end within 10 s after SIGTERM")
	}
}

// leader returns the slot of the replica that relays.
func (r *trial) leader() (slot int) {
	r.t.Helper()
	eventually(r.t, "a replica relays", func() bool {
		for slot = range r.running {
			if r.at(slot).Metric(env.MetricLeader) == 1 {
				return true
			}
		}
		return false
	})
	return slot
}

// leaders returns the number of replicas that relay.
func (r *trial) leaders() (n int) {
	for slot := range r.running {
		n += int(r.at(slot).Metric(env.MetricLeader))
	}
	return n
}

// exec runs SQL as the superuser in the service's database.
func (r *trial) exec(sql string) {
	r.t.Helper()
	if _, err := r.db.Exec(r.t.Context(), sql); err != nil {
		r.t.Fatalf("%s: %v", sql, err)
	}
}

func (r *trial) sampleOutbox(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, 50*time.Millisecond) {
		query, cancel := context.WithTimeout(ctx, 2*time.Second)
		var n int64
		if r.db.QueryRow(query, "SELECT count(*) FROM outbox").Scan(&n) == nil {
			r.outbox.Store(n)
			r.largest.Store(max(n, r.largest.Load()))
		}
		cancel()
	}
}

// finally registers a check that runs after the load.
func (r *trial) finally(check func()) { r.checks = append(r.checks, check) }

// limit returns how long something may take: d on the quiet machine of a full run, and three times
// as long with the selection.
func (r *trial) limit(d time.Duration) time.Duration {
	if *allRows {
		return d
	}
	return 3 * d
}

// roundsOf returns the number for a full run, or that for the selection.
func roundsOf[T any](full, selection T) T {
	if *allRows {
		return full
	}
	return selection
}

// within waits until a condition holds, and expects that soon.
func (r *trial) within(d time.Duration, what string, holds func() bool) {
	r.t.Helper()
	begin := time.Now()
	eventually(r.t, what, holds)
	took := time.Since(begin).Round(time.Millisecond)
	r.t.Logf("%s after %v", what, took)
	if took > r.limit(d) {
		r.t.Errorf("%s only after %v", what, took)
	}
}

// eventsFlow expects an event of a change that was requested after a time.
func (r *trial) eventsFlow(after time.Time, within time.Duration) {
	r.finally(func() {
		took := r.eventAfter(after).Round(time.Millisecond)
		r.t.Logf("events flowed after %v", took)
		if took > r.limit(within) {
			r.t.Errorf("events flowed only after %v", took)
		}
	})
}

// awaitEvents waits for an event of a change that was requested after a time.
func (r *trial) awaitEvents(after time.Time, within time.Duration) {
	r.t.Helper()
	r.eventsFlow(after, within)
	eventually(r.t, "an event arrives", func() bool {
		time.Sleep(50 * time.Millisecond)
		return r.eventAfter(after) < never
	})
}

// answersCome expects a 2xx soon after a time.
func (r *trial) answersCome(after time.Time, within time.Duration) {
	r.finally(func() {
		if first := r.firstOK(after); first > r.limit(within) {
			r.t.Errorf("the first 2xx came %v after the fault", first)
		}
	})
}

// firstOK returns how long after a time the first 2xx came, or never.
func (r *trial) firstOK(after time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := never
	for _, a := range r.attempts {
		if a.outcome == outcomeOK && a.done.After(after) {
			first = min(first, a.done.Sub(after))
		}
	}
	return first
}

// never stands for the duration until something that did not happen.
const never = time.Hour

// eventAfter returns how long after a time the recorder received the event of a change that was
// requested after that time.
func (r *trial) eventAfter(t time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ledger.mu.Lock()
	defer r.ledger.mu.Unlock()
	first := never
	for _, a := range slices.Backward(r.attempts) {
		if a.done.Before(t) {
			break
		}
		if a.outcome != outcomeOK || !a.requested.After(t) || a.change.version == 0 {
			continue
		}
		// An earlier arrival belongs to a change that was lost with its database.
		arrival := r.ledger.users[a.change.userID].find(a.change.version)
		if arrival != nil && arrival.at.After(t) {
			first = min(first, arrival.at.Sub(t))
		}
	}
	return first
}

// longestGap returns the longest time of the load without a 2xx, and the slowest answer.
func (r *trial) longestGap(end time.Time) (gap, slowest time.Duration) {
	last := r.begun
	for _, a := range r.attempts { // almost in the order of done
		slowest = max(slowest, a.done.Sub(a.begun))
		if a.outcome == outcomeOK {
			gap, last = max(gap, a.done.Sub(last)), a.done
		}
	}
	return max(gap, end.Sub(last)), slowest
}

// p99 returns the 99th percentile of the latency of the requests between two times.
func (r *trial) p99(from, to time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	var took []time.Duration
	for _, a := range r.attempts {
		if a.begun.After(from) && a.done.Before(to) {
			took = append(took, a.done.Sub(a.begun))
		}
	}
	if len(took) == 0 {
		return 0
	}
	slices.Sort(took)
	return took[len(took)*99/100]
}

// problem counts an occurrence of what must not happen.
func (r *trial) problem(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.problems[fmt.Sprintf(format, args...)]++
}

func (r *trial) problemIf(is bool, format string, args ...any) {
	if is {
		r.problem(format, args...)
	}
}
