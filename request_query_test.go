package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// page is a query of GET /users and the answer that it must have. links are the targets by
// relation.
type page struct {
	query string
	ids   []int64
	tail  string // of the body, after the users
	links map[string]string
}

// check requests the page with GET and HEAD.
func (p page) check(t *testing.T, s *service) {
	t.Helper()
	a := s.do("GET", "/users"+p.query, "")
	var list userList
	if err := json.Unmarshal([]byte(a.body), &list); err != nil || a.status != http.StatusOK {
		t.Errorf("%q: status %d, want 200 with a list: %v: %s", p.query, a.status, err, a.body)
		return
	}
	var ids []int64
	for _, u := range list.Users {
		ids = append(ids, u.ID)
	}
	_, tail, isList := strings.Cut(a.body, "]")
	if !isList || !slices.Equal(ids, p.ids) || strings.TrimSpace(tail) != p.tail {
		t.Errorf("%q: users %v and %s, want %v and %s", p.query, ids, tail, p.ids, p.tail)
	}
	if got := links(t, a); fmt.Sprint(got) != fmt.Sprint(p.links) {
		t.Errorf("%q: links\n%v, want\n%v", p.query, got, p.links)
	}
	head := s.do("HEAD", "/users"+p.query, "")
	if head.status != a.status || head.header.Get("Link") != a.header.Get("Link") ||
		head.body != "" {
		t.Errorf("HEAD %q: status %d, Link %q, want those of GET, without a body: %s",
			p.query, head.status, head.header.Get("Link"), head.body)
	}
}

// linkPattern matches a link of the Link header. Its groups are the target and the relation.
var linkPattern = regexp.MustCompile(`^<([^>]*)>; rel="([a-z]+)"$`)

// links returns the targets in the Link header of an answer by relation.
func links(t *testing.T, a answer) map[string]string {
	t.Helper()
	targets := make(map[string]string)
	for _, field := range a.header["Link"] {
		for link := range strings.SplitSeq(field, ", ") {
			parts := linkPattern.FindStringSubmatch(link)
			if parts == nil {
				t.Errorf("malformed link %q", link)
			} else if targets[parts[2]] != "" {
				t.Errorf("two links with the relation %q", parts[2])
			} else {
				targets[parts[2]] = parts[1]
			}
		}
	}
	return targets
}

// TestListUsers checks the users, the members and the links of pages.
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
		{"?after=9223372036854775807", nil, `,"total":7,"per_page":10,"next_after":null}`,
			targets{}},

		// The last pages that do not skip too many users.
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

// TestListNoUsers checks the pages of an empty list.
func TestListNoUsers(t *testing.T) {
	t.Parallel()
	type targets = map[string]string
	eachStore(t, func(t *testing.T, s *service) {
		for _, page := range []page{
			{"", nil, `,"total":0,"page":1,"per_page":10,"next_after":null}`,
				targets{"first": "/users?page=1", "last": "/users?page=1"}},
			{"?page=3", nil, `,"total":0,"page":3,"per_page":10,"next_after":null}`,
				targets{"first": "/users?page=1", "prev": "/users?page=1",
					"last": "/users?page=1"}},
			{"?after=0&per_page=5", nil, `,"total":0,"per_page":5,"next_after":null}`, targets{}},
		} {
			page.check(t, s)
		}
	})
}

// TestLastLink checks that there is a link to the last page only if that page does not skip too
// many users.
func TestLastLink(t *testing.T) {
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
			t.Errorf("%s of %d users: last %q, want %q", test.query, test.total, got, test.last)
		}
	}
}

// listQueries are seeds of FuzzListQuery.
var listQueries = []string{
	"", "page=1", "page=3&per_page=7", "per_page=100&page=1001",
	"per_page=100&page=1002", "after=0",
	"after=9223372036854775807", "after=9223372036854775808",
	"page=9223372036854775807&per_page=1", "page=4611686018427387905&per_page=4",
	"page=100001&per_page=1", "page=1&after=1", "p%61ge=%31",
	"page=+1", "page=-1", "page=01", "page=1_0", "page=", "page", "page=1&page=1",
	"PAGE=1&x=%00&%zz", "per_page=0", "per_page=101", "a;b", "page=%D9%A1", "&&",
	"after=-0", "after=4&per_page=2&per_page=",
}

