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

const john = `{"name": "John", "surname": "Doe", "password": "` + secret + `"}`

// receivedEvents returns types and versions of what the consumer has logged of a user.
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

func TestCreateUser(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		for i, path := range []string{"/users", "/users/"} {
			location := fmt.Sprint("/users/", i+1)
			created := s.do("POST", path, john)
			if created.status != http.StatusCreated || created.header.Get("Location") != location {
				t.Fatalf("POST %s: %d %v", path, created.status, created.header)
			}
			got := s.do("GET", location, "")
			for _, a := range []answer{created, got} {
				if a.header.Get("ETag") != `"1"` || a.header.Get("Content-Type") != "application/json" {
					t.Errorf("%s has the header %v", location, a.header)
				}
			}
			if got.status != http.StatusOK || got.body != created.body {
				t.Errorf("GET %s: %d %s, not %s", location, got.status, got.body, created.body)
			}
			checkJohn(t, created, i+1)

			list := s.do("GET", path, "")
			want := strings.TrimSpace(created.body) + fmt.Sprintf(`],"total":%d,"page":1,`, i+1)
			if list.status != http.StatusOK || !strings.Contains(list.body, want) {
				t.Errorf("GET %s: %d %s", path, list.status, list.body)
			}
		}
	})
}

var timePattern = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$`)

// checkJohn holds an answer against the JSON of a user that was just created.
func checkJohn(t *testing.T, a answer, id int) {
	t.Helper()
	want := []string{"id", "name", "surname", "created_at", "updated_at"}
	if got := keys(a.body); !slices.Equal(got, want) {
		t.Errorf("the user has the keys %v", got)
	}
	if a.json(t, "id") != float64(id) || a.json(t, "name") != "John" || a.json(t, "surname") != "Doe" {
		t.Errorf("user %d is %s", id, a.body)
	}
	created := fmt.Sprint(a.json(t, "created_at"))
	at, err := time.Parse(time.RFC3339, created)
	if !timePattern.MatchString(created) || err != nil || time.Since(at).Abs() > time.Minute ||
		a.json(t, "updated_at") != created {
		t.Errorf("the times of a new user are wrong: %s", a.body)
	}
}

func TestTimesHaveSixDigits(t *testing.T) {
	t.Parallel()
	east := time.FixedZone("", 2*60*60)
	for want, when := range map[string]time.Time{
		`"2026-01-01T12:00:00.000000Z"`: time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC),
		`"2026-01-01T12:00:00.123400Z"`: time.Date(2026, 1, 1, 12, 0, 0, 123_400_999, time.UTC),
		`"2025-12-31T23:30:00.000001Z"`: time.Date(2026, 1, 1, 1, 30, 0, 1000, east),
	} {
		if got, err := json.Marshal(timestamp{when}); err != nil || string(got) != want {
			t.Errorf("%v is %s, not %s (%v)", when, got, want, err)
		}
	}
}

func TestUpdateUser(t *testing.T) {
	t.Parallel()
	const mergePatch = "Content-Type: application/merge-patch+json"
	updates := []struct {
		body, name, surname, etag string
		changes                   bool
	}{
		{`{"name": "Jane"}`, "Jane", "Doe", `"2"`, true},
		{`{"surname": "Roe"}`, "Jane", "Roe", `"3"`, true},
		{`{"name": "Jane"}`, "Jane", "Roe", `"3"`, false},
		{`{"name": " Jane\u00a0", "surname": "Roe"}`, "Jane", "Roe", `"3"`, false},
		{`{"name": "Jane", "surname": "roe"}`, "Jane", "roe", `"4"`, true},
		{`{"password": "` + secret + `"}`, "Jane", "roe", `"5"`, true},
		{`{"name": "Jane", "password": "` + secret + `"}`, "Jane", "roe", `"6"`, true},
	}
	eachStore(t, func(t *testing.T, s *service) {
		for _, how := range []struct {
			method  string
			headers []string
		}{
			{"PUT", nil},
			{"PATCH", nil},
			{"PATCH", []string{mergePatch}},
		} {
			id := s.createUser("John", "Doe")
			path := fmt.Sprint("/users/", id)
			before := s.do("GET", path, "")
			want := []string{"user.created 1"}
			for _, u := range updates {
				a := s.do(how.method, path, u.body, how.headers...)
				if a.status != http.StatusOK || a.header.Get("ETag") != u.etag ||
					a.json(t, "name") != u.name || a.json(t, "surname") != u.surname {
					t.Errorf("%s %s: %d %s %s", how, u.body, a.status, a.header.Get("ETag"), a.body)
				}
				if a.json(t, "created_at") != before.json(t, "created_at") {
					t.Errorf("%s %s changed created_at: %s", how, u.body, a.body)
				}
				later := fmt.Sprint(a.json(t, "updated_at")) > fmt.Sprint(before.json(t, "updated_at"))
				if u.changes && !later || !u.changes && a.body != before.body {
					t.Errorf("%s %s made %s of %s", how, u.body, a.body, before.body)
				}
				if got := s.do("GET", path, ""); got.body != a.body || got.header.Get("ETag") != u.etag {
					t.Errorf("%s %s answered %s, but now it is %s", how, u.body, a.body, got.body)
				}
				if u.changes {
					want = append(want, "user.updated "+strings.Trim(u.etag, `"`))
				}
				before = a
			}
			s.waitForLine(fmt.Sprint("Received event user.updated with user_id=", id), "version", 6)
			if got := s.receivedEvents(id); !slices.Equal(got, want) {
				t.Errorf("%s: the events are %v, not %v", how, got, want)
			}
		}
	})
}

