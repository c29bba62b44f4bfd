package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/argon2"
)

const john = `{"name": "John", "surname": "Doe", "password": "` + secret + `"}`

// wrongParts returns the pointers and parameters that a problem document names, sorted.
func wrongParts(t *testing.T, a answer) []string {
	t.Helper()
	var p problem
	if err := json.Unmarshal([]byte(a.body), &p); err != nil {
		t.Fatalf("%v in %s", err, a.body)
	}
	var parts []string
	for _, e := range p.Errors {
		if e.Detail == "" || (e.Pointer == "") == (e.Parameter == "") {
			t.Errorf("not one wrong part with a detail: %+v", e)
		}
		parts = append(parts, e.Pointer+e.Parameter)
	}
	slices.Sort(parts)
	return parts
}

// checkBadRequest wants a 400 that names exactly these parts.
func checkBadRequest(t *testing.T, what string, a answer, want ...string) {
	t.Helper()
	if a.status != http.StatusBadRequest || !slices.Equal(wrongParts(t, a), want) {
		t.Errorf("%s: %d %s", what, a.status, a.body)
	}
}

// quote is text as JSON.
func quote(text string) string {
	literal, _ := json.Marshal(text)
	return string(literal)
}

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

func TestPasswordRules(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		password string
		accepted bool
	}{
		"8 characters":                   {"8letters", true},
		"8 characters of four bytes":     {strings.Repeat("😀", 8), true},
		"8 code points of 4 letters":     {strings.Repeat("e\u0301", 4), true},
		"128 characters":                 {strings.Repeat("x", 128), true},
		"128 characters of four bytes":   {strings.Repeat("😀", 128), true},
		"8 spaces":                       {"        ", true},
		"spaces that belong to it":       {" 6chars ", true},
		"control characters":             {"\x01\t\n\x1b\x7f\u0085\u009f\u2028", true},
		"7 characters":                   {"7letter", false},
		"7 characters of four bytes":     {strings.Repeat("😀", 7), false},
		"129 characters":                 {strings.Repeat("x", 129), false},
		"129 characters of four bytes":   {strings.Repeat("😀", 129), false},
		"129 with a space at the end":    {strings.Repeat("x", 128) + " ", false},
		"130 code points of 65 letters":  {strings.Repeat("e\u0301", 65), false},
		"empty":                          {"", false},
		"NUL":                            {"8letters\x00", false},
		"a NUL between other characters": {secret + "\x00" + secret, false},
	}
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		for what, test := range tests {
			a := s.do("PATCH", "/users/1", `{"password": `+quote(test.password)+`}`)
			if !test.accepted {
				checkBadRequest(t, what, a, "#/password")
			} else if a.status != http.StatusOK {
				t.Errorf("%s: %d %s", what, a.status, a.body)
			}
		}
	})
}

// TestPasswordIsTakenAsReceived sends what a careless service would trim, fold or drop.
func TestPasswordIsTakenAsReceived(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	conn := connect(t, s.settings.databaseURL)
	password := " \u3000\u0130" + strings.ToUpper(secret) + "\x1b\u0085 "
	for _, target := range []string{"POST /users", "PUT /users/1", "PATCH /users/1"} {
		method, path, _ := strings.Cut(target, " ")
		body := `{"name": "John", "surname": "Doe", "password": ` + quote(password) + `}`
		if a := s.do(method, path, body); a.status/100 != 2 {
			t.Fatalf("%s: %d %s", target, a.status, a.body)
		}
		stored := queryValue[string](t, conn, "SELECT password FROM users")
		if !verifies(t, stored, password) {
			t.Errorf("%s stored another password", target)
		}
		password += target // so that the next is another
	}
}

func TestPasswordMinLength(t *testing.T) {
	t.Parallel()
	settings := memorySettings()
	settings.passwordMinLength = 12
	s := startService(t, settings)
	for password, want := range map[string]int{
		"11 letters.":  http.StatusBadRequest,
		"12 letters..": http.StatusCreated,
	} {
		a := s.do("POST", "/users", `{"name": "John", "surname": "Doe", "password": "`+password+`"}`)
		if a.status != want {
			t.Errorf("%q: %d %s", password, a.status, a.body)
		}
	}
}

