package contract

import (
	"bytes"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"user-service/system/env"
)

// What the deployment files may rely on. The tests of the service check these bounds.
const (
	databaseWait = 60 * time.Second // at start
	stopBound    = 10 * time.Second // after SHUTDOWN_DELAY
	heapBound    = 64 << 20         // bytes
	hashBound    = 7 << 20          // bytes for each core
)

// manifest is deploy/kubernetes.yaml.
type manifest struct {
	deployment appsv1.Deployment
	service    corev1.Service
	budget     policyv1.PodDisruptionBudget
	network    networkingv1.NetworkPolicy
	pod        corev1.PodSpec
	container  corev1.Container
}

// readManifest decodes the manifest strictly: an unknown or duplicate field fails the test.
func readManifest(t *testing.T) manifest {
	t.Helper()
	var m manifest
	objects := map[string]any{
		"apps/v1 Deployment":                 &m.deployment,
		"v1 Service":                         &m.service,
		"policy/v1 PodDisruptionBudget":      &m.budget,
		"networking.k8s.io/v1 NetworkPolicy": &m.network,
	}
	text := readFile(t, "deploy/kubernetes.yaml")
	for _, document := range bytes.Split([]byte(text), []byte("\n---\n")) {
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal(document, &kind); err != nil {
			t.Fatal(err)
		}
		object := objects[kind.APIVersion+" "+kind.Kind]
		if object == nil {
			t.Fatalf("unexpected, or twice: %s %s", kind.APIVersion, kind.Kind)
		}
		delete(objects, kind.APIVersion+" "+kind.Kind)
		text, err := yaml.YAMLToJSONStrict(document)
		if err != nil {
			t.Fatalf("%s: %v", kind.Kind, err)
		}
		// As Kubernetes decodes it: unlike encoding/json, with the case of names.
		strict, err := json.UnmarshalStrict(text, object)
		if err := errors.Join(append(strict, err)...); err != nil {
			t.Fatalf("%s: %v", kind.Kind, err)
		}
	}
	if len(objects) > 0 {
		t.Fatalf("missing: %v", objects)
	}
	m.pod = m.deployment.Spec.Template.Spec
	if len(m.pod.Containers) != 1 {
		t.Fatalf("%d containers", len(m.pod.Containers))
	}
	m.container = m.pod.Containers[0]
	return m
}

// readCompose loads docker-compose.yml, which checks it against the Compose Specification, and
// returns the service app.
func readCompose(t *testing.T) types.ServiceConfig {
	t.Helper()
	options, err := cli.NewProjectOptions([]string{filepath.Join(root, "docker-compose.yml")},
		cli.WithProfiles([]string{"app"}))
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"postgres", "rabbitmq"} {
		s := project.Services[name]
		if s.Image == "" || s.HealthCheck == nil || len(s.Profiles) > 0 {
			t.Errorf("%s: image %q, health check %v, profiles %v", name, s.Image, s.HealthCheck, s.Profiles)
		}
		for _, port := range s.Ports {
			if port.HostIP != "127.0.0.1" {
				t.Errorf("%s: the port %s is open to %q", name, port.Published, port.HostIP)
			}
		}
	}
	return project.Services["app"]
}

// readDockerfile returns the instructions of the stages, one line each.
func readDockerfile(t *testing.T) (stages [][]string) {
	t.Helper()
	text := strings.ReplaceAll(readFile(t, "Dockerfile"), "\\\n", " ")
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if strings.HasPrefix(line, "FROM ") {
			stages = append(stages, nil)
		}
		stages[len(stages)-1] = append(stages[len(stages)-1], line)
	}
	return stages
}

func TestImage(t *testing.T) {
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
	stages := readDockerfile(t)
	if got := stages[len(stages)-1]; !slices.Equal(got, want) {
		t.Errorf("the image is made of\n%s", strings.Join(got, "\n"))
	}
	ignored := strings.Split(readFile(t, ".dockerignore"), "\n")
	for _, private := range append(secretFiles(t), ".git", ".env*") {
		if !slices.Contains(ignored, private) {
			t.Errorf("the build context contains %s", private)
		}
	}
	if slices.ContainsFunc(ignored, func(line string) bool { return strings.HasPrefix(line, "!") }) {
		t.Error(".dockerignore has an exception")
	}
}

// secretFiles returns the files that the manifest asks people to make.
func secretFiles(t *testing.T) (names []string) {
	t.Helper()
	text := readFile(t, "deploy/kubernetes.yaml")
	for _, match := range regexp.MustCompile(`--from-file=\w+=(\S+)`).FindAllStringSubmatch(text, -1) {
		names = append(names, match[1])
	}
	if len(names) != 3 {
		t.Errorf("the manifest asks for the files %v, want 3", names)
	}
	return names
}

