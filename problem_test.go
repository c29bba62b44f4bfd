package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/VictoriaMetrics/metrics"
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
		state    string
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
		if a.status != test.want || a.json(t, "database") != test.state {
			t.Errorf("%+v: status %d, %s", test, a.status, a.body)
		}
	}
}

// faultyStore fails every call with err, and is ready as state says.
type faultyStore struct {
	err   error
	state string
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
func (s faultyStore) passwordHash(context.Context, int64) (string, error) { return "", s.err }
func (s faultyStore) rehashPassword(context.Context, int64, string, string) error {
	return s.err
}
func (s faultyStore) deleteUser(context.Context, int64, []int64) error   { return s.err }
func (s faultyStore) size(context.Context) (int64, time.Duration, error) { return 0, 0, s.err }
func (s faultyStore) ready(context.Context) string                       { return s.state }

// newFaultyServer has the routes of the service, without anything behind them that works.
func newFaultyServer(s faultyStore, draining bool) *server {
	return newServerOf(settings{}, s, draining)
}

func newFaultyServerWith(s settings) *server {
	return newServerOf(s, faultyStore{state: "up", err: errUnavailable}, false)
}

func newServerOf(set settings, s faultyStore, draining bool) *server {
	server := newServer(set, slog.New(slog.DiscardHandler), metrics.NewSet())
	h := &health{store: s, broker: inProcess{}, metrics: server.metrics, draining: &server.draining}
	server.draining.Store(draining)
	api := newAPI(s, settings{passwordMinLength: 8}, &server.traffic, server.log)
	api.creating.Store("running", true)
	server.addRoutes(openRoutes(h), keyedRoutes(api, h))
	return server
}

// ask sends a request to a server in this process.
func ask(server *server, method, target string, body io.Reader, headers ...string) answer {
	request := httptest.NewRequest(method, target, body)
	request.Header.Set("Content-Type", "application/json")
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		request.Header.Set(name, value)
	}
	recorder := httptest.NewRecorder()
	server.ServeHTTP(recorder, request)
	return answer{recorder.Code, recorder.Header(), recorder.Body.String()}
}
