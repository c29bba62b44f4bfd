package process

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"user-service/system/env"
)

// openTerminal returns both ends of a pseudo terminal.
func openTerminal(t *testing.T) (screen, terminal *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { screen.Close() })
	fd := int(screen.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprint("/dev/pts/", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return screen, terminal
}

// TestTransferBar checks the bar on a terminal. Lines about refused users are whole.
func TestTransferBar(t *testing.T) {
	t.Parallel()
	d, _ := newUserDatabase(t)
	lines := hashedLines(20_000, true) + "null\n"
	path := dirWithEnvFile(t, lines) + "/.env"
	for _, test := range []struct {
		args      []string
		done, bar string
	}{
		{[]string{"import", path}, `"event":"Import finished","users":20000`,
			`Import +\d+% \|[^|]*\| \(\d+/20001, \d+ users/s\) \[`},
		{[]string{"import", "-"}, `"event":"Import finished","users":0,"unchanged":20000`,
			`Import +\(\d+/-, \d+ users/s\) \[`},
		{[]string{"export"}, `"event":"Export finished","users":20000`,
			`Export +\d+% \|[^|]*\| \(\d+/20000, \d+ users/s\) \[`},
	} {
		screen, terminal := openTerminal(t)
		cmd := transferCommand(t, d.URL, test.args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(lines), io.Discard, terminal
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		terminal.Close()
		text, _ := io.ReadAll(screen) // ends with EIO
		cmd.Wait()
		if !bytes.Contains(text, []byte(test.done)) || !regexp.MustCompile(test.bar).Match(text) {
			t.Errorf("%v: got on the terminal\n%q\nwant %s and a match of %s", test.args, text,
				test.done, test.bar)
		}
		const refused = "{\"line\":20001,\"reason\":\"must be a JSON object, but is null\"}\r\n"
		if test.args[0] == "import" && !bytes.Contains(text, []byte(refused)) {
			t.Errorf("%v: got on the terminal\n%q\nwant %s", test.args, text, refused)
		}
	}
}

// TestTransferProgress waits for the line that an import writes every ten seconds if standard error
// is no terminal.
func TestTransferProgress(t *testing.T) {
	t.Parallel()
	d, _ := newUserDatabase(t)
	cmd := transferCommand(t, d.URL, "import", "-")
	cmd.Stdin = openInput(t, hashedLines(1000, true))
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 1000)
	n, _ := log.Read(line)
	want := regexp.MustCompile(`"event":"Import in progress","users":1000,"users_per_second":\d+`)
	if !want.Match(line[:n]) || bytes.Contains(line[:n], []byte(env.Secret)) {
		t.Errorf("got %s\nwant a match of %v", line[:n], want)
	}
}
