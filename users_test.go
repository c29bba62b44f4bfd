package main

// Tests of users.go and request.go: handlers, rules, bodies, conditional headers, lists,
// idempotency.

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/big"
	"mime"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"
)

// john is a valid body of POST /users.
const john = `{"name": "John", "surname": "Doe", "password": "` + secret + `"}`

// receivedEvents returns the types and versions of the events of a user in the log of the consumer.
func (s *service) receivedEvents(id int64) []string {
	var events []string
	for _, line := range s.log.lines("") {
		received := strings.HasPrefix(fmt.Sprint(line["event"]), "Received event ")
		if received && line["user_id"] == float64(id) {
			events = append(events, fmt.Sprint(line["event_type"], " ", line["version"]))
		}
	}
	return events
}

// TestCreateUser checks the answer to POST, and that GET and the list have the new user.
func TestCreateUser(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		for i, path := range []string{"/users", "/users/"} {
			location := fmt.Sprint("/users/", i+1)
			created := s.do("POST", path, john)
			if created.status != http.StatusCreated || created.header.Get("Location") != location {
				t.Fatalf("POST %s: status %d, Location %q, want 201, %q: %s", path,
					created.status, created.header.Get("Location"), location, created.body)
			}
			got := s.do("GET", location, "")
			for _, a := range []answer{created, got} {
				etag, contentType := a.header.Get("ETag"), a.header.Get("Content-Type")
				if etag != `"1"` || contentType != "application/json" {
					t.Errorf("%s: ETag %s, Content-Type %q, want \"1\", application/json",
						location, etag, contentType)
				}
			}
			if got.status != http.StatusOK || got.body != created.body {
				t.Errorf("GET %s: status %d, %s, want 200, %s",
					location, got.status, got.body, created.body)
			}
			checkJohn(t, created, i+1)

			list := s.do("GET", path, "")
			want := strings.TrimSpace(created.body) + fmt.Sprintf(`],"total":%d,"page":1,`, i+1)
			if list.status != http.StatusOK || !strings.Contains(list.body, want) {
				t.Errorf("GET %s: status %d, want 200 with %s: %s",
					path, list.status, want, list.body)
			}
		}
	})
}

// timePattern matches the times of a user.
var timePattern = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$`)

// checkJohn checks that an answer is the JSON of the user John Doe, who has just been created.
func checkJohn(t *testing.T, a answer, id int) {
	t.Helper()
	want := []string{"id", "name", "surname", "version", "created_at", "updated_at"}
	if got := keys(a.body); !slices.Equal(got, want) {
		t.Errorf("keys %v, want %v", got, want)
	}
	if a.json(t, "id") != float64(id) || a.json(t, "name") != "John" ||
		a.json(t, "surname") != "Doe" || a.json(t, "version") != 1.0 {
		t.Errorf("want version 1 of John Doe with the id %d: %s", id, a.body)
	}
	created := fmt.Sprint(a.json(t, "created_at"))
	at, err := time.Parse(time.RFC3339, created)
	if !timePattern.MatchString(created) || err != nil || time.Since(at).Abs() > time.Minute ||
		a.json(t, "updated_at") != created {
		t.Errorf("want two equal times of this minute: %s", a.body)
	}
}

// TestTimesHaveSixDigits checks that times are UTC with microseconds.
func TestTimesHaveSixDigits(t *testing.T) {
	t.Parallel()
	east := time.FixedZone("", 2*60*60)
	for want, when := range map[string]time.Time{
		`"2026-01-01T12:00:00.000000Z"`: time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC),
		`"2026-01-01T12:00:00.123400Z"`: time.Date(2026, 1, 1, 12, 0, 0, 123_400_999, time.UTC),
		`"2025-12-31T23:30:00.000001Z"`: time.Date(2026, 1, 1, 1, 30, 0, 1000, east),
	} {
		if got, err := json.Marshal(timestamp{when}); err != nil || string(got) != want {
			t.Errorf("%v: %s, %v, want %s", when, got, err, want)
		}
	}
}

// userUpdates are updates of John Doe in turn, and the user after each.
var userUpdates = []struct {
	body, name, surname, etag string
	changes                   bool // whether the version grows
}{
	{`{"name": "Jane"}`, "Jane", "Doe", `"2"`, true},
	{`{"surname": "Roe"}`, "Jane", "Roe", `"3"`, true},
	{`{"name": "Jane"}`, "Jane", "Roe", `"3"`, false},
	{`{"name": " Jane\u00a0", "surname": "Roe"}`, "Jane", "Roe", `"3"`, false},
	{`{"name": "Jane", "surname": "roe"}`, "Jane", "roe", `"4"`, true},
	{`{"password": "` + secret + `"}`, "Jane", "roe", `"5"`, true},
	{`{"name": "Jane", "password": "` + secret + `"}`, "Jane", "roe", `"6"`, true},
}

// TestUpdateUser checks the answers and the events of updates. An update that changes nothing
// leaves the version as it is and has no event.
func TestUpdateUser(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		checkUpdates(t, s, "PUT", "application/json")
		checkUpdates(t, s, "PATCH", "application/json")
		checkUpdates(t, s, "PATCH", "application/merge-patch+json")
	})
}

// checkUpdates makes userUpdates of a new user.
func checkUpdates(t *testing.T, s *service, method, contentType string) {
	t.Helper()
	id := s.createUser("John", "Doe")
	path := fmt.Sprint("/users/", id)
	before := s.do("GET", path, "")
	want := []string{"user.created 1"}
	for _, u := range userUpdates {
		what := method + " " + u.body + " as " + contentType
		a := s.do(method, path, u.body, "Content-Type: "+contentType)
		etag := a.header.Get("ETag")
		if a.status != http.StatusOK || etag != u.etag || a.json(t, "name") != u.name ||
			a.json(t, "surname") != u.surname ||
			fmt.Sprintf(`"%v"`, a.json(t, "version")) != etag {
			t.Errorf("%s: status %d, ETag %s, want 200, %s with %s %s: %s",
				what, a.status, etag, u.etag, u.name, u.surname, a.body)
		}
		if a.json(t, "created_at") != before.json(t, "created_at") {
			t.Errorf("%s: created_at of %s changed: %s", what, before.body, a.body)
		}
		later := fmt.Sprint(a.json(t, "updated_at")) > fmt.Sprint(before.json(t, "updated_at"))
		if u.changes && !later || !u.changes && a.body != before.body {
			t.Errorf("%s: %s, want a change of %s: %t", what, a.body, before.body, u.changes)
		}
		if got := s.do("GET", path, ""); got.body != a.body || got.header.Get("ETag") != u.etag {
			t.Errorf("GET after %s: %s, want %s", what, got.body, a.body)
		}
		if u.changes {
			want = append(want, "user.updated "+strings.Trim(u.etag, `"`))
		}
		before = a
	}
	s.waitForLine(fmt.Sprint("Received event user.updated with user_id=", id), "version", 6)
	if got := s.receivedEvents(id); !slices.Equal(got, want) {
		t.Errorf("%s as %s: events %v, want %v", method, contentType, got, want)
	}
}

// TestDeleteUser checks the answer and the event of a deletion, and that the user is gone.
func TestDeleteUser(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		a := s.do("DELETE", "/users/1", "")
		message := a.json(t, "message")
		if a.status != http.StatusOK || message != "User with id 1 has been deleted" ||
			len(keys(a.body)) != 1 || a.header.Get("Content-Type") != "application/json" {
			t.Errorf("DELETE /users/1: status %d, want 200 with only a message: %s",
				a.status, a.body)
		}
		for _, method := range []string{"DELETE", "GET", "PUT", "PATCH"} {
			a := s.do(method, "/users/1", `{"name": "Jane"}`)
			detail := a.json(t, "detail")
			if a.status != http.StatusNotFound || detail != "User with id 1 not found" {
				t.Errorf("%s /users/1 after DELETE: status %d, want 404: %s",
					method, a.status, a.body)
			}
		}
		if a := s.do("GET", "/users", ""); a.json(t, "total") != 0.0 {
			t.Errorf("GET /users after DELETE: want the total 0: %s", a.body)
		}
		s.waitForLine("Received event user.deleted with user_id=1", "version", 2)
		want := []string{"user.created 1", "user.deleted 2"}
		if got := s.receivedEvents(1); !slices.Equal(got, want) {
			t.Errorf("events %v, want %v", got, want)
		}
	})
}

// TestNameRules checks the length of names, in code points, the trimming of white space, and the
// characters in names.
func TestNameRules(t *testing.T) {
	t.Parallel()
	// space has all characters with the property White_Space (PropList.txt of Unicode).
	const space = "\t\n\v\f\r \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007" +
		"\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
	const refused = ""
	x255, emoji255 := strings.Repeat("x", 255), strings.Repeat("😀", 255)
	accented := "x" + strings.Repeat("e\u0301", 127)
	tests := map[string]struct{ name, want string }{
		"one character":                   {"J", "J"},
		"white space at both ends":        {space + "John" + space, "John"},
		"white space inside":              {"J \u00a0\u3000\u2028J", "J \u00a0\u3000\u2028J"},
		"255 characters":                  {x255, x255},
		"255 characters, and white space": {space + x255 + space, x255},
		"255 characters of four bytes":    {emoji255, emoji255},
		"255 code points of 127 letters":  {accented, accented},
		"zero width space":                {"\u200b", "\u200b"},
		"byte order mark":                 {"\ufeffJohn\u180e", "\ufeffJohn\u180e"},
		"neither letters nor controls": {
			"\u00ad\ue000\ufffd\U0010ffff", "\u00ad\ue000\ufffd\U0010ffff"},
		"special characters of HTML and SQL": {`<b>&'"\;--`, `<b>&'"\;--`},
		"backslash and u":                    {`\ud800`, `\ud800`},

		"empty":                              {"", refused},
		"only white space":                   {space, refused},
		"256 characters":                     {x255 + "x", refused},
		"256 characters of four bytes":       {emoji255 + "😀", refused},
		"256 code points of 129 letters":     {accented + "e", refused},
		"256 characters with a space inside": {strings.Repeat("x", 254) + " x", refused},
		"NUL":                                {"Jo\x00hn", refused},
		"NUL at the end":                     {"John\x00", refused},
		"the first control character":        {"Jo\x01hn", refused},
		"a tab":                              {"Jo\thn", refused},
		"a line feed":                        {"Jo\nhn", refused},
		"the last control below space":       {"Jo\x1fhn", refused},
		"DEL":                                {"Jo\x7fhn", refused},
		"the first control of C1":            {"Jo\u0080hn", refused},
		"NEL, which is also white space":     {"Jo\u0085hn", refused},
		"the last control of C1":             {"Jo\u009fhn", refused},
		"a control after white space":        {" \x1b John", refused},
	}
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		for what, test := range tests {
			for _, field := range []string{"name", "surname"} {
				a := s.do("PATCH", "/users/1", `{"`+field+`": `+quote(test.name)+`}`)
				if test.want == refused {
					checkBadRequest(t, field+" with "+what, a, "#/"+field)
				} else if a.status != http.StatusOK || a.json(t, field) != test.want {
					t.Errorf("%s: status %d, want 200 with the %s %q: %s",
						what, a.status, field, test.want, a.body)
				}
			}
		}
	})
}

// TestVerifyPassword checks the answers to verifications, and that they leave the version as it is.
func TestVerifyPassword(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		const angstrom = "\u212b and 7 more" // \u00c5 in NFC
		body := fmt.Sprintf(`{"name": "Ann", "surname": "Lee", "password": %q}`, angstrom)
		id := s.do("POST", "/users", body).json(t, "id")
		other := s.createUser("Eve", "Lee")
		for i, test := range []struct {
			id   any
			body string
			want string
		}{
			{id, fmt.Sprintf(`{"password": %q}`, angstrom), `{"valid":true}`},
			{id, `{"password": "\u00c5 and 7 more"}`, `{"valid":true}`},
			{id, `{"password": "A and 7 more"}`, `{"valid":false}`},
			{id, `{"password": "x"}`, `{"valid":false}`},
			{other, fmt.Sprintf(`{"password": %q}`, angstrom), `{"valid":false}`},
			{other, fmt.Sprintf(`{"password": %q}`, secret), `{"valid":true}`},
			{999, fmt.Sprintf(`{"password": %q}`, secret), `{"valid":false}`},
			{id, `{}`, `"pointer":"#/password","detail":"is required"`},
			{id, `{"password": ""}`, `"detail":"must have 1 to 128 characters"`},
			{id, `{"password": "x", "name": "Ann"}`,
				`"detail":"is unknown; the fields are password"`},
			{id, `{"password": "` + strings.Repeat("x", 129) + `"}`,
				`"detail":"must have 1 to 128 characters"`},
		} {
			a := s.do("POST", fmt.Sprintf("/users/%v/password/verify", test.id), test.body)
			if !strings.Contains(a.body, test.want) {
				t.Errorf("verification %d: status %d, want %s: %s", i, a.status, test.want, a.body)
			}
		}
		a := s.do("GET", fmt.Sprintf("/users/%v", id), "")
		if version := a.header.Get("ETag"); version != `"1"` {
			t.Errorf("version %s after the verifications, want \"1\"", version)
		}
	})
}

// TestVerificationLimit checks the limit on verifications per user. The rate is almost 0, so no
// attempt becomes available during the test.
func TestVerificationLimit(t *testing.T) {
	t.Parallel()
	d := testDependencies(memorySettings(), newMemory(), discardLog)
	a := newAPI(d, &traffic{})
	limit := a.verifications
	if limit.burst != 10 || limit.every != 6*time.Second {
		t.Errorf("one attempt every %v, burst %d, want 10 per minute, burst 10",
			limit.every, limit.burst)
	}
	a.verifications = newLimiter[int64]("password", 1e-6, maxVerifications)
	s := serveInProcess(t, newServer(d, &traffic{}, newAccess(d.settings, nil), protectedRoutes(a, &health{})))
	for _, path := range []string{"/users/998/password/verify", "/users/999/password/verify"} {
		for attempt := range maxVerifications + 2 {
			want := 200
			if attempt >= maxVerifications {
				want = 429
			}
			got := s.do("POST", path, `{"password": "x"}`)
			retryAfter := got.header.Get("Retry-After")
			if got.status != want || (retryAfter != "") != (want == 429) {
				t.Errorf("%s, attempt %d: status %d, Retry-After %q, want %d",
					path, attempt, got.status, retryAfter, want)
			}
		}
	}
}

// TestVerifyPasswordOfMissingUser checks that a verification for a missing user computes a hash, so
// that the time of the answer does not reveal whether the user exists: it fails if the queue is
// full.
func TestVerifyPasswordOfMissingUser(t *testing.T) {
	t.Parallel()
	d := testDependencies(memorySettings(), newMemory(), discardLog)
	a := newAPI(d, &traffic{})
	s := serveInProcess(t, newServer(d, &traffic{}, newAccess(d.settings, nil), protectedRoutes(a, &health{})))
	a.hasher.lanes.clients = newQueues[string](1, 0)
	got := s.do("POST", "/users/999/password/verify", `{"password": "x"}`)
	if got.status != 503 {
		t.Errorf("full queue: status %d, want 503: %s", got.status, got.body)
	}
}

