// Package process tests the compiled program: its commands and exit codes, its settings, its
// signals, and what it does when it starts or stops without its servers.
package process

import (
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"user-service/system/env"
)

// testEnv builds the service and runs it for all tests.
var testEnv *env.Env

func TestMain(m *testing.M) {
	var err error
	if testEnv, err = env.New(); err != nil {
		log.Fatal(err)
	}
	code := m.Run()
	testEnv.Close()
	os.Exit(code)
}

// brokerTimeout is how long the service waits for a RabbitMQ that does not answer.
const brokerTimeout = 5 * time.Second

// Nothing listens on port 1. A Program checks that its log has no password.
const (
	deadDatabaseURL = "postgres://john:" + env.Secret + "@127.0.0.1:1/users"
	deadRabbitURL   = "amqp://john:" + env.Secret + "@127.0.0.1:1/"
)

// occupiedPort returns a port that accepts connections, and never answers, until the test ends.
func occupiedPort(t *testing.T) int {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener.Addr().(*net.TCPAddr).Port
}

// newProxy returns a proxy to a database.
func newProxy(t *testing.T, d *env.Database) *env.Proxy {
	t.Helper()
	proxy, err := testEnv.NewProxy(d.URL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	return proxy
}

// dirWithEnvFile returns a directory that has a .env file, or is empty if the content is "".
func dirWithEnvFile(t *testing.T, content string) string {
	t.Helper()
	dir := t.TempDir()
	if content == "" {
		return dir
	}
	if err := os.WriteFile(filepath.Join(dir, ".env"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// expectExit waits for the end of the process and checks its exit code.
func expectExit(t *testing.T, p *env.Program, want int) {
	t.Helper()
	if got := p.Wait(); got != want {
		t.Errorf("got exit code %d, want %d:\n%s", got, want, p.Log())
	}
}

// checkEnd checks that the process ends with exit code 0, that its last line says so, and that its
// port is closed.
func checkEnd(t *testing.T, p *env.Program) {
	t.Helper()
	expectExit(t, p, 0)
	lines := p.Lines("")
	if last := lines[len(lines)-1]; last["event"] != "Service stopped" {
		t.Errorf("got the last line %v, want Service stopped", last)
	}
	if listens(p) {
		t.Error("the port is open after the end of the process")
	}
}

// listens reports whether the service accepts connections.
func listens(p *env.Program) bool {
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.URL, "http://"))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

func TestInMemory(t *testing.T) {
	t.Parallel()
	for _, signal := range []os.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			p := testEnv.LaunchProgram(t, env.ServiceConfig{})
			started := p.AwaitStart()
			lines := p.Lines("")
			if len(lines) != 2 || lines[0]["level"] != "WARN" ||
				!strings.Contains(fmt.Sprint(lines[0]["event"]), "everything is lost on exit") {
				t.Errorf("got a log that begins with\n%swant a warning and the start line", p.Log())
			}
			docs := fmt.Sprintf("http://localhost:%v/docs", started["port"])
			if started["level"] != "INFO" || started["app"] != "user-service" ||
				started["host"] != "127.0.0.1" || started["docs"] != docs {
				t.Errorf("got the start line %v, want the defaults and docs=%s", started, docs)
			}
			p.CreateUser("John", "Doe")
			if r := p.Do("GET", "/docs", ""); r.StatusCode != 200 {
				t.Errorf("got %v\nwant status 200", r)
			}
			p.Signal(signal)
			checkEnd(t, p)
		})
	}
}

