package process

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"user-service/system/env"
)

// createPredecessor creates the table of the predecessor as SQLAlchemy does.
func createPredecessor(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	mustExec(t, conn, `CREATE TABLE "user" (
		id BIGSERIAL NOT NULL,
		name VARCHAR NOT NULL,
		surname VARCHAR NOT NULL,
		password VARCHAR NOT NULL,
		created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
		updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
		PRIMARY KEY (id)
	)`)
}

// oldUsers returns a digest of the predecessor's table.
func oldUsers(t *testing.T, conn *pgx.Conn) string {
	t.Helper()
	return queryValue[string](t, conn, `
		SELECT md5(string_agg("user"::text, ',' ORDER BY id)) FROM "user"`)
}

// predecessorRows are users of the predecessor, with the refusal or the name and surname here.
var predecessorRows = []struct {
	id                             int64
	name, surname, password, times string // times: created_at, a comma and updated_at
	field, reason, user            string
}{
	{id: 1, user: "John|Doe"},
	{id: 2, times: "2020-01-01 00:00:00.123456+02,2021-01-01 00:00:00-11", user: "John|Doe"},
	{id: 3, name: " \u00a0John\t", surname: "\u3000Doe\n", user: "John|Doe"},
	{id: 4, name: "Jo\u0308rg", surname: "J\u00f6rg", password: "a\u0308" + env.Secret,
		user: "Jo\u0308rg|J\u00f6rg"},
	{id: 5, name: strings.Repeat("é", 255), user: strings.Repeat("é", 255) + "|Doe"},
	{id: 6, password: "x", user: "John|Doe"},
	{id: 7, password: strings.Repeat("é", 128), user: "John|Doe"},
	{id: 8, password: "  " + env.Secret + "\t", user: "John|Doe"},
	{id: 1 << 40, user: "John|Doe"},
	{id: 1<<63 - 2, user: "John|Doe"},
	{id: 1<<63 - 1, user: "John|Doe"},

	{id: -1 << 63, reason: "must have an id of 1 or more"},
	{id: -5, reason: "must have an id of 1 or more"},
	{id: 0, reason: "must have an id of 1 or more"},
	{id: 20, name: "-", field: "name", reason: notName},
	{id: 21, name: " \u3000\t", field: "name", reason: notName},
	{id: 22, name: strings.Repeat("é", 256), field: "name", reason: notName},
	{id: 23, surname: "-", field: "surname", reason: notName},
	{id: 24, surname: "D\toe", field: "surname", reason: "must not contain control characters"},
	{id: 25, name: "Jo\u0085hn", field: "name", reason: "must not contain control characters"},
	{id: 26, password: "-", field: "password", reason: "must have 1 to 128 characters"},
	{id: 27, password: strings.Repeat("é", 129), field: "password",
		reason: "must have 1 to 128 characters"},
	{id: 28, times: "infinity,2021-01-01Z", reason: "must have times in the years 1 to 9999"},
	{id: 29, times: "2021-01-01Z,infinity", reason: "must have times in the years 1 to 9999"},
	{id: 30, times: "-infinity,2021-01-01Z", reason: "must have times in the years 1 to 9999"},
	{id: 31, times: "0044-03-15 BC,2021-01-01Z", reason: "must have times in the years 1 to 9999"},
}

// insertOldUsers inserts predecessorRows. There, "" means a usual value and "-" an empty one.
func insertOldUsers(t *testing.T, conn *pgx.Conn) (refusals, created []string) {
	t.Helper()
	value := func(given, usual string) string {
		return map[string]string{"": usual, "-": ""}[given] + strings.TrimPrefix(given, "-")
	}
	for _, row := range predecessorRows {
		createdAt, updatedAt, _ := strings.Cut(value(row.times, "2020-01-01Z,2021-01-01Z"), ",")
		_, err := conn.Exec(t.Context(), `INSERT INTO "user"
			VALUES ($1, $2, $3, $4, $5::text::timestamptz, $6::text::timestamptz)`, row.id,
			value(row.name, "John"), value(row.surname, "Doe"), value(row.password, env.Secret),
			createdAt, updatedAt)
		if err != nil {
			t.Fatal(err)
		}
		field := ""
		if row.field != "" {
			field = fmt.Sprintf(`"field":%q,`, row.field)
		}
		if row.reason != "" {
			refusals = append(refusals,
				fmt.Sprintf(`{"id":%d,%s"reason":%q}`, row.id, field, row.reason))
		} else {
			created = append(created, fmt.Sprintf("%d|%s|1", row.id, row.user))
		}
	}
	return refusals, created
}

