package contract

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"user-service/system/env"
)

// TestResponses causes every response that the document has, and checks each one against it.
func TestResponses(t *testing.T) {
	t.Parallel()
	d := readDocument(t)
	var skipped atomic.Bool
	t.Run("from", func(t *testing.T) {
		for _, test := range []struct {
			name string
			run  func(*testing.T, *document)
		}{
			{"slow bodies", testSlowBodies},
			{"memory", testMemory},
			{"postgres", testPostgres},
			{"keys", testKeys},
			{"tokens", testTokens},
			{"limit", testLimit},
			{"stopping", testStopping},
			{"rules of a database", testRules},
			{"broken database", testBrokenDatabase},
			{"read-only database", testReadOnlyDatabase},
			{"unreachable database", testUnreachableDatabase},
		} {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				t.Cleanup(func() {
					if t.Skipped() {
						skipped.Store(true)
					}
				})
				test.run(t, d)
			})
		}
	})
	if skipped.Load() {
		t.Skip("without all services, not every response can be caused")
	}
	for id, o := range d.operations {
		for _, status := range o.statuses() {
			if !d.seen[id+" "+status] {
				t.Errorf("%s: no test causes the documented status %s", id, status)
			}
		}
	}
}

func testMemory(t *testing.T, d *document) { testRequests(t, d, startService(t)) }

func testPostgres(t *testing.T, d *document) {
	testRequests(t, d, startService(t, "DATABASE_URL="+env.NewDatabase(t).URL))
}

// testRequests sends requests to a service without users.
func testRequests(t *testing.T, d *document, s *env.Program) {
	valid := fmt.Sprintf(`{"name": " Ann ", "surname": "Lee", "password": %q}`, env.Secret)
	other := strings.Replace(valid, "Ann", "Eve", 1)
	try := fmt.Sprintf(`{"password": %q}`, env.Secret)
	invalid := `{"name": "", "surname": null, "age/years": 7}`
	large := `{"name": "` + strings.Repeat("x", 64<<10) + `"}`
	form := "Content-Type: application/x-www-form-urlencoded"
	patch := "Content-Type: application/merge-patch+json"
	stale := `If-Match: "999"`
	change := `{"name": "Bob"}`
	for i := range 3 {
		s.CreateUser(fmt.Sprint("user ", i+1), "Doe")
	}
	for _, test := range []struct {
		operation string
		path      string
		body      string
		header    string
		want      int
	}{
		{operation: "listUsers", path: "/users", want: 200},
		{operation: "listUsers", path: "/users/?page=2&per_page=1", want: 200},
		{operation: "listUsers", path: "/users?page=9", want: 200},
		{operation: "listUsers", path: "/users?after=0&per_page=1", want: 200},
		{operation: "listUsers", path: "/users?after=9", want: 200},
		{operation: "listUsers", path: "/users?page=1&after=1&per_page=0&x=1", want: 400},
		{operation: "listUsers", path: "/users?page=%", want: 400},
		{operation: "createUser", path: "/users", body: valid, want: 201},
		{operation: "createUser", path: "/users/", body: valid, want: 201},
		{operation: "createUser", path: "/users", body: invalid, want: 400},
		{operation: "createUser", path: "/users", body: `[]`, want: 400},
		{operation: "createUser", path: "/users", body: large, want: 413},
		{operation: "createUser", path: "/users", body: "name=Ann", header: form, want: 415},
		{operation: "createUser", path: "/users", body: valid, header: "Idempotency-Key: k", want: 201},
		{operation: "createUser", path: "/users", body: valid, header: "Idempotency-Key: k", want: 201},
		{operation: "createUser", path: "/users", body: other, header: "Idempotency-Key: k", want: 422},
		{operation: "createUser", path: "/users", body: valid, header: "Idempotency-Key: k k", want: 400},
		{operation: "getUser", path: "/users/1", want: 200},
		{operation: "getUser", path: "/users/1", header: `If-None-Match: W/"1"`, want: 304},
		{operation: "getUser", path: "/users/999", want: 404},
		{operation: "getUser", path: "/users/x", want: 404},
		{operation: "updateUser", path: "/users/1", body: change, want: 200},
		{operation: "updateUser", path: "/users/1", body: change, want: 200}, // nothing new
		{operation: "updateUser", path: "/users/1", body: `{}`, want: 400},
		{operation: "updateUser", path: "/users/1", body: invalid, want: 400},
		{operation: "updateUser", path: "/users/999", body: change, want: 404},
		{operation: "updateUser", path: "/users/1", body: change, header: stale, want: 412},
		{operation: "updateUser", path: "/users/1", body: large, want: 413},
		{operation: "updateUser", path: "/users/1", body: change, header: patch, want: 415},
		{operation: "patchUser", path: "/users/1", body: valid, want: 200},
		{operation: "patchUser", path: "/users/1", body: change, header: patch, want: 200},
		{operation: "patchUser", path: "/users/1", body: invalid, want: 400},
		{operation: "patchUser", path: "/users/999", body: change, want: 404},
		{operation: "patchUser", path: "/users/1", body: change, header: `If-Match: W/"1"`, want: 412},
		{operation: "patchUser", path: "/users/1", body: large, want: 413},
		{operation: "patchUser", path: "/users/1", body: "name=Bob", header: form, want: 415},
		{operation: "deleteUser", path: "/users/1", header: stale, want: 412},
		{operation: "deleteUser", path: "/users/1", want: 200},
		{operation: "deleteUser", path: "/users/1", want: 404},
		{operation: "verifyPassword", path: "/users/2/password/verify", body: try, want: 200},
		{operation: "verifyPassword", path: "/users/999/password/verify", body: try, want: 200},
		{operation: "verifyPassword", path: "/users/x/password/verify", body: try, want: 404},
		{operation: "verifyPassword", path: "/users/2/password/verify", body: invalid, want: 400},
		{operation: "verifyPassword", path: "/users/2/password/verify", body: large, want: 413},
		{operation: "verifyPassword", path: "/users/2/password/verify", body: try, header: form,
			want: 415},
		{operation: "healthz", path: "/healthz", want: 200},
		{operation: "readyz", path: "/readyz", want: 200},
		{operation: "metrics", path: "/metrics", want: 200},
		{operation: "openapi", path: "/openapi.json", want: 200},
		{operation: "asyncapi", path: "/asyncapi.json", want: 200},
		{operation: "docs", path: "/docs", want: 200},
	} {
		o := d.operation(t, test.operation)
		var headers []string
		if test.header != "" {
			headers = []string{test.header}
		}
		e := s.Do(o.method, test.path, test.body, headers...)
		if e.StatusCode != test.want {
			t.Errorf("%.60v: %v", test, e)
		}
		o.check(t, e)
		if o.method != "GET" {
			continue
		}
		head := s.Do("HEAD", test.path, "", headers...)
		if head.StatusCode != e.StatusCode || head.Body != "" ||
			head.Header.Get("Content-Type") != e.Header.Get("Content-Type") {
			t.Errorf("%v, and %v", head, e)
		}
	}
}

