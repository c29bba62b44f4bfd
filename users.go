package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
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
// not nil, lists the versions that the change may be made to. Every method also fails with
// errUnavailable, and with the context's error where the caller left before the work began;
// a change also with errOutcomeUnknown, with errReferenced or errRefused where the database has rules
// of its own, and with errInvalidValue for what slipped through.
type userStore interface {
	// createUser takes an input that says everything. With a key, which may be "", it
	// fails with errKeyUsed where another user was created under it.
	createUser(ctx context.Context, in userInput, key string) (User, error)
	// creationUnder returns the user created under a key within keyLifetime, as it was
	// then, and its password's hash. It fails with errNotFound.
	creationUnder(ctx context.Context, key string) (User, string, error)
	// getUser fails with errNotFound.
	getUser(ctx context.Context, id int64) (User, error)
	// passwordHash fails with errNotFound.
	passwordHash(ctx context.Context, id int64) (string, error)
	// rehashPassword stores another hash of the same password, if old is still there. That
	// is no change of the user, and makes no event.
	rehashPassword(ctx context.Context, id int64, old, hash string) error
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
	errReferenced      = errors.New("user referenced by other data")
	errRefused         = errors.New("change refused by a rule of the database")
	errUnavailable     = errors.New("store unavailable, nothing changed")
	errOutcomeUnknown  = errors.New("store lost, outcome unknown")
)

// api has the handlers of /users.
type api struct {
	store         userStore
	hasher        *hasher
	log           *slog.Logger
	fields        map[string]fieldRule
	verifications *limiter[int64] // of a user's password
	creating      sync.Map        // the idempotency keys of requests under way
}

// fieldRule returns a field's text as it is taken, or says what is wrong with it.
type fieldRule func(text string) (string, error)

// creationBudget is the time that the store has for the statements of a creation together.
const creationBudget = 4500 * time.Millisecond

// guesses is how many passwords may be tried on a user within a minute.
const guesses = 10

func newAPI(store userStore, s settings, t *traffic, log *slog.Logger) *api {
	return &api{
		store:  store,
		hasher: newHasher(t),
		log:    log,
		fields: map[string]fieldRule{"name": checkName, "surname": checkName,
			"password": newPasswordRule(s.passwordMinLength, s.passwordBlocklist)},
		verifications: newLimiter[int64]("password", guesses/60.0, guesses),
	}
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
	fields, err := readFields(w, r, a.fields, []string{"name", "surname", "password"},
		"application/json")
	if err != nil {
		return err
	}
	key, err := idempotencyKey(r.Header, w.(*response).key)
	if err != nil {
		return err
	}
	u, err := a.createOnce(r.Context(), w.Header(), inputOf(fields), key)
	if err != nil {
		return err
	}
	w.Header().Set("Location", fmt.Sprintf("/users/%d", u.ID))
	return writeUser(w, http.StatusCreated, u)
}

// createOnce creates a user, or returns the one that was created under the key before. h is the
// header of the answer.
func (a *api) createOnce(ctx context.Context, h http.Header, in userInput, key string) (User, error) {
	budget, cancel := context.WithTimeout(ctx, creationBudget)
	defer cancel()
	if key != "" {
		if _, running := a.creating.LoadOrStore(key, true); running {
			return User{}, newProblem(http.StatusConflict,
				"A request with this Idempotency-Key is still running")
		}
		defer a.creating.Delete(key)
		u, err := a.replay(ctx, budget, h, in, key)
		if !errors.Is(err, errNotFound) {
			return u, err
		}
	}
	hashed := in
	if err := a.hashPassword(ctx, &hashed); err != nil {
		return User{}, err
	}
	u, err := a.store.createUser(budget, hashed, key)
	if errors.Is(err, errKeyUsed) { // another replica was faster
		return a.replay(ctx, budget, h, in, key)
	}
	return u, err
}

