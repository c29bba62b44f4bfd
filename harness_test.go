package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// secret is in every password that a test sends, so that the harness can look for it in
// whatever leaves the service.
const secret = "correct-horse-s3cr3t"

// The services of the tests, and what to do where they are missing.
var (
	testDatabaseURL = envOr("TEST_DATABASE_URL", "postgres://postgres@127.0.0.1:5432/postgres")
	testRabbitURL   = envOr("TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672/")
)

// microseconds is the layout of every time that leaves the service.
const microseconds = "2006-01-02T15:04:05.000000Z"

func envOr(name, fallback string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return fallback
}

// missing skips the test, or fails it where REQUIRE_SERVICES=1 promises everything.
func missing(t *testing.T, what string, err error) {
	t.Helper()
	if os.Getenv("REQUIRE_SERVICES") == "1" {
		t.Fatalf("%s is required: %v", what, err)
	}
	t.Skipf("needs %s: `make services` provides it (%v)", what, err)
}

var serial atomic.Int64

// uniqueName is a name that no other test has, also in another process.
func uniqueName() string {
	return fmt.Sprintf("us_test_%d_%d", os.Getpid(), serial.Add(1))
}

// template is the database that each test's own is cloned from.
var template struct {
	once sync.Once
	role string
	name string
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if template.name != "" {
		dropDatabase(template.name)
		admin(context.Background(), "DROP ROLE "+template.role)
	}
	os.Exit(code)
}

// admin runs statements on the server of the tests, outside any transaction.
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

func dropDatabase(name string) error {
	return admin(context.Background(), "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
}

// databaseURL is the URL of a database on the tests' server as its owner, who is no
// superuser.
func databaseURL(name string) string {
	u, err := url.Parse(testDatabaseURL)
	if err != nil {
		panic(err)
	}
	u.Path = "/" + name
	u.User = url.UserPassword(template.role, template.role)
	return u.String()
}

// makeTemplate makes an empty database with the schema.
func makeTemplate() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	template.role, template.name = uniqueName(), uniqueName()
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

// newDatabase returns the URL of a database with the schema that only this test has.
func newDatabase(t *testing.T) string {
	t.Helper()
	template.once.Do(func() { template.err = makeTemplate() })
	if template.err != nil {
		missing(t, "PostgreSQL", template.err)
	}
	name := uniqueName()
	err := admin(t.Context(), fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s OWNER %s",
		name, template.name, template.role))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dropDatabase(name); err != nil {
			t.Error(err)
		}
	})
	return databaseURL(name)
}

// connect opens a connection to a test's database, to look at it or to disturb it.
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

