package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

var wholeDrill = flag.Bool("drill", false, "TestDrill: all faults instead of the most important ones")

// TestDrill runs the program under load while faults happen to it, to its PostgreSQL and to
// its RabbitMQ, and prints a table. Its words:
//
// An attempt is a change that a client asked for: ok was answered 2xx; failed was certainly
// not done (4xx, a 503 that says so, no connection); unknown is everything else.
//
// What must have happened to a user is versions 1 to its last: the one in the table, or that
// of its user.deleted event. Against that stands the recorder, a queue of the drill's own.
//   - lost: versions up to the last, or acknowledged, whose event the recorder never got;
//   - phantom: events of versions beyond the last, of users that never existed, of the
//     deletion of a user that is there, and two different events of one version;
//   - reordered: events that, when they came for the first time, did not follow the highest
//     version of their user so far: also each one after a gap;
//   - duplicated: further deliveries of an event by the service.
//
// Two more columns compare with the database as it is in the end. The database can be another
// one than before: a standby that took over.
//   - missing: acknowledged changes that it does not have: no row of the user although nobody
//     deleted it, a version below the acknowledged one, or a row in spite of an acknowledged
//     deletion;
//   - without change: events whose change it does not have. Each of them is a phantom too,
//     except where asynchronous replication may lose changes: there it is not the service's
//     fault that the new primary does not have a change whose event was published.
//
// The time to recover is from the end of the fault until the recorder has the event of an
// acknowledged change that was asked for after the end: so whatever was before it in the
// outbox is through. The largest outbox is sampled every 50 ms.
//
// In every scenario lost, phantom and reordered are 0, and missing and without change too, but
// for the failover to an asynchronous standby, which only reports those two. The service's
// consumer has logged every event and put none aside, and the outbox is empty in the end.
// Nothing is answered with 500; no change was done twice, or although its answer was that it
// was not. The log has a line for each connection that is back, and no ERROR. One replica relays.
func TestDrill(t *testing.T) {
	s := startServers(t)
	var results []result
	for _, sc := range scenarios {
		if *wholeDrill || sc.short {
			t.Run(sc.name, func(t *testing.T) { results = append(results, s.try(t, sc)) })
		}
	}
	fmt.Printf("\n%s\n%s\n", table(results), s.versions(t))
}

// scenario is one row of the table.
type scenario struct {
	name  string
	short bool // part of the selection that `make test` runs

	replicas int           // 0: two
	clients  int           // 0: eight
	pause    time.Duration // of a client between two changes; 0: 20 ms
	shared   int           // clients change this many common users, instead of their own
	patience time.Duration // of a client with an answer; 0: 15 s

	// onlyRabbit: nothing but RabbitMQ is affected, so every answer is 2xx.
	onlyRabbit bool
	// database: any answer comes within 6 s, 503 with Retry-After if it is none, and 2xx
	// are back 2 s after the fault.
	database bool
	// lossy: the database that is there in the end may lack the last changes, acknowledged or
	// not.
	lossy bool
	// queueLost: the queue of the service's consumer is lost with what is in it.
	queueLost bool
	// bindingLost: the recorder's queue loses its binding, which comes back after the
	// service's own. So what only the consumer of the service logged counts as received.
	bindingLost bool

	before func(*trial) // happens before the service starts
	fault  func(*trial) // begins and ends under load
}

var scenarios = []scenario{
	// The service.
	{name: "kill -9 again and again", short: true, replicas: 3, fault: killAgainAndAgain},
	{name: "SIGTERM, rolling", short: true, onlyRabbit: true, fault: restartRolling},
	{name: "leading replica killed", replicas: 3, fault: killLeader},
	{name: "leading replica frozen for 30 s", replicas: 3, patience: 2 * time.Second, fault: freezeLeader},
	{name: "order: 32 clients, 5 users", short: true, replicas: 3, clients: 32, shared: 5,
		pause: 10 * time.Millisecond, onlyRabbit: true, fault: holdBackCreations},
	{name: "rolling update from c223611 and back", short: true, onlyRabbit: true,
		before: startPrevious, fault: updateAndBack},

	// RabbitMQ.
	{name: "RabbitMQ: connections closed, stop_app", short: true, onlyRabbit: true, fault: stopRabbit},
	{name: "RabbitMQ: killed", onlyRabbit: true, fault: killRabbit},
	{name: "RabbitMQ: frozen for 20 s", onlyRabbit: true, fault: freezeRabbit},
	{name: "RabbitMQ: memory alarm", onlyRabbit: true, fault: raiseAlarm},
	{name: "RabbitMQ: absent at start", onlyRabbit: true, fault: endAbsence,
		before: func(r *trial) { r.toRabbit.cut(true) }},
	{name: "RabbitMQ: TCP cut and flapping", short: true, onlyRabbit: true, fault: cutRabbit},
	{name: "RabbitMQ: packets to it swallowed", onlyRabbit: true,
		fault: func(r *trial) { r.swallow(r.toRabbit, fromClient, 20*time.Second) }},
	{name: "RabbitMQ: packets from it swallowed", onlyRabbit: true,
		fault: func(r *trial) { r.swallow(r.toRabbit, fromServer, 20*time.Second) }},
	{name: "RabbitMQ: our queue deleted", short: true, onlyRabbit: true, queueLost: true, fault: deleteQueue},
	{name: "RabbitMQ: the exchange deleted", onlyRabbit: true, bindingLost: true, fault: deleteExchange},
	{name: "RabbitMQ: all bindings removed", onlyRabbit: true, bindingLost: true, fault: removeBindings},
	{name: "RabbitMQ: our queue with other arguments", onlyRabbit: true, before: declareForeignQueue},
	{name: "RabbitMQ: cluster of three, leader killed", onlyRabbit: true, before: startCluster,
		fault: killQueueLeader},
	{name: "RabbitMQ: one of the hosts is dead at start", onlyRabbit: true, before: nameDeadHosts,
		fault: loseLivingHost},
	{name: "unreadable messages", onlyRabbit: true, fault: sendUnreadable},

	// PostgreSQL.
	{name: "PostgreSQL: restart fast", database: true,
		fault: func(r *trial) { r.restartPostgres(r.t, syscall.SIGINT) }},
	{name: "PostgreSQL: restart immediate", short: true, database: true,
		fault: func(r *trial) { r.restartPostgres(r.t, syscall.SIGQUIT) }},
	{name: "PostgreSQL: connections terminated", database: true, fault: terminateConnections},
	{name: "PostgreSQL: read-only for 4 s", database: true, fault: makeReadOnly},
	{name: "PostgreSQL: frozen for 8 s", database: true,
		fault: func(r *trial) { r.freezePostgres(r.t, r.db, 8*time.Second) }},
	{name: "PostgreSQL: table locked for 8 s", database: true, fault: lockTable},
	{name: "PostgreSQL: too many connections", database: true, fault: fillConnections},
	{name: "PostgreSQL: answers lost on the way", database: true, fault: loseAnswers},
	{name: "PostgreSQL: standby, asynchronous, failover", database: true, lossy: true,
		before: useAsynchronousPair, fault: failOver},
	{name: "PostgreSQL: standby, synchronous, failover", short: true, database: true, clients: 24,
		before: useSynchronousPair, fault: failOverBehind},
	{name: "PostgreSQL: standby, synchronous, silent", database: true,
		before: useSynchronousPair, fault: silenceStandby},
	{name: "PostgreSQL: planned switchover", database: true,
		before: useAsynchronousPair, fault: switchOver},
	{name: "PgBouncer, session pooling", replicas: 3,
		before: func(r *trial) { r.useBouncer("session") }, fault: disturbPooled},
	{name: "PgBouncer, transaction pooling", short: true, replicas: 3,
		before: func(r *trial) { r.useBouncer("transaction") }, fault: disturbPooled},

	// Other writers.
	{name: "psql writers beside the API", short: true, shared: 20, onlyRabbit: true,
		fault: writeBeside},
	{name: "an import that stays open", onlyRabbit: true, fault: importSlowly},

	// Load.
	{name: "old snapshot, backlog of 100,000", onlyRabbit: true, replicas: 1, clients: 4,
		fault: drainBacklog},
	{name: "2,000 clients vanish", replicas: 1, fault: vanish},
}

