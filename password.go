package main

// This file owns passwords: the rules for new ones, argon2id hashes, and the verification of these
// and of other systems' hashes.

import (
	"context"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"
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
)

const maxPasswordLength = 128 // code points

//go:embed assets/passwords.txt
var commonPasswords string

// newPasswordRule returns the rule for passwords of at least minLength code points. If blocklist is
// set, it refuses the most common passwords, in any case.
func newPasswordRule(minLength int, blocklist bool) func(text string) (string, error) {
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

// hasher hashes and verifies passwords when hashLanes allow it: each takes a core and 7 MiB, or
// what passwordFormats allow for a hash of another system.
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
	return h.cost.hash(password), nil
}

// hash returns the PHC string of the NFC form of a password.
func (c argonCost) hash(password string) string {
	salt := make([]byte, argonSalt)
	rand.Read(salt) // never fails, see its documentation
	key := argon2.IDKey(norm.NFC.Bytes([]byte(password)), salt,
		c.passes, c.memory, argonThreads, argonKey)
	return c.prefix() + base64.RawStdEncoding.EncodeToString(salt) + "$" +
		base64.RawStdEncoding.EncodeToString(key)
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

// needsRehash reports whether old has another format or other parameters than a new hash.
func (h *hasher) needsRehash(old string) bool { return !strings.HasPrefix(old, h.cost.prefix()) }

// errHash reports a stored hash that is malformed or too expensive to verify.
var errHash = errors.New("the stored hash is malformed or too expensive to verify")

// passwordFormat is a way to write hashes that match pattern.
type passwordFormat struct {
	name    string
	pattern *regexp.Regexp
	bounds  []bound
	// parse takes the groups of pattern. It returns the values that bounds limit, and the check,
	// which may be called only if they are within the bounds.
	parse func(groups []string) ([]int, passwordCheck)
}

// bound limits a parameter of a hash, or the length of a part in bytes.
type bound struct {
	name     string
	min, max int
}

// passwordCheck reports whether a hash is that of password, byte by byte.
type passwordCheck func(password string) bool

// passwordFormats lists the hashes that can be verified. docs/takeover.md has the same table.
var passwordFormats = []passwordFormat{
	{"argon2id", regexp.MustCompile(`^\$argon2id\$v=19\$m=([1-9]\d*),t=([1-9]\d*),p=([1-9]\d*)` +
		`\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)$`), []bound{
		{"KiB of memory", 8, 64 << 10}, {"KiB per thread", 8, 64 << 10}, // RFC 9106, section 3.1
		{"threads", 1, 99}, {"passes", 1, 10}, {"salt", 8, 64}, {"key", 4, 64},
	}, parseArgon2id},
	{"bcrypt", regexp.MustCompile(`^\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}$`),
		[]bound{{"cost", 4, 14}}, parseBcrypt},
	pbkdf2Format("pbkdf2-sha256", sha256.New),
	pbkdf2Format("pbkdf2-sha512", sha512.New),
	pbkdf2Format("pbkdf2_sha256", sha256.New),
	pbkdf2Format("pbkdf2_sha512", sha512.New),
}

// parseHash returns the check of a stored hash. It computes nothing, and fails with errHash unless
// the hash is in one of passwordFormats and within its bounds.
func parseHash(text string) (passwordCheck, error) {
	for _, f := range passwordFormats {
		groups := f.pattern.FindStringSubmatch(text)
		if groups == nil {
			continue
		}
		values, check := f.parse(groups)
		for i, b := range f.bounds {
			if values[i] < b.min || values[i] > b.max {
				return nil, errHash
			}
		}
		return check, nil
	}
	return nil, errHash
}

// parseArgon2id parses a PHC string.
func parseArgon2id(groups []string) ([]int, passwordCheck) {
	memory, passes, threads := atoi(groups[1]), atoi(groups[2]), atoi(groups[3])
	salt, key := decode(base64.RawStdEncoding, groups[4]), decode(base64.RawStdEncoding, groups[5])
	values := []int{memory, memory / threads, threads, passes, len(salt), len(key)}
	return values, func(password string) bool {
		got := argon2.IDKey([]byte(password), salt, uint32(passes), // #nosec G115 -- within bounds
			uint32(memory), uint8(threads), uint32(len(key))) // #nosec G115 -- within bounds
		return subtle.ConstantTimeCompare(got, key) == 1
	}
}

// parseBcrypt parses a string of crypt(3). Only the first 72 bytes of a password count.
func parseBcrypt(groups []string) ([]int, passwordCheck) {
	return []int{atoi(groups[1])}, func(password string) bool {
		return bcrypt.CompareHashAndPassword([]byte(groups[0]), []byte(password)) == nil
	}
}

// pbkdf2Format returns the format with the given name: Django's if it has an underscore, otherwise
// that of PHC strings, in which passlib omits "i=" and writes "." for "+". A key longer than the
// digest would multiply the cost.
func pbkdf2Format(name string, digest func() hash.Hash) passwordFormat {
	pattern, encoding := `^\$`+name+`\$(?:i=)?([1-9]\d*)(?:,l=(\d+))?`+
		`\$([A-Za-z0-9+/.]+)\$([A-Za-z0-9+/.]+)$`, base64.RawStdEncoding
	django := strings.Contains(name, "_")
	if django {
		pattern = `^` + name + `\$([1-9]\d*)()\$([!-#%-~]+)\$([A-Za-z0-9+/=]+)$`
		encoding = base64.StdEncoding
	}
	bounds := []bound{{"rounds", 1, 5_000_000}, {"salt", 1, 64}, {"key", 16, digest().Size()}}
	parse := func(groups []string) ([]int, passwordCheck) {
		rounds, salt, key := atoi(groups[1]), []byte(groups[3]), decode(encoding, groups[4])
		if !django {
			salt = decode(encoding, groups[3])
		}
		if groups[2] != "" && groups[2] != strconv.Itoa(len(key)) {
			key = nil // below its bound
		}
		return []int{rounds, len(salt), len(key)}, func(password string) bool {
			got, err := pbkdf2.Key(digest, password, salt, rounds, len(key))
			return err == nil && subtle.ConstantTimeCompare(got, key) == 1
		}
	}
	return passwordFormat{name, regexp.MustCompile(pattern), bounds, parse}
}

// atoi returns the value of decimal digits, or the largest int if they overflow.
func atoi(digits string) int {
	n, _ := strconv.Atoi(digits)
	return n
}

// decode returns nil if text is not the canonical form of any bytes, in base64 with "+" or ".".
func decode(encoding *base64.Encoding, text string) []byte {
	decoded, err := encoding.Strict().DecodeString(strings.ReplaceAll(text, ".", "+"))
	if err != nil {
		return nil
	}
	return decoded
}

// matches applies the check to the NFC form of a password, as our hashes are, and to the password as
// received, as those of other systems may be.
func (c passwordCheck) matches(password string) bool {
	nfc := norm.NFC.String(password)
	return c(nfc) || nfc != password && c(password)
}

// verify reports whether stored is a hash of password. It fails with errHash before it computes
// anything, and with the errors of hash.
func (h *hasher) verify(ctx context.Context, client, password, stored string) (bool, error) {
	check, err := parseHash(stored)
	if err != nil {
		return false, err
	}
	leave, err := h.lanes.enter(ctx, client)
	if err != nil {
		return false, err
	}
	defer leave()
	return check.matches(password), nil
}
