// Package drill runs the service under load while faults happen to it, to its PostgreSQL and to its
// RabbitMQ, and checks that no change and no event was lost, invented or reordered.
//
// `make drill` runs every row and writes the table in docs/drill.md, which defines its columns. Without
// the flag -drill, TestDrill runs a selection of the rows.
package drill

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"user-service/system/env"
)

var allRows = flag.Bool("drill", false,
	"run all rows, longer, with the limits of a quiet machine, and write docs/drill.md")

// TestDrill runs the rows and prints a table of their results.
//
// The rules are the same for every row. The columns lost, phantom and reordered are 0, and so are
// missing and without change, except for the failover to an asynchronous standby, which only
// reports those two. The service's consumer has logged every event and rejected none, and the
// outbox is empty at the end. No answer is 500. No change was made twice, and none was made
// although its answer said that it was not. The log has a line for each restored connection, and no
// ERROR. Exactly one replica relays.
func TestDrill(t *testing.T) {
	s := startServers(t)
	var results []result
	for _, sc := range scenarios {
		if *allRows || sc.short {
			t.Run(sc.name, func(t *testing.T) { results = append(results, s.run(t, sc)) })
		}
	}
	text := table(results)
	versions := s.versions(t)
	fmt.Printf("\n%s\n%s\n", text, versions)
	if !*allRows || len(results) < len(scenarios) || t.Failed() {
		return // the document shows complete runs without a failure
	}
	if err := env.WriteResults("docs/drill.md", text+"\n"+versions); err != nil {
		t.Error(err)
	}
}

// scenario is a row of the table.
type scenario struct {
	name  string
	short bool // part of the selection that `make test` runs

	replicas int           // 0 means 2
	clients  int           // 0 means 8
	pause    time.Duration // mean pause of a client between two changes; 0 means 20 ms
	shared   int           // if not 0, all clients change this many common users
	timeout  time.Duration // of a client's request; 0 means 15 s

	// onlyRabbit: the fault affects nothing but RabbitMQ, so every answer must be 2xx.
	onlyRabbit bool
	// database: every answer must come within 6 s, must be a 503 with Retry-After if it is not
	// 2xx, and the first 2xx must come within 2 s after the fault.
	database bool
	// lossy: the database at the end may lack the last changes, acknowledged or not.
	lossy bool
	// queueLost: the queue of the service's consumer is lost with its content.
	queueLost bool
	// bindingLost: the recorder's queue loses its binding, which is restored after the service's.
	// Events that only the service's consumer logged count as received.
	bindingLost bool

	before func(*trial) // runs before the service starts
	fault  func(*trial) // begins and ends under load
}

var scenarios = []scenario{
	// The service.
	{name: "kill -9 again and again", short: true, replicas: 3, fault: killAgainAndAgain},
	{name: "SIGTERM, rolling", short: true, onlyRabbit: true, fault: restartRolling},
	{name: "leading replica killed", replicas: 3, fault: killLeader},
	{name: "leading replica frozen for 30 s", replicas: 3, timeout: 2 * time.Second,
		fault: freezeLeader},
	{name: "order: 32 clients, 5 users", short: true, replicas: 3, clients: 32, shared: 5,
		pause: 10 * time.Millisecond, onlyRabbit: true, fault: delayCommits},
	{name: "rolling update from c223611 and back", short: true, onlyRabbit: true,
		before: startPrevious, fault: updateAndBack},

	// RabbitMQ.
	{name: "RabbitMQ: connections closed, stop_app", short: true, onlyRabbit: true,
		fault: stopRabbit},
	{name: "RabbitMQ: killed", onlyRabbit: true, fault: killRabbit},
	{name: "RabbitMQ: frozen for 20 s", onlyRabbit: true, fault: freezeRabbit},
	{name: "RabbitMQ: memory alarm", onlyRabbit: true, fault: raiseAlarm},
	{name: "RabbitMQ: absent at start", onlyRabbit: true, fault: endAbsence,
		before: func(r *trial) { r.toRabbit.Cut(true) }},
	{name: "RabbitMQ: TCP cut and flapping", short: true, onlyRabbit: true, fault: cutRabbit},
	{name: "RabbitMQ: packets to it swallowed", onlyRabbit: true,
		fault: func(r *trial) { swallow(r.toRabbit, env.FromClient, 20*time.Second) }},
	{name: "RabbitMQ: packets from it swallowed", onlyRabbit: true,
		fault: func(r *trial) { swallow(r.toRabbit, env.FromServer, 20*time.Second) }},
	{name: "RabbitMQ: our queue deleted", short: true, onlyRabbit: true, queueLost: true,
		fault: deleteQueue},
	{name: "RabbitMQ: the exchange deleted", onlyRabbit: true, bindingLost: true,
		fault: deleteExchange},
	{name: "RabbitMQ: all bindings removed", onlyRabbit: true, bindingLost: true,
		fault: removeBindings},
	{name: "RabbitMQ: our queue with other arguments", onlyRabbit: true,
		before: declareMismatchedQueue},
	{name: "RabbitMQ: cluster of three, leader killed", onlyRabbit: true, before: useCluster,
		fault: killQueueLeader},
	{name: "RabbitMQ: one of the hosts is dead at start", onlyRabbit: true, before: nameDeadHosts,
		fault: loseLiveHost},
	{name: "unreadable messages", onlyRabbit: true, fault: sendUnreadable},

	// PostgreSQL.
	{name: "PostgreSQL: restart fast", database: true, fault: restartFast},
	{name: "PostgreSQL: restart immediate", short: true, database: true, fault: restartImmediate},
	{name: "PostgreSQL: connections terminated", database: true, fault: terminateConnections},
	{name: "PostgreSQL: read-only for 4 s", database: true, fault: makeReadOnly},
	{name: "PostgreSQL: frozen for 8 s", database: true, fault: freezePostgres},
	{name: "PostgreSQL: one session frozen", short: true, database: true, replicas: 1, clients: 16,
		fault: freezeSession},
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
	{name: "consumer that starts under load", short: true, onlyRabbit: true, clients: 1,
		fault: startConsumer},
	{name: "2,000 clients vanish", replicas: 1, fault: vanish},
}

