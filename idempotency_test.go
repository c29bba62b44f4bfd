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

// TestIdempotencyKey checks when a POST with a key returns the first answer, and when it creates a user.
func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	eachStore(t, func(t *testing.T, s *service) {
		first := s.do("POST", "/users", john, "Idempotency-Key: key-1")
		s.do("PUT", "/users/1", `{"name": "Jane"}`)
		for name, test := range map[string]struct {
			body, key string
			want      int
		}{
			"the same body": {body: john, key: "key-1", want: 201},
			"a quoted key":  {body: john, key: `"key-1"`, want: 201},
			"an equivalent body": {body: strings.Replace(john, ` "John"`, `"\u004aohn  "`, 1), key: "key-1",
				want: 201},
			"another name":    {body: strings.Replace(john, "John", "Jane", 1), key: "key-1", want: 422},
			"another surname": {body: strings.Replace(john, "Doe", "Roe", 1), key: "key-1", want: 422},
			"another password": {body: strings.Replace(john, secret, secret+"!", 1), key: "key-1",
				want: 422},
			"an invalid body": {body: `{}`, key: "key-1", want: 400},
		} {
			a := s.do("POST", "/users/", test.body, "Idempotency-Key: "+test.key)
			if a.status != test.want {
				t.Errorf("%s: got %d %s, want %d", name, a.status, a.body, test.want)
			}
			if test.want == 201 && (a.body != first.body || a.header.Get("Location") != "/users/1" ||
				a.header.Get("ETag") != `"1"`) {
				t.Errorf("%s: got %s with %v, want the first answer", name, a.body, a.header)
			}
		}
		s.do("DELETE", "/users/1", "")
		if a := s.do("POST", "/users", john, "Idempotency-Key: key-1"); a.body != first.body {
			t.Errorf("after the user is deleted: got %d %s, want the first answer", a.status, a.body)
		}
		for i, headers := range [][]string{{}, {"Idempotency-Key: key-2"}, {"Idempotency-Key: KEY-1"}} {
			a := s.do("POST", "/users", john, headers...)
			if got := a.json(t, "id"); fmt.Sprint(got) != fmt.Sprint(i+2) {
				t.Errorf("POST with %v: got id %v, want %d", headers, got, i+2)
			}
		}
		if total := s.do("GET", "/users", "").json(t, "total"); total != 3.0 {
			t.Errorf("total: got %v, want 3", total)
		}
	})
}

// TestParseIdempotencyKey checks which header lines are valid keys, and that keys of different callers
// differ.
func TestParseIdempotencyKey(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("k", 255)
	for name, test := range map[string]struct {
		lines []string
		want  string // "" if the key is invalid
	}{
		"a token":              {lines: []string{"8e03978e-40d5-43dd-bc93-6894a57f9324"}, want: "8e03978e-40d5-43dd-bc93-6894a57f9324"},
		"a token with signs":   {lines: []string{"a/b+c=d;e,f"}, want: "a/b+c=d;e,f"},
		"a string":             {lines: []string{`"a b"`}, want: "a b"},
		"a string with quotes": {lines: []string{`"\"\\"`}, want: `"\`},
		"the longest":          {lines: []string{long}, want: long},
		"the longest string":   {lines: []string{`"` + long + `"`}, want: long},
		"too long":             {lines: []string{long + "k"}},
		"a string too long":    {lines: []string{`"k` + long + `"`}},
		"empty":                {lines: []string{""}},
		"an empty string":      {lines: []string{`""`}},
		"an open string":       {lines: []string{`"a`}},
		"an invalid escape":    {lines: []string{`"\n"`}},
		"a space":              {lines: []string{"a b"}},
		"text after a string":  {lines: []string{`"a";b`}},
		"beyond ASCII":         {lines: []string{"clé"}},
		"a control character":  {lines: []string{"\"a\tb\""}},
		"two lines":            {lines: []string{"a", "a"}},
	} {
		got, err := idempotencyKey(map[string][]string{"Idempotency-Key": test.lines}, caller{})
		if got != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, test.want)
		}
	}
	owned, err := idempotencyKey(map[string][]string{"Idempotency-Key": {"key"}}, caller{name: "shop"})
	if owned != "shop\tkey" || err != nil {
		t.Errorf("key of the caller shop: got %q, %v", owned, err)
	}
	if key, err := idempotencyKey(nil, caller{}); key != "" || err != nil {
		t.Errorf("no header: got %q, %v, want no key and no error", key, err)
	}
}

// TestIdempotencyKeyCheckedLast checks that an unsupported content type is reported before an invalid key.
func TestIdempotencyKeyCheckedLast(t *testing.T) {
	t.Parallel()
	s := startService(t, memorySettings())
	for want, headers := range map[int][]string{
		415: {"Idempotency-Key: two words", "Content-Type: text/plain"},
		400: {"Idempotency-Key: two words"},
	} {
		if a := s.do("POST", "/users", john, headers...); a.status != want {
			t.Errorf("POST with %v: got %d %s, want %d", headers, a.status, a.body, want)
		}
	}
}

// TestIdempotencyKeyPerCaller checks that callers with different API keys can use the same Idempotency-Key.
func TestIdempotencyKeyPerCaller(t *testing.T) {
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
					t.Errorf("POST with %s: got %d %s, want %d with id %v", step.key, a.status, a.body,
						step.status, step.id)
				}
			}
		})
	}
}

