package contract

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"user-service/system/env"
)

// promtool runs promtool in a directory, and fails the test unless it succeeds.
func promtool(t *testing.T, dir, input string, arguments ...string) (output string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		env.Missing(t, "promtool", err)
	}
	cmd := exec.CommandContext(t.Context(), path, arguments...)
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(input)
	text, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(arguments, " "), err, text)
	}
	return string(text)
}

// TestMetricsLint checks /metrics of a service without and with servers.
func TestMetricsLint(t *testing.T) {
	t.Parallel()
	for name, settings := range map[string]func(*testing.T) []string{
		"memory":  func(*testing.T) []string { return nil },
		"servers": serverSettings,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text := readMetrics(t, settings(t)...)
			if output := promtool(t, root, text, "check", "metrics"); output != "" {
				t.Errorf("promtool check metrics prints\n%s", output)
			}
		})
	}
}

// serverSettings names a database and a broker that only this test uses.
func serverSettings(t *testing.T) []string {
	return []string{"DATABASE_URL=" + env.NewDatabase(t).URL, "RABBITMQ_URL=" + newVhost(t)}
}

// readMetrics returns /metrics of a service that has answered a request.
func readMetrics(t *testing.T, settings ...string) string {
	t.Helper()
	s := startService(t, settings...)
	s.CreateUser("John", "Doe")
	return s.Do("GET", "/metrics", "").Body
}

