package main

// Tests of what surrounds the handlers: middleware.go, access.go, tokens.go, problem.go, trace ids,
// health.go, and a fuzz test of whole requests.

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	cryptorand "crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"
)

// dial opens a connection for requests that net/http's client does not send. Its deadline is
// shorter than the time that the service waits for a body, so an answer that waits for one fails
// the test.
func (s *service) dial() *net.TCPConn {
	s.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(8 * time.Second)); err != nil {
		s.t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// write sends part of a request.
func (s *service) write(conn net.Conn, text string) {
	s.t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		s.t.Fatal(err)
	}
}

// send sends a request unchanged, and checks what holds for every answer.
func (s *service) send(request string) answer {
	s.t.Helper()
	method, rest, _ := strings.Cut(request, " ")
	target, _, _ := strings.Cut(rest, " ")
	line := method + " " + target
	conn := s.dial()
	defer conn.Close()
	s.write(conn, request)
	response, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		s.t.Fatalf("%s: %v", line, err)
	}
	content, err := io.ReadAll(response.Body)
	if err != nil {
		s.t.Fatalf("%s: reading the body: %v", line, err)
	}
	u, err := url.ParseRequestURI(target)
	if err != nil {
		s.t.Fatal(err)
	}
	a := answer{response.StatusCode, response.Header, string(content)}
	s.checkAnswer(method, u.EscapedPath(), a)
	return a
}

// serveHandler serves a handler at / and /x, within the middleware of the service.
func serveHandler(t *testing.T, h handler) *service {
	t.Helper()
	log := &logBuffer{}
	out := &logWriter{w: log}
	logger := newLogger(out, slog.LevelDebug)
	dependencies := testDependencies(settings{}, newMemory(), logger)
	server := newServer(dependencies, &traffic{}, newAccess(settings{}, nil),
		[]route{{"GET", "/{$}", h}, {"GET", "/x", h}})
	web := httptest.NewUnstartedServer(nil)
	web.Config = &newHTTPServer(server, testLimits, logger).Server
	web.Start()
	t.Cleanup(func() {
		web.Close()
		out.flush()
		log.check(t)
	})
	return &service{t: t, url: web.URL, log: log}
}

// TestLogLines checks the log lines of a request and of its event, with their keys in order.
func TestLogLines(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		created := s.do("POST", "/users/?x=1", john, "X-Request-Id: trace-1")
		s.waitForLine("Received event user.created with user_id=1", "trace_id", "trace-1")
		completed := s.waitForLine("Request completed", "trace_id", "trace-1")
		if completed["bytes"] != float64(len(created.body)) {
			t.Errorf("bytes: %v, want %d", completed["bytes"], len(created.body))
		}
		const head = `{"timestamp":"T","level":"INFO","event":"`
		wanted := []string{
			head + `Request started","trace_id":"trace-1","method":"POST","path":"/users/"`,
			head + `Request completed","trace_id":"trace-1","method":"POST","path":"/users/",` +
				`"status":201,"duration_ms":N,"bytes":N`,
			head + `Received event user.created with user_id=1","trace_id":"trace-1",` +
				`"event_type":"user.created","user_id":1,"version":1`,
		}
		var lines []string
		for line := range strings.Lines(s.log.String()) {
			if strings.Contains(line, "trace-1") {
				lines = append(lines, maskValues(line))
			}
		}
		for _, want := range wanted { // more keys may follow
			matches := func(line string) bool { return strings.HasPrefix(line, want) }
			if !slices.ContainsFunc(lines, matches) {
				t.Errorf("no line begins with\n%s\nlines:\n%s", want, lines)
			}
		}
		if len(lines) != len(wanted) {
			t.Errorf("%d lines, want %d:\n%s", len(lines), len(wanted), lines)
		}
	})
}

// maskValues replaces the values of a log line that a test cannot predict: times by T, durations
// and sizes by N.
func maskValues(line string) string {
	times := regexp.MustCompile(`"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"`)
	numbers := regexp.MustCompile(`"(duration_ms|bytes)":\d+(\.\d+)?`)
	return numbers.ReplaceAllString(times.ReplaceAllString(line, `"T"`), `"$1":N`)
}

// TestRequestLog checks that the log has the method, the decoded path, the status and the size of
// each request.
func TestRequestLog(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	for i, test := range []struct {
		method, target, path string
		status               int
	}{
		{"GET", "/users/%31?page=1", "/users/1", http.StatusOK},
		{"HEAD", "/users/1", "/users/1", http.StatusOK},
		{"GET", "/users/2", "/users/2", http.StatusNotFound},
		{"HEAD", "/users/2", "/users/2", http.StatusNotFound},
		{"GET", "/users/1%2F2", "/users/1/2", http.StatusNotFound},
		{"GET", "/a%20b%22%0A%C3%A9?x=1", "/a b\"\n\u00e9", http.StatusNotFound},
		{"FOO", "/users", "/users", http.StatusMethodNotAllowed},
		{"GET", "/users?x=1", "/users", http.StatusBadRequest},
		{"GET", "/", "/", http.StatusFound},
		{"GET", "/readyz", "/readyz", http.StatusOK},
		{"OPTIONS", "*", "*", http.StatusNotFound},
		{"GET", "http://elsewhere/healthz?x=1", "/healthz", http.StatusOK},
	} {
		id := fmt.Sprint("trace-", i)
		a := s.send(fmt.Sprintf("%s %s HTTP/1.1\r\nHost: test\r\nX-Request-Id: %s\r\n\r\n",
			test.method, test.target, id))
		if a.status != test.status {
			t.Errorf("%s %s: status %d, want %d: %s",
				test.method, test.target, a.status, test.status, a.body)
		}
		level := "INFO"
		if test.path == "/readyz" || test.path == "/healthz" {
			level = "DEBUG"
		}
		common := []any{"trace_id", id, "level", level, "method", test.method, "path", test.path}
		s.waitForLine("Request started", common...)
		line := s.waitForLine("Request completed",
			append(common, "status", test.status, "bytes", len(a.body))...)
		if duration, ok := line["duration_ms"].(float64); !ok || duration <= 0 {
			t.Errorf("%s %s: duration_ms %v, want a positive number",
				test.method, test.target, line["duration_ms"])
		}
	}
}

// TestMethodNotAllowed checks the 405 and its Allow header for each method that a path does not
// have.
func TestMethodNotAllowed(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	methods := strings.Fields("GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT FOO get")
	for path, allow := range map[string]string{
		"/users":                   "GET, HEAD, POST",
		"/users/":                  "GET, HEAD, POST",
		"/users/1":                 "GET, HEAD, PUT, PATCH, DELETE", // the user does not exist
		"/users/%37":               "GET, HEAD, PUT, PATCH, DELETE",
		"/users/1?x=1":             "GET, HEAD, PUT, PATCH, DELETE",
		"/docs":                    "GET, HEAD",
		"/docs/":                   "GET, HEAD",
		"/docs/swagger-ui.css":     "GET, HEAD",
		"/openapi.json":            "GET, HEAD",
		"/schema":                  "GET, HEAD",
		"/":                        "GET, HEAD",
		"/healthz":                 "GET, HEAD",
		"/readyz":                  "GET, HEAD",
		"/metrics":                 "GET, HEAD",
		"http://elsewhere/healthz": "GET, HEAD",
	} {
		for _, method := range methods {
			if slices.Contains(strings.Split(allow, ", "), method) ||
				// The target of CONNECT is an authority.
				method == "CONNECT" && !strings.HasPrefix(path, "/") {
				continue
			}
			a := s.send(method + " " + path + " HTTP/1.1\r\nHost: test\r\n\r\n")
			if got := a.header["Allow"]; a.status != http.StatusMethodNotAllowed ||
				!slices.Equal(got, []string{allow}) {
				t.Errorf("%s %s: status %d, Allow %q, want 405, %q",
					method, path, a.status, got, allow)
			}
		}
	}
}

// TestNotFound checks that a path without a route is 404 for every method.
func TestNotFound(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	for _, target := range []string{
		"/nothing", "/users/1/", "/users/1/name", "/users/one", "/Users", "/users.json", "/user",
		"/healthz/", "/readyz/", "/metrics/", "/openapi.json/", "/schema/",
		"/docs/nothing", "/docs/nothing/x", "/docs/..%2f..%2fschema.sql",
		"/index.html", "/%75sers/01", "/favicon.ico?x=1",
		"http://elsewhere/nothing",
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "FOO"} {
			a := s.send(method + " " + target + " HTTP/1.1\r\nHost: test\r\n\r\n")
			if a.status != http.StatusNotFound || a.header.Get("Allow") != "" {
				t.Errorf("%s %s: status %d, Allow %q, want 404 without Allow: %s",
					method, target, a.status, a.header["Allow"], a.body)
			}
		}
	}
	for _, line := range []string{
		"OPTIONS *", "CONNECT elsewhere:443", "CONNECT /nothing", "CONNECT /users/one",
	} {
		a := s.send(line + " HTTP/1.1\r\nHost: test\r\n\r\n")
		if a.status != http.StatusNotFound {
			t.Errorf("%s: status %d, want 404: %s", line, a.status, a.body)
		}
	}
}

// TestHead checks that HEAD returns the status and the headers of GET, without a body.
func TestHead(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		for range 3 {
			s.createUser("John", "Doe")
		}
		for _, path := range []string{
			"/users", "/users/?page=2&per_page=1", "/users?page=0",
			"/users/1", "/users/9", "/users/x", "/nothing",
			"/docs", "/docs/", "/docs/start.js", "/docs/swagger-ui.css", "/openapi.json",
			"/schema", "/", "/healthz", "/readyz", "/metrics",
		} {
			const plain = "Accept-Encoding: identity" // net/http's client would ask for gzip
			get, head := s.do("GET", path, "", plain), s.do("HEAD", path, "", plain)
			if head.status != get.status || head.body != "" {
				t.Errorf("HEAD %s: status %d, body %q, want %d without a body",
					path, head.status, head.body, get.status)
			}
			for _, name := range []string{
				"Content-Type", "Content-Length", "ETag", "Link", "Location",
			} {
				redirects := get.status == http.StatusFound // without Content-Length for HEAD
				if name == "Content-Length" && (path == "/metrics" || redirects) {
					continue // the metrics change with every request
				}
				if got, want := head.header.Get(name), get.header.Get(name); got != want {
					t.Errorf("HEAD %s: %s %q, want %q", path, name, got, want)
				}
			}
		}
	})
}

// TestRedirects checks the redirects to /docs and from unclean paths.
func TestRedirects(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for path, want := range map[string]string{
		"/":                   "docs", // relative, for a proxy that adds a prefix
		"/schema":             "docs",
		"/docs/":              "../docs",
		"//users":             "/users",
		"/a/../users":         "/users",
		"/./users/":           "/users/",
		"/users//?per_page=5": "/users/?per_page=5",
		"//users/1":           "/users/1",
	} {
		for _, method := range []string{"GET", "HEAD"} {
			a := s.send(method + " " + path + " HTTP/1.1\r\nHost: test\r\n\r\n")
			if a.status/100 != 3 || a.header.Get("Location") != want {
				t.Errorf("%s %s: status %d, Location %q, want a redirect to %q",
					method, path, a.status, a.header.Get("Location"), want)
			}
		}
	}
	// Both spellings of the list are routes.
	for _, path := range []string{"/users", "/users/"} {
		if a := s.do("GET", path, ""); a.status != http.StatusOK {
			t.Errorf("GET %s: status %d, want 200", path, a.status)
		}
	}
}

// panicking is a handler that panics before it answers.
func panicking(*response, *http.Request, caller) error {
	panic("at 10.0.0.1")
}

// TestPanicInAnswer checks that the connection is aborted if a handler panics within its answer, so
// that the client does not take the answer for complete.
func TestPanicInAnswer(t *testing.T) {
	t.Parallel()
	s := serveHandler(t, func(w *response, r *http.Request, by caller) error {
		io.WriteString(w, "half")
		w.ResponseWriter.(http.Flusher).Flush()
		panic("in the middle")
	})
	s.log.allowErrors(1)
	response, err := client.Get(s.url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if content, err := io.ReadAll(response.Body); err == nil {
		t.Errorf("the client received a complete answer: %s", content)
	}
	s.waitForLine("Request completed")
	if failures := s.log.lines("Request failed"); len(failures) != 1 {
		t.Errorf("%d lines \"Request failed\", want 1: %v", len(failures), failures)
	}
}

// TestClientLeavesInBody closes the connection in each way that TCP has, before the body is
// complete: the status in the log is 499, and nothing changes.
func TestClientLeavesInBody(t *testing.T) {
	t.Parallel()
	const head = " HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nX-Request-Id: "
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	leave := map[string]func(*net.TCPConn) error{
		"close": (*net.TCPConn).Close,
		"half":  (*net.TCPConn).CloseWrite,
		"reset": func(conn *net.TCPConn) error { conn.SetLinger(0); return conn.Close() },
	}
	for _, target := range []string{"POST /users", "PUT /users/1", "PATCH /users/1"} {
		for how, leave := range leave {
			for framing, rest := range map[string]string{
				"length":       "Content-Length: 100\r\n\r\n",
				"begun":        "Content-Length: 100\r\n\r\n{\"name\"",
				"whole-object": "Content-Length: 100\r\n\r\n" + john,
				"chunks":       "Transfer-Encoding: chunked\r\n\r\n",
				"in-chunk":     "Transfer-Encoding: chunked\r\n\r\n64\r\n{\"name\"",
				"behind-chunk": "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
			} {
				id := fmt.Sprintf("%.4s-%s-%s", target, how, framing)
				id = strings.ReplaceAll(id, " ", "")
				conn := s.dial()
				s.write(conn, target+head+id+"\r\n"+rest)
				s.waitForLine("Request started", "trace_id", id)
				if err := leave(conn); err != nil {
					t.Fatal(err)
				}
				s.waitForLine("Request completed", "trace_id", id, "status", 499, "level", "INFO")
				// After "half", the client can still read.
				if got, _ := io.ReadAll(conn); len(got) > 0 {
					t.Errorf("%s: status 499 in the log, but the client received %s", id, got)
				}
			}
		}
	}
	if a := s.do("GET", "/users", ""); a.json(t, "total") != 1.0 {
		t.Errorf("total %v, want 1: an incomplete body made a user", a.json(t, "total"))
	}
}

// TestClientLeavesInHandler checks that the status in the log is 499 if the client leaves before
// the handler returns, whatever the handler returns.
func TestClientLeavesInHandler(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]handler{
		"context error": func(_ *response, r *http.Request, _ caller) error {
			return fmt.Errorf("waiting: %w", r.Context().Err())
		},
		"answer": func(w *response, _ *http.Request, _ caller) error {
			return writeJSON(w, http.StatusOK, "too late")
		},
		"404": func(*response, *http.Request, caller) error { return errNotFound },
		"503": func(*response, *http.Request, caller) error { return errUnavailable },
	} {
		s := serveHandler(t, func(w *response, r *http.Request, by caller) error {
			<-r.Context().Done()
			return end(w, r, by)
		})
		conn := s.dial()
		s.write(conn, "GET /x HTTP/1.1\r\nHost: test\r\n\r\n")
		s.waitForLine("Request started")
		conn.Close()
		line := s.waitForLine("Request completed")
		if line["status"] != 499.0 || line["level"] != "INFO" {
			t.Errorf("%s: log line %v, want the status 499 at INFO", name, line)
		}
	}
}

// TestPanicAfterClientLeft checks that a panic is logged although the client has left.
func TestPanicAfterClientLeft(t *testing.T) {
	t.Parallel()
	s := serveHandler(t, func(w *response, r *http.Request, by caller) error {
		<-r.Context().Done()
		return panicking(w, r, by)
	})
	s.log.allowErrors(1)
	conn := s.dial()
	s.write(conn, "GET /x HTTP/1.1\r\nHost: test\r\n\r\n")
	s.waitForLine("Request started")
	conn.Close()
	s.waitForLine("Request completed")
	if failures := s.log.lines("Request failed"); len(failures) != 1 {
		t.Errorf("%d lines \"Request failed\", want 1: %v", len(failures), failures)
	}
}

// lockUsers locks the table users until unlock is called. waitBlocked returns when a statement
// waits for the lock.
func lockUsers(s *service) (waitBlocked, unlock func()) {
	s.t.Helper()
	conn := connect(s.t, s.settings.databaseURL)
	execute := func(sql string) {
		if _, err := conn.Exec(s.t.Context(), sql); err != nil {
			s.t.Fatal(err)
		}
	}
	execute("BEGIN; LOCK TABLE users")
	waitBlocked = func() {
		eventually(s.t, "a statement that waits", func() bool {
			return queryValue[bool](s.t, conn, `SELECT EXISTS (SELECT FROM pg_locks
				WHERE relation = 'users'::regclass AND NOT granted)`)
		})
	}
	return waitBlocked, func() { execute("ROLLBACK") }
}

// TestLockedTable checks that a request that waits too long for a lock is answered with 503, and
// that one whose client leaves meanwhile is logged with 499.
func TestLockedTable(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	s.createUser("John", "Doe")
	waitBlocked, unlock := lockUsers(s)
	impatient := s.dial()
	s.write(impatient, "GET /users/1 HTTP/1.1\r\nHost: test\r\nX-Request-Id: impatient\r\n\r\n")
	waitBlocked()
	impatient.Close()
	a := s.do("PUT", "/users/1", `{"name": "Jane"}`, "X-Request-Id: patient")
	if a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
		t.Errorf("PUT during a lock: status %d, Retry-After %q, want 503 with Retry-After: %s",
			a.status, a.header.Get("Retry-After"), a.body)
	}
	s.waitForLine("Request completed", "trace_id", "patient", "status", 503, "level", "WARN")
	s.waitForLine("Request completed", "trace_id", "impatient", "status", 499, "level", "INFO")
	unlock()
	if a := s.do("GET", "/users/1", ""); a.header.Get("ETag") != `"1"` {
		t.Errorf("GET after the lock: status %d, ETag %s, want an unchanged user: %s",
			a.status, a.header.Get("ETag"), a.body)
	}
}

// TestChangeOutlivesClient checks that a change is committed with its event although the client
// left after it began.
func TestChangeOutlivesClient(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	s.createUser("John", "Doe")
	waitBlocked, unlock := lockUsers(s)
	gone := s.dial()
	s.write(gone, "DELETE /users/1 HTTP/1.1\r\nHost: test\r\nX-Request-Id: gone\r\n\r\n")
	waitBlocked()
	gone.Close()
	unlock()
	s.waitForLine("Received event user.deleted with user_id=1", "trace_id", "gone")
	s.waitForLine("Request completed", "trace_id", "gone", "level", "INFO")
}

