package process

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"user-service/system/env"
)

// drainIdle is how long a stopping service waits for idle connections.
const drainIdle = time.Second

// stopBudget is how long a stop may take at most, without SHUTDOWN_DELAY.
const stopBudget = 10 * time.Second

// queryValue returns the only value of a query.
func queryValue[T any](t *testing.T, conn *pgx.Conn, sql string, args ...any) T {
	t.Helper()
	var value T
	if err := conn.QueryRow(t.Context(), sql, args...).Scan(&value); err != nil {
		t.Fatal(err)
	}
	return value
}

func mustExec(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

// beginPost sends a POST without the end of its body. finish sends the rest and returns the status
// of the response.
func beginPost(t *testing.T, p *env.Program) (finish func() int) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	const head, tail = `{"name": "John", "surname": "Doe", `, `"password": "` + env.Secret + `"}`
	fmt.Fprintf(conn, "POST /users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n%s", len(head+tail), head)
	p.AwaitLine("Request started", "method", "POST")
	return func() int {
		t.Helper()
		io.WriteString(conn, tail)
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		return response.StatusCode
	}
}

// beginPatch sends a PATCH of user 1 that sets the name to Jane. finish returns the response.
func beginPatch(t *testing.T, p *env.Program) (finish func() env.Response) {
	t.Helper()
	answered := make(chan env.Response, 1)
	go func() {
		defer close(answered) // also if Do ends the goroutine
		answered <- p.Do("PATCH", "/users/1", `{"name": "Jane"}`)
	}()
	return func() env.Response {
		t.Helper()
		r, ok := <-answered
		if !ok {
			t.FailNow()
		}
		return r
	}
}

// awaitClosed waits until the service accepts no more connections.
func awaitClosed(t *testing.T, p *env.Program) {
	t.Helper()
	env.Eventually(t, "a closed listener", func() bool { return !listens(p) })
}

// awaitNotReady waits until /readyz answers 503. It returns that response and how many requests
// this took.
func awaitNotReady(t *testing.T, p *env.Program) (last env.Response, requests int) {
	t.Helper()
	env.Eventually(t, "an answer 503 of /readyz", func() bool {
		requests++
		last = p.Do("GET", "/readyz", "")
		return last.StatusCode == 503
	})
	return last, requests
}

// expectEvents checks how many events of a type the log has for user 1.
func expectEvents(t *testing.T, p *env.Program, eventType string, want int) {
	t.Helper()
	got := len(p.Lines(env.LogReceivedEvent + " " + eventType + " with user_id=1"))
	if got != want {
		t.Errorf("got %d events %s, want %d:\n%s", got, eventType, want, p.Log())
	}
}

// expectWithin checks the time since begin.
func expectWithin(t *testing.T, begin time.Time, limit time.Duration) {
	t.Helper()
	if took := time.Since(begin); took > limit {
		t.Errorf("the end took %v, want at most %v", took, limit)
	}
}

func TestDelaysItsEnd(t *testing.T) {
	t.Parallel()
	const delay = 2 * time.Second
	p := testEnv.StartProgram(t, fmt.Sprint("SHUTDOWN_DELAY=", delay))
	begin := time.Now()
	p.Signal(syscall.SIGTERM)
	if r, _ := awaitNotReady(t, p); r.JSON(t, "status") != "not ready" {
		t.Errorf("got %v\nwant the status not ready", r)
	}
	if r := p.Do("GET", "/users", ""); r.StatusCode != 200 {
		t.Errorf("during the delay: got %v\nwant status 200", r)
	}
	if !listens(p) {
		t.Error("new connections are refused during the delay")
	}
	checkEnd(t, p)
	if took := time.Since(begin); took < delay {
		t.Errorf("the end came after %v, want at least %v", took, delay)
	}
}

func TestFinishesRequests(t *testing.T) {
	t.Parallel()
	p := testEnv.StartProgram(t, "DATABASE_URL="+env.NewDatabase(t).URL)
	finish := beginPost(t, p)
	p.Signal(syscall.SIGTERM)
	awaitClosed(t, p)
	time.Sleep(2 * drainIdle) // idle connections are closed by now
	if status := finish(); status != 201 {
		t.Errorf("a POST during the stop: got status %d, want 201", status)
	}
	checkEnd(t, p)
	expectEvents(t, p, env.EventCreated, 1)
}

