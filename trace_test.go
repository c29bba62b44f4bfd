package main

import (
	"cmp"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// uuidV4 and uuidV7 match UUIDs of these versions (RFC 9562).
var (
	uuidV4 = regexp.MustCompile(
		`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	uuidV7 = regexp.MustCompile(
		`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
)

// TestUUIDs checks that UUIDs have their version and variant, that they are unique, and that those
// of version 7 are in the order of time.
func TestUUIDs(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	before := ""
	start := time.Now().UnixMilli()
	for range 1000 {
		v4, v7 := newUUIDv4(), newUUIDv7()
		if !uuidV4.MatchString(v4) || !uuidV7.MatchString(v7) || seen[v4] || seen[v7] {
			t.Fatalf("%s is not a new UUIDv4 or %s is not a new UUIDv7", v4, v7)
		}
		if v7[:13] < before {
			t.Errorf("%s is less than %s, which is older", v7, before)
		}
		seen[v4], seen[v7], before = true, true, v7[:13]
	}
	var last int64
	fmt.Sscanf(strings.Replace(before, "-", "", 1), "%x", &last)
	if last < start || last > time.Now().UnixMilli() {
		t.Errorf("%s has the time %d, want %d or up to a few seconds later", before, last, start)
	}
}

// traceIDTests are the headers of requests and the trace id of each request. An empty want stands
// for a new UUID. traceIDParts expands the words that begin with a dollar sign.
var traceIDTests = map[string]struct {
	headers []string
	want    string
}{
	"no header": {},
	"all characters": {
		headers: []string{"X-Request-Id: AZaz09._:-"}, want: "AZaz09._:-"},
	"request id of 1 character": {
		headers: []string{"X-Request-Id: x"}, want: "x"},
	"request id of 128 characters": {
		headers: []string{"X-Request-Id: $x128"}, want: "$x128"},
	"request id of 129 characters": {
		headers: []string{"X-Request-Id: $x128x"}},
	"request id with a space": {headers: []string{"X-Request-Id: a b"}},
	"request id with a slash": {headers: []string{"X-Request-Id: a/b"}},
	"request id with a quote": {headers: []string{`X-Request-Id: a"b`}},
	"request id with a letter outside ASCII": {
		headers: []string{"X-Request-Id: é"}},
	"request id with a comma": {headers: []string{"X-Request-Id: a,b"}},
	"two request ids": {
		headers: []string{"X-Request-Id: a", "X-Request-Id: b"}},
	"the same request id twice": {
		headers: []string{"X-Request-Id: a", "X-Request-Id: a"}},
	"a valid and an invalid request id": {
		headers: []string{"X-Request-Id: a", "X-Request-Id: /"}},
	"traceparent": {
		headers: []string{"traceparent: 00-$trace-$parent-01"}, want: "$trace"},
	"not sampled": {
		headers: []string{"traceparent: 00-$trace-$parent-00"}, want: "$trace"},
	"unknown flags": {
		headers: []string{"traceparent: 00-$trace-$parent-ff"}, want: "$trace"},
	"version 00 with a fifth field": {
		headers: []string{"traceparent: 00-$trace-$parent-01-x"}},
	"version 00 with a dash at the end": {
		headers: []string{"traceparent: 00-$trace-$parent-01-"}},
	"version 01": {
		headers: []string{"traceparent: 01-$trace-$parent-01"}, want: "$trace"},
	"version fe with more fields": {
		headers: []string{"traceparent: fe-$trace-$parent-01-a-b"}, want: "$trace"},
	"version fe with text after the flags": {
		headers: []string{"traceparent: fe-$trace-$parent-01.x"}},
	"version ff": {headers: []string{"traceparent: ff-$trace-$parent-01"}},
	"version of 1 digit": {
		headers: []string{"traceparent: 0-$trace-$parent-01"}},
	"version that is not hexadecimal": {
		headers: []string{"traceparent: 0x-$trace-$parent-01"}},
	"trace id of zeros": {
		headers: []string{"traceparent: 00-$zeros-$parent-01"}},
	"parent id of zeros": {
		headers: []string{"traceparent: 00-$trace-$zeros16-01"}},
	"trace id in upper case": {
		headers: []string{"traceparent: 00-$TRACE-$parent-01"}},
	"parent id in upper case": {
		headers: []string{"traceparent: 00-$trace-$PARENT-01"}},
	"flags in upper case": {
		headers: []string{"traceparent: 00-$trace-$parent-0A"}},
	"trace id of 31 digits": {
		headers: []string{"traceparent: 00-$trace31-$parent-01"}},
	"trace id of 33 digits": {
		headers: []string{"traceparent: 00-0$trace-$parent-01"}},
	"parent id of 15 digits": {
		headers: []string{"traceparent: 00-$trace-$parent15-01"}},
	"no flags":        {headers: []string{"traceparent: 00-$trace-$parent"}},
	"only a trace id": {headers: []string{"traceparent: $trace"}},
	"text before the version": {
		headers: []string{"traceparent: x00-$trace-$parent-01"}},
	"two traceparents": {
		headers: []string{
			"traceparent: 00-$trace-$parent-01", "traceparent: 00-$trace-$parent-01"}},
	"request id and traceparent": {
		headers: []string{"X-Request-Id: a", "traceparent: 00-$trace-$parent-01"}, want: "a"},
	"invalid request id and traceparent": {
		headers: []string{"X-Request-Id: /", "traceparent: 00-$trace-$parent-01"}, want: "$trace"},
	"two request ids and traceparent": {
		headers: []string{
			"X-Request-Id: a", "X-Request-Id: a", "traceparent: 00-$trace-$parent-01"},
		want: "$trace"},
	"request id and invalid traceparent": {
		headers: []string{"X-Request-Id: b", "traceparent: x"}, want: "b"},
}

// traceIDParts expands the words in traceIDTests.
var traceIDParts = strings.NewReplacer(
	"$trace31", "af7651916cd43dd8448eb211c80319c",
	"$trace", "0af7651916cd43dd8448eb211c80319c",
	"$TRACE", "0AF7651916CD43DD8448EB211C80319C",
	"$parent15", "7ad6b7169203331",
	"$parent", "b7ad6b7169203331",
	"$PARENT", "B7AD6B7169203331",
	"$zeros16", strings.Repeat("0", 16),
	"$zeros", strings.Repeat("0", 32),
	"$x128", strings.Repeat("x", 128),
)

// TestTraceID checks which header the trace id of a request comes from, and that the answer and
// the log have it.
func TestTraceID(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for name, test := range traceIDTests {
		var headers []string
		for _, header := range test.headers {
			headers = append(headers, traceIDParts.Replace(header))
		}
		want := traceIDParts.Replace(test.want)
		a := s.do("GET", "/nothing", "", headers...)
		got := a.header.Get("X-Trace-Id")
		if want == "" && !uuidV4.MatchString(got) || want != "" && got != want {
			t.Errorf("%s: trace id %q, want %q", name, got, cmp.Or(want, "a UUIDv4"))
		}
		if n := len(a.header["X-Trace-Id"]); n != 1 {
			t.Errorf("%s: %d X-Trace-Id headers, want 1", name, n)
		}
		s.waitForLine("Request started", "trace_id", got)
		s.waitForLine("Request completed", "trace_id", got)
	}
	// net/http's client does not send an empty header.
	a := s.send("GET /nothing HTTP/1.1\r\nHost: test\r\nX-Request-Id:\r\n\r\n")
	if got := a.header.Get("X-Trace-Id"); !uuidV4.MatchString(got) {
		t.Errorf("empty request id: trace id %q, want a UUIDv4", got)
	}
}

// FuzzTraceID compares requestTraceID with wantTraceID, a second implementation.
func FuzzTraceID(f *testing.F) {
	const valid = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for _, parent := range []string{
		"", valid, valid + "-x", "01" + valid[2:], "ff" + valid[2:],
		"cc" + valid[2:] + "-a-b", "cc" + valid[2:] + ".x",
		strings.ToUpper(valid), valid[:53], "0" + valid,
		strings.Replace(valid, "b7ad6b7169203331", "0000000000000000", 1),
		"00-00000000000000000000000000000000-b7ad6b7169203331-01",
		"00-" + strings.Repeat("-", 32) + valid[35:],
	} {
		f.Add("", parent, byte(2)) // only the traceparent
		f.Add("AZaz09._:-", parent, byte(3))
		f.Add("a b", parent, byte(3))
		f.Add("a", parent, byte(3|4)) // two request ids
		f.Add("", parent, byte(2|8))  // two traceparents
	}
	for _, id := range []string{
		strings.Repeat("x", 128), strings.Repeat("x", 129),
		"a\n", "é", "a\xff", "\x00", "{}", "a,b",
	} {
		f.Add(id, valid, byte(1))
		f.Add(id, valid, byte(3))
	}
	f.Fuzz(func(t *testing.T, id, parent string, given byte) {
		if strings.Contains(parent, "\n") {
			return // a header cannot contain it
		}
		h := make(http.Header)
		for bit := byte(1); bit <= 8; bit <<= 1 {
			switch given & bit {
			case 1, 4:
				h.Add("X-Request-Id", id)
			case 2, 8:
				h.Add("Traceparent", parent)
			}
		}
		got, want := requestTraceID(h), wantTraceID(h)
		if want != "" && got != want || want == "" && !uuidV4.MatchString(got) {
			t.Fatalf("%q: trace id %q, want %q", h, got, cmp.Or(want, "a UUIDv4"))
		}
		if again := requestTraceID(http.Header{"X-Request-Id": {got}}); again != got {
			t.Errorf("the trace id %q as X-Request-Id becomes %q", got, again)
		}
	})
}

// wantTraceID returns the trace id that a request must have, or "" for a new UUID.
func wantTraceID(h http.Header) string {
	const digits, letters = "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	if ids := h["X-Request-Id"]; len(ids) == 1 && len(ids[0]) >= 1 && len(ids[0]) <= 128 &&
		consistsOf(ids[0], digits+letters+"._:-") {
		return ids[0]
	}
	if len(h["Traceparent"]) != 1 {
		return ""
	}
	fields := strings.SplitN(h["Traceparent"][0], "-", 5)
	if len(fields) < 4 || fields[0] == "ff" || fields[0] == "00" && len(fields) > 4 {
		return ""
	}
	for i, length := range []int{2, 32, 16, 2} {
		if len(fields[i]) != length || !consistsOf(fields[i], digits+"abcdef") {
			return ""
		}
	}
	if consistsOf(fields[1], "0") || consistsOf(fields[2], "0") {
		return ""
	}
	return fields[1]
}

// consistsOf reports whether text contains only characters of a set.
func consistsOf(text, characters string) bool {
	return !strings.ContainsFunc(text, func(c rune) bool {
		return !strings.ContainsRune(characters, c)
	})
}

// TestTraceIDsOfBatch checks that changes that share a statement keep their trace ids.
func TestTraceIDsOfBatch(t *testing.T) {
	t.Parallel()
	svc := startService(t, postgresSettings(t))
	conn := connect(t, svc.settings.databaseURL)
	const users = 48
	execute(t, conn, `INSERT INTO users (name, surname, password)
		SELECT 'John', 'Doe', 'x' FROM generate_series(1, $1)`, users)
	for _, method := range []string{"PUT", "DELETE"} {
		var group sync.WaitGroup
		for id := 1; id <= users; id++ {
			group.Go(func() {
				body := map[string]string{"PUT": `{"name": "Jane"}`}[method]
				a := svc.do(method, fmt.Sprintf("/users/%d", id), body,
					fmt.Sprintf("X-Request-Id: %s-%d", method, id))
				if a.status != 200 {
					t.Errorf("%s /users/%d: status %d, want 200: %s", method, id, a.status, a.body)
				}
			})
		}
		group.Wait()
	}
	for id := 1; id <= users; id++ {
		svc.waitForLine(fmt.Sprintf("Received event user.updated with user_id=%d", id),
			"trace_id", fmt.Sprintf("PUT-%d", id), "version", 2)
		svc.waitForLine(fmt.Sprintf("Received event user.deleted with user_id=%d", id),
			"trace_id", fmt.Sprintf("DELETE-%d", id), "version", 3)
	}
	if n := strings.Count(svc.log.String(), `"Received event `); n != 3*users {
		t.Errorf("received %d events, want %d", n, 3*users)
	}
}

// TestTraceIDsOfUser checks that concurrent changes of one user keep their trace ids.
func TestTraceIDsOfUser(t *testing.T) {
	t.Parallel()
	svc := startService(t, postgresSettings(t))
	id := svc.createUser("John", "Doe")
	const changes = 10
	versions := make([]string, changes)
	var group sync.WaitGroup
	for i := range changes {
		group.Go(func() {
			a := svc.do("PUT", fmt.Sprint("/users/", id), fmt.Sprintf(`{"name": "name %d"}`, i),
				fmt.Sprint("X-Request-Id: change-", i))
			if a.status != 200 {
				t.Errorf("PUT /users/%d: status %d, want 200: %s", id, a.status, a.body)
			}
			versions[i] = strings.Trim(a.header.Get("ETag"), `"`)
		})
	}
	group.Wait()
	for i, version := range versions {
		svc.waitForLine(fmt.Sprintf("Received event user.updated with user_id=%d", id),
			"trace_id", fmt.Sprint("change-", i), "version", version)
	}
}