// TestIdempotencyKeyGuessing checks that repeated creations with other passwords count against the limit of
// verifications, which allows another one every six seconds.
func TestIdempotencyKeyGuessing(t *testing.T) {
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
			t.Errorf("after %d requests: got %d %s, want 429 after more than %d", tries, a.status, a.body,
				maxVerifications)
		}
		for path, body := range map[string]string{
			"/users":                   john,
			"/users/1/password/verify": fmt.Sprintf(`{"password": %q}`, secret),
		} {
			status := 0
			for n := 0; status != 429 && n < maxVerifications/2; n++ {
				status = s.do("POST", path, body, "Idempotency-Key: key").status
			}
			if status != 429 {
				t.Errorf("POST %s after too many verifications: got %d, want 429", path, status)
			}
		}
		if a := s.do("POST", "/users", john, "Idempotency-Key: other"); a.status != 201 {
			t.Errorf("POST with another key: got %d %s, want 201", a.status, a.body)
		}
	})
}

// TestIdempotencyKeyRace checks that concurrent requests with one key to two replicas create one user, and
// that each answer 201 has that user.
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
				t.Errorf("POST: got %d %s, want 201 or 409", a.status, a.body)
			}
		}
		if len(created) != 1 {
			t.Errorf("different answers 201: got %d, want 1", len(created))
		}
	}
	if total := replicas[0].do("GET", "/users", "").json(t, "total"); total != 5.0 {
		t.Errorf("users of 5 keys: got %v, want 5", total)
	}
}

// TestIdempotencyKeyWhileRunning checks that a request is refused while another with its key is in
// progress.
func TestIdempotencyKeyWhileRunning(t *testing.T) {
	t.Parallel()
	settings := postgresSettings(t)
	s, conn := startService(t, settings), connect(t, settings.databaseURL)
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE users"); err != nil {
		t.Fatal(err)
	}
	first := s.goDo("POST", "/users", john, "Idempotency-Key: key-1")
	watcher := connect(t, settings.databaseURL)
	eventually(t, "a statement that waits for the lock", func() bool {
		return queryValue[bool](t, watcher, blockedHere)
	})
	if a := s.do("POST", "/users", john, "Idempotency-Key: key-1"); a.status != 409 {
		t.Errorf("second request during the first: got %d %s, want 409", a.status, a.body)
	}
	if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	if a := <-first; a.status != 201 {
		t.Errorf("first request: got %d %s, want 201", a.status, a.body)
	}
	if a := s.do("POST", "/users", john, "Idempotency-Key: key-1"); a.status != 201 {
		t.Errorf("third request after the first: got %d %s, want 201", a.status, a.body)
	}
}

// TestPostgresKeyLifetime checks that a key expires after a day, and that a sweep deletes expired keys.
func TestPostgresKeyLifetime(t *testing.T) {
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
		t.Errorf("expired key: got %v, want errNotFound", err)
	}
	if u, hash, err := s.creationUnder(t.Context(), "young"); err != nil || u.ID != 3 || hash != "hash" {
		t.Errorf("valid key: got %+v, %q, %v, want user 3", u, hash, err)
	}
	if u, err := s.createUser(t.Context(), in, "old-1"); err != nil || u.Version != 1 {
		t.Errorf("createUser with an expired key: got %+v, %v, want a new user", u, err)
	}
	if _, err := s.createUser(t.Context(), in, "young"); !errors.Is(err, errKeyUsed) {
		t.Errorf("createUser with a valid key: got %v, want errKeyUsed", err)
	}
	if n := len(allPending(t, s)); n != 4 {
		t.Errorf("pending events: got %d, want 4", n)
	}
	if err := s.sweepKeys(t.Context()); err != nil {
		t.Error(err)
	}
	const left = "SELECT string_agg(key, ' ' ORDER BY key) FROM idempotency_keys"
	if got := queryValue[string](t, conn, left); got != "old-1 young" {
		t.Errorf("keys after the sweep: got %q, want %q", got, "old-1 young")
	}
}

// TestPostgresSweepsManyKeys checks a sweep of more pages than one statement reads, with expired and valid
// keys.
func TestPostgresSweepsManyKeys(t *testing.T) {
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
		t.Fatalf("%d pages, want more than the %d of one statement", pages, keyPages)
	}
	if err := s.sweepKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := queryValue[string](t, conn, `SELECT count(*) || ' ' ||
		count(*) FILTER (WHERE user_id % 100 = 0) FROM idempotency_keys`)
	if got != "400 400" {
		t.Errorf("keys after the sweep, and valid ones: got %s, want 400 400", got)
	}
}

// TestMemoryKeyLifetime checks that a key of the memory store expires after keyLifetime.
func TestMemoryKeyLifetime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		in := input("John", "Doe", "hash")
		for i, step := range []struct {
			wait time.Duration
			want error
		}{
			{wait: 0, want: nil},
			{wait: keyLifetime - time.Second, want: errKeyUsed},
			{wait: time.Second, want: nil},
			{wait: 0, want: errKeyUsed},
		} {
			time.Sleep(step.wait)
			if _, err := m.createUser(t.Context(), in, "key"); !errors.Is(err, step.want) {
				t.Errorf("step %d: got %v, want %v", i, err, step.want)
			}
		}
		if len(m.byKey) != 1 || len(m.keysByAge) != 1 || len(m.users) != 2 {
			t.Errorf("got %d keys, %d entries by age, %d users, want 1, 1, 2", len(m.byKey), len(m.keysByAge),
				len(m.users))
		}
	})
}
