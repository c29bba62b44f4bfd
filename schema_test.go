package main

// Tests of schema.sql: the triggers, the repair of a damaged schema, and the upgrade of an older
// one.

import (
	"context"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// asRole returns the URL of a test's database as another role, whose password is its name.
func asRole(t *testing.T, databaseURL, role string) string {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, role)
	return u.String()
}

// asSuperuser returns the URL of a test's database as the superuser of the tests.
func asSuperuser(t *testing.T, databaseURL string) string {
	t.Helper()
	own, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	super, err := url.Parse(testDatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	own.User = super.User
	return own.String()
}

// newRole returns a role that only this test uses.
func newRole(t *testing.T) string {
	t.Helper()
	role := uniqueName()
	err := admin(t.Context(), fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s'", role, role))
	if err != nil {
		missing(t, "PostgreSQL", err)
	}
	leftovers.dropRole(role)
	return role
}

// execute runs statements, or a single one if there are arguments.
func execute(t *testing.T, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
		t.Fatalf("%v in %.300s", err, sql)
	}
}

// checkTotal checks that the total equals the number of users.
func checkTotal(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	total := queryValue[int](t, conn, "SELECT coalesce(sum(n), -1) FROM user_counts")
	if n := queryValue[int](t, conn, "SELECT count(*) FROM users"); n != total {
		t.Errorf("total %d, want %d", total, n)
	}
}

// writers are changes of users in SQL. Each begins with the users 1 Ann in version 1, 2 Bob in
// version 5 and 3 Cid in version 1, and the next id is 11.
var writers = []struct {
	name   string
	sql    string
	users  string // id, name and version, and * if updated_at is new
	events string // type, id and version
	since  int    // the minimum server_version_num
}{
	{
		name:   "INSERT of one row",
		sql:    "INSERT INTO users (name, surname, password) VALUES ('New', 'N', 'x')",
		users:  "1 Ann 1, 2 Bob 5, 3 Cid 1, 11 New 1*",
		events: "created 11/1",
	},
	{
		name: "INSERT of many rows",
		sql: `INSERT INTO users (name, surname, password)
			SELECT 'New', 'N', 'x' FROM generate_series(1, 3)`,
		users:  "1 Ann 1, 2 Bob 5, 3 Cid 1, 11 New 1*, 12 New 1*, 13 New 1*",
		events: "created 11/1, created 12/1, created 13/1",
	},
	{
		name: "INSERT with id and version",
		sql: `INSERT INTO users (id, name, surname, password, version)
			VALUES (7, 'New', 'N', 'x', 9)`,
		users:  "1 Ann 1, 2 Bob 5, 3 Cid 1, 7 New 9*",
		events: "created 7/9",
	},
	{
		name:  "INSERT of no row",
		sql:   "INSERT INTO users (name, surname, password) SELECT '', '', '' WHERE false",
		users: "1 Ann 1, 2 Bob 5, 3 Cid 1",
	},
	{
		name:   "UPDATE of one row",
		sql:    "UPDATE users SET name = 'Eve' WHERE id = 2",
		users:  "1 Ann 1, 2 Eve 6*, 3 Cid 1",
		events: "updated 2/6",
	},
	{
		name:   "UPDATE of many rows",
		sql:    "UPDATE users SET surname = 'Roe'",
		users:  "1 Ann 2*, 2 Bob 6*, 3 Cid 2*",
		events: "updated 1/2, updated 2/6, updated 3/2",
	},
	{
		name:   "UPDATE of a password",
		sql:    "UPDATE users SET password = 'y' WHERE id = 1",
		users:  "1 Ann 2*, 2 Bob 5, 3 Cid 1",
		events: "updated 1/2",
	},
	{
		name:   "UPDATE of created_at",
		sql:    "UPDATE users SET created_at = '2019-01-01' WHERE id = 1",
		users:  "1 Ann 2*, 2 Bob 5, 3 Cid 1",
		events: "updated 1/2",
	},
	{
		name:  "UPDATE that changes nothing",
		sql:   "UPDATE users SET name = name, password = password",
		users: "1 Ann 1, 2 Bob 5, 3 Cid 1",
	},
	{
		name:   "UPDATE that changes one row of several",
		sql:    "UPDATE users SET name = 'Ann'",
		users:  "1 Ann 1, 2 Ann 6*, 3 Ann 2*",
		events: "updated 2/6, updated 3/2",
	},
	{
		name:  "UPDATE of only version and updated_at",
		sql:   "UPDATE users SET version = 50, updated_at = now() + interval '1 day'",
		users: "1 Ann 1, 2 Bob 5, 3 Cid 1",
	},
	{
		name: "UPDATE of a version and a name",
		sql: `UPDATE users SET version = 1, name = 'Eve', updated_at = '2001-01-01'
			WHERE id = 2`,
		users:  "1 Ann 1, 2 Eve 6*, 3 Cid 1",
		events: "updated 2/6",
	},
	{
		name:  "rehash",
		sql:   "SET LOCAL user_service.rehash = 'on'; UPDATE users SET password = 'y' WHERE id = 2",
		users: "1 Ann 1, 2 Bob 5, 3 Cid 1",
	},
	{
		name: "rehash with another name",
		sql: `SET LOCAL user_service.rehash = 'on';
			UPDATE users SET password = 'y', name = 'Eve' WHERE id = 2`,
		users:  "1 Ann 1, 2 Eve 6*, 3 Cid 1",
		events: "updated 2/6",
	},
	{
		name:   "DELETE of one row",
		sql:    "DELETE FROM users WHERE id = 2",
		users:  "1 Ann 1, 3 Cid 1",
		events: "deleted 2/6",
	},
	{
		name:   "DELETE of all rows",
		sql:    "DELETE FROM users",
		events: "deleted 1/2, deleted 2/6, deleted 3/2",
	},
	{
		name:   "TRUNCATE",
		sql:    "TRUNCATE users",
		events: "deleted 1/2, deleted 2/6, deleted 3/2",
	},
	{
		name: "INSERT ON CONFLICT DO UPDATE",
		sql: `INSERT INTO users (id, name, surname, password)
			VALUES (2, 'Eve', 'N', 'x'), (7, 'New', 'N', 'x')
			ON CONFLICT (id) DO UPDATE SET name = excluded.name`,
		users:  "1 Ann 1, 2 Eve 6*, 3 Cid 1, 7 New 1*",
		events: "updated 2/6, created 7/1",
	},
	{
		name: "INSERT ON CONFLICT DO NOTHING",
		sql: `INSERT INTO users (id, name, surname, password)
			VALUES (2, 'Eve', 'N', 'x'), (7, 'New', 'N', 'x') ON CONFLICT DO NOTHING`,
		users:  "1 Ann 1, 2 Bob 5, 3 Cid 1, 7 New 1*",
		events: "created 7/1",
	},
	{
		name: "several modifying CTEs",
		sql: `WITH i AS (
				INSERT INTO users (id, name, surname, password) VALUES (7, 'New', 'N', 'x')),
			u AS (UPDATE users SET name = 'Eve' WHERE id = 1),
			v AS (UPDATE users SET name = 'Eve' WHERE id = 2)
			DELETE FROM users WHERE id = 3`,
		users:  "1 Eve 2*, 2 Eve 6*, 7 New 1*",
		events: "updated 1/2, updated 2/6, deleted 3/2, created 7/1",
	},
	{
		name: "MERGE",
		sql: `MERGE INTO users USING (VALUES (1), (2), (7)) AS v (v) ON id = v
			WHEN MATCHED AND id = 1 THEN DELETE
			WHEN MATCHED THEN UPDATE SET name = 'Eve'
			WHEN NOT MATCHED THEN INSERT (id, name, surname, password) VALUES (v, 'New', 'N', 'x')`,
		users:  "2 Eve 6*, 3 Cid 1, 7 New 1*",
		events: "deleted 1/2, updated 2/6, created 7/1",
		since:  150000,
	},
	{
		name: "savepoints rolled back",
		sql: `UPDATE users SET name = 'Eve' WHERE id = 1; SAVEPOINT s;
			UPDATE users SET name = 'Fay'; DELETE FROM users WHERE id = 3; ROLLBACK TO s;
			UPDATE users SET name = 'Gil' WHERE id = 1`,
		users:  "1 Gil 3*, 2 Bob 5, 3 Cid 1",
		events: "updated 1/2, updated 1/3",
	},
	{
		name:  "a transaction rolled back",
		sql:   "UPDATE users SET name = 'Eve'; DELETE FROM users WHERE id = 1; ROLLBACK; BEGIN",
		users: "1 Ann 1, 2 Bob 5, 3 Cid 1",
	},
	{
		name: "several changes in a transaction",
		sql: `UPDATE users SET name = 'Eve' WHERE id = 1;
			UPDATE users SET name = 'Fay' WHERE id = 1;
			DELETE FROM users WHERE id = 1`,
		users:  "2 Bob 5, 3 Cid 1",
		events: "updated 1/2, updated 1/3, deleted 1/4",
	},
}

// resetWriters replaces the users by those that writers begin with.
const resetWriters = `
	DELETE FROM users;
	INSERT INTO users (id, name, surname, password, version, created_at, updated_at) VALUES
		(1, 'Ann', 'Doe', 'x', 1, '2020-01-01', '2020-01-01'),
		(2, 'Bob', 'Doe', 'x', 5, '2020-01-01', '2020-01-01'),
		(3, 'Cid', 'Doe', 'x', 1, '2020-01-01', '2020-01-01');
	DELETE FROM outbox;
	SELECT setval(pg_get_serial_sequence('users', 'id'), 10);`

// usersText and eventsText are queries that return the columns users and events of writers.
const (
	usersText = `SELECT coalesce(string_agg(format('%s %s %s%s', id, name, version,
			CASE WHEN updated_at > '2021-01-01' THEN '*' END), ', ' ORDER BY id), '')
		FROM users`
	eventsText = `SELECT coalesce(string_agg(format('%s %s/%s', substr(event_type, 6), user_id,
			version), ', ' ORDER BY user_id, version), '')
		FROM outbox`
)

// TestTriggers checks the versions, the events and the total after each of writers, by the owner of
// the tables and by a role with an empty search_path.
func TestTriggers(t *testing.T) {
	t.Parallel()
	role := newRole(t)
	direct := newDatabase(t)
	owner := connect(t, direct)
	execute(t, owner, fmt.Sprintf(`
		GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON users TO %[1]s;
		GRANT USAGE ON SEQUENCE users_id_seq TO %[1]s`, role))
	guest := connect(t, asRole(t, direct, role))
	server := queryValue[int](t, owner, "SELECT current_setting('server_version_num')::int")
	for _, test := range writers {
		if test.since > server {
			continue
		}
		for writer, conn := range map[string]*pgx.Conn{"owner": owner, "guest": guest} {
			begin, sql := "BEGIN;", test.sql
			if conn == guest {
				begin = "BEGIN; SET LOCAL search_path = '';"
				sql = strings.NewReplacer("INTO users", "INTO public.users", "UPDATE users",
					"UPDATE public.users", "FROM users", "FROM public.users", "TRUNCATE users",
					"TRUNCATE public.users").Replace(sql)
			}
			execute(t, owner, resetWriters)
			execute(t, conn, begin+sql+"; COMMIT")
			if got := queryValue[string](t, owner, usersText); got != test.users {
				t.Errorf("%s by the %s: users %s, want %s", test.name, writer, got, test.users)
			}
			if got := queryValue[string](t, owner, eventsText); got != test.events {
				t.Errorf("%s by the %s: events %q, want %q", test.name, writer, got, test.events)
			}
			checkTotal(t, owner)
			checkEvents(t, owner)
		}
	}
}

// checkEvents checks what holds for each event: its ids, its time, which is that of the user in the
// same version, and its order.
func checkEvents(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	rows, _ := conn.Query(t.Context(), `
		SELECT event_id::text, trace_id, outbox.occurred_at, coalesce(users.updated_at, occurred_at)
		FROM outbox LEFT JOIN users ON users.id = user_id AND users.version = outbox.version`)
	var eventID, traceID string
	var occurred, updated time.Time
	_, err := pgx.ForEachRow(rows, []any{&eventID, &traceID, &occurred, &updated}, func() error {
		binary, err := hex.DecodeString(strings.ReplaceAll(eventID, "-", ""))
		if err != nil {
			return err
		}
		if binary[6]>>4 != 7 || binary[8]>>6 != 2 {
			t.Errorf("event id %s, want a UUIDv7", eventID)
		}
		var milliseconds int64
		for _, b := range binary[:6] {
			milliseconds = milliseconds<<8 | int64(b)
		}
		if age := time.Since(time.UnixMilli(milliseconds)); age.Abs() > time.Minute {
			t.Errorf("event id %s: its time is %v ago, want less than a minute", eventID, age)
		}
		if !requestIDPattern.MatchString(traceID) {
			t.Errorf("trace id %q is not valid", traceID)
		}
		if occurred.Before(updated) || time.Since(occurred) > time.Minute {
			t.Errorf("occurred_at %v, want a time of this minute, not before updated_at %v",
				occurred, updated)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	disorder := queryValue[int](t, conn, `
		SELECT count(*) FROM outbox a JOIN outbox b USING (user_id)
		WHERE a.id < b.id AND a.version >= b.version`)
	if disorder > 0 {
		t.Errorf("%d pairs of events of one user are not in the order of versions", disorder)
	}
}

// TestTruncateKeepsIDs checks that the first user after TRUNCATE has an id that was not used
// before.
func TestTruncateKeepsIDs(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, before, truncate string }{
		{name: "continued", truncate: "TRUNCATE users"},
		{name: "restarted", truncate: "TRUNCATE users RESTART IDENTITY"},
		{name: "restarted, with the last user deleted", before: "DELETE FROM users WHERE id > 5",
			truncate: "TRUNCATE users RESTART IDENTITY"},
		{name: "restarted, with all users deleted", before: "DELETE FROM users",
			truncate: "TRUNCATE users RESTART IDENTITY"},
		{name: "restarted twice", before: "TRUNCATE users RESTART IDENTITY",
			truncate: "TRUNCATE users RESTART IDENTITY"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			conn := connect(t, newDatabase(t))
			execute(t, conn, `INSERT INTO users (name, surname, password)
				SELECT 'John', 'Doe', 'x' FROM generate_series(1, 10)`)
			execute(t, conn, test.before)
			execute(t, conn, test.truncate)
			id := queryValue[int64](t, conn, `INSERT INTO users (name, surname, password)
				VALUES ('John', 'Doe', 'x') RETURNING id`)
			if id <= 10 {
				t.Errorf("id %d, want more than 10", id)
			}
			checkTotal(t, conn)
		})
	}
}

// TestTriggersOnCopy checks the versions, the events and the total after COPY.
func TestTriggersOnCopy(t *testing.T) {
	t.Parallel()
	conn := connect(t, newDatabase(t))
	execute(t, conn, resetWriters)
	columns := []string{"name", "surname", "password"}
	rows := [][]any{{"New", "N", "x"}, {"New", "N", "x"}}
	if _, err := conn.CopyFrom(t.Context(), pgx.Identifier{"users"}, columns,
		pgx.CopyFromRows(rows)); err != nil {
		t.Fatal(err)
	}
	columns, rows = append(columns, "id", "version"), [][]any{{"Old", "N", "x", 7, 9}}
	if _, err := conn.CopyFrom(t.Context(), pgx.Identifier{"users"}, columns,
		pgx.CopyFromRows(rows)); err != nil {
		t.Fatal(err)
	}
	const users = "1 Ann 1, 2 Bob 5, 3 Cid 1, 7 Old 9*, 11 New 1*, 12 New 1*"
	if got := queryValue[string](t, conn, usersText); got != users {
		t.Errorf("users %s, want %s", got, users)
	}
	const events = "created 7/9, created 11/1, created 12/1"
	if got := queryValue[string](t, conn, eventsText); got != events {
		t.Errorf("events %s, want %s", got, events)
	}
	checkTotal(t, conn)
	checkEvents(t, conn)
}

// TestTriggersReturnRows checks that an update returns its row whether or not it changes something.
func TestTriggersReturnRows(t *testing.T) {
	t.Parallel()
	conn := connect(t, newDatabase(t))
	execute(t, conn, resetWriters)
	for name, want := range map[string]int64{"Ann": 1, "Eve": 2} {
		execute(t, conn, "UPDATE users SET name = 'Ann' WHERE id = 1 AND name <> 'Ann'")
		execute(t, conn, resetWriters)
		got := queryValue[int64](t, conn,
			"UPDATE users SET name = $1 WHERE id = 1 RETURNING version", name)
		if got != want {
			t.Errorf("update to %s: version %d, want %d", name, got, want)
		}
	}
}

// TestTraceIDSetting checks that events have the trace id in the setting user_service.trace_id if
// it is valid, else a UUIDv4.
func TestTraceIDSetting(t *testing.T) {
	t.Parallel()
	conn := connect(t, newDatabase(t))
	const uuid = `^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`
	for _, test := range []struct{ name, setting, want string }{
		{name: "no setting", want: uuid},
		{name: "a setting", setting: "migration-7:a_b.c", want: "^migration-7:a_b.c$"},
		{name: "the longest", setting: strings.Repeat("x", 128), want: "^x{128}$"},
		{name: "too long", setting: strings.Repeat("x", 129), want: uuid},
		{name: "a newline", setting: "migration\n7", want: uuid},
		{name: "a newline at the end", setting: "migration\n", want: uuid},
		{name: "a space", setting: "migration 7", want: uuid},
		{name: "a letter outside ASCII", setting: "é", want: uuid},
	} {
		execute(t, conn, "DELETE FROM outbox; RESET user_service.trace_id")
		if test.setting != "" {
			execute(t, conn, "SELECT set_config('user_service.trace_id', $1, false)", test.setting)
		}
		execute(t, conn, "INSERT INTO users (name, surname, password) VALUES ('New', 'N', 'x')")
		execute(t, conn, "UPDATE users SET name = 'Old'; DELETE FROM users")
		n := queryValue[int](t, conn, "SELECT count(*) FROM outbox WHERE trace_id ~ $1", test.want)
		if n != 3 {
			t.Errorf("%s: %d trace ids match %s, want 3", test.name, n, test.want)
		}
	}
}

// TestConstraints checks that the table refuses values that an answer cannot have, changes of ids,
// and duplicates. It accepts the limits.
func TestConstraints(t *testing.T) {
	t.Parallel()
	conn := connect(t, newDatabase(t))
	execute(t, conn, resetWriters)
	before := queryValue[string](t, conn, usersText)
	insert := func(columns, values string) string {
		return fmt.Sprintf(`INSERT INTO users (name, surname, password, %s)
			VALUES ('a', 'b', 'c', %s)`, columns, values)
	}
	for _, test := range []struct{ sql, code string }{
		{insert("id", "0"), "23514"},
		{insert("id", "-1"), "23514"},
		{insert("version", "0"), "23514"},
		{insert("version", "-1"), "23514"},
		{insert("created_at", "'infinity'"), "23514"},
		{insert("created_at", "'-infinity'"), "23514"},
		{insert("created_at", "'10000-01-01 00:00Z'"), "23514"},
		{insert("created_at", "'0001-12-31 23:59Z BC'"), "23514"},
		{insert("updated_at", "'infinity'"), "23514"},
		{insert("updated_at", "'-infinity'"), "23514"},
		{insert("updated_at", "'10000-01-01 00:00Z'"), "23514"},
		{"UPDATE users SET created_at = 'infinity'", "23514"},
		{"UPDATE users SET created_at = '20000-01-01'", "23514"},
		{"UPDATE users SET id = 9 WHERE id = 1", "23000"},
		{"UPDATE users SET id = id + 1", "23000"},
		{"UPDATE users SET id = -id", "23000"},
		{insert("id", "1"), "23505"},
		{insert("id", "NULL"), "23502"},
		{insert("created_at", "NULL"), "23502"},
	} {
		_, err := conn.Exec(t.Context(), test.sql)
		if code := sqlState(err); code != test.code {
			t.Errorf("%s: SQLSTATE %q (%v), want %s", test.sql, code, err, test.code)
		}
	}
	if after := queryValue[string](t, conn, usersText); after != before {
		t.Errorf("users %s after refused statements, want %s", after, before)
	}
	if events := queryValue[string](t, conn, eventsText); events != "" {
		t.Errorf("events %s after refused statements, want none", events)
	}
	for _, sql := range []string{
		insert("id, version", fmt.Sprintf("%d, %d",
			int64(math.MaxInt64), int64(math.MaxInt64-1))),
		insert("created_at", "'0001-01-01 00:00Z'"),
		insert("created_at", "'9999-12-31 23:59:59.999999Z'"),
	} {
		execute(t, conn, sql)
	}
}

// TestTriggersOnManyRows checks that the triggers handle a statement of many rows in time although
// the session has cached plans for single rows.
func TestTriggersOnManyRows(t *testing.T) {
	t.Parallel()
	conn := connect(t, newDatabase(t))
	const rows = 20_000
	execute(t, conn, `INSERT INTO users (name, surname, password)
		SELECT 'John', 'Doe', 'x' FROM generate_series(1, $1)`, rows)
	for id := range 20 {
		execute(t, conn, "UPDATE users SET name = 'one' WHERE id = $1", id+1)
	}
	execute(t, conn, "SET statement_timeout = '20s'")
	execute(t, conn, "UPDATE users SET name = 'all'")
	execute(t, conn, "DELETE FROM users")
	if n := queryValue[int](t, conn, "SELECT count(*) FROM outbox"); n != 3*rows+20 {
		t.Errorf("%d events, want %d", n, 3*rows+20)
	}
	checkTotal(t, conn)
}

// openLogged opens a database as the start of the service does, and closes it. It returns the log.
func openLogged(t *testing.T, databaseURL string) (*logBuffer, error) {
	t.Helper()
	log := &logBuffer{}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out := &logWriter{w: log}
	s, err := openPostgres(ctx, databaseURL, "test", newLogger(out, 0))
	if err == nil {
		s.close()
	}
	return log, errors.Join(err, out.flush())
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

// brokenServer returns the address of a server that reads eight bytes of each connection, answers
// with text and closes it, and the number of its connections.
func brokenServer(t *testing.T, text string) (address string, attempts *atomic.Int64) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	attempts = &atomic.Int64{}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			attempts.Add(1)
			io.ReadFull(conn, make([]byte, 8))
			io.WriteString(conn, text)
			conn.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, conn)
			conn.Close()
		}
	}()
	return listener.Addr().String(), attempts
}

