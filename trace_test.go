package main

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	uuidV4 = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	uuidV7 = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
)

func TestUUIDs(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	before := ""
	start := time.Now().UnixMilli()
	for range 1000 {
		v4, v7 := newUUIDv4(), newUUIDv7()
		if !uuidV4.MatchString(v4) || !uuidV7.MatchString(v7) || seen[v4] || seen[v7] {
			t.Fatalf("%s or %s is not a new UUID", v4, v7)
		}
		if v7[:13] < before {
			t.Errorf("%s comes after %s", v7, before)
		}
		seen[v4], seen[v7], before = true, true, v7[:13]
	}
	var last int64
	fmt.Sscanf(strings.Replace(before, "-", "", 1), "%x", &last)
	if last < start || last > time.Now().UnixMilli() {
		t.Errorf("%s is not of now", before)
	}
}

func TestTraceID(t *testing.T) {
	t.Parallel()
	const id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	const zeros = "00000000000000000000000000000000"
	const requestID, trace = "X-Request-Id: ", "traceparent: "
	const valid = trace + "00-" + id + "-" + parent
	const newID = ""
	upperID, upperParent, x128 := strings.ToUpper(id), strings.ToUpper(parent), strings.Repeat("x", 128)
	s := startService(t, memorySettings())
	for name, test := range map[string]struct {
		headers []string
		want    string
	}{
		"nothing":                    {nil, newID},
		"a request id":               {[]string{requestID + "AZaz09._:-"}, "AZaz09._:-"},
		"one of 1 character":         {[]string{requestID + "x"}, "x"},
		"one of 128 characters":      {[]string{requestID + x128}, x128},
		"one of 129 characters":      {[]string{requestID + x128 + "x"}, newID},
		"one with a space":           {[]string{requestID + "a b"}, newID},
		"one with a slash":           {[]string{requestID + "a/b"}, newID},
		"one with a quote":           {[]string{requestID + `a"b`}, newID},
		"one beyond ASCII":           {[]string{requestID + "é"}, newID},
		"one with a comma":           {[]string{requestID + "a,b"}, newID},
		"two request ids":            {[]string{requestID + "a", requestID + "b"}, newID},
		"one request id twice":       {[]string{requestID + "a", requestID + "a"}, newID},
		"two, only the first valid":  {[]string{requestID + "a", requestID + "/"}, newID},
		"a trace":                    {[]string{valid + "-01"}, id},
		"a trace, not sampled":       {[]string{valid + "-00"}, id},
		"a trace with other flags":   {[]string{valid + "-ff"}, id},
		"version 00 with more":       {[]string{valid + "-01-x"}, newID},
		"version 00 with a dash":     {[]string{valid + "-01-"}, newID},
		"version 01":                 {[]string{trace + "01-" + id + "-" + parent + "-01"}, id},
		"version fe with more":       {[]string{trace + "fe-" + id + "-" + parent + "-01-a-b"}, id},
		"version fe with other more": {[]string{trace + "fe-" + id + "-" + parent + "-01.x"}, newID},
		"version ff":                 {[]string{trace + "ff-" + id + "-" + parent + "-01"}, newID},
		"version 0":                  {[]string{trace + "0-" + id + "-" + parent + "-01"}, newID},
		"version 0x":                 {[]string{trace + "0x-" + id + "-" + parent + "-01"}, newID},
		"no trace id":                {[]string{trace + "00-" + zeros + "-" + parent + "-01"}, newID},
		"no parent id":               {[]string{trace + "00-" + id + "-" + zeros[:16] + "-01"}, newID},
		"a trace in capitals":        {[]string{trace + "00-" + upperID + "-" + parent + "-01"}, newID},
		"a parent in capitals":       {[]string{trace + "00-" + id + "-" + upperParent + "-01"}, newID},
		"flags in capitals":          {[]string{valid + "-0A"}, newID},
		"a short trace id":           {[]string{trace + "00-" + id[1:] + "-" + parent + "-01"}, newID},
		"a long trace id":            {[]string{trace + "00-0" + id + "-" + parent + "-01"}, newID},
		"a short parent id":          {[]string{trace + "00-" + id + "-" + parent[1:] + "-01"}, newID},
		"no flags":                   {[]string{valid}, newID},
		"a trace id alone":           {[]string{trace + id}, newID},
		"something in front":         {[]string{trace + "x00-" + id + "-" + parent + "-01"}, newID},
		"two traces":                 {[]string{valid + "-01", valid + "-01"}, newID},
		"a request id and a trace":   {[]string{requestID + "a", valid + "-01"}, "a"},
		"a bad one and a trace":      {[]string{requestID + "/", valid + "-01"}, id},
		"two and a trace":            {[]string{requestID + "a", requestID + "a", valid + "-01"}, id},
		"a request id and no trace":  {[]string{requestID + "b", trace + "x"}, "b"},
	} {
		a := s.do("GET", "/nothing", "", test.headers...)
		got := a.header.Get("X-Trace-Id")
		if test.want == newID && !uuidV4.MatchString(got) || test.want != newID && got != test.want {
			t.Errorf("%s: the trace id is %q", name, got)
		}
		if n := len(a.header["X-Trace-Id"]); n != 1 {
			t.Errorf("%s: X-Trace-Id is there %d times", name, n)
		}
		s.waitForLine("Request started", "trace_id", got)
		s.waitForLine("Request completed", "trace_id", got)
	}
	// net/http's client does not send an empty field.
	a := s.send("GET /nothing HTTP/1.1\r\nHost: test\r\nX-Request-Id:\r\n\r\n")
	if got := a.header.Get("X-Trace-Id"); !uuidV4.MatchString(got) {
		t.Errorf("an empty request id became %q", got)
	}
}