func TestDeleteUser(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		a := s.do("DELETE", "/users/1", "")
		message := a.json(t, "message")
		if a.status != http.StatusOK || message != "User with id 1 has been deleted" ||
			len(keys(a.body)) != 1 || a.header.Get("Content-Type") != "application/json" {
			t.Errorf("DELETE: %d %s", a.status, a.body)
		}
		for _, method := range []string{"DELETE", "GET", "PUT", "PATCH"} {
			a := s.do(method, "/users/1", `{"name": "Jane"}`)
			if a.status != http.StatusNotFound || a.json(t, "detail") != "User with id 1 not found" {
				t.Errorf("%s of a deleted user: %d %s", method, a.status, a.body)
			}
		}
		if a := s.do("GET", "/users", ""); a.json(t, "total") != 0.0 {
			t.Errorf("the list after the deletion: %s", a.body)
		}
		s.waitForLine("Received event user.deleted with user_id=1", "version", 2)
		want := []string{"user.created 1", "user.deleted 2"}
		if got := s.receivedEvents(1); !slices.Equal(got, want) {
			t.Errorf("the events are %v, not %v", got, want)
		}
	})
}

func TestNameRules(t *testing.T) {
	t.Parallel()
	// All of White_Space, by Unicode's PropList.txt.
	const space = "\t\n\v\f\r \u0085\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007" +
		"\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
	const refused = ""
	x255, emoji255 := strings.Repeat("x", 255), strings.Repeat("😀", 255)
	accented := "x" + strings.Repeat("e\u0301", 127)
	tests := map[string]struct{ name, want string }{
		"one character":                     {"J", "J"},
		"white space at both ends":          {space + "John" + space, "John"},
		"white space inside":                {"J \u00a0\u3000\u2028J", "J \u00a0\u3000\u2028J"},
		"255 characters":                    {x255, x255},
		"255 characters, and white space":   {space + x255 + space, x255},
		"255 characters of four bytes":      {emoji255, emoji255},
		"255 code points of 127 letters":    {accented, accented},
		"a zero width space is none":        {"\u200b", "\u200b"},
		"a byte order mark is none":         {"\ufeffJohn\u180e", "\ufeffJohn\u180e"},
		"what is neither a letter nor Cc":   {"\u00ad\ue000\ufffd\U0010ffff", "\u00ad\ue000\ufffd\U0010ffff"},
		"what HTML and SQL have a word for": {`<b>&'"\;--`, `<b>&'"\;--`},
		"what looks like an escape":         {`\ud800`, `\ud800`},

		"empty":                                {"", refused},
		"only white space":                     {space, refused},
		"256 characters":                       {x255 + "x", refused},
		"256 characters of four bytes":         {emoji255 + "😀", refused},
		"256 code points of 129 letters":       {accented + "e", refused},
		"256 characters with white space in":   {strings.Repeat("x", 254) + " x", refused},
		"NUL":                                  {"Jo\x00hn", refused},
		"NUL at the end":                       {"John\x00", refused},
		"the first control character":          {"Jo\x01hn", refused},
		"a tab":                                {"Jo\thn", refused},
		"a line feed":                          {"Jo\nhn", refused},
		"the last below space":                 {"Jo\x1fhn", refused},
		"DEL":                                  {"Jo\x7fhn", refused},
		"the first of C1":                      {"Jo\u0080hn", refused},
		"NEL, which is white space too":        {"Jo\u0085hn", refused},
		"the last of C1":                       {"Jo\u009fhn", refused},
		"a control character that stops space": {" \x1b John", refused},
	}
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		for what, test := range tests {
			for _, field := range []string{"name", "surname"} {
				a := s.do("PATCH", "/users/1", `{"`+field+`": `+quote(test.name)+`}`)
				if test.want == refused {
					checkBadRequest(t, field+" with "+what, a, "#/"+field)
				} else if a.status != http.StatusOK || a.json(t, field) != test.want {
					t.Errorf("%s with %s: %d %s", field, what, a.status, a.body)
				}
			}
		}
	})
}

func TestVerifyPassword(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		const angstrom = "\u212b and 7 more" // NFC writes it as \u00c5
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
			{id, `{"password": "x", "name": "Ann"}`, `"detail":"is unknown; the fields are password"`},
			{id, `{"password": "` + strings.Repeat("x", 129) + `"}`, `"detail":"must have 1 to 128 characters"`},
		} {
			a := s.do("POST", fmt.Sprintf("/users/%v/password/verify", test.id), test.body)
			if !strings.Contains(a.body, test.want) {
				t.Errorf("try %d: %d %s", i, a.status, a.body)
			}
		}
		if version := s.do("GET", fmt.Sprintf("/users/%v", id), "").header.Get("ETag"); version != `"1"` {
			t.Errorf("to verify made version %s", version)
		}
	})
}

