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
