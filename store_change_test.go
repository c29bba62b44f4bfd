package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// lockUser locks a user in an open transaction until unlock is called or the test ends.
func lockUser(t *testing.T, url string, id int64) (unlock func()) {
	t.Helper()
	tx, err := connect(t, url).Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), "SELECT FROM users WHERE id = $1 FOR UPDATE", id)
	}
	if err != nil {
		t.Fatal(err)
	}
	unlock = sync.OnceFunc(func() { tx.Rollback(context.Background()) })
	t.Cleanup(unlock)
	return unlock
}

// blockedHere is a query that returns whether a statement in this database waits for a lock.
const blockedHere = `SELECT EXISTS (SELECT FROM pg_stat_activity
	WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0)`

// changeLocked locks the first users and starts clients that change them. It returns when a change
// waits. stop unlocks the users, waits for the clients, and returns the number of clients that were
// answered before.
func changeLocked(t *testing.T, svc *service, users, clients int) (stop func() int64) {
	t.Helper()
	url := svc.settings.databaseURL
	tx, err := connect(t, url).Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), "SELECT FROM users WHERE id <= $1 FOR UPDATE", users)
	}
	if err != nil {
		t.Fatal(err)
	}
	var answered atomic.Int64
	var group sync.WaitGroup
	for i := range clients {
		group.Go(func() {
			path, body := fmt.Sprint("/users/", i%users+1), fmt.Sprintf(`{"name": "locked %d"}`, i)
			a := svc.do("PUT", path, body)
			if a.status != 200 && a.status != 503 {
				t.Errorf("PUT %s: status %d, want 200 or 503: %s", path, a.status, a.body)
			}
			answered.Add(1)
		})
	}
	watcher := connect(t, url)
	eventually(t, "a change that waits", func() bool {
		return queryValue[bool](t, watcher, blockedHere)
	})
	return func() int64 {
		n := answered.Load()
		if err := tx.Rollback(t.Context()); err != nil {
			t.Error(err)
		}
		group.Wait()
		return n
	}
}

// TestChangeBatch checks which changes a batch makes: not those of users that are missing, that
// have another version, or that another transaction has locked. The batch does not wait for the
// lock.
func TestChangeBatch(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s := openTestPostgres(t, url)
	var users []User
	for range 6 {
		users = append(users, mustCreate(t, s, "John"))
	}
	lockUser(t, url, users[5].ID)
	jane, john := "Jane", "John"
	change := func(id int64, name *string, match ...int64) *userChange {
		return &userChange{id: id, name: name, match: match, traceID: fmt.Sprint("trace-", id)}
	}
	changes := []*userChange{
		0: change(users[0].ID, &jane),
		1: change(users[1].ID, &jane, 1, 7),
		2: change(users[2].ID, &jane, 7),
		3: change(users[3].ID, &john),
		4: change(1<<40, &jane),
		5: change(users[5].ID, &jane),
	}
	results, err := s.changeBatch(t.Context(), updateUsers, s.write, changes)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range map[int]User{
		0: {ID: users[0].ID, Version: 2, Name: jane},
		1: {ID: users[1].ID, Version: 2, Name: jane},
		3: {ID: users[3].ID, Version: 1, Name: john},
	} {
		got, ok := results[changes[i]]
		if !ok || got.ID != want.ID || got.Version != want.Version || got.Name != want.Name {
			t.Errorf("change %d: made %t, %+v, want %+v", i, ok, got, want)
		}
	}
	if len(results) != 3 {
		t.Errorf("%d changes were made, want 3", len(results))
	}

	changes = []*userChange{
		change(users[0].ID, nil), change(users[1].ID, nil, 1), change(users[5].ID, nil)}
	results, err = s.changeBatch(t.Context(), deleteUsers, s.write, changes)
	if _, deleted := results[changes[0]]; err != nil || !deleted || len(results) != 1 {
		t.Errorf("deletions: %+v, %v, want only that of user %d", results, err, users[0].ID)
	}
	var events []string
	for _, e := range allPending(t, s)[len(users):] {
		events = append(events, fmt.Sprintf("%s %d/%d %s",
			e.Type, e.Data.UserID, e.Data.Version, e.TraceID))
	}
	slices.Sort(events)
	want := "[user.deleted 1/3 trace-1 user.updated 1/2 trace-1 user.updated 2/2 trace-2]"
	if got := fmt.Sprint(events); got != want {
		t.Errorf("events %s, want %s", got, want)
	}
}

