package main

import (
	"bufio"
	"fmt"
	"io"
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

// executable is the program as `make build` builds it; TestMain removes it.
var executable struct {
	once sync.Once
	dir  string
	err  error
}

func buildExecutable() error {
	var err error
	if executable.dir, err = os.MkdirTemp("", "user-service"); err != nil {
		return err
	}
	path := filepath.Join(executable.dir, "user-service")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-buildvcs=false", "-o", path, ".")
	if built := os.Getenv("TEST_EXECUTABLE"); built != "" { // by whoever has a cache to write to
		build = exec.Command("cp", built, path) // #nosec G702 -- .ci/confined sets it
	}
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", build, err, output)
	}
	return nil
}

// program is the service as a process of its own, in an empty directory and with no
// environment but what the test gives it.
type program struct {
	*service
	cmd    *exec.Cmd
	stderr logBuffer
	ended  chan struct{} // closed when the process has ended
}

// newProgram returns a program that is not started yet. Its port is a free one.
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

// start begins the process. When the test ends, it is gone and its output was checked.
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
			p.t.Errorf("standard error: %s", text)
		}
	})
}

// waitUntilStarted returns the start line.
func (p *program) waitUntilStarted() logLine {
	p.t.Helper()
	line := p.waitForLine("Service started")
	p.url = fmt.Sprintf("http://127.0.0.1:%v", line["port"])
	return line
}

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

// wait returns the exit code of the process, -1 for one that a signal ended.
func (p *program) wait() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(20 * time.Second):
		p.t.Fatalf("the process does not end:\n%s", p.log)
	}
	return p.cmd.ProcessState.ExitCode()
}

// run starts the program and returns its exit code.
func (p *program) run() int {
	p.t.Helper()
	p.start()
	return p.wait()
}

// checkEnd expects the program to end well, its last line to say so, and its port to be free.
func (p *program) checkEnd() {
	p.t.Helper()
	if code := p.wait(); code != 0 {
		p.t.Errorf("exit code %d:\n%s", code, p.log)
	}
	lines := p.log.lines("")
	if last := lines[len(lines)-1]; last["event"] != "Service stopped" {
		p.t.Errorf("the last line is %v", last)
	}
	if p.listens() {
		p.t.Error("something listens after the end")
	}
}

func (p *program) listens() bool {
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// beginPost sends a POST without the end of its body, and returns what sends the rest and
// reads the status of the answer.
func (p *program) beginPost() (finish func() int) {
	p.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	const head, tail = `{"name": "John", "surname": "Doe", `, `"password": "` + secret + `"}`
	fmt.Fprintf(conn, "POST /users HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n%s", len(head+tail), head)
	p.waitForLine("Request started", "method", "POST")
	return func() int {
		p.t.Helper()
		io.WriteString(conn, tail)
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			p.t.Fatal(err)
		}
		defer response.Body.Close()
		return response.StatusCode
	}
}

// occupiedPort is one that takes connections until the test ends, and never says a word.
func occupiedPort(t *testing.T) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener.Addr().(*net.TCPAddr).Port
}

// Nothing listens on port 1. The password must be in no line, which the harness checks.
const (
	deadDatabaseURL = "postgres://john:" + secret + "@127.0.0.1:1/users"
	deadRabbitURL   = "amqp://john:" + secret + "@127.0.0.1:1/"
)

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
				t.Errorf("the program begins with\n%s", p.log)
			}
			started := p.waitUntilStarted()
			docs := fmt.Sprintf("http://localhost:%v/docs", started["port"])
			if started["level"] != "INFO" || started["app"] != "user-service" ||
				started["host"] != "127.0.0.1" || started["docs"] != docs {
				t.Errorf("the start line is %v", started)
			}
			p.createUser("John", "Doe")
			if a := p.do("GET", "/docs", ""); a.status != 200 {
				t.Errorf("GET /docs: %d", a.status)
			}
			p.signal(signal)
			p.checkEnd()
		})
	}
}

// TestProgramRefuses starts the program wrongly: one line says what is wrong, and a
// secret in it stays untold, which the harness checks.
func TestProgramRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		env, file, args string
		want            string // in the line
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
		"in the file":         {file: "DEBUG=yes", want: "DEBUG must be true or false"},
		"the file":            {file: "A=1\nDATABASE URL=" + secret, want: "line 2"},
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
				t.Errorf("exit code %d", code)
			}
			lines := p.log.lines("")
			if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0]["error"]), test.want) {
				t.Errorf("not one line with %q:\n%s", test.want, p.log)
			}
		})
	}
}

