package main

// This file owns access: API keys, client addresses, other origins, and rates.

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const maxClients = 20_000 // whose rate is remembered

// access decides who may send requests, from where, and how often.
type access struct {
	keys        []apiKey         // nil: everybody may
	rates       *limiter[string] // of callers; nil: no limit
	proxies     []netip.Prefix   // whose X-Forwarded-For is trusted
	origins     []string         // whose pages may use the API
	crossOrigin *http.CrossOriginProtection
}

// newAccess returns the access rules of the settings, which loadSettings has validated.
func newAccess(s settings) *access {
	a := &access{keys: s.apiKeys, proxies: s.trustedProxies, origins: s.corsOrigins,
		crossOrigin: http.NewCrossOriginProtection()}
	if s.rateLimit > 0 {
		a.rates = newLimiter[string]("client", rate.Limit(s.rateLimit), int(math.Ceil(s.rateLimit)))
	}
	for _, origin := range s.corsOrigins {
		_ = a.crossOrigin.AddTrustedOrigin(origin) // loadSettings has tried it
	}
	return a
}

// securityHeaders are set on every answer. /docs replaces the Content-Security-Policy.
var securityHeaders = http.Header{
	"Cache-Control":           {"no-store"},
	"Content-Security-Policy": {"default-src 'none'; frame-ancestors 'none'"},
	"Referrer-Policy":         {"no-referrer"},
	"X-Content-Type-Options":  {"nosniff"},
}

// caller is who sent a request. The zero value is anonymous.
type caller struct {
	name     string // of the API key
	readOnly bool
}

// limitRate takes a token of the caller, or of an anonymous caller's network. It fails with a 429.
func (a *access) limitRate(h http.Header, r *http.Request, by caller) error {
	if a.rates == nil {
		return nil
	}
	client := "key " + by.name
	if by.name == "" {
		client = a.clientNetwork(r)
	}
	return a.rates.admit(h, client)
}

// apiKey is an entry of API_KEYS. The key itself is not known, only its digest.
type apiKey struct {
	name     string
	digest   [sha256.Size]byte
	readOnly bool
}

var apiKeyPattern = regexp.MustCompile(`^([A-Za-z0-9._-]{1,64}):([0-9A-Fa-f]{64})(:read)?$`)

// parseAPIKeys reads a list of keys, or "open", for which it returns nil.
func parseAPIKeys(text string) ([]apiKey, error) {
	if text == "open" {
		return nil, nil
	}
	return listOf(parseAPIKey)(text)
}

// parseAPIKey reads name:sha256hex, or name:sha256hex:read. It refuses the digests of what is no
// secret: no key at all, and the example in README.md.
func parseAPIKey(text string) (apiKey, error) {
	fields := apiKeyPattern.FindStringSubmatch(text)
	if fields == nil {
		return apiKey{}, errUnusable
	}
	key := apiKey{name: fields[1], readOnly: fields[3] != ""}
	_, err := hex.Decode(key.digest[:], []byte(fields[2]))
	switch key.digest {
	case sha256.Sum256(nil):
		err = reason("the digest of " + key.name + " is that of an empty key")
	case sha256.Sum256([]byte("usk_...")):
		err = reason("the digest of " + key.name + " is that of the example in README.md")
	}
	return key, err
}

// newAPIKey returns a new key of 256 random bits, and its entry for API_KEYS.
func newAPIKey(name string, readOnly bool) (key, setting string, err error) {
	var random [32]byte
	rand.Read(random[:]) // never fails, see its documentation
	key = "usk_" + base64.RawURLEncoding.EncodeToString(random[:])
	setting = fmt.Sprintf("%s:%x", name, sha256.Sum256([]byte(key)))
	if readOnly {
		setting += ":read"
	}
	_, err = parseAPIKey(setting)
	return key, setting, err
}

