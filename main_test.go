package main

// The harness of all tests, tests of main.go and of the tools: settings.go, limits.go, log.go,
// password.go, concurrency.go, and benchmarks of single functions.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/VictoriaMetrics/metrics"
	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/crypto/argon2"
	"golang.org/x/sync/errgroup"
)

// secret is a part of every password that a test sends. The harness checks that no answer and no log line
// contains it.
const secret = "correct-horse-s3cr3t"

// The servers that tests use.
var (
	testDatabaseURL = envOr("TEST_DATABASE_URL", "postgres://postgres@127.0.0.1:5432/postgres")
	testRabbitURL   = envOr("TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672/")
)

// microseconds is the layout of times in answers, events and the log.
const microseconds = "2006-01-02T15:04:05.000000Z"

// envOr returns an environment variable, or fallback if it is empty or not set.
func envOr(name, fallback string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return fallback
}

// missing skips the test because a server is missing, or fails it if REQUIRE_SERVICES is 1.
func missing(t *testing.T, what string, err error) {
	t.Helper()
	if os.Getenv("REQUIRE_SERVICES") == "1" {
		t.Fatalf("%s is required: %v", what, err)
	}
	t.Skipf("needs %s: `make services` provides it (%v)", what, err)
}

var serial atomic.Int64

// uniqueName returns a name that no other test uses, in this process or another.
func uniqueName() string {
	return fmt.Sprintf("us_test_%d_%d", os.Getpid(), serial.Add(1))
}

// template is the database that the databases of tests are cloned from, and the role that owns them.
var template struct {
	once sync.Once
	role string
	name string
	err  error
}

// parallelTests is how many tests run at the same time: most of them wait for a server or a timeout,
// so that one test a core would leave the machine idle. The flag -parallel overrides it.
const parallelTests = 12

func TestMain(m *testing.M) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		flag.Set("test.parallel", strconv.Itoa(max(parallelTests, runtime.GOMAXPROCS(0))))
	}
	code := m.Run()
	if err := leftovers.finish(); err != nil {
		fmt.Fprintln(os.Stderr, "cleaning up:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// leftovers is what tests have created on the servers. A test does not wait for its removal: DROP
// DATABASE waits for a checkpoint of the whole server, and exchanges need a pause first.
var leftovers = cleanup{dropping: make(chan struct{}, parallelTests)}

type cleanup struct {
	drops    errgroup.Group // of databases that no test uses any more
	dropping chan struct{}  // limits concurrent drops

	mu        sync.Mutex
	roles     []string
	exchanges []string
}

// dropDatabase drops a database in the background. Concurrent drops share checkpoints.
func (c *cleanup) dropDatabase(name string) {
	c.drops.Go(func() error {
		c.dropping <- struct{}{}
		defer func() { <-c.dropping }()
		return admin(context.Background(), "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
	})
}

// dropRole drops a role after all databases, in which it may have rights.
func (c *cleanup) dropRole(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.roles = append(c.roles, name)
}

func (c *cleanup) deleteExchange(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.exchanges = append(c.exchanges, name)
}

// finish returns when everything is removed. No test may run any more.
func (c *cleanup) finish() error {
	if template.name != "" {
		c.dropDatabase(template.name)
	}
	err := errors.Join(deleteExchanges(c.exchanges), c.drops.Wait())
	for _, name := range c.roles {
		err = errors.Join(err, admin(context.Background(), "DROP ROLE IF EXISTS "+name))
	}
	return err
}

// deleteExchanges deletes exchanges and what the service derives from them. RabbitMQ 3.10 loses its
// supervisor of at-least-once dead letters, for all queues and until it is restarted, when such a
// queue is deleted within milliseconds of its declaration; hence the pause.
func deleteExchanges(names []string) error {
	if len(names) == 0 {
		return nil
	}
	time.Sleep(300 * time.Millisecond)
	conn, err := amqp.Dial(testRabbitURL)
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	for _, name := range names {
		b := &rabbitMQ{exchange: name}
		for _, queue := range []string{b.queue(), b.deadLetterQueue()} {
			_, deleted := ch.QueueDelete(queue, false, false, false)
			err = errors.Join(err, deleted)
		}
		for _, exchange := range []string{b.exchange, b.deadLetterExchange()} {
			err = errors.Join(err, ch.ExchangeDelete(exchange, false, false))
		}
	}
	return err
}

// admin runs statements as a superuser of the PostgreSQL server, each in its own transaction.
func admin(ctx context.Context, statements ...string) error {
	conn, err := pgx.Connect(ctx, testDatabaseURL)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, statement := range statements {
		if _, err := conn.Exec(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}

// databaseURL returns the URL of a database for its owner, who is not a superuser.
func databaseURL(name string) string {
	u, err := url.Parse(testDatabaseURL)
	if err != nil {
		panic(err)
	}
	u.Path = "/" + name
	u.User = url.UserPassword(template.role, template.role)
	return u.String()
}

// makeTemplate creates the role, and a database with the schema and no users.
func makeTemplate() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	template.role, template.name = uniqueName(), uniqueName()
	leftovers.dropRole(template.role)
	err := admin(ctx,
		fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s'", template.role, template.role),
		fmt.Sprintf("CREATE DATABASE %s OWNER %s", template.name, template.role))
	if err != nil {
		return err
	}
	store, err := openPostgres(ctx, databaseURL(template.name), "template", discardLog)
	if err != nil {
		return err
	}
	store.close()
	return nil
}

// newDatabase returns the URL of a database with the schema that only this test uses.
func newDatabase(t *testing.T) string {
	t.Helper()
	return createDatabase(t, "TEMPLATE "+templateDatabase(t))
}

// emptyDatabase returns the URL of a database without the schema. Options are those of CREATE
// DATABASE.
func emptyDatabase(t *testing.T, options string) string {
	t.Helper()
	templateDatabase(t) // its role owns every database
	return createDatabase(t, options)
}

// templateDatabase returns the name of the database with the schema that others are cloned from.
func templateDatabase(t *testing.T) string {
	t.Helper()
	template.once.Do(func() { template.err = makeTemplate() })
	if template.err != nil {
		missing(t, "PostgreSQL", template.err)
	}
	return template.name
}

func createDatabase(t *testing.T, options string) string {
	t.Helper()
	name := uniqueName()
	t.Cleanup(func() { leftovers.dropDatabase(name) })
	create := fmt.Sprintf("CREATE DATABASE %s OWNER %s %s", name, template.role, options)
	if err := admin(t.Context(), create); err != nil {
		t.Fatal(err)
	}
	return databaseURL(name)
}

// connect opens a connection to a database until the test ends.
func connect(t *testing.T, databaseURL string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// queryValue returns the only value of a query.
func queryValue[T any](t *testing.T, conn *pgx.Conn, sql string, args ...any) T {
	t.Helper()
	var value T
	if err := conn.QueryRow(t.Context(), sql, args...).Scan(&value); err != nil {
		t.Fatal(err)
	}
	return value
}

// waitForEmptyOutbox waits until the relay has published every event.
func waitForEmptyOutbox(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	eventually(t, "an empty outbox", func() bool {
		return queryValue[int](t, conn, "SELECT count(*) FROM outbox") == 0
	})
}

// dialRabbit opens a connection to RabbitMQ until the test ends.
func dialRabbit(t *testing.T) *amqp.Connection {
	t.Helper()
	conn, err := amqp.Dial(testRabbitURL)
	if err != nil {
		missing(t, "RabbitMQ", err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// newExchange returns the name of an exchange that only this test uses.
func newExchange(t *testing.T) string {
	t.Helper()
	dialRabbit(t)
	name := uniqueName()
	leftovers.deleteExchange(name)
	return name
}

// service is a running service and the test that sends requests to it.
type service struct {
	t        *testing.T
	settings settings
	url      string
	client   *http.Client // nil: the client that all tests share
	log      *logBuffer
	stop     func() error // stops the service, once, and returns the error of run
}

// memorySettings returns settings for a service without PostgreSQL and RabbitMQ, on a free port.
func memorySettings() settings {
	return settings{appName: "test", host: "127.0.0.1", open: true, passwordMinLength: 8,
		logLevel: slog.LevelDebug, exchange: "none"}
}

// postgresSettings returns memorySettings with a new database.
func postgresSettings(t *testing.T) settings {
	t.Helper()
	s := memorySettings()
	s.databaseURL = newDatabase(t)
	return s
}

// eachStore runs a test with a service in memory and with one in a new database.
func eachStore(t *testing.T, test func(t *testing.T, s *service)) {
	t.Run("memory", func(t *testing.T) {
		t.Parallel()
		test(t, startService(t, memorySettings()))
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		test(t, startService(t, postgresSettings(t)))
	})
}

// testLimits are the limits of a machine with two cores and no memory limit. Its hashes are cheap:
// those of a real service would take most of the time of the tests.
var testLimits = func() limits {
	l := newLimits(2, math.MaxInt64)
	l.hash = argonCost{memory: 64, passes: 1}
	return l
}()

// testDependencies returns dependencies for newHandler in this process, without a broker.
func testDependencies(s settings, users store, log *slog.Logger) dependencies {
	return dependencies{settings: s, limits: testLimits, store: users,
		broker: inProcess{newConsumer(log, metrics.NewSet()), log},
		log:    log, metrics: metrics.NewSet(), draining: &atomic.Bool{}}
}

// faultyStore is a store whose calls fail with err. Its ready returns state.
type faultyStore struct {
	*memory
	err   error
	state state
}

func (s faultyStore) createUser(context.Context, string, userInput, string) (User, error) {
	return User{}, s.err
}
func (s faultyStore) creationUnder(context.Context, string) (User, string, error) {
	return User{}, "", s.err
}
func (s faultyStore) getUser(context.Context, int64) (User, error) { return User{}, s.err }
func (s faultyStore) listUsers(context.Context, string, string, int64, int64, int64) ([]User, int64, error) {
	return nil, 0, s.err
}
func (s faultyStore) updateUser(context.Context, string, int64, userInput, []int64) (User, error) {
	return User{}, s.err
}
func (s faultyStore) passwordHash(context.Context, int64) (string, error)         { return "", s.err }
func (s faultyStore) rehashPassword(context.Context, int64, string, string) error { return s.err }
func (s faultyStore) deleteUser(context.Context, string, int64, []int64) error    { return s.err }
func (s faultyStore) size(context.Context) (int64, time.Duration, error)          { return 0, 0, s.err }
func (s faultyStore) ready() state                                                { return s.state }

// serveInProcess returns a service whose requests go to h directly, without a connection. Clients have
// the address 192.0.2.1. It works in a synctest bubble.
func serveInProcess(t *testing.T, h http.Handler) *service {
	direct := &http.Client{CheckRedirect: client.CheckRedirect, Transport: handlerTransport{h}}
	return &service{t: t, url: "http://example.com", log: &logBuffer{}, client: direct}
}

// handlerTransport is an http.RoundTripper that answers requests with a handler.
type handlerTransport struct{ handler http.Handler }

func (h handlerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	received := httptest.NewRequestWithContext(r.Context(), r.Method, r.URL.RequestURI(), r.Body)
	received.Header, received.ContentLength = r.Header, r.ContentLength
	recorder := httptest.NewRecorder()
	h.handler.ServeHTTP(recorder, received)
	return recorder.Result(), nil
}

// startService runs a service until the test ends, and then checks its log.
func startService(t *testing.T, s settings) *service {
	t.Helper()
	log := &logBuffer{}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		out := &logWriter{w: log}
		err := run(ctx, s, testLimits, out)
		ended <- errors.Join(err, out.flush())
	}()
	svc := &service{t: t, settings: s, log: log}
	svc.stop = sync.OnceValue(func() error {
		client.CloseIdleConnections() // the service would wait for a request on each
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(15 * time.Second):
			return errors.New("the service has not stopped within 15 s")
		}
	})
	t.Cleanup(func() {
		if err := svc.stop(); err != nil {
			t.Errorf("run: %v", err)
		}
		log.check(t)
	})
	started := svc.waitForLine("Service started")
	svc.url = fmt.Sprintf("http://127.0.0.1:%v", started["port"])
	return svc
}

// answer is a response whose body has been read.
type answer struct {
	status int
	header http.Header
	body   string
}

// json returns the value at a path of names in the body.
func (a answer) json(t *testing.T, names ...string) any {
	t.Helper()
	var value any
	if err := json.Unmarshal([]byte(a.body), &value); err != nil {
		t.Fatalf("body %s: %v", a.body, err)
	}
	for _, name := range names {
		object, _ := value.(map[string]any)
		value = object[name]
	}
	return value
}

// client is shared by all tests. It does not follow redirects.
var client = &http.Client{
	Timeout:       15 * time.Second,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Transport:     &http.Transport{MaxIdleConnsPerHost: 64},
}

// do sends a request and checks the answer with checkAnswer. Headers are "Name: value"; an empty value
// removes the header. The content type of a body is application/json unless a header sets another.
func (s *service) do(method, path, body string, headers ...string) answer {
	s.t.Helper()
	request, err := http.NewRequest(method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	if body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ":")
		if value = strings.TrimSpace(value); value == "" {
			request.Header.Del(name)
		} else if name == "Content-Type" {
			request.Header.Set(name, value)
		} else {
			request.Header.Add(name, value)
		}
	}
	response, err := cmp.Or(s.client, client).Do(request)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		s.t.Fatalf("%s %s: reading the body: %v", method, path, err)
	}
	a := answer{response.StatusCode, response.Header, string(content)}
	s.checkAnswer(method, path, a)
	return a
}

// goDo sends a request like do, and returns a channel that receives the answer.
func (s *service) goDo(method, path, body string, headers ...string) <-chan answer {
	answered := make(chan answer, 1)
	go func() {
		defer close(answered) // also if do ends the goroutine
		answered <- s.do(method, path, body, headers...)
	}()
	return answered
}

// checkAnswer checks what the contract says about every answer: a trace id, no password, and a problem
// document for an error.
func (s *service) checkAnswer(method, path string, a answer) {
	s.t.Helper()
	id := a.header.Get("X-Trace-Id")
	if !requestIDPattern.MatchString(id) {
		s.t.Errorf("%s %s: invalid X-Trace-Id: %q", method, path, id)
	}
	if strings.Contains(a.body, secret) || strings.Contains(a.body, "argon2id") {
		s.t.Errorf("%s %s: the body contains a password: %s", method, path, a.body)
	}
	if a.status < 400 || method == http.MethodHead || strings.HasPrefix(path, "/readyz") {
		return
	}
	if got := a.header.Get("Content-Type"); got != "application/problem+json" {
		s.t.Errorf("%s %s: status %d with Content-Type %q, want application/problem+json", method, path,
			a.status, got)
	}
	var p problem
	decoder := json.NewDecoder(strings.NewReader(a.body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&p); err != nil {
		s.t.Fatalf("%s %s: %v in %s", method, path, err, a.body)
	}
	instance, _, _ := strings.Cut(path, "?")
	if len(instance) > maxLogged { // it may be cut, and its escapes spelled in another way
		decoded, _ := url.PathUnescape(instance)
		if start, err := url.PathUnescape(p.Instance); err == nil && strings.HasPrefix(decoded, start) {
			instance = p.Instance
		}
	}
	if p.Type != "about:blank" || p.Title != http.StatusText(a.status) || p.Status != a.status ||
		p.Detail == "" || p.TraceID != id || p.Instance != instance {
		s.t.Errorf("%s %s: status %d with the wrong problem document: %s", method, path, a.status, a.body)
	}
	if a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") == "" {
		s.t.Errorf("%s %s: status 503 without Retry-After", method, path)
	}
}

// createUser creates a user and returns its id.
func (s *service) createUser(name, surname string) int64 {
	s.t.Helper()
	body := fmt.Sprintf(`{"name": %q, "surname": %q, "password": %q}`, name, surname, secret)
	a := s.do("POST", "/users", body)
	if a.status != http.StatusCreated {
		s.t.Fatalf("POST /users: got %d %s, want 201", a.status, a.body)
	}
	return int64(a.json(s.t, "id").(float64))
}

// logBuffer collects the log of a service.
type logBuffer struct {
	mu            sync.Mutex
	content       bytes.Buffer
	errorsAllowed int
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.content.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.content.String()
}

// logLine is a parsed line of the log.
type logLine map[string]any

// lines returns the lines of an event, or all lines if event is empty.
func (b *logBuffer) lines(event string) []logLine {
	var lines []logLine
	for text := range strings.Lines(b.String()) {
		var line logLine
		if json.Unmarshal([]byte(text), &line) == nil && (event == "" || line["event"] == event) {
			lines = append(lines, line)
		}
	}
	return lines
}

// allowErrors sets the number of lines at ERROR that check requires. The default is none.
func (b *logBuffer) allowErrors(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.errorsAllowed = n
}

// check checks what the contract says about every line: a JSON object that begins with timestamp, level and
// event, and has no password.
func (b *logBuffer) check(t *testing.T) {
	t.Helper()
	failures := 0
	for text := range strings.Lines(b.String()) {
		var line logLine
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Errorf("log line %s: %v", text, err)
			continue
		}
		want := []string{"timestamp", "level", "event"}
		if _, ok := line["trace_id"]; ok {
			want = append(want, "trace_id")
		}
		if got := keys(text)[:len(want)]; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("first keys of a log line: got %v, want %v: %s", got, want, text)
		}
		if _, err := time.Parse(microseconds, fmt.Sprint(line["timestamp"])); err != nil {
			t.Error(err)
		}
		if strings.Contains(text, secret) || strings.Contains(text, "argon2id") {
			t.Errorf("a log line contains a password: %s", text)
		}
		if strings.Contains(text, "superfluous") {
			t.Errorf("a handler wrote the status twice: %s", text)
		}
		if line["level"] == "ERROR" {
			failures++
		}
	}
	if failures != b.errorsAllowed {
		t.Errorf("lines at ERROR: got %d, want %d:\n%s", failures, b.errorsAllowed, b)
	}
}

// keys returns the names of the members of a JSON object, in order.
func keys(object string) []string {
	members, err := parseObject([]byte(object), maxMembers)
	if err != nil {
		return nil
	}
	var names []string
	for _, m := range members {
		names = append(names, m.name)
	}
	return names
}

// waitForLine waits for a log line of an event with the given attributes, which are alternating names and
// values, and returns the first one.
func (s *service) waitForLine(event string, attributes ...any) logLine {
	s.t.Helper()
	var found logLine
	eventually(s.t, "the log line "+event+fmt.Sprint(attributes...), func() bool {
		for _, line := range s.log.lines(event) {
			matches := true
			for i := 0; i < len(attributes); i += 2 {
				name := attributes[i].(string)
				matches = matches && fmt.Sprint(line[name]) == fmt.Sprint(attributes[i+1])
			}
			if matches {
				found = line
				return true
			}
		}
		return false
	})
	return found
}

// eventually waits until holds returns true. It fails the test after 20 s.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timeout after 20 s waiting for %s", what)
		}
	}
}

