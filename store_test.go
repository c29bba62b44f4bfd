package main

// Tests of the stores: store.go, memory.go, database.go, outbox.go, and schema.sql with its triggers,
// the repair of a damaged schema, and the upgrade of an older one.

import (
	"context"
	"crypto/tls"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
)

// eachStoreAlone runs a test with each store, without a service. So no relay removes events from
// the outbox.
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

// openTestPostgres opens a store on a database until the test ends.
func openTestPostgres(t *testing.T, url string) *postgres {
	t.Helper()
	out := &logWriter{w: t.Output()}
	s, err := openPostgres(t.Context(), url, "test", newLogger(out, 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.close()
		if err := out.flush(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// input returns a userInput with the fields that are not "".
func input(name, surname, password string) userInput {
	in := userInput{&name, &surname, &password}
	for _, field := range []**string{&in.name, &in.surname, &in.password} {
		if **field == "" {
			*field = nil
		}
	}
	return in
}

// mustCreate creates a user with a name.
func mustCreate(t *testing.T, s store, name string) User {
	t.Helper()
	u, err := s.createUser(t.Context(), "test", input(name, "Doe", "hash"), "")
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// allPending returns all events of the outbox. It does not need the lease.
func allPending(t *testing.T, s store) []event {
	t.Helper()
	events, _, err := s.next(t.Context(), nil, nil, 1_000_000, false)
	if err != nil {
		t.Fatal(err)
	}
	return events
}

// TestStoreChanges checks the user and the event after a creation, an update and a deletion.
func TestStoreChanges(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		ctx := withTraceID(t.Context(), "trace-1")
		created, err := s.createUser(ctx, "test", input("John", "Doe", "hash"), "")
		if err != nil || created.ID != 1 || created.Name != "John" || created.Surname != "Doe" ||
			created.Version != 1 || !created.CreatedAt.Equal(created.UpdatedAt.Time) ||
			time.Since(created.CreatedAt.Time).Abs() > time.Minute {
			t.Fatalf("createUser: %+v, %v, want John Doe with id 1, version 1 and current times",
				created, err)
		}
		got, err := s.getUser(ctx, 1)
		if err != nil || got.ID != 1 || !got.CreatedAt.Equal(created.CreatedAt.Time) {
			t.Errorf("getUser: %+v, %v, want %+v", got, err, created)
		}
		updated, err := s.updateUser(ctx, "test", 1, input("Jane", "", ""), nil)
		if err != nil || updated.Name != "Jane" || updated.Surname != "Doe" ||
			updated.Version != 2 || !updated.UpdatedAt.After(created.UpdatedAt.Time) {
			t.Errorf("updateUser: %+v, %v, want Jane Doe in version 2, later than %v",
				updated, err, created.UpdatedAt)
		}
		if err := s.deleteUser(ctx, "test", 1, nil); err != nil {
			t.Error(err)
		}
		if _, err := s.getUser(ctx, 1); !errors.Is(err, errNotFound) {
			t.Errorf("getUser after deleteUser: error %v, want errNotFound", err)
		}
		events := allPending(t, s)
		if len(events) != 3 {
			t.Fatalf("%d events after 3 changes, want 3", len(events))
		}
		for i, want := range []string{userCreated, userUpdated, userDeleted} {
			e := events[i]
			if e.Type != want || e.Data != (eventData{1, int64(i + 1)}) || e.TraceID != "trace-1" ||
				len(e.ID) != 36 || e.ID[14] != '7' {
				t.Errorf("event %d: %+v, want %s of version %d with trace-1 and a UUIDv7",
					i, e, want, i+1)
			}
		}
		if !events[1].OccurredAt.Equal(updated.UpdatedAt.Time) ||
			!events[2].OccurredAt.After(updated.UpdatedAt.Time) {
			t.Errorf("events %+v, want the times of the changes, %v and later",
				events, updated.UpdatedAt)
		}
	})
}

// oddActors are names that PostgreSQL could mistake for its own syntax.
var oddActors = []string{"ops", "auth0|42", `a"b\c{d},e`, "NULL", "Ünï", "o'Neil $1", " ", "{}"}

// origins of the events in the tests below.
const (
	parent1 = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	state1  = "rojo=00f067aa0ba902b7,\tcongo={t61rcWkgMzE} \"x\""
)

// TestStoreOrigins checks that the event of each change has the actor and the trace of its change,
// also when changes share a statement.
func TestStoreOrigins(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		want := make(map[eventData]event)
		origin := func(actor string, id, version int64) context.Context {
			e := event{TraceID: fmt.Sprint("trace-", id, "-", version), actor: actor}
			if id%2 == 0 {
				e.traceParent, e.traceState = parent1, state1
			}
			want[eventData{id, version}] = e
			return withTrace(t.Context(), trace{e.TraceID, e.traceParent, e.traceState})
		}
		for i, actor := range oddActors {
			id := int64(i + 1)
			_, err := s.createUser(origin(actor, id, 1), actor, input("John", "Doe", "x"), "")
			if err != nil {
				t.Fatal(err)
			}
		}
		for version := int64(2); version <= 3; version++ {
			var group errgroup.Group
			for i, actor := range oddActors {
				id := int64(i + 1)
				ctx := origin(actor, id, version)
				group.Go(func() error {
					if version == 3 {
						return s.deleteUser(ctx, actor, id, nil)
					}
					_, err := s.updateUser(ctx, actor, id, input("Jane", "", ""), nil)
					return err
				})
			}
			if err := group.Wait(); err != nil {
				t.Fatal(err)
			}
		}
		for _, e := range allPending(t, s) {
			got := event{TraceID: e.TraceID, actor: e.actor, traceParent: e.traceParent,
				traceState: e.traceState}
			if got != want[e.Data] {
				t.Errorf("event %v: origin %+v, want %+v", e.Data, got, want[e.Data])
			}
			delete(want, e.Data)
		}
		if len(want) > 0 {
			t.Errorf("no events %v", want)
		}
	})
}

// originsText is a query that returns the origins of the events, and removes the events. A UUID is
// shown as "uuid".
const originsText = `WITH removed AS (DELETE FROM outbox RETURNING *)
	SELECT string_agg(concat_ws(' ',
		CASE WHEN trace_id ~ '^[0-9a-f]{8}-.{4}-4.{3}-' THEN 'uuid' ELSE trace_id END,
		CASE actor WHEN 'sql:' || session_user THEN 'sql:owner'
			WHEN 'sql:' || current_setting('test.role') THEN 'sql:role' ELSE actor END,
		traceparent, tracestate), '; ' ORDER BY id) FROM removed`

// TestOriginsOfSQL checks the origin of changes by SQL, whatever settings the writer makes. Only the
// roles of the service can choose the actor.
func TestOriginsOfSQL(t *testing.T) {
	t.Parallel()
	const traceID1 = "0af7651916cd43dd8448eb211c80319c"
	set := func(name, value string) string {
		return fmt.Sprintf("SET LOCAL user_service.%s = '%s'; ", name, value)
	}
	parent := func(text string) string { return set("traceparent", text) }
	for _, test := range []struct {
		name     string
		owner    bool // writes, not another role
		settings string
		want     string
	}{
		{name: "no settings", want: "uuid sql:role  "},
		{name: "no settings of the owner", owner: true, want: "uuid sql:owner  "},
		{name: "trace id", settings: set("trace_id", "job-7"), want: "job-7 sql:role  "},
		{name: "invalid trace id", settings: set("trace_id", "job 7"), want: "uuid sql:role  "},
		{name: "traceparent", settings: parent(parent1),
			want: traceID1 + " sql:role " + parent1 + " "},
		{name: "trace id and traceparent", settings: set("trace_id", "job-7") + parent(parent1),
			want: "job-7 sql:role " + parent1 + " "},
		{name: "traceparent and tracestate", settings: parent(parent1) + set("tracestate", "a=b, c=d"),
			want: traceID1 + " sql:role " + parent1 + " a=b, c=d"},
		{name: "later version of traceparent", settings: parent("cc" + parent1[2:] + "-x.y"),
			want: traceID1 + " sql:role cc" + parent1[2:] + "-x.y "},
		{name: "version ff", settings: parent("ff" + parent1[2:]), want: "uuid sql:role  "},
		{name: "version 00 with more", settings: parent(parent1 + "-x"), want: "uuid sql:role  "},
		{name: "zero trace id", settings: parent("00-" + strings.Repeat("0", 32) + parent1[35:]),
			want: "uuid sql:role  "},
		{name: "zero parent id", settings: parent(parent1[:36] + strings.Repeat("0", 16) + "-01"),
			want: "uuid sql:role  "},
		{name: "line feed", settings: parent(parent1 + "\n"), want: "uuid sql:role  "},
		{name: "long traceparent", settings: parent("cc" + parent1[2:] + "-" + strings.Repeat("x", 200)),
			want: "uuid sql:role  "},
		{name: "tracestate alone", settings: set("tracestate", "a=b"), want: "uuid sql:role  "},
		{name: "tracestate with a line feed", settings: parent(parent1) + set("tracestate", "a=b\nc"),
			want: traceID1 + " sql:role " + parent1 + " "},
		{name: "long tracestate", settings: parent(parent1) + set("tracestate", strings.Repeat("x", 2049)),
			want: traceID1 + " sql:role " + parent1 + " "},
		{name: "origin of another role", settings: set("origin", "t\nops\n\n"), want: "uuid sql:role  "},
		{name: "origins of another role", settings: set("ids", "{1}") + set("origins", "{\"t\nops\"}"),
			want: "uuid sql:role  "},
		{name: "trace ids of another role",
			settings: set("ids", "{1}") + set("trace_ids", "{\"t\nops\"}"), want: "uuid sql:role  "},
		{name: "origin of the owner", owner: true, settings: set("origin", "t\nops\n\n"),
			want: "t ops  "},
		{name: "trace ids of release 1.3.0", owner: true,
			settings: set("ids", "{1}") + set("trace_ids", "{t}"), want: "t sql:owner  "},
		{name: "origins without the user", owner: true,
			settings: set("ids", "{99}") + set("origins", "{\"t\nops\"}"), want: "uuid sql:owner  "},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			url := newDatabase(t)
			role := newRole(t)
			conn, writer := connect(t, url), connect(t, asRole(t, url, role))
			execute(t, conn, "GRANT ALL ON users TO "+role+"; SET test.role = '"+role+"'")
			if test.owner {
				writer = connect(t, url)
			}
			const insert = "INSERT INTO users (id, name, surname, password) VALUES (1, 'A', 'B', 'x')"
			for _, sql := range []string{insert, "UPDATE users SET name = 'C'", "DELETE FROM users",
				insert, "TRUNCATE users"} {
				execute(t, writer, "BEGIN; "+test.settings+sql+"; COMMIT")
				if got := queryValue[string](t, conn, originsText); got != test.want {
					t.Errorf("%s: origin %q, want %q", sql, got, test.want)
				}
			}
		})
	}
}

// TestActorIsTheSession checks that SET ROLE does not hide who writes, and that a name of a role
// cannot add parts to an origin.
func TestActorIsTheSession(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	role := newRole(t)
	super := connect(t, asSuperuser(t, url))
	owner := queryValue[string](t, super, "SELECT tableowner FROM pg_tables WHERE tablename = 'users'")
	execute(t, super, fmt.Sprintf("GRANT %s TO %s", owner, role))
	writer := connect(t, asRole(t, url, role))
	execute(t, writer, "SET ROLE "+owner)
	execute(t, writer, "INSERT INTO users (name, surname, password) VALUES ('A', 'B', 'x')")
	odd := role + "\nops"
	execute(t, super, "CREATE ROLE "+pgx.Identifier{odd}.Sanitize())
	t.Cleanup(func() {
		_ = admin(context.Background(), "DROP ROLE "+pgx.Identifier{odd}.Sanitize())
	})
	execute(t, super, "GRANT ALL ON users TO "+pgx.Identifier{odd}.Sanitize())
	execute(t, super, "SET SESSION AUTHORIZATION "+pgx.Identifier{odd}.Sanitize())
	execute(t, super, "UPDATE users SET name = 'C'; RESET SESSION AUTHORIZATION")
	execute(t, super, "REVOKE ALL ON users FROM "+pgx.Identifier{odd}.Sanitize())
	got := queryValue[string](t, super, "SELECT string_agg(actor, ';' ORDER BY id) FROM outbox")
	if want := "sql:" + role + ";sql:" + role + " ops"; got != want {
		t.Errorf("actors %q, want %q", got, want)
	}
}

