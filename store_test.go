package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// eachStoreAlone runs a test against the stores themselves, with no relay that empties
// their outbox.
func eachStoreAlone(t *testing.T, test func(t *testing.T, s store)) {
	t.Run("memory", func(t *testing.T) {
		t.Parallel()
		test(t, newMemory())
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		test(t, openTestPostgres(t, newDatabase(t)))
	})
}

func openTestPostgres(t *testing.T, url string) *postgres {
	t.Helper()
	s, err := openPostgres(t.Context(), url, "test", newLogger(&logWriter{w: t.Output()}, 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	return s
}

func input(name, surname, password string) userInput {
	in := userInput{&name, &surname, &password}
	for _, field := range []**string{&in.name, &in.surname, &in.password} {
		if **field == "" {
			*field = nil
		}
	}
	return in
}

func mustCreate(t *testing.T, s store, name string) User {
	t.Helper()
	u, err := s.createUser(t.Context(), input(name, "Doe", "hash"), "")
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// allPending reads the outbox, without the lead.
func allPending(t *testing.T, s store) []event {
	t.Helper()
	events, err := s.pending(t.Context(), 1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	return events
}

func TestStoreKeepsUsers(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		ctx := withTraceID(t.Context(), "trace-1")
		created, err := s.createUser(ctx, input("John", "Doe", "hash"), "")
		if err != nil || created.ID != 1 || created.Name != "John" || created.Surname != "Doe" ||
			created.Version != 1 || !created.CreatedAt.Equal(created.UpdatedAt.Time) ||
			time.Since(created.CreatedAt.Time).Abs() > time.Minute {
			t.Fatalf("created %+v, %v", created, err)
		}
		got, err := s.getUser(ctx, 1)
		if err != nil || got.ID != 1 || !got.CreatedAt.Equal(created.CreatedAt.Time) {
			t.Errorf("got %+v, %v", got, err)
		}
		updated, err := s.updateUser(ctx, 1, input("Jane", "", ""), nil)
		if err != nil || updated.Name != "Jane" || updated.Surname != "Doe" || updated.Version != 2 ||
			!updated.UpdatedAt.After(created.UpdatedAt.Time) {
			t.Errorf("updated %+v, %v", updated, err)
		}
		if err := s.deleteUser(ctx, 1, nil); err != nil {
			t.Error(err)
		}
		if _, err := s.getUser(ctx, 1); !errors.Is(err, errNotFound) {
			t.Errorf("got a deleted user: %v", err)
		}
		events := allPending(t, s)
		if len(events) != 3 {
			t.Fatalf("%d events for 3 changes", len(events))
		}
		for i, want := range []string{userCreated, userUpdated, userDeleted} {
			e := events[i]
			if e.Type != want || e.Data != (eventData{1, int64(i + 1)}) || e.TraceID != "trace-1" ||
				len(e.ID) != 36 || e.ID[14] != '7' {
				t.Errorf("event %d is %+v", i, e)
			}
		}
		if !events[1].OccurredAt.Equal(updated.UpdatedAt.Time) ||
			!events[2].OccurredAt.After(updated.UpdatedAt.Time) {
			t.Errorf("the events' times are not those of the changes: %+v", events)
		}
	})
}

func TestStoreRefuses(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		mustCreate(t, s, "John")
		_, missing := s.updateUser(t.Context(), 9, input("Jane", "", ""), []int64{})
		_, stale := s.updateUser(t.Context(), 1, input("Jane", "", ""), []int64{2, 3})
		_, unchanged := s.updateUser(t.Context(), 1, input("John", "", ""), []int64{})
		for name, test := range map[string]struct{ got, want error }{
			"update of a missing user":           {missing, errNotFound},
			"update of another version":          {stale, errVersionMismatch},
			"no-op update of another version":    {unchanged, errVersionMismatch},
			"delete of a missing user":           {s.deleteUser(t.Context(), 9, nil), errNotFound},
			"delete of another version":          {s.deleteUser(t.Context(), 1, []int64{2}), errVersionMismatch},
			"delete with a match of no versions": {s.deleteUser(t.Context(), 1, []int64{}), errVersionMismatch},
		} {
			if !errors.Is(test.got, test.want) {
				t.Errorf("%s: %v", name, test.got)
			}
		}
		if u, err := s.getUser(t.Context(), 1); err != nil || u.Version != 1 {
			t.Errorf("a refused change changed something: %+v, %v", u, err)
		}
		if n := len(allPending(t, s)); n != 1 {
			t.Errorf("%d events for 1 change", n)
		}
		if err := s.deleteUser(t.Context(), 1, []int64{5, 1}); err != nil {
			t.Errorf("delete of a listed version: %v", err)
		}
	})
}

