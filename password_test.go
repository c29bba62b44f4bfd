package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

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

// TestHashLanesLimit counts how many passwords may be hashed at the same time, alone and in mixed traffic.
func TestHashLanesLimit(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ cores, alone, mixed int }{
		{1, 1, 1}, {2, 2, 1}, {3, 3, 2}, {8, 8, 7},
	} {
		for _, mixed := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				l := newLimits(test.cores, math.MaxInt64)
				h := newHashLanes(l, &traffic{})
				want := test.alone
				if mixed {
					want = test.mixed
					h.traffic.otherDone.Store(time.Now().UnixNano())
				}
				working := 0
				for range l.hashQueue {
					go func() {
						if leave, err := h.enter(context.Background()); err == nil {
							working++
							time.Sleep(time.Hour)
							leave()
						}
					}()
				}
				synctest.Wait()
				if working != want {
					t.Errorf("%d cores, mixed %t: %d at the same time, not %d", test.cores, mixed, working, want)
				}
				if _, err := h.enter(t.Context()); !errors.Is(err, errBusy) {
					t.Errorf("%d cores: a password beyond the queue: %v", test.cores, err)
				}
				time.Sleep(2 * time.Hour)
				if !h.queue.TryAcquire(int64(l.hashQueue)) {
					t.Errorf("%d cores: places are still taken", test.cores)
				}
			})
		}
	}
}

// TestHashLanesWait has other calls take the cores.
func TestHashLanesWait(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		busy  time.Duration // how long the other calls work
		leave time.Duration // 0: the caller stays
		want  error
		after time.Duration
	}{
		"no wait":         {},
		"turn in time":    {busy: hashWait / 2, after: hashWait / 2},
		"no turn in time": {busy: 2 * hashWait, want: errBusy, after: hashWait},
		"caller leaves":   {busy: 2 * hashWait, leave: hashWait / 2, want: context.Canceled, after: hashWait / 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				h := newHashLanes(newLimits(1, math.MaxInt64), &traffic{})
				if test.busy > 0 {
					leave, err := h.enter(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					time.AfterFunc(test.busy, leave)
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if test.leave > 0 {
					time.AfterFunc(test.leave, cancel)
				}
				start := time.Now()
				leave, err := h.enter(ctx)
				if !errors.Is(err, test.want) || (err == nil) != (leave != nil) {
					t.Errorf("enter: %v", err)
				}
				if waited := time.Since(start); waited != test.after {
					t.Errorf("waited for %v, not %v", waited, test.after)
				}
				time.Sleep(3 * hashWait)
			})
		})
	}
}

// TestPasswordFlood sends more passwords than can be hashed in time.
func TestPasswordFlood(t *testing.T) {
	t.Parallel()
	const requests = 300
	s := startService(t, memorySettings())
	statuses := make(chan int, requests)
	var group sync.WaitGroup
	for range requests {
		group.Go(func() {
			body := `{"name": "John", "surname": "Doe", "password": "` + secret + `"}`
			response, err := client.Post(s.url+"/users", "application/json", strings.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			if response.StatusCode == http.StatusServiceUnavailable && response.Header.Get("Retry-After") == "" {
				t.Error("503 without Retry-After")
			}
			statuses <- response.StatusCode
		})
	}
	flood := make(chan struct{})
	go func() {
		group.Wait()
		close(statuses)
		close(flood)
	}()
	for over := false; !over; {
		if a := s.do("GET", "/users", ""); a.status != http.StatusOK {
			t.Errorf("GET during the flood: %d %s", a.status, a.body)
		}
		select {
		case <-flood:
			over = true
		case <-time.After(10 * time.Millisecond):
		}
	}
	count := make(map[int]int)
	for status := range statuses {
		count[status]++
	}
	if count[201] == 0 || count[201]+count[503] != requests {
		t.Errorf("statuses and their number: %v", count)
	}
	// A machine of many cores may take them all.
	if tooMany := 2 * testLimits.hashQueue; requests > tooMany && count[503] == 0 {
		t.Errorf("nothing was refused: %v", count)
	}
	if total := s.do("GET", "/users?per_page=1", "").json(t, "total"); total != float64(count[201]) {
		t.Errorf("%v users after %d answers 201", total, count[201])
	}
}
