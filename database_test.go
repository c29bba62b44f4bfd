package main

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"github.com/jackc/pgx/v5"
	"net/url"
	"strings"
	"sync"
	"testing"
)

// withParameter adds a parameter to the URL of a database.
func withParameter(t *testing.T, databaseURL, name, value string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	query := u.Query()
	query.Set(name, value)
	u.RawQuery = strings.ReplaceAll(query.Encode(), "+", "%20") // pgx does not decode +
	return u.String()
}

// strangeName has characters that are special in SQL, arrays, JSON or messages.
const strangeName = `Łukasz 🙂 "quoted" {a,b} \ NULL '%s'`

// userBody returns the body of a POST or PUT.
func userBody(t *testing.T, name, surname string) string {
	t.Helper()
	user := map[string]string{"name": name, "surname": surname, "password": secret}
	body, err := json.Marshal(user)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// conform checks every operation of a service with these settings.
func conform(t *testing.T, s settings) {
	t.Helper()
	svc := startService(t, s)
	conn := connect(t, s.databaseURL)
	checkCreating(t, svc)
	checkChanging(t, svc)
	checkConcurrentChanges(t, svc, conn)
	stored := queryValue[string](t, conn,
		"SELECT encode(convert_to(name, 'UTF8'), 'hex') FROM users WHERE id = 2")
	if want := hex.EncodeToString([]byte(strangeName)); stored != want {
		t.Errorf("stored name: got %s, want %s", stored, want)
	}
	checkTotal(t, conn)
	waitForEmptyOutbox(t, conn)
	for _, line := range svc.log.lines("") {
		switch line["event"] {
		case "Database maintenance failed", "Event connection lost":
			t.Errorf("unexpected log line: %v", line)
		}
	}
}

// checkCreating creates the users 1 and 2.
func checkCreating(t *testing.T, svc *service) {
	t.Helper()
	body := userBody(t, strangeName, "Doe")
	first := svc.do("POST", "/users", body, "X-Request-Id: create-1")
	if first.status != 201 || first.json(t, "name") != strangeName {
		t.Fatalf("POST: got %d %s, want 201 with the name %s", first.status, first.body, strangeName)
	}
	keyed := svc.do("POST", "/users", body, "Idempotency-Key: key", "X-Request-Id: create-2")
	again := svc.do("POST", "/users", body, "Idempotency-Key: key")
	if keyed.status != 201 || again.status != 201 || keyed.body != again.body {
		t.Errorf("POST with a key: got %d %s, then %d %s, want the same answer twice",
			keyed.status, keyed.body, again.status, again.body)
	}
	other := svc.do("POST", "/users", userBody(t, "John", "Doe"), "Idempotency-Key: key")
	if other.status != 422 {
		t.Errorf("POST of another body with the key: got %d %s, want 422", other.status, other.body)
	}
	if a := svc.do("GET", "/users/1", ""); a.status != 200 || a.body != first.body {
		t.Errorf("GET: got %d %s, want %s", a.status, a.body, first.body)
	}
	if a := svc.do("GET", "/users", ""); a.status != 200 || a.json(t, "total") != 2.0 {
		t.Errorf("GET /users: got %d %s, want the total 2", a.status, a.body)
	}
	for id := 1; id <= 2; id++ {
		svc.waitForLine(fmt.Sprintf("Received event user.created with user_id=%d", id),
			"trace_id", fmt.Sprint("create-", id), "version", 1)
	}
}

// checkChanging changes user 1, verifies its password, and deletes it.
func checkChanging(t *testing.T, svc *service) {
	t.Helper()
	name := strangeName + " II"
	put := userBody(t, name, "Roe")
	const verification = "/users/1/password/verify"
	verify := func(password string) string { return fmt.Sprintf(`{"password": %q}`, password) }
	for _, step := range []struct {
		method, path, body string
		headers            []string
		status             int
		contains           string
	}{
		{method: "PUT", path: "/users/1", body: put, status: 200},
		{method: "PUT", path: "/users/1", body: `{"surname": "Roe"}`, status: 200},
		{method: "PUT", path: "/users/1", body: `{"surname": "Poe"}`, status: 412,
			headers: []string{`If-Match: "1", "7"`}},
		{method: "PATCH", path: "/users/1", body: `{"surname": "Poe"}`, status: 200,
			headers: []string{`If-Match: "2", "7"`}, contains: `"Poe"`},
		{method: "GET", path: "/users/1", status: 200, contains: `"Poe"`},
		{method: "POST", path: verification, body: verify(secret), status: 200, contains: "true"},
		{method: "POST", path: verification, body: verify("other"), status: 200, contains: "false"},
		{method: "PUT", path: "/users/99", body: put, status: 404},
		{method: "DELETE", path: "/users/1", status: 412, headers: []string{`If-Match: "2"`}},
		{method: "DELETE", path: "/users/1", status: 200, headers: []string{`If-Match: "3"`}},
		{method: "DELETE", path: "/users/1", status: 404},
		{method: "GET", path: "/users/1", status: 404},
	} {
		a := svc.do(step.method, step.path, step.body, step.headers...)
		if a.status != step.status || !strings.Contains(a.body, step.contains) {
			t.Errorf("%s %s %s with %v: got %d %s, want %d with %q", step.method, step.path, step.body,
				step.headers, a.status, a.body, step.status, step.contains)
		}
		if step.method == "PATCH" && a.json(t, "name") != name {
			t.Errorf("PATCH: got %s, want the name %s", a.body, name)
		}
	}
	for version, change := range map[int]string{2: "updated", 3: "updated", 4: "deleted"} {
		svc.waitForLine("Received event user."+change+" with user_id=1", "version", version)
	}
}

// checkConcurrentChanges changes four new users from many clients.
func checkConcurrentChanges(t *testing.T, svc *service, conn *pgx.Conn) {
	t.Helper()
	execute(t, conn, `INSERT INTO users (name, surname, password)
		SELECT 'John', 'Doe', 'x' FROM generate_series(1, 4)`)
	var ids []int64
	rows, err := conn.Query(t.Context(), "SELECT id FROM users WHERE id > 2")
	if err == nil {
		ids, err = pgx.CollectRows(rows, pgx.RowTo[int64])
	}
	if err != nil || len(ids) != 4 {
		t.Fatalf("new users: got %v, %v, want 4", ids, err)
	}
	var group sync.WaitGroup
	const clients, rounds = 12, 4
	for c := range clients {
		group.Go(func() {
			for i := range rounds {
				body := fmt.Sprintf(`{"name": "name %d %d"}`, c, i)
				a := svc.do("PUT", fmt.Sprint("/users/", ids[c%len(ids)]), body)
				if a.status != 200 || !strings.Contains(a.body, fmt.Sprintf(`"name %d %d"`, c, i)) {
					t.Errorf("PUT %s: got %d %s", body, a.status, a.body)
				}
			}
		})
	}
	group.Wait()
	for _, id := range ids {
		for version := 2; version <= 1+rounds*clients/len(ids); version++ {
			svc.waitForLine(fmt.Sprintf("Received event user.updated with user_id=%d", id),
				"version", version)
		}
	}
}

// TestDatabaseSettings runs the service with settings of the database that differ from the defaults of
// PostgreSQL.
func TestDatabaseSettings(t *testing.T) {
	t.Parallel()
	for _, setting := range []string{
		"default_transaction_isolation = 'repeatable read'",
		"default_transaction_isolation = 'serializable'",
		"default_transaction_isolation = 'read uncommitted'",
		"default_transaction_deferrable = on",
		"DateStyle = 'German, DMY'",
		"IntervalStyle = 'sql_standard'",
		"client_encoding = 'LATIN1'",
		"timezone = 'Asia/Kathmandu'",
		"synchronous_commit = off",
		"plan_cache_mode = force_custom_plan",
		"standard_conforming_strings = off",
		"bytea_output = 'escape'",
		"extra_float_digits = -15",
		"array_nulls = off",
		"row_security = off",
		"session_replication_role = local",
		"search_path = own, public",
	} {
		t.Run(setting, func(t *testing.T) {
			t.Parallel()
			conformWith(t, setting)
		})
	}
}

// conformWith runs the service with a setting of its role in its database. The schema named own exists.
func conformWith(t *testing.T, setting string) {
	t.Helper()
	s := memorySettings()
	s.databaseURL = emptyDatabase(t, "")
	conn := connect(t, asSuperuser(t, s.databaseURL))
	execute(t, conn, fmt.Sprintf(`CREATE SCHEMA own AUTHORIZATION %[1]s;
		ALTER ROLE %[1]s IN DATABASE %[2]s SET %[3]s`,
		template.role, conn.Config().Database, setting))
	conform(t, s)
	where := queryValue[string](t, conn,
		"SELECT string_agg(schemaname, ', ') FROM pg_tables WHERE tablename = 'users'")
	if want := strings.Contains(setting, "own"); (where == "own") != want {
		t.Errorf("schema of the table users: got %s, want own: %t", where, want)
	}
}

// TestExecModes runs the service in each mode in which pgx can send statements.
func TestExecModes(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"cache_statement", "cache_describe", "describe_exec", "exec",
		"simple_protocol"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			s := postgresSettings(t)
			s.databaseURL = withParameter(t, s.databaseURL, "default_query_exec_mode", mode)
			conform(t, s)
		})
	}
}