// TestPrivateFiles checks that git ignores the files with settings and secrets.
func TestPrivateFiles(t *testing.T) {
	t.Parallel()
	ignored := strings.Split(readFile(t, ".gitignore"), "\n")
	for _, name := range secretFiles(t) {
		if !slices.Contains(ignored, "/"+name) {
			t.Errorf("git does not ignore %s", name)
		}
	}
	if !slices.Contains(ignored, ".env") {
		t.Error("git does not ignore .env")
	}
	example := readFile(t, ".env.example")
	if !strings.Contains(example, "\nHOST=127.0.0.1\n") || strings.Contains(example, "\nAPI_KEYS=") {
		t.Error(".env.example opens the service to the network, or sets API_KEYS")
	}
}

func TestCompose(t *testing.T) {
	t.Parallel()
	app := readCompose(t)
	if app.User != "" || !app.ReadOnly || app.Privileged || len(app.CapAdd) > 0 ||
		!slices.Equal(app.CapDrop, []string{"ALL"}) ||
		!slices.Equal(app.SecurityOpt, []string{"no-new-privileges:true"}) {
		t.Errorf("user %q, read-only %v, privileged %v, capabilities +%v -%v, %v", app.User,
			app.ReadOnly, app.Privileged, app.CapAdd, app.CapDrop, app.SecurityOpt)
	}
	if len(app.Ports) != 1 || app.Ports[0].HostIP != "127.0.0.1" || app.Ports[0].Target != 8000 ||
		app.Ports[0].Published != "8000" {
		t.Errorf("ports %+v", app.Ports)
	}
	for name, want := range map[string]string{"PORT": "8000", "HOST": "0.0.0.0"} {
		if value := app.Environment[name]; value == nil || *value != want {
			t.Errorf("%s is not %s", name, want)
		}
	}
	if app.Environment["SHUTDOWN_DELAY"] != nil || app.StopGracePeriod == nil ||
		time.Duration(*app.StopGracePeriod) < stopBound {
		t.Errorf("the grace period is %v", app.StopGracePeriod)
	}
	const cores = 16 // of whoever tries it
	checkMemory(t, int64(app.MemLimit), cores)
}

// checkMemory requires half as much again as the heap and a password hash on each core take.
func checkMemory(t *testing.T, limit int64, cores int) {
	t.Helper()
	if need := int64(heapBound + cores*hashBound); limit < need*3/2 {
		t.Errorf("the limit is %d MiB, and the service may need %d", limit>>20, need>>20)
	}
}

func TestManifestSecurity(t *testing.T) {
	t.Parallel()
	m := readManifest(t)
	user := new(int64(65532))
	wantPod := &corev1.PodSecurityContext{RunAsNonRoot: new(true), RunAsUser: user, RunAsGroup: user,
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}}
	if got := m.pod.SecurityContext; !reflect.DeepEqual(got, wantPod) {
		t.Errorf("the pod's security context is %+v", got)
	}
	wantContainer := &corev1.SecurityContext{AllowPrivilegeEscalation: new(false),
		ReadOnlyRootFilesystem: new(true),
		Capabilities:           &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}}
	if got := m.container.SecurityContext; !reflect.DeepEqual(got, wantContainer) {
		t.Errorf("the container's security context is %+v", got)
	}
	if token := m.pod.AutomountServiceAccountToken; token == nil || *token {
		t.Error("the pod gets a token")
	}
	if len(m.pod.Volumes) > 0 || len(m.pod.InitContainers) > 0 {
		t.Errorf("volumes %v, init containers %v", m.pod.Volumes, m.pod.InitContainers)
	}
}