// The tests of the compiled program are in system/process. These call functions of this package.

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

// TestRunGivesUpOnDatabase checks that run fails after it has waited for the database for a minute,
// and that the log has the error and a remedy once, and then the error every 10 s.
func TestRunGivesUpOnDatabase(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.databaseURL = "postgres://john:" + secret + "@127.0.0.1:1/users"
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		start := time.Now()
		out := &logWriter{w: log}
		err := run(t.Context(), s, testLimits, out)
		out.flush()
		if err == nil || !strings.Contains(err.Error(), "opening the database") ||
			strings.Contains(err.Error(), secret) {
			t.Errorf("run: got %v, want an error about opening the database, without the password", err)
		}
		if waited := time.Since(start); waited < 55*time.Second || waited > time.Minute {
			t.Errorf("run took %v, want 55 s to 60 s", waited)
		}
		lines := log.lines("Waiting for the database")
		if len(lines) != 6 || len(log.lines("")) != 6 {
			t.Fatalf("got the log\n%swant 6 lines of waiting", log)
		}
		for i, line := range lines {
			if line["error"] != "connection to 127.0.0.1:1 refused" || (line["remedy"] != nil) != (i == 0) ||
				line["seconds_left"] != float64(59-10*i) && line["seconds_left"] != float64(60-10*i) {
				t.Errorf("line %d: got %v, want the error, the time left, and a remedy in the first", i, line)
			}
		}
		log.check(t)
	})
}

// TestRunFindsPortInUse checks that run reports a port in use before it waits for the database.
func TestRunFindsPortInUse(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.databaseURL, s.port = "postgres://john:"+secret+"@127.0.0.1:1/users", occupiedPort(t)
	log := &logBuffer{}
	err := run(t.Context(), s, testLimits, &logWriter{w: log})
	if err == nil || !strings.Contains(err.Error(), "PORT") || len(log.lines("")) > 0 {
		t.Errorf("run: got %v, want an error about PORT, and no line in the log:\n%s", err, log)
	}
}

// TestCommands checks the exit code and the output of commands that need no settings.
func TestCommands(t *testing.T) {
	t.Parallel()
	all := []string{"user-service", "import FILE", "export", "key NAME [read]", "healthcheck", "version", "help", "README.md"}
	build := []string{"user-service " + release + ",", "commit ", runtime.Version()}
	for _, test := range []struct {
		args  string
		code  int
		lines int
		says  []string
	}{
		{args: "help", lines: 14, says: all},
		{args: "-h", lines: 14, says: all},
		{args: "--help", lines: 14, says: all},
		{args: "key --help", lines: 14, says: all},
		{args: "version", lines: 1, says: build},
		{args: "--version", lines: 1, says: build},
		{args: "serve", code: 2, lines: 1, says: []string{`"ERROR"`, "import, export, key, healthcheck, version, help"}},
		{args: "help me", code: 2, lines: 1, says: []string{`"ERROR"`, "import, export, key, healthcheck, version, help"}},
	} {
		var out bytes.Buffer
		if code := command(t.Context(), strings.Fields(test.args), streams{out: &out, err: &out}); code != test.code {
			t.Errorf("%s: exit code %d, want %d", test.args, code, test.code)
		}
		for _, text := range test.says {
			if !strings.Contains(out.String(), text) {
				t.Errorf("%s: output %q, want %q in it", test.args, &out, text)
			}
		}
		if lines := strings.Count(out.String(), "\n"); lines != test.lines {
			t.Errorf("%s: %d lines, want %d", test.args, lines, test.lines)
		}
	}
}

// lateListener delays the error of Accept that tells its server that it is closed.
type lateListener struct{ net.Listener }

func (l lateListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		time.Sleep(2 * drainIdle)
	}
	return conn, err
}

// listenLocally serves a handler with a limit on connections, and returns the address.
func listenLocally(t *testing.T, h http.Handler, connections int) (*httpServer, string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := testLimits
	l.connections = connections
	s := newHTTPServer(h, l, discardLog)
	served := make(chan error, 1)
	go func() { served <- s.Serve(limitedListener{listener, s}) }()
	t.Cleanup(func() {
		if err := s.shutDown(listener); err != nil {
			t.Error(err)
		}
		<-served
	})
	return s, listener.Addr().String()
}

// get sends a request on a new connection, and returns the connection and the status line.
func get(t *testing.T, address string) (net.Conn, string) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: test\r\n\r\n")
	line, _ := bufio.NewReader(conn).ReadString('\n')
	return conn, line
}

// TestConnectionLimit opens more connections than the server keeps: idle ones are closed for new
// ones, which wait while all are busy.
func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	const most = 3
	var block atomic.Pointer[chan struct{}]
	s, address := listenLocally(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		if c := block.Load(); c != nil {
			<-*c
		}
	}), most)
	var idle []net.Conn
	for range 3 * most {
		conn, line := get(t, address)
		if !strings.HasPrefix(line, "HTTP/1.1 200") {
			t.Fatalf("a connection in addition to idle ones: got %q, want 200", line)
		}
		if n := s.open.Load(); n > most {
			t.Errorf("%d open connections, want at most %d", n, most)
		}
		idle = append(idle, conn)
	}
	if n, err := idle[0].Read(make([]byte, 1000)); err == nil && n == 0 {
		t.Error("the first idle connection is open")
	}
	busy := make(chan struct{})
	block.Store(&busy)
	lines := make(chan string)
	for range 2 * most {
		go func() {
			_, line := get(t, address)
			lines <- line
		}()
	}
	eventually(t, "busy connections", func() bool { return s.open.Load() == most })
	close(busy)
	for range 2 * most {
		if line := <-lines; !strings.HasPrefix(line, "HTTP/1.1 200") {
			t.Errorf("a connection that waited: got %q, want 200", line)
		}
	}
}

// TestBusyConnectionsStayOpen checks that the server does not close connections because it has too
// many: clients that are busy would have to connect for every request.
func TestBusyConnectionsStayOpen(t *testing.T) {
	t.Parallel()
	var full atomic.Bool
	var busy atomic.Int64
	release := make(chan struct{})
	s, address := listenLocally(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		if full.Load() {
			busy.Add(1)
			<-release
		}
	}), 2)
	first, _ := get(t, address)
	full.Store(true)
	fmt.Fprint(first, "GET / HTTP/1.1\r\nHost: test\r\n\r\n")
	eventually(t, "a busy connection", func() bool { return busy.Load() == 1 })
	second := make(chan struct{})
	go func() {
		defer close(second)
		get(t, address)
	}()
	eventually(t, "another one", func() bool { return busy.Load() == 2 && s.open.Load() == 2 })
	time.Sleep(50 * time.Millisecond) // until Accept has closed the idle ones
	close(release)
	answer, err := http.ReadResponse(bufio.NewReader(first), nil)
	if err != nil || answer.Close {
		t.Errorf("a busy connection: error %v, closed %t, want it to stay open", err,
			err == nil && answer.Close)
	}
	<-second
}

// TestUnreadAnswer checks that a client that does not read its answer takes little memory of the
// kernel.
func TestUnreadAnswer(t *testing.T) {
	t.Parallel()
	var sent atomic.Int64
	_, address := listenLocally(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Second))
		for {
			n, err := w.Write(make([]byte, 1000))
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	}), 10)
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096)
		})
	}}
	conn, err := dialer.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: test\r\n\r\n")
	for last := int64(-1); sent.Load() == 0 || sent.Load() != last; time.Sleep(100 * time.Millisecond) {
		last = sent.Load()
	}
	if n := sent.Load(); n > 2*sendBuffer+16<<10 { // the client's buffer and net/http's
		t.Errorf("the kernel took %d bytes of an answer, want at most %d", n, 2*sendBuffer+16<<10)
	}
}

// TestServerErrors checks that errors of the listener are logged at WARN, a few at a time, and
// errors of single connections at DEBUG.
func TestServerErrors(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := &logBuffer{}
		out := &logWriter{w: log}
		s := newHTTPServer(nil, testLimits, newLogger(out, slog.LevelInfo))
		for range 3 {
			for range 10 {
				s.ErrorLog.Print("http: Accept error: accept: too many open files; retrying in 1s")
				s.ErrorLog.Print("http: TLS handshake error")
			}
			time.Sleep(time.Minute)
		}
		out.flush()
		lines := log.lines("HTTP server error")
		if len(lines) != 12 {
			t.Errorf("%d lines in 3 minutes, want 12", len(lines))
		}
		for _, line := range lines {
			if line["level"] != "WARN" || !strings.Contains(fmt.Sprint(line["error"]), "open files") {
				t.Errorf("line %v, want the error of the listener at WARN", line)
			}
		}
	})
}