// The API keys of the tests, and a setting that accepts them.
const (
	fullKey = "usk_full-key-of-the-contract-tests"
	readKey = "usk_read-key-of-the-contract-tests"
)

func keysSetting() string {
	return fmt.Sprintf("API_KEYS=shop:%x,report:%x:read", sha256.Sum256([]byte(fullKey)),
		sha256.Sum256([]byte(readKey)))
}

// testKeys sends each operation without an API key and with a read-only one. Operations whose
// security the document lifts need no key.
func testKeys(t *testing.T, d *document) {
	s := startService(t, keysSetting())
	s.CreateUser("John", "Doe", "Authorization: Bearer "+fullKey)
	for id, o := range d.operations {
		public := o.Security != nil && len(o.Security) == 0
		if public == o.documents(401) {
			t.Errorf("%s: its security and its 401 contradict each other", id)
		}
		body := o.exampleBody(t, "application/json")
		e := s.Do(o.method, o.target(t), body)
		if (e.StatusCode == 401) != o.documents(401) {
			t.Errorf("%s, without a key: %v", id, e)
		}
		o.check(t, e)
		e = s.Do(o.method, o.target(t), body, "Authorization: Bearer "+readKey)
		if (e.StatusCode == 403) != (o.documents(403) && o.method != "GET") {
			t.Errorf("%s, with a read-only key: %v", id, e)
		}
		o.check(t, e)
	}
}

// testLimit sends each operation as a client of its own, until the limit refuses it.
func testLimit(t *testing.T, d *document) {
	s := startService(t, "RATE_LIMIT=0.01", "TRUSTED_PROXIES=127.0.0.1")
	client := 0
	for id, o := range d.operations {
		client++
		address := fmt.Sprint("X-Forwarded-For: 192.0.2.", client)
		body := o.exampleBody(t, "application/json")
		o.check(t, s.Do(o.method, o.target(t), body, address))
		e := s.Do(o.method, o.target(t), body, address)
		if (e.StatusCode == 429) != o.documents(429) {
			t.Errorf("%s, beyond the limit: %v", id, e)
		}
		o.check(t, e)
	}
	verify := d.operation(t, "verifyPassword")
	s = startService(t)
	for try := 1; try <= 11; try++ {
		e := s.Do(verify.method, verify.target(t), verify.exampleBody(t, "application/json"))
		if (e.StatusCode == 429) != (try > 10) {
			t.Errorf("password attempt %d: %v", try, e)
		}
		verify.check(t, e)
	}
}

