package env

import (
	"net/http"
	"testing"
)

func TestCheckLine(t *testing.T) {
	t.Parallel()
	const begin = `{"timestamp":"2026-11-26T21:59:38.000001Z","level":"INFO","event":"e"`
	for _, test := range []struct {
		line string
		ok   bool
	}{
		{begin + `}`, true},
		{begin + `,"trace_id":"t","a":1}`, true},
		{begin + `,"a":1,"trace_id":"t"}`, false},
		{begin, false},
		{`"text"`, false},
		{`{}`, false},
		{`{"level":"INFO","timestamp":"2026-11-26T21:59:38.000001Z","event":"e"}`, false},
		{`{"timestamp":"2026-11-26T21:59:38Z","level":"INFO","event":"e"}`, false},
		{begin + `,"a":"` + Secret + `"}`, false},
		{begin + `,"a":"$argon2id$v=19$"}`, false},
		{begin + `,"a":"http: superfluous response.WriteHeader call"}`, false},
	} {
		if err := checkLine(test.line); (err == nil) != test.ok {
			t.Errorf("%s: got error %v, want ok=%t", test.line, err, test.ok)
		}
	}
}

func TestCheckResponse(t *testing.T) {
	t.Parallel()
	const unavailable = `{"type": "about:blank", "title": "Service Unavailable", "status": 503,
		"detail": "d", "instance": "/users", "trace_id": "t"}`
	const problemType = "application/problem+json"
	for _, test := range []struct {
		name, method, path     string
		status                 int
		mediaType, retry, body string
		ok                     bool
	}{
		{"success", "GET", "/users", 200, "text/plain", "", "text", true},
		{"password", "GET", "/users", 200, "text/plain", "", Secret, false},
		{"hash", "GET", "/users", 200, "text/plain", "", "$argon2id$", false},
		{"problem", "GET", "/users", 503, problemType, "1", unavailable, true},
		{"no Retry-After", "GET", "/users", 503, problemType, "", unavailable, false},
		{"other type", "GET", "/users", 503, "application/json", "1", unavailable, false},
		{"other instance", "GET", "/users/1", 503, problemType, "1", unavailable, false},
		{"other status", "GET", "/users", 500, problemType, "", unavailable, false},
		{"unknown member", "GET", "/users", 503, problemType, "1", `{"a": 1}`, false},
		{"no document", "GET", "/users", 404, problemType, "", "", false},
		{"HEAD", "HEAD", "/users", 404, problemType, "", "", true},
		{"not ready", "GET", "/readyz", 503, "application/json", "", `{}`, true},
		{"wrong method", "PUT", "/readyz", 405, "application/json", "", `{}`, false},
	} {
		request, err := http.NewRequest(test.method, "http://127.0.0.1"+test.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r := Response{&http.Response{StatusCode: test.status, Request: request, Header: http.Header{
			"X-Trace-Id": {"t"}, "Content-Type": {test.mediaType}, "Retry-After": {test.retry}}},
			test.body}
		if err := r.violations(); (err == nil) != test.ok {
			t.Errorf("%s: got error %v, want ok=%t", test.name, err, test.ok)
		}
		r.Header.Del("X-Trace-Id")
		if r.violations() == nil {
			t.Errorf("%s, without a trace id: got no error, want one", test.name)
		}
	}
}
