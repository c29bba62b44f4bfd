package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// openLogged opens a database as the start of the service does, and closes it. It returns the log.
func openLogged(t *testing.T, databaseURL string) (*logBuffer, error) {
	t.Helper()
	log := &logBuffer{}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s, err := openPostgres(ctx, databaseURL, "test", newLogger(&logWriter{w: log}, 0))
	if err == nil {
		s.close()
	}
	return log, err
}

// repairs are changes of a database with the users 1 to 3, after which the service must start.
var repairs = []struct {
	name      string
	sql       string
	superuser bool
	users     int    // after the change
	line      string // a substring of the log of the repair, or "" if there is nothing to repair
}{
	{name: "all tables truncated",
		sql: "TRUNCATE users, outbox, idempotency_keys, user_counts, relay_lease"},
	{name: "all rows deleted", sql: `DELETE FROM users; DELETE FROM outbox;
		DELETE FROM idempotency_keys; DELETE FROM user_counts; DELETE FROM relay_lease`},
	{name: "triggers of users disabled", superuser: true, users: 5,
		sql: `ALTER TABLE users DISABLE TRIGGER ALL;
			INSERT INTO users (name, surname, password) VALUES ('a', 'b', 'c'), ('a', 'b', 'c')`,
		line: "trigger"},
	{name: "users restored without triggers", superuser: true, users: 5,
		sql: `ALTER TABLE users DISABLE TRIGGER ALL;
			INSERT INTO users (id, name, surname, password)
			VALUES (70, 'a', 'b', 'c'), (71, 'a', 'b', 'c');
			ALTER TABLE users ENABLE TRIGGER ALL`,
		line: "total"},
	{name: "users deleted with session_replication_role", superuser: true, users: 1,
		sql: `SET session_replication_role = replica; DELETE FROM users WHERE id > 1;
			RESET session_replication_role`,
		line: "total"},
	{name: "triggers of outbox disabled", users: 3, line: "trigger",
		sql: "ALTER TABLE outbox DISABLE TRIGGER USER"},
	{name: "triggers for replicas only", users: 3, line: "trigger",
		sql: "ALTER TABLE users ENABLE REPLICA TRIGGER user_service_insert"},
	{name: "TRUNCATE users", sql: "TRUNCATE users"},
	{name: "TRUNCATE outbox", users: 3, sql: "TRUNCATE outbox"},
	{name: "TRUNCATE outbox RESTART IDENTITY", users: 3, sql: "TRUNCATE outbox RESTART IDENTITY"},
	{name: "TRUNCATE idempotency_keys", users: 3, sql: "TRUNCATE idempotency_keys"},
	{name: "TRUNCATE user_counts", users: 3, sql: "TRUNCATE user_counts", line: "total"},
	{name: "TRUNCATE relay_lease", users: 3, sql: "TRUNCATE relay_lease"},
	{name: "DROP TABLE users", sql: "DROP TABLE users", line: "users"},
	{name: "DROP TABLE outbox", users: 3, sql: "DROP TABLE outbox", line: "outbox"},
	{name: "DROP TABLE idempotency_keys", users: 3, sql: "DROP TABLE idempotency_keys",
		line: "idempotency_keys"},
	{name: "DROP TABLE user_counts", users: 3, sql: "DROP TABLE user_counts", line: "total"},
	{name: "DROP TABLE relay_lease", users: 3, sql: "DROP TABLE relay_lease", line: "relay_lease"},
	{name: "users by CREATE TABLE AS", users: 3, line: "users",
		sql: `CREATE TABLE copy AS SELECT * FROM users; DROP TABLE users;
			ALTER TABLE copy RENAME TO users`},
	{name: "users by LIKE", users: 3, line: "users",
		sql: `CREATE TABLE copy (LIKE users); INSERT INTO copy SELECT * FROM users;
			DROP TABLE users; ALTER TABLE copy RENAME TO users`},
	{name: "users by LIKE INCLUDING ALL", users: 3, line: "users",
		sql: `CREATE TABLE copy (LIKE users INCLUDING ALL); INSERT INTO copy SELECT * FROM users;
			DROP TABLE users; ALTER TABLE copy RENAME TO users`},
	{name: "outbox by CREATE TABLE AS", users: 3, line: "outbox",
		sql: `CREATE TABLE copy AS SELECT * FROM outbox; DROP TABLE outbox;
			ALTER TABLE copy RENAME TO outbox`},
	{name: "outbox by LIKE INCLUDING ALL", users: 3, line: "outbox",
		sql: `CREATE TABLE copy (LIKE outbox INCLUDING ALL); DROP TABLE outbox;
			ALTER TABLE copy RENAME TO outbox`},
	{name: "idempotency_keys by CREATE TABLE AS", users: 3, line: "idempotency_keys",
		sql: `CREATE TABLE copy AS SELECT * FROM idempotency_keys; DROP TABLE idempotency_keys;
			ALTER TABLE copy RENAME TO idempotency_keys`},
	{name: "a trigger dropped", users: 3, sql: "DROP TRIGGER user_service_insert ON users",
		line: "user_service_insert"},
	{name: "the trigger of outbox dropped", users: 3, line: "user_service_adopt",
		sql: "DROP TRIGGER user_service_adopt ON outbox"},
	{name: "a function dropped", users: 3, sql: "DROP FUNCTION user_service_record CASCADE",
		line: "user_service_insert"},
	{name: "the function of event ids dropped", users: 3, line: "event_id",
		sql: "DROP FUNCTION user_service_uuid CASCADE"},
	{name: "the function of the schema version dropped", users: 3,
		sql: "DROP FUNCTION user_service_schema"},
	{name: "a check dropped", users: 3, sql: "ALTER TABLE users DROP CONSTRAINT user_service_id",
		line: "check"},
	{name: "the primary key dropped", users: 3, sql: "ALTER TABLE users DROP CONSTRAINT users_pkey",
		line: "primary key"},
	{name: "the identity dropped", users: 3, sql: "ALTER TABLE users ALTER id DROP IDENTITY",
		line: "identity"},
	{name: "the defaults dropped", users: 3, line: "default",
		sql: "ALTER TABLE users ALTER version DROP DEFAULT, ALTER created_at DROP DEFAULT"},
	{name: "the sequence of outbox set back", users: 3, line: "outbox",
		sql: `INSERT INTO users (name, surname, password) VALUES ('a', 'b', 'c');
			DELETE FROM users WHERE name = 'a'; ALTER TABLE outbox ALTER id RESTART`},
	{name: "users inserted with ids", users: 5,
		sql: `INSERT INTO users (id, name, surname, password)
			VALUES (4, 'a', 'b', 'c'), (5, 'a', 'b', 'c')`},
	{name: "users inserted with ids, without triggers", users: 5, superuser: true, line: "sequence",
		sql: `SET session_replication_role = replica;
			INSERT INTO users (id, name, surname, password)
			VALUES (4, 'a', 'b', 'c'), (5, 'a', 'b', 'c')`},
	{name: "the highest id", users: 4, sql: `INSERT INTO users (id, name, surname, password)
			VALUES (9223372036854775807, 'a', 'b', 'c')`},
	{name: "the sequence set back by setval", users: 3, line: "sequence",
		sql: "SELECT setval('users_id_seq', 1)"},
	{name: "the sequence restarted", users: 3, line: "sequence",
		sql: "ALTER TABLE users ALTER id RESTART"},
}

