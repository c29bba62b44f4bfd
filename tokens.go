package main

// This file owns access tokens: JWTs of an identity provider (RFC 9068), and the provider's keys.

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/golang-jwt/jwt/v5"
)

// tokens verifies the access tokens of one identity provider, and remembers those that are valid.
type tokens struct {
	parser *jwt.Parser
	keys   *keySet

	mu       sync.RWMutex
	verified recent[[sha256.Size]byte, verifiedToken] // by digest
}

// verifiedToken is the caller whom a token names until it expires.
type verifiedToken struct {
	caller
	expires time.Time
}

// newTokens returns nil if the settings name no identity provider.
func newTokens(s settings, log *slog.Logger) *tokens {
	if s.jwtAudience == "" {
		return nil
	}
	options := []jwt.ParserOption{
		jwt.WithValidMethods([]string{"RS256", "PS256", "ES256", "EdDSA"}),
		jwt.WithAudience(s.jwtAudience),
		jwt.WithExpirationRequired(),
		jwt.WithLeeway(tokenLeeway),
		jwt.WithStrictDecoding(),
	}
	if s.jwtIssuer != "" {
		options = append(options, jwt.WithIssuer(s.jwtIssuer))
	}
	return &tokens{
		parser: jwt.NewParser(options...),
		keys: &keySet{issuer: s.jwtIssuer, url: s.jwksURL, log: log,
			wanted: make(chan struct{}, 1), done: make(chan struct{})}, // run begins with a refresh
		verified: recent[[sha256.Size]byte, verifiedToken]{max: maxTokens},
	}
}

// run keeps the keys up to date until ctx ends.
func (t *tokens) run(ctx context.Context) {
	if t != nil {
		t.keys.run(ctx)
	}
}

// identify returns the caller whom a token with a digest names. It fails with a problem: 401 for a
// token that is not valid, 503 if the keys to verify it are not available.
func (t *tokens) identify(ctx context.Context, token string, digest [sha256.Size]byte) (
	caller, error) {
	t.mu.RLock()
	known, ok := t.verified.get(digest)
	t.mu.RUnlock()
	if ok && time.Now().Before(known.expires) {
		return known.caller, nil
	}
	var claims tokenClaims
	_, err := t.parser.ParseWithClaims(token, &claims, func(parsed *jwt.Token) (any, error) {
		return t.keyFor(ctx, parsed.Header)
	})
	var by caller
	if err == nil {
		by, err = claims.caller()
	}
	if p, ok := errors.AsType[*problem](err); ok {
		return caller{}, p
	}
	if errors.Is(err, context.Canceled) { // the client left while keyFor waited
		return caller{}, err
	}
	if err != nil {
		return caller{}, newProblem(http.StatusUnauthorized,
			"The access token is not valid: "+explainToken(err))
	}
	expires, _ := claims.GetExpirationTime() // the parser requires it
	t.mu.Lock()
	defer t.mu.Unlock()
	t.verified.put(digest, verifiedToken{by, expires.Time})
	return by, nil
}

// keyFor returns the key that the header of a token names. Whatever else the header says about keys,
// such as jku or jwk, is ignored: the sender of a token must not choose them.
func (t *tokens) keyFor(ctx context.Context, header map[string]any) (any, error) {
	typ, _ := header["typ"].(string)
	if strings.TrimPrefix(strings.ToLower(typ), "application/") != "at+jwt" { // RFC 9068, section 4
		return nil, reason("its header typ must be at+jwt")
	}
	if _, ok := header["crit"]; ok { // RFC 7515, section 4.1.11
		return nil, reason("its header crit names extensions that are not supported")
	}
	kid, _ := header["kid"].(string)
	if kid == "" {
		return nil, reason("its header has no kid")
	}
	return t.keys.find(ctx, fmt.Sprint(header["alg"], " ", kid))
}

// tokenErrors explain why the parser refused a token. The first that matches counts.
var tokenErrors = []struct {
	err  error
	text string
}{
	{jwt.ErrTokenSignatureInvalid, "its signature is wrong, or not one of RS256, PS256, ES256, EdDSA"},
	{jwt.ErrTokenExpired, "it has expired"},
	{jwt.ErrTokenNotValidYet, "it is not valid yet"},
	{jwt.ErrTokenInvalidAudience, "its aud does not name this service"},
	{jwt.ErrTokenInvalidIssuer, "its iss is not the identity provider of this service"},
	{jwt.ErrTokenRequiredClaimMissing, "it lacks exp, aud or iss"},
	{jwt.ErrTokenInvalidClaims, "a claim has the wrong type"},
}

// explainToken returns what is wrong with a token, in words for whoever sent it.
func explainToken(err error) string {
	if why, ok := errors.AsType[reason](err); ok {
		return string(why)
	}
	for _, known := range tokenErrors {
		if errors.Is(err, known.err) {
			return known.text
		}
	}
	return "it is no API key of this service and no signed JWT"
}

// tokenClaims are the claims of a token.
type tokenClaims struct{ jwt.MapClaims }

