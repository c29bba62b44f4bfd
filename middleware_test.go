package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
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

// dial opens a connection for what net/http's client would not send. It lasts for less
// than the service waits for a body, so that no answer may depend on one that is not sent.
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

// write sends a part of a request.
func (s *service) write(conn net.Conn, text string) {
	s.t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		s.t.Fatal(err)
	}
}

// send sends a request as it stands and checks what holds for every answer.
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

// serveHandler serves one handler at every path, as the service serves its own.
func serveHandler(t *testing.T, h handler) *service {
	t.Helper()
	log := &logBuffer{}
	out := &logWriter{w: log}
	logger := newLogger(out, slog.LevelDebug)
	server := newServer(testDependencies(settings{}, newMemory(), logger), &traffic{}, newAccess(settings{}),
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

// What hashes passwords leaves a core to the rest, so it has to know whether there is any.
func TestMixedTraffic(t *testing.T) {
	t.Parallel()
	server := newHandler(testDependencies(settings{}, newMemory(), slog.New(slog.DiscardHandler))).(*server)
	for _, test := range []struct {
		method string
		mixed  bool
	}{{"POST", false}, {"GET", true}, {"POST", true}} {
		server.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(test.method, "/users", nil))
		if mixed := server.traffic.isMixed(); mixed != test.mixed {
			t.Errorf("after a %s the traffic is mixed: %t", test.method, mixed)
		}
	}
}

var (
	uuidV4 = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	uuidV7 = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
)

func TestUUIDs(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	before := ""
	start := time.Now().UnixMilli()
	for range 1000 {
		v4, v7 := newUUIDv4(), newUUIDv7()
		if !uuidV4.MatchString(v4) || !uuidV7.MatchString(v7) || seen[v4] || seen[v7] {
			t.Fatalf("%s or %s is not a new UUID", v4, v7)
		}
		if v7[:13] < before {
			t.Errorf("%s comes after %s", v7, before)
		}
		seen[v4], seen[v7], before = true, true, v7[:13]
	}
	var last int64
	fmt.Sscanf(strings.Replace(before, "-", "", 1), "%x", &last)
	if last < start || last > time.Now().UnixMilli() {
		t.Errorf("%s is not of now", before)
	}
}

func TestTraceID(t *testing.T) {
	t.Parallel()
	const id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	const zeros = "00000000000000000000000000000000"
	const requestID, trace = "X-Request-Id: ", "traceparent: "
	const valid = trace + "00-" + id + "-" + parent
	const newID = ""
	upperID, upperParent, x128 := strings.ToUpper(id), strings.ToUpper(parent), strings.Repeat("x", 128)
	s := startService(t, memorySettings())
	for name, test := range map[string]struct {
		headers []string
		want    string
	}{
		"nothing":                    {nil, newID},
		"a request id":               {[]string{requestID + "AZaz09._:-"}, "AZaz09._:-"},
		"one of 1 character":         {[]string{requestID + "x"}, "x"},
		"one of 128 characters":      {[]string{requestID + x128}, x128},
		"one of 129 characters":      {[]string{requestID + x128 + "x"}, newID},
		"one with a space":           {[]string{requestID + "a b"}, newID},
		"one with a slash":           {[]string{requestID + "a/b"}, newID},
		"one with a quote":           {[]string{requestID + `a"b`}, newID},
		"one beyond ASCII":           {[]string{requestID + "é"}, newID},
		"one with a comma":           {[]string{requestID + "a,b"}, newID},
		"two request ids":            {[]string{requestID + "a", requestID + "b"}, newID},
		"one request id twice":       {[]string{requestID + "a", requestID + "a"}, newID},
		"two, only the first valid":  {[]string{requestID + "a", requestID + "/"}, newID},
		"a trace":                    {[]string{valid + "-01"}, id},
		"a trace, not sampled":       {[]string{valid + "-00"}, id},
		"a trace with other flags":   {[]string{valid + "-ff"}, id},
		"version 00 with more":       {[]string{valid + "-01-x"}, newID},
		"version 00 with a dash":     {[]string{valid + "-01-"}, newID},
		"version 01":                 {[]string{trace + "01-" + id + "-" + parent + "-01"}, id},
		"version fe with more":       {[]string{trace + "fe-" + id + "-" + parent + "-01-a-b"}, id},
		"version fe with other more": {[]string{trace + "fe-" + id + "-" + parent + "-01.x"}, newID},
		"version ff":                 {[]string{trace + "ff-" + id + "-" + parent + "-01"}, newID},
		"version 0":                  {[]string{trace + "0-" + id + "-" + parent + "-01"}, newID},
		"version 0x":                 {[]string{trace + "0x-" + id + "-" + parent + "-01"}, newID},
		"no trace id":                {[]string{trace + "00-" + zeros + "-" + parent + "-01"}, newID},
		"no parent id":               {[]string{trace + "00-" + id + "-" + zeros[:16] + "-01"}, newID},
		"a trace in capitals":        {[]string{trace + "00-" + upperID + "-" + parent + "-01"}, newID},
		"a parent in capitals":       {[]string{trace + "00-" + id + "-" + upperParent + "-01"}, newID},
		"flags in capitals":          {[]string{valid + "-0A"}, newID},
		"a short trace id":           {[]string{trace + "00-" + id[1:] + "-" + parent + "-01"}, newID},
		"a long trace id":            {[]string{trace + "00-0" + id + "-" + parent + "-01"}, newID},
		"a short parent id":          {[]string{trace + "00-" + id + "-" + parent[1:] + "-01"}, newID},
		"no flags":                   {[]string{valid}, newID},
		"a trace id alone":           {[]string{trace + id}, newID},
		"something in front":         {[]string{trace + "x00-" + id + "-" + parent + "-01"}, newID},
		"two traces":                 {[]string{valid + "-01", valid + "-01"}, newID},
		"a request id and a trace":   {[]string{requestID + "a", valid + "-01"}, "a"},
		"a bad one and a trace":      {[]string{requestID + "/", valid + "-01"}, id},
		"two and a trace":            {[]string{requestID + "a", requestID + "a", valid + "-01"}, id},
		"a request id and no trace":  {[]string{requestID + "b", trace + "x"}, "b"},
	} {
		a := s.do("GET", "/nothing", "", test.headers...)
		got := a.header.Get("X-Trace-Id")
		if test.want == newID && !uuidV4.MatchString(got) || test.want != newID && got != test.want {
			t.Errorf("%s: the trace id is %q", name, got)
		}
		if n := len(a.header["X-Trace-Id"]); n != 1 {
			t.Errorf("%s: X-Trace-Id is there %d times", name, n)
		}
		s.waitForLine("Request started", "trace_id", got)
		s.waitForLine("Request completed", "trace_id", got)
	}
	// net/http's client does not send an empty field.
	a := s.send("GET /nothing HTTP/1.1\r\nHost: test\r\nX-Request-Id:\r\n\r\n")
	if got := a.header.Get("X-Trace-Id"); !uuidV4.MatchString(got) {
		t.Errorf("an empty request id became %q", got)
	}
}

// FuzzTraceID holds the trace id of a request against wantTraceID.
func FuzzTraceID(f *testing.F) {
	const valid = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for _, parent := range []string{
		"", valid, valid + "-x", "01" + valid[2:], "ff" + valid[2:],
		"cc" + valid[2:] + "-a-b", "cc" + valid[2:] + ".x", strings.ToUpper(valid), valid[:53], "0" + valid,
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
		strings.Repeat("x", 128), strings.Repeat("x", 129), "a\n", "é", "a\xff", "\x00", "{}", "a,b",
	} {
		f.Add(id, valid, byte(1))
		f.Add(id, valid, byte(3))
	}
	f.Fuzz(func(t *testing.T, id, parent string, given byte) {
		if strings.Contains(parent, "\n") {
			return // no field of a header can
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
		got, want := requestTraceID(h), wantTraceID(h)
		if want != "" && got != want || want == "" && !uuidV4.MatchString(got) {
			t.Fatalf("%q has the trace id %q, not %q", h, got, want)
		}
		if again := requestTraceID(http.Header{"X-Request-Id": {got}}); again != got {
			t.Errorf("%q, sent on, becomes %q", got, again)
		}
	})
}

// wantTraceID is "" where the contract asks for a new one.
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

func consistsOf(text, characters string) bool {
	return !strings.ContainsFunc(text, func(c rune) bool {
		return !strings.ContainsRune(characters, c)
	})
}

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

func TestLogLines(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		created := s.do("POST", "/users/?x=1", john, "X-Request-Id: trace-1")
		s.waitForLine("Received event user.created with user_id=1", "trace_id", "trace-1")
		completed := s.waitForLine("Request completed", "trace_id", "trace-1")
		if completed["bytes"] != float64(len(created.body)) {
			t.Errorf("%v bytes were logged of %s", completed["bytes"], created.body)
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
				lines = append(lines, anyTimes(line))
			}
		}
		for _, want := range wanted { // more keys may follow
			if !slices.ContainsFunc(lines, func(line string) bool { return strings.HasPrefix(line, want) }) {
				t.Errorf("no line begins with\n%s, but these are\n%s", want, lines)
			}
		}
		if len(lines) != len(wanted) {
			t.Errorf("%d lines of one request:\n%s", len(lines), lines)
		}
	})
}

