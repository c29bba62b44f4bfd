package main

import (
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// stopBound is how long a stop takes at most, behind SHUTDOWN_DELAY.
const stopBound = 10 * time.Second

// deployment is what the files say that bring the service to where it runs.
type deployment struct {
	image   []string // the instructions of the Dockerfile's last stage
	compose node     // the service app
	pod     node
	main    node // the pod's container
	objects map[string]node
}

func readDeployment(t *testing.T) deployment {
	t.Helper()
	d := deployment{objects: make(map[string]node)}
	dockerfile := strings.ReplaceAll(readText(t, "Dockerfile"), "\\\n", " ")
	for line := range strings.Lines(dockerfile) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "FROM ") {
			d.image = nil
		}
		if line != "" && line[0] != '#' {
			d.image = append(d.image, line)
		}
	}
	d.compose = readYAML(t, "docker-compose.yml")[0].at("services", "app")
	for _, object := range readYAML(t, "deploy/kubernetes.yaml") {
		d.objects[fmt.Sprint(object.at("kind").value)] = object
	}
	d.pod = d.objects["Deployment"].at("spec", "template", "spec")
	d.main = d.pod.at("containers", "0")
	return d
}

func readText(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path) // #nosec G304 -- of this repository
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func TestImageHoldsTheBinaryOnly(t *testing.T) {
	t.Parallel()
	want := []string{
		"FROM scratch",
		"COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/",
		"COPY --from=build /user-service /user-service",
		"USER 65532:65532",
		"ENV HOST=0.0.0.0 PORT=8000",
		"EXPOSE 8000",
		`HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["/user-service", "healthcheck"]`,
		`ENTRYPOINT ["/user-service"]`,
	}
	if got := readDeployment(t).image; !slices.Equal(got, want) {
		t.Errorf("the image is made of\n%s", strings.Join(got, "\n"))
	}
	ignored := strings.Split(readText(t, ".dockerignore"), "\n")
	for _, private := range []string{".git", ".env*"} {
		if !slices.Contains(ignored, private) {
			t.Errorf("%s gets to whoever builds the image", private)
		}
	}
	if slices.ContainsFunc(ignored, func(line string) bool { return strings.HasPrefix(line, "!") }) {
		t.Error(".dockerignore takes something back")
	}
}

// TestDeploymentsAgree holds the image, the compose file and the manifest against each other.
func TestDeploymentsAgree(t *testing.T) {
	t.Parallel()
	d := readDeployment(t)
	manifest := d.objects["Deployment"].at("spec")
	labels := manifest.at("template", "metadata", "labels").value
	type m = map[string]any
	for _, test := range []struct {
		name string
		got  node
		want any
	}{
		{"compose user", d.compose.at("user"), nil}, // that of the image
		{"compose root", d.compose.at("read_only"), true},
		{"compose capabilities", d.compose.at("cap_drop"), []any{"ALL"}},
		{"compose added capabilities", d.compose.at("cap_add"), nil},
		{"compose privileged", d.compose.at("privileged"), nil},
		{"compose escalation", d.compose.at("security_opt"), []any{"no-new-privileges:true"}},
		{"compose port", d.compose.at("environment", "PORT"), "8000"},
		{"compose host", d.compose.at("environment", "HOST"), "0.0.0.0"},
		{"compose ports", d.compose.at("ports"), []any{"127.0.0.1:8000:8000"}},

		{"pod", d.pod.at("securityContext"), m{"runAsNonRoot": true, "runAsUser": 65532,
			"runAsGroup": 65532, "seccompProfile": m{"type": "RuntimeDefault"}}},
		{"container", d.main.at("securityContext"), m{"allowPrivilegeEscalation": false,
			"readOnlyRootFilesystem": true, "capabilities": m{"drop": []any{"ALL"}}}},
		{"token", d.pod.at("automountServiceAccountToken"), false},
		{"other containers", d.pod.at("containers", "1"), nil},
		{"volumes", d.pod.at("volumes"), nil},
		{"container ports", d.main.at("ports"), []any{m{"name": "http", "containerPort": 8000}}},
		{"service port", d.objects["Service"].at("spec", "ports", "0", "targetPort"), "http"},
		{"service", d.objects["Service"].at("spec", "selector"), labels},
		{"deployment", manifest.at("selector", "matchLabels"), labels},
		{"spread", d.pod.at("topologySpreadConstraints", "0", "labelSelector", "matchLabels"), labels},
		{"budget", d.objects["PodDisruptionBudget"].at("spec"),
			m{"minAvailable": 1, "selector": m{"matchLabels": labels}}},
		{"update", manifest.at("strategy", "rollingUpdate", "maxUnavailable"), 0},
	} {
		if !reflect.DeepEqual(test.got.value, test.want) {
			t.Errorf("%s: %v, not %v", test.name, test.got.value, test.want)
		}
	}
}