// TestManifestAgrees checks the objects of the manifest against each other.
func TestManifestAgrees(t *testing.T) {
	t.Parallel()
	m := readManifest(t)
	labels := m.deployment.Spec.Template.Labels
	spread := m.pod.TopologySpreadConstraints
	if len(labels) == 0 || len(spread) != 1 {
		t.Fatalf("labels %v, topology spread constraints %v", labels, spread)
	}
	for name, selector := range map[string]map[string]string{
		"Service":                    m.service.Spec.Selector,
		"Deployment":                 m.deployment.Spec.Selector.MatchLabels,
		"topology spread constraint": spread[0].LabelSelector.MatchLabels,
		"PodDisruptionBudget":        m.budget.Spec.Selector.MatchLabels,
		"NetworkPolicy":              m.network.Spec.PodSelector.MatchLabels,
	} {
		if !reflect.DeepEqual(selector, labels) {
			t.Errorf("%s: the selector is %v, the labels of the pods are %v", name, selector, labels)
		}
	}
	ports := []corev1.ContainerPort{{Name: "http", ContainerPort: 8000}}
	if !reflect.DeepEqual(m.container.Ports, ports) {
		t.Errorf("the container's ports are %v", m.container.Ports)
	}
	target := intstr.FromString("http")
	if ports := m.service.Spec.Ports; len(ports) != 1 || ports[0].TargetPort != target {
		t.Errorf("the service's ports are %v", ports)
	}
	want := policyv1.PodDisruptionBudgetSpec{MinAvailable: new(intstr.FromInt32(1)),
		Selector: m.deployment.Spec.Selector}
	if !reflect.DeepEqual(m.budget.Spec, want) {
		t.Errorf("the disruption budget is %+v", m.budget.Spec)
	}
	if update := m.deployment.Spec.Strategy.RollingUpdate; update == nil ||
		*update.MaxUnavailable != intstr.FromInt32(0) {
		t.Errorf("the update strategy is %+v", m.deployment.Spec.Strategy)
	}
}

// TestNetworkPolicy checks who may send requests, and which ports the service may connect to.
func TestNetworkPolicy(t *testing.T) {
	t.Parallel()
	policy := readManifest(t).network.Spec
	both := []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	if !slices.Equal(policy.PolicyTypes, both) {
		t.Errorf("the policy applies to %v", policy.PolicyTypes)
	}
	sameNamespace := []networkingv1.NetworkPolicyIngressRule{{
		Ports: []networkingv1.NetworkPolicyPort{{Port: new(intstr.FromString("http"))}},
		From:  []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}},
	}}
	if !reflect.DeepEqual(policy.Ingress, sameNamespace) {
		t.Errorf("ingress is allowed from %+v", policy.Ingress)
	}
	if len(policy.Egress) != 1 || len(policy.Egress[0].To) > 0 {
		t.Fatalf("egress is allowed to %+v", policy.Egress)
	}
	var ports []string
	for _, port := range policy.Egress[0].Ports {
		protocol := corev1.ProtocolTCP
		if port.Protocol != nil {
			protocol = *port.Protocol
		}
		ports = append(ports, string(protocol)+" "+port.Port.String())
	}
	if want := []string{"UDP 53", "TCP 53", "TCP 5432", "TCP 5672", "TCP 5671"}; !slices.Equal(ports, want) {
		t.Errorf("egress is allowed to the ports %v, want %v", ports, want)
	}
}

// TestProbes checks that the probes ask for public routes, and allow for the start.
func TestProbes(t *testing.T) {
	t.Parallel()
	m := readManifest(t)
	d := readDocument(t)
	for path, probe := range map[string]*corev1.Probe{
		"/healthz startup": m.container.StartupProbe,
		"/healthz live":    m.container.LivenessProbe,
		"/readyz ready":    m.container.ReadinessProbe,
	} {
		path, name, _ := strings.Cut(path, " ")
		want := &corev1.HTTPGetAction{Path: path, Port: intstr.FromString("http")}
		if !reflect.DeepEqual(probe.HTTPGet, want) {
			t.Errorf("%s: the probe is %+v", name, probe.HTTPGet)
		}
		item := d.Paths.PathItems.GetOrZero(path)
		if item == nil || item.Get == nil || item.Get.Security == nil || len(item.Get.Security) > 0 {
			t.Errorf("%s: GET %s is not a public operation", name, path)
		}
	}
	startup := m.container.StartupProbe
	patience := seconds(startup.PeriodSeconds * startup.FailureThreshold)
	if patience <= databaseWait {
		t.Errorf("the start may take %v, the wait for the database %v", patience, databaseWait)
	}
	stages := readDockerfile(t)
	image := strings.Join(stages[len(stages)-1], "\n")
	match := regexp.MustCompile(`--start-period=(\S+)`).FindStringSubmatch(image)
	if match == nil || parseDuration(t, match[1]) < databaseWait {
		t.Errorf("the start period of the image is %v", match)
	}
}

func TestManifestResources(t *testing.T) {
	t.Parallel()
	m := readManifest(t)
	limits := m.container.Resources.Limits
	cores := limits.Cpu().Value()
	if cores < 1 {
		t.Fatal("no limit of cores, which decides how much memory the service needs")
	}
	checkMemory(t, limits.Memory().Value(), int(cores))
	delay := parseDuration(t, environment(t, m)["SHUTDOWN_DELAY"])
	grace := m.pod.TerminationGracePeriodSeconds
	if delay <= 0 || grace == nil || seconds(int32(*grace)) < delay+stopBound {
		t.Errorf("the grace period is %v, SHUTDOWN_DELAY %v", grace, delay)
	}
}

