package contract

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rhysd/actionlint"
	"sigs.k8s.io/yaml"
)

// workflows returns the paths of the GitHub workflows.
func workflows(t *testing.T) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(root, ".github/workflows/*"))
	if err != nil || len(paths) < 2 {
		t.Fatalf("%v, %v", paths, err)
	}
	return paths
}

// TestWorkflows runs actionlint. It uses shellcheck where that is installed.
func TestWorkflows(t *testing.T) {
	t.Parallel()
	linter, err := actionlint.NewLinter(t.Output(), &actionlint.LinterOptions{
		Shellcheck: "shellcheck", Color: actionlint.ColorOptionKindNever})
	if err != nil {
		t.Fatal(err)
	}
	findings, err := linter.LintFiles(workflows(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(findings) > 0 {
		t.Errorf("%d findings", len(findings))
	}
}

// pinned matches an action with its full commit, followed by the version as a comment.
var pinned = regexp.MustCompile(`^[\w-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$`)

// TestActionsArePinned checks that no action can change under a workflow, that a workflow may
// only read by default, that checkouts keep no credentials, and that each job ends.
func TestActionsArePinned(t *testing.T) {
	t.Parallel()
	uses := regexp.MustCompile(`(?m)\buses:\s*(\S.*)$`)
	for _, path := range workflows(t) {
		name := filepath.Join(".github/workflows", filepath.Base(path))
		text := readFile(t, name)
		for _, match := range uses.FindAllStringSubmatch(text, -1) {
			if !pinned.MatchString(match[1]) {
				t.Errorf("%s: %s is not pinned", name, match[1])
			}
		}
		checkWorkflow(t, name, text)
	}
}

func checkWorkflow(t *testing.T, name, text string) {
	t.Helper()
	var workflow struct {
		Permissions map[string]string
		Concurrency struct{ Group string }
		Jobs        map[string]struct {
			TimeoutMinutes int `json:"timeout-minutes"`
			Steps          []struct {
				Uses string
				With map[string]any
			}
		}
	}
	if err := yaml.Unmarshal([]byte(text), &workflow); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if len(workflow.Permissions) != 1 || workflow.Permissions["contents"] != "read" {
		t.Errorf("%s: the default permissions are %v", name, workflow.Permissions)
	}
	if workflow.Concurrency.Group == "" {
		t.Errorf("%s: no concurrency group", name)
	}
	for id, job := range workflow.Jobs {
		if job.TimeoutMinutes == 0 {
			t.Errorf("%s: the job %s has no timeout", name, id)
		}
		for _, step := range job.Steps {
			keeps := step.With["persist-credentials"] != false
			if strings.HasPrefix(step.Uses, "actions/checkout@") && keeps {
				t.Errorf("%s: the checkout of %s keeps credentials", name, id)
			}
		}
	}
}

// TestDependabot checks that each part of the repository that has dependencies is updated.
func TestDependabot(t *testing.T) {
	t.Parallel()
	var config struct {
		Version int
		Updates []struct {
			Ecosystem   string `json:"package-ecosystem"`
			Directory   string
			Directories []string
			Schedule    struct{ Interval string }
			Groups      map[string]struct{ Patterns []string }
		}
	}
	text := []byte(readFile(t, ".github/dependabot.yml"))
	if err := yaml.UnmarshalStrict(text, &config); err != nil {
		t.Fatal(err)
	}
	updated := make(map[string]bool)
	for _, update := range config.Updates {
		for _, directory := range append(update.Directories, update.Directory) {
			updated[update.Ecosystem+" "+directory] = update.Schedule.Interval != ""
		}
	}
	for _, want := range []string{"gomod /", "gomod /system", "docker /", "github-actions /"} {
		if !updated[want] {
			t.Errorf("%s is not updated", want)
		}
	}
}