// TestPredecessorRows imports odd users of the predecessor, twice.
func TestPredecessorRows(t *testing.T) {
	t.Parallel()
	d, conn := newUserDatabase(t)
	createPredecessor(t, conn)
	refused, created := insertOldUsers(t, conn)
	old := oldUsers(t, conn)
	r := transfer(t, d.URL, "", "import", "--predecessor")
	r.expect(t, 1, imported(len(created), 0, len(refused)))
	expectSet(t, "standard error", r.refusals(t), refused)
	var got []string
	for _, user := range users(t, conn) {
		got = append(got, strings.Join(strings.Split(user, "|")[:4], "|"))
	}
	expectSet(t, "the users", got, created)
	differ := queryValue[int](t, conn, `SELECT count(*) FROM users JOIN "user" USING (id)
		WHERE users.created_at <> "user".created_at OR users.updated_at <> "user".updated_at`)
	if differ > 0 {
		t.Errorf("got %d users with other times, want none", differ)
	}
	before := state(t, conn)
	r = transfer(t, d.URL, "", "import", "--predecessor")
	r.expect(t, 1, imported(0, len(created), len(refused)))
	if oldUsers(t, conn) != old || state(t, conn) != before {
		t.Error("the second import changes something, or the old table has changed")
	}
	p := testEnv.StartProgram(t, "DATABASE_URL="+d.URL)
	for _, row := range predecessorRows {
		if row.user == "" {
			continue
		}
		password := row.password + map[bool]string{true: env.Secret}[row.password == ""]
		body := fmt.Sprintf(`{"password":%q}`, password)
		path := fmt.Sprintf("/users/%d/password/verify", row.id)
		if r := p.Do("POST", path, body); r.JSON(t, "valid") != true {
			t.Errorf("user %d cannot log in: %v", row.id, r)
		}
	}
}

// TestPredecessorTypes imports from tables whose columns have other types than SQLAlchemy's for the
// same models, and none with NOT NULL.
func TestPredecessorTypes(t *testing.T) {
	t.Parallel()
	const zoned, local = "timestamptz", "timestamp"
	for _, test := range []struct{ id, text, time string }{
		{"serial", "varchar(255)", zoned},
		{"smallserial", "varchar(255)", local},
		{"bigserial", "char(20)", local},
		{"numeric", "text", zoned},
		{"int", "text_of_site", "date"},
	} {
		t.Run(test.id, func(t *testing.T) {
			t.Parallel()
			d, conn := newUserDatabase(t)
			mustExec(t, conn, "CREATE DOMAIN text_of_site AS text CHECK (VALUE <> '')")
			mustExec(t, conn, strings.NewReplacer("ID", test.id, "TEXT", test.text, "TIME", test.time).
				Replace(`CREATE TABLE "user" (id ID PRIMARY KEY, name TEXT, surname TEXT, password TEXT,
					created_at TIME, updated_at TIME)`))
			mustExec(t, conn, `INSERT INTO "user" VALUES
				(1, 'John', 'Doe', '`+env.Secret+`', '2020-01-01', '2021-01-01'),
				(2, 'Jane', 'Doe', '`+env.Secret+`', NULL, NULL),
				(3, NULL, 'Doe', '`+env.Secret+`', '2020-01-01', NULL),
				(4, 'Jack', 'Doe', NULL, NULL, '2021-01-01')`)
			for _, want := range []ending{imported(2, 0, 2), imported(0, 2, 2)} {
				r := transfer(t, d.URL, "", "import", "--predecessor")
				r.expect(t, 1, want)
				expectLines(t, "standard error", r.refusals(t), []string{
					`{"id":3,"field":"name","reason":"` + notName + `"}`,
					`{"id":4,"field":"password","reason":"must have 1 to 128 characters"}`})
			}
			got := users(t, conn)
			if len(got) != 2 || got[0] != "1|John|Doe|1|2020-01-01 00:00:00|2021-01-01 00:00:00" ||
				!strings.HasPrefix(got[1], "2|Jane|Doe|1|") {
				t.Errorf("got the users %q, want John and Jane", got)
			}
			if id := queryValue[int](t, conn, "SELECT nextval('users_id_seq')"); id != 5 {
				t.Errorf("got %d as the next id, want 5", id)
			}
		})
	}
}