// TestSiteExtendsUsers checks changes of a table that a site has extended: by columns with the names
// of the trigger's variables, and by a trigger that changes another user.
func TestSiteExtendsUsers(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	for _, name := range []string{"ids", "origins", "origin", "writer", "trace", "parent", "state", "part"} {
		execute(t, conn, "ALTER TABLE users ADD COLUMN "+name+" text")
	}
	execute(t, conn, `CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
			UPDATE users SET surname = NEW.name WHERE id = NEW.id + 1; RETURN NULL; END $$;
		CREATE TRIGGER touch AFTER UPDATE OF name ON users FOR EACH ROW EXECUTE FUNCTION touch()`)
	mustCreate(t, s, "Ann")
	mustCreate(t, s, "Bob")
	ctx := withTraceID(t.Context(), "trace-1")
	if _, err := s.updateUser(ctx, "ops", 1, input("Eve", "", ""), nil); err != nil {
		t.Fatal(err)
	}
	if err := s.deleteUser(ctx, "ops", 1, nil); err != nil {
		t.Fatal(err)
	}
	const want = "updated 1/2 trace-1 ops, updated 2/2 uuid sql:owner, deleted 1/3 trace-1 ops"
	got := queryValue[string](t, conn, `SELECT string_agg(concat_ws(' ', substr(event_type, 6),
			user_id || '/' || version, CASE WHEN length(trace_id) = 36 THEN 'uuid' ELSE trace_id END,
			replace(actor, session_user, 'owner')), ', ' ORDER BY event_type DESC, user_id)
		FROM outbox WHERE event_type <> 'user.created'`)
	if got != want {
		t.Errorf("events %s, want %s", got, want)
	}
	checkTotal(t, conn)
}

// TestStoreErrors checks the errors of updates and deletions, and that a failed one changes
// nothing.
func TestStoreErrors(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		mustCreate(t, s, "John")
		_, missing := s.updateUser(t.Context(), "test", 9, input("Jane", "", ""), []int64{})
		_, stale := s.updateUser(t.Context(), "test", 1, input("Jane", "", ""), []int64{2, 3})
		_, unchanged := s.updateUser(t.Context(), "test", 1, input("John", "", ""), []int64{})
		for name, test := range map[string]struct{ got, want error }{
			"update of a missing user":                 {missing, errNotFound},
			"update of another version":                {stale, errVersionMismatch},
			"update without change of another version": {unchanged, errVersionMismatch},
			"deletion of a missing user": {
				s.deleteUser(t.Context(), "test", 9, nil), errNotFound},
			"deletion of another version": {
				s.deleteUser(t.Context(), "test", 1, []int64{2}), errVersionMismatch},
			"deletion of no version": {
				s.deleteUser(t.Context(), "test", 1, []int64{}), errVersionMismatch},
		} {
			if !errors.Is(test.got, test.want) {
				t.Errorf("%s: error %v, want %v", name, test.got, test.want)
			}
		}
		if u, err := s.getUser(t.Context(), 1); err != nil || u.Version != 1 {
			t.Errorf("user after failed changes: %+v, %v, want version 1", u, err)
		}
		if n := len(allPending(t, s)); n != 1 {
			t.Errorf("%d events after 1 change, want 1", n)
		}
		if err := s.deleteUser(t.Context(), "test", 1, []int64{5, 1}); err != nil {
			t.Errorf("deletion of a listed version: %v", err)
		}
	})
}

// TestStoreUpdatesDifferences checks that an update makes a version and an event only if it changes
// something. A password always counts as a change, because its hash is new.
func TestStoreUpdatesDifferences(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		in      userInput
		changes bool
	}{
		"same name":             {input("John", "", ""), false},
		"same name and surname": {input("John", "Doe", ""), false},
		"other name":            {input("Jane", "", ""), true},
		"other surname":         {input("John", "Roe", ""), true},
		"name in upper case":    {input("JOHN", "", ""), true},
		"password":              {input("John", "Doe", "hash2"), true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachStoreAlone(t, func(t *testing.T, s store) {
				before := mustCreate(t, s, "John")
				u, err := s.updateUser(t.Context(), "test", 1, test.in, []int64{1})
				if err != nil {
					t.Fatal(err)
				}
				changed := u.Version == 2 && u.UpdatedAt.After(before.UpdatedAt.Time)
				same := u.Version == 1 && u.UpdatedAt.Equal(before.UpdatedAt.Time)
				if test.changes && !changed || !test.changes && !same {
					t.Errorf("the update made %+v of %+v, want a change: %t",
						u, before, test.changes)
				}
				if got := len(allPending(t, s)); (got == 2) != test.changes {
					t.Errorf("%d events, want 1, or 2 if the update changes something (%t)",
						got, test.changes)
				}
			})
		})
	}
}

// TestStoreRehashesOnce checks that a hash is only replaced if it is still stored, and that this
// changes nothing else.
func TestStoreRehashesOnce(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		u, err := s.createUser(t.Context(), "test", input("John", "Doe", "old"), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct{ old, hash, want string }{
			{"other", "wrong", "old"}, {"old", "new", "new"}, {"old", "late", "new"},
		} {
			if err := s.rehashPassword(t.Context(), u.ID, test.old, test.hash); err != nil {
				t.Fatal(err)
			}
			if got, err := s.passwordHash(t.Context(), u.ID); err != nil || got != test.want {
				t.Errorf("hash after replacing %s by %s: %s, %v, want %s",
					test.old, test.hash, got, err, test.want)
			}
		}
		if err := s.rehashPassword(t.Context(), 999, "old", "new"); err != nil {
			t.Errorf("rehashPassword of a missing user: %v", err)
		}
		if _, err := s.passwordHash(t.Context(), 999); !errors.Is(err, errNotFound) {
			t.Errorf("passwordHash of a missing user: error %v, want errNotFound", err)
		}
		if again, _ := s.getUser(t.Context(), u.ID); again != u {
			t.Errorf("user %+v after the rehash, want %+v", again, u)
		}
	})
}

// TestStoreListsInOrder checks the pages of a list with gaps between the ids.
func TestStoreListsInOrder(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		for i := range 12 {
			mustCreate(t, s, fmt.Sprint("user", i+1))
		}
		for _, id := range []int64{1, 5, 12} {
			if err := s.deleteUser(t.Context(), "test", id, nil); err != nil {
				t.Fatal(err)
			}
		}
		for name, test := range map[string]struct {
			after, offset, limit int64
			want                 []int64
		}{
			"first page":           {0, 0, 4, []int64{2, 3, 4, 6}},
			"offset":               {0, 3, 4, []int64{6, 7, 8, 9}},
			"rest":                 {0, 7, 100, []int64{10, 11}},
			"offset past the end":  {0, 9, 5, nil},
			"after a user":         {4, 0, 3, []int64{6, 7, 8}},
			"after a deleted user": {5, 0, 3, []int64{6, 7, 8}},
			"after the last":       {11, 0, 3, nil},
			"after the maximum id": {1<<63 - 1, 0, 3, nil},
		} {
			users, total, err := s.listUsers(t.Context(), "", "", test.after, test.offset, test.limit)
			if err != nil || total != 9 {
				t.Errorf("%s: total %d, %v, want 9", name, total, err)
			}
			var got []int64
			for _, u := range users {
				got = append(got, u.ID)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("%s: ids %v, want %v", name, got, test.want)
			}
		}
	})
}