func TestDeploymentProbes(t *testing.T) {
	t.Parallel()
	d := readDeployment(t)
	for probe, path := range map[string]string{
		"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz",
	} {
		get := d.main.at(probe, "httpGet")
		if want := (map[string]any{"path": path, "port": "http"}); !reflect.DeepEqual(get.value, want) {
			t.Errorf("%s asks %v", probe, get.value)
		}
		if !slices.ContainsFunc(openRoutes(&health{}), func(r route) bool {
			return r.method == "GET" && r.path == path
		}) {
			t.Errorf("%s asks %s, which is no open route", probe, path)
		}
	}
	startup := d.main.at("startupProbe")
	patience := seconds(startup.at("periodSeconds").int(t) * startup.at("failureThreshold").int(t))
	if patience <= databaseWait {
		t.Errorf("the start may take %v, the wait for the database %v", patience, databaseWait)
	}
	start := regexp.MustCompile(`--start-period=(\S+)`).FindStringSubmatch(strings.Join(d.image, "\n"))
	if start == nil || duration(t, start[1]) < databaseWait {
		t.Errorf("the image's start period is %q", start)
	}
}

func TestDeploymentGracePeriods(t *testing.T) {
	t.Parallel()
	d := readDeployment(t)
	if sum := drainIdle + drainRequests + drainEvents + drainConsumer + closeWait; sum > stopBound {
		t.Errorf("a stop may take %v", sum)
	}
	delay := duration(t, d.env(t)["SHUTDOWN_DELAY"])
	grace := seconds(d.pod.at("terminationGracePeriodSeconds").int(t))
	if delay <= 0 || grace < delay+stopBound {
		t.Errorf("the manifest: %v after a delay of %v", grace, delay)
	}
	grace = duration(t, fmt.Sprint(d.compose.at("stop_grace_period").value))
	if d.compose.at("environment", "SHUTDOWN_DELAY").value != nil || grace < stopBound {
		t.Errorf("compose: %v", grace)
	}
}

// TestDeploymentMemory wants half as much again as the heap's limit and a password for
// each core take.
func TestDeploymentMemory(t *testing.T) {
	t.Parallel()
	d := readDeployment(t)
	limits := d.main.at("resources", "limits")
	cpus, err := strconv.Atoi(fmt.Sprint(limits.at("cpu").value))
	if err != nil {
		t.Fatalf("the limit of cores decides what memory the service takes: %v", err)
	}
	for name, test := range map[string]struct {
		limit node
		cores int
	}{
		"manifest": {limits.at("memory"), cpus},
		"compose":  {d.compose.at("mem_limit"), 16}, // of whoever tries it
	} {
		number := strings.TrimRight(fmt.Sprint(test.limit.value), "Mim")
		mebibytes, err := strconv.Atoi(number)
		if need := memoryLimit + test.cores*argonMemory<<10; err != nil || mebibytes<<20 < need*3/2 {
			t.Errorf("%s: %v, which may have to hold %d MiB", name, test.limit.value, need>>20)
		}
	}
}

