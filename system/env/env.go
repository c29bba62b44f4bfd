// Package env provides what the tests outside the service's process run on: the built service, and
// PostgreSQL, PgBouncer and RabbitMQ servers of their own on free ports of the loopback interface.
//
// An [Env] owns a temporary directory and every process that was started in it. Closing the Env
// ends the processes and removes the directory.
//
// A [Program] is the service under test: its log and its answers are checked. The tests of Programs
// use databases of the machine's PostgreSQL server, each its own ([NewDatabase]). Nothing else uses
// servers that run already.
package env

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Env is a temporary directory and the processes that run in it.
type Env struct {
	Dir string

	owner  *syscall.Credential // of programs that refuse to run as root; nil if we are not root
	serial atomic.Int64        // numbers data directories

	current, previous build

	mu      sync.Mutex
	cleanup []func()
}

// New returns an Env that the caller has to close.
func New() (*Env, error) {
	dir, err := os.MkdirTemp("", "user-service")
	if err != nil {
		return nil, err
	}
	e := &Env{Dir: dir}
	e.OnClose(func() { os.RemoveAll(dir) })
	e.owner, err = unprivilegedOwner()
	if err == nil {
		// PostgreSQL's user has to pass through.
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		e.Close()
		return nil, err
	}
	return e, nil
}

// OnClose has Close call f, before the functions that were registered earlier. The returned
// function calls f at once; f is called only once in any case.
func (e *Env) OnClose(f func()) func() {
	f = sync.OnceFunc(f)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cleanup = append(e.cleanup, f)
	return f
}

// Close ends all processes and removes the directory. It may be called several times.
func (e *Env) Close() {
	e.mu.Lock()
	cleanup := e.cleanup
	e.mu.Unlock()
	for _, f := range slices.Backward(cleanup) {
		f()
	}
}

// CloseOnSignal closes e and ends this process with exit code 1 on SIGINT, on SIGTERM and at the
// deadline, unless that is zero. The returned function stops this.
func (e *Env) CloseOnSignal(deadline time.Time) (stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	var timeout <-chan time.Time
	if !deadline.IsZero() {
		timeout = time.After(time.Until(deadline))
	}
	stopped := make(chan struct{})
	go func() {
		message := "interrupted"
		select {
		case <-stopped:
			return
		case <-timeout:
			message = "out of time"
		case <-signals:
		}
		e.Close()
		os.Stderr.WriteString(message + "\n")
		os.Exit(1)
	}()
	return sync.OnceFunc(func() {
		signal.Stop(signals)
		close(stopped)
	})
}

// Log opens a file of the Env's directory for appending.
func (e *Env) Log(name string) (*os.File, error) {
	const flags = os.O_CREATE | os.O_APPEND | os.O_WRONLY
	return os.OpenFile(filepath.Join(e.Dir, name), flags, 0o600)
}

// Tail returns the last 2,000 bytes of a file of the Env's directory.
func (e *Env) Tail(name string) string {
	content, _ := os.ReadFile(filepath.Join(e.Dir, name))
	return string(content[max(0, len(content)-2000):])
}

// A build makes one executable, once.
type build struct {
	once sync.Once
	path string
	err  error
}

func (b *build) get(make func() (string, error)) (string, error) {
	b.once.Do(func() { b.path, b.err = make() })
	return b.path, b.err
}

// Executable returns the path of the service as `make build` builds it. If TEST_EXECUTABLE is set,
// that is the path; otherwise the first call builds the service.
func (e *Env) Executable() (string, error) {
	return e.current.get(func() (string, error) {
		path := os.Getenv("TEST_EXECUTABLE")
		if path != "" {
			return path, nil
		}
		path = filepath.Join(e.Dir, "user-service")
		return path, e.run("go", "build", "-trimpath", "-ldflags=-s -w", "-buildvcs=false",
			"-o", path, ".")
	})
}

// PreviousExecutable returns the path of the service of the previous release. If
// TEST_PREVIOUS_EXECUTABLE is set, that is the path; otherwise the first call runs .ci/previous.
func (e *Env) PreviousExecutable() (string, error) {
	return e.previous.get(func() (string, error) {
		path := os.Getenv("TEST_PREVIOUS_EXECUTABLE")
		if path != "" {
			return path, nil
		}
		path = filepath.Join(e.Dir, "previous")
		return path, e.run("./.ci/previous", path)
	})
}

// run runs a command in the root of the repository.
func (e *Env) run(name string, args ...string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	return output(cmd)
}

// output runs a command and returns its output as part of the error.
func output(cmd *exec.Cmd) error {
	text, err := cmd.CombinedOutput()
	if err != nil {
		err = errors.New(cmd.String() + ": " + err.Error() + "\n" + string(text))
	}
	return err
}

// Root returns the root of the repository, which is the nearest directory above the working
// directory whose go.mod is that of the service.
func Root() (string, error) {
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		content, _ := os.ReadFile(filepath.Join(dir, "go.mod"))
		if strings.HasPrefix(string(content), "module user-service\n") {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			err = errors.New("the working directory is not in the repository of user-service")
		}
	}
	return "", err
}