// identify returns the caller whose API key the header has, or the zero caller. It takes the same
// time for every key, known or not.
func (a *access) identify(h http.Header) (by caller) {
	if len(a.keys) == 0 {
		return caller{}
	}
	var token string
	if lines := h["Authorization"]; len(lines) == 1 {
		scheme, credentials, _ := strings.Cut(lines[0], " ")
		if strings.EqualFold(scheme, "Bearer") {
			token = strings.TrimLeft(credentials, " ")
		}
	}
	digest := sha256.Sum256([]byte(token))
	for _, key := range a.keys {
		if subtle.ConstantTimeCompare(digest[:], key.digest[:]) == 1 {
			by = caller{key.name, key.readOnly}
		}
	}
	return by
}

// protect returns the routes with handlers that require an API key, unless everybody may send
// requests. A read-only key allows GET and HEAD.
func (a *access) protect(routes []route) []route {
	if a.keys == nil {
		return routes
	}
	for i, r := range routes {
		routes[i].handler = func(w *response, request *http.Request, by caller) error {
			if by.name == "" {
				w.Header().Set("WWW-Authenticate", "Bearer")
				return newProblem(http.StatusUnauthorized,
					"An API key is required in the header Authorization: Bearer <key>")
			}
			if by.readOnly && r.method != http.MethodGet {
				return newProblem(http.StatusForbidden, "This API key is read-only")
			}
			return r.handler(w, request, by)
		}
	}
	return routes
}

// clientNetwork returns the client's IPv4 address, or the /64 network of its IPv6 address, because
// one client usually has all of it. It follows X-Forwarded-For as long as trusted proxies wrote it.
func (a *access) clientNetwork(r *http.Request) string {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	client := peer.Addr().Unmap()
	hops := strings.Split(strings.Join(r.Header["X-Forwarded-For"], ","), ",")
	for _, hop := range slices.Backward(hops) {
		trusted := func(proxy netip.Prefix) bool { return proxy.Contains(client) }
		if !slices.ContainsFunc(a.proxies, trusted) {
			break
		}
		address, err := netip.ParseAddr(strings.TrimSpace(hop))
		if err != nil {
			break
		}
		client = address.Unmap().WithZone("")
	}
	if client.Is6() {
		network, _ := client.Prefix(64)
		return network.String()
	}
	return client.String()
}

// parsePrefix reads a network, or an address as a network of one. An IPv4-mapped IPv6 address
// becomes an IPv4 address, as those of clients do.
func parsePrefix(text string) (netip.Prefix, error) {
	if address, err := netip.ParseAddr(text); err == nil && address.Zone() == "" {
		address = address.Unmap()
		return netip.PrefixFrom(address, address.BitLen()), nil
	}
	network, err := netip.ParsePrefix(text)
	if !network.Addr().Is4In6() {
		return network, err
	}
	if network.Bits() < 96 {
		return network, reason("a network of IPv4-mapped addresses has 96 bits or more")
	}
	return netip.PrefixFrom(network.Addr().Unmap(), network.Bits()-96), nil
}

// The values of the CORS headers.
const (
	corsMethods = "GET, HEAD, POST, PUT, PATCH, DELETE"
	corsHeaders = "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, " +
		"Traceparent, X-Request-Id"
	corsExposed = "ETag, Link, Location, RateLimit, RateLimit-Policy, Retry-After, X-Trace-Id"
	corsMaxAge  = "600" // seconds
)

// allowOrigin lets pages of origin read the answer, if it is one of CORS_ORIGINS.
func (a *access) allowOrigin(h http.Header, origin string) {
	if len(a.origins) == 0 {
		return
	}
	h.Add("Vary", "Origin")
	if slices.Contains(a.origins, origin) {
		h.Set("Access-Control-Allow-Origin", origin)
		h.Set("Access-Control-Expose-Headers", corsExposed)
	}
}

// isPreflight reports whether a browser asks if a page may send a request (Fetch Standard, section
// 3.3).
func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != ""
}