// killAgainAndAgain kills, in turn, anyone at any moment, and the replica whose consumer is
// at work, in the middle of that: it cannot write its log.
func killAgainAndAgain(r *trial) {
	duration := 6 * time.Second
	if *wholeDrill {
		duration = 15 * time.Second
	}
	for i, end := 0, time.Now().Add(duration); time.Now().Before(end); i++ {
		slot, unblock := rand.N(r.replicas), func() {}
		if i%2 == 0 {
			for other := range r.replicas {
				if r.at(other).heard.Load() > r.at(slot).heard.Load() {
					slot = other
				}
			}
			unblock = r.at(slot).blockOutput()
			time.Sleep(300 * time.Millisecond)
		}
		time.Sleep(rand.N(500 * time.Millisecond))
		r.at(slot).cmd.Process.Kill()
		unblock()
		<-r.at(slot).ended
		time.Sleep(rand.N(200 * time.Millisecond))
		r.startReplica(slot)
	}
}

func restartRolling(r *trial) {
	rounds := 1
	if *wholeDrill {
		rounds = 3
	}
	for i := range rounds * r.replicas {
		slot := i % r.replicas
		r.terminate(slot)
		r.startReplica(slot)
		time.Sleep(300 * time.Millisecond)
	}
}

func killLeader(r *trial) {
	slot := r.leader()
	killed := time.Now()
	r.at(slot).cmd.Process.Kill()
	r.over = killed
	r.eventsFlow(killed, 5*time.Second)
	time.Sleep(5 * time.Second)
	r.startReplica(slot)
}

func freezeLeader(r *trial) {
	slot := r.leader()
	frozen := time.Now()
	r.at(slot).cmd.Process.Signal(syscall.SIGSTOP)
	r.eventsFlow(frozen, 5*time.Second)
	time.Sleep(30 * time.Second)
	r.at(slot).cmd.Process.Signal(syscall.SIGCONT)
}

// holdBackCreations keeps transactions open that have drawn the id of their outbox row: others
// with higher ids are committed before them.
func holdBackCreations(r *trial) {
	duration := 5 * time.Second
	if *wholeDrill {
		duration = 20 * time.Second
	}
	stop := inBackground(r.t, func(ctx context.Context) {
		for ; ctx.Err() == nil; sleep(ctx, 100*time.Millisecond) {
			r.create()
		}
	})
	for end := time.Now().Add(duration); time.Now().Before(end); {
		r.exec(fmt.Sprintf(`BEGIN;
			INSERT INTO users (name, surname, password) VALUES ('%s', 'Doe', '');
			SELECT pg_sleep(0.4);
			COMMIT`, r.newName()))
		time.Sleep(200 * time.Millisecond)
	}
	stop()
}

func stopRabbit(r *trial) {
	r.ctl(r.t, "close_all_connections", "drill")
	time.Sleep(2 * time.Second)
	r.ctl(r.t, "stop_app")
	time.Sleep(time.Second)
	r.ctl(r.t, "start_app")
}

func killRabbit(r *trial) {
	r.rabbit.end(syscall.SIGKILL)
	time.Sleep(time.Second)
	if err := r.rabbit.start(); err != nil {
		r.t.Fatal(err)
	}
}

func freezeRabbit(r *trial) {
	r.rabbit.signal(syscall.SIGSTOP)
	time.Sleep(20 * time.Second)
	r.rabbit.signal(syscall.SIGCONT)
}

func raiseAlarm(r *trial) {
	r.ctl(r.t, "set_vm_memory_high_watermark", "0.0000001")
	time.Sleep(8 * time.Second)
	r.terminate(0)
	r.startReplica(0)
	r.ctl(r.t, "set_vm_memory_high_watermark", "0.4")
}

func endAbsence(r *trial) {
	time.Sleep(4 * time.Second)
	r.toRabbit.cut(false)
}