// TestHalfClosedClient checks that a client that closes only its half of the connection receives the
// answer, and that the log has its status.
func TestHalfClosedClient(t *testing.T) {
	t.Parallel()
	s := serveHandler(t, func(w *response, r *http.Request, _ caller) error {
		<-r.Context().Done()
		return writeJSON(w, http.StatusAccepted, "in time")
	})
	conn := s.dial()
	s.write(conn, "GET /x HTTP/1.1\r\nHost: test\r\n\r\n")
	s.waitForLine("Request started")
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, _ := io.ReadAll(conn); !bytes.HasPrefix(got, []byte("HTTP/1.1 202")) ||
		!bytes.Contains(got, []byte("in time")) {
		t.Errorf("the client received %q, want the answer 202", got)
	}
	s.waitForLine("Request completed", "status", 202, "level", "INFO")
}

// TestLongPath checks that the log and the answer repeat 1 KiB of a path and of a method at most, and
// no torn character.
func TestLongPath(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	method := strings.Repeat("M", 2000)
	a := s.send(method + " /x" + strings.Repeat("%C3%A9", 1000) + " HTTP/1.1\r\nHost: test\r\n\r\n")
	if a.status != http.StatusNotFound || len(a.body) > 4000 {
		t.Errorf("status %d, %d bytes, want 404 and at most 4000 bytes", a.status, len(a.body))
	}
	for _, event := range []string{"Request started", "Request completed"} {
		s.waitForLine(event, "method", method[:1024], "path", "/x"+strings.Repeat("é", 511))
	}
}

// TestConnectMethod checks that CONNECT is like every method that a path does not have.
func TestConnectMethod(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for target, want := range map[string]int{
		"/users": 405, "/users/1": 405, "/users/1/password/verify": 405, "/users//password/verify": 307,
		"/users/../users": 307, "//users": 307, "example.com:443": 404,
	} {
		a := s.send("CONNECT " + target + " HTTP/1.1\r\nHost: test\r\n\r\n")
		if a.status != want || (a.header.Get("Allow") != "") != (want == 405) {
			t.Errorf("CONNECT %s: status %d, Allow %q, want %d", target, a.status, a.header["Allow"], want)
		}
		s.waitForLine("Request completed", "method", "CONNECT")
	}
}

// TestChunkedBodyEndsConnection checks that no second request is read after a chunked body.
func TestChunkedBodyEndsConnection(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for name, start := range map[string]string{
		"chunked":           "HTTP/1.1\r\n",
		"both":              "HTTP/1.1\r\nContent-Length: 3\r\n",
		"HTTP/1.0":          "HTTP/1.0\r\nConnection: keep-alive\r\n",
		"HTTP/1.0 and both": "HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 12\r\n",
	} {
		conn := s.dial()
		s.write(conn, "POST /users "+start+"Host: test\r\nContent-Type: application/json\r\n"+
			"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"+
			"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n")
		got, err := io.ReadAll(conn)
		if err != nil || bytes.Count(got, []byte("HTTP/1.")) != 1 ||
			!bytes.Contains(got, []byte("Connection: close\r\n")) {
			t.Errorf("%s: want one answer and Connection: close, got %v %s", name, err, got)
		}
	}
}

// TestLocalHosts checks which hosts are answered by a service that only this machine can reach.
func TestLocalHosts(t *testing.T) {
	t.Parallel()
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	_, key := newTestKey(t, "shop", false)
	for host, local := range map[string]bool{
		"localhost": true, "LOCALHOST:8000": true, "localhost.": true, "app.localhost:8000": true,
		"127.0.0.1": true, "127.9.9.9:8000": true, "[::1]": true, "[::1]:8000": true, name: true,
		"example.com": false, "example.com:8000": false, "localhost.example.com": false,
		"10.0.0.1": false, "notlocalhost": false, "127.0.0.1.example.com": false, "": false,
	} {
		for _, test := range []struct {
			settings settings
			checks   bool
		}{
			{settings{host: "127.0.0.1"}, true},
			{settings{host: "::1"}, true},
			{settings{host: "localhost"}, true},
			{settings{host: "127.0.0.1", open: true}, false},
			{settings{host: "127.0.0.1", apiKeys: []apiKey{key}}, false},
			{settings{host: "0.0.0.0"}, false},
		} {
			log := discardLog
			r := httptest.NewRequest("GET", "/docs", nil)
			r.Host = host
			w := httptest.NewRecorder()
			newHandler(testDependencies(test.settings, newMemory(), log)).ServeHTTP(w, r)
			if refused := w.Code == http.StatusForbidden; refused != (test.checks && !local) {
				t.Errorf("%+v: host %q: status %d", test, host, w.Code)
			}
		}
	}
}

// TestBodiesShareMemory checks that large bodies beyond a number of bytes are refused, that small
// bodies are not, and that a client gets only half of the bytes.
func TestBodiesShareMemory(t *testing.T) {
	t.Parallel()
	d := testDependencies(memorySettings(), newMemory(), discardLog)
	d.limits.bodies = 6 * maxBodyBytes
	server := newHandler(d)
	large := john[:len(john)-1] + strings.Repeat(" ", maxBodyBytes-len(john)) + "}"
	arrived, finish := make(chan struct{}), make(chan struct{})
	var group sync.WaitGroup
	for range 3 {
		body := io.MultiReader(strings.NewReader(large[:9]), onRead(func() {
			arrived <- struct{}{}
			<-finish
		}), strings.NewReader(large[9:]))
		group.Go(func() {
			if a := ask(server, "POST", "/users", body); a.status != 201 {
				t.Errorf("a large body within the limit: status %d, want 201", a.status)
			}
		})
		<-arrived
	}
	if a := ask(server, "POST", "/users", strings.NewReader(large)); a.status != 503 {
		t.Errorf("a large body over the limit: status %d, want 503", a.status)
	}
	if a := ask(server, "POST", "/users", strings.NewReader(john)); a.status != 201 {
		t.Errorf("a small body: status %d, want 201", a.status)
	}
	other := httptest.NewRequest("POST", "/users", strings.NewReader(large))
	other.Header.Set("Content-Type", "application/json")
	other.RemoteAddr = "192.0.2.77:1"
	recorder := httptest.NewRecorder()
	if server.ServeHTTP(recorder, other); recorder.Code != 201 {
		t.Errorf("a large body of another client: status %d, want 201", recorder.Code)
	}
	close(finish)
	group.Wait()
	if a := ask(server, "POST", "/users", strings.NewReader(large)); a.status != 201 {
		t.Errorf("a large body later: status %d, want 201", a.status)
	}
}

// onRead is an empty io.Reader that calls a function.
type onRead func()

func (f onRead) Read([]byte) (int, error) {
	f()
	return 0, io.EOF
}

