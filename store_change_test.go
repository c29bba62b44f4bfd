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

// lockUser locks a user, as an administrator's open transaction does, until the function that comes
// back is called or the test ends.
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

// blockedHere says whether a statement of this database, not of another test's, waits for
// a lock.
const blockedHere = `SELECT EXISTS (SELECT FROM pg_stat_activity
	WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0)`

// changeLocked locks users and has one client change each of them, or several if there is one user.
// It returns when a change waits. Stop unlocks the users, waits for the clients, and returns the
// number of those that had been answered before.
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
				t.Errorf("a locked user: %d %s", a.status, a.body)
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

// TestPostgresChangesTogether makes a batch of what can be changed at once and what cannot: a user
// who is missing, one of another version, and one whom somebody else has locked are left out, and
// nobody waits for them.
func TestPostgresChangesTogether(t *testing.T) {
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
			t.Errorf("change %d: %t, %+v", i, ok, got)
		}
	}
	if len(results) != 3 {
		t.Errorf("%d changes were made, not 3", len(results))
	}

	changes = []*userChange{change(users[0].ID, nil), change(users[1].ID, nil, 1), change(users[5].ID, nil)}
	results, err = s.changeBatch(t.Context(), deleteUsers, s.write, changes)
	if _, deleted := results[changes[0]]; err != nil || !deleted || len(results) != 1 {
		t.Errorf("deletions: %+v, %v", results, err)
	}
	var events []string
	for _, e := range allPending(t, s)[len(users):] {
		events = append(events, fmt.Sprintf("%s %d/%d %s", e.Type, e.Data.UserID, e.Data.Version, e.TraceID))
	}
	slices.Sort(events)
	want := "[user.deleted 1/3 trace-1 user.updated 1/2 trace-1 user.updated 2/2 trace-2]"
	if got := fmt.Sprint(events); got != want {
		t.Errorf("the events are %s, not %s", got, want)
	}
}

// TestPostgresChangesAlone has one change of a batch refused by PostgreSQL: the others are
// made nevertheless, and its caller is told.
func TestPostgresChangesAlone(t *testing.T) {
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
			name = "slow" // so that the others share a batch
		} else if i == len(ids)-1 {
			name = "refused"
		}
		callers.Go(func() {
			u, err := s.updateUser(t.Context(), id, userInput{name: &name}, nil)
			if name == "refused" {
				if err == nil || errors.Is(err, errUnavailable) || errors.Is(err, errOutcomeUnknown) {
					t.Errorf("the refused change: %+v, %v", u, err)
				}
			} else if err != nil || u.Name != name || u.Version != 2 {
				t.Errorf("%s: %+v, %v", name, u, err)
			}
		})
		if i == writesAlone-1 {
			time.Sleep(50 * time.Millisecond)
		}
	}
	callers.Wait()
	if n := len(allPending(t, s)); n != 2*len(ids)-1 {
		t.Errorf("%d events of %d creations and %d updates", n, len(ids), len(ids)-1)
	}
}

// TestLockedUsersHoldUpNobody has many clients change locked users: one user, then more users than
// there are connections. Everything else goes on while not one of them is answered. The machine of
// the test may be slower than the changes, so there are some attempts.
func TestLockedUsersHoldUpNobody(t *testing.T) {
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
					{"PUT", free, fmt.Sprintf(`{"name": "free %d"}`, attempt)}, {"GET", "/metrics", ""},
				} {
					if a := svc.do(step.method, step.path, step.body); a.status != 200 {
						t.Errorf("%s %s: %d %s", step.method, step.path, a.status, a.body)
					}
				}
				svc.createUser("Jane", "Doe")
				blocked := queryValue[int](t, watcher, `SELECT count(*) FROM pg_stat_activity
					WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0`)
				if blocked > min(locked, defaultPoolSize/2) {
					t.Errorf("%d connections wait for %d users", blocked, locked)
				}
				answered = stop()
			}
			if answered > 0 {
				t.Errorf("%d changes of locked users were answered before all others", answered)
			}
		})
	}
}

