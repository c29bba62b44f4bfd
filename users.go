package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	maxNameLength     = 255 // code points
	maxPasswordLength = 128 // code points
	maxKeyLength      = 255 // characters of an idempotency key
	keyLifetime       = 24 * time.Hour
	maxPerPage        = 100
	defaultPerPage    = 10
	maxOffset         = 100_000 // rows that a page may skip
)

// User is a user as clients see it. Version starts at 1 and grows by 1 with each change.
type User struct {
	ID        int64     `json:"id"`
	Name      string    `json:"name"`
	Surname   string    `json:"surname"`
	CreatedAt timestamp `json:"created_at"`
	UpdatedAt timestamp `json:"updated_at"`
	Version   int64     `json:"-"`
}

// userInput is what a request says of a user; nil is what it does not say. The store
// takes the password hashed.
type userInput struct {
	name     *string
	surname  *string
	password *string
}

// userStore holds the users. Each change commits together with its event, and match, if
// not nil, lists the versions that the change may be made to. Every method also fails
// with errUnavailable, and the context's error where the caller left before the work began.
type userStore interface {
	// createUser takes an input that says everything. With a key, which may be "", it
	// fails with errKeyUsed where another user was created under it.
	createUser(ctx context.Context, in userInput, key string) (User, error)
	// creationUnder returns the user created under a key within keyLifetime, as it was
	// then, and its password's hash. It fails with errNotFound.
	creationUnder(ctx context.Context, key string) (User, string, error)
	// getUser fails with errNotFound.
	getUser(ctx context.Context, id int64) (User, error)
	// listUsers returns up to limit users with ids above after, in the order of ids and
	// without the first offset of them, and the number of all users.
	listUsers(ctx context.Context, after, offset, limit int64) ([]User, int64, error)
	// updateUser fails with errNotFound, then errVersionMismatch. Where nothing differs
	// it returns the user as it is and makes no event.
	updateUser(ctx context.Context, id int64, in userInput, match []int64) (User, error)
	// deleteUser fails with errNotFound, then errVersionMismatch.
	deleteUser(ctx context.Context, id int64, match []int64) error
}

// What a store's method can fail with, beside an error that nobody expects.
var (
	errNotFound        = errors.New("user not found")
	errVersionMismatch = errors.New("version does not match")
	errKeyUsed         = errors.New("idempotency key used")
	errInvalidValue    = errors.New("value cannot be stored")
	errUnavailable     = errors.New("store unavailable, nothing changed")
	errOutcomeUnknown  = errors.New("store lost, outcome unknown")
)

// api has the handlers of /users.
type api struct {
	store             userStore
	hasher            *hasher
	passwordMinLength int
	creating          sync.Map // the idempotency keys of requests under way
}

func (a *api) listUsers(w http.ResponseWriter, r *http.Request) error {
	q, err := parseListQuery(r.URL.RawQuery)
	if err != nil {
		return err
	}
	users, total, err := a.store.listUsers(r.Context(), q.after, q.offset(), q.perPage+1)
	if err != nil {
		return err
	}
	list := q.list(users, total)
	if links := q.links(list); links != "" {
		w.Header().Set("Link", links)
	}
	return writeJSON(w, http.StatusOK, list)
}

func (a *api) createUser(w http.ResponseWriter, r *http.Request) error {
	key, err := idempotencyKey(r.Header)
	if err != nil {
		return err
	}
	in, err := a.readUser(w, r, []string{"name", "surname", "password"}, "application/json")
	if err != nil {
		return err
	}
	u, err := a.createOnce(r.Context(), in, key)
	if err != nil {
		return err
	}
	w.Header().Set("Location", fmt.Sprintf("/users/%d", u.ID))
	return writeUser(w, http.StatusCreated, u)
}

// createOnce creates a user, or returns the one that was created under the key before.
func (a *api) createOnce(ctx context.Context, in userInput, key string) (User, error) {
	if key != "" {
		if _, running := a.creating.LoadOrStore(key, true); running {
			return User{}, newProblem(http.StatusConflict,
				"A request with this Idempotency-Key is still running")
		}
		defer a.creating.Delete(key)
		u, err := a.replay(ctx, in, key)
		if !errors.Is(err, errNotFound) {
			return u, err
		}
	}
	hashed := in
	if err := a.hashPassword(ctx, &hashed); err != nil {
		return User{}, err
	}
	u, err := a.store.createUser(ctx, hashed, key)
	if errors.Is(err, errKeyUsed) { // another replica was faster
		return a.replay(ctx, in, key)
	}
	return u, err
}

