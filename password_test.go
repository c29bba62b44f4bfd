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

var phcFormat = regexp.MustCompile(
	`^\$argon2id\$v=19\$m=7168,t=5,p=1\$([A-Za-z0-9+/]{22})\$([A-Za-z0-9+/]{43})$`)

// verifies says whether hash is the PHC string of exactly these bytes.
func verifies(t *testing.T, hash, password string) bool {
	t.Helper()
	fields := phcFormat.FindStringSubmatch(hash)
	if fields == nil {
		t.Fatalf("no PHC string: %s", hash)
	}
	salt, err := base64.RawStdEncoding.Strict().DecodeString(fields[1])
	if err != nil || len(salt) != 16 {
		t.Fatalf("the salt has %d bytes: %v", len(salt), err)
	}
	key := argon2.IDKey([]byte(password), salt, 5, 7168, 1, 32)
	return fields[2] == base64.RawStdEncoding.EncodeToString(key)
}

func newTestHasher() *hasher { return &hasher{newHashLanes(testLimits, &traffic{})} }

func mustHash(t *testing.T, password string) string {
	t.Helper()
	hash, err := newTestHasher().hash(t.Context(), password)
	if err != nil {
		t.Fatal(err)
	}
	return hash
}

func TestPasswordRules(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		password string
		accepted bool
	}{
		"8 characters":                   {"8letters", true},
		"8 characters of four bytes":     {strings.Repeat("😀", 8), true},
		"8 code points of 4 letters":     {strings.Repeat("e\u0301", 4), true},
		"128 characters":                 {strings.Repeat("x", 128), true},
		"128 characters of four bytes":   {strings.Repeat("😀", 128), true},
		"8 spaces":                       {"        ", true},
		"spaces that belong to it":       {" 6chars ", true},
		"control characters":             {"\x01\t\n\x1b\x7f\u0085\u009f\u2028", true},
		"7 characters":                   {"7letter", false},
		"7 characters of four bytes":     {strings.Repeat("😀", 7), false},
		"129 characters":                 {strings.Repeat("x", 129), false},
		"129 characters of four bytes":   {strings.Repeat("😀", 129), false},
		"129 with a space at the end":    {strings.Repeat("x", 128) + " ", false},
		"130 code points of 65 letters":  {strings.Repeat("e\u0301", 65), false},
		"empty":                          {"", false},
		"NUL":                            {"8letters\x00", false},
		"a NUL between other characters": {secret + "\x00" + secret, false},
	}
	eachStore(t, func(t *testing.T, s *service) {
		s.createUser("John", "Doe")
		for what, test := range tests {
			a := s.do("PATCH", "/users/1", `{"password": `+quote(test.password)+`}`)
			if !test.accepted {
				checkBadRequest(t, what, a, "#/password")
			} else if a.status != http.StatusOK {
				t.Errorf("%s: %d %s", what, a.status, a.body)
			}
		}
	})
}

func TestPasswordMinLength(t *testing.T) {
	t.Parallel()
	settings := memorySettings()
	settings.passwordMinLength = 12
	s := startService(t, settings)
	for password, want := range map[string]int{
		"11 letters.":  http.StatusBadRequest,
		"12 letters..": http.StatusCreated,
	} {
		a := s.do("POST", "/users", `{"name": "John", "surname": "Doe", "password": "`+password+`"}`)
		if a.status != want {
			t.Errorf("%q: %d %s", password, a.status, a.body)
		}
	}
}

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
			t.Errorf("%q: %d %s", password, a.status, a.body)
		}
	}
	open := startService(t, memorySettings())
	if a := open.do("POST", "/users", `{"name": "Ann", "surname": "Lee", "password": "password"}`); a.status != 201 {
		t.Errorf("without the list: %d", a.status)
	}
	for password := range strings.Lines(commonPasswords) {
		if trimmed := strings.TrimSpace(password); trimmed != strings.ToLower(trimmed) || trimmed+"\n" != password {
			t.Errorf("%q is not a password in lower case", password)
		}
	}
}

