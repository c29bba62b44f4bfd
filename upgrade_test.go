package main

import (
	"context"
	_ "embed"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
)

// previousSchema is the schema.sql of the release of commit c223611.
//
//go:embed testdata/schema-c223611.sql
var previousSchema string

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
	for i := 0; len(log.lines("Waiting for the database")) < 2; i++ {
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
