package main

import (
	"encoding/hex"
	"fmt"
	"math"
	"net/url"
	"strings"
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
