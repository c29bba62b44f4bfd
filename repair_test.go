package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// openLogged opens the database as a start does, and closes it again.
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

// repairs are the disturbances that a start repairs. There are the users 1 to 3 before.
var repairs = []struct {
	name      string
	sql       string
	superuser bool
	users     int    // that are left
	line      string // what a line of the log says; "" where nothing needs a repair
}{
	{name: "no content at all",
		sql: "TRUNCATE users, outbox, idempotency_keys, user_counts, relay_lease"},
	{name: "no content, deleted", sql: `DELETE FROM users; DELETE FROM outbox;
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
	{name: "users deleted by a replica", superuser: true, users: 1,
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
	{name: "the function of ids dropped", users: 3, sql: "DROP FUNCTION user_service_uuid CASCADE",
		line: "event_id"},
	{name: "the version dropped", users: 3, sql: "DROP FUNCTION user_service_schema"},
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
	{name: "ids copied", users: 5, sql: `INSERT INTO users (id, name, surname, password)
			VALUES (4, 'a', 'b', 'c'), (5, 'a', 'b', 'c')`},
	{name: "ids copied without triggers", users: 5, superuser: true, line: "sequence",
		sql: `SET session_replication_role = replica; INSERT INTO users (id, name, surname, password)
			VALUES (4, 'a', 'b', 'c'), (5, 'a', 'b', 'c')`},
	{name: "the highest id", users: 4, sql: `INSERT INTO users (id, name, surname, password)
			VALUES (9223372036854775807, 'a', 'b', 'c')`},
	{name: "the sequence set back by setval", users: 3, line: "sequence",
		sql: "SELECT setval('users_id_seq', 1)"},
	{name: "the sequence restarted", users: 3, line: "sequence",
		sql: "ALTER TABLE users ALTER id RESTART"},
}

// TestStartRepairs disturbs a database and starts the service: it works, and a second start has
// nothing to repair.
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

// checkRepaired starts the service twice on a database with so many users.
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
		t.Errorf("what the log says of the repair has no %q: %q", line, repaired)
	}
	if log, err := openLogged(t, databaseURL); err != nil || len(log.lines("")) > 0 {
		t.Errorf("a second start: %v\n%s", err, log)
	}
	checkServes(t, svc, users)
	conn := connect(t, databaseURL)
	checkTotal(t, conn)
	checkSchemaVersion(t, conn)
	nullable := queryValue[string](t, conn, `SELECT coalesce(string_agg(attname, ', '), '')
		FROM pg_attribute WHERE attrelid = 'users'::regclass AND attnum > 0 AND NOT attnotnull
			AND NOT attisdropped`)
	if nullable != "" {
		t.Errorf("users may have no %s", nullable)
	}
}

// checkServes creates, changes and deletes users, beside so many others.
func checkServes(t *testing.T, svc *service, users int) {
	t.Helper()
	first := svc.do("POST", "/users", john, "Idempotency-Key: repaired")
	again := svc.do("POST", "/users", john, "Idempotency-Key: repaired")
	if first.status != 201 || first.body != again.body {
		t.Fatalf("POST: %d %s, then %d %s", first.status, first.body, again.status, again.body)
	}
	id := int64(first.json(t, "id").(float64))
	second := svc.createUser("Ann", "Lee")
	path := fmt.Sprint("/users/", id)
	a := svc.do("PUT", path, `{"name": "Jane"}`)
	if a.status != 200 || a.header.Get("ETag") != `"2"` {
		t.Errorf("PUT: %d %s", a.status, a.body)
	}
	if a := svc.do("DELETE", fmt.Sprint("/users/", second), ""); a.status != 200 {
		t.Errorf("DELETE: %d %s", a.status, a.body)
	}
	a = svc.do("GET", "/users?per_page=100", "")
	if a.status != 200 || a.json(t, "total") != float64(users+1) ||
		len(a.json(t, "users").([]any)) != users+1 {
		t.Errorf("the list of %d users: %d %s", users+1, a.status, a.body)
	}
	svc.waitForLine(fmt.Sprintf("Received event user.updated with user_id=%d", id), "version", 2)
	svc.waitForLine(fmt.Sprintf("Received event user.deleted with user_id=%d", second),
		"version", 2)
}

// pgDump returns what pg_dump says of a database, or "" where there is no pg_dump that can.
func pgDump(t *testing.T, databaseURL string, options ...string) string {
	t.Helper()
	commands, err := filepath.Glob("/usr/lib/postgresql/*/bin/pg_dump")
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range append([]string{"pg_dump"}, commands...) {
		arguments := append(slices.Clone(options), databaseURL)
		dump, err := exec.CommandContext(t.Context(), command, arguments...).Output()
		if err == nil { // it is installed, and not older than the server
			return withoutPsql(string(dump))
		}
	}
	return ""
}

// TestStartOnDumpOfSchema restores a dump of the schema alone into an empty database.
func TestStartOnDumpOfSchema(t *testing.T) {
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

// TestStartOnDumpOfData restores data into a database that has the schema already.
func TestStartOnDumpOfData(t *testing.T) {
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
				t.Errorf("a user of version 2 has version %d", version)
			}
		})
	}
}

// withoutPsql takes out the commands of psql that newer releases of pg_dump write.
func withoutPsql(dump string) string {
	var sql strings.Builder
	for line := range strings.Lines(dump) {
		if !strings.HasPrefix(line, `\`) {
			sql.WriteString(line)
		}
	}
	return sql.String()
}

// TestCreatePassesUsedIDs creates users while the sequence is behind ids in use.
func TestCreatePassesUsedIDs(t *testing.T) {
	t.Parallel()
	for _, key := range []string{"", "key"} {
		t.Run("key="+key, func(t *testing.T) {
			t.Parallel()
			svc := startService(t, postgresSettings(t))
			svc.createUser("John", "Doe")
			conn := connect(t, svc.settings.databaseURL)
			execute(t, conn, `INSERT INTO users (id, name, surname, password)
				SELECT i, 'Copied', 'C', 'x' FROM generate_series(2, 40) AS i`)
			var headers []string
			if key != "" {
				headers = []string{"Idempotency-Key: " + key}
			}
			a := svc.do("POST", "/users", john, headers...)
			if a.status != 201 || a.json(t, "id").(float64) <= 40 {
				t.Errorf("%d %s", a.status, a.body)
			}
			execute(t, conn, "SELECT setval(pg_get_serial_sequence('users', 'id'), 1, false)")
			if id := svc.createUser("Jane", "Doe"); id <= 41 {
				t.Errorf("id %d was used before", id)
			}
			checkTotal(t, conn)
		})
	}
}

// TestStartRefuses opens databases that will never do. The error comes at once, says what was
// found, and nothing was touched.
func TestStartRefuses(t *testing.T) {
	t.Parallel()
	const newest = `CREATE OR REPLACE FUNCTION user_service_schema(OUT version int, OUT oldest int)
		LANGUAGE sql IMMUTABLE AS 'SELECT 9, 9'`
	for _, test := range []struct {
		name      string
		empty     bool   // no schema is there before
		superuser bool   // runs sql
		sql       string // $role is the role that opens the database
		other     bool   // another role than the owner of the tables opens it
		says      []string
	}{
		{name: "a foreign table users with our names", empty: true, says: []string{"public.users", "id"},
			sql: `CREATE TABLE users (id uuid, name text, surname text, password text, version int,
				created_at timestamptz, updated_at timestamptz)`},
		{name: "a foreign table users", empty: true,
			sql:  "CREATE TABLE users (id serial PRIMARY KEY, email text, encrypted_password text)",
			says: []string{"public.users", "name", "surname", "DATABASE_URL|database|schema"}},
		{name: "a foreign table outbox", empty: true,
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
		{name: "a newer schema", sql: newest, says: []string{"version 9", "2"}},
	} {
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
				t.Fatalf("the database was not refused at once: %v\n%s", err, log)
			}
			for _, text := range test.says {
				if !containsAny(err.Error(), strings.Split(replacer.Replace(text), "|")) {
					t.Errorf("the error has no %q: %v", text, err)
				}
			}
			after := queryValue[string](t, conn, catalog)
			if lines := differences(before, after); len(lines) > 0 {
				t.Errorf("a refused database was changed: %q", lines)
			}
		})
	}
}

func containsAny(text string, words []string) bool {
	for _, word := range words {
		if strings.Contains(text, word) {
			return true
		}
	}
	return false
}

// TestStartOnNewerSchema starts on a schema that a newer release has made and that this one can
// use: it repairs nothing, because it does not know what is right.
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
		t.Errorf("a newer schema was repaired: %v", lines)
	}
	if lines := differences(before, queryValue[string](t, conn, catalog)); len(lines) > 0 {
		t.Errorf("a newer schema was changed: %q", lines)
	}
}

// TestStartGivesUp opens a database that is missing, or as a role that is: that may be a matter of
// seconds, so it is tried three times.
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
				t.Fatal("opened")
			}
			if n := len(log.lines("Waiting for the database")); n != 2 {
				t.Errorf("%d lines of waiting, want 2, before %v", n, err)
			}
		})
	}
}

// TestStartWaitsForADatabase creates a missing database while the service waits.
func TestStartWaitsForADatabase(t *testing.T) {
	t.Parallel()
	templateDatabase(t) // for the role
	name := uniqueName()
	t.Cleanup(func() { leftovers.dropDatabase(name) })
	log := &logBuffer{}
	opened := make(chan error)
	go func() {
		s, err := openPostgres(context.Background(), databaseURL(name), "test", newLogger(&logWriter{w: log}, 0))
		if err == nil {
			s.close()
		}
		opened <- err
	}()
	eventually(t, "a line of waiting", func() bool {
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
