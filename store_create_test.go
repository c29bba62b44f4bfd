package main

import (
	"context"
	"testing"
)

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