// TestVerifyImportedHash checks verifications with stored strings that the service has not written:
// an unusable one is logged and matches no password, and a hash with outdated parameters is
// replaced without a new version or an event.
func TestVerifyImportedHash(t *testing.T) {
	t.Parallel()
	set := postgresSettings(t)
	s := startService(t, set)
	path := fmt.Sprint("/users/", s.createUser("Ann", "Lee"))
	db := connect(t, set.databaseURL)
	key := argon2.IDKey([]byte(secret), []byte("somesalt"), 1, 128, 1, 32)
	older := "$argon2id$v=19$m=128,t=1,p=1$c29tZXNhbHQ$" + base64.RawStdEncoding.EncodeToString(key)
	for _, test := range []struct {
		stored string
		valid  bool
		warns  int // lines in the log so far
	}{
		{"plain " + secret, false, 1},
		{"$2b$15$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy", false, 2},
		{strings.Replace(older, "m=128,", "m=65537,", 1), false, 3},
		{strings.Replace(older, "t=1,", "t=11,", 1), false, 4},
		{strings.Replace(older, "c29", "c2%", 1), false, 5},
		{older, true, 5},
	} {
		execute(t, db, "UPDATE users SET password = $1", test.stored)
		a := s.do("POST", path+"/password/verify", fmt.Sprintf(`{"password": %q}`, secret))
		if a.status != 200 || a.json(t, "valid") != test.valid {
			t.Errorf("%s: status %d, want 200 with valid %t: %s",
				test.stored, a.status, test.valid, a.body)
		}
		eventually(t, fmt.Sprintf("%d warnings after %s", test.warns, test.stored), func() bool {
			return len(s.log.lines("Password hash unusable")) == test.warns
		})
		stored := queryValue[string](t, db, "SELECT password FROM users")
		rehashed := stored != test.stored
		if rehashed != test.valid || rehashed && !strings.HasPrefix(stored, testLimits.hash.prefix()) {
			t.Errorf("%s became %s, want a new hash: %t", test.stored, stored, test.valid)
		}
	}
	a := s.do("POST", path+"/password/verify", fmt.Sprintf(`{"password": %q}`, secret))
	version := s.do("GET", path, "").header.Get("ETag")
	if a.json(t, "valid") != true || version != `"7"` {
		t.Errorf("after the rehash: version %s, want \"7\" with valid true: %s", version, a.body)
	}
	s.do("PUT", path, `{"name": "Bea"}`)
	s.waitForLine("Received event user.updated with user_id=1", "version", 8)
	if events := len(s.log.lines("Received event user.updated with user_id=1")); events != 7 {
		t.Errorf("%d events of 6 updates by SQL and 1 by the API, want 7", events)
	}
}

// foreignHashes are hashes of secret by other implementations: the argon2 of its authors, htpasswd
// of Apache, libxcrypt, passlib, Django, and hashlib of Python.
var foreignHashes = []string{
	"$argon2id$v=19$m=128,t=1,p=2$c2FsdHNhbHQx$X0CPF/9uhobmxe6RKRLx7g",
	"$2y$10$ri.gZAbTk3UNmqUda5BWMuAav1mmGYEN9Jx9r3cmUFw1KHtdhVBGK",
	"$2a$04$abcdefghijklmnopqrstuucztQDpJXZhW4r8nZ.wVbgLzS.bZh6m.",
	"$2b$10$abcdefghijklmnopqrstuuwMU6/u.aJ9NR0arCBl0ESC9rlxMtIBW",
	"$pbkdf2-sha256$1000$LEUIgZCyVsr5v5dSSqmVMg$r4FzaElX57I0XhVagMoFXu4SLn2x6YyPi9ODWH/wMiA",
	"$pbkdf2-sha256$i=1000$c2l4dGVlbn5ieXRlcz8+IQ$tWkqhlH4ncsDjE2zeFMsnxY2LWflD7U4Y+p7rDdi+ew",
	"$pbkdf2-sha256$i=1000,l=32$c2l4dGVlbn5ieXRlcz8+IQ$tWkqhlH4ncsDjE2zeFMsnxY2LWflD7U4Y+p7rDdi+ew",
	"$pbkdf2-sha256$i=1000$c2l4dGVlbn5ieXRlcz8+IQ$tWkqhlH4ncsDjE2zeFMsnw",
	"$pbkdf2-sha512$1000$mNMag1BKSYkxZkzpvXduLQ$3xr34.lXPMAK1FGKssTpI3KZx7ER9JC3FHAWP96wSjmp9Djet" +
		"AldqwE..0raUv4bfEh.pGXYczsd.UxLDltiIg",
	"$pbkdf2-sha512$i=1000,l=64$c2l4dGVlbn5ieXRlcz8+IQ$lGWXkE2LBjbz7RmMbp9NCC3WC1syVLEtkuWQjY6XKj" +
		"4dhnhX1f1ohjgH12sPh1rqUQRxBa/tBN6XQDWlIqFX+w",
	"pbkdf2_sha256$260000$abcDEF123456$eE/vuOnDUiGHs3+XLeXP2II8an37r4bC0IKPsZIYK0A=",
	"pbkdf2_sha512$1000$abcDEF123456$E9fiSLedyYqf12/ubzUo2U2GQDGZHtIkBbg/sIwVYkEcD7Yni+ER3agx6Fn" +
		"6EAB6kaSSmcXBVQzuSL9VeGYXVQ==",
}

// TestForeignHash checks that hashes of other systems verify secret and nothing else, in both
// stores, and that only a success replaces them.
func TestForeignHash(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, users store) {
		d := testDependencies(memorySettings(), users, discardLog)
		a := newAPI(d, &traffic{})
		s := serveInProcess(t,
			newServer(d, &traffic{}, newAccess(d.settings, nil), protectedRoutes(a, &health{})))
		for _, hash := range foreignHashes {
			id := s.createUser("Ann", "Lee")
			stored := func() string {
				t.Helper()
				got, err := users.passwordHash(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				return got
			}
			if err := users.rehashPassword(t.Context(), id, stored(), hash); err != nil {
				t.Fatal(err)
			}
			for i, attempt := range []struct {
				password        string
				valid, replaced bool
			}{
				{secret + "!", false, false}, {secret, true, true},
				{secret, true, true}, {"x", false, true},
			} {
				got := s.do("POST", fmt.Sprintf("/users/%d/password/verify", id),
					fmt.Sprintf(`{"password": %q}`, attempt.password))
				if got.status != 200 || got.json(t, "valid") != attempt.valid {
					t.Errorf("%s, attempt %d: status %d, want valid %t: %s",
						hash, i, got.status, attempt.valid, got.body)
				}
				if attempt.replaced {
					verifies(t, stored(), secret) // fails if it is not a new hash
				} else if stored() != hash {
					t.Errorf("%s became %s after attempt %d", hash, stored(), i)
				}
			}
		}
	})
}

// TestForeignPasswordBytes checks which bytes of a password count: hashes of another system may be
// of the decomposed form, and bcrypt takes the first 72 bytes.
func TestForeignPasswordBytes(t *testing.T) {
	t.Parallel()
	const composed, decomposed = "caf\u00e9 " + secret, "cafe\u0301 " + secret
	long := strings.Repeat(secret, 5)
	h := newTestHasher()
	const (
		bcryptComposed   = "$2b$04$abcdefghijklmnopqrstuu65mQN8I19Sr05poEILFHuQrj1szXdoO"
		bcryptDecomposed = "$2b$04$abcdefghijklmnopqrstuucQPSzHWXYPphMwfsqXyavpYPoz1NUIO"
		bcryptLong       = "$2b$04$abcdefghijklmnopqrstuuf1/DiXu8zFiN.Gzf3ury6MjcJ.LVbqK"
		django           = "pbkdf2_sha256$1000$abcDEF123456$" +
			"J5w4ZXeYPHCswujpahGbFc1Bdf8LRXTUCrFXf3EhdKE="
	)
	for _, test := range []struct {
		hash, password string
		want           bool
	}{
		{bcryptDecomposed, decomposed, true},
		{bcryptDecomposed, composed, false},
		{bcryptComposed, decomposed, true},
		{bcryptComposed, composed, true},
		{"$argon2id$v=19$m=128,t=1,p=2$c2FsdHNhbHQx$Pa1N8pbBXO9ePwMxt/1/bg", decomposed, true},
		{django, decomposed, true},
		{django, composed, false},
		{"$2y$12$E45pglDaLxxsshC48gNin.bI7YDIBjXwmLbnzRC8/1miek2C4XJoC", secret, true},
		{bcryptLong, long, true},
		{bcryptLong, long[:72] + "!", true},
		{bcryptLong, long[:71], false},
	} {
		got, err := h.verify(t.Context(), "", test.password, test.hash)
		if got != test.want || err != nil {
			t.Errorf("verify(%+q, %s): got %t, %v, want %t",
				test.password, test.hash, got, err, test.want)
		}
	}
}

// TestHashBounds checks the bounds of each format. A hash outside of them is not computed.
func TestHashBounds(t *testing.T) {
	t.Parallel()
	raw := func(n int) string { return base64.RawStdEncoding.EncodeToString(make([]byte, n)) }
	padded := func(n int) string { return base64.StdEncoding.EncodeToString(make([]byte, n)) }
	argon := func(m, t, p uint64, salt, key int) string {
		return fmt.Sprintf("$argon2id$v=19$m=%d,t=%d,p=%d$%s$%s", m, t, p, raw(salt), raw(key))
	}
	phc := func(digest, parameters string, salt, key int) string {
		return fmt.Sprintf("$pbkdf2-%s$%s$%s$%s", digest, parameters, raw(salt), raw(key))
	}
	django := func(digest, rounds, salt string, key int) string {
		return fmt.Sprintf("pbkdf2_%s$%s$%s$%s", digest, rounds, salt, padded(key))
	}
	bcrypt := func(head string) string { return head + strings.Repeat("a", 53) }
	for _, text := range []string{
		argon(8, 1, 1, 8, 4), argon(65536, 10, 99, 64, 64), argon(16, 1, 2, 8, 4),
		bcrypt("$2a$04$"), bcrypt("$2b$14$"), bcrypt("$2y$14$"),
		phc("sha256", "i=1", 1, 16), phc("sha256", "i=5000000", 64, 32),
		phc("sha512", "5000000", 8, 64), phc("sha256", "i=1,l=31", 8, 31),
		django("sha256", "1", "s", 16), django("sha256", "5000000", strings.Repeat("+", 64), 32),
		django("sha512", "1", "s", 64),
	} {
		if check, err := parseHash(text); check == nil || err != nil {
			t.Errorf("parseHash(%q): %v", text, err)
		}
	}
	for _, text := range []string{
		"", "$", secret, "md5$s$00", argon(7, 1, 1, 8, 4), argon(65537, 1, 1, 8, 4),
		argon(15, 1, 2, 8, 4), argon(8, 0, 1, 8, 4), argon(8, 11, 1, 8, 4), argon(8, 1, 0, 8, 4),
		argon(800, 1, 100, 8, 4), argon(8, 1, 1, 7, 4), argon(8, 1, 1, 65, 4),
		argon(8, 1, 1, 8, 3), argon(8, 1, 1, 8, 65), argon(1<<32+8, 1, 1, 8, 4),
		argon(8, 1, 257, 8, 4), argon(8, 1, math.MaxUint64, 8, 4),

		bcrypt("$2a$03$"), bcrypt("$2b$15$"), bcrypt("$2x$10$"), bcrypt("$2$10$"), bcrypt("$2b$4$"),
		bcrypt("$2b$10$a"), bcrypt("$2b$10$")[:59], bcrypt("$2b$10$")[:59] + "+",
		bcrypt("$2b$10$") + "\n",

		phc("sha256", "i=0", 8, 32), phc("sha256", "i=5000001", 8, 32),
		phc("sha256", "i=01", 8, 32), phc("sha256", "i=18446744073709551617", 8, 32),
		phc("sha256", "1", 0, 32), phc("sha256", "1", 65, 32), phc("sha1", "1", 8, 16),
		phc("sha256", "1", 8, 15), phc("sha256", "1", 8, 33), phc("sha256", "-1", 8, 32),
		phc("sha512", "1", 8, 65), phc("sha256", "i=1,l=31", 8, 32),
		phc("sha256", "i=1,l=0", 8, 32), phc("sha256", "i=1,l=", 8, 32),
		phc("sha512", "i=1,l=64", 8, 32), phc("sha256", "i=1", 8, 32) + "=", "$pbkdf2-sha256$",
		phc("sha256", "i=1", 8, 32)[:73] + "B", // bits beyond the last byte

		django("sha256", "0", "s", 32), django("sha256", "5000001", "s", 32),
		django("sha256", "1", "", 32), django("sha256", "1", strings.Repeat("s", 65), 32),
		django("sha256", "1", "s", 15), django("sha256", "1", "s", 33),
		django("sha512", "1", "s", 65), django("sha256", "1", "s s", 32),
		django("sha256", "1", "\u00e9", 32),
		django("sha256", "1", "s", 32) + "=", "$" + django("sha256", "1", "s", 32),
		strings.TrimRight(django("sha256", "1", "s", 32), "="), "pbkdf2_sha256$1$s$====",
	} {
		h := &hasher{} // panics if it computes
		valid, err := h.verify(t.Context(), "", secret, text)
		if valid || !errors.Is(err, errHash) {
			t.Errorf("verify with %q: got %t, %v, want errHash", text, valid, err)
		}
	}
}

