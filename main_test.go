package main

import (
	"bufio"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// executable is the directory of the binary of the service. TestMain removes it.
var executable struct {
	once sync.Once
	dir  string
	err  error
}

// buildExecutable builds the service like `make build`, or copies TEST_EXECUTABLE if that is set.
func buildExecutable() error {
	var err error
	if executable.dir, err = os.MkdirTemp("", "user-service"); err != nil {
		return err
	}
	path := filepath.Join(executable.dir, "user-service")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-buildvcs=false", "-o", path, ".")
	if built := os.Getenv("TEST_EXECUTABLE"); built != "" {
		build = exec.Command("cp", built, path) // #nosec G702 -- .ci/confined sets it
	}
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", build, err, output)
	}
	return nil
}

// program is a service in a process of its own, with an empty working directory and only the environment
// variables of the test.
type program struct {
	*service
	cmd    *exec.Cmd
	stderr logBuffer
	ended  chan struct{} // closed when the process has ended
}

// newProgram returns a program that is not started yet and will listen on a free port.
func newProgram(t *testing.T, env ...string) *program {
	t.Helper()
	executable.once.Do(func() { executable.err = buildExecutable() })
	if executable.err != nil {
		t.Fatal(executable.err)
	}
	p := &program{service: &service{t: t, log: &logBuffer{}}, ended: make(chan struct{})}
	p.cmd = exec.Command(filepath.Join(executable.dir, "user-service"))
	p.cmd.Dir = t.TempDir()
	p.cmd.Env = append([]string{"PORT=0"}, env...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, &p.stderr
	return p
}

// start starts the process. When the test ends, it kills the process and checks its output.
func (p *program) start() {
	p.t.Helper()
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	go func() {
		p.cmd.Wait()
		close(p.ended)
	}()
	p.t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.ended
		p.log.check(p.t)
		if text := p.stderr.String(); text != "" {
			p.t.Errorf("standard error: got %s, want nothing", text)
		}
	})
}

// waitUntilStarted waits for the line that the service logs when it has started, and returns it.
func (p *program) waitUntilStarted() logLine {
	p.t.Helper()
	line := p.waitForLine("Service started")
	p.url = fmt.Sprintf("http://127.0.0.1:%v", line["port"])
	return line
}

// startProgram returns a program that has started.
func startProgram(t *testing.T, env ...string) *program {
	t.Helper()
	p := newProgram(t, env...)
	p.start()
	p.waitUntilStarted()
	return p
}

func (p *program) signal(signal os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(signal); err != nil {
		p.t.Fatal(err)
	}
}

// wait waits for the end of the process and returns its exit code, or -1 if a signal ended it.
func (p *program) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(20 * time.Second):
		p.t.Fatalf("the process has not ended within 20 s:\n%s", p.log)
	}
	return p.cmd.ProcessState.ExitCode()
}

// run starts the program, waits for its end and returns its exit code.
func (p *program) run() int {
	p.t.Helper()
	p.start()
	return p.wait()
}

// checkEnd waits for the end of the program and checks the exit code 0, the last line of the log, and that
// the port is closed.
func (p *program) checkEnd() {
	p.t.Helper()
	if code := p.wait(); code != 0 {
		p.t.Errorf("exit code: got %d, want 0:\n%s", code, p.log)
	}
	lines := p.log.lines("")
	if last := lines[len(lines)-1]; last["event"] != "Service stopped" {
		p.t.Errorf("last line: got %v, want Service stopped", last)
	}
	if p.listens() {
		p.t.Error("the port accepts connections after the end")
	}
}

// listens reports whether the port of the program accepts connections.
func (p *program) listens() bool {
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// beginPost sends a POST without the end of its body, and waits for its line in the log. finish sends the
// rest and returns the status of the answer.
func (p *program) beginPost() (finish func() int) {
	p.t.Helper()
	conn := p.dial()
	const head, tail = `{"name": "John", "surname": "Doe", `, `"password": "` + secret + `"}`
	p.write(conn, fmt.Sprintf("POST /users HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n%s", len(head+tail), head))
	p.waitForLine("Request started", "method", "POST")
	return func() int {
		p.t.Helper()
		p.write(conn, tail)
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			p.t.Fatal(err)
		}
		defer response.Body.Close()
		return response.StatusCode
	}
}

