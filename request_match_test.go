package main

import (
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
)

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
