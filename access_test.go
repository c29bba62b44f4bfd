package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
)

// newTestKey returns a new API key and its entry for API_KEYS, parsed.
func newTestKey(t *testing.T, name string, readOnly bool) (string, apiKey) {
	t.Helper()
	text, setting, err := newAPIKey(name, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	key, err := parseAPIKey(setting)
	if err != nil || key.name != name || key.readOnly != readOnly ||
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
		if code := command(t.Context(), test.args, &out); code != test.want {
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
			got.apiKeys[0].readOnly != (len(test.args) == 3) ||
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
		log := slog.New(slog.DiscardHandler)
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
		forwarded []string
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
		{peer: "10.0.0.1:1", forwarded: []string{"198.51.100.1:77"}, want: "10.0.0.1"},
		{peer: "[::1]:1", forwarded: []string{"2001:db8:1:2:3::4"}, want: "2001:db8:1:2::/64"},
		{peer: "[2001:db8:1:2:3::4%eth0]:1", want: "2001:db8:1:2::/64"},
		{peer: "@", want: "@"},
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr = test.peer
		r.Header["X-Forwarded-For"] = test.forwarded
		if got := a.clientNetwork(r); got != test.want {
			t.Errorf("peer %s, X-Forwarded-For %q: got %s, want %s", test.peer, test.forwarded, got,
				test.want)
		}
	}
}

// TestLimiterSize checks that a limiter remembers at most maxClients clients, and the most recent half
// of them.
func TestLimiterSize(t *testing.T) {
	t.Parallel()
	l := newLimiter[int]("test", rate.Limit(0.001), 1)
	for client := range 3 * maxClients {
		if err := l.admit(http.Header{}, client); err != nil {
			t.Fatalf("client %d: %v", client, err)
		}
		if n := len(l.buckets.newer) + len(l.buckets.older); n > maxClients {
			t.Fatalf("%d clients are remembered, want at most %d", n, maxClients)
		}
	}
	for client := 3*maxClients - maxClients/2; client < 3*maxClients; client++ {
		if l.admit(http.Header{}, client) == nil {
			t.Fatalf("client %d was admitted twice, want an error", client)
		}
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
	plain := startService(t, memorySettings()).do("GET", "/users", "", "Origin: "+ours)
	if plain.header.Get("Access-Control-Allow-Origin") != "" || plain.header.Get("Vary") != "" {
		t.Errorf("without CORS_ORIGINS: got %v, want no CORS headers", plain.header)
	}
}