// dialRabbit opens a connection to the tests' broker.
func dialRabbit(t *testing.T) *amqp.Connection {
	t.Helper()
	conn, err := amqp.Dial(testRabbitURL)
	if err != nil {
		missing(t, "RabbitMQ", err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// newExchange returns the name of an exchange that only this test has, and removes it
// and all that the service derives from it afterwards.
func newExchange(t *testing.T) string {
	t.Helper()
	dialRabbit(t)
	name := uniqueName()
	t.Cleanup(func() {
		conn, err := amqp.Dial(testRabbitURL)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		b := &rabbitMQ{exchange: name}
		ch, err := conn.Channel()
		if err != nil {
			t.Error(err)
			return
		}
		// RabbitMQ 3.10 loses its supervisor of at-least-once dead letters, for all queues
		// and until it is started again, when such a queue is deleted within milliseconds of
		// its declaration.
		time.Sleep(300 * time.Millisecond)
		ch.QueueDelete(b.queue(), false, false, false)
		ch.QueueDelete(b.deadLetterQueue(), false, false, false)
		ch.ExchangeDelete(b.exchange, false, false)
		ch.ExchangeDelete(b.deadLetterExchange(), false, false)
	})
	return name
}

// service is one that runs in this process, as run runs it, and that a test talks to.
type service struct {
	t        *testing.T
	settings settings
	url      string
	log      *logBuffer
	stop     func() error // ends the service and returns what run returned; once
}

// memorySettings are the defaults of `go run .`, on a free port.
func memorySettings() settings {
	return settings{appName: "test", host: "127.0.0.1", passwordMinLength: 8,
		logLevel: slog.LevelDebug, exchange: "none"}
}

func postgresSettings(t *testing.T) settings {
	t.Helper()
	s := memorySettings()
	s.databaseURL = newDatabase(t)
	return s
}

// eachStore runs a test that must hold whatever the users are kept in.
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

// testLimits are those of a machine with two cores and without a memory limit.
var testLimits = newLimits(2, math.MaxInt64)

// testDependencies returns dependencies for newHandler in this process, without a broker.
func testDependencies(s settings, users store, log *slog.Logger) dependencies {
	return dependencies{settings: s, limits: testLimits, store: users,
		broker: inProcess{newConsumer(log, &logWriter{w: io.Discard}, metrics.NewSet()), log},
		log:    log, metrics: metrics.NewSet(), draining: &atomic.Bool{}}
}

// faultyStore fails every call with err if that is set, and is in state.
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
func (s faultyStore) updateUser(context.Context, int64, userInput, []int64) (User, error) {
	return User{}, s.err
}
func (s faultyStore) passwordHash(context.Context, int64) (string, error)         { return "", s.err }
func (s faultyStore) rehashPassword(context.Context, int64, string, string) error { return s.err }
func (s faultyStore) deleteUser(context.Context, int64, []int64) error            { return s.err }
func (s faultyStore) size(context.Context) (int64, time.Duration, error)          { return 0, 0, s.err }
func (s faultyStore) ready(context.Context) state                                 { return s.state }

// ask sends a request to a handler in this process.
func ask(h http.Handler, method, target string, body io.Reader, headers ...string) answer {
	request := httptest.NewRequest(method, target, body)
	request.Header.Set("Content-Type", "application/json")
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		request.Header.Set(name, value)
	}
	recorder := httptest.NewRecorder()
	h.ServeHTTP(recorder, request)
	return answer{recorder.Code, recorder.Header(), recorder.Body.String()}
}

// startService runs a service until the test ends. Then its log is checked.
func startService(t *testing.T, s settings) *service {
	t.Helper()
	log := &logBuffer{}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, s, testLimits, &logWriter{w: log}) }()
	svc := &service{t: t, settings: s, log: log}
	svc.stop = sync.OnceValue(func() error {
		client.CloseIdleConnections() // the service would wait for their next request
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(15 * time.Second):
			return fmt.Errorf("the service does not end")
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

// answer is a response whose body was read.
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
		t.Fatalf("the body is no JSON: %v\n%s", err, a.body)
	}
	for _, name := range names {
		object, _ := value.(map[string]any)
		value = object[name]
	}
	return value
}

// client does not follow redirects, and is shared by all tests.
var client = &http.Client{
	Timeout:       15 * time.Second,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Transport:     &http.Transport{MaxIdleConnsPerHost: 64},
}

// do sends a request and checks what holds for every answer. Headers are "Name: value"; a
// body has the content type application/json unless a header says otherwise.
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
	response, err := client.Do(request)
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

// checkAnswer holds an answer against what the contract says of all of them.
func (s *service) checkAnswer(method, path string, a answer) {
	s.t.Helper()
	id := a.header.Get("X-Trace-Id")
	if !requestIDPattern.MatchString(id) {
		s.t.Errorf("%s %s: X-Trace-Id is %q", method, path, id)
	}
	if strings.Contains(a.body, secret) || strings.Contains(a.body, "argon2id") {
		s.t.Errorf("%s %s: the answer tells a password: %s", method, path, a.body)
	}
	if a.status < 400 || method == http.MethodHead || strings.HasPrefix(path, "/readyz") {
		return
	}
	if got := a.header.Get("Content-Type"); got != "application/problem+json" {
		s.t.Errorf("%s %s: status %d has the content type %q", method, path, a.status, got)
	}
	var p problem
	decoder := json.NewDecoder(strings.NewReader(a.body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&p); err != nil {
		s.t.Fatalf("%s %s: %v in %s", method, path, err, a.body)
	}
	instance, _, _ := strings.Cut(path, "?")
	if p.Type != "about:blank" || p.Title != http.StatusText(a.status) || p.Status != a.status ||
		p.Detail == "" || p.TraceID != id || p.Instance != instance {
		s.t.Errorf("%s %s: not the problem document of this answer: %s", method, path, a.body)
	}
	if a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") == "" {
		s.t.Errorf("%s %s: 503 without Retry-After", method, path)
	}
}

// createUser returns the id of a new user.
func (s *service) createUser(name, surname string) int64 {
	s.t.Helper()
	body := fmt.Sprintf(`{"name": %q, "surname": %q, "password": %q}`, name, surname, secret)
	a := s.do("POST", "/users", body)
	if a.status != http.StatusCreated {
		s.t.Fatalf("POST /users: %d %s", a.status, a.body)
	}
	return int64(a.json(s.t, "id").(float64))
}

// logBuffer keeps the log of a service.
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

type logLine map[string]any

// lines returns the lines with an event, or all for "".
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

// allowErrors says how many lines at ERROR the test brings about.
func (b *logBuffer) allowErrors(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.errorsAllowed = n
}

// check holds every line against what the contract says of all of them.
func (b *logBuffer) check(t *testing.T) {
	t.Helper()
	failures := 0
	for text := range strings.Lines(b.String()) {
		var line logLine
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Errorf("a log line is no JSON object: %v: %s", err, text)
			continue
		}
		want := []string{"timestamp", "level", "event"}
		if _, ok := line["trace_id"]; ok {
			want = append(want, "trace_id")
		}
		if got := keys(text)[:len(want)]; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("a log line begins with %v, not %v: %s", got, want, text)
		}
		if _, err := time.Parse(microseconds, fmt.Sprint(line["timestamp"])); err != nil {
			t.Error(err)
		}
		if strings.Contains(text, secret) || strings.Contains(text, "argon2id") {
			t.Errorf("a log line tells a password: %s", text)
		}
		if strings.Contains(text, "superfluous") {
			t.Errorf("a handler wrote its status twice: %s", text)
		}
		if line["level"] == "ERROR" {
			failures++
		}
	}
	if failures != b.errorsAllowed {
		t.Errorf("%d lines at ERROR, not %d:\n%s", failures, b.errorsAllowed, b)
	}
}

// keys returns the names of an object in their order.
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

// waitForLine waits for the first line with an event whose attributes, given as names and
// values in turn, are as wanted.
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

// eventually waits until a condition holds, or fails the test.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in 20 s there was not: %s", what)
		}
	}
}
