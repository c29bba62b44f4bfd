package main

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/crypto/argon2"
)

// phcFormat matches new hashes. Its groups are the salt and the key.
var phcFormat = regexp.MustCompile(
	`^\$argon2id\$v=19\$m=7168,t=5,p=1\$([A-Za-z0-9+/]{22})\$([A-Za-z0-9+/]{43})$`)

// verifies reports whether hash is the PHC string of exactly these bytes.
func verifies(t *testing.T, hash, password string) bool {
	t.Helper()
	fields := phcFormat.FindStringSubmatch(hash)
	if fields == nil {
		t.Fatalf("the hash is not a PHC string of the current parameters: %s", hash)
	}
	salt, err := base64.RawStdEncoding.Strict().DecodeString(fields[1])
	if err != nil || len(salt) != 16 {
		t.Fatalf("salt of %d bytes, want 16: %v", len(salt), err)
	}
	key := argon2.IDKey([]byte(password), salt, 5, 7168, 1, 32)
	return fields[2] == base64.RawStdEncoding.EncodeToString(key)
}

// newTestHasher returns a hasher with the limits of the tests.
func newTestHasher() *hasher { return &hasher{newHashLanes(testLimits, &traffic{})} }

// mustHash returns a hash of password.
func mustHash(t *testing.T, password string) string {
	t.Helper()
	hash, err := newTestHasher().hash(t.Context(), password)
	if err != nil {
		t.Fatal(err)
	}
	return hash
}

// TestPasswordRules checks the length of passwords, in code points, and the characters in them.
func TestPasswordRules(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		password string
		accepted bool
	}{
		"8 characters":                  {"8letters", true},
		"8 characters of four bytes":    {strings.Repeat("😀", 8), true},
		"8 code points of 4 letters":    {strings.Repeat("e\u0301", 4), true},
		"128 characters":                {strings.Repeat("x", 128), true},
		"128 characters of four bytes":  {strings.Repeat("😀", 128), true},
		"8 spaces":                      {"        ", true},
		"spaces at both ends":           {" 6chars ", true},
		"control characters":            {"\x01\t\n\x1b\x7f\u0085\u009f\u2028", true},
		"7 characters":                  {"7letter", false},
		"7 characters of four bytes":    {strings.Repeat("😀", 7), false},
		"129 characters":                {strings.Repeat("x", 129), false},
		"129 characters of four bytes":  {strings.Repeat("😀", 129), false},
		"128 characters and a space":    {strings.Repeat("x", 128) + " ", false},
		"130 code points of 65 letters": {strings.Repeat("e\u0301", 65), false},
		"empty":                         {"", false},
		"NUL":                           {"8letters\x00", false},
		"NUL between other characters":  {secret + "\x00" + secret, false},
	}
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		for what, test := range tests {
			a := s.do("PATCH", "/users/1", `{"password": `+quote(test.password)+`}`)
			if !test.accepted {
				checkBadRequest(t, what, a, "#/password")
			} else if a.status != http.StatusOK {
				t.Errorf("%s: status %d, want 200: %s", what, a.status, a.body)
			}
		}
	})
}

// TestPasswordMinLength checks that PASSWORD_MIN_LENGTH applies to new passwords.
func TestPasswordMinLength(t *testing.T) {
	t.Parallel()
	settings := memorySettings()
	settings.passwordMinLength = 12
	s := startService(t, settings)
	for password, want := range map[string]int{
		"11 letters.":  http.StatusBadRequest,
		"12 letters..": http.StatusCreated,
	} {
		body := fmt.Sprintf(`{"name": "John", "surname": "Doe", "password": %q}`, password)
		a := s.do("POST", "/users", body)
		if a.status != want {
			t.Errorf("password %q: status %d, want %d: %s", password, a.status, want, a.body)
		}
	}
}

