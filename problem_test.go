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
