package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestBodyNamesWhatIsWrong(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	const rest = `, "surname": "Doe", "password": "` + secret + `"}`
	for body, want := range map[string][]string{
		`{}`:                                  {"#/name", "#/password", "#/surname"},
		`{"name": "John"}`:                    {"#/password", "#/surname"},
		`{"name": null` + rest:                {"#/name"},
		`{"name": 5` + rest:                   {"#/name"},
		`{"name": -1.5e3` + rest:              {"#/name"},
		`{"name": true` + rest:                {"#/name"},
		`{"name": ["John"]` + rest:            {"#/name"},
		`{"name": {"name": "John"}` + rest:    {"#/name"},
		`{"name": "John", "age": 5` + rest:    {"#/age"},
		`{"name": "John", "id": null` + rest:  {"#/id"},
		`{"NAME": "John"` + rest:              {"#/NAME", "#/name"},
		`{"Name": "John"` + rest:              {"#/Name", "#/name"},
		`{"name ": "John"` + rest:             {"#/name", "#/name%20"},
		`{"ſurname": "a", "name": "b"` + rest: {"#/%C5%BFurname"}, // folds to surname

		`{"name": "a", "name": "a"` + rest:      {"#/name"},
		`{"name": "a", "n\u0061me": "b"` + rest: {"#/name"},
		`{"\u006eame": "a"` + rest:              nil,

		`{"name": "\ud83d\ude00"` + rest:                   nil,
		`{"name": "\uD83D\uDE00"` + rest:                   nil,
		`{"name": "a\ud800\udc00\udbff\udfffb"` + rest:     nil,
		`{"name": "\\ud83d"` + rest:                        nil, // an escaped backslash
		`{"name": "\\\\\udc00"` + rest:                     {"#/name"},
		`{"name": "\ud83d"` + rest:                         {"#/name"},
		`{"name": "\uD83D"` + rest:                         {"#/name"},
		`{"name": "\uDFFF"` + rest:                         {"#/name"},
		`{"name": "\udBfF\uDc00"` + rest:                   nil,
		`{"name": "\ud83dx"` + rest:                        {"#/name"},
		`{"name": "\ude00"` + rest:                         {"#/name"},
		`{"name": "x\udfff"` + rest:                        {"#/name"},
		`{"name": "\ude00\ud83d"` + rest:                   {"#/name"},
		`{"name": "\ud83d\ud83d\ude00"` + rest:             {"#/name"},
		`{"name": "\ud83d\ude00\ude00"` + rest:             {"#/name"},
		`{"name": "\ud83dx\ude00"` + rest:                  {"#/name"},
		`{"name": "\ud83d\n\ude00"` + rest:                 {"#/name"},
		`{"name": "\ud83d\\ude00"` + rest:                  {"#/name"},
		`{"name": "\ud7ff\ue000"` + rest:                   nil, // beside the surrogates
		"{\"name\": \"\xff\"" + rest:                       {"#/name"},
		"{\"name\": \"caf\xe9\"" + rest:                    {"#/name"}, // Latin-1
		"{\"name\": \"\xc3\"" + rest:                       {"#/name"},
		"{\"name\": \"\xc0\xaf\"" + rest:                   {"#/name"}, // overlong
		"{\"name\": \"\xed\xa0\xbd\xed\xb8\x80\"" + rest:   {"#/name"}, // CESU-8
		"{\"name\": \"\xf4\x90\x80\x80\"" + rest:           {"#/name"}, // above U+10FFFF
		"{\"name\": \"\ufffd\"" + rest:                     nil,
		`{"name": "\u0000"` + rest:                         {"#/name"},
		`{"name": "a\u0000"` + rest:                        {"#/name"},
		"{\"na\xffme\": 1, \"name\": \"a\"" + rest:         {"#/na%EF%BF%BDme"},
		" \t\r\n{\n\"name\"\t:\r\"John\" " + rest + "\n\n": nil,

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
	} {
		a := s.do("POST", "/users", body)
		if want == nil {
			if a.status != http.StatusCreated {
				t.Errorf("%q: %d %s", body, a.status, a.body)
			}
			continue
		}
		checkBadRequest(t, quote(body), a, want...)
		if n := len(want); n > 1 && a.json(t, "detail") != fmt.Sprint(n, " fields are not valid") {
			t.Errorf("%q: %s", body, a.body)
		}
	}
}

// TestUpdateNamesWhatIsWrong sends what a POST would refuse too, and what only an update
// takes or refuses.
func TestUpdateNamesWhatIsWrong(t *testing.T) {
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
		t.Errorf("a refused update changed something: %s", a.body)
	}
}