// writeEnvFile writes the .env file of the program's directory, if there is something in it.
func (p *program) writeEnvFile(content string) {
	p.t.Helper()
	if content == "" {
		return
	}
	if err := os.WriteFile(filepath.Join(p.cmd.Dir, ".env"), []byte(content), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func TestProgramReadsEnvFile(t *testing.T) {
	t.Parallel()
	p := newProgram(t, "HOST=127.0.0.1", "APP_NAME=")
	p.writeEnvFile("HOST=localhost\nexport APP_NAME='from the file'\n")
	p.start()
	if line := p.waitUntilStarted(); line["host"] != "127.0.0.1" || line["app"] != "from the file" {
		t.Errorf("the start line is %v", line)
	}
}

func TestProgramCannotListen(t *testing.T) {
	t.Parallel()
	for name, env := range map[string]string{
		"a port in use":        fmt.Sprint("PORT=", occupiedPort(t)),
		"an address elsewhere": "HOST=192.0.2.1", // TEST-NET-1, which no machine has
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProgram(t, env)
			p.log.allowErrors(1)
			if code := p.run(); code != 1 {
				t.Errorf("exit code %d", code)
			}
			lines := p.log.lines("")
			if len(lines) != 3 || lines[2]["level"] != "ERROR" ||
				!strings.Contains(fmt.Sprint(lines[2]["error"]), "listen") {
				t.Errorf("no error after the warnings:\n%s", p.log)
			}
		})
	}
}

// TestProgramWaitsForDatabase gives the program a port that is in use: as soon as it tried
// to listen, it would end.
func TestProgramWaitsForDatabase(t *testing.T) {
	t.Parallel()
	p := newProgram(t, "DATABASE_URL="+deadDatabaseURL, "LOG_LEVEL=DEBUG",
		fmt.Sprint("PORT=", occupiedPort(t)))
	p.start()
	eventually(t, "two attempts", func() bool { return len(p.log.lines("Waiting for the database")) == 2 })
	p.signal(syscall.SIGTERM)
	if code := p.wait(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, line := range p.log.lines("") {
		if line["level"] != "WARN" || line["event"] != "Waiting for the database" {
			t.Errorf("while there is no database: %v", line)
		}
	}
}

// TestRunGivesUpOnDatabase waits a minute of a bubble's time.
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
			t.Errorf("run: %v", err)
		}
		if waited := time.Since(start); waited < 55*time.Second || waited > time.Minute {
			t.Errorf("waited for %v", waited)
		}
		if n := len(log.lines("Waiting for the database")); n < 10 || n != len(log.lines("")) {
			t.Errorf("%d lines tell of the wait:\n%s", n, log)
		}
		log.check(t)
	})
}

func TestProgramStartsWhenDatabaseDoes(t *testing.T) {
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
		t.Errorf("the database has %d users", n)
	}
	p.signal(syscall.SIGTERM)
	p.checkEnd()
}

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
				t.Errorf("the start took %v", took)
			}
			p.createUser("John", "Doe")
			if a := p.do("PATCH", "/users/1", `{"name": "Jane"}`); a.status != 200 {
				t.Errorf("PATCH: %d %s", a.status, a.body)
			}
			if a := p.do("GET", "/readyz", ""); a.status != 200 || a.json(t, "rabbitmq") != "down" {
				t.Errorf("GET /readyz: %d %s", a.status, a.body)
			}
			p.signal(syscall.SIGTERM)
			p.checkEnd()
		})
	}
}

func TestProgramDelaysItsEnd(t *testing.T) {
	t.Parallel()
	p := startProgram(t, "SHUTDOWN_DELAY=2s")
	begin := time.Now()
	p.signal(syscall.SIGTERM)
	var readiness answer
	eventually(t, "an answer 503 of /readyz", func() bool {
		readiness = p.do("GET", "/readyz", "")
		return readiness.status == 503
	})
	if readiness.json(t, "status") != "not ready" {
		t.Errorf("GET /readyz: %s", readiness.body)
	}
	if a := p.do("GET", "/users", ""); a.status != 200 {
		t.Errorf("GET during the delay: %d %s", a.status, a.body)
	}
	if !p.listens() {
		t.Error("new connections are refused during the delay")
	}
	p.checkEnd()
	if took := time.Since(begin); took < 2*time.Second {
		t.Errorf("the end came after %v", took)
	}
}

func TestProgramFinishesRequests(t *testing.T) {
	t.Parallel()
	p := startProgram(t, "DATABASE_URL="+newDatabase(t))
	finish := p.beginPost()
	p.signal(syscall.SIGTERM)
	eventually(t, "a closed listener", func() bool { return !p.listens() })
	time.Sleep(2 * drainIdle) // idle connections are closed by now
	if status := finish(); status != 201 {
		t.Errorf("POST that the end came upon: %d", status)
	}
	p.checkEnd()
	if len(p.log.lines("Received event user.created with user_id=1")) != 1 {
		t.Errorf("the event of the last request is missing:\n%s", p.log)
	}
}

