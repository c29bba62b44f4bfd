package main

// This file owns access: callers and their rights, API keys, client addresses, and other origins.

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
)

// access decides who may send requests, from where, and how often.
type access struct {
	keys        []apiKey         // nil: there are none
	tokens      *tokens          // nil: no access tokens
	rates       *limiter[string] // of callers; nil: no limit
	proxies     []netip.Prefix   // whose X-Forwarded-For and Forwarded are trusted
	origins     []string         // whose pages may use the API
	crossOrigin *http.CrossOriginProtection
	onlyLocal   bool // only this machine can connect, and needs no key
}

// newAccess returns the access rules of the settings, which loadSettings has validated.
func newAccess(s settings, t *tokens) *access {
	a := &access{keys: s.apiKeys, tokens: t, proxies: s.trustedProxies, origins: s.corsOrigins,
		crossOrigin: http.NewCrossOriginProtection()}
	a.onlyLocal = a.isOpen() && !s.open && isLoopback(s.host)
	if s.rateLimit > 0 {
		a.rates = newLimiter[string]("client", s.rateLimit, int(math.Ceil(s.rateLimit)))
	}
	for _, origin := range s.corsOrigins {
		_ = a.crossOrigin.AddTrustedOrigin(origin) // loadSettings has tried it
	}
	return a
}

// securityHeaders are set on every answer. /docs replaces the Content-Security-Policy. All answers
// share the values, which nobody changes.
var securityHeaders = http.Header{
	"Cache-Control":           {"no-store"},
	"Content-Security-Policy": {"default-src 'none'; frame-ancestors 'none'"},
	"Referrer-Policy":         {"no-referrer"},
	"X-Content-Type-Options":  {"nosniff"},
}

// isOpen reports whether everybody may send requests.
func (a *access) isOpen() bool { return a.keys == nil && a.tokens == nil }

// caller is who sent a request.
type caller struct {
	client  string   // distinguishes it from all other callers
	kind    string   // "key" or "subject"; "" without an API key or an access token
	name    string   // of the API key, or the subject of the token
	scopes  []string // which requests it may send
	refusal error    // why its API key or token is not accepted; nil if it has none
}

const anonymousActor = "anonymous" // of a change without an API key or a token

// actor returns the name under which the caller's changes are recorded.
func (c caller) actor() string { return cmp.Or(c.name, anonymousActor) }

// The scopes of access tokens. An API key has both, or scopeRead alone.
const (
	scopeRead  = "users:read"
	scopeWrite = "users:write"
)

var allScopes = []string{scopeRead, scopeWrite}

