package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// userRequests are a valid request for each route of users.
var userRequests = []struct {
	method, path, body string
	conflicts          bool // the database may refuse the change
}{
	{method: "GET", path: "/users"},
	{method: "POST", path: "/users", conflicts: true,
		body: `{"name": "John", "surname": "Doe", "password": "correct horse"}`},
	{method: "GET", path: "/users/1"},
	{method: "PUT", path: "/users/1", body: `{"name": "Jane"}`, conflicts: true},
	{method: "PATCH", path: "/users/1", body: `{"name": "Jane"}`, conflicts: true},
	{method: "DELETE", path: "/users/1", conflicts: true},
	{method: "POST", path: "/users/1/password/verify", body: `{"password": "correct horse"}`},
}

// TestErrorsOfStore sends requests to a store that fails.
func TestErrorsOfStore(t *testing.T) {
	t.Parallel()
	for _, request := range userRequests {
		faults := map[error]int{
			errors.New("inside"): 500,
			errUnavailable:       503,
			errOutcomeUnknown:    503,
		}
		if request.conflicts {
			faults[errReferenced], faults[errRefused] = 409, 409
		}
		for err, want := range faults {
			server := newFaultyServer(faultyStore{err: err}, false)
			checkProblem(t, ask(server, request.method, request.path, strings.NewReader(request.body)), want)
		}
		if request.body != "" {
			stalled := iotest.ErrReader(os.ErrDeadlineExceeded)
			server := newFaultyServer(faultyStore{}, false)
			checkProblem(t, ask(server, request.method, request.path, stalled), 408)
		}
	}
	create := strings.NewReader(userRequests[1].body)
	server := newFaultyServer(faultyStore{}, false)
	checkProblem(t, ask(server, "POST", "/users", create, "Idempotency-Key: running"), 409)
}

// checkProblem expects a problem document with a status.
func checkProblem(t *testing.T, a answer, want int) {
	t.Helper()
	var p problem
	if err := json.Unmarshal([]byte(a.body), &p); err != nil {
		t.Fatalf("%v: %s", err, a.body)
	}
	if a.status != want || a.header.Get("Content-Type") != "application/problem+json" ||
		p.Title != http.StatusText(want) || p.Status != want || p.TraceID != a.header.Get("X-Trace-Id") ||
		(want == 503) != (a.header.Get("Retry-After") != "") || strings.Contains(a.body, "the cause") {
		t.Errorf("status %d, not %d: %v %s", a.status, want, a.header, a.body)
	}
}

// TestReadiness asks servers whose store is in each of its states.
func TestReadiness(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		state    state
		draining bool
		want     int
	}{
		{"up", false, 200},
		{"up", true, 503},
		{"memory", true, 503},
		{"down", false, 503},
		{"read-only", false, 503},
	} {
		a := ask(newFaultyServer(faultyStore{state: test.state}, test.draining), "GET", "/readyz", nil)
		if a.status != test.want || a.json(t, "database") != string(test.state) {
			t.Errorf("%+v: status %d, %s", test, a.status, a.body)
		}
	}
}

// newFaultyServer returns the routes of the service over a store that fails. A request with the
// idempotency key "running" is in progress.
func newFaultyServer(store faultyStore, draining bool) http.Handler {
	d := testDependencies(memorySettings(), store, slog.New(slog.DiscardHandler))
	d.draining.Store(draining)
	a := newAPI(d, &traffic{})
	a.creating.Store("running", true)
	h := &health{d.store, d.broker, d.metrics, d.draining}
	return newServer(d, &traffic{}, newAccess(d.settings), append(publicRoutes(h), protectedRoutes(a, h)...))
}

// invalidFields returns the pointers and parameters of the errors in a problem document, sorted.
func invalidFields(t *testing.T, a answer) []string {
	t.Helper()
	var p problem
	if err := json.Unmarshal([]byte(a.body), &p); err != nil {
		t.Fatalf("the body is not a problem document: %v: %s", err, a.body)
	}
	var fields []string
	for _, e := range p.Errors {
		if e.Detail == "" || (e.Pointer == "") == (e.Parameter == "") {
			t.Errorf("error %+v, want either a pointer or a parameter, and a detail", e)
		}
		fields = append(fields, e.Pointer+e.Parameter)
	}
	slices.Sort(fields)
	return fields
}

// checkBadRequest checks that an answer is a 400 whose errors are those of the wanted fields.
func checkBadRequest(t *testing.T, what string, a answer, want ...string) {
	t.Helper()
	if got := invalidFields(t, a); a.status != http.StatusBadRequest || !slices.Equal(got, want) {
		t.Errorf("%s: status %d, errors %q, want 400, %q: %s", what, a.status, got, want, a.body)
	}
}