// testSlowBodies sends requests whose body does not arrive.
func testSlowBodies(t *testing.T, d *document) {
	s := startService(t)
	var requests sync.WaitGroup
	for id, o := range d.operations {
		if (o.RequestBody != nil) != o.documents(408) {
			t.Errorf("%s: its body and its 408 contradict each other", id)
		}
		if o.RequestBody == nil {
			continue
		}
		requests.Go(func() { // all at once: the service waits 10 s
			e, err := sendSlowly(s, o.method, o.target(t))
			if err != nil || e.StatusCode != 408 {
				t.Errorf("%s: %v %v", id, e, err)
				return
			}
			e.Check(t)
			o.check(t, e)
		})
	}
	requests.Wait()
}

// testStopping asks a service that has been told to stop whether it is ready.
func testStopping(t *testing.T, d *document) {
	s := startService(t, "SHUTDOWN_DELAY=2s")
	readyz := d.operation(t, "readyz")
	readyz.check(t, s.Do("GET", "/readyz", ""))
	s.Signal(syscall.SIGTERM)
	env.Eventually(t, "503 from /readyz", func() bool {
		e := s.Do("GET", "/readyz", "")
		readyz.check(t, e)
		return e.StatusCode == 503
	})
	if code := s.Wait(); code != 0 {
		t.Errorf("got exit code %d, want 0", code)
	}
}

// testRules has a database that refuses changes: a constraint, and a row of another table that
// refers to a user.
func testRules(t *testing.T, d *document) {
	db := env.NewDatabase(t)
	s := startService(t, "DATABASE_URL="+db.URL)
	s.CreateUser("John", "Doe")
	db.Exec(db.Name, "ALTER TABLE users ADD CHECK (surname <> 'Refused')",
		"CREATE TABLE orders (user_id bigint REFERENCES users)", "INSERT INTO orders VALUES (1)")
	refused := fmt.Sprintf(`{"name": "John", "surname": "Refused", "password": %q}`, env.Secret)
	for id, o := range d.operations {
		body := refused
		if id == "deleteUser" {
			body = ""
		}
		if !o.documents(409) {
			continue
		}
		e := s.Do(o.method, o.target(t), body)
		if e.StatusCode != 409 {
			t.Errorf("%s: %v", id, e)
		}
		o.check(t, e)
	}
}

// testBrokenDatabase has a database without the table.
func testBrokenDatabase(t *testing.T, d *document) {
	db := env.NewDatabase(t)
	s := startService(t, "DATABASE_URL="+db.URL)
	s.AllowErrors(env.AnyErrors)
	db.Exec(db.Name, "ALTER TABLE users RENAME TO moved")
	for id, o := range d.operations {
		e := s.Do(o.method, o.target(t), o.exampleBody(t, "application/json"))
		if (e.StatusCode == 500) != o.documents(500) {
			t.Errorf("%s: %v", id, e)
		}
		if id != "readyz" { // whether it notices does not matter here
			o.check(t, e)
		}
	}
}

// testReadOnlyDatabase has a database that takes no writes, as a standby does.
func testReadOnlyDatabase(t *testing.T, d *document) {
	db := env.NewDatabase(t)
	s := startService(t, "DATABASE_URL="+db.URL)
	s.CreateUser("John", "Doe")
	db.Exec("postgres", "ALTER DATABASE "+db.Name+" SET default_transaction_read_only = on",
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '"+db.Name+"'")
	readyz := d.operation(t, "readyz")
	env.Eventually(t, "503 from /readyz", func() bool {
		e := s.Do("GET", "/readyz", "")
		readyz.check(t, e)
		return strings.Contains(e.Body, `"read-only"`) && e.StatusCode == 503
	})
	for _, id := range []string{"createUser", "updateUser", "patchUser", "deleteUser"} {
		o := d.operation(t, id)
		e := s.Do(o.method, o.target(t), o.exampleBody(t, "application/json"))
		if e.StatusCode != 503 {
			t.Errorf("%s: %v", id, e)
		}
		o.check(t, e)
	}
	get := d.operation(t, "getUser")
	get.check(t, s.Do(get.method, get.target(t), ""))
}

// testUnreachableDatabase has a database that lets nobody in any more.
func testUnreachableDatabase(t *testing.T, d *document) {
	db := env.NewDatabase(t)
	s := startService(t, "DATABASE_URL="+db.URL)
	s.CreateUser("John", "Doe")
	db.Exec("postgres", "ALTER ROLE "+db.Name+" NOLOGIN",
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '"+db.Name+"'")
	readyz := d.operation(t, "readyz")
	env.Eventually(t, "503 from /readyz", func() bool {
		e := s.Do("GET", "/readyz", "")
		readyz.check(t, e)
		return strings.Contains(e.Body, `"down"`) && e.StatusCode == 503
	})
	for id, o := range d.operations {
		if id == "readyz" {
			continue
		}
		t.Run(id, func(t *testing.T) {
			t.Parallel()
			e := s.Do(o.method, o.target(t), o.exampleBody(t, "application/json"))
			// /metrics has a 503 only for an access token, see testTokens.
			if (e.StatusCode == 503) != (o.documents(503) && id != "metrics") {
				t.Error(e)
			}
			o.check(t, e)
		})
	}
}
