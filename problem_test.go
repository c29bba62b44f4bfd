package main

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"os"
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

// TestStoreErrors sends requests to a store that fails.
func TestStoreErrors(t *testing.T) {
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