// TestProblemOfError checks the problem document for each error that a handler may return. The
// log has the cause of a 500, the answer does not.
func TestProblemOfError(t *testing.T) {
	t.Parallel()
	const cause = "at 10.0.0.1"
	wrapped := func(err error) handler {
		return func(*response, *http.Request, caller) error {
			return fmt.Errorf("%s: %w", cause, fmt.Errorf("%w: %s", err, cause))
		}
	}
	for name, test := range map[string]struct {
		handler handler
		want    int
		detail  string // a substring of it
	}{
		"problem": {
			wrapped(newProblem(418, "short and stout")), 418, "short and stout"},
		"user not found":     {wrapped(errNotFound), 404, "not found"},
		"version mismatch":   {wrapped(errVersionMismatch), 412, "If-Match"},
		"invalid value":      {wrapped(errInvalidValue), 400, "value"},
		"unavailable":        {wrapped(errUnavailable), 503, "nothing was changed"},
		"busy":               {wrapped(errBusy), 503, "nothing was changed"},
		"outcome unknown":    {wrapped(errOutcomeUnknown), 503, "may or may not"},
		"unknown error":      {wrapped(io.ErrUnexpectedEOF), 500, "Internal error"},
		"other deadline":     {wrapped(context.DeadlineExceeded), 500, "Internal error"},
		"other cancellation": {wrapped(context.Canceled), 500, "Internal error"},
		"panic":              {panicking, 500, "Internal error"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveHandler(t, test.handler)
			a := s.do("GET", "/x?y=1", "", "X-Request-Id: trace-1")
			if a.status != test.want || strings.Contains(a.body, cause) ||
				!strings.Contains(fmt.Sprint(a.json(t, "detail")), test.detail) {
				t.Errorf("status %d, want %d with %q but without %q: %s",
					a.status, test.want, test.detail, cause, a.body)
			}
			s.waitForLine("Request completed",
				"trace_id", "trace-1", "level", "INFO", "status", test.want)
			if test.want != http.StatusInternalServerError {
				return // the harness checks that no line has the level ERROR
			}
			s.log.allowErrors(1)
			failure := s.waitForLine("Request failed", "trace_id", "trace-1", "level", "ERROR")
			stack := fmt.Sprint(failure["stack"])
			if !strings.Contains(fmt.Sprint(failure["error"]), cause) ||
				!strings.Contains(stack, "ServeHTTP") {
				t.Errorf("log line %v, want the cause %q and a stack", failure, cause)
			}
			if name == "panic" && !strings.Contains(stack, "panicking") {
				t.Errorf("the stack does not contain the panicking function: %s", stack)
			}
		})
	}
}

// TestInternalErrors checks that the log has the cause of an unexpected database error, that the
// answer does not, and that the service recovers.
func TestInternalErrors(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	conn := connect(t, s.settings.databaseURL)
	if _, err := conn.Exec(t.Context(), "ALTER TABLE users RENAME TO gone"); err != nil {
		t.Fatal(err)
	}
	requests := []struct{ method, path, body string }{
		{"GET", "/users", ""},
		{"GET", "/users/1", ""},
		{"POST", "/users", john},
		{"PUT", "/users/1", john},
		{"DELETE", "/users/1", ""},
	}
	s.log.allowErrors(len(requests))
	for _, r := range requests {
		a := s.do(r.method, r.path, r.body)
		if a.status != http.StatusInternalServerError {
			t.Errorf("%s %s: status %d, want 500: %s", r.method, r.path, a.status, a.body)
		}
		for _, inner := range []string{"relation", "exist", "42P01", "SQLSTATE", "ERROR"} {
			if strings.Contains(a.body, inner) {
				t.Errorf("%s %s: the answer contains %q: %s", r.method, r.path, inner, a.body)
			}
		}
		id := a.header.Get("X-Trace-Id")
		failure := s.waitForLine("Request failed", "trace_id", id, "level", "ERROR")
		if !strings.Contains(fmt.Sprint(failure["error"]), "42P01") || failure["stack"] == "" {
			t.Errorf("%s %s: log line %v, want 42P01 and a stack", r.method, r.path, failure)
		}
		s.waitForLine("Request completed", "trace_id", id, "status", 500, "level", "INFO")
	}
	if _, err := conn.Exec(t.Context(), "ALTER TABLE gone RENAME TO users"); err != nil {
		t.Fatal(err)
	}
	if a := s.do("POST", "/users", john); a.status != http.StatusCreated {
		t.Errorf("POST /users after the errors: status %d, want 201: %s", a.status, a.body)
	}
}

// ask sends a request with any body to a handler in this process.
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
