package contract

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"user-service/system/env"
)

// Fields of the traceparents in these tests.
const (
	callerTrace = "4bf92f3577b34da6a3ce929d0e0e4736"
	callerSpan  = "00f067aa0ba902b7"
)

// spanContext is what a consumer extracts from the headers of a message. Without a trace it is
// empty, apart from the event.
type spanContext struct {
	EventID string `json:"event_id"`
	TraceID string `json:"trace_id"`
	SpanID  string `json:"span_id"`
	Flags   int    `json:"flags"`
	State   string `json:"state"`
}

// TestTraceContext checks that the traceparent and tracestate of a change arrive unchanged in the
// headers of its message, and that consumers with OpenTelemetry continue the trace, in Go and in
// JavaScript.
func TestTraceContext(t *testing.T) {
	t.Parallel()
	rabbitURL := newVhost(t)
	for _, test := range []struct {
		name string
		db   *env.Database // nil: in memory
	}{
		{name: "memory"},
		{name: "postgres", db: env.NewDatabase(t)},
	} {
		databaseURL := ""
		if test.db != nil {
			databaseURL = test.db.URL
		}
		s := startService(t, "RABBITMQ_URL="+rabbitURL, "DATABASE_URL="+databaseURL)
		messages := consume(t, rabbitURL)
		extracted := startConsumer(t, rabbitURL)
		t.Run(test.name, func(t *testing.T) { testTraceContext(t, s, test.db, messages, extracted) })
		s.Stop()
	}
}

func testTraceContext(t *testing.T, s *env.Program, db *env.Database, messages <-chan amqp.Delivery,
	extracted <-chan spanContext) {
	const (
		valid    = "00-" + callerTrace + "-" + callerSpan + "-01"
		extended = "cc-" + callerTrace + "-" + callerSpan + "-01-what.the.future-will.be"
		state    = "vendor=t61rcWkgMzE,other@sys=00f067aa0ba902b7"
	)
	span := spanContext{TraceID: callerTrace, SpanID: callerSpan, Flags: 1}
	withState := span
	withState.State = state
	for _, test := range []struct {
		name    string
		request http.Header
		sql     []string // instead of a request, in one transaction
		traceID string   // "": any other than that of the trace
		parent  string   // of the message, "" for none
		state   string
		want    spanContext
	}{
		{name: "none", request: http.Header{}},
		{name: "valid", request: http.Header{"Traceparent": {valid}, "Tracestate": {state}},
			traceID: callerTrace, parent: valid, state: state, want: withState},
		{name: "without tracestate", request: http.Header{"Traceparent": {valid}},
			traceID: callerTrace, parent: valid, want: span},
		{name: "not sampled", request: http.Header{"Traceparent": {valid[:54] + "0"}},
			traceID: callerTrace, parent: valid[:54] + "0",
			want: spanContext{TraceID: callerTrace, SpanID: callerSpan}},
		{name: "tracestate in two lines", request: http.Header{"Traceparent": {valid},
			"Tracestate": strings.Split(state, ",")},
			traceID: callerTrace, parent: valid, state: state, want: withState},
		{name: "invalid tracestate", request: http.Header{"Traceparent": {valid},
			"Tracestate": {state, "no member"}},
			traceID: callerTrace, parent: valid, want: span},
		{name: "invalid traceparent", request: http.Header{"Traceparent": {strings.ToUpper(valid)},
			"Tracestate": {state}}},
		{name: "two traceparents", request: http.Header{"Traceparent": {valid, valid},
			"Tracestate": {state}}},
		{name: "version 00 with more fields", request: http.Header{"Traceparent": {valid + "-more"}}},
		{name: "higher version", request: http.Header{"Traceparent": {extended}, "Tracestate": {state}},
			traceID: callerTrace, parent: extended, state: state, want: withState},
		{name: "request id", request: http.Header{"Traceparent": {valid}, "Tracestate": {state},
			"X-Request-Id": {"req-1"}},
			traceID: "req-1", parent: valid, state: state, want: withState},
		{name: "sql", sql: []string{"SET LOCAL user_service.traceparent = '" + valid + "'",
			"SET LOCAL user_service.tracestate = '" + state + "'"},
			traceID: callerTrace, parent: valid, state: state, want: withState},
		{name: "sql, higher version", sql: []string{
			"SET LOCAL user_service.traceparent = '" + extended + "'"},
			traceID: callerTrace, parent: extended, want: span},
		{name: "sql with a trace id", sql: []string{
			"SET LOCAL user_service.traceparent = '" + valid + "'",
			"SET LOCAL user_service.trace_id = 'job-1'"},
			traceID: "job-1", parent: valid, want: span},
		{name: "sql, invalid traceparent", sql: []string{
			"SET LOCAL user_service.traceparent = '" + strings.ToUpper(valid) + "'",
			"SET LOCAL user_service.tracestate = '" + state + "'"}},
	} {
		if test.sql != nil && db == nil {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			if test.sql != nil {
				insertUser(t, db, test.sql)
			} else {
				createUser(t, s, test.request)
			}
			message := receive(t, messages, "a message")
			id, _ := message.Headers["trace_id"].(string)
			if test.traceID == "" && (id == "" || id == callerTrace) ||
				test.traceID != "" && id != test.traceID {
				t.Errorf("the header trace_id is %q, want %q", id, test.traceID)
			}
			for name, want := range map[string]string{
				"traceparent": test.parent, "tracestate": test.state,
			} {
				if got, ok := message.Headers[name]; ok != (want != "") || ok && got != want {
					t.Errorf("the header %s is %q, want %q", name, got, want)
				}
			}
			test.want.EventID = message.MessageId
			if got := extract(message); got != test.want {
				t.Errorf("Go extracts %+v, want %+v", got, test.want)
			}
			if got := receive(t, extracted, "a line of the consumer"); got != test.want {
				t.Errorf("JavaScript extracts %+v, want %+v", got, test.want)
			}
		})
	}
}