// TestDocumentedHashes compares the table in docs/takeover.md with passwordFormats.
func TestDocumentedHashes(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("docs/takeover.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ = bytes.Cut(text, []byte("## Password hashes\n"))
	text, _, _ = bytes.Cut(text, []byte("\n## "))
	var got, want []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| `([^`]+)` \\| (.+) \\|$").
		FindAllSubmatch(text, -1) {
		got = append(got, fmt.Sprintf("%s: %s", row[1], row[3]))
		if _, err := parseHash(string(row[2])); err != nil {
			t.Errorf("the example %s: %v", row[2], err)
		}
		if !strings.Contains(string(row[2]), strings.TrimPrefix(string(row[1]), "bcrypt")) {
			t.Errorf("the example %s is not of the format %s", row[2], row[1])
		}
	}
	for _, f := range passwordFormats {
		var bounds []string
		for _, b := range f.bounds {
			bounds = append(bounds, fmt.Sprintf("%s %d to %d", b.name, b.min, b.max))
		}
		want = append(want, f.name+": "+strings.Join(bounds, ", "))
	}
	if !slices.Equal(got, want) {
		t.Errorf("docs/takeover.md differs from passwordFormats:\ngot  %q\nwant %q", got, want)
	}
}

// FuzzUserID compares userID with the rule that an id is a decimal int64 of 0 or more, without
// leading zeros.
func FuzzUserID(f *testing.F) {
	for _, text := range []string{
		"0", "1", "9223372036854775807", "9223372036854775808", "18446744073709551617", "00", "01",
		"-0", "-1", "+1", " 1", "1 ", "", "1_0", "0x1", "1e0", "1.0", "\u0661", "\uff11", "1\x00",
	} {
		f.Add(text)
	}
	digits := regexp.MustCompile(`^(0|[1-9][0-9]{0,18})$`)
	f.Fuzz(func(t *testing.T, text string) {
		r := &http.Request{}
		r.SetPathValue("id", text)
		id, err := userID(r)
		n, isNumber := new(big.Int).SetString(text, 10)
		if isNumber && digits.MatchString(text) && n.IsInt64() {
			if err != nil || id != n.Int64() {
				t.Errorf("id %q: %d, %v, want %d", text, id, err, n)
			}
		} else if !errors.Is(err, errNoRoute) || id != 0 {
			t.Errorf("id %q: %d, %v, want errNoRoute", text, id, err)
		}
	})
}

// TestUserIDs checks the 404 for an id without a user, and for a path whose id is not valid.
func TestUserIDs(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		for id, want := range map[string]string{ // the detail of the 404
			"1":                    "",
			"%31":                  "",
			"2":                    "User with id 2 not found",
			"%37":                  "User with id 7 not found",
			"1%30":                 "User with id 10 not found",
			"9223372036854775807":  "User with id 9223372036854775807 not found",
			"01":                   "No resource has this path",
			"00":                   "No resource has this path",
			"%301":                 "No resource has this path",
			"+1":                   "No resource has this path",
			"%2B1":                 "No resource has this path",
			"-1":                   "No resource has this path",
			"-0":                   "No resource has this path",
			"1.0":                  "No resource has this path",
			"1e0":                  "No resource has this path",
			"0x1":                  "No resource has this path",
			"1_0":                  "No resource has this path",
			"one":                  "No resource has this path",
			"9223372036854775808":  "No resource has this path",
			"9999999999999999999":  "No resource has this path",
			"18446744073709551617": "No resource has this path",
			"00000000000000000001": "No resource has this path",
			"%201":                 "No resource has this path",
			"1%20":                 "No resource has this path",
			"1%00":                 "No resource has this path",
			"1%0A":                 "No resource has this path",
			"%D9%A1":               "No resource has this path", // an Arabic-Indic 1
			"%EF%BC%91":            "No resource has this path", // a fullwidth 1
			"1%2F":                 "No resource has this path",
			"1%2F2":                "No resource has this path",
			"%2F1":                 "No resource has this path",
			"1/":                   "No resource has this path",
			"1/2":                  "No resource has this path",
			"%2531":                "No resource has this path",
		} {
			a := s.do("GET", "/users/"+id, "")
			if want == "" {
				if a.status != http.StatusOK || a.json(t, "id") != 1.0 {
					t.Errorf("GET /users/%s: status %d, want 200 with user 1: %s",
						id, a.status, a.body)
				}
			} else if a.status != http.StatusNotFound || a.json(t, "detail") != want {
				t.Errorf("GET /users/%s: status %d, want 404 with %q: %s",
					id, a.status, want, a.body)
			}
		}
		if a := s.do("GET", "/users/0", ""); a.status != http.StatusNotFound {
			t.Errorf("GET /users/0: status %d, want 404: %s", a.status, a.body)
		}
	})
}

// contentTypes are values of Content-Type, and the methods that accept them.
var contentTypes = map[string]string{
	"application/json":                                "POST PUT PATCH",
	"Application/JSON":                                "POST PUT PATCH",
	"application/json; charset=utf-8":                 "POST PUT PATCH",
	`application/json;charset="UTF-8"`:                "POST PUT PATCH",
	"application/json ; Charset=Utf-8":                "POST PUT PATCH",
	"application/json; profile=x":                     "POST PUT PATCH",
	"application/merge-patch+json":                    "PATCH",
	"Application/Merge-Patch+JSON":                    "PATCH",
	"application/merge-patch+json; charset=utf-8":     "PATCH",
	"application/merge-patch+json; charset=utf-16":    "",
	"application/json; charset=latin1":                "",
	"application/json; charset=us-ascii":              "",
	"application/json; charset=":                      "",
	`application/json; charset=""`:                    "",
	"application/json; charset=utf-8; charset=latin1": "",
	"application/json, application/json":              "",
	"text/plain":                                      "",
	"text/json":                                       "",
	"application/x-www-form-urlencoded":               "",
	"application/json5":                               "",
	"application/vnd.api+json":                        "",
	"application/json-patch+json":                     "",
	"application/*":                                   "",
	"*/*":                                             "",
	"json":                                            "",
	"":                                                "", // no header
}

// TestContentType checks which media types and parameters each method accepts.
func TestContentType(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	targets := []struct {
		method, path string
		success      int
	}{
		{"POST", "/users", http.StatusCreated},
		{"PUT", "/users/1", http.StatusOK},
		{"PATCH", "/users/1", http.StatusOK},
	}
	for contentType, methods := range contentTypes {
		for _, target := range targets {
			want := http.StatusUnsupportedMediaType
			if slices.Contains(strings.Fields(methods), target.method) {
				want = target.success
			}
			a := s.do(target.method, target.path, john, "Content-Type: "+contentType)
			if a.status != want {
				t.Errorf("%s as %q: status %d, want %d: %s",
					target.method, contentType, a.status, want, a.body)
			}
		}
	}
	for name, fields := range map[string]string{
		"two headers": "Content-Type: application/json\r\n" +
			"Content-Type: application/json\r\n",
		"a header and an empty one": "Content-Type: application/json\r\nContent-Type:\r\n",
		"an empty header":           "Content-Type:\r\n",
	} {
		for _, target := range targets {
			a := s.send(fmt.Sprintf(
				"%s %s HTTP/1.1\r\nHost: test\r\n%sContent-Length: %d\r\n\r\n%s",
				target.method, target.path, fields, len(john), john))
			if a.status != http.StatusUnsupportedMediaType {
				t.Errorf("%s with %s: status %d, want 415: %s",
					target.method, name, a.status, a.body)
			}
		}
	}
	for _, target := range targets {
		if a := s.do(target.method, target.path, ""); a.status != http.StatusUnsupportedMediaType {
			t.Errorf("%s without a body: status %d, want 415: %s", target.method, a.status, a.body)
		}
		for coding, want := range map[string]int{
			"": target.success, "identity": target.success, "Identity": target.success,
			"gzip": 415, "br": 415, "identity, gzip": 415,
		} {
			a := s.do(target.method, target.path, john, "Content-Encoding: "+coding)
			if a.status != want {
				t.Errorf("%s with Content-Encoding %q: status %d, want %d", target.method, coding,
					a.status, want)
			}
		}
	}
}

// TestBodySize checks the limit on the size of a body, with Content-Length and in chunks. A body
// that is too large need not be complete.
func TestBodySize(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	const limit = 64 << 10
	padded := func(size int) string { return john + strings.Repeat(" ", size-len(john)) }
	for _, target := range []struct{ method, path string }{
		{"POST", "/users"}, {"PUT", "/users/1"}, {"PATCH", "/users/1"},
	} {
		head := target.method + " " + target.path +
			" HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
		for name, test := range map[string]struct {
			rest string // of the request, after the Content-Type
			fits bool
		}{
			"maximum size": {
				fmt.Sprintf("Content-Length: %d\r\n\r\n%s", limit, padded(limit)), true},
			"too large by a byte, not sent": {
				fmt.Sprintf("Content-Length: %d\r\n\r\n", limit+1), false},
			"1 TiB":                      {"Content-Length: 1099511627776\r\n\r\n{", false},
			"chunks of the maximum size": {chunked(padded(limit)), true},
			"chunks too large by a byte": {chunked(padded(limit + 1)), false},
			"chunks too large, without end": {
				strings.TrimSuffix(chunked(padded(limit+1)), "0\r\n\r\n"), false},
		} {
			a := s.send(head + test.rest)
			if test.fits && a.status/100 != 2 ||
				!test.fits && a.status != http.StatusRequestEntityTooLarge {
				t.Errorf("%s, %s: status %d, want 413 unless it fits (%t): %s",
					target.method, name, a.status, test.fits, a.body)
			}
		}
	}
}

// chunked returns the header Transfer-Encoding and the body in chunks.
func chunked(body string) string {
	rest := "Transfer-Encoding: chunked\r\n\r\n"
	for chunk := range slices.Chunk([]byte(body), 5000) {
		rest += fmt.Sprintf("%x\r\n%s\r\n", len(chunk), chunk)
	}
	return rest + "0\r\n\r\n"
}

// TestErrorPrecedence checks which error is answered if a request has several: 404 for the path,
// 405, 415, 413, 400, 404 for the user, 412.
func TestErrorPrecedence(t *testing.T) {
	t.Parallel()
	const text, stale = "Content-Type: text/plain", `If-Match: "9"`
	huge := `{"x": "` + strings.Repeat("x", 64<<10) + `"}`
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		for _, test := range []struct {
			method, path, body string
			headers            []string
			want               int
		}{
			{"PATCH", "/users/x?page=0", huge, []string{text, stale}, http.StatusNotFound},
			{"POST", "/users/x", huge, []string{text, stale}, http.StatusNotFound},
			{"OPTIONS", "/users/01", "", nil, http.StatusNotFound},
			{"POST", "/nothing", huge, []string{text, stale}, http.StatusNotFound},
			{"PUT", "/users?page=0", huge, []string{text, stale}, http.StatusMethodNotAllowed},
			{"POST", "/users/9", huge, []string{text, stale}, http.StatusMethodNotAllowed},
			{"PUT", "/users/9", huge, []string{text, stale}, http.StatusUnsupportedMediaType},
			{"POST", "/users", huge, []string{text}, http.StatusUnsupportedMediaType},
			{"PUT", "/users/9", huge, []string{stale}, http.StatusRequestEntityTooLarge},
			{"POST", "/users", huge, nil, http.StatusRequestEntityTooLarge},
			{"PUT", "/users/9", `{"x": 1}`, []string{stale}, http.StatusBadRequest},
			{"PATCH", "/users/9", `[]`, []string{stale}, http.StatusBadRequest},
			{"PUT", "/users/1", `{}`, []string{stale}, http.StatusBadRequest},
			{"PUT", "/users/9", john, []string{stale}, http.StatusNotFound},
			{"DELETE", "/users/9", "", []string{stale}, http.StatusNotFound},
			{"DELETE", "/users/9", "", []string{"If-Match: x"}, http.StatusNotFound},
			{"PUT", "/users/1", john, []string{stale}, http.StatusPreconditionFailed},
			{"DELETE", "/users/1", "", []string{stale}, http.StatusPreconditionFailed},
		} {
			a := s.do(test.method, test.path, test.body, test.headers...)
			if a.status != test.want {
				t.Errorf("%s %s %.20s %v: status %d, want %d: %s",
					test.method, test.path, test.body, test.headers, a.status, test.want, a.body)
			}
		}
	})
}

// quote returns text as a JSON string.
func quote(text string) string {
	literal, _ := json.Marshal(text)
	return string(literal)
}

// otherFields completes a body of POST /users that begins with a name.
const otherFields = `, "surname": "Doe", "password": "` + secret + `"}`

// invalidCreations are bodies of POST /users, and the pointers to their invalid fields.
var invalidCreations = map[string][]string{
	`{}`:                                         {"#/name", "#/password", "#/surname"},
	`{"name": "John"}`:                           {"#/password", "#/surname"},
	`{"name": null` + otherFields:                {"#/name"},
	`{"name": 5` + otherFields:                   {"#/name"},
	`{"name": -1.5e3` + otherFields:              {"#/name"},
	`{"name": true` + otherFields:                {"#/name"},
	`{"name": ["John"]` + otherFields:            {"#/name"},
	`{"name": {"name": "John"}` + otherFields:    {"#/name"},
	`{"name": "John", "age": 5` + otherFields:    {"#/age"},
	`{"name": "John", "id": null` + otherFields:  {"#/id"},
	`{"NAME": "John"` + otherFields:              {"#/NAME", "#/name"},
	`{"Name": "John"` + otherFields:              {"#/Name", "#/name"},
	`{"name ": "John"` + otherFields:             {"#/name", "#/name%20"},
	`{"ſurname": "a", "name": "b"` + otherFields: {"#/%C5%BFurname"}, // s under case folding

	`{"name": "a", "name": "a"` + otherFields:      {"#/name"},
	`{"name": "a", "n\u0061me": "b"` + otherFields: {"#/name"},
	`{"\u006eame": "a"` + otherFields:              nil,

	`{"name": "\ud83d\ude00"` + otherFields:                   nil,
	`{"name": "\uD83D\uDE00"` + otherFields:                   nil,
	`{"name": "a\ud800\udc00\udbff\udfffb"` + otherFields:     nil,
	`{"name": "\\ud83d"` + otherFields:                        nil, // an escaped backslash
	`{"name": "\\\\\udc00"` + otherFields:                     {"#/name"},
	`{"name": "\ud83d"` + otherFields:                         {"#/name"},
	`{"name": "\uD83D"` + otherFields:                         {"#/name"},
	`{"name": "\uDFFF"` + otherFields:                         {"#/name"},
	`{"name": "\udBfF\uDc00"` + otherFields:                   nil,
	`{"name": "\ud83dx"` + otherFields:                        {"#/name"},
	`{"name": "\ude00"` + otherFields:                         {"#/name"},
	`{"name": "x\udfff"` + otherFields:                        {"#/name"},
	`{"name": "\ude00\ud83d"` + otherFields:                   {"#/name"},
	`{"name": "\ud83d\ud83d\ude00"` + otherFields:             {"#/name"},
	`{"name": "\ud83d\ude00\ude00"` + otherFields:             {"#/name"},
	`{"name": "\ud83dx\ude00"` + otherFields:                  {"#/name"},
	`{"name": "\ud83d\n\ude00"` + otherFields:                 {"#/name"},
	`{"name": "\ud83d\\ude00"` + otherFields:                  {"#/name"},
	`{"name": "\ud7ff\ue000"` + otherFields:                   nil, // next to the surrogates
	"{\"name\": \"\xff\"" + otherFields:                       {"#/name"},
	"{\"name\": \"caf\xe9\"" + otherFields:                    {"#/name"}, // Latin-1
	"{\"name\": \"\xc3\"" + otherFields:                       {"#/name"},
	"{\"name\": \"\xc0\xaf\"" + otherFields:                   {"#/name"}, // overlong
	"{\"name\": \"\xed\xa0\xbd\xed\xb8\x80\"" + otherFields:   {"#/name"}, // CESU-8
	"{\"name\": \"\xf4\x90\x80\x80\"" + otherFields:           {"#/name"}, // above U+10FFFF
	"{\"name\": \"\ufffd\"" + otherFields:                     nil,
	`{"name": "\u0000"` + otherFields:                         {"#/name"},
	`{"name": "a\u0000"` + otherFields:                        {"#/name"},
	"{\"na\xffme\": 1, \"name\": \"a\"" + otherFields:         {"#/na%EF%BF%BDme"},
	" \t\r\n{\n\"name\"\t:\r\"John\" " + otherFields + "\n\n": nil,

	`{"name": "a", "surname": "\ud800", "password": "` + secret + `\udc00"}`: {
		"#/password", "#/surname"},
	"{\"name\": \"a\", \"surname\": \"\xff\", \"password\": \"" + secret + "\xff\"}": {
		"#/password", "#/surname"},
	`{"name": "a", "surname": [], "password": 12345678}`: {"#/password", "#/surname"},
	`{"name": null, "surname": null, "password": null}`:  {"#/name", "#/password", "#/surname"},
	`{"name": "", "surname": 5, "password": "short", "x": 1, "y": 2}`: {
		"#/name", "#/password", "#/surname", "#/x", "#/y"},
	`{"surname": "a", "surname": "b", "NAME": "c", "password": "` + secret + `\u0000"}`: {
		"#/NAME", "#/name", "#/password", "#/surname"},
}

// TestCreateErrors checks that the 400 to a POST has an error for each field of invalidCreations,
// and that a body without invalid fields is accepted.
func TestCreateErrors(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for body, want := range invalidCreations {
		a := s.do("POST", "/users", body)
		if want == nil {
			if a.status != http.StatusCreated {
				t.Errorf("POST %q: status %d, want 201: %s", body, a.status, a.body)
			}
			continue
		}
		checkBadRequest(t, quote(body), a, want...)
		if n := len(want); n > 1 && a.json(t, "detail") != fmt.Sprint(n, " fields are not valid") {
			t.Errorf("POST %q: want a detail with %d fields: %s", body, n, a.body)
		}
	}
}

// TestUpdateErrors checks that the 400 to a PUT or PATCH has an error for each invalid field, and
// that nothing is changed.
func TestUpdateErrors(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	for _, how := range []struct{ method, contentType string }{
		{"PUT", "application/json"},
		{"PATCH", "application/json"},
		{"PATCH", "application/merge-patch+json"},
	} {
		for body, want := range map[string][]string{
			`{"name": null}`:                      {"#/name"},
			`{"name": "Jane", "password": null}`:  {"#/password"},
			`{"name": "Jane", "version": 1}`:      {"#/version"},
			`{"Name": "Jane"}`:                    {"#/Name"},
			`{"id": 1}`:                           {"#/id"},
			`{"name": "Jane", "name": "Jane"}`:    {"#/name"},
			`{"name": "", "surname": "", "x": 1}`: {"#/name", "#/surname", "#/x"},
			`{}`:                                  nil,
			` { } `:                               nil,
		} {
			a := s.do(how.method, "/users/1", body, "Content-Type: "+how.contentType)
			checkBadRequest(t, fmt.Sprint(how, body), a, want...)
		}
	}
	if a := s.do("GET", "/users/1", ""); a.header.Get("ETag") != `"1"` {
		t.Errorf("ETag %s after refused updates, want \"1\": %s", a.header.Get("ETag"), a.body)
	}
}

// notObjects are bodies that are not one JSON object.
var notObjects = map[string]string{
	"empty":                           "",
	"white space":                     " \t\r\n",
	"an array":                        "[]",
	"an array of one":                 "[" + john + "]",
	"a string":                        `"name"`,
	"a number":                        "5",
	"null":                            "null",
	"true":                            "true",
	"incomplete word":                 "nul",
	"form":                            "name=John&surname=Doe",
	"two objects":                     john + " {}",
	"two objects on lines":            john + "\n" + john,
	"an object and a brace":           john + "}",
	"an object and a comma":           john + ",",
	"an object and a NUL":             john + "\x00",
	"an object and a no-break space":  john + "\u00a0",
	"an object and a comment":         john + " // John",
	"only a brace":                    "{",
	"no closing brace":                strings.TrimSuffix(john, "}"),
	"cut off in a string":             john[:len(john)-3],
	"cut off after a name":            `{"name"`,
	"cut off after a colon":           `{"name":`,
	"cut off after a comma":           `{"name": "John",`,
	"a byte order mark":               "\ufeff" + john,
	"UTF-16":                          "{\x00\"\x00n\x00",
	"a comma after the last member":   `{"name": "John",}`,
	"a comma before the first member": `{,"name": "John"}`,
	"two commas":                      `{"name": "John",,"surname": "Doe"}`,
	"no comma":                        `{"name": "John" "surname": "Doe"}`,
	"no colon":                        `{"name" "John"}`,
	"no value":                        `{"name": }`,
	"no name":                         `{"John"}`,
	"a name without quotes":           `{name: "John"}`,
	"a number as a name":              `{1: "John"}`,
	"null as a name":                  `{null: "John"}`,
	"single quotes":                   `{'name': 'John'}`,
	"closed by a bracket":             `{"name": "John"]`,
	"an open array as value":          `{"name": [}`,
	"a number with a leading zero":    `{"name": 01}`,
	"not a number":                    `{"name": NaN}`,
	"an unknown escape":               `{"name": "\x41"}`,
	"a short escape":                  `{"name": "\u41"}`,
	"a line feed in a string":         "{\"name\": \"Jo\nhn\"}",
	"a NUL in a string":               "{\"name\": \"Jo\x00hn\"}",
	"invalid UTF-8 outside strings":   "{\xff\"name\": \"John\"}",
}

// TestBodyIsObject checks that a body that is not one JSON object is refused with a 400 without
// field errors.
func TestBodyIsObject(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	for name, body := range notObjects {
		for _, target := range []struct{ method, path string }{
			{"POST", "/users"}, {"PUT", "/users/1"}, {"PATCH", "/users/1"},
		} {
			a := s.do(target.method, target.path, body, "Content-Type: application/json")
			if a.status != http.StatusBadRequest ||
				!strings.Contains(fmt.Sprint(a.json(t, "detail")), "JSON object") ||
				slices.Contains(keys(a.body), "errors") {
				t.Errorf("%s, %s: status %d, want 400 with \"JSON object\" and without errors: %s",
					target.method, name, a.status, a.body)
			}
		}
	}
}

// TestPointers checks the pointer to a member as a URI fragment, with the examples of RFC 6901,
// section 6, and others.
func TestPointers(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for name, want := range map[string]string{
		"":      "#/",
		"a/b":   "#/a~1b",
		"c%d":   "#/c%25d",
		"e^f":   "#/e%5Ef",
		"g|h":   "#/g%7Ch",
		`i\j`:   "#/i%5Cj",
		`k"l`:   "#/k%22l",
		" ":     "#/%20",
		"m~n":   "#/m~0n",
		"~1":    "#/~01",
		"~":     "#/~0",
		"/":     "#/~1",
		"//~~":  "#/~1~1~0~0",
		"#":     "#/%23",
		"é":     "#/%C3%A9",
		"😀":     "#/%F0%9F%98%80",
		"name/": "#/name~1",
		"\n":    "#/%0A",
		"\x00":  "#/%00",
		"a.b":   "#/a.b",
		"0":     "#/0",
	} {
		body := strings.Replace(john, "{", "{"+quote(name)+": 1, ", 1)
		checkBadRequest(t, quote(name), s.do("POST", "/users", body), want)
	}
}

// FuzzParseObject compares parseObject with encoding/json, which keeps the last of several members
// with the same name.
func FuzzParseObject(f *testing.F) {
	for _, body := range []string{
		``, ` `, `{}`, ` { } `, john,
		`{"a": 1, "a": [2, {"b": null}], "\u0061": "\ud800"}`, `{"a": 1,}`,
		`{"a"}`, `{"a":}`, `{"a" 1}`, `{1: 2}`, `{`, `{"a": 1`, `{} {}`, `{}x`, `{}]`,
		`[]`, `[{}]`, `null`, "{" + strings.Repeat(`"a": 1, `, maxMembers) + `"a": 1}`,
		"{" + strings.Repeat(`"a": 1, `, maxMembers) + `"a": 1]`,
		`"a"`, `5`, "\ufeff{}", "{\"\xff\": \"\xff\"}", `{"a": 1]`, `{"a": 01}`, `{"a": "\x"}`,
		"{\"a\": \"\n\"}",
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		members, err := parseObject(body, maxMembers)
		var want map[string]json.RawMessage
		isObject := json.Unmarshal(body, &want) == nil && want != nil // nil is null
		if (err == nil) != isObject {
			t.Fatalf("parseObject(%q): error %v, but a JSON object: %t", body, err, isObject)
		}
		if err != nil {
			p, ok := err.(*problem)
			if !ok || p.Status != http.StatusBadRequest || p.Errors != nil {
				t.Errorf("parseObject(%q): error %#v, want a 400 without field errors", body, err)
			}
			return
		}
		n := countMembers(body)
		if len(members) != min(n, maxMembers) {
			t.Errorf("parseObject(%q): %d members, want %d", body, len(members), min(n, maxMembers))
		}
		if n > maxMembers {
			return
		}
		got := make(map[string]json.RawMessage)
		for _, m := range members {
			got[m.name] = m.value
		}
		equal := func(a, b json.RawMessage) bool { return bytes.Equal(a, b) }
		if !maps.EqualFunc(got, want, equal) {
			t.Errorf("parseObject(%q): members %s, want %s", body, got, want)
		}
	})
}

// countMembers returns the number of members of a JSON object: of its colons outside names and
// values.
func countMembers(object []byte) int {
	count, depth, quoted := 0, 0, false
	for i := 0; i < len(object); i++ {
		switch c := object[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{', c == '[':
			depth++
		case c == '}', c == ']':
			depth--
		case c == ':' && depth == 1:
			count++
		}
	}
	return count
}

// FuzzParseString compares parseString with encoding/json, and with decodeUTF16 for strings in
// which encoding/json would insert U+FFFD.
func FuzzParseString(f *testing.F) {
	for _, value := range []string{
		`"John"`, `""`, `null`, `5`, `{}`, `"\u0000"`,
		`"\ud83d\ude00"`, `"\ud83d"`, `"\ude00\ud83d"`,
		`"\\ud83d"`, `"\ud83d\\ude00"`, `"\ud83d\ud83d\ude00"`, `"\ufffd"`, `"\uD83D\n\uDE00"`,
		`"\\\udc00"`, `"\ud83d\ude00\udE00"`, `"\udc00\udc00"`,
		`"\uD7ff\uE000"`, `" \u0000"`, "\"\\u005cud83d\ufffd\"",
		`"\"\/\b\f\n\r\t"`, "\"\xff\"", "\"\xed\xa0\xbd\"", "\"\xed\xa0\xbd\\ude00\"",
	} {
		f.Add([]byte(value))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		value = bytes.Trim(value, " \t\r\n") // as parseObject does
		if !json.Valid(value) {
			return
		}
		text, err := parseString(value)
		var want *string
		isString := json.Unmarshal(value, &want) == nil && want != nil && utf8.Valid(value) &&
			*want == decodeUTF16(value) && !strings.Contains(*want, "\x00")
		if isString != (err == nil) {
			t.Fatalf("parseString(%q): error %v, but a valid string: %t", value, err, isString)
		}
		if !isString {
			return
		}
		if text != *want || !utf8.ValidString(text) {
			t.Errorf("parseString(%q) = %q, want %q", value, text, *want)
		}
		if again, err := parseString(json.RawMessage(quote(text))); err != nil || again != text {
			t.Errorf("parseString(%q) = %q, but parseString(%q) = %q, %v",
				value, text, quote(text), again, err)
		}
	})
}

// decodeUTF16 decodes a valid JSON string as UTF-16 code units (RFC 8259, section 7). Half of a
// surrogate pair becomes a byte that is not valid UTF-8.
func decodeUTF16(literal []byte) string {
	var units []uint16
	inner := literal[1 : len(literal)-1]
	for len(inner) > 0 {
		c, size := utf8.DecodeRune(inner)
		if c == '\\' {
			c, size = rune(inner[1]), 2
			if i := strings.IndexRune("bfnrt", c); i >= 0 {
				c = rune("\b\f\n\r\t"[i])
			}
			if c == 'u' {
				unit, _ := strconv.ParseUint(string(inner[2:6]), 16, 16)
				units, inner = append(units, uint16(unit)), inner[6:]
				continue
			}
		}
		units, inner = utf16.AppendRune(units, c), inner[size:]
	}
	var text []byte
	for i := 0; i < len(units); i++ {
		c := rune(units[i])
		if utf16.IsSurrogate(c) && i+1 < len(units) {
			if pair := utf16.DecodeRune(c, rune(units[i+1])); pair != utf8.RuneError {
				c = pair
				i++
			}
		}
		if utf16.IsSurrogate(c) {
			text = append(text, 0xff)
		} else {
			text = utf8.AppendRune(text, c)
		}
	}
	return string(text)
}

// fragmentPattern matches URI fragments with a JSON pointer.
var fragmentPattern = regexp.MustCompile(`^#/[!-~]*$`)

// userBodies are seeds of FuzzReadUser.
var userBodies = []string{
	``, `{}`, `[]`, `null`, john, john + "{}", `{"name": "Jane"}`, `{"name": " Jane\u00a0"}`,
	`{"password": " ` + secret + `\u0001 "}`,
	`{"password": "7 chars"}`, `{"password": "8letters"}`,
	`{"name": "a", "n\u0061me": "a"}`, `{"NAME": "a"}`, `{"\u017furname": "a"}`,
	`{"a/b~c%": 1, "": 2}`,
	`{"name": null, "surname": 5, "password": []}`, `{"name": "\ud83d", "surname": "\u0000"}`,
	`{"name": "\u0085", "surname": "\u200b"}`, "{\"name\": \"\xff\", \"\xff\": 1}",
	`{"surname": "` + strings.Repeat("é", 255) + `"}`,
	`{"surname": "` + strings.Repeat("x", 256) + `"}`,
	`{"password": "` + strings.Repeat("😀", 128) + `"}`,
	`{"password": "` + strings.Repeat("x", 129) + `"}`,
}

// FuzzReadUser compares readFields with wantUser, a second implementation on top of encoding/json.
// The result of an accepted body must be accepted again and have the same result, and the error of
// any other body must name its invalid fields.
func FuzzReadUser(f *testing.F) {
	for _, body := range userBodies {
		f.Add([]byte(body), "application/json", true)
		f.Add([]byte(body), "application/json", false)
	}
	f.Add([]byte(john), `Application/JSON; charset="UTF-8"`, true)
	f.Add([]byte(john), "application/json; charset=latin1", true)
	f.Add([]byte(john), "application/json, application/json", true)
	f.Add([]byte(strings.Repeat(" ", maxBodyBytes)+"{}"), "application/json", true)
	f.Fuzz(func(t *testing.T, body []byte, contentType string, creates bool) {
		var required []string
		if creates {
			required = []string{"name", "surname", "password"}
		}
		log := discardLog
		a := newAPI(testDependencies(memorySettings(), nil, log), &traffic{})
		read := func(body []byte) (userInput, error) {
			r := httptest.NewRequest("POST", "/users", bytes.NewReader(body))
			r.Header.Set("Content-Type", contentType)
			fields, err := readFields(
				httptest.NewRecorder(), r, a.rules, required, "application/json")
			return inputOf(fields), err
		}
		in, err := read(body)
		want, status, wrong := wantUser(body, contentType, required)
		if err == nil {
			if status != http.StatusOK || !reflect.DeepEqual(in, want) {
				t.Fatalf("%q is read as %s, want %s and the status %d",
					body, userJSON(in), userJSON(want), status)
			}
			if again, err := read(userJSON(in)); err != nil || !reflect.DeepEqual(again, in) {
				t.Errorf("%q is read as %s, and that as %s, %v",
					body, userJSON(in), userJSON(again), err)
			}
			return
		}
		p, ok := err.(*problem)
		if !ok || p.Status != status || !reflect.DeepEqual(in, userInput{}) {
			t.Fatalf("%q: error %+v, want a problem with the status %d", body, err, status)
		}
		got := make(map[string]bool)
		for _, e := range p.Errors {
			got[e.Pointer] = true
			if !fragmentPattern.MatchString(e.Pointer) || e.Detail == "" {
				t.Errorf("%q: invalid field error %+v", body, e)
			}
		}
		if !isListed(got, wrong, len(p.Errors)) {
			t.Errorf("%q: errors for %v, want %v", body, got, wrong)
		}
	})
}

// isListed reports whether got has all names of want, or only such names if an answer with n errors
// may leave some out.
func isListed(got, want map[string]bool, n int) bool {
	for name := range got {
		if !want[name] {
			return false
		}
	}
	return n == maxErrors || len(got) == len(want)
}

// userJSON returns a body with the fields of in.
func userJSON(in userInput) []byte {
	members := make(map[string]string)
	for name, text := range map[string]*string{
		"name": in.name, "surname": in.surname, "password": in.password,
	} {
		if text != nil {
			members[name] = *text
		}
	}
	body, _ := json.Marshal(members)
	return body
}

// wantUser returns what a body must be read as, or the status of its error and the pointers to the
// invalid fields.
func wantUser(body []byte, contentType string, required []string) (in userInput, status int,
	wrong map[string]bool) {
	mediaType, parameters, err := mime.ParseMediaType(contentType)
	charset, given := parameters["charset"]
	var values map[string]json.RawMessage
	switch {
	case err != nil, mediaType != "application/json", given && !strings.EqualFold(charset, "utf-8"):
		return in, http.StatusUnsupportedMediaType, nil
	case len(body) > 65536:
		return in, http.StatusRequestEntityTooLarge, nil
	case json.Unmarshal(body, &values) != nil, values == nil, len(values) == 0 && required == nil:
		return in, http.StatusBadRequest, nil
	}
	wrong = make(map[string]bool)
	members, _ := parseObject(body, maxMembers) // FuzzParseObject checks it
	count := make(map[string]int)
	for _, m := range members {
		count[m.name]++
		text, ok := wantText(m)
		if !ok || count[m.name] > 1 {
			name := cut(m.name, maxEchoed)
			name = strings.ReplaceAll(strings.ReplaceAll(name, "~", "~0"), "/", "~1")
			u := url.URL{Fragment: name}
			wrong["#/"+u.EscapedFragment()] = true
		}
		switch m.name {
		case "name":
			in.name = &text
		case "surname":
			in.surname = &text
		case "password":
			in.password = &text
		}
	}
	for _, name := range required {
		if _, given := values[name]; !given {
			wrong["#/"+name] = true
		}
	}
	if len(wrong) > 0 {
		return userInput{}, http.StatusBadRequest, wrong
	}
	return in, http.StatusOK, nil
}

// wantText returns what a member must be read as. ok is false if it is not valid.
func wantText(m member) (text string, ok bool) {
	if json.Unmarshal(m.value, &text) != nil || string(m.value) == "null" || !utf8.Valid(m.value) ||
		text != decodeUTF16(m.value) || strings.Contains(text, "\x00") {
		return "", false
	}
	switch m.name {
	case "name", "surname":
		text = strings.TrimSpace(text)
		n := len([]rune(text))
		return text, n >= 1 && n <= 255 && !regexp.MustCompile(`\p{Cc}`).MatchString(text)
	case "password":
		n := len([]rune(text))
		return text, n >= 8 && n <= 128
	}
	return "", false
}

// conditionTest is a conditional header that is sent when the version of the user is 2.
type conditionTest struct {
	lines []string // of the header
	lists bool     // whether they list version 2
}

// ifMatchTests are values of If-Match.
var ifMatchTests = map[string]conditionTest{
	"a star":                          {[]string{`*`}, true},
	"the version":                     {[]string{`"2"`}, true},
	"a list":                          {[]string{`"1", "2", "3"`}, true},
	"a list without spaces":           {[]string{`"1","2"`}, true},
	"a list with a weak tag":          {[]string{`W/"7", "2"`}, true},
	"a list with empty members":       {[]string{`, "1" ,	,"2",`}, true},
	"several lines":                   {[]string{`"1"`, `"2"`}, true},
	"a comma in a tag":                {[]string{`"1,", ",", "2"`}, true},
	"a backslash in a tag":            {[]string{`"1\", "2"`}, true},
	"a letter outside ASCII in a tag": {[]string{`"é", "2"`}, true},

	"an older version":                {[]string{`"1"`}, false},
	"a later version":                 {[]string{`"3"`}, false},
	"other versions":                  {[]string{`"1", "3"`, `"4"`}, false},
	"the weak version":                {[]string{`W/"2"`}, false},
	"a list of weak versions":         {[]string{`W/"1", W/"2"`}, false},
	"the version within a tag":        {[]string{`"1,2,3"`, `" 2 "`}, false},
	"the version with a leading zero": {[]string{`"02"`}, false},
	"the version with a sign":         {[]string{`"+2"`}, false},
	"the version without quotes":      {[]string{`2`}, false},
	"an open quote":                   {[]string{`"2`}, false},
	"only the closing quote":          {[]string{`2"`}, false},
	"the version and an open quote":   {[]string{`"2", "3`}, false},
	"two tags without a comma":        {[]string{`"2" "3"`}, false},
	"the version and a letter":        {[]string{`"2"x`}, false},
	"a space in a tag":                {[]string{`"2", "a b"`}, false},
	"a star in a list":                {[]string{`*, "2"`}, false},
	"a star after a tag":              {[]string{`"2"`, `*`}, false},
	"two stars":                       {[]string{`*`, `*`}, false},
	"a weak tag in lower case":        {[]string{`w/"2", "2"`}, false},
	"a weak tag with a space":         {[]string{`W/ "3", "2"`}, false},
	"a number above 64 bits":          {[]string{`"18446744073709551618"`}, false}, // 2 in 64 bits
	"an empty tag":                    {[]string{`""`}, false},
	"only commas":                     {[]string{`,`}, false},
}

// TestIfMatch checks which values of If-Match allow a change.
func TestIfMatch(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		s.do("PUT", "/users/1", `{"name": "Jane"}`)
		for what, test := range ifMatchTests {
			var headers []string
			for _, line := range test.lines {
				headers = append(headers, "If-Match: "+line)
			}
			methods, want := []string{"PUT", "PATCH"}, http.StatusOK // nothing changes
			if !test.lists {
				methods, want = append(methods, "DELETE"), http.StatusPreconditionFailed
			}
			for _, method := range methods {
				a := s.do(method, "/users/1", `{"name": "Jane"}`, headers...)
				if a.status != want {
					t.Errorf("%s with %s: status %d, want %d: %s",
						method, what, a.status, want, a.body)
				}
			}
			a := s.do("PUT", "/users/9", `{"name": "Jane"}`, headers...)
			if a.status != http.StatusNotFound {
				t.Errorf("PUT /users/9 with %s: status %d, want 404", what, a.status)
			}
		}
		// net/http's client does not send an empty header.
		a := s.send("DELETE /users/1 HTTP/1.1\r\nHost: test\r\nIf-Match:\r\n\r\n")
		if a.status != http.StatusPreconditionFailed {
			t.Errorf("DELETE with an empty If-Match: status %d, want 412", a.status)
		}

		a = s.do("GET", "/users/1", "", `If-None-Match: "2"`)
		if a.status != http.StatusNotModified {
			t.Errorf("GET after refused changes: status %d, want 304: %s", a.status, a.body)
		}
		a = s.do("DELETE", "/users/9", "", `If-Match: "1"`)
		if a.status != http.StatusNotFound {
			t.Errorf("DELETE /users/9: status %d, want 404", a.status)
		}
		a = s.do("PUT", "/users/1", `{"name": "Jack"}`, `If-Match: "2"`)
		if a.header.Get("ETag") != `"3"` {
			t.Errorf("PUT of the current version: status %d, ETag %s, want \"3\": %s",
				a.status, a.header.Get("ETag"), a.body)
		}
		a = s.do("DELETE", "/users/1", "", `If-Match: "2", "3"`)
		if a.status != http.StatusOK {
			t.Errorf("DELETE of the current version: status %d, want 200: %s", a.status, a.body)
		}
	})
}

// ifNoneMatchTests are values of If-None-Match.
var ifNoneMatchTests = map[string]conditionTest{
	"a star":               {[]string{`*`}, true},
	"the version":          {[]string{`"2"`}, true},
	"the weak version":     {[]string{`W/"2"`}, true},
	"a list":               {[]string{`"1", W/"2"`}, true},
	"several lines":        {[]string{`"a,b"`, `"2"`}, true},
	"an older version":     {[]string{`"1"`}, false},
	"other versions":       {[]string{`"1", W/"3"`, `"22"`}, false},
	"the version unquoted": {[]string{`2`}, false},
	"an open quote":        {[]string{`"2", "3`}, false},
	"a star in a list":     {[]string{`*, "2"`}, false},
	"W/ within a tag":      {[]string{`"W/2"`}, false},
}

// TestIfNoneMatch checks which values of If-None-Match are answered with 304.
func TestIfNoneMatch(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		user := s.do("PUT", "/users/1", `{"name": "Jane"}`).body
		for what, test := range ifNoneMatchTests {
			var headers []string
			for _, line := range test.lines {
				headers = append(headers, "If-None-Match: "+line)
			}
			status, body := http.StatusOK, user
			if test.lists {
				status, body = http.StatusNotModified, ""
			}
			for method, body := range map[string]string{"GET": body, "HEAD": ""} {
				a := s.do(method, "/users/1", "", headers...)
				if a.status != status || a.body != body || a.header.Get("ETag") != `"2"` {
					t.Errorf("%s with %s: status %d, ETag %s, want %d, \"2\": %s",
						method, what, a.status, a.header.Get("ETag"), status, a.body)
				}
			}
			if a := s.do("GET", "/users/9", "", headers...); a.status != http.StatusNotFound {
				t.Errorf("GET /users/9 with %s: status %d, want 404", what, a.status)
			}
		}
	})
}

// TestIgnoredConditions checks that If-Match and If-None-Match are ignored by the methods for which
// they are not defined.
func TestIgnoredConditions(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	for _, test := range []struct {
		method, path, body, header string
		want                       int
	}{
		{"GET", "/users/1", "", `If-Match: "9"`, http.StatusOK},
		{"HEAD", "/users/1", "", `If-Match: "9"`, http.StatusOK},
		{"GET", "/users", "", `If-Match: "9"`, http.StatusOK},
		{"POST", "/users", john, `If-Match: "9"`, http.StatusCreated},
		{"GET", "/users", "", `If-None-Match: *`, http.StatusOK},
		{"POST", "/users", john, `If-None-Match: *`, http.StatusCreated},
		{"PUT", "/users/1", john, `If-None-Match: *`, http.StatusOK},
		{"PATCH", "/users/1", john, `If-None-Match: *`, http.StatusOK},
		{"DELETE", "/users/1", "", `If-None-Match: *`, http.StatusOK},
	} {
		if a := s.do(test.method, test.path, test.body, test.header); a.status != test.want {
			t.Errorf("%s %s with %s: status %d, want %d: %s",
				test.method, test.path, test.header, a.status, test.want, a.body)
		}
	}
}

// TestParseEntityTags checks the syntax of entity tags and their lists.
func TestParseEntityTags(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		lines []string
		want  []string
	}{
		{nil, nil},
		{[]string{""}, nil},
		{[]string{" ,\t, "}, nil},
		{[]string{"*"}, []string{"*"}},
		{[]string{" * "}, []string{"*"}},
		{[]string{"*", "*"}, nil},
		{[]string{"**"}, nil},
		{[]string{`"*"`}, []string{`"*"`}},
		{[]string{`""`}, []string{`""`}},
		{[]string{`"a"`}, []string{`"a"`}},
		{[]string{`W/"a"`}, []string{`W/"a"`}},
		{[]string{`"a","b"`}, []string{`"a"`, `"b"`}},
		{[]string{"\"a\"\t, ,\t\"b\""}, []string{`"a"`, `"b"`}},
		{[]string{`"a", W/"b"`, `"c"`}, []string{`"a"`, `W/"b"`, `"c"`}},
		{[]string{`"a,b", "c, W/"`}, nil}, // a tag has no spaces
		{[]string{`"a,b", "c,W/"`}, []string{`"a,b"`, `"c,W/"`}},
		{[]string{`"a\"`, `"b"`}, []string{`"a\"`, `"b"`}},
		{[]string{"\"\xff\""}, []string{"\"\xff\""}}, // obs-text
		{[]string{"\"\x7f\""}, nil},
		{[]string{"\"\x01\""}, nil},
		{[]string{`"a`}, nil},
		{[]string{`"`}, nil},
		{[]string{`a"`}, nil},
		{[]string{`W/`}, nil},
		{[]string{`W/a`}, nil},
		{[]string{`W/*`}, nil},
		{[]string{`W/W/"a"`}, nil},
		{[]string{`w/"a"`}, nil},
		{[]string{`W/ "a"`}, nil},
		{[]string{`"a" "b"`}, nil},
		{[]string{`"a"; "b"`}, nil},
		{[]string{`"a"`, `b`}, nil},
		{[]string{`"a"`, ``}, []string{`"a"`}},
	} {
		if got := parseEntityTags(test.lines); !slices.Equal(got, test.want) {
			t.Errorf("parseEntityTags(%q) = %q, want %q", test.lines, got, test.want)
		}
	}
}

// FuzzEntityTags compares parseEntityTags, matchVersions and noneMatchFails with scanEntityTags, a
// second implementation. Several lines are one list, and a tag that is appended to a list is in it.
func FuzzEntityTags(f *testing.F) {
	for _, line := range []string{
		``, `*`, `"2"`, `W/"1", "2"`, `"a,b" ,, "c\"`, `"a" "b"`, `W/`, "\"\xff\"",
		` , "2"	,`, `"02", "+2", "-2"`,
		`*, "2"`, `"2", *`, `"2`, `w/"2"`, `W/ "2"`, `W/"2"W/"3"`,
		`"", "2""3"`, `"9223372036854775808"`, "\"2\x7f\"",
	} {
		f.Add(line, `W/"1"`, int64(1))
		f.Add(`"2"`, line, int64(math.MaxInt64))
	}
	f.Fuzz(func(t *testing.T, first, second string, version int64) {
		field := first + "," + second
		tags, any := scanEntityTags(field), strings.Trim(field, " \t,") == "*"
		h := http.Header{"If-Match": {first, second}, "If-None-Match": {first, second}}
		if got := parseEntityTags([]string{field}); !slices.Equal(got, tags) && !any {
			t.Fatalf("parseEntityTags(%q) = %q, want %q", field, got, tags)
		}
		var want []int64
		named := any
		for _, tag := range tags {
			n, err := strconv.ParseInt(strings.Trim(tag, `"`), 10, 64)
			if err == nil && tag == fmt.Sprintf(`"%d"`, n) {
				want = append(want, n)
			}
			named = named || strings.TrimPrefix(tag, "W/") == fmt.Sprintf(`"%d"`, version)
		}
		if got := matchVersions(h); !slices.Equal(got, want) || (got == nil) != any {
			t.Errorf("If-Match %q, %q: versions %v, want %v", first, second, got, want)
		}
		if got := noneMatchFails(h, version); got != named {
			t.Errorf("If-None-Match %q, %q: lists %d %t, want %t",
				first, second, version, got, named)
		}
		h = http.Header{"If-Match": append(tags, entityTag(version))}
		if got := matchVersions(h); !slices.Equal(got, append(want, version)) {
			t.Errorf("%q: versions %v, want %v and %d", h, got, want, version)
		}
	})
}

// scanEntityTags parses a list of entity tags (RFC 9110, section 5.6.1) from left to right. It
// returns nil if the list is not valid.
func scanEntityTags(list string) (tags []string) {
	for list = strings.TrimLeft(list, " \t,"); list != ""; {
		weak := strings.HasPrefix(list, "W/")
		opaque := strings.TrimPrefix(list, "W/")
		end := strings.IndexByte(strings.TrimPrefix(opaque, `"`), '"')
		if opaque == "" || opaque[0] != '"' || end < 0 {
			return nil
		}
		opaque = opaque[:end+2]
		for _, c := range []byte(opaque) {
			if c <= ' ' || c == 0x7f {
				return nil
			}
		}
		tag := opaque
		if weak {
			tag = "W/" + opaque
		}
		tags = append(tags, tag)
		list = strings.TrimLeft(list[len(tag):], " \t")
		if list != "" && list[0] != ',' {
			return nil
		}
		list = strings.TrimLeft(list, " \t,")
	}
	return tags
}

// page is a query of GET /users and the answer that it must have. links are the targets by
// relation.
type page struct {
	query string
	ids   []int64
	tail  string // of the body, after the users
	links map[string]string
}

// check requests the page with GET and HEAD.
func (p page) check(t *testing.T, s *service) {
	t.Helper()
	a := s.do("GET", "/users"+p.query, "")
	var list userList
	if err := json.Unmarshal([]byte(a.body), &list); err != nil || a.status != http.StatusOK {
		t.Errorf("%q: status %d, want 200 with a list: %v: %s", p.query, a.status, err, a.body)
		return
	}
	var ids []int64
	for _, u := range list.Users {
		ids = append(ids, u.ID)
	}
	_, tail, isList := strings.Cut(a.body, "]")
	if !isList || !slices.Equal(ids, p.ids) || strings.TrimSpace(tail) != p.tail {
		t.Errorf("%q: users %v and %s, want %v and %s", p.query, ids, tail, p.ids, p.tail)
	}
	if got := links(t, a); fmt.Sprint(got) != fmt.Sprint(p.links) {
		t.Errorf("%q: links\n%v, want\n%v", p.query, got, p.links)
	}
	head := s.do("HEAD", "/users"+p.query, "")
	if head.status != a.status || head.header.Get("Link") != a.header.Get("Link") ||
		head.body != "" {
		t.Errorf("HEAD %q: status %d, Link %q, want those of GET, without a body: %s",
			p.query, head.status, head.header.Get("Link"), head.body)
	}
}

// linkPattern matches a link of the Link header. Its groups are the target and the relation.
var linkPattern = regexp.MustCompile(`^<([^>]*)>; rel="([a-z]+)"$`)

// links returns the targets in the Link header of an answer by relation.
func links(t *testing.T, a answer) map[string]string {
	t.Helper()
	targets := make(map[string]string)
	for _, field := range a.header["Link"] {
		for link := range strings.SplitSeq(field, ", ") {
			parts := linkPattern.FindStringSubmatch(link)
			if parts == nil {
				t.Errorf("malformed link %q", link)
			} else if targets[parts[2]] != "" {
				t.Errorf("two links with the relation %q", parts[2])
			} else {
				targets[parts[2]] = parts[1]
			}
		}
	}
	return targets
}

// TestListUsers checks the users, the members and the links of pages.
func TestListUsers(t *testing.T) {
	t.Parallel()
	type targets = map[string]string
	all := []int64{1, 2, 3, 5, 6, 7, 8}
	pages := []page{
		{"", all, `,"total":7,"page":1,"per_page":10,"next_after":null}`,
			targets{"first": "/users?page=1", "last": "/users?page=1"}},
		{"?", all, `,"total":7,"page":1,"per_page":10,"next_after":null}`,
			targets{"first": "/users?page=1", "last": "/users?page=1"}},
		{"/?per_page=7", all, `,"total":7,"page":1,"per_page":7,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=7", "last": "/users?page=1&per_page=7"}},
		{"?per_page=6", all[:6], `,"total":7,"page":1,"per_page":6,"next_after":7}`,
			targets{"first": "/users?page=1&per_page=6", "next": "/users?after=7&per_page=6",
				"last": "/users?page=2&per_page=6"}},
		{"?per_page=3&page=1", all[:3], `,"total":7,"page":1,"per_page":3,"next_after":3}`,
			targets{"first": "/users?page=1&per_page=3", "next": "/users?after=3&per_page=3",
				"last": "/users?page=3&per_page=3"}},
		{"?p%61ge=2&per_page=3", all[3:6], `,"total":7,"page":2,"per_page":3,"next_after":7}`,
			targets{"first": "/users?page=1&per_page=3", "prev": "/users?page=1&per_page=3",
				"next": "/users?after=7&per_page=3", "last": "/users?page=3&per_page=3"}},
		{"?page=3&per_page=3", all[6:], `,"total":7,"page":3,"per_page":3,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=3", "prev": "/users?page=2&per_page=3",
				"last": "/users?page=3&per_page=3"}},
		{"?page=4&per_page=3", nil, `,"total":7,"page":4,"per_page":3,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=3", "prev": "/users?page=3&per_page=3",
				"last": "/users?page=3&per_page=3"}},
		{"?page=50", nil, `,"total":7,"page":50,"per_page":10,"next_after":null}`,
			targets{"first": "/users?page=1", "prev": "/users?page=1", "last": "/users?page=1"}},

		{"?after=0", all, `,"total":7,"per_page":10,"next_after":null}`, targets{}},
		{"?after=3&per_page=3", all[3:6], `,"total":7,"per_page":3,"next_after":7}`,
			targets{"next": "/users?after=7&per_page=3"}},
		{"?after=4&per_page=1", all[3:4], `,"total":7,"per_page":1,"next_after":5}`,
			targets{"next": "/users?after=5&per_page=1"}},
		{"?per_page=1&after=7", all[6:], `,"total":7,"per_page":1,"next_after":null}`, targets{}},
		{"?after=8", nil, `,"total":7,"per_page":10,"next_after":null}`, targets{}},
		{"?after=9223372036854775807", nil, `,"total":7,"per_page":10,"next_after":null}`,
			targets{}},

		// The last pages that do not skip too many users.
		{"?page=100001&per_page=1", nil, `,"total":7,"page":100001,"per_page":1,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=1", "prev": "/users?page=7&per_page=1",
				"last": "/users?page=7&per_page=1"}},
		{"?page=1001&per_page=100", nil, `,"total":7,"page":1001,"per_page":100,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=100", "prev": "/users?page=1&per_page=100",
				"last": "/users?page=1&per_page=100"}},
		{"?page=14286&per_page=7", nil, `,"total":7,"page":14286,"per_page":7,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=7", "prev": "/users?page=1&per_page=7",
				"last": "/users?page=1&per_page=7"}},
	}
	eachStore(t, func(t *testing.T, s *service) {
		for range 8 {
			s.createUser("John", "Doe")
		}
		s.do("DELETE", "/users/4", "")
		for _, page := range pages {
			page.check(t, s)
		}
	})
}

// TestListNoUsers checks the pages of an empty list.
func TestListNoUsers(t *testing.T) {
	t.Parallel()
	type targets = map[string]string
	eachStore(t, func(t *testing.T, s *service) {
		for _, page := range []page{
			{"", nil, `,"total":0,"page":1,"per_page":10,"next_after":null}`,
				targets{"first": "/users?page=1", "last": "/users?page=1"}},
			{"?page=3", nil, `,"total":0,"page":3,"per_page":10,"next_after":null}`,
				targets{"first": "/users?page=1", "prev": "/users?page=1",
					"last": "/users?page=1"}},
			{"?after=0&per_page=5", nil, `,"total":0,"per_page":5,"next_after":null}`, targets{}},
		} {
			page.check(t, s)
		}
	})
}

// TestLastLink checks that there is a link to the last page only if that page does not skip too
// many users.
func TestLastLink(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		query string
		total int64
		last  string
	}{
		{"per_page=1", 100_001, "/users?page=100001&per_page=1"},
		{"per_page=1", 100_002, ""},
		{"per_page=100", 100_100, "/users?page=1001&per_page=100"},
		{"per_page=100", 100_101, ""},
	} {
		q, err := parseListQuery(test.query)
		if err != nil {
			t.Fatal(err)
		}
		a := answer{header: http.Header{"Link": {q.links(q.list([]User{}, test.total))}}}
		if got := links(t, a)["last"]; got != test.last {
			t.Errorf("%s of %d users: last %q, want %q", test.query, test.total, got, test.last)
		}
	}
}

// searchedUsers are the users of TestSearch, by id from 1.
var searchedUsers = [][2]string{
	1: {"Ann", "Lee"}, 2: {"Bob", "Anderson"}, 3: {"ANNA", "annan"}, 4: {"100% Sure", "x"},
	5: {"1000 Sure", "x"}, 6: {"a_b", `"quoted"`}, 7: {"axb", "'single'"},
	8: {`back\slash`, `\`}, 9: {"Mary Ann", "Smith"}, 10: {"MaryAnn", "smythe"},
	11: {"\u00c9va", "composed"}, 12: {"E\u0301va", "decomposed"}, 13: {"Eva", "plain"},
	14: {"ΣΊΣΥΦΟΣ", "x"}, 15: {"σίσυφος", "x"}, 16: {"\u0130stanbul", "x"},
	17: {"\u0131stanbul", "x"}, 18: {"istanbul", "x"}, 19: {"Istanbul", "x"},
	20: {"Straße", "x"}, 21: {"STRAẞE", "x"}, 22: {"Strasse", "x"},
	23: {"\u212aelvin", "x"}, 24: {"kelvin", "x"}, 25: {"Kelvin", "x"},
	26: {"Иван", "Ёлкин"}, 27: {"ИВАНОВ", "ёлкин"}, 28: {"ანა", "x"}, 29: {"ᲐᲜᲐ", "x"},
	30: {"𐐔𐐯𐑅", "x"}, 31: {"𐐼𐐇𐑅", "x"}, 32: {"z\U0010ffffz", "x"},
	33: {"z" + strings.Repeat("\U0010ffff", 254), "x"}, 34: {"😀 Grin", "x"}, 35: {"😀😀", "x"},
	36: {strings.Repeat("n", 255), "x"}, 37: {strings.Repeat("𐐔", 255), "x"},
	38: {"O\u00a0Neil", "O'Neil"}, 39: {"{a,b}", "$1"}, 40: {"x", "NULL"},
}

// searches are prefixes, and the ids of the searchedUsers with them.
var searches = []struct {
	name string
	q    string
	want []int64
}{
	{name: "name or surname", q: "An", want: []int64{1, 2, 3}},
	{name: "name and surname, counted once", q: "anna", want: []int64{3}},
	{name: "surname", q: "le", want: []int64{1}},
	{name: "upper case", q: "ANN", want: []int64{1, 3}},
	{name: "inside a name", q: "nn", want: []int64{36}},
	{name: "nothing", q: "Zoe"},
	{name: "percent sign", q: "%"},
	{name: "percent sign at the end", q: "100%", want: []int64{4}},
	{name: "underscore", q: "_"},
	{name: "underscore inside", q: "a_", want: []int64{6}},
	{name: "backslash", q: `\`, want: []int64{8}},
	{name: "backslash inside", q: `BACK\s`, want: []int64{8}},
	{name: "backslash and percent sign", q: `\%`},
	{name: "double quote", q: `"Q`, want: []int64{6}},
	{name: "single quote", q: "'s", want: []int64{7}},
	{name: "two single quotes", q: "''"},
	{name: "apostrophe", q: "o'n", want: []int64{38}},
	{name: "array", q: "{A,", want: []int64{39}},
	{name: "parameter", q: "$1", want: []int64{39}},
	{name: "regular expression", q: "."},
	{name: "NULL", q: "null", want: []int64{40}},
	{name: "space inside", q: "mary a", want: []int64{9}},
	{name: "space at the end", q: "mary ", want: []int64{9}},
	{name: "without the space", q: "marya", want: []int64{10}},
	{name: "space at the start", q: " mary"},
	{name: "space only", q: " "},
	{name: "space after a whole name", q: "Ann "},
	{name: "no-break space", q: "o\u00a0n", want: []int64{38}},
	{name: "space for a no-break space", q: "o n"},
	{name: "composed accent", q: "\u00e9V", want: []int64{11}},
	{name: "decomposed accent", q: "e\u0301V", want: []int64{12}},
	{name: "without an accent", q: "ev", want: []int64{13}},
	{name: "before a combining accent", q: "e", want: []int64{12, 13}},
	{name: "combining accent", q: "\u0301"},
	{name: "final sigma", q: "ςίσυφοσ", want: []int64{14, 15}},
	{name: "capital sigma", q: "Σ", want: []int64{14, 15}},
	{name: "small dotted i", q: "iST", want: []int64{16, 18, 19}},
	{name: "capital dotless i", q: "Ist", want: []int64{16, 18, 19}},
	{name: "capital dotted i", q: "\u0130ST", want: []int64{16, 18, 19}},
	{name: "small dotless i", q: "\u0131st", want: []int64{17}},
	{name: "sharp s", q: "straß", want: []int64{20, 21}},
	{name: "capital sharp s", q: "straẞ", want: []int64{20, 21}},
	{name: "two s", q: "strass", want: []int64{22}},
	{name: "kelvin sign", q: "\u212a", want: []int64{23, 24, 25}},
	{name: "k for a kelvin sign", q: "kEL", want: []int64{23, 24, 25}},
	{name: "Cyrillic", q: "ИВан", want: []int64{26, 27}},
	{name: "Cyrillic yo", q: "ё", want: []int64{26, 27}},
	{name: "Cyrillic ye", q: "е"},
	{name: "Georgian Mkhedruli", q: "ან", want: []int64{28, 29}},
	{name: "Georgian Mtavruli", q: "ᲐᲜ", want: []int64{28, 29}},
	{name: "Deseret", q: "𐐼𐐯", want: []int64{30, 31}},
	{name: "the highest code point", q: "\U0010ffff"},
	{name: "the highest code point inside", q: "Z\U0010ffff", want: []int64{32, 33}},
	{name: "before the highest code points", q: "z", want: []int64{32, 33}},
	{name: "emoji", q: "😀", want: []int64{34, 35}},
	{name: "two emoji", q: "😀😀", want: []int64{35}},
	{name: "255 characters", q: strings.Repeat("N", 255), want: []int64{36}},
	{name: "255 characters beyond the BMP", q: strings.Repeat("𐐼", 255), want: []int64{37}},
	{name: "255 characters of another name", q: strings.Repeat("N", 254) + "m"},
	{name: "longer than the name", q: "Anna Maria"},
	{name: "line separator", q: "\u2028"},
}

// TestSearch checks which users q finds, and that the answer does not depend on its case.
func TestSearch(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		for _, names := range searchedUsers[1:] {
			if a := s.do("POST", "/users", userBody(t, names[0], names[1])); a.status != 201 {
				t.Fatalf("POST %q: status %d, want 201: %s", names, a.status, a.body)
			}
		}
		for _, test := range searches {
			if got := s.search(test.q); !slices.Equal(got, test.want) {
				t.Errorf("%s: q=%+q finds %v, want %v", test.name, test.q, got, test.want)
			}
		}
	})
}

// search returns the ids that a list with q has. It checks the total.
func (s *service) search(q string) (ids []int64) {
	s.t.Helper()
	a := s.do("GET", "/users?per_page=100&q="+url.QueryEscape(q), "")
	var list userList
	if err := json.Unmarshal([]byte(a.body), &list); err != nil || a.status != http.StatusOK {
		s.t.Fatalf("q=%+q: status %d, %v, want 200 with a list: %s", q, a.status, err, a.body)
	}
	for _, u := range list.Users {
		ids = append(ids, u.ID)
	}
	if list.Total != int64(len(ids)) || strings.Contains(a.body, "total_capped") {
		s.t.Errorf("q=%+q: want the total %d, not capped: %s", q, len(ids), a.body)
	}
	return ids
}

// TestSearchAfterChanges checks that q finds changed users by their new names only, and no deleted
// users.
func TestSearchAfterChanges(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		for range 3 {
			s.createUser("John", "Doe")
		}
		for _, step := range []struct {
			method, path, body string
			john, doe, jane    []int64 // found
		}{
			{"PUT", "/users/2", `{"name": "Jane"}`, []int64{1, 3}, []int64{1, 2, 3}, []int64{2}},
			{"PATCH", "/users/2", `{"surname": "JOHNS"}`, []int64{1, 2, 3}, []int64{1, 3},
				[]int64{2}},
			{"PUT", "/users/1", `{"password": "` + secret + `"}`, []int64{1, 2, 3}, []int64{1, 3},
				[]int64{2}},
			{"PUT", "/users/3", `{"name": "jane", "surname": "Janeson"}`, []int64{1, 2}, []int64{1},
				[]int64{2, 3}},
			{"DELETE", "/users/2", "", []int64{1}, []int64{1}, []int64{3}},
			{"DELETE", "/users/1", "", nil, nil, []int64{3}},
			{"POST", "/users", john, []int64{4}, []int64{4}, []int64{3}},
		} {
			if a := s.do(step.method, step.path, step.body); a.status >= 300 {
				t.Errorf("%s %s: status %d: %s", step.method, step.path, a.status, a.body)
			}
			for q, want := range map[string][]int64{
				"john": step.john, "doe": step.doe, "jane": step.jane,
			} {
				if got := s.search(q); !slices.Equal(got, want) {
					t.Errorf("q=%s after %s %s %s finds %v, want %v",
						q, step.method, step.path, step.body, got, want)
				}
			}
		}
	})
}

// TestSearchPages checks the users, the members and the links of pages with q.
func TestSearchPages(t *testing.T) {
	t.Parallel()
	type targets = map[string]string
	all := []int64{2, 4, 6, 10}
	const jo = "&q=J%25+o"
	pages := []page{
		{"?q=J%25+o", all, `,"total":4,"page":1,"per_page":10,"next_after":null}`,
			targets{"first": "/users?page=1" + jo, "last": "/users?page=1" + jo}},
		{"?q=j%25%20O&per_page=3", all[:3], `,"total":4,"page":1,"per_page":3,"next_after":6}`,
			targets{"first": "/users?page=1&per_page=3&q=j%25+O",
				"next": "/users?after=6&per_page=3&q=j%25+O",
				"last": "/users?page=2&per_page=3&q=j%25+O"}},
		{"?per_page=3&page=2" + jo, all[3:], `,"total":4,"page":2,"per_page":3,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=3" + jo,
				"prev": "/users?page=1&per_page=3" + jo, "last": "/users?page=2&per_page=3" + jo}},
		{"?per_page=2&page=9" + jo, nil, `,"total":4,"page":9,"per_page":2,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=2" + jo,
				"prev": "/users?page=2&per_page=2" + jo, "last": "/users?page=2&per_page=2" + jo}},
		{"?page=100001&per_page=1" + jo, nil,
			`,"total":4,"page":100001,"per_page":1,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=1" + jo,
				"prev": "/users?page=4&per_page=1" + jo, "last": "/users?page=4&per_page=1" + jo}},
		{"?after=0&per_page=4" + jo, all, `,"total":4,"per_page":4,"next_after":null}`, targets{}},
		{"?after=2&per_page=2" + jo, all[1:3], `,"total":4,"per_page":2,"next_after":6}`,
			targets{"next": "/users?after=6&per_page=2" + jo}},
		{"?after=5&per_page=1" + jo, all[2:3], `,"total":4,"per_page":1,"next_after":6}`,
			targets{"next": "/users?after=6&per_page=1" + jo}},
		{"?after=10" + jo, nil, `,"total":4,"per_page":10,"next_after":null}`, targets{}},
		{"?after=9223372036854775807" + jo, nil, `,"total":4,"per_page":10,"next_after":null}`,
			targets{}},
		{"?q=x&page=2", nil, `,"total":0,"page":2,"per_page":10,"next_after":null}`,
			targets{"first": "/users?page=1&q=x", "prev": "/users?page=1&q=x",
				"last": "/users?page=1&q=x"}},
		{"?%71=%6a%25", all, `,"total":4,"page":1,"per_page":10,"next_after":null}`,
			targets{"first": "/users?page=1&q=j%25", "last": "/users?page=1&q=j%25"}},
	}
	eachStore(t, func(t *testing.T, s *service) {
		for i := range 5 {
			s.createUser("Jane", "Doe")
			s.createUser([]string{"J% OH", "Ann"}[i%2], []string{"Doe", "j% o"}[i%2])
		}
		s.do("DELETE", "/users/8", "")
		for _, page := range pages {
			page.check(t, s)
		}
	})
}

// TestSearchErrors checks the whole problem document of an invalid q.
func TestSearchErrors(t *testing.T) {
	t.Parallel()
	const bounds = `{"parameter":"q",` +
		`"detail":"must be 1 to 255 characters of UTF-8 without control characters"}`
	const twice = `{"parameter":"q","detail":"must be given once"}`
	x256, emoji256 := strings.Repeat("x", 256), strings.Repeat("%F0%9F%98%80", 256)
	eachStore(t, func(t *testing.T, s *service) {
		for _, test := range []struct{ name, query, errors string }{
			{"empty", "q=", bounds},
			{"no value", "q", bounds},
			{"256 characters", "q=" + x256, bounds},
			{"256 emoji", "q=" + emoji256, bounds},
			{"NUL", "q=a%00", bounds},
			{"tab", "q=%09", bounds},
			{"newline", "q=a%0Ab", bounds},
			{"DEL", "q=%7F", bounds},
			{"a control character of Latin-1", "q=%C2%85", bounds},
			{"a byte that no character has", "q=a%FF", bounds},
			{"half a character", "q=%C3", bounds},
			{"an overlong NUL", "q=%C0%80", bounds},
			{"a surrogate", "q=%ED%A0%80", bounds},
			{"beyond the highest code point", "q=%F4%90%80%80", bounds},
			{"twice", "q=a&q=b", twice},
			{"twice the same", "q=a&page=1&q=a", twice},
			{"twice empty", "q=&q=", twice},
		} {
			a := s.do("GET", "/users?"+test.query, "", "X-Request-Id: id")
			want := `{"type":"about:blank","title":"Bad Request","status":400,` +
				`"detail":"1 parameter is not valid","instance":"/users","trace_id":"id",` +
				`"errors":[` + test.errors + `]}`
			if a.status != http.StatusBadRequest || strings.TrimSpace(a.body) != want {
				t.Errorf("%s: status %d, %s, want 400, %s", test.name, a.status, a.body, want)
			}
		}
	})
}

// listQueries are seeds of FuzzListQuery.
var listQueries = []string{
	"", "page=1", "page=3&per_page=7", "per_page=100&page=1001",
	"per_page=100&page=1002", "after=0",
	"after=9223372036854775807", "after=9223372036854775808",
	"page=9223372036854775807&per_page=1", "page=4611686018427387905&per_page=4",
	"page=100001&per_page=1", "page=1&after=1", "p%61ge=%31",
	"page=+1", "page=-1", "page=01", "page=1_0", "page=", "page", "page=1&page=1",
	"PAGE=1&x=%00&%zz", "per_page=0", "per_page=101", "a;b", "page=%D9%A1", "&&",
	"after=-0", "after=4&per_page=2&per_page=",
	"q=jo&per_page=3&page=2", "q=a+%25&after=7", "q=%F0%9F%98%80", "q=", "q", "q=%FF", "q=a%00",
	"q=a&q=b", "q=%C2%85&page=0", "q=%EF%BF%BD&page=10001",
}

// FuzzListQuery compares parseListQuery with wantInvalid, and checks the links of a list of users
// whose ids are even.
func FuzzListQuery(f *testing.F) {
	for _, query := range listQueries {
		for _, total := range []uint32{0, 1, 10, 200_001} {
			f.Add(query, total)
		}
	}
	f.Fuzz(func(t *testing.T, query string, size uint32) {
		q, err := parseListQuery(query)
		invalid, parsed := wantInvalid(query)
		if err != nil {
			got := make(map[string]bool)
			p, ok := err.(*problem)
			if !ok || p.Status != http.StatusBadRequest || parsed != (len(p.Errors) > 0) {
				t.Fatalf("%q: error %+v, want a 400 for %v", query, err, invalid)
			}
			for _, e := range p.Errors {
				got[e.Parameter] = true
			}
			if !isListed(got, invalid, len(p.Errors)) || parsed && len(invalid) == 0 {
				t.Errorf("%q: errors for %v, want %v", query, got, invalid)
			}
			return
		}
		if !parsed || len(invalid) > 0 {
			t.Fatalf("%q: no error, want one for %v", query, invalid)
		}
		checkEvenList(t, query, q, int64(size%300_000))
	})
}

// checkEvenList checks the page of a list of evenUsers and its links.
func checkEvenList(t *testing.T, query string, q listQuery, total int64) {
	t.Helper()
	counted, capped := total, q.prefix != "" && total > 10_000
	if capped {
		counted = 10_001
	}
	list := q.list(evenUsers(q, total), counted)
	if n := int64(len(list.Users)); n > q.perPage || q.offset() < 0 || q.offset() > 100_000 {
		t.Fatalf("%q: %d users after an offset of %d", query, n, q.offset())
	}
	if list.TotalCapped != capped || capped && list.Total != 10_000 {
		t.Errorf("%q of %d: total %d, capped: %t", query, total, list.Total, list.TotalCapped)
	}
	want := evenLinks(q, list, total)
	a := answer{header: http.Header{"Link": {q.links(list)}}}
	if a.header.Get("Link") == "" {
		a.header.Del("Link")
	}
	got := links(t, a)
	for relation, target := range got {
		linked, err := parseListQuery(strings.TrimPrefix(target, "/users?"))
		linked.values = nil
		if err != nil || !reflect.DeepEqual(linked, want[relation]) {
			t.Errorf("%q of %d: link %s to %s (%v), want %+v",
				query, total, relation, target, err, want[relation])
		}
	}
	if len(got) != len(want) {
		t.Errorf("%q of %d: links %v, want %v", query, total, got, want)
	}
}

// evenLinks returns what the links of a page of evenUsers must lead to, by relation.
func evenLinks(q listQuery, list userList, total int64) map[string]listQuery {
	want := map[string]listQuery{}
	link := func(relation string, page, after int64) {
		want[relation] = listQuery{prefix: q.prefix, page: page, after: after, perPage: q.perPage}
	}
	last := max(0, total-1)/q.perPage + 1 // the number of the last page
	if q.page > 0 {
		link("first", 1, 0)
	}
	if q.page > 0 && !list.TotalCapped && (last-1)*q.perPage <= 100_000 {
		link("last", last, 0)
	}
	if q.page > 1 && list.TotalCapped {
		link("prev", q.page-1, 0)
	} else if q.page > 1 {
		link("prev", min(q.page-1, last), 0)
	}
	if n := len(list.Users); n > 0 && list.Users[n-1].ID < 2*total {
		link("next", 0, list.Users[n-1].ID)
	}
	return want
}

// evenUsers returns what a store of users with the even ids from 2 to 2*total returns for q.
func evenUsers(q listQuery, total int64) []User {
	users := []User{}
	first := min(q.after, 2*total)/2 + q.offset()
	for i := first; i < total && int64(len(users)) <= q.perPage; i++ {
		users = append(users, User{ID: 2 * (i + 1)})
	}
	return users
}

// searchPattern matches a valid q, and invalid UTF-8.
var searchPattern = regexp.MustCompile(`^\P{Cc}{1,255}$`)

// wantInvalid returns the parameters that must be refused. ok is false if the query is malformed.
func wantInvalid(query string) (invalid map[string]bool, ok bool) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil, false
	}
	invalid = make(map[string]bool)
	const maxInt64 = "9223372036854775807"
	high := map[string]string{"page": maxInt64, "per_page": "100", "after": maxInt64}
	number := map[string]*big.Int{"page": big.NewInt(1), "per_page": big.NewInt(10)}
	for name, texts := range values {
		if name == "q" {
			if len(texts) > 1 || !searchPattern.MatchString(texts[0]) ||
				strings.ToValidUTF8(texts[0], "") != texts[0] {
				invalid[name] = true
			}
			continue
		}
		limit, _ := new(big.Int).SetString(high[name], 10)
		n, isNumber := new(big.Int).SetString(texts[0], 10)
		if high[name] == "" || len(texts) > 1 || !isNumber ||
			strings.Trim(texts[0], "0123456789") != "" ||
			n.Cmp(limit) > 0 || name != "after" && n.Sign() == 0 {
			invalid[cut(name, maxEchoed)] = true
		}
		number[name] = n
	}
	skipped := new(big.Int)
	if len(invalid) == 0 {
		skipped.Mul(skipped.Sub(number["page"], big.NewInt(1)), number["per_page"])
	}
	switch {
	case values.Has("page") && values.Has("after"):
		invalid["after"] = true
	case skipped.Cmp(big.NewInt(100_000)) > 0:
		invalid["page"] = true
	}
	return invalid, true
}

// invalidQueries are queries of GET /users, and their invalid parameters.
var invalidQueries = map[string][]string{
	"page=0":                              {"page"},
	"page=-1":                             {"page"},
	"page=%2B1":                           {"page"},
	"page=+1":                             {"page"}, // a space and a 1
	"page=1e3":                            {"page"},
	"page=1.0":                            {"page"},
	"page=0x1":                            {"page"},
	"page=1_0":                            {"page"},
	"page=one":                            {"page"},
	"page=%D9%A1":                         {"page"}, // an Arabic-Indic 1
	"page=":                               {"page"},
	"page":                                {"page"},
	"page=1&page=1":                       {"page"},
	"page=9223372036854775807":            {"page"},
	"page=9223372036854775808":            {"page"},
	"page=18446744073709551617":           {"page"},
	"per_page=0":                          {"per_page"},
	"per_page=101":                        {"per_page"},
	"per_page=-5":                         {"per_page"},
	"per_page=":                           {"per_page"},
	"per_page=5&per_page=6":               {"per_page"},
	"per_page=18446744073709551621":       {"per_page"},
	"after=-1":                            {"after"},
	"after=":                              {"after"},
	"after=%2B0":                          {"after"},
	"after=9223372036854775808":           {"after"},
	"after=1&after=1":                     {"after"},
	"page=1&after=0":                      {"after"},
	"per_page=10&page=1&after=1":          {"after"},
	"limit=5":                             {"limit"},
	"Page=1":                              {"Page"},
	"page[]=1":                            {"page[]"},
	"limit=5&limit=6":                     {"limit"},
	"page=0&per_page=0&x=&y=1":            {"page", "per_page", "x", "y"},
	"after=x&per_page=101":                {"after", "per_page"},
	"page=10002":                          {"page"}, // skips 100,010
	"page=100002&per_page=1":              {"page"},
	"page=1002&per_page=100":              {"page"},
	"page=14287&per_page=7":               {"page"}, // skips 100,002
	"page=4611686018427387905&per_page=4": {"page"}, // skips 2^64
}

// TestListErrors checks that the 400 names each invalid parameter of a list.
func TestListErrors(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for query, want := range invalidQueries {
		checkBadRequest(t, query, s.do("GET", "/users?"+query, ""), want...)
	}
	const pageDetail = "must be 1 or more and skip at most 100000 users; use after to go further"
	for query, want := range map[string]string{
		"page=0":                       pageDetail,
		"page=10002":                   pageDetail,
		"page=9223372036854775807":     pageDetail,
		"page=9223372036854775808":     pageDetail,
		"per_page=0":                   "must be 1 to 100",
		"per_page=9223372036854775808": "must be 1 to 100",
		"after=-1":                     "must be 0 or more",
		"after=9223372036854775808":    "must be 0 or more",
	} {
		a := s.do("GET", "/users?"+query, "")
		if !strings.Contains(a.body, fmt.Sprintf(`,"detail":%q}`, want)) {
			t.Errorf("%s: want the detail %q: %s", query, want, a.body)
		}
	}
	for _, query := range []string{
		"%zz", "page=%", "page=1&per_page=%2", "page=1;per_page=2", "a;b",
	} {
		a := s.do("GET", "/users?"+query, "")
		if a.status != http.StatusBadRequest ||
			!strings.Contains(fmt.Sprint(a.json(t, "detail")), "query") {
			t.Errorf("%s: status %d, want 400 with a detail about the query: %s",
				query, a.status, a.body)
		}
	}
}

// TestIgnoredQuery checks that every route except the list ignores an invalid query.
func TestIgnoredQuery(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	const query = "?page=0&x=1&%zz;"
	for _, test := range []struct {
		method, path, body string
		want               int
	}{
		{"POST", "/users", john, http.StatusCreated},
		{"POST", "/users", "[]", http.StatusBadRequest},
		{"GET", "/users/1", "", http.StatusOK},
		{"PUT", "/users/1", john, http.StatusOK},
		{"DELETE", "/users/1", "", http.StatusOK},
		{"DELETE", "/users/1", "", http.StatusNotFound},
		{"OPTIONS", "/users", "", http.StatusMethodNotAllowed},
		{"GET", "/nothing", "", http.StatusNotFound},
		{"GET", "/docs", "", http.StatusOK},
		{"GET", "/openapi.json", "", http.StatusOK},
		{"GET", "/healthz", "", http.StatusOK},
		{"GET", "/readyz", "", http.StatusOK},
		{"GET", "/metrics", "", http.StatusOK},
	} {
		if a := s.do(test.method, test.path+query, test.body); a.status != test.want {
			t.Errorf("%s %s: status %d, want %d: %s",
				test.method, test.path, a.status, test.want, a.body)
		}
	}
}

// TestIdempotencyKey checks when a POST with a key returns the first answer, and when it creates a user.
func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		first := s.do("POST", "/users", john, "Idempotency-Key: key-1")
		s.do("PUT", "/users/1", `{"name": "Jane"}`)
		for name, test := range map[string]struct {
			body, key string
			want      int
		}{
			"the same body": {body: john, key: "key-1", want: 201},
			"a quoted key":  {body: john, key: `"key-1"`, want: 201},
			"an equivalent body": {body: strings.Replace(john, ` "John"`, `"\u004aohn  "`, 1), key: "key-1",
				want: 201},
			"another name":    {body: strings.Replace(john, "John", "Jane", 1), key: "key-1", want: 422},
			"another surname": {body: strings.Replace(john, "Doe", "Roe", 1), key: "key-1", want: 422},
			"another password": {body: strings.Replace(john, secret, secret+"!", 1), key: "key-1",
				want: 422},
			"an invalid body": {body: `{}`, key: "key-1", want: 400},
		} {
			a := s.do("POST", "/users/", test.body, "Idempotency-Key: "+test.key)
			if a.status != test.want {
				t.Errorf("%s: got %d %s, want %d", name, a.status, a.body, test.want)
			}
			if test.want == 201 && (a.body != first.body || a.header.Get("Location") != "/users/1" ||
				a.header.Get("ETag") != `"1"`) {
				t.Errorf("%s: got %s with %v, want the first answer", name, a.body, a.header)
			}
		}
		s.do("DELETE", "/users/1", "")
		if a := s.do("POST", "/users", john, "Idempotency-Key: key-1"); a.body != first.body {
			t.Errorf("after the user is deleted: got %d %s, want the first answer", a.status, a.body)
		}
		for i, headers := range [][]string{{}, {"Idempotency-Key: key-2"}, {"Idempotency-Key: KEY-1"}} {
			a := s.do("POST", "/users", john, headers...)
			if got := a.json(t, "id"); fmt.Sprint(got) != fmt.Sprint(i+2) {
				t.Errorf("POST with %v: got id %v, want %d", headers, got, i+2)
			}
		}
		if total := s.do("GET", "/users", "").json(t, "total"); total != 3.0 {
			t.Errorf("total: got %v, want 3", total)
		}
	})
}

// TestParseIdempotencyKey checks which header lines are valid keys, and that keys of different callers
// differ.
func TestParseIdempotencyKey(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("k", 255)
	for name, test := range map[string]struct {
		lines []string
		want  string // "" if the key is invalid
	}{
		"a token":              {lines: []string{"8e03978e-40d5-43dd-bc93-6894a57f9324"}, want: "8e03978e-40d5-43dd-bc93-6894a57f9324"},
		"a token with signs":   {lines: []string{"a/b+c=d;e,f"}, want: "a/b+c=d;e,f"},
		"a string":             {lines: []string{`"a b"`}, want: "a b"},
		"a string with quotes": {lines: []string{`"\"\\"`}, want: `"\`},
		"the longest":          {lines: []string{long}, want: long},
		"the longest string":   {lines: []string{`"` + long + `"`}, want: long},
		"too long":             {lines: []string{long + "k"}},
		"a string too long":    {lines: []string{`"k` + long + `"`}},
		"empty":                {lines: []string{""}},
		"an empty string":      {lines: []string{`""`}},
		"an open string":       {lines: []string{`"a`}},
		"an invalid escape":    {lines: []string{`"\n"`}},
		"a space":              {lines: []string{"a b"}},
		"text after a string":  {lines: []string{`"a";b`}},
		"beyond ASCII":         {lines: []string{"clé"}},
		"a control character":  {lines: []string{"\"a\tb\""}},
		"two lines":            {lines: []string{"a", "a"}},
	} {
		got, err := idempotencyKey(map[string][]string{"Idempotency-Key": test.lines}, caller{})
		if got != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, test.want)
		}
	}
	owned, err := idempotencyKey(map[string][]string{"Idempotency-Key": {"key"}}, caller{kind: "key", name: "shop"})
	if owned != "shop\tkey" || err != nil {
		t.Errorf("key of the caller shop: got %q, %v", owned, err)
	}
	if key, err := idempotencyKey(nil, caller{}); key != "" || err != nil {
		t.Errorf("no header: got %q, %v, want no key and no error", key, err)
	}
}

// TestIdempotencyKeyCheckedLast checks that an unsupported content type is reported before an invalid key.
func TestIdempotencyKeyCheckedLast(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for want, headers := range map[int][]string{
		415: {"Idempotency-Key: two words", "Content-Type: text/plain"},
		400: {"Idempotency-Key: two words"},
	} {
		if a := s.do("POST", "/users", john, headers...); a.status != want {
			t.Errorf("POST with %v: got %d %s, want %d", headers, a.status, a.body, want)
		}
	}
}

// TestIdempotencyKeyPerCaller checks that callers with different API keys can use the same Idempotency-Key.
func TestIdempotencyKeyPerCaller(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*testing.T) settings{
		"memory":   func(*testing.T) settings { return memorySettings() },
		"postgres": postgresSettings,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			shop, shopKey := newTestKey(t, "shop", false)
			crm, crmKey := newTestKey(t, "crm", false)
			s := set(t)
			s.apiKeys = []apiKey{shopKey, crmKey}
			svc := startService(t, s)
			jane := strings.Replace(john, "John", "Jane", 1)
			for _, step := range []struct {
				owner, key, body string
				status           int
				id               float64
			}{
				{owner: shop, key: "order-1", body: john, status: 201, id: 1},
				{owner: crm, key: "order-1", body: john, status: 201, id: 2},
				{owner: shop, key: "order-2", body: john, status: 201, id: 3},
				{owner: crm, key: "order-2", body: jane, status: 201, id: 4},
				{owner: shop, key: "order-1", body: john, status: 201, id: 1},
				{owner: crm, key: "order-1", body: john, status: 201, id: 2},
				{owner: crm, key: "order-2", body: john, status: 422},
			} {
				a := svc.do("POST", "/users", step.body, "Authorization: Bearer "+step.owner,
					"Idempotency-Key: "+step.key)
				if a.status != step.status || step.id > 0 && a.json(t, "id") != step.id {
					t.Errorf("POST with %s: got %d %s, want %d with id %v", step.key, a.status, a.body,
						step.status, step.id)
				}
			}
		})
	}
}

// TestIdempotencyKeyGuessing checks that repeated creations with other passwords count against the limit of
// verifications, which allows another one every six seconds.
func TestIdempotencyKeyGuessing(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		s.do("POST", "/users", john, "Idempotency-Key: key")
		const most = 3 * maxVerifications
		tries, a := 0, answer{status: 422}
		for ; a.status == 422 && tries < most; tries++ {
			body := strings.Replace(john, secret, fmt.Sprint(secret, tries), 1)
			a = s.do("POST", "/users", body, "Idempotency-Key: key")
		}
		if a.status != 429 || a.header.Get("Retry-After") == "" || tries <= maxVerifications {
			t.Errorf("after %d requests: got %d %s, want 429 after more than %d", tries, a.status, a.body,
				maxVerifications)
		}
		for path, body := range map[string]string{
			"/users":                   john,
			"/users/1/password/verify": fmt.Sprintf(`{"password": %q}`, secret),
		} {
			status := 0
			for n := 0; status != 429 && n < maxVerifications/2; n++ {
				status = s.do("POST", path, body, "Idempotency-Key: key").status
			}
			if status != 429 {
				t.Errorf("POST %s after too many verifications: got %d, want 429", path, status)
			}
		}
		if a := s.do("POST", "/users", john, "Idempotency-Key: other"); a.status != 201 {
			t.Errorf("POST with another key: got %d %s, want 201", a.status, a.body)
		}
	})
}

// TestIdempotencyKeyRace checks that concurrent requests with one key to two replicas create one user, and
// that each answer 201 has that user.
func TestIdempotencyKeyRace(t *testing.T) {
	t.Parallel()
	settings := postgresSettings(t)
	replicas := []*service{startService(t, settings), startService(t, settings)}
	for round := range 5 {
		key := fmt.Sprint("Idempotency-Key: round-", round)
		answers := make(chan answer, 12)
		var group sync.WaitGroup
		for i := range cap(answers) {
			group.Go(func() { answers <- replicas[i%2].do("POST", "/users", john, key) })
		}
		group.Wait()
		close(answers)
		created := make(map[string]int)
		for a := range answers {
			switch a.status {
			case 201:
				created[a.body]++
			case 409:
			default:
				t.Errorf("POST: got %d %s, want 201 or 409", a.status, a.body)
			}
		}
		if len(created) != 1 {
			t.Errorf("different answers 201: got %d, want 1", len(created))
		}
	}
	if total := replicas[0].do("GET", "/users", "").json(t, "total"); total != 5.0 {
		t.Errorf("users of 5 keys: got %v, want 5", total)
	}
}

// TestIdempotencyKeyWhileRunning checks that a request is refused while another with its key is in
// progress.
func TestIdempotencyKeyWhileRunning(t *testing.T) {
	t.Parallel()
	settings := postgresSettings(t)
	s, conn := startService(t, settings), connect(t, settings.databaseURL)
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE users"); err != nil {
		t.Fatal(err)
	}
	first := s.goDo("POST", "/users", john, "Idempotency-Key: key-1")
	watcher := connect(t, settings.databaseURL)
	eventually(t, "a statement that waits for the lock", func() bool {
		return queryValue[bool](t, watcher, blockedHere)
	})
	if a := s.do("POST", "/users", john, "Idempotency-Key: key-1"); a.status != 409 {
		t.Errorf("second request during the first: got %d %s, want 409", a.status, a.body)
	}
	if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	if a := <-first; a.status != 201 {
		t.Errorf("first request: got %d %s, want 201", a.status, a.body)
	}
	if a := s.do("POST", "/users", john, "Idempotency-Key: key-1"); a.status != 201 {
		t.Errorf("third request after the first: got %d %s, want 201", a.status, a.body)
	}
}