// addUsers creates users with names and surnames. Without other users, they get the ids from 1.
func addUsers(t *testing.T, s store, names ...[2]string) {
	t.Helper()
	if s, ok := s.(*postgres); ok {
		next := pgx.CopyFromSlice(len(names), func(i int) ([]any, error) {
			return []any{names[i][0], names[i][1], "x"}, nil
		})
		columns := []string{"name", "surname", "password"}
		if _, err := s.pool.CopyFrom(t.Context(), pgx.Identifier{"users"}, columns, next); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, n := range names {
		if _, err := s.createUser(t.Context(), "test", input(n[0], n[1], "x"), ""); err != nil {
			t.Fatal(err)
		}
	}
}

// checkFound checks the ids and the total of a search. It returns whether they are as wanted.
func checkFound(t *testing.T, s store, prefix string, after, offset, limit int64, want []int64,
	total int64) bool {
	t.Helper()
	users, got, err := s.listUsers(t.Context(), "", prefix, after, offset, limit)
	ids := []int64{}
	for _, u := range users {
		ids = append(ids, u.ID)
	}
	if err != nil || got != total || !slices.Equal(ids, want) {
		t.Errorf("%T: %+q after %d, offset %d, limit %d: users %v of %d, %v, want %v of %d",
			s, prefix, after, offset, limit, ids, got, err, want, total)
		return false
	}
	return true
}

// searchLetters are characters of random names: letters with several forms of equal case, and those
// that could be confused with them or with the syntax of a pattern.
var searchLetters = []rune("aAbB%_\\' éÉeE\u0301σςΣµμΜİıiIkK\u212aſsSßẞǅǆжЖა\u10a0\u2d00ᲐꮿᏯ" +
	"😀𐐔𐐼\u00a0\uffff\U0010ffff")

// beginsWith reports whether text begins with prefix regardless of case. It compares the texts by
// strings.EqualFold, in which İ has no other case.
func beginsWith(text, prefix string) bool {
	dotted := strings.NewReplacer("İ", "i")
	start := []rune(text)
	start = start[:min(len(start), utf8.RuneCountInString(prefix))]
	return strings.EqualFold(dotted.Replace(string(start)), dotted.Replace(prefix))
}

// TestStoresFindTheSame compares both stores with beginsWith: random users, prefixes and positions.
func TestStoresFindTheSame(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	text := func(longest int) string {
		runes := make([]rune, random.IntN(longest)+1)
		for i := range runes {
			runes[i] = searchLetters[random.IntN(len(searchLetters))]
		}
		return string(runes)
	}
	names := make([][2]string, 400)
	for i := range names {
		names[i] = [2]string{text(4), text(4)}
	}
	stores := []store{newMemory(), openTestPostgres(t, newDatabase(t))}
	for _, s := range stores {
		addUsers(t, s, names...)
	}
	for i := 0; i < len(names); i += 7 { // every other one of these is deleted, or renamed
		names[i] = [2]string{text(4), text(4)}
		in := input(names[i][0], names[i][1], "")
		for _, s := range stores {
			_, err := s.updateUser(t.Context(), "test", int64(i+1), in, nil)
			if err == nil && i%2 == 0 {
				err = s.deleteUser(t.Context(), "test", int64(i+1), nil)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if i%2 == 0 {
			names[i] = [2]string{}
		}
	}
	for range 1000 {
		prefix, after, offset := text(2), random.Int64N(450)-20, random.Int64N(8)
		limit := random.Int64N(12) + 1
		matches, want := int64(0), []int64{}
		for i, n := range names {
			if !beginsWith(n[0], prefix) && !beginsWith(n[1], prefix) {
				continue
			}
			matches++
			if id := int64(i + 1); id > after {
				want = append(want, id)
			}
		}
		want = want[min(offset, int64(len(want))):]
		want = want[:min(limit, int64(len(want)))]
		for _, s := range stores {
			if !checkFound(t, s, prefix, max(after, 0), offset, limit, want, matches) {
				t.Fatalf("the seed is %d", seed)
			}
		}
	}
}

// TestFoldInDatabase compares user_service_fold with foldCase, for each code point and for random
// texts, in databases with different locales. With SQL_ASCII only A to Z have a lower case.
func TestFoldInDatabase(t *testing.T) {
	t.Parallel()
	asciiOnly := func(text string) string {
		return strings.Map(func(r rune) rune {
			if r >= 'A' && r <= 'Z' {
				r += 'a' - 'A'
			}
			return r
		}, text)
	}
	server := queryValue[int](t, connect(t, newDatabase(t)),
		"SELECT current_setting('server_version_num')::int")
	const lastLetter = 0x1ffff // all code points that have a case are below
	for _, test := range []struct {
		name, options string
		highest       rune
		fold          func(string) string
		since         int // the minimum server_version_num
	}{
		{name: "C.UTF-8", options: "LC_COLLATE 'C.UTF-8' LC_CTYPE 'C.UTF-8' ENCODING UTF8",
			highest: unicode.MaxRune, fold: foldCase},
		{name: "C", options: "LC_COLLATE 'C' LC_CTYPE 'C' ENCODING UTF8", highest: lastLetter,
			fold: foldCase},
		{name: "Turkish", highest: lastLetter, fold: foldCase, since: 150000,
			options: "LOCALE_PROVIDER icu ICU_LOCALE 'tr' LC_COLLATE 'C' LC_CTYPE 'C' ENCODING UTF8"},
		{name: "SQL_ASCII", options: "LC_COLLATE 'C' LC_CTYPE 'C' ENCODING SQL_ASCII",
			highest: lastLetter, fold: asciiOnly},
	} {
		if test.since > server {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			url := emptyDatabase(t, "TEMPLATE template0 "+test.options)
			openTestPostgres(t, url).close()
			conn := connect(t, url)
			rows, _ := conn.Query(t.Context(),
				"SELECT text, user_service_fold(text) FROM unnest($1::text[]) AS text",
				textsToFold(test.highest))
			var text, got string
			n := 0
			_, err := pgx.ForEachRow(rows, []any{&text, &got}, func() error {
				if want := test.fold(text); got != want && n < 20 {
					n++
					t.Errorf("%+q becomes %+q, want %+q", text, got, want)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// textsToFold returns each code point up to highest, and random texts of characters of one, two or
// all kinds that user_service_fold distinguishes.
func textsToFold(highest rune) (texts []string) {
	for r := rune(1); r <= highest; r++ {
		if !utf16.IsSurrogate(r) {
			texts = append(texts, string(r))
		}
	}
	kinds := []rune{1, 0x80, 0x250, 0x530, 0x10000, 0x1f000} // the first code point of each
	for i := range 20_000 {
		first := i % (len(kinds) - 1)
		low, high := kinds[first], kinds[first+1+rand.IntN(len(kinds)-1-first)]
		if i%2 == 0 {
			low = 1
		}
		var b strings.Builder
		for range rand.IntN(12) {
			if r := low + rand.Int32N(high-low); !utf16.IsSurrogate(r) {
				b.WriteRune(r)
			}
		}
		texts = append(texts, b.String())
	}
	return texts
}

// TestSearchInSQLASCII checks that a database without an encoding finds names by their bytes, and
// regardless of the case of A to Z.
func TestSearchInSQLASCII(t *testing.T) {
	t.Parallel()
	s := openTestPostgres(t, emptyDatabase(t,
		"TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C' ENCODING SQL_ASCII"))
	addUsers(t, s, [2]string{"Éva", "Lee"}, [2]string{"éva", "LEE"}, [2]string{"𐐔x", "😀"},
		[2]string{"z" + strings.Repeat("\U0010ffff", 254), "Jo"})
	for _, test := range []struct {
		prefix string
		want   []int64
	}{
		{"É", []int64{1}}, {"éV", []int64{2}}, {"lE", []int64{1, 2}}, {"𐐔", []int64{3}},
		{"𐐼", []int64{}}, {"😀", []int64{3}}, {"Z", []int64{4}}, {"z\U0010ffff", []int64{4}},
	} {
		checkFound(t, s, test.prefix, 0, 0, 10, test.want, int64(len(test.want)))
	}
}

// userGroups are groups of users with one name and one surname each. The number of users with a
// name or surname is near the one up to which matches are counted.
var userGroups = []struct {
	name, surname string
	n             int64
}{
	{"j", "-", 9_000}, // more are behind the other groups
	{"a", "-", 10_000}, {"b", "-", 10_001}, {"-", "c", 10_000}, {"-", "d", 10_001},
	{"e", "-", 5_000}, {"-", "E", 5_000}, {"F", "-", 6_000}, {"-", "f", 6_000},
	{"g", "G", 10_000}, {"h", "h", 10_001}, {"i", "-", 5_001}, {"-", "i", 5_000},
	{"-", "j", 3_000}, {"k", "-", 3},
}

// groupedIDs returns the ids of the users in userGroups whose name or surname begins with prefix.
func groupedIDs(prefix string) (ids []int64) {
	first := int64(1)
	for _, g := range userGroups {
		for id := first; id < first+g.n; id++ {
			if strings.EqualFold(g.name, prefix) || strings.EqualFold(g.surname, prefix) {
				ids = append(ids, id)
			}
		}
		first += g.n
	}
	return ids
}

// TestSearchManyUsers checks totals up to and above the number that is counted, and pages that are
// near to and far from each other in the order of ids.
func TestSearchManyUsers(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		for _, g := range userGroups {
			addUsers(t, s, slices.Repeat([][2]string{{g.name, g.surname}}, int(g.n))...)
		}
		for _, prefix := range strings.Split("abcdefghijk", "") {
			ids := groupedIDs(prefix)
			total := min(int64(len(ids)), 10_001)
			first, last := ids[0], ids[len(ids)-1]
			for _, position := range []struct{ after, offset int64 }{
				{0, 0}, {0, 7}, {0, 4_995}, {0, 9_995}, {0, 11_990}, {0, 99_990},
				{first - 1, 0}, {first, 100}, {first + 4_000, 0}, {first + 8_994, 0},
				{first + 10, 5_000}, {last - 4_990, 0}, {last - 3, 0}, {last - 3, 2}, {last, 0},
				{1<<63 - 1, 0},
			} {
				behind, _ := slices.BinarySearch(ids, position.after)
				if behind < len(ids) && ids[behind] == position.after {
					behind++
				}
				want := ids[min(behind+int(position.offset), len(ids)):]
				checkFound(t, s, prefix, position.after, position.offset, 11,
					want[:min(11, len(want))], total)
			}
		}
		checkCappedPages(t, s)
	})
}

// checkCappedPages checks the pages and the links of searches in userGroups. A capped total has no
// last page.
func checkCappedPages(t *testing.T, users store) {
	t.Helper()
	type targets = map[string]string
	d := testDependencies(memorySettings(), users, discardLog)
	server := httptest.NewServer(newServer(d, &traffic{}, newAccess(d.settings, nil),
		protectedRoutes(newAPI(d, &traffic{}), &health{})))
	defer server.Close()
	s := &service{t: t, url: server.URL}
	j, a := groupedIDs("j"), groupedIDs("a")
	const capped = `,"total":10000,"total_capped":true,`
	for _, p := range []page{
		{"?q=J&per_page=2", j[:2], capped + `"page":1,"per_page":2,"next_after":2}`,
			targets{"first": "/users?page=1&per_page=2&q=J",
				"next": "/users?after=2&per_page=2&q=J"}},
		{"?q=j&per_page=2&page=3", j[4:6], capped + `"page":3,"per_page":2,"next_after":6}`,
			targets{"first": "/users?page=1&per_page=2&q=j",
				"prev": "/users?page=2&per_page=2&q=j", "next": "/users?after=6&per_page=2&q=j"}},
		{"?q=j&per_page=100&page=120", j[11_900:],
			capped + `"page":120,"per_page":100,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=100&q=j",
				"prev": "/users?page=119&per_page=100&q=j"}},
		{"?q=j&per_page=100&page=121", nil,
			capped + `"page":121,"per_page":100,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=100&q=j",
				"prev": "/users?page=120&per_page=100&q=j"}},
		{"?q=j&per_page=2&after=8999", j[8_999:9_001],
			fmt.Sprintf(`%s"per_page":2,"next_after":%d}`, capped, j[9_000]),
			targets{"next": fmt.Sprintf("/users?after=%d&per_page=2&q=j", j[9_000])}},
		{"?q=a&per_page=100&page=100", a[9_900:],
			`,"total":10000,"page":100,"per_page":100,"next_after":null}`,
			targets{"first": "/users?page=1&per_page=100&q=a",
				"prev": "/users?page=99&per_page=100&q=a",
				"last": "/users?page=100&per_page=100&q=a"}},
	} {
		p.check(t, s)
	}
}

// explainedPostgres opens a store whose connections send the plan of each statement, also of those
// inside functions, to plan.
func explainedPostgres(t *testing.T, url string, plan func(string)) *postgres {
	t.Helper()
	admin := connect(t, asSuperuser(t, url))
	if _, err := admin.Exec(t.Context(), "LOAD 'auto_explain'"); err != nil {
		missing(t, "auto_explain of PostgreSQL", err)
	}
	for _, setting := range []string{"session_preload_libraries = 'auto_explain'",
		"auto_explain.log_min_duration = 0", "auto_explain.log_nested_statements = on",
		"auto_explain.log_level = warning"} {
		execute(t, admin, "ALTER DATABASE "+admin.Config().Database+" SET "+setting)
	}
	config := openTestPostgres(t, url).pool.Config()
	config.ConnConfig.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { plan(n.Message) }
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return newPostgres(pool, false, discardLog)
}

// TestSearchPlans checks which indexes the statements of a search use, with many users.
func TestSearchPlans(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	super := connect(t, asSuperuser(t, url))
	execute(t, super, `SET session_replication_role = replica;
		INSERT INTO users (name, surname, password)
		SELECT CASE WHEN i % 2 = 0 THEN 'Common' WHEN i % 5000 = 1 THEN 'Rare' ELSE 'Other' END || i,
			CASE WHEN i % 4 = 3 THEN 'Smith' ELSE 'Doe' END || i, repeat('x', 100)
		FROM generate_series(1, 200000) AS i`)
	execute(t, super, "VACUUM ANALYZE users")
	var mu sync.Mutex
	var plans []string
	s := explainedPostgres(t, url, func(plan string) {
		mu.Lock()
		defer mu.Unlock()
		plans = append(plans, plan)
	})
	const byName, bySurname, byID = "Index Only Scan using user_service_name on users",
		"Index Only Scan using user_service_surname on users", "Index Scan using users_pkey on users"
	for _, test := range []struct {
		prefix string
		after  int64
		scans  []string // of each statement in the function, and of the page
	}{
		{"rare", 0, []string{byName, bySurname, byID}},
		{"nobody", 0, []string{byName, bySurname, byID}},
		{"oth", 0, []string{byName, bySurname, byID, byID}},
		{"smith", 100_000, []string{byName, bySurname, byID, byID}},
		{"common", 199_000, []string{byName, bySurname, byID, byName + bySurname, byID}},
	} {
		if _, _, err := s.listUsers(t.Context(), "", test.prefix, test.after, 600, 10); err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		var scans []string
		for _, plan := range plans {
			if found := scanPattern.FindAllString(plan, -1); found != nil {
				scans = append(scans, strings.Join(found, ""))
			}
			if strings.Contains(plan, "Index Only") && strings.Contains(plan, "Filter:") {
				t.Errorf("%s: want both bounds of the prefix in Index Cond: %s", test.prefix, plan)
			}
		}
		if !slices.Equal(scans, test.scans) {
			t.Errorf("%s after %d: scans %q, want %q: %s", test.prefix, test.after, scans, test.scans,
				strings.Join(plans, "\n"))
		}
		plans = nil
		mu.Unlock()
	}
}

// scanPattern matches the scans of users in a plan.
var scanPattern = regexp.MustCompile(`[A-Z][A-Za-z ]* Scan[a-z_ ]* on users`)

// TestStoreKeepsOrder changes a few users concurrently, and checks that the outbox has the events
// of each user in the order of versions and times, without a gap.
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
					if _, err := s.updateUser(context.Background(), "test", id, in, nil); err != nil {
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
				t.Errorf("user %d: event of version %d after version %d",
					e.Data.UserID, e.Data.Version, versions[e.Data.UserID])
			}
			if !e.OccurredAt.After(times[e.Data.UserID]) {
				t.Errorf("user %d: the time of version %d is not later than that before",
					e.Data.UserID, e.Data.Version)
			}
			versions[e.Data.UserID] = e.Data.Version
			times[e.Data.UserID] = e.OccurredAt.Time
		}
		sum := int64(0)
		for id, version := range versions {
			sum += version
			if u, err := s.getUser(t.Context(), id); err != nil || u.Version != version {
				t.Errorf("user %d: version %d, %v, want %d as in the last event",
					id, u.Version, err, version)
			}
		}
		if sum != users+clients*rounds {
			t.Errorf("%d events, want %d", sum, users+clients*rounds)
		}
	})
}

// TestStoreMatchesOnce checks that exactly one of several concurrent updates of one version
// succeeds.
func TestStoreMatchesOnce(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		mustCreate(t, s, "John")
		for version := int64(1); version <= 10; version++ {
			errs := make(chan error, 8)
			for c := range cap(errs) {
				go func() {
					in := input(fmt.Sprint("name", version, c), "", "")
					_, err := s.updateUser(context.Background(), "test", 1, in, []int64{version})
					errs <- err
				}()
			}
			succeeded := 0
			for range cap(errs) {
				if err := <-errs; err == nil {
					succeeded++
				} else if !errors.Is(err, errVersionMismatch) {
					t.Error(err)
				}
			}
			if succeeded != 1 {
				t.Errorf("%d updates of version %d succeeded, want 1", succeeded, version)
			}
		}
	})
}

