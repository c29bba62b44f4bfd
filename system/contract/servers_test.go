package contract

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// The servers of the tests. The role of testDatabaseURL is a superuser.
var (
	testDatabaseURL = cmp.Or(os.Getenv("TEST_DATABASE_URL"),
		"postgres://postgres@127.0.0.1:5432/postgres")
	testRabbitURL = cmp.Or(os.Getenv("TEST_RABBITMQ_URL"), "amqp://guest:guest@127.0.0.1:5672/")
)

// database is a database that only this test uses. Its owner is not a superuser.
type database struct {
	t    *testing.T
	name string
	url  string // as the owner
}

// newDatabase creates an empty database and drops it when the test ends.
func newDatabase(t *testing.T) *database {
	t.Helper()
	admin, err := url.Parse(testDatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	name := uniqueName()
	d := &database{t: t, name: name}
	conn, err := pgx.Connect(t.Context(), testDatabaseURL)
	if err != nil {
		missing(t, "PostgreSQL", err)
	}
	defer conn.Close(context.Background())
	for _, statement := range []string{
		fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s'", name, name),
		fmt.Sprintf("CREATE DATABASE %s OWNER %s", name, name),
	} {
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		d.exec("postgres", "DROP DATABASE "+name+" WITH (FORCE)", "DROP ROLE "+name)
	})
	admin.Path, admin.User = "/"+name, url.UserPassword(name, name)
	d.url = admin.String()
	return d
}

// exec runs statements as the superuser in the named database, outside any transaction.
func (d *database) exec(name string, statements ...string) {
	d.t.Helper()
	config, err := pgx.ParseConfig(testDatabaseURL)
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

// newVhost creates a RabbitMQ virtual host that only this test uses, and returns its URL. It
// uses the management API on port 15672 or, where there is none, rabbitmqctl.
func newVhost(t *testing.T) string {
	t.Helper()
	conn, err := amqp.Dial(testRabbitURL)
	if err != nil {
		missing(t, "RabbitMQ", err)
	}
	conn.Close()
	u, err := url.Parse(testRabbitURL)
	if err != nil {
		t.Fatal(err)
	}
	name := uniqueName()
	create, remove := vhostByHTTP(u, name)
	if err := create(); err != nil {
		create, remove = vhostByCommand(u, name)
		if err := create(); err != nil {
			missing(t, "the RabbitMQ management API, or rabbitmqctl", err)
		}
	}
	t.Cleanup(func() {
		if err := remove(); err != nil {
			t.Error(err)
		}
	})
	u.Path = "/" + name
	return u.String()
}

func vhostByHTTP(u *url.URL, name string) (create, remove func() error) {
	send := func(method, path, body string) error {
		request, err := http.NewRequest(method, "http://"+u.Hostname()+":15672/api/"+path,
			strings.NewReader(body))
		if err != nil {
			return err
		}
		password, _ := u.User.Password()
		request.SetBasicAuth(u.User.Username(), password)
		request.Header.Set("Content-Type", "application/json")
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		response.Body.Close()
		if response.StatusCode > 299 {
			return fmt.Errorf("%s %s: %s", method, path, response.Status)
		}
		return nil
	}
	create = func() error {
		if err := send("PUT", "vhosts/"+name, "{}"); err != nil {
			return err
		}
		return send("PUT", "permissions/"+name+"/"+url.PathEscape(u.User.Username()),
			`{"configure": ".*", "write": ".*", "read": ".*"}`)
	}
	return create, func() error { return send("DELETE", "vhosts/"+name, "") }
}

func vhostByCommand(u *url.URL, name string) (create, remove func() error) {
	create = func() error {
		if err := runCommand("rabbitmqctl", "-q", "add_vhost", name); err != nil {
			return err
		}
		return runCommand("rabbitmqctl", "-q", "set_permissions", "-p", name,
			u.User.Username(), ".*", ".*", ".*")
	}
	return create, func() error { return runCommand("rabbitmqctl", "-q", "delete_vhost", name) }
}