// TestRefusedChangeDoesNotAffectBatch checks that one change that PostgreSQL refuses fails alone.
// The first changes take long, so that the others share a batch.
func TestRefusedChangeDoesNotAffectBatch(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s := openTestPostgres(t, url)
	_, err := s.pool.Exec(t.Context(), `
		CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
			$$ BEGIN RAISE 'refused'; END $$;
		CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW
			WHEN (NEW.name = 'refused') EXECUTE FUNCTION refuse();
		CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS
			$$ BEGIN PERFORM pg_sleep(0.2); RETURN NEW; END $$;
		CREATE TRIGGER linger BEFORE UPDATE ON users FOR EACH ROW
			WHEN (NEW.name = 'slow') EXECUTE FUNCTION linger();`)
	if err != nil {
		t.Fatal(err)
	}
	var ids []int64
	for range writesAlone + 5 {
		ids = append(ids, mustCreate(t, s, "John").ID)
	}
	var callers sync.WaitGroup
	for i, id := range ids {
		name := "Jane"
		if i < writesAlone {
			name = "slow"
		} else if i == len(ids)-1 {
			name = "refused"
		}
		callers.Go(func() {
			u, err := s.updateUser(t.Context(), id, userInput{name: &name}, nil)
			if name == "refused" {
				if err == nil || errors.Is(err, errUnavailable) ||
					errors.Is(err, errOutcomeUnknown) {
					t.Errorf("refused change: %+v, %v, want a permanent error", u, err)
				}
			} else if err != nil || u.Name != name || u.Version != 2 {
				t.Errorf("change to %s: %+v, %v, want version 2", name, u, err)
			}
		})
		if i == writesAlone-1 {
			time.Sleep(50 * time.Millisecond)
		}
	}
	callers.Wait()
	if n := len(allPending(t, s)); n != 2*len(ids)-1 {
		t.Errorf("%d events, want %d", n, 2*len(ids)-1)
	}
}

// TestLockedUsersDoNotBlockOthers starts many changes of one locked user, and of more locked users
// than there are connections. It checks that all other requests succeed before one of the changes
// times out. The machine may be too slow for that, so there are several attempts.
func TestLockedUsersDoNotBlockOthers(t *testing.T) {
	t.Parallel()
	const most = 2 * defaultPoolSize
	for locked, clients := range map[int]int{1: 40, most: most} {
		t.Run(fmt.Sprint(locked), func(t *testing.T) {
			t.Parallel()
			svc := startService(t, postgresSettings(t))
			watcher := connect(t, svc.settings.databaseURL)
			execute(t, watcher, `INSERT INTO users (name, surname, password)
				SELECT 'John', 'Doe', 'x' FROM generate_series(1, $1)`, most+1)
			free := fmt.Sprint("/users/", most+1)
			answered := int64(1)
			for attempt := 0; answered > 0 && attempt < 5; attempt++ {
				stop := changeLocked(t, svc, locked, clients)
				for _, step := range []struct{ method, path, body string }{
					{"GET", "/users/1", ""}, {"GET", "/users", ""}, {"GET", "/readyz", ""},
					{"PUT", free, fmt.Sprintf(`{"name": "free %d"}`, attempt)},
					{"GET", "/metrics", ""},
				} {
					if a := svc.do(step.method, step.path, step.body); a.status != 200 {
						t.Errorf("%s %s: status %d, want 200: %s",
							step.method, step.path, a.status, a.body)
					}
				}
				svc.createUser("Jane", "Doe")
				blocked := queryValue[int](t, watcher, `SELECT count(*) FROM pg_stat_activity
					WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0`)
				if blocked > min(locked, defaultPoolSize/2) {
					t.Errorf("%d connections wait for %d locked users, want %d or fewer",
						blocked, locked, min(locked, defaultPoolSize/2))
				}
				answered = stop()
			}
			if answered > 0 {
				t.Errorf("%d changes of locked users were answered before other requests", answered)
			}
		})
	}
}

// siteTrigger returns the SQL of a trigger whose function has a body.
func siteTrigger(body string) string {
	return `CREATE FUNCTION site() RETURNS trigger LANGUAGE plpgsql AS
			$$ BEGIN ` + body + ` END $$;
		CREATE TRIGGER site BEFORE UPDATE ON users FOR EACH ROW WHEN (NEW.name = 'refused')
		EXECUTE FUNCTION site()`
}