// TestStoreCountsUsers checks the total after concurrent creations and deletions.
func TestStoreCountsUsers(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		var group sync.WaitGroup
		for range 16 {
			group.Go(func() {
				for range 10 {
					u, err := s.createUser(context.Background(), "test", input("John", "Doe", "hash"), "")
					if err == nil && u.ID%3 == 0 {
						err = s.deleteUser(context.Background(), "test", u.ID, nil)
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
		users, total, err := s.listUsers(t.Context(), "", "", 0, 0, 1000)
		if err != nil || total != int64(len(users)) || total != 160-160/3 {
			t.Errorf("total %d, %d users, %v, want %d", total, len(users), err, 160-160/3)
		}
	})
}

// TestPostgresCountsAllWriters checks the total after changes of the table by other writers.
func TestPostgresCountsAllWriters(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	for _, step := range []struct {
		sql  string
		want int64
	}{
		{`INSERT INTO users (name, surname, password)
			SELECT 'a', 'b', 'c' FROM generate_series(1, 1000)`, 1000},
		{"DELETE FROM users WHERE id % 2 = 0", 500},
		{"DELETE FROM users WHERE id = -1", 500},
		{"UPDATE users SET name = 'd'", 500},
		{"TRUNCATE users", 0},
	} {
		execute(t, conn, step.sql)
		_, total, err := s.listUsers(t.Context(), "", "", 0, 0, 1)
		if err != nil || total != step.want {
			t.Errorf("total after %q: %d, %v, want %d", step.sql, total, err, step.want)
		}
	}
}

// TestCreateSkipsUsedIDs checks that creations succeed while the sequence is behind ids in use.
func TestCreateSkipsUsedIDs(t *testing.T) {
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
				t.Errorf("POST /users: status %d, want 201 with an id above 40: %s",
					a.status, a.body)
			}
			execute(t, conn, "SELECT setval(pg_get_serial_sequence('users', 'id'), 1, false)")
			if id := svc.createUser("Jane", "Doe"); id <= 41 {
				t.Errorf("id %d after the sequence was set back, want more than 41", id)
			}
			checkTotal(t, conn)
		})
	}
}

// TestCreateDuringImport checks that a creation does not wait for an open transaction that has
// inserted the next ids.
func TestCreateDuringImport(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s := openTestPostgres(t, url)
	last := mustCreate(t, s, "John").ID
	tx, err := connect(t, url).Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), `INSERT INTO users (id, name, surname, password)
			SELECT id, 'copied', 'Doe', 'x'
			FROM generate_series($1::bigint + 1, $1 + 100) AS id`, last)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	if u := mustCreate(t, s, "Jane"); u.ID <= last+100 {
		t.Errorf("id %d, want more than %d", u.ID, last+100)
	}
}

// TestCreatePreventedByTrigger checks that a creation that a trigger of the site skips is answered
// with 409, and that its idempotency key can be used again.
func TestCreatePreventedByTrigger(t *testing.T) {
	t.Parallel()
	set := postgresSettings(t)
	svc, conn := startService(t, set), connect(t, set.databaseURL)
	execute(t, conn, `
		CREATE FUNCTION prevent() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
		CREATE TRIGGER prevent BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION prevent()`)
	for _, header := range []string{"", "Idempotency-Key: key-1"} {
		if a := svc.do("POST", "/users", john, header); a.status != 409 {
			t.Errorf("POST with %q: status %d, want 409: %s", header, a.status, a.body)
		}
	}
	execute(t, conn, "DROP TRIGGER prevent ON users")
	a := svc.do("POST", "/users", john, "Idempotency-Key: key-1")
	if a.status != 201 || svc.do("GET", a.header.Get("Location"), "").status != 200 {
		t.Errorf("POST with the key again: status %d, want 201: %s", a.status, a.body)
	}
}

// TestCreateRefusedByIndex checks that a creation that a unique index of the site refuses is
// answered with 409, and that others succeed.
func TestCreateRefusedByIndex(t *testing.T) {
	t.Parallel()
	svc := startService(t, postgresSettings(t))
	conn := connect(t, svc.settings.databaseURL)
	execute(t, conn, "CREATE UNIQUE INDEX site ON users (name, surname)")
	svc.createUser("John", "Doe")
	for _, headers := range [][]string{nil, {"Idempotency-Key: key"}} {
		if a := svc.do("POST", "/users", john, headers...); a.status != 409 {
			t.Errorf("POST with %v: status %d, want 409: %s", headers, a.status, a.body)
		}
	}
	if id := svc.createUser("Jane", "Doe"); id < 2 {
		t.Errorf("id %d of the next user, want 2 or more", id)
	}
	checkTotal(t, conn)
}

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
		return &userChange{id: id, name: name, match: match, origin: fmt.Sprint("trace-", id)}
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
// The first change takes long, so that the others share a batch.
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
	for range 6 {
		ids = append(ids, mustCreate(t, s, "John").ID)
	}
	var callers sync.WaitGroup
	for i, id := range ids {
		name := "Jane"
		if i == 0 {
			name = "slow"
		} else if i == len(ids)-1 {
			name = "refused"
		}
		callers.Go(func() {
			u, err := s.updateUser(t.Context(), "test", id, userInput{name: &name}, nil)
			if name == "refused" {
				if err == nil || errors.Is(err, errUnavailable) ||
					errors.Is(err, errOutcomeUnknown) {
					t.Errorf("refused change: %+v, %v, want a permanent error", u, err)
				}
			} else if err != nil || u.Name != name || u.Version != 2 {
				t.Errorf("change to %s: %+v, %v, want version 2", name, u, err)
			}
		})
		if i == 0 {
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
		name:    "trigger with an SQLSTATE of its own",
		sql:     siteTrigger("RAISE 'refused' USING ERRCODE = 'AB123';"),
		refused: `{"name": "refused"}`, status: 409,
	},
	{
		name:    "trigger that lacks a right",
		sql:     siteTrigger("RAISE insufficient_privilege;"),
		refused: `{"name": "refused"}`, status: 409,
	},
	{
		name:    "trigger with an assertion",
		sql:     siteTrigger("ASSERT false, 'refused';"),
		refused: `{"name": "refused"}`, status: 409,
	},
	{
		name: "row security",
		sql: `ALTER TABLE users ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
			CREATE POLICY site ON users USING (true) WITH CHECK (name <> 'refused')`,
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
			for i := range 40 {
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
			if version != 1 || versions != "3" {
				t.Errorf("versions: %d of the refused user, want 1, and %s of the others, want 3",
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
		_, err := s.updateUser(context.Background(), "test", 1, input("Jane", "", ""), nil)
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
		u, err := s.updateUser(t.Context(), "test", id, input(fmt.Sprint("name ", i), "", ""), nil)
		if err != nil || u.Version != int64(i+2) {
			t.Errorf("updateUser after %s: %+v, %v, want version %d", alter, u, err, i+2)
		}
	}
}

// TestMemoryListsManyUsers checks the last page of 100,000 users in memory.
func TestMemoryListsManyUsers(t *testing.T) {
	t.Parallel()
	s := newMemory()
	for range 100_000 {
		mustCreate(t, s, "John")
	}
	users, total, err := s.listUsers(t.Context(), "", "", 99_990, 0, 100)
	if err != nil || total != 100_000 || len(users) != 10 || users[0].ID != 99_991 {
		t.Errorf("total %d, %d users, %v, want 100000, 10 users from 99991 on",
			total, len(users), err)
	}
}

// TestPoolConfigLimits checks the timeout of connecting, which no URL can disable, and the number
// of connections.
func TestPoolConfigLimits(t *testing.T) {
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
			t.Errorf("%s: timeout %v, %v, want %v",
				url, config.ConnConfig.ConnectTimeout, err, want)
		}
	}
	for query, want := range map[string]int32{"": defaultPoolSize, "?pool_max_conns=7": 7,
		"?pool_max_conns=1": minPoolSize, "?pool_max_conns=99": maxPoolSize} {
		config, err := poolConfig("postgres://u@h/d"+query, "test")
		if err != nil || config.MaxConns != want {
			t.Errorf("%q: %d connections, %v, want %d", query, config.MaxConns, err, want)
		}
	}
}

// TestPoolConfigParameters checks that the startup parameters are those that PgBouncer accepts, and
// that the URL cannot change them.
func TestPoolConfigParameters(t *testing.T) {
	t.Parallel()
	config, err := poolConfig("postgres://u@h/d?client_encoding=LATIN1&DateStyle=German", "test")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"application_name": "test", "client_encoding": "UTF8",
		"datestyle": "ISO", "timezone": "UTC", "standard_conforming_strings": "on"}
	if got := config.ConnConfig.RuntimeParams; !maps.Equal(got, want) {
		t.Errorf("startup parameters %v, want %v", got, want)
	}
}

// TestPoolConfigFindsPrimary checks that connections are validated if there are several hosts, of
// which one takes writes.
func TestPoolConfigFindsPrimary(t *testing.T) {
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
			t.Errorf("%s: validates %t, %v, want %t",
				url, config.ConnConfig.ValidateConnect != nil, err, want)
		}
	}
}

// TestPoolConfigTLS checks in which order connections are tried with and without TLS. On loopback,
// plain connections come first.
func TestPoolConfigTLS(t *testing.T) {
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
		attempts := []*tls.Config{config.ConnConfig.TLSConfig}
		for _, f := range config.ConnConfig.Fallbacks {
			attempts = append(attempts, f.TLSConfig)
		}
		got := make([]string, len(attempts))
		for i, config := range attempts {
			got[i] = map[bool]string{true: "plain", false: "TLS"}[config == nil]
		}
		if strings.Join(got, ", ") != want {
			t.Errorf("%s: tries %s, want %s", url, strings.Join(got, ", "), want)
		}
	}
}