func TestPasswordHash(t *testing.T) {
	t.Parallel()
	const composed, decomposed = "caf\u00e9 " + secret, "cafe\u0301 " + secret
	for name, test := range map[string]struct {
		password, verified string
		want               bool
	}{
		"the same":         {secret, secret, true},
		"another":          {secret, secret + "!", false},
		"another case":     {secret, strings.ToUpper(secret), false},
		"white space":      {" " + secret + " ", secret, false},
		"composed":         {composed, composed, true},
		"decomposed":       {decomposed, composed, true},
		"not decomposed":   {composed, decomposed, false},
		"compatible (NFC)": {"\ufb01" + secret, "fi" + secret, false},
		"128 characters":   {strings.Repeat("𝄞", 128), strings.Repeat("𝄞", 128), true},
	} {
		if got := verifies(t, mustHash(t, test.password), test.verified); got != test.want {
			t.Errorf("%s: verifies %v", name, got)
		}
	}
	if first, second := mustHash(t, secret), mustHash(t, secret); first == second {
		t.Error("two hashes have the same salt")
	}
}

// TestPasswordIsStoredHashed follows a password from the request to the row.
func TestPasswordIsStoredHashed(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	conn := connect(t, s.settings.databaseURL)
	stored := func() string { return queryValue[string](t, conn, "SELECT password FROM users") }
	s.createUser("John", "Doe")
	if !verifies(t, stored(), secret) {
		t.Error("POST stored another password")
	}
	s.do("PATCH", "/users/1", `{"password": " e\u0301 `+secret+`"}`)
	if !verifies(t, stored(), " é "+secret) {
		t.Error("PATCH stored another password")
	}
}

// TestPasswordIsTakenAsReceived sends what a careless service would trim, fold or drop.
func TestPasswordIsTakenAsReceived(t *testing.T) {
	t.Parallel()
	s := startService(t, postgresSettings(t))
	conn := connect(t, s.settings.databaseURL)
	password := " \u3000\u0130" + strings.ToUpper(secret) + "\x1b\u0085 "
	for _, target := range []string{"POST /users", "PUT /users/1", "PATCH /users/1"} {
		method, path, _ := strings.Cut(target, " ")
		body := `{"name": "John", "surname": "Doe", "password": ` + quote(password) + `}`
		if a := s.do(method, path, body); a.status/100 != 2 {
			t.Fatalf("%s: %d %s", target, a.status, a.body)
		}
		stored := queryValue[string](t, conn, "SELECT password FROM users")
		if !verifies(t, stored, password) {
			t.Errorf("%s stored another password", target)
		}
		password += target // so that the next is another
	}
}

// FuzzPHC holds parsePHC against scanPHC, which spells a string again to see whether it is
// the one spelling. What is refused must not be computed.
func FuzzPHC(f *testing.F) {
	const salt, key = "c2FsdHNhbHRzYWx0c2FsdA", "a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2V5a2U"
	const head = "$argon2id$v=19$"
	for _, phc := range []string{
		head + "m=12288,t=3,p=1$" + salt + "$" + key,
		head + "m=8,t=1,p=1$c2FsdHNhbHQ$a2V5cw", // the least
		head + "m=65536,t=10,p=99$" + strings.Repeat("A", 86) + "$" + strings.Repeat("A", 86),
		head + "m=65537,t=3,p=1$" + salt + "$" + key,
		head + "m=12288,t=11,p=1$" + salt + "$" + key,
		head + "m=15,t=1,p=2$" + salt + "$" + key,
		head + "m=12288,t=0,p=0$" + salt + "$" + key,
		head + "m=012288,t=03,p=1$" + salt + "$" + key,
		head + "m=4294979584,t=3,p=257$" + salt + "$" + key, // 12288 and 1, in few bits
		head + "m=12288,t=3,p=1$" + salt + "$",
		head + "m=12288,t=3,p=1$" + salt + "$AA",
		head + "m=12288,t=3,p=1$" + salt[:21] + "B$" + key, // bits that no byte has
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
			t.Fatalf("%q is %+v (%v), not %+v", phc, got, err, want)
		}
		if err != nil {
			h := &hasher{} // whose do has no place for anybody
			same, got := h.verify(t.Context(), secret, phc)
			if same || fmt.Sprint(got) != err.Error() {
				t.Errorf("%q: verify is %t, %v, not %v", phc, same, got, err)
			}
		}
	})
}

// scanPHC is false for what argon2 does not allow, and for what would cost too much.
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
