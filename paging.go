package main

import (
	"fmt"
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

const (
	maxPerPage     = 100
	defaultPerPage = 10
	maxOffset      = 100_000 // rows that a page may skip
)

// listQuery is the query of GET /users. The position is after, else page.
type listQuery struct {
	values  url.Values
	page    int64 // 0 where the position is after
	after   int64
	perPage int64
}

// userList is a page of users. NextAfter is nil where nothing follows.
type userList struct {
	Users     []User `json:"users"`
	Total     int64  `json:"total"`
	Page      int64  `json:"page,omitempty"`
	PerPage   int64  `json:"per_page"`
	NextAfter *int64 `json:"next_after"`
}

// parseListQuery fails with one 400 that names every wrong parameter.
func parseListQuery(rawQuery string) (listQuery, error) {
	values, err := url.ParseQuery(rawQuery)
	if err != nil {
		return listQuery{}, newProblem(http.StatusBadRequest, "The query cannot be parsed")
	}
	p := queryParser{values: values}
	p.refuseUnknown("page", "per_page", "after")
	q := listQuery{
		values:  values,
		page:    p.number("page", 1, 1, math.MaxInt64),
		perPage: p.number("per_page", defaultPerPage, 1, maxPerPage),
		after:   p.number("after", 0, 0, math.MaxInt64),
	}
	switch {
	case values.Has("page") && values.Has("after"):
		p.fail("after", "cannot be combined with page")
	case values.Has("after"):
		q.page = 0
	case len(p.wrong) == 0 && q.page-1 > maxOffset/q.perPage:
		p.fail("page", fmt.Sprintf("cannot skip more than %d users: use after instead", maxOffset))
	}
	if len(p.wrong) > 0 {
		return listQuery{}, invalid("parameter", p.wrong)
	}
	return q, nil
}

// queryParser collects what is wrong with a query.
type queryParser struct {
	values url.Values
	wrong  []fieldError
}

func (p *queryParser) fail(name, detail string) {
	p.wrong = append(p.wrong, fieldError{Parameter: name, Detail: detail})
}

func (p *queryParser) refuseUnknown(known ...string) {
	for _, name := range slices.Sorted(maps.Keys(p.values)) {
		if !slices.Contains(known, name) {
			p.fail(name, "is not a known parameter: those are "+strings.Join(known, ", "))
		}
	}
}

// number returns fallback where the parameter is not given.
func (p *queryParser) number(name string, fallback, low, high int64) int64 {
	texts, given := p.values[name]
	if !given {
		return fallback
	}
	n, err := strconv.ParseUint(texts[0], 10, 63)
	if len(texts) > 1 {
		p.fail(name, "is given more than once")
	} else if err != nil || int64(n) < low || int64(n) > high {
		p.fail(name, fmt.Sprintf("must be %d to %d", low, high))
	}
	return int64(n)
}

func (q listQuery) offset() int64 {
	return max(q.page-1, 0) * q.perPage
}

// list makes the page from up to perPage+1 users: the one too many says that more follow.
func (q listQuery) list(users []User, total int64) userList {
	list := userList{Users: users, Total: total, Page: q.page, PerPage: q.perPage}
	if int64(len(users)) > q.perPage {
		list.Users = users[:q.perPage]
		list.NextAfter = &users[q.perPage-1].ID
	}
	return list
}

// links is the Link field of list by RFC 8288. A last page that page cannot reach is
// not linked.
func (q listQuery) links(list userList) string {
	var links []string
	link := func(relation, position string, n int64) {
		values := maps.Clone(q.values)
		values.Del("page")
		values.Set(position, strconv.FormatInt(n, 10))
		links = append(links, fmt.Sprintf(`</users?%s>; rel="%s"`, values.Encode(), relation))
	}
	last := max((list.Total+q.perPage-1)/q.perPage, 1)
	if q.page > 0 {
		link("first", "page", 1)
	}
	if q.page > 1 {
		link("prev", "page", min(q.page-1, last))
	}
	if list.NextAfter != nil {
		link("next", "after", *list.NextAfter)
	}
	if q.page > 0 && last-1 <= maxOffset/q.perPage {
		link("last", "page", last)
	}
	return strings.Join(links, ", ")
}
