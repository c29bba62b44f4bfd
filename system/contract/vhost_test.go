package contract

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"user-service/system/env"
)

var testRabbitURL = cmp.Or(os.Getenv("TEST_RABBITMQ_URL"), "amqp://guest:guest@127.0.0.1:5672/")

// newVhost creates a RabbitMQ virtual host that only this test uses, and returns its URL. It
// uses the management API on port 15672 or, where there is none, rabbitmqctl.
func newVhost(t *testing.T) string {
	t.Helper()
	conn, err := amqp.Dial(testRabbitURL)
	if err != nil {
		env.Missing(t, "RabbitMQ", err)
	}
	conn.Close()
	u, err := url.Parse(testRabbitURL)
	if err != nil {
		t.Fatal(err)
	}
	name := env.UniqueName()
	create, remove := vhostByHTTP(u, name)
	if err := create(); err != nil {
		create, remove = vhostByCommand(u, name)
		if err := create(); err != nil {
			env.Missing(t, "the RabbitMQ management API, or rabbitmqctl", err)
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
		response, err := http.DefaultClient.Do(request)
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

// runCommand runs a command for at most a minute.
func runCommand(command ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	output, err := exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(command, " "), err, output)
	}
	return nil
}
