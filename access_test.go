package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/time/rate"
)

// newTestKey returns a key and its setting.
func newTestKey(t *testing.T, name string, readOnly bool) (string, apiKey) {
	t.Helper()
	text, setting, err := newAPIKey(name, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	key, err := parseAPIKey(setting)
	if err != nil || key.name != name || key.readOnly != readOnly || key.digest != sha256.Sum256([]byte(text)) {
		t.Fatalf("%s is %+v, %v", setting, key, err)
	}
	return text, key
}

func TestAPIKeys(t *testing.T) {
	t.Parallel()
	full, fullKey := newTestKey(t, "shop", false)
	read, readKey := newTestKey(t, "report", true)
	set := memorySettings()
	set.apiKeys = []apiKey{fullKey, readKey}
	s := startService(t, set)
	user := fmt.Sprintf(`{"name": "Ann", "surname": "Lee", "password": %q}`, secret)
	try := fmt.Sprintf(`{"password": %q}`, secret)
	bearer := func(key string) string { return "Authorization: Bearer " + key }
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
		{method: "POST", path: "/users/1/password/verify", body: try, want: 401},
		{method: "POST", path: "/users/1/password/verify", body: try, headers: []string{bearer(read)}, want: 403},
		{method: "POST", path: "/users/1/password/verify", body: try, headers: []string{bearer(full)}, want: 200},
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
			t.Errorf("%s %s %.40v: status %d, not %d; %q", test.method, test.path, test.headers,
				a.status, test.want, challenge)
		}
	}
	if err := s.stop(); err != nil { // and write the log out
		t.Fatal(err)
	}
	names := make(map[any]int)
	for _, line := range s.log.lines("Request completed") {
		names[line["key"]]++
	}
	if names["shop"] != 5 || names["report"] != 8 {
		t.Errorf("the log names keys so often: %v", names)
	}
	for _, key := range []string{full, read, full[4:], fmt.Sprintf("%x", fullKey.digest)} {
		if strings.Contains(s.log.String(), key) {
			t.Errorf("the log tells %s", key)
		}
	}
}

func TestKeyCommand(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args []string
		want int
	}{
		{[]string{"key", "shop"}, 0},
		{[]string{"key", "report", "read"}, 0},
		{[]string{"key"}, 2},
		{[]string{"key", "a b"}, 2},
		{[]string{"key", "shop", "write"}, 2},
		{[]string{"key", strings.Repeat("x", 65)}, 2},
	} {
		var out bytes.Buffer
		if code := command(t.Context(), test.args, &out); code != test.want {
			t.Errorf("%q: exit code %d: %s", test.args, code, &out)
		}
		if test.want > 0 {
			continue
		}
		key := regexp.MustCompile(`(?m)^usk_[A-Za-z0-9_-]{43}$`).FindString(out.String())
		setting := regexp.MustCompile(`(?m)^API_KEYS=(.*)$`).FindStringSubmatch(out.String())
		if key == "" || setting == nil {
			t.Fatalf("%q prints %s", test.args, &out)
		}
		got, err := loadSettings(envOf("API_KEYS", setting[1]))
		if err != nil || len(got.apiKeys) != 1 || got.apiKeys[0].name != test.args[1] ||
			got.apiKeys[0].readOnly != (len(test.args) == 3) ||
			got.apiKeys[0].digest != sha256.Sum256([]byte(key)) {
			t.Errorf("%s: %+v, %v", &out, got.apiKeys, err)
		}
	}
}