// TestPostgresKeyLifetime checks that a key expires after a day, and that a sweep deletes expired keys.
func TestPostgresKeyLifetime(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	in := input("John", "Doe", "hash")
	for _, key := range []string{"old-1", "old-2", "young"} {
		if _, err := s.createUser(t.Context(), "test", in, key); err != nil {
			t.Fatal(err)
		}
	}
	_, err := conn.Exec(t.Context(), `UPDATE idempotency_keys SET created_at = created_at
		- interval '1 day' + interval '1 minute' * (key = 'young')::int`)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.creationUnder(t.Context(), "old-1"); !errors.Is(err, errNotFound) {
		t.Errorf("expired key: got %v, want errNotFound", err)
	}
	if u, hash, err := s.creationUnder(t.Context(), "young"); err != nil || u.ID != 3 || hash != "hash" {
		t.Errorf("valid key: got %+v, %q, %v, want user 3", u, hash, err)
	}
	if u, err := s.createUser(t.Context(), "test", in, "old-1"); err != nil || u.Version != 1 {
		t.Errorf("createUser with an expired key: got %+v, %v, want a new user", u, err)
	}
	if _, err := s.createUser(t.Context(), "test", in, "young"); !errors.Is(err, errKeyUsed) {
		t.Errorf("createUser with a valid key: got %v, want errKeyUsed", err)
	}
	if n := len(allPending(t, s)); n != 4 {
		t.Errorf("pending events: got %d, want 4", n)
	}
	if err := s.sweepKeys(t.Context()); err != nil {
		t.Error(err)
	}
	const left = "SELECT string_agg(key, ' ' ORDER BY key) FROM idempotency_keys"
	if got := queryValue[string](t, conn, left); got != "old-1 young" {
		t.Errorf("keys after the sweep: got %q, want %q", got, "old-1 young")
	}
}