// occupiedPort returns a port that accepts connections, and sends nothing, until the test ends.
func occupiedPort(t *testing.T) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener.Addr().(*net.TCPAddr).Port
}

// URLs of servers that do not exist: nothing listens on port 1. The harness checks that the log does not
// contain the password.
const (
	deadDatabaseURL = "postgres://john:" + secret + "@127.0.0.1:1/users"
	deadRabbitURL   = "amqp://john:" + secret + "@127.0.0.1:1/"
)

// TestProgramInMemory checks the first lines of the log, and that SIGTERM and SIGINT stop the program.
func TestProgramInMemory(t *testing.T) {
	t.Parallel()
	for _, signal := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			p := startProgram(t)
			lines := p.log.lines("")
			if len(lines) != 3 || lines[0]["level"] != "WARN" || lines[1]["level"] != "WARN" ||
				!strings.Contains(fmt.Sprint(lines[0]["event"]), "everything is lost on exit") ||
				!strings.Contains(fmt.Sprint(lines[1]["event"]), "No API_KEYS") {
				t.Errorf("got other lines than two warnings and the start:\n%s", p.log)
			}
			started := p.waitUntilStarted()
			docs := fmt.Sprintf("http://localhost:%v/docs", started["port"])
			if started["level"] != "INFO" || started["app"] != "user-service" ||
				started["host"] != "127.0.0.1" || started["docs"] != docs {
				t.Errorf("start line: got %v, want INFO, user-service, 127.0.0.1, %s", started, docs)
			}
			p.createUser("John", "Doe")
			if a := p.do("GET", "/docs", ""); a.status != 200 {
				t.Errorf("GET /docs: got %d, want 200", a.status)
			}
			p.signal(signal)
			p.checkEnd()
		})
	}
}

// TestProgramInvalidSettings checks that invalid settings or arguments end the program with one line, which
// gives the reason.
func TestProgramInvalidSettings(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		env, file, args string
		want            string // substring of the error
	}{
		"DATABASE_URL":        {env: "DATABASE_URL=mysql://john:" + secret + "@h/d", want: "DATABASE_URL must be"},
		"RABBITMQ_URL":        {env: "RABBITMQ_URL=http://john:" + secret + "@h/", want: "RABBITMQ_URL must be"},
		"APP_NAME":            {env: "APP_NAME=two\nlines", want: "APP_NAME must be"},
		"HOST":                {env: "HOST=two words", want: "HOST must be"},
		"PORT":                {env: "PORT=65536", want: "PORT must be a port number, 0 to 65535"},
		"LOG_LEVEL":           {env: "LOG_LEVEL=loud", want: "LOG_LEVEL must be"},
		"DEBUG":               {env: "DEBUG=yes", want: "DEBUG must be true or false"},
		"PASSWORD_MIN_LENGTH": {env: "PASSWORD_MIN_LENGTH=0", want: "PASSWORD_MIN_LENGTH must be"},
		"SHUTDOWN_DELAY":      {env: "SHUTDOWN_DELAY=-1s", want: "SHUTDOWN_DELAY must be"},
		"DEBUG in .env":       {file: "DEBUG=yes", want: "DEBUG must be true or false"},
		"a line of .env":      {file: "A=1\nDATABASE URL=" + secret, want: "line 2"},
		"a command":           {args: "serve", want: "healthcheck"},
		"two commands":        {args: "healthcheck now", want: "healthcheck"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProgram(t, test.env)
			p.cmd.Args = append(p.cmd.Args, strings.Fields(test.args)...)
			p.writeEnvFile(test.file)
			p.log.allowErrors(1)
			if code := p.run(); code != 2 {
				t.Errorf("exit code: got %d, want 2", code)
			}
			lines := p.log.lines("")
			if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0]["error"]), test.want) {
				t.Errorf("got other lines than one error with %q:\n%s", test.want, p.log)
			}
		})
	}
}