// TestShutDownBeforeServeReturns checks that shutDown succeeds if Serve has not returned yet. In this case
// http.Server.Shutdown closes the listener a second time.
func TestShutDownBeforeServeReturns(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newHTTPServer(http.NotFoundHandler(), testLimits, discardLog)
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

// envOf returns an environment that has one variable.
func envOf(name, value string) func(string) variable {
	return func(asked string) variable {
		if asked == name {
			return variable{value: value, set: true}
		}
		return variable{}
	}
}

// defaultSettings returns the settings of an empty environment.
func defaultSettings() settings {
	return settings{
		exchange:          "user_events",
		appName:           "user-service",
		host:              "127.0.0.1",
		port:              8000,
		logLevel:          slog.LevelInfo,
		passwordMinLength: 8,
	}
}

// withDatabaseURL returns a function that sets databaseURL.
func withDatabaseURL(url string) func(*settings) {
	return func(s *settings) { s.databaseURL = url }
}

// withLogLevel returns a function that sets logLevel.
func withLogLevel(level slog.Level) func(*settings) {
	return func(s *settings) { s.logLevel = level }
}

// validSettings are environments of one variable. want makes the expected settings of the defaults.
var validSettings = []struct {
	name, value string
	want        func(*settings)
}{
	{"NOT_A_SETTING", "value", func(*settings) {}},
	{"DATABASE_URL", "postgres://u:p@h:5433/d", withDatabaseURL("postgres://u:p@h:5433/d")},
	{"DATABASE_URL", "postgresql://u:p@h/d?sslmode=disable",
		withDatabaseURL("postgresql://u:p@h/d?sslmode=disable")},
	{"DATABASE_URL", "postgresql+asyncpg://u:p@h/d", withDatabaseURL("postgresql://u:p@h/d")},
	{"DATABASE_URL", "postgres+psycopg2://u:p@h/d", withDatabaseURL("postgres://u:p@h/d")},
	{"DATABASE_URL", "postgres://u:p@ss+w@h/d", withDatabaseURL("postgres://u:p@ss+w@h/d")},
	{"DATABASE_URL", "postgres://u@a:1,b:2/d?target_session_attrs=read-write",
		withDatabaseURL("postgres://u@a:1,b:2/d?target_session_attrs=read-write")},
	{"RABBITMQ_URL", "amqp://u:p@h:5673/%2F",
		func(s *settings) { s.rabbitURL = "amqp://u:p@h:5673/%2F" }},
	{"RABBITMQ_URL", "amqps://h", func(s *settings) { s.rabbitURL = "amqps://h" }},
	{"APP_NAME", "ein Dienst für Leute", func(s *settings) { s.appName = "ein Dienst für Leute" }},
	{"APP_NAME", strings.Repeat("a", 255),
		func(s *settings) { s.appName = strings.Repeat("a", 255) }},
	{"HOST", "0.0.0.0", func(s *settings) { s.host = "0.0.0.0" }},
	{"HOST", "::1", func(s *settings) { s.host = "::1" }},
	{"HOST", "localhost", func(s *settings) { s.host = "localhost" }},
	{"PORT", "0", func(s *settings) { s.port = 0 }},
	{"PORT", "65535", func(s *settings) { s.port = 65535 }},
	{"LOG_LEVEL", "DEBUG", withLogLevel(slog.LevelDebug)},
	{"LOG_LEVEL", "info", withLogLevel(slog.LevelInfo)},
	{"LOG_LEVEL", "WARNING", withLogLevel(slog.LevelWarn)},
	{"LOG_LEVEL", "Warn", withLogLevel(slog.LevelWarn)},
	{"LOG_LEVEL", "error", withLogLevel(slog.LevelError)},
	{"LOG_LEVEL", "critical", withLogLevel(slog.LevelError)},
	{"DEBUG", "true", withLogLevel(slog.LevelDebug)},
	{"DEBUG", "1", withLogLevel(slog.LevelDebug)},
	{"DEBUG", "False", withLogLevel(slog.LevelInfo)},
	{"PASSWORD_MIN_LENGTH", "1", func(s *settings) { s.passwordMinLength = 1 }},
	{"PASSWORD_MIN_LENGTH", "128", func(s *settings) { s.passwordMinLength = 128 }},
	{"PASSWORD_BLOCKLIST", "on", func(s *settings) { s.passwordBlocklist = true }},
	{"PASSWORD_BLOCKLIST", "OFF", func(*settings) {}},
	{"API_KEYS", "a:" + strings.Repeat("00", 32) + ", b.c:" + strings.Repeat("00", 32) + ":read",
		func(s *settings) {
			s.apiKeys = []apiKey{{name: "a", scopes: allScopes},
				{name: "b.c", scopes: []string{scopeRead}}}
		}},
	{"API_KEYS", "", func(s *settings) { s.apiKeys = []apiKey{} }}, // not nil: nobody has access
	{"API_KEYS", "open", func(s *settings) { s.open = true }},
	{"RATE_LIMIT", "0.5", func(s *settings) { s.rateLimit = 0.5 }},
	{"TRUSTED_PROXIES", "10.0.0.0/8, ::1", func(s *settings) {
		s.trustedProxies = []netip.Prefix{
			netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	}},
	{"TRUSTED_PROXIES", "::ffff:10.0.0.0/104, ::ffff:10.1.2.3", func(s *settings) {
		s.trustedProxies = []netip.Prefix{
			netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.2.3/32")}
	}},
	{"CORS_ORIGINS", "https://a.example, http://localhost:3000", func(s *settings) {
		s.corsOrigins = []string{"https://a.example", "http://localhost:3000"}
	}},
	{"CORS_ORIGINS", "http://[::1]:443,chrome-extension://abc,https://xn--bcher-kva.example:80",
		func(s *settings) {
			s.corsOrigins = []string{"http://[::1]:443", "chrome-extension://abc",
				"https://xn--bcher-kva.example:80"}
		}},
	{"SHUTDOWN_DELAY", "0s", func(*settings) {}},
	{"SHUTDOWN_DELAY", "1m500ms", func(s *settings) { s.shutdownDelay = 60500 * time.Millisecond }},
}

// TestSettings checks the settings for each of validSettings.
func TestSettings(t *testing.T) {
	t.Parallel()
	for _, test := range validSettings {
		want := defaultSettings()
		test.want(&want)
		got, err := loadSettings(envOf(test.name, test.value))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s=%s: %+v, %v, want %+v", test.name, test.value, got, err, want)
		}
	}
}

// TestLogLevelOverridesDebug checks that LOG_LEVEL takes precedence over DEBUG.
func TestLogLevelOverridesDebug(t *testing.T) {
	t.Parallel()
	env := map[string]string{"DEBUG": "true", "LOG_LEVEL": "error"}
	s, err := loadSettings(func(name string) variable { return variable{value: env[name]} })
	if err != nil || s.logLevel != slog.LevelError {
		t.Errorf("level %v, %v, want ERROR", s.logLevel, err)
	}
}

// invalidSettings are values that a variable must not have, and a substring of the error, which
// says what would be valid.
var invalidSettings = map[string]struct {
	accepts string
	values  []string
}{
	"DATABASE_URL": {"postgres://user:password@host:5432/database", []string{
		"mysql://u:" + secret + "@h/d", "http://h/d", "h:5432/d",
		"postgresql", "postgresql+asyncpg", "postgres:h", "postgres:/h/d", // no "://"
		"POSTGRES://h/d", // libpq does not accept upper case either
		"host=localhost password=" + secret, "user=u dbname=d",
		"postgres://u:" + secret + "@h:abc/d", "postgres://u:" + secret + "@h:0/d",
		"postgres://u:" + secret + "@h:99999/d", "postgres://u:" + secret + "@h:1:2/d",
		"postgres://u:%zz" + secret + "@h/d", "postgres://u:" + secret + "@h/d\n",
		"postgres://u:" + secret + "@h/d?sslmode=unknown",
		"postgres://u:" + secret + "@h/d?connect_timeout=x",
		"postgres://u:" + secret + "@h/d?pool_max_conns=0",
		// Passwords that should be percent-encoded: pgx parses them as the name of a
		// database, for example, and its errors contain that name.
		"postgres://u:/" + secret + "@h/d", "postgres://u:1/" + secret + "@h/d",
		"postgres://u:1?" + secret + "@h/d", "postgres://u:1#" + secret + "@h/d",
	}},
	"RABBITMQ_URL": {"amqp://user:password@host:5672/", []string{
		"http://u:" + secret + "@h/", "amqps", "amqps:", "amqp+x://h/", "AMQP://h/", "h:5672",
		"amqp://u:" + secret + "@h:abc/", "amqp://u:" + secret + "@h:99999/",
		"amqp://u:" + secret + "@h:0/", "amqp://u:%zz" + secret + "@h/",
		"amqp://u:" + secret + "@h/a b", "amqp://u:" + secret + "@h/?heartbeat=x",
	}},
	"APP_NAME": {"1 to 255 bytes", []string{
		strings.Repeat("a", 256), "two\nlines", "nul\x00byte", "half\xc3",
	}},
	"HOST": {"IP address or a host name", []string{
		"[::1]", "127.0.0.1:80", ":8000", "two words", "http://h",
	}},
	"PORT": {"0 to 65535", []string{
		"65536", "-1", "+1", "http", "80.0", "0x50", " 80", "99999999999999999999",
	}},
	"LOG_LEVEL": {"DEBUG, INFO, WARNING, ERROR or CRITICAL", []string{"TRACE", "-4", "INFO "}},
	"DEBUG":     {"true or false", []string{"yes", "2", "on"}},
	"PASSWORD_MIN_LENGTH": {"1 to 128", []string{
		"0", "129", "-8", "eight", "4294967297",
	}},
	"PASSWORD_BLOCKLIST": {"on or off", []string{"yes", "2"}},
	"API_KEYS": {"name:sha256hex", []string{
		"shop", "shop:" + strings.Repeat("a", 63), "shop:" + strings.Repeat("g", 64),
		":" + strings.Repeat("a", 64), "shop:" + strings.Repeat("a", 64) + ":write",
		"a b:" + strings.Repeat("a", 64), "shop:" + strings.Repeat("a", 64) + ",", "OPEN",
		"open,shop:" + strings.Repeat("a", 64),
	}},
	"RATE_LIMIT": {"0.01 to 1000000", []string{
		"0.001", "-1", "1e9", "NaN", "Inf", "ten", "10/s",
	}},
	"TRUSTED_PROXIES": {"IP addresses or networks", []string{
		"proxy", "10.0.0.0/33", "10.0.0.1,", "fe80::1%eth0", "::ffff:0:0/95",
	}},
	"CORS_ORIGINS": {"https://app.example.com", []string{
		"shop.example", "https://shop.example/", "ftp:/shop.example", "https://Shop.example",
		"https://shop.example,", "https://:1", "https://a b", "https://shop.example:", "http://h:0",
		"https://*.shop.example", "https://[::1", "http://h:port",
	}},
	"SHUTDOWN_DELAY": {"a duration of 0 or more", []string{"-1s", "7", "soon", "7 s"}},
	"JWT_ISSUER": {"the URL of an identity provider, such as https://id.example.com/",
		wrongProviderURLs},
	"JWT_JWKS_URL": {"the URL of a JSON Web Key Set, such as https://id.example.com/keys",
		wrongProviderURLs},
	"JWT_AUDIENCE": {"1 to 255 bytes", []string{strings.Repeat("a", 256), "two\nlines", "half\xc3"}},
}

// wrongProviderURLs are no URLs of an identity provider.
var wrongProviderURLs = []string{
	"ftp://idp.test", "file:///etc/passwd", "HTTPS://idp.test", "idp.test", "//idp.test",
	"http:", "http://", "https:///keys", "https://:443", "https://idp.test:", "https://h:99999/",
	"https://h:0/", "https://idp.test/#a", "https://idp.test/\n", "https://[::1", "https://a b/",
	"https://u:" + secret + "@idp.test/", "https://" + secret + "@idp.test/",
	"https://u:a/" + secret + "@idp.test/", "https://idp.test/" + strings.Repeat("a", 255),
}

// TestSettingsRefuse checks that the error of an invalid value names the variable and what it
// accepts, and does not contain the value, which may be a password.
func TestSettingsRefuse(t *testing.T) {
	t.Parallel()
	for name, test := range invalidSettings {
		for _, value := range test.values {
			_, err := loadSettings(envOf(name, value))
			refusal, ok := errors.AsType[*settingError](err)
			if !ok || refusal.name != name {
				t.Errorf("%s=%q: error %v, want a settingError of this variable", name, value, err)
				continue
			}
			text := err.Error()
			if !strings.HasPrefix(text, name+" must be ") || !strings.Contains(text, test.accepts) {
				t.Errorf("%s=%q: error %q, want %q in it", name, value, text, test.accepts)
			}
			if strings.Contains(text, value) || strings.Contains(text, secret) {
				t.Errorf("%s=%q: the error contains the value: %s", name, value, text)
			}
		}
	}
}

// TestSettingsReasons checks that the error of a value says what is wrong with it.
func TestSettingsReasons(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, value, reason string }{
		{"API_KEYS", "shop:" + digestOf(""), "shop is that of an empty key"},
		{"API_KEYS", "shop:" + digestOf("usk_..."), "shop is that of the example in README.md"},
		{"CORS_ORIGINS", "*", "* is not supported, because any page"},
		{"CORS_ORIGINS", "null", "any page can send it"},
		{"CORS_ORIGINS", "shop.example", "begins with a scheme"},
		{"CORS_ORIGINS", "localhost:3000", "begins with a scheme"},
		{"CORS_ORIGINS", "https:/shop.example", "begins with a scheme"},
		{"CORS_ORIGINS", "https://u:" + secret + "@shop.example", "no user name"},
		{"CORS_ORIGINS", "https://shop.example/", "without a slash"},
		{"CORS_ORIGINS", "https://shop.example/app", "without a slash"},
		{"CORS_ORIGINS", "https://shop.example?a=b", "without a slash"},
		{"CORS_ORIGINS", "https://shop.example#a", "without a slash"},
		{"CORS_ORIGINS", "https://Shop.example", "lower case"},
		{"CORS_ORIGINS", "HTTPS://shop.example", "lower case"},
		{"CORS_ORIGINS", "https://shop.example:443", "default port"},
		{"CORS_ORIGINS", "http://shop.example:80", "default port"},
		{"CORS_ORIGINS", "https://bücher.example", "xn-- form"},
		{"JWT_ISSUER", "https://u:" + secret + "@h/", "must not have a user name or a password"},
		{"JWT_JWKS_URL", "https://u:" + secret + "@h/", "must not have a user name or a password"},
		{"DATABASE_URL", "postgres://u:" + secret + "@h/d?sslmode=verify-full&sslrootcert=/none.pem",
			"cannot be read: open /none.pem: no such file"},
	} {
		_, err := loadSettings(envOf(test.name, test.value))
		if err == nil || !strings.Contains(err.Error(), test.reason) ||
			strings.Contains(err.Error(), secret) {
			t.Errorf("%s=%s: error %v, want %q in it", test.name, test.value, err, test.reason)
		}
	}
}

// TestTokenSettings checks which settings of access tokens fit together.
func TestTokenSettings(t *testing.T) {
	t.Parallel()
	const id, keys = "https://id.example/", "https://id.example:8443/keys?a=b"
	shop := "shop:" + digestOf("key")
	for _, test := range []struct {
		env  map[string]string
		want string // the variable of the error; "" if the settings are valid
	}{
		{env: map[string]string{"JWT_ISSUER": id, "JWT_AUDIENCE": "users"}},
		{env: map[string]string{"JWT_JWKS_URL": keys, "JWT_AUDIENCE": "users"}},
		{env: map[string]string{"JWT_ISSUER": id, "JWT_JWKS_URL": keys, "JWT_AUDIENCE": "ü s"}},
		{env: map[string]string{"JWT_ISSUER": "http://[::1]:80/a", "JWT_AUDIENCE": "users"}},
		{env: map[string]string{"JWT_ISSUER": id, "JWT_AUDIENCE": "users", "API_KEYS": shop}},
		{env: map[string]string{"JWT_ISSUER": id, "JWT_AUDIENCE": "users", "API_KEYS": ""}},
		{env: map[string]string{"JWT_ISSUER": "", "JWT_JWKS_URL": "", "JWT_AUDIENCE": ""}},
		{env: map[string]string{"JWT_ISSUER": id}, want: "JWT_AUDIENCE"},
		{env: map[string]string{"JWT_JWKS_URL": keys}, want: "JWT_AUDIENCE"},
		{env: map[string]string{"JWT_ISSUER": id, "JWT_AUDIENCE": ""}, want: "JWT_AUDIENCE"},
		{env: map[string]string{"JWT_AUDIENCE": "users"}, want: "JWT_ISSUER"},
		{env: map[string]string{"JWT_AUDIENCE": "users", "API_KEYS": shop}, want: "JWT_ISSUER"},
		{env: map[string]string{"JWT_ISSUER": id, "JWT_AUDIENCE": "users", "API_KEYS": "open"},
			want: "API_KEYS"},
		{env: map[string]string{"JWT_JWKS_URL": keys, "JWT_AUDIENCE": "users", "API_KEYS": "open"},
			want: "API_KEYS"},
	} {
		s, err := loadSettings(func(name string) variable {
			value, set := test.env[name]
			return variable{value: value, set: set}
		})
		name := ""
		if refusal, ok := errors.AsType[*settingError](err); ok {
			name = refusal.name
		}
		if name != test.want || (err == nil) != (test.want == "") {
			t.Errorf("%v: got %v, want an error of %q", test.env, err, test.want)
		}
		if err == nil && (s.jwtIssuer != test.env["JWT_ISSUER"] ||
			s.jwksURL != test.env["JWT_JWKS_URL"] || s.jwtAudience != test.env["JWT_AUDIENCE"]) {
			t.Errorf("%v: got the settings %+v", test.env, s)
		}
	}
}

// digestOf returns the digest of a key, as API_KEYS has it.
func digestOf(key string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(key))) }