// TestPostgresSweepsManyKeys checks a sweep of more pages than one statement reads, with expired and valid
// keys.
func TestPostgresSweepsManyKeys(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	execute(t, conn, `
		INSERT INTO idempotency_keys (key, user_id, name, surname, password, created_at)
		SELECT i, i, 'John', 'Doe', repeat('x', 100),
			now() - interval '1 day' + CASE WHEN i % 100 = 0 THEN interval '1 minute' ELSE '0' END
		FROM generate_series(1, 40000) AS i`)
	pages := queryValue[int](t, conn, `SELECT pg_relation_size('idempotency_keys')
		/ current_setting('block_size')::int`)
	if pages <= keyPages {
		t.Fatalf("%d pages, want more than the %d of one statement", pages, keyPages)
	}
	if err := s.sweepKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := queryValue[string](t, conn, `SELECT count(*) || ' ' ||
		count(*) FILTER (WHERE user_id % 100 = 0) FROM idempotency_keys`)
	if got != "400 400" {
		t.Errorf("keys after the sweep, and valid ones: got %s, want 400 400", got)
	}
}

// TestMemoryKeyLifetime checks that a key of the memory store expires after keyLifetime.
func TestMemoryKeyLifetime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		in := input("John", "Doe", "hash")
		for i, step := range []struct {
			wait time.Duration
			want error
		}{
			{wait: 0, want: nil},
			{wait: keyLifetime - time.Second, want: errKeyUsed},
			{wait: time.Second, want: nil},
			{wait: 0, want: errKeyUsed},
		} {
			time.Sleep(step.wait)
			if _, err := m.createUser(t.Context(), "test", in, "key"); !errors.Is(err, step.want) {
				t.Errorf("step %d: got %v, want %v", i, err, step.want)
			}
		}
		if len(m.byKey) != 1 || len(m.keysByAge) != 1 || len(m.users) != 2 {
			t.Errorf("got %d keys, %d entries by age, %d users, want 1, 1, 2", len(m.byKey), len(m.keysByAge),
				len(m.users))
		}
	})
}