func TestBodyIsOneObject(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	for name, body := range map[string]string{
		"empty":                      "",
		"white space":                " \t\r\n",
		"an array":                   "[]",
		"an array of one":            "[" + john + "]",
		"a string":                   `"name"`,
		"a number":                   "5",
		"null":                       "null",
		"true":                       "true",
		"half a word":                "nul",
		"no JSON":                    "name=John&surname=Doe",
		"two objects":                john + " {}",
		"two objects on lines":       john + "\n" + john,
		"an object and a brace":      john + "}",
		"an object and a comma":      john + ",",
		"an object and a NUL":        john + "\x00",
		"an object and a no-break":   john + "\u00a0",
		"an object and a comment":    john + " // John",
		"only the start":             "{",
		"without its end":            strings.TrimSuffix(john, "}"),
		"cut in a string":            john[:len(john)-3],
		"cut behind a name":          `{"name"`,
		"cut behind a colon":         `{"name":`,
		"cut behind a comma":         `{"name": "John",`,
		"a byte order mark":          "\ufeff" + john,
		"UTF-16":                     "{\x00\"\x00n\x00",
		"a comma too much":           `{"name": "John",}`,
		"a comma in front":           `{,"name": "John"}`,
		"two commas":                 `{"name": "John",,"surname": "Doe"}`,
		"no comma":                   `{"name": "John" "surname": "Doe"}`,
		"no colon":                   `{"name" "John"}`,
		"no value":                   `{"name": }`,
		"no name":                    `{"John"}`,
		"a name without quotes":      `{name: "John"}`,
		"a number as a name":         `{1: "John"}`,
		"null as a name":             `{null: "John"}`,
		"single quotes":              `{'name': 'John'}`,
		"the wrong end":              `{"name": "John"]`,
		"an open array in it":        `{"name": [}`,
		"a number with a zero":       `{"name": 01}`,
		"not a number":               `{"name": NaN}`,
		"an unknown escape":          `{"name": "\x41"}`,
		"a short escape":             `{"name": "\u41"}`,
		"a line feed in a string":    "{\"name\": \"Jo\nhn\"}",
		"a NUL in a string":          "{\"name\": \"Jo\x00hn\"}",
		"invalid UTF-8 in no string": "{\xff\"name\": \"John\"}",
	} {
		for _, target := range []struct{ method, path string }{
			{"POST", "/users"}, {"PUT", "/users/1"}, {"PATCH", "/users/1"},
		} {
			a := s.do(target.method, target.path, body, "Content-Type: application/json")
			if a.status != http.StatusBadRequest ||
				!strings.Contains(fmt.Sprint(a.json(t, "detail")), "JSON object") ||
				slices.Contains(keys(a.body), "errors") {
				t.Errorf("%s of %s: %d %s", target.method, name, a.status, a.body)
			}
		}
	}
}

// TestPointers has the examples of RFC 6901, section 6, and more.
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

func TestContentType(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	s.createUser("John", "Doe")
	const plain, mergePatch = "application/json", "application/merge-patch+json"
	targets := []struct {
		method, path string
		success      int
	}{
		{"POST", "/users", http.StatusCreated},
		{"PUT", "/users/1", http.StatusOK},
		{"PATCH", "/users/1", http.StatusOK},
	}
	for contentType, methods := range map[string]string{ // that take it
		plain:                                     "POST PUT PATCH",
		"Application/JSON":                        "POST PUT PATCH",
		plain + "; charset=utf-8":                 "POST PUT PATCH",
		plain + `;charset="UTF-8"`:                "POST PUT PATCH",
		plain + " ; Charset=Utf-8":                "POST PUT PATCH",
		plain + "; profile=x":                     "POST PUT PATCH",
		mergePatch:                                "PATCH",
		"Application/Merge-Patch+JSON":            "PATCH",
		mergePatch + "; charset=utf-8":            "PATCH",
		mergePatch + "; charset=utf-16":           "",
		plain + "; charset=latin1":                "",
		plain + "; charset=us-ascii":              "",
		plain + "; charset=":                      "",
		plain + `; charset=""`:                    "",
		plain + "; charset=utf-8; charset=latin1": "",
		plain + ", " + plain:                      "",
		"text/plain":                              "",
		"text/json":                               "",
		"application/x-www-form-urlencoded":       "",
		"application/json5":                       "",
		"application/vnd.api+json":                "",
		"application/json-patch+json":             "",
		"application/*":                           "",
		"*/*":                                     "",
		"json":                                    "",
		"":                                        "", // no such field
	} {
		for _, target := range targets {
			want := http.StatusUnsupportedMediaType
			if slices.Contains(strings.Fields(methods), target.method) {
				want = target.success
			}
			a := s.do(target.method, target.path, john, "Content-Type: "+contentType)
			if a.status != want {
				t.Errorf("%s as %q: %d %s", target.method, contentType, a.status, a.body)
			}
		}
	}
	for name, fields := range map[string]string{
		"two":             "Content-Type: application/json\r\nContent-Type: application/json\r\n",
		"one and nothing": "Content-Type: application/json\r\nContent-Type:\r\n",
		"nothing":         "Content-Type:\r\n",
	} {
		for _, target := range targets {
			a := s.send(fmt.Sprintf("%s %s HTTP/1.1\r\nHost: test\r\n%sContent-Length: %d\r\n\r\n%s",
				target.method, target.path, fields, len(john), john))
			if a.status != http.StatusUnsupportedMediaType {
				t.Errorf("%s with %s as content type: %d %s", target.method, name, a.status, a.body)
			}
		}
	}
	for _, target := range targets { // also where there is no body that it could be of
		if a := s.do(target.method, target.path, ""); a.status != http.StatusUnsupportedMediaType {
			t.Errorf("%s of nothing: %d %s", target.method, a.status, a.body)
		}
	}
}