func cutRabbit(r *trial) {
	for range 3 { // with events under way that it does not get
		r.toRabbit.swallow(fromClient, true)
		time.Sleep(300 * time.Millisecond)
		r.toRabbit.cut(true)
		r.toRabbit.swallow(fromClient, false)
		time.Sleep(700 * time.Millisecond)
		r.toRabbit.cut(false)
		time.Sleep(700 * time.Millisecond)
	}
	for range 20 {
		r.toRabbit.cut(false)
		time.Sleep(100 * time.Millisecond)
	}
}

func deleteQueue(r *trial) {
	if _, err := r.rabbitChannel(r.t).QueueDelete(r.names.queue(), false, false, false); err != nil {
		r.t.Fatal(err)
	}
	r.over = time.Now()
	r.within(3*time.Second, "the queue is back", func() bool {
		_, err := r.rabbitChannel(r.t).QueueDeclarePassive(r.names.queue(), true, false, false, false, nil)
		return err == nil
	})
	back := time.Now()
	r.finally(func() {
		eventually(r.t, "an event from the new queue", func() bool {
			r.ledger.mu.Lock()
			defer r.ledger.mu.Unlock()
			return slices.ContainsFunc(r.attempts, func(a attempt) bool {
				return a.asked.After(back) && r.ledger.heard[a.change] != ""
			})
		})
	})
}

// deleteExchange takes the recorder's binding too, which comes back when the service has
// declared the exchange again.
func deleteExchange(r *trial) {
	if err := r.rabbitChannel(r.t).ExchangeDelete(r.names.exchange, false, false); err != nil {
		r.t.Fatal(err)
	}
	r.over = time.Now()
	r.within(3*time.Second, "the exchange is back", func() bool {
		return r.rabbitChannel(r.t).QueueBind(recorderQueue, "user.*", r.names.exchange, false, nil) == nil
	})
}

// removeBindings leaves no queue that takes events: each must wait in the outbox, although
// the broker confirms it.
func removeBindings(r *trial) {
	ch := r.rabbitChannel(r.t)
	for _, queue := range []string{recorderQueue, r.names.queue()} {
		if err := ch.QueueUnbind(queue, "user.*", r.names.exchange, nil); err != nil {
			r.t.Fatal(err)
		}
	}
	time.Sleep(4 * time.Second)
	if err := ch.QueueBind(recorderQueue, "user.*", r.names.exchange, false, nil); err != nil {
		r.t.Fatal(err)
	}
}

func declareForeignQueue(r *trial) {
	if _, err := r.rabbitChannel(r.t).QueueDeclare(r.names.queue(), true, false, false, false, nil); err != nil {
		r.t.Fatal(err)
	}
}

func sendUnreadable(r *trial) {
	ch := r.rabbitChannel(r.t)
	bad := []string{"not JSON", `{"event_type": "user.renamed"}`, strings.Repeat("x", 1<<20)}
	for _, body := range bad {
		if err := ch.Publish("", r.names.queue(), false, false, amqp.Publishing{Body: []byte(body)}); err != nil {
			r.t.Fatal(err)
		}
		time.Sleep(time.Second)
	}
	r.finally(func() {
		var got []string
		eventually(r.t, "as many dead letters", func() bool {
			d, ok, err := ch.Get(r.names.deadLetterQueue(), true)
			if err != nil {
				r.t.Fatal(err)
			}
			if ok {
				got = append(got, string(d.Body))
			}
			return len(got) == len(bad)
		})
		if slices.Sort(bad); !slices.Equal(slices.Sorted(slices.Values(got)), bad) {
			r.t.Error("the dead letters are not what was sent")
		}
	})
}

const othersConnections = `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'drill'`

func terminateConnections(r *trial) {
	for range 5 {
		r.exec(othersConnections)
		time.Sleep(time.Second)
	}
	r.exec(othersConnections)
}

func makeReadOnly(r *trial) {
	r.sql(r.t, "ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()", othersConnections)
	time.Sleep(4 * time.Second)
	r.sql(r.t, "SET transaction_read_only = off", "ALTER SYSTEM RESET default_transaction_read_only",
		"SELECT pg_reload_conf()")
	r.over = time.Now()
	r.exec(othersConnections)
}

func lockTable(r *trial) {
	r.exec("BEGIN; LOCK TABLE users; SELECT pg_sleep(8); COMMIT")
}

// fillConnections takes every connection that an ordinary role can have, those of the
// service first.
func fillConnections(r *trial) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Second)
	defer cancel()
	var fill sync.WaitGroup
	for range 60 {
		fill.Go(func() {
			for ; ctx.Err() == nil; sleep(ctx, 50*time.Millisecond) {
				if conn, err := pgx.Connect(ctx, r.databaseURL("filler", "postgres")); err == nil {
					<-ctx.Done()
					conn.Close(context.Background())
				}
			}
		})
	}
	for range 10 {
		r.exec(othersConnections)
		time.Sleep(100 * time.Millisecond)
	}
	fill.Wait()
}

func loseAnswers(r *trial) {
	for range 5 {
		r.toPostgres.swallow(fromServer, true)
		time.Sleep(500 * time.Millisecond)
		r.toPostgres.cut(false)
		r.toPostgres.swallow(fromServer, false)
		time.Sleep(time.Second)
	}
}