func TestIfMatch(t *testing.T) {
	t.Parallel()
	const current, other = true, false
	tests := map[string]struct {
		lines []string
		names bool // the current version, which is 2
	}{
		"any":                       {[]string{`*`}, current},
		"the version":               {[]string{`"2"`}, current},
		"a list":                    {[]string{`"1", "2", "3"`}, current},
		"a list without spaces":     {[]string{`"1","2"`}, current},
		"a list with a weak tag":    {[]string{`W/"7", "2"`}, current},
		"a list with empty members": {[]string{`, "1" ,	,"2",`}, current},
		"several lines":             {[]string{`"1"`, `"2"`}, current},
		"a comma in a tag":          {[]string{`"1,", ",", "2"`}, current},
		"a backslash in a tag":      {[]string{`"1\", "2"`}, current},
		"more than ASCII in a tag":  {[]string{`"é", "2"`}, current},

		"an older version":           {[]string{`"1"`}, other},
		"a later version":            {[]string{`"3"`}, other},
		"other versions":             {[]string{`"1", "3"`, `"4"`}, other},
		"the weak version":           {[]string{`W/"2"`}, other},
		"a list of weak versions":    {[]string{`W/"1", W/"2"`}, other},
		"the version in a tag":       {[]string{`"1,2,3"`, `" 2 "`}, other},
		"the version with a zero":    {[]string{`"02"`}, other},
		"the version with a sign":    {[]string{`"+2"`}, other},
		"the version without quotes": {[]string{`2`}, other},
		"an open quote":              {[]string{`"2`}, other},
		"only the end quote":         {[]string{`2"`}, other},
		"an open quote behind it":    {[]string{`"2", "3`}, other},
		"two without a comma":        {[]string{`"2" "3"`}, other},
		"something behind it":        {[]string{`"2"x`}, other},
		"a space in a tag":           {[]string{`"2", "a b"`}, other},
		"any in a list":              {[]string{`*, "2"`}, other},
		"any behind a tag":           {[]string{`"2"`, `*`}, other},
		"any twice":                  {[]string{`*`, `*`}, other},
		"a small weak sign":          {[]string{`w/"2", "2"`}, other},
		"a space in the weak sign":   {[]string{`W/ "3", "2"`}, other},
		"a number too large":         {[]string{`"18446744073709551618"`}, other}, // 2 in 64 bits
		"an empty tag":               {[]string{`""`}, other},
		"only commas":                {[]string{`,`}, other},
	}
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		s.do("PUT", "/users/1", `{"name": "Jane"}`)
		for what, test := range tests {
			var headers []string
			for _, line := range test.lines {
				headers = append(headers, "If-Match: "+line)
			}
			methods, want := []string{"PUT", "PATCH"}, http.StatusOK // the user stays as it is
			if test.names == other {
				methods, want = append(methods, "DELETE"), http.StatusPreconditionFailed
			}
			for _, method := range methods {
				a := s.do(method, "/users/1", `{"name": "Jane"}`, headers...)
				if a.status != want {
					t.Errorf("%s with %s: %d %s", method, what, a.status, a.body)
				}
			}
			if a := s.do("PUT", "/users/9", `{"name": "Jane"}`, headers...); a.status != http.StatusNotFound {
				t.Errorf("a missing user with %s: %d", what, a.status)
			}
		}
		// net/http's client does not send an empty field.
		a := s.send("DELETE /users/1 HTTP/1.1\r\nHost: test\r\nIf-Match:\r\n\r\n")
		if a.status != http.StatusPreconditionFailed {
			t.Errorf("DELETE with an empty If-Match: %d", a.status)
		}

		if a := s.do("GET", "/users/1", "", `If-None-Match: "2"`); a.status != http.StatusNotModified {
			t.Errorf("a refused change changed something: %d %s", a.status, a.body)
		}
		if a := s.do("DELETE", "/users/9", "", `If-Match: "1"`); a.status != http.StatusNotFound {
			t.Errorf("DELETE of a missing user: %d", a.status)
		}
		if a := s.do("PUT", "/users/1", `{"name": "Jack"}`, `If-Match: "2"`); a.header.Get("ETag") != `"3"` {
			t.Errorf("a change of the version that is: %d %s", a.status, a.body)
		}
		if a := s.do("DELETE", "/users/1", "", `If-Match: "2", "3"`); a.status != http.StatusOK {
			t.Errorf("DELETE of the version that is: %d %s", a.status, a.body)
		}
	})
}