// refusal returns the message of a server that refuses a connection with a SQLSTATE.
func refusal(code string) string {
	fields := "SFATAL\x00VFATAL\x00C" + code + "\x00Mno\x00\x00"
	return "E" + string(binary.BigEndian.AppendUint32(nil, uint32(len(fields)+4))) + fields // #nosec G115 -- short
}

// TestDatabaseFailures checks how the failure of a connection is explained: each host once, with a
// remedy, and without the driver's text or the password.
func TestDatabaseFailures(t *testing.T) {
	t.Parallel()
	silent := fmt.Sprint("127.0.0.1:", occupiedPort(t))
	withoutTLS, _ := brokenServer(t, "N")
	closing, _ := brokenServer(t, "")
	_, port, _ := net.SplitHostPort(withoutTLS)
	for _, test := range []struct {
		name   string
		hosts  string
		query  string
		text   string
		remedy string // a part of it
		denied bool
	}{
		{name: "nothing listens", hosts: "127.0.0.1:1", text: "connection to 127.0.0.1:1 refused",
			remedy: "start PostgreSQL"},
		{name: "two hosts and two TLS modes", hosts: "127.0.0.1:1,127.0.0.2:1", query: "?sslmode=prefer",
			text:   "connection to 127.0.0.1:1 refused; connection to 127.0.0.2:1 refused",
			remedy: "check the host and the port"},
		{name: "a name for two addresses", hosts: "localhost:1",
			text: "connection to localhost:1 refused", remedy: "start PostgreSQL"},
		{name: "no answer", hosts: silent, query: "?connect_timeout=1",
			text: "connection to " + silent + " timed out", remedy: "start PostgreSQL"},
		{name: "an unknown name", hosts: "unknown.invalid", text: "host unknown.invalid: ",
			remedy: "check the host"},
		{name: "no TLS", hosts: withoutTLS, query: "?sslmode=require", denied: true,
			text: withoutTLS + " does not support TLS", remedy: "change sslmode"},
		{name: "no TLS, and another host", hosts: withoutTLS + ",127.0.0.1:1", query: "?sslmode=require",
			text:   "connection to 127.0.0.1:1 refused; " + withoutTLS + " does not support TLS",
			remedy: "start PostgreSQL"},
		{name: "no TLS, and broken without", hosts: "localhost:" + port, query: "?sslmode=prefer",
			text:   "connection to localhost:" + port + ": ",
			remedy: "start PostgreSQL"},
		{name: "closed at once", hosts: closing, query: "?sslmode=disable",
			text: "connection to " + closing + ": closed by the server", remedy: "start PostgreSQL"},
		{name: "no socket", query: "?host=/none", text: "connection to /none/.s.PGSQL.5432: no such file",
			remedy: "start PostgreSQL"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			config, err := poolConfig("postgres://john:"+secret+"@"+test.hosts+"/users"+test.query, "")
			if err != nil {
				t.Fatal(err)
			}
			_, err = pgx.ConnectConfig(t.Context(), config.ConnConfig)
			if err == nil {
				t.Fatal("no error")
			}
			got := explainFailure(err)
			if !strings.HasPrefix(got.text, test.text) || !strings.Contains(got.remedy, test.remedy) ||
				got.denied != test.denied || strings.Contains(got.Error(), secret) {
				t.Errorf("%v\ngot %+v\nwant %q, a remedy with %q, and denied %t", err, got, test.text,
					test.remedy, test.denied)
			}
		})
	}
}

