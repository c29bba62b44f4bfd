package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

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
	want := []string{"id", "name", "surname", "created_at", "updated_at"}
	if got := keys(a.body); !slices.Equal(got, want) {
		t.Errorf("keys %v, want %v", got, want)
	}
	if a.json(t, "id") != float64(id) || a.json(t, "name") != "John" ||
		a.json(t, "surname") != "Doe" {
		t.Errorf("want John Doe with the id %d: %s", id, a.body)
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
		if a.status != http.StatusOK || etag != u.etag ||
			a.json(t, "name") != u.name || a.json(t, "surname") != u.surname {
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
	d := testDependencies(memorySettings(), newMemory(), slog.New(slog.DiscardHandler))
	a := newAPI(d, &traffic{})
	limit := a.verifications
	if limit.burst != 10 || math.Abs(float64(limit.rate)*60-10) > 1e-9 {
		t.Errorf("limit of %v per second, burst %d, want 10 per minute, burst 10",
			limit.rate, limit.burst)
	}
	a.verifications = newLimiter[int64]("password", 1e-6, maxVerifications)
	s := serveInProcess(t, newServer(d, &traffic{}, newAccess(d.settings), protectedRoutes(a, &health{})))
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
	d := testDependencies(memorySettings(), newMemory(), slog.New(slog.DiscardHandler))
	a := newAPI(d, &traffic{})
	s := serveInProcess(t, newServer(d, &traffic{}, newAccess(d.settings), protectedRoutes(a, &health{})))
	if !a.hasher.lanes.queue.TryAcquire(int64(d.limits.hashQueue)) {
		t.Fatal("the queue of hashes is not empty")
	}
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
	key := argon2.IDKey([]byte(secret), []byte("somesalt"), 1, 64, 1, 32)
	older := "$argon2id$v=19$m=64,t=1,p=1$c29tZXNhbHQ$" + base64.RawStdEncoding.EncodeToString(key)
	for _, test := range []struct {
		stored string
		valid  bool
		warns  int // lines in the log so far
	}{
		{"plain " + secret, false, 1},
		{"$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy", false, 2},
		{strings.Replace(older, "m=64,", "m=65537,", 1), false, 3},
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
		if warns := len(s.log.lines("Password hash unusable")); warns != test.warns {
			t.Errorf("%s: %d warnings, want %d", test.stored, warns, test.warns)
		}
		stored := queryValue[string](t, db, "SELECT password FROM users")
		rehashed := stored != test.stored
		if rehashed != test.valid || rehashed && !strings.HasPrefix(stored, phcPrefix) {
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