func TestIfNoneMatch(t *testing.T) {
	t.Parallel()
	const current, other = true, false
	tests := map[string]struct {
		lines []string
		names bool // the current version, which is 2
	}{
		"any":                    {[]string{`*`}, current},
		"the version":            {[]string{`"2"`}, current},
		"the weak version":       {[]string{`W/"2"`}, current},
		"a list":                 {[]string{`"1", W/"2"`}, current},
		"several lines":          {[]string{`"a,b"`, `"2"`}, current},
		"an older version":       {[]string{`"1"`}, other},
		"other versions":         {[]string{`"1", W/"3"`, `"22"`}, other},
		"the version unquoted":   {[]string{`2`}, other},
		"what cannot be read":    {[]string{`"2", "3`}, other},
		"any in a list":          {[]string{`*, "2"`}, other},
		"the weak sign in a tag": {[]string{`"W/2"`}, other},
	}
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		user := s.do("PUT", "/users/1", `{"name": "Jane"}`).body
		for what, test := range tests {
			var headers []string
			for _, line := range test.lines {
				headers = append(headers, "If-None-Match: "+line)
			}
			status, body := http.StatusOK, user
			if test.names == current {
				status, body = http.StatusNotModified, ""
			}
			for method, body := range map[string]string{"GET": body, "HEAD": ""} {
				a := s.do(method, "/users/1", "", headers...)
				if a.status != status || a.body != body || a.header.Get("ETag") != `"2"` {
					t.Errorf("%s with %s: %d %s %q", method, what, a.status, a.header.Get("ETag"), a.body)
				}
			}
			if a := s.do("GET", "/users/9", "", headers...); a.status != http.StatusNotFound {
				t.Errorf("a missing user with %s: %d", what, a.status)
			}
		}
	})
}

// TestConditionsElsewhere sends each condition where it has no meaning.
func TestConditionsElsewhere(t *testing.T) {
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
			t.Errorf("%s %s with %s: %d %s", test.method, test.path, test.header, a.status, a.body)
		}
	}
}

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
			t.Errorf("%q: %q, not %q", test.lines, got, test.want)
		}
	}
}

// FuzzEntityTags holds what If-Match and If-None-Match say against scanEntityTags. The
// lines of a field are one list, and a version is in each list that it is added to.
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
			t.Fatalf("%q is %q, not %q", field, got, tags)
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
			t.Errorf("If-Match %q, %q names %v, not %v", first, second, got, want)
		}
		if got := noneMatchFails(h, version); got != named {
			t.Errorf("If-None-Match %q, %q names %d: %t", first, second, version, got)
		}
		h = http.Header{"If-Match": append(tags, entityTag(version))}
		if got := matchVersions(h); !slices.Equal(got, append(want, version)) {
			t.Errorf("%q names %v, not %v and %d", h, got, want, version)
		}
	})
}

// scanEntityTags reads a list by RFC 9110, section 5.6.1, from its start to its end.
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

// page is what a test says of a list; its links are by relation.
type page struct {
	query string
	ids   []int64
	tail  string // the body behind the users
	links map[string]string
}

