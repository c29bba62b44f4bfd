package main

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		first := s.do("POST", "/users", john, "Idempotency-Key: key-1")
		s.do("PUT", "/users/1", `{"name": "Jane"}`)
		for name, test := range map[string]struct {
			body, key string
			want      int
		}{
			"the same":              {john, "key-1", 201},
			"the same, as a string": {john, `"key-1"`, 201},
			"the same in meaning":   {strings.Replace(john, ` "John"`, `"\u004aohn  "`, 1), "key-1", 201},
			"another name":          {strings.Replace(john, "John", "Jane", 1), "key-1", 422},
			"another surname":       {strings.Replace(john, "Doe", "Roe", 1), "key-1", 422},
			"another password":      {strings.Replace(john, secret, secret+"!", 1), "key-1", 422},
			"an invalid body":       {`{}`, "key-1", 400},
		} {
			a := s.do("POST", "/users/", test.body, "Idempotency-Key: "+test.key)
			if a.status != test.want {
				t.Errorf("%s: %d %s", name, a.status, a.body)
			}
			if test.want == 201 && (a.body != first.body || a.header.Get("Location") != "/users/1" ||
				a.header.Get("ETag") != `"1"`) {
				t.Errorf("%s: %s %v, not the first answer", name, a.body, a.header)
			}
		}
		s.do("DELETE", "/users/1", "")
		if a := s.do("POST", "/users", john, "Idempotency-Key: key-1"); a.body != first.body {
			t.Errorf("after the user is deleted: %d %s", a.status, a.body)
		}
		for i, headers := range [][]string{{}, {"Idempotency-Key: key-2"}, {"Idempotency-Key: KEY-1"}} {
			a := s.do("POST", "/users", john, headers...)
			if got := a.json(t, "id"); fmt.Sprint(got) != fmt.Sprint(i+2) {
				t.Errorf("with %v: id %v", headers, got)
			}
		}
		if total := s.do("GET", "/users", "").json(t, "total"); total != 3.0 {
			t.Errorf("total is %v", total)
		}
	})
}

func TestIdempotencyKeyIsParsed(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("k", 255)
	for name, test := range map[string]struct {
		lines []string
		want  string // "": refused
	}{
		"bare":                 {[]string{"8e03978e-40d5-43dd-bc93-6894a57f9324"}, "8e03978e-40d5-43dd-bc93-6894a57f9324"},
		"bare with signs":      {[]string{"a/b+c=d;e,f"}, "a/b+c=d;e,f"},
		"a string":             {[]string{`"a b"`}, "a b"},
		"a string with quotes": {[]string{`"\"\\"`}, `"\`},
		"the longest":          {[]string{long}, long},
		"the longest string":   {[]string{`"` + long + `"`}, long},
		"too long":             {[]string{long + "k"}, ""},
		"a string too long":    {[]string{`"k` + long + `"`}, ""},
		"empty":                {[]string{""}, ""},
		"an empty string":      {[]string{`""`}, ""},
		"half a string":        {[]string{`"a`}, ""},
		"another escape":       {[]string{`"\n"`}, ""},
		"a space":              {[]string{"a b"}, ""},
		"behind a string":      {[]string{`"a";b`}, ""},
		"no ASCII":             {[]string{"clé"}, ""},
		"a control character":  {[]string{"\"a\tb\""}, ""},
		"two lines":            {[]string{"a", "a"}, ""},
	} {
		got, err := idempotencyKey(map[string][]string{"Idempotency-Key": test.lines}, caller{})
		if got != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	owned, err := idempotencyKey(map[string][]string{"Idempotency-Key": {"key"}}, caller{name: "shop"})
	if owned != "shop\tkey" || err != nil {
		t.Errorf("of an API key: %q, %v", owned, err)
	}
	if key, err := idempotencyKey(nil, caller{}); key != "" || err != nil {
		t.Errorf("no header: %q, %v", key, err)
	}
}

func TestIdempotencyKeyIsCheckedLast(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for want, headers := range map[int][]string{
		415: {"Idempotency-Key: two words", "Content-Type: text/plain"},
		400: {"Idempotency-Key: two words"},
	} {
		if a := s.do("POST", "/users", john, headers...); a.status != want {
			t.Errorf("%v: %d %s", headers, a.status, a.body)
		}
	}
}

// TestIdempotencyKeysAreOwned has two API keys use the same Idempotency-Key, with the same body and
// with another one: each makes its user.
func TestIdempotencyKeysAreOwned(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*testing.T) settings{
		"memory":   func(*testing.T) settings { return memorySettings() },
		"postgres": postgresSettings,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			shop, shopKey := newTestKey(t, "shop", false)
			crm, crmKey := newTestKey(t, "crm", false)
			s := set(t)
			s.apiKeys = []apiKey{shopKey, crmKey}
			svc := startService(t, s)
			jane := strings.Replace(john, "John", "Jane", 1)
			for _, step := range []struct {
				owner, key, body string
				status           int
				id               float64
			}{
				{owner: shop, key: "order-1", body: john, status: 201, id: 1},
				{owner: crm, key: "order-1", body: john, status: 201, id: 2},
				{owner: shop, key: "order-2", body: john, status: 201, id: 3},
				{owner: crm, key: "order-2", body: jane, status: 201, id: 4},
				{owner: shop, key: "order-1", body: john, status: 201, id: 1},
				{owner: crm, key: "order-1", body: john, status: 201, id: 2},
				{owner: crm, key: "order-2", body: john, status: 422},
			} {
				a := svc.do("POST", "/users", step.body, "Authorization: Bearer "+step.owner,
					"Idempotency-Key: "+step.key)
				if a.status != step.status || step.id > 0 && a.json(t, "id") != step.id {
					t.Errorf("%s: %d %s, want %d with the id %v", step.key, a.status, a.body,
						step.status, step.id)
				}
			}
		})
	}
}

