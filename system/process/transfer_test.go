package process

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"golang.org/x/crypto/bcrypt"

	"user-service/system/env"
)

// transferCommand returns the command import or export on a database, in an empty directory.
func transferCommand(t *testing.T, databaseURL string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := testEnv.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Dir, cmd.Env = t.TempDir(), []string{"DATABASE_URL=" + databaseURL}
	return cmd
}

// transferred is a command import or export that has ended.
type transferred struct {
	code        int
	output, log string // standard output and standard error
}

// transfer runs import or export to its end.
func transfer(t *testing.T, databaseURL, input string, args ...string) transferred {
	t.Helper()
	cmd := transferCommand(t, databaseURL, args...)
	cmd.Stdin = strings.NewReader(input)
	return finish(t, cmd)
}

// finish runs a command to its end.
func finish(t *testing.T, cmd *exec.Cmd) transferred {
	t.Helper()
	var output, log bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &output
	}
	cmd.Stderr = &log
	var failure *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &failure) {
		t.Fatal(err)
	}
	return transferred{cmd.ProcessState.ExitCode(), output.String(), log.String()}
}

// ending is the last line on standard error.
type ending struct {
	Event                     string
	Users, Unchanged, Refused int
	Remedy, Error             string
}

func (r transferred) ending(t *testing.T) (last ending) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(r.log, "\n"), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil {
		t.Errorf("the last line on standard error: %v", err)
	}
	return last
}

// expect checks the exit code and the last line on standard error. No output has a password, and
// that of import is empty.
func (r transferred) expect(t *testing.T, code int, want ending) {
	t.Helper()
	got := r.ending(t)
	if r.code != code || got != want {
		t.Errorf("got exit code %d and %+v, want %d and %+v\n%s", r.code, got, code, want, r.log)
	}
	if strings.Contains(r.log, env.Secret) || strings.Contains(r.log, "$argon2id$") {
		t.Errorf("standard error has a password or a hash:\n%s", r.log)
	}
	if strings.HasPrefix(want.Event, "Import") && r.output != "" {
		t.Errorf("got on standard output, want nothing: %s", r.output)
	}
}

func imported(users, unchanged, refused int) ending {
	return ending{Event: "Import finished", Users: users, Unchanged: unchanged, Refused: refused}
}