// TestServerRefusals checks the remedy for what a server may answer, and whether the start gives up.
func TestServerRefusals(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		code   string
		remedy string // a part of it
		denied bool
	}{
		{code: "28P01", remedy: "password", denied: true},
		{code: "28000", remedy: "pg_hba.conf", denied: true},
		{code: "3D000", remedy: "createdb", denied: true},
		{code: "42501", remedy: "CREATE", denied: true},
		{code: "53300", remedy: "max_connections"},
		{code: "57P03", remedy: "wait until PostgreSQL has started"},
		{code: "55P03"},
	} {
		host, _ := brokenServer(t, refusal(test.code))
		config, err := poolConfig("postgres://john@"+host+"/users?sslmode=disable", "")
		if err != nil {
			t.Fatal(err)
		}
		_, err = pgx.ConnectConfig(t.Context(), config.ConnConfig)
		if err == nil {
			t.Fatalf("%s: no error", test.code)
		}
		got, want := explainFailure(err), host+": FATAL: no (SQLSTATE "+test.code+")"
		if got.text != want || !strings.Contains(got.remedy, test.remedy) ||
			(got.remedy == "") != (test.remedy == "") || got.denied != test.denied {
			t.Errorf("got %+v, want %q, a remedy with %q, and denied %t", got, want, test.remedy,
				test.denied)
		}
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
			lines := log.lines("Waiting for the database")
			if len(lines) != 1 || lines[0]["remedy"] == nil ||
				!strings.Contains(err.Error(), fmt.Sprint(lines[0]["remedy"])) {
				t.Errorf("lines of waiting %v, want one with the remedy of the error %v", lines, err)
			}
		})
	}
}