// TestVerifyPasswordHasItsLimit tries on two users who do not exist, as if time stood still.
func TestVerifyPasswordHasItsLimit(t *testing.T) {
	t.Parallel()
	d := testDependencies(memorySettings(), newMemory(), slog.New(slog.DiscardHandler))
	a := newAPI(d, &traffic{})
	if limit := a.verifications; limit.burst != 10 || math.Abs(float64(limit.rate)*60-10) > 1e-9 {
		t.Errorf("the limit is %v a second, %d at once", limit.rate, limit.burst)
	}
	a.verifications = newLimiter[int64]("password", 1e-6, maxVerifications)
	server := newServer(d, &traffic{}, newAccess(d.settings), protectedRoutes(a, &health{}))
	for _, path := range []string{"/users/998/password/verify", "/users/999/password/verify"} {
		for try := range maxVerifications + 2 {
			want := 200
			if try >= maxVerifications {
				want = 429
			}
			got := ask(server, "POST", path, strings.NewReader(`{"password": "x"}`))
			if got.status != want || (got.header.Get("Retry-After") != "") != (want == 429) {
				t.Errorf("%s, try %d: %d, Retry-After %q", path, try, got.status, got.header.Get("Retry-After"))
			}
		}
	}
}

// TestVerifyPasswordHashesForNobody has no room for another hash: that a user is missing does
// not make the answer come sooner.
func TestVerifyPasswordHashesForNobody(t *testing.T) {
	t.Parallel()
	d := testDependencies(memorySettings(), newMemory(), slog.New(slog.DiscardHandler))
	a := newAPI(d, &traffic{})
	server := newServer(d, &traffic{}, newAccess(d.settings), protectedRoutes(a, &health{}))
	if !a.hasher.lanes.queue.TryAcquire(int64(d.limits.hashQueue)) {
		t.Fatal("the queue is in use")
	}
	got := ask(server, "POST", "/users/999/password/verify", strings.NewReader(`{"password": "x"}`))
	if got.status != 503 {
		t.Errorf("without a hash: %d %s", got.status, got.body)
	}
}

// TestVerifyPasswordOfOtherMaking has stored strings that the service did not write.
func TestVerifyPasswordOfOtherMaking(t *testing.T) {
	t.Parallel()
	set := postgresSettings(t)
	s := startService(t, set)
	id := s.createUser("Ann", "Lee")
	db := connect(t, set.databaseURL)
	key := argon2.IDKey([]byte(secret), []byte("somesalt"), 1, 64, 1, 32)
	older := "$argon2id$v=19$m=64,t=1,p=1$c29tZXNhbHQ$" + base64.RawStdEncoding.EncodeToString(key)
	for _, test := range []struct {
		stored string
		valid  bool
		warns  int
	}{
		{"plain " + secret, false, 1},
		{"$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy", false, 2},
		{strings.Replace(older, "m=64,", "m=65537,", 1), false, 3},
		{strings.Replace(older, "t=1,", "t=11,", 1), false, 4},
		{strings.Replace(older, "c29", "c2%", 1), false, 5},
		{older, true, 5},
	} {
		if _, err := db.Exec(t.Context(), "UPDATE users SET password = $1", test.stored); err != nil {
			t.Fatal(err)
		}
		a := s.do("POST", fmt.Sprintf("/users/%d/password/verify", id), fmt.Sprintf(`{"password": %q}`, secret))
		if a.status != 200 || a.json(t, "valid") != test.valid {
			t.Errorf("%s: %d %s", test.stored, a.status, a.body)
		}
		if warns := len(s.log.lines("Password hash unusable")); warns != test.warns {
			t.Errorf("%s: %d warnings", test.stored, warns)
		}
		stored := queryValue[string](t, db, "SELECT password FROM users")
		if rehashed := stored != test.stored; rehashed != test.valid || rehashed && !strings.HasPrefix(stored, phcPrefix) {
			t.Errorf("%s became %s", test.stored, stored)
		}
	}
	a := s.do("POST", fmt.Sprintf("/users/%d/password/verify", id), fmt.Sprintf(`{"password": %q}`, secret))
	if a.json(t, "valid") != true || s.do("GET", fmt.Sprintf("/users/%d", id), "").header.Get("ETag") != `"7"` {
		t.Errorf("after the new hash: %s", a.body)
	}
	s.do("PUT", fmt.Sprintf("/users/%d", id), `{"name": "Bea"}`)
	s.waitForLine("Received event user.updated with user_id=1", "version", 8)
	if events := len(s.log.lines("Received event user.updated with user_id=1")); events != 7 {
		t.Errorf("%d events of 6 updates by SQL and one by the API: the new hash made one", events)
	}
}