// environment returns the variables of the manifest's container. One from the Secret is empty.
func environment(t *testing.T, m manifest) map[string]string {
	t.Helper()
	values := make(map[string]string)
	for _, variable := range m.container.Env {
		if _, ok := values[variable.Name]; ok {
			t.Errorf("%s appears twice", variable.Name)
		}
		values[variable.Name] = variable.Value
		from := variable.ValueFrom
		fromSecret := from != nil && from.SecretKeyRef != nil && from.SecretKeyRef.Key == variable.Name
		if (variable.Value == "") != fromSecret {
			t.Errorf("%s has no value, and does not come from the Secret", variable.Name)
		}
	}
	return values
}

// settingNames returns the variables that settings.go reads: the calls whose arguments include
// the name of a variable.
func settingNames(t *testing.T) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, "settings.go"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	name := regexp.MustCompile(`^"[A-Z]+(_[A-Z]+)*"$`)
	var names []string
	ast.Inspect(file, func(node ast.Node) bool {
		call, ok := node.(*ast.CallExpr)
		if !ok {
			return true
		}
		for _, argument := range call.Args {
			if literal, ok := argument.(*ast.BasicLit); ok && name.MatchString(literal.Value) {
				names = append(names, strings.Trim(literal.Value, `"`))
			}
		}
		return true
	})
	slices.Sort(names)
	return slices.Compact(names)
}

// TestSettingsAreListed checks that settings.go, .env.example and README.md name the same
// settings, and the manifest and docker-compose.yml no others.
func TestSettingsAreListed(t *testing.T) {
	t.Parallel()
	names := settingNames(t)
	for path, pattern := range map[string]string{
		".env.example": `(?m)^#?([A-Z_]+)=`,
		"README.md":    "(?m)^\\| `([A-Z_]+)` \\|",
	} {
		var listed []string
		for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(readFile(t, path), -1) {
			listed = append(listed, match[1])
		}
		slices.Sort(listed)
		if !slices.Equal(listed, names) {
			t.Errorf("%s lists\n%v, the settings are\n%v", path, listed, names)
		}
	}
	env := environment(t, readManifest(t))
	for _, private := range []string{"DATABASE_URL", "RABBITMQ_URL", "API_KEYS"} {
		if value, ok := env[private]; !ok || value != "" {
			t.Errorf("the manifest: %s does not come from the Secret", private)
		}
	}
	for name := range env {
		if !slices.Contains(names, name) {
			t.Errorf("the manifest: %s is not a setting", name)
		}
	}
	for name := range readCompose(t).Environment {
		if !slices.Contains(names, name) {
			t.Errorf("compose: %s is not a setting", name)
		}
	}
}

// TestDeployedSettings starts the service with the settings of the manifest, and checks that it
// accepts those of docker-compose.yml and .env.example.
func TestDeployedSettings(t *testing.T) {
	t.Parallel()
	settings := []string{"HOST=127.0.0.1"}
	for name, value := range environment(t, readManifest(t)) {
		if name != "SHUTDOWN_DELAY" {
			settings = append(settings, name+"="+value)
		}
	}
	startService(t, settings...)

	// Nothing listens on port 1: the service waits for its database, whose settings it accepts.
	var composed []string
	for name, value := range readCompose(t).Environment {
		if value != nil && name != "PORT" {
			composed = append(composed, name+"="+*value)
		}
	}
	nowhere := strings.NewReplacer("@postgres:5432", "@127.0.0.1:1", "@rabbitmq:5672", "@127.0.0.1:1",
		"@127.0.0.1:5432", "@127.0.0.1:1", "@127.0.0.1:5672", "@127.0.0.1:1", "PORT=8000", "PORT=0")
	checkAccepted(t, "docker-compose.yml", nowhere.Replace(strings.Join(composed, "\n")))
	checkAccepted(t, ".env.example", nowhere.Replace(readFile(t, ".env.example")))
}

// checkAccepted starts the service with a file .env and checks that it does not refuse it.
func checkAccepted(t *testing.T, name, content string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, ".env"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	s := testEnv.LaunchProgram(t, env.ServiceConfig{Dir: dir})
	env.Eventually(t, "a log line", func() bool { return len(s.Lines("")) > 0 })
	if line := s.Lines("")[0]; line["level"] == "ERROR" {
		t.Errorf("%s: got the line %v, want no error", name, line)
	}
}

func seconds(n int32) time.Duration { return time.Duration(n) * time.Second }

func parseDuration(t *testing.T, text string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