// FuzzTraceID holds the trace id of a request against wantTraceID.
func FuzzTraceID(f *testing.F) {
	const valid = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for _, parent := range []string{
		"", valid, valid + "-x", "01" + valid[2:], "ff" + valid[2:],
		"cc" + valid[2:] + "-a-b", "cc" + valid[2:] + ".x", strings.ToUpper(valid), valid[:53], "0" + valid,
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
		strings.Repeat("x", 128), strings.Repeat("x", 129), "a\n", "é", "a\xff", "\x00", "{}", "a,b",
	} {
		f.Add(id, valid, byte(1))
		f.Add(id, valid, byte(3))
	}
	f.Fuzz(func(t *testing.T, id, parent string, given byte) {
		if strings.Contains(parent, "\n") {
			return // no field of a header can
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
			t.Fatalf("%q has the trace id %q, not %q", h, got, want)
		}
		if again := requestTraceID(http.Header{"X-Request-Id": {got}}); again != got {
			t.Errorf("%q, sent on, becomes %q", got, again)
		}
	})
}

// wantTraceID is "" where the contract asks for a new one.
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

func consistsOf(text, characters string) bool {
	return !strings.ContainsFunc(text, func(c rune) bool {
		return !strings.ContainsRune(characters, c)
	})
}

// TestTraceIDsOfABatch changes users at once, each with a trace id of its own.
func TestTraceIDsOfABatch(t *testing.T) {
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
					t.Errorf("%d %s", a.status, a.body)
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
		t.Errorf("%d events of %d changes", n, 3*users)
	}
}

// TestTraceIDsOfAUser changes one user from many sides: each change has the trace id of its own
// request.
func TestTraceIDsOfAUser(t *testing.T) {
	t.Parallel()
	svc := startService(t, postgresSettings(t))
	id := svc.createUser("John", "Doe")
	const changes = 24
	versions := make([]string, changes)
	var group sync.WaitGroup
	for i := range changes {
		group.Go(func() {
			a := svc.do("PUT", fmt.Sprint("/users/", id), fmt.Sprintf(`{"name": "name %d"}`, i),
				fmt.Sprint("X-Request-Id: change-", i))
			if a.status != 200 {
				t.Errorf("%d %s", a.status, a.body)
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