// TestRateLimit has one request for each client, and none again for 100 seconds.
func TestRateLimit(t *testing.T) {
	t.Parallel()
	key, setting := newTestKey(t, "shop", false)
	set := memorySettings()
	set.rateLimit, set.apiKeys = 0.01, []apiKey{setting}
	set.trustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	s := startService(t, set)
	for i, test := range []struct {
		path   string
		header string
		want   int
	}{
		{"/docs", "", 200},
		{"/docs", "", 429},
		{"/nothing", "", 429},
		{"/users", "Authorization: Bearer wrong", 429},
		{"/healthz", "", 200},
		{"/readyz", "", 200},
		{"/users", "Authorization: Bearer " + key, 200},
		{"/users", "Authorization: Bearer " + key, 429},
		{"/docs", "X-Forwarded-For: 192.0.2.7", 200},
		{"/docs", "X-Forwarded-For: 192.0.2.7, 127.0.0.2", 429},
		{"/docs", "X-Forwarded-For: 198.51.100.1, 192.0.2.7", 429},
		{"/docs", "X-Forwarded-For: 2001:db8::1", 200},
		{"/docs", "X-Forwarded-For: 2001:db8::ffff", 429},
		{"/docs", "X-Forwarded-For: nonsense", 429},
	} {
		a := s.do("GET", test.path, "", test.header)
		if a.status != test.want {
			t.Errorf("request %d: status %d, not %d", i, a.status, test.want)
		}
		probe := strings.HasSuffix(test.path, "z")
		left := map[int]string{200: `"client";r=0;t=100`, 429: `"client";r=0;t=100`}[a.status]
		if probe {
			left = ""
		}
		if got := a.header.Get("RateLimit"); got != left {
			t.Errorf("request %d: RateLimit is %s, not %s", i, got, left)
		}
		if got := a.header.Get("RateLimit-Policy"); (got == `"client";q=1;w=100`) == probe {
			t.Errorf("request %d: RateLimit-Policy is %s", i, got)
		}
		if got := a.header.Get("Retry-After"); got != map[int]string{429: "100"}[a.status] {
			t.Errorf("request %d: Retry-After is %s", i, got)
		}
	}
}

func TestClientNetwork(t *testing.T) {
	t.Parallel()
	a := &access{proxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}}
	for _, test := range []struct {
		peer      string
		forwarded []string
		want      string
	}{
		{"192.0.2.1:1", nil, "192.0.2.1"},
		{"192.0.2.1:1", []string{"198.51.100.1"}, "192.0.2.1"},
		{"10.0.0.1:1", nil, "10.0.0.1"},
		{"10.0.0.1:1", []string{"198.51.100.1"}, "198.51.100.1"},
		{"[::ffff:10.0.0.1]:1", []string{"198.51.100.1"}, "198.51.100.1"},
		{"10.0.0.1:1", []string{"203.0.113.9, 198.51.100.1"}, "198.51.100.1"},
		{"10.0.0.1:1", []string{"203.0.113.9", "198.51.100.1,10.2.3.4"}, "198.51.100.1"},
		{"10.0.0.1:1", []string{"198.51.100.1, unknown"}, "10.0.0.1"},
		{"10.0.0.1:1", []string{"198.51.100.1:77"}, "10.0.0.1"},
		{"[::1]:1", []string{"2001:db8:1:2:3::4"}, "2001:db8:1:2::/64"},
		{"[2001:db8:1:2:3::4%eth0]:1", nil, "2001:db8:1:2::/64"},
		{"@", nil, "@"},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = test.peer
		r.Header["X-Forwarded-For"] = test.forwarded
		if got := a.clientNetwork(r); got != test.want {
			t.Errorf("%s, %q: %s, not %s", test.peer, test.forwarded, got, test.want)
		}
	}
}

func TestLimiterStaysBounded(t *testing.T) {
	t.Parallel()
	l := newLimiter[int]("test", rate.Limit(0.001), 1)
	for client := range 3 * maxClients {
		if err := l.admit(http.Header{}, client); err != nil {
			t.Fatalf("client %d: %v", client, err)
		}
		if n := len(l.buckets.newer) + len(l.buckets.older); n > maxClients {
			t.Fatalf("%d clients are remembered", n)
		}
	}
	for client := 3*maxClients - maxClients/2; client < 3*maxClients; client++ {
		if l.admit(http.Header{}, client) == nil {
			t.Fatalf("client %d is forgotten", client)
		}
	}
}

func TestOverloadIsRefused(t *testing.T) {
	t.Parallel()
	d := testDependencies(settings{}, newMemory(), slog.New(slog.DiscardHandler))
	server := newHandler(d).(*server)
	server.traffic.requests.Store(int64(d.limits.requests))
	for path, want := range map[string]int{"/users": 503, "/docs": 503, "/healthz": 200, "/readyz": 200} {
		a := ask(server, "GET", path, nil)
		if a.status != want || (a.header.Get("Retry-After") != "") != (want == 503) {
			t.Errorf("%s: status %d, Retry-After %q", path, a.status, a.header.Get("Retry-After"))
		}
	}
	server.traffic.requests.Add(-1)
	if a := ask(server, "GET", "/users", nil); a.status != 200 {
		t.Errorf("within the bound: status %d", a.status)
	}
}

