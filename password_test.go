package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/argon2"
)

var phcFormat = regexp.MustCompile(
	`^\$argon2id\$v=19\$m=12288,t=3,p=1\$([A-Za-z0-9+/]{22})\$([A-Za-z0-9+/]{43})$`)

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
	key := argon2.IDKey([]byte(password), salt, 3, 12288, 1, 32)
	return fields[2] == base64.RawStdEncoding.EncodeToString(key)
}

func mustHash(t *testing.T, password string) string {
	t.Helper()
	hash, err := newHasher(&traffic{}).hash(t.Context(), password)
	if err != nil {
		t.Fatal(err)
	}
	return hash
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

func TestHasherSize(t *testing.T) {
	t.Parallel()
	h := newHasher(&traffic{})
	cores := runtime.GOMAXPROCS(0)
	if cap(h.working) != cores || cap(h.admitted) != cores*(1+hashQueue) || cap(h.beside) != max(cores-1, 1) {
		t.Errorf("%d at work, %d beside others and %d admitted on %d cores",
			cap(h.working), cap(h.beside), cap(h.admitted), cores)
	}
}

// TestHasherHoldsItsPlaces watches the places while more calls come than can be at work.
func TestHasherHoldsItsPlaces(t *testing.T) {
	t.Parallel()
	h := &hasher{traffic: &traffic{}, admitted: make(chan struct{}, 20), working: make(chan struct{}, 2)}
	var group sync.WaitGroup
	for range cap(h.admitted) {
		group.Go(func() {
			// Where the wait is too long, errBusy is the right answer.
			if _, err := h.hash(context.Background(), secret); err != nil && !errors.Is(err, errBusy) {
				t.Error(err)
			}
		})
	}
	eventually(t, "two at work, and others waiting", func() bool {
		return len(h.working) == 2 && len(h.admitted) > 2
	})
	group.Wait()
	if len(h.working) != 0 || len(h.admitted) != 0 {
		t.Errorf("after all, %d are at work and %d admitted", len(h.working), len(h.admitted))
	}
}

// TestHasherRefuses has a hasher whose places others hold, in the time of a bubble.
func TestHasherRefuses(t *testing.T) {
	t.Parallel()
	type places struct{ admitted, working, beside int } // taken by others, of 3, 1 and 1
	for name, test := range map[string]struct {
		taken places
		leave time.Duration // 0: the caller stays
		free  time.Duration // 0: nobody makes room
		want  error
		after time.Duration
		reads time.Duration // for so long, other requests come
	}{
		"queue full":        {taken: places{3, 1, 0}, want: errBusy},
		"no turn in time":   {taken: places{2, 1, 0}, want: errBusy, after: hashWait},
		"turn in time":      {taken: places{2, 1, 0}, free: hashWait / 2, after: hashWait / 2},
		"caller leaves":     {taken: places{2, 1, 0}, leave: hashWait / 2, want: context.DeadlineExceeded, after: hashWait / 2},
		"nobody else there": {},
		"a core for reads":  {reads: time.Hour},
		"no core for reads": {taken: places{1, 0, 1}, reads: time.Hour, want: errBusy, after: hashWait},
		"until reads end":   {taken: places{1, 0, 1}, reads: mixedFor, after: 2 * mixedFor},
		"no reads":          {taken: places{1, 0, 1}},
		"caller leaves at last": {taken: places{1, 0, 1}, reads: time.Hour, leave: hashWait / 2,
			want: context.DeadlineExceeded, after: hashWait / 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				h := &hasher{traffic: &traffic{}, admitted: make(chan struct{}, 3),
					working: make(chan struct{}, 1), beside: make(chan struct{}, 1)}
				if test.reads > 0 {
					h.traffic.other.Store(time.Now().Add(test.reads).UnixNano())
				}
				for range test.taken.beside {
					h.beside <- struct{}{}
				}
				for range test.taken.admitted {
					h.admitted <- struct{}{}
				}
				for range test.taken.working {
					h.working <- struct{}{}
				}
				ctx := t.Context()
				if test.leave > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, test.leave)
					defer cancel()
				}
				if test.free > 0 {
					test.taken.working--
					time.AfterFunc(test.free, func() { <-h.working })
				}
				start := time.Now()
				hash, err := h.hash(ctx, secret)
				if !errors.Is(err, test.want) || (err == nil) != (hash != "") {
					t.Errorf("hash is %q, %v", hash, err)
				}
				if waited := time.Since(start); waited != test.after {
					t.Errorf("waited for %v, not %v", waited, test.after)
				}
				if left := (places{len(h.admitted), len(h.working), len(h.beside)}); left != test.taken {
					t.Errorf("left %+v, not %+v", left, test.taken)
				}
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
	if tooMany := 2 * cap(newHasher(&traffic{}).admitted); requests > tooMany && count[503] == 0 {
		t.Errorf("nothing was refused: %v", count)
	}
	if total := s.do("GET", "/users?per_page=1", "").json(t, "total"); total != float64(count[201]) {
		t.Errorf("%v users after %d answers 201", total, count[201])
	}
}