// TestRefuses starts the program with wrong settings or arguments. One line tells which is wrong.
func TestRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		setting, file, args string
		want                string // in the line
	}{
		"DATABASE_URL": {setting: "DATABASE_URL=mysql://john:" + env.Secret + "@h/d",
			want: "DATABASE_URL must be"},
		"RABBITMQ_URL": {setting: "RABBITMQ_URL=http://john:" + env.Secret + "@h/",
			want: "RABBITMQ_URL must be"},
		"APP_NAME":            {setting: "APP_NAME=two\nlines", want: "APP_NAME must be"},
		"HOST":                {setting: "HOST=two words", want: "HOST must be"},
		"PORT":                {setting: "PORT=65536", want: "PORT must be a port number, 0 to 65535"},
		"LOG_LEVEL":           {setting: "LOG_LEVEL=loud", want: "LOG_LEVEL must be"},
		"DEBUG":               {setting: "DEBUG=yes", want: "DEBUG must be true or false"},
		"PASSWORD_MIN_LENGTH": {setting: "PASSWORD_MIN_LENGTH=0", want: "PASSWORD_MIN_LENGTH must be"},
		"SHUTDOWN_DELAY":      {setting: "SHUTDOWN_DELAY=-1s", want: "SHUTDOWN_DELAY must be"},
		"in the file":         {file: "# x\nDEBUG=yes # no", want: "DEBUG must be true or false (.env, line 2)"},
		"UTF-16":              {file: "\xff\xfeA\x00=\x001\x00", want: "UTF-8 text, not UTF-16"},
		"an API key": {setting: "API_KEYS=a:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
			want: "an empty key"},
		"the file":     {file: "A=1\nDATABASE URL=" + env.Secret, want: "line 2"},
		"a command":    {args: "serve", want: "healthcheck"},
		"two commands": {args: "healthcheck now", want: "healthcheck"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := testEnv.LaunchProgram(t, env.ServiceConfig{Settings: []string{test.setting},
				Args: strings.Fields(test.args), Dir: dirWithEnvFile(t, test.file)})
			p.AllowErrors(1)
			expectExit(t, p, 2)
			lines := p.Lines("")
			if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0]["error"]), test.want) {
				t.Errorf("got\n%swant one line with %q", p.Log(), test.want)
			}
		})
	}
}

func TestReadsEnvFile(t *testing.T) {
	t.Parallel()
	p := testEnv.LaunchProgram(t, env.ServiceConfig{
		Settings: []string{"HOST=127.0.0.1", "APP_NAME="},
		Dir:      dirWithEnvFile(t, "HOST=localhost\nexport APP_NAME='from the file'\n"),
	})
	if line := p.AwaitStart(); line["host"] != "127.0.0.1" || line["app"] != "from the file" {
		t.Errorf("got the start line %v, want the host 127.0.0.1 and the app %q", line, "from the file")
	}
}

func TestCannotListen(t *testing.T) {
	t.Parallel()
	used := fmt.Sprint("PORT=", occupiedPort(t))
	for name, settings := range map[string][]string{
		"a port in use":        {used},
		"and no database":      {used, "DATABASE_URL=" + deadDatabaseURL}, // without waiting for it
		"an address elsewhere": {"HOST=192.0.2.1"},                        // TEST-NET-1, which no machine has
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := testEnv.LaunchProgram(t, env.ServiceConfig{Settings: settings})
			p.AllowErrors(1)
			expectExit(t, p, 1)
			lines := p.Lines("")
			if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0]["error"]), "listen") {
				t.Errorf("got\n%swant one error about listening", p.Log())
			}
		})
	}
}

// TestWaitsForDatabase checks that the program waits, and does not listen meanwhile. The address is
// one that no other test uses.
func TestWaitsForDatabase(t *testing.T) {
	t.Parallel()
	const host, port = "127.0.0.9", "18009"
	p := testEnv.LaunchProgram(t, env.ServiceConfig{Settings: []string{
		"DATABASE_URL=" + deadDatabaseURL, "LOG_LEVEL=DEBUG", "HOST=" + host, "PORT=" + port}})
	line := p.AwaitLine(env.LogWaiting, "level", "WARN", "error", "connection to 127.0.0.1:1 refused")
	if line["remedy"] == nil || line["seconds_left"] == nil {
		t.Errorf("got the line %v, want a remedy and the time left", line)
	}
	if conn, err := net.Dial("tcp", host+":"+port); err == nil {
		conn.Close()
		t.Error("the program listens before the database answers")
	}
	p.Signal(syscall.SIGTERM)
	expectExit(t, p, 0)
	if n := len(p.Lines("")); n != 1 {
		t.Errorf("got %d lines, want 1:\n%s", n, p.Log())
	}
}

// TestPrints runs the commands that print a text, with settings that are not valid.
func TestPrints(t *testing.T) {
	t.Parallel()
	path, err := testEnv.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for argument, want := range map[string]string{
		"help": "user-service healthcheck", "-h": "user-service healthcheck",
		"--help": "user-service healthcheck", "version": ", commit ", "--version": ", commit ",
	} {
		cmd := exec.Command(path, argument)
		cmd.Dir, cmd.Env = dirWithEnvFile(t, "not a setting"), []string{"PORT=http"}
		output, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(output), want) {
			t.Errorf("%s: got %v, %s\nwant %q", argument, err, output, want)
		}
	}
}