// drainBacklog has SQL write the backlog, because the API would hash a password for each user.
func drainBacklog(r *trial) {
	const backlog = 100_000
	service := r.at(0)
	r.toRabbit.cut(true)
	snapshot, err := r.db.Acquire(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	defer snapshot.Release()
	if _, err := snapshot.Exec(r.t.Context(), "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1"); err != nil {
		r.t.Fatal(err)
	}
	defer snapshot.Exec(context.Background(), "ROLLBACK")
	r.exec(fmt.Sprintf(`INSERT INTO users (name, surname, password)
		SELECT 'backlog ' || n, 'Doe', '' FROM generate_series(1, %d) AS n`, backlog))
	before := service.metric("process_resident_memory_bytes")
	time.Sleep(4 * time.Second)
	quiet := r.p99(time.Now().Add(-4*time.Second), time.Now())
	r.toRabbit.cut(false)
	r.over = time.Now()
	eventually(r.t, "a backlog that gets smaller", func() bool { return r.ledger.received.Load() > 1000 })
	begin, first := time.Now(), r.ledger.received.Load()
	peak := 0.0
	for r.outbox.Load() > 500 {
		if time.Since(begin) > 120*time.Second {
			r.t.Fatalf("%d events are left", r.outbox.Load())
		}
		peak = max(peak, service.metric("process_resident_memory_bytes"))
		time.Sleep(100 * time.Millisecond)
	}
	took := time.Since(begin)
	rate := float64(r.ledger.received.Load()-first) / took.Seconds()
	r.t.Logf("%.0f events/s; resident memory %.0f MB before, %.0f MB at most; p99 of changes %v before, %v meanwhile",
		rate, before/1e6, peak/1e6, quiet, r.p99(begin, time.Now()))
	if rate < 1500 {
		r.t.Errorf("only %.0f events/s", rate)
	}
}

// vanish has clients send a change, some only half of it, and go.
func vanish(r *trial) {
	id := r.create().id
	address := strings.TrimPrefix(r.at(0).url, "http://")
	var most int
	stop := inBackground(r.t, func(ctx context.Context) {
		for ; ctx.Err() == nil; sleep(ctx, 10*time.Millisecond) {
			var n int
			if r.db.QueryRow(ctx, `SELECT count(*) FROM pg_stat_activity
					WHERE application_name = 'user-service' AND datname = current_database()`).Scan(&n) == nil {
				most = max(most, n)
			}
		}
	})
	var left atomic.Int64
	left.Store(2000)
	var vanishing sync.WaitGroup
	for range 100 {
		vanishing.Go(func() {
			for n := left.Add(-1); n >= 0; n = left.Add(-1) {
				conn, err := net.Dial("tcp", address)
				if err != nil {
					continue
				}
				body := fmt.Sprintf(`{"name": "vanished %d"}`, n)
				request := fmt.Sprintf("PUT /users/%d HTTP/1.1\r\nHost: drill\r\nContent-Type: application/json\r\n"+
					"Content-Length: %d\r\n\r\n%s", id, len(body), body)
				io.WriteString(conn, request[:len(request)-int(n%2)*5])
				time.Sleep(rand.N(5 * time.Millisecond))
				conn.Close()
			}
		})
	}
	vanishing.Wait()
	stop()
	r.t.Logf("at most %d connections", most)
	if most > 20 || most == 0 {
		r.t.Errorf("%d connections to the database", most)
	}
}

// trial is a scenario on its way, with a database, replicas, load and a recorder of its own.
type trial struct {
	*servers
	scenario
	t          *testing.T
	names      *rabbitMQ
	db         *pgxpool.Pool // as the superuser
	toRabbit   *wire
	cluster    []*rabbitNode
	toPostgres *wire
	serviceURL string // DATABASE_URL of the replicas
	program    string // of the replicas that are started next; "": the present build
	pair       *pair  // PostgreSQL servers of this trial, if it has some
	bouncer    *daemon
	ledger     *ledger
	client     *http.Client
	begun      time.Time // of the load
	over       time.Time // the end of the fault: when its function returns, or said so
	checks     []func()
	turns      atomic.Int64 // of the clients; also makes names unique
	outbox     atomic.Int64 // as sampled last
	largest    atomic.Int64

	mu       sync.Mutex
	running  []*replica // now
	started  []*replica // all
	attempts []attempt
	problems map[string]int
}

// attempt is one change that a client asked for.
type attempt struct {
	asked       time.Time // for this change first
	begun, done time.Time
	outcome     outcome
	change      eventData // of one that was acknowledged; of a deletion without version
}

type outcome int

const (
	outcomeOK outcome = iota
	outcomeFailed
	outcomeUnknown
)

const recorderQueue = "drill.recorder"

func (s *servers) try(t *testing.T, sc scenario) result {
	sc.replicas = cmp.Or(sc.replicas, 2)
	sc.clients = cmp.Or(sc.clients, 8)
	sc.pause = cmp.Or(sc.pause, 20*time.Millisecond)
	sc.patience = cmp.Or(sc.patience, 15*time.Second)
	database := s.newDatabase(t)
	db, err := pgxpool.New(t.Context(), s.databaseURL("postgres", database))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	r := &trial{
		servers: s, scenario: sc, t: t, db: db,
		names:      &rabbitMQ{exchange: "user_events"},
		toRabbit:   newWire(t, s.rabbitURL()),
		toPostgres: newWire(t, s.databaseURL("drill", database)),
		ledger:     newLedger(),
		client:     &http.Client{Timeout: sc.patience, Transport: &http.Transport{MaxIdleConnsPerHost: 64}},
		running:    make([]*replica, sc.replicas),
		problems:   make(map[string]int),
	}
	r.serviceURL = r.toPostgres.url
	r.prepareRabbit()
	if r.before != nil {
		r.before(r)
	}
	t.Cleanup(func() { r.killReplicas() })
	for slot := range r.running {
		r.startReplica(slot)
	}
	stopWatching := inBackground(t, func(ctx context.Context) { r.ledger.record(ctx, s) }, r.sampleOutbox)
	r.begun = time.Now()
	stopLoad := inBackground(t, r.load()...)
	time.Sleep(time.Second)
	if r.fault != nil {
		r.fault(r)
	}
	if r.over.IsZero() {
		r.over = time.Now()
	}
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if r.eventAfter(r.over) < never && time.Since(r.over) > 2*time.Second {
			break
		}
	}
	stopLoad()
	loaded := time.Now()
	for _, check := range r.checks {
		check()
	}
	for slot := range r.running {
		r.awaitRestored(slot)
	}
	eventually(t, "exactly one replica that relays", func() bool { return r.leaders() == 1 })
	row := r.settle()
	stopWatching()
	said := r.killReplicas()
	row.longestGap, row.slowest = r.longestGap(loaded)
	r.judge(&row, said)
	verdict := "held"
	if t.Failed() {
		verdict = "BROKEN"
		t.Logf("the replicas said: ...%s", said[max(0, len(said)-5000):])
	}
	t.Logf("%s: %s in %.1f s: %d of %d attempts ok, longest time without %v, recovered in %v", sc.name,
		verdict, time.Since(r.begun).Seconds(), row.ok, row.attempts,
		row.longestGap.Round(time.Millisecond), row.recovery.Round(time.Millisecond))
	return row
}