// TestStartRepairs makes each of the changes in repairs and starts the service. It checks that the
// service works and that a second start has nothing to repair.
func TestStartRepairs(t *testing.T) {
	t.Parallel()
	for _, test := range repairs {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			url := newDatabase(t)
			conn := connect(t, url)
			execute(t, conn, `INSERT INTO users (name, surname, password)
				SELECT 'John', 'Doe', 'x' FROM generate_series(1, 3)`)
			if test.superuser {
				execute(t, connect(t, asSuperuser(t, url)), test.sql)
			} else {
				execute(t, conn, test.sql)
			}
			checkRepaired(t, url, test.users, test.line)
		})
	}
}

// checkRepaired starts the service on a database with a number of users, and checks that it logs a
// repair that contains line, that it works, and that a second start repairs nothing.
func checkRepaired(t *testing.T, databaseURL string, users int, line string) {
	t.Helper()
	set := memorySettings()
	set.databaseURL = databaseURL
	svc := startService(t, set)
	var repaired []string
	for _, line := range svc.log.lines("Database repaired") {
		repaired = append(repaired, fmt.Sprint(line["what"]))
	}
	if line != "" && !strings.Contains(strings.Join(repaired, "\n"), line) {
		t.Errorf("repairs %q, want one that contains %q", repaired, line)
	}
	if log, err := openLogged(t, databaseURL); err != nil || len(log.lines("")) > 0 {
		t.Errorf("second start: error %v, want none and an empty log:\n%s", err, log)
	}
	checkServes(t, svc, users)
	conn := connect(t, databaseURL)
	checkTotal(t, conn)
	checkSchemaVersion(t, conn)
	nullable := queryValue[string](t, conn, `SELECT coalesce(string_agg(attname, ', '), '')
		FROM pg_attribute WHERE attrelid = 'users'::regclass AND attnum > 0 AND NOT attnotnull
			AND NOT attisdropped`)
	if nullable != "" {
		t.Errorf("columns of users that are not NOT NULL: %s", nullable)
	}
}

