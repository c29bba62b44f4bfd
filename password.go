package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/crypto/argon2"
	"golang.org/x/text/unicode/norm"
)

// The parameters of argon2id: within OWASP's password storage cheat sheet.
const (
	argonMemory  = 12288 // KiB
	argonTime    = 3
	argonThreads = 1
	argonSalt    = 16 // bytes
	argonKey     = 32 // bytes
)

const (
	hashWait  = time.Second // how long a call waits for its turn
	hashQueue = 32          // calls that wait for each one at work, about a second's work
)

// errBusy means that more passwords wait to be hashed than can be within hashWait.
var errBusy = errors.New("too many passwords to hash")

// hasher bounds how many passwords are hashed at once: each takes a core and 12 MiB.
type hasher struct {
	admitted chan struct{} // holds one token for each call at work or waiting
	working  chan struct{} // holds one token for each call at work
}

func newHasher() *hasher {
	cores := runtime.GOMAXPROCS(0)
	return &hasher{
		admitted: make(chan struct{}, cores*(1+hashQueue)),
		working:  make(chan struct{}, cores),
	}
}

// hash returns the PHC string of the NFC form of password. It fails with errBusy, or with
// the context's error when the caller leaves before its turn.
func (h *hasher) hash(ctx context.Context, password string) (string, error) {
	select {
	case h.admitted <- struct{}{}:
		defer func() { <-h.admitted }()
	default:
		return "", errBusy
	}
	timer := time.NewTimer(hashWait)
	defer timer.Stop()
	select {
	case h.working <- struct{}{}:
		defer func() { <-h.working }()
	case <-timer.C:
		return "", errBusy
	case <-ctx.Done():
		return "", ctx.Err()
	}
	return hashPassword(password), nil
}

func hashPassword(password string) string {
	salt := make([]byte, argonSalt)
	rand.Read(salt) // never fails, says its documentation
	key := argon2.IDKey(norm.NFC.Bytes([]byte(password)), salt,
		argonTime, argonMemory, argonThreads, argonKey)
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version,
		argonMemory, argonTime, argonThreads,
		base64.RawStdEncoding.EncodeToString(salt), base64.RawStdEncoding.EncodeToString(key))
}