// anyTimes puts T and N for what a test cannot know of a log line.
func anyTimes(line string) string {
	line = regexp.MustCompile(`"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"`).ReplaceAllString(line, `"T"`)
	return regexp.MustCompile(`"(duration_ms|bytes)":\d+(\.\d+)?`).ReplaceAllString(line, `"$1":N`)
}

func TestLogSaysWhatWasAnswered(t *testing.T) {
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
			t.Errorf("%s %s: %d %s", test.method, test.target, a.status, a.body)
		}
		common := []any{"trace_id", id, "level", "INFO", "method", test.method, "path", test.path}
		s.waitForLine("Request started", common...)
		line := s.waitForLine("Request completed",
			append(common, "status", test.status, "bytes", len(a.body))...)
		if duration, ok := line["duration_ms"].(float64); !ok || duration <= 0 {
			t.Errorf("%s %s took %v", test.method, test.target, line["duration_ms"])
		}
	}
}

func TestMethodNotAllowed(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	methods := strings.Fields("GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT FOO get")
	for path, allow := range map[string]string{
		"/users":                   "GET, HEAD, POST",
		"/users/":                  "GET, HEAD, POST",
		"/users/1":                 "GET, HEAD, PUT, PATCH, DELETE", // no such user
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
				method == "CONNECT" && !strings.HasPrefix(path, "/") { // that would be an authority
				continue
			}
			a := s.send(method + " " + path + " HTTP/1.1\r\nHost: test\r\n\r\n")
			if a.status != http.StatusMethodNotAllowed || !slices.Equal(a.header["Allow"], []string{allow}) {
				t.Errorf("%s %s: %d, Allow: %q", method, path, a.status, a.header["Allow"])
			}
		}
	}
}