// TestPostgresReady checks the state of the store while the database is read-only, closed and open.
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
		{[]string{"ALTER DATABASE " + name + " SET default_transaction_read_only = on"},
			"read-only"},
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
		eventually(t, "the state "+string(step.want), func() bool {
			got, _ := s.check(t.Context())
			return got == step.want
		})
		if step.want != "read-only" {
			continue
		}
		_, err := s.createUser(t.Context(), "test", input("John", "Doe", "hash"), "")
		if !errors.Is(err, errUnavailable) {
			t.Errorf("createUser on a read-only database: error %v, want errUnavailable", err)
		}
	}
}

// TestUpdateOfLockedTable checks that an update that waits too long for a lock fails and changes
// nothing.
func TestUpdateOfLockedTable(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	mustCreate(t, s, "John")
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE users"); err != nil {
		t.Fatal(err)
	}
	_, err := s.updateUser(t.Context(), "test", 1, input("Jane", "", ""), nil)
	if !errors.Is(err, errUnavailable) {
		t.Errorf("updateUser: error %v, want errUnavailable", err)
	}
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	if u, err := s.getUser(t.Context(), 1); err != nil || u.Version != 1 {
		t.Errorf("user after the lock: %+v, %v, want version 1", u, err)
	}
}

// TestListsLeaveConnections checks that a statement about another table gets a connection while
// more lists than there are connections wait for a locked table.
func TestListsLeaveConnections(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s := openTestPostgres(t, url)
	_, unlock := lockUsers(&service{t: t, settings: settings{databaseURL: url}})
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan error)
	lists := int(s.pool.Config().MaxConns) - reservedConns - 1
	for range 2 * maxPoolSize {
		go func() {
			_, _, err := s.listUsers(ctx, "", "", 0, 0, 1)
			left <- err
		}()
	}
	watcher := connect(t, url)
	eventually(t, "lists that wait for the lock", func() bool {
		return queryValue[int](t, watcher, `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'`) == lists
	})
	if _, _, err := s.creationUnder(t.Context(), "key"); !errors.Is(err, errNotFound) {
		t.Errorf("creationUnder while lists wait: error %v, want errNotFound", err)
	}
	leave() // lists without a connection fail immediately
	for range 2*maxPoolSize - lists {
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("list without a connection: error %v, want %v", err, context.Canceled)
		}
	}
	unlock()
	for range lists {
		if err := <-left; err != nil {
			t.Errorf("list that had begun: error %v, want none", err)
		}
	}
}

// TestSlowBatch checks that a change whose batch does not end in time is answered with errOutcomeUnknown,
// whether the change runs the batch or has joined it.
func TestSlowBatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &postgres{changing: newQueues[int64](1, math.MaxInt), wake: make(chan struct{}, 1)}
		by := changer{group: &Group[*userChange, User]{
			budget: 2 * statementBudget,
			run: func(ctx context.Context, _ []*userChange) (map[*userChange]User, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			},
		}}
		var group sync.WaitGroup
		for id := range int64(3) {
			group.Go(func() {
				if _, err := s.change(t.Context(), by, &userChange{id: id}); !errors.Is(err, errOutcomeUnknown) {
					t.Errorf("change %d: error %v, want %v", id, err, errOutcomeUnknown)
				}
			})
			synctest.Wait()
		}
		group.Wait()
		time.Sleep(2 * statementBudget) // until every batch has ended, as a bubble requires
	})
}

// TestListsAreFair checks that a client with many lists does not delay a list of another client by more
// than those that run.
func TestListsAreFair(t *testing.T) {
	t.Parallel()
	s := openTestPostgres(t, newDatabase(t))
	lists := int(s.pool.Config().MaxConns) - reservedConns - 1
	for range lists {
		if err := s.list.lane.enter(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	const greedy = 40
	done := make(chan string)
	list := func(client string) {
		go func() {
			_, _, err := s.listUsers(t.Context(), client, "", 0, 0, 1)
			if err != nil {
				t.Errorf("list of %s: %v", client, err)
			}
			done <- client
		}()
	}
	waiting := func(client string, want int) {
		t.Helper()
		eventually(t, "lists that wait", func() bool {
			s.listing.mu.Lock()
			defer s.listing.mu.Unlock()
			return s.listing.keys[client] != nil && s.listing.keys[client].calls == want
		})
	}
	for range greedy {
		list("greedy")
	}
	waiting("greedy", greedy)
	list("modest")
	waiting("modest", 1)
	time.Sleep(10 * time.Millisecond) // until they wait for a connection
	for range lists {
		s.list.lane.leave()
	}
	for before := range greedy + 1 {
		if client := <-done; client == "modest" && before > 3*lists {
			t.Errorf("the list of the other client came after %d, want %d at most", before, 3*lists)
		}
	}
}

// TestReadAfterLostConnections checks that a read succeeds after the server has closed every
// connection of the store.
func TestReadAfterLostConnections(t *testing.T) {
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
			t.Errorf("getUser after the connections were closed: %v", err)
		}
	}
}

// TestCancellationKeepsConnections cancels callers while their statements run, and checks that
// their connections are not replaced.
func TestCancellationKeepsConnections(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	mustCreate(t, s, "John")
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE users"); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 200 {
		timeout := time.Duration(rand.IntN(50)) * time.Millisecond
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		group.Go(func() { s.getUser(ctx, 1) })
	}
	time.Sleep(100 * time.Millisecond)
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	group.Wait()
	if opened := s.pool.Stat().NewConnsCount(); opened > defaultPoolSize {
		t.Errorf("%d connections were opened, want %d or fewer", opened, defaultPoolSize)
	}
}

// TestActivityHidesPasswords checks that the statements that pg_stat_activity shows contain neither
// passwords nor hashes.
func TestActivityHidesPasswords(t *testing.T) {
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
		path := fmt.Sprintf("/users/%d/password/verify", id)
		s.do("POST", path, fmt.Sprintf(`{"password": %q}`, secret))
	})
	const waiting = `SELECT coalesce(string_agg(query, E'\n'), '') FROM pg_stat_activity
		WHERE datname = current_database() AND wait_event_type = 'Lock'`
	watcher := connect(t, set.databaseURL)
	var queries string
	eventually(t, "three statements that wait", func() bool {
		queries = queryValue[string](t, watcher, waiting)
		return strings.Contains(queries, "INSERT INTO users") &&
			strings.Contains(queries, "UPDATE users") &&
			strings.Contains(queries, "SELECT password")
	})
	if strings.Contains(queries, secret) || strings.Contains(queries, "argon2id") {
		t.Errorf("pg_stat_activity shows a password:\n%s", queries)
	}
	unlock()
	requests.Wait()
}

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

// TestOneLeader checks that exactly one replica leads until it resigns or its lease expires, also
// after a restore has added rows to the lease or removed them.
func TestOneLeader(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	first, second := openTestPostgres(t, url), openTestPostgres(t, url)
	conn := connect(t, url)
	leads := func(s *postgres) bool {
		_, leads, err := s.next(t.Context(), nil, nil, 0, true)
		if err != nil {
			t.Fatal(err)
		}
		return leads
	}
	if !leads(first) || leads(second) || !leads(first) {
		t.Error("want the first replica, which asked first, as the only leader")
	}
	if err := first.resign(t.Context()); err != nil || !leads(second) || leads(first) {
		t.Errorf("resign: %v, want the second replica as the only leader", err)
	}
	for _, disturbance := range []string{
		"DELETE FROM relay_lease",
		"TRUNCATE relay_lease",
		"INSERT INTO relay_lease VALUES ('restored', now() - interval '1 day')",
		`INSERT INTO relay_lease
			SELECT 'restored', now() - interval '1 day' FROM generate_series(1, 3)`,
		"UPDATE relay_lease SET until = '-infinity'",
		"UPDATE relay_lease SET holder = 'ahead', until = now() + interval '1 hour'",
	} {
		execute(t, conn, disturbance)
		eventually(t, "a leader after "+disturbance, func() bool {
			return leads(first) || leads(second)
		})
		for range 10 {
			if leads(first) == leads(second) {
				t.Errorf("both or none of the replicas lead after %s, want one", disturbance)
			}
		}
	}
	execute(t, conn, `UPDATE relay_lease
		SET holder = 'frozen', until = clock_timestamp() + interval '2 s'`)
	if leads(first) || leads(second) {
		t.Error("a replica leads although another one holds the lease")
	}
	eventually(t, "a leader after the lease has ended", func() bool { return leads(first) })
}

// TestLeadNeedsWrites checks that no replica leads on a read-only database.
func TestLeadNeedsWrites(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	execute(t, conn, "ALTER DATABASE "+conn.Config().Database+
		" SET default_transaction_read_only = on")
	s.pool.Reset()
	_, leads, err := s.next(t.Context(), nil, nil, 0, true)
	if leads || !errors.Is(err, errUnavailable) {
		t.Errorf("next: %t, %v, want false, errUnavailable", leads, err)
	}
}