// servers are the PostgreSQL and the RabbitMQ that the rows share.
type servers struct {
	*env.Env
	postgres  *env.Postgres
	rabbit    *env.RabbitMQ
	databases int
}

// postgresSettings are those of every PostgreSQL server. A primary that stops may wait for the next
// status of its standby.
var postgresSettings = []string{"max_connections=60", "wal_receiver_status_interval=1s"}

// startServers starts both servers. They end with the test, also if it runs out of time.
func startServers(t *testing.T) *servers {
	t.Helper()
	e, err := env.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	deadline, ok := t.Deadline()
	if ok {
		deadline = deadline.Add(-20 * time.Second)
	}
	t.Cleanup(e.CloseOnSignal(deadline))
	s := &servers{Env: e}
	var buildErr, postgresErr, rabbitErr error
	var starting sync.WaitGroup
	starting.Go(func() { _, buildErr = e.Executable() })
	starting.Go(func() { s.postgres, postgresErr = e.StartPostgres(postgresSettings...) })
	starting.Go(func() { s.rabbit, rabbitErr = e.StartRabbitMQ() })
	starting.Wait()
	require(t, errors.Join(buildErr, postgresErr, rabbitErr))
	require(t, s.postgres.SQL("CREATE ROLE drill LOGIN", "CREATE ROLE filler LOGIN",
		"CREATE ROLE writer LOGIN", "ALTER ROLE writer SET search_path = ''"))
	return s
}

// require fails the test on an error. If the error is that a program is not installed, it skips the
// test, unless REQUIRE_SERVICES=1.
func require(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, exec.ErrNotFound) && os.Getenv("REQUIRE_SERVICES") != "1" {
		t.Skipf("`make services` installs what is missing: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// newDatabase returns the name of an empty database that the role drill owns. It is dropped after
// the row, because its content would make restarts slower.
func (s *servers) newDatabase(t *testing.T) string {
	t.Helper()
	s.databases++
	name := "drill_" + strconv.Itoa(s.databases)
	require(t, s.postgres.SQL("CREATE DATABASE "+name+" OWNER drill"))
	t.Cleanup(func() { s.postgres.SQL("DROP DATABASE " + name + " WITH (FORCE)") })
	return name
}

// versions describes what the table was made with. The test fails if PostgreSQL's version is not
// TEST_POSTGRES_VERSION.
func (s *servers) versions(t *testing.T) string {
	t.Helper()
	postgres, err := s.postgres.Version(t.Context())
	require(t, err)
	t.Logf("the server reports PostgreSQL %s", postgres)
	if want := os.Getenv("TEST_POSTGRES_VERSION"); want != "" && postgres != want {
		t.Errorf("PostgreSQL is %s, want %s", postgres, want)
	}
	conn, err := s.rabbit.Dial()
	require(t, err)
	defer conn.Close()
	return fmt.Sprintf("%s, PostgreSQL %s, %s, RabbitMQ %v, %s, %d cores",
		time.Now().UTC().Format(time.DateOnly), postgres, env.PgBouncerVersion(),
		conn.Properties["version"], runtime.Version(), runtime.NumCPU())
}

// table returns the results as a table in Markdown with aligned columns.
func table(results []result) string {
	rows := [][]string{strings.Split("fault|attempts|ok|failed|unknown|lost|phantom|reordered|"+
		"duplicated|missing|without change|longest without 2xx|time to recover|largest outbox", "|")}
	seconds := func(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
	for _, r := range results {
		row := []string{r.name}
		for _, n := range []int{r.attempts, r.ok, r.failed, r.unknown, r.lost, r.phantom,
			r.reordered, r.duplicated, r.missing, r.withoutChange} {
			row = append(row, strconv.Itoa(n))
		}
		rows = append(rows, append(row, seconds(r.longestGap), seconds(r.recovery),
			fmt.Sprint(r.largestOutbox)))
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

// eventually waits up to 20 s until a condition holds, or fails the test.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
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

// inBackground runs functions until stop is called, or the test ends.
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