// TestStartCountsDenials checks that opening a database fails after three attempts if the server
// denies the role or lacks TLS.
func TestStartCountsDenials(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, answer, mode string }{
		{name: "a wrong password", answer: refusal("28P01"), mode: "disable"},
		{name: "no TLS", answer: "N", mode: "require"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			host, attempts := brokenServer(t, test.answer)
			_, err := openLogged(t, "postgres://john@"+host+"/users?sslmode="+test.mode)
			if err == nil || attempts.Load() != maxDenials {
				t.Errorf("error %v after %d attempts, want one after %d", err, attempts.Load(), maxDenials)
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

// previousSchema is the schema.sql of the release of commit c223611.
var previousSchema = func() string {
	text, err := os.ReadFile("system/testdata/schema-c223611.sql")
	if err != nil {
		panic(err)
	}
	return string(text)
}()

// The SQL statements of the release of commit c223611, word for word.
const (
	previousColumns = "id, name, surname, version, created_at, updated_at"
	previousCreate  = `
		WITH claimed AS (
			INSERT INTO idempotency_keys AS k (key, user_id, name, surname, password)
			SELECT $6::text, nextval('users_id_seq'), $1, $2, $3 WHERE $6 <> ''
			ON CONFLICT (key) DO UPDATE SET user_id = excluded.user_id, name = excluded.name,
				surname = excluded.surname, password = excluded.password, created_at = now()
			WHERE k.created_at <= now() - $7::interval
			RETURNING user_id
		), created AS (
			INSERT INTO users (id, name, surname, password)
			SELECT coalesce((SELECT user_id FROM claimed), nextval('users_id_seq')), $1, $2, $3
			WHERE $6 = '' OR EXISTS (SELECT FROM claimed)
			RETURNING ` + previousColumns + `
		), event AS (
			INSERT INTO outbox (event_id, event_type, user_id, version, trace_id, occurred_at)
			SELECT $4, 'user.created', id, version, $5, updated_at FROM created
		)
		SELECT ` + previousColumns + ` FROM created`
	previousChange = `
		WITH change AS (
			SELECT * FROM json_to_recordset($1) AS change (user_id bigint, new_name text,
				new_surname text, new_password text, match bigint[], event_id uuid, trace_id text)
		), current AS (
			SELECT *, match IS NULL OR version = ANY (match) AS matches
			FROM change,
				LATERAL (SELECT * FROM users WHERE id = user_id FOR UPDATE /* of several */) users
		), `
	previousUpdate = previousChange + `
		changed AS (
			UPDATE users SET
				name = coalesce(new_name, c.name),
				surname = coalesce(new_surname, c.surname),
				password = coalesce(new_password, c.password),
				version = c.version + 1,
				updated_at = greatest(clock_timestamp(), c.updated_at + interval '1 microsecond')
			FROM current c
			WHERE users.id = c.id AND matches
				AND (new_password IS NOT NULL OR new_name <> c.name OR new_surname <> c.surname)
			RETURNING users.*, event_id, trace_id
		), event AS (
			INSERT INTO outbox (event_id, event_type, user_id, version, trace_id, occurred_at)
			SELECT event_id, 'user.updated', id, version, trace_id, updated_at FROM changed
		)
		SELECT ` + previousColumns + `, true FROM changed
		UNION ALL
		SELECT ` + previousColumns + `, false FROM current WHERE id NOT IN (SELECT id FROM changed)`
	previousDelete = previousChange + `
		changed AS (
			DELETE FROM users USING current c WHERE users.id = c.id AND matches RETURNING c.*
		), event AS (
			INSERT INTO outbox (event_id, event_type, user_id, version, trace_id, occurred_at)
			SELECT event_id, 'user.deleted', id, version + 1, trace_id,
				greatest(clock_timestamp(), updated_at + interval '1 microsecond')
			FROM changed
		)
		SELECT ` + previousColumns + `, true FROM changed
		UNION ALL
		SELECT ` + previousColumns + `, false FROM current WHERE NOT matches`
)

// previousUserChange is an element of the parameter of previousUpdate and previousDelete.
type previousUserChange struct {
	ID       int64   `json:"user_id"`
	Name     *string `json:"new_name"`
	Surname  *string `json:"new_surname"`
	Password *string `json:"new_password"`
	Match    []int64 `json:"match"`
	EventID  string  `json:"event_id"`
	TraceID  string  `json:"trace_id"`
}

// previousRelease changes users with the statements of the release of commit c223611.
type previousRelease struct{ conn *pgx.Conn }

// create returns the new user, or one with the id 0 if the key was used before.
func (r previousRelease) create(t *testing.T, key, traceID string) (u User) {
	t.Helper()
	rows, _ := r.conn.Query(t.Context(), previousCreate, "John", "Doe", "hash", newUUIDv7(),
		traceID, key, keyLifetime)
	if _, err := pgx.ForEachRow(rows, u.scanInto(), func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	return u
}

// change runs previousUpdate or previousDelete. It returns the users and which of them were
// changed.
func (r previousRelease) change(t *testing.T, sql string, changes ...previousUserChange) (
	users map[int64]User, done map[int64]bool) {
	t.Helper()
	users, done = make(map[int64]User), make(map[int64]bool)
	for i := range changes {
		changes[i].EventID = newUUIDv7()
	}
	var u User
	var changed bool
	rows, _ := r.conn.Query(t.Context(), sql, changes)
	_, err := pgx.ForEachRow(rows, append(u.scanInto(), &changed), func() error {
		users[u.ID], done[u.ID] = u, changed
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return users, done
}

// eventsWithTraces returns the type, user, version and trace id of each event in the outbox.
const eventsWithTraces = `SELECT coalesce(string_agg(format('%s %s/%s %s', substr(event_type, 6),
	user_id, version, trace_id), ', ' ORDER BY user_id, version), '') FROM outbox`

// TestPreviousReleaseStatements runs the statements of the previous release on the new schema, and
// checks that each version has exactly one event, with the trace id of the statement.
func TestPreviousReleaseStatements(t *testing.T) {
	t.Parallel()
	conn := connect(t, newDatabase(t))
	old := previousRelease{conn}
	jane, john := "Jane", "John"
	for i, key := range []string{"", "key", "other", "", "key"} {
		u := old.create(t, key, fmt.Sprint("create-", i+1))
		if (u.ID == 0) != (i == 4) || u.ID != 0 && u.Version != 1 {
			t.Errorf("creation %d with the key %q: %+v, want version 1 unless the key is used",
				i, key, u)
		}
	}
	const created = "created 1/1 create-1, created 2/1 create-2, created 3/1 create-3, " +
		"created 4/1 create-4"
	if got := queryValue[string](t, conn, eventsWithTraces); got != created {
		t.Errorf("events of creations: %s, want %s", got, created)
	}

	execute(t, conn, "DELETE FROM outbox")
	users, done := old.change(t, previousUpdate,
		previousUserChange{ID: 1, Name: &jane, TraceID: "update-1"},
		previousUserChange{ID: 2, Name: &john, TraceID: "update-2"},
		previousUserChange{ID: 3, Name: &jane, Match: []int64{7}, TraceID: "update-3"},
		previousUserChange{ID: 4, Surname: &jane, Match: []int64{1}, TraceID: "update-4"},
		previousUserChange{ID: 99, Name: &jane, TraceID: "update-99"})
	if !done[1] || done[2] || done[3] || !done[4] || len(done) != 4 {
		t.Errorf("updates done: %v, want those of the users 1 and 4", done)
	}
	if users[1].Version != 2 || users[2].Version != 1 || users[4].Version != 2 {
		t.Errorf("users after the updates: %+v, want the versions 2, 1 and 2 of 1, 2 and 4", users)
	}
	const updated = "updated 1/2 update-1, updated 4/2 update-4"
	if got := queryValue[string](t, conn, eventsWithTraces); got != updated {
		t.Errorf("events of updates: %s, want %s", got, updated)
	}

	execute(t, conn, "DELETE FROM outbox")
	_, done = old.change(t, previousDelete,
		previousUserChange{ID: 1, TraceID: "delete-1"},
		previousUserChange{ID: 2, Match: []int64{7}, TraceID: "delete-2"},
		previousUserChange{ID: 3, Match: []int64{1}, TraceID: "delete-3"})
	if !done[1] || done[2] || !done[3] || len(done) != 3 {
		t.Errorf("deletions done: %v, want those of the users 1 and 3", done)
	}
	const deleted = "deleted 1/3 delete-1, deleted 3/2 delete-3"
	if got := queryValue[string](t, conn, eventsWithTraces); got != deleted {
		t.Errorf("events of deletions: %s, want %s", got, deleted)
	}
	checkTotal(t, conn)
	checkEvents(t, conn)
}

// TestReleasesShareUsers changes the same users with both releases concurrently, and checks that
// each version and each change has one event.
func TestReleasesShareUsers(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s := openTestPostgres(t, url)
	const users, rounds = 4, 25
	for range users {
		mustCreate(t, s, "John")
	}
	var group sync.WaitGroup
	for c := range 4 {
		old := previousRelease{connect(t, url)}
		group.Go(func() {
			for i := range rounds {
				name := fmt.Sprint("old ", c, " ", i)
				id := int64((c+i)%users + 1)
				trace := fmt.Sprintf("old-%d-%d", c, i)
				old.change(t, previousUpdate,
					previousUserChange{ID: id, Name: &name, TraceID: trace})
			}
		})
		group.Go(func() {
			for i := range rounds {
				ctx := withTraceID(context.Background(), fmt.Sprintf("new-%d-%d", c, i))
				in := input(fmt.Sprint("new ", c, " ", i), "", "")
				if _, err := s.updateUser(ctx, int64((c+i)%users+1), in, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	versions, traces := make(map[int64]int64), make(map[string]bool)
	for _, e := range allPending(t, s) {
		if e.Data.Version != versions[e.Data.UserID]+1 {
			t.Errorf("user %d: event of version %d after version %d",
				e.Data.UserID, e.Data.Version, versions[e.Data.UserID])
		}
		versions[e.Data.UserID] = e.Data.Version
		traces[e.TraceID] = true
	}
	for c := range 4 {
		for i := range rounds {
			for _, release := range []string{"old", "new"} {
				if trace := fmt.Sprintf("%s-%d-%d", release, c, i); !traces[trace] {
					t.Errorf("no event with the trace id %s", trace)
				}
			}
		}
	}
}

// previousDatabase returns a database of the previous release with five users and two pending
// events. User 4 was created at -infinity, and user 5 was changed in the year 20000.
func previousDatabase(t *testing.T) string {
	t.Helper()
	url := emptyDatabase(t, "")
	conn := connect(t, url)
	execute(t, conn, previousSchema)
	old := previousRelease{conn}
	for i := range 3 {
		old.create(t, fmt.Sprint("key-", i), fmt.Sprint("create-", i+1))
	}
	execute(t, conn, `
		DELETE FROM outbox WHERE user_id = 1;
		INSERT INTO users (name, surname, password, created_at)
		VALUES ('Ann', 'Lee', 'x', '-infinity');
		INSERT INTO users (name, surname, password, updated_at)
		VALUES ('Bob', 'Lee', 'x', '20000-01-01 00:00Z')`)
	return url
}

// catalog is a query that returns a description of all objects that a start could change.
const catalog = `
	SELECT string_agg(item, E'\n' ORDER BY item) FROM (
		SELECT format('relation %s %s %s %s %s', oid, relname, relfilenode, xmin, relchecks)
		FROM pg_class WHERE relnamespace = current_schema()::regnamespace
		UNION ALL SELECT format('trigger %s %s %s %s', oid, tgname, tgenabled, xmin)
		FROM pg_trigger WHERE NOT tgisinternal
		UNION ALL SELECT format('function %s %s %s', oid, proname, md5(prosrc))
		FROM pg_proc WHERE pronamespace = current_schema()::regnamespace
		UNION ALL SELECT format('constraint %s %s %s', oid, conname, xmin)
		FROM pg_constraint WHERE connamespace = current_schema()::regnamespace
		UNION ALL SELECT format('default %s %s %s', oid, adrelid, xmin) FROM pg_attrdef
		UNION ALL SELECT format('schema %s %s', oid, nspname) FROM pg_namespace
		WHERE nspname !~ '^pg_(toast_)?temp'
	) AS items (item)`

// differences returns the lines that only one of two texts has.
func differences(before, after string) (lines []string) {
	old, new := strings.Split(before, "\n"), strings.Split(after, "\n")
	for _, line := range old {
		if !slices.Contains(new, line) {
			lines = append(lines, "- "+line)
		}
	}
	for _, line := range new {
		if !slices.Contains(old, line) {
			lines = append(lines, "+ "+line)
		}
	}
	return lines
}

// TestUpgrade checks that the upgrade of a database keeps its content, and that the previous
// release can start on the upgraded database and use it.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	url := previousDatabase(t)
	conn := connect(t, url)
	content := func() string {
		return queryValue[string](t, conn, `SELECT concat_ws(E'\n',
			(SELECT string_agg(u::text, ' ' ORDER BY id) FROM users u),
			(SELECT string_agg(o::text, ' ' ORDER BY id) FROM outbox o),
			(SELECT string_agg(k::text, ' ' ORDER BY key) FROM idempotency_keys k))`)
	}
	before := content()
	s := openTestPostgres(t, url)
	if after := content(); after != before {
		t.Errorf("content after the upgrade:\n%s\nwant\n%s", after, before)
	}
	_, total, err := s.listUsers(t.Context(), 0, 0, 1)
	if err != nil || total != 5 {
		t.Errorf("total %d, %v, want 5", total, err)
	}
	s.close()
	checkSchemaVersion(t, conn)

	upgraded := queryValue[string](t, conn, catalog)
	execute(t, conn, previousSchema)
	openTestPostgres(t, url).close()
	if lines := differences(upgraded, queryValue[string](t, conn, catalog)); len(lines) > 0 {
		t.Errorf("the start of the previous release changed the catalog: %q", lines)
	}
	if after := content(); after != before {
		t.Errorf("content after the start of the previous release:\n%s\nwant\n%s", after, before)
	}
	old := previousRelease{conn}
	if u := old.create(t, "key-2", "trace"); u.ID != 0 {
		t.Errorf("creation with a used key: %+v, want none", u)
	}
	if u := old.create(t, "key-9", "trace"); u.ID <= 5 || u.Version != 1 {
		t.Errorf("creation with a new key: %+v, want version 1 and an id above 5", u)
	}
	checkTotal(t, conn)
}

// checkSchemaVersion checks the version and the triggers of the schema.
func checkSchemaVersion(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	version := queryValue[int](t, conn, "SELECT version FROM user_service_schema()")
	triggers := queryValue[string](t, conn, `SELECT string_agg(tgname, ' ' ORDER BY tgname)
		FROM pg_trigger WHERE NOT tgisinternal`)
	const want = "user_service_adopt user_service_delete user_service_insert " +
		"user_service_keep_ids user_service_stamp user_service_truncate user_service_update"
	if version != 2 || triggers != want {
		t.Errorf("version %d with the triggers %s, want 2, %s", version, triggers, want)
	}
	old := queryValue[int](t, conn, "SELECT count(*) FROM pg_proc WHERE proname = 'count_users'")
	if old != 0 {
		t.Error("the function of the old triggers was not dropped")
	}
}

// TestUpgradedRows checks that the service publishes the pending events of the previous release,
// and reads and deletes its users, including those whose times JSON cannot represent.
func TestUpgradedRows(t *testing.T) {
	t.Parallel()
	set := memorySettings()
	set.databaseURL = previousDatabase(t)
	svc := startService(t, set)
	for id := 2; id <= 3; id++ { // with events in the outbox
		svc.waitForLine(fmt.Sprintf("Received event user.created with user_id=%d", id),
			"trace_id", fmt.Sprint("create-", id), "version", 1)
	}
	if a := svc.do("GET", "/users", ""); a.status != 200 || a.json(t, "total") != 5.0 ||
		len(a.json(t, "users").([]any)) != 5 {
		t.Errorf("GET /users: status %d, want 200 with 5 users: %s", a.status, a.body)
	}
	for id, want := range map[int][2]string{
		4: {"created_at", "0001-01-01T00:00:00.000000Z"},
		5: {"updated_at", "9999-12-31T23:59:59.999999Z"},
	} {
		path := fmt.Sprint("/users/", id)
		if a := svc.do("GET", path, ""); a.status != 200 || a.json(t, want[0]) != want[1] {
			t.Errorf("GET %s: status %d, want 200 with %s: %s", path, a.status, want, a.body)
		}
	}
	for id := 1; id <= 5; id++ {
		path := fmt.Sprint("/users/", id)
		if a := svc.do("DELETE", path, ""); a.status != 200 {
			t.Errorf("DELETE %s: status %d, want 200: %s", path, a.status, a.body)
		}
		svc.waitForLine(fmt.Sprintf("Received event user.deleted with user_id=%d", id),
			"version", 2)
	}
	if a := svc.do("GET", "/users", ""); a.json(t, "total") != 0.0 {
		t.Errorf("GET /users after the deletions: want the total 0: %s", a.body)
	}
	svc.createUser("John", "Doe")
}

// TestUpgradedRowsDoNotAffectBatch checks that updates of users whose times no new row may have,
// which may be refused, do not affect concurrent updates of other users.
func TestUpgradedRowsDoNotAffectBatch(t *testing.T) {
	t.Parallel()
	set := memorySettings()
	set.databaseURL = previousDatabase(t)
	svc := startService(t, set)
	var group sync.WaitGroup
	for i := range 40 {
		id := i%5 + 1
		group.Go(func() {
			a := svc.do("PUT", fmt.Sprint("/users/", id), fmt.Sprintf(`{"name": "name %d"}`, i))
			if a.status != 200 && (id <= 3 || a.status != 409) {
				t.Errorf("PUT /users/%d: status %d, want 200, or 409 for the users 4 and 5: %s",
					id, a.status, a.body)
			}
		})
	}
	group.Wait()
}

// TestUpgradeDoesNotBlock upgrades a database while a transaction that has read users is open. It
// checks that other statements succeed meanwhile, and that the upgrade succeeds after the
// transaction.
func TestUpgradeDoesNotBlock(t *testing.T) {
	t.Parallel()
	url := previousDatabase(t)
	tx, err := connect(t, url).Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), "SELECT count(*) FROM users")
	}
	if err != nil {
		t.Fatal(err)
	}
	log := &logBuffer{}
	opened := make(chan error)
	go func() {
		logger := newLogger(&logWriter{w: log}, 0)
		s, err := openPostgres(context.Background(), url, "upgrade", logger)
		if err == nil {
			s.close()
		}
		opened <- err
	}()
	old := previousRelease{connect(t, url)}
	execute(t, old.conn, "SET lock_timeout = '5s'")
	for i := 0; len(log.lines("Waiting for the database")) == 0; i++ {
		old.create(t, "", fmt.Sprint("during-", i))
	}
	select {
	case err := <-opened:
		t.Errorf("the upgrade did not wait for the transaction: %v", err)
		return
	default:
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Error(err)
	}
	checkSchemaVersion(t, old.conn)
	checkTotal(t, old.conn)
	for range 3 {
		old.create(t, "", "after")
	}
	checkTotal(t, old.conn)
}

// TestUpgradeKeepsOtherFunction checks that a function of the site is kept although it has the name
// of one of the previous release.
func TestUpgradeKeepsOtherFunction(t *testing.T) {
	t.Parallel()
	url := emptyDatabase(t, "")
	conn := connect(t, url)
	execute(t, conn,
		"CREATE FUNCTION count_users() RETURNS bigint LANGUAGE sql AS 'SELECT 7::bigint'")
	openTestPostgres(t, url)
	if n := queryValue[int64](t, conn, "SELECT count_users()"); n != 7 {
		t.Errorf("the function of the site returns %d, want 7", n)
	}
}