// TestMetricNames checks that the rules, the dashboard and the documentation name only metrics that
// /metrics shows, and that the documentation has all of them.
func TestMetricNames(t *testing.T) {
	t.Parallel()
	shown := make(map[string]bool)
	text := readMetrics(t, serverSettings(t)...)
	for _, match := range regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)$`).FindAllStringSubmatch(text, -1) {
		shown[match[1]] = true
		if match[2] == "histogram" {
			shown[match[1]+"_bucket"] = true
		}
	}
	for source, names := range map[string][]string{
		"prometheus-rules.yaml": metricsOf(slices.Collect(maps.Values(readRules(t)))),
		"grafana.json":          metricsOf(readDashboard(t).expressions()),
		"operations.md":         documentedMetrics(t),
	} {
		if len(names) < 10 {
			t.Errorf("%s: found only the metrics %v", source, names)
		}
		for _, name := range names {
			if !shown[name] {
				t.Errorf("%s: /metrics does not have %s", source, name)
			}
		}
	}
	runtime := regexp.MustCompile(`^(go|process)_|_bucket$`)
	for name := range shown {
		if !runtime.MatchString(name) && !slices.Contains(documentedMetrics(t), name) {
			t.Errorf("operations.md does not have %s", name)
		}
	}
}

// documentedMetrics returns the names in the table of metrics in operations.md.
func documentedMetrics(t *testing.T) (names []string) {
	t.Helper()
	_, table, _ := strings.Cut(readFile(t, "docs/operations.md"), "| metric | meaning |\n")
	table, _, _ = strings.Cut(table, "\n\n")
	for row := range strings.Lines(table) {
		cell := strings.Split(row, "|")[1]
		for _, match := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(cell, -1) {
			names = append(names, match[1])
		}
	}
	return names
}

// metricsOf returns the names of the metrics in PromQL expressions, except for up, which Prometheus
// adds.
func metricsOf(expressions []string) (names []string) {
	text := regexp.MustCompile(`"[^"]*"`) // may contain braces
	others := regexp.MustCompile(`\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)|\b[a-z_]+\(|\b(sum|max|min|up)\b`)
	for _, expression := range expressions {
		bare := others.ReplaceAllString(text.ReplaceAllString(expression, ""), "")
		names = append(names, regexp.MustCompile(`[a-z][a-z_]+`).FindAllString(bare, -1)...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// readRules returns the expressions of the alerts by name.
func readRules(t *testing.T) map[string]string {
	t.Helper()
	var file struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	if err := yaml.Unmarshal([]byte(readFile(t, "deploy/prometheus-rules.yaml")), &file); err != nil {
		t.Fatal(err)
	}
	expressions := make(map[string]string)
	for _, group := range file.Groups {
		for _, rule := range group.Rules {
			expressions[rule.Alert] = rule.Expr
		}
	}
	return expressions
}

// TestRules runs the tests of the alerts, and checks that each alert has a test and a row in
// operations.md.
func TestRules(t *testing.T) {
	t.Parallel()
	promtool(t, filepath.Join(root, "system/testdata"), "", "test", "rules",
		"prometheus-rules-test.yaml")
	promtool(t, root, "", "check", "rules", "deploy/prometheus-rules.yaml")
	rules := readRules(t)
	tests := readFile(t, "system/testdata/prometheus-rules-test.yaml")
	operations := readFile(t, "docs/operations.md")
	for name := range rules {
		if strings.Count(tests, "alertname: "+name) < 2 || !strings.Contains(tests, "alertname: "+name+"\n") {
			t.Errorf("%s has no test that it fires, or none that it does not", name)
		}
		if !strings.Contains(operations, "\n| `"+name+"` |") {
			t.Errorf("%s is not documented", name)
		}
	}
	for _, match := range regexp.MustCompile("\n\\| `(User[A-Za-z]+)` \\|").FindAllStringSubmatch(operations, -1) {
		if rules[match[1]] == "" {
			t.Errorf("%s is documented, and does not exist", match[1])
		}
	}
}

// dashboard is what a Grafana dashboard needs.
type dashboard struct {
	Title         string
	UID           string
	SchemaVersion int
	Panels        []panel
	Templating    struct {
		List []struct {
			Name, Type string
			Query      any // a string, or an object
		}
	}
}

type panel struct {
	ID         int
	Title      string
	Type       string
	GridPos    struct{ X, Y, W, H int }
	Datasource source
	Targets    []struct {
		RefID      string
		Expr       string
		Datasource source
	}
}

type source struct{ Type, UID string }

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	if err := json.Unmarshal([]byte(readFile(t, "deploy/grafana.json")), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// expressions returns the queries of the panels, with values for Grafana's variables.
func (d dashboard) expressions() (expressions []string) {
	values := strings.NewReplacer("$__rate_interval", "1m", "$job", "user-service")
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			expressions = append(expressions, values.Replace(target.Expr))
		}
	}
	return expressions
}

// TestDashboard checks that the dashboard fits on a screen, that its panels use the variables, and
// that Prometheus accepts the queries.
func TestDashboard(t *testing.T) {
	t.Parallel()
	d := readDashboard(t)
	if d.SchemaVersion != 39 || d.Title == "" || d.UID == "" || len(d.Panels) != 12 {
		t.Errorf("schema version %d, title %q, uid %q, %d panels", d.SchemaVersion, d.Title, d.UID,
			len(d.Panels))
	}
	if list := d.Templating.List; len(list) != 2 || list[0].Name != "datasource" ||
		list[0].Type != "datasource" || list[0].Query != "prometheus" || list[1].Name != "job" {
		t.Errorf("the variables are %+v", list)
	}
	prometheus := source{Type: "prometheus", UID: "${datasource}"}
	taken := make(map[[2]int]string)
	for i, p := range d.Panels {
		at := p.GridPos
		if p.ID != i+1 || p.Type != "timeseries" || p.Datasource != prometheus || len(p.Targets) == 0 ||
			at.W < 1 || at.H < 1 || at.X+at.W > 24 || at.Y+at.H > 24 {
			t.Errorf("panel %+v", p)
		}
		for x := at.X; x < at.X+at.W; x++ {
			for y := at.Y; y < at.Y+at.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("%q covers %q", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		for k, target := range p.Targets {
			if target.Datasource != prometheus || target.RefID != string(rune('A'+k)) ||
				!strings.Contains(target.Expr, `job="$job"`) {
				t.Errorf("%q: target %+v", p.Title, target)
			}
		}
	}
	checkQueries(t, d.expressions())
}

// checkQueries checks that Prometheus can parse expressions.
func checkQueries(t *testing.T, expressions []string) {
	t.Helper()
	var rules bytes.Buffer
	rules.WriteString("groups:\n- name: dashboard\n  rules:\n")
	for _, expression := range expressions {
		quoted, err := json.Marshal(expression)
		if err != nil {
			t.Fatal(err)
		}
		rules.WriteString("  - record: query\n    labels: {query: " + string(quoted) + "}\n    expr: " +
			string(quoted) + "\n")
	}
	file := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, rules.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, root, "", "check", "rules", file)
}