// siteRules are what a site may add to the table: each refuses the user whose name is refused.
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
		name: "trigger with a code of integrity",
		sql: `CREATE FUNCTION site() RETURNS trigger LANGUAGE plpgsql AS
				$$ BEGIN RAISE 'refused' USING ERRCODE = 'check_violation'; END $$;
			CREATE TRIGGER site BEFORE UPDATE ON users FOR EACH ROW WHEN (NEW.name = 'refused')
			EXECUTE FUNCTION site()`,
		refused: `{"name": "refused"}`, status: 409,
	},
	{
		name: "trigger that raises",
		sql: `CREATE FUNCTION site() RETURNS trigger LANGUAGE plpgsql AS
				$$ BEGIN RAISE 'refused'; END $$;
			CREATE TRIGGER site BEFORE UPDATE ON users FOR EACH ROW WHEN (NEW.name = 'refused')
			EXECUTE FUNCTION site()`,
		refused: `{"name": "refused"}`, status: 409,
	},
	{
		name: "trigger that skips the row",
		sql: `CREATE FUNCTION site() RETURNS trigger LANGUAGE plpgsql AS
				$$ BEGIN RETURN NULL; END $$;
			CREATE TRIGGER site BEFORE UPDATE ON users FOR EACH ROW WHEN (NEW.name = 'refused')
			EXECUTE FUNCTION site()`,
		refused: `{"name": "refused"}`, status: 409,
	},
	{
		name: "lock timeout",
		sql: `CREATE FUNCTION site() RETURNS trigger LANGUAGE plpgsql AS
				$$ BEGIN RAISE 'refused' USING ERRCODE = 'lock_not_available'; END $$;
			CREATE TRIGGER site BEFORE UPDATE ON users FOR EACH ROW WHEN (NEW.name = 'refused')
			EXECUTE FUNCTION site()`,
		refused: `{"name": "refused"}`, status: 503,
	},
	{
		name: "statement timeout",
		sql: `CREATE FUNCTION site() RETURNS trigger LANGUAGE plpgsql AS
				$$ BEGIN RAISE 'refused' USING ERRCODE = 'query_canceled'; END $$;
			CREATE TRIGGER site BEFORE UPDATE ON users FOR EACH ROW WHEN (NEW.name = 'refused')
			EXECUTE FUNCTION site()`,
		refused: `{"name": "refused"}`, status: 503,
	},
}

// TestRefusedChangeIsItsCallers has one of many changes at once refused by a rule of the site: its
// client is told, and all others succeed.
func TestRefusedChangeIsItsCallers(t *testing.T) {
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
						t.Errorf("user %d: %d %s, want %d", id, a.status, a.body, want)
					}
				})
			}
			group.Wait()
			versions := queryValue[string](t, conn,
				"SELECT string_agg(DISTINCT version::text, ' ') FROM users WHERE id <> 7")
			version := queryValue[int](t, conn, "SELECT version FROM users WHERE id = 7")
			if version != 1 || versions != "4" {
				t.Errorf("the refused user has version %d, the others %s", version, versions)
			}
		})
	}
}

// TestReferencedUser is one to whom a table of the site refers: it cannot be deleted, and others
// that are deleted at the same time are.
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
				t.Errorf("user %d: %d %s", id, a.status, a.body)
			}
		})
	}
	group.Wait()
	execute(t, conn, "DROP TABLE orders")
	if a := svc.do("DELETE", "/users/7", ""); a.status != 200 {
		t.Errorf("without the reference: %d %s", a.status, a.body)
	}
	svc.waitForLine("Received event user.deleted with user_id=7", "version", 2)
}

// TestCancelledStatement has an administrator cancel changes that wait for a lock.
func TestCancelledStatement(t *testing.T) {
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
		t.Errorf("after the cancels: %d %s", a.status, a.body)
	}
}

// TestPostgresChangesAtMostOnce loses the answer to a write: the service must not send it
// again, and says that it does not know.
func TestPostgresChangesAtMostOnce(t *testing.T) {
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
		t.Errorf("a write whose answer was lost: %v", err)
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
		t.Errorf("one write made version %d, %v", u.Version, err)
	}
}

// TestAlteredColumns changes the types of columns, and adds and drops one, under load.
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
				path, name := fmt.Sprint("/users/", c+1), fmt.Sprintf(`{"name": "name %d %d"}`, c, i)
				for method, body := range map[string]string{"GET": "", "PUT": name} {
					if a := svc.do(method, path, body); a.status != 200 {
						t.Errorf("%s %s: %d %s", method, path, a.status, a.body)
					}
				}
				if a := svc.do("GET", "/users", ""); a.status != 200 {
					t.Errorf("the list: %d %s", a.status, a.body)
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

// TestAlteredVersion changes the type of a column that the trigger sets: the sessions that have run it
// fail from then on, and are replaced.
func TestAlteredVersion(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s := openTestPostgres(t, url)
	id := mustCreate(t, s, "John").ID
	for i, alter := range []string{"SELECT 1", "ALTER TABLE users ALTER version TYPE int",
		"ALTER TABLE users ALTER updated_at TYPE timestamptz(3)"} {
		execute(t, connect(t, url), alter)
		if u, err := s.updateUser(t.Context(), id, input(fmt.Sprint("name ", i), "", ""), nil); err != nil ||
			u.Version != int64(i+2) {
			t.Errorf("after %s: %+v, %v", alter, u, err)
		}
	}
}