// settingNames are the variables that the service asks for.
func settingNames(t *testing.T) []string {
	t.Helper()
	var names []string
	_, err := loadSettings(func(name string) string {
		names = append(names, name)
		return ""
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// env are the variables of the manifest's container; a value from the Secret is "".
func (d deployment) env(t *testing.T) map[string]string {
	t.Helper()
	values := make(map[string]string)
	for _, variable := range d.main.at("env").items() {
		name := fmt.Sprint(variable.at("name").value)
		if _, ok := values[name]; ok {
			t.Errorf("%s is there twice", name)
		}
		values[name] = ""
		if key := variable.at("valueFrom", "secretKeyRef", "key").value; key == name {
			continue
		}
		text, ok := variable.at("value").value.(string)
		if !ok || text == "" {
			t.Errorf("%s is not a text in quotes, nor that of the Secret", name)
		}
		values[name] = text
	}
	return values
}

func TestDeploymentSettings(t *testing.T) {
	t.Parallel()
	d := readDeployment(t)
	names := settingNames(t)
	env := d.env(t)
	for _, private := range []string{"DATABASE_URL", "RABBITMQ_URL", "API_KEYS"} {
		if value, ok := env[private]; !ok || value != "" {
			t.Errorf("%s does not come from the Secret", private)
		}
	}
	if _, err := loadSettings(func(name string) string { return env[name] }); err != nil {
		t.Errorf("the manifest: %v", err)
	}
	for name := range env {
		if !slices.Contains(names, name) {
			t.Errorf("the manifest: %s is no setting", name)
		}
	}
	composed, _ := d.compose.at("environment").value.(map[string]any)
	for name := range composed {
		if !slices.Contains(names, name) {
			t.Errorf("compose: %s is no setting", name)
		}
	}

	example := readText(t, ".env.example")
	for path, pattern := range map[string]string{
		".env.example": `(?m)^#?([A-Z_]+)=`,
		"README.md":    "(?m)^\\| `([A-Z_]+)` \\|",
	} {
		var listed []string
		for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(readText(t, path), -1) {
			listed = append(listed, match[1])
		}
		slices.Sort(listed)
		if !slices.Equal(listed, names) {
			t.Errorf("%s lists\n%v, the settings are\n%v", path, listed, names)
		}
	}
	values, err := parseEnvFile(example)
	if err == nil {
		_, err = loadSettings(func(name string) string { return values[name] })
	}
	if err != nil {
		t.Errorf(".env.example: %v", err)
	}
}

func seconds(n int) time.Duration { return time.Duration(n) * time.Second }

func duration(t *testing.T, text string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// node is a value of a YAML file: a map[string]any, []any, string, int, bool or nil.
type node struct{ value any }

// at follows names and indexes; what is not there is nil.
func (n node) at(path ...string) node {
	for _, step := range path {
		switch value := n.value.(type) {
		case map[string]any:
			n.value = value[step]
		case []any:
			i, err := strconv.Atoi(step)
			n.value = nil
			if err == nil && i < len(value) {
				n.value = value[i]
			}
		default:
			return node{}
		}
	}
	return n
}

func (n node) items() []node {
	var items []node
	values, _ := n.value.([]any)
	for _, value := range values {
		items = append(items, node{value})
	}
	return items
}

func (n node) int(t *testing.T) int {
	t.Helper()
	value, ok := n.value.(int)
	if !ok {
		t.Fatalf("%v is no number", n.value)
	}
	return value
}

func readYAML(t *testing.T, path string) []node {
	t.Helper()
	var documents []node
	for text := range strings.SplitSeq(readText(t, path), "\n---\n") {
		value, err := parseYAML(text)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		documents = append(documents, node{value})
	}
	return documents
}

// yamlReader reads as much of YAML as such files need: maps and lists, by indentation, and
// lists of texts in brackets. All else it refuses, so that it cannot read it wrongly.
type yamlReader struct{ lines []yamlLine }

type yamlLine struct {
	indent int
	text   string
}

var (
	yamlEntry = regexp.MustCompile(`^([A-Za-z][\w./-]*):(?: +(\S.*))?$`)
	yamlPlain = regexp.MustCompile(`^[A-Za-z0-9./$][^#"',\[\]]*$`)
	// What is plain and yet no text, in one version of YAML or another.
	yamlTyped = regexp.MustCompile(`(?i)^(y|n|yes|no|on|off|true|false|null|\.inf|\.nan|` +
		`\d[\d_]*[._][\d_]*|\.\d+|\d+(:\d+)+(\.\d*)?|\d+-\d+-\d.*|0[\dxob].*|[\d.]+e\d+)$|: |:$`)
)

func parseYAML(text string) (any, error) {
	r := &yamlReader{}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		content, _, _ := strings.Cut(" "+line, " #") // in a text in quotes it is refused later
		content = strings.TrimRight(strings.TrimPrefix(content, " "), " ")
		if strings.Contains(line, "\t") {
			return nil, fmt.Errorf("not read: %s", line)
		}
		if trimmed := strings.TrimLeft(content, " "); trimmed != "" {
			r.lines = append(r.lines, yamlLine{len(content) - len(trimmed), trimmed})
		}
	}
	value, err := r.block(0)
	if err == nil && len(r.lines) > 0 {
		err = fmt.Errorf("not read: %s", r.lines[0].text)
	}
	return value, err
}

// block reads the lines at an indentation, and what is below them.
func (r *yamlReader) block(indent int) (any, error) {
	var list []any
	entries := make(map[string]any)
	for len(r.lines) > 0 && r.lines[0].indent == indent {
		line := &r.lines[0]
		if item, ok := strings.CutPrefix(line.text, "- "); ok && len(entries) == 0 {
			value, err := r.item(line, strings.TrimLeft(item, " "))
			if err != nil {
				return nil, err
			}
			list = append(list, value)
			continue
		}
		match := yamlEntry.FindStringSubmatch(line.text)
		if match == nil || list != nil {
			return nil, fmt.Errorf("not read: %s", line.text)
		}
		if _, ok := entries[match[1]]; ok {
			return nil, fmt.Errorf("twice: %s", line.text)
		}
		r.lines = r.lines[1:]
		var err error
		if match[2] != "" {
			entries[match[1]], err = yamlScalar(match[2])
		} else if len(r.lines) > 0 && r.lines[0].indent > indent {
			entries[match[1]], err = r.block(r.lines[0].indent)
		} else {
			entries[match[1]] = nil
		}
		if err != nil {
			return nil, err
		}
	}
	if list != nil {
		return list, nil
	}
	return entries, nil
}

// item reads what follows a dash: a value, or the first entry of a map.
func (r *yamlReader) item(line *yamlLine, text string) (any, error) {
	if yamlEntry.MatchString(text) {
		line.indent += len(line.text) - len(text)
		line.text = text
		return r.block(line.indent)
	}
	r.lines = r.lines[1:]
	return yamlScalar(text)
}

func yamlScalar(text string) (any, error) {
	if n := len(text); n >= 2 && (text[0] == '"' || text[0] == '\'') {
		if inner := text[1 : n-1]; text[n-1] == text[0] && !strings.ContainsAny(inner, `"'\`) {
			return inner, nil
		}
	}
	if inner, ok := strings.CutPrefix(text, "["); ok && strings.HasSuffix(inner, "]") &&
		!strings.Contains(inner, "[") {
		var list []any
		for part := range strings.SplitSeq(strings.TrimSuffix(inner, "]"), ",") {
			value, err := yamlScalar(strings.TrimSpace(part))
			if err != nil {
				return nil, err
			}
			list = append(list, value)
		}
		return list, nil
	}
	if text == "true" || text == "false" {
		return text == "true", nil
	}
	if !yamlPlain.MatchString(text) || yamlTyped.MatchString(text) {
		return nil, fmt.Errorf("not read: %s", text)
	}
	if n, err := strconv.Atoi(text); err == nil {
		return n, nil
	}
	return text, nil
}

func TestParseYAML(t *testing.T) {
	t.Parallel()
	const text = "# comment\na: 1\nb: # more\n  - c: \"8000\" # a text\n    d: [ALL, 'x']\n" +
		"  - e:f\n\ng:\n  h: true\n  i:\nj.k/l: ${M:-n}\n"
	want := map[string]any{
		"a":     1,
		"b":     []any{map[string]any{"c": "8000", "d": []any{"ALL", "x"}}, "e:f"},
		"g":     map[string]any{"h": true, "i": nil},
		"j.k/l": "${M:-n}",
	}
	if got, err := parseYAML(text); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, text := range []string{
		"a: 1\na: 2", "- a\nb: c", "b: c\n- a", "a:\n\tb: c", "a:\n    b: c\n  d: e", "a: x\n  y",
		"  a: b", "a: yes", "a: on", "a: True", "a: ~", "a: 1.5", "a: .5", "a: 1:30", "a: 010",
		"a: 1e3", "a: -1", "a: b: c",
		"a: |\n  x", "a: >-\n  x", "a: &x b", "a: *x", "a: !t b", "<<: a", "%YAML 1.2",
		"a: 1\n...", "a: {b: c}", "a: [b, [c]]", "a: [b", "a: 'x", "a: \"x\\n\"", "a: \"x # y\"",
		"a: x'y # z'", "- - a", "a: 1_000", "a: 2026-01-01",
	} {
		if value, err := parseYAML(text); err == nil {
			t.Errorf("%q is read as %v", text, value)
		}
	}
}