// TestWarnings checks which settings make the service warn when it starts.
func TestWarnings(t *testing.T) {
	t.Parallel()
	key := "shop:" + digestOf("key")
	for _, test := range []struct {
		env  map[string]string
		want string // the start of the only warning
	}{
		{env: map[string]string{}},
		{env: map[string]string{"HOST": "::1"}},
		{env: map[string]string{"HOST": "localhost"}},
		{env: map[string]string{"HOST": "0.0.0.0"}, want: "No API_KEYS"},
		{env: map[string]string{"HOST": "192.0.2.1"}, want: "No API_KEYS"},
		{env: map[string]string{"HOST": "0.0.0.0", "API_KEYS": "open"}},
		{env: map[string]string{"HOST": "0.0.0.0", "API_KEYS": key}},
		{env: map[string]string{"HOST": "0.0.0.0", "API_KEYS": ""}, want: "API_KEYS is set but empty"},
		{env: map[string]string{"DATABASE_URL": "postgres://u@127.0.0.1/d"}},
		{env: map[string]string{"DATABASE_URL": "postgres://u@localhost/d"}},
		{env: map[string]string{"DATABASE_URL": "postgres:///d?host=/run/postgresql"}},
		{env: map[string]string{"DATABASE_URL": "postgres://u@192.0.2.1/d?sslmode=require"}},
		{env: map[string]string{"DATABASE_URL": "postgres://u@db/d?sslmode=verify-full"}},
		{env: map[string]string{"DATABASE_URL": "postgres://u@db/d"}, want: "DATABASE_URL"},
		{env: map[string]string{"DATABASE_URL": "postgres://u@db/d?sslmode=allow"}, want: "DATABASE_URL"},
		{env: map[string]string{"DATABASE_URL": "postgres://u@db/d?sslmode=disable"},
			want: "DATABASE_URL"},
		{env: map[string]string{"DATABASE_URL": "postgres://u@localhost,db/d"}, want: "DATABASE_URL"},
		{env: map[string]string{"RABBITMQ_URL": "amqp://u:p@[::1]:5672/"}},
		{env: map[string]string{"RABBITMQ_URL": "amqps://mq/"}},
		{env: map[string]string{"RABBITMQ_URL": "amqp://u:p@localhost,mq/"}, want: "RABBITMQ_URL"},
		{env: map[string]string{"JWT_ISSUER": "https://id/", "JWT_AUDIENCE": "users"}},
		{env: map[string]string{"JWT_ISSUER": "http://localhost/", "JWT_AUDIENCE": "users"}},
		{env: map[string]string{"JWT_ISSUER": "http://[::1]:80/", "JWT_AUDIENCE": "users"}},
		{env: map[string]string{"JWT_ISSUER": "https://id/", "JWT_AUDIENCE": "users",
			"HOST": "0.0.0.0"}},
		{env: map[string]string{"JWT_ISSUER": "https://id/", "JWT_AUDIENCE": "users", "API_KEYS": ""}},
		{env: map[string]string{"JWT_ISSUER": "http://id/", "JWT_AUDIENCE": "users"},
			want: "JWT_ISSUER or JWT_JWKS_URL names a remote host"},
		{env: map[string]string{"JWT_ISSUER": "https://id/", "JWT_AUDIENCE": "users",
			"JWT_JWKS_URL": "http://id/keys"}, want: "JWT_ISSUER or JWT_JWKS_URL names a remote host"},
		{env: map[string]string{"JWT_ISSUER": "http://id/", "JWT_AUDIENCE": "users", // only a name
			"JWT_JWKS_URL": "https://id/keys"}},
		{env: map[string]string{"JWT_JWKS_URL": "https://id/keys", "JWT_AUDIENCE": "users"},
			want: "No JWT_ISSUER"},
	} {
		s, err := loadSettings(func(name string) variable {
			value, set := test.env[name]
			return variable{value: value, set: set}
		})
		if err != nil {
			t.Errorf("%v: %v", test.env, err)
			continue
		}
		got := s.warnings()
		if none := test.want == ""; none != (len(got) == 0) ||
			!none && (len(got) != 1 || !strings.HasPrefix(got[0], test.want)) {
			t.Errorf("%v: got the warnings %q, want one of %q", test.env, got, test.want)
		}
	}
}

// TestNobodyHasAccess checks that without keys, but with API_KEYS set to "", no request passes.
func TestNobodyHasAccess(t *testing.T) {
	t.Parallel()
	set := memorySettings()
	set.apiKeys = []apiKey{}
	s := startService(t, set)
	for path, want := range map[string]int{"/users": 401, "/metrics": 401, "/healthz": 200} {
		for _, header := range []string{"", "Authorization: Bearer ", "Authorization: Bearer key"} {
			if a := s.do("GET", path, "", header); a.status != want {
				t.Errorf("GET %s with %q: got %d, want %d", path, header, a.status, want)
			}
		}
	}
}

// TestParseEnvFile checks the syntax of .env files. The error of an invalid line has its number but
// not its content, which may be a password.
func TestParseEnvFile(t *testing.T) {
	t.Parallel()
	type values = map[string]string
	for content, want := range map[string]values{
		"":                               {},
		"A=1\nB=2":                       {"A": "1", "B": "2"},
		"A=1\nA=2\n":                     {"A": "2"},
		"# A=1\n\n  #B=2\n \t\nC=3\n":    {"C": "3"},
		"A=1 # comment\nB=#2\nC=3\t#\n":  {"A": "1", "B": "#2", "C": "3"},
		"A=p#ss # it's a \"#\"\n":        {"A": "p#ss"},
		"A= # comment\nB= b c # x # y\n": {"A": "", "B": "b c"},
		"A=\"x # y\" # z\nB=' #' \n":     {"A": "x # y", "B": " #"},
		"A=\"x\" # say \"y\"\nB='x'#y\n": {"A": "x", "B": "'x'#y"},
		"A='a'b'\nB=\"\" # none\n":       {"A": "a'b", "B": ""},
		"A=1\nA=\n":                      {"A": ""},
		"export A=1\n export  B=2\n":     {"A": "1", "B": "2"},
		"exported=1\n":                   {"exported": "1"},
		"A=\"x y\"\nB=' z '\n":           {"A": "x y", "B": " z "},
		"A=\"x\nB='\nC='x\"\nD=x'y'\n":   {"A": `"x`, "B": "'", "C": `'x"`, "D": "x'y'"},
		"A=\"x\" \nB=\"\"\n":             {"A": "x", "B": ""},
		"A=1\r\nB=\"2\"\r\n":             {"A": "1", "B": "2"},
		"\ufeffA=1\n":                    {"A": "1"},
		"  A=1\n\tB=2\n":                 {"A": "1", "B": "2"},
		"A= x \n":                        {"A": "x"},
		"A=b=c==\n":                      {"A": "b=c=="},
		"A=\n":                           {"A": ""},
		"A\n":                            {"A": ""},
		"A=" + strings.Repeat("x", 9e4):  {"A": strings.Repeat("x", 9e4)},
	} {
		lines, err := parseEnvFile(content)
		got := values{}
		for name, line := range lines {
			got[name] = line.value
		}
		if err != nil || !maps.Equal(got, want) {
			t.Errorf("%.60q: %.60q, %v, want %.60q", content, got, err, want)
		}
	}
	for content, want := range map[string]string{
		"A=1\n# B\nDATABASE URL=" + secret: "line 3",
		"A =" + secret:                     "line 1",
		"A=1\r\n=" + secret:                "line 2",
		"export =" + secret:                "line 1",
		"\xff\xfeA\x00=\x001\x00":          "UTF-16",
		"\xfe\xff\x00A\x00=\x001":          "UTF-16",
		"A\x00=\x001\x00":                  "UTF-16",
	} {
		_, err := parseEnvFile(content)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: error %v, want %s in it", content, err, want)
		} else if strings.Contains(err.Error(), secret) {
			t.Errorf("%.60q: the error contains the value: %v", content, err)
		}
	}
}

// FuzzParseEnvFile checks that parseEnvFile returns either values or an error, and valid names.
func FuzzParseEnvFile(f *testing.F) {
	for _, content := range []string{
		"", "A=1\r\nexport B='2'\n", "\ufeff# x\nA=\"", "A B=1", "=", "export ",
	} {
		f.Add([]byte(content))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		values, err := parseEnvFile(string(content))
		if (values == nil) == (err == nil) {
			t.Errorf("values %v and error %v, want exactly one of them", values, err)
		}
		for name := range values {
			if name == "" || strings.Contains(name, "=") ||
				strings.ContainsFunc(name, unicode.IsSpace) {
				t.Errorf("%q: invalid name of a variable %q", content, name)
			}
		}
	})
}

// TestLookupWithFile checks that the environment takes precedence over the file, and that the file
// is named as the source. It uses PATH, which every environment has, because parallel tests cannot
// set a variable.
func TestLookupWithFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, ".env")
	inherited := variable{value: os.Getenv("PATH"), set: true}
	lookup, err := lookupWithFile(path)
	if err != nil || lookup("PATH") != inherited {
		t.Errorf("PATH without a file: %v, %v, want %v", lookup("PATH"), err, inherited)
	}
	content := []byte("# comment\nPATH=file\nUS_TEST_ONLY_IN_FILE=old\n" +
		"US_TEST_ONLY_IN_FILE=file\nUS_TEST_EMPTY=")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	lookup, err = lookupWithFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]variable{
		"PATH": inherited, "US_TEST_NOWHERE": {}, "US_TEST_EMPTY": {},
		"US_TEST_ONLY_IN_FILE": {value: "file", source: path + ", line 4"},
	} {
		if got := lookup(name); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	_, err = lookupWithFile(dir)
	if err == nil || !strings.HasPrefix(err.Error(), dir+" must be ") {
		t.Errorf("a directory as the file: error %v, want one that begins with %q",
			err, dir+" must be ")
	}
}

// TestSettingSource checks that an error names the file and the line of the value.
func TestSettingSource(t *testing.T) {
	t.Parallel()
	_, err := loadSettings(func(name string) variable {
		if name == "PORT" {
			return variable{value: "http", source: ".env, line 3"}
		}
		return variable{}
	})
	if want := "PORT must be a port number, 0 to 65535 (.env, line 3)"; err == nil ||
		err.Error() != want {
		t.Errorf("got the error %v, want %s", err, want)
	}
}

