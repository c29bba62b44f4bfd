// Package contract tests what a user of the repository relies on: the binary, seen from
// outside, and the files beside it. Nothing here imports the service.
//
// Run the tests with -count=1: the cache of `go test` does not notice changes of files outside
// this module.
package contract

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// root is the directory of the repository.
const root = "../.."

// secret is part of every password that a test sends. It must never leave the service.
const secret = "correct-horse-s3cr3t"

// binary is the service as `make build` builds it, in a directory that TestMain removes.
var binary struct {
	once sync.Once
	dir  string
	path string
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if binary.dir != "" {
		os.RemoveAll(binary.dir)
	}
	os.Exit(code)
}

// buildBinary builds the service once and returns the path of the executable.
func buildBinary(t *testing.T) string {
	t.Helper()
	binary.once.Do(func() {
		if binary.dir, binary.err = os.MkdirTemp("", "user-service"); binary.err != nil {
			return
		}
		binary.path = filepath.Join(binary.dir, "user-service")
		build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-buildvcs=false",
			"-o", binary.path, ".")
		build.Dir = root
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if output, err := build.CombinedOutput(); err != nil {
			binary.err = fmt.Errorf("%s: %w\n%s", build, err, output)
		}
	})
	if binary.err != nil {
		t.Fatal(binary.err)
	}
	return binary.path
}

// missing skips the test. With REQUIRE_SERVICES=1 it fails the test instead.
func missing(t *testing.T, what string, err error) {
	t.Helper()
	if os.Getenv("REQUIRE_SERVICES") == "1" {
		t.Fatalf("%s is required: %v", what, err)
	}
	t.Skipf("needs %s: `make services` provides it (%v)", what, err)
}

var serial atomic.Int64

// uniqueName returns a name that no other test uses, in no other process either.
func uniqueName() string {
	return fmt.Sprintf("us_contract_%d_%d", os.Getpid(), serial.Add(1))
}

// readFile returns the content of a file of the repository.
func readFile(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// service is a running binary.
type service struct {
	t             *testing.T
	url           string
	stdout        output
	stderr        output
	process       *os.Process
	ended         chan struct{} // closed when the process has ended
	exitCode      int           // valid after ended
	errorsAllowed bool          // the test causes log lines at level ERROR
}

// launch starts the binary with exactly the variables env, and PORT=0 unless env has a PORT,
// in directory dir. It does not wait until the service listens. When the test ends, the
// service is stopped and its output is checked.
func launch(t *testing.T, dir string, env ...string) *service {
	t.Helper()
	cmd := exec.Command(buildBinary(t))
	cmd.Dir = dir
	cmd.Env = append([]string{"PORT=0"}, env...)
	s := &service{t: t, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &s.stdout, &s.stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.process = cmd.Process
	go func() {
		_ = cmd.Wait() // the exit code says it all
		s.exitCode = cmd.ProcessState.ExitCode()
		close(s.ended)
	}()
	t.Cleanup(func() {
		s.stop()
		s.checkOutput()
	})
	return s
}

// startService starts the binary in an empty directory and waits until it listens.
func startService(t *testing.T, env ...string) *service {
	t.Helper()
	s := launch(t, t.TempDir(), env...)
	eventually(t, "the start line", func() bool {
		select {
		case <-s.ended:
			t.Fatalf("the service ended:\n%s", &s.stdout)
		default:
		}
		for _, line := range s.stdout.lines() {
			if line["event"] == "Service started" {
				s.url = fmt.Sprintf("http://127.0.0.1:%v", line["port"])
			}
		}
		return s.url != ""
	})
	return s
}

// stop ends the process as an orchestrator does, and kills it if that takes too long.
func (s *service) stop() {
	s.t.Helper()
	_ = s.process.Signal(syscall.SIGTERM) // it may have ended
	client.CloseIdleConnections()
	select {
	case <-s.ended:
	case <-time.After(20 * time.Second):
		_ = s.process.Kill()
		<-s.ended
		s.t.Errorf("the service does not stop:\n%s", &s.stdout)
	}
}

// checkOutput checks what holds for the output of every service.
func (s *service) checkOutput() {
	s.t.Helper()
	if text := s.stderr.String(); text != "" {
		s.t.Errorf("standard error: %s", text)
	}
	for text := range strings.Lines(s.stdout.String()) {
		var line map[string]any
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			s.t.Errorf("a log line is not a JSON object: %v: %s", err, text)
		}
		if strings.Contains(text, secret) || strings.Contains(text, "argon2id") {
			s.t.Errorf("a log line contains a password: %s", text)
		}
		if line["level"] == "ERROR" && !s.errorsAllowed {
			s.t.Errorf("unexpected: %s", text)
		}
	}
}

// output collects what a process writes.
type output struct {
	mu      sync.Mutex
	content bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.content.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.content.String()
}

// lines returns the complete log lines.
func (o *output) lines() []map[string]any {
	var lines []map[string]any
	for text := range strings.Lines(o.String()) {
		var line map[string]any
		if json.Unmarshal([]byte(text), &line) == nil {
			lines = append(lines, line)
		}
	}
	return lines
}

// exchange is a request and its response, whose body has been read.
type exchange struct {
	request  *http.Request
	response *http.Response
	body     string
}

func (e exchange) String() string {
	if e.response == nil {
		return "no response"
	}
	return fmt.Sprintf("%s %s: status %d, %v\n%s", e.request.Method, e.request.URL.RequestURI(),
		e.response.StatusCode, e.response.Header, e.body)
}

// client does not follow redirects.
var client = &http.Client{
	Timeout:       30 * time.Second,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	Transport:     &http.Transport{MaxIdleConnsPerHost: 16},
}

// do sends a request. Headers are "Name: value". A body has the content type
// application/json unless a header says otherwise.
func (s *service) do(method, path, body string, headers ...string) exchange {
	s.t.Helper()
	request := newRequest(s.t, method, s.url+path, body, headers...)
	response, err := client.Do(request)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		s.t.Fatalf("%s %s: reading the body: %v", method, path, err)
	}
	e := exchange{request, response, string(content)}
	if strings.Contains(e.body, secret) || strings.Contains(e.body, "argon2id") {
		s.t.Errorf("the response contains a password: %v", e)
	}
	return e
}

func newRequest(t *testing.T, method, url, body string, headers ...string) *http.Request {
	t.Helper()
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		request.Header.Set(name, value)
	}
	return request
}

// createUser creates a user. headers may authenticate the request.
func (s *service) createUser(name, surname string, headers ...string) {
	s.t.Helper()
	body := fmt.Sprintf(`{"name": %q, "surname": %q, "password": %q}`, name, surname, secret)
	if e := s.do("POST", "/users", body, headers...); e.response.StatusCode != 201 {
		s.t.Fatal(e)
	}
}

// eventually waits until a condition holds, or fails the test.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timeout waiting for %s", what)
		}
	}
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

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