// refusals returns the lines about refused users, in the order of their lines or ids.
func (r transferred) refusals(t *testing.T) (lines []string) {
	t.Helper()
	number := func(line string) (n json.Number) {
		var refused struct{ Line, ID json.Number }
		if err := json.Unmarshal([]byte(line), &refused); err != nil {
			t.Errorf("standard error has a line that is not JSON: %v: %s", err, line)
		}
		return refused.Line + refused.ID
	}
	for line := range strings.Lines(r.log) {
		if !strings.HasPrefix(line, `{"timestamp":`) {
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
	}
	slices.SortStableFunc(lines, func(a, b string) int {
		left, _ := number(a).Int64()
		right, _ := number(b).Int64()
		return int(left - right)
	})
	return lines
}

// expectLines checks texts of several lines, and shows those that differ.
func expectLines(t *testing.T, what string, got, want []string) {
	t.Helper()
	for i := range max(len(got), len(want)) {
		left, right := "nothing", "nothing"
		if i < len(got) {
			left = got[i]
		}
		if i < len(want) {
			right = want[i]
		}
		if left != right {
			t.Errorf("%s, line %d:\ngot  %s\nwant %s", what, i+1, left, right)
		}
	}
}

// newUserDatabase returns a database with an empty table users, and a connection to it.
func newUserDatabase(t *testing.T) (*env.Database, *pgx.Conn) {
	t.Helper()
	d := env.NewDatabase(t)
	transfer(t, d.URL, "", "import", "-").expect(t, 0, imported(0, 0, 0))
	return d, d.Connect()
}

// users returns the users of a database, in the order of ids.
func users(t *testing.T, conn *pgx.Conn) []string {
	t.Helper()
	rows, _ := conn.Query(t.Context(), `
		SELECT concat_ws('|', id, name, surname, version, created_at AT TIME ZONE 'UTC',
			updated_at AT TIME ZONE 'UTC')
		FROM users ORDER BY id`)
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// state returns a digest of the users and their events.
func state(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	return queryValue[string](t, conn, `
		SELECT concat(md5(string_agg(users::text, ',' ORDER BY id)), (SELECT
			md5(string_agg(outbox::text, ',' ORDER BY id)) FROM outbox), (SELECT sum(n) FROM user_counts))
		FROM users`)
}

// expectComplete checks that each of n different users exists once, has one event user.created with
// its version, and is part of the total.
func expectComplete(t *testing.T, conn *pgx.Conn, n int) {
	t.Helper()
	got := queryValue[string](t, conn, `SELECT concat_ws(', ',
		(SELECT count(*) || ' users' FROM users), (SELECT count(DISTINCT name) || ' names' FROM users),
		(SELECT sum(n) || ' in total' FROM user_counts), (SELECT count(*) || ' events' FROM outbox),
		(SELECT count(DISTINCT users.id) || ' users with theirs' FROM users JOIN outbox
			ON user_id = users.id AND outbox.version = users.version AND event_type = 'user.created'))`)
	want := fmt.Sprintf("%d users, %d names, %d in total, %d events, %d users with theirs", n, n, n, n, n)
	if got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

// hashedLines returns lines for n users with hashes of another system, with the ids from 1 to n or
// without ids.
func hashedLines(n int, ids bool) string {
	var lines strings.Builder
	for i := 1; i <= n; i++ {
		lines.WriteByte('{')
		if ids {
			fmt.Fprintf(&lines, `"id":%d,`, i)
		}
		key := base64.RawStdEncoding.EncodeToString(fmt.Appendf(nil, "%012d", i))
		fmt.Fprintf(&lines, `"name":"John %d","surname":"Doe",`+
			`"password_hash":"$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$%s"}`+"\n", i, key)
	}
	return lines.String()
}

func TestTransferRefusesArguments(t *testing.T) {
	t.Parallel()
	const unused = "postgres://127.0.0.1:1/unused"
	usage, missing := "usage: import [--no-events] FILE", "DATABASE_URL"
	for _, test := range []struct{ args, url, want string }{
		{"import", unused, usage},
		{"import a b", unused, usage},
		{"import - -", unused, usage},
		{"import --no-events", unused, usage},
		{"import --predecessor a", unused, usage},
		{"import a --predecessor", unused, usage},
		{"import --no-event a", unused, usage},
		{"import --password-hashes a", unused, usage},
		{"export a", unused, usage},
		{"export -", unused, usage},
		{"export --no-events", unused, usage},
		{"export --predecessor", unused, usage},
		{"export --password-hashes a", unused, usage},
		{"import -", "", missing},
		{"import --predecessor", "", missing},
		{"export", "", missing},
		{"export", "mysql://h/d", "DATABASE_URL must be"},
	} {
		r := transfer(t, test.url, "", strings.Fields(test.args)...)
		if r.code != 2 || r.output != "" || strings.Count(r.log, "\n") != 1 ||
			!strings.Contains(r.log, test.want) {
			t.Errorf("%s with DATABASE_URL=%s: got exit code %d\n%s%s\nwant 2 and one line with %q",
				test.args, test.url, r.code, r.output, r.log, test.want)
		}
	}
}

func TestImportCannotRead(t *testing.T) {
	t.Parallel()
	d, conn := newUserDatabase(t)
	for _, name := range []string{"missing", "."} {
		r := transfer(t, d.URL, "", "import", name)
		if r.code != 1 || !strings.Contains(r.log, `"event":"Import failed"`) {
			t.Errorf("%s: got exit code %d and %s\nwant 1 and an error", name, r.code, r.log)
		}
	}
	r := transfer(t, d.URL, "", "import", "--predecessor")
	if r.code != 1 || !strings.Contains(r.log, `reading the table \"user\"`) {
		t.Errorf("without a predecessor: got exit code %d and %s\nwant 1 and an error", r.code, r.log)
	}
	expectLines(t, "the users", users(t, conn), nil)
}

// Parts of lines, and the reasons of refusals.
const (
	linePassword = `"password":"` + env.Secret + `"`
	lineRest     = `"surname":"Doe",` + linePassword
	lineDoe      = `"name":"John",` + lineRest
	notPositive  = "must be an integer from 1 to 9223372036854775807"
	notName      = "must have 1 to 255 characters, not counting white space at the ends"
	notPassword  = "must have 8 to 128 characters"
	notHash      = "must be a hash of argon2id, bcrypt or PBKDF2, within the bounds that docs/takeover.md lists"
	notTime      = "must be a time such as 2026-01-01T12:00:00.123456Z"
	notKnown     = "is unknown; the fields are created_at, id, name, password, password_hash, surname, " +
		"updated_at, version"
	lineFirst, lineSecond = `"created_at":"2026-01-01T00:00:00Z"`, `"updated_at":"2026-02-01T00:00:00Z"`
	lineTimes             = "2026-01-01 00:00:00|2026-02-01 00:00:00"
)

var longName = strings.Repeat("é", 255)

// importLines are lines of one file, with the refusal or the user that each makes.
var importLines = []struct{ line, field, reason, user string }{
	{line: "\ufeff" + `{"id":1,` + lineDoe + `,` + lineFirst + `,` + lineSecond + "}\r",
		user: "1|John|Doe|1|" + lineTimes},
	{line: ""}, {line: " \t\r"},
	{line: `{"id":2,"name":" \u00a0J d\u3000","surname":"\tDoe\n","version":7,` + linePassword + `,` +
		lineFirst + `,` + lineSecond + `}`, user: "2|J d|Doe|7|" + lineTimes},
	{line: `{"id":3,` + lineDoe + `,"created_at":"2026-01-01T05:30:00.123456999+05:30",` +
		`"updated_at":"2026-01-31T14:00:00.1-10:00"}`,
		user: "3|John|Doe|1|2026-01-01 00:00:00.123456|2026-02-01 00:00:00.1"},
	{line: `{"id":4,` + lineDoe + `,` + lineFirst + `}`,
		user: "4|John|Doe|1|2026-01-01 00:00:00|2026-01-01 00:00:00"},
	{line: `{"id":5,` + lineDoe + `,` + lineSecond + `}`,
		user: "5|John|Doe|1|2026-02-01 00:00:00|2026-02-01 00:00:00"},
	{line: `  {"id":6,"name":"` + longName + `",` + lineRest + `,` + lineFirst + `,` + lineSecond + `}  `,
		user: "6|" + longName + "|Doe|1|" + lineTimes},
	{line: `{"id":7,"name":"\ud83d\ude00",` + lineRest + `,` + lineFirst + `,` + lineSecond + `}`,
		user: "7|😀|Doe|1|" + lineTimes},
	{line: `{"id":9223372036854775807,` + lineDoe + `,` + lineFirst + `,` + lineSecond + `}`,
		user: "9223372036854775807|John|Doe|1|" + lineTimes},

	{line: `x`, reason: "must be a JSON object, but is not valid JSON"},
	{line: `[1]`, reason: "must be a JSON object, but is an array"},
	{line: `null`, reason: "must be a JSON object, but is null"},
	{line: `{` + lineDoe, reason: "must be a JSON object, but is not valid JSON"},
	{line: `{` + lineDoe + `}{}`, reason: "must be a JSON object, but more follows the object"},
	{line: "\ufeff" + `{` + lineDoe + `}`, reason: "must be a JSON object, but is not valid JSON"},
	{line: `{` + lineDoe + `,"x":"` + strings.Repeat("x", 64<<10) + `"}`,
		reason: "must not be longer than 65536 bytes"},
	{line: `{}`, field: "name", reason: "is required"},
	{line: `{"name":"John",` + linePassword + `}`, field: "surname", reason: "is required"},
	{line: `{"name":"John","surname":"Doe"}`, field: "password",
		reason: "is required, or password_hash instead"},
	{line: `{` + lineDoe + `,"password_hash":"$2b$10$` + strings.Repeat("a", 53) + `"}`,
		field: "password", reason: "must not be given together with password_hash"},
	{line: `{` + lineDoe + `,"Name":"John"}`, field: "Name", reason: notKnown},
	{line: `{` + lineDoe + `,"` + strings.Repeat("x", 200) + `":1}`,
		field: strings.Repeat("x", 100), reason: notKnown},
	{line: `{` + lineDoe + `,"name":"John"}`, field: "name", reason: "must be given once"},
	{line: `{"name":null,` + lineRest + `}`, field: "name", reason: "must be a string, not null"},
	{line: `{"name":1,` + lineRest + `}`, field: "name", reason: "must be a string"},
	{line: "{\"name\":\"\xff\"," + lineRest + `}`, field: "name", reason: "must be valid UTF-8"},
	{line: `{"name":"\ud83d",` + lineRest + `}`, field: "name",
		reason: "must not contain half of a surrogate pair"},
	{line: `{"name":"\u0000",` + lineRest + `}`, field: "name",
		reason: "must not contain a NUL character"},
	{line: `{"name":"\u3000",` + lineRest + `}`, field: "name", reason: notName},
	{line: `{"name":"` + longName + `e",` + lineRest + `}`, field: "name", reason: notName},
	{line: `{"name":"a\tb",` + lineRest + `}`, field: "name",
		reason: "must not contain control characters"},
	{line: `{"name":"John","surname":"Doe","password":"1234567"}`, field: "password",
		reason: notPassword},
	{line: `{"name":"John","surname":"Doe","password":"` + strings.Repeat("é", 129) + `"}`,
		field: "password", reason: notPassword},
	{line: `{"name":"John","surname":"Doe","password_hash":"` + env.Secret + `"}`,
		field: "password_hash", reason: notHash},
	{line: `{"name":"John","surname":"Doe","password_hash":"$2b$15$` +
		strings.Repeat("a", 53) + `"}`, field: "password_hash", reason: notHash},
	{line: `{"id":0,` + lineDoe + `}`, field: "id", reason: notPositive},
	{line: `{"id":-1,` + lineDoe + `}`, field: "id", reason: notPositive},
	{line: `{"id":1.0,` + lineDoe + `}`, field: "id", reason: notPositive},
	{line: `{"id":"1",` + lineDoe + `}`, field: "id", reason: notPositive},
	{line: `{"id":null,` + lineDoe + `}`, field: "id", reason: notPositive},
	{line: `{"id":9223372036854775808,` + lineDoe + `}`, field: "id", reason: notPositive},
	{line: `{"version":0,` + lineDoe + `}`, field: "version", reason: notPositive},
	{line: `{"created_at":"2026-01-01",` + lineDoe + `}`, field: "created_at", reason: notTime},
	{line: `{"created_at":"2026-02-30T00:00:00Z",` + lineDoe + `}`, field: "created_at",
		reason: notTime},
	{line: `{"updated_at":1,` + lineDoe + `}`, field: "updated_at", reason: "must be a string"},
	{line: `{"updated_at":"0000-12-31T00:00:00Z",` + lineDoe + `}`, field: "updated_at",
		reason: notTime},
	{line: `{"id":1,"name":"Jane",` + lineRest + `}`, field: "id",
		reason: "the user with id 1 exists and has other content"},
	{line: `{"id":8,` + lineDoe + `,` + lineFirst + `,` + lineSecond + `}`,
		user: "8|John|Doe|1|" + lineTimes}, // without a newline
}

// TestImportLines imports good and bad lines of one file. The last line has no newline.
func TestImportLines(t *testing.T) {
	t.Parallel()
	var input, refused, created []string
	for i, line := range importLines {
		input = append(input, line.line)
		if line.user != "" {
			created = append(created, line.user)
		}
		field := ""
		if line.field != "" {
			field = fmt.Sprintf(`"field":%q,`, line.field)
		}
		if line.reason != "" {
			refused = append(refused,
				fmt.Sprintf(`{"line":%d,%s"reason":%q}`, i+1, field, line.reason))
		}
	}
	slices.SortFunc(created, func(a, b string) int {
		a, _, _ = strings.Cut(a, "|")
		b, _, _ = strings.Cut(b, "|")
		return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
	})
	d, conn := newUserDatabase(t)
	r := transfer(t, d.URL, strings.Join(input, "\n"), "import", "-")
	r.expect(t, 1, imported(len(created), 0, len(refused)))
	expectLines(t, "standard error", r.refusals(t), refused)
	expectLines(t, "the users", users(t, conn), created)
}

// TestImportSameID imports several lines with the same id in one file. The first one counts.
func TestImportSameID(t *testing.T) {
	t.Parallel()
	for name, password := range map[string]string{
		"passwords": linePassword,
		"hashes":    `"password_hash":"$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$MDAwMDAwMDAwMDAx"`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			john := `{"id":5,"name":"John","surname":"Doe",` + password + "}\n"
			jane := strings.Replace(john, "John", "Jane", 1)
			d, conn := newUserDatabase(t)
			r := transfer(t, d.URL, john+jane+john, "import", "-")
			r.expect(t, 1, imported(1, 1, 1))
			expectLines(t, "standard error", r.refusals(t),
				[]string{`{"line":2,"field":"id",` +
					`"reason":"the user with id 5 exists and has other content"}`})
			expectComplete(t, conn, 1)
			if got := users(t, conn); !strings.HasPrefix(got[0], "5|John|Doe|1|") {
				t.Errorf("got the user %s, want that of the first line", got)
			}
		})
	}
}

// TestImportRepeated imports a file twice, and the second time nothing changes.
func TestImportRepeated(t *testing.T) {
	t.Parallel()
	bcrypted, err := bcrypt.GenerateFromPassword([]byte(env.Secret), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	for name, id := range map[string]string{"with ids": `"id":%d,`, "without ids": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var lines []string
			for i, password := range []string{linePassword, `"password":"a\u0308` + env.Secret + `"`,
				`"password_hash":"` + string(bcrypted) + `"`, `"version":3,` + linePassword,
				linePassword + `,` + lineFirst + `,` + lineSecond} {
				given := strings.ReplaceAll(id, "%d", fmt.Sprint(i+1))
				lines = append(lines,
					fmt.Sprintf(`{%s"name":"John %d","surname":"Doe",%s}`, given, i, password))
			}
			d, conn := newUserDatabase(t)
			input := strings.Join(lines, "\n")
			transfer(t, d.URL, input, "import", "-").expect(t, 0, imported(5, 0, 0))
			expectComplete(t, conn, 5)
			before := state(t, conn)
			transfer(t, d.URL, input, "import", "-").expect(t, 0, imported(0, 5, 0))
			if after := state(t, conn); after != before {
				t.Error("the second import changes something")
			}
			verifyAll(t, d, conn)
			before = state(t, conn)
			transfer(t, d.URL, input, "import", "-").expect(t, 0, imported(0, 5, 0))
			if after := state(t, conn); after != before {
				t.Error("the import after the verification changes something")
			}
			changed := strings.ReplaceAll(input, env.Secret, "another "+env.Secret)
			if id != "" {
				changed = strings.ReplaceAll(changed, `"surname":"Doe"`, `"surname":"Roe"`)
			}
			want := map[bool]ending{true: imported(0, 0, 5), false: imported(0, 1, 4)}[id != ""]
			transfer(t, d.URL, changed, "import", "-").expect(t, 1, want)
			if after := state(t, conn); after != before {
				t.Error("changed lines change something")
			}
		})
	}
}

