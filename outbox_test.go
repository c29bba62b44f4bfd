package main

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
)

// TestOneLeader checks that one replica leads until it resigns or its lease expires, and that a
// restore that has added rows to the lease or removed them leads neither to two leaders nor to
// none.
func TestOneLeader(t *testing.T) {
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
	if leads, err := s.lead(t.Context()); leads || !errors.Is(err, errUnavailable) {
		t.Errorf("lead: %t, %v, want false, errUnavailable", leads, err)
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
