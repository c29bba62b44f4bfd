package main

// This file owns reading a request: its body, its conditional headers, and its query.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// userID returns the id in the path. It fails with errNoRoute unless that is the canonical form of
// an int64 of 0 or more.
func userID(r *http.Request) (int64, error) {
	text := r.PathValue("id")
	id, err := strconv.ParseInt(text, 10, 64)
	if err != nil || id < 0 || strconv.FormatInt(id, 10) != text {
		return 0, errNoRoute
	}
	return id, nil
}

// fieldRule returns the text of a member's value as it is stored, or an error that says what would
// be valid.
type fieldRule func(value json.RawMessage) (string, error)

// textRule returns the rule for strings to which check applies.
func textRule(check func(text string) (string, error)) fieldRule {
	return func(value json.RawMessage) (string, error) {
		text, err := parseString(value)
		if err == nil {
			text, err = check(text)
		}
		return text, err
	}
}

// readFields reads the string members of a JSON object by their rules. It fails with the errors of
// readBody, or with one 400 that names every invalid member.
func readFields(w http.ResponseWriter, r *http.Request, rules map[string]fieldRule,
	required []string, mediaTypes ...string) (map[string]string, error) {
	body, err := readBody(w, r, mediaTypes...)
	if err != nil {
		return nil, err
	}
	members, err := parseObject(body, maxMembers)
	if err != nil {
		return nil, err
	}
	if len(members) == 0 && len(required) == 0 {
		return nil, newProblem(http.StatusBadRequest, "The body must have one or more of "+
			strings.Join(slices.Sorted(maps.Keys(rules)), ", "))
	}
	fields, wrong := checkMembers(members, rules, required)
	if len(wrong) > 0 {
		return nil, invalid("field", wrong)
	}
	return fields, nil
}

// checkMembers returns the texts of members by their rules, and what is wrong with them.
func checkMembers(members []member, rules map[string]fieldRule, required []string) (
	fields map[string]string, wrong []fieldError) {
	fields = make(map[string]string)
	fail := func(name, detail string) {
		wrong = append(wrong, fieldError{Pointer: pointer(cut(name, maxEchoed)), Detail: detail})
	}
	for _, m := range members {
		rule, ok := rules[m.name]
		if !ok {
			fail(m.name, "is unknown; the fields are "+
				strings.Join(slices.Sorted(maps.Keys(rules)), ", "))
			continue
		}
		if _, repeated := fields[m.name]; repeated {
			fail(m.name, "must be given once")
			continue
		}
		text, err := rule(m.value)
		if err != nil {
			fail(m.name, err.Error())
		}
		fields[m.name] = text
	}
	for _, name := range required {
		if _, ok := fields[name]; !ok {
			fail(name, "is required")
		}
	}
	return fields, wrong
}

// readBody returns the body of r if it has one of the media types. It fails with the problems 415,
// 413, 408 and 400, in this order, and with errClientGone.
func readBody(w http.ResponseWriter, r *http.Request, mediaTypes ...string) ([]byte, error) {
	if !hasMediaType(r.Header["Content-Type"], mediaTypes) {
		return nil, newProblem(http.StatusUnsupportedMediaType,
			"Content-Type must be "+strings.Join(mediaTypes, " or ")+", in UTF-8")
	}
	for _, coding := range r.Header["Content-Encoding"] {
		if !strings.EqualFold(coding, "identity") {
			return nil, newProblem(http.StatusUnsupportedMediaType,
				"The body must not have a Content-Encoding")
		}
	}
	tooLarge := newProblem(http.StatusRequestEntityTooLarge,
		fmt.Sprintf("The body must not be larger than %d bytes", maxBodyBytes))
	if r.ContentLength > maxBodyBytes {
		return nil, tooLarge
	}
	var body bytes.Buffer
	body.Grow(int(max(r.ContentLength, 0)) + bytes.MinRead)
	_, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, maxBodyBytes))
	if err == nil {
		return body.Bytes(), nil
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, tooLarge
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, newProblem(http.StatusRequestTimeout, "The body did not arrive in time")
	}
	if _, ok := errors.AsType[net.Error](err); ok || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, errClientGone
	}
	return nil, newProblem(http.StatusBadRequest, "The body is not valid HTTP")
}

// hasMediaType reports whether a request has exactly one Content-Type, which is allowed, in UTF-8
// if it names a charset.
func hasMediaType(contentTypes, allowed []string) bool {
	if len(contentTypes) != 1 {
		return false
	}
	mediaType, parameters, err := mime.ParseMediaType(contentTypes[0])
	charset, ok := parameters["charset"]
	return err == nil && slices.Contains(allowed, mediaType) &&
		(!ok || strings.EqualFold(charset, "utf-8"))
}

// entityTag returns the strong ETag of a version.
func entityTag(version int64) string {
	return `"` + strconv.FormatInt(version, 10) + `"`
}

// matchVersions returns the versions that If-Match lists, by strong comparison (RFC 9110, section
// 13.1.1). nil means any version. A malformed header matches no version.
func matchVersions(h http.Header) []int64 {
	lines := h["If-Match"]
	if len(lines) == 0 {
		return nil
	}
	tags := parseEntityTags(lines)
	if slices.Contains(tags, "*") {
		return nil
	}
	versions := []int64{}
	for _, tag := range tags {
		version, err := strconv.ParseInt(strings.Trim(tag, `"`), 10, 64)
		if err == nil && entityTag(version) == tag {
			versions = append(versions, version)
		}
	}
	return versions
}

