package contract

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"user-service/system/env"
)

// TestLinters checks the documents with Spectral and Redocly. Warnings and hints fail the test.
func TestLinters(t *testing.T) {
	t.Parallel()
	dir := installPackages(t, "linters")
	for name, path := range map[string]string{
		"asyncapi": "assets/asyncapi.json",
		"openapi":  "openapi.json",
	} {
		document, err := filepath.Abs(filepath.Join(root, path))
		if err != nil {
			t.Fatal(err)
		}
		for _, command := range []string{
			"spectral lint --fail-severity hint --ruleset spectral-NAME.yaml DOCUMENT",
			"redocly lint --config redocly-NAME.yaml DOCUMENT",
		} {
			linter, _, _ := strings.Cut(command, " ")
			t.Run(linter+" "+name, func(t *testing.T) {
				t.Parallel()
				run(t, dir, "npm exec --no -- "+command, "NAME", name, "DOCUMENT", document)
			})
		}
	}
}

// installPackages copies a directory of testdata, installs its npm packages, and returns the copy.
func installPackages(t *testing.T, name string) (dir string) {
	t.Helper()
	if _, err := exec.LookPath("npm"); err != nil {
		env.Missing(t, "npm", err)
	}
	dir = t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("../testdata/"+name)); err != nil {
		t.Fatal(err)
	}
	run(t, dir, "npm ci --ignore-scripts --no-audit --no-fund")
	return dir
}

// run runs a command in a directory. The replacements are pairs of a word of the command and what
// stands for it.
func run(t *testing.T, dir, command string, replacements ...string) {
	t.Helper()
	args := strings.Fields(command)
	for i, arg := range args {
		args[i] = strings.NewReplacer(replacements...).Replace(arg)
	}
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOFLAGS=", "GOWORK=off",
		"REDOCLY_TELEMETRY=off", "REDOCLY_SUPPRESS_UPDATE_NOTICE=true")
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, output)
	}
}