// siteRules are rules that a site may add to the table users. Each refuses the body refused, and
// the answer has the status.
var siteRules = []struct {
	name, sql, refused string
	status             int
}{
	{
		name:    "CHECK",
		sql:     "ALTER TABLE users ADD CONSTRAINT site CHECK (name <> 'refused')",
		refused: `{"name": "refused"}`, status: 409,
	},
	{
		name:    "UNIQUE",
		sql:     "CREATE UNIQUE INDEX site ON users (surname) WHERE surname IN ('taken')",
		refused: `{"surname": "taken"}`, status: 409,
	},
	{
		name:    "trigger with an integrity violation",
		sql:     siteTrigger("RAISE 'refused' USING ERRCODE = 'check_violation';"),
		refused: `{"name": "refused"}`, status: 409,
	},
	{
		name:    "trigger that raises",
		sql:     siteTrigger("RAISE 'refused';"),
		refused: `{"name": "refused"}`, status: 409,
	},
	{
		name:    "trigger that skips the row",
		sql:     siteTrigger("RETURN NULL;"),
		refused: `{"name": "refused"}`, status: 409,
	},
	{
		name:    "lock timeout",
		sql:     siteTrigger("RAISE 'refused' USING ERRCODE = 'lock_not_available';"),
		refused: `{"name": "refused"}`, status: 503,
	},
	{
		name:    "statement timeout",
		sql:     siteTrigger("RAISE 'refused' USING ERRCODE = 'query_canceled';"),
		refused: `{"name": "refused"}`, status: 503,
	},
}

// TestSiteRules checks that the change that a rule of the site refuses is answered with the right
// status, and that all concurrent changes of other users succeed.
func TestSiteRules(t *testing.T) {
	t.Parallel()
	for _, rule := range siteRules {
		t.Run(rule.name, func(t *testing.T) {
			t.Parallel()
			svc := startService(t, postgresSettings(t))
			conn := connect(t, svc.settings.databaseURL)
			execute(t, conn, `INSERT INTO users (name, surname, password)
				SELECT 'John', CASE i WHEN 20 THEN 'taken' ELSE 'Doe' END, 'x'
				FROM generate_series(1, 20) AS i`)
			execute(t, conn, rule.sql)
			var group sync.WaitGroup
			for i := range 60 {
				id, body, want := i%20+1, fmt.Sprintf(`{"name": "name %d"}`, i), 200
				if id == 7 {
					body, want = rule.refused, rule.status
				}
				group.Go(func() {
					a := svc.do("PUT", fmt.Sprint("/users/", id), body)
					if a.status != want || strings.Contains(a.body, "site") {
						t.Errorf("PUT /users/%d: status %d, want %d without \"site\": %s",
							id, a.status, want, a.body)
					}
				})
			}
			group.Wait()
			versions := queryValue[string](t, conn,
				"SELECT string_agg(DISTINCT version::text, ' ') FROM users WHERE id <> 7")
			version := queryValue[int](t, conn, "SELECT version FROM users WHERE id = 7")
			if version != 1 || versions != "4" {
				t.Errorf("versions: %d of the refused user, want 1, and %s of the others, want 4",
					version, versions)
			}
		})
	}
}

// TestReferencedUser checks that the deletion of a user that a table of the site references is
// answered with 409, and that all concurrent deletions of other users succeed.
func TestReferencedUser(t *testing.T) {
	t.Parallel()
	svc := startService(t, postgresSettings(t))
	conn := connect(t, svc.settings.databaseURL)
	execute(t, conn, `INSERT INTO users (name, surname, password)
		SELECT 'John', 'Doe', 'x' FROM generate_series(1, 20)`)
	execute(t, conn, `CREATE TABLE orders (user_id bigint REFERENCES users);
		INSERT INTO orders VALUES (7)`)
	var group sync.WaitGroup
	for id := 1; id <= 20; id++ {
		want := map[bool]int{true: 409, false: 200}[id == 7]
		group.Go(func() {
			if a := svc.do("DELETE", fmt.Sprint("/users/", id), ""); a.status != want {
				t.Errorf("DELETE /users/%d: status %d, want %d: %s", id, a.status, want, a.body)
			}
		})
	}
	group.Wait()
	execute(t, conn, "DROP TABLE orders")
	if a := svc.do("DELETE", "/users/7", ""); a.status != 200 {
		t.Errorf("DELETE without the reference: status %d, want 200: %s", a.status, a.body)
	}
	svc.waitForLine("Received event user.deleted with user_id=7", "version", 2)
}