// UnmarshalJSON refuses what encoding/json would accept silently: a claim that is given twice, text
// that is not Unicode, which could make two subjects the same, and times that are out of range.
func (c *tokenClaims) UnmarshalJSON(text []byte) error {
	members, err := parseObject(text, len(text))
	if err != nil || json.Unmarshal(text, &c.MapClaims) != nil {
		return reason("its claims are not a JSON object")
	}
	if len(members) != len(c.MapClaims) {
		return reason("a claim is given twice")
	}
	if !utf8.Valid(text) || hasLoneSurrogate(text) {
		return reason("a claim is not valid Unicode")
	}
	for _, name := range []string{"exp", "nbf"} { // the parser would convert any number to int64
		if seconds, _ := c.MapClaims[name].(float64); math.Abs(seconds) > 1<<53 {
			return reason("its " + name + " is not a time")
		}
	}
	return nil
}

// caller returns who sends requests with the token. The subject may be stored and logged, and must
// not look like a user of the database (see the actor of an event).
func (c tokenClaims) caller() (caller, error) {
	issuer, _ := c.MapClaims["iss"].(string)
	subject, _ := c.MapClaims["sub"].(string)
	for name, text := range map[string]string{"iss": issuer, "sub": subject} {
		if text == "" || len(text) > maxSubject || strings.ContainsFunc(text, unicode.IsControl) {
			return caller{}, reason(fmt.Sprintf(
				"its %s must have 1 to %d bytes without control characters", name, maxSubject))
		}
	}
	if strings.HasPrefix(subject, sqlActor) {
		return caller{}, reason("its sub must not begin with " + sqlActor)
	}
	by := caller{client: "token\t" + issuer + "\t" + subject, kind: "subject", name: subject}
	for _, scope := range c.scopes() {
		if slices.Contains(allScopes, scope) && !slices.Contains(by.scopes, scope) {
			by.scopes = append(by.scopes, scope)
		}
	}
	return by, nil
}

// scopes returns those of the claim scope, which separates them by spaces (RFC 8693, section 4.2),
// and those of the claim scp, which some providers use, also with a list.
func (c tokenClaims) scopes() []string {
	scope, _ := c.MapClaims["scope"].(string)
	scopes := strings.Split(scope, " ")
	switch scp := c.MapClaims["scp"].(type) {
	case string:
		scopes = append(scopes, strings.Split(scp, " ")...)
	case []any:
		for _, each := range scp {
			text, _ := each.(string)
			scopes = append(scopes, text)
		}
	}
	return scopes
}

// errNoKeys reports that a token cannot be verified now.
var errNoKeys = newProblem(http.StatusServiceUnavailable,
	"The keys of the identity provider are not available")

// keySet has the public keys of an identity provider. Only run asks for them: at the start, then
// every keyInterval, and in between if a request wants a key that it does not have, at most once
// every keyPause. After a failure it keeps the last keys and tries again with growing pauses.
type keySet struct {
	issuer string // whose configuration names the URL of the keys
	url    string // of the keys, if it is set
	log    *slog.Logger
	wanted chan struct{} // starts a refresh

	mu    sync.Mutex
	keys  map[string]crypto.PublicKey // by "alg kid"; nil until they are known
	asked time.Time                   // when a request last wanted a refresh
	err   error                       // of the last refresh
	done  chan struct{}               // closed after the next refresh, if one is wanted or running
}

// run keeps the keys up to date until ctx ends. It logs the first failure in a row, and the keys
// that end it.
func (k *keySet) run(ctx context.Context) {
	for pause := keyRetry; ctx.Err() == nil; {
		failed := k.err != nil
		switch n, err := k.refresh(ctx); {
		case ctx.Err() != nil:
			return
		case err == nil && (failed || pause < keyInterval):
			k.log.Info("Keys of the identity provider loaded", "keys", n)
			pause = keyInterval
		case err != nil && !failed:
			k.log.Warn("Keys of the identity provider are not available",
				"error", cut(err.Error(), maxLogged)) // which may repeat what the provider sent
			pause = keyRetry
		case err != nil:
			pause = min(2*pause, maxPause)
		}
		select {
		case <-ctx.Done():
		case <-k.wanted:
		case <-time.After(pause):
		}
	}
}

// refresh replaces the keys, wakes who waits for it, and returns the number of keys.
func (k *keySet) refresh(ctx context.Context) (int, error) {
	k.mu.Lock()
	if k.done == nil {
		k.done = make(chan struct{})
	}
	k.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, keyBudget)
	defer cancel()
	keys, err := k.fetch(ctx)

	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err = err; err == nil {
		k.keys = keys
	}
	close(k.done)
	k.done = nil
	select {
	case <-k.wanted: // before the refresh began
	default:
	}
	return len(keys), err
}