// TestCheapRefusals checks that the answer to a refused request is small and lists 20 errors at most,
// whatever the request repeats.
func TestCheapRefusals(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	names := func(name string) string { // as many as the largest body has
		one := `"` + name + `":0,`
		return "{" + strings.Repeat(one, (maxBodyBytes-20)/len(one)) + `"name":"x"}`
	}
	query := func(part string) string { return "/users?" + strings.Repeat(part, 7000/len(part)) }
	for name, test := range map[string]struct {
		method, path, body string
		more               bool // errors than are listed
	}{
		"empty names":    {"POST", "/users", names(""), true},
		"wide names":     {"POST", "/users", names(strings.Repeat("\U0001f600", 300)), true},
		"one name":       {"POST", "/users", names(strings.Repeat("é", 32_000)), false},
		"escaped names":  {"POST", "/users", names(strings.Repeat("\\u0001", 500)), true},
		"repeated names": {"PUT", "/users/1", names("name"), true},
		"long value":     {"POST", "/users", `{"name":"` + strings.Repeat("x", 65_000) + `"}`, false},
		"surrogates":     {"POST", "/users", `{"name":"` + strings.Repeat("\\ud800", 10_000) + `"}`, false},
		"backslashes":    {"POST", "/users", `{"name":"` + strings.Repeat("\\\\", 16_000) + `"}`, false},
		"deep value":     {"POST", "/users", `{"name":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + "}", false},
		"parameters":     {"GET", query("%E2%82%AC=&"), "", false},
		"more parameters": {"GET", func() string {
			path := "/users?"
			for i := range 1000 {
				path += fmt.Sprintf("%d&", i)
			}
			return path
		}(), "", true},
		"long path": {"GET", "/" + strings.Repeat("&", 7000), "", false},
	} {
		a := s.do(test.method, test.path, test.body)
		listed, _ := a.json(t, "errors").([]any)
		if a.status < 400 || len(a.body) > 16<<10 || len(listed) > 20 {
			t.Errorf("%s: status %d, %d bytes, %d errors, want at most 16 KiB and 20 errors",
				name, a.status, len(a.body), len(listed))
		}
		if more := strings.HasPrefix(fmt.Sprint(a.json(t, "detail")), "More than 20 "); more != test.more {
			t.Errorf("%s: detail %q, says that there are more errors: %t", name, a.json(t, "detail"), more)
		}
		for _, e := range listed {
			pointer, _ := url.PathUnescape(fmt.Sprint(e.(map[string]any)["pointer"]))
			if utf8.RuneCountInString(pointer) > 2+100 || !utf8.ValidString(pointer) {
				t.Errorf("%s: pointer %q, want at most 100 whole characters", name, pointer)
			}
		}
	}
}

// BenchmarkRefusal measures the processor time of a refused body of 64 KiB.
func BenchmarkRefusal(b *testing.B) {
	for name, body := range map[string]string{
		"members":     "{" + strings.Repeat(`"":0,`, 13_000) + `"":0}`,
		"surrogates":  `{"name":"` + strings.Repeat("\\ud800", 10_000) + `"}`,
		"backslashes": `{"name":"` + strings.Repeat("\\\\", 16_000) + `"}`,
		"deep":        `{"name":` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + "}",
		"name":        `{"` + strings.Repeat("é", 32_000) + `":0}`,
		"plain":       `{"name":"` + strings.Repeat("x", 65_000) + `"}`,
	} {
		server := newHandler(testDependencies(memorySettings(), newMemory(), discardLog))
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if a := ask(server, "POST", "/users", strings.NewReader(body)); a.status != 400 {
					b.Fatal(a.body)
				}
			}
		})
	}
}

// TestOverload checks that only probes are answered while too many requests are in progress.
func TestOverload(t *testing.T) {
	t.Parallel()
	d := testDependencies(settings{}, newMemory(), discardLog)
	server := newHandler(d).(*server)
	s := serveInProcess(t, server)
	server.traffic.requests.Store(int64(d.limits.requests))
	for path, want := range map[string]int{
		"/users": 503, "/docs": 503, "/healthz": 200, "/readyz": 200,
	} {
		a := s.do("GET", path, "")
		if a.status != want || (a.header.Get("Retry-After") != "") != (want == 503) {
			t.Errorf("GET %s: status %d, Retry-After %q, want status %d", path, a.status,
				a.header.Get("Retry-After"), want)
		}
	}
	server.traffic.requests.Add(-1)
	if a := s.do("GET", "/users", ""); a.status != 200 {
		t.Errorf("GET /users below the limit: status %d, want 200", a.status)
	}
}

// newTestKey returns a new API key and its entry for API_KEYS, parsed.
func newTestKey(t *testing.T, name string, readOnly bool) (string, apiKey) {
	t.Helper()
	text, setting, err := newAPIKey(name, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	key, err := parseAPIKey(setting)
	if err != nil || key.name != name || !slices.Contains(key.scopes, scopeWrite) != readOnly ||
		key.digest != sha256.Sum256([]byte(text)) {
		t.Fatalf("parseAPIKey(%q): got %+v, %v, want %q, %t, the digest of the key", setting, key, err,
			name, readOnly)
	}
	return text, key
}

// TestAPIKeys checks which routes require an API key, what a read-only key allows, and that no key
// appears in the log.
func TestAPIKeys(t *testing.T) {
	t.Parallel()
	full, fullKey := newTestKey(t, "shop", false)
	read, readKey := newTestKey(t, "report", true)
	set := memorySettings()
	set.apiKeys = []apiKey{fullKey, readKey}
	s := startService(t, set)
	user := fmt.Sprintf(`{"name": "Ann", "surname": "Lee", "password": %q}`, secret)
	verify := fmt.Sprintf(`{"password": %q}`, secret)
	for _, test := range []struct {
		method  string
		path    string
		body    string
		headers []string
		want    int
	}{
		{method: "POST", path: "/users", body: user, headers: []string{bearer(full)}, want: 201},
		{method: "POST", path: "/users", body: user, want: 401},
		{method: "POST", path: "/users", body: user, headers: []string{bearer(read)}, want: 403},
		{method: "GET", path: "/users", want: 401},
		{method: "GET", path: "/users/", want: 401},
		{method: "GET", path: "/users/abc", want: 404},
		{method: "PUT", path: "/users/007", body: user, want: 404},
		{method: "POST", path: "/users/01/password/verify", body: verify, want: 404},
		{method: "GET", path: "/users/1", want: 401},
		{method: "HEAD", path: "/users/1", want: 401},
		{method: "GET", path: "/users/1", headers: []string{bearer(full)}, want: 200},
		{method: "GET", path: "/users/1", headers: []string{bearer(read)}, want: 200},
		{method: "HEAD", path: "/users/1", headers: []string{bearer(read)}, want: 200},
		{method: "GET", path: "/users/1", headers: []string{"Authorization: bearer  " + full}, want: 200},
		{method: "GET", path: "/users/1", headers: []string{"Authorization: Basic " + full}, want: 401},
		{method: "GET", path: "/users/1", headers: []string{"Authorization: " + full}, want: 401},
		{method: "GET", path: "/users/1", headers: []string{"Authorization: Bearer"}, want: 401},
		{method: "GET", path: "/users/1", headers: []string{bearer(full + "x")}, want: 401},
		{method: "GET", path: "/users/1", headers: []string{bearer(full[:len(full)-1])}, want: 401},
		{method: "GET", path: "/users/1", headers: []string{bearer(full), bearer(full)}, want: 401},
		{method: "GET", path: "/users/1", headers: []string{bearer(fmt.Sprintf("%x", fullKey.digest))}, want: 401},
		{method: "PUT", path: "/users/1", body: user, headers: []string{bearer(read)}, want: 403},
		{method: "PATCH", path: "/users/1", body: user, headers: []string{bearer(read)}, want: 403},
		{method: "DELETE", path: "/users/1", headers: []string{bearer(read)}, want: 403},
		{method: "DELETE", path: "/users/1", want: 401},
		{method: "POST", path: "/users/1/password/verify", body: verify, want: 401},
		{method: "POST", path: "/users/1/password/verify", body: verify, headers: []string{bearer(read)}, want: 403},
		{method: "POST", path: "/users/1/password/verify", body: verify, headers: []string{bearer(full)}, want: 200},
		{method: "GET", path: "/metrics", want: 401},
		{method: "GET", path: "/metrics", headers: []string{bearer(read)}, want: 200},
		{method: "GET", path: "/docs", want: 200},
		{method: "GET", path: "/docs/start.js", want: 200},
		{method: "GET", path: "/openapi.json", want: 200},
		{method: "GET", path: "/healthz", want: 200},
		{method: "GET", path: "/readyz", want: 200},
		{method: "GET", path: "/nothing", want: 404},
		{method: "TRACE", path: "/users", want: 405},
		{method: "DELETE", path: "/users/1", headers: []string{bearer(full)}, want: 200},
	} {
		a := s.do(test.method, test.path, test.body, test.headers...)
		challenge := a.header.Get("WWW-Authenticate")
		if a.status != test.want || (challenge == "Bearer") != (a.status == 401) {
			t.Errorf("%s %s with %.40v: status %d, WWW-Authenticate %q, want status %d", test.method,
				test.path, test.headers, a.status, challenge, test.want)
		}
	}
	if err := s.stop(); err != nil { // this flushes the log
		t.Fatal(err)
	}
	logged := make(map[any]int)
	for _, line := range s.log.lines("Request completed") {
		logged[line["key"]]++
	}
	if logged["shop"] != 5 || logged["report"] != 8 {
		t.Errorf("logged requests by key: got %v, want 5 of shop and 8 of report", logged)
	}
	for _, key := range []string{full, read, full[4:], fmt.Sprintf("%x", fullKey.digest)} {
		if strings.Contains(s.log.String(), key) {
			t.Errorf("the log contains the key or digest %s", key)
		}
	}
}

// TestKeyCommand checks the exit codes of the command key, and that the setting it prints accepts the
// key it prints.
func TestKeyCommand(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args []string
		want int
	}{
		{args: []string{"key", "shop"}, want: 0},
		{args: []string{"key", "report", "read"}, want: 0},
		{args: []string{"key"}, want: 2},
		{args: []string{"key", "a b"}, want: 2},
		{args: []string{"key", "shop", "write"}, want: 2},
		{args: []string{"key", strings.Repeat("x", 65)}, want: 2},
	} {
		var out bytes.Buffer
		if code := command(t.Context(), test.args, streams{out: &out, err: &out}); code != test.want {
			t.Errorf("%q: exit code %d, want %d: %s", test.args, code, test.want, &out)
		}
		if test.want > 0 {
			continue
		}
		key := regexp.MustCompile(`(?m)^usk_[A-Za-z0-9_-]{43}$`).FindString(out.String())
		setting := regexp.MustCompile(`(?m)^API_KEYS=(.*)$`).FindStringSubmatch(out.String())
		if key == "" || setting == nil {
			t.Fatalf("%q: got no key and setting: %s", test.args, &out)
		}
		got, err := loadSettings(envOf("API_KEYS", setting[1]))
		if err != nil || len(got.apiKeys) != 1 || got.apiKeys[0].name != test.args[1] ||
			!slices.Contains(got.apiKeys[0].scopes, scopeWrite) != (len(test.args) == 3) ||
			got.apiKeys[0].digest != sha256.Sum256([]byte(key)) {
			t.Errorf("loadSettings of %s: got %+v, %v", &out, got.apiKeys, err)
		}
	}
}

// TestRateLimit checks which requests share a rate limit, and the headers of their answers. The rate is
// one request in 100 seconds, and the clock stands still.
func TestRateLimit(t *testing.T) {
	t.Parallel()
	key, setting := newTestKey(t, "shop", false)
	set := memorySettings()
	set.rateLimit, set.apiKeys = 0.01, []apiKey{setting}
	set.trustedProxies = []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")}
	synctest.Test(t, func(t *testing.T) {
		log := discardLog
		s := serveInProcess(t, newHandler(testDependencies(set, newMemory(), log)))
		for i, test := range []struct {
			path   string
			header string
			want   int
		}{
			{path: "/docs", want: 200},
			{path: "/docs", want: 429},
			{path: "/nothing", want: 429},
			{path: "/users", header: "Authorization: Bearer wrong", want: 429},
			{path: "/healthz", want: 200},
			{path: "/readyz", want: 200},
			{path: "/users", header: "Authorization: Bearer " + key, want: 200},
			{path: "/users", header: "Authorization: Bearer " + key, want: 429},
			{path: "/docs", header: "X-Forwarded-For: 192.0.2.7", want: 200},
			{path: "/docs", header: "X-Forwarded-For: 192.0.2.7, 192.0.2.1", want: 429},
			{path: "/docs", header: "X-Forwarded-For: 198.51.100.1, 192.0.2.7", want: 429},
			{path: "/docs", header: "X-Forwarded-For: 2001:db8::1", want: 200},
			{path: "/docs", header: "X-Forwarded-For: 2001:db8::ffff", want: 429},
			{path: "/docs", header: "X-Forwarded-For: nonsense", want: 429},
		} {
			a := s.do("GET", test.path, "", test.header)
			if a.status != test.want {
				t.Errorf("request %d: status %d, want %d", i, a.status, test.want)
			}
			want := map[string]string{"RateLimit": `"client";r=0;t=100`,
				"RateLimit-Policy": `"client";q=1;w=100`}
			if test.path == "/healthz" || test.path == "/readyz" {
				want = nil // probes have no limit
			} else if test.want == 429 {
				want["Retry-After"] = "100"
			}
			for _, name := range []string{"RateLimit", "RateLimit-Policy", "Retry-After"} {
				if got := a.header.Get(name); got != want[name] {
					t.Errorf("request %d: %s: got %q, want %q", i, name, got, want[name])
				}
			}
		}
		time.Sleep(100 * time.Second)
		if a := s.do("GET", "/docs", ""); a.status != 200 {
			t.Errorf("after 100 s: status %d, want 200", a.status)
		}
	})
}

// TestClientNetwork checks which address a request counts for, with and without trusted proxies.
func TestClientNetwork(t *testing.T) {
	t.Parallel()
	a := &access{proxies: []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}}
	for _, test := range []struct {
		peer      string
		forwarded []string // X-Forwarded-For
		standard  []string // Forwarded
		want      string
	}{
		{peer: "192.0.2.1:1", want: "192.0.2.1"},
		{peer: "192.0.2.1:1", forwarded: []string{"198.51.100.1"}, want: "192.0.2.1"},
		{peer: "10.0.0.1:1", want: "10.0.0.1"},
		{peer: "10.0.0.1:1", forwarded: []string{"198.51.100.1"}, want: "198.51.100.1"},
		{peer: "[::ffff:10.0.0.1]:1", forwarded: []string{"198.51.100.1"}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", forwarded: []string{"203.0.113.9, 198.51.100.1"}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", forwarded: []string{"203.0.113.9", "198.51.100.1,10.2.3.4"}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", forwarded: []string{"198.51.100.1, unknown"}, want: "10.0.0.1"},
		{peer: "10.0.0.1:1", forwarded: []string{"198.51.100.1:77"}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", forwarded: []string{"[2001:db8::7]:77"}, want: "2001:db8::/64"},
		{peer: "10.0.0.1:1", forwarded: []string{"[2001:db8::7]"}, want: "2001:db8::/64"},
		{peer: "10.0.0.1:1", forwarded: []string{"::ffff:198.51.100.1"}, want: "198.51.100.1"},
		{peer: "192.0.2.1:1", standard: []string{"for=198.51.100.1"}, want: "192.0.2.1"},
		{peer: "10.0.0.1:1", standard: []string{"for=198.51.100.1"}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", standard: []string{`For="198.51.100.1:77";proto=https`}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", standard: []string{`by=10.0.0.1; for="[2001:db8::7]:77"`}, want: "2001:db8::/64"},
		{peer: "10.0.0.1:1", standard: []string{"for=203.0.113.9, for=198.51.100.1", "for=10.9.9.9"}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", standard: []string{"for=198.51.100.1, for=unknown"}, want: "10.0.0.1"},
		{peer: "10.0.0.1:1", standard: []string{"for=198.51.100.1, for=_gateway"}, want: "10.0.0.1"},
		{peer: "10.0.0.1:1", standard: []string{`for="203.0.113.9, for=198.51.100.1`}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", standard: []string{`host="x;for=203.0.113.9";for=198.51.100.1`}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", standard: []string{`host="x,for=203.0.113.9";for=198.51.100.1`}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", standard: []string{`for=198.51.100.1;host="x;for=203.0.113.9"`}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", standard: []string{`for=198.51.100.1;host="x,for=203.0.113.9"`}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", standard: []string{`host="\";for=203.0.113.9";for=198.51.100.1`}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", standard: []string{`host="x";for=203.0.113.9;y="";for=198.51.100.1`}, want: "10.0.0.1"},
		{peer: "10.0.0.1:1", standard: []string{`for=203.0.113.9;x="`, `for="198.51.100.1:7"`}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", forwarded: []string{`"`, "198.51.100.1"}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", standard: []string{"proto=https"}, want: "10.0.0.1"},
		{peer: "10.0.0.1:1", forwarded: []string{"198.51.100.1"}, standard: []string{"for=198.51.100.1:7"}, want: "198.51.100.1"},
		{peer: "10.0.0.1:1", forwarded: []string{"198.51.100.1"}, standard: []string{"for=203.0.113.9"}, want: "10.0.0.1"},
		{peer: "10.0.0.1:1", forwarded: []string{"203.0.113.9"}, standard: []string{"for=198.51.100.1"}, want: "10.0.0.1"},
		{peer: "[::1]:1", forwarded: []string{"2001:db8:1:2:3::4"}, want: "2001:db8:1:2::/64"},
		{peer: "[2001:db8:1:2:3::4%eth0]:1", want: "2001:db8:1:2::/64"},
		{peer: "@", want: "@"},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = test.peer
		if test.forwarded != nil {
			r.Header["X-Forwarded-For"] = test.forwarded
		}
		if test.standard != nil {
			r.Header["Forwarded"] = test.standard
		}
		if got := a.clientNetwork(r); got != test.want {
			t.Errorf("peer %s, X-Forwarded-For %q, Forwarded %q: got %s, want %s", test.peer,
				test.forwarded, test.standard, got, test.want)
		}
	}
}

// TestLimiterForgetsNobody checks that a limiter refuses a client without tokens although many others
// come after it, that it remembers a limited number of clients, and that it forgets those that have
// all tokens again.
func TestLimiterForgetsNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter[int]("test", 0.1, 2)
		try := func(client int) bool { return l.admit(http.Header{}, client) == nil }
		remembered := func() int { return len(l.newer) + len(l.older) }
		if got := []bool{try(1), try(1), try(1)}; !slices.Equal(got, []bool{true, true, false}) {
			t.Errorf("the first client was admitted: %t, want twice", got)
		}
		others := 0
		for client := range 3 * maxClients {
			if client != 1 && try(client) && client >= maxClients {
				others++
			}
		}
		if try(1) {
			t.Error("the first client was forgotten before it had a token again")
		}
		if n := remembered(); n > maxClients+1 {
			t.Errorf("%d clients are remembered, want at most %d", n, maxClients+1)
		}
		if others != 1 { // client 0 took the other token of those that share
			t.Errorf("%d clients over the maximum were admitted, want 1", others)
		}
		l.refund(1)
		if got := []bool{try(1), try(1)}; !slices.Equal(got, []bool{true, false}) {
			t.Errorf("after a token was returned, the first client was admitted: %t, want once", got)
		}
		time.Sleep(21 * time.Second)
		try(2)
		time.Sleep(21 * time.Second)
		if !try(1) || remembered() > 2 {
			t.Errorf("%d clients are remembered after 42 s, want at most 2", remembered())
		}
	})
}

// TestRefundsLeaveNothing checks that clients whose tokens were returned take no place in a limiter:
// otherwise a client could fill it with requests that nothing is done for.
func TestRefundsLeaveNothing(t *testing.T) {
	t.Parallel()
	l := newLimiter[int]("test", 0.1, 2)
	for client := range 2 * maxClients {
		if err := l.admit(http.Header{}, client); err != nil {
			t.Fatalf("client %d: %v", client, err)
		}
		l.refund(client)
	}
	if n := len(l.newer) + len(l.older); n != 0 {
		t.Errorf("%d clients are remembered, want none", n)
	}
}

// TestSecurityHeaders checks that every answer has the security headers.
func TestSecurityHeaders(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for path, want := range map[string]int{
		"/users": 200, "/users/1": 404, "/nothing": 404, "/": 302, "//users": 301, "/docs": 200,
		"/docs/start.js": 200, "/openapi.json": 200, "/healthz": 200, "/metrics": 200, "/users?x=1": 400,
	} {
		a := s.do("GET", path, "")
		if a.status != want && a.status != 307 {
			t.Errorf("GET %s: status %d, want %d", path, a.status, want)
		}
		for name, value := range map[string]string{
			"Cache-Control":          "no-store",
			"Referrer-Policy":        "no-referrer",
			"X-Content-Type-Options": "nosniff",
		} {
			if got := a.header.Get(name); got != value {
				t.Errorf("GET %s: %s: got %q, want %q", path, name, got, value)
			}
		}
		policy := a.header.Get("Content-Security-Policy")
		if !strings.HasPrefix(policy, "default-src 'none'") ||
			strings.Contains(policy, "script") != (path == "/docs") {
			t.Errorf("GET %s: Content-Security-Policy: got %q", path, policy)
		}
	}
}

// TestCrossOrigin checks which origins may send requests and read the answers.
func TestCrossOrigin(t *testing.T) {
	t.Parallel()
	const ours, other = "https://app.example.com", "https://other.example.com"
	set := memorySettings()
	set.corsOrigins = []string{"http://localhost:3000", ours}
	s := startService(t, set)
	body := fmt.Sprintf(`{"name": "Ann", "surname": "Lee", "password": %q}`, secret)
	for _, test := range []struct {
		method  string
		headers []string
		want    int
		allowed string // Access-Control-Allow-Origin
	}{
		{method: "POST", want: 201},
		{method: "POST", headers: []string{"Origin: " + s.url}, want: 201},
		{method: "POST", headers: []string{"Origin: " + s.url, "Sec-Fetch-Site: same-origin"}, want: 201},
		{method: "POST", headers: []string{"Origin: " + other}, want: 403},
		{method: "POST", headers: []string{"Origin: null"}, want: 403},
		{method: "POST", headers: []string{"Origin: " + other, "Sec-Fetch-Site: cross-site"}, want: 403},
		{method: "POST", headers: []string{"Sec-Fetch-Site: cross-site"}, want: 403},
		{method: "POST", headers: []string{"Origin: " + ours, "Sec-Fetch-Site: cross-site"}, want: 201, allowed: ours},
		{method: "GET", headers: []string{"Origin: " + ours, "Sec-Fetch-Site: cross-site"}, want: 200, allowed: ours},
		{method: "GET", headers: []string{"Origin: " + other, "Sec-Fetch-Site: cross-site"}, want: 200},
		{method: "OPTIONS", headers: []string{"Origin: " + ours, "Access-Control-Request-Method: POST"}, want: 204, allowed: ours},
		{method: "OPTIONS", headers: []string{"Origin: " + other, "Access-Control-Request-Method: POST"}, want: 405},
		{method: "OPTIONS", headers: []string{"Origin: " + ours}, want: 405, allowed: ours},
		{method: "OPTIONS", want: 405},
	} {
		text := body
		if test.method != "POST" {
			text = ""
		}
		a := s.do(test.method, "/users", text, test.headers...)
		if got := a.header.Get("Access-Control-Allow-Origin"); a.status != test.want || got != test.allowed {
			t.Errorf("%s with %q: status %d, Access-Control-Allow-Origin %q, want %d, %q", test.method,
				test.headers, a.status, got, test.want, test.allowed)
		}
		if got := a.header.Values("Vary"); len(got) != 1 || got[0] != "Origin" {
			t.Errorf("%s with %q: Vary: got %q, want Origin", test.method, test.headers, got)
		}
		exposed := strings.Contains(a.header.Get("Access-Control-Expose-Headers"), "ETag")
		if exposed != (test.allowed != "") {
			t.Errorf("%s with %q: headers exposed: got %t, want %t", test.method, test.headers, exposed,
				!exposed)
		}
		methods := a.header.Get("Access-Control-Allow-Methods")
		headers := a.header.Get("Access-Control-Allow-Headers")
		if a.status == 204 &&
			(!strings.Contains(methods, "PATCH") || !strings.Contains(headers, "Authorization")) {
			t.Errorf("preflight: got methods %q and headers %q, want PATCH and Authorization", methods,
				headers)
		}
	}
	set.rateLimit = 0.01
	limited := startService(t, set)
	for range 3 {
		a := limited.do("OPTIONS", "/users", "", "Origin: "+ours, "Access-Control-Request-Method: POST")
		if a.status != 204 {
			t.Errorf("preflight with a rate limit: status %d, want 204", a.status)
		}
	}
	if a := limited.do("GET", "/users", "", "Origin: "+ours); a.status != 200 {
		t.Errorf("the first request after preflights: status %d, want 200", a.status)
	}
	plain := startService(t, memorySettings()).do("GET", "/users", "", "Origin: "+ours)
	if plain.header.Get("Access-Control-Allow-Origin") != "" || plain.header.Get("Vary") != "" {
		t.Errorf("without CORS_ORIGINS: got %v, want no CORS headers", plain.header)
	}
}

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
	d := testDependencies(memorySettings(), store, discardLog)
	d.draining.Store(draining)
	a := newAPI(d, &traffic{})
	a.creating.Store("running", true)
	h := &health{d.store, d.broker, d.metrics, d.draining}
	return newServer(d, &traffic{}, newAccess(d.settings, nil), append(publicRoutes(h), protectedRoutes(a, h)...))
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
			level := "INFO"
			if test.want >= 500 {
				level = "WARN"
			}
			line := s.waitForLine("Request completed",
				"trace_id", "trace-1", "level", level, "status", test.want)
			if logged := strings.Contains(fmt.Sprint(line["error"]), cause); logged != (level == "WARN") {
				t.Errorf("log line %v, cause logged: %t", line, logged)
			}
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
		s.waitForLine("Request completed", "trace_id", id, "status", 500, "level", "WARN")
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

// uuidV4 and uuidV7 match UUIDs of these versions (RFC 9562).
var (
	uuidV4 = regexp.MustCompile(
		`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	uuidV7 = regexp.MustCompile(
		`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
)

// TestUUIDs checks that UUIDs have their version and variant, that they are unique, and that those
// of version 7 are in the order of time.
func TestUUIDs(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	before := ""
	start := time.Now().UnixMilli()
	for range 1000 {
		v4, v7 := newUUIDv4(), newUUIDv7()
		if !uuidV4.MatchString(v4) || !uuidV7.MatchString(v7) || seen[v4] || seen[v7] {
			t.Fatalf("%s is not a new UUIDv4 or %s is not a new UUIDv7", v4, v7)
		}
		if v7[:13] < before {
			t.Errorf("%s is less than %s, which is older", v7, before)
		}
		seen[v4], seen[v7], before = true, true, v7[:13]
	}
	var last int64
	fmt.Sscanf(strings.Replace(before, "-", "", 1), "%x", &last)
	if last < start || last > time.Now().UnixMilli() {
		t.Errorf("%s has the time %d, want %d or up to a few seconds later", before, last, start)
	}
}

// traceIDTests are the headers of requests and the trace id of each request. An empty want stands
// for a new UUID. traceIDParts expands the words that begin with a dollar sign.
var traceIDTests = map[string]struct {
	headers []string
	want    string
}{
	"no header": {},
	"all characters": {
		headers: []string{"X-Request-Id: AZaz09._:-"}, want: "AZaz09._:-"},
	"request id of 1 character": {
		headers: []string{"X-Request-Id: x"}, want: "x"},
	"request id of 128 characters": {
		headers: []string{"X-Request-Id: $x128"}, want: "$x128"},
	"request id of 129 characters": {
		headers: []string{"X-Request-Id: $x128x"}},
	"request id with a space": {headers: []string{"X-Request-Id: a b"}},
	"request id with a slash": {headers: []string{"X-Request-Id: a/b"}},
	"request id with a quote": {headers: []string{`X-Request-Id: a"b`}},
	"request id with a letter outside ASCII": {
		headers: []string{"X-Request-Id: é"}},
	"request id with a comma": {headers: []string{"X-Request-Id: a,b"}},
	"two request ids": {
		headers: []string{"X-Request-Id: a", "X-Request-Id: b"}},
	"the same request id twice": {
		headers: []string{"X-Request-Id: a", "X-Request-Id: a"}},
	"a valid and an invalid request id": {
		headers: []string{"X-Request-Id: a", "X-Request-Id: /"}},
	"traceparent": {
		headers: []string{"traceparent: 00-$trace-$parent-01"}, want: "$trace"},
	"not sampled": {
		headers: []string{"traceparent: 00-$trace-$parent-00"}, want: "$trace"},
	"unknown flags": {
		headers: []string{"traceparent: 00-$trace-$parent-ff"}, want: "$trace"},
	"version 00 with a fifth field": {
		headers: []string{"traceparent: 00-$trace-$parent-01-x"}},
	"version 00 with a dash at the end": {
		headers: []string{"traceparent: 00-$trace-$parent-01-"}},
	"version 01": {
		headers: []string{"traceparent: 01-$trace-$parent-01"}, want: "$trace"},
	"version fe with more fields": {
		headers: []string{"traceparent: fe-$trace-$parent-01-a-b"}, want: "$trace"},
	"version fe with text after the flags": {
		headers: []string{"traceparent: fe-$trace-$parent-01.x"}},
	"version ff": {headers: []string{"traceparent: ff-$trace-$parent-01"}},
	"version of 1 digit": {
		headers: []string{"traceparent: 0-$trace-$parent-01"}},
	"version that is not hexadecimal": {
		headers: []string{"traceparent: 0x-$trace-$parent-01"}},
	"trace id of zeros": {
		headers: []string{"traceparent: 00-$zeros-$parent-01"}},
	"parent id of zeros": {
		headers: []string{"traceparent: 00-$trace-$zeros16-01"}},
	"trace id in upper case": {
		headers: []string{"traceparent: 00-$TRACE-$parent-01"}},
	"parent id in upper case": {
		headers: []string{"traceparent: 00-$trace-$PARENT-01"}},
	"flags in upper case": {
		headers: []string{"traceparent: 00-$trace-$parent-0A"}},
	"trace id of 31 digits": {
		headers: []string{"traceparent: 00-$trace31-$parent-01"}},
	"trace id of 33 digits": {
		headers: []string{"traceparent: 00-0$trace-$parent-01"}},
	"parent id of 15 digits": {
		headers: []string{"traceparent: 00-$trace-$parent15-01"}},
	"no flags":        {headers: []string{"traceparent: 00-$trace-$parent"}},
	"only a trace id": {headers: []string{"traceparent: $trace"}},
	"text before the version": {
		headers: []string{"traceparent: x00-$trace-$parent-01"}},
	"two traceparents": {
		headers: []string{
			"traceparent: 00-$trace-$parent-01", "traceparent: 00-$trace-$parent-01"}},
	"request id and traceparent": {
		headers: []string{"X-Request-Id: a", "traceparent: 00-$trace-$parent-01"}, want: "a"},
	"invalid request id and traceparent": {
		headers: []string{"X-Request-Id: /", "traceparent: 00-$trace-$parent-01"}, want: "$trace"},
	"two request ids and traceparent": {
		headers: []string{
			"X-Request-Id: a", "X-Request-Id: a", "traceparent: 00-$trace-$parent-01"},
		want: "$trace"},
	"request id and invalid traceparent": {
		headers: []string{"X-Request-Id: b", "traceparent: x"}, want: "b"},
}

// traceIDParts expands the words in traceIDTests.
var traceIDParts = strings.NewReplacer(
	"$trace31", "af7651916cd43dd8448eb211c80319c",
	"$trace", "0af7651916cd43dd8448eb211c80319c",
	"$TRACE", "0AF7651916CD43DD8448EB211C80319C",
	"$parent15", "7ad6b7169203331",
	"$parent", "b7ad6b7169203331",
	"$PARENT", "B7AD6B7169203331",
	"$zeros16", strings.Repeat("0", 16),
	"$zeros", strings.Repeat("0", 32),
	"$x128", strings.Repeat("x", 128),
)

// TestTraceID checks which header the trace id of a request comes from, and that the answer and
// the log have it.
func TestTraceID(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for name, test := range traceIDTests {
		var headers []string
		for _, header := range test.headers {
			headers = append(headers, traceIDParts.Replace(header))
		}
		want := traceIDParts.Replace(test.want)
		a := s.do("GET", "/nothing", "", headers...)
		got := a.header.Get("X-Trace-Id")
		if want == "" && !uuidV4.MatchString(got) || want != "" && got != want {
			t.Errorf("%s: trace id %q, want %q", name, got, cmp.Or(want, "a UUIDv4"))
		}
		if n := len(a.header["X-Trace-Id"]); n != 1 {
			t.Errorf("%s: %d X-Trace-Id headers, want 1", name, n)
		}
		s.waitForLine("Request started", "trace_id", got)
		s.waitForLine("Request completed", "trace_id", got)
	}
	// net/http's client does not send an empty header.
	a := s.send("GET /nothing HTTP/1.1\r\nHost: test\r\nX-Request-Id:\r\n\r\n")
	if got := a.header.Get("X-Trace-Id"); !uuidV4.MatchString(got) {
		t.Errorf("empty request id: trace id %q, want a UUIDv4", got)
	}
}

// FuzzTraceID compares requestTrace with wantTraceID, a second implementation.
func FuzzTraceID(f *testing.F) {
	const valid = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for _, parent := range []string{
		"", valid, valid + "-x", "01" + valid[2:], "ff" + valid[2:],
		"cc" + valid[2:] + "-a-b", "cc" + valid[2:] + ".x",
		strings.ToUpper(valid), valid[:53], "0" + valid,
		strings.Replace(valid, "b7ad6b7169203331", "0000000000000000", 1),
		"00-00000000000000000000000000000000-b7ad6b7169203331-01",
		"00-" + strings.Repeat("-", 32) + valid[35:],
	} {
		f.Add("", parent, byte(2)) // only the traceparent
		f.Add("AZaz09._:-", parent, byte(3))
		f.Add("a b", parent, byte(3))
		f.Add("a", parent, byte(3|4)) // two request ids
		f.Add("", parent, byte(2|8))  // two traceparents
	}
	for _, id := range []string{
		strings.Repeat("x", 128), strings.Repeat("x", 129),
		"a\n", "é", "a\xff", "\x00", "{}", "a,b",
	} {
		f.Add(id, valid, byte(1))
		f.Add(id, valid, byte(3))
	}
	f.Fuzz(func(t *testing.T, id, parent string, given byte) {
		if strings.Contains(parent, "\n") {
			return // a header cannot contain it
		}
		h := make(http.Header)
		for bit := byte(1); bit <= 8; bit <<= 1 {
			switch given & bit {
			case 1, 4:
				h.Add("X-Request-Id", id)
			case 2, 8:
				h.Add("Traceparent", parent)
			}
		}
		got, want := requestTrace(h).id, wantTraceID(h)
		if want != "" && got != want || want == "" && !uuidV4.MatchString(got) {
			t.Fatalf("%q: trace id %q, want %q", h, got, cmp.Or(want, "a UUIDv4"))
		}
		if again := requestTrace(http.Header{"X-Request-Id": {got}}).id; again != got {
			t.Errorf("the trace id %q as X-Request-Id becomes %q", got, again)
		}
	})
}

// wantTraceID returns the trace id that a request must have, or "" for a new UUID.
func wantTraceID(h http.Header) string {
	const digits, letters = "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	if ids := h["X-Request-Id"]; len(ids) == 1 && len(ids[0]) >= 1 && len(ids[0]) <= 128 &&
		consistsOf(ids[0], digits+letters+"._:-") {
		return ids[0]
	}
	if len(h["Traceparent"]) != 1 {
		return ""
	}
	fields := strings.SplitN(h["Traceparent"][0], "-", 5)
	if len(fields) < 4 || fields[0] == "ff" || fields[0] == "00" && len(fields) > 4 {
		return ""
	}
	for i, length := range []int{2, 32, 16, 2} {
		if len(fields[i]) != length || !consistsOf(fields[i], digits+"abcdef") {
			return ""
		}
	}
	if consistsOf(fields[1], "0") || consistsOf(fields[2], "0") {
		return ""
	}
	return fields[1]
}

// consistsOf reports whether text contains only characters of a set.
func consistsOf(text, characters string) bool {
	return !strings.ContainsFunc(text, func(c rune) bool {
		return !strings.ContainsRune(characters, c)
	})
}

// TestTraceIDsOfBatch checks that changes that share a statement keep their trace ids.
func TestTraceIDsOfBatch(t *testing.T) {
	t.Parallel()
	svc := startService(t, postgresSettings(t))
	conn := connect(t, svc.settings.databaseURL)
	const users = 48
	execute(t, conn, `INSERT INTO users (name, surname, password)
		SELECT 'John', 'Doe', 'x' FROM generate_series(1, $1)`, users)
	for _, method := range []string{"PUT", "DELETE"} {
		var group sync.WaitGroup
		for id := 1; id <= users; id++ {
			group.Go(func() {
				body := map[string]string{"PUT": `{"name": "Jane"}`}[method]
				a := svc.do(method, fmt.Sprintf("/users/%d", id), body,
					fmt.Sprintf("X-Request-Id: %s-%d", method, id))
				if a.status != 200 {
					t.Errorf("%s /users/%d: status %d, want 200: %s", method, id, a.status, a.body)
				}
			})
		}
		group.Wait()
	}
	for id := 1; id <= users; id++ {
		svc.waitForLine(fmt.Sprintf("Received event user.updated with user_id=%d", id),
			"trace_id", fmt.Sprintf("PUT-%d", id), "version", 2)
		svc.waitForLine(fmt.Sprintf("Received event user.deleted with user_id=%d", id),
			"trace_id", fmt.Sprintf("DELETE-%d", id), "version", 3)
	}
	if n := strings.Count(svc.log.String(), `"Received event `); n != 3*users {
		t.Errorf("received %d events, want %d", n, 3*users)
	}
}

// TestTraceIDsOfUser checks that concurrent changes of one user keep their trace ids.
func TestTraceIDsOfUser(t *testing.T) {
	t.Parallel()
	svc := startService(t, postgresSettings(t))
	id := svc.createUser("John", "Doe")
	const changes = 10
	versions := make([]string, changes)
	var group sync.WaitGroup
	for i := range changes {
		group.Go(func() {
			a := svc.do("PUT", fmt.Sprint("/users/", id), fmt.Sprintf(`{"name": "name %d"}`, i),
				fmt.Sprint("X-Request-Id: change-", i))
			if a.status != 200 {
				t.Errorf("PUT /users/%d: status %d, want 200: %s", id, a.status, a.body)
			}
			versions[i] = strings.Trim(a.header.Get("ETag"), `"`)
		})
	}
	group.Wait()
	for i, version := range versions {
		svc.waitForLine(fmt.Sprintf("Received event user.updated with user_id=%d", id),
			"trace_id", fmt.Sprint("change-", i), "version", version)
	}
}

// TestHealthz checks the answer of GET /healthz with each store.
func TestHealthz(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		a := s.do("GET", "/healthz", "")
		if a.status != 200 || a.json(t, "status") != "ok" {
			t.Errorf("GET /healthz: got %d %s, want 200 with status ok", a.status, a.body)
		}
	})
}

// checkReady waits until /readyz returns a status code and an object with exactly these three members.
func (s *service) checkReady(want int, status, database, rabbitMQ string) {
	s.t.Helper()
	body := fmt.Sprint(map[string]any{"status": status, "database": database, "rabbitmq": rabbitMQ})
	eventually(s.t, fmt.Sprintf("an answer %d of /readyz with %s", want, body), func() bool {
		a := s.do("GET", "/readyz", "")
		if got := a.header.Get("Content-Type"); got != "application/json" {
			s.t.Errorf("GET /readyz: Content-Type: got %q, want application/json", got)
		}
		return a.status == want && fmt.Sprint(a.json(s.t)) == body
	})
}

// TestReadyzInMemory checks GET and HEAD /readyz without PostgreSQL and RabbitMQ.
func TestReadyzInMemory(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.checkReady(200, "ready", "memory", "in-process")
	if a := s.do("HEAD", "/readyz", ""); a.status != 200 {
		t.Errorf("HEAD /readyz: got %d, want 200", a.status)
	}
}

// TestReadyzWithRabbitMQ checks that /readyz reports the connection to RabbitMQ.
func TestReadyzWithRabbitMQ(t *testing.T) {
	t.Parallel()
	settings := memorySettings()
	settings.exchange = newExchange(t)
	settings.rabbitURL = testRabbitURL
	startService(t, settings).checkReady(200, "ready", "memory", "up")
}

// TestReadyzFollowsDatabase checks /readyz while the database is read-only, while it refuses connections,
// and after it has recovered.
func TestReadyzFollowsDatabase(t *testing.T) {
	t.Parallel()
	settings := postgresSettings(t)
	settings.appName = uniqueName()
	u, err := url.Parse(settings.databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	database := strings.TrimPrefix(u.Path, "/")
	s := startService(t, settings)
	alter := func(change string) {
		err := admin(t.Context(), "ALTER DATABASE "+database+" "+change,
			"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '"+
				settings.appName+"'")
		if err != nil {
			t.Fatal(err)
		}
	}
	s.checkReady(200, "ready", "up", "in-process")
	alter("SET default_transaction_read_only = on")
	s.checkReady(503, "not ready", "read-only", "in-process")
	alter("RESET default_transaction_read_only")
	s.checkReady(200, "ready", "up", "in-process")
	alter("ALLOW_CONNECTIONS false")
	s.checkReady(503, "not ready", "down", "in-process")
	s.waitForLine("Database connection lost", "level", "WARN", "state", "down")
	s.waitForLine("Request completed", "path", "/readyz", "level", "WARN", "status", 503,
		"error", errNotReady.Error())
	if a := s.do("GET", "/healthz", ""); a.status != 200 {
		t.Errorf("GET /healthz without a database: got %d %s, want 200", a.status, a.body)
	}
	alter("ALLOW_CONNECTIONS true")
	s.checkReady(200, "ready", "up", "in-process")
	eventually(t, "two lines that the connection is restored", func() bool {
		return len(s.log.lines("Database connection restored")) == 2
	})
}

// TestReadyzFrozenDatabase checks that /readyz answers in time while the database accepts data but does not
// answer.
func TestReadyzFrozenDatabase(t *testing.T) {
	t.Parallel()
	settings := postgresSettings(t)
	var freeze func()
	settings.databaseURL, freeze = freezable(t, settings.databaseURL)
	s := startService(t, settings)
	s.checkReady(200, "ready", "up", "in-process")
	freeze()
	s.checkReady(503, "not ready", "down", "in-process")
}

// freezable returns a URL of a database behind a proxy. After freeze, the proxy still accepts connections
// and data, but forwards nothing.
func freezable(t *testing.T, databaseURL string) (proxyURL string, freeze func()) {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	server := u.Host
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	var frozen sync.RWMutex
	forward := func(to, from net.Conn) {
		defer to.Close()
		buffer := make([]byte, 32<<10)
		for {
			n, err := from.Read(buffer)
			frozen.RLock()
			to.Write(buffer[:n])
			frozen.RUnlock()
			if err != nil {
				return
			}
		}
	}
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", server)
			if err != nil {
				in.Close()
				continue
			}
			go forward(in, out)
			go forward(out, in)
		}
	}()
	u.Host = listener.Addr().String()
	return u.String(), func() {
		frozen.Lock()
		t.Cleanup(frozen.Unlock)
	}
}

// samplePattern matches a sample of the Prometheus text format, version 0.0.4: a series, which is a name
// with or without labels, and a value.
var samplePattern = regexp.MustCompile(
	`^([a-zA-Z_:][\w:]*(?:\{(?:[a-zA-Z_]\w*="(?:[^"\\]|\\[\\"n])*"(?:, ?|\}))+)?) (\S+)$`)

// samples returns the value of each series of /metrics.
func (s *service) samples() map[string]float64 {
	s.t.Helper()
	a := s.do("GET", "/metrics", "")
	if a.status != 200 || !strings.HasPrefix(a.header.Get("Content-Type"), "text/plain; version=0.0.4") {
		s.t.Errorf("GET /metrics: status %d, Content-Type %q", a.status, a.header.Get("Content-Type"))
	}
	samples := make(map[string]float64)
	for line := range strings.Lines(a.body) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			continue
		}
		fields := samplePattern.FindStringSubmatch(line)
		if fields == nil {
			s.t.Errorf("not a sample: %q", line)
			continue
		}
		series := fields[1]
		value, err := strconv.ParseFloat(fields[2], 64)
		if err != nil {
			s.t.Errorf("not a number: %q", line)
		}
		if _, ok := samples[series]; ok {
			s.t.Errorf("duplicate series: %q", series)
		}
		samples[series] = value
	}
	return samples
}