// prepareRabbit makes the broker as new, but for the recorder's queue and its binding.
func (r *trial) prepareRabbit() {
	r.t.Helper()
	ch := r.rabbitChannel(r.t)
	for _, queue := range []string{r.names.queue(), r.names.deadLetterQueue(), recorderQueue} {
		if _, err := ch.QueueDelete(queue, false, false, false); err != nil {
			r.t.Fatal(err)
		}
	}
	for _, exchange := range []string{r.names.exchange, r.names.deadLetterExchange()} {
		if err := ch.ExchangeDelete(exchange, false, false); err != nil {
			r.t.Fatal(err)
		}
	}
	_, err := ch.QueueDeclare(recorderQueue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"})
	err = errors.Join(err, ch.ExchangeDeclare(r.names.exchange, "topic", true, false, false, false, nil),
		ch.QueueBind(recorderQueue, "user.*", r.names.exchange, false, nil))
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *trial) startReplica(slot int) {
	r.t.Helper()
	p, err := r.servers.startReplica(r.program, r.ledger.hear, "DATABASE_URL="+r.serviceURL,
		"RABBITMQ_URL="+r.toRabbit.url, "SHUTDOWN_DELAY=1s")
	if err != nil {
		r.t.Fatal(err)
	}
	go p.probe()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running[slot], r.started = p, append(r.started, p)
}

// killReplicas returns what they said from WARN on.
func (r *trial) killReplicas() (said string) {
	for _, p := range r.started {
		p.cmd.Process.Kill()
		<-p.ended
		said += p.important.String() + p.stderr.String()
	}
	return said
}

// awaitRestored expects a line in the log for each connection that is back.
func (r *trial) awaitRestored(slot int) {
	r.t.Helper()
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		said := r.at(slot).important.String()
		if strings.Count(said, "connection lost") == strings.Count(said, "connection restored") {
			return
		}
		if time.Now().After(deadline) {
			r.t.Errorf("a replica does not say that its connections are back:\n%s", said)
			return
		}
	}
}

func (r *trial) at(slot int) *replica {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running[slot]
}

// terminate expects a replica to end as it should.
func (r *trial) terminate(slot int) {
	r.t.Helper()
	p := r.at(slot)
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		if code := p.cmd.ProcessState.ExitCode(); code != 0 {
			r.t.Errorf("exit code %d after SIGTERM", code)
		}
	case <-time.After(11 * time.Second): // with the SHUTDOWN_DELAY
		r.t.Error("no end within 10 s after SIGTERM")
	}
}

// leader is the slot of the replica that relays.
func (r *trial) leader() (slot int) {
	r.t.Helper()
	eventually(r.t, "a leader", func() bool {
		for slot = range r.running {
			if r.at(slot).metric("relay_leader") == 1 {
				return true
			}
		}
		return false
	})
	return slot
}