func TestStoreUpdatesWhatDiffers(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		in      userInput
		changes bool
	}{
		"same name":             {input("John", "", ""), false},
		"same name and surname": {input("John", "Doe", ""), false},
		"another name":          {input("Jane", "", ""), true},
		"another surname":       {input("John", "Roe", ""), true},
		"the name in capitals":  {input("JOHN", "", ""), true},
		"a password":            {input("John", "Doe", "hash2"), true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachStoreAlone(t, func(t *testing.T, s store) {
				before := mustCreate(t, s, "John")
				u, err := s.updateUser(t.Context(), 1, test.in, []int64{1})
				if err != nil {
					t.Fatal(err)
				}
				changed := u.Version == 2 && u.UpdatedAt.After(before.UpdatedAt.Time)
				same := u.Version == 1 && u.UpdatedAt.Equal(before.UpdatedAt.Time)
				if test.changes && !changed || !test.changes && !same {
					t.Errorf("the update made %+v of %+v", u, before)
				}
				if got := len(allPending(t, s)); (got == 2) != test.changes {
					t.Errorf("%d events", got)
				}
			})
		})
	}
}

func TestStoreListsInOrder(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		for i := range 12 {
			mustCreate(t, s, fmt.Sprint("user", i+1))
		}
		for _, id := range []int64{1, 5, 12} {
			if err := s.deleteUser(t.Context(), id, nil); err != nil {
				t.Fatal(err)
			}
		}
		for name, test := range map[string]struct {
			after, offset, limit int64
			want                 []int64
		}{
			"from the start":       {0, 0, 4, []int64{2, 3, 4, 6}},
			"with an offset":       {0, 3, 4, []int64{6, 7, 8, 9}},
			"the rest":             {0, 7, 100, []int64{10, 11}},
			"past the end":         {0, 9, 5, nil},
			"after a user":         {4, 0, 3, []int64{6, 7, 8}},
			"after a deleted user": {5, 0, 3, []int64{6, 7, 8}},
			"after the last":       {11, 0, 3, nil},
			"after any id":         {1<<63 - 1, 0, 3, nil},
		} {
			users, total, err := s.listUsers(t.Context(), test.after, test.offset, test.limit)
			if err != nil || total != 9 {
				t.Errorf("%s: total %d, %v", name, total, err)
			}
			var got []int64
			for _, u := range users {
				got = append(got, u.ID)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("%s: %v, not %v", name, got, test.want)
			}
		}
	})
}

