package main

// This file owns users: the type, the rules for its fields, the store's interface, a handler for
// each route in the order of the routes, and Idempotency-Key.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

const maxNameLength = 255 // code points

// User is a user as clients see it. Version starts at 1 and grows by 1 with each change.
type User struct {
	ID        int64     `json:"id"`
	Name      string    `json:"name"`
	Surname   string    `json:"surname"`
	Version   int64     `json:"version"`
	CreatedAt timestamp `json:"created_at"`
	UpdatedAt timestamp `json:"updated_at"`
}

// userList is a page of users. NextAfter is nil if nothing follows.
type userList struct {
	Users       []User `json:"users"`
	Total       int64  `json:"total"`
	TotalCapped bool   `json:"total_capped,omitempty"`
	Page        int64  `json:"page,omitempty"`
	PerPage     int64  `json:"per_page"`
	NextAfter   *int64 `json:"next_after"`
}

const maxMatches = 10_000 // users of a search that are counted

// userInput holds the fields that a request sets; nil fields are not set. Handlers replace the
// password by its hash before they call the store.
type userInput struct {
	name     *string
	surname  *string
	password *string
}

// userStore stores users. Each change commits together with its event. If match is not nil, a
// change requires that the user's version is one of match.
//
// Besides the errors below, every method fails with errUnavailable, and with the context's error if
// the caller leaves before the work begins. A change also fails with errOutcomeUnknown, with
// errInvalidValue, and with errReferenced or errRefused if the database has rules of its own.
type userStore interface {
	// createUser requires all fields of in. If key is not "" and a user was created under it, it
	// fails with errKeyUsed. The event of the change names the actor.
	createUser(ctx context.Context, actor string, in userInput, key string) (User, error)
	// creationUnder returns the user that was created under a key within keyLifetime, in its first
	// version, and the hash of its password. It fails with errNotFound.
	creationUnder(ctx context.Context, key string) (User, string, error)
	// getUser fails with errNotFound.
	getUser(ctx context.Context, id int64) (User, error)
	// passwordHash fails with errNotFound.
	passwordHash(ctx context.Context, id int64) (string, error)
	// rehashPassword replaces a hash by another one of the same password, if old is still stored.
	// It changes neither the version nor makes an event.
	rehashPassword(ctx context.Context, id int64, old, hash string) error
	// listUsers returns up to limit users with ids above after, in the order of ids, without the
	// first offset of them. With a prefix it lists only users whose name or surname begins with it
	// regardless of case (see foldCase). total counts all such users, but with a prefix
	// maxMatches+1 means that there are more. Clients take turns.
	listUsers(ctx context.Context, client, prefix string, after, offset, limit int64) (
		users []User, total int64, err error)
	// updateUser fails with errNotFound, then errVersionMismatch. If nothing differs, it returns
	// the unchanged user and makes no event.
	updateUser(ctx context.Context, actor string, id int64, in userInput, match []int64) (User,
		error)
	// deleteUser fails with errNotFound, then errVersionMismatch.
	deleteUser(ctx context.Context, actor string, id int64, match []int64) error
}

// The errors of a userStore. Any other error is unexpected.
var (
	errNotFound        = errors.New("user not found")
	errVersionMismatch = errors.New("version does not match")
	errKeyUsed         = errors.New("idempotency key is used")
	errInvalidValue    = errors.New("value cannot be stored")
	errReferenced      = errors.New("user is referenced by other data")
	errRefused         = errors.New("change is refused by a rule of the database")
	errUnavailable     = errors.New("store is unavailable, nothing was changed")
	errOutcomeUnknown  = errors.New("store did not answer, the outcome is unknown")
)

const maxVerifications = 10 // passwords that may be tried on a user per minute

// api has the handlers of /users.
type api struct {
	store         userStore
	hasher        *hasher
	log           *slog.Logger
	rules         map[string]fieldRule // of the fields of a user
	verifications *limiter[int64]      // by user
	creating      sync.Map             // idempotency keys of requests in progress
}

// newAPI returns the handlers. t tells them how busy the service is.
func newAPI(d dependencies, t *traffic) *api {
	s := d.settings
	return &api{
		store:  d.store,
		hasher: &hasher{newHashLanes(d.limits, t), d.limits.hash},
		log:    d.log,
		rules: map[string]fieldRule{
			"name":     textRule(checkName),
			"surname":  textRule(checkName),
			"password": textRule(newPasswordRule(s.passwordMinLength, s.passwordBlocklist)),
		},
		verifications: newLimiter[int64]("password", maxVerifications/60.0, maxVerifications),
	}
}

// listUsers handles GET /users. It asks the store for one user more than the page has, which shows
// whether another page follows.
func (a *api) listUsers(w *response, r *http.Request, by caller) error {
	q, err := parseListQuery(r.URL.RawQuery)
	if err != nil {
		return err
	}
	users, total, err := a.store.listUsers(r.Context(), by.client, q.prefix, q.after, q.offset(),
		q.perPage+1)
	if err != nil {
		return err
	}
	list := q.list(users, total)
	if links := q.links(list); links != "" {
		w.Header().Set("Link", links)
	}
	return writeJSON(w, http.StatusOK, list)
}

