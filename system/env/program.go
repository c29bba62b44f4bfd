package env

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Secret is part of every password that a test sends. It must be in no output of a Program.
const Secret = "correct-horse-s3cr3t"

// Program is a Service under test. When the test ends, the process is stopped and all of its output
// is checked.
type Program struct {
	*Service

	t      *testing.T
	output buffer
	errors atomic.Int64 // AnyErrors, or how many lines at level ERROR the test causes
}

// StartProgram starts the service with these settings in an empty directory, and returns when it
// listens.
func (e *Env) StartProgram(t *testing.T, settings ...string) *Program {
	t.Helper()
	p := e.LaunchProgram(t, ServiceConfig{Settings: settings})
	p.AwaitStart()
	return p
}

// LaunchProgram starts the service and returns at once. If c has no Dir, it is an empty directory.
func (e *Env) LaunchProgram(t *testing.T, c ServiceConfig) *Program {
	t.Helper()
	if c.Dir == "" {
		c.Dir = t.TempDir()
	}
	p := &Program{t: t}
	c.Log = &p.output
	var err error
	if p.Service, err = e.LaunchService(c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Stop()
		p.checkOutput()
	})
	return p
}

// AwaitStart returns the start line as soon as the service listens. It may be called once.
func (p *Program) AwaitStart() Line {
	p.t.Helper()
	if err := p.Service.AwaitStart(); err != nil {
		p.t.Fatal(err)
	}
	return p.Lines(LogStarted)[0]
}

// Signal sends a signal to the process, which must not have ended.
func (p *Program) Signal(signal os.Signal) {
	p.t.Helper()
	if err := p.Service.Signal(signal); err != nil {
		p.t.Fatal(err)
	}
}

// Stop ends the process as an orchestrator does, if it has not ended, and returns its exit code as
// Wait does.
func (p *Program) Stop() int {
	p.t.Helper()
	_ = p.Service.Signal(syscall.SIGTERM) // it may have ended
	httpClient.CloseIdleConnections()
	return p.Wait()
}

// Wait returns the exit code of the process when it has ended, or -1 if a signal ended it. After
// 20 s it fails the test and kills the process.
func (p *Program) Wait() int {
	p.t.Helper()
	select {
	case <-p.Ended:
	case <-time.After(20 * time.Second):
		p.Kill()
		<-p.Ended
		p.t.Errorf("the process does not end within 20 s:\n%s", p.Log())
	}
	return p.ExitCode()
}

// AnyErrors makes AllowErrors accept any number.
const AnyErrors = -1

// AllowErrors announces that the test causes exactly n lines at level ERROR. Without it, there must
// be none.
func (p *Program) AllowErrors(n int) { p.errors.Store(int64(n)) }

// Line is a line of the log.
type Line map[string]any

// Log returns the log so far.
func (p *Program) Log() string { return p.output.String() }

// Lines returns the lines with an event, or all lines for "".
func (p *Program) Lines(event string) []Line {
	var lines []Line
	for text := range strings.Lines(p.Log()) {
		var line Line
		if json.Unmarshal([]byte(text), &line) == nil && (event == "" || line["event"] == event) {
			lines = append(lines, line)
		}
	}
	return lines
}

// AwaitLine waits for a line with an event and attributes, which are given as names and values in
// turn. It returns the first one.
func (p *Program) AwaitLine(event string, attributes ...any) Line {
	p.t.Helper()
	var found Line
	Eventually(p.t, fmt.Sprintf("a log line %q with %v", event, attributes), func() bool {
		lines := p.Lines(event)
		i := slices.IndexFunc(lines, func(l Line) bool { return l.has(attributes) })
		if i >= 0 {
			found = lines[i]
		}
		return i >= 0
	})
	return found
}

func (l Line) has(attributes []any) bool {
	for pair := range slices.Chunk(attributes, 2) {
		if fmt.Sprint(l[pair[0].(string)]) != fmt.Sprint(pair[1]) {
			return false
		}
	}
	return true
}

// Eventually waits until a condition holds. After 30 s it fails the test.
func Eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 30 s for %s", what)
		}
	}
}

// checkOutput checks what holds for the output of every process: there is nothing on standard
// error, and the log has as many errors as the test announced.
func (p *Program) checkOutput() {
	p.t.Helper()
	if text := p.stderr.String(); text != "" {
		p.t.Errorf("got on standard error, want nothing: %s", text)
	}
	errors := int64(0)
	for text := range strings.Lines(p.Log()) {
		if err := checkLine(text); err != nil {
			p.t.Errorf("%v: %s", err, text)
		}
		var line Line
		if json.Unmarshal([]byte(text), &line) == nil && line["level"] == "ERROR" {
			errors++
		}
	}
	if want := p.errors.Load(); errors != want && want != AnyErrors {
		p.t.Errorf("got %d lines at ERROR, want %d:\n%s", errors, want, p.Log())
	}
}

// checkLine checks what holds for every line of a log.
func checkLine(text string) error {
	var line Line
	if err := json.Unmarshal([]byte(text), &line); err != nil {
		return fmt.Errorf("a log line is not a JSON object: %w", err)
	}
	want := []string{"timestamp", "level", "event"}
	if _, ok := line["trace_id"]; ok {
		want = append(want, "trace_id")
	}
	if got := firstNames(text, len(want)); !slices.Equal(got, want) {
		return fmt.Errorf("a log line begins with %v, want %v", got, want)
	}
	const layout = "2006-01-02T15:04:05.000000Z"
	if _, err := time.Parse(layout, fmt.Sprint(line["timestamp"])); err != nil {
		return err
	}
	if containsPassword(text) {
		return fmt.Errorf("a log line contains a password")
	}
	if strings.Contains(text, "superfluous") {
		return fmt.Errorf("a handler wrote its status twice")
	}
	return nil
}

// firstNames returns the names of the first n members of a JSON object.
func firstNames(object string, n int) (names []string) {
	decoder := json.NewDecoder(strings.NewReader(object))
	decoder.Token() // {
	for range n {
		name, err := decoder.Token()
		var value json.RawMessage
		if err != nil || decoder.Decode(&value) != nil {
			break
		}
		names = append(names, fmt.Sprint(name))
	}
	return names
}

// containsPassword reports whether a text contains a test's password, or the hash of one.
func containsPassword(text string) bool {
	return strings.Contains(text, Secret) || strings.Contains(text, "argon2id")
}