// leaders counts the replicas that relay.
func (r *trial) leaders() (n int) {
	for slot := range r.running {
		n += int(r.at(slot).metric("relay_leader"))
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

// swallow ends with a cut, as TCP itself would after a while.
func (r *trial) swallow(w *wire, direction int, d time.Duration) {
	w.swallow(direction, true)
	time.Sleep(d)
	w.cut(false)
	w.swallow(direction, false)
}

// finally has a check run after the load.
func (r *trial) finally(check func()) { r.checks = append(r.checks, check) }

// limit is how long something may take. The machine of the short selection may be busy.
func (r *trial) limit(d time.Duration) time.Duration {
	if *wholeDrill {
		return d
	}
	return 3 * d
}

// within waits until a condition holds, which should not take long.
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

// eventsFlow expects an event of a change that was asked for after a time.
func (r *trial) eventsFlow(after time.Time, within time.Duration) {
	r.finally(func() {
		took := r.eventAfter(after).Round(time.Millisecond)
		r.t.Logf("events flowed after %v", took)
		if took > r.limit(within) {
			r.t.Errorf("events flowed only after %v", took)
		}
	})
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

// ownUser is what a client knows about a user that nobody else changes.
type ownUser struct {
	id      int64
	version int64 // the last that was acknowledged
	unknown int64 // changes since then that may have been made, or may yet be
	gone    bool  // with a database that was lost
}

// inBackground runs functions until the one that comes back is called, or the test ends.
func inBackground(t *testing.T, functions ...func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, f := range functions {
		running.Go(func() { f(ctx) })
	}
	stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(stop)
	return stop
}

// load returns the clients: 9 of 10 changes are updates.
func (r *trial) load() (clients []func(context.Context)) {
	create := func() *ownUser {
		u := r.create()
		if u == nil {
			r.t.Fatalf("a user could not be created before the fault: %v", r.problems)
		}
		return u
	}
	var common []*ownUser
	for range r.shared {
		common = append(common, create())
	}
	for range r.clients {
		own := slices.Clone(common)
		if r.shared == 0 { // one after another: each costs a password
			own = append(own, create())
		}
		clients = append(clients, func(ctx context.Context) {
			for ; ctx.Err() == nil; sleep(ctx, rand.N(2*r.pause)) {
				own = slices.DeleteFunc(own, func(u *ownUser) bool { return u.gone })
				dice := rand.N(100)
				switch {
				case r.shared == 0 && (dice < 4 && len(own) < 6 || len(own) == 0):
					if u := r.create(); u != nil {
						own = append(own, u)
					}
				case r.shared == 0 && dice < 7 && len(own) > 1:
					r.remove(own[0])
					own = own[1:]
				default:
					r.update(own[rand.N(len(own))])
				}
			}
		})
	}
	return clients
}

func (r *trial) newName() string { return fmt.Sprint("name-", r.turns.Add(1)) }

// create asks again under the same key until it knows what became of the first time. It
// returns nil where there is no user.
func (r *trial) create() *ownUser {
	name := r.newName()
	body := fmt.Sprintf(`{"name": %q, "surname": "Doe", "password": %q}`, name, secret)
	asked, unsure := time.Now(), false
	for {
		a, answer := r.ask("POST", "/users", body, name)
		if a.outcome == outcomeOK {
			var u User
			if err := json.Unmarshal([]byte(answer.body), &u); err != nil {
				r.problem("an answer that is no user: %s", answer.body)
			}
			a.change = eventData{u.ID, version(answer)}
			a.asked = asked
		}
		r.keep(a)
		if a.outcome == outcomeOK {
			return &ownUser{id: a.change.UserID, version: a.change.Version}
		}
		unsure = unsure || a.outcome == outcomeUnknown
		if !unsure || time.Since(asked) > 30*time.Second {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (r *trial) update(u *ownUser) {
	a, answer := r.ask("PUT", fmt.Sprint("/users/", u.id), fmt.Sprintf(`{"name": %q}`, r.newName()), "")
	a.change = eventData{u.id, version(answer)}
	r.keep(a)
	if r.lossy {
		u.gone = answer.status == http.StatusNotFound
	}
	if r.shared > 0 || r.lossy {
		return
	}
	switch {
	case a.outcome == outcomeUnknown:
		u.unknown++
	case a.outcome == outcomeOK:
		extra := a.change.Version - u.version - 1
		if extra < 0 || extra > u.unknown {
			r.problem("a change was undone, done twice, or done although it had failed")
		}
		u.version, u.unknown = a.change.Version, u.unknown-extra
	}
}

func (r *trial) remove(u *ownUser) {
	r.ledger.mu.Lock()
	r.ledger.removed[u.id] = true
	r.ledger.mu.Unlock()
	a, _ := r.ask("DELETE", fmt.Sprint("/users/", u.id), "", "")
	a.change = eventData{UserID: u.id}
	r.keep(a)
	if a.outcome == outcomeFailed {
		r.ledger.mu.Lock()
		delete(r.ledger.removed, u.id)
		r.ledger.mu.Unlock()
	}
}

// version is that of the user in an answer.
func version(a answer) int64 {
	n, _ := strconv.ParseInt(strings.Trim(a.header.Get("ETag"), `"`), 10, 64)
	return n
}

// ask sends one request, to another replica where there is no connection to the first.
func (r *trial) ask(method, path, body, key string) (attempt, answer) {
	a := attempt{begun: time.Now()}
	a.asked = a.begun
	var response *http.Response
	var err error
	for range r.replicas {
		p := r.pick()
		request, _ := http.NewRequest(method, p.url+path, strings.NewReader(body))
		request.Header.Set("Content-Type", "application/json")
		if key != "" {
			request.Header.Set("Idempotency-Key", key)
		}
		if response, err = r.client.Do(request); err == nil {
			break
		}
		a.outcome = outcomeUnknown
		if refusal, ok := errors.AsType[*net.OpError](err); !ok || refusal.Op != "dial" {
			break
		}
		a.outcome = outcomeFailed
		p.ready.Store(false)
	}
	var content []byte
	if err == nil {
		content, err = io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil {
			a.outcome = outcomeUnknown
		}
	}
	a.done = time.Now()
	if err != nil {
		r.problemIf(r.onlyRabbit || r.database, "no answer: %v", err)
		return a, answer{}
	}
	status := response.StatusCode
	said, _, _ := bytes.Cut(content, []byte(`,"trace_id"`)) // the same of many requests
	switch {
	case status < 300:
		a.outcome = outcomeOK
	case status == http.StatusServiceUnavailable:
		a.outcome = outcomeUnknown
		if bytes.Contains(content, []byte("nothing was changed")) {
			a.outcome = outcomeFailed
		}
		r.problemIf(response.Header.Get("Retry-After") == "", "503 without Retry-After")
		r.problemIf(r.onlyRabbit, "%d %s", status, said)
	case status == http.StatusConflict && key != "" && !r.onlyRabbit:
		a.outcome = outcomeFailed // the first request with this key still runs
	case status == http.StatusNotFound && r.lossy:
		a.outcome = outcomeFailed // with the database that had the user
	default:
		a.outcome = outcomeFailed
		if status >= 500 {
			a.outcome = outcomeUnknown
		}
		r.problem("%d %s", status, said)
	}
	return a, answer{status, response.Header, string(content)}
}

// pick takes a replica in turn, of those that are ready if there are any.
func (r *trial) pick() *replica {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := int(r.turns.Add(1))
	for i := range r.running {
		if p := r.running[(first+i)%len(r.running)]; p.ready.Load() {
			return p
		}
	}
	return r.running[first%len(r.running)]
}

func (r *trial) keep(a attempt) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.attempts = append(r.attempts, a)
}

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

const never = time.Hour

// eventAfter is how long after a time the recorder had the event of a change that was
// asked for after that time.
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
		if a.outcome == outcomeOK && a.asked.After(t) && a.change.Version > 0 {
			// An earlier arrival is of a change that was lost with its database.
			arrival := r.ledger.users[a.change.UserID].find(a.change.Version)
			if arrival != nil && arrival.at.After(t) {
				first = min(first, arrival.at.Sub(t))
			}
		}
	}
	return first
}

// longestGap is the longest time of the load without a 2xx, and the slowest answer.
func (r *trial) longestGap(end time.Time) (gap, slowest time.Duration) {
	last := r.begun
	for _, a := range r.attempts { // in the order of done, almost
		slowest = max(slowest, a.done.Sub(a.begun))
		if a.outcome == outcomeOK {
			gap, last = max(gap, a.done.Sub(last)), a.done
		}
	}
	return max(gap, end.Sub(last)), slowest
}

// p99 is that of the answers between two times.
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

// ledger is what happened according to the recorder and to the service's consumer.
type ledger struct {
	received atomic.Int64 // events that came for the first time

	mu        sync.Mutex
	users     map[int64]*history
	heard     map[eventData]string // type by log line of the consumer
	deletions map[int64]int64      // versions of user.deleted that the consumer logged
	removed   map[int64]bool       // users whose deletion a client asked for
	written   []eventData          // changes that others than the API committed
	repeated  []time.Time          // of the duplicates
	foreign   int                  // messages that are no events
}

// history is what the recorder got of a user, in the order of the first arrivals.
type history struct {
	arrivals   []arrival
	highest    int64
	deletion   int64 // the version of user.deleted, if it came
	duplicated int
	disagreed  int // deliveries of a version that were another event
}

type arrival struct {
	version int64
	id      string
	at      time.Time
}

func newLedger() *ledger {
	return &ledger{users: make(map[int64]*history), heard: make(map[eventData]string),
		deletions: make(map[int64]int64), removed: make(map[int64]bool)}
}

func (h *history) find(version int64) *arrival {
	if h != nil && version <= h.highest {
		for i := len(h.arrivals) - 1; i >= 0; i-- {
			if h.arrivals[i].version == version {
				return &h.arrivals[i]
			}
		}
	}
	return nil
}

// hear takes what the service's consumer logged.
func (l *ledger) hear(eventType string, d eventData) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard[d] = eventType
	if eventType == userDeleted {
		l.deletions[d.UserID] = d.Version
	}
}

// record reads the recorder's queue. It acknowledges, so a message that was delivered when
// its own connection broke comes again, with a mark.
func (l *ledger) record(ctx context.Context, s *servers) {
	for ; ctx.Err() == nil; sleep(ctx, 100*time.Millisecond) {
		conn, err := s.dialRabbit()
		if err != nil {
			continue
		}
		hangUp := func() { conn.CloseDeadline(time.Now().Add(time.Second)) }
		stop := context.AfterFunc(ctx, hangUp)
		if deliveries, err := subscribe(conn); err == nil {
			for d := range deliveries {
				l.add(d)
				d.Ack(false)
			}
		}
		stop()
		hangUp()
	}
}

func subscribe(conn *amqp.Connection) (<-chan amqp.Delivery, error) {
	ch, err := conn.Channel()
	if err != nil {
		return nil, err
	}
	if err := ch.Qos(1000, 0, false); err != nil {
		return nil, err
	}
	return ch.Consume(recorderQueue, "", false, false, false, false, nil)
}

func (l *ledger) add(d amqp.Delivery) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e, err := parseEvent(d.Body)
	if err != nil {
		l.foreign++
		return
	}
	h := l.users[e.Data.UserID]
	if h == nil {
		h = &history{}
		l.users[e.Data.UserID] = h
	}
	if first := h.find(e.Data.Version); first != nil {
		if first.id != e.ID {
			h.disagreed++
			if e.Type == userDeleted {
				h.deletion = e.Data.Version
			}
		} else if !d.Redelivered {
			h.duplicated++
			l.repeated = append(l.repeated, time.Now())
		}
		return
	}
	l.received.Add(1)
	h.arrivals = append(h.arrivals, arrival{e.Data.Version, e.ID, time.Now()})
	h.highest = max(h.highest, e.Data.Version)
	if e.Type == userDeleted {
		h.deletion = e.Data.Version
	}
}

// result is a row of the table.
type result struct {
	name                                 string
	attempts, ok, failed, unknown        int
	lost, phantom, reordered, duplicated int
	missing, withoutChange               int
	longestGap, recovery                 time.Duration
	largestOutbox                        int64

	slowest  time.Duration // answer
	unlogged int           // events that the consumer did not log
	pending  int64         // events that stay in the outbox
	twice    int           // users that were created twice
	dead     int           // messages that the consumer could not read
}

// settle waits until all is as it must be, or will not be any more.
func (r *trial) settle() result {
	for deadline := time.Now().Add(40 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		row := r.count()
		if row.lost+row.unlogged == 0 && row.pending == 0 || time.Now().After(deadline) {
			time.Sleep(200 * time.Millisecond) // for what should not come
			row = r.count()
			queue, err := r.rabbitChannel(r.t).QueueDeclarePassive(r.names.deadLetterQueue(), true, false, false, false, nil)
			if err != nil {
				r.t.Error(err)
			}
			row.dead = queue.Messages
			return row
		}
	}
}

// count compares what happened with the table and with what was acknowledged.
func (r *trial) count() result {
	row := result{name: r.name, recovery: r.eventAfter(r.over), largestOutbox: r.largest.Load()}
	table := make(map[int64]int64)
	rows, _ := r.db.Query(r.t.Context(), "SELECT id, version FROM users")
	var id, version int64
	_, err := pgx.ForEachRow(rows, []any{&id, &version}, func() error {
		table[id] = version
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.db.QueryRow(r.t.Context(), "SELECT count(*) FROM outbox").Scan(&row.pending); err != nil {
		r.t.Fatal(err)
	}
	// Every attempt gives a name of its own, so a name in two rows was given twice.
	if err := r.db.QueryRow(r.t.Context(), `SELECT count(*) FROM
			(SELECT FROM users GROUP BY name HAVING count(*) > 1) AS twice`).Scan(&row.twice); err != nil {
		r.t.Fatal(err)
	}
	acknowledged := make(map[int64]map[int64]bool) // by user, versions; 0 for a deletion
	acknowledge := func(change eventData) {
		if acknowledged[change.UserID] == nil {
			acknowledged[change.UserID] = make(map[int64]bool)
		}
		acknowledged[change.UserID][change.Version] = true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.attempts {
		row.attempts++
		switch a.outcome {
		case outcomeFailed:
			row.failed++
		case outcomeUnknown:
			row.unknown++
		case outcomeOK:
			row.ok++
			acknowledge(a.change)
		}
	}
	l := r.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, change := range l.written {
		acknowledge(change)
	}
	users := make(map[int64]bool)
	for id := range table {
		users[id] = true
	}
	for id := range acknowledged {
		users[id] = true
	}
	for id := range l.users {
		users[id] = true
	}
	for id := range users {
		last, exists := table[id]
		r.judgeUser(&row, id, last, exists, acknowledged[id])
	}
	if !r.lossy {
		row.phantom = row.withoutChange
	}
	return row
}

// judgeUser adds what happened to one user to row, by the definitions at TestDrill.
func (r *trial) judgeUser(row *result, id, last int64, exists bool, acknowledged map[int64]bool) {
	h := r.ledger.users[id]
	if h == nil {
		h = &history{}
	}
	elsewhere := func(version int64) bool { return r.bindingLost && r.ledger.heard[eventData{id, version}] != "" }
	deletion := h.deletion
	if r.bindingLost {
		deletion = max(deletion, r.ledger.deletions[id])
	}
	highest := h.highest
	for version := range acknowledged {
		highest = max(highest, version)
	}
	gone := false // without a deletion
	switch {
	case exists && deletion > 0:
		row.withoutChange++
	case exists:
	case deletion > 0:
		last = deletion
	case r.ledger.removed[id]: // its deletion has no event
		last = highest + 1
	default:
		gone = true
	}
	for version := range acknowledged {
		if gone || version > last || version == 0 && exists {
			row.missing++
		}
	}
	expected := int64(1)
	for _, a := range h.arrivals {
		for expected < a.version && elsewhere(expected) {
			expected++
		}
		if a.version != expected {
			row.reordered++
		}
		expected = max(expected, a.version+1)
		if a.version > last {
			row.withoutChange++
		}
		if !r.queueLost && !r.bindingLost && r.ledger.heard[eventData{id, a.version}] == "" {
			row.unlogged++
		}
	}
	row.withoutChange += h.disagreed
	row.duplicated += h.duplicated
	got := make(map[int64]bool, len(h.arrivals))
	for _, a := range h.arrivals {
		got[a.version] = true
	}
	for version := int64(1); version <= highest || version <= last; version++ {
		if !got[version] && !elsewhere(version) &&
			(version <= last || acknowledged[version] && !r.lossy) {
			row.lost++
		}
	}
}

// judge fails the test where a rule is broken.
func (r *trial) judge(row *result, said string) {
	r.t.Helper()
	for line := range strings.Lines(said) {
		r.problemIf(!strings.Contains(line, `"level":"WARN"`) && !strings.Contains(line, "connection restored"),
			"in the log: %s", line)
	}
	for problem, n := range r.problems {
		r.t.Errorf("%d times: %s", n, problem)
	}
	if row.lost+row.phantom+row.reordered > 0 {
		r.t.Errorf("%d lost, %d phantom, %d reordered", row.lost, row.phantom, row.reordered)
	}
	if !r.lossy && row.missing+row.withoutChange > 0 {
		r.t.Errorf("%d acknowledged changes are missing, %d events are without their change",
			row.missing, row.withoutChange)
	}
	if row.pending > 0 || r.ledger.foreign > 0 {
		r.t.Errorf("%d events stay in the outbox, and the recorder got %d messages that are none",
			row.pending, r.ledger.foreign)
	}
	if row.twice > 0 {
		r.t.Errorf("%d users were created twice, in spite of the Idempotency-Key", row.twice)
	}
	if row.dead > 0 {
		r.t.Errorf("%d messages are in the dead letter queue", row.dead)
	}
	if row.unlogged > 0 {
		r.t.Errorf("the service's consumer did not log %d events", row.unlogged)
	}
	if row.recovery == never {
		r.t.Error("no event flowed after the fault")
	}
	if r.onlyRabbit && row.failed+row.unknown > 0 {
		r.t.Errorf("%d attempts failed, and %d have an unknown outcome", row.failed, row.unknown)
	}
	if !r.database {
		return
	}
	if row.slowest > r.limit(6*time.Second) {
		r.t.Errorf("an answer took %v", row.slowest)
	}
	back := never
	for _, a := range r.attempts {
		if a.outcome == outcomeOK && a.done.After(r.over) {
			back = min(back, a.done.Sub(r.over))
		}
	}
	if back > r.limit(2*time.Second) {
		r.t.Errorf("the first 2xx came %v after the fault", back)
	}
}

// table is text in columns, and Markdown.
func table(results []result) string {
	rows := [][]string{strings.Split("fault|attempts|ok|failed|unknown|lost|phantom|reordered|duplicated|"+
		"missing|without change|longest without 2xx|time to recover|largest outbox", "|")}
	seconds := func(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
	for _, r := range results {
		row := []string{r.name}
		for _, n := range []int{r.attempts, r.ok, r.failed, r.unknown, r.lost, r.phantom,
			r.reordered, r.duplicated, r.missing, r.withoutChange} {
			row = append(row, strconv.Itoa(n))
		}
		rows = append(rows, append(row, seconds(r.longestGap), seconds(r.recovery), fmt.Sprint(r.largestOutbox)))
	}
	var b strings.Builder
	for i, row := range rows {
		rule := ""
		for column, cell := range row {
			width := 0
			for _, other := range rows {
				width = max(width, len(other[column]))
			}
			if column == 0 {
				fmt.Fprintf(&b, "| %-*s |", width, cell)
				rule += "|:" + strings.Repeat("-", width+1) + "|"
			} else {
				fmt.Fprintf(&b, " %*s |", width, cell)
				rule += strings.Repeat("-", width+1) + ":|"
			}
		}
		b.WriteByte('\n')
		if i == 0 {
			b.WriteString(rule + "\n")
		}
	}
	return b.String()
}

// versions says what the table was made with.
func (s *servers) versions(t *testing.T) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), s.databaseURL("postgres", "postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	broker, err := s.dialRabbit()
	if err != nil {
		t.Fatal(err)
	}
	defer broker.Close()
	return fmt.Sprintf("%s, PostgreSQL %s, %s, RabbitMQ %v, %s, %d cores",
		time.Now().UTC().Format(time.DateOnly), postgresVersion(t, conn), bouncerVersion(),
		broker.Properties["version"], runtime.Version(), runtime.NumCPU())
}