// TestPredecessorRepeated changes users on both sides between imports.
func TestPredecessorRepeated(t *testing.T) {
	t.Parallel()
	d, conn := newUserDatabase(t)
	createPredecessor(t, conn)
	mustExec(t, conn, `INSERT INTO "user" SELECT n, 'John', 'Doe', '`+env.Secret+`', '2020-01-01Z',
		'2021-01-01Z' FROM generate_series(1, 9) AS n`)
	transfer(t, d.URL, "", "import", "--predecessor").expect(t, 0, imported(9, 0, 0))
	mustExec(t, conn, "DELETE FROM outbox")
	const newer = ` SET name = 'Jane', updated_at = '2040-01-01Z' `
	for _, statement := range []string{
		`UPDATE "user"` + newer + `WHERE id IN (2, 4, 7)`,
		`UPDATE users SET surname = 'Roe' WHERE id IN (3, 4)`,
		`DELETE FROM users WHERE id IN (5, 7, 9)`,
		`DELETE FROM "user" WHERE id IN (6, 9)`,
		`INSERT INTO "user" SELECT 10, 'New', 'Doe', '` + env.Secret +
			`', '2020-01-01Z', '2021-01-01Z'`,
		`DELETE FROM outbox`,
	} {
		mustExec(t, conn, statement)
	}
	old := oldUsers(t, conn)
	refused := []string{
		`{"id":4,"reason":"was changed on both sides since the last import"}`,
		`{"id":6,"reason":"is deleted in the table \"user\", but not here"}`,
		`{"id":7,"reason":"was changed on both sides since the last import"}`,
	}
	for _, want := range []ending{imported(2, 4, 3), imported(0, 6, 3)} { // unchanged: 1, 3, 5, 8
		r := transfer(t, d.URL, "", "import", "--predecessor")
		r.expect(t, 1, want)
		expectLines(t, "standard error", r.refusals(t), refused)
		rows := queryValue[string](t, conn, `SELECT string_agg(concat_ws(' ', id, name, surname, version,
			(updated_at = '2021-01-01Z')::text, (updated_at = '2040-01-01Z')::text),
			', ' ORDER BY id) FROM users`)
		if want := "1 John Doe 1 true false, 2 Jane Doe 2 false true, 3 John Roe 2 false false, " +
			"4 John Roe 2 false false, 6 John Doe 1 true false, 8 John Doe 1 true false, " +
			"10 New Doe 1 true false"; rows != want {
			t.Errorf("got  %s\nwant %s", rows, want)
		}
		events := queryValue[string](t, conn, `
			SELECT string_agg(concat_ws(' ', event_type, user_id, version), ', ' ORDER BY user_id) FROM outbox`)
		if want := "user.updated 2 2, user.created 10 1"; events != want {
			t.Errorf("got the events %s, want %s", events, want)
		}
	}
	if oldUsers(t, conn) != old {
		t.Error("the old table has changed")
	}
}

// expectSet is expectLines for lines in any order.
func expectSet(t *testing.T, what string, got, want []string) {
	t.Helper()
	expectLines(t, what, slices.Sorted(slices.Values(got)),
		slices.Sorted(slices.Values(want)))
}

// TestPredecessorWhileServing imports while a service creates users. It gives them other ids.
func TestPredecessorWhileServing(t *testing.T) {
	t.Parallel()
	const n = 300
	d, conn := newUserDatabase(t)
	createPredecessor(t, conn)
	mustExec(t, conn, fmt.Sprintf(`INSERT INTO "user" (name, surname, password)
		SELECT 'John', 'Doe', '%s' FROM generate_series(1, %d)`, env.Secret, n))
	p := testEnv.StartProgram(t, "DATABASE_URL="+d.URL)
	p.CreateUser("First", "Here") // has the id 1
	cmd := begin(t, d.URL, nil, "import", "--predecessor")
	env.Eventually(t, "a sequence behind the predecessor's ids, before its users", func() bool {
		return queryValue[bool](t, conn, `
			SELECT last_value >= $1 AND (SELECT count(*) FROM users) = 1 FROM users_id_seq`, n)
	})
	created := 0
	ended := cmd.ended()
	for ; len(ended) == 0; created++ {
		p.CreateUser("Later", "Here")
	}
	r := <-ended
	r.expect(t, 1, imported(n-1, 0, 1))
	expectLines(t, "standard error", r.refusals(t),
		[]string{`{"id":1,"reason":"has the id of another user here"}`})
	got := queryValue[string](t, conn, `SELECT concat_ws(' ', count(*),
		count(*) FILTER (WHERE name = 'John' AND id BETWEEN 2 AND $1),
		count(*) FILTER (WHERE name = 'Later' AND id > $1)) FROM users`, n)
	if want := fmt.Sprint(n+created, n-1, created); got != want || created == 0 {
		t.Errorf("got %s (users, imported ones, created ones), want %s", got, want)
	}
}

// TestPredecessorWarning checks when a start of the service names the command for the takeover.
func TestPredecessorWarning(t *testing.T) {
	t.Parallel()
	const row = `INSERT INTO "user" (name, surname, password)
		VALUES ('John', 'Doe', '` + env.Secret + `')`
	for name, test := range map[string]struct {
		rows, imported bool
		want           int
	}{
		"waiting users":  {true, false, 1},
		"no users":       {false, false, 0},
		"imported users": {true, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := env.NewDatabase(t)
			conn := d.Connect()
			createPredecessor(t, conn)
			if test.rows {
				mustExec(t, conn, row)
			}
			if test.imported {
				transfer(t, d.URL, "", "import", "--predecessor").expect(t, 0, imported(1, 0, 0))
			}
			const event = "Predecessor's users not imported"
			p := testEnv.StartProgram(t, "DATABASE_URL="+d.URL)
			if test.want > 0 {
				line := p.AwaitLine(event, "level", "WARN")
				if !strings.Contains(fmt.Sprint(line["remedy"]), "user-service import --predecessor") {
					t.Errorf("got %v, want a line that names the command", line)
				}
			}
			p.CreateUser("John", "Doe")
			id := 1
			if test.imported {
				id = 2
			}
			p.AwaitLine(env.LogReceivedEvent + " user.created with user_id=" + strconv.Itoa(id))
			if lines := p.Lines(event); len(lines) != test.want {
				t.Errorf("got %v, want %d lines", lines, test.want)
			}
		})
	}
}