// writeEnvFile writes the .env file of the program, unless content is empty.
func (p *program) writeEnvFile(content string) {
	p.t.Helper()
	if content == "" {
		return
	}
	if err := os.WriteFile(filepath.Join(p.cmd.Dir, ".env"), []byte(content), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// TestProgramReadsEnvFile checks that .env supplies settings, and that environment variables override it.
func TestProgramReadsEnvFile(t *testing.T) {
	t.Parallel()
	p := newProgram(t, "HOST=127.0.0.1", "APP_NAME=")
	p.writeEnvFile("HOST=localhost\nexport APP_NAME='from the file'\n")
	p.start()
	if line := p.waitUntilStarted(); line["host"] != "127.0.0.1" || line["app"] != "from the file" {
		t.Errorf("start line: got %v, want host 127.0.0.1 and app \"from the file\"", line)
	}
}

// TestProgramCannotListen checks that the program ends with an error if it cannot listen.
func TestProgramCannotListen(t *testing.T) {
	t.Parallel()
	for name, env := range map[string]string{
		"a port in use":     fmt.Sprint("PORT=", occupiedPort(t)),
		"a foreign address": "HOST=192.0.2.1", // TEST-NET-1, which no machine has
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProgram(t, env)
			p.log.allowErrors(1)
			if code := p.run(); code != 1 {
				t.Errorf("exit code: got %d, want 1", code)
			}
			lines := p.log.lines("")
			if len(lines) != 3 || lines[2]["level"] != "ERROR" ||
				!strings.Contains(fmt.Sprint(lines[2]["error"]), "listen") {
				t.Errorf("got other lines than two warnings and an error about listening:\n%s", p.log)
			}
		})
	}
}

// TestProgramWaitsForDatabase checks that the program waits for the database before it listens. Its port is
// in use, so that an attempt to listen would end it.
func TestProgramWaitsForDatabase(t *testing.T) {
	t.Parallel()
	p := newProgram(t, "DATABASE_URL="+deadDatabaseURL, "LOG_LEVEL=DEBUG",
		fmt.Sprint("PORT=", occupiedPort(t)))
	p.start()
	eventually(t, "two attempts to connect", func() bool { return len(p.log.lines("Waiting for the database")) == 2 })
	p.signal(syscall.SIGTERM)
	if code := p.wait(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	for _, line := range p.log.lines("") {
		if line["level"] != "WARN" || line["event"] != "Waiting for the database" {
			t.Errorf("line without a database: got %v, want Waiting for the database at WARN", line)
		}
	}
}

// TestRunGivesUpOnDatabase checks that run fails after it has waited for the database for a minute.
func TestRunGivesUpOnDatabase(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.databaseURL, s.port = deadDatabaseURL, occupiedPort(t)
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		start := time.Now()
		err := run(t.Context(), s, testLimits, &logWriter{w: log})
		if err == nil || !strings.Contains(err.Error(), "opening the database") ||
			strings.Contains(err.Error(), secret) {
			t.Errorf("run: got %v, want an error about opening the database, without the password", err)
		}
		if waited := time.Since(start); waited < 55*time.Second || waited > time.Minute {
			t.Errorf("run took %v, want 55 s to 60 s", waited)
		}
		if n := len(log.lines("Waiting for the database")); n < 10 || n != len(log.lines("")) {
			t.Errorf("got %d lines of waiting, want at least 10 and no others:\n%s", n, log)
		}
		log.check(t)
	})
}

// TestProgramStartsAfterDatabase checks that the program starts when its database becomes reachable.
func TestProgramStartsAfterDatabase(t *testing.T) {
	t.Parallel()
	direct := newDatabase(t)
	database := newProxy(t, direct)
	database.set(false)
	p := newProgram(t, "DATABASE_URL="+throughProxy(t, direct, database))
	p.start()
	p.waitForLine("Waiting for the database", "level", "WARN")
	database.set(true)
	p.waitUntilStarted()
	p.createUser("John", "Doe")
	if n := queryValue[int](t, connect(t, direct), "SELECT count(*) FROM users"); n != 1 {
		t.Errorf("users in the database: got %d, want 1", n)
	}
	p.signal(syscall.SIGTERM)
	p.checkEnd()
}

