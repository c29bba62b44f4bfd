package main

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

const (
	maxInFlight = 4096 // requests, beyond which those under way would be late too
	maxClients  = 20_000
)

// access decides who may come in, from where, and how often.
type access struct {
	keys    []apiKey         // none: everybody may
	clients *limiter[string] // nil: as often as they like
	proxies []netip.Prefix   // whose X-Forwarded-For is believed
	origins []string         // whose pages a browser may let in
	cross   *http.CrossOriginProtection
}

func newAccess(s settings) *access {
	a := &access{keys: s.apiKeys, proxies: s.trustedProxies, origins: s.corsOrigins,
		cross: http.NewCrossOriginProtection()}
	if s.rateLimit > 0 {
		a.clients = newLimiter[string]("client", rate.Limit(s.rateLimit), int(math.Ceil(s.rateLimit)))
	}
	for _, origin := range s.corsOrigins {
		_ = a.cross.AddTrustedOrigin(origin) // loadSettings has seen that it can
	}
	return a
}

// securityHeaders go with every answer. /docs alone has another policy for its content.
var securityHeaders = http.Header{
	"Cache-Control":           {"no-store"},
	"Content-Security-Policy": {"default-src 'none'; frame-ancestors 'none'"},
	"Referrer-Policy":         {"no-referrer"},
	"X-Content-Type-Options":  {"nosniff"},
}

// admit says why r is not let in, and notes whose key it has. Probes are always let in: an
// overloaded process lives.
func (a *access) admit(w *response, r *http.Request, inFlight int64) error {
	w.key = a.keyOf(r.Header)
	a.allowOrigin(w.Header(), r.Header.Get("Origin"))
	if r.URL.Path == "/healthz" || r.URL.Path == "/readyz" {
		return nil
	}
	if a.clients != nil {
		client := a.clientNetwork(r)
		if w.key != nil {
			client = "key " + w.key.name
		}
		if err := a.clients.admit(w.Header(), client); err != nil {
			return err
		}
	}
	if inFlight > maxInFlight {
		return errOverloaded
	}
	if err := a.cross.Check(r); err != nil {
		return newProblem(http.StatusForbidden, "The page that sent this request is of another origin")
	}
	return nil
}

// apiKey is a key that somebody holds; of the key itself only the digest is known.
type apiKey struct {
	name     string
	digest   [sha256.Size]byte
	readOnly bool
}

var apiKeyPattern = regexp.MustCompile(`^([A-Za-z0-9._-]{1,64}):([0-9A-Fa-f]{64})(:read)?$`)

// parseAPIKey reads name:sha256hex, or name:sha256hex:read.
func parseAPIKey(text string) (apiKey, error) {
	fields := apiKeyPattern.FindStringSubmatch(text)
	if fields == nil {
		return apiKey{}, errUnusable
	}
	key := apiKey{name: fields[1], readOnly: fields[3] != ""}
	_, err := hex.Decode(key.digest[:], []byte(fields[2]))
	return key, err
}

// newAPIKey makes a key of 256 random bits, and what API_KEYS has to say about it.
func newAPIKey(name string, readOnly bool) (key, setting string, err error) {
	var random [32]byte
	rand.Read(random[:]) // never fails, says its documentation
	key = "usk_" + base64.RawURLEncoding.EncodeToString(random[:])
	setting = fmt.Sprintf("%s:%x", name, sha256.Sum256([]byte(key)))
	if readOnly {
		setting += ":read"
	}
	_, err = parseAPIKey(setting)
	return key, setting, err
}

// keyOf returns the key that the header has, or nil. It takes the same time for each of
// the keys and for one that is unknown.
func (a *access) keyOf(h http.Header) (found *apiKey) {
	if len(a.keys) == 0 {
		return nil
	}
	var token string
	if lines := h["Authorization"]; len(lines) == 1 {
		scheme, credentials, _ := strings.Cut(lines[0], " ")
		if strings.EqualFold(scheme, "Bearer") {
			token = strings.TrimLeft(credentials, " ")
		}
	}
	digest := sha256.Sum256([]byte(token))
	for i := range a.keys {
		if subtle.ConstantTimeCompare(digest[:], a.keys[i].digest[:]) == 1 {
			found = &a.keys[i]
		}
	}
	return found
}