// TestCanceledStatements checks that the service works after an administrator has canceled changes
// that waited for a lock.
func TestCanceledStatements(t *testing.T) {
	t.Parallel()
	svc := startService(t, postgresSettings(t))
	svc.createUser("John", "Doe")
	stop := changeLocked(t, svc, 1, 3)
	watcher := connect(t, svc.settings.databaseURL)
	const cancel = `SELECT count(*) FILTER (WHERE pg_cancel_backend(pid)) FROM pg_stat_activity
		WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0`
	for range 4 {
		eventually(t, "a statement to cancel", func() bool {
			return queryValue[int](t, watcher, cancel) > 0
		})
	}
	stop()
	if a := svc.do("PUT", "/users/1", `{"name": "after"}`); a.status != 200 {
		t.Errorf("PUT after the cancellations: status %d, want 200: %s", a.status, a.body)
	}
}

// TestChangeIsNotRepeated closes the connection while a change waits, and checks that its outcome
// is unknown and that it is made at most once.
func TestChangeIsNotRepeated(t *testing.T) {
	t.Parallel()
	direct := newDatabase(t)
	p := newProxy(t, direct)
	s, conn := openTestPostgres(t, throughProxy(t, direct, p)), connect(t, direct)
	mustCreate(t, s, "John")
	if _, err := conn.Exec(t.Context(), "BEGIN; SELECT FROM users FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	failed := make(chan error)
	go func() {
		_, err := s.updateUser(context.Background(), 1, input("Jane", "", ""), nil)
		failed <- err
	}()
	watcher := connect(t, direct)
	eventually(t, "an update that waits for the lock", func() bool {
		return queryValue[bool](t, watcher, blockedHere)
	})
	p.set(false)
	if err := <-failed; !errors.Is(err, errOutcomeUnknown) {
		t.Errorf("change with a lost answer: error %v, want errOutcomeUnknown", err)
	}
	p.set(true)
	if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of all statements", func() bool {
		return queryValue[int](t, watcher, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND state = 'active'`) == 1
	})
	if u, err := s.getUser(t.Context(), 1); err != nil || u.Version > 2 {
		t.Errorf("version %d, %v after one change, want at most 2", u.Version, err)
	}
}

// TestAlteredColumns alters, adds and drops columns under load, and checks that every request
// succeeds.
func TestAlteredColumns(t *testing.T) {
	t.Parallel()
	svc := startService(t, postgresSettings(t))
	conn := connect(t, svc.settings.databaseURL)
	for range 4 {
		svc.createUser("John", "Doe")
	}
	done := make(chan struct{})
	var group sync.WaitGroup
	for c := range 4 {
		group.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				path := fmt.Sprint("/users/", c+1)
				name := fmt.Sprintf(`{"name": "name %d %d"}`, c, i)
				for method, body := range map[string]string{"GET": "", "PUT": name} {
					if a := svc.do(method, path, body); a.status != 200 {
						t.Errorf("%s %s: status %d, want 200: %s", method, path, a.status, a.body)
					}
				}
				if a := svc.do("GET", "/users", ""); a.status != 200 {
					t.Errorf("GET /users: status %d, want 200: %s", a.status, a.body)
				}
			}
		})
	}
	for _, ddl := range []string{
		"ALTER COLUMN name TYPE varchar(300)", "ALTER COLUMN surname TYPE varchar(300)",
		"ADD COLUMN email text", "ALTER COLUMN name TYPE text", "DROP COLUMN email",
		"ALTER COLUMN surname TYPE text",
	} {
		execute(t, conn, "ALTER TABLE users "+ddl)
		svc.createUser("Jane", "Doe")
	}
	close(done)
	group.Wait()
	checkTotal(t, conn)
}

// TestAlteredVersion alters columns that the triggers set. After that, the triggers fail in
// sessions that have run them. The test checks that the store replaces these sessions.
func TestAlteredVersion(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s := openTestPostgres(t, url)
	id := mustCreate(t, s, "John").ID
	for i, alter := range []string{"SELECT 1", "ALTER TABLE users ALTER version TYPE int",
		"ALTER TABLE users ALTER updated_at TYPE timestamptz(3)"} {
		execute(t, connect(t, url), alter)
		u, err := s.updateUser(t.Context(), id, input(fmt.Sprint("name ", i), "", ""), nil)
		if err != nil || u.Version != int64(i+2) {
			t.Errorf("updateUser after %s: %+v, %v, want version %d", alter, u, err, i+2)
		}
	}
}