// TestPasswordBlocklist checks that PASSWORD_BLOCKLIST=on refuses common passwords in any case,
// that they are accepted by default, and that the list is in lower case.
func TestPasswordBlocklist(t *testing.T) {
	t.Parallel()
	set := memorySettings()
	set.passwordBlocklist = true
	s := startService(t, set)
	for password, want := range map[string]int{
		"password": 400, "PassWord": 400, "1q2w3e4r": 400, "iloveyou": 400,
		"password ": 201, secret: 201,
	} {
		body := fmt.Sprintf(`{"name": "Ann", "surname": "Lee", "password": %q}`, password)
		a := s.do("POST", "/users", body)
		if a.status != want || (want == 400) != strings.Contains(a.body, "one of the most common") {
			t.Errorf("password %q: status %d, want %d: %s", password, a.status, want, a.body)
		}
	}
	open := startService(t, memorySettings())
	a := open.do("POST", "/users", `{"name": "Ann", "surname": "Lee", "password": "password"}`)
	if a.status != 201 {
		t.Errorf("without the list: status %d, want 201: %s", a.status, a.body)
	}
	for password := range strings.Lines(commonPasswords) {
		trimmed := strings.TrimSpace(password)
		if trimmed != strings.ToLower(trimmed) || trimmed+"\n" != password {
			t.Errorf("the line %q of the list is not a password in lower case", password)
		}
	}
}

// TestVerify checks that verify accepts the hashed password only, and refuses hashes that are malformed or
// too expensive.
func TestVerify(t *testing.T) {
	t.Parallel()
	h := newTestHasher()
	phc := mustHash(t, secret)
	for password, want := range map[string]bool{secret: true, secret + "!": false, "": false} {
		if got, err := h.verify(t.Context(), password, phc); got != want || err != nil {
			t.Errorf("verify(%q): got %t, %v, want %t", password, got, err, want)
		}
	}
	for _, bad := range []string{
		"", "hash", strings.Replace(phc, "argon2id", "argon2i", 1),
		strings.Replace(phc, "m=7168", "m=65537", 1), strings.Replace(phc, "m=7168", "m=4294967295", 1),
		strings.Replace(phc, "t=5", "t=11", 1), strings.Replace(phc, "t=5", "t=0", 1),
		strings.Replace(phc, "p=1", "p=0", 1), phc + strings.Repeat("A", 100),
	} {
		if same, err := h.verify(t.Context(), secret, bad); same || err == nil {
			t.Errorf("verify with the hash %q: got %t, %v, want an error", bad, same, err)
		}
	}
}

// TestPasswordHash checks which bytes a hash verifies: those of the NFC form of the password. Each
// hash has a salt of its own.
func TestPasswordHash(t *testing.T) {
	t.Parallel()
	const composed, decomposed = "caf\u00e9 " + secret, "cafe\u0301 " + secret
	for name, test := range map[string]struct {
		password, verified string
		want               bool
	}{
		"same password":      {secret, secret, true},
		"other password":     {secret, secret + "!", false},
		"other case":         {secret, strings.ToUpper(secret), false},
		"white space":        {" " + secret + " ", secret, false},
		"composed":           {composed, composed, true},
		"decomposed":         {decomposed, composed, true},
		"not decomposed":     {composed, decomposed, false},
		"compatibility form": {"\ufb01" + secret, "fi" + secret, false},
		"128 characters":     {strings.Repeat("𝄞", 128), strings.Repeat("𝄞", 128), true},
	} {
		if got := verifies(t, mustHash(t, test.password), test.verified); got != test.want {
			t.Errorf("%s: verified %t, want %t", name, got, test.want)
		}
	}
	if first, second := mustHash(t, secret), mustHash(t, secret); first == second {
		t.Error("two hashes of one password are equal")
	}
}

// TestPasswordIsStoredHashed checks that the row of a user has the hash of the password in NFC.
func TestPasswordIsStoredHashed(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	conn := connect(t, s.settings.databaseURL)
	stored := func() string { return queryValue[string](t, conn, "SELECT password FROM users") }
	s.createUser("John", "Doe")
	if !verifies(t, stored(), secret) {
		t.Error("the hash after POST does not verify the password")
	}
	s.do("PATCH", "/users/1", `{"password": " e\u0301 `+secret+`"}`)
	if !verifies(t, stored(), " é "+secret) {
		t.Error("the hash after PATCH does not verify the password")
	}
}

// TestPasswordIsNotTrimmed checks that white space, upper case and control characters of a password
// are part of it.
func TestPasswordIsNotTrimmed(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	conn := connect(t, s.settings.databaseURL)
	password := " \u3000\u0130" + strings.ToUpper(secret) + "\x1b\u0085 "
	for _, target := range []string{"POST /users", "PUT /users/1", "PATCH /users/1"} {
		method, path, _ := strings.Cut(target, " ")
		body := `{"name": "John", "surname": "Doe", "password": ` + quote(password) + `}`
		if a := s.do(method, path, body); a.status/100 != 2 {
			t.Fatalf("%s: status %d, want 200 or 201: %s", target, a.status, a.body)
		}
		stored := queryValue[string](t, conn, "SELECT password FROM users")
		if !verifies(t, stored, password) {
			t.Errorf("the hash after %s does not verify the password", target)
		}
		password += target // a new password for the next request
	}
}