// TestBudgets checks the inequalities that the comments of limits.go promise.
func TestBudgets(t *testing.T) {
	t.Parallel()
	const contract = 5 * time.Second // for an answer, and for the takeover of the lease
	for _, test := range []struct {
		name        string
		less, limit time.Duration
	}{
		{"a request and its deadline", requestBudget, contract},
		{"the work of a change and its request", workBudget, requestBudget - 1},
		{"a statement and its request", statementBudget, requestBudget - 1},
		{"a batch and a statement after it", batchBudget + cancelBudget, statementBudget - 1},
		{"connecting and its statement", connectBudget, statementBudget - 1},
		{"connecting to several hosts and its statement", allHostsBudget, statementBudget - 1},
		{"the wait of a hash and the work of a change", hashWait, workBudget - 1},
		{"readiness and its deadline", readyBudget, 3*time.Second - 1},
		{"an answer and its timeout", readTimeout + requestBudget, writeTimeout},
		{"headers and the whole request", readHeaderTimeout, readTimeout - 1},
		{"all phases of a stop", drainIdle + drainRequests + relayDrain + resignWait + drainConsumer +
			closeWait + logWait, stopBudget - 1},
		{"waiting for the log and the end of the consumer", logWait, drainConsumer - 1},
		{"a request and the drain of requests", requestBudget, drainRequests - 1},
		{"waiting for confirms and the lease", leadInterval + publishWait, leaseTime},
		{"the takeover of the lease and its deadline", leaseTime + leadInterval, contract},
		{"a write to the broker and the confirms", brokerWrite, publishWait},
		{"the topology and its deadline", topologyInterval, 3*time.Second - 1},
		{"a pause of the consumer and RabbitMQ's timeout", maxPause, 30*time.Minute - 1},
	} {
		if test.less > test.limit {
			t.Errorf("%s: %v, want at most %v", test.name, test.less, test.limit)
		}
	}
	if maxPoolSize > 20 || defaultPoolSize > maxPoolSize || 3*minPoolSize > 20 ||
		minPoolSize <= reservedConns+1 {
		t.Error("the pool sizes do not fit 20 connections of a replica, or of three behind a pooler")
	}
	if relayWindow > relayRead || consumerPrefetch < 1 {
		t.Error("a window of the relay is larger than what it reads")
	}
}

// TestNewLimits checks that the machine's limits stay within its memory.
func TestNewLimits(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	for _, test := range []struct {
		cores  int
		memory int64
		want   limits
	}{
		{1, math.MaxInt64, limits{connections: 8192, requests: 4096, bodies: 16 * mib,
			hashes: 1, hashQueue: 128}},
		{2, math.MaxInt64, limits{connections: 8192, requests: 4096, bodies: 16 * mib,
			hashes: 2, hashQueue: 256}},
		{64, math.MaxInt64, limits{connections: 8192, requests: 4096, bodies: 16 * mib,
			hashes: 64, hashQueue: 8192}},
		{64, 512 * mib, limits{connections: 8192, requests: 4096, bodies: 16 * mib,
			hashes: 18, hashQueue: 2304}},
		{2, 56 * mib, limits{connections: 896, requests: 896, bodies: 7 * mib,
			hashes: 2, hashQueue: 256}},
		{2, 8 * mib, limits{connections: 256, requests: 128, bodies: mib,
			hashes: 1, hashQueue: 128}},
	} {
		test.want.cores, test.want.memory, test.want.hash = test.cores, test.memory, newHashCost
		if got := newLimits(test.cores, test.memory); got != test.want {
			t.Errorf("%d cores, %d MiB: got %+v, want %+v", test.cores, test.memory/mib, got, test.want)
		}
	}
}

// TestCgroupMemory reads the limits of containers and services as Linux shows them.
func TestCgroupMemory(t *testing.T) {
	t.Parallel()
	const none = math.MaxInt64
	for name, test := range map[string]struct {
		files map[string]string
		want  int64
	}{
		"not Linux": {nil, none},
		"version 2, container": {map[string]string{
			"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "536870912\n"}, 512 << 20},
		"version 2, no limit": {map[string]string{
			"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, none},
		"version 2, parent with a lower limit": {map[string]string{
			"proc/self/cgroup":                                   "0::/system.slice/user.service\n",
			"sys/fs/cgroup/system.slice/memory.max":              "1000\n",
			"sys/fs/cgroup/system.slice/user.service/memory.max": "2000\n"}, 1000},
		"version 1": {map[string]string{
			"proc/self/cgroup": "9:cpu:/a\n8:memory:/docker/7\n",
			"sys/fs/cgroup/memory/docker/7/memory.limit_in_bytes": "3000\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":          "9223372036854771712\n"}, 3000},
		"version 1, path of the host": {map[string]string{
			"proc/self/cgroup":                           "8:memory:/docker/7\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "4000\n"}, 4000},
		"garbage": {map[string]string{"proc/self/cgroup": "::\n\n0\n0::/../..\n"}, none},
	} {
		root := fstest.MapFS{}
		for path, content := range test.files {
			root[path] = &fstest.MapFile{Data: []byte(content)}
		}
		if got := cgroupMemory(root); got != test.want {
			t.Errorf("%s: got %d, want %d", name, got, test.want)
		}
	}
}

// TestMixedTraffic checks that the first request other than POST makes the traffic mixed, and that
// a later POST does not change that.
func TestMixedTraffic(t *testing.T) {
	t.Parallel()
	log := discardLog
	server := newHandler(testDependencies(settings{}, newMemory(), log)).(*server)
	for _, test := range []struct {
		method string
		mixed  bool
	}{{"POST", false}, {"GET", true}, {"POST", true}} {
		server.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(test.method, "/users", nil))
		if mixed := server.traffic.isMixed(); mixed != test.mixed {
			t.Errorf("after %s: mixed %t, want %t", test.method, mixed, test.mixed)
		}
	}
}

// TestHashLanesLimit checks how many passwords are hashed concurrently, alone and in mixed traffic,
// and how many wait.
func TestHashLanesLimit(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ cores, alone, mixed int }{
		{cores: 1, alone: 1, mixed: 1}, {cores: 2, alone: 2, mixed: 1},
		{cores: 3, alone: 3, mixed: 2}, {cores: 8, alone: 8, mixed: 7},
	} {
		for _, mixed := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				l := newLimits(test.cores, math.MaxInt64)
				h := newHashLanes(l, &traffic{})
				want := test.alone
				if mixed {
					want = test.mixed
					h.traffic.otherDone.Store(time.Now().UnixNano())
				}
				var working atomic.Int64
				for range l.hashQueue {
					go func() {
						if leave, err := h.enter(context.Background(), ""); err == nil {
							working.Add(1)
							time.Sleep(time.Hour)
							leave()
						}
					}()
				}
				synctest.Wait()
				if int(working.Load()) != want {
					t.Errorf("%d cores, mixed %t: %d concurrent hashes, want %d",
						test.cores, mixed, working.Load(), want)
				}
				if _, err := h.enter(t.Context(), ""); !errors.Is(err, errBusy) {
					t.Errorf("%d cores, full queue: error %v, want errBusy", test.cores, err)
				}
				time.Sleep(2 * time.Hour)
				if n := h.queued.Load(); n != 0 || len(h.clients.keys) != 0 {
					t.Errorf("%d cores: %d passwords wait after all hashes", test.cores, n)
				}
			})
		}
	}
}

// TestHashLanesWait checks how long a call waits for a core that another call occupies.
func TestHashLanesWait(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		busy  time.Duration // how long the other call works
		leave time.Duration // when the caller leaves, 0 for never
		want  error
		after time.Duration
	}{
		"free core":       {},
		"core in time":    {busy: hashWait / 2, after: hashWait / 2},
		"no core in time": {busy: 2 * hashWait, want: errBusy, after: hashWait},
		"caller leaves": {busy: 2 * hashWait, leave: hashWait / 2, want: context.Canceled,
			after: hashWait / 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				h := newHashLanes(newLimits(1, math.MaxInt64), &traffic{})
				if test.busy > 0 {
					leave, err := h.enter(t.Context(), "")
					if err != nil {
						t.Fatal(err)
					}
					time.AfterFunc(test.busy, leave)
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if test.leave > 0 {
					time.AfterFunc(test.leave, cancel)
				}
				start := time.Now()
				leave, err := h.enter(ctx, "")
				if !errors.Is(err, test.want) || (err == nil) != (leave != nil) {
					t.Errorf("enter: error %v, want %v", err, test.want)
				}
				if waited := time.Since(start); waited != test.after {
					t.Errorf("waited %v, want %v", waited, test.after)
				}
				time.Sleep(3 * hashWait)
			})
		})
	}
}

// TestHashLanesUnderPressure checks that all cores hash in mixed traffic while many passwords wait,
// and that one core is reserved again when few do.
func TestHashLanesUnderPressure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const hash = 10 * time.Millisecond
		traffic := &traffic{}
		h := newHashLanes(newLimits(2, math.MaxInt64), traffic)
		var working, most atomic.Int64
		call := func(client string) {
			leave, err := h.enter(t.Context(), client)
			if err != nil {
				t.Errorf("client %s: %v", client, err)
				return
			}
			most.Store(max(most.Load(), working.Add(1)))
			time.Sleep(hash)
			working.Add(-1)
			leave()
		}
		for _, test := range []struct {
			passwords int
			want      int64
		}{{20, 1}, {100, 2}, {20, 1}} {
			most.Store(0)
			for i := range test.passwords {
				traffic.otherDone.Store(time.Now().UnixNano())
				go call(strconv.Itoa(i % 4))
			}
			synctest.Wait()
			for h.queued.Load() > 0 || working.Load() > 0 {
				traffic.otherDone.Store(time.Now().UnixNano())
				time.Sleep(hash)
			}
			if got := most.Load(); got != test.want {
				t.Errorf("%d passwords: %d at the same time, want %d", test.passwords, got, test.want)
			}
		}
	})
}

// TestHashLanesAreFair checks that a client that sends many passwords does not delay others: a call
// of another client waits for the hashes in progress only, and each client has a queue of its own.
func TestHashLanesAreFair(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const hash = hashWait / 10
		l := newLimits(2, math.MaxInt64)
		h := newHashLanes(l, &traffic{})
		call := func(client string) error {
			leave, err := h.enter(t.Context(), client)
			if err == nil {
				time.Sleep(hash)
				leave()
			}
			return err
		}
		for range l.hashQueue {
			go call("greedy")
		}
		synctest.Wait()
		if err := call("greedy"); !errors.Is(err, errBusy) {
			t.Errorf("a client with a full queue: error %v, want errBusy", err)
		}
		for range 3 {
			start := time.Now()
			if err := call("modest"); err != nil {
				t.Errorf("another client: %v", err)
			}
			if took := time.Since(start); took > 3*hash {
				t.Errorf("a hash of another client took %v, want at most %v", took, 3*hash)
			}
		}
		time.Sleep(2 * hashWait) // until every call has ended, as a bubble requires
	})
}

// stuckStore is a store that has one user, and whose other calls do not return before their context
// ends.
type stuckStore struct {
	*memory
	hash  string        // of the user; "": passwordHash does not return either
	after time.Duration // how long passwordHash takes
}

func (s stuckStore) updateUser(ctx context.Context, _ string, _ int64, _ userInput, _ []int64) (
	User, error) {
	<-ctx.Done()
	return User{}, errOutcomeUnknown
}

func (s stuckStore) passwordHash(ctx context.Context, _ int64) (string, error) {
	if s.hash == "" {
		<-ctx.Done()
		return "", errUnavailable
	}
	time.Sleep(s.after)
	return s.hash, nil
}

func (s stuckStore) rehashPassword(ctx context.Context, _ int64, _, _ string) error {
	<-ctx.Done()
	return ctx.Err()
}

// TestWorkBudget checks that a request with a password is answered within its budget, although the
// password waits for its turn as long as it may and the store does not answer, and that this is no
// internal error.
func TestWorkBudget(t *testing.T) {
	t.Parallel()
	old := argonCost{memory: 32, passes: 1}.hash("old password")
	for _, test := range []struct {
		name, method, path, body, hash string
		after                          time.Duration
		want                           int
	}{
		{name: "update", method: "PUT", path: "/users/1", body: `{"password": "new password"}`, want: 503},
		{name: "verification", method: "POST", path: "/users/1/password/verify",
			body: `{"password": "old password"}`, want: 503},
		{name: "new hash", method: "POST", path: "/users/1/password/verify",
			body: `{"password": "old password"}`, hash: old, want: 200},
		{name: "late turn", method: "POST", path: "/users/1/password/verify",
			body: `{"password": "old password"}`, hash: old, after: workBudget - hashWait/2, want: 503},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				d := testDependencies(memorySettings(), stuckStore{newMemory(), test.hash, test.after},
					discardLog)
				a := newAPI(d, &traffic{})
				for range d.limits.hashes {
					leave, err := a.hasher.lanes.enter(t.Context(), "another client")
					if err != nil {
						t.Fatal(err)
					}
					time.AfterFunc(test.after+hashWait-time.Millisecond, leave)
				}
				s := serveInProcess(t, newServer(d, &traffic{}, newAccess(d.settings, nil),
					protectedRoutes(a, &health{})))
				start := time.Now()
				answer := s.do(test.method, test.path, test.body)
				if took := time.Since(start); answer.status != test.want || took > workBudget {
					t.Errorf("status %d after %v, want %d within %v: %s", answer.status, took, test.want,
						workBudget, answer.body)
				}
			})
		})
	}
}

// TestRefundedVerification checks that an attempt that was not answered does not count.
func TestRefundedVerification(t *testing.T) {
	t.Parallel()
	d := testDependencies(memorySettings(), newMemory(), discardLog)
	a := newAPI(d, &traffic{})
	a.verifications = newLimiter[int64]("password", 1e-6, maxVerifications)
	s := serveInProcess(t, newServer(d, &traffic{}, newAccess(d.settings, nil), protectedRoutes(a, &health{})))
	try := func() int { return s.do("POST", "/users/7/password/verify", `{"password": "x"}`).status }
	free, busy := a.hasher.lanes.clients, newQueues[string](1, 0)
	var got []int
	for range maxVerifications {
		a.hasher.lanes.clients = busy
		got = append(got, try())
		a.hasher.lanes.clients = free
		got = append(got, try())
	}
	got = append(got, try())
	want := append(slices.Repeat([]int{503, 200}, maxVerifications), 429)
	if !slices.Equal(got, want) {
		t.Errorf("statuses %v, want %v", got, want)
	}
}