// TestMetrics checks the values of metrics after some requests.
func TestMetrics(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		s.createUser("Jane", "Doe")
		s.do("GET", "/users/1", "")
		s.do("GET", "/users/3", "")
		s.do("GET", "/users/2", "")
		s.do("GET", "/no/such/path", "")
		var samples map[string]float64
		eventually(t, "two consumed events", func() bool {
			samples = s.samples()
			return samples["events_published_total"] == 2 && samples["events_consumed_total"] == 2 &&
				samples["outbox_pending"] == 0
		})
		for series, want := range map[string]float64{
			"outbox_pending":        0,
			"outbox_oldest_seconds": 0,
			"events_returned_total": 0,
			"events_rejected_total": 0,
			"relay_leader":          1,
			"broker_connected":      1,

			"log_lines_dropped_total":       0,
			"http_requests_in_flight":       1, // this one
			"http_requests_in_flight_limit": float64(testLimits.requests),
			"password_hashes_queued":        0,
			"password_hashes_queued_limit":  float64(testLimits.hashQueue),

			`http_requests_total{route="POST /users",status="201"}`:               2,
			`http_requests_total{route="GET /users/{id}",status="200"}`:           2,
			`http_requests_total{route="GET /users/{id}",status="404"}`:           1,
			`http_requests_total{route="/",status="404"}`:                         1,
			`http_request_duration_seconds_count{route="POST /users"}`:            2,
			`http_request_duration_seconds_bucket{route="POST /users",le="+Inf"}`: 2,
		} {
			if got, ok := samples[series]; got != want || !ok {
				t.Errorf("%s: got %v, want %v", series, got, want)
			}
		}
	})
}

// TestMetricHelp checks that a service with a database shows exactly the metrics of metricHelp, in
// families that begin with HELP and TYPE.
func TestMetricHelp(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	s.do("GET", "/healthz", "")
	shown := make(map[string]bool)
	var family string
	for line := range strings.Lines(s.do("GET", "/metrics", "").body) {
		line = strings.TrimSuffix(line, "\n")
		if help, ok := strings.CutPrefix(line, "# HELP "); ok {
			family, help, _ = strings.Cut(help, " ")
			if shown[family] || help == "" || help != metricHelp[family] {
				t.Errorf("a second family, or the wrong text: %s", line)
			}
			shown[family] = true
		} else if !strings.HasPrefix(strings.TrimPrefix(line, "# TYPE "), family) {
			t.Errorf("in the family %s: %s", family, line)
		}
	}
	for name := range metricHelp {
		if !shown[name] {
			t.Errorf("%s is not shown", name)
		}
	}
}

// TestMetricsHaveHelp checks that metricHelp has each metric that is registered: others are dropped.
func TestMetricsHaveHelp(t *testing.T) {
	t.Parallel()
	out := &logWriter{w: t.Output()}
	log, set := newLogger(out, 0), newMetrics()
	d := testDependencies(memorySettings(), newMemory(), log)
	d.broker, d.metrics = newBroker(d.settings, newConsumer(log, set), log, set), set
	newRelay(d.store, d.broker, log, set)
	newHandler(d).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/healthz", nil))
	for _, name := range set.ListMetricNames() {
		family, _, _ := strings.Cut(name, "{")
		if metricHelp[family] == "" {
			t.Errorf("%s has no text", name)
		}
	}
}

// TestDocsPage checks the page /docs. Its URLs are relative, for a proxy that adds a prefix.
func TestDocsPage(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	a := s.do("GET", "/docs", "")
	if got := a.header.Get("Content-Type"); a.status != 200 || got != "text/html; charset=utf-8" {
		t.Errorf("GET /docs: status %d, Content-Type %q, want 200, text/html", a.status, got)
	}
	const policy = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; " +
		"img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; " +
		"form-action 'none'; frame-ancestors 'none'"
	if got := a.header.Get("Content-Security-Policy"); got != policy {
		t.Errorf("Content-Security-Policy: got %q, want %q", got, policy)
	}
	for _, match := range regexp.MustCompile(`(?:href|src)="([^"]*)"`).FindAllStringSubmatch(a.body, -1) {
		if !strings.HasPrefix(match[1], "docs/") {
			t.Errorf("the page refers to %s, want a relative URL in docs/", match[1])
		}
	}
}