// TestBodySize sends bodies with their length in front and in chunks.
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
			rest string
			fits bool
		}{
			"as large as may be":      {fmt.Sprintf("Content-Length: %d\r\n\r\n%s", limit, padded(limit)), true},
			"too large, and not sent": {fmt.Sprintf("Content-Length: %d\r\n\r\n", limit+1), false},
			"far too large":           {"Content-Length: 1099511627776\r\n\r\n{", false},
			"in chunks":               {chunked(padded(limit)), true},
			"in too many chunks":      {chunked(padded(limit + 1)), false},
			"in chunks without end":   {strings.TrimSuffix(chunked(padded(limit+1)), "0\r\n\r\n"), false},
		} {
			a := s.send(head + test.rest)
			if test.fits && a.status/100 != 2 || !test.fits && a.status != http.StatusRequestEntityTooLarge {
				t.Errorf("%s %s: %d %s", target.method, name, a.status, a.body)
			}
		}
	}
}

// chunked is the rest of a request from its field Transfer-Encoding on.
func chunked(body string) string {
	rest := "Transfer-Encoding: chunked\r\n\r\n"
	for chunk := range slices.Chunk([]byte(body), 5000) {
		rest += fmt.Sprintf("%x\r\n%s\r\n", len(chunk), chunk)
	}
	return rest + "0\r\n\r\n"
}

// TestOrderOfRefusals makes one more thing right in each request.
func TestOrderOfRefusals(t *testing.T) {
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
				t.Errorf("%s %s %.20s %v: %d %s", test.method, test.path, test.body, test.headers, a.status, a.body)
			}
		}
	})
}

// FuzzParseObject holds parseObject against encoding/json, which keeps the last of
// members with one name.
func FuzzParseObject(f *testing.F) {
	for _, body := range []string{
		``, ` `, `{}`, ` { } `, john, `{"a": 1, "a": [2, {"b": null}], "\u0061": "\ud800"}`, `{"a": 1,}`,
		`{"a"}`, `{"a":}`, `{"a" 1}`, `{1: 2}`, `{`, `{"a": 1`, `{} {}`, `{}x`, `{}]`, `[]`, `[{}]`, `null`,
		`"a"`, `5`, "\ufeff{}", "{\"\xff\": \"\xff\"}", `{"a": 1]`, `{"a": 01}`, `{"a": "\x"}`,
		"{\"a\": \"\n\"}",
	} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		members, err := parseObject(body)
		var want map[string]json.RawMessage
		isObject := json.Unmarshal(body, &want) == nil && want != nil // nil is null
		if (err == nil) != isObject {
			t.Fatalf("%q is an object: %t, but the error is %v", body, isObject, err)
		}
		if err != nil {
			if p, ok := err.(*problem); !ok || p.Status != http.StatusBadRequest || p.Errors != nil {
				t.Errorf("%q: not the problem of a body: %v", body, err)
			}
			return
		}
		got := make(map[string]json.RawMessage)
		for _, m := range members {
			got[m.name] = m.value
		}
		if !maps.EqualFunc(got, want, func(a, b json.RawMessage) bool { return bytes.Equal(a, b) }) {
			t.Errorf("%q has the members %s, not %s", body, got, want)
		}
	})
}

// FuzzParseString holds parseString against encoding/json, which puts U+FFFD where it
// reads no Unicode.
func FuzzParseString(f *testing.F) {
	for _, value := range []string{
		`"John"`, `""`, `null`, `5`, `{}`, `"\u0000"`, `"\ud83d\ude00"`, `"\ud83d"`, `"\ude00\ud83d"`,
		`"\\ud83d"`, `"\ud83d\\ude00"`, `"\ud83d\ud83d\ude00"`, `"\ufffd"`,
		`"\"\/\b\f\n\r\t"`, "\"\xff\"", "\"\xed\xa0\xbd\"",
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
		isString := json.Unmarshal(value, &want) == nil && want != nil
		if err == nil {
			if !isString || text != *want || !utf8.ValidString(text) || strings.Contains(text, "\x00") {
				t.Fatalf("%q is %q", value, text)
			}
			if again, err := parseString(json.RawMessage(quote(text))); err != nil || again != text {
				t.Errorf("%q is %q, and then %q (%v)", value, text, again, err)
			}
		} else if isString && !strings.ContainsAny(*want, "\ufffd\x00") {
			t.Errorf("%q is the string %q, but the error is %v", value, *want, err)
		}
	})
}