func (p page) check(t *testing.T, s *service) {
	t.Helper()
	a := s.do("GET", "/users"+p.query, "")
	var list userList
	if err := json.Unmarshal([]byte(a.body), &list); err != nil || a.status != http.StatusOK {
		t.Errorf("%q: %d %v in %s", p.query, a.status, err, a.body)
		return
	}
	var ids []int64
	for _, u := range list.Users {
		ids = append(ids, u.ID)
	}
	_, tail, isList := strings.Cut(a.body, "]")
	if !isList || !slices.Equal(ids, p.ids) || strings.TrimSpace(tail) != p.tail {
		t.Errorf("%q: the users %v and %s, not %v and %s", p.query, ids, tail, p.ids, p.tail)
	}
	if got := links(t, a); fmt.Sprint(got) != fmt.Sprint(p.links) {
		t.Errorf("%q: the links are\n%v, not\n%v", p.query, got, p.links)
	}
	head := s.do("HEAD", "/users"+p.query, "")
	if head.status != a.status || head.header.Get("Link") != a.header.Get("Link") || head.body != "" {
		t.Errorf("HEAD %q: %d %v %q", p.query, head.status, head.header, head.body)
	}
}

var linkPattern = regexp.MustCompile(`^<([^>]*)>; rel="([a-z]+)"$`)

// links returns the targets in the Link field of an answer by their relation.
func links(t *testing.T, a answer) map[string]string {
	t.Helper()
	targets := make(map[string]string)
	for _, field := range a.header["Link"] {
		for link := range strings.SplitSeq(field, ", ") {
			parts := linkPattern.FindStringSubmatch(link)
			if parts == nil {
				t.Errorf("Link has %q", link)
			} else if targets[parts[2]] != "" {
				t.Errorf("Link has %q twice", parts[2])
			} else {
				targets[parts[2]] = parts[1]
			}
		}
	}
	return targets
}

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
		{"?after=9223372036854775807", nil, `,"total":7,"per_page":10,"next_after":null}`, targets{}},

		// The most that a page may skip.
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

func TestListNoUsers(t *testing.T) {
	t.Parallel()
	type targets = map[string]string
	eachStore(t, func(t *testing.T, s *service) {
		for _, page := range []page{
			{"", nil, `,"total":0,"page":1,"per_page":10,"next_after":null}`,
				targets{"first": "/users?page=1", "last": "/users?page=1"}},
			{"?page=3", nil, `,"total":0,"page":3,"per_page":10,"next_after":null}`,
				targets{"first": "/users?page=1", "prev": "/users?page=1", "last": "/users?page=1"}},
			{"?after=0&per_page=5", nil, `,"total":0,"per_page":5,"next_after":null}`, targets{}},
		} {
			page.check(t, s)
		}
	})
}

// TestLinksStayInReach asks for links that a table of the tests would be too small for.
// Each must be a page that the service would answer.
func TestLinksStayInReach(t *testing.T) {
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
			t.Errorf("%s of %d users: last is %q, not %q", test.query, test.total, got, test.last)
		}
	}
}

