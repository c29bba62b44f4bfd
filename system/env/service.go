package env

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// ServiceConfig describes how a Service is started. The zero value starts the current build with
// its default settings.
type ServiceConfig struct {
	Previous bool     // start the previous release instead of the current build
	Settings []string // all environment variables; PORT is 0 unless it is given
	Args     []string
	Dir      string   // the working directory; "" is that of the Env
	Wrapper  []string // a command that runs the executable, such as setpriv with its options

	// OnEvent is called for each event that the service's consumer logs, if it is not nil.
	OnEvent func(eventType string, userID, version int64)
	// Log receives each line of the standard output in one Write, if it is not nil.
	Log io.Writer
}

// Service is the service as a process.
type Service struct {
	URL       string
	Ready     atomic.Bool   // the last answer of /readyz, while Probe runs
	LastEvent atomic.Int64  // when its consumer logged an event last, in Unix nanoseconds
	Ended     chan struct{} // closed when the process has ended

	cmd     *exec.Cmd
	wording wording
	onEvent func(eventType string, userID, version int64)
	log     io.Writer
	started chan int // receives the port

	output  *os.File   // the reading end of the standard output
	reading sync.Mutex // held by the reader, or by BlockOutput
	stderr  buffer
	notable buffer
}

// buffer is a bytes.Buffer for concurrent use.
type buffer struct {
	mu      sync.Mutex
	content bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.content.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.content.String()
}

// backlog is an io.Pipe whose writer never waits for the reader. A service that ends waits only 400
// ms for the reader of its log. On a busy machine, one that decodes each line would be later.
type backlog struct {
	mu      sync.Mutex
	changed *sync.Cond
	content bytes.Buffer
	closed  bool
}

func newBacklog() *backlog {
	b := &backlog{}
	b.changed = sync.NewCond(&b.mu)
	return b
}

func (b *backlog) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.changed.Signal()
	return b.content.Write(p)
}

func (b *backlog) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.changed.Signal()
	return nil
}

func (b *backlog) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.content.Len() == 0 && !b.closed {
		b.changed.Wait()
	}
	return b.content.Read(p)
}

// StartService starts the service and returns when it listens. The end of the Env kills it.
func (e *Env) StartService(c ServiceConfig) (*Service, error) {
	s, err := e.LaunchService(c)
	if err != nil {
		return nil, err
	}
	return s, s.AwaitStart()
}

// LaunchService starts the service and returns at once. The end of the Env kills it.
func (e *Env) LaunchService(c ServiceConfig) (*Service, error) {
	find, words := e.Executable, currentWording
	if c.Previous {
		find, words = e.PreviousExecutable, previousWording
	}
	path, err := find()
	if err != nil {
		return nil, err
	}
	output, input, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer input.Close()
	s := &Service{output: output, Ended: make(chan struct{}), started: make(chan int, 1),
		wording: words, onEvent: c.OnEvent, log: c.Log}
	command := slices.Concat(c.Wrapper, []string{path}, c.Args)
	s.cmd = exec.Command(command[0], command[1:]...)
	s.cmd.Dir, s.cmd.Env = cmp.Or(c.Dir, e.Dir), append([]string{"PORT=0"}, c.Settings...)
	s.cmd.Stdout, s.cmd.Stderr = input, &s.stderr
	if err := s.cmd.Start(); err != nil {
		output.Close()
		return nil, err
	}
	e.OnClose(s.Kill)
	go func() {
		s.readOutput()
		s.output.Close()
		s.cmd.Wait()
		close(s.Ended)
	}()
	return s, nil
}

// AwaitStart returns when the service listens. It may be called once.
func (s *Service) AwaitStart() error {
	select {
	case port := <-s.started:
		s.URL = fmt.Sprint("http://127.0.0.1:", port)
		s.Ready.Store(true)
		return nil
	case <-s.Ended:
		return fmt.Errorf("the service ended during its start: %s", s.Notable())
	case <-time.After(70 * time.Second):
		s.Kill()
		return fmt.Errorf("the service does not start: %s", s.Notable())
	}
}

// logLine is a line of the log, or of what is not JSON a line at ERROR.
type logLine struct {
	Level, Event string
	Port         int
	Type         string `json:"event_type"`
	UserID       int64  `json:"user_id"`
	Version      int64
}