// TestPasswordFlood sends many passwords at the same time: none fails otherwise than with 503, and
// reads succeed meanwhile.
func TestPasswordFlood(t *testing.T) {
	t.Parallel()
	const requests = 300
	s := startService(t, memorySettings())
	statuses := make(chan int, requests)
	var group sync.WaitGroup
	for range requests {
		group.Go(func() {
			body := strings.NewReader(john)
			response, err := client.Post(s.url+"/users", "application/json", body)
			if err != nil {
				t.Error(err)
				return
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			if response.StatusCode == http.StatusServiceUnavailable &&
				response.Header.Get("Retry-After") == "" {
				t.Error("status 503 without Retry-After")
			}
			statuses <- response.StatusCode
		})
	}
	flood := make(chan struct{})
	go func() {
		group.Wait()
		close(statuses)
		close(flood)
	}()
	for over := false; !over; {
		if a := s.do("GET", "/users", ""); a.status != http.StatusOK {
			t.Errorf("GET /users during the flood: status %d, want 200: %s", a.status, a.body)
		}
		select {
		case <-flood:
			over = true
		case <-time.After(10 * time.Millisecond):
		}
	}
	count := make(map[int]int)
	for status := range statuses {
		count[status]++
	}
	if count[201] == 0 || count[201]+count[503] != requests {
		t.Errorf("answers by status: %v, want only 201 and 503, %d together", count, requests)
	}
	total := s.do("GET", "/users?per_page=1", "").json(t, "total")
	if total != float64(count[201]) {
		t.Errorf("%v users after %d answers with 201", total, count[201])
	}
}

// TestRecent checks that a map has at most max entries, and the most recent half of them.
func TestRecent(t *testing.T) {
	t.Parallel()
	v := recent[int64, int64]{max: maxVersions}
	for id := range int64(3 * maxVersions) {
		v.put(id+1, 1)
		if n := len(v.newer) + len(v.older); n > maxVersions {
			t.Fatalf("%d entries after %d puts, want at most %d", n, id+1, maxVersions)
		}
	}
	for id := int64(3*maxVersions - maxVersions/2 + 1); id <= 3*maxVersions; id++ {
		if version, ok := v.get(id); !ok || version != 1 {
			t.Fatalf("get(%d): got %d, %t, want 1", id, version, ok)
		}
	}
}

// TestLogValues checks how each kind of value is logged.
func TestLogValues(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	out := &logWriter{w: log}
	logger := newLogger(out, slog.LevelDebug).With("always", true)
	ctx := withTraceID(context.Background(), "trace-1")
	logger.WarnContext(ctx, "A \"line\"\n", "text", "\xff\u2028", "error", errors.New("why"), "int", -7,
		"float", 0.25, "large", 1e21, "duration", time.Second, "list", []int{1})
	out.flush()
	var line map[string]any
	if err := json.Unmarshal([]byte(log.String()), &line); err != nil {
		t.Fatalf("line %s: %v", log, err)
	}
	for key, want := range map[string]any{"level": "WARN", "event": "A \"line\"\n", "trace_id": "trace-1",
		"always": true, "text": "\ufffd\u2028", "error": "why", "int": -7.0, "float": 0.25, "large": 1e21,
		"duration": "1s", "list": "[1]"} {
		if line[key] != want {
			t.Errorf("%s: got %#v, want %#v", key, line[key], want)
		}
	}
}

// FuzzLogLine checks that a line is one JSON object with the logged values, whatever they are.
func FuzzLogLine(f *testing.F) {
	for _, text := range []string{"GET", "/users", "", "a\nb\r\n", `"}{"`, `\`,
		"\x00\x1b\x7f", "\u2028\u2029", "\xff\xfe", "\xed\xa0\x80", "<&>", "😀", "timestamp"} {
		f.Add(text, text, text, text, int64(7), 0.25)
	}
	f.Add("", "", "", "", int64(math.MinInt64), math.MaxFloat64)
	f.Add("", "", "", "", int64(math.MaxInt64), math.SmallestNonzeroFloat64)
	f.Add("", "", "", "", int64(0), math.NaN())
	f.Add("", "", "", "", int64(0), math.Inf(-1))
	f.Fuzz(func(t *testing.T, message, key, text, id string, n int64, x float64) {
		log := &logBuffer{}
		out := &logWriter{w: log}
		logger := newLogger(out, slog.LevelDebug).With("always", text)
		ctx := withTraceID(context.Background(), id)
		logger.LogAttrs(ctx, slog.Level(n%20), message, slog.String("text", text), slog.Int64("n", n),
			slog.Float64("x", x), slog.Any("error", errors.New(text)), slog.Any("bytes", []byte(text)),
			slog.Uint64("u", math.Float64bits(x)), slog.Duration("d", time.Duration(n)),
			slog.Time("t", time.Unix(n, 0)),
			slog.Group("g"+key, slog.String(key, text)), slog.Any("nothing", nil), slog.Any("k"+key, id))
		out.flush()
		if slog.Level(n%20) < slog.LevelDebug {
			if log.String() != "" {
				t.Errorf("record below the level: got %s, want no line", log)
			}
			return
		}
		lines := log.String()
		if strings.Count(lines, "\n") != 1 || !strings.HasSuffix(lines, "\n") {
			t.Fatalf("got %q, want one line", lines)
		}
		var line map[string]any
		decoder := json.NewDecoder(strings.NewReader(lines))
		decoder.UseNumber()
		if err := decoder.Decode(&line); err != nil {
			t.Fatalf("line %s: %v", lines, err)
		}
		head := []string{"timestamp", "level", "event", "trace_id"}
		if id == "" {
			head = head[:3]
		}
		if got := keys(lines); !slices.Equal(got[:len(head)], head) {
			t.Errorf("keys: got %q, want first %q", got, head)
		}
		want := map[string]string{"event": message, "always": text, "text": text, "error": text,
			"n": strconv.FormatInt(n, 10), "k" + key: id}
		if number, ok := line["x"].(json.Number); ok {
			if back, err := number.Float64(); err != nil || back != x {
				t.Errorf("x: got %s, want %v", number, x)
			}
		} else { // JSON has no NaN or infinity
			want["x"] = slog.Float64Value(x).String()
		}
		for name, value := range want {
			// Each invalid byte becomes U+FFFD.
			if got := fmt.Sprint(line[string([]rune(name))]); got != string([]rune(value)) {
				t.Errorf("%q: got %q, want %q", name, got, string([]rune(value)))
			}
		}
	})
}

// discardLog is for tests that do not look at the log.
var discardLog = newLogger(&logWriter{w: io.Discard}, slog.LevelError+1)

// fillLog adds lines until the buffer has no room for the line of an event. The writer must be blocked or
// broken.
func fillLog(out *logWriter) (lines int) {
	for _, line := range []string{strings.Repeat("x", 1000) + "\n", "\n"} {
		for out.writeLine(false, func(b []byte) []byte { return append(b, line...) }) == nil {
			lines++
		}
	}
	return lines
}

// TestLogOutage checks that callers go on while the log cannot be written, and that afterwards it has all
// lines that were not dropped, once, whole and in order, and then a line with the number of the others.
func TestLogOutage(t *testing.T) {
	t.Parallel()
	const before, after = 1000, 3 // lines that fit and do not fit
	for _, test := range []struct {
		name     string
		failures int
		part     int
		block    time.Duration
	}{
		{name: "an error", failures: 50},
		{name: "parts of lines", failures: 50, part: 7},
		{name: "blocked", block: time.Hour},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := &logOutage{failures: test.failures, part: test.part, block: test.block}
				out := &logWriter{w: w}
				logger := newLogger(out, slog.LevelInfo)
				start := time.Now()
				for i := range before {
					logger.Info("Before", "n", i)
				}
				if err := out.flush(); !errors.Is(err, errLogStuck) {
					t.Errorf("flush: got %v, want %v", err, errLogStuck)
				}
				if took := time.Since(start); took != logWait {
					t.Errorf("logging and a flush took %v, want %v", took, logWait)
				}
				filler := fillLog(out)
				dropped := out.dropped.Load()
				for range after {
					logger.Warn("Dropped")
				}
				if n := out.dropped.Load() - dropped; n != after {
					t.Errorf("dropped: got %d lines, want %d", n, after)
				}
				time.Sleep(2 * time.Hour)
				logger.Info("After")
				if err := out.flush(); err != nil {
					t.Errorf("flush after the outage: %v", err)
				}
				for i, line := range w.log.lines("")[:before] {
					if line["event"] != "Before" || line["n"] != float64(i) {
						t.Fatalf("line %d: got %v", i, line)
					}
				}
				if n := strings.Count(w.log.String(), "\n"); n != before+filler+2 {
					t.Errorf("got %d lines, want %d", n, before+filler+2)
				}
				all := w.log.lines("")
				report, last := all[len(all)-2], all[len(all)-1]
				if report["event"] != "Log lines dropped" || report["level"] != "WARN" ||
					report["lines"] != float64(dropped+after) || last["event"] != "After" {
					t.Errorf("last lines: got %v, %v, want %d lines dropped, After", report, last, dropped+after)
				}
				if calls := w.calls; calls > 200 {
					t.Errorf("got %d writes, want pauses between those that fail", calls)
				}
			})
		})
	}
}

// logOutage is a writer that fails or blocks at first.
type logOutage struct {
	log      logBuffer
	failures int           // calls that fail
	part     int           // bytes that these write
	block    time.Duration // of the first call
	calls    int
}

func (w *logOutage) Write(p []byte) (int, error) {
	if w.calls++; w.calls == 1 {
		time.Sleep(w.block)
	}
	if w.calls <= w.failures {
		n, _ := w.log.Write(p[:w.part])
		return n, errors.New("disk full")
	}
	return w.log.Write(p)
}

// TestLogDelay checks when lines are written.
func TestLogDelay(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		log   func(out *logWriter, log *slog.Logger)
		delay time.Duration
	}{
		{"INFO", func(_ *logWriter, log *slog.Logger) { log.Info("x") }, logDelay},
		{"WARN", func(_ *logWriter, log *slog.Logger) { log.Warn("x") }, 0},
		{"WARN after INFO", func(_ *logWriter, log *slog.Logger) { log.Info("x"); log.Warn("x") }, 0},
		{"a full batch", func(_ *logWriter, log *slog.Logger) {
			log.Info(strings.Repeat("x", logBatch))
		}, 0},
		{"flush", func(out *logWriter, log *slog.Logger) { log.Info("x"); out.flush() }, 0},
		{"stopBuffering", func(out *logWriter, log *slog.Logger) { log.Info("x"); out.stopBuffering() }, 0},
		{"INFO after stopBuffering", func(out *logWriter, log *slog.Logger) {
			out.stopBuffering()
			log.Info("x")
		}, 0},
		{"a line that never fits", func(_ *logWriter, log *slog.Logger) {
			log.Info(strings.Repeat("x", logCapacity))
		}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				log := &logBuffer{}
				out := &logWriter{w: log}
				test.log(out, newLogger(out, slog.LevelInfo))
				if test.delay > 0 {
					time.Sleep(test.delay - 1)
					synctest.Wait()
					if log.String() != "" {
						t.Errorf("before %v: got %s, want nothing", test.delay, log)
					}
					time.Sleep(time.Nanosecond)
				}
				synctest.Wait()
				if log.String() == "" {
					t.Errorf("after %v: got nothing, want lines", test.delay)
				}
			})
		})
	}
}

// TestLogPipe logs to a pipe that nobody reads, and then to one whose reader has gone.
func TestLogPipe(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	out := &logWriter{w: w}
	lines := fillLog(out) // the first ones are in the pipe
	if err := out.flush(); !errors.Is(err, errLogStuck) {
		t.Errorf("flush to a full pipe: got %v, want %v", err, errLogStuck)
	}
	if n := out.dropped.Load(); n == 0 || lines == 0 {
		t.Errorf("got %d lines in the buffers and %d dropped, want some", lines, n)
	}
	r.Close()
	eventually(t, "a flush to a closed pipe that fails with EPIPE", func() bool {
		return errors.Is(out.flush(), syscall.EPIPE)
	})
}

// TestLogConcurrent checks that lines of concurrent callers are whole, and those of each in order.
func TestLogConcurrent(t *testing.T) {
	t.Parallel()
	const callers, lines = 8, 500
	log := &logBuffer{}
	out := &logWriter{w: log}
	logger := newLogger(out, slog.LevelInfo)
	var group sync.WaitGroup
	for c := range callers {
		group.Go(func() {
			for i := range lines {
				level := []slog.Level{slog.LevelInfo, slog.LevelWarn}[i%2]
				_ = logAt(t.Context(), logger, level, time.Now(), "Line", slog.Int("c", c), slog.Int("i", i))
				if i%100 == 0 {
					out.flush()
				}
			}
		})
	}
	group.Wait()
	if err := out.flush(); err != nil {
		t.Error(err)
	}
	next := make(map[any]float64)
	for _, line := range log.lines("") {
		if line["i"] != next[line["c"]] {
			t.Fatalf("got %v, want i=%v", line, next[line["c"]])
		}
		next[line["c"]]++
	}
	if n := len(log.lines("")); n != callers*lines {
		t.Errorf("got %d lines, want %d", n, callers*lines)
	}
}

// FuzzAppendJSON compares appendJSON with encoding/json.
func FuzzAppendJSON(f *testing.F) {
	for _, text := range []string{"John", "", "a\"b\\c", "<&>", "\x00\x1f\x7f", "\u2028é😀", "\xff", "\xed\xa0\x80"} {
		f.Add(int64(7), text, text, int64(1767268800123456))
	}
	f.Fuzz(func(t *testing.T, n int64, name, surname string, at int64) {
		type plainUser User // without the method
		type plainList struct {
			Users     []plainUser `json:"users"`
			Total     int64       `json:"total"`
			Page      int64       `json:"page,omitempty"`
			PerPage   int64       `json:"per_page"`
			NextAfter *int64      `json:"next_after"`
		}
		u := User{ID: n, Name: name, Surname: surname, Version: n,
			CreatedAt: timestamp{time.UnixMicro(at % 1e17)}, UpdatedAt: timestamp{time.UnixMicro(n % 1e17)}}
		page := max(n, 0)
		for list, plain := range map[*userList]plainList{
			{Users: []User{}, Total: n, Page: page, PerPage: at}: {[]plainUser{}, n, page, at, nil},
			{Users: []User{u}, Total: at, PerPage: n}:            {[]plainUser{plainUser(u)}, at, 0, n, nil},
			{Users: []User{u, u}, NextAfter: &n}:                 {[]plainUser{plainUser(u), plainUser(u)}, 0, 0, 0, &n},
		} {
			want, err := json.Marshal(plain)
			if err != nil {
				t.Fatal(err)
			}
			if got := list.appendJSON(nil); !bytes.Equal(got, want) {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		}
	})
}

// phcFormat matches new hashes, of a real service and of one with testLimits. Its groups are the salt
// and the key.
var phcFormat = regexp.MustCompile(
	`^\$argon2id\$v=19\$(?:m=7168,t=5|m=64,t=1),p=1\$([A-Za-z0-9+/]{22})\$([A-Za-z0-9+/]{43})$`)

// verifies reports whether hash is the PHC string of exactly these bytes.
func verifies(t *testing.T, hash, password string) bool {
	t.Helper()
	fields := phcFormat.FindStringSubmatch(hash)
	if fields == nil {
		t.Fatalf("the hash is not a PHC string of the current parameters: %s", hash)
	}
	salt, err := base64.RawStdEncoding.Strict().DecodeString(fields[1])
	if err != nil || len(salt) != 16 {
		t.Fatalf("salt of %d bytes, want 16: %v", len(salt), err)
	}
	passes, memory := uint32(5), uint32(7168)
	if strings.Contains(hash, "$m=64,t=1,") {
		passes, memory = 1, 64
	}
	key := argon2.IDKey([]byte(password), salt, passes, memory, 1, 32)
	return fields[2] == base64.RawStdEncoding.EncodeToString(key)
}

// newTestHasher returns a hasher with the parameters of a real service.
func newTestHasher() *hasher {
	return &hasher{newHashLanes(testLimits, &traffic{}), newHashCost}
}

// mustHash returns a hash of password.
func mustHash(t *testing.T, password string) string {
	t.Helper()
	hash, err := newTestHasher().hash(t.Context(), "", password)
	if err != nil {
		t.Fatal(err)
	}
	return hash
}

// TestPasswordRules checks the length of passwords, in code points, and the characters in them.
func TestPasswordRules(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		password string
		accepted bool
	}{
		"8 characters":                  {"8letters", true},
		"8 characters of four bytes":    {strings.Repeat("😀", 8), true},
		"8 code points of 4 letters":    {strings.Repeat("e\u0301", 4), true},
		"128 characters":                {strings.Repeat("x", 128), true},
		"128 characters of four bytes":  {strings.Repeat("😀", 128), true},
		"8 spaces":                      {"        ", true},
		"spaces at both ends":           {" 6chars ", true},
		"control characters":            {"\x01\t\n\x1b\x7f\u0085\u009f\u2028", true},
		"7 characters":                  {"7letter", false},
		"7 characters of four bytes":    {strings.Repeat("😀", 7), false},
		"129 characters":                {strings.Repeat("x", 129), false},
		"129 characters of four bytes":  {strings.Repeat("😀", 129), false},
		"128 characters and a space":    {strings.Repeat("x", 128) + " ", false},
		"130 code points of 65 letters": {strings.Repeat("e\u0301", 65), false},
		"empty":                         {"", false},
		"NUL":                           {"8letters\x00", false},
		"NUL between other characters":  {secret + "\x00" + secret, false},
	}
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		for what, test := range tests {
			a := s.do("PATCH", "/users/1", `{"password": `+quote(test.password)+`}`)
			if !test.accepted {
				checkBadRequest(t, what, a, "#/password")
			} else if a.status != http.StatusOK {
				t.Errorf("%s: status %d, want 200: %s", what, a.status, a.body)
			}
		}
	})
}

// TestPasswordMinLength checks that PASSWORD_MIN_LENGTH applies to new passwords.
func TestPasswordMinLength(t *testing.T) {
	t.Parallel()
	settings := memorySettings()
	settings.passwordMinLength = 12
	s := startService(t, settings)
	for password, want := range map[string]int{
		"11 letters.":  http.StatusBadRequest,
		"12 letters..": http.StatusCreated,
	} {
		body := fmt.Sprintf(`{"name": "John", "surname": "Doe", "password": %q}`, password)
		a := s.do("POST", "/users", body)
		if a.status != want {
			t.Errorf("password %q: status %d, want %d: %s", password, a.status, want, a.body)
		}
	}
}

// TestPasswordBlocklist checks that PASSWORD_BLOCKLIST=on refuses common passwords in any case,
// that they are accepted by default, and that the list is in lower case.
func TestPasswordBlocklist(t *testing.T) {
	t.Parallel()
	set := memorySettings()
	set.passwordBlocklist = true
	s := startService(t, set)
	for password, want := range map[string]int{
		"password": 400, "PassWord": 400, "1q2w3e4r": 400, "iloveyou": 400,
		"password ": 201, secret: 201,
	} {
		body := fmt.Sprintf(`{"name": "Ann", "surname": "Lee", "password": %q}`, password)
		a := s.do("POST", "/users", body)
		if a.status != want || (want == 400) != strings.Contains(a.body, "one of the most common") {
			t.Errorf("password %q: status %d, want %d: %s", password, a.status, want, a.body)
		}
	}
	open := startService(t, memorySettings())
	a := open.do("POST", "/users", `{"name": "Ann", "surname": "Lee", "password": "password"}`)
	if a.status != 201 {
		t.Errorf("without the list: status %d, want 201: %s", a.status, a.body)
	}
	for password := range strings.Lines(commonPasswords) {
		trimmed := strings.TrimSpace(password)
		if trimmed != strings.ToLower(trimmed) || trimmed+"\n" != password {
			t.Errorf("the line %q of the list is not a password in lower case", password)
		}
	}
}

// TestVerify checks that verify accepts the hashed password only, and refuses hashes that are malformed or
// too expensive.
func TestVerify(t *testing.T) {
	t.Parallel()
	h := newTestHasher()
	phc := mustHash(t, secret)
	for password, want := range map[string]bool{secret: true, secret + "!": false, "": false} {
		if got, err := h.verify(t.Context(), "", password, phc); got != want || err != nil {
			t.Errorf("verify(%q): got %t, %v, want %t", password, got, err, want)
		}
	}
	for _, bad := range []string{
		"", "hash", strings.Replace(phc, "argon2id", "argon2i", 1),
		strings.Replace(phc, "m=7168", "m=65537", 1), strings.Replace(phc, "m=7168", "m=4294967295", 1),
		strings.Replace(phc, "t=5", "t=11", 1), strings.Replace(phc, "t=5", "t=0", 1),
		strings.Replace(phc, "p=1", "p=0", 1), phc + strings.Repeat("A", 100),
	} {
		if same, err := h.verify(t.Context(), "", secret, bad); same || err == nil {
			t.Errorf("verify with the hash %q: got %t, %v, want an error", bad, same, err)
		}
	}
}

// TestPasswordHash checks which bytes a hash verifies: those of the NFC form of the password. Each
// hash has a salt of its own.
func TestPasswordHash(t *testing.T) {
	t.Parallel()
	const composed, decomposed = "caf\u00e9 " + secret, "cafe\u0301 " + secret
	for name, test := range map[string]struct {
		password, verified string
		want               bool
	}{
		"same password":      {secret, secret, true},
		"other password":     {secret, secret + "!", false},
		"other case":         {secret, strings.ToUpper(secret), false},
		"white space":        {" " + secret + " ", secret, false},
		"composed":           {composed, composed, true},
		"decomposed":         {decomposed, composed, true},
		"not decomposed":     {composed, decomposed, false},
		"compatibility form": {"\ufb01" + secret, "fi" + secret, false},
		"128 characters":     {strings.Repeat("𝄞", 128), strings.Repeat("𝄞", 128), true},
	} {
		hash := mustHash(t, test.password)
		if !strings.HasPrefix(hash, "$argon2id$v=19$m=7168,t=5,p=1$") {
			t.Errorf("%s: the parameters are not those of OWASP: %s", name, hash)
		}
		if got := verifies(t, hash, test.verified); got != test.want {
			t.Errorf("%s: verified %t, want %t", name, got, test.want)
		}
	}
	if first, second := mustHash(t, secret), mustHash(t, secret); first == second {
		t.Error("two hashes of one password are equal")
	}
}

// TestPasswordIsStoredHashed checks that the row of a user has the hash of the password in NFC.
func TestPasswordIsStoredHashed(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	conn := connect(t, s.settings.databaseURL)
	stored := func() string { return queryValue[string](t, conn, "SELECT password FROM users") }
	s.createUser("John", "Doe")
	if !verifies(t, stored(), secret) {
		t.Error("the hash after POST does not verify the password")
	}
	s.do("PATCH", "/users/1", `{"password": " e\u0301 `+secret+`"}`)
	if !verifies(t, stored(), " é "+secret) {
		t.Error("the hash after PATCH does not verify the password")
	}
}

// TestPasswordIsNotTrimmed checks that white space, upper case and control characters of a password
// are part of it.
func TestPasswordIsNotTrimmed(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	conn := connect(t, s.settings.databaseURL)
	password := " \u3000\u0130" + strings.ToUpper(secret) + "\x1b\u0085 "
	for _, target := range []string{"POST /users", "PUT /users/1", "PATCH /users/1"} {
		method, path, _ := strings.Cut(target, " ")
		body := `{"name": "John", "surname": "Doe", "password": ` + quote(password) + `}`
		if a := s.do(method, path, body); a.status/100 != 2 {
			t.Fatalf("%s: status %d, want 200 or 201: %s", target, a.status, a.body)
		}
		stored := queryValue[string](t, conn, "SELECT password FROM users")
		if !verifies(t, stored, password) {
			t.Errorf("the hash after %s does not verify the password", target)
		}
		password += target // a new password for the next request
	}
}

// FuzzPasswordHash compares parseHash with scanHash, a second implementation. It also checks that a
// hash that parseHash refuses is not computed.
func FuzzPasswordHash(f *testing.F) {
	const salt, key = "c2FsdHNhbHRzYWx0c2FsdA", "a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2U"
	const head = "$argon2id$v=19$"
	for _, text := range append([]string{
		head + "m=12288,t=3,p=1$" + salt + "$" + key,
		head + "m=8,t=1,p=1$c2FsdHNhbHQ$a2V5cw", // the minimum
		head + "m=65536,t=10,p=99$" + strings.Repeat("A", 86) + "$" + strings.Repeat("A", 86),
		head + "m=65537,t=3,p=1$" + salt + "$" + key,
		head + "m=12288,t=11,p=1$" + salt + "$" + key,
		head + "m=15,t=1,p=2$" + salt + "$" + key,
		head + "m=12288,t=0,p=0$" + salt + "$" + key,
		head + "m=012288,t=03,p=1$" + salt + "$" + key,
		head + "m=4294979584,t=3,p=257$" + salt + "$" + key, // 12288 and 1 after an overflow
		head + "m=12288,t=3,p=1$" + salt + "$",
		head + "m=12288,t=3,p=1$" + salt + "$AA",
		head + "m=12288,t=3,p=1$" + salt[:21] + "B$" + key, // bits beyond the last byte
		head + "m=12288,t=3,p=1$" + salt + "$" + key[:42] + "V",
		head + "m=12288,t=3,p=1$" + salt + "$" + key + "=",
		head + "m=12288,t=3,p=1$" + salt + "$" + key + "\n",
		head + "m=12288,t=3,p=1$" + salt + "$" + strings.Repeat("A", 87),
		strings.Replace(head, "19", "16", 1) + "m=12288,t=3,p=1$" + salt + "$" + key,
		strings.Replace(head, "2id", "2i", 1) + "m=12288,t=3,p=1$" + salt + "$" + key,
		"", "$$$$$", "$2b$15$" + strings.Repeat("a", 53),
		"$2b$04$" + strings.Repeat("a", 53) + "\n",
		"$pbkdf2-sha256$i=5000001$" + salt + "$" + key, "pbkdf2_sha256$1$a b$" + key + "=",
		"$pbkdf2-sha512$i=1,l=32$" + salt + "$" + key, "$pbkdf2-sha256$1,l=0$" + salt + "$" + key,
	}, foreignHashes...) {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		_, err := parseHash(text)
		if want := scanHash(text); (err == nil) != want {
			t.Fatalf("parseHash(%q): %v, want success: %t", text, err, want)
		}
		if err != nil {
			h := &hasher{} // panics if it computes
			valid, got := h.verify(t.Context(), "", secret, text)
			if valid || !errors.Is(got, errHash) {
				t.Errorf("verify with %q = %t, %v, want false, %v", text, valid, got, errHash)
			}
		}
	})
}

// scanHash reports whether a stored hash is well-formed and within bounds. It formats what it has
// parsed and compares the result with the text.
func scanHash(text string) bool {
	fields := strings.Split(text, "$")
	if kind, digest, ok := strings.Cut(fields[0], "_"); ok && kind == "pbkdf2" && len(fields) == 4 {
		key, keySize := recode(base64.StdEncoding, fields[3])
		unprintable := func(r rune) bool { return r <= ' ' || r > '~' }
		return key == fields[3] && !strings.ContainsFunc(fields[2], unprintable) &&
			scanPBKDF2(digest, fields[1], len(fields[2]), keySize)
	}
	switch {
	case fields[0] != "":
		return false
	case len(fields) == 6:
		return scanArgon2id(text, fields)
	case len(fields) == 5:
		return scanPHC(fields)
	case len(fields) == 4:
		cost, err := strconv.Atoi(fields[2])
		foreign := func(r rune) bool { return !strings.ContainsRune(bcryptDigits, r) }
		return err == nil && fields[2] == fmt.Sprintf("%02d", cost) && cost >= 4 && cost <= 14 &&
			slices.Contains([]string{"2a", "2b", "2y"}, fields[1]) &&
			len(fields[3]) == 53 && !strings.ContainsFunc(fields[3], foreign)
	}
	return false
}

const bcryptDigits = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

// scanArgon2id is scanHash for argon2id.
func scanArgon2id(text string, fields []string) bool {
	var memory, passes, threads int
	fmt.Sscanf(fields[3], "m=%d,t=%d,p=%d", &memory, &passes, &threads)
	salt, saltSize := recode(base64.RawStdEncoding, fields[4])
	key, keySize := recode(base64.RawStdEncoding, fields[5])
	again := fmt.Sprintf("$argon2id$v=19$m=%d,t=%d,p=%d$%s$%s", memory, passes, threads, salt, key)
	return again == text && passes >= 1 && passes <= 10 && threads >= 1 && threads <= 99 &&
		memory >= 8*threads && memory <= 64*1024 &&
		saltSize >= 8 && saltSize <= 64 && keySize >= 4 && keySize <= 64
}

// scanPHC is scanHash for PBKDF2 that does not come from Django.
func scanPHC(fields []string) bool {
	digest, isPBKDF2 := strings.CutPrefix(fields[1], "pbkdf2-")
	rounds, length, hasLength := strings.Cut(strings.TrimPrefix(fields[2], "i="), ",")
	salt, saltSize := recode(base64.RawStdEncoding, strings.ReplaceAll(fields[3], ".", "+"))
	key, keySize := recode(base64.RawStdEncoding, strings.ReplaceAll(fields[4], ".", "+"))
	return isPBKDF2 && salt == strings.ReplaceAll(fields[3], ".", "+") &&
		key == strings.ReplaceAll(fields[4], ".", "+") &&
		(!hasLength || length == fmt.Sprint("l=", keySize)) &&
		scanPBKDF2(digest, rounds, saltSize, keySize)
}

// scanPBKDF2 reports whether the parameters of PBKDF2 are within bounds.
func scanPBKDF2(digest, rounds string, salt, key int) bool {
	n, size := 0, map[string]int{"sha256": 32, "sha512": 64}[digest]
	fmt.Sscanf(rounds, "%d", &n)
	return rounds == strconv.Itoa(n) && n >= 1 && n <= 5_000_000 && salt >= 1 && salt <= 64 &&
		key >= 16 && key <= size
}

// recode decodes text and encodes the bytes again. It also returns their number.
func recode(encoding *base64.Encoding, text string) (string, int) {
	decoded, _ := encoding.DecodeString(text)
	return encoding.EncodeToString(decoded), len(decoded)
}

// slowGroup returns a Group that returns the text of each positive key after batchPatience/2, and
// fails for negative keys. Key 99 takes four times batchPatience. It appends the keys of each batch
// to batches.
func slowGroup(batches *[][]int) *Group[int, string] {
	var mu sync.Mutex // a late batch runs beside the next one
	return &Group[int, string]{
		budget: time.Minute,
		run: func(_ context.Context, keys []int) (map[int]string, error) {
			mu.Lock()
			*batches = append(*batches, slices.Clone(keys))
			mu.Unlock()
			if slices.Contains(keys, 99) {
				time.Sleep(4 * batchPatience)
			} else {
				time.Sleep(batchPatience / 2)
			}
			values := make(map[int]string)
			for _, key := range keys {
				if key < 0 {
					return nil, fmt.Errorf("key %d", key)
				}
				if key > 0 {
					values[key] = fmt.Sprint(key)
				}
			}
			return values, nil
		},
	}
}

// TestGroupSharesNextBatch checks that calls during a batch share the next one.
func TestGroupSharesNextBatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var batches [][]int
		g := slowGroup(&batches)
		var callers sync.WaitGroup
		for _, key := range []int{7, 1, 2, 2, 0, 3} {
			callers.Go(func() {
				value, ok, err := g.Do(t.Context(), key)
				if err != nil || ok != (key != 0) || ok && value != fmt.Sprint(key) {
					t.Errorf("Do(%d): got %q, %t, %v", key, value, ok, err)
				}
			})
			synctest.Wait() // so that the calls come in this order
		}
		callers.Wait()
		if got, want := fmt.Sprint(batches), "[[7] [1 2 2 0 3]]"; got != want {
			t.Errorf("batches: got %s, want %s", got, want)
		}
		if g.Do(t.Context(), 8); len(batches) != 3 {
			t.Errorf("batches after another call: got %d, want 3", len(batches))
		}
	})
}

// TestGroupLateBatch checks that a batch that takes long holds up the next ones for batchPatience
// only, that these hold each other up, and that its end starts no batch.
func TestGroupLateBatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var batches [][]int
		g := slowGroup(&batches)
		start := time.Now()
		const tick = batchPatience / 10
		var took [9]time.Duration
		var callers sync.WaitGroup
		for i, at := range []time.Duration{0, 1, 2, 12, 13, 18, 38, 41, 50} {
			callers.Go(func() {
				time.Sleep(at * tick)
				key := i + 1
				if i == 0 {
					key = 99
				}
				g.Do(t.Context(), key)
				took[i] = time.Since(start) / tick
			})
		}
		callers.Wait()
		const wantBatches = "[[99] [2 3] [4 5] [6] [7] [8] [9]]"
		const wantTook = "[40ns 15ns 15ns 20ns 20ns 25ns 43ns 48ns 55ns]"
		if got := fmt.Sprint(batches); got != wantBatches {
			t.Errorf("batches: got %s, want %s", got, wantBatches)
		}
		if got := fmt.Sprint(took); got != wantTook {
			t.Errorf("times of the answers in tenths of batchPatience: got %s, want %s", got, wantTook)
		}
	})
}

// TestGroupReturnsNewState checks that a call does not get the result of a batch that began before it.
func TestGroupReturnsNewState(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		state := "old"
		g := &Group[int, string]{budget: time.Minute}
		g.run = func(context.Context, []int) (map[int]string, error) {
			seen := state
			time.Sleep(time.Second)
			return map[int]string{1: seen}, nil
		}
		go g.Do(t.Context(), 1)
		synctest.Wait()
		state = "new"
		if value, _, _ := g.Do(t.Context(), 1); value != "new" {
			t.Errorf("Do: got the %s state, want the new one", value)
		}
	})
}

// TestGroupCallerContext checks that a call returns when its context is canceled or times out, and that
// the other calls of its batch are answered.
func TestGroupCallerContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var batches [][]int
		g := slowGroup(&batches)
		go g.Do(t.Context(), 1)
		synctest.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		canceled := make(chan error, 1)
		go func() {
			_, _, err := g.Do(ctx, 2)
			canceled <- err
		}()
		synctest.Wait()
		cancel()
		synctest.Wait()
		if err := <-canceled; !errors.Is(err, context.Canceled) {
			t.Errorf("canceled call: got %v, want context.Canceled", err)
		}
		ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, _, err := g.Do(ctx, 3); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("timed-out call: got %v, want context.DeadlineExceeded", err)
		}
		if value, ok, err := g.Do(t.Context(), 4); value != "4" || !ok || err != nil {
			t.Errorf("other call: got %q, %t, %v, want 4", value, ok, err)
		}
	})
}

// TestGroupBudget checks that calls fail when the budget of their batch ends. The budget begins with
// the first call of the batch, also while that waits. The second to fourth call share a batch.
func TestGroupBudget(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := &Group[int, string]{budget: 4 * time.Second}
		g.run = func(ctx context.Context, _ []int) (map[int]string, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		start := time.Now()
		var took [5]time.Duration
		var callers sync.WaitGroup
		for i := range took {
			callers.Go(func() {
				if _, _, err := g.Do(t.Context(), i); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("Do(%d): got %v, want context.DeadlineExceeded", i, err)
				}
				took[i] = time.Since(start)
			})
			synctest.Wait()
			time.Sleep(batchPatience * 3 / 10)
		}
		callers.Wait()
		if got, want := fmt.Sprint(took), "[4s 4.075s 4.075s 4.075s 4.3s]"; got != want {
			t.Errorf("times of the answers: got %s, want %s", got, want)
		}
	})
}

// TestGroupFailures checks that calls return the error or panic of their batch, alone or shared, and that
// the next batch runs.
func TestGroupFailures(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := &Group[string, int]{budget: time.Minute}
		g.run = func(_ context.Context, keys []string) (map[string]int, error) {
			time.Sleep(time.Second)
			switch keys[0] {
			case "panic":
				panic("broken")
			case "fail":
				return nil, errors.New("failed")
			}
			return map[string]int{"ok": 1}, nil
		}
		for _, keys := range [][]string{{"panic", "fail", "ok"}, {"fail", "panic", "ok"}} {
			var callers sync.WaitGroup
			for _, key := range keys[:2] {
				callers.Go(func() {
					_, ok, err := g.Do(t.Context(), key)
					_, panicked := errors.AsType[*panicError](err)
					if ok || err == nil || panicked != (key == "panic") {
						t.Errorf("Do(%s): got %t, %v", key, ok, err)
					}
				})
				synctest.Wait()
			}
			callers.Wait()
			if value, ok, err := g.Do(t.Context(), "ok"); value != 1 || !ok || err != nil {
				t.Errorf("Do after %v: got %d, %t, %v, want 1", keys[:2], value, ok, err)
			}
		}
	})
}

// TestQueuesKeepOrder makes several calls with one key, two of which stop waiting. It checks that
// the others get their turn in order, that another key is free, and that no key is kept afterwards.
func TestQueuesKeepOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueues[int64](1, math.MaxInt)
		first, err := q.enter(t.Context(), 1)
		if err != nil {
			t.Fatal(err)
		}
		leaving, leave := context.WithCancel(t.Context())
		var order []int
		results := make(chan error, 6)
		for i := range cap(results) {
			go func() {
				ctx := t.Context()
				switch i {
				case 1:
					ctx = leaving
				case 3:
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, time.Second)
					defer cancel()
				}
				done, err := q.enter(ctx, 1)
				if err == nil {
					order = append(order, i)
				}
				done()
				results <- err
			}()
			synctest.Wait()
		}
		other, err := q.enter(t.Context(), 2)
		if err != nil {
			t.Errorf("call with another key: %v", err)
		}
		other()
		leave()
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Errorf("call whose caller left: error %v, want %v", err, context.Canceled)
		}
		if err := <-results; !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("call past its deadline: error %v, want %v", err, context.DeadlineExceeded)
		}
		first()
		synctest.Wait()
		if want := []int{0, 2, 4, 5}; !slices.Equal(order, want) {
			t.Errorf("order %v, want %v", order, want)
		}
		if len(q.keys) != 0 {
			t.Errorf("%d keys after all calls, want 0", len(q.keys))
		}
	})
}

func BenchmarkGetUser(b *testing.B) {
	m := newMemory()
	name := "John"
	if _, err := m.createUser(b.Context(), "test", userInput{&name, &name, &name}, ""); err != nil {
		b.Fatal(err)
	}
	log := newLogger(&logWriter{w: io.Discard}, slog.LevelInfo)
	server := newHandler(testDependencies(settings{}, m, log))
	r := httptest.NewRequest("GET", "/users/1", nil)
	b.ReportAllocs()
	for b.Loop() {
		server.ServeHTTP(httptest.NewRecorder(), r)
	}
}

func BenchmarkParseObject(b *testing.B) {
	body := []byte(`{"name": "John", "surname": "Doe", "password": "correct horse"}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseObject(body, maxMembers); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGroup(b *testing.B) {
	g := Group[int, int]{}
	g.run = func(_ context.Context, keys []int) (map[int]int, error) {
		return map[int]int{keys[0]: 1}, nil
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			g.Do(b.Context(), 1)
		}
	})
}

func BenchmarkUserJSON(b *testing.B) {
	u := User{ID: 7, Name: "John", Surname: "Doe", CreatedAt: timestamp{time.Now()}, UpdatedAt: timestamp{time.Now()}}
	buffer := make([]byte, 0, 256)
	b.ReportAllocs()
	for b.Loop() {
		u.appendJSON(buffer)
	}
}

func BenchmarkLogLine(b *testing.B) {
	log := newLogger(&logWriter{w: io.Discard}, slog.LevelInfo)
	ctx := withTraceID(context.Background(), newUUIDv4())
	b.ReportAllocs()
	for b.Loop() {
		log.LogAttrs(ctx, slog.LevelInfo, "Request completed", slog.String("method", "GET"),
			slog.String("path", "/users/7"), slog.Int("status", 200),
			slog.Float64("duration_ms", 0.123), slog.Int64("bytes", 151))
	}
}

// BenchmarkLog logs from several goroutines at once, as requests do.
func BenchmarkLog(b *testing.B) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer null.Close()
	log := newLogger(&logWriter{w: null}, slog.LevelInfo)
	ctx := withTraceID(context.Background(), newUUIDv4())
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			log.LogAttrs(ctx, slog.LevelInfo, "Request completed", slog.String("method", "GET"),
				slog.String("path", "/users/7"), slog.Int("status", 200),
				slog.Float64("duration_ms", 0.123), slog.Int64("bytes", 151))
		}
	})
}

// TestPostgresVersion logs the version of PostgreSQL that the tests use.
func TestPostgresVersion(t *testing.T) {
	conn, err := pgx.Connect(t.Context(), testDatabaseURL)
	if err != nil {
		missing(t, "PostgreSQL", err)
	}
	defer conn.Close(t.Context())
	postgresVersion(t, conn)
}

// postgresVersion logs and returns the version of a server, without the suffix of a distribution. The
// test fails if TEST_POSTGRES_VERSION is set and differs.
func postgresVersion(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	var reported string
	if err := conn.QueryRow(t.Context(), "SHOW server_version").Scan(&reported); err != nil {
		t.Fatal(err)
	}
	version, _, _ := strings.Cut(reported, " ")
	t.Logf("the server reports PostgreSQL %s", version)
	if want := os.Getenv("TEST_POSTGRES_VERSION"); want != "" && version != want {
		t.Errorf("PostgreSQL version: got %s, want %s", version, want)
	}
	return version
}
