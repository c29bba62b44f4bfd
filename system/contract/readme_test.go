package contract

import (
	"context"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"user-service/system/env"
)

// TestReadme runs the commands of README.md in its order, against one service without users,
// and compares their output with the one that the README shows.
//
// A block ```console has lines "$ command", each followed by its output; a command goes on after
// a line that ends in a backslash. A command without output, and each line of a block ```sh, need
// only succeed. Comments after " # " are dropped. `...` or `…` in an output matches anything.
func TestReadme(t *testing.T) {
	t.Parallel()
	s := startService(t)
	run := 0
	for _, command := range readmeCommands(readFile(t, "README.md")) {
		if skip := notRun(command.text); skip != "" {
			t.Logf("not run, because it begins with %q: %s", skip, command.text)
			continue
		}
		run++
		output, err := runReadme(t, s, command.text)
		if err != nil {
			t.Errorf("$ %s\n%v\n%s", command.text, err, output)
			continue
		}
		if command.output != "" && !matches(command.output, output) {
			t.Errorf("$ %s\nthe README shows\n%s\nbut the output is\n%s", command.text,
				command.output, output)
		}
	}
	if run < 5 {
		t.Errorf("only %d commands were run", run)
	}
}

// skippedPrefixes begin the commands that are not run: they need Docker or servers, change the
// machine, clone the repository, take long, or start the service, which the test does itself.
var skippedPrefixes = []string{"docker ", "git clone", "cd ", "cp ", "createuser", "createdb",
	"psql", "make", "go run .", "DATABASE_URL=", "RABBITMQ_URL=", "kubectl"}

// notRun returns the prefix for which a command is not run, or "" if it is run. `go run .` with
// arguments is run.
func notRun(command string) string {
	for _, prefix := range skippedPrefixes {
		if prefix == "go run ." && command != prefix {
			continue
		}
		if strings.HasPrefix(command, prefix) {
			return prefix
		}
	}
	return ""
}

// readmeCommand is a command of the README and the output that it shows, which may be none.
type readmeCommand struct{ text, output string }

func readmeCommands(readme string) []readmeCommand {
	var commands []readmeCommand
	block, continued := "", false
	for line := range strings.Lines(readme) {
		line = strings.TrimSuffix(line, "\n")
		last := len(commands) - 1
		text, isCommand := strings.CutPrefix(line, "$ ")
		switch {
		case strings.HasPrefix(line, "```"):
			block, continued = strings.TrimPrefix(line, "```"), false
			if block != "console" && block != "sh" {
				block = ""
			}
			continue
		case block == "":
			continue
		case continued:
			commands[last].text += "\n" + line
		case block == "sh" && (line == "" || strings.HasPrefix(line, "#")):
			continue
		case block == "sh":
			commands = append(commands, readmeCommand{text: line})
		case isCommand:
			commands = append(commands, readmeCommand{text: text})
		case last >= 0:
			commands[last].output += line + "\n"
		}
		continued = strings.HasSuffix(line, `\`) && (block == "sh" || isCommand || continued)
	}
	for i := range commands {
		commands[i].text, _, _ = strings.Cut(commands[i].text, " # ")
		commands[i].text = strings.TrimSpace(commands[i].text)
	}
	return commands
}

// runReadme runs a command in a shell with the port of s in place of 8000. `go` builds what is
// in the repository, and `user-service` is the binary. It returns what the command writes.
func runReadme(t *testing.T, s *env.Program, command string) (string, error) {
	t.Helper()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	executable, err := testEnv.Executable() // PATH finds it as user-service
	if err != nil {
		t.Fatal(err)
	}
	command = strings.ReplaceAll(command, "localhost:8000", "127.0.0.1:"+u.Port())
	command = strings.ReplaceAll(command, "8000", u.Port())
	command = regexp.MustCompile(`(^|\s)(\./user-service|go run \.) `).
		ReplaceAllString(command, "${1}user-service ")
	command = strings.ReplaceAll(command, "-o user-service ",
		"-o "+filepath.Join(t.TempDir(), "built")+" ")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", command)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(executable)+":"+os.Getenv("PATH"),
		"CURL_HOME=/nonexistent", "PORT="+u.Port(), "HOST=127.0.0.1", "DATABASE_URL=", "RABBITMQ_URL=")
	var stderr strings.Builder
	cmd.Stderr = &stderr // curl draws a progress meter there
	output, err := cmd.Output()
	if err != nil {
		return string(output) + stderr.String(), err
	}
	return string(output), nil
}

// varying are the parts of an output that differ from run to run. A part matches any other of
// its kind.
var varying = []struct{ pattern, name string }{
	{`usk_[\w-]{43}`, "KEY"},
	{`\b[0-9a-f]{64}\b`, "SHA256"},
	{`\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b`, "UUID"},
	{`\b[0-9a-f]{32}\b`, "TRACEID"},
	{`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`, "TIME"},
	{`(?m)^Date: .*$`, "Date: TIME"},
	{`"duration_ms":[\d.]+`, `"duration_ms":N`},
	{`127\.0\.0\.1:\d+|localhost:\d+`, "HOST:PORT"},
}

func normalize(text string) string {
	text = strings.ReplaceAll(text, "\r\n", "\n")
	for _, v := range varying {
		text = regexp.MustCompile(v.pattern).ReplaceAllString(text, v.name)
	}
	return strings.TrimSpace(text)
}

// matches reports whether an output is the one that the README shows, apart from what varies.
func matches(shown, output string) bool {
	shown = strings.ReplaceAll(normalize(shown), "…", "...")
	var parts []string
	for part := range strings.SplitSeq(shown, "...") {
		parts = append(parts, regexp.QuoteMeta(part))
	}
	return regexp.MustCompile(`(?s)^` + strings.Join(parts, ".*") + `$`).MatchString(normalize(output))
}

func TestReadmeCommands(t *testing.T) {
	t.Parallel()
	got := readmeCommands("text\n```sh\nmake  # all\n\n```\n```json\n$ no\n```\n" +
		"```console\n$ a \\\n  -b\nout\n\n$ c\n```\n")
	want := []readmeCommand{{text: "make"}, {"a \\\n  -b", "out\n\n"}, {text: "c"}}
	if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
		t.Errorf("%+v", got)
	}
	for _, test := range []struct {
		shown, output string
		want          bool
	}{
		{"a\n", "a", true},
		{"a", "b", false},
		{"a\n...\nc", "a\nb\nc", true},
		{"", "a", false},
		{`"2026-11-23T16:26:22.275535Z"`, `"2027-01-01T00:00:00.000001Z"`, true},
		{`"version":1`, `"version":2`, false},
	} {
		if matches(test.shown, test.output) != test.want {
			t.Errorf("%+v", test)
		}
	}
}
