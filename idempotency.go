package main

// This file owns Idempotency-Key: the header, what a repeated POST answers, and how long a key
// lives. Both stores keep a key together with the user that was created under it.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"time"
)

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
	if by.name != "" {
		key = by.name + "\t" + key
	}
	return key, nil
}

// createOnce creates a user, or returns the user that was created under the same key before. While
// this replica is working on a request with the key, another one is refused with a 409. Two
// replicas may both begin; then the database lets one create, and the other returns its user.
func (a *api) createOnce(ctx context.Context, h http.Header, in userInput, key string) (
	User, error) {
	budget, cancel := context.WithTimeout(ctx, creationBudget)
	defer cancel()
	if key != "" {
		if _, running := a.creating.LoadOrStore(key, true); running {
			return User{}, newProblem(http.StatusConflict,
				"A request with this Idempotency-Key is in progress")
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
	if errors.Is(err, errKeyUsed) { // by another replica in the meantime
		return a.replay(ctx, budget, h, in, key)
	}
	return u, err
}

// replay returns the user that was created under key, if in is the same input. It fails with
// errNotFound, or with a 422 for another input. Because the answer shows whether the password is
// the same, it counts as a verification. ctx is the caller's, budget limits the statements, h is of
// the answer.
func (a *api) replay(ctx, budget context.Context, h http.Header, in userInput, key string) (
	User, error) {
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