// TestProgramWithoutRabbitMQ checks that the program starts and serves while RabbitMQ is unreachable.
func TestProgramWithoutRabbitMQ(t *testing.T) {
	t.Parallel()
	for name, url := range map[string]string{
		"nothing listens": deadRabbitURL,
		"never answers":   fmt.Sprintf("amqp://john:%s@127.0.0.1:%d/", secret, occupiedPort(t)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProgram(t, "RABBITMQ_URL="+url, "LOG_LEVEL=DEBUG")
			begin := time.Now()
			p.start()
			p.waitUntilStarted()
			if took := time.Since(begin); took >= brokerTimeout {
				t.Errorf("the start took %v, want less than %v", took, brokerTimeout)
			}
			p.createUser("John", "Doe")
			if a := p.do("PATCH", "/users/1", `{"name": "Jane"}`); a.status != 200 {
				t.Errorf("PATCH: got %d %s, want 200", a.status, a.body)
			}
			if a := p.do("GET", "/readyz", ""); a.status != 200 || a.json(t, "rabbitmq") != "down" {
				t.Errorf("GET /readyz: got %d %s, want 200 with rabbitmq down", a.status, a.body)
			}
			p.signal(syscall.SIGTERM)
			p.checkEnd()
		})
	}
}

// TestProgramShutdownDelay checks that the program is not ready, but answers requests, during
// SHUTDOWN_DELAY.
func TestProgramShutdownDelay(t *testing.T) {
	t.Parallel()
	p := startProgram(t, "SHUTDOWN_DELAY=4s")
	begin := time.Now()
	p.signal(syscall.SIGTERM)
	var readiness answer
	eventually(t, "an answer 503 of /readyz", func() bool {
		readiness = p.do("GET", "/readyz", "")
		return readiness.status == 503
	})
	if readiness.json(t, "status") != "not ready" {
		t.Errorf("GET /readyz: got %s, want not ready", readiness.body)
	}
	if a := p.do("GET", "/users", ""); a.status != 200 {
		t.Errorf("GET /users during the delay: got %d %s, want 200", a.status, a.body)
	}
	if !p.listens() {
		t.Error("the port is closed during the delay")
	}
	p.checkEnd()
	if took := time.Since(begin); took < 4*time.Second {
		t.Errorf("the program ended after %v, want at least 4 s", took)
	}
}

// TestProgramFinishesRequests checks that a request whose body arrives during the shutdown is answered, and
// that its event is delivered.
func TestProgramFinishesRequests(t *testing.T) {
	t.Parallel()
	p := startProgram(t, "DATABASE_URL="+newDatabase(t))
	finish := p.beginPost()
	p.signal(syscall.SIGTERM)
	eventually(t, "a closed listener", func() bool { return !p.listens() })
	time.Sleep(2 * drainIdle) // idle connections are closed by now
	if status := finish(); status != 201 {
		t.Errorf("POST during the shutdown: got %d, want 201", status)
	}
	p.checkEnd()
	if n := len(p.log.lines("Received event user.created with user_id=1")); n != 1 {
		t.Errorf("events of the last request: got %d, want 1:\n%s", n, p.log)
	}
}