// TestDocsFiles checks the files of Swagger UI, with and without compression.
func TestDocsFiles(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for _, test := range []struct{ name, contentType, prefix string }{
		{name: "swagger-ui.css", contentType: "text/css; charset=utf-8", prefix: ".swagger-ui"},
		{name: "swagger-ui-bundle.js", contentType: "text/javascript; charset=utf-8",
			prefix: "/*! For license"},
		{name: "start.js", contentType: "text/javascript; charset=utf-8", prefix: "SwaggerUIBundle("},
		{name: "favicon-32x32.png", contentType: "image/png", prefix: "\x89PNG"},
	} {
		path := "/docs/" + test.name
		plain := s.do("GET", path, "", "Accept-Encoding: identity")
		if got := plain.header.Get("Content-Type"); plain.status != 200 || got != test.contentType {
			t.Errorf("GET %s: status %d, Content-Type %q, want 200, %q", path, plain.status, got,
				test.contentType)
		}
		if n := fmt.Sprint(len(plain.body)); plain.header.Get("Content-Length") != n {
			t.Errorf("GET %s: Content-Length %q, want %s", path, plain.header.Get("Content-Length"), n)
		}
		if plain.header.Get("Content-Encoding") != "" || !strings.HasPrefix(plain.body, test.prefix) {
			t.Errorf("GET %s: Content-Encoding %q, body %.40q, want a body with the prefix %q", path,
				plain.header.Get("Content-Encoding"), plain.body, test.prefix)
		}
		zipped := s.do("GET", path, "", "Accept-Encoding: gzip, deflate, br")
		if unzip(t, zipped) != plain.body {
			t.Errorf("GET %s with gzip: got another file than without", path)
		}
		if vary := zipped.header.Get("Vary"); zipped.header.Get("Content-Encoding") != "" &&
			vary != "Accept-Encoding" {
			t.Errorf("GET %s: Vary: got %q, want Accept-Encoding", path, vary)
		}
		head := s.do("HEAD", path, "", "Accept-Encoding: identity")
		for _, name := range []string{"Content-Type", "Content-Length", "Cache-Control", "Vary"} {
			if got, want := head.header.Get(name), plain.header.Get(name); got != want {
				t.Errorf("HEAD %s: %s: got %q, want %q", path, name, got, want)
			}
		}
		if head.status != 200 || head.body != "" {
			t.Errorf("HEAD %s: status %d with %d bytes, want 200 without a body", path, head.status,
				len(head.body))
		}
	}
	for _, name := range []string{"nothing.js", "swagger-ui.css.gz", "embed.go", "..%2fgo.mod"} {
		if a := s.do("GET", "/docs/"+name, ""); a.status != 404 {
			t.Errorf("GET /docs/%s: status %d, want 404", name, a.status)
		}
	}
}

// TestAcceptEncoding checks which clients receive a file with gzip.
func TestAcceptEncoding(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for _, test := range []struct {
		accept string
		gzip   bool
	}{
		{accept: "gzip", gzip: true},
		{accept: "GZIP", gzip: true},
		{accept: "gzip, deflate, br", gzip: true},
		{accept: "br;q=1.0,\tgzip ; Q=0.5", gzip: true},
		{accept: "gzip;q=0.001", gzip: true},
		{accept: "*", gzip: true},
		{accept: "*;q=0.1", gzip: true},
		{accept: "identity;q=0, *", gzip: true},
		{accept: "identity;q=0.5, gzip;q=0.5", gzip: true},
		{accept: "identity"},
		{accept: "br, deflate"},
		{accept: "x-not-gzip"},
		{accept: "gzip;q=0"},
		{accept: "gzip;q=0.000, *"},
		{accept: "*;q=0"},
		{accept: "identity, gzip;q=0.5"},
		{accept: "gzip;q="},
		{accept: "gzip;q=x"},
		{accept: "gzip;level=1"},
	} {
		a := s.do("GET", "/docs/swagger-ui.css", "", "Accept-Encoding: "+test.accept)
		if got := a.header.Get("Content-Encoding") == "gzip"; got != test.gzip {
			t.Errorf("Accept-Encoding %q: gzip is %t, want %t", test.accept, got, test.gzip)
		}
		if vary := a.header.Get("Vary"); vary != "Accept-Encoding" {
			t.Errorf("Accept-Encoding %q: Vary is %q", test.accept, vary)
		}
		if !strings.HasPrefix(unzip(t, a), ".swagger-ui") {
			t.Errorf("Accept-Encoding %q: got another file", test.accept)
		}
	}
}

// unzip returns the body without its Content-Encoding.
func unzip(t *testing.T, a answer) string {
	t.Helper()
	if a.header.Get("Content-Encoding") == "" {
		return a.body
	}
	reader, err := gzip.NewReader(strings.NewReader(a.body))
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(reader)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// routesBesideTheDocument are other spellings of documented routes, redirects to them, and
// the parts of a page.
var routesBesideTheDocument = []string{"GET /users/{$}", "POST /users/{$}", "GET /docs/{$}",
	"GET /docs/start.js", "GET /docs/swagger-ui-bundle.js", "GET /docs/swagger-ui.css",
	"GET /docs/favicon-32x32.png", "GET /schema", "GET /{$}"}

// TestOpenAPIHasEveryRoute compares the routes with the document. What the document says about
// each of them is checked from outside, in system/contract.
func TestOpenAPIHasEveryRoute(t *testing.T) {
	t.Parallel()
	var document struct {
		Paths map[string]map[string]any
	}
	text, err := assets.ReadFile("openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	missing := make(map[string]bool)
	for _, route := range routesBesideTheDocument {
		missing[route] = true
	}
	for path, methods := range document.Paths {
		for method := range methods {
			missing[strings.ToUpper(method)+" "+path] = true
		}
	}
	for _, route := range append(publicRoutes(&health{}), protectedRoutes(&api{}, &health{})...) {
		pattern := route.method + " " + route.path
		if !missing[pattern] {
			t.Errorf("the route %s is not documented", pattern)
		}
		delete(missing, pattern)
	}
	for pattern := range missing {
		t.Errorf("%s is not a route", pattern)
	}
}

// TestVersion checks that the document, the start line and the metrics show the same release.
func TestVersion(t *testing.T) {
	t.Parallel()
	var document struct {
		Info struct{ Version string }
	}
	text, err := assets.ReadFile("openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	if document.Info.Version != release {
		t.Errorf("openapi.json has version %q, want %q", document.Info.Version, release)
	}
	s := startService(t, memorySettings())
	shown, _ := s.waitForLine("Service started")["version"].(string)
	if number, _, _ := strings.Cut(shown, "+"); number != release {
		t.Errorf("the start line has version %q, want %q", shown, release)
	}
	want := fmt.Sprintf("build_info{version=%q,go=%q} 1", shown, runtime.Version())
	if a := s.do("GET", "/metrics", ""); !strings.Contains(a.body, want) {
		t.Errorf("the metrics do not have %s", want)
	}
}

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
	{strings.Repeat("M", 2*maxLogged), "/users/1", "", ""},
	{"GET", "/" + strings.Repeat("a%01%ff", maxLogged), "", ""},
	{"GET", "/" + strings.Repeat("%e2%80%a8", maxLogged), "", ""},
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
	hash, err := newTestHasher().hash(context.Background(), "", secret)
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
		store.createUser(t.Context(), "test", input("John", "Doe", hash), "used")
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
		line := lines[i]
		if line["event"] != event || line["trace_id"] != id ||
			!repeats(line["method"], r.Method) || !repeats(line["path"], r.URL.Path) {
			s.t.Errorf("%s %q: log line %v, want the event %q", r.Method, r.URL.Path, line, event)
		}
	}
	return lines[1]
}

// repeats reports whether a value of a log line is a client's text. Bytes that are not UTF-8 are
// logged as U+FFFD. Long text is cut, so that it has at most maxLogged bytes as JSON; one byte takes
// at most six.
func repeats(logged any, text string) bool {
	start, _ := logged.(string)
	asJSON, err := json.Marshal(start)
	if err != nil || len(asJSON) > maxLogged+len(`""`) {
		return false
	}
	text = string([]rune(text))
	return start == text ||
		strings.HasPrefix(text, start) && len(start) > maxLogged/6-utf8.UTFMax
}

// repeatsPassword reports whether the client has put a password where the service may repeat it: in
// the head, in the name of a member, or in the name of a user.
func repeatsPassword(head string, query url.Values, body []byte) bool {
	text := fmt.Sprint(head, query)
	members, _ := parseObject(body, maxMembers)
	for _, m := range members {
		text += " " + m.name
		if m.name == "name" || m.name == "surname" {
			name, _ := parseString(m.value)
			text += " " + name
		}
	}
	return strings.Contains(text, secret) || strings.Contains(text, "argon2id")
}

// object is a JSON object.
type object = map[string]any

// changed returns the JSON of an object with other members. Those whose value is absent are left
// out.
func changed(base, changes object) string {
	merged := maps.Clone(base)
	maps.Copy(merged, changes)
	maps.DeleteFunc(merged, func(_ string, value any) bool { return value == absent })
	text, err := json.Marshal(merged)
	if err != nil {
		panic(err)
	}
	return string(text)
}

const absent = json.Number("absent")

// base64url encodes a part of a token (RFC 7515, section 2).
func base64url[T ~string | ~[]byte](part T) string {
	return base64.RawURLEncoding.EncodeToString([]byte(part))
}

// compact returns a JWT in its compact form. sign returns the signature of the text before it.
func compact(header, claims string, sign func(input string) []byte) string {
	input := base64url(header) + "." + base64url(claims)
	return input + "." + base64url(sign(input))
}

// signer signs tokens with a key of an identity provider.
type signer struct {
	kid, alg string
	key      crypto.Signer
}

// rsaKeys have 2048 bits. To make one takes up to a second.
var rsaKeys = sync.OnceValue(func() (pair [2]*rsa.PrivateKey) {
	for i := range pair {
		pair[i], _ = rsa.GenerateKey(cryptorand.Reader, 2048)
	}
	return pair
})

// newSigner returns a signer with a new key, or with a shared one if the key is slow to make: with
// that of the provider, or that of an attacker.
func newSigner(kid, alg string, attacker bool) signer {
	s := signer{kid: kid, alg: alg}
	switch alg {
	case "ES256":
		s.key, _ = ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	case "EdDSA":
		_, s.key, _ = ed25519.GenerateKey(nil)
	default:
		s.key = rsaKeys()[0]
		if attacker {
			s.key = rsaKeys()[1]
		}
	}
	return s
}

// sign returns the signature of a text (RFC 7518, section 3, and RFC 8037).
func (s signer) sign(input string) []byte {
	digest := sha256.Sum256([]byte(input))
	var signature []byte
	switch key := s.key.(type) {
	case *rsa.PrivateKey:
		signature, _ = rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
		if s.alg == "PS256" {
			options := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}
			signature, _ = rsa.SignPSS(cryptorand.Reader, key, crypto.SHA256, digest[:], options)
		}
	case *ecdsa.PrivateKey:
		r, s, _ := ecdsa.Sign(cryptorand.Reader, key, digest[:])
		signature = append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
	case ed25519.PrivateKey:
		signature = ed25519.Sign(key, []byte(input))
	}
	return signature
}

// header returns the header of a token, with changes.
func (s signer) header(changes object) string {
	return changed(object{"alg": s.alg, "kid": s.kid, "typ": "at+jwt"}, changes)
}

// jwk returns the public key as in a JSON Web Key Set.
func (s signer) jwk() object {
	j := object{"kid": s.kid, "use": "sig"}
	switch key := s.key.Public().(type) {
	case *rsa.PublicKey:
		j["kty"], j["n"], j["e"] = "RSA", base64url(key.N.Bytes()), "AQAB"
	case *ecdsa.PublicKey:
		point, _ := key.Bytes()
		j["kty"], j["crv"] = "EC", "P-256"
		j["x"], j["y"] = base64url(point[1:33]), base64url(point[33:])
	case ed25519.PublicKey:
		j["kty"], j["crv"], j["x"] = "OKP", "Ed25519", base64url(key)
	}
	return j
}

// provider is an identity provider.
type provider struct {
	url       string
	refreshes atomic.Int64 // requests for its configuration

	mu      sync.Mutex
	signers []signer
	answer  http.HandlerFunc // to every request, unless it is nil
}

// newProvider returns a provider that has a key of each type.
func newProvider(url string) *provider {
	return &provider{url: url, signers: []signer{newSigner("rsa", "RS256", false),
		newSigner("ec", "ES256", false), newSigner("ed", "EdDSA", false)}}
}

// startProvider starts a new provider.
func startProvider(t *testing.T) *provider {
	t.Helper()
	p := newProvider("")
	web := httptest.NewServer(p)
	t.Cleanup(web.Close)
	p.url = web.URL
	return p
}

// ServeHTTP implements http.Handler.
func (p *provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	answer, signers := p.answer, p.signers
	p.mu.Unlock()
	isConfiguration := r.URL.Path == "/.well-known/openid-configuration"
	if isConfiguration {
		p.refreshes.Add(1)
	}
	switch {
	case answer != nil:
		answer(w, r)
	case isConfiguration:
		json.NewEncoder(w).Encode(object{"issuer": p.url, "jwks_uri": p.url + "/keys"})
	case r.URL.Path == "/keys":
		keys := make([]object, len(signers))
		for i, s := range signers {
			keys[i] = s.jwk()
		}
		json.NewEncoder(w).Encode(object{"keys": keys})
	default:
		http.NotFound(w, r)
	}
}

// lie makes the provider answer every request with answer, or truly again if that is nil.
func (p *provider) lie(answer http.HandlerFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = answer
}

// rotate replaces the keys of the provider.
func (p *provider) rotate(signers ...signer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.signers = signers
}

// settings returns those of a service that accepts the tokens of the provider.
func (p *provider) settings() settings {
	s := memorySettings()
	s.open, s.jwtIssuer, s.jwtAudience = false, p.url, "users"
	return s
}

// signer returns the first signer of the provider for an algorithm.
func (p *provider) signer(alg string) signer {
	for _, s := range p.signers {
		if s.alg == alg || s.alg == "RS256" && alg == "PS256" {
			return signer{s.kid, alg, s.key}
		}
	}
	panic(alg)
}

// claims returns the claims of a token for the subject ann, with changes.
func (p *provider) claims(changes object) string {
	now := time.Now().Unix()
	return changed(object{"iss": p.url, "sub": "ann", "aud": "users", "exp": now + 3600, "iat": now,
		"client_id": "shop", "scope": "users:read users:write"}, changes)
}

// token returns a token that s has signed, with changes of its header and of its claims.
func (p *provider) token(s signer, header, claims object) string {
	return compact(s.header(header), p.claims(claims), s.sign)
}

// startWithTokens runs a service like startService until it has the keys of its provider.
func startWithTokens(t *testing.T, set settings) *service {
	t.Helper()
	s := startService(t, set)
	s.waitForLine("Keys of the identity provider loaded")
	return s
}

// bearer returns the header that sends a token or an API key.
func bearer(token string) string { return "Authorization: Bearer " + token }

// The values of WWW-Authenticate (RFC 6750, section 3).
const (
	invalidToken = `Bearer error="invalid_token"`
	lacksRead    = `Bearer error="insufficient_scope", scope="users:read"`
	lacksWrite   = `Bearer error="insufficient_scope", scope="users:write"`
)

// checkUnlogged stops a service, and checks that no log line contains a token or a part of one.
func (s *service) checkUnlogged(tokens ...string) {
	s.t.Helper()
	if err := s.stop(); err != nil { // this flushes the log
		s.t.Fatal(err)
	}
	log := s.log.String()
	for _, token := range tokens {
		for part := range strings.SplitSeq(token, ".") {
			if len(part) > 20 && strings.Contains(log, part) {
				s.t.Errorf("the log contains %q of the token %q", part, token)
			}
		}
	}
}