// replay returns the user that was created under the key, if in is what created it. Because the
// answer tells whether the password is the same, it costs one of the user's tries.
func (a *api) replay(ctx, budget context.Context, h http.Header, in userInput, key string) (User, error) {
	u, hash, err := a.store.creationUnder(budget, key)
	if err != nil {
		return User{}, err
	}
	if err := a.verifications.admit(h, u.ID); err != nil {
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
	fields, err := readFields(w, r, a.fields, nil, mediaTypes...)
	if err != nil {
		return err
	}
	in := inputOf(fields)
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

// anyPassword is the body of a verification: the rules of today are not those of all times.
var anyPassword = map[string]fieldRule{"password": newPasswordRule(1, false)}

// verifyPassword takes the same time for a user who does not exist.
func (a *api) verifyPassword(w http.ResponseWriter, r *http.Request) error {
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
	valid, err := a.verify(r.Context(), id, fields["password"])
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, map[string]bool{"valid": valid})
}

func (a *api) verify(ctx context.Context, id int64, password string) (bool, error) {
	hash, err := a.store.passwordHash(ctx, id)
	if errors.Is(err, errNotFound) {
		return a.hasher.verify(ctx, password, decoyHash)
	}
	if err != nil {
		return false, err
	}
	valid, err := a.hasher.verify(ctx, password, hash)
	if errors.Is(err, errHash) {
		a.log.WarnContext(ctx, "Password cannot be verified", "user_id", id, "error", err)
		return a.hasher.verify(ctx, password, decoyHash)
	}
	if valid && isOutdated(hash) {
		a.rehash(ctx, id, hash, password)
	}
	return valid, err
}

// rehash replaces a hash that was made with other parameters. It may fail: there is a next time.
func (a *api) rehash(ctx context.Context, id int64, old, password string) {
	hash, err := a.hasher.hash(ctx, password)
	if err == nil {
		err = a.store.rehashPassword(ctx, id, old, hash)
	}
	if err != nil {
		a.log.WarnContext(ctx, "Password was not hashed again", "user_id", id, "error", err)
	}
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

// readFields reads the string members of a body by their rules. Its errors are those of
// readBody and one 400 that names every wrong member.
func readFields(w http.ResponseWriter, r *http.Request, rules map[string]fieldRule,
	required []string, mediaTypes ...string) (map[string]string, error) {
	body, err := readBody(w, r, mediaTypes...)
	if err != nil {
		return nil, err
	}
	members, err := parseObject(body)
	if err != nil {
		return nil, err
	}
	known := strings.Join(slices.Sorted(maps.Keys(rules)), ", ")
	if len(members) == 0 && len(required) == 0 {
		return nil, newProblem(http.StatusBadRequest, "The body must have at least one of "+known)
	}
	fields := make(map[string]string)
	var wrong []fieldError
	fail := func(name, detail string) {
		wrong = append(wrong, fieldError{Pointer: pointer(name), Detail: detail})
	}
	for _, m := range members {
		rule, ok := rules[m.name]
		if !ok {
			fail(m.name, "is not a known field: those are "+known)
			continue
		}
		if _, again := fields[m.name]; again {
			fail(m.name, "is given more than once")
			continue
		}
		text, err := parseString(m.value)
		if err == nil {
			text, err = rule(text)
		}
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
	if len(wrong) > 0 {
		return nil, invalid("field", wrong)
	}
	return fields, nil
}

func inputOf(fields map[string]string) userInput {
	field := func(name string) *string {
		if text, ok := fields[name]; ok {
			return &text
		}
		return nil
	}
	return userInput{name: field("name"), surname: field("surname"), password: field("password")}
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

// hashPassword replaces the password of in, if there is one, by its hash.
func (a *api) hashPassword(ctx context.Context, in *userInput) error {
	if in.password == nil {
		return nil
	}
	hash, err := a.hasher.hash(ctx, *in.password)
	in.password = &hash
	return err
}
