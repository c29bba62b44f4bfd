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
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
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
	store, err := openPostgres(ctx, databaseURL(template.name), "template", slog.New(slog.DiscardHandler))
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
		broker: inProcess{newConsumer(log, &logWriter{w: io.Discard}, metrics.NewSet()), log},
		log:    log, metrics: metrics.NewSet(), draining: &atomic.Bool{}}
}

// faultyStore is a store whose calls fail with err. Its ready returns state.
type faultyStore struct {
	*memory
	err   error
	state state
}

func (s faultyStore) createUser(context.Context, userInput, string) (User, error) {
	return User{}, s.err
}
func (s faultyStore) creationUnder(context.Context, string) (User, string, error) {
	return User{}, "", s.err
}
func (s faultyStore) getUser(context.Context, int64) (User, error) { return User{}, s.err }
func (s faultyStore) listUsers(context.Context, int64, int64, int64) ([]User, int64, error) {
	return nil, 0, s.err
}
func (s faultyStore) findUsers(context.Context, string, int64, int64, int64) ([]User, int64, error) {
	return nil, 0, s.err
}
func (s faultyStore) updateUser(context.Context, int64, userInput, []int64) (User, error) {
	return User{}, s.err
}
func (s faultyStore) passwordHash(context.Context, int64) (string, error)         { return "", s.err }
func (s faultyStore) rehashPassword(context.Context, int64, string, string) error { return s.err }
func (s faultyStore) deleteUser(context.Context, int64, []int64) error            { return s.err }
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
	if p.Type != "about:blank" || p.Title != http.StatusText(a.status) || p.Status != a.status ||
		p.Detail == "" || p.TraceID != id ||
		p.Instance != instance && (len(path) < maxLogged || !strings.HasPrefix(path, p.Instance)) {
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
	members, err := parseObject([]byte(object))
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
