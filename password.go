package main

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

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

	maxArgonMemory = 64 << 10 // KiB, of a stored string
	maxArgonTime   = 10
)

const (
	hashWait  = time.Second // how long a call waits for its turn
	hashQueue = 32          // calls that wait for each one at work, about a second's work
)

const maxPasswordLength = 128 // code points

//go:embed passwords.txt
var commonPasswords string

// newPasswordRule is the rule for passwords of minLength code points or more, which the
// blocklist, if it is on, does not name in lower case.
func newPasswordRule(minLength int, blocklist bool) fieldRule {
	blocked := make(map[string]bool)
	if blocklist {
		for password := range strings.FieldsSeq(commonPasswords) {
			blocked[password] = true
		}
	}
	return func(text string) (string, error) {
		if n := utf8.RuneCountInString(text); n < minLength || n > maxPasswordLength {
			return "", fmt.Errorf("must have %d to %d characters", minLength, maxPasswordLength)
		}
		if blocked[strings.ToLower(text)] {
			return "", errors.New("must not be one of the most common passwords")
		}
		return text, nil
	}
}

// errBusy means that more passwords wait to be hashed than can be within hashWait.
var errBusy = errors.New("too many passwords to hash")

// hasher bounds how many passwords are hashed at once: each takes a core and 12 MiB. While
// other requests come, one core is theirs.
type hasher struct {
	traffic  *traffic
	admitted chan struct{} // holds one token for each call at work or waiting
	working  chan struct{} // holds one token for each call at work
	beside   chan struct{} // holds one token for each call at work that began in mixed traffic
}

// cores is how many threads Go would use by itself.
var cores = runtime.GOMAXPROCS(0)

func newHasher(t *traffic) *hasher {
	return &hasher{
		traffic:  t,
		admitted: make(chan struct{}, cores*(1+hashQueue)),
		working:  make(chan struct{}, cores),
		beside:   make(chan struct{}, max(cores-1, 1)),
	}
}

// do runs f, which hashes, in its turn, and in mixed traffic only where another core is free.
// It fails with errBusy, or with the context's error when the caller leaves before that.
func (h *hasher) do(ctx context.Context, f func()) error {
	select {
	case h.admitted <- struct{}{}:
		defer func() { <-h.admitted }()
	default:
		return errBusy
	}
	timer := time.NewTimer(hashWait)
	defer timer.Stop()
	select {
	case h.working <- struct{}{}:
		defer func() { <-h.working }()
	case <-timer.C:
		return errBusy
	case <-ctx.Done():
		return ctx.Err()
	}
	for h.traffic.mixed() {
		select {
		case h.beside <- struct{}{}:
			defer func() { <-h.beside }()
			f()
			return nil
		case <-time.After(mixedFor / 10): // to look again whether others come
		case <-timer.C:
			return errBusy
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	f()
	return nil
}

// hash returns the PHC string of the NFC form of password. Its errors are those of do.
func (h *hasher) hash(ctx context.Context, password string) (phc string, err error) {
	err = h.do(ctx, func() {
		salt := make([]byte, argonSalt)
		rand.Read(salt) // never fails, says its documentation
		key := argon2.IDKey(norm.NFC.Bytes([]byte(password)), salt,
			argonTime, argonMemory, argonThreads, argonKey)
		phc = phcPrefix + base64.RawStdEncoding.EncodeToString(salt) + "$" +
			base64.RawStdEncoding.EncodeToString(key)
	})
	return phc, err
}

var phcPrefix = fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$",
	argon2.Version, argonMemory, argonTime, argonThreads)

// decoyHash is what no password gives, in the time that one of ours takes.
var decoyHash = phcPrefix + strings.Repeat("A", 22) + "$" + strings.Repeat("A", 43)

// isOutdated says whether phc was made with other parameters than a new one would be.
func isOutdated(phc string) bool { return !strings.HasPrefix(phc, phcPrefix) }

// errHash is a stored string that is not computed.
var errHash = errors.New("the stored string is none that is computed")

// argonHash is what a PHC string of argon2id says.
type argonHash struct {
	memory, passes uint32
	threads        uint8
	salt, key      []byte
}

// The lengths are those of 8 to 64 bytes of salt, and 4 to 64 of key.
var phcPattern = regexp.MustCompile(
	`^\$argon2id\$v=19\$m=([1-9]\d{0,4}),t=([1-9]\d?),p=([1-9]\d?)` +
		`\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{6,86})$`)

// parsePHC fails with errHash for what is not the one spelling of an argon2id hash, or would
// cost more than 64 MiB or ten passes to compute.
func parsePHC(phc string) (argonHash, error) {
	fields := phcPattern.FindStringSubmatch(phc)
	if fields == nil {
		return argonHash{}, errHash
	}
	memory, _ := strconv.ParseUint(fields[1], 10, 32) // digits, says the pattern
	passes, _ := strconv.ParseUint(fields[2], 10, 32)
	threads, _ := strconv.ParseUint(fields[3], 10, 8)
	salt, saltErr := base64.RawStdEncoding.Strict().DecodeString(fields[4])
	key, keyErr := base64.RawStdEncoding.Strict().DecodeString(fields[5])
	if saltErr != nil || keyErr != nil || passes > maxArgonTime ||
		memory > maxArgonMemory || memory < 8*threads { // RFC 9106, section 3.1
		return argonHash{}, errHash
	}
	return argonHash{uint32(memory), uint32(passes), uint8(threads), salt, key}, nil
}

// verify says whether phc was made of password. Its errors are those of parsePHC, where
// nothing is computed, and of do.
func (h *hasher) verify(ctx context.Context, password, phc string) (same bool, err error) {
	want, err := parsePHC(phc)
	if err != nil {
		return false, err
	}
	err = h.do(ctx, func() {
		got := argon2.IDKey(norm.NFC.Bytes([]byte(password)), want.salt,
			want.passes, want.memory, want.threads, uint32(len(want.key))) // #nosec G115 -- at most 64
		same = subtle.ConstantTimeCompare(got, want.key) == 1
	})
	return same, err
}