// createUser handles POST /users. With an Idempotency-Key it is safe to repeat.
func (a *api) createUser(w *response, r *http.Request, by caller) error {
	fields, err := readFields(w, r, a.rules, []string{"name", "surname", "password"},
		"application/json")
	if err != nil {
		return err
	}
	key, err := idempotencyKey(r.Header, by)
	if err != nil {
		return err
	}
	u, err := a.createOnce(r.Context(), w.Header(), inputOf(fields), key, by)
	if err != nil {
		return err
	}
	w.Header().Set("Location", fmt.Sprintf("/users/%d", u.ID))
	return writeUser(w, http.StatusCreated, u)
}

// getUser handles GET /users/{id}. It answers 304 if the client has the current version.
func (a *api) getUser(w *response, r *http.Request, _ caller) error {
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

// updateUser handles PUT and PATCH. Fields that the body does not have stay unchanged.
func (a *api) updateUser(w *response, r *http.Request, by caller) error {
	id, err := userID(r)
	if err != nil {
		return err
	}
	mediaTypes := []string{"application/json"}
	if r.Method == http.MethodPatch {
		mediaTypes = append(mediaTypes, "application/merge-patch+json")
	}
	fields, err := readFields(w, r, a.rules, nil, mediaTypes...)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), workBudget)
	defer cancel()
	in := inputOf(fields)
	if err := a.hashPassword(ctx, by.client, &in); err != nil {
		return err
	}
	u, err := a.store.updateUser(ctx, by.actor(), id, in, matchVersions(r.Header))
	if err != nil {
		return err
	}
	return writeUser(w, http.StatusOK, u)
}

// deleteUser handles DELETE /users/{id}.
func (a *api) deleteUser(w *response, r *http.Request, by caller) error {
	id, err := userID(r)
	if err != nil {
		return err
	}
	if err = a.store.deleteUser(r.Context(), by.actor(), id, matchVersions(r.Header)); err != nil {
		return err
	}
	message := fmt.Sprintf("User with id %d has been deleted", id)
	return writeJSON(w, http.StatusOK, map[string]string{"message": message})
}

// anyPassword accepts every password that any settings would: the rules may have changed since a
// password was stored.
var anyPassword = map[string]fieldRule{"password": textRule(newPasswordRule(1, false))}

// verifyPassword takes the same time for a user that does not exist.
func (a *api) verifyPassword(w *response, r *http.Request, by caller) error {
	id, err := userID(r)
	if err != nil {
		return err
	}
	fields, err := readFields(w, r, anyPassword, []string{"password"}, "application/json")
	if err != nil {
		return err
	}
	if err := a.verifications.admit(w.Header(), id); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), workBudget)
	defer cancel()
	valid, err := a.verify(ctx, by.client, id, fields["password"])
	if err != nil {
		a.verifications.refund(id) // the caller has learned nothing
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]bool{"valid": valid})
}

// verify reports whether password is that of a user, at the same cost if the user does not exist or
// the hash cannot be verified. It replaces a hash of another system or with outdated parameters.
func (a *api) verify(ctx context.Context, client string, id int64, password string) (bool, error) {
	hash, err := a.store.passwordHash(ctx, id)
	if errors.Is(err, errNotFound) {
		return a.hasher.verify(ctx, client, password, a.hasher.decoy())
	}
	if err != nil {
		return false, err
	}
	valid, err := a.hasher.verify(ctx, client, password, hash)
	if errors.Is(err, errHash) {
		a.log.WarnContext(ctx, "Password hash unusable", "user_id", id, "error", err)
		return a.hasher.verify(ctx, client, password, a.hasher.decoy())
	}
	if valid && a.hasher.needsRehash(hash) {
		a.rehash(ctx, client, id, hash, password)
	}
	return valid, err
}

// rehash replaces old, a hash of password. If it fails, the next verification tries again.
func (a *api) rehash(ctx context.Context, client string, id int64, old, password string) {
	hash, err := a.hasher.hash(ctx, client, password)
	if err == nil {
		err = a.store.rehashPassword(ctx, id, old, hash)
	}
	if err != nil {
		a.log.WarnContext(ctx, "Password rehash failed", "user_id", id, "error", err)
	}
}

// writeUser answers with a user and its ETag.
func writeUser(w http.ResponseWriter, status int, u User) error {
	w.Header().Set("ETag", entityTag(u.Version))
	return writeJSON(w, status, u)
}

// inputOf returns the input that the fields of a body make.
func inputOf(fields map[string]string) userInput {
	field := func(name string) *string {
		if text, ok := fields[name]; ok {
			return &text
		}
		return nil
	}
	return userInput{name: field("name"), surname: field("surname"), password: field("password")}
}

// appendJSON implements jsonAppender.
func (u User) appendJSON(b []byte) []byte {
	b = strconv.AppendInt(append(b, `{"id":`...), u.ID, 10)
	b = appendJSONString(append(b, `,"name":`...), u.Name)
	b = appendJSONString(append(b, `,"surname":`...), u.Surname)
	b = strconv.AppendInt(append(b, `,"version":`...), u.Version, 10)
	b = u.CreatedAt.appendJSON(append(b, `,"created_at":`...))
	b = u.UpdatedAt.appendJSON(append(b, `,"updated_at":`...))
	return append(b, '}')
}

