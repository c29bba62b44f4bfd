package process

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"user-service/system/env"
)

// running is a command import or export that has not ended.
type running struct {
	*exec.Cmd
	output, log *bytes.Buffer
}

// begin starts import or export with this standard input.
func begin(t *testing.T, databaseURL string, input io.Reader, args ...string) running {
	t.Helper()
	cmd := transferCommand(t, databaseURL, args...)
	r := running{cmd, &bytes.Buffer{}, &bytes.Buffer{}}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = input, r.output, r.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return r
}

// end sends a signal and waits for the end.
func (r running) end(t *testing.T, signal os.Signal) transferred {
	t.Helper()
	if err := r.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
	return r.wait()
}

// wait waits for the end.
func (r running) wait() transferred {
	r.Wait() // the exit code tells
	return transferred{r.ProcessState.ExitCode(), r.output.String(), r.log.String()}
}

// ended returns a channel that receives the result after the end.
func (r running) ended() chan transferred {
	ended := make(chan transferred, 1)
	go func() { ended <- r.wait() }()
	return ended
}

// openInput returns a standard input that has these lines and does not end before the test.
func openInput(t *testing.T, lines string) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	go io.WriteString(w, lines)
	return r
}

// blockImport waits until an import has created users, and then blocks its next transactions until
// release is called. It returns how many users there are.
func blockImport(t *testing.T, conn *pgx.Conn) (n int, release func()) {
	t.Helper()
	env.Eventually(t, "the first imported users", func() bool {
		return queryValue[bool](t, conn, "SELECT EXISTS (SELECT FROM users)")
	})
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	mustExec(t, conn, "LOCK TABLE users IN SHARE MODE")
	env.Eventually(t, "a transaction that waits", func() bool {
		return queryValue[bool](t, conn, `SELECT EXISTS (
			SELECT FROM pg_locks WHERE relation = 'users'::regclass AND NOT granted)`)
	})
	return queryValue[int](t, conn, "SELECT count(*) FROM users"), func() {
		t.Helper()
		if err := tx.Rollback(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestImportInterrupted ends imports between their transactions. A second run completes them.
func TestImportInterrupted(t *testing.T) {
	t.Parallel()
	const n = 20_000
	for name, ids := range map[string]bool{"with ids": true, "without ids": false} {
		for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGINT, syscall.SIGTERM} {
			t.Run(name+", "+signal.String(), func(t *testing.T) {
				t.Parallel()
				d, conn := newUserDatabase(t)
				input := hashedLines(n, ids)
				first := begin(t, d.URL, openInput(t, input), "import", "-")
				before, release := blockImport(t, conn)
				if err := first.Process.Signal(signal); err != nil {
					t.Fatal(err)
				}
				if signal == syscall.SIGKILL {
					first.wait()
					release()
				} else {
					release() // the import waits for its transactions
					r := first.wait()
					after := queryValue[int](t, conn, "SELECT count(*) FROM users")
					expectInterrupted(t, r, "Import", after)
					if after == before {
						t.Error("the import does not finish its transactions")
					}
				}
				expectSecond(t, transfer(t, d.URL, input, "import", "-"), n)
				expectComplete(t, conn, n)
			})
		}
	}
}

// TestImportSimultaneous imports one file twice at the same time, and another one beside it.
func TestImportSimultaneous(t *testing.T) {
	t.Parallel()
	const n = 5000
	d, conn := newUserDatabase(t)
	same := hashedLines(n, false)
	other := strings.ReplaceAll(same, `"name":"John`, `"name":"Jane`)
	var ended []chan transferred
	for _, input := range []string{same, same, other} {
		ended = append(ended, begin(t, d.URL, strings.NewReader(input), "import", "-").ended())
	}
	created := 0
	for _, ended := range ended[:2] {
		r := <-ended
		got := r.ending(t).Users
		r.expect(t, 0, imported(got, n-got, 0))
		created += got
	}
	(<-ended[2]).expect(t, 0, imported(n, 0, 0))
	if created != n {
		t.Errorf("both imports created %d users, want %d", created, n)
	}
	expectComplete(t, conn, 2*n)
}

// TestImportDeleted imports lines without ids again after some users were deleted. They are created
// with new ids.
func TestImportDeleted(t *testing.T) {
	t.Parallel()
	d, conn := newUserDatabase(t)
	input := hashedLines(5, false)
	transfer(t, d.URL, input, "import", "-").expect(t, 0, imported(5, 0, 0))
	mustExec(t, conn, "DELETE FROM users WHERE id IN (2, 5)")
	transfer(t, d.URL, input, "import", "-").expect(t, 0, imported(2, 3, 0))
	transfer(t, d.URL, input, "import", "-").expect(t, 0, imported(0, 5, 0))
	got := queryValue[string](t, conn, `SELECT string_agg(name, ', ' ORDER BY id) FROM users
		WHERE id NOT IN (2, 5)`)
	if want := "John 1, John 3, John 4, John 2, John 5"; got != want {
		t.Errorf("got %s without the ids 2 and 5, want %s", got, want)
	}
}

// TestPredecessorInterrupted ends the import while it hashes the second page of users. Most users of
// the first page are here already, so it is done before.
func TestPredecessorInterrupted(t *testing.T) {
	t.Parallel()
	const here, first, n = 950, 1000, 1250
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGINT} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			d, conn := newUserDatabase(t)
			createPredecessor(t, conn)
			mustExec(t, conn, fmt.Sprintf(`INSERT INTO "user" (name, surname, password)
				SELECT 'John ' || n, 'Doe', '%s' FROM generate_series(1, %d) AS n`, env.Secret, n))
			mustExec(t, conn, fmt.Sprintf(`
				INSERT INTO users (id, name, surname, password, created_at, updated_at)
				SELECT id, name, surname, '', created_at, updated_at
				FROM "user" WHERE id <= %d`, here))
			old := oldUsers(t, conn)
			command := begin(t, d.URL, nil, "import", "--predecessor")
			env.Eventually(t, "the first page", func() bool {
				return queryValue[bool](t, conn, "SELECT count(*) >= $1 FROM users", first)
			})
			r := command.end(t, signal)
			if refused := r.refusals(t); len(refused) > 0 {
				t.Errorf("got %d refused users, want none: %s ...", len(refused), refused[0])
			}
			if signal == syscall.SIGINT {
				r.log = r.log[strings.LastIndex(r.log, `{"timestamp":`):]
				r.expect(t, 1, ending{Event: "Import interrupted", Users: first - here, Unchanged: here,
					Remedy: "run the same command again"})
			}
			r = transfer(t, d.URL, "", "import", "--predecessor")
			r.expect(t, 0, imported(n-first, first, 0))
			expectComplete(t, conn, n)
			if oldUsers(t, conn) != old {
				t.Error("the old table has changed")
			}
		})
	}
}