func TestSecurityHeaders(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for path, want := range map[string]int{
		"/users": 200, "/users/1": 404, "/nothing": 404, "/": 302, "//users": 301, "/docs": 200,
		"/docs/start.js": 200, "/openapi.json": 200, "/healthz": 200, "/metrics": 200, "/users?x=1": 400,
	} {
		a := s.do("GET", path, "")
		if a.status != want && a.status != 307 {
			t.Errorf("%s: status %d, not %d", path, a.status, want)
		}
		for name, value := range map[string]string{
			"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
		} {
			if got := a.header.Get(name); got != value {
				t.Errorf("%s: %s is %q, not %q", path, name, got, value)
			}
		}
		policy := a.header.Get("Content-Security-Policy")
		if !strings.HasPrefix(policy, "default-src 'none'") || strings.Contains(policy, "script") != (path == "/docs") {
			t.Errorf("%s: Content-Security-Policy is %q", path, policy)
		}
	}
}

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
		{"POST", nil, 201, ""},
		{"POST", []string{"Origin: " + s.url}, 201, ""},
		{"POST", []string{"Origin: " + s.url, "Sec-Fetch-Site: same-origin"}, 201, ""},
		{"POST", []string{"Origin: " + other}, 403, ""},
		{"POST", []string{"Origin: null"}, 403, ""},
		{"POST", []string{"Origin: " + other, "Sec-Fetch-Site: cross-site"}, 403, ""},
		{"POST", []string{"Sec-Fetch-Site: cross-site"}, 403, ""},
		{"POST", []string{"Origin: " + ours, "Sec-Fetch-Site: cross-site"}, 201, ours},
		{"GET", []string{"Origin: " + ours, "Sec-Fetch-Site: cross-site"}, 200, ours},
		{"GET", []string{"Origin: " + other, "Sec-Fetch-Site: cross-site"}, 200, ""},
		{"OPTIONS", []string{"Origin: " + ours, "Access-Control-Request-Method: POST"}, 204, ours},
		{"OPTIONS", []string{"Origin: " + other, "Access-Control-Request-Method: POST"}, 405, ""},
		{"OPTIONS", []string{"Origin: " + ours}, 405, ours},
		{"OPTIONS", nil, 405, ""},
	} {
		text := body
		if test.method != "POST" {
			text = ""
		}
		a := s.do(test.method, "/users", text, test.headers...)
		if got := a.header.Get("Access-Control-Allow-Origin"); a.status != test.want || got != test.allowed {
			t.Errorf("%s %q: status %d, allowed %q", test.method, test.headers, a.status, got)
		}
		if got := a.header.Values("Vary"); len(got) != 1 || got[0] != "Origin" {
			t.Errorf("%s %q: Vary is %q", test.method, test.headers, got)
		}
		exposed := strings.Contains(a.header.Get("Access-Control-Expose-Headers"), "ETag")
		if exposed != (test.allowed != "") {
			t.Errorf("%s %q: exposed %v", test.method, test.headers, exposed)
		}
		methods, headers := a.header.Get("Access-Control-Allow-Methods"), a.header.Get("Access-Control-Allow-Headers")
		if a.status == 204 && (!strings.Contains(methods, "PATCH") || !strings.Contains(headers, "Authorization")) {
			t.Errorf("the preflight allows %q, %q", methods, headers)
		}
	}
	plain := startService(t, memorySettings()).do("GET", "/users", "", "Origin: "+ours)
	if plain.header.Get("Access-Control-Allow-Origin") != "" || plain.header.Get("Vary") != "" {
		t.Errorf("without CORS_ORIGINS: %v", plain.header)
	}
}

// TestSlowClients has connections that never finish their headers, their body, or the reading
// of their answers: everybody else is answered.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		const users = 3
		for range users {
			s.createUser("John", "Doe")
		}
		const slow = 150
		for range slow {
			for _, head := range []string{
				"GET /users HTTP/1.1\r\nHost: slow\r\n",
				"POST /users HTTP/1.1\r\nHost: slow\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
				strings.Repeat("GET /users?per_page=100 HTTP/1.1\r\nHost: slow\r\n\r\n", 20),
			} {
				conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				if _, err := conn.Write([]byte(head)); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i := range 20 {
			path := fmt.Sprint("/users/", i%users+1)
			if a := s.do("GET", path, ""); a.status != 200 {
				t.Errorf("GET %s: got %d %s, want 200", path, a.status, a.body)
			}
			body := fmt.Sprintf(`{"name": "Jane %d"}`, i)
			if a := s.do("PUT", path, body); a.status != 200 {
				t.Errorf("PUT %s: got %d %s, want 200", path, a.status, a.body)
			}
		}
	})
}