func TestNotFound(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	for _, target := range []string{
		"/nothing", "/users/1/", "/users/1/name", "/users/one", "/Users", "/users.json", "/user",
		"/healthz/", "/readyz/", "/metrics/", "/openapi.json/", "/schema/", "/docs/nothing", "/docs/nothing/x",
		"/index.html", "/%75sers/01", "/favicon.ico?x=1", "/docs/..%2f..%2fschema.sql",
		"http://elsewhere/nothing",
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "FOO"} {
			a := s.send(method + " " + target + " HTTP/1.1\r\nHost: test\r\n\r\n")
			if a.status != http.StatusNotFound || a.header.Get("Allow") != "" {
				t.Errorf("%s %s: %d %v %s", method, target, a.status, a.header, a.body)
			}
		}
	}
	for _, line := range []string{
		"OPTIONS *", "CONNECT elsewhere:443", "CONNECT /nothing", "CONNECT //users",
	} {
		if a := s.send(line + " HTTP/1.1\r\nHost: test\r\n\r\n"); a.status != http.StatusNotFound {
			t.Errorf("%s: %d %s", line, a.status, a.body)
		}
	}
}

// TestHead compares what matters of an answer's header: HEAD has all of it, and no body.
func TestHead(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		for range 3 {
			s.createUser("John", "Doe")
		}
		for _, path := range []string{
			"/users", "/users/?page=2&per_page=1", "/users?page=0", "/users/1", "/users/9", "/users/x",
			"/nothing", "/docs", "/docs/", "/docs/start.js", "/docs/swagger-ui.css", "/openapi.json",
			"/schema", "/", "/healthz", "/readyz", "/metrics",
		} {
			const plain = "Accept-Encoding: identity" // else net/http's client asks for gzip
			get, head := s.do("GET", path, "", plain), s.do("HEAD", path, "", plain)
			if head.status != get.status || head.body != "" {
				t.Errorf("HEAD %s: %d %q", path, head.status, head.body)
			}
			for _, name := range []string{"Content-Type", "Content-Length", "ETag", "Link", "Location"} {
				if name == "Content-Length" && (path == "/metrics" || get.status == http.StatusFound) {
					continue // changes from one request to the next, and is not known
				}
				if got, want := head.header.Get(name), get.header.Get(name); got != want {
					t.Errorf("HEAD %s: %s is %q, not %q", path, name, got, want)
				}
			}
		}
	})
}

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
				t.Errorf("%s %s: %d, Location: %s", method, path, a.status, a.header.Get("Location"))
			}
		}
	}
	// Neither spelling of the list is one.
	for _, path := range []string{"/users", "/users/"} {
		if a := s.do("GET", path, ""); a.status != http.StatusOK {
			t.Errorf("%s: %d", path, a.status)
		}
	}
}