// expectSecond checks that an import has completed an earlier one.
func expectSecond(t *testing.T, r transferred, users int) {
	t.Helper()
	got := r.ending(t)
	r.expect(t, 0, imported(got.Users, users-got.Users, 0))
	if got.Users == 0 || got.Users == users {
		t.Errorf("got %d users in the second import, want some", got.Users)
	}
}

// expectInterrupted checks that a command has ended after SIGINT, and says how to continue.
func expectInterrupted(t *testing.T, r transferred, what string, users int) {
	t.Helper()
	r.expect(t, 1, ending{Event: what + " interrupted", Users: users,
		Remedy: "run the same command again"})
}

// TestImportInterruptedIdle ends an import whose standard input has no data.
func TestImportInterruptedIdle(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		lines string
		users int
	}{
		"before the first line":  {"", 0},
		"after a complete batch": {hashedLines(1000, true) + "{", 1000},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, conn := newUserDatabase(t)
			r := begin(t, d.URL, openInput(t, test.lines), "import", "-")
			env.Eventually(t, "the users before the signal", func() bool {
				return queryValue[bool](t, conn, `SELECT count(*) = $1
					AND EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
						AND application_name = 'user-service')
					FROM users`, test.users)
			})
			expectInterrupted(t, r.end(t, syscall.SIGINT), "Import", test.users)
		})
	}
}

// TestExportInterrupted ends an export whose output is not read for a while. The next one is
// complete.
func TestExportInterrupted(t *testing.T) {
	t.Parallel()
	d, conn := newUserDatabase(t)
	insertUsers(t, conn, 20_000)
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGINT} {
		cmd := transferCommand(t, d.URL, "export")
		var log bytes.Buffer
		cmd.Stderr = &log
		output, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := bufio.NewReader(output).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		cmd.Process.Signal(signal)
		io.Copy(io.Discard, output)
		cmd.Wait()
		r := transferred{cmd.ProcessState.ExitCode(), "", log.String()}
		if signal == syscall.SIGINT {
			expectInterrupted(t, r, "Export", r.ending(t).Users)
		}
		complete := transfer(t, d.URL, "", "export")
		complete.expect(t, 0, exported(20_000))
		if n := strings.Count(complete.output, "\n"); n != 20_000 {
			t.Errorf("after %v: got %d lines, want 20000", signal, n)
		}
	}
}

// TestTransferCounts starts the service after an interrupted import. Its total is exact, and it
// has nothing to repair.
func TestTransferCounts(t *testing.T) {
	t.Parallel()
	d, conn := newUserDatabase(t)
	input := hashedLines(20_000, false)
	first := begin(t, d.URL, openInput(t, input), "import", "-")
	_, release := blockImport(t, conn)
	first.end(t, syscall.SIGKILL)
	release()
	expectSecond(t, transfer(t, d.URL, input, "import", "-"), 20_000)
	p := testEnv.StartProgram(t, "DATABASE_URL="+d.URL)
	if got := fmt.Sprint(p.Do("GET", "/users", "").JSON(t, "total")); got != "20000" {
		t.Errorf("got the total %s, want 20000", got)
	}
	if lines := p.Lines("Database repaired"); len(lines) > 0 {
		t.Errorf("the start repairs: %v", lines)
	}
}