// apiKey is an entry of API_KEYS. The key itself is not known, only its digest.
type apiKey struct {
	name   string
	digest [sha256.Size]byte
	scopes []string
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
	key := apiKey{name: fields[1], scopes: allScopes}
	if fields[3] != "" {
		key.scopes = []string{scopeRead}
	}
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

// identify returns the caller of a request: the one whose API key or access token it has, else an
// anonymous one of its network. It takes the same time for every key, known or not.
func (a *access) identify(r *http.Request) caller {
	anonymous := caller{client: a.clientNetwork(r)}
	if a.isOpen() {
		return anonymous
	}
	var credentials string
	if lines := r.Header["Authorization"]; len(lines) == 1 {
		scheme, text, _ := strings.Cut(lines[0], " ")
		if strings.EqualFold(scheme, "Bearer") {
			credentials = strings.TrimLeft(text, " ")
		}
	}
	digest, by := sha256.Sum256([]byte(credentials)), anonymous
	for _, key := range a.keys {
		if subtle.ConstantTimeCompare(digest[:], key.digest[:]) == 1 {
			by = caller{client: "key " + key.name, kind: "key", name: key.name, scopes: key.scopes}
		}
	}
	if by.kind != "" || a.tokens == nil || credentials == "" {
		return by
	}
	by, err := a.tokens.identify(r.Context(), credentials, digest)
	if err != nil {
		by = anonymous
		by.refusal = err
	}
	return by
}

// protect returns the routes with handlers that require an API key or an access token, unless
// everybody may send requests. GET and HEAD require scopeRead, other methods scopeWrite.
func (a *access) protect(routes []route) []route {
	if a.isOpen() {
		return routes
	}
	for i, r := range routes {
		scope := scopeWrite
		if r.method == http.MethodGet {
			scope = scopeRead
		}
		routes[i].handler = func(w *response, request *http.Request, by caller) error {
			if err := a.authorize(w.Header(), by, scope); err != nil {
				return err
			}
			return r.handler(w, request, by)
		}
	}
	return routes
}

// authorize fails with a problem unless the caller has a scope. It sets WWW-Authenticate (RFC 6750,
// section 3).
func (a *access) authorize(h http.Header, by caller, scope string) error {
	switch {
	case slices.Contains(by.scopes, scope):
		return nil
	case by.kind == "key":
		return newProblem(http.StatusForbidden, "This API key is read-only")
	case by.kind != "":
		h.Set("WWW-Authenticate", `Bearer error="insufficient_scope", scope="`+scope+`"`)
		return newProblem(http.StatusForbidden, "The access token lacks the scope "+scope)
	case by.refusal == nil && a.tokens == nil:
		h.Set("WWW-Authenticate", "Bearer")
		return newProblem(http.StatusUnauthorized,
			"An API key is required in the header Authorization: Bearer <key>")
	case by.refusal == nil:
		h.Set("WWW-Authenticate", "Bearer")
		return newProblem(http.StatusUnauthorized, "An access token or an API key is required in "+
			"the header Authorization: Bearer <token>")
	case !errors.Is(by.refusal, errNoKeys):
		h.Set("WWW-Authenticate", `Bearer error="invalid_token"`)
	}
	return by.refusal
}

// clientNetwork returns the client's IPv4 address, or the /64 network of its IPv6 address, because
// one client usually has all of it.
func (a *access) clientNetwork(r *http.Request) string {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	client := peer.Addr().Unmap()
	if len(a.proxies) > 0 {
		client = a.behindProxies(client, r.Header)
	}
	if client.Is6() {
		network, _ := client.Prefix(64)
		return network.String()
	}
	return client.String()
}

// behindProxies returns the client's address. It follows X-Forwarded-For, or the standard Forwarded
// (RFC 7239), as long as trusted proxies wrote it. If both are given and differ, the client wrote
// one of them, and the proxy counts.
func (a *access) behindProxies(proxy netip.Addr, h http.Header) netip.Addr {
	lines, standard := h["X-Forwarded-For"], h["Forwarded"]
	hops := strings.Split(strings.Join(lines, ","), ",")
	slices.Reverse(hops)
	client := a.follow(proxy, hops)
	if len(standard) == 0 {
		return client
	}
	forwarded := a.follow(proxy, forwardedHops(strings.Join(standard, ",")))
	if len(lines) > 0 && forwarded != client {
		return proxy
	}
	return forwarded
}

// follow returns the address that hops lead to, beginning with peer. The first of hops is that of
// the nearest proxy.
func (a *access) follow(peer netip.Addr, hops []string) netip.Addr {
	for _, hop := range hops {
		trusted := func(proxy netip.Prefix) bool { return proxy.Contains(peer) }
		if !slices.ContainsFunc(a.proxies, trusted) {
			break
		}
		address, err := parseHop(hop)
		if err != nil {
			break
		}
		peer = address
	}
	return peer
}

// forwardedHops returns the parameter for of each element of Forwarded, the last one first. It is
// "" if it is missing, or given twice: a proxy may have put a header of the client into an element.
func forwardedHops(list string) (hops []string) {
	for _, element := range splitBackward(list, ',') {
		var nodes []string
		for _, pair := range splitBackward(element, ';') {
			name, node, _ := strings.Cut(strings.TrimSpace(pair), "=")
			if strings.EqualFold(name, "for") {
				nodes = append(nodes, strings.Trim(node, `"`))
			}
		}
		if len(nodes) != 1 {
			nodes = []string{""}
		}
		hops = append(hops, nodes[0])
	}
	return hops
}

// splitBackward divides text at a separator outside of quoted strings, and returns the last part
// first. It begins at the end, which a proxy wrote: a quote that a client leaves open changes only
// what comes before.
func splitBackward(text string, separator byte) (parts []string) {
	end, quoted := len(text), false
	for i := len(text) - 1; i >= 0; i-- {
		switch {
		case text[i] == '"' && !strings.HasSuffix(text[:i], `\`):
			quoted = !quoted
		case text[i] == separator && !quoted:
			parts = append(parts, text[i+1:end])
			end = i
		}
	}
	return append(parts, text[:end])
}

// parseHop reads an address as proxies write it: with or without brackets and port.
func parseHop(text string) (netip.Addr, error) {
	text = strings.TrimSpace(text)
	hop, err := netip.ParseAddrPort(text)
	address := hop.Addr()
	if err != nil {
		address, err = netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(text, "["), "]"))
	}
	return address.Unmap().WithZone(""), err
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

// isLocal reports whether a Host header names this machine.
func isLocal(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil { // no port
		host = strings.TrimSuffix(strings.TrimPrefix(hostport, "["), "]")
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	address, err := netip.ParseAddr(host)
	if err == nil {
		return address.Unmap().IsLoopback()
	}
	name, err := os.Hostname()
	return err == nil && strings.EqualFold(host, name)
}

// The values of the CORS headers.
const (
	corsMethods = "GET, HEAD, POST, PUT, PATCH, DELETE"
	corsHeaders = "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, " +
		"Traceparent, Tracestate, X-Request-Id"
	corsExposed = "ETag, Link, Location, RateLimit, RateLimit-Policy, Retry-After, X-Trace-Id"
	corsMaxAge  = "600" // seconds
)

// allowOrigin lets pages of origin read the answer, if it is one of CORS_ORIGINS.
func (a *access) allowOrigin(h http.Header, origin string) (allowed bool) {
	if len(a.origins) > 0 {
		h.Add("Vary", "Origin")
	}
	if allowed = slices.Contains(a.origins, origin); allowed {
		h.Set("Access-Control-Allow-Origin", origin)
		h.Set("Access-Control-Expose-Headers", corsExposed)
	}
	return allowed
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
	{regexp.MustCompile(`^(:[^/]|:/[^/]|[^:])*$`),
		"an origin begins with a scheme, such as https://"},
	{regexp.MustCompile(`//[^/?#]*@`), "an origin has no user name"},
	{regexp.MustCompile(`//[^/?#]*[/?#]`),
		"an origin ends after its host or port, without a slash"},
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

// parseProviderURL accepts the URL of an identity provider or of its keys.
func parseProviderURL(text string) (string, error) {
	u, err := url.Parse(text)
	if err == nil && u.User != nil {
		return "", reason("it must not have a user name or a password")
	}
	if err != nil || checkURL(text, "http", "https") != nil || u.Hostname() == "" ||
		u.Fragment != "" || len(text) > maxSubject {
		return "", errUnusable
	}
	return text, nil
}

// isRemoteInClear reports whether a URL of one host names another machine, without TLS.
func isRemoteInClear(text string) bool {
	u, err := url.Parse(text)
	return err == nil && (u.Scheme == "amqp" || u.Scheme == "http") && u.Host != "" &&
		!isLoopback(u.Hostname())
}