func (s *Service) readOutput() {
	output := newBacklog()
	go func() {
		defer output.Close()
		chunk := make([]byte, 64<<10)
		for {
			s.reading.Lock()
			n, err := s.output.Read(chunk)
			s.reading.Unlock()
			output.Write(chunk[:n])
			if err != nil {
				return
			}
		}
	}()
	lines := bufio.NewScanner(output)
	lines.Buffer(nil, 1<<20)
	isRequest := []byte(`"event":"` + s.wording.request)
	for lines.Scan() {
		text := lines.Bytes()
		if s.log != nil {
			s.log.Write(append(slices.Clone(text), '\n'))
		}
		// Most lines are about requests. Decoding them would cost too much.
		if !bytes.Contains(text, isRequest) {
			s.readLine(text)
		}
	}
}

func (s *Service) readLine(text []byte) {
	var line logLine
	if err := json.Unmarshal(text, &line); err != nil {
		line.Level = "ERROR"
	}
	switch {
	case strings.HasPrefix(line.Event, s.wording.receivedEvent):
		s.LastEvent.Store(time.Now().UnixNano())
		if s.onEvent != nil {
			s.onEvent(line.Type, line.UserID, line.Version)
		}
	case line.Event == s.wording.started:
		s.started <- line.Port
	case line.Level != "INFO" || line.Event == s.wording.restored:
		s.notable.Write(append(slices.Clone(text), '\n'))
	}
}

// Notable returns the log's lines at WARN and above and those about restored connections, and then
// the standard error.
func (s *Service) Notable() string { return s.notable.String() + s.stderr.String() }

// Unexpected returns the lines of Notable that are neither at WARN nor about a restored connection.
func (s *Service) Unexpected() (lines []string) {
	for line := range strings.Lines(s.Notable()) {
		if !strings.Contains(line, `"level":"WARN"`) && !strings.Contains(line, s.wording.restored) {
			lines = append(lines, line)
		}
	}
	return lines
}

// Restored reports whether the log says of each lost connection that it was restored.
func (s *Service) Restored() bool {
	text := s.Notable()
	return strings.Count(text, s.wording.lost) == strings.Count(text, s.wording.restored)
}

// Signal sends a signal to the process. The error is os.ErrProcessDone if it has ended.
func (s *Service) Signal(signal os.Signal) error { return s.cmd.Process.Signal(signal) }

// Kill kills the process. It may have ended.
func (s *Service) Kill() { s.cmd.Process.Kill() }

// ExitCode returns the exit code after Ended is closed, or -1 if a signal ended the process.
func (s *Service) ExitCode() int { return s.cmd.ProcessState.ExitCode() }

// State returns how the process ended after Ended is closed.
func (s *Service) State() *os.ProcessState { return s.cmd.ProcessState }

// BlockOutput makes the next writes to the standard output block, until unblock is called.
func (s *Service) BlockOutput() (unblock func()) {
	s.reading.Lock()
	const setPipeSize = 1031 // F_SETPIPE_SZ of Linux; a small pipe is full at once
	if raw, err := s.output.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			syscall.Syscall(syscall.SYS_FCNTL, fd, setPipeSize, 4096)
		})
	}
	return s.reading.Unlock
}

func (s *Service) alive() bool {
	select {
	case <-s.Ended:
		return false
	default:
		return true
	}
}

// Probe requests /readyz every 100 ms, as a load balancer does, until the process has ended.
func (s *Service) Probe() {
	prober := &http.Client{Timeout: time.Second}
	defer prober.CloseIdleConnections()
	for s.alive() {
		response, err := prober.Get(s.URL + "/readyz")
		if err == nil {
			response.Body.Close()
		}
		s.Ready.Store(err == nil && response.StatusCode == http.StatusOK)
		time.Sleep(100 * time.Millisecond)
	}
	s.Ready.Store(false)
}

// Metric returns a value from /metrics, or 0 if there is none.
func (s *Service) Metric(name string) float64 {
	prober := &http.Client{Timeout: time.Second}
	defer prober.CloseIdleConnections()
	response, err := prober.Get(s.URL + "/metrics")
	if err != nil {
		return 0
	}
	defer response.Body.Close()
	for lines := bufio.NewScanner(response.Body); lines.Scan(); {
		if text, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			value, _ := strconv.ParseFloat(text, 64)
			return value
		}
	}
	return 0
}
