package env

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Process is a server in a process group of its own, which can be started again.
type Process struct {
	Command func() (*exec.Cmd, error) // returns a new command for each start
	Answers func() error              // returns nil when the server can be used
	Timeout time.Duration             // of a start; 0 means 60 s

	mu      sync.Mutex
	process *os.Process
	ended   chan struct{}
}

// Start starts the server and returns when it answers. It closes the files that the command writes
// to; the server has them.
func (p *Process) Start() error {
	cmd, err := p.Command()
	if err != nil {
		return err
	}
	ended, err := p.launch(cmd)
	if err != nil {
		return err
	}
	timeout := cmp.Or(p.Timeout, 60*time.Second)
	for deadline := time.Now().Add(timeout); time.Now().Before(deadline); {
		if err = p.Answers(); err == nil {
			return nil
		}
		select {
		case <-ended:
			return fmt.Errorf("%s ended during its start: %w", cmd.Path, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
	return fmt.Errorf("%s did not answer within %v: %w", cmd.Path, timeout, err)
}

func (p *Process) launch(cmd *exec.Cmd) (ended chan struct{}, err error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	p.mu.Lock()
	defer p.mu.Unlock()
	err = cmd.Start()
	for _, output := range []io.Writer{cmd.Stdout, cmd.Stderr} {
		if file, ok := output.(*os.File); ok {
			file.Close()
		}
	}
	if err != nil {
		return nil, err
	}
	ended = make(chan struct{})
	p.process, p.ended = cmd.Process, ended
	go func() {
		cmd.Wait()
		close(ended)
	}()
	return ended, nil
}

// PID returns the id of the running process, or 0.
func (p *Process) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process == nil {
		return 0
	}
	return p.process.Pid
}

// SignalGroup sends a signal to the whole process group.
func (p *Process) SignalGroup(signal syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process != nil {
		syscall.Kill(-p.process.Pid, signal)
	}
}

// End sends a signal to the first process, waits up to 10 s for its end, and kills what is left of
// the group. It does nothing if the process is not running.
func (p *Process) End(signal syscall.Signal) {
	p.mu.Lock()
	process, ended := p.process, p.ended
	p.mu.Unlock()
	if process == nil {
		return
	}
	p.SignalGroup(syscall.SIGCONT)
	process.Signal(signal)
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
	}
	p.SignalGroup(syscall.SIGKILL)
	<-ended
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.process == process {
		p.process = nil // the system may give its id to another process
	}
}

// findProgram looks in TEST_POSTGRES_BIN, which .ci/compat sets, then in the directories that match
// the patterns, which are those of Debian, and then in PATH. Its error is an exec.ErrNotFound.
func findProgram(name string, patterns ...string) (string, error) {
	if bin := os.Getenv("TEST_POSTGRES_BIN"); bin != "" {
		patterns = slices.Insert(patterns, 0, bin)
	}
	for _, pattern := range patterns {
		if paths, _ := filepath.Glob(filepath.Join(pattern, name)); len(paths) > 0 {
			return paths[len(paths)-1], nil
		}
	}
	return exec.LookPath(name)
}

var portSerial atomic.Int64

// FreePort returns a port that nobody listens on. It is below the range that the system assigns to
// outgoing connections, so it stays free while a server restarts.
func FreePort() string {
	for {
		port := 10000 + int(time.Now().UnixNano()/1000+portSerial.Add(1)*7919)%20000
		listener, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
		if err == nil {
			listener.Close()
			return strconv.Itoa(port)
		}
	}
}

// unprivilegedOwner returns the user postgres, or nobody, or nil if this process is not root.
func unprivilegedOwner() (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	owner, err := user.Lookup("postgres")
	if err != nil {
		owner, err = user.Lookup("nobody")
	}
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(owner.Uid, 10, 31)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(owner.Gid, 10, 31)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, err
}

// unprivileged returns a command for a program that refuses to run as root. Its standard error goes
// to a log of the Env if logName is not empty.
func (e *Env) unprivileged(dir, logName, path string, args ...string) (*exec.Cmd, error) {
	cmd := exec.Command(path, args...)
	cmd.Dir, cmd.SysProcAttr = dir, &syscall.SysProcAttr{Credential: e.owner}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	if logName == "" {
		return cmd, nil
	}
	log, err := e.Log(logName)
	if err != nil {
		return nil, err
	}
	cmd.Stderr = log
	return cmd, nil
}

// unprivilegedDir makes a directory that an unprivileged program owns.
func (e *Env) unprivilegedDir(name string) (string, error) {
	dir := filepath.Join(e.Dir, name)
	return dir, errors.Join(os.Mkdir(dir, 0o700), e.disown(dir))
}

// unprivilegedFile writes a file that an unprivileged program owns.
func (e *Env) unprivilegedFile(path, content string) error {
	return errors.Join(os.WriteFile(path, []byte(content), 0o600), e.disown(path))
}

func (e *Env) disown(path string) error {
	if e.owner == nil {
		return nil
	}
	return os.Chown(path, int(e.owner.Uid), int(e.owner.Gid))
}