// TestProgramFinishesStatements checks that a request is answered whose statement waits for a lock when the
// shutdown begins.
func TestProgramFinishesStatements(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	p := startProgram(t, "DATABASE_URL="+url)
	p.createUser("John", "Doe")
	locker, watcher := connect(t, url), connect(t, url)
	if _, err := locker.Exec(t.Context(), "BEGIN; SELECT FROM users FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	answered := p.goDo("PATCH", "/users/1", `{"name": "Jane"}`)
	eventually(t, "an update that waits for the lock", func() bool {
		return queryValue[bool](t, watcher, `SELECT EXISTS (SELECT FROM pg_stat_activity
			WHERE $1 = ANY (pg_blocking_pids(pid)))`, locker.PgConn().PID())
	})
	p.signal(syscall.SIGTERM)
	eventually(t, "a closed listener", func() bool { return !p.listens() })
	if _, err := locker.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if a := <-answered; a.status != 200 || a.json(t, "name") != "Jane" {
		t.Errorf("PATCH during the shutdown: got %d %s, want 200", a.status, a.body)
	}
	p.checkEnd()
	if name := queryValue[string](t, watcher, "SELECT name FROM users"); name != "Jane" {
		t.Errorf("stored name: got %s, want Jane", name)
	}
}

// TestProgramCutsOffRequests checks that an unfinished request does not delay the shutdown beyond its budget.
func TestProgramCutsOffRequests(t *testing.T) {
	t.Parallel()
	p := startProgram(t)
	p.beginPost()
	begin := time.Now()
	p.signal(syscall.SIGTERM)
	p.checkEnd()
	if took := time.Since(begin); took > stopBudget {
		t.Errorf("the shutdown took %v, want at most %v", took, stopBudget)
	}
}

// TestProgramEndsWithoutDatabase checks that the program stops within its budget while the database does not
// answer.
func TestProgramEndsWithoutDatabase(t *testing.T) {
	t.Parallel()
	through, freeze := freezable(t, newDatabase(t))
	p := startProgram(t, "DATABASE_URL="+through)
	p.createUser("John", "Doe")
	freeze()
	answered := p.goDo("PATCH", "/users/1", `{"name": "Jane"}`)
	p.waitForLine("Request started", "method", "PATCH")
	begin := time.Now()
	p.signal(syscall.SIGTERM)
	if a := <-answered; a.status != 503 {
		t.Errorf("PATCH during the shutdown: got %d %s, want 503", a.status, a.body)
	}
	p.checkEnd()
	if took := time.Since(begin); took > stopBudget {
		t.Errorf("the shutdown took %v, want at most %v", took, stopBudget)
	}
}

// TestProgramSecondSignal checks that a second signal ends the program at once, with a complete log.
func TestProgramSecondSignal(t *testing.T) {
	t.Parallel()
	p := startProgram(t, "SHUTDOWN_DELAY=1h")
	p.signal(syscall.SIGTERM)
	requests := 0
	eventually(t, "an answer 503 of /readyz", func() bool {
		requests++
		return p.do("GET", "/readyz", "").status == 503
	})
	p.signal(syscall.SIGTERM)
	p.wait()
	if n := len(p.log.lines("Request started")); n != requests {
		t.Errorf("requests in the log: got %d, want %d", n, requests)
	}
	status := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("end after the second signal: got %v, want SIGTERM", p.cmd.ProcessState)
	}
}

// TestProgramLogsLastEvents checks that all events are logged when the program is stopped right after its
// last answer.
func TestProgramLogsLastEvents(t *testing.T) {
	t.Parallel()
	const updates = 50
	p := startProgram(t)
	p.createUser("John", "Doe")
	for i := range updates {
		p.do("PATCH", "/users/1", fmt.Sprintf(`{"name": "John %d"}`, i))
	}
	p.signal(syscall.SIGTERM)
	p.checkEnd()
	if n := len(p.log.lines("Received event user.updated with user_id=1")); n != updates {
		t.Errorf("events of updates: got %d, want %d", n, updates)
	}
}

// TestProgramDrainsEvents checks that the relay publishes the pending events during the shutdown. A lock
// delays the removal of its first event until the requests have ended.
func TestProgramDrainsEvents(t *testing.T) {
	t.Parallel()
	const updates = 10
	url := newDatabase(t)
	conn := connect(t, url)
	execute(t, conn, `
		CREATE FUNCTION wait_for_test() RETURNS trigger LANGUAGE plpgsql AS
			'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN OLD; END';
		CREATE TRIGGER wait_for_test BEFORE DELETE ON outbox
			FOR EACH ROW EXECUTE FUNCTION wait_for_test();
		SELECT pg_advisory_lock(1)`)
	p := startProgram(t, "DATABASE_URL="+url)
	p.createUser("John", "Doe")
	p.waitForLine("Received event user.created with user_id=1")
	for i := range updates {
		p.do("PATCH", "/users/1", fmt.Sprintf(`{"name": "John %d"}`, i))
	}
	p.signal(syscall.SIGTERM)
	eventually(t, "a closed listener", func() bool { return !p.listens() })
	time.Sleep(2 * drainIdle) // idle connections are closed by now
	execute(t, conn, "SELECT pg_advisory_unlock(1)")
	p.checkEnd()
	if n := len(p.log.lines("Received event user.updated with user_id=1")); n != updates {
		t.Errorf("events of updates: got %d, want %d", n, updates)
	}
	if n := queryValue[int](t, conn, "SELECT count(*) FROM outbox"); n != 0 {
		t.Errorf("pending events: got %d, want none", n)
	}
}

// lateListener is a listener whose Accept returns late after it was closed.
type lateListener struct{ net.Listener }

func (l lateListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		time.Sleep(2 * drainIdle)
	}
	return conn, err
}