// TestFoldKeepsTotal checks that the total equals the number of users in every snapshot, while many
// clients create and delete users, two stores fold, and a transaction that created a user is open.
func TestFoldKeepsTotal(t *testing.T) {
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
				u, err := s.createUser(context.Background(), "test", input("John", "Doe", "hash"), "")
				if err == nil && c%3 == 0 {
					err = s.deleteUser(context.Background(), "test", u.ID, nil)
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
	if _, total, err := first.listUsers(t.Context(), "", "", 0, 0, 1); err != nil || total != n {
		t.Errorf("total %d of the list, %v, want %d", total, err, n)
	}
}

// compareTotals compares the total with the number of users in one snapshot, again and again until
// done is closed, and at least ten times.
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

// TestFold checks that fold replaces many rows by one with their sum, and leaves a few rows as they
// are unless they occupy many pages.
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
		{"many rows with the sum 0", "SELECT (-1) ^ i FROM generate_series(1, 1000) AS i", "1 0"},
		{"many rows of 0", "SELECT 0 FROM generate_series(1, 100)", "1 0"},
		{"rows in many pages", "SELECT 1 FROM generate_series(1, 40000)", "1 40000"},
		{"one row in many pages", "VALUES (7)", "1 7"},
	} {
		execute(t, conn, "DELETE FROM user_counts")
		execute(t, conn, "INSERT INTO user_counts "+test.rows)
		eventually(t, "a successful fold", func() bool { return s.fold(t.Context()) == nil })
		got := queryValue[string](t, conn, "SELECT count(*) || ' ' || sum(n) FROM user_counts")
		if got != test.want {
			t.Errorf("%s: rows and sum %s, want %s", test.name, got, test.want)
		}
	}
}

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
	{name: "an index dropped", users: 3, sql: "DROP INDEX user_service_name",
		line: "created the index user_service_name"},
	{name: "an index invalid", users: 3, superuser: true,
		sql: `UPDATE pg_index SET indisvalid = false
			WHERE indexrelid = 'user_service_surname'::regclass`,
		line: "created the index user_service_surname"},
	{name: "the function of searches dropped", users: 3, sql: "DROP FUNCTION user_service_fold CASCADE",
		line: "created the index user_service_name"},
	{name: "the function that searches dropped", users: 3, sql: "DROP FUNCTION user_service_find"},
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
		if _, err := source.createUser(t.Context(), "test", input("John", "Doe", "hash"), key); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := source.updateUser(t.Context(), "test", 3, input("Jane", "", ""), nil); err != nil {
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
	{name: "a newer schema", sql: newestSchema, says: []string{"version 9", "5"}},
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
		LANGUAGE sql IMMUTABLE AS 'SELECT 6, 5';
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
				if _, err := s.updateUser(ctx, "test", int64((c+i)%users+1), in, nil); err != nil {
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
			(SELECT string_agg((id, event_id, event_type, user_id, version, trace_id, occurred_at)::text,
				' ' ORDER BY id) FROM outbox),
			(SELECT string_agg(k::text, ' ' ORDER BY key) FROM idempotency_keys k))`)
	}
	before := content()
	s := openTestPostgres(t, url)
	if after := content(); after != before {
		t.Errorf("content after the upgrade:\n%s\nwant\n%s", after, before)
	}
	_, total, err := s.listUsers(t.Context(), "", "", 0, 0, 1)
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
	if version != 5 || triggers != want {
		t.Errorf("version %d with the triggers %s, want 5, %s", version, triggers, want)
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

// schema120 is the schema of release 1.2.0, which has version 2.
var schema120 = func() string {
	text, err := os.ReadFile("system/testdata/schema-1.2.0.sql")
	if err != nil {
		panic(err)
	}
	return string(text)
}()

// database120 returns a database of release 1.2.0 with users, each of which takes about 2 KiB.
func database120(t *testing.T, users int) string {
	t.Helper()
	url := emptyDatabase(t, "")
	conn := connect(t, url)
	execute(t, conn, schema120)
	execute(t, conn, `INSERT INTO users (name, surname, password)
		SELECT 'John' || i, 'Doe', repeat(md5(i::text), 60) FROM generate_series(1, $1) AS i`, users)
	return url
}

// manyUsers are users of database120 whose indexes a start leaves to finishSchema.
const manyUsers = 6000

// indexes is a query that returns the indexes of searches. An invalid one has an exclamation mark.
const indexes = `SELECT coalesce(string_agg(relname || CASE WHEN indisvalid THEN '' ELSE '!' END, ' '
		ORDER BY relname), '')
	FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
	WHERE indrelid = 'users'::regclass AND relname <> 'users_pkey'`

// bothIndexes is the result of indexes after a start or after finishSchema.
const bothIndexes = "user_service_name user_service_surname"

// waitForIndexes waits until the indexes are valid.
func waitForIndexes(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	eventually(t, "the indexes of searches", func() bool {
		return queryValue[string](t, conn, indexes) == bothIndexes
	})
}

// blockIndexes begins a transaction for which CREATE INDEX CONCURRENTLY waits until release is
// called.
func blockIndexes(t *testing.T, url string) (release func()) {
	t.Helper()
	conn := connect(t, url)
	execute(t, conn, "BEGIN; LOCK TABLE users IN ROW EXCLUSIVE MODE")
	return func() { execute(t, conn, "COMMIT") }
}

// waitForBuild waits until the creation of an index, or the removal of an invalid one, waits for other
// transactions, and returns its process.
func waitForBuild(t *testing.T, conn *pgx.Conn) (pid int) {
	t.Helper()
	eventually(t, "the creation of an index", func() bool {
		pid = queryValue[int](t, conn, `SELECT coalesce(max(pid), 0) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock'
				AND query ~ '^(CREATE|DROP) INDEX CONCURRENTLY'`)
		return pid > 0
	})
	return pid
}

// TestUpgradeFewUsers checks that a start on a small database of release 1.2.0 creates the indexes
// before it serves.
func TestUpgradeFewUsers(t *testing.T) {
	t.Parallel()
	url := database120(t, 50)
	log, err := openLogged(t, url)
	conn := connect(t, url)
	if got := queryValue[string](t, conn, indexes); err != nil || got != bothIndexes {
		t.Errorf("start: %v, indexes %q, want %q", err, got, bothIndexes)
	}
	if n := len(log.lines("Database schema updated")); n != 1 || n != len(log.lines("")) {
		t.Errorf("%d lines about the update, want no other:\n%s", n, log)
	}
	checkSchemaVersion(t, conn)
	checkRepaired(t, url, 50, "")
}

// TestUpgradeManyUsers checks that the service serves while the indexes are created after the start
// on a large database of release 1.2.0, and that no timeout of the database ends the creation.
func TestUpgradeManyUsers(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.databaseURL = database120(t, manyUsers)
	conn := connect(t, s.databaseURL)
	execute(t, conn, "ALTER DATABASE "+conn.Config().Database+" SET statement_timeout = '1s'")
	execute(t, conn, "ALTER DATABASE "+conn.Config().Database+" SET lock_timeout = '1s'")
	release := blockIndexes(t, s.databaseURL)
	svc := startService(t, s)
	waitForBuild(t, conn)
	checkSearches := func(want ...int64) {
		t.Helper()
		if got := svc.search("john600"); !slices.Equal(got, want) {
			t.Errorf("users %v, want %v", got, want)
		}
	}
	checkSearches(600, manyUsers)
	id := svc.createUser("Ann", "John600")
	if a := svc.do("PUT", "/users/600", `{"name": "Bob"}`); a.status != http.StatusOK {
		t.Errorf("PUT during the creation of an index: status %d, want 200: %s", a.status, a.body)
	}
	checkSearches(manyUsers, id)
	execute(t, conn, "SET statement_timeout = 0; SELECT pg_sleep(1.5)") // longer than the timeouts
	release()
	for _, index := range strings.Fields(bothIndexes) {
		svc.waitForLine("Search index built", "index", index)
	}
	if got := queryValue[string](t, conn, indexes); got != bothIndexes {
		t.Errorf("indexes %q, want %q", got, bothIndexes)
	}
	checkSearches(manyUsers, id)
	checkSchemaVersion(t, conn)
	if log, err := openLogged(t, s.databaseURL); err != nil || len(log.lines("")) > 0 {
		t.Errorf("second start: error %v, want none and an empty log:\n%s", err, log)
	}
}

// TestUpgradeByTwoServices checks that two services that start at once on a large database of
// release 1.2.0 both serve, and that the indexes are created.
func TestUpgradeByTwoServices(t *testing.T) {
	t.Parallel()
	s := memorySettings()
	s.databaseURL = database120(t, manyUsers)
	services := make([]*service, 2)
	var group sync.WaitGroup
	for i := range services {
		group.Go(func() { services[i] = startService(t, s) })
	}
	group.Wait()
	waitForIndexes(t, connect(t, s.databaseURL))
	for _, svc := range services {
		if got := svc.search("john600"); !slices.Equal(got, []int64{600, manyUsers}) {
			t.Errorf("users %v, want 600 and %d", got, manyUsers)
		}
		if lines := svc.log.lines("Building a search index failed"); len(lines) > 0 {
			t.Errorf("failures %v, want none", lines)
		}
	}
}

// indexDamages are changes of the indexes.
var indexDamages = []struct {
	name, sql string
}{
	{"dropped", "DROP INDEX user_service_name, user_service_surname"},
	{"one dropped", "DROP INDEX user_service_surname"},
	{"invalid", `UPDATE pg_index SET indisvalid = false
		WHERE indexrelid IN ('user_service_name'::regclass, 'user_service_surname'::regclass)`},
}

// TestStartRepairsIndexes checks that a start replaces missing and invalid indexes, or leaves that to
// finishSchema if there are many users.
func TestStartRepairsIndexes(t *testing.T) {
	t.Parallel()
	for _, test := range indexDamages {
		for _, users := range []int{3, manyUsers} {
			t.Run(fmt.Sprint(test.name, " with ", users, " users"), func(t *testing.T) {
				t.Parallel()
				url := database120(t, users)
				first := openTestPostgres(t, url)
				first.finishSchema(t.Context())
				conn := connect(t, asSuperuser(t, url))
				execute(t, conn, test.sql)
				log, err := openLogged(t, url)
				repaired := fmt.Sprint(log.lines("Database repaired"))
				named := strings.Contains(repaired, "user_service_surname")
				if err != nil || named != (users == 3) {
					t.Errorf("start: %v, want the repair of the index unless finishSchema makes it:\n%s",
						err, log)
				}
				s := openTestPostgres(t, url)
				if left := len(s.left); (left > 0) != (users == manyUsers) {
					t.Errorf("%d indexes left to finishSchema with %d users", left, users)
				}
				s.finishSchema(t.Context())
				if got := queryValue[string](t, conn, indexes); got != bothIndexes {
					t.Errorf("indexes %q, want %q", got, bothIndexes)
				}
				checkFound(t, s, "john2", 1, 0, 1, []int64{2}, map[int]int64{3: 1, manyUsers: 1111}[users])
			})
		}
	}
}

// TestBuildIndexFails checks that the failure to create an index is logged, unless the service stops,
// that the index is left to the next attempt, and that this one replaces the invalid index.
func TestBuildIndexFails(t *testing.T) {
	t.Parallel()
	url := database120(t, manyUsers)
	conn, log := connect(t, url), &logBuffer{}
	out := &logWriter{w: log}
	s, err := openPostgres(t.Context(), url, "test", newLogger(out, 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	for attempt, fail := range []func(pid int, cancel func()){
		func(pid int, _ func()) { execute(t, conn, "SELECT pg_terminate_backend($1)", pid) },
		func(pid int, _ func()) { execute(t, conn, "SELECT pg_cancel_backend($1)", pid) },
		func(_ int, cancel func()) { cancel() }, // the service stops
	} {
		release := blockIndexes(t, url)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { s.finishSchema(ctx); close(done) }()
		fail(waitForBuild(t, conn), cancel)
		eventually(t, "the line about the failure", func() bool {
			return ctx.Err() != nil || out.flush() == nil &&
				len(log.lines("Building a search index failed")) > attempt
		})
		cancel()
		<-done
		if got := queryValue[string](t, conn, indexes); len(s.left) != 2 ||
			got != "user_service_name!" {
			t.Errorf("attempt %d: %d indexes left and %q, want 2 and an invalid user_service_name",
				attempt, len(s.left), got)
		}
		release()
	}
	s.finishSchema(t.Context())
	if got := queryValue[string](t, conn, indexes); len(s.left) > 0 || got != bothIndexes {
		t.Errorf("%d indexes left and %q, want none and %q", len(s.left), got, bothIndexes)
	}
	if lines := log.lines("Building a search index failed"); len(lines) != 2 {
		t.Errorf("failures %v, want two", lines)
	}
}

// TestBuildIndexOnce checks that an index that another replica has created meanwhile is kept.
func TestBuildIndexOnce(t *testing.T) {
	t.Parallel()
	url := database120(t, manyUsers)
	first, second := openTestPostgres(t, url), openTestPostgres(t, url)
	if len(first.left) != 2 || len(second.left) != 2 {
		t.Fatalf("%d and %d indexes left, want 2 each", len(first.left), len(second.left))
	}
	conn := connect(t, url)
	const oids = "SELECT array_agg(indexrelid) FROM pg_index WHERE indrelid = 'users'::regclass"
	first.finishSchema(t.Context())
	before := queryValue[[]uint32](t, conn, oids)
	second.finishSchema(t.Context())
	if after := queryValue[[]uint32](t, conn, oids); len(before) != 3 || !slices.Equal(after, before) {
		t.Errorf("indexes %v, then %v, want the same", before, after)
	}
}

// The SQL statements of release 1.2.0 that change or list users, word for word.
const (
	insert120 = `
		WITH created AS (
			INSERT INTO users (name, surname, password)
			SELECT $1, $2, $3 FROM set_config('user_service.trace_id', $4, true)
			RETURNING ` + previousColumns + `
		), kept AS (
			INSERT INTO idempotency_keys (key, user_id, name, surname, password)
			SELECT $5, id, name, surname, $3 FROM created WHERE $5 <> ''
		)
		SELECT * FROM created`
	change120 = `
		WITH change AS (
			SELECT * FROM unnest(
				set_config('user_service.ids', $1::bigint[]::text, true)::bigint[],
				set_config('user_service.trace_ids', $2::text[]::text, true)::text[],
				$3::text[], $4::text[], $5::text[], $6::text[]
			) AS change (user_id, trace_id, match, new_name, new_surname, new_password)
		), free AS (
			SELECT change.*
			FROM change,
				LATERAL (SELECT FROM users WHERE id = user_id FOR UPDATE SKIP LOCKED) AS users
		)`
	update120 = change120 + `
		UPDATE users SET
			name = coalesce(new_name, name),
			surname = coalesce(new_surname, surname),
			password = coalesce(new_password, password)
		FROM free
		WHERE id = user_id AND (match IS NULL OR version = ANY (match::bigint[]))
		RETURNING ` + previousColumns
	delete120 = change120 + `
		DELETE FROM users USING free
		WHERE id = user_id AND (match IS NULL OR version = ANY (match::bigint[]))
		RETURNING ` + previousColumns
	rehash120 = `
		UPDATE users SET password = $3 FROM set_config('user_service.rehash', 'on', true)
		WHERE id = $1 AND password = $2`
	list120 = `
			SELECT greatest(sum(n), 0)::bigint AS total, 0 AS id, '' AS name, '' AS surname,
				0 AS version, now() AS created_at, now() AS updated_at
			FROM user_counts
			UNION ALL (
				SELECT NULL, ` + previousColumns + ` FROM users WHERE id > $1 ORDER BY id LIMIT $3 OFFSET $2
			)
			ORDER BY total, id`
)

// TestRelease120 checks that release 1.2.0 can start on an upgraded database, and that its statements
// work there.
func TestRelease120(t *testing.T) {
	t.Parallel()
	url := database120(t, 0)
	s, conn := openTestPostgres(t, url), connect(t, url)
	before := queryValue[string](t, conn, catalog)
	if _, err := conn.Exec(t.Context(), schema120); sqlState(err) != "US002" {
		t.Errorf("start of release 1.2.0: %v, want US002, which ends its steps", err)
	}
	if lines := differences(before, queryValue[string](t, conn, catalog)); len(lines) > 0 {
		t.Errorf("the start of release 1.2.0 changed the catalog: %q", lines)
	}
	for _, key := range []string{"", "key", ""} {
		execute(t, conn, insert120, "John", "Doe", "hash", "create", key)
	}
	ids, traces := []int64{1, 2, 9}, []string{"change-1", "change-2", "change-9"}
	none, jane, one, seven := []*string{nil, nil, nil}, new("Jane"), new("{1}"), new("{7}")
	names := []*string{jane, jane, jane}
	execute(t, conn, update120, ids, traces, []*string{one, seven, nil}, names, none, none)
	execute(t, conn, rehash120, 3, "hash", "new hash")
	execute(t, conn, delete120, ids, traces, []*string{seven, nil, nil}, none, none, none)
	const want = "created 1/1 create, updated 1/2 change-1, created 2/1 create, " +
		"deleted 2/2 change-2, created 3/1 create"
	if got := queryValue[string](t, conn, eventsWithTraces); got != want {
		t.Errorf("events %s, want %s", got, want)
	}
	rows, _ := conn.Query(t.Context(), list120, 0, 1, 10)
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
		values, err := row.Values()
		return fmt.Sprint(values[:5]), err
	})
	if err != nil || !slices.Equal(list, []string{"[2 0   0]", "[<nil> 3 John Doe 1]"}) {
		t.Errorf("list %q, %v, want the total 2 and user 3", list, err)
	}
	checkFound(t, s, "jan", 0, 0, 10, []int64{1}, 1)
	checkTotal(t, conn)
	checkEvents(t, conn)
}

// TestImportedTimes checks when an update keeps the updated_at of its writer, and the time of the
// event.
func TestImportedTimes(t *testing.T) {
	t.Parallel()
	conn := connect(t, newDatabase(t))
	const last = "2020-01-01 00:00:00.123456Z"
	for _, test := range []struct{ name, setting, sql, want string }{
		{name: "no setting", sql: "name = 'Eve', updated_at = '2024-01-01Z'"},
		{name: "off", setting: "off", sql: "name = 'Eve', updated_at = '2024-01-01Z'"},
		{name: "another setting", setting: "true", sql: "name = 'Eve', updated_at = '2024-01-01Z'"},
		{name: "later", setting: "on", sql: "name = 'Eve', updated_at = '2024-01-01Z'",
			want: "2024-01-01 00:00:00Z"},
		{name: "in the future", setting: "on", sql: "name = 'Eve', updated_at = '2199-01-01Z'",
			want: "2199-01-01 00:00:00Z"},
		{name: "the same", setting: "on", sql: "name = 'Eve'", want: "2020-01-01 00:00:00.123457Z"},
		{name: "earlier", setting: "on", sql: "name = 'Eve', updated_at = '2019-01-01Z'",
			want: "2020-01-01 00:00:00.123457Z"},
		{name: "a password", setting: "on", sql: "password = 'y', updated_at = '2024-01-01Z'",
			want: "2024-01-01 00:00:00Z"},
		{name: "only a time", setting: "on", sql: "updated_at = '2024-01-01Z'", want: last},
	} {
		execute(t, conn, "DELETE FROM users")
		execute(t, conn, `INSERT INTO users (id, name, surname, password, updated_at)
			VALUES (1, 'Ann', 'Doe', 'x', '`+last+`')`)
		execute(t, conn, "DELETE FROM outbox")
		start := queryValue[time.Time](t, conn, "SELECT clock_timestamp()")
		execute(t, conn, "BEGIN; SET LOCAL user_service.import = '"+test.setting+"';"+
			"UPDATE users SET "+test.sql+"; COMMIT")
		updated := queryValue[time.Time](t, conn, "SELECT updated_at FROM users")
		want, err := time.Parse("2006-01-02 15:04:05Z07:00", test.want)
		if test.want == "" {
			if age := time.Since(updated); updated.Before(start) || age < 0 {
				t.Errorf("%s: updated_at %v, want the time of the statement", test.name, updated)
			}
		} else if err != nil || !updated.Equal(want) {
			t.Errorf("%s: updated_at %v, %v, want %v", test.name, updated, err, want)
		}
		unchanged := test.want == last
		n := queryValue[int](t, conn, `SELECT count(*) FROM outbox, users
			WHERE occurred_at >= greatest(updated_at, $1) AND outbox.version = 2`, start)
		version := queryValue[int](t, conn, "SELECT version FROM users")
		if unchanged && (n != 0 || version != 1) || !unchanged && (n != 1 || version != 2) {
			t.Errorf("%s: version %d with %d events of this time, unchanged: %t",
				test.name, version, n, unchanged)
		}
	}
}

// predecessors are tables of the name user, and whether a start must mention the import of its users.
var predecessors = []struct {
	name, sql string
	superuser bool
	waiting   bool
}{
	{name: "none", sql: "SELECT"},
	{name: "rows", sql: predecessorTable + predecessorRow, waiting: true},
	{name: "rows, readable", superuser: true, waiting: true,
		sql: predecessorTable + predecessorRow + `GRANT SELECT ON "user" TO PUBLIC;`},
	{name: "rows, not readable", superuser: true, sql: predecessorTable + predecessorRow},
	{name: "rows, one column readable", superuser: true,
		sql: predecessorTable + predecessorRow + `GRANT SELECT (id) ON "user" TO PUBLIC;`},
	{name: "more columns", waiting: true,
		sql: predecessorTable + predecessorRow + `ALTER TABLE "user" ADD email text;`},
	{name: "no rows", sql: predecessorTable},
	{name: "a column missing", sql: predecessorTable + predecessorRow +
		`ALTER TABLE "user" DROP created_at;`},
	{name: "a table of another kind", sql: `CREATE TABLE "user" (id int); INSERT INTO "user" VALUES (1)`},
	{name: "users exist", sql: predecessorTable + predecessorRow +
		"INSERT INTO users (name, surname, password) VALUES ('John', 'Doe', 'x');"},
	{name: "a table in another schema", sql: "CREATE SCHEMA other; SET search_path = other;" +
		predecessorTable + predecessorRow},
}

const (
	predecessorTable = `CREATE TABLE "user" (id bigserial PRIMARY KEY, name text, surname text,
		password text, created_at timestamptz DEFAULT now(), updated_at timestamptz DEFAULT now());`
	predecessorRow = `INSERT INTO "user" (name, surname, password) VALUES ('Ann', 'Lee', 'x');`
)

// TestStartMentionsPredecessor checks that a service without users, whose database has users of the
// predecessor, names the command that imports them, and starts in any case.
func TestStartMentionsPredecessor(t *testing.T) {
	t.Parallel()
	for _, test := range predecessors {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := postgresSettings(t)
			url := s.databaseURL
			if test.superuser {
				url = asSuperuser(t, url)
			}
			execute(t, connect(t, url), test.sql)
			if left := openTestPostgres(t, s.databaseURL).left; (len(left) == 1) != test.waiting ||
				test.waiting && left[0].Code != "US103" {
				t.Errorf("left %v, want US103: %t", left, test.waiting)
			}
			svc := startService(t, s)
			if test.waiting {
				line := svc.waitForLine("Predecessor's users not imported", "level", "WARN")
				if !strings.Contains(fmt.Sprint(line["remedy"]), "user-service import --predecessor") {
					t.Errorf("line %v, want the command", line)
				}
			}
		})
	}
}

// TestBuildIndexInOwnSchema checks that the indexes are created in the service's schema, and that
// those of another service later in the search_path stay.
func TestBuildIndexInOwnSchema(t *testing.T) {
	t.Parallel()
	url := database120(t, manyUsers) // in the schema public
	public := openTestPostgres(t, url)
	public.finishSchema(t.Context())
	conn := connect(t, withParameter(t, url, "search_path", "own"))
	execute(t, conn, "CREATE SCHEMA own")
	execute(t, conn, schema120)
	execute(t, conn, "INSERT INTO users SELECT * FROM public.users")
	s := openTestPostgres(t, withParameter(t, url, "search_path", "own, public"))
	s.finishSchema(t.Context())
	for _, schema := range []string{"own", "public"} {
		execute(t, conn, "SET search_path = "+schema)
		if got := queryValue[string](t, conn, indexes); got != bothIndexes {
			t.Errorf("indexes in the schema %s: %q, want %q", schema, got, bothIndexes)
		}
	}
}

// TestUpgradeLongName checks that a name that is too long for the API, which SQL could write before,
// does not prevent a start, and can still be written by SQL.
func TestUpgradeLongName(t *testing.T) {
	t.Parallel()
	url := database120(t, 3)
	conn := connect(t, url)
	const lengthen = `UPDATE users SET name = (
		SELECT string_agg(md5(i::text), '') FROM generate_series(1, 120) AS i) WHERE id = $1`
	execute(t, conn, lengthen, 1)
	openTestPostgres(t, url)
	execute(t, conn, lengthen, 2)
}

// TestRemovesByBothIDs checks that an event stays that has only the outbox id of a published one, as
// after a failover that lost changes.
func TestRemovesByBothIDs(t *testing.T) {
	t.Parallel()
	s := openTestPostgres(t, newDatabase(t))
	mustCreate(t, s, "John")
	other := allPending(t, s)[0]
	published := other
	published.ID = newUUIDv7()
	for _, done := range []event{published, other} {
		pending, _, err := s.next(t.Context(), []event{done}, nil, 10, false)
		if want := map[bool]int{true: 1}[done.ID == published.ID]; err != nil || len(pending) != want {
			t.Errorf("got %d events and %v, want %d", len(pending), err, want)
		}
	}
}

// TestSkipsUsers checks that the relay's read leaves out the users that it should, in both stores.
func TestSkipsUsers(t *testing.T) {
	t.Parallel()
	for _, s := range []store{newMemory(), openTestPostgres(t, newDatabase(t))} {
		for range 3 {
			mustCreate(t, s, "John")
		}
		skip := []event{newEvent(userUpdated, 1, 9), newEvent(userUpdated, 3, 9)}
		events, _, err := s.next(t.Context(), nil, skip, 10, false)
		if err != nil || len(events) != 1 || events[0].Data.UserID != 2 {
			t.Errorf("%T: got %v and %v, want the event of user 2", s, events, err)
		}
	}
}

// TestPublicationOfAllTables checks that the service works while every table is published, as for
// logical replication: PostgreSQL then refuses to update or delete rows without a replica identity.
func TestPublicationOfAllTables(t *testing.T) {
	t.Parallel()
	set := postgresSettings(t)
	super := connect(t, asSuperuser(t, set.databaseURL))
	execute(t, super, "CREATE PUBLICATION everything FOR ALL TABLES")
	svc := startService(t, set)
	checkServes(t, svc, 0)
	s := openTestPostgres(t, set.databaseURL)
	for range foldFrom {
		mustCreate(t, s, "John")
	}
	eventually(t, "an empty outbox", func() bool {
		return queryValue[int](t, super, "SELECT count(*) FROM outbox") == 0
	})
	if err := errors.Join(s.fold(t.Context()), s.sweepKeys(t.Context())); err != nil {
		t.Error(err)
	}
	checkTotal(t, super)
}

// TestReplicaIdentityOfUpgrade checks that a start on a database of release 1.2.0 gives each table
// a replica identity, and that a start sets it again if it was lost.
func TestReplicaIdentityOfUpgrade(t *testing.T) {
	t.Parallel()
	url := database120(t, 1)
	openTestPostgres(t, url)
	conn := connect(t, url)
	const lacking = `SELECT count(*) FROM pg_class
		WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relreplident <> 'f'
			AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = pg_class.oid AND indisprimary)`
	if n := queryValue[int](t, conn, lacking); n > 0 {
		t.Errorf("%d tables have no replica identity, want none", n)
	}
	execute(t, conn, "ALTER TABLE user_counts REPLICA IDENTITY DEFAULT")
	checkRepaired(t, url, 1, "replica identity of user_counts")
}

// TestLastID checks that the service starts, and that users can be changed and truncated, when the
// last id is in use and the sequence is at its end.
func TestLastID(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	execute(t, conn, `INSERT INTO users (id, name, surname, password)
		VALUES (9223372036854775806, 'John', 'Doe', 'x')`)
	if last := mustCreate(t, s, "Ann"); last.ID != math.MaxInt64 {
		t.Errorf("the last user has id %d, want %d", last.ID, math.MaxInt64)
	}
	if log, err := openLogged(t, url); err != nil || len(log.lines("")) > 0 {
		t.Errorf("start: error %v, want none and an empty log:\n%s", err, log)
	}
	ann := input("Eve", "Lee", "")
	if _, err := s.updateUser(t.Context(), "", math.MaxInt64, ann, nil); err != nil {
		t.Error(err)
	}
	execute(t, conn, "SELECT setval(pg_get_serial_sequence('users', 'id'), 9223372036854775807)")
	if _, err := s.createUser(t.Context(), "", input("Eve", "Lee", "x"), ""); !errors.Is(err, errRefused) {
		t.Errorf("creation without an id left: error %v, want %v", err, errRefused)
	}
	execute(t, conn, "TRUNCATE users")
	checkTotal(t, conn)
}

// sqlWords returns the words of schema.sql and of the statements in store.go and outbox.go that
// could be the name of a column.
func sqlWords(t *testing.T) (words []string) {
	t.Helper()
	sql := regexp.MustCompile(`--.*`).ReplaceAllString(schema, "")
	for _, file := range []string{"store.go", "outbox.go"} {
		text, err := fs.ReadFile(os.DirFS("."), file)
		if err != nil {
			t.Fatal(err)
		}
		sql += strings.Join(regexp.MustCompile("(?s)`.*?`").FindAllString(string(text), -1), "\n")
	}
	words = regexp.MustCompile(`\b[a-z_][a-z0-9_]*\b`).FindAllString(sql, -1)
	slices.Sort(words)
	system := []string{"cmax", "cmin", "ctid", "tableoid", "xmax", "xmin"}
	return slices.DeleteFunc(slices.Compact(words), func(word string) bool {
		return slices.Contains(system, word)
	})
}

// TestSiteColumns checks that every statement works if the site has added columns whose names occur
// in it.
func TestSiteColumns(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	for _, table := range []string{"users", "outbox", "idempotency_keys", "user_counts", "relay_lease"} {
		var columns []string
		for _, word := range sqlWords(t) {
			columns = append(columns, fmt.Sprintf("ADD COLUMN IF NOT EXISTS %q text", word))
		}
		execute(t, conn, "SET client_min_messages = warning; ALTER TABLE "+table+" "+
			strings.Join(columns, ", "))
	}
	openTestPostgres(t, url)
	ctx := t.Context()
	for i := range 3 {
		if _, err := s.createUser(ctx, "", input("John", "Doe", "x"), fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	_, _, keyErr := s.creationUnder(ctx, "1")
	_, getErr := s.getUser(ctx, 1)
	hash, hashErr := s.passwordHash(ctx, 1)
	version := []int64{1}
	_, updateErr := s.updateUser(ctx, "", 1, input("Jane", "", ""), version)
	rehashErr := s.rehashPassword(ctx, 1, hash, "y")
	deleteErr := s.deleteUser(ctx, "", 2, version)
	err := errors.Join(keyErr, getErr, hashErr, updateErr, rehashErr, deleteErr)
	if err != nil {
		t.Error(err)
	}
	checkFound(t, s, "jan", 0, 0, 10, []int64{1}, 1)
	if users, total, err := s.listUsers(ctx, "", "", 0, 0, 10); err != nil || len(users) != 2 || total != 2 {
		t.Errorf("list: %d users, total %d, %v, want 2, 2", len(users), total, err)
	}
	const want = "created 1/1, created 2/1, created 3/1, updated 1/2, deleted 2/2"
	if got := eventNames(allPending(t, s)); got != want {
		t.Errorf("events %s, want %s", got, want)
	}
	_, leads, err := s.next(ctx, allPending(t, s), nil, 10, true)
	if pending := allPending(t, s); err != nil || !leads || len(pending) > 0 {
		t.Errorf("relay: leads %t, %d pending events, %v, want true, 0", leads, len(pending), err)
	}
	// More matches than user_service_find counts, and none among the next users that it reads first.
	execute(t, conn, `INSERT INTO users (name, surname, password)
		SELECT CASE WHEN i > 4000 THEN 'Max' ELSE 'Ned' END, 'Lee', 'x'
		FROM generate_series(1, 14100) AS i`)
	if users, total, err := s.listUsers(ctx, "", "max", 0, 0, 10); err != nil || len(users) != 10 ||
		total != 10001 {
		t.Errorf("search: %d users, total %d, %v, want 10, 10001", len(users), total, err)
	}
	_, _, sizeErr := s.size(ctx)
	err = errors.Join(sizeErr, s.fold(ctx), s.sweepKeys(ctx), s.vacuum(ctx), s.resign(ctx))
	if err != nil {
		t.Error(err)
	}
	execute(t, conn, "TRUNCATE users RESTART IDENTITY")
	checkTotal(t, conn)
}

// eventNames returns the types, users and versions of events.
func eventNames(events []event) string {
	names := make([]string, len(events))
	for i, e := range events {
		names[i] = fmt.Sprintf("%s %d/%d", strings.TrimPrefix(e.Type, "user."), e.Data.UserID,
			e.Data.Version)
	}
	return strings.Join(names, ", ")
}

// TestSiteSetsUpdatedAt checks that an update without a change has no event, even if a later trigger
// of the site sets updated_at.
func TestSiteSetsUpdatedAt(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	s, conn := openTestPostgres(t, url), connect(t, url)
	execute(t, conn, `CREATE FUNCTION moddatetime() RETURNS trigger LANGUAGE plpgsql
			AS 'BEGIN NEW.updated_at := now(); RETURN NEW; END';
		CREATE TRIGGER users_moddatetime BEFORE UPDATE ON users
			FOR EACH ROW EXECUTE FUNCTION moddatetime()`)
	mustCreate(t, s, "Ann")
	for _, name := range []string{"Ann", "Eve", "Eve"} {
		if _, err := s.updateUser(t.Context(), "", 1, input(name, "", ""), nil); err != nil {
			t.Fatal(err)
		}
	}
	execute(t, conn, "UPDATE users SET name = 'Eve'")
	const want = "created 1/1, updated 1/2"
	if got := eventNames(allPending(t, s)); got != want {
		t.Errorf("events %s, want %s", got, want)
	}
}

// TestOriginOfSetRole checks that events have the trace id and the actor of the request if the role
// of DATABASE_URL does not inherit the rights of the owner, but sets its role to the owner.
func TestOriginOfSetRole(t *testing.T) {
	t.Parallel()
	url := newDatabase(t)
	role := newRole(t)
	super := connect(t, asSuperuser(t, url))
	execute(t, super, fmt.Sprintf(`ALTER ROLE %[1]s NOINHERIT; GRANT %[2]s TO %[1]s;
		ALTER ROLE %[1]s SET role = '%[2]s'`, role, template.role))
	s := openTestPostgres(t, asRole(t, url, role))
	ctx := withTraceID(t.Context(), "trace-1")
	if _, err := s.createUser(ctx, "ops", input("Ann", "Lee", "x"), ""); err != nil {
		t.Fatal(err)
	}
	if e := allPending(t, s)[0]; e.TraceID != "trace-1" || e.actor != "ops" {
		t.Errorf("trace id %s, actor %s, want trace-1, ops", e.TraceID, e.actor)
	}
}

// TestWritersNeedNoExecute checks that another role needs privileges on users only, even if the
// owner grants the execution of functions to nobody.
func TestWritersNeedNoExecute(t *testing.T) {
	t.Parallel()
	url := emptyDatabase(t, "")
	conn := connect(t, url)
	execute(t, conn, "ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
	openTestPostgres(t, url)
	role := newRole(t)
	execute(t, conn, "GRANT SELECT, INSERT, UPDATE, DELETE ON users TO "+role)
	writer := connect(t, asRole(t, url, role))
	execute(t, writer, "INSERT INTO users (name, surname, password) VALUES ('Ann', 'Lee', 'x')")
	execute(t, writer, "UPDATE users SET name = 'Eve'")
	execute(t, writer, "DELETE FROM users")
	const want = "created 1/1, updated 1/2, deleted 1/3"
	if got := queryValue[string](t, conn, eventsText); got != want {
		t.Errorf("events %s, want %s", got, want)
	}
	checkTotal(t, conn)
}

// TestStartWithoutDDL checks that the service starts on a complete schema although it may not
// create objects, and still refuses an incomplete one.
func TestStartWithoutDDL(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, sql string }{
		{name: "a schema without CREATE", sql: `ALTER SCHEMA public OWNER TO CURRENT_USER;
			REVOKE CREATE ON SCHEMA public FROM PUBLIC; GRANT USAGE ON SCHEMA public TO PUBLIC`},
		{name: "an event trigger", sql: `CREATE FUNCTION no_ddl() RETURNS event_trigger
				LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''permission denied''; END';
			CREATE EVENT TRIGGER no_ddl ON ddl_command_start EXECUTE FUNCTION no_ddl()`},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			url := newDatabase(t)
			super := connect(t, asSuperuser(t, url))
			execute(t, super, test.sql)
			checkRepaired(t, url, 0, "")
			execute(t, super, "SET session_replication_role = replica") // disables the event trigger
			execute(t, super, "DROP FUNCTION user_service_find")
			if _, err := openLogged(t, url); err == nil ||
				!strings.Contains(err.Error(), "permission denied") {
				t.Errorf("start without a function: error %v, want that permission is denied", err)
			}
		})
	}
}