// replay returns the user that was created under the key, if in is what created it.
func (a *api) replay(ctx context.Context, in userInput, key string) (User, error) {
	u, hash, err := a.store.creationUnder(ctx, key)
	if err != nil {
		return User{}, err
	}
	same := u.Name == *in.name && u.Surname == *in.surname
	if same {
		if same, err = a.hasher.verify(ctx, *in.password, hash); err != nil {
			return User{}, err
		}
	}
	if !same {
		return User{}, newProblem(http.StatusUnprocessableEntity,
			"This Idempotency-Key was used with another body")
	}
	return u, nil
}

func (a *api) getUser(w http.ResponseWriter, r *http.Request) error {
	id, err := userID(r)
	if err != nil {
		return err
	}
	u, err := a.store.getUser(r.Context(), id)
	if err != nil {
		return err
	}
	if noneMatchFails(r.Header, u.Version) {
		w.Header().Set("ETag", entityTag(u.Version))
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return writeUser(w, http.StatusOK, u)
}

// updateUser answers PUT and PATCH: what the body does not say stays as it is.
func (a *api) updateUser(w http.ResponseWriter, r *http.Request) error {
	id, err := userID(r)
	if err != nil {
		return err
	}
	mediaTypes := []string{"application/json"}
	if r.Method == http.MethodPatch {
		mediaTypes = append(mediaTypes, "application/merge-patch+json")
	}
	in, err := a.readUser(w, r, nil, mediaTypes...)
	if err != nil {
		return err
	}
	if err := a.hashPassword(r.Context(), &in); err != nil {
		return err
	}
	u, err := a.store.updateUser(r.Context(), id, in, matchVersions(r.Header))
	if err != nil {
		return err
	}
	return writeUser(w, http.StatusOK, u)
}

func (a *api) deleteUser(w http.ResponseWriter, r *http.Request) error {
	id, err := userID(r)
	if err != nil {
		return err
	}
	if err := a.store.deleteUser(r.Context(), id, matchVersions(r.Header)); err != nil {
		return err
	}
	message := fmt.Sprintf("User with id %d has been deleted", id)
	return writeJSON(w, http.StatusOK, map[string]string{"message": message})
}

func writeUser(w http.ResponseWriter, status int, u User) error {
	w.Header().Set("ETag", entityTag(u.Version))
	return writeJSON(w, status, u)
}

// userID fails with errNoRoute for what is not a canonical int64 of 0 or more.
func userID(r *http.Request) (int64, error) {
	text := r.PathValue("id")
	id, err := strconv.ParseInt(text, 10, 64)
	if err != nil || id < 0 || strconv.FormatInt(id, 10) != text {
		return 0, errNoRoute
	}
	return id, nil
}

// readUser reads a body by the rules for users. Its errors are those of readBody and one
// 400 that names every wrong member.
func (a *api) readUser(w http.ResponseWriter, r *http.Request, required []string,
	mediaTypes ...string) (userInput, error) {
	body, err := readBody(w, r, mediaTypes...)
	if err != nil {
		return userInput{}, err
	}
	members, err := parseObject(body)
	if err != nil {
		return userInput{}, err
	}
	if len(members) == 0 && len(required) == 0 {
		return userInput{}, newProblem(http.StatusBadRequest,
			"The body must have at least one of name, surname and password")
	}
	var in userInput
	var wrong []fieldError
	given := make(map[string]int)
	for _, m := range members {
		given[m.name]++
		if err := a.setMember(&in, m, given[m.name]); err != nil {
			wrong = append(wrong, fieldError{Pointer: pointer(m.name), Detail: err.Error()})
		}
	}
	for _, name := range required {
		if given[name] == 0 {
			wrong = append(wrong, fieldError{Pointer: pointer(name), Detail: "is required"})
		}
	}
	if len(wrong) > 0 {
		return userInput{}, invalid("field", wrong)
	}
	return in, nil
}

// setMember sets what m says, as the nth member of its name.
func (a *api) setMember(in *userInput, m member, nth int) error {
	var target **string
	check := checkName
	switch m.name {
	case "name":
		target = &in.name
	case "surname":
		target = &in.surname
	case "password":
		target, check = &in.password, a.checkPassword
	default:
		return errors.New("is not a known field: those are name, surname and password")
	}
	if nth > 1 {
		return errors.New("is given more than once")
	}
	text, err := parseString(m.value)
	if err != nil {
		return err
	}
	text, err = check(text)
	*target = &text
	return err
}

// checkName returns a name or surname as it is stored: without white space at its ends.
func checkName(text string) (string, error) {
	text = strings.TrimFunc(text, unicode.IsSpace)
	if n := utf8.RuneCountInString(text); n < 1 || n > maxNameLength {
		return "", fmt.Errorf("must have 1 to %d characters beside white space at its ends",
			maxNameLength)
	}
	if strings.ContainsFunc(text, unicode.IsControl) {
		return "", errors.New("must not hold control characters")
	}
	return text, nil
}

func (a *api) checkPassword(text string) (string, error) {
	if n := utf8.RuneCountInString(text); n < a.passwordMinLength || n > maxPasswordLength {
		return "", fmt.Errorf("must have %d to %d characters",
			a.passwordMinLength, maxPasswordLength)
	}
	return text, nil
}

// hashPassword replaces the password of in, if there is one, by its hash.
func (a *api) hashPassword(ctx context.Context, in *userInput) error {
	if in.password == nil {
		return nil
	}
	hash, err := a.hasher.hash(ctx, *in.password)
	in.password = &hash
	return err
}

var (
	// A string of RFC 8941, section 3.3.3.
	quotedKey = regexp.MustCompile(`^"((?:[ !#-\[\]-~]|\\["\\])*)"$`)
	bareKey   = regexp.MustCompile(`^[!#-~]+$`)
	unescape  = strings.NewReplacer(`\"`, `"`, `\\`, `\`)
)

// idempotencyKey is "" where the header is missing. Its error is a 400.
func idempotencyKey(h http.Header) (string, error) {
	lines, given := h["Idempotency-Key"]
	if !given {
		return "", nil
	}
	var key string
	if quoted := quotedKey.FindStringSubmatch(lines[0]); quoted != nil {
		key = unescape.Replace(quoted[1])
	} else if bareKey.MatchString(lines[0]) {
		key = lines[0]
	}
	if len(lines) > 1 || key == "" || len(key) > maxKeyLength {
		return "", newProblem(http.StatusBadRequest, fmt.Sprintf(
			"Idempotency-Key must be one string of 1 to %d printable ASCII characters", maxKeyLength))
	}
	return key, nil
}

// entityTag is the strong ETag of a version.
func entityTag(version int64) string {
	return `"` + strconv.FormatInt(version, 10) + `"`
}

// matchVersions returns the versions that If-Match lists, by strong comparison (RFC 9110,
// section 13.1.1): nil where any will do, none where the field cannot be read.
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

// noneMatchFails says whether If-None-Match names the version, by weak comparison
// (RFC 9110, section 13.1.2).
func noneMatchFails(h http.Header, version int64) bool {
	return slices.ContainsFunc(parseEntityTags(h["If-None-Match"]), func(tag string) bool {
		return tag == "*" || strings.TrimPrefix(tag, "W/") == entityTag(version)
	})
}

// parseEntityTags reads a list by RFC 9110, section 8.8.3, or a lone "*". It returns
// nothing where the lines are neither.
func parseEntityTags(lines []string) []string {
	rest := strings.Trim(strings.Join(lines, ","), " \t,")
	if rest == "*" {
		return []string{"*"}
	}
	var tags []string
	for rest != "" {
		opaque := strings.TrimPrefix(rest, "W/")
		weak := len(rest) - len(opaque)
		if opaque == "" || opaque[0] != '"' {
			return nil
		}
		length := strings.IndexFunc(opaque[1:], func(c rune) bool {
			return c == '"' || c <= ' ' || c == 0x7f
		})
		if length < 0 || opaque[1+length] != '"' {
			return nil
		}
		end := weak + length + 2
		tags = append(tags, rest[:end])
		next := strings.TrimLeft(rest[end:], " \t")
		if next != "" && next[0] != ',' {
			return nil
		}
		rest = strings.TrimLeft(next, " \t,")
	}
	return tags
}

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
		values.Del("after")
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
