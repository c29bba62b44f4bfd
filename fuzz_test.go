package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// onceRecorder is a recorder that fails the test if a handler writes a second status.
type onceRecorder struct {
	*httptest.ResponseRecorder
	t       *testing.T
	written bool
}

// WriteHeader records a status and fails the test if there is one already.
func (r *onceRecorder) WriteHeader(status int) {
	if r.written {
		r.t.Errorf("a second status was written: %d", status)
	}
	r.written = true
	r.ResponseRecorder.WriteHeader(status)
}

// jsonHeader is a header line of requestSeeds.
const jsonHeader = "Content-Type: application/json\r\n"

// requestSeeds are the seeds of FuzzRequest. headers are lines that end with CRLF.
var requestSeeds = []struct{ method, target, headers, body string }{
	{"GET", "/users?per_page=1&page=2", "", ""},
	{"GET", "/users/?after=0", "", ""},
	{"GET", "/users?page=0&x=%00", "", ""},
	{"GET", "/users?%zz", "", ""},
	{"HEAD", "/users/9", "", ""},
	{"GET", "/users/1", "If-None-Match: W/\"1\"\r\n", ""},
	{"GET", "/users/%31?a", "X-Request-Id: a\r\n", ""},
	{"POST", "/users", jsonHeader, john},
	{"POST", "/users/", jsonHeader, `{"name": "\ud800", "password": "` + secret},
	{"POST", "/users", jsonHeader + "Idempotency-Key: \"used\"\r\n", john},
	{"POST", "/users", jsonHeader, `{"name": "a", "surname": "b", "password": ["` + secret + `"]}`},
	{"POST", "/users", jsonHeader, `{"x": "` + secret + `", "a/~": 1}`},
	{"POST", "/users", jsonHeader + "Idempotency-Key: \"used\"\r\n",
		strings.Replace(john, "Doe", "Roe", 1)},
	{"POST", "/users", jsonHeader + "Idempotency-Key: \"\"\r\n", john},
	{"POST", "/users", "", john},
	{"POST", "/users", jsonHeader + "Transfer-Encoding: chunked\r\n", "2\r\n{}\r\n0\r\n\r\n"},
	{"POST", "/users", jsonHeader + "Transfer-Encoding: chunked\r\n", "zz"},
	{"POST", "/users", jsonHeader, strings.Repeat(" ", maxBodyBytes) + "{}"},
	{"PUT", "/users/1", jsonHeader, `{"name": "Jane", "password": "` + secret + `"}`},
	{"PUT", "/users/1", jsonHeader + "If-Match: \"1\"\r\n", `{"surname": " Roe "}`},
	{"PATCH", "/users/1", "Content-Type: application/merge-patch+json\r\n", `{"name": "Jane"}`},
	{"PATCH", "/users/1", jsonHeader + "If-Match: \"2\"\r\n", `{"name": "Jane"}`},
	{"PUT", "/users/2", jsonHeader, `[]`},
	{"DELETE", "/users/1", "", ""},
	{"DELETE", "/users/1", "If-Match: x\r\n", ""},
	{"DELETE", "/users/x", "", ""},
	{"OPTIONS", "*", "", ""},
	{"CONNECT", "a:1", "", ""},
	{"FOO", "/users/1%2F2%0A%22", "", ""},
	{"GET", "//users", "", ""},
	{"GET", "/a/../users", "", ""},
	{"GET", "http://a/healthz", "", ""},
	{"GET", "/readyz", "", ""},
	{"GET", "/metrics", "", ""},
	{"GET", "/openapi.json", "Range: bytes=1-2\r\n", ""},
	{"GET", "/docs", "", ""},
	{"GET", "/docs/start.js", "", ""},
	{"GET", "/", "", ""},
	{"GET", "/x%ff?%ff",
		"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n", ""},
}