// TestIdempotencyKeyTellsNoPassword repeats a creation with other passwords. Each costs a try, so
// that nobody can guess for long. A try comes back every six seconds.
func TestIdempotencyKeyTellsNoPassword(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		s.do("POST", "/users", john, "Idempotency-Key: key")
		const most = 3 * maxVerifications
		tries, a := 0, answer{status: 422}
		for ; a.status == 422 && tries < most; tries++ {
			body := strings.Replace(john, secret, fmt.Sprint(secret, tries), 1)
			a = s.do("POST", "/users", body, "Idempotency-Key: key")
		}
		if a.status != 429 || a.header.Get("Retry-After") == "" || tries <= maxVerifications {
			t.Errorf("after %d tries: %d %s", tries, a.status, a.body)
		}
		for try, body := range map[string]string{
			"/users":                   john,
			"/users/1/password/verify": fmt.Sprintf(`{"password": %q}`, secret),
		} {
			status := 0
			for n := 0; status != 429 && n < maxVerifications/2; n++ {
				status = s.do("POST", try, body, "Idempotency-Key: key").status
			}
			if status != 429 {
				t.Errorf("%s after too many tries: %d", try, status)
			}
		}
		if a := s.do("POST", "/users", john, "Idempotency-Key: other"); a.status != 201 {
			t.Errorf("another key: %d %s", a.status, a.body)
		}
	})
}

// TestIdempotencyKeyRace sends one request many times at once, to two replicas: one user
// comes of it, and whoever gets a 201 gets that user.
func TestIdempotencyKeyRace(t *testing.T) {
	t.Parallel()
	settings := postgresSettings(t)
	replicas := []*service{startService(t, settings), startService(t, settings)}
	for round := range 5 {
		key := fmt.Sprint("Idempotency-Key: round-", round)
		answers := make(chan answer, 12)
		var group sync.WaitGroup
		for i := range cap(answers) {
			group.Go(func() { answers <- replicas[i%2].do("POST", "/users", john, key) })
		}
		group.Wait()
		close(answers)
		created := make(map[string]int)
		for a := range answers {
			switch a.status {
			case 201:
				created[a.body]++
			case 409:
			default:
				t.Errorf("%d %s", a.status, a.body)
			}
		}
		if len(created) != 1 {
			t.Errorf("one key made %d users", len(created))
		}
	}
	if total := replicas[0].do("GET", "/users", "").json(t, "total"); total != 5.0 {
		t.Errorf("5 keys made %v users", total)
	}
}

// TestIdempotencyKeyWhileRunning repeats a request whose first run waits for a lock.
func TestIdempotencyKeyWhileRunning(t *testing.T) {
	t.Parallel()
	settings := postgresSettings(t)
	s, conn := startService(t, settings), connect(t, settings.databaseURL)
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE users"); err != nil {
		t.Fatal(err)
	}
	first := make(chan answer)
	go func() { first <- s.do("POST", "/users", john, "Idempotency-Key: key-1") }()
	watcher := connect(t, settings.databaseURL)
	eventually(t, "a request that waits for the lock", func() bool {
		return queryValue[bool](t, watcher, blockedHere)
	})
	if a := s.do("POST", "/users", john, "Idempotency-Key: key-1"); a.status != 409 {
		t.Errorf("while the first is running: %d %s", a.status, a.body)
	}
	if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	if a := <-first; a.status != 201 {
		t.Errorf("the first: %d %s", a.status, a.body)
	}
	if a := s.do("POST", "/users", john, "Idempotency-Key: key-1"); a.status != 201 {
		t.Errorf("after the first: %d %s", a.status, a.body)
	}
}

