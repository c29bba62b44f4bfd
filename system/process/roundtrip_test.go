package process

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// insertUsers creates n users with hashes, versions, times and sparse ids.
func insertUsers(t *testing.T, conn *pgx.Conn, n int) {
	t.Helper()
	_, err := conn.Exec(t.Context(), `
		INSERT INTO users (id, name, surname, password, version, created_at, updated_at)
		SELECT n * 3, 'Jöhn "' || n || '" \', 'Doe 😀 <' || chr(8232) || n || '>',
			'$argon2id$v=19$m=7168,t=5,p=1$'
				|| rtrim(encode(decode(md5(n::text), 'hex'), 'base64'), '=')
				|| '$' || rtrim(encode(sha256(n::text::bytea), 'base64'), '='),
			1 + n % 5, '2020-01-01Z'::timestamptz + n * interval '1.000001 s',
			'2025-01-01Z'::timestamptz + n * interval '1 s'
		FROM generate_series(1, $1) AS n`, n)
	if err != nil {
		t.Fatal(err)
	}
}

func exported(users int) ending { return ending{Event: "Export finished", Users: users} }

// expectExport checks that lines are those of all users, in the order of ids.
func expectExport(t *testing.T, conn *pgx.Conn, lines []string) {
	t.Helper()
	got := queryValue[string](t, conn, `
		SELECT concat(count(line), ' of ', count(*), ' users')
		FROM (SELECT *, row_number() OVER (ORDER BY id) AS position FROM users) AS stored
		LEFT JOIN unnest($1::jsonb[]) WITH ORDINALITY AS exported (line, position)
			ON stored.position = exported.position AND (line->>'id')::bigint = id
			AND line->>'name' = name AND line->>'surname' = surname
			AND (line->>'version')::bigint = version AND line->>'password_hash' = password
			AND (line->>'created_at')::timestamptz = created_at
			AND (line->>'updated_at')::timestamptz = updated_at`, lines)
	if want := fmt.Sprintf("%d of %[1]d users", len(lines)); got != want {
		t.Errorf("the export has %s, want %s", got, want)
	}
}

// TestExport changes users while an export runs. It exports one snapshot, and hashes only if asked.
func TestExport(t *testing.T) {
	t.Parallel()
	const n = 20_000
	d, conn := newUserDatabase(t)
	insertUsers(t, conn, n)
	before := transfer(t, d.URL, "", "export", "--password-hashes")
	before.expect(t, 0, exported(n))
	expectExport(t, conn, strings.Split(strings.TrimSpace(before.output), "\n"))
	cmd := transferCommand(t, d.URL, "export")
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(output)
	first, err := reader.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	mustExec(t, conn, "UPDATE users SET surname = 'Roe'")
	mustExec(t, conn, "DELETE FROM users WHERE id % 2 = 0")
	mustExec(t, conn, "INSERT INTO users (id, name, surname, password) VALUES (1, 'J', 'D', '')")
	rest, err := io.ReadAll(reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	var want strings.Builder
	for line := range strings.Lines(before.output) {
		visible, _, _ := strings.Cut(line, `,"password_hash":`)
		want.WriteString(visible + "}\n")
	}
	got := first + string(rest)
	if got != want.String() {
		t.Errorf("got %d lines, not the %d of the snapshot without hashes",
			strings.Count(got, "\n"), n)
	}
}

// maxTransferMemory is the resident memory that import and export may have, in bytes.
const maxTransferMemory = 128 << 20

// peakMemory returns a function that waits for the end of a process and returns the largest resident
// memory that it had. (ru_maxrss includes memory of the parent process.)
func peakMemory(cmd *exec.Cmd) func() (bytes int64) {
	path := fmt.Sprintf("/proc/%d/status", cmd.Process.Pid)
	peak := make(chan int64)
	go func() {
		bytes := int64(0)
		for {
			status, _ := os.ReadFile(path)
			_, after, found := strings.Cut(string(status), "VmHWM:")
			if !found { // a zombie has no memory
				peak <- bytes
				return
			}
			kib, _ := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
			bytes = max(bytes, kib<<10)
			time.Sleep(10 * time.Millisecond)
		}
	}()
	return func() int64 { return <-peak }
}

// TestRoundTrip pipes an export into an import, and compares the exports of both databases. `make
// bench` sets TRANSFER_USERS to a million.
func TestRoundTrip(t *testing.T) {
	n, err := strconv.Atoi(cmp.Or(os.Getenv("TRANSFER_USERS"), "100000"))
	if err != nil {
		t.Fatal(err)
	}
	from, fromConn := newUserDatabase(t)
	to, toConn := newUserDatabase(t)
	insertUsers(t, fromConn, n)
	source := transferCommand(t, from.URL, "export", "--password-hashes")
	target := transferCommand(t, to.URL, "import", "-")
	var log strings.Builder
	target.Stderr = &log
	input, err := target.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	sent, received := sha256.New(), sha256.New()
	source.Stdout = io.MultiWriter(sent, input)
	if err := cmp.Or(source.Start(), target.Start()); err != nil {
		t.Fatal(err)
	}
	sourceMemory, targetMemory := peakMemory(source), peakMemory(target)
	peaks := []int64{sourceMemory()}
	err = source.Wait()
	input.Close()
	peaks = append(peaks, targetMemory())
	if err := cmp.Or(err, target.Wait()); err != nil {
		t.Error(err)
	}
	transferred{0, "", log.String()}.expect(t, 0, imported(n, 0, 0))
	t.Logf("peak memory of export and import: %d MiB", []int64{peaks[0] >> 20, peaks[1] >> 20})
	if max(peaks[0], peaks[1]) >= maxTransferMemory || min(peaks[0], peaks[1]) == 0 {
		t.Errorf("got %d bytes of memory, want less than %d", peaks, maxTransferMemory)
	}
	again := transferCommand(t, to.URL, "export", "--password-hashes")
	again.Stdout = received
	finish(t, again).expect(t, 0, exported(n))
	if string(sent.Sum(nil)) != string(received.Sum(nil)) {
		t.Error("the exports differ")
	}
	expectComplete(t, toConn, n)
}