// FuzzListQuery holds a query against wantWrong, and then follows each link of a table of
// users whose ids are all even.
func FuzzListQuery(f *testing.F) {
	for _, query := range []string{
		"", "page=1", "page=3&per_page=7", "per_page=100&page=1001", "per_page=100&page=1002", "after=0",
		"after=9223372036854775807", "after=9223372036854775808", "page=9223372036854775807&per_page=1",
		"page=4611686018427387905&per_page=4", "page=100001&per_page=1", "page=1&after=1", "p%61ge=%31",
		"page=+1", "page=-1", "page=01", "page=1_0", "page=", "page", "page=1&page=1", "PAGE=1&x=%00&%zz",
		"per_page=0", "per_page=101", "a;b", "page=%D9%A1", "&&",
		"after=-0", "after=4&per_page=2&per_page=",
	} {
		for _, total := range []uint32{0, 1, 10, 200_001} {
			f.Add(query, total)
		}
	}
	f.Fuzz(func(t *testing.T, query string, size uint32) {
		q, err := parseListQuery(query)
		wrong, parsed := wantWrong(query)
		if err != nil {
			got := make(map[string]bool)
			p, ok := err.(*problem)
			if !ok || p.Status != http.StatusBadRequest || parsed != (len(p.Errors) > 0) {
				t.Fatalf("%q: %+v", query, err)
			}
			for _, e := range p.Errors {
				got[e.Parameter] = true
			}
			if !maps.Equal(got, wrong) || parsed && len(wrong) == 0 {
				t.Errorf("%q: the wrong parameters are %v, not %v", query, got, wrong)
			}
			return
		}
		if !parsed || len(wrong) > 0 {
			t.Fatalf("%q is accepted, but wrong are %v", query, wrong)
		}
		total := int64(size % 300_000)
		list := q.list(evenUsers(q, total), total)
		if n := int64(len(list.Users)); n > q.perPage || q.offset() < 0 || q.offset() > 100_000 {
			t.Fatalf("%q skips %d users and has %d", query, q.offset(), n)
		}
		last := max(0, total-1)/q.perPage + 1 // page
		want := map[string]listQuery{}
		if q.page > 0 {
			want["first"] = listQuery{page: 1, perPage: q.perPage}
			if (last-1)*q.perPage <= 100_000 {
				want["last"] = listQuery{page: last, perPage: q.perPage}
			}
		}
		if q.page > 1 {
			want["prev"] = listQuery{page: min(q.page-1, last), perPage: q.perPage}
		}
		if n := len(list.Users); n > 0 && list.Users[n-1].ID < 2*total {
			want["next"] = listQuery{after: list.Users[n-1].ID, perPage: q.perPage}
		}
		a := answer{header: http.Header{"Link": {q.links(list)}}}
		if a.header.Get("Link") == "" {
			a.header.Del("Link")
		}
		got := links(t, a)
		for relation, target := range got {
			linked, err := parseListQuery(strings.TrimPrefix(target, "/users?"))
			linked.values = nil
			if err != nil || !reflect.DeepEqual(linked, want[relation]) {
				t.Errorf("%q of %d: %s is %s (%v), not %+v",
					query, total, relation, target, err, want[relation])
			}
		}
		if len(got) != len(want) {
			t.Errorf("%q of %d: the links are %v, not %v", query, total, got, want)
		}
	})
}

// evenUsers is what a store with total users, from 2 to 2*total, returns for q.
func evenUsers(q listQuery, total int64) []User {
	users := []User{}
	for i := min(q.after, 2*total)/2 + q.offset(); i < total && int64(len(users)) <= q.perPage; i++ {
		users = append(users, User{ID: 2 * (i + 1)})
	}
	return users
}

// wantWrong returns the parameters that a list must refuse, or false for no query at all.
func wantWrong(query string) (wrong map[string]bool, ok bool) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil, false
	}
	wrong = make(map[string]bool)
	const maxInt64 = "9223372036854775807"
	high := map[string]string{"page": maxInt64, "per_page": "100", "after": maxInt64}
	number := map[string]*big.Int{"page": big.NewInt(1), "per_page": big.NewInt(10)}
	for name, texts := range values {
		limit, _ := new(big.Int).SetString(high[name], 10)
		n, isNumber := new(big.Int).SetString(texts[0], 10)
		if high[name] == "" || len(texts) > 1 || !isNumber ||
			strings.Trim(texts[0], "0123456789") != "" ||
			n.Cmp(limit) > 0 || name != "after" && n.Sign() == 0 {
			wrong[name] = true
		}
		number[name] = n
	}
	skipped := new(big.Int)
	if len(wrong) == 0 {
		skipped.Mul(skipped.Sub(number["page"], big.NewInt(1)), number["per_page"])
	}
	switch {
	case values.Has("page") && values.Has("after"):
		wrong["after"] = true
	case skipped.Cmp(big.NewInt(100_000)) > 0:
		wrong["page"] = true
	}
	return wrong, true
}