// FuzzListQuery compares parseListQuery with wantInvalid, and checks the links of a list of users
// whose ids are even.
func FuzzListQuery(f *testing.F) {
	for _, query := range listQueries {
		for _, total := range []uint32{0, 1, 10, 200_001} {
			f.Add(query, total)
		}
	}
	f.Fuzz(func(t *testing.T, query string, size uint32) {
		q, err := parseListQuery(query)
		invalid, parsed := wantInvalid(query)
		if err != nil {
			got := make(map[string]bool)
			p, ok := err.(*problem)
			if !ok || p.Status != http.StatusBadRequest || parsed != (len(p.Errors) > 0) {
				t.Fatalf("%q: error %+v, want a 400 for %v", query, err, invalid)
			}
			for _, e := range p.Errors {
				got[e.Parameter] = true
			}
			if !maps.Equal(got, invalid) || parsed && len(invalid) == 0 {
				t.Errorf("%q: errors for %v, want %v", query, got, invalid)
			}
			return
		}
		if !parsed || len(invalid) > 0 {
			t.Fatalf("%q: no error, want one for %v", query, invalid)
		}
		checkEvenList(t, query, q, int64(size%300_000))
	})
}

// checkEvenList checks the page of a list of evenUsers and its links.
func checkEvenList(t *testing.T, query string, q listQuery, total int64) {
	t.Helper()
	list := q.list(evenUsers(q, total), total)
	if n := int64(len(list.Users)); n > q.perPage || q.offset() < 0 || q.offset() > 100_000 {
		t.Fatalf("%q: %d users after an offset of %d", query, n, q.offset())
	}
	last := max(0, total-1)/q.perPage + 1 // the number of the last page
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
			t.Errorf("%q of %d: link %s to %s (%v), want %+v",
				query, total, relation, target, err, want[relation])
		}
	}
	if len(got) != len(want) {
		t.Errorf("%q of %d: links %v, want %v", query, total, got, want)
	}
}

// evenUsers returns what a store of users with the even ids from 2 to 2*total returns for q.
func evenUsers(q listQuery, total int64) []User {
	users := []User{}
	first := min(q.after, 2*total)/2 + q.offset()
	for i := first; i < total && int64(len(users)) <= q.perPage; i++ {
		users = append(users, User{ID: 2 * (i + 1)})
	}
	return users
}

// wantInvalid returns the parameters that must be refused. ok is false if the query is malformed.
func wantInvalid(query string) (invalid map[string]bool, ok bool) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil, false
	}
	invalid = make(map[string]bool)
	const maxInt64 = "9223372036854775807"
	high := map[string]string{"page": maxInt64, "per_page": "100", "after": maxInt64}
	number := map[string]*big.Int{"page": big.NewInt(1), "per_page": big.NewInt(10)}
	for name, texts := range values {
		limit, _ := new(big.Int).SetString(high[name], 10)
		n, isNumber := new(big.Int).SetString(texts[0], 10)
		if high[name] == "" || len(texts) > 1 || !isNumber ||
			strings.Trim(texts[0], "0123456789") != "" ||
			n.Cmp(limit) > 0 || name != "after" && n.Sign() == 0 {
			invalid[name] = true
		}
		number[name] = n
	}
	skipped := new(big.Int)
	if len(invalid) == 0 {
		skipped.Mul(skipped.Sub(number["page"], big.NewInt(1)), number["per_page"])
	}
	switch {
	case values.Has("page") && values.Has("after"):
		invalid["after"] = true
	case skipped.Cmp(big.NewInt(100_000)) > 0:
		invalid["page"] = true
	}
	return invalid, true
}

// invalidQueries are queries of GET /users, and their invalid parameters.
var invalidQueries = map[string][]string{
	"page=0":                              {"page"},
	"page=-1":                             {"page"},
	"page=%2B1":                           {"page"},
	"page=+1":                             {"page"}, // a space and a 1
	"page=1e3":                            {"page"},
	"page=1.0":                            {"page"},
	"page=0x1":                            {"page"},
	"page=1_0":                            {"page"},
	"page=one":                            {"page"},
	"page=%D9%A1":                         {"page"}, // an Arabic-Indic 1
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
}

// TestListErrors checks that the 400 names each invalid parameter of a list.
func TestListErrors(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for query, want := range invalidQueries {
		checkBadRequest(t, query, s.do("GET", "/users?"+query, ""), want...)
	}
	for _, query := range []string{"page=10002", "page=9223372036854775807"} {
		if a := s.do("GET", "/users?"+query, ""); !strings.Contains(a.body, "use after") {
			t.Errorf("%s: want a detail that recommends after: %s", query, a.body)
		}
	}
	for _, query := range []string{
		"%zz", "page=%", "page=1&per_page=%2", "page=1;per_page=2", "a;b",
	} {
		a := s.do("GET", "/users?"+query, "")
		if a.status != http.StatusBadRequest ||
			!strings.Contains(fmt.Sprint(a.json(t, "detail")), "query") {
			t.Errorf("%s: status %d, want 400 with a detail about the query: %s",
				query, a.status, a.body)
		}
	}
}

// TestIgnoredQuery checks that every route except the list ignores an invalid query.
func TestIgnoredQuery(t *testing.T) {
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
			t.Errorf("%s %s: status %d, want %d: %s",
				test.method, test.path, a.status, test.want, a.body)
		}
	}
}
