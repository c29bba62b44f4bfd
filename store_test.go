package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
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

func TestStoreRehashesOnce(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		u, err := s.createUser(t.Context(), input("John", "Doe", "old"), "")
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
				t.Errorf("%s -> %s: %s, %v", test.old, test.hash, got, err)
			}
		}
		if err := s.rehashPassword(t.Context(), 999, "old", "new"); err != nil {
			t.Errorf("a missing user: %v", err)
		}
		if _, err := s.passwordHash(t.Context(), 999); !errors.Is(err, errNotFound) {
			t.Errorf("a missing user: %v", err)
		}
		if again, _ := s.getUser(t.Context(), u.ID); again != u {
			t.Errorf("%+v became %+v", u, again)
		}
	})
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