// needsKey lets those in who have a key, and to read also those whose key is to read.
func (a *access) needsKey(h handler) handler {
	if len(a.keys) == 0 {
		return h
	}
	return func(w http.ResponseWriter, r *http.Request) error {
		key := w.(*response).key
		switch {
		case key == nil:
			w.Header().Set("WWW-Authenticate", "Bearer")
			return newProblem(http.StatusUnauthorized,
				"The request needs the header Authorization: Bearer <key>")
		case key.readOnly && r.Method != http.MethodGet && r.Method != http.MethodHead:
			return newProblem(http.StatusForbidden, "The key is one to read only")
		}
		return h(w, r)
	}
}

// clientNetwork is where r comes from: an IPv4 address, or the /64 that one holder of an
// IPv6 address has. X-Forwarded-For counts as far as trusted proxies have written it.
func (a *access) clientNetwork(r *http.Request) string {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	client := peer.Addr().Unmap()
	hops := strings.Split(strings.Join(r.Header["X-Forwarded-For"], ","), ",")
	for _, hop := range slices.Backward(hops) {
		if !slices.ContainsFunc(a.proxies, func(p netip.Prefix) bool { return p.Contains(client) }) {
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

// parsePrefix reads a network, or an address as the network that has no other.
func parsePrefix(text string) (netip.Prefix, error) {
	if address, err := netip.ParseAddr(text); err == nil && address.Zone() == "" {
		return netip.PrefixFrom(address, address.BitLen()), nil
	}
	return netip.ParsePrefix(text)
}

// What a page of another origin may send, and see of the answer.
const (
	corsMethods = "GET, HEAD, POST, PUT, PATCH, DELETE"
	corsHeaders = "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, " +
		"Traceparent, X-Request-Id"
	corsExposed = "ETag, Link, Location, RateLimit, RateLimit-Policy, Retry-After, X-Trace-Id"
	corsMaxAge  = "600" // seconds
)

// allowOrigin lets a page of that origin, if it is one of ours, see the answer.
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

// preflight answers a browser that asks whether a page may send a request, where it may.
func preflight(w http.ResponseWriter, r *http.Request) bool {
	h := w.Header()
	if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" ||
		h.Get("Access-Control-Allow-Origin") == "" {
		return false
	}
	h.Set("Access-Control-Allow-Methods", corsMethods)
	h.Set("Access-Control-Allow-Headers", corsHeaders)
	h.Set("Access-Control-Max-Age", corsMaxAge)
	w.WriteHeader(http.StatusNoContent)
	return true
}

// parseOrigin reads scheme://host or scheme://host:port, as a browser writes it.
func parseOrigin(text string) (string, error) {
	if text != strings.ToLower(text) {
		return "", errUnusable
	}
	return text, http.NewCrossOriginProtection().AddTrustedOrigin(text)
}

// limiter gives each client its tokens at a rate, up to a burst. It knows the clients that
// came last; one that it has forgotten has all its tokens again.
type limiter[K comparable] struct {
	name  string     // of its policy
	rate  rate.Limit // per second
	burst int

	mu      sync.Mutex
	buckets recent[K, *rate.Limiter]
}

func newLimiter[K comparable](name string, r rate.Limit, burst int) *limiter[K] {
	return &limiter[K]{name: name, rate: r, burst: burst,
		buckets: recent[K, *rate.Limiter]{max: maxClients}}
}

// admit takes one of the client's tokens. h says what is left (draft-ietf-httpapi-ratelimit-
// headers), and where there was none, in its 429, when to come again.
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
	h.Add("RateLimit-Policy", fmt.Sprintf(`%q;q=%d;w=%d`, l.name, l.burst, seconds(float64(l.burst))))
	h.Add("RateLimit", fmt.Sprintf(`%q;r=%d;t=%d`, l.name, int(max(left, 0)),
		seconds(float64(l.burst)-left)))
	if !allowed {
		h.Set("Retry-After", strconv.Itoa(max(seconds(1-left), 1)))
		return newProblem(http.StatusTooManyRequests,
			"Too many requests; Retry-After says when to come again")
	}
	return nil
}