// allowPreflight answers a preflight request of an allowed origin with the methods and headers that
// a page may use.
func allowPreflight(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Access-Control-Allow-Methods", corsMethods)
	h.Set("Access-Control-Allow-Headers", corsHeaders)
	h.Set("Access-Control-Max-Age", corsMaxAge)
	w.WriteHeader(http.StatusNoContent)
}

// wrongOrigins are patterns of values that browsers never send as an origin, or that say nothing.
// The first that matches explains the mistake.
var wrongOrigins = []struct {
	pattern *regexp.Regexp
	why     reason
}{
	{regexp.MustCompile(`^\*$`),
		"* is not supported, because any page could then read and change users"},
	{regexp.MustCompile(`^null$`), "null is not supported, because any page can send it"},
	{regexp.MustCompile(`^(:[^/]|:/[^/]|[^:])*$`), "an origin begins with a scheme, such as https://"},
	{regexp.MustCompile(`//[^/?#]*@`), "an origin has no user name"},
	{regexp.MustCompile(`//[^/?#]*[/?#]`), "an origin ends after its host or port, without a slash"},
	{regexp.MustCompile(`[A-Z]`), "browsers send an origin in lower case"},
	{regexp.MustCompile(`^https:.*:443$|^http:.*:80$`), "browsers leave out the default port"},
	{regexp.MustCompile(`[^ -~]`), "browsers send letters outside ASCII in their xn-- form"},
}

var originPattern = regexp.MustCompile(
	`^[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[1-9][0-9]{0,4})?$`)

// parseOrigin reads scheme://host or scheme://host:port, spelled as browsers send it.
func parseOrigin(text string) (string, error) {
	for _, wrong := range wrongOrigins {
		if wrong.pattern.MatchString(text) {
			return "", wrong.why
		}
	}
	if !originPattern.MatchString(text) {
		return "", errUnusable
	}
	return text, http.NewCrossOriginProtection().AddTrustedOrigin(text)
}

// limiter gives each client tokens at a rate, up to a burst. It remembers the most recent clients;
// a forgotten client starts with all tokens.
type limiter[K comparable] struct {
	name  string     // of the policy, in the answer
	rate  rate.Limit // per second
	burst int

	mu      sync.Mutex
	buckets recent[K, *rate.Limiter]
}

// newLimiter returns a limiter that gives each client r tokens per second, and burst tokens at the
// start. name appears in the answers.
func newLimiter[K comparable](name string, r rate.Limit, burst int) *limiter[K] {
	return &limiter[K]{name: name, rate: r, burst: burst,
		buckets: recent[K, *rate.Limiter]{max: maxClients}}
}

// admit takes a token of the client, or fails with a 429. It sets the headers of
// draft-ietf-httpapi-ratelimit-headers, and Retry-After with the 429.
func (l *limiter[K]) admit(h http.Header, client K) error {
	now := time.Now()
	l.mu.Lock()
	bucket, ok := l.buckets.get(client)
	if !ok {
		bucket = rate.NewLimiter(l.rate, l.burst)
	}
	l.buckets.put(client, bucket)
	allowed := bucket.AllowN(now, 1)
	left := bucket.TokensAt(now)
	l.mu.Unlock()

	seconds := func(tokens float64) int { return int(math.Ceil(tokens / float64(l.rate))) }
	burst := float64(l.burst)
	h.Add("RateLimit-Policy", fmt.Sprintf(`%q;q=%d;w=%d`, l.name, l.burst, seconds(burst)))
	h.Add("RateLimit", fmt.Sprintf(`%q;r=%d;t=%d`, l.name, int(max(left, 0)), seconds(burst-left)))
	if !allowed {
		h.Set("Retry-After", strconv.Itoa(max(seconds(1-left), 1)))
		return newProblem(http.StatusTooManyRequests,
			"Too many requests; try again after Retry-After seconds")
	}
	return nil
}
