package main

import (
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
)

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