// checkServes checks that the service creates, changes, deletes and lists users, and publishes
// their events. users is the number of other users.
func checkServes(t *testing.T, svc *service, users int) {
	t.Helper()
	first := svc.do("POST", "/users", john, "Idempotency-Key: repaired")
	again := svc.do("POST", "/users", john, "Idempotency-Key: repaired")
	if first.status != 201 || first.body != again.body {
		t.Fatalf("POST with one key: status %d, then %d, want 201 and the same body: %s %s",
			first.status, again.status, first.body, again.body)
	}
	id := int64(first.json(t, "id").(float64))
	second := svc.createUser("Ann", "Lee")
	path := fmt.Sprint("/users/", id)
	a := svc.do("PUT", path, `{"name": "Jane"}`)
	if a.status != 200 || a.header.Get("ETag") != `"2"` {
		t.Errorf("PUT %s: status %d, ETag %s, want 200, \"2\": %s",
			path, a.status, a.header.Get("ETag"), a.body)
	}
	if a := svc.do("DELETE", fmt.Sprint("/users/", second), ""); a.status != 200 {
		t.Errorf("DELETE /users/%d: status %d, want 200: %s", second, a.status, a.body)
	}
	a = svc.do("GET", "/users?per_page=100", "")
	if a.status != 200 || a.json(t, "total") != float64(users+1) ||
		len(a.json(t, "users").([]any)) != users+1 {
		t.Errorf("GET /users: status %d, want 200 with %d users: %s", a.status, users+1, a.body)
	}
	svc.waitForLine(fmt.Sprintf("Received event user.updated with user_id=%d", id), "version", 2)
	svc.waitForLine(fmt.Sprintf("Received event user.deleted with user_id=%d", second),
		"version", 2)
}

// pgDump returns the output of pg_dump for a database, or "" if no pg_dump can read it.
func pgDump(t *testing.T, databaseURL string, options ...string) string {
	t.Helper()
	commands, err := filepath.Glob("/usr/lib/postgresql/*/bin/pg_dump")
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range append([]string{"pg_dump"}, commands...) {
		arguments := append(slices.Clone(options), databaseURL)
		dump, err := exec.CommandContext(t.Context(), command, arguments...).Output()
		if err == nil { // pg_dump is installed and not older than the server
			return withoutPsql(string(dump))
		}
	}
	return ""
}