func TestStartsWhenDatabaseDoes(t *testing.T) {
	t.Parallel()
	database := env.NewDatabase(t)
	proxy := newProxy(t, database)
	proxy.Cut(true)
	p := testEnv.LaunchProgram(t, env.ServiceConfig{Settings: []string{"DATABASE_URL=" + proxy.URL}})
	p.AwaitLine(env.LogWaiting, "level", "WARN")
	proxy.Cut(false)
	p.AwaitStart()
	p.CreateUser("John", "Doe")
	if n := queryValue[int](t, database.Connect(), "SELECT count(*) FROM users"); n != 1 {
		t.Errorf("got %d users in the database, want 1", n)
	}
	p.Signal(syscall.SIGTERM)
	checkEnd(t, p)
}

func TestWithoutRabbitMQ(t *testing.T) {
	t.Parallel()
	for name, url := range map[string]string{
		"nothing listens": deadRabbitURL,
		"never answers":   fmt.Sprintf("amqp://john:%s@127.0.0.1:%d/", env.Secret, occupiedPort(t)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := testEnv.Executable(); err != nil { // building is not part of the start
				t.Fatal(err)
			}
			begin := time.Now()
			p := testEnv.StartProgram(t, "RABBITMQ_URL="+url, "LOG_LEVEL=DEBUG")
			if took := time.Since(begin); took >= brokerTimeout {
				t.Errorf("the start took %v, want less than %v", took, brokerTimeout)
			}
			p.CreateUser("John", "Doe")
			if r := p.Do("PATCH", "/users/1", `{"name": "Jane"}`); r.StatusCode != 200 {
				t.Errorf("got %v\nwant status 200", r)
			}
			if r := p.Do("GET", "/readyz", ""); r.StatusCode != 200 || r.JSON(t, "rabbitmq") != "down" {
				t.Errorf("got %v\nwant status 200 and rabbitmq down", r)
			}
			p.Signal(syscall.SIGTERM)
			checkEnd(t, p)
		})
	}
}

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	failing := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(failing.Close)
	running := func(settings ...string) (port string) {
		return portOf(testEnv.StartProgram(t, settings...).URL)
	}
	for name, test := range map[string]struct {
		settings []string
		want     int // the exit code, and the number of lines
	}{
		"loopback":        {[]string{"HOST=127.0.0.1", running("HOST=127.0.0.1")}, 0},
		"every interface": {[]string{"HOST=0.0.0.0", running("HOST=0.0.0.0")}, 0},
		"a host name":     {[]string{"HOST=localhost", running("HOST=localhost")}, 0},
		"a bad database":  {[]string{"DATABASE_URL=" + deadDatabaseURL, running()}, 0},
		"nothing there":   {[]string{"PORT=1"}, 1},
		"another status":  {[]string{portOf(failing.URL)}, 1},
		"no answer":       {[]string{fmt.Sprint("PORT=", occupiedPort(t))}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := testEnv.LaunchProgram(t, env.ServiceConfig{Settings: test.settings,
				Args: []string{"healthcheck"}})
			p.AllowErrors(test.want)
			expectExit(t, p, test.want)
			if n := len(p.Lines("")); n != test.want {
				t.Errorf("got %d lines, want %d:\n%s", n, test.want, p.Log())
			}
		})
	}
}

// portOf returns the setting PORT of the service at a URL.
func portOf(url string) string {
	return "PORT=" + url[strings.LastIndex(url, ":")+1:]
}

// TestRestricted runs the program as the image does: in a directory that it cannot write to,
// without root, and without capabilities. If the tests do not run as root, only the directory is
// restricted.
func TestRestricted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o555); err != nil {
		t.Fatal(err)
	}
	c := env.ServiceConfig{Dir: dir,
		Settings: []string{"DATABASE_URL=" + env.NewDatabase(t).URL, "HOST=0.0.0.0"}}
	if os.Geteuid() == 0 {
		c.Wrapper = []string{"setpriv", "--reuid=65532", "--regid=65532", "--clear-groups",
			"--bounding-set=-all", "--no-new-privs", "--"}
	}
	p := testEnv.LaunchProgram(t, c)
	p.AwaitStart()
	p.CreateUser("John", "Doe")
	p.Signal(syscall.SIGTERM)
	checkEnd(t, p)
}