// appendJSON implements jsonAppender.
func (l userList) appendJSON(b []byte) []byte {
	b = append(b, `{"users":[`...)
	for i, u := range l.Users {
		if i > 0 {
			b = append(b, ',')
		}
		b = u.appendJSON(b)
	}
	b = strconv.AppendInt(append(b, `],"total":`...), l.Total, 10)
	if l.TotalCapped {
		b = append(b, `,"total_capped":true`...)
	}
	if l.Page > 0 {
		b = strconv.AppendInt(append(b, `,"page":`...), l.Page, 10)
	}
	b = strconv.AppendInt(append(b, `,"per_page":`...), l.PerPage, 10)
	b = append(b, `,"next_after":`...)
	if l.NextAfter == nil {
		return append(b, `null}`...)
	}
	return append(strconv.AppendInt(b, *l.NextAfter, 10), '}')
}

// checkName is the rule of names and surnames. It trims white space.
func checkName(text string) (string, error) {
	text = strings.TrimFunc(text, unicode.IsSpace)
	if n := utf8.RuneCountInString(text); n < 1 || n > maxNameLength {
		return "", fmt.Errorf("must have 1 to %d characters, not counting white space at the ends",
			maxNameLength)
	}
	if strings.ContainsFunc(text, unicode.IsControl) {
		return "", errors.New("must not contain control characters")
	}
	return text, nil
}

// hashPassword replaces the password of in, if it has one, by its hash.
func (a *api) hashPassword(ctx context.Context, client string, in *userInput) error {
	if in.password == nil {
		return nil
	}
	hash, err := a.hasher.hash(ctx, client, *in.password)
	in.password = &hash
	return err
}

// The rest of the file owns Idempotency-Key: the header, the answer to a repeated POST, and the
// lifetime of a key. Both stores keep a key together with the user that was created under it.

const (
	maxKeyLength = 255            // characters of a key
	keyLifetime  = 24 * time.Hour // after which a key is free again
)

var (
	quotedKey = regexp.MustCompile(`^"((?:[ !#-\[\]-~]|\\["\\])*)"$`) // RFC 8941, section 3.3.3
	bareKey   = regexp.MustCompile(`^[!#-~]+$`)
	unescape  = strings.NewReplacer(`\"`, `"`, `\\`, `\`)
)

// idempotencyKey returns the key as it is stored, or "" if the header is missing. A key belongs to
// its caller: the caller's name and a tab, which no key contains, precede it. It fails with a 400.
func idempotencyKey(h http.Header, by caller) (string, error) {
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
		return "", newProblem(http.StatusBadRequest, fmt.Sprintf("Idempotency-Key must be one "+
			"string of 1 to %d printable ASCII characters", maxKeyLength))
	}
	switch by.kind {
	case "key":
		key = by.name + "\t" + key
	case "subject":
		key = by.client + "\t" + key
	}
	return key, nil
}

// createOnce creates a user, or returns the user that was created under the same key before. While
// this replica is working on a request with the key, another one is refused with a 409. Two
// replicas may both begin; then the database lets one create, and the other returns its user.
func (a *api) createOnce(ctx context.Context, h http.Header, in userInput, key string, by caller) (
	User, error) {
	ctx, cancel := context.WithTimeout(ctx, workBudget)
	defer cancel()
	if key != "" {
		if _, running := a.creating.LoadOrStore(key, true); running {
			return User{}, newProblem(http.StatusConflict,
				"A request with this Idempotency-Key is in progress")
		}
		defer a.creating.Delete(key)
		u, err := a.replay(ctx, h, in, key, by.client)
		if !errors.Is(err, errNotFound) {
			return u, err
		}
	}
	hashed := in
	if err := a.hashPassword(ctx, by.client, &hashed); err != nil {
		return User{}, err
	}
	u, err := a.store.createUser(ctx, by.actor(), hashed, key)
	if errors.Is(err, errKeyUsed) { // by another replica in the meantime
		return a.replay(ctx, h, in, key, by.client)
	}
	return u, err
}

// replay returns the user that was created under key, if in is the same input. It fails with
// errNotFound, or with a 422 for another input. Because the answer shows whether the password is
// the same, it counts as a verification. h is of the answer.
func (a *api) replay(ctx context.Context, h http.Header, in userInput, key, client string) (
	User, error) {
	u, hash, err := a.store.creationUnder(ctx, key)
	if err != nil {
		return User{}, err
	}
	if err := a.verifications.admit(h, u.ID); err != nil {
		return User{}, err
	}
	same := u.Name == *in.name && u.Surname == *in.surname
	if same {
		if same, err = a.hasher.verify(ctx, client, *in.password, hash); err != nil {
			a.verifications.refund(u.ID)
			return User{}, err
		}
	}
	if !same {
		return User{}, newProblem(http.StatusUnprocessableEntity,
			"This Idempotency-Key was used with another body")
	}
	return u, nil
}