// withoutPsql removes the psql commands that newer releases of pg_dump write.
func withoutPsql(dump string) string {
	var sql strings.Builder
	for line := range strings.Lines(dump) {
		if !strings.HasPrefix(line, `\`) {
			sql.WriteString(line)
		}
	}
	return sql.String()
}

// TestStartOnSchemaDump checks the start on a database into which a dump of the schema was
// restored.
func TestStartOnSchemaDump(t *testing.T) {
	t.Parallel()
	set := postgresSettings(t)
	startService(t, set).createUser("John", "Doe")
	dump := pgDump(t, set.databaseURL, "--schema-only")
	url := emptyDatabase(t, "")
	if dump == "" {
		t.Log("there is no pg_dump")
		return
	}
	execute(t, connect(t, url), dump)
	checkRepaired(t, url, 0, "")
}

// TestStartOnDataDump checks the start on a database with the schema, into which a dump of data was
// restored.
func TestStartOnDataDump(t *testing.T) {
	t.Parallel()
	from := newDatabase(t)
	source := openTestPostgres(t, from)
	for _, key := range []string{"", "key", "other"} {
		if _, err := source.createUser(t.Context(), input("John", "Doe", "hash"), key); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := source.updateUser(t.Context(), 3, input("Jane", "", ""), nil); err != nil {
		t.Fatal(err)
	}
	for name, options := range map[string][]string{
		"users":                     {"--table=users"},
		"users, triggers disabled":  {"--table=users", "--disable-triggers"},
		"tables":                    {},
		"tables, triggers disabled": {"--disable-triggers"},
	} {
		dump := pgDump(t, from, append([]string{"--data-only", "--inserts"}, options...)...)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if dump == "" {
				t.Log("there is no pg_dump")
				return
			}
			url := newDatabase(t)
			conn := connect(t, asSuperuser(t, url))
			execute(t, conn, dump)
			checkRepaired(t, url, 3, "")
			version := queryValue[int](t, conn, "SELECT version FROM public.users WHERE id = 3")
			if version != 2 {
				t.Errorf("user 3 has version %d after the restore, want 2", version)
			}
		})
	}
}

// TestConcurrentStarts opens an empty database concurrently, and checks that each call succeeds and
// that a later one does not change the schema.
func TestConcurrentStarts(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	conn := connect(t, url)
	// Before PostgreSQL 15, the owner of a database does not own its schema public.
	if _, err := conn.Exec(t.Context(), "DROP OWNED BY CURRENT_USER"); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 5 {
		group.Go(func() {
			log := newLogger(&logWriter{w: t.Output()}, 0)
			s, err := openPostgres(context.Background(), url, "test", log)
			if err != nil {
				t.Error(err)
				return
			}
			s.close()
		})
	}
	group.Wait()
	const relations = `SELECT string_agg(c.oid || c.relname || c.relfilenode, ' ' ORDER BY c.oid)
		FROM pg_class c WHERE relnamespace = 'public'::regnamespace`
	before := queryValue[string](t, conn, relations)
	mustCreate(t, openTestPostgres(t, url), "John")
	if after := queryValue[string](t, conn, relations); after != before {
		t.Errorf("a later start changed the schema from\n%s\nto\n%s", before, after)
	}
}

// newestSchema replaces the version of the schema by one that this release cannot use.
const newestSchema = `
	CREATE OR REPLACE FUNCTION user_service_schema(OUT version int, OUT oldest int)
	LANGUAGE sql IMMUTABLE AS 'SELECT 9, 9'`

// unusableDatabases are databases that the service refuses to use.
var unusableDatabases = []struct {
	name      string
	empty     bool     // the database has no schema
	superuser bool     // a superuser runs sql, not the owner
	sql       string   // $role is another role than the owner
	other     bool     // $role opens the database, not the owner
	says      []string // substrings of the error; | separates alternatives
}{
	{name: "a table users with other types", empty: true, says: []string{"public.users", "id"},
		sql: `CREATE TABLE users (id uuid, name text, surname text, password text, version int,
			created_at timestamptz, updated_at timestamptz)`},
	{name: "a table users with other columns", empty: true,
		sql:  "CREATE TABLE users (id serial PRIMARY KEY, email text, encrypted_password text)",
		says: []string{"public.users", "name", "surname", "DATABASE_URL|database|schema"}},
	{name: "a table outbox with other columns", empty: true,
		sql:  "CREATE TABLE outbox (id bigint PRIMARY KEY, payload json)",
		says: []string{"public.outbox", "event_id"}},
	{name: "a view users", empty: true,
		sql: `CREATE VIEW users AS SELECT 1::bigint AS id, '' AS name, '' AS surname,
			'' AS password, 1::bigint AS version, now() AS created_at, now() AS updated_at`,
		says: []string{"public.users"}},
	{name: "a sequence users", empty: true, sql: "CREATE SEQUENCE users",
		says: []string{"public.users"}},
	{name: "a table of another role", superuser: true, other: true,
		sql: `GRANT ALL ON ALL TABLES IN SCHEMA public TO $role;
			GRANT ALL ON SCHEMA public TO $role`,
		says: []string{"belongs to the role", "$role", "$owner"}},
	{name: "a role without CREATE", empty: true, superuser: true, other: true,
		sql:  "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
		says: []string{"public", "permission|rights"}},
	{name: "a newer schema", sql: newestSchema, says: []string{"version 9", "2"}},
}

// TestStartRefuses checks that opening an unusable database fails without a second attempt, that
// the error says what was found, and that nothing is changed.
func TestStartRefuses(t *testing.T) {
	t.Parallel()
	for _, test := range unusableDatabases {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			role := newRole(t)
			create := newDatabase
			if test.empty {
				create = func(t *testing.T) string { return emptyDatabase(t, "") }
			}
			url := create(t)
			opened, conn := url, connect(t, url)
			if test.other {
				opened = asRole(t, url, role)
			}
			replacer := strings.NewReplacer("$role", role, "$owner", template.role)
			sql := replacer.Replace(test.sql)
			if test.superuser {
				execute(t, connect(t, asSuperuser(t, url)), sql)
			} else {
				execute(t, conn, sql)
			}
			before := queryValue[string](t, conn, catalog)
			log, err := openLogged(t, opened)
			if err == nil || len(log.lines("")) > 0 {
				t.Fatalf("error %v, want one without a line in the log:\n%s", err, log)
			}
			for _, text := range test.says {
				if !containsAny(err.Error(), strings.Split(replacer.Replace(text), "|")) {
					t.Errorf("the error does not contain %q: %v", text, err)
				}
			}
			after := queryValue[string](t, conn, catalog)
			if lines := differences(before, after); len(lines) > 0 {
				t.Errorf("the refused database was changed: %q", lines)
			}
		})
	}
}

// containsAny reports whether text contains one of the words.
func containsAny(text string, words []string) bool {
	for _, word := range words {
		if strings.Contains(text, word) {
			return true
		}
	}
	return false
}

// TestStartOnNewerSchema checks that the service works on the schema of a newer release that
// supports it, and repairs nothing, because it does not know that schema.
func TestStartOnNewerSchema(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	conn := connect(t, url)
	execute(t, conn, `
		CREATE OR REPLACE FUNCTION user_service_schema(OUT version int, OUT oldest int)
		LANGUAGE sql IMMUTABLE AS 'SELECT 3, 2';
		DROP TRIGGER user_service_keep_ids ON users;
		ALTER TABLE users ADD COLUMN email text;
		ALTER TABLE users DROP CONSTRAINT user_service_times`)
	before := queryValue[string](t, conn, catalog)
	set := memorySettings()
	set.databaseURL = url
	svc := startService(t, set)
	checkServes(t, svc, 0)
	if lines := svc.log.lines("Database repaired"); len(lines) > 0 {
		t.Errorf("the newer schema was repaired: %v", lines)
	}
	if lines := differences(before, queryValue[string](t, conn, catalog)); len(lines) > 0 {
		t.Errorf("the newer schema was changed: %q", lines)
	}
}

// TestStartGivesUp checks that opening a database fails after three attempts if the database or the
// role does not exist. Somebody may be creating it, so one attempt is not enough.
func TestStartGivesUp(t *testing.T) {
	t.Parallel()
	existing := newDatabase(t)
	for name, url := range map[string]string{
		"a missing database": databaseURL(uniqueName()),
		"a missing role":     asRole(t, existing, uniqueName()),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			log, err := openLogged(t, url)
			if err == nil {
				t.Fatal("no error")
			}
			if n := len(log.lines("Waiting for the database")); n != 2 {
				t.Errorf("%d lines \"Waiting for the database\", want 2; error %v", n, err)
			}
		})
	}
}

// TestStartWaitsForDatabase checks that the start succeeds if the missing database is created while
// it waits.
func TestStartWaitsForDatabase(t *testing.T) {
	t.Parallel()
	templateDatabase(t) // for the role
	name := uniqueName()
	t.Cleanup(func() { leftovers.dropDatabase(name) })
	log := &logBuffer{}
	opened := make(chan error)
	go func() {
		logger := newLogger(&logWriter{w: log}, 0)
		s, err := openPostgres(context.Background(), databaseURL(name), "test", logger)
		if err == nil {
			s.close()
		}
		opened <- err
	}()
	eventually(t, "a line \"Waiting for the database\"", func() bool {
		return len(log.lines("Waiting for the database")) > 0
	})
	err := admin(t.Context(), fmt.Sprintf("CREATE DATABASE %s OWNER %s", name, template.role))
	if err != nil {
		t.Error(err)
	}
	if err := <-opened; err != nil {
		t.Error(err)
	}
}
