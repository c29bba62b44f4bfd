package process

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"user-service/system/env"
)

// limitRole sets short timeouts for the role of a database.
func limitRole(d *env.Database) {
	d.Exec("postgres", "ALTER ROLE "+d.Name+" SET statement_timeout = '200ms'",
		"ALTER ROLE "+d.Name+" SET lock_timeout = '100ms'",
		"ALTER ROLE "+d.Name+" SET idle_in_transaction_session_timeout = '100ms'")
}

// TestImportTimeouts imports users with statements that take longer than the statement_timeout of
// the role.
func TestImportTimeouts(t *testing.T) {
	t.Parallel()
	d, conn := newUserDatabase(t)
	limitRole(d)
	mustExec(t, conn, `
		CREATE FUNCTION delay() RETURNS trigger LANGUAGE plpgsql AS
			'BEGIN PERFORM pg_sleep(0.1); RETURN NEW; END';
		CREATE TRIGGER delay BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION delay();
		CREATE VIEW "user" AS SELECT n + 10 AS id, 'John' || pg_sleep(0.1) AS name, 'Doe' AS surname,
			'`+env.Secret+`' AS password, now() AS created_at, timestamptz '2020-01-01Z' AS updated_at
			FROM generate_series(1, 4) AS n`)
	input := hashedLines(4, false)
	transfer(t, d.URL, input, "import", "-").expect(t, 0, imported(4, 0, 0))
	transfer(t, d.URL, "", "import", "--predecessor").expect(t, 0, imported(4, 0, 0))
}

// TestImportWaitsForLock imports while another transaction locks the table for longer than the
// lock_timeout of the role.
func TestImportWaitsForLock(t *testing.T) {
	t.Parallel()
	const n = 20_000
	for name, ids := range map[string]bool{"with ids": true, "without ids": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, conn := newUserDatabase(t)
			limitRole(d)
			r := begin(t, d.URL, strings.NewReader(hashedLines(n, ids)), "import", "-")
			_, release := blockImport(t, conn)
			time.Sleep(500 * time.Millisecond)
			release()
			r.wait().expect(t, 0, imported(n, 0, 0))
		})
	}
}

// TestTransferAddedColumns imports and exports users in a table that has a column of every name that
// occurs in the program's statements for that.
func TestTransferAddedColumns(t *testing.T) {
	t.Parallel()
	d, conn := newUserDatabase(t)
	createPredecessor(t, conn)
	root, err := env.Root()
	if err != nil {
		t.Fatal(err)
	}
	var source []byte
	for _, name := range []string{"import.go", "transfer.go"} {
		content, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		source = append(source, content...)
	}
	own := strings.Fields("id name surname password version created_at updated_at")
	var names []string
	for _, text := range regexp.MustCompile("(?s)`.*?`|\".*?\"").FindAll(source, -1) {
		for _, word := range regexp.MustCompile(`[a-z_]+`).FindAll(bytes.ToLower(text), -1) {
			names = append(names, string(word))
		}
	}
	slices.Sort(names)
	added := 0
	for _, name := range slices.Compact(names) {
		if !slices.Contains(own, name) {
			mustExec(t, conn, `ALTER TABLE users ADD COLUMN "`+name+`" text`)
			added++
		}
	}
	if added < 100 || !slices.Contains(names, "expected") {
		t.Errorf("got %d names, want more: %s", added, names)
	}
	mustExec(t, conn, `INSERT INTO "user" (id, name, surname, password)
		VALUES (7, 'John', 'Doe', '`+env.Secret+`')`)
	for _, ids := range []bool{true, false} {
		input := hashedLines(3, ids)
		transfer(t, d.URL, input, "import", "--no-events", "-").expect(t, 0, imported(3, 0, 0))
		transfer(t, d.URL, input, "import", "-").expect(t, 0, imported(0, 3, 0))
	}
	transfer(t, d.URL, "", "import", "--predecessor").expect(t, 0, imported(1, 0, 0))
	mustExec(t, conn, `UPDATE "user" SET name = 'Jane', updated_at = '2040-01-01Z'`)
	transfer(t, d.URL, "", "import", "--predecessor").expect(t, 0, imported(1, 0, 0))
	transfer(t, d.URL, "", "export", "--password-hashes").expect(t, 0, exported(7))
}