// FuzzPHC compares parsePHC with scanPHC, a second implementation. It also checks that a hash that
// parsePHC refuses is not computed.
func FuzzPHC(f *testing.F) {
	const salt, key = "c2FsdHNhbHRzYWx0c2FsdA", "a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2U"
	const head = "$argon2id$v=19$"
	for _, phc := range []string{
		head + "m=12288,t=3,p=1$" + salt + "$" + key,
		head + "m=8,t=1,p=1$c2FsdHNhbHQ$a2V5cw", // the minimum
		head + "m=65536,t=10,p=99$" + strings.Repeat("A", 86) + "$" + strings.Repeat("A", 86),
		head + "m=65537,t=3,p=1$" + salt + "$" + key,
		head + "m=12288,t=11,p=1$" + salt + "$" + key,
		head + "m=15,t=1,p=2$" + salt + "$" + key,
		head + "m=12288,t=0,p=0$" + salt + "$" + key,
		head + "m=012288,t=03,p=1$" + salt + "$" + key,
		head + "m=4294979584,t=3,p=257$" + salt + "$" + key, // 12288 and 1 after an overflow
		head + "m=12288,t=3,p=1$" + salt + "$",
		head + "m=12288,t=3,p=1$" + salt + "$AA",
		head + "m=12288,t=3,p=1$" + salt[:21] + "B$" + key, // bits beyond the last byte
		head + "m=12288,t=3,p=1$" + salt + "$" + key[:42] + "V",
		head + "m=12288,t=3,p=1$" + salt + "$" + key + "=",
		head + "m=12288,t=3,p=1$" + salt + "$" + key + "\n",
		head + "m=12288,t=3,p=1$" + salt + "$" + strings.Repeat("A", 87),
		strings.Replace(head, "19", "16", 1) + "m=12288,t=3,p=1$" + salt + "$" + key,
		strings.Replace(head, "2id", "2i", 1) + "m=12288,t=3,p=1$" + salt + "$" + key,
		"", "$$$$$",
	} {
		f.Add(phc)
	}
	f.Fuzz(func(t *testing.T, phc string) {
		got, err := parsePHC(phc)
		want, ok := scanPHC(phc)
		if (err == nil) != ok || !reflect.DeepEqual(got, want) {
			t.Fatalf("parsePHC(%q) = %+v, %v, want %+v, %t", phc, got, err, want, ok)
		}
		if err != nil {
			h := &hasher{} // panics if it computes
			same, got := h.verify(t.Context(), secret, phc)
			if same || fmt.Sprint(got) != err.Error() {
				t.Errorf("verify with %q = %t, %v, want false, %v", phc, same, got, err)
			}
		}
	})
}

// scanPHC parses a PHC string by formatting the parsed parameters and comparing the result with it.
// ok is false if argon2 does not allow the parameters or if they are too expensive.
func scanPHC(phc string) (h argonHash, ok bool) {
	fields := strings.Split(phc, "$")
	if len(fields) != 6 {
		return argonHash{}, false
	}
	fmt.Sscanf(fields[3], "m=%d,t=%d,p=%d", &h.memory, &h.passes, &h.threads)
	h.salt, _ = base64.RawStdEncoding.DecodeString(fields[4])
	h.key, _ = base64.RawStdEncoding.DecodeString(fields[5])
	again := fmt.Sprintf("$argon2id$v=19$m=%d,t=%d,p=%d$%s$%s", h.memory, h.passes, h.threads,
		base64.RawStdEncoding.EncodeToString(h.salt), base64.RawStdEncoding.EncodeToString(h.key))
	if again != phc || h.passes < 1 || h.passes > 10 || h.threads < 1 || h.threads > 99 ||
		h.memory < 8*uint32(h.threads) || h.memory > 64*1024 ||
		len(h.salt) < 8 || len(h.salt) > 64 || len(h.key) < 4 || len(h.key) > 64 {
		return argonHash{}, false
	}
	return h, true
}