// TestFinishesStatements stops the program while a statement waits for a lock.
func TestFinishesStatements(t *testing.T) {
	t.Parallel()
	database := env.NewDatabase(t)
	p := testEnv.StartProgram(t, "DATABASE_URL="+database.URL)
	p.CreateUser("John", "Doe")
	locker, watcher := database.Connect(), database.Connect()
	mustExec(t, locker, "BEGIN; SELECT FROM users FOR UPDATE")
	finish := beginPatch(t, p)
	env.Eventually(t, "an update that waits for the lock", func() bool {
		return queryValue[bool](t, watcher, `SELECT EXISTS (SELECT FROM pg_stat_activity
			WHERE $1 = ANY (pg_blocking_pids(pid)))`, locker.PgConn().PID())
	})
	p.Signal(syscall.SIGTERM)
	awaitClosed(t, p)
	mustExec(t, locker, "ROLLBACK")
	if r := finish(); r.StatusCode != 200 || r.JSON(t, "name") != "Jane" {
		t.Errorf("a PATCH during the stop: got %v\nwant status 200 and the name Jane", r)
	}
	checkEnd(t, p)
	if name := queryValue[string](t, watcher, "SELECT name FROM users"); name != "Jane" {
		t.Errorf("got the name %s in the database, want Jane", name)
	}
}

func TestCutsOffRequests(t *testing.T) {
	t.Parallel()
	p := testEnv.StartProgram(t)
	beginPost(t, p)
	begin := time.Now()
	p.Signal(syscall.SIGTERM)
	checkEnd(t, p)
	expectWithin(t, begin, stopBudget)
}

// TestEndsWithoutDatabase stops the program after its database has stopped to answer.
func TestEndsWithoutDatabase(t *testing.T) {
	t.Parallel()
	proxy := newProxy(t, env.NewDatabase(t))
	p := testEnv.StartProgram(t, "DATABASE_URL="+proxy.URL)
	p.CreateUser("John", "Doe")
	proxy.Hold(env.FromClient)
	proxy.Hold(env.FromServer)
	finish := beginPatch(t, p)
	p.AwaitLine("Request started", "method", "PATCH")
	begin := time.Now()
	p.Signal(syscall.SIGTERM)
	if r := finish(); r.StatusCode != 503 {
		t.Errorf("a PATCH during the stop: got %v\nwant status 503", r)
	}
	checkEnd(t, p)
	expectWithin(t, begin, stopBudget)
}

// TestSecondSignal checks that a second signal ends the process at once, without loss of log lines.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	p := testEnv.StartProgram(t, "SHUTDOWN_DELAY=1h", "LOG_LEVEL=DEBUG")
	p.Signal(syscall.SIGTERM)
	_, requests := awaitNotReady(t, p)
	p.Signal(syscall.SIGTERM)
	p.Wait()
	if n := len(p.Lines("Request started")); n != requests {
		t.Errorf("got %d requests in the log, want %d", n, requests)
	}
	status := p.State().Sys().(syscall.WaitStatus)
	if !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("the second signal: got %v, want an end by SIGTERM", p.State())
	}
}

// TestLogsLastEvents stops the program immediately after its last response.
func TestLogsLastEvents(t *testing.T) {
	t.Parallel()
	const updates = 50
	p := testEnv.StartProgram(t)
	p.CreateUser("John", "Doe")
	for i := range updates {
		p.Do("PATCH", "/users/1", fmt.Sprintf(`{"name": "John %d"}`, i))
	}
	p.Signal(syscall.SIGTERM)
	checkEnd(t, p)
	expectEvents(t, p, env.EventUpdated, updates)
}

// TestDrainsEvents blocks the relay in the removal of its first event until everything else has
// ended. Then the relay has to deliver the other events.
func TestDrainsEvents(t *testing.T) {
	t.Parallel()
	const updates = 10
	database := env.NewDatabase(t)
	p := testEnv.StartProgram(t, "DATABASE_URL="+database.URL)
	conn := database.Connect()
	mustExec(t, conn, `
		CREATE FUNCTION wait_for_test() RETURNS trigger LANGUAGE plpgsql AS
			'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN OLD; END';
		CREATE TRIGGER wait_for_test BEFORE DELETE ON outbox
			FOR EACH ROW EXECUTE FUNCTION wait_for_test();
		SELECT pg_advisory_lock(1)`)
	p.CreateUser("John", "Doe")
	p.AwaitLine(env.LogReceivedEvent + " user.created with user_id=1")
	for i := range updates {
		p.Do("PATCH", "/users/1", fmt.Sprintf(`{"name": "John %d"}`, i))
	}
	p.Signal(syscall.SIGTERM)
	awaitClosed(t, p)
	time.Sleep(2 * drainIdle) // idle connections are closed by now
	mustExec(t, conn, "SELECT pg_advisory_unlock(1)")
	checkEnd(t, p)
	expectEvents(t, p, env.EventUpdated, updates)
	if n := queryValue[int](t, conn, "SELECT count(*) FROM outbox"); n != 0 {
		t.Errorf("got %d events in the outbox, want 0", n)
	}
}