// TestShutDownBeforeServeReturns checks that shutDown succeeds if Serve has not returned yet. In this case
// http.Server.Shutdown closes the listener a second time.
func TestShutDownBeforeServeReturns(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newHTTPServer(http.NotFoundHandler(), slog.New(slog.DiscardHandler))
	go s.Serve(lateListener{listener})
	response, err := client.Get("http://" + listener.Addr().String()) // returns when Serve runs
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if err := s.shutDown(listener); err != nil {
		t.Error(err)
	}
}

// TestSlowClients checks that requests are answered while other clients never finish sending their
// headers or body, or reading their answers.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		const users = 3
		for range users {
			s.createUser("John", "Doe")
		}
		const slow = 60
		for range slow {
			for _, head := range []string{
				"GET /users HTTP/1.1\r\nHost: slow\r\n",
				"POST /users HTTP/1.1\r\nHost: slow\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
				strings.Repeat("GET /users?per_page=100 HTTP/1.1\r\nHost: slow\r\n\r\n", 20),
			} {
				conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := conn.Write([]byte(head)); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i := range 20 {
			path := fmt.Sprint("/users/", i%users+1)
			if a := s.do("GET", path, ""); a.status != 200 {
				t.Errorf("GET %s: got %d %s, want 200", path, a.status, a.body)
			}
			body := fmt.Sprintf(`{"name": "Jane %d"}`, i)
			if a := s.do("PUT", path, body); a.status != 200 {
				t.Errorf("PUT %s: got %d %s, want 200", path, a.status, a.body)
			}
		}
	})
}

// TestHealthcheck checks the exit codes of the command healthcheck.
func TestHealthcheck(t *testing.T) {
	t.Parallel()
	failing := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(failing.Close)
	running := func(env ...string) (port string) { return portOf(startProgram(t, env...).url) }
	for name, test := range map[string]struct {
		env  []string
		want int
	}{
		"loopback":       {env: []string{"HOST=127.0.0.1", running("HOST=127.0.0.1")}},
		"all interfaces": {env: []string{"HOST=0.0.0.0", running("HOST=0.0.0.0")}},
		"a host name":    {env: []string{"HOST=localhost", running("HOST=localhost")}},
		"no database":    {env: []string{"DATABASE_URL=" + deadDatabaseURL, running()}},
		"no listener":    {env: []string{"PORT=1"}, want: 1},
		"status 404":     {env: []string{portOf(failing.URL)}, want: 1},
		"no answer":      {env: []string{fmt.Sprint("PORT=", occupiedPort(t))}, want: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProgram(t, test.env...)
			p.cmd.Args = append(p.cmd.Args, "healthcheck")
			p.log.allowErrors(test.want)
			if code := p.run(); code != test.want {
				t.Errorf("exit code: got %d, want %d", code, test.want)
			}
			if n := len(p.log.lines("")); n != test.want {
				t.Errorf("lines: got %d, want %d:\n%s", n, test.want, p.log)
			}
		})
	}
}

// portOf returns the setting PORT for the service at a URL.
func portOf(url string) string {
	return "PORT=" + url[strings.LastIndex(url, ":")+1:]
}

// TestProgramRestricted runs the program with the restrictions of its container: a read-only directory and,
// if the tests run as root, another user without capabilities.
func TestProgramRestricted(t *testing.T) {
	t.Parallel()
	p := newProgram(t, "DATABASE_URL="+newDatabase(t), "HOST=0.0.0.0")
	// Other users cannot follow the path to the binary, but can run a link in the working directory.
	if err := os.Link(p.cmd.Path, filepath.Join(p.cmd.Dir, "user-service")); err != nil {
		t.Fatal(err)
	}
	err := os.Chmod(p.cmd.Dir, 0o555) // #nosec G302 -- another user runs the link
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(p.cmd.Dir, 0o700) }) // #nosec G302 -- a directory
	command := []string{"./user-service"}
	if os.Geteuid() == 0 {
		command = append([]string{"setpriv", "--reuid=65532", "--regid=65532", "--clear-groups",
			"--bounding-set=-all", "--no-new-privs", "--"}, command...)
	}
	restricted := exec.Command(command[0], command[1:]...)
	p.cmd.Path, p.cmd.Args, p.cmd.Err = restricted.Path, restricted.Args, restricted.Err
	p.start()
	p.waitUntilStarted()
	p.createUser("John", "Doe")
	p.signal(syscall.SIGTERM)
	p.checkEnd()
}
