package main

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
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
	server := newServer(dependencies, &traffic{}, newAccess(settings{}),
		[]route{{"GET", "/{$}", h}, {"GET", "/x", h}})
	web := httptest.NewUnstartedServer(nil)
	web.Config = &newHTTPServer(server, logger).Server
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
		common := []any{"trace_id", id, "level", "INFO", "method", test.method, "path", test.path}
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
		"OPTIONS *", "CONNECT elsewhere:443", "CONNECT /nothing", "CONNECT //users",
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
		"/":                   "/docs",
		"/schema":             "/docs",
		"/docs/":              "/docs",
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
	s.waitForLine("Request completed", "trace_id", "patient", "status", 503, "level", "INFO")
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

// TestOverload checks that only probes are answered while too many requests are in progress.
func TestOverload(t *testing.T) {
	t.Parallel()
	d := testDependencies(settings{}, newMemory(), slog.New(slog.DiscardHandler))
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