func TestPostgresForgetsKeys(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	in := input("John", "Doe", "hash")
	for _, key := range []string{"old-1", "old-2", "young"} {
		if _, err := s.createUser(t.Context(), in, key); err != nil {
			t.Fatal(err)
		}
	}
	_, err := conn.Exec(t.Context(), `UPDATE idempotency_keys SET created_at = created_at
		- interval '1 day' + interval '1 minute' * (key = 'young')::int`)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.creationUnder(t.Context(), "old-1"); !errors.Is(err, errNotFound) {
		t.Errorf("an old key: %v", err)
	}
	if u, hash, err := s.creationUnder(t.Context(), "young"); err != nil || u.ID != 3 || hash != "hash" {
		t.Errorf("a young key: %+v, %q, %v", u, hash, err)
	}
	if u, err := s.createUser(t.Context(), in, "old-1"); err != nil || u.Version != 1 {
		t.Errorf("an old key, used again: %+v, %v", u, err)
	}
	if _, err := s.createUser(t.Context(), in, "young"); !errors.Is(err, errKeyUsed) {
		t.Errorf("a young key, used again: %v", err)
	}
	if len(allPending(t, s)) != 4 {
		t.Error("not one event for each user")
	}
	if err := s.sweepKeys(t.Context()); err != nil {
		t.Error(err)
	}
	const left = "SELECT string_agg(key, ' ' ORDER BY key) FROM idempotency_keys"
	if got := queryValue[string](t, conn, left); got != "old-1 young" {
		t.Errorf("the keys that are left: %s", got)
	}
}

// TestPostgresForgetsManyKeys deletes more old keys than one statement does, among young ones.
func TestPostgresForgetsManyKeys(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	execute(t, conn, `
		INSERT INTO idempotency_keys (key, user_id, name, surname, password, created_at)
		SELECT i, i, 'John', 'Doe', repeat('x', 100),
			now() - interval '1 day' + CASE WHEN i % 100 = 0 THEN interval '1 minute' ELSE '0' END
		FROM generate_series(1, 40000) AS i`)
	pages := queryValue[int](t, conn, `SELECT pg_relation_size('idempotency_keys')
		/ current_setting('block_size')::int`)
	if pages <= keyPages {
		t.Fatalf("%d pages are no more than one statement takes", pages)
	}
	if err := s.sweepKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := queryValue[string](t, conn, `SELECT count(*) || ' ' ||
		count(*) FILTER (WHERE user_id % 100 = 0) FROM idempotency_keys`)
	if got != "400 400" {
		t.Errorf("keys that are left, and young ones: %s, want 400 400", got)
	}
}

func TestMemoryForgetsKeys(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		in := input("John", "Doe", "hash")
		for i, step := range []struct {
			wait time.Duration
			want error
		}{{0, nil}, {keyLifetime - time.Second, errKeyUsed}, {time.Second, nil}, {0, errKeyUsed}} {
			time.Sleep(step.wait)
			if _, err := m.createUser(t.Context(), in, "key"); !errors.Is(err, step.want) {
				t.Errorf("step %d: %v", i, err)
			}
		}
		if len(m.byKey) != 1 || len(m.keysByAge) != 1 || len(m.users) != 2 {
			t.Errorf("%d keys, %d ages, %d users", len(m.byKey), len(m.keysByAge), len(m.users))
		}
	})
}

func TestVerify(t *testing.T) {
	t.Parallel()
	h := newTestHasher()
	phc := mustHash(t, secret)
	for password, want := range map[string]bool{secret: true, secret + "!": false, "": false} {
		if got, err := h.verify(t.Context(), password, phc); got != want || err != nil {
			t.Errorf("%q: %t, %v", password, got, err)
		}
	}
	for _, bad := range []string{
		"", "hash", strings.Replace(phc, "argon2id", "argon2i", 1),
		strings.Replace(phc, "m=7168", "m=65537", 1), strings.Replace(phc, "m=7168", "m=4294967295", 1),
		strings.Replace(phc, "t=5", "t=11", 1), strings.Replace(phc, "t=5", "t=0", 1),
		strings.Replace(phc, "p=1", "p=0", 1), phc + strings.Repeat("A", 100),
	} {
		if same, err := h.verify(t.Context(), secret, bad); same || err == nil {
			t.Errorf("computed %q", bad)
		}
	}
}