func TestListRefuses(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for query, want := range map[string][]string{
		"page=0":                              {"page"},
		"page=-1":                             {"page"},
		"page=%2B1":                           {"page"},
		"page=+1":                             {"page"}, // a space and a 1
		"page=1e3":                            {"page"},
		"page=1.0":                            {"page"},
		"page=0x1":                            {"page"},
		"page=1_0":                            {"page"},
		"page=one":                            {"page"},
		"page=%D9%A1":                         {"page"}, // an Arabic 1
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
	} {
		checkBadRequest(t, query, s.do("GET", "/users?"+query, ""), want...)
	}
	for _, query := range []string{"page=10002", "page=9223372036854775807"} {
		if a := s.do("GET", "/users?"+query, ""); !strings.Contains(a.body, "use after") {
			t.Errorf("%s: no word of after: %s", query, a.body)
		}
	}
	for _, query := range []string{"%zz", "page=%", "page=1&per_page=%2", "page=1;per_page=2", "a;b"} {
		a := s.do("GET", "/users?"+query, "")
		if a.status != http.StatusBadRequest || !strings.Contains(fmt.Sprint(a.json(t, "detail")), "query") {
			t.Errorf("%s: %d %s", query, a.status, a.body)
		}
	}
}

// TestQueryElsewhere sends a query that no list would take.
func TestQueryElsewhere(t *testing.T) {
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
			t.Errorf("%s %s: %d %s", test.method, test.path, a.status, a.body)
		}
	}
}

// FuzzUserID holds the id of a path against the words of the contract.
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
				t.Errorf("%q is %d, %v", text, id, err)
			}
		} else if !errors.Is(err, errNoRoute) || id != 0 {
			t.Errorf("%q is %d, %v", text, id, err)
		}
	})
}

func TestUserIDs(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		for id, want := range map[string]string{ // detail of the 404
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
			"%D9%A1":               "No resource has this path", // an Arabic 1
			"%EF%BC%91":            "No resource has this path", // a wide 1
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
					t.Errorf("%s: %d %s", id, a.status, a.body)
				}
			} else if a.status != http.StatusNotFound || a.json(t, "detail") != want {
				t.Errorf("%s: %d %s", id, a.status, a.body)
			}
		}
		if a := s.do("GET", "/users/0", ""); a.status != http.StatusNotFound {
			t.Errorf("user 0: %d %s", a.status, a.body)
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

func TestStoreRehashesOnce(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		u, err := s.createUser(t.Context(), input("John", "Doe", "old"), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct{ old, hash, want string }{
			{"other", "wrong", "old"}, {"old", "new", "new"}, {"old", "late", "new"},
		} {
			if err := s.rehashPassword(t.Context(), u.ID, test.old, test.hash); err != nil {
				t.Fatal(err)
			}
			if got, err := s.passwordHash(t.Context(), u.ID); err != nil || got != test.want {
				t.Errorf("%s -> %s: %s, %v", test.old, test.hash, got, err)
			}
		}
		if err := s.rehashPassword(t.Context(), 999, "old", "new"); err != nil {
			t.Errorf("a missing user: %v", err)
		}
		if _, err := s.passwordHash(t.Context(), 999); !errors.Is(err, errNotFound) {
			t.Errorf("a missing user: %v", err)
		}
		if again, _ := s.getUser(t.Context(), u.ID); again != u {
			t.Errorf("%+v became %+v", u, again)
		}
	})
}

func TestPasswordBlocklist(t *testing.T) {
	t.Parallel()
	set := memorySettings()
	set.passwordBlocklist = true
	s := startService(t, set)
	for password, want := range map[string]int{
		"password": 400, "PassWord": 400, "1q2w3e4r": 400, "iloveyou": 400,
		"password ": 201, secret: 201,
	} {
		body := fmt.Sprintf(`{"name": "Ann", "surname": "Lee", "password": %q}`, password)
		a := s.do("POST", "/users", body)
		if a.status != want || (want == 400) != strings.Contains(a.body, "one of the most common") {
			t.Errorf("%q: %d %s", password, a.status, a.body)
		}
	}
	open := startService(t, memorySettings())
	if a := open.do("POST", "/users", `{"name": "Ann", "surname": "Lee", "password": "password"}`); a.status != 201 {
		t.Errorf("without the list: %d", a.status)
	}
	for password := range strings.Lines(commonPasswords) {
		if trimmed := strings.TrimSpace(password); trimmed != strings.ToLower(trimmed) || trimmed+"\n" != password {
			t.Errorf("%q is not a password in lower case", password)
		}
	}
}