// FuzzRequest sends requests to a service that has one user, and checks what holds for every answer
// and its log lines.
func FuzzRequest(f *testing.F) {
	for _, seed := range requestSeeds {
		f.Add(seed.method, seed.target, seed.headers, []byte(seed.body))
	}
	hash, err := newTestHasher().hash(context.Background(), secret)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, method, target, headers string, body []byte) {
		head := method + " " + target + " HTTP/1.1\r\nHost: test\r\n" + headers
		if !strings.Contains(headers, "Transfer-Encoding") {
			head += fmt.Sprintf("Content-Length: %d\r\n", len(body))
		}
		r, err := http.ReadRequest(bufio.NewReader(io.MultiReader(
			strings.NewReader(head+"\r\n"), bytes.NewReader(body))))
		if err != nil {
			return // net/http answers without calling the handler
		}
		log := &logBuffer{}
		out := &logWriter{w: log}
		store := newMemory()
		store.createUser(t.Context(), input("John", "Doe", hash), "used")
		logger := newLogger(out, slog.LevelDebug)
		server := newHandler(testDependencies(memorySettings(), store, logger))
		recorder := httptest.NewRecorder()
		aborted := serveOnce(server, &onceRecorder{ResponseRecorder: recorder, t: t}, r)
		out.flush()

		s := &service{t: t, log: log}
		completed := s.checkRequestLog(r, recorder.Header().Get("X-Trace-Id"))
		if aborted {
			if completed["status"] != 499.0 || recorder.Body.Len() > 0 {
				t.Fatalf("%q: the connection was aborted, but the log has %v", head, completed)
			}
			return
		}
		got := answer{recorder.Code, recorder.Header(), recorder.Body.String()}
		if got.status >= 500 || completed["status"] != float64(got.status) {
			t.Fatalf("%q %q: status %d, but the log has %v", head, body, got.status, completed)
		}
		checkFuzzedAnswer(t, r, head, got)
		if repeatsPassword(head+r.URL.Path, r.URL.Query(), body) {
			return // the answer may contain the password that is in the URL or a name
		}
		s.checkAnswer(r.Method, r.URL.EscapedPath(), got)
		log.check(t)
		all := fmt.Sprint(got, log)
		if strings.Contains(all, secret) || strings.Contains(all, hash) {
			t.Errorf("%q %q: the answer or the log contains the password: %s", head, body, all)
		}
	})
}

// checkFuzzedAnswer checks the headers of an answer that the service finished.
func checkFuzzedAnswer(t *testing.T, r *http.Request, head string, got answer) {
	t.Helper()
	traceID := got.header.Get("X-Trace-Id")
	if want := wantTraceID(r.Header); want != "" && traceID != want {
		t.Errorf("%q: trace id %q, want %q", head, traceID, want)
	}
	if got.header.Get("Content-Type") == "application/json" && !json.Valid([]byte(got.body)) {
		t.Errorf("%q: the body is not valid JSON: %s", head, got.body)
	}
	if (got.status == http.StatusMethodNotAllowed) != (got.header.Get("Allow") != "") {
		t.Errorf("%q: status %d with the header %v, want Allow with 405 only",
			head, got.status, got.header)
	}
}

// serveOnce serves a request and reports whether the handler aborted the connection.
func serveOnce(server http.Handler, w http.ResponseWriter, r *http.Request) (aborted bool) {
	defer func() {
		if v := recover(); v == http.ErrAbortHandler {
			aborted = true
		} else if v != nil {
			panic(v)
		}
	}()
	server.ServeHTTP(w, r)
	return false
}

// checkRequestLog checks the two log lines of a request and returns the second.
func (s *service) checkRequestLog(r *http.Request, id string) logLine {
	s.t.Helper()
	lines := s.log.lines("")
	if len(lines) != 2 || strings.Count(s.log.String(), "\n") != 2 {
		s.t.Fatalf("the log does not have two lines:\n%s", s.log)
	}
	for i, event := range []string{"Request started", "Request completed"} {
		line, path := lines[i], string([]rune(r.URL.Path))
		if line["event"] != event || line["trace_id"] != id || line["method"] != r.Method ||
			line["path"] != path {
			s.t.Errorf("%s %q: log line %v, want the event %q", r.Method, r.URL.Path, line, event)
		}
	}
	return lines[1]
}

// repeatsPassword reports whether the client has put a password where the service may repeat it: in
// the head, in the name of a member, or in the name of a user.
func repeatsPassword(head string, query url.Values, body []byte) bool {
	text := fmt.Sprint(head, query)
	members, _ := parseObject(body)
	for _, m := range members {
		text += " " + m.name
		if m.name == "name" || m.name == "surname" {
			name, _ := parseString(m.value)
			text += " " + name
		}
	}
	return strings.Contains(text, secret) || strings.Contains(text, "argon2id")
}