// noneMatchFails reports whether If-None-Match lists the version, by weak comparison (RFC 9110,
// section 13.1.2).
func noneMatchFails(h http.Header, version int64) bool {
	return slices.ContainsFunc(parseEntityTags(h["If-None-Match"]), func(tag string) bool {
		return tag == "*" || strings.TrimPrefix(tag, "W/") == entityTag(version)
	})
}

const entityTagPattern = `(?:W/)?"[^\x00-\x20"\x7f]*"`

var (
	entityTags    = regexp.MustCompile(entityTagPattern)
	entityTagList = regexp.MustCompile(
		`^` + entityTagPattern + `(?:[ \t]*,[ \t,]*` + entityTagPattern + `)*$`)
)

// parseEntityTags returns the tags of a list (RFC 9110, section 8.8.3), or a single "*". It returns
// nil if the lines are neither.
func parseEntityTags(lines []string) []string {
	list := strings.Trim(strings.Join(lines, ","), " \t,")
	if list == "*" {
		return []string{"*"}
	}
	if !entityTagList.MatchString(list) {
		return nil
	}
	return entityTags.FindAllString(list, -1)
}

const (
	maxPerPage     = 100
	defaultPerPage = 10
	maxOffset      = 100_000 // users that a page may skip

	pageBounds    = "must be 1 or more and skip at most 100000 users; use after to go further"
	perPageBounds = "must be 1 to 100"
	afterBounds   = "must be 0 or more"
	prefixBounds  = "must be 1 to 255 characters of UTF-8 without control characters"
)

// listQuery is the query of GET /users. The position is page, or after if page is 0. The prefix is
// empty if all users are listed.
type listQuery struct {
	values  url.Values
	prefix  string
	page    int64
	after   int64
	perPage int64
}

// parseListQuery fails with one 400 that names every invalid parameter.
func parseListQuery(rawQuery string) (listQuery, error) {
	values, err := url.ParseQuery(rawQuery)
	if err != nil {
		return listQuery{}, newProblem(http.StatusBadRequest, "The query is not valid")
	}
	p := queryParser{values: values}
	p.refuseUnknown("page", "per_page", "after", "q")
	q := listQuery{
		values:  values,
		prefix:  p.prefix("q"),
		page:    p.number("page", 1, 1, math.MaxInt64, pageBounds),
		perPage: p.number("per_page", defaultPerPage, 1, maxPerPage, perPageBounds),
		after:   p.number("after", 0, 0, math.MaxInt64, afterBounds),
	}
	switch {
	case values.Has("page") && values.Has("after"):
		p.fail("after", "cannot be combined with page")
	case values.Has("after"):
		q.page = 0
	case len(p.wrong) == 0 && q.page-1 > maxOffset/q.perPage:
		p.fail("page", pageBounds)
	}
	if len(p.wrong) > 0 {
		return listQuery{}, invalid("parameter", p.wrong)
	}
	return q, nil
}

// queryParser collects the errors of a query.
type queryParser struct {
	values url.Values
	wrong  []fieldError
}

// fail adds an error for a parameter.
func (p *queryParser) fail(name, detail string) {
	p.wrong = append(p.wrong, fieldError{Parameter: cut(name, maxEchoed), Detail: detail})
}

// refuseUnknown adds an error for each parameter that is not one of known.
func (p *queryParser) refuseUnknown(known ...string) {
	for _, name := range slices.Sorted(maps.Keys(p.values)) {
		if !slices.Contains(known, name) {
			p.fail(name, "is unknown; the parameters are "+strings.Join(known, ", "))
		}
	}
}

// number returns fallback if the parameter is not given. A value that is not low to high has the
// error bounds.
func (p *queryParser) number(name string, fallback, low, high int64, bounds string) int64 {
	texts, given := p.values[name]
	if !given {
		return fallback
	}
	n, err := strconv.ParseUint(texts[0], 10, 63)
	if len(texts) > 1 {
		p.fail(name, "must be given once")
	} else if err != nil || int64(n) < low || int64(n) > high {
		p.fail(name, bounds)
	}
	return int64(n)
}

// prefix returns the text with which names begin, or "" if the parameter is not given.
func (p *queryParser) prefix(name string) string {
	texts, given := p.values[name]
	if !given {
		return ""
	}
	text := texts[0]
	if len(texts) > 1 {
		p.fail(name, "must be given once")
	} else if n := utf8.RuneCountInString(text); n < 1 || n > maxNameLength ||
		!utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
		p.fail(name, prefixBounds)
	}
	return text
}

// offset returns how many users the page skips.
func (q listQuery) offset() int64 {
	return max(q.page-1, 0) * q.perPage
}

// list returns the page of up to perPage+1 users. The extra user shows that more follow.
func (q listQuery) list(users []User, total int64) userList {
	list := userList{Users: users, Total: total, Page: q.page, PerPage: q.perPage}
	if q.prefix != "" && total > maxMatches {
		list.Total, list.TotalCapped = maxMatches, true
	}
	if int64(len(users)) > q.perPage {
		list.Users = users[:q.perPage]
		list.NextAfter = &users[q.perPage-1].ID
	}
	return list
}

// links returns the Link header of a list (RFC 8288). It leaves out a last page that is not known,
// or too far away for the parameter page.
func (q listQuery) links(list userList) string {
	var links []string
	link := func(relation, position string, n int64) {
		values := maps.Clone(q.values)
		values.Del("page")
		values.Set(position, strconv.FormatInt(n, 10))
		links = append(links, fmt.Sprintf(`</users?%s>; rel="%s"`, values.Encode(), relation))
	}
	last := max((list.Total+q.perPage-1)/q.perPage, 1)
	if list.TotalCapped {
		last = math.MaxInt64
	}
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
