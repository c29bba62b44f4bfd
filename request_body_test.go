package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"mime"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf16"
	"unicode/utf8"
)

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
		`[]`, `[{}]`, `null`,
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
			t.Fatalf("parseObject(%q): error %v, but a JSON object: %t", body, err, isObject)
		}
		if err != nil {
			p, ok := err.(*problem)
			if !ok || p.Status != http.StatusBadRequest || p.Errors != nil {
				t.Errorf("parseObject(%q): error %#v, want a 400 without field errors", body, err)
			}
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
		if n := countMembers(body); len(members) != n {
			t.Errorf("parseObject(%q): %d members, want %d", body, len(members), n)
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
		log := slog.New(slog.DiscardHandler)
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
		if !maps.Equal(got, wrong) {
			t.Errorf("%q: errors for %v, want %v", body, got, wrong)
		}
	})
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
	members, _ := parseObject(body) // FuzzParseObject checks it
	count := make(map[string]int)
	for _, m := range members {
		count[m.name]++
		text, ok := wantText(m)
		if !ok || count[m.name] > 1 {
			name := strings.ReplaceAll(strings.ReplaceAll(m.name, "~", "~0"), "/", "~1")
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