// find returns a key. For one that it does not have, it waits for a refresh, at most keyWait. It
// fails with a 503 unless the provider has answered that there is no such key.
func (k *keySet) find(ctx context.Context, id string) (crypto.PublicKey, error) {
	key, refreshed, err := k.look(id, true)
	if key == nil && refreshed != nil {
		select {
		case <-refreshed:
		case <-time.After(keyWait):
			return nil, errNoKeys
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		key, _, err = k.look(id, false)
	}
	switch {
	case key != nil:
		return key, nil
	case err != nil:
		return nil, errNoKeys
	}
	return nil, reason("the identity provider has no key with its kid and alg")
}

// look returns a key. For an unknown one it returns nil, a channel that is closed after the wanted
// or running refresh, or nil if there is none, and the error of the last refresh. ask allows it to
// request one, at most once per keyPause.
func (k *keySet) look(id string, ask bool) (key crypto.PublicKey, refreshed chan struct{}, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if key = k.keys[id]; key != nil {
		return key, nil, nil
	}
	if ask && k.done == nil && time.Since(k.asked) >= keyPause {
		k.asked, k.done = time.Now(), make(chan struct{})
		wake(k.wanted)
	}
	return nil, k.done, k.err
}

// fetch makes one or two requests within keyBudget. Its error may quote the provider's answer.
func (k *keySet) fetch(ctx context.Context) (map[string]crypto.PublicKey, error) {
	url := k.url
	if url == "" {
		var provider struct {
			Issuer string `json:"issuer"`
			Keys   string `json:"jwks_uri"`
		}
		base := strings.TrimSuffix(k.issuer, "/")
		if err := getJSON(ctx, base+"/.well-known/openid-configuration", &provider); err != nil {
			return nil, err
		}
		if provider.Issuer != k.issuer { // OpenID Connect Discovery, section 4.3
			return nil, fmt.Errorf("its configuration names the issuer %q", provider.Issuer)
		}
		var err error
		if url, err = parseProviderURL(provider.Keys); err != nil ||
			strings.HasPrefix(base, "https:") && !strings.HasPrefix(url, "https:") {
			return nil, fmt.Errorf("its configuration has a jwks_uri that cannot be used: %q", provider.Keys)
		}
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := getJSON(ctx, url, &set); err != nil {
		return nil, err
	}
	keys := make(map[string]crypto.PublicKey)
	for _, text := range set.Keys {
		var key jsonWebKey
		if json.Unmarshal(text, &key) == nil {
			key.addTo(keys)
		}
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s has no key for RS256, PS256, ES256 or EdDSA with a kid", url)
	}
	return keys, nil
}

// getJSON decodes the answer to a GET. It follows no redirect.
func getJSON(ctx context.Context, url string, into any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	request.Close = true // the next request comes in an hour
	client := http.Client{
		Transport:     http.DefaultTransport.(*http.Transport).Clone(), // that others do not close
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxKeysBytes+1))
	switch {
	case err != nil:
		return fmt.Errorf("reading %s: %w", url, err)
	case answer.StatusCode != http.StatusOK:
		return fmt.Errorf("%s answers %s", url, answer.Status)
	case len(body) > maxKeysBytes:
		return fmt.Errorf("%s answers more than %d bytes", url, maxKeysBytes)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("%s does not answer with JSON as expected: %w", url, err)
	}
	return nil
}

// jsonWebKey is a public key (RFC 7517). Binary values are base64url.
type jsonWebKey struct {
	Type       string   `json:"kty"`
	ID         string   `json:"kid"`
	Use        string   `json:"use"`
	Operations []string `json:"key_ops"`
	Algorithm  string   `json:"alg"`
	Curve      string   `json:"crv"`
	N, E, X, Y string
}

// addTo adds the key for each algorithm that it may verify, unless it is weak or not for signatures.
func (j jsonWebKey) addTo(keys map[string]crypto.PublicKey) {
	if j.ID == "" || j.Use != "" && j.Use != "sig" ||
		j.Operations != nil && !slices.Contains(j.Operations, "verify") {
		return
	}
	key, algorithms := j.publicKey()
	for _, algorithm := range algorithms {
		if j.Algorithm == "" || j.Algorithm == algorithm {
			keys[algorithm+" "+j.ID] = key
		}
	}
}

// publicKey returns the key and the algorithms that it can verify, or none.
func (j jsonWebKey) publicKey() (crypto.PublicKey, []string) {
	binary := func(text string) []byte {
		b, _ := base64.RawURLEncoding.DecodeString(strings.TrimRight(text, "=")) // nil fits nowhere
		return b
	}
	switch x := binary(j.X); j.Type + " " + j.Curve {
	case "RSA ":
		n, e := new(big.Int).SetBytes(binary(j.N)), new(big.Int).SetBytes(binary(j.E))
		if n.BitLen() >= 2048 && n.BitLen() <= 8192 && e.BitLen() >= 2 && e.BitLen() <= 31 &&
			e.Bit(0) == 1 {
			return &rsa.PublicKey{N: n, E: int(e.Int64())}, []string{"RS256", "PS256"}
		}
	case "EC P-256":
		point := slices.Concat([]byte{4}, x, binary(j.Y)) // SEC 1, section 2.3.3: uncompressed
		if key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point); err == nil {
			return key, []string{"ES256"}
		}
	case "OKP Ed25519":
		if len(x) == ed25519.PublicKeySize {
			return ed25519.PublicKey(x), []string{"EdDSA"}
		}
	}
	return nil, nil
}
