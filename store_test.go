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
	s, err := openPostgres(t.Context(), url, "test", newLogger(&logWriter{w: t.Output()}, 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
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
	u, err := s.createUser(t.Context(), input(name, "Doe", "hash"), "")
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// allPending returns all events of the outbox. It does not need the lease.
func allPending(t *testing.T, s store) []event {
	t.Helper()
	events, err := s.pending(t.Context(), 1_000_000)
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
		created, err := s.createUser(ctx, input("John", "Doe", "hash"), "")
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
		updated, err := s.updateUser(ctx, 1, input("Jane", "", ""), nil)
		if err != nil || updated.Name != "Jane" || updated.Surname != "Doe" ||
			updated.Version != 2 || !updated.UpdatedAt.After(created.UpdatedAt.Time) {
			t.Errorf("updateUser: %+v, %v, want Jane Doe in version 2, later than %v",
				updated, err, created.UpdatedAt)
		}
		if err := s.deleteUser(ctx, 1, nil); err != nil {
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

// TestStoreErrors checks the errors of updates and deletions, and that a failed one changes
// nothing.
func TestStoreErrors(t *testing.T) {
	t.Parallel()
	eachStoreAlone(t, func(t *testing.T, s store) {
		mustCreate(t, s, "John")
		_, missing := s.updateUser(t.Context(), 9, input("Jane", "", ""), []int64{})
		_, stale := s.updateUser(t.Context(), 1, input("Jane", "", ""), []int64{2, 3})
		_, unchanged := s.updateUser(t.Context(), 1, input("John", "", ""), []int64{})
		for name, test := range map[string]struct{ got, want error }{
			"update of a missing user":                 {missing, errNotFound},
			"update of another version":                {stale, errVersionMismatch},
			"update without change of another version": {unchanged, errVersionMismatch},
			"deletion of a missing user": {
				s.deleteUser(t.Context(), 9, nil), errNotFound},
			"deletion of another version": {
				s.deleteUser(t.Context(), 1, []int64{2}), errVersionMismatch},
			"deletion of no version": {
				s.deleteUser(t.Context(), 1, []int64{}), errVersionMismatch},
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
		if err := s.deleteUser(t.Context(), 1, []int64{5, 1}); err != nil {
			t.Errorf("deletion of a listed version: %v", err)
		}
	})
}

// TestStoreUpdatesDifferences checks that an update makes a version and an event only if it changes
// something. A password always does, because its hash is new.
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
				u, err := s.updateUser(t.Context(), 1, test.in, []int64{1})
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
					t.Errorf("%d events, want 2: %t", got, test.changes)
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
			if err := s.deleteUser(t.Context(), id, nil); err != nil {
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
			users, total, err := s.listUsers(t.Context(), test.after, test.offset, test.limit)
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
					_, err := s.updateUser(context.Background(), 1, in, []int64{version})
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
		_, total, err := s.listUsers(t.Context(), 0, 0, 1)
		if err != nil || total != step.want {
			t.Errorf("total after %q: %d, %v, want %d", step.sql, total, err, step.want)
		}
	}
}
