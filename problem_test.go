package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// wrongParts returns the pointers and parameters that a problem document names, sorted.
func wrongParts(t *testing.T, a answer) []string {
	t.Helper()
	var p problem
	if err := json.Unmarshal([]byte(a.body), &p); err != nil {
		t.Fatalf("%v in %s", err, a.body)
	}
	var parts []string
	for _, e := range p.Errors {
		if e.Detail == "" || (e.Pointer == "") == (e.Parameter == "") {
			t.Errorf("not one wrong part with a detail: %+v", e)
		}
		parts = append(parts, e.Pointer+e.Parameter)
	}
	slices.Sort(parts)
	return parts
}

// checkBadRequest wants a 400 that names exactly these parts.
func checkBadRequest(t *testing.T, what string, a answer, want ...string) {
	t.Helper()
	if a.status != http.StatusBadRequest || !slices.Equal(wrongParts(t, a), want) {
		t.Errorf("%s: %d %s", what, a.status, a.body)
	}
}

// TestErrors has what a handler may return. Its cause is for the log, not for the client.
func TestErrors(t *testing.T) {
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
		detail  string // a part of it
	}{
		"a problem":           {wrapped(newProblem(418, "short and stout")), 418, "short and stout"},
		"no such user":        {wrapped(errNotFound), 404, "not found"},
		"another version":     {wrapped(errVersionMismatch), 412, "If-Match"},
		"a bad value":         {wrapped(errInvalidValue), 400, "value"},
		"no database":         {wrapped(errUnavailable), 503, "nothing was changed"},
		"too many passwords":  {wrapped(errBusy), 503, "nothing was changed"},
		"a lost database":     {wrapped(errOutcomeUnknown), 503, "may or may not"},
		"an unknown error":    {wrapped(io.ErrUnexpectedEOF), 500, "Internal error"},
		"somebody's deadline": {wrapped(context.DeadlineExceeded), 500, "Internal error"},
		"somebody's end":      {wrapped(context.Canceled), 500, "Internal error"},
		"a panic":             {panicking, 500, "Internal error"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveHandler(t, test.handler)
			a := s.do("GET", "/x?y=1", "", "X-Request-Id: trace-1")
			if a.status != test.want || strings.Contains(a.body, cause) ||
				!strings.Contains(fmt.Sprint(a.json(t, "detail")), test.detail) {
				t.Errorf("%d %s", a.status, a.body)
			}
			s.waitForLine("Request completed", "trace_id", "trace-1", "level", "INFO", "status", test.want)
			if test.want != http.StatusInternalServerError {
				return // the harness sees to it that there is no line at ERROR
			}
			s.log.allowErrors(1)
			failure := s.waitForLine("Request failed", "trace_id", "trace-1", "level", "ERROR")
			stack := fmt.Sprint(failure["stack"])
			if !strings.Contains(fmt.Sprint(failure["error"]), cause) || !strings.Contains(stack, "ServeHTTP") {
				t.Errorf("the line of the failure is %v", failure)
			}
			if name == "a panic" && !strings.Contains(stack, "panicking") {
				t.Errorf("the stack is not that of the panic: %s", stack)
			}
		})
	}
}

// TestServiceSurvivesFailures fails inside in the one way that a test of the whole service can
// bring about, and sends more.
func TestServiceSurvivesFailures(t *testing.T) {
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
			t.Errorf("%s %s: %d %s", r.method, r.path, a.status, a.body)
		}
		for _, inner := range []string{"relation", "exist", "42P01", "SQLSTATE", "ERROR"} {
			if strings.Contains(a.body, inner) {
				t.Errorf("%s %s tells %s: %s", r.method, r.path, inner, a.body)
			}
		}
		id := a.header.Get("X-Trace-Id")
		failure := s.waitForLine("Request failed", "trace_id", id, "level", "ERROR")
		if !strings.Contains(fmt.Sprint(failure["error"]), "42P01") || failure["stack"] == "" {
			t.Errorf("%s %s failed with %v", r.method, r.path, failure)
		}
		s.waitForLine("Request completed", "trace_id", id, "status", 500, "level", "INFO")
	}
	if _, err := conn.Exec(t.Context(), "ALTER TABLE gone RENAME TO users"); err != nil {
		t.Fatal(err)
	}
	if a := s.do("POST", "/users", john); a.status != http.StatusCreated {
		t.Errorf("after the failures: %d %s", a.status, a.body)
	}
}