// TestAccessTokens checks which tokens are accepted, and which requests their scopes allow.
func TestAccessTokens(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	now := time.Now().Unix()
	rs, keyless := p.signer("RS256"), p.settings()
	text, key := newTestKey(t, "shop", false)
	set := p.settings()
	set.apiKeys = []apiKey{key}
	keyless.jwtIssuer, keyless.jwksURL = "", p.url+"/keys"
	s, ofEveryIssuer := startWithTokens(t, set), startWithTokens(t, keyless)
	user := fmt.Sprintf(`{"name": "Ann", "surname": "Lee", "password": %q}`, secret)
	for i, test := range []struct {
		name            string
		alg             string // RS256 if it is empty
		header          object
		claims          object
		service         *service // s if it is nil
		noRead, noWrite bool     // which requests the token does not allow
	}{
		{name: "RS256", alg: "RS256"},
		{name: "PS256", alg: "PS256"},
		{name: "ES256", alg: "ES256"},
		{name: "EdDSA", alg: "EdDSA"},
		{name: "media type", header: object{"typ": "application/at+jwt"}},
		{name: "typ in upper case", header: object{"typ": "AT+JWT"}},
		{name: "media type in mixed case", header: object{"typ": "Application/At+jwt"}},
		{name: "header with more", header: object{"x": 1, "cty": "x", "x5t": "x"}},
		{name: "aud with one", claims: object{"aud": []string{"users"}}},
		{name: "aud with several", claims: object{"aud": []string{"a", "users", "b"}}},
		{name: "expired within the leeway", claims: object{"exp": now - 20}},
		{name: "nbf in the past", claims: object{"nbf": now - 3600}},
		{name: "nbf within the leeway", claims: object{"nbf": now + 50}},
		{name: "iat in the future", claims: object{"iat": now + 3600}},
		{name: "times with fractions", claims: object{"exp": float64(now) + 60.5, "nbf": 0.5}},
		{name: "longest sub", claims: object{"sub": strings.Repeat("a", 255)}},
		{name: "sub with Unicode", claims: object{"sub": "Zoë \U0001f600|auth0"}},
		{name: "JWT_JWKS_URL", service: ofEveryIssuer},
		{name: "JWT_JWKS_URL and any iss", service: ofEveryIssuer, claims: object{"iss": "x"}},
		{name: "scope of reads", claims: object{"scope": "users:read"}, noWrite: true},
		{name: "scope of writes", claims: object{"scope": "users:write"}, noRead: true},
		{name: "scope with others", claims: object{"scope": "openid users:read x"}, noWrite: true},
		{name: "scope in another case", claims: object{"scope": "Users:Read users:write "},
			noRead: true},
		{name: "similar scopes", noRead: true, noWrite: true,
			claims: object{"scope": "users:reads xusers:read users users: users:read\tusers:write"}},
		{name: "no scope", claims: object{"scope": absent}, noRead: true, noWrite: true},
		{name: "scope of another type", claims: object{"scope": []string{"users:read"}},
			noRead: true, noWrite: true},
		{name: "scp as a string", claims: object{"scope": absent, "scp": "users:read users:write"}},
		{name: "scp as a list", claims: object{"scope": absent, "scp": []any{"users:write", 1}},
			noRead: true},
		{name: "list with both in one", noRead: true, noWrite: true,
			claims: object{"scope": absent, "scp": []string{"users:read users:write"}}},
		{name: "scope and scp", claims: object{"scope": "users:read", "scp": "users:write"}},
		{name: "scp of another type", claims: object{"scope": absent, "scp": 1}, noRead: true,
			noWrite: true},
	} {
		token := p.token(p.signer(cmp.Or(test.alg, "RS256")), test.header, test.claims)
		s := cmp.Or(test.service, s)
		for _, request := range []struct {
			method, path, body string
			want               int // with the scope
		}{
			{method: "GET", path: "/users", want: 200},
			{method: "HEAD", path: "/users/999", want: 404},
			{method: "GET", path: "/metrics", want: 200},
			{method: "POST", path: "/users", body: user, want: 201},
			{method: "PUT", path: "/users/999", body: user, want: 404},
			{method: "PATCH", path: "/users/999", body: user, want: 404},
			{method: "DELETE", path: "/users/999", want: 404},
			{method: "POST", path: fmt.Sprintf("/users/%d/password/verify", 1000+i),
				body: `{"password": "x"}`, want: 200},
		} {
			lacks, challenge := test.noWrite, lacksWrite
			if request.method == "GET" || request.method == "HEAD" {
				lacks, challenge = test.noRead, lacksRead
			}
			if lacks {
				request.want = 403
			} else {
				challenge = ""
			}
			a := s.do(request.method, request.path, request.body, bearer(token))
			if got := a.header.Get("WWW-Authenticate"); a.status != request.want || got != challenge {
				t.Errorf("%s: %s %s: status %d, WWW-Authenticate %q, want %d, %q: %.200s",
					test.name, request.method, request.path, a.status, got, request.want, challenge,
					a.body)
			}
		}
	}
	token := p.token(rs, nil, object{"sub": "zoe", "scope": "users:read"})
	for _, test := range []struct {
		name    string
		headers []string
		path    string // /users if it is empty
		want    int
	}{
		{name: "API key", headers: []string{bearer(text)}, want: 200},
		{name: "scheme in lower case", headers: []string{"Authorization: bearer  " + token}, want: 200},
		{name: "nothing", want: 401},
		{name: "no credentials", headers: []string{"Authorization: Bearer"}, want: 401},
		{name: "other scheme", headers: []string{"Authorization: Basic " + token}, want: 401},
		{name: "no scheme", headers: []string{"Authorization: " + token}, want: 401},
		{name: "twice", headers: []string{bearer(token), bearer(token)}, want: 401},
		{name: "other header", headers: []string{"Access-Token: " + token}, want: 401},
		{name: "query", path: "/users?access_token=" + token, want: 401},
		{name: "public route", path: "/openapi.json", want: 200},
		{name: "public route and a bad token", path: "/openapi.json",
			headers: []string{bearer(token + "x")}, want: 200},
	} {
		a := s.do("GET", cmp.Or(test.path, "/users"), "", test.headers...)
		got := a.header.Get("WWW-Authenticate")
		if a.status != test.want || (got == "Bearer") != (a.status == 401) {
			t.Errorf("%s: status %d, WWW-Authenticate %q, want %d: %s", test.name, a.status, got,
				test.want, a.body)
		}
	}
	s.checkUnlogged(token, text)
	for name, subject := range map[string]string{"subject": "zoe", "key": "shop"} {
		logged := func(line logLine) bool { return line[name] == subject }
		if !slices.ContainsFunc(s.log.lines("Request completed"), logged) {
			t.Errorf("no request with the %s %s in the log", name, subject)
		}
	}
}

// attack is a token that must be refused.
type attack struct {
	name, token string
	want        string // part of the answer
}

// What the answers to attacks say.
const (
	wrongSignature = "its signature is wrong, or not one of RS256, PS256, ES256, EdDSA"
	noToken        = "it is no API key of this service and no signed JWT"
	noSuchKey      = "the identity provider has no key with its kid and alg"
	noKid          = "its header has no kid"
	wrongTyp       = "its header typ must be at+jwt"
	unknownCrit    = "its header crit names extensions that are not supported"
	lacksClaim     = "it lacks exp, aud or iss"
	wrongClaim     = "a claim has the wrong type"
	wrongAudience  = "its aud does not name this service"
	wrongIssuer    = "its iss is not the identity provider of this service"
	wrongSubject   = "its sub must have 1 to 255 bytes without control characters"
	claimTwice     = "a claim is given twice"
	notUnicode     = "a claim is not valid Unicode"
	notObject      = "its claims are not a JSON object"
	expired        = "it has expired"
	notYetValid    = "it is not valid yet"
)

// attacksOnKeys are attacks on the signature, and on the choice of the key (RFC 8725, section 2).
// The provider at url has keys of the attacker.
func attacksOnKeys(p *provider, url string) []attack {
	rs, es, ed := p.signer("RS256"), p.signer("ES256"), p.signer("EdDSA")
	thief := newSigner("thief", "RS256", true)
	good, claims := p.token(rs, nil, nil), p.claims(nil)
	nothing := func(string) []byte { return nil }
	public := rs.key.Public().(*rsa.PublicKey)
	der, _ := x509.MarshalPKIXPublicKey(public)
	withSecret := func(secret []byte) string {
		return compact(rs.header(object{"alg": "HS256"}), claims, func(input string) []byte {
			mac := hmac.New(sha256.New, secret)
			io.WriteString(mac, input)
			return mac.Sum(nil)
		})
	}
	signed := func(by signer, changes object) string { return p.token(by, changes, nil) }
	last := strings.LastIndexByte(good, '.') + 1
	attacks := []attack{
		{"alg none", compact(rs.header(object{"alg": "none"}), claims, nothing), wrongSignature},
		{"alg none, signed", signed(rs, object{"alg": "none"}), wrongSignature},
		{"alg none at the end", compact(strings.TrimSuffix(rs.header(nil), "}")+`,"alg":"none"}`, claims,
			nothing), wrongSignature},
		{"alg None", compact(rs.header(object{"alg": "None"}), claims, nothing), noToken},
		{"alg nOnE", compact(rs.header(object{"alg": "nOnE"}), claims, nothing), noToken},
		{"no alg", signed(rs, object{"alg": absent}), noToken},
		{"alg null", signed(rs, object{"alg": nil}), noToken},
		{"alg list", signed(rs, object{"alg": []string{"RS256"}}), noToken},
		{"alg in lower case", signed(rs, object{"alg": "rs256"}), noToken},
		{"alg ES256K", signed(es, object{"alg": "ES256K"}), noToken},
		{"alg Ed25519", signed(ed, object{"alg": "Ed25519"}), noToken},
		{"empty signature", good[:last], wrongSignature},
		{"secret is the key as PEM", withSecret(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY",
			Bytes: der})), wrongSignature},
		{"secret is the key as DER", withSecret(der), wrongSignature},
		{"secret is the modulus", withSecret(public.N.Bytes()), wrongSignature},
		{"empty secret", withSecret(nil), wrongSignature},
		{"RS256 with the key of ES256", signed(rs, object{"kid": "ec"}), noSuchKey},
		{"ES256 with the key of RS256", signed(es, object{"kid": "rsa"}), noSuchKey},
		{"EdDSA with the key of ES256", signed(ed, object{"kid": "ec"}), noSuchKey},
		{"PS256 signed as RS256", signed(rs, object{"alg": "PS256"}), wrongSignature},
		{"RS256 signed as PS256", signed(p.signer("PS256"), object{"alg": "RS256"}), wrongSignature},
		{"other key of the same kid", signed(newSigner("rsa", "RS256", true), nil), wrongSignature},
		{"other EC key of the same kid", signed(newSigner("ec", "ES256", true), nil), wrongSignature},
		{"other kid", signed(thief, nil), noSuchKey},
		{"kid in upper case", signed(rs, object{"kid": "RSA"}), noSuchKey},
		{"kid with a space", signed(rs, object{"kid": "rsa "}), noSuchKey},
		{"kid with alg", signed(rs, object{"kid": "RS256 rsa"}), noSuchKey},
		{"kid is a path", signed(rs, object{"kid": "../../keys/rsa"}), noSuchKey},
		{"kid is a URL", signed(thief, object{"kid": url + "/keys"}), noSuchKey},
		{"kid is SQL", signed(rs, object{"kid": "' UNION SELECT 'rsa' --"}), noSuchKey},
		{"no kid", signed(rs, object{"kid": absent}), noKid},
		{"empty kid", signed(rs, object{"kid": ""}), noKid},
		{"kid null", signed(rs, object{"kid": nil}), noKid},
		{"kid number", signed(rs, object{"kid": 7}), noKid},
		{"kid list", signed(rs, object{"kid": []string{"rsa"}}), noKid},
		{"jku", signed(thief, object{"jku": url + "/keys"}), noSuchKey},
		{"jku and a kid of ours", signed(thief, object{"jku": url + "/keys", "kid": "rsa"}),
			wrongSignature},
		{"x5u", signed(thief, object{"x5u": url + "/keys", "kid": "rsa"}), wrongSignature},
		{"jwk", signed(thief, object{"jwk": thief.jwk()}), noSuchKey},
		{"jwk and a kid of ours", signed(thief, object{"jwk": thief.jwk(), "kid": "rsa"}),
			wrongSignature},
		{"jwk without a kid", signed(thief, object{"jwk": thief.jwk(), "kid": absent}), noKid},
		{"x5c", signed(thief, object{"x5c": []string{base64url(der)}, "kid": "rsa"}), wrongSignature},
		{"crit", signed(rs, object{"crit": []string{"exp"}, "exp": 1}), unknownCrit},
		{"crit b64", signed(rs, object{"crit": []string{"b64"}, "b64": false}), unknownCrit},
		{"empty crit", signed(rs, object{"crit": []string{}}), unknownCrit},
		{"crit null", signed(rs, object{"crit": nil}), unknownCrit},
		{"signature of another token", p.token(rs, nil, object{"sub": "bob"})[:strings.LastIndexByte(
			p.token(rs, nil, object{"sub": "bob"}), '.')+1] + good[last:], wrongSignature},
		{"other claims", strings.Split(good, ".")[0] + "." + base64url(p.claims(object{"sub": "bob"})) +
			"." + good[last:], wrongSignature},
		{"ES256 in DER", compact(es.header(nil), claims, func(input string) []byte {
			digest := sha256.Sum256([]byte(input))
			signature, _ := es.key.Sign(cryptorand.Reader, digest[:], crypto.SHA256)
			return signature
		}), wrongSignature},
		{"ES256 of zeros", compact(es.header(nil), claims, func(string) []byte {
			return make([]byte, 64)
		}), wrongSignature},
		{"ES256 without s", compact(es.header(nil), claims, func(input string) []byte {
			return es.sign(input)[:32]
		}), wrongSignature},
		{"ES256 with leading zeros", compact(es.header(nil), claims, func(input string) []byte {
			signature := es.sign(input)
			return slices.Concat([]byte{0}, signature[:32], []byte{0}, signature[32:])
		}), wrongSignature},
		{"EdDSA of zeros", compact(ed.header(nil), claims, func(string) []byte {
			return make([]byte, 64)
		}), wrongSignature},
		{"RS256 of zeros", compact(rs.header(nil), claims, func(string) []byte {
			return make([]byte, 256)
		}), wrongSignature},
		{"RS256 of one", compact(rs.header(nil), claims, func(string) []byte {
			return append(make([]byte, 255), 1)
		}), wrongSignature},
	}
	for _, alg := range []string{"HS256", "HS384", "HS512", "RS384", "RS512", "PS384", "PS512",
		"ES384", "ES512"} {
		attacks = append(attacks, attack{"alg " + alg, signed(rs, object{"alg": alg}), wrongSignature})
	}
	for _, typ := range []any{"JWT", absent, "dpop+jwt", "id_token", "logout+jwt", "", nil, 1,
		"application/jwt", "application/application/at+jwt", "at+jwt ", "at+jwt+x", []string{"at+jwt"}} {
		attacks = append(attacks, attack{fmt.Sprint("typ ", typ), signed(rs, object{"typ": typ}),
			wrongTyp})
	}
	return attacks
}

// attacksOnClaims are tokens with a valid signature whose claims are not those of an access token
// for this service.
func attacksOnClaims(p *provider) []attack {
	now := time.Now().Unix()
	rs, url := p.signer("RS256"), p.url
	attacks := []attack{}
	for _, test := range []struct {
		name  string
		value any
		want  string
	}{
		{"exp", absent, lacksClaim}, {"exp", nil, wrongClaim}, {"exp", "4102444800", wrongClaim},
		{"exp", true, wrongClaim}, {"exp", []int64{now + 60}, wrongClaim}, {"exp", 0, lacksClaim},
		{"exp", -1, expired}, {"exp", now - 61, expired}, {"exp", now - 3600, expired},
		{"exp", 1e300, "its exp is not a time"}, {"exp", -1e300, "its exp is not a time"},
		{"exp", json.Number("1e400"), notObject},
		{"exp", uint64(math.MaxInt64), "its exp is not a time"},
		{"nbf", now + 3600, notYetValid}, {"nbf", "0", wrongClaim}, {"nbf", nil, wrongClaim},
		{"nbf", 1e300, "its nbf is not a time"},
		{"aud", absent, lacksClaim}, {"aud", "", lacksClaim}, {"aud", []string{}, lacksClaim},
		{"aud", nil, lacksClaim}, {"aud", 7, lacksClaim}, {"aud", object{"users": 1}, lacksClaim},
		{"aud", []any{"users", 7}, wrongClaim}, {"aud", "shop", wrongAudience},
		{"aud", "user", wrongAudience}, {"aud", "users2", wrongAudience},
		{"aud", "Users", wrongAudience}, {"aud", "users ", wrongAudience},
		{"aud", "a users", wrongAudience}, {"aud", []string{"a", "users,b"}, wrongAudience},
		{"iss", absent, lacksClaim}, {"iss", "", lacksClaim}, {"iss", []string{url}, wrongClaim},
		{"iss", url + "/", wrongIssuer}, {"iss", strings.ToUpper(url), wrongIssuer},
		{"iss", url[:len(url)-1], wrongIssuer}, {"iss", url + "@evil.example", wrongIssuer},
		{"sub", absent, wrongSubject}, {"sub", "", wrongSubject}, {"sub", 7, wrongSubject},
		{"sub", nil, wrongSubject}, {"sub", []string{"ann"}, wrongSubject},
		{"sub", strings.Repeat("a", 256), wrongSubject},
		{"sub", strings.Repeat("é", 128), wrongSubject}, {"sub", "a\nb", wrongSubject},
		{"sub", "ann\x00", wrongSubject}, {"sub", "ann\u0085", wrongSubject},
		{"sub", "sql:postgres", "its sub must not begin with sql:"},
	} {
		attacks = append(attacks, attack{fmt.Sprint(test.name, " ", test.value),
			p.token(rs, nil, object{test.name: test.value}), test.want})
	}
	good := strings.TrimSuffix(p.claims(nil), "}")
	withMore := func(more string) string { return good + "," + more + "}" }
	for _, test := range []struct{ name, claims, want string }{
		{"sub twice", withMore(`"sub":"bob"`), claimTwice},
		{"same sub twice", withMore(`"sub":"ann"`), claimTwice},
		{"aud twice", withMore(`"aud":"users"`), claimTwice},
		{"exp twice", withMore(`"exp":4102444800`), claimTwice},
		{"escaped sub twice", withMore(`"\u0073ub":"bob"`), claimTwice},
		{"unknown claim twice", withMore(`"x":1,"x":1`), claimTwice},
		{"EXP", strings.Replace(good, `"exp"`, `"EXP"`, 1) + "}", lacksClaim},
		{"Aud", strings.Replace(good, `"aud"`, `"Aud"`, 1) + "}", lacksClaim},
		{"ISS", strings.Replace(good, `"iss"`, `"ISS"`, 1) + "}", lacksClaim},
		{"Sub", strings.Replace(good, `"sub"`, `"Sub"`, 1) + "}", wrongSubject},
		{"sub that is not UTF-8", strings.Replace(good, "ann", "ann\xff", 1) + "}", notUnicode},
		{"half of a pair", strings.Replace(good, "ann", `ann\ud800`, 1) + "}", notUnicode},
		{"other half of a pair", withMore(`"x":["\udc00"]`), notUnicode},
		{"name that is not UTF-8", withMore("\"\xff\":1"), notUnicode},
		{"null", "null", lacksClaim}, {"array", "[]", notObject}, {"string", `"x"`, notObject},
		{"claims in an array", "[" + good + "}]", notObject}, {"number", "7", notObject},
		{"empty", "", noToken}, {"half an object", good, noToken},
		{"two objects", good + "}" + good + "}", noToken}, {"BOM", "\ufeff" + good + "}", noToken},
		{"deep", strings.Repeat("[", 2500) + strings.Repeat("]", 2500), notObject},
		{"nested token", p.token(rs, nil, nil), noToken},
		{"nested token as a string", `"` + p.token(rs, nil, nil) + `"`, notObject},
	} {
		attacks = append(attacks, attack{"claims: " + test.name,
			compact(rs.header(nil), test.claims, rs.sign), test.want})
	}
	return attacks
}

// attacksOnForm are texts that are no JWT in its compact form (RFC 7515, section 7.1).
func attacksOnForm(p *provider) []attack {
	rs, es := p.signer("RS256"), p.signer("ES256")
	good := p.token(es, nil, nil)
	parts := strings.Split(good, ".")
	// The last character of 64 bytes has four bits that are not used.
	end := good[len(good)-1]
	bits := good[:len(good)-1] + string(rune(end)+1)
	jwe := base64url(`{"alg":"RSA-OAEP","enc":"A256GCM","typ":"at+jwt","kid":"rsa"}`)
	attacks := []attack{
		{"raw payload", compact(rs.header(object{"b64": false}), "x", func(string) []byte {
			return rs.sign(base64url(rs.header(object{"b64": false})) + "." + p.claims(nil))
		}), noToken},
		{"unused bits", bits, noToken},
		{"signature with padding", good + "==", noToken},
		{"header with padding", parts[0] + "=." + parts[1] + "." + parts[2], noToken},
		{"white space", parts[0] + ". " + parts[1] + "." + parts[2], noToken},
		{"standard base64", strings.NewReplacer("-", "+", "_", "/").Replace(good) + "+", noToken},
		{"JWE", jwe + ".x.x.x.x", noToken},
		{"one part", parts[0], noToken},
		{"two parts", parts[0] + "." + parts[1], noToken},
		{"four parts", good + "." + parts[2], noToken},
		{"four parts, the last empty", good + ".", noToken},
		{"dots", "..", noToken}, {"dots only", strings.Repeat(".", 7000), noToken},
		{"no header", "." + parts[1] + "." + parts[2], noToken},
		{"quotes", `"` + good + `"`, noToken},
		{"scheme twice", "Bearer " + good, noToken},
		{"two tokens", good + "," + good, noToken},
		{"JSON form", `{"payload":"` + parts[1] + `","protected":"` + parts[0] + `","signature":"` +
			parts[2] + `"}`, noToken},
		{"API key", "usk_" + strings.Repeat("a", 43), noToken},
	}
	for _, header := range []string{"", "null", "{}", "[]", "7", `"x"`, "{", "\xff",
		es.header(nil) + "x"} {
		attacks = append(attacks, attack{fmt.Sprintf("header %q", header),
			compact(header, p.claims(nil), es.sign), noToken})
	}
	return attacks
}