// TestStoreKeepsOrder changes few users from many sides at once. Whatever happens, the
// events of a user are its versions without a gap, and the outbox has them in order.
func TestStoreKeepsOrder(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		const users, clients, rounds = 5, 32, 20
		for i := range users {
			mustCreate(t, s, fmt.Sprint("user", i))
		}
		var group sync.WaitGroup
		for c := range clients {
			group.Go(func() {
				for i := range rounds {
					id := rand.Int64N(users) + 1
					in := input(fmt.Sprintf("name %d %d", c, i), "", "")
					if _, err := s.updateUser(context.Background(), id, in, nil); err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
		versions := make(map[int64]int64)
		times := make(map[int64]time.Time)
		for _, e := range allPending(t, s) {
			if e.Data.Version != versions[e.Data.UserID]+1 {
				t.Errorf("version %d of user %d follows %d",
					e.Data.Version, e.Data.UserID, versions[e.Data.UserID])
			}
			if !e.OccurredAt.After(times[e.Data.UserID]) {
				t.Errorf("version %d of user %d is not later than the one before",
					e.Data.Version, e.Data.UserID)
			}
			versions[e.Data.UserID] = e.Data.Version
			times[e.Data.UserID] = e.OccurredAt.Time
		}
		sum := int64(0)
		for id, version := range versions {
			sum += version
			if u, err := s.getUser(t.Context(), id); err != nil || u.Version != version {
				t.Errorf("user %d has version %d, its last event %d (%v)", id, u.Version, version, err)
			}
		}
		if sum != users+clients*rounds {
			t.Errorf("%d events for %d changes", sum, users+clients*rounds)
		}
	})
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

// TestUniqueIndexOfASite refuses a creation.
func TestUniqueIndexOfASite(t *testing.T) {
	t.Parallel()
	svc := startService(t, postgresSettings(t))
	conn := connect(t, svc.settings.databaseURL)
	execute(t, conn, "CREATE UNIQUE INDEX site ON users (name, surname)")
	svc.createUser("John", "Doe")
	for _, headers := range [][]string{nil, {"Idempotency-Key: key"}} {
		if a := svc.do("POST", "/users", john, headers...); a.status != 409 {
			t.Errorf("with %v: %d %s", headers, a.status, a.body)
		}
	}
	if id := svc.createUser("Jane", "Doe"); id < 2 {
		t.Errorf("the next user has the id %d", id)
	}
	checkTotal(t, conn)
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

// TestStoreMatchesOnce lets clients compete for one version: one of them wins.
func TestStoreMatchesOnce(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		mustCreate(t, s, "John")
		for version := int64(1); version <= 10; version++ {
			errs := make(chan error, 8)
			for c := range cap(errs) {
				go func() {
					in := input(fmt.Sprint("name", version, c), "", "")
					_, err := s.updateUser(context.Background(), 1, in, []int64{version})
					errs <- err
				}()
			}
			won := 0
			for range cap(errs) {
				if err := <-errs; err == nil {
					won++
				} else if !errors.Is(err, errVersionMismatch) {
					t.Error(err)
				}
			}
			if won != 1 {
				t.Errorf("%d clients changed version %d", won, version)
			}
		}
	})
}

// TestStoreCountsExactly adds and removes users from many sides at once.
func TestStoreCountsExactly(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		var group sync.WaitGroup
		for range 16 {
			group.Go(func() {
				for range 10 {
					u, err := s.createUser(context.Background(), input("John", "Doe", "hash"), "")
					if err == nil && u.ID%3 == 0 {
						err = s.deleteUser(context.Background(), u.ID, nil)
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
		users, total, err := s.listUsers(t.Context(), 0, 0, 1000)
		if err != nil || total != int64(len(users)) || total != 160-160/3 {
			t.Errorf("total %d of %d users, %v", total, len(users), err)
		}
	})
}

// TestPostgresCountsForeignRows changes the table behind the service's back.
func TestPostgresCountsForeignRows(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	for _, step := range []struct {
		sql  string
		want int64
	}{
		{"INSERT INTO users (name, surname, password) SELECT 'a', 'b', 'c' FROM generate_series(1, 1000)", 1000},
		{"DELETE FROM users WHERE id % 2 = 0", 500},
		{"DELETE FROM users WHERE id = -1", 500},
		{"UPDATE users SET name = 'd'", 500},
		{"TRUNCATE users", 0},
	} {
		if _, err := conn.Exec(t.Context(), step.sql); err != nil {
			t.Fatal(err)
		}
		if _, total, err := s.listUsers(t.Context(), 0, 0, 1); err != nil || total != step.want {
			t.Errorf("after %q the total is %d, not %d (%v)", step.sql, total, step.want, err)
		}
	}
}

// TestTotalIsExactWhileFolded compares the total with the number of users, in one snapshot, while
// many write and two stores fold.
func TestTotalIsExactWhileFolded(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	first, second := openTestPostgres(t, url), openTestPostgres(t, url)
	open, err := connect(t, url).Begin(t.Context())
	if err == nil {
		_, err = open.Exec(t.Context(),
			"INSERT INTO users (name, surname, password) VALUES ('a', 'b', 'c')")
	}
	if err != nil {
		t.Fatal(err)
	}
	var writers, folders sync.WaitGroup
	for c := range 50 {
		s := []*postgres{first, second}[c%2]
		writers.Go(func() {
			for range 8 {
				u, err := s.createUser(context.Background(), input("John", "Doe", "hash"), "")
				if err == nil && c%3 == 0 {
					err = s.deleteUser(context.Background(), u.ID, nil)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	for _, s := range []*postgres{first, second} {
		folders.Go(func() {
			for working := true; working; {
				select {
				case <-done:
					working = false
				default:
				}
				if err := s.fold(context.Background()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	go func() { writers.Wait(); close(done) }()
	compareTotals(t, connect(t, url), done)
	folders.Wait()
	if err := open.Commit(t.Context()); err != nil {
		t.Error(err)
	}
	conn := connect(t, url)
	checkTotal(t, conn)
	n := queryValue[int64](t, conn, "SELECT count(*) FROM users")
	if _, total, err := first.listUsers(t.Context(), 0, 0, 1); err != nil || total != n {
		t.Errorf("the list has the total %d of %d, %v", total, n, err)
	}
}

// compareTotals compares the total with the number of users, in one snapshot each time, until
// done is closed and at least ten times.
func compareTotals(t *testing.T, conn *pgx.Conn, done <-chan struct{}) {
	t.Helper()
	for compared, working := 0, true; working || compared < 10; compared++ {
		select {
		case <-done:
			working = false
		default:
		}
		options := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
		err := pgx.BeginTxFunc(t.Context(), conn, options, func(pgx.Tx) error {
			checkTotal(t, conn)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestFold makes one row of many, whatever their sum is, and leaves a few and a single one.
func TestFold(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	for _, test := range []struct {
		name, rows string
		want       string
	}{
		{"one row", "VALUES (7)", "1 7"},
		{"a few rows", "SELECT 1 FROM generate_series(1, 49)", "49 49"},
		{"many rows", "SELECT i FROM generate_series(1, 50) AS i", "1 1275"},
		{"a sum of 0", "SELECT (-1) ^ i FROM generate_series(1, 1000) AS i", "1 0"},
		{"rows of 0", "SELECT 0 FROM generate_series(1, 100)", "1 0"},
		{"rows of many pages", "SELECT 1 FROM generate_series(1, 40000)", "1 40000"},
		{"one row in many pages", "VALUES (7)", "1 7"},
	} {
		execute(t, conn, "DELETE FROM user_counts")
		execute(t, conn, "INSERT INTO user_counts "+test.rows)
		eventually(t, "a total that is folded", func() bool { return s.fold(t.Context()) == nil })
		got := queryValue[string](t, conn, "SELECT count(*) || ' ' || sum(n) FROM user_counts")
		if got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

// TestPostgresAppliesSchemaTogether starts replicas on an empty database at once, and
// once more on the finished one, where nothing may change.
func TestPostgresAppliesSchemaTogether(t *testing.T) {
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
			s, err := openPostgres(context.Background(), url, "test", newLogger(&logWriter{w: t.Output()}, 0))
			if err != nil {
				t.Error(err)
				return
			}
			s.close()
		})
	}
	group.Wait()
	const catalog = `SELECT string_agg(c.oid || c.relname || c.relfilenode, ' ' ORDER BY c.oid)
		FROM pg_class c WHERE relnamespace = 'public'::regnamespace`
	before := queryValue[string](t, conn, catalog)
	mustCreate(t, openTestPostgres(t, url), "John")
	if after := queryValue[string](t, conn, catalog); after != before {
		t.Errorf("a second start changed the schema:\n%s\n%s", before, after)
	}
}

// TestPoolConfigBoundsConnecting has no URL without a time to connect in: zero would be
// without end.
func TestPoolConfigBoundsConnecting(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]time.Duration{
		"postgres://u@h/d":                               2 * time.Second,
		"postgres://u@h/d?connect_timeout=0":             2 * time.Second,
		"postgres://u@h/d?connect_timeout=1":             time.Second,
		"postgres://u@h/d?connect_timeout=60":            2 * time.Second,
		"postgres://u@h,i/d":                             1500 * time.Millisecond,
		"postgres://u@h:1,h:2,h:3,h:4/d":                 750 * time.Millisecond,
		"postgres://u@h,h/d?sslmode=disable":             2 * time.Second,
		"postgres://u@a,b,c/d?connect_timeout=1":         time.Second,
		"postgres://u@/d?host=/run/pg,/run/other&port=1": 1500 * time.Millisecond,
	} {
		config, err := poolConfig(url, "test")
		if err != nil || config.ConnConfig.ConnectTimeout != want {
			t.Errorf("%s: %v, %v", url, config.ConnConfig.ConnectTimeout, err)
		}
	}
	for query, want := range map[string]int32{"": defaultPoolSize, "?pool_max_conns=7": 7,
		"?pool_max_conns=1": minPoolSize, "?pool_max_conns=99": maxPoolSize} {
		if config, err := poolConfig("postgres://u@h/d"+query, "test"); err != nil || config.MaxConns != want {
			t.Errorf("%q: %d connections, %v", query, config.MaxConns, err)
		}
	}
}

// TestPoolConfigSendsWhatPoolersTake has no start-up parameter that PgBouncer refuses, and none
// that the URL can take away from us.
func TestPoolConfigSendsWhatPoolersTake(t *testing.T) {
	t.Parallel()
	config, err := poolConfig("postgres://u@h/d?client_encoding=LATIN1&DateStyle=German", "test")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"application_name": "test", "client_encoding": "UTF8",
		"datestyle": "ISO", "timezone": "UTC", "standard_conforming_strings": "on"}
	if got := config.ConnConfig.RuntimeParams; !maps.Equal(got, want) {
		t.Errorf("%v, not %v", got, want)
	}
}

// TestPoolConfigLooksForThePrimary asks several hosts for the one that takes writes.
func TestPoolConfigLooksForThePrimary(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]bool{
		"postgres://u@h/d":                                       false,
		"postgres://u@h,i/d":                                     true,
		"postgres://u@h:1,h:2/d":                                 true,
		"postgres://u@h/d?target_session_attrs=read-write":       true,
		"postgres://u@h,i/d?target_session_attrs=prefer-standby": true,
	} {
		config, err := poolConfig(url, "test")
		if err != nil || (config.ConnConfig.ValidateConnect != nil) != want {
			t.Errorf("%s: %t, %v", url, config.ConnConfig.ValidateConnect != nil, err)
		}
	}
}

func TestPoolConfigPrefersPlainOnLoopback(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]string{
		"postgres://u@127.0.0.1/d":                   "plain, TLS",
		"postgres://u@[::1]/d?sslmode=prefer":        "plain, TLS",
		"postgres://u@localhost/d":                   "plain, TLS",
		"postgres://u@localhost/d?sslmode=require":   "TLS",
		"postgres://u@localhost/d?sslmode=disable":   "plain",
		"postgres://u@db.example.com/d":              "TLS, plain",
		"postgres://u@192.0.2.1/d":                   "TLS, plain",
		"postgres://u@127.0.0.1,db.example.com/d":    "TLS, plain, TLS, plain",
		"postgres://u@localhost/d?sslmode=allow":     "plain, TLS",
		"postgres://u@/d?host=/var/run/postgresql":   "plain",
		"postgres://u@localhost/d?sslmode=verify-ca": "TLS",
	} {
		config, err := poolConfig(url, "test")
		if err != nil {
			t.Fatal(err)
		}
		ways := []*tls.Config{config.ConnConfig.TLSConfig}
		for _, f := range config.ConnConfig.Fallbacks {
			ways = append(ways, f.TLSConfig)
		}
		got := make([]string, len(ways))
		for i, way := range ways {
			got[i] = map[bool]string{true: "plain", false: "TLS"}[way == nil]
		}
		if strings.Join(got, ", ") != want {
			t.Errorf("%s connects by %s, want %s", url, got, want)
		}
	}
}

func TestPostgresGivesUpOnLockedTable(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	mustCreate(t, s, "John")
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE users"); err != nil {
		t.Fatal(err)
	}
	_, err := s.updateUser(t.Context(), 1, input("Jane", "", ""), nil)
	if !errors.Is(err, errUnavailable) {
		t.Errorf("an update of a locked table: %v", err)
	}
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if u, err := s.getUser(t.Context(), 1); err != nil || u.Version != 1 {
		t.Errorf("after the lock: %+v, %v", u, err)
	}
}

// TestPostgresListsLeaveConnections has more lists than there are connections wait for a
// locked table: a statement about another one still finds a connection at once.
func TestPostgresListsLeaveConnections(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s := openTestPostgres(t, url)
	_, unlock := lockUsers(&service{t: t, settings: settings{databaseURL: url}})
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan error)
	lists := int(s.pool.Config().MaxConns) - reservedConns - 1
	for range 2 * maxPoolSize {
		go func() {
			_, _, err := s.listUsers(ctx, 0, 0, 1)
			left <- err
		}()
	}
	watcher := connect(t, url)
	eventually(t, "lists that wait", func() bool {
		return queryValue[int](t, watcher, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`) == lists
	})
	if _, _, err := s.creationUnder(t.Context(), "key"); !errors.Is(err, errNotFound) {
		t.Errorf("beside the lists: %v", err)
	}
	leave() // those that have no statement go at once
	for range 2*maxPoolSize - lists {
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("a list that waited: %v", err)
		}
	}
	unlock()
	for range lists {
		if err := <-left; err != nil {
			t.Errorf("a list whose client left: %v", err)
		}
	}
}

// TestPostgresActivityTellsNoSecret looks at what the server shows of statements that wait.
func TestPostgresActivityTellsNoSecret(t *testing.T) {
	t.Parallel()
	set := postgresSettings(t)
	s := startService(t, set)
	id := s.createUser("John", "Doe")
	_, unlock := lockUsers(s)
	var requests sync.WaitGroup
	user := fmt.Sprintf(`{"name": "Ann", "surname": "Lee", "password": %q}`, secret)
	requests.Go(func() { s.do("POST", "/users", user, "Idempotency-Key: key") })
	requests.Go(func() { s.do("PUT", fmt.Sprintf("/users/%d", id), user) })
	requests.Go(func() {
		s.do("POST", fmt.Sprintf("/users/%d/password/verify", id), fmt.Sprintf(`{"password": %q}`, secret))
	})
	const waiting = `SELECT coalesce(string_agg(query, E'\n'), '') FROM pg_stat_activity
		WHERE datname = current_database() AND wait_event_type = 'Lock'`
	watcher := connect(t, set.databaseURL)
	var queries string
	eventually(t, "three statements that wait", func() bool {
		queries = queryValue[string](t, watcher, waiting)
		return strings.Contains(queries, "INSERT INTO users") && strings.Contains(queries, "UPDATE users") &&
			strings.Contains(queries, "SELECT password")
	})
	if strings.Contains(queries, secret) || strings.Contains(queries, "argon2id") {
		t.Errorf("the server shows a password:\n%s", queries)
	}
	unlock()
	requests.Wait()
}

// TestPostgresSurvivesLostConnections cuts every connection of the service. Reads go on,
// and a write that reached no server is sent again.
func TestPostgresSurvivesLostConnections(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	mustCreate(t, s, "John")
	for range 5 {
		_, err := conn.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid()`)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.getUser(t.Context(), 1); err != nil {
			t.Errorf("a read after the cut: %v", err)
		}
	}
}

// blockedHere says whether a statement of this database, not of another test's, waits for
// a lock.
const blockedHere = `SELECT EXISTS (SELECT FROM pg_stat_activity
	WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0)`

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

// TestPostgresKeepsConnections lets callers vanish while their statement runs.
func TestPostgresKeepsConnections(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	mustCreate(t, s, "John")
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE users"); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 200 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(50))*time.Millisecond)
		defer cancel()
		group.Go(func() { s.getUser(ctx, 1) })
	}
	time.Sleep(100 * time.Millisecond)
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	group.Wait()
	if opened := s.pool.Stat().NewConnsCount(); opened > defaultPoolSize {
		t.Errorf("%d connections were opened for a pool of %d", opened, defaultPoolSize)
	}
}

func TestPostgresReady(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	name := conn.Config().Database
	steps := []struct {
		sql  []string
		want state
	}{
		{nil, "up"},
		{[]string{"ALTER DATABASE " + name + " SET default_transaction_read_only = on"}, "read-only"},
		{[]string{"ALTER DATABASE " + name + " RESET default_transaction_read_only"}, "up"},
		{[]string{"ALTER DATABASE " + name + " ALLOW_CONNECTIONS false"}, "down"},
		{[]string{"ALTER DATABASE " + name + " ALLOW_CONNECTIONS true"}, "up"},
	}
	for _, step := range steps {
		terminate := "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '" +
			name + "' AND application_name = 'test'"
		if err := admin(t.Context(), append(step.sql, terminate)...); err != nil {
			t.Fatal(err)
		}
		eventually(t, "readiness "+string(step.want), func() bool { return s.ready(t.Context()) == step.want })
		if step.want == "read-only" {
			if _, err := s.createUser(t.Context(), input("John", "Doe", "hash"), ""); !errors.Is(err, errUnavailable) {
				t.Errorf("a write to a read-only database: %v", err)
			}
		}
	}
}

// TestLeadIsOne lets replicas compete for the lead: one has it until it resigns, or as long as its
// lease, also where a restore has added a row of another time, or has taken the row away.
func TestLeadIsOne(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	first, second := openTestPostgres(t, url), openTestPostgres(t, url)
	conn := connect(t, url)
	leads := func(s *postgres) bool {
		leads, err := s.lead(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return leads
	}
	if !leads(first) || leads(second) || !leads(first) {
		t.Error("not only the first leads")
	}
	if err := first.resign(t.Context()); err != nil || !leads(second) || leads(first) {
		t.Errorf("not only the second leads, after the first has resigned: %v", err)
	}
	for _, disturbance := range []string{
		"DELETE FROM relay_lease",
		"TRUNCATE relay_lease",
		"INSERT INTO relay_lease VALUES ('restored', now() - interval '1 day')",
		"INSERT INTO relay_lease SELECT 'restored', now() - interval '1 day' FROM generate_series(1, 3)",
		"UPDATE relay_lease SET until = '-infinity'",
		"UPDATE relay_lease SET holder = 'ahead', until = now() + interval '1 hour'",
	} {
		if _, err := conn.Exec(t.Context(), disturbance); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a leader after "+disturbance, func() bool { return leads(first) || leads(second) })
		for range 10 {
			if leads(first) == leads(second) {
				t.Errorf("none or both lead after %s", disturbance)
			}
		}
	}
	if _, err := conn.Exec(t.Context(), "UPDATE relay_lease SET holder = 'frozen', until = clock_timestamp() + interval '2 s'"); err != nil {
		t.Fatal(err)
	}
	if leads(first) || leads(second) {
		t.Error("two lead")
	}
	eventually(t, "a leader after the lease has ended", func() bool { return leads(first) })
}

// TestLeadNeedsWrites asks for the lead of a database that takes no writes.
func TestLeadNeedsWrites(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	_, err := conn.Exec(t.Context(), "ALTER DATABASE "+conn.Config().Database+
		" SET default_transaction_read_only = on")
	if err != nil {
		t.Fatal(err)
	}
	s.pool.Reset()
	if leads, err := s.lead(t.Context()); leads || !errors.Is(err, errUnavailable) {
		t.Errorf("leads what it cannot change: %t, %v", leads, err)
	}
}

func TestMemoryListsManyUsers(t *testing.T) {
	t.Parallel()
	s := newMemory()
	for range 100_000 {
		mustCreate(t, s, "John")
	}
	users, total, err := s.listUsers(t.Context(), 99_990, 0, 100)
	if err != nil || total != 100_000 || len(users) != 10 || users[0].ID != 99_991 {
		t.Errorf("%d users of %d, %v", len(users), total, err)
	}
}

// TestPreventedCreation has a trigger of the site prevent creations, in silence: nobody is told that a
// user was created, and the key is free for the next attempt.
func TestPreventedCreation(t *testing.T) {
	t.Parallel()
	set := postgresSettings(t)
	svc, conn := startService(t, set), connect(t, set.databaseURL)
	execute(t, conn, `
		CREATE FUNCTION prevent() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
		CREATE TRIGGER prevent BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION prevent()`)
	for _, header := range []string{"", "Idempotency-Key: key-1"} {
		if a := svc.do("POST", "/users", john, header); a.status != 409 {
			t.Errorf("%q: %d %s", header, a.status, a.body)
		}
	}
	execute(t, conn, "DROP TRIGGER prevent ON users")
	a := svc.do("POST", "/users", john, "Idempotency-Key: key-1")
	if a.status != 201 || svc.do("GET", a.header.Get("Location"), "").status != 200 {
		t.Errorf("with the same key afterwards: %d %s", a.status, a.body)
	}
}

// TestCreationBesideCopiedIDs has an open import insert ids that come next: creations go on.
func TestCreationBesideCopiedIDs(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s := openTestPostgres(t, url)
	last := mustCreate(t, s, "John").ID
	tx, err := connect(t, url).Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), `INSERT INTO users (id, name, surname, password)
			SELECT id, 'copied', 'Doe', 'x' FROM generate_series($1::bigint + 1, $1 + 100) AS id`, last)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	if u := mustCreate(t, s, "Jane"); u.ID <= last+100 {
		t.Errorf("the next id is %d", u.ID)
	}
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
