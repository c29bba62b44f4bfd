package contract

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"
)

// testTokens sends each operation that requires authentication with access tokens: one that is not
// valid, and one with each scope. The document names the scope that is required.
func testTokens(t *testing.T, d *document) {
	p := startProvider(t)
	s := startService(t, keysSetting(), "JWT_AUDIENCE=users", "JWT_JWKS_URL="+p.url)
	withoutKeys := startService(t, "JWT_AUDIENCE=users", "JWT_JWKS_URL=http://127.0.0.1:1/keys")
	s.CreateUser("John", "Doe", "Authorization: Bearer "+fullKey)
	for id, o := range d.operations {
		required := o.tokenScopes()
		if (required != nil) != o.documents(401) {
			t.Errorf("%s: its security and its 401 contradict each other", id)
		}
		if required == nil {
			continue
		}
		body := o.exampleBody(t, "application/json")
		for _, scope := range []string{"users:read", "users:write"} {
			bearer := "Authorization: Bearer " + p.token(t, scope)
			e := s.Do(o.method, o.target(t), body, bearer)
			if (e.StatusCode != 403) != slices.Equal(required, []string{scope}) || e.StatusCode == 401 {
				t.Errorf("%s, with the scope %s: %v", id, scope, e)
			}
			o.check(t, e)
			e = withoutKeys.Do(o.method, o.target(t), body, bearer)
			if e.StatusCode != 503 {
				t.Errorf("%s, while the provider has no keys: %v", id, e)
			}
			o.check(t, e)
		}
		e := s.Do(o.method, o.target(t), body, "Authorization: Bearer x")
		challenge := e.Header.Get("WWW-Authenticate")
		if e.StatusCode != 401 || challenge != `Bearer error="invalid_token"` {
			t.Errorf("%s, with an invalid token: %v", id, e)
		}
		o.check(t, e)
	}
}

// tokenScopes returns the scopes that an access token needs for the operation, or nil if the
// document does not say that a token is accepted.
func (o *operation) tokenScopes() (scopes []string) {
	for _, alternative := range o.Security {
		for name, required := range alternative.Requirements.FromOldest() {
			if name == "accessToken" {
				scopes = append([]string{}, required...)
			}
		}
	}
	return scopes
}

// provider is an identity provider.
type provider struct {
	url string // of its keys
	key *ecdsa.PrivateKey
}

func startProvider(t *testing.T) *provider {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	keys := fmt.Sprintf(`{"keys": [{"kty": "EC", "crv": "P-256", "kid": "1", "x": %q, "y": %q}]}`,
		base64.RawURLEncoding.EncodeToString(point[1:33]),
		base64.RawURLEncoding.EncodeToString(point[33:]))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, keys)
	}))
	t.Cleanup(server.Close)
	return &provider{server.URL + "/keys", key}
}

// token returns an access token with a scope, which is valid for an hour.
func (p *provider) token(t *testing.T, scope string) string {
	t.Helper()
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"alg": "ES256", "typ": "at+jwt", "kid": "1"}`)) + "." +
		encode(fmt.Appendf(nil, `{"iss": %q, "sub": "ann", "aud": "users", "scope": %q, "exp": %d}`,
			p.url, scope, time.Now().Add(time.Hour).Unix()))
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, p.key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return signed + "." + encode(signature)
}