func panicking(*response, *http.Request, caller) error {
	panic("at 10.0.0.1")
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

// TestPanicInAnswer breaks off an answer that has begun. The client must not take it for
// a whole one.
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
		t.Errorf("the answer seems whole: %s", content)
	}
	s.waitForLine("Request completed")
	if failures := s.log.lines("Request failed"); len(failures) != 1 {
		t.Errorf("the lines of the failure are %v", failures)
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

// TestClientLeavesInBody goes away in each way that TCP has, while the body is on its way.
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
				if got, _ := io.ReadAll(conn); len(got) > 0 { // "half" can still read
					t.Errorf("%s: 499 in the log, but the client was told %s", id, got)
				}
			}
		}
	}
	if a := s.do("GET", "/users", ""); a.json(t, "total") != 1.0 {
		t.Errorf("half a body made a user: %s", a.body)
	}
}

// TestClientLeavesInHandler goes away while a handler is at work, which sees it and ends
// in one way or another.
func TestClientLeavesInHandler(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]handler{
		"the context's error": func(_ *response, r *http.Request, _ caller) error {
			return fmt.Errorf("waiting: %w", r.Context().Err())
		},
		"an answer": func(w *response, _ *http.Request, _ caller) error {
			return writeJSON(w, http.StatusOK, "too late")
		},
		"a refusal": func(*response, *http.Request, caller) error { return errNotFound },
		"a 503":     func(*response, *http.Request, caller) error { return errUnavailable },
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
			t.Errorf("%s: %v", name, line)
		}
	}
}

// TestPanicAfterClientLeft: nobody waits for the answer, but the fault is the service's.
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
		t.Errorf("the lines of the failure are %v", failures)
	}
}

// lockUsers makes whoever needs the table of users wait until unlock. begun returns when
// somebody does.
func lockUsers(s *service) (begun, unlock func()) {
	s.t.Helper()
	conn := connect(s.t, s.settings.databaseURL)
	execute := func(sql string) {
		if _, err := conn.Exec(s.t.Context(), sql); err != nil {
			s.t.Fatal(err)
		}
	}
	execute("BEGIN; LOCK TABLE users")
	begun = func() {
		eventually(s.t, "a statement that waits", func() bool {
			return queryValue[bool](s.t, conn, `SELECT EXISTS (SELECT FROM pg_locks
				WHERE relation = 'users'::regclass AND NOT granted)`)
		})
	}
	return begun, func() { execute("ROLLBACK") }
}

// TestLockedTable keeps requests waiting for longer than they may wait. One client does
// not have the patience.
func TestLockedTable(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	s.createUser("John", "Doe")
	begun, unlock := lockUsers(s)
	impatient := s.dial()
	s.write(impatient, "GET /users/1 HTTP/1.1\r\nHost: test\r\nX-Request-Id: impatient\r\n\r\n")
	begun()
	impatient.Close()
	a := s.do("PUT", "/users/1", `{"name": "Jane"}`, "X-Request-Id: patient")
	if a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
		t.Errorf("an update of a locked table: %d %v %s", a.status, a.header, a.body)
	}
	s.waitForLine("Request completed", "trace_id", "patient", "status", 503, "level", "INFO")
	s.waitForLine("Request completed", "trace_id", "impatient", "status", 499, "level", "INFO")
	unlock()
	if a := s.do("GET", "/users/1", ""); a.header.Get("ETag") != `"1"` {
		t.Errorf("after the lock: %d %s", a.status, a.body)
	}
}

// TestChangeOutlivesClient: what was begun is done, with its event.
func TestChangeOutlivesClient(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	s.createUser("John", "Doe")
	begun, unlock := lockUsers(s)
	gone := s.dial()
	s.write(gone, "DELETE /users/1 HTTP/1.1\r\nHost: test\r\nX-Request-Id: gone\r\n\r\n")
	begun()
	gone.Close()
	unlock()
	s.waitForLine("Received event user.deleted with user_id=1", "trace_id", "gone")
	s.waitForLine("Request completed", "trace_id", "gone", "level", "INFO")
}