// TestTokenAttacks checks that tokens which are not valid are refused, and why. It also checks that
// the service does not ask the attacker for keys, and logs no subject and no token.
func TestTokenAttacks(t *testing.T) {
	t.Parallel()
	p, thief := startProvider(t), startProvider(t)
	var asked atomic.Int64
	thief.lie(func(http.ResponseWriter, *http.Request) { asked.Add(1) })
	s := startWithTokens(t, p.settings())
	attacks := slices.Concat(attacksOnKeys(p, thief.url), attacksOnClaims(p), attacksOnForm(p))
	var sent []string
	for _, test := range attacks {
		a := s.do("GET", "/users", "", bearer(test.token))
		challenge := a.header.Get("WWW-Authenticate")
		if a.status != 401 || challenge != invalidToken ||
			a.json(t, "detail") != "The access token is not valid: "+test.want {
			t.Errorf("%s: got %d, WWW-Authenticate %q, %s, want 401, %q, %q", test.name, a.status,
				challenge, a.body, invalidToken, test.want)
		}
		if len(test.token) > 20 && strings.Contains(a.body, test.token) {
			t.Errorf("%s: the answer repeats the token: %s", test.name, a.body)
		}
		sent = append(sent, test.token)
	}
	if n := asked.Load(); n > 0 {
		t.Errorf("the service asked the attacker for keys %d times", n)
	}
	if n := p.refreshes.Load(); n != 2 { // at the start, and for the first unknown key
		t.Errorf("the service asked the provider for keys %d times, want 2", n)
	}
	s.checkUnlogged(sent...)
	for _, line := range s.log.lines("Request completed") {
		if line["status"] != 401.0 || line["subject"] != nil {
			t.Errorf("log line %v, want status 401 without a subject", line)
		}
	}
}

// TestLargeTokens checks that tokens of any size that net/http lets pass are verified, and that
// larger ones are refused.
func TestLargeTokens(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	s := startWithTokens(t, p.settings())
	ed := p.signer("EdDSA")
	large := p.token(ed, nil, object{"x": strings.Repeat("x", 5000)})
	deep := p.token(ed, nil, object{"x": json.RawMessage(
		strings.Repeat("[", 2500) + strings.Repeat("]", 2500))})
	for name, token := range map[string]string{"7 KiB": large, "deep": deep} {
		if a := s.do("GET", "/users", "", bearer(token)); a.status != 200 || len(token) < 6900 {
			t.Errorf("%s, %d bytes: got %d %s, want 200", name, len(token), a.status, a.body)
		}
	}
	conn := s.dial()
	s.write(conn, "GET /users HTTP/1.1\r\nHost: test\r\n"+bearer(strings.Repeat(large, 2))+"\r\n\r\n")
	if line, _ := bufio.NewReader(conn).ReadString('\n'); !strings.Contains(line, " 431 ") {
		t.Errorf("14 KiB: got %q, want 431", line)
	}
	many := make(object)
	for i := range 2000 {
		many[fmt.Sprint(i)] = i
	}
	d := testDependencies(p.settings(), newMemory(), discardLog)
	d.tokens = newTokens(d.settings, d.log)
	if _, err := d.tokens.keys.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	h := newHandler(d)
	nested := strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000)
	for _, test := range []struct {
		name, token string
		want        int
	}{
		{"2000 claims", p.token(ed, nil, many), 200},
		{"a claim too deep for JSON", compact(ed.header(nil), strings.TrimSuffix(p.claims(nil), "}")+
			`,"x":`+nested+"}", ed.sign), 401},
		{"a header too deep for JSON", compact(`{"x":`+nested+"}", p.claims(nil), ed.sign), 401},
		{"1 MB of dots", strings.Repeat(".", 1_000_000), 401},
	} {
		if a := ask(h, "GET", "/users", nil, bearer(test.token)); a.status != test.want {
			t.Errorf("%s: got %d %s, want %d", test.name, a.status, a.body, test.want)
		}
	}
}

// serveTokens returns a service in this process that accepts tokens, with their keys, and keeps the
// keys up to date until the test ends. It runs in a synctest bubble, whose clock stands still while
// the provider answers. stop flushes the log.
func serveTokens(t *testing.T, set settings) (*service, *tokens) {
	t.Helper()
	log := &logBuffer{}
	out := &logWriter{w: log}
	d := testDependencies(set, newMemory(), newLogger(out, slog.LevelDebug))
	d.tokens = newTokens(set, d.log)
	s := serveInProcess(t, newHandler(d))
	s.log, s.stop = log, out.flush
	go d.tokens.run(t.Context())
	synctest.Wait()
	return s, d.tokens
}

// checkToken checks the status of GET /users with a token.
func (s *service) checkToken(what, token string, want int) {
	s.t.Helper()
	a := s.do("GET", "/users", "", bearer(token))
	challenge := a.header.Get("WWW-Authenticate")
	if a.status != want || (challenge == invalidToken) != (want == 401) {
		s.t.Errorf("%s: got %d, WWW-Authenticate %q, want %d: %s", what, a.status, challenge, want,
			a.body)
	}
}

// checkRefreshes checks how often a provider was asked for its configuration.
func (p *provider) checkRefreshes(t *testing.T, when string, want int64) {
	t.Helper()
	if n := p.refreshes.Load(); n != want {
		t.Errorf("refreshes %s: got %d, want %d", when, n, want)
	}
}

// TestTokenKeysAreRefreshed checks that unknown keys make the service ask for the keys once a
// minute, however many requests want them, and that it asks once an hour without them.
func TestTokenKeysAreRefreshed(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	synctest.Test(t, func(t *testing.T) {
		s, _ := serveTokens(t, p.settings())
		old, next := p.signer("EdDSA"), newSigner("next", "EdDSA", false)
		flood := func(when string, want int64) {
			t.Helper()
			var callers sync.WaitGroup
			for i := range 20 {
				unknown := signer{fmt.Sprint("unknown ", i), "EdDSA", next.key}
				callers.Go(func() { s.checkToken(when, p.token(unknown, nil, nil), 401) })
			}
			callers.Wait()
			p.checkRefreshes(t, when, want)
		}
		s.checkToken("at the start", p.token(old, nil, nil), 200)
		p.checkRefreshes(t, "at the start", 1)
		flood("soon after the start", 2)
		time.Sleep(keyPause - time.Second)
		flood("within a minute", 2)
		time.Sleep(time.Second)
		flood("after a minute", 3)
		flood("again", 3)
		p.rotate(next)
		s.checkToken("new key within a minute", p.token(next, nil, nil), 401)
		s.checkToken("old key", p.token(old, nil, nil), 200)
		time.Sleep(keyPause)
		s.checkToken("new key after a minute", p.token(next, nil, nil), 200)
		s.checkToken("old key that is replaced", p.token(old, nil, object{"sub": "bob"}), 401)
		p.checkRefreshes(t, "for a new key", 4)
		time.Sleep(keyInterval - time.Second)
		p.checkRefreshes(t, "within an hour", 4)
		time.Sleep(time.Second)
		synctest.Wait()
		p.checkRefreshes(t, "after an hour", 5)
		p.rotate(old)
		s.checkToken("new key right after a refresh", p.token(old, nil, object{"sub": "eve"}), 200)
	})
}

// TestTokenKeysInOutage checks that the last keys stay valid while the provider fails, that another
// key is 503, and that the log has one line about the outage and one about its end.
func TestTokenKeysInOutage(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	synctest.Test(t, func(t *testing.T) {
		s, _ := serveTokens(t, p.settings())
		next := newSigner("next", "ES256", false)
		p.lie(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) })
		time.Sleep(keyInterval)
		synctest.Wait()
		s.checkToken("known key", p.token(p.signer("ES256"), nil, nil), 200)
		s.checkToken("unknown key", p.token(next, nil, nil), 503)
		time.Sleep(10 * time.Minute)
		s.checkToken("known key after 10 min", p.token(p.signer("RS256"), nil, nil), 200)
		if n := p.refreshes.Load(); n < 50 || n > 80 {
			t.Errorf("attempts in 10 min: got %d, want one in up to %v", n, maxPause)
		}
		p.rotate(next)
		p.lie(nil)
		time.Sleep(maxPause)
		synctest.Wait()
		s.checkToken("new key", p.token(next, nil, nil), 200)
		s.stop()
		if n := len(s.log.lines("Keys of the identity provider loaded")); n != 2 {
			t.Errorf("lines about keys: got %d, want 2: %s", n, s.log)
		}
		lines := s.log.lines("Keys of the identity provider are not available")
		if len(lines) != 1 || lines[0]["level"] != "WARN" {
			t.Errorf("lines about the outage: got %v, want one at WARN", lines)
		}
	})
}

// TestTokenKeysAtStart checks that the service starts while the provider does not answer: tokens
// are 503 after a short wait, API keys work, and tokens work as soon as the provider answers.
func TestTokenKeysAtStart(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	answer := make(chan struct{})
	release := sync.OnceFunc(func() { close(answer) })
	t.Cleanup(release) // before the provider closes
	p.lie(func(w http.ResponseWriter, r *http.Request) {
		<-answer
		p.lie(nil)
		p.ServeHTTP(w, r)
	})
	set := p.settings()
	key, setting := newTestKey(t, "shop", false)
	set.apiKeys = []apiKey{setting}
	s := startService(t, set)
	token := p.token(p.signer("RS256"), nil, nil)
	start := time.Now()
	var callers sync.WaitGroup
	for range 10 {
		callers.Go(func() { s.checkToken("token without keys", token, 503) })
	}
	s.checkToken("API key", key, 200)
	callers.Wait()
	if took := time.Since(start); took < keyWait/2 || took > 3*keyWait {
		t.Errorf("tokens without keys took %v, want about %v", took, keyWait)
	}
	p.checkRefreshes(t, "by all requests", 1)
	release()
	s.waitForLine("Keys of the identity provider loaded", "keys", 4)
	s.checkToken("token", token, 200)
}

// TestSlowTokenKeys checks that a request waits a short time for a key that the service does not
// have, and that those with known keys do not wait.
func TestSlowTokenKeys(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	d := testDependencies(p.settings(), newMemory(), discardLog)
	d.tokens = newTokens(d.settings, d.log)
	stop := start(d.tokens.run)
	t.Cleanup(func() { stop(0) })
	s := serveInProcess(t, newHandler(d))
	s.checkToken("token", p.token(p.signer("RS256"), nil, nil), 200) // after the first refresh
	asked, next := make(chan struct{}), newSigner("next", "RS256", true)
	var once sync.Once
	p.lie(func(_ http.ResponseWriter, r *http.Request) {
		once.Do(func() { close(asked) })
		<-r.Context().Done()
	})
	begin := time.Now()
	waiting := make(chan answer, 1)
	go func() { waiting <- s.do("GET", "/users", "", bearer(p.token(next, nil, nil))) }()
	<-asked
	s.checkToken("known key", p.token(p.signer("ES256"), nil, nil), 200)
	if a := <-waiting; a.status != 503 || time.Since(begin) > 3*keyWait {
		t.Errorf("unknown key: got %d after %v, want 503 after %v", a.status, time.Since(begin), keyWait)
	}
}

// TestClientLeavesTokenKeys checks that the status in the log is 499 if the client leaves while the
// service waits for keys.
func TestClientLeavesTokenKeys(t *testing.T) {
	t.Parallel()
	p := newProvider("http://id.example")
	log := &logBuffer{}
	out := &logWriter{w: log}
	d := testDependencies(p.settings(), newMemory(), newLogger(out, slog.LevelInfo))
	d.tokens = newTokens(d.settings, d.log) // does not run
	ctx, leave := context.WithCancel(t.Context())
	leave()
	r := httptest.NewRequestWithContext(ctx, "GET", "/users", nil)
	r.Header.Set("Authorization", "Bearer "+p.token(p.signer("EdDSA"), nil, nil))
	aborted := serveOnce(newHandler(d), httptest.NewRecorder(), r)
	out.flush()
	lines := log.lines("Request completed")
	if !aborted || len(lines) != 1 || lines[0]["status"] != 499.0 || lines[0]["level"] != "INFO" {
		t.Errorf("aborted %t, log lines %v, want one with status 499 at INFO", aborted, lines)
	}
}

// TestTokenKeysRefused checks that wrong answers of a provider give no keys, and are logged once,
// in a short line.
func TestTokenKeysRefused(t *testing.T) {
	t.Parallel()
	other := startProvider(t)
	configuration := func(issuer, keys any) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			json.NewEncoder(w).Encode(object{"issuer": cmp.Or(issuer, any("http://"+r.Host)),
				"jwks_uri": keys})
		}
	}
	text := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) }
	}
	keysOf := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/keys" {
				io.WriteString(w, body)
				return
			}
			configuration(nil, "http://"+r.Host+"/keys")(w, r)
		}
	}
	const noJSON, tooLarge = "does not answer with JSON as expected", "answers more than 1048576 bytes"
	const noURL = "has a jwks_uri that cannot be used"
	const noKeys = "has no key for RS256, PS256, ES256 or EdDSA"
	for name, test := range map[string]struct {
		answer http.HandlerFunc
		want   string // in the log line
	}{
		"status 500": {want: "answers 500", answer: func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(500)
			io.WriteString(w, `{"keys":[]}`)
		}},
		"redirect": {want: "answers 307", answer: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.url+r.URL.Path, http.StatusTemporaryRedirect)
		}},
		"HTML":    {want: noJSON, answer: text("<html></html>")},
		"nothing": {want: noJSON, answer: text("")},
		"half":    {want: noJSON, answer: text(`{"issuer":`)},
		"array":   {want: noJSON, answer: text("[]")},
		"null":    {want: "names the issuer", answer: text("null")},
		"10 MB":   {want: tooLarge, answer: text("{" + strings.Repeat(" ", 10_000_000) + "}")},
		"endless": {want: tooLarge, answer: func(w http.ResponseWriter, _ *http.Request) {
			for line := []byte(strings.Repeat("[", 4096)); ; {
				if _, err := w.Write(line); err != nil {
					return
				}
			}
		}},
		"compressed 10 MB": {want: tooLarge, answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			zipped := gzip.NewWriter(w)
			defer zipped.Close()
			io.WriteString(zipped, strings.Repeat(" ", 10_000_000))
		}},
		"no HTTP": {want: "malformed HTTP", answer: func(w http.ResponseWriter, _ *http.Request) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			defer conn.Close()
			io.WriteString(conn, strings.Repeat("x", 100_000)+"\r\n\r\n")
		}},
		"aborted": {want: "EOF", answer: func(http.ResponseWriter, *http.Request) {
			panic(http.ErrAbortHandler)
		}},
		"other issuer": {want: "names the issuer", answer: configuration(other.url, other.url+"/keys")},
		"no issuer":    {want: "names the issuer", answer: configuration("", other.url+"/keys")},
		"long issuer": {want: "names the issuer",
			answer: configuration(strings.Repeat("x", 500_000), other.url+"/keys")},
		"no jwks_uri":        {want: noURL, answer: configuration(nil, "")},
		"relative jwks_uri":  {want: noURL, answer: configuration(nil, "/keys")},
		"jwks_uri of a file": {want: noURL, answer: configuration(nil, "file:///etc/passwd")},
		"jwks_uri with user": {want: noURL, answer: configuration(nil, "http://u:p@127.0.0.1:1/keys")},
		"long jwks_uri": {want: noURL,
			answer: configuration(nil, "http://127.0.0.1:1/"+strings.Repeat("x", 500_000))},
		"jwks_uri of a number": {want: noJSON, answer: configuration(nil, 7)},
		"no keys":              {want: noKeys, answer: keysOf("{}")},
		"empty keys":           {want: noKeys, answer: keysOf(`{"keys":[]}`)},
		"keys of other types":  {want: noKeys, answer: keysOf(`{"keys":[{"kid":"a","kty":"oct"},7]}`)},
		"keys in an object":    {want: noJSON, answer: keysOf(`{"keys":{"a":{}}}`)},
		"large keys": {want: tooLarge,
			answer: keysOf(`{"keys":[` + strings.Repeat(" ", 2_000_000) + "]}")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := startProvider(t)
			p.lie(test.answer)
			synctest.Test(t, func(t *testing.T) {
				s, _ := serveTokens(t, p.settings())
				time.Sleep(keyPause)
				s.checkToken("token", p.token(p.signer("EdDSA"), nil, nil), 503)
				s.stop()
				lines := s.log.lines("Keys of the identity provider are not available")
				if len(lines) != 1 || lines[0]["level"] != "WARN" ||
					!strings.Contains(fmt.Sprint(lines[0]["error"]), test.want) {
					t.Errorf("got the lines %.2000v, want one at WARN with %q", lines, test.want)
				}
				for line := range strings.Lines(s.log.String()) {
					if len(line) > 2*maxLogged {
						t.Errorf("a line has %d bytes: %.200s", len(line), line)
					}
				}
			})
		})
	}
	t.Cleanup(func() { other.checkRefreshes(t, "of the target of a redirect", 0) })
}

// TestTokenKeysNeedTLS checks that a provider with TLS cannot name keys without. It is not
// parallel, because it changes the transport of all requests.
func TestTokenKeysNeedTLS(t *testing.T) {
	p := newProvider("")
	web := httptest.NewTLSServer(p)
	defer web.Close()
	p.url = web.URL
	before := http.DefaultTransport
	defer func() { http.DefaultTransport = before }()
	http.DefaultTransport = web.Client().Transport
	k := &keySet{issuer: p.url}
	if keys, err := k.fetch(t.Context()); err != nil || len(keys) != 4 {
		t.Errorf("fetch: got %d keys, %v, want 4", len(keys), err)
	}
	p.lie(func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(object{"issuer": p.url, "jwks_uri": "http://127.0.0.1:1/keys"})
	})
	_, err := k.fetch(t.Context())
	if err == nil || !strings.Contains(err.Error(), "jwks_uri that cannot be used") {
		t.Errorf("fetch of keys without TLS: got %v, want an error about jwks_uri", err)
	}
}

