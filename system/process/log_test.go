package process

import (
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"user-service/system/env"
)

// startWithOutput starts the service with a standard output that the test cannot read the start
// line from, and returns when it answers.
func startWithOutput(t *testing.T, output *os.File) (url string, end func() error) {
	t.Helper()
	path, err := testEnv.Executable()
	if err != nil {
		t.Fatal(err)
	}
	port := env.FreePort()
	cmd := exec.Command(path)
	cmd.Dir, cmd.Env, cmd.Stdout = t.TempDir(), []string{"PORT=" + port}, output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill() })
	url = "http://127.0.0.1:" + port
	env.Eventually(t, "an answer of /healthz", func() bool { return get(url+"/healthz") == nil })
	return url, func() error {
		http.DefaultClient.CloseIdleConnections()
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-ended:
			return err
		case <-time.After(stopBudget):
			return os.ErrDeadlineExceeded
		}
	}
}

// get fails unless the answer is 200 within a second.
func get(url string) error {
	client := http.Client{Timeout: time.Second}
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	return err
}

// TestServesWithoutLog checks that the service answers and ends normally while its log cannot be
// written.
func TestServesWithoutLog(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]func() (*os.File, error){
		"a pipe that nobody reads": func() (*os.File, error) {
			r, w, err := os.Pipe()
			if err == nil {
				t.Cleanup(func() { r.Close() })
			}
			return w, err
		},
		"a closed pipe": func() (*os.File, error) {
			r, w, err := os.Pipe()
			if err == nil {
				r.Close()
			}
			return w, err
		},
		"a full disk": func() (*os.File, error) { return os.OpenFile("/dev/full", os.O_WRONLY, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			output, err := open()
			if err != nil {
				t.Fatal(err)
			}
			defer output.Close()
			url, end := startWithOutput(t, output)
			for i := range 2000 {
				if err := get(url + "/healthz"); err != nil {
					t.Fatalf("request %d: %v", i, err)
				}
			}
			if err := end(); err != nil {
				t.Errorf("the end: %v, want exit code 0 within %v", err, stopBudget)
			}
		})
	}
}

// TestReportsDroppedLines stops reading the log until lines are dropped, and reads it again.
func TestReportsDroppedLines(t *testing.T) {
	t.Parallel()
	p := testEnv.StartProgram(t)
	path := "/users/" + strings.Repeat("x", 1000)
	blocked := make(chan func(), 1)
	go func() { blocked <- p.BlockOutput() }()
	for len(blocked) == 0 { // BlockOutput returns after a read
		p.Do("GET", path, "")
	}
	unblock := <-blocked
	const dropped = "log_lines_dropped_total"
	for range 2000 {
		if p.Metric(dropped) > 0 {
			break
		}
		for range 20 {
			p.Do("GET", path, "")
		}
	}
	unblock()
	line := p.AwaitLine("Log lines dropped", "level", "WARN")
	if n := p.Metric(dropped); n == 0 || n != line["lines"] {
		t.Errorf("got %s = %v and the line %v, want the same number", dropped, n, line)
	}
	p.CreateUser("John", "Doe")
	p.Signal(syscall.SIGTERM)
	checkEnd(t, p)
}
