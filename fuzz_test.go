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

// onceRecorder fails a test whose handler writes a status twice.
type onceRecorder struct {
	*httptest.ResponseRecorder
	t       *testing.T
	written bool
}

func (r *onceRecorder) WriteHeader(status int) {
	if r.written {
		r.t.Errorf("the status %d comes after another", status)
	}
	r.written = true
	r.ResponseRecorder.WriteHeader(status)
}

// FuzzRequest sends a request to all of the service, with one user in memory, and holds the
// answer and the log against what is true of all of them.
func FuzzRequest(f *testing.F) {
	const jsonType = "Content-Type: application/json\r\n"
	for _, seed := range []struct{ method, target, headers, body string }{
		{"GET", "/users?per_page=1&page=2", "", ""},
		{"GET", "/users/?after=0", "", ""},
		{"GET", "/users?page=0&x=%00", "", ""},
		{"GET", "/users?%zz", "", ""},
		{"HEAD", "/users/9", "", ""},
		{"GET", "/users/1", "If-None-Match: W/\"1\"\r\n", ""},
		{"GET", "/users/%31?a", "X-Request-Id: a\r\n", ""},
		{"POST", "/users", jsonType, john},
		{"POST", "/users/", jsonType, `{"name": "\ud800", "password": "` + secret},
		{"POST", "/users", jsonType + "Idempotency-Key: \"used\"\r\n", john},
		{"POST", "/users", jsonType, `{"name": "a", "surname": "b", "password": ["` + secret + `"]}`},
		{"POST", "/users", jsonType, `{"x": "` + secret + `", "a/~": 1}`},
		{"POST", "/users", jsonType + "Idempotency-Key: \"used\"\r\n",
			strings.Replace(john, "Doe", "Roe", 1)},
		{"POST", "/users", jsonType + "Idempotency-Key: \"\"\r\n", john},
		{"POST", "/users", "", john},
		{"POST", "/users", jsonType + "Transfer-Encoding: chunked\r\n", "2\r\n{}\r\n0\r\n\r\n"},
		{"POST", "/users", jsonType + "Transfer-Encoding: chunked\r\n", "zz"},
		{"POST", "/users", jsonType, strings.Repeat(" ", maxBodyBytes) + "{}"},
		{"PUT", "/users/1", jsonType, `{"name": "Jane", "password": "` + secret + `"}`},
		{"PUT", "/users/1", jsonType + "If-Match: \"1\"\r\n", `{"surname": " Roe "}`},
		{"PATCH", "/users/1", "Content-Type: application/merge-patch+json\r\n", `{"name": "Jane"}`},
		{"PATCH", "/users/1", jsonType + "If-Match: \"2\"\r\n", `{"name": "Jane"}`},
		{"PUT", "/users/2", jsonType, `[]`},
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
	} {
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
			return // net/http answers by itself
		}
		log := &logBuffer{}
		out := &logWriter{w: log}
		store := newMemory()
		store.createUser(t.Context(), input("John", "Doe", hash), "used")
		server := newHandler(testDependencies(memorySettings(), store, newLogger(out, slog.LevelDebug)))
		recorder := httptest.NewRecorder()
		aborted := serveOnce(server, &onceRecorder{ResponseRecorder: recorder, t: t}, r)
		out.flush()

		s := &service{t: t, log: log}
		completed := s.checkRequestLog(r, recorder.Header().Get("X-Trace-Id"))
		if aborted {
			if completed["status"] != 499.0 || recorder.Body.Len() > 0 {
				t.Fatalf("no answer to %q, but the log says %v", head, completed)
			}
			return
		}
		got := answer{recorder.Code, recorder.Header(), recorder.Body.String()}
		if got.status >= 500 || completed["status"] != float64(got.status) {
			t.Fatalf("%q %q: %d, and the log says %v", head, body, got.status, completed)
		}
		if want := wantTraceID(r.Header); want != "" && got.header.Get("X-Trace-Id") != want {
			t.Errorf("%q: the trace id is %q", head, got.header.Get("X-Trace-Id"))
		}
		if got.header.Get("Content-Type") == "application/json" && !json.Valid([]byte(got.body)) {
			t.Errorf("%q: no JSON: %s", head, got.body)
		}
		if (got.status == http.StatusMethodNotAllowed) != (got.header.Get("Allow") != "") {
			t.Errorf("%q: %d %v", head, got.status, got.header)
		}
		if mayTell(head+r.URL.Path, r.URL.Query(), body) { // so that no check takes an echo for a leak
			return
		}
		s.checkAnswer(r.Method, r.URL.EscapedPath(), got)
		log.check(t)
		if all := fmt.Sprint(got, log); strings.Contains(all, secret) || strings.Contains(all, hash) {
			t.Errorf("%q %q: the password is told: %s", head, body, all)
		}
	})
}

// serveOnce says whether the server ended the connection instead of an answer.
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

// checkRequestLog returns the second of the two lines that a log of one request has.
func (s *service) checkRequestLog(r *http.Request, id string) logLine {
	s.t.Helper()
	lines := s.log.lines("")
	if len(lines) != 2 || strings.Count(s.log.String(), "\n") != 2 {
		s.t.Fatalf("not the two lines of a request:\n%s", s.log)
	}
	for i, event := range []string{"Request started", "Request completed"} {
		line, path := lines[i], string([]rune(r.URL.Path))
		if line["event"] != event || line["trace_id"] != id || line["method"] != r.Method ||
			line["path"] != path {
			s.t.Errorf("%s %q has the line %v", r.Method, r.URL.Path, line)
		}
	}
	return lines[1]
}

// mayTell says whether a client has put a password where the service repeats what it gets:
// into the head, as the name of a member, or as the name of a user.
func mayTell(head string, query url.Values, body []byte) bool {
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