// createUser creates a user by a request with these headers, of which each may have several lines.
func createUser(t *testing.T, s *env.Program, headers http.Header) {
	t.Helper()
	request := env.NewRequest(t, "POST", s.URL+"/users",
		fmt.Sprintf(`{"name": "John", "surname": "Doe", "password": %q}`, env.Secret))
	for name, lines := range headers {
		request.Header[name] = lines
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusCreated {
		t.Fatalf("got status %d, want 201", response.StatusCode)
	}
}

// insertUser creates a user by SQL, in a transaction that begins with these statements.
func insertUser(t *testing.T, db *env.Database, statements []string) {
	t.Helper()
	conn := db.Connect()
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, statement := range append(statements,
		"INSERT INTO users (name, surname, password) VALUES ('John', 'Doe', 'none')") {
		if _, err := tx.Exec(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// receive returns the next value of a channel. After 20 s it fails the test.
func receive[T any](t *testing.T, from <-chan T, what string) T {
	t.Helper()
	select {
	case value, ok := <-from:
		if !ok {
			t.Fatalf("the channel is closed, want %s", what)
		}
		return value
	case <-time.After(20 * time.Second):
		t.Fatalf("waited 20 s for %s", what)
	}
	panic("unreachable")
}

// extract returns the span context of a message, as OpenTelemetry reads its headers.
func extract(message amqp.Delivery) spanContext {
	carrier := make(propagation.MapCarrier)
	for name, value := range message.Headers {
		if text, ok := value.(string); ok {
			carrier[name] = text
		}
	}
	extracted := propagation.TraceContext{}.Extract(context.Background(), carrier)
	span := spanContext{EventID: message.MessageId}
	if c := trace.SpanContextFromContext(extracted); c.IsValid() {
		span.TraceID, span.SpanID = c.TraceID().String(), c.SpanID().String()
		span.Flags, span.State = int(c.TraceFlags()), c.TraceState().String()
	}
	return span
}

// startConsumer starts the consumer in testdata/clients/trace, and returns what it extracts from
// the messages that are published from now on.
func startConsumer(t *testing.T, rabbitURL string) <-chan spanContext {
	t.Helper()
	dir := installPackages(t, "clients/trace")
	cmd := exec.CommandContext(t.Context(), "node", "main.js", rabbitURL)
	cmd.Dir = dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	output, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("the consumer writes %s", stderr.String())
		}
	})
	ready := make(chan bool, 1)
	extracted := make(chan spanContext, 100)
	go func() {
		defer close(extracted)
		defer close(ready)
		for lines := bufio.NewScanner(output); lines.Scan(); {
			var span spanContext
			if lines.Text() == "ready" {
				ready <- true
			} else if err := json.Unmarshal(lines.Bytes(), &span); err == nil {
				extracted <- span
			}
		}
	}()
	receive(t, ready, "the consumer")
	return extracted
}