// TestSchemas checks that services in two schemas of one database do not share users or totals.
func TestSchemas(t *testing.T) {
	t.Parallel()
	database := emptyDatabase(t, "")
	conn := connect(t, database)
	execute(t, conn, `CREATE SCHEMA one; CREATE SCHEMA "The other"`)
	t.Run("conform", func(t *testing.T) {
		for _, schema := range []string{"one", `"The other"`} {
			t.Run(schema, func(t *testing.T) {
				t.Parallel()
				s := memorySettings()
				s.databaseURL = withParameter(t, database, "search_path", schema)
				conform(t, s)
			})
		}
	})
	for _, schema := range []string{"one", `"The other"`} {
		n := queryValue[int](t, conn, "SELECT count(*) FROM "+schema+".users")
		total := queryValue[int](t, conn, "SELECT sum(n) FROM "+schema+".user_counts")
		if n != 5 || total != 5 {
			t.Errorf("schema %s: got %d users and the total %d, want 5", schema, n, total)
		}
	}
	execute(t, conn, `TRUNCATE one.users`)
	if n := queryValue[int](t, conn, `SELECT sum(n) FROM "The other".user_counts`); n != 5 {
		t.Errorf("total after TRUNCATE in another schema: got %d, want 5", n)
	}
}

// TestSearchPathWithoutSchema checks that a database is refused, and not changed, if the search_path names
// no schema.
func TestSearchPathWithoutSchema(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	conn := connect(t, url)
	before := queryValue[string](t, conn, catalog)
	for _, path := range []string{"nowhere", ""} {
		log, err := openLogged(t, withParameter(t, url, "search_path", path))
		if err == nil || len(log.lines("")) > 0 || !strings.Contains(err.Error(), "search_path") {
			t.Errorf("search_path %q: got %v, want an error about search_path and an empty log\n%s", path, err,
				log)
		}
	}
	if lines := differences(before, queryValue[string](t, conn, catalog)); len(lines) > 0 {
		t.Errorf("changes of a refused database: got %q, want none", lines)
	}
}

// TestEncodings checks that the service works with encodings that can store every name, and refuses others.
func TestEncodings(t *testing.T) {
	t.Parallel()
	for encoding, usable := range map[string]bool{"UTF8": true, "SQL_ASCII": true, "LATIN1": false,
		"EUC_JP": false} {
		t.Run(encoding, func(t *testing.T) {
			t.Parallel()
			options := "TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C' ENCODING " + encoding
			s := memorySettings()
			s.databaseURL = emptyDatabase(t, options)
			if usable {
				conform(t, s)
				return
			}
			log, err := openLogged(t, s.databaseURL)
			if err == nil || len(log.lines("")) > 0 || !strings.Contains(err.Error(), encoding) {
				t.Errorf("got %v, want an error about %s and an empty log\n%s", err, encoding, log)
			}
			tables := queryValue[int](t, connect(t, s.databaseURL),
				"SELECT count(*) FROM pg_class WHERE relnamespace = current_schema()::regnamespace")
			if tables > 0 {
				t.Errorf("relations in a refused database: got %d, want none", tables)
			}
		})
	}
}