// verifyAll verifies the password of each user through the API, which replaces the hashes of other
// systems.
func verifyAll(t *testing.T, d *env.Database, conn *pgx.Conn) {
	t.Helper()
	p := testEnv.StartProgram(t, "DATABASE_URL="+d.URL)
	for _, user := range users(t, conn) {
		id, _, _ := strings.Cut(user, "|")
		verify := func(prefix string) bool {
			body := fmt.Sprintf(`{"password":"%s%s"}`, prefix, env.Secret)
			return p.Do("POST", "/users/"+id+"/password/verify", body).JSON(t, "valid") == true
		}
		if !verify("") && !verify(`\u00e4`) {
			t.Errorf("user %s cannot log in", user)
		}
	}
	env.Eventually(t, "an empty outbox", func() bool {
		return queryValue[int](t, conn, "SELECT count(*) FROM outbox") == 0
	})
	if n := queryValue[int](t, conn, "SELECT count(*) FROM users WHERE password LIKE '$2_$%'"); n > 0 {
		t.Errorf("got %d hashes of another system, want none", n)
	}
	p.Stop()
}

func TestImportEvents(t *testing.T) {
	t.Parallel()
	input := hashedLines(2500, true) + `{"id":2501,"version":7,` + lineDoe + "}\n"
	for name, test := range map[string]struct {
		args   []string
		events int
	}{
		"with events":    {[]string{"import", "-"}, 2501},
		"without events": {[]string{"import", "--no-events", "-"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, conn := newUserDatabase(t)
			mustExec(t, conn, `SET user_service.trace_id = 'other'`) // that event stays
			mustExec(t, conn, `INSERT INTO users (id, name, surname, password)
				VALUES (5000, 'J', 'D', '')`)
			transfer(t, d.URL, input, test.args...).expect(t, 0, imported(2501, 0, 0))
			got := queryValue[string](t, conn, `SELECT concat_ws(' ', count(*), count(DISTINCT user_id),
				count(*) FILTER (WHERE version = CASE user_id WHEN 2501 THEN 7 ELSE 1 END),
				count(DISTINCT trace_id)) FROM outbox WHERE event_type = 'user.created'
				AND trace_id <> 'other'`)
			want := fmt.Sprint(test.events, test.events, test.events, min(test.events, 1))
			if got != want {
				t.Errorf("got %s (events, users, right versions, trace ids), want %s", got, want)
			}
			n := queryValue[int](t, conn, "SELECT count(*) FROM outbox WHERE trace_id = 'other'")
			if n != 1 {
				t.Error("the event of another change is gone")
			}
			if n := queryValue[int](t, conn, "SELECT sum(n) FROM user_counts"); n != 2502 {
				t.Errorf("got the total %d, want 2502", n)
			}
		})
	}
}

// TestImportFile imports a file by its name.
func TestImportFile(t *testing.T) {
	t.Parallel()
	d, conn := newUserDatabase(t)
	path := filepath.Join(t.TempDir(), "users.jsonl")
	if err := os.WriteFile(path, []byte(hashedLines(10, false)), 0o600); err != nil {
		t.Fatal(err)
	}
	transfer(t, d.URL, "", "import", path).expect(t, 0, imported(10, 0, 0))
	expectComplete(t, conn, 10)
}