// TestProgramFinishesStatements stops the program while a statement waits for a lock.
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
		t.Errorf("PATCH that the end came upon: %d %s", a.status, a.body)
	}
	p.checkEnd()
	if name := queryValue[string](t, watcher, "SELECT name FROM users"); name != "Jane" {
		t.Errorf("the change was lost: %s", name)
	}
}

func TestProgramCutsOffRequests(t *testing.T) {
	t.Parallel()
	p := startProgram(t)
	p.beginPost()
	begin := time.Now()
	p.signal(syscall.SIGTERM)
	p.checkEnd()
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("the end took %v", took)
	}
}

// TestProgramEndsWithoutDatabase stops the program after its database has frozen.
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
		t.Errorf("PATCH that the end came upon: %d %s", a.status, a.body)
	}
	p.checkEnd()
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("the end took %v", took)
	}
}

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
		t.Errorf("the log has %d of %d requests", n, requests)
	}
	status := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("the second signal ended it with %v", p.cmd.ProcessState)
	}
}

// TestProgramLogsLastEvents stops the program at the very moment of its last answer.
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
		t.Errorf("%d events of %d updates", n, updates)
	}
}

// TestProgramDrainsEvents holds the relay up, in the removal of its first event, until
// everything else has ended. Then it has to do the rest.
func TestProgramDrainsEvents(t *testing.T) {
	t.Parallel()
	const updates = 10
	url := newDatabase(t)
	conn := connect(t, url)
	mustExec := func(sql string) {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	mustExec(`
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
	time.Sleep(2 * drainIdle) // the connections are closed after one
	mustExec("SELECT pg_advisory_unlock(1)")
	p.checkEnd()
	if n := len(p.log.lines("Received event user.updated with user_id=1")); n != updates {
		t.Errorf("%d events of %d updates", n, updates)
	}
	if n := queryValue[int](t, conn, "SELECT count(*) FROM outbox"); n != 0 {
		t.Errorf("%d events are left", n)
	}
}

// lateListener is slow to tell its server that it was closed.
type lateListener struct{ net.Listener }

func (l lateListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		time.Sleep(2 * drainIdle)
	}
	return conn, err
}

// TestShutDownBeforeServeReturns is about a race: net/http closes the listener once more
// if its Serve has not returned yet.
func TestShutDownBeforeServeReturns(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newHTTPServer(http.NotFoundHandler(), slog.New(slog.DiscardHandler))
	go s.Serve(lateListener{listener})
	response, err := client.Get("http://" + listener.Addr().String()) // now it serves
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
		const slow = 150
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

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	failing := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(failing.Close)
	running := func(env ...string) (port string) { return portOf(startProgram(t, env...).url) }
	for name, test := range map[string]struct {
		env  []string
		want int
	}{
		"loopback":        {[]string{"HOST=127.0.0.1", running("HOST=127.0.0.1")}, 0},
		"every interface": {[]string{"HOST=0.0.0.0", running("HOST=0.0.0.0")}, 0},
		"a host name":     {[]string{"HOST=localhost", running("HOST=localhost")}, 0},
		"a bad database":  {[]string{"DATABASE_URL=" + deadDatabaseURL, running()}, 0},
		"nothing there":   {[]string{"PORT=1"}, 1},
		"another status":  {[]string{portOf(failing.URL)}, 1},
		"no answer":       {[]string{fmt.Sprint("PORT=", occupiedPort(t))}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProgram(t, test.env...)
			p.cmd.Args = append(p.cmd.Args, "healthcheck")
			p.log.allowErrors(test.want)
			if code := p.run(); code != test.want {
				t.Errorf("exit code %d", code)
			}
			if n := len(p.log.lines("")); n != test.want {
				t.Errorf("%d lines:\n%s", n, p.log)
			}
		})
	}
}

// portOf is the PORT of a service at a URL.
func portOf(url string) string {
	return "PORT=" + url[strings.LastIndex(url, ":")+1:]
}

// TestProgramRestricted takes from the program what its container takes from it: a
// directory to write to, root, and every capability. Who runs the tests without being root
// has no more to take.
func TestProgramRestricted(t *testing.T) {
	t.Parallel()
	p := newProgram(t, "DATABASE_URL="+newDatabase(t), "HOST=0.0.0.0")
	// The path to the binary is closed to others, but not what is in the directory itself.
	if err := os.Link(p.cmd.Path, filepath.Join(p.cmd.Dir, "user-service")); err != nil {
		t.Fatal(err)
	}
	err := os.Chmod(p.cmd.Dir, 0o555) // #nosec G302 -- another user is to run what is in it
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
