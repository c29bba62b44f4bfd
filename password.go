package main

// This file owns passwords: the rules for new ones, argon2id hashes, and their verification.

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"
	"golang.org/x/text/unicode/norm"
)

// argonCost is the memory in KiB, and the passes, that a new hash takes.
type argonCost struct{ memory, passes uint32 }

// newHashCost is the cheapest of the pairs that OWASP's password storage cheat sheet lists as
// equally strong.
var newHashCost = argonCost{memory: hashMemory >> 10, passes: 5}

// The other parameters of argon2id.
const (
	argonThreads = 1
	argonSalt    = 16 // bytes
	argonKey     = 32 // bytes

	maxArgonMemory = 64 << 10 // KiB, of a stored hash
	maxArgonTime   = 10
)

const maxPasswordLength = 128 // code points

//go:embed assets/passwords.txt
var commonPasswords string

// newPasswordRule returns the rule for passwords of at least minLength code points. If blocklist is
// set, it refuses the most common passwords, in any case.
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

// hasher hashes and verifies passwords when hashLanes allow it: each takes a core and 7 MiB.
type hasher struct {
	lanes *hashLanes
	cost  argonCost // of new hashes
}

// hash returns the PHC string of the NFC form of a client's password. It fails with errBusy, or with
// the error of ctx if the caller leaves before its turn.
func (h *hasher) hash(ctx context.Context, client, password string) (phc string, err error) {
	leave, err := h.lanes.enter(ctx, client)
	if err != nil {
		return "", err
	}
	defer leave()
	salt := make([]byte, argonSalt)
	rand.Read(salt) // never fails, see its documentation
	key := argon2.IDKey(norm.NFC.Bytes([]byte(password)), salt,
		h.cost.passes, h.cost.memory, argonThreads, argonKey)
	return h.cost.prefix() + base64.RawStdEncoding.EncodeToString(salt) + "$" +
		base64.RawStdEncoding.EncodeToString(key), nil
}

// prefix returns the part of a PHC string that comes before the salt.
func (c argonCost) prefix() string {
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$",
		argon2.Version, c.memory, c.passes, argonThreads)
}

// decoy returns a hash that matches no password and takes as long to verify as a new hash.
func (h *hasher) decoy() string {
	return h.cost.prefix() + strings.Repeat("A", 22) + "$" + strings.Repeat("A", 43)
}

// needsRehash reports whether phc has other parameters than a new hash.
func (h *hasher) needsRehash(phc string) bool { return !strings.HasPrefix(phc, h.cost.prefix()) }

// errHash reports a stored hash that is malformed or too expensive to verify.
var errHash = errors.New("the stored hash is malformed or too expensive to verify")

// argonHash is a parsed PHC string of argon2id.
type argonHash struct {
	memory, passes uint32
	threads        uint8
	salt, key      []byte
}

// phcPattern matches salts of 8 to 64 bytes and keys of 4 to 64 bytes.
var phcPattern = regexp.MustCompile(
	`^\$argon2id\$v=19\$m=([1-9]\d{0,4}),t=([1-9]\d?),p=([1-9]\d?)` +
		`\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{6,86})$`)

// parsePHC fails with errHash unless phc is the canonical form of an argon2id hash that takes at
// most 64 MiB and ten passes.
func parsePHC(phc string) (argonHash, error) {
	fields := phcPattern.FindStringSubmatch(phc)
	if fields == nil {
		return argonHash{}, errHash
	}
	memory, _ := strconv.ParseUint(fields[1], 10, 32) // the pattern allows digits only
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

// verify reports whether phc is a hash of password. It fails with errHash before it computes
// anything, and with the errors of hash.
func (h *hasher) verify(ctx context.Context, client, password, phc string) (bool, error) {
	want, err := parsePHC(phc)
	if err != nil {
		return false, err
	}
	leave, err := h.lanes.enter(ctx, client)
	if err != nil {
		return false, err
	}
	defer leave()
	got := argon2.IDKey(norm.NFC.Bytes([]byte(password)), want.salt,
		want.passes, want.memory, want.threads, uint32(len(want.key))) // #nosec G115 -- at most 64
	return subtle.ConstantTimeCompare(got, want.key) == 1, nil
}