// TestUnusableTokenKeys checks which keys of a set are used: weak keys, keys for other purposes and
// malformed ones are ignored.
func TestUnusableTokenKeys(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	rs, es, ed := p.signer("RS256").jwk(), p.signer("ES256").jwk(), p.signer("EdDSA").jwk()
	weak, err := rsa.GenerateKey(cryptorand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, _ := p384.PublicKey.Bytes()
	zeros := base64url(make([]byte, 32))
	set := []string{"null", "7", `"x"`, "[]", "{}", `{"kty":"RSA","kid":7}`,
		`{"kty":"RSA","kid":"a","n":7}`, `{"kty":"oct","kid":"oct","k":"AAAA","alg":"HS256"}`,
		changed(rs, object{"kid": "rs only", "alg": "RS256"}),
		changed(rs, object{"kid": "ps only", "alg": "PS256", "key_ops": []string{"verify"}}),
		changed(es, object{"kid": "padded", "use": absent, "x": es["x"].(string) + "="}),
		changed(ed, object{"kid": "with alg", "alg": "EdDSA", "x5c": []string{"x"}, "x": ed["x"]})}
	for i, key := range []struct{ base, changes object }{
		{rs, object{"kid": absent}}, {rs, object{"kid": ""}}, {rs, object{"kty": absent}},
		{rs, object{"use": "enc"}}, {es, object{"use": "enc"}}, {ed, object{"use": "SIG"}},
		{rs, object{"key_ops": []string{"sign"}}}, {rs, object{"key_ops": []string{}}},
		{rs, object{"key_ops": []string{"encrypt", "wrapKey"}}},
		{rs, object{"alg": "RS384"}}, {rs, object{"alg": "RSA-OAEP"}}, {rs, object{"alg": "ES256"}},
		{es, object{"alg": "RS256"}}, {es, object{"alg": "ES384"}}, {ed, object{"alg": "ES256"}},
		{es, object{"alg": "HS256"}}, {rs, object{"kty": "rsa"}}, {rs, object{"kty": "EC"}},
		{rs, object{"n": base64url(weak.N.Bytes())}}, {rs, object{"n": absent}}, {rs, object{"n": ""}},
		{rs, object{"n": base64url(bytes.Repeat([]byte{255}, 2048))}}, {rs, object{"n": "+/+/"}},
		{rs, object{"e": "AQ"}}, {rs, object{"e": "Ag"}}, {rs, object{"e": "AAEAAA"}},
		{rs, object{"e": ""}}, {rs, object{"e": absent}}, {rs, object{"e": "AQAAAAE"}},
		{es, object{"y": es["x"]}}, {es, object{"x": zeros, "y": zeros}}, {es, object{"y": absent}},
		{es, object{"x": "AA"}}, {es, object{"crv": "P-384", "x": base64url(point[1:49]),
			"y": base64url(point[49:])}},
		{es, object{"x": base64url(point[1:49]), "y": base64url(point[49:])}},
		{es, object{"crv": "secp256k1"}}, {es, object{"crv": "p-256"}}, {es, object{"crv": absent}},
		{es, object{"x": base64url(bytes.Repeat([]byte{255}, 32))}},
		{ed, object{"crv": "X25519"}}, {ed, object{"crv": "Ed448"}}, {ed, object{"kty": "EC"}},
		{ed, object{"x": ed["x"].(string)[:40]}}, {ed, object{"x": absent}},
	} {
		kid := fmt.Sprint("wrong ", i)
		if _, ok := key.changes["kid"]; !ok {
			key.changes["kid"] = kid
		}
		set = append(set, changed(key.base, key.changes))
	}
	set = append(set, changed(rs, nil), changed(es, nil), changed(ed, nil))
	p.lie(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"keys":[`+strings.Join(set, ",")+"]}")
	})
	k := &keySet{url: p.url}
	keys, err := k.fetch(t.Context())
	got := slices.Sorted(maps.Keys(keys))
	want := []string{"ES256 ec", "ES256 padded", "EdDSA ed", "EdDSA with alg", "PS256 ps only",
		"PS256 rsa", "RS256 rs only", "RS256 rsa"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("fetch: got the keys %q, %v, want %q", got, err, want)
	}
	for id, key := range keys {
		_, kid, _ := strings.Cut(id, " ")
		for _, s := range p.signers {
			public := s.key.Public().(interface{ Equal(crypto.PublicKey) bool })
			if kid == s.kid && !public.Equal(key) {
				t.Errorf("%s is another key", id)
			}
		}
	}
}

// TestUnusualTokenKeys checks that keys which look right, but verify nothing, make no token valid.
func TestUnusualTokenKeys(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	rs, ed := p.signer("RS256"), p.signer("EdDSA")
	even := new(big.Int).Lsh(big.NewInt(1), 2047)
	odd := new(big.Int).Add(even, big.NewInt(1))
	keys := []string{changed(rs.jwk(), object{"kid": "even", "n": base64url(even.Bytes())}),
		changed(rs.jwk(), object{"kid": "odd", "n": base64url(odd.Bytes())}),
		changed(ed.jwk(), object{"kid": "no point", "x": base64url(bytes.Repeat([]byte{2}, 32))})}
	set := p.settings()
	set.jwtIssuer, set.jwksURL = "", p.url
	p.lie(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"keys":[`+strings.Join(keys, ",")+"]}")
	})
	s := startWithTokens(t, set)
	for _, by := range []signer{{"even", "RS256", rs.key}, {"even", "PS256", rs.key},
		{"odd", "RS256", rs.key}, {"no point", "EdDSA", ed.key}} {
		s.checkToken(by.kid, p.token(by, nil, nil), 401)
	}
}

// TestTokenTimes checks the leeway of a minute to the second.
func TestTokenTimes(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	synctest.Test(t, func(t *testing.T) {
		s, _ := serveTokens(t, p.settings())
		now := time.Now().Unix()
		for name, test := range map[string]struct {
			claims object
			want   int
		}{
			"expired 59 s ago":  {claims: object{"exp": now - 59}, want: 200},
			"expired 60 s ago":  {claims: object{"exp": now - 60}, want: 401},
			"valid in 60 s":     {claims: object{"nbf": now + 60}, want: 200},
			"valid in 61 s":     {claims: object{"nbf": now + 61}, want: 401},
			"valid for a year":  {claims: object{"exp": now + 365*86400}, want: 200},
			"never valid":       {claims: object{"exp": now + 10, "nbf": now + 100}, want: 401},
			"valid for no time": {claims: object{"exp": now, "nbf": now}, want: 200},
		} {
			s.checkToken(name, p.token(p.signer("EdDSA"), nil, test.claims), test.want)
		}
		token := p.token(p.signer("EdDSA"), nil, object{"exp": now + 10, "nbf": now + 65})
		s.checkToken("too early", token, 401)
		time.Sleep(5 * time.Second)
		s.checkToken("a token that was refused", token, 200)
		time.Sleep(64 * time.Second)
		s.checkToken("a remembered token in its leeway", token, 200)
		time.Sleep(time.Second)
		s.checkToken("a remembered token that has expired", token, 401)
	})
}

// TestVerifiedTokens checks that a token which was verified is valid until it expires, also without
// its key, with the same scopes, and that the number of remembered tokens is limited.
func TestVerifiedTokens(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	synctest.Test(t, func(t *testing.T) {
		s, tokens := serveTokens(t, p.settings())
		if tokens.verified.max != maxTokens {
			t.Errorf("%d tokens are remembered, want %d", tokens.verified.max, maxTokens)
		}
		old := p.signer("ES256")
		claims := object{"exp": time.Now().Add(2 * keyInterval).Unix(), "scope": "users:read"}
		token := p.token(old, nil, claims)
		s.checkToken("new token", token, 200)
		p.rotate(newSigner("next", "ES256", false))
		time.Sleep(keyInterval)
		synctest.Wait()
		s.checkToken("new token without its key", p.token(old, nil, nil), 401)
		time.Sleep(keyInterval - time.Second)
		s.checkToken("remembered token", token, 200)
		if a := s.do("DELETE", "/users/1", "", bearer(token)); a.status != 403 {
			t.Errorf("DELETE with a remembered token to read: got %d, want 403", a.status)
		}
		s.checkToken("remembered token with another signature", token[:len(token)-4]+"AAAA", 401)
		time.Sleep(time.Second)
		s.checkToken("remembered token that has expired", token, 401)
		tokens.verified.max = 10
		for i := range 50 {
			by := p.signer("ES256")
			s.checkToken("one of many", p.token(by, nil, object{"sub": fmt.Sprint(i)}), 200)
			if n := len(tokens.verified.newer) + len(tokens.verified.older); n > 10 {
				t.Fatalf("%d tokens are remembered, want at most 10", n)
			}
		}
	})
}

// TestTokenCallers checks which credentials share a rate limit and an idempotency key: those of one
// issuer and subject, or of one API key.
func TestTokenCallers(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	key, setting := newTestKey(t, "ann", false)
	set := p.settings()
	set.jwtIssuer, set.jwksURL, set.apiKeys = "", p.url+"/keys", []apiKey{setting}
	limited := set
	limited.rateLimit = 0.01 // the burst is 1
	rs, es := p.signer("RS256"), p.signer("ES256")
	synctest.Test(t, func(t *testing.T) {
		s, _ := serveTokens(t, set)
		few, _ := serveTokens(t, limited)
		const once = "Idempotency-Key: x"
		for _, test := range []struct {
			name, credentials string
			id                float64 // of the user that the caller has created
			known             bool    // has the caller sent a request before?
		}{
			{name: "subject", credentials: p.token(rs, nil, nil), id: 1},
			{name: "other token", credentials: p.token(es, nil, object{"x": 1}), id: 1, known: true},
			{name: "other subject", credentials: p.token(rs, nil, object{"sub": "bob"}), id: 2},
			{name: "other issuer", credentials: p.token(rs, nil, object{"iss": "x"}), id: 3},
			{name: "subject in upper case", credentials: p.token(rs, nil, object{"sub": "ANN"}), id: 4},
			{name: "issuer with a space", credentials: p.token(rs, nil, object{"iss": "a b", "sub": "c"}),
				id: 5},
			{name: "subject with a space", credentials: p.token(rs, nil, object{"iss": "a", "sub": "b c"}),
				id: 6},
			{name: "API key of the same name", credentials: key, id: 7},
			{name: "API key again", credentials: key, id: 7, known: true},
			{name: "subject like a key", credentials: p.token(rs, nil, object{"sub": "key ann"}), id: 8},
		} {
			a := s.do("POST", "/users", john, bearer(test.credentials), once)
			if a.status != 201 || a.json(t, "id") != test.id {
				t.Errorf("%s: got %d %s, want the user %v", test.name, a.status, a.body, test.id)
			}
			want := map[bool]int{false: 200, true: 429}[test.known]
			if a := few.do("GET", "/users", "", bearer(test.credentials)); a.status != want {
				t.Errorf("%s: GET with a rate limit: got %d, want %d", test.name, a.status, want)
			}
		}
		few.checkToken("invalid token", "x.y.z", 401) // counts for its address
		if a := few.do("GET", "/docs", ""); a.status != 429 {
			t.Errorf("GET /docs after an invalid token: got %d, want 429", a.status)
		}
	})
}

// acceptToken is identify for the tokens of a provider, written anew from RFC 7515, RFC 7519 and
// RFC 9068. Its leeway is two seconds longer.
func acceptToken(p *provider, token string) (subject string, scopes []string, valid bool) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", nil, false
	}
	var decoded [3][]byte
	for i, part := range parts {
		if again, _ := recode(base64.RawURLEncoding, part); again != part {
			return "", nil, false
		}
		decoded[i], _ = base64.RawURLEncoding.DecodeString(part)
	}
	var header map[string]any
	if json.Unmarshal(decoded[0], &header) != nil || header["crit"] != nil {
		return "", nil, false
	}
	typ, _ := header["typ"].(string)
	isToken := strings.EqualFold(typ, "at+jwt") || strings.EqualFold(typ, "application/at+jwt")
	verified := false
	digest := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	for _, s := range p.signers {
		verified = verified || header["kid"] == s.kid &&
			verify(s.key.Public(), header["alg"], parts[0]+"."+parts[1], digest[:], decoded[2])
	}
	claims, unique := strictObject(decoded[1])
	subject, _ = claims["sub"].(string)
	if !isToken || !verified || !unique || claims["iss"] != p.url || subject == "" ||
		len(subject) > 255 || strings.ContainsFunc(subject, unicode.IsControl) ||
		strings.HasPrefix(subject, "sql:") {
		return "", nil, false
	}
	audience, isList := claims["aud"].([]any)
	if !isList {
		audience = []any{claims["aud"]}
	}
	now := float64(time.Now().Unix())
	expires, hasEnd := claims["exp"].(float64)
	begins, hasBegin := claims["nbf"].(float64)
	_, hasAnyBegin := claims["nbf"]
	if !slices.Contains(audience, any("users")) || !hasEnd || expires < now-62 ||
		hasBegin != hasAnyBegin || begins > now+62 {
		return "", nil, false
	}
	scope, _ := claims["scope"].(string)
	scopes = strings.Split(scope, " ")
	scp, _ := claims["scp"].(string)
	scopes = append(scopes, strings.Split(scp, " ")...)
	list, _ := claims["scp"].([]any)
	for _, each := range list {
		scopes = append(scopes, fmt.Sprint(each))
	}
	return subject, scopes, true
}

// verify reports whether a signature is valid for an algorithm and the type of the key.
func verify(key any, alg any, input string, digest, signature []byte) bool {
	switch key := key.(type) {
	case *rsa.PublicKey:
		return alg == "RS256" && rsa.VerifyPKCS1v15(key, crypto.SHA256, digest, signature) == nil ||
			alg == "PS256" && rsa.VerifyPSS(key, crypto.SHA256, digest, signature, nil) == nil
	case *ecdsa.PublicKey:
		return alg == "ES256" && len(signature) == 64 && ecdsa.Verify(key, digest,
			new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
	case ed25519.PublicKey:
		return alg == "EdDSA" && ed25519.Verify(key, []byte(input), signature)
	}
	return false
}

// strictObject decodes an object in UTF-8 whose names are unique. U+FFFD in a value means that half
// a surrogate pair was replaced, unless the text has it too.
func strictObject(text []byte) (values object, ok bool) {
	if json.Unmarshal(text, &values) != nil || values == nil || !utf8.Valid(text) {
		return nil, false
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.Token()
	names := 0
	for ; decoder.More(); names++ {
		var value any
		decoder.Token()
		decoder.Decode(&value)
	}
	const replacement = "\ufffd"
	isReplaced := strings.Contains(fmt.Sprint(values), replacement) &&
		!strings.Contains(string(text), replacement) &&
		!strings.Contains(strings.ToLower(string(text)), `\ufffd`)
	return values, names == len(values) && !isReplaced
}

// FuzzAccessToken sends a text, and a token with a valid signature, after Bearer. It checks that
// identify accepts nothing that acceptToken does not.
func FuzzAccessToken(f *testing.F) {
	p := newProvider("https://id.example")
	a := newAccess(p.settings(), newTokens(p.settings(), discardLog))
	set := a.tokens.keys
	set.keys, set.asked = make(map[string]crypto.PublicKey), time.Now().Add(1000*time.Hour)
	for _, s := range p.signers {
		var key jsonWebKey
		if err := json.Unmarshal([]byte(changed(s.jwk(), nil)), &key); err != nil {
			f.Fatal(err)
		}
		key.addTo(set.keys)
	}
	const validFor = 100 * 365 * 24 * time.Hour
	for _, alg := range []string{"RS256", "PS256", "ES256", "EdDSA"} {
		f.Add("Bearer", p.signer(alg).header(nil),
			p.claims(object{"exp": time.Now().Add(validFor).Unix()}))
	}
	for _, attack := range slices.Concat(attacksOnKeys(p, "https://thief.example"),
		attacksOnClaims(p), attacksOnForm(p)) {
		f.Add("Bearer "+attack.token, "", "")
		if parts := strings.Split(attack.token, "."); len(parts) == 3 {
			header, _ := base64.RawURLEncoding.DecodeString(parts[0])
			claims, _ := base64.RawURLEncoding.DecodeString(parts[1])
			f.Add("Bearer", string(header), string(claims))
		}
	}
	f.Fuzz(func(t *testing.T, text, header, claims string) {
		if strings.ContainsAny(text, "\r\n") {
			return // cannot be part of a header
		}
		if text == "Bearer" {
			by := p.signer("EdDSA")
			var named struct{ Alg string }
			_ = json.Unmarshal([]byte(header), &named)
			if slices.Contains([]string{"RS256", "PS256", "ES256"}, named.Alg) {
				by = p.signer(named.Alg)
			}
			text = "Bearer " + compact(header, claims, by.sign)
		}
		r := httptest.NewRequest("GET", "/users", nil)
		r.Header["Authorization"] = []string{text}
		by := a.identify(r)
		if by.kind == "" {
			return
		}
		_, token, _ := strings.Cut(text, " ")
		subject, scopes, valid := acceptToken(p, strings.TrimLeft(token, " "))
		if !valid || by.kind != "subject" || by.name != subject {
			t.Errorf("%q is accepted as %+v, want %q, valid: %t", text, by, subject, valid)
		}
		for _, scope := range by.scopes {
			if !slices.Contains(scopes, scope) || !slices.Contains(allScopes, scope) {
				t.Errorf("%q gives the scope %q, want one of %q", text, scope, scopes)
			}
		}
	})
}

// BenchmarkIdentify measures how long it takes to know the caller of a request.
func BenchmarkIdentify(b *testing.B) {
	p := newProvider("https://id.example")
	text, setting, err := newAPIKey("shop", false)
	if err != nil {
		b.Fatal(err)
	}
	key, err := parseAPIKey(setting)
	if err != nil {
		b.Fatal(err)
	}
	set := p.settings()
	set.apiKeys = []apiKey{key}
	a := newAccess(set, newTokens(set, discardLog))
	a.tokens.keys.keys = map[string]crypto.PublicKey{}
	for _, alg := range []string{"RS256", "ES256", "EdDSA"} {
		s := p.signer(alg)
		a.tokens.keys.keys[alg+" "+s.kid] = s.key.Public()
	}
	for _, test := range []struct {
		name, credentials string
		isNew             bool
	}{
		{name: "key", credentials: text},
		{name: "remembered", credentials: p.token(p.signer("RS256"), nil, nil)},
		{name: "RS256", credentials: p.token(p.signer("RS256"), nil, nil), isNew: true},
		{name: "ES256", credentials: p.token(p.signer("ES256"), nil, nil), isNew: true},
		{name: "EdDSA", credentials: p.token(p.signer("EdDSA"), nil, nil), isNew: true},
	} {
		r := httptest.NewRequest("GET", "/users", nil)
		r.Header.Set("Authorization", "Bearer "+test.credentials)
		b.Run(test.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if by := a.identify(r); by.kind == "" {
					b.Fatal(by.refusal)
				}
				if test.isNew {
					a.tokens.verified.newer, a.tokens.verified.older = nil, nil
				}
			}
		})
	}
}
