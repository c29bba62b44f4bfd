package env

import (
	"cmp"
	"context"
	"fmt"
	"net/url"
	"os"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
)

// databaseURL is the server of the tests' databases. Its role is a superuser.
var databaseURL = cmp.Or(os.Getenv("TEST_DATABASE_URL"),
	"postgres://postgres@127.0.0.1:5432/postgres")

// Missing skips the test because it lacks something. With REQUIRE_SERVICES=1 it fails the test
// instead.
func Missing(t *testing.T, what string, err error) {
	t.Helper()
	if os.Getenv("REQUIRE_SERVICES") == "1" {
		t.Fatalf("%s is required: %v", what, err)
	}
	t.Skipf("needs %s: `make services` provides it (%v)", what, err)
}

var names atomic.Int64

// UniqueName returns a name that no other test uses, in no other process either.
func UniqueName() string {
	return fmt.Sprintf("us_system_%d_%d", os.Getpid(), names.Add(1))
}

// Database is a database that only one test uses. Its owner is a role of the same name that is not
// a superuser.
type Database struct {
	Name string
	URL  string // as the owner

	t *testing.T
}

// NewDatabase creates an empty database, and drops it when the test ends.
func NewDatabase(t *testing.T) *Database {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), databaseURL)
	if err != nil {
		Missing(t, "PostgreSQL", err)
	}
	defer conn.Close(context.Background())
	name := UniqueName()
	for _, statement := range []string{
		fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s'", name, name),
		fmt.Sprintf("CREATE DATABASE %s OWNER %s", name, name),
	} {
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	u.Path, u.User = "/"+name, url.UserPassword(name, name)
	d := &Database{Name: name, URL: u.String(), t: t}
	t.Cleanup(func() {
		d.Exec("postgres", "DROP DATABASE "+name+" WITH (FORCE)", "DROP ROLE "+name)
	})
	return d
}

// Exec runs statements as the superuser in the named database, outside any transaction.
func (d *Database) Exec(name string, statements ...string) {
	d.t.Helper()
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		d.t.Fatal(err)
	}
	config.Database = name
	conn, err := pgx.ConnectConfig(context.Background(), config)
	if err != nil {
		d.t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for _, statement := range statements {
		if _, err := conn.Exec(context.Background(), statement); err != nil {
			d.t.Errorf("%s: %v", statement, err)
		}
	}
}

// Connect opens a connection to the database as its owner. It is closed when the test ends.
func (d *Database) Connect() *pgx.Conn {
	d.t.Helper()
	conn, err := pgx.Connect(d.t.Context(), d.URL)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}
