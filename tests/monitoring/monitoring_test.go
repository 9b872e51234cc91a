// Package monitoring tests manifests/components/monitoring with a real Prometheus and real metrics of a real agent.
// It needs Debian's packages prometheus and prometheus-blackbox-exporter.
package monitoring

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	grafana "github.com/grafana/grafana-foundation-sdk/go/dashboard"
	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness"
)

const component = "../../manifests/components/monitoring"

// manifests is what kustomize renders from the component, and from its siblings in overlays.
type manifests struct {
	monitor        monitoringv1.PodMonitor
	serviceMonitor monitoringv1.ServiceMonitor
	service        corev1.Service
	probe          monitoringv1.Probe
	rules          monitoringv1.PrometheusRule
	deployment     appsv1.Deployment
	dashboard      dashboard
	dashboardJSON  string
}

// render returns the component alone.
func render(t *testing.T) manifests {
	t.Helper()
	m := kustomize(t, component)
	if len(m.monitor.Spec.PodMetricsEndpoints) != 1 || len(m.rules.Spec.Groups) != 1 || len(m.dashboard.Panels) == 0 {
		t.Fatalf("something is missing: %+v", m)
	}
	return m
}

// overlay returns an overlay of the base with components, and with more lines of a kustomization.yaml.
func overlay(t *testing.T, more string, components ...string) manifests {
	t.Helper()
	dir := t.TempDir()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Rel(dir, filepath.Join(here, "..", "..", "manifests"))
	if err != nil {
		t.Fatal(err)
	}
	text := "resources: [" + root + "/base]\ncomponents:\n"
	for _, name := range components {
		text += "  - " + root + "/components/" + name + "\n"
	}
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text+more), 0o600); err != nil {
		t.Fatal(err)
	}
	return kustomize(t, dir)
}

// kustomize renders dir, and decodes the output strictly into the operator's own types, so that a misspelled field is
// an error.
func kustomize(t *testing.T, dir string) manifests {
	t.Helper()
	out, err := exec.Command(harness.Binary(t, "kubectl"), "kustomize", dir).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var m manifests
	var config corev1.ConfigMap
	for _, document := range bytes.Split(out, []byte("\n---\n")) {
		var meta metav1.TypeMeta
		if err := yaml.Unmarshal(document, &meta); err != nil {
			t.Fatal(err)
		}
		into := map[string]any{
			"PodMonitor": &m.monitor, "ServiceMonitor": &m.serviceMonitor, "Service": &m.service, "Probe": &m.probe,
			"PrometheusRule": &m.rules, "ConfigMap": &config, "Deployment": &m.deployment,
		}[meta.Kind]
		if into == nil || meta.Kind == "ConfigMap" && !bytes.Contains(document, []byte("name: pipeops-agent-dashboard")) {
			continue // of the base
		}
		if err := yaml.UnmarshalStrict(document, into); err != nil {
			t.Fatal(err)
		}
	}
	if config.Labels["grafana_dashboard"] != "1" || len(config.Data) != 1 {
		t.Fatalf("Grafana's sidecar does not find the dashboard: labels %v, %d files", config.Labels, len(config.Data))
	}
	for _, text := range config.Data {
		m.dashboardJSON = text
		if err := json.Unmarshal([]byte(text), &m.dashboard); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// dashboard is the part of Grafana's model that says what is queried and how it is shown.
type dashboard struct {
	Panels      []panel `json:"panels"`
	Annotations struct{ List []struct{ Expr string } }
	Templating  struct {
		List []struct {
			Name, Type string
			Query      any
		}
	}
}

type panel struct {
	ID          int    `json:"id"`
	Type        string `json:"type"` // row, stat or timeseries
	Title       string `json:"title"`
	Description string `json:"description"`
	Links       []struct{ URL string }
	GridPos     struct{ H, W, X, Y int }
	FieldConfig struct {
		Defaults struct {
			Unit     string `json:"unit"`
			Min, Max *float64
			Mappings []struct {
				Options map[string]struct{ Text string }
			}
		} `json:"defaults"`
	} `json:"fieldConfig"`
	Targets []struct {
		Expr         string `json:"expr"`
		LegendFormat string `json:"legendFormat"`
	} `json:"targets"`
}

// resolve replaces Grafana's variables with values.
func resolve(expr string) string {
	return strings.NewReplacer("$__rate_interval", "10s", "$cluster", ".*", "$namespace", ".*", "$pod", ".*").Replace(expr)
}

// installed returns the path of a program of Debian's package prometheus or prometheus-blackbox-exporter.
func installed(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is not installed: apt-get install --no-install-recommends prometheus prometheus-blackbox-exporter "+
			"(the services need not run)", name)
	}
	return path
}

// TestDashboardPanelsAreComplete checks that every panel has an id and a place of its own, a description and a query.
func TestDashboardPanelsAreComplete(t *testing.T) {
	ids := map[int]bool{}
	taken := map[[2]int]string{}
	for _, p := range render(t).dashboard.Panels {
		if ids[p.ID] {
			t.Errorf("panel %q has the id of another", p.Title)
		}
		ids[p.ID] = true
		if p.Type != "row" && (p.Description == "" || len(p.Targets) == 0) {
			t.Errorf("panel %q has no description or no query", p.Title)
		}
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other, found := taken[[2]int{x, y}]; found || x >= 24 {
					t.Fatalf("panel %q lies over %q, or outside", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
	}
}

// TestGrafanaKnowsEveryField decodes the dashboard into Grafana's own types, which know each panel's and each query's
// fields. Grafana itself has defaults for those that are missing.
func TestGrafanaKnowsEveryField(t *testing.T) {
	plugins.RegisterDefaultPlugins()
	var decoded grafana.Dashboard //nolint:staticcheck // v1 is what Grafana's sidecar loads into every version
	err := decoded.UnmarshalJSONStrict([]byte(render(t).dashboardJSON))
	problems, ok := errors.AsType[cog.BuildErrors](err)
	if err != nil && !ok {
		t.Fatal(err)
	}
	for _, problem := range problems {
		if !strings.Contains(problem.Error(), "required field is missing") {
			t.Error(problem)
		}
	}
	if err := decoded.Validate(); err != nil {
		t.Error(err)
	}
}

// TestDashboardFollowsItsVariables checks that each query selects the clusters and namespaces that are chosen, and
// pods if its metrics are of pods; that no variable is undeclared; and that links lead to sections of the runbooks.
func TestDashboardFollowsItsVariables(t *testing.T) {
	m := render(t)
	declared, base := []string{"__rate_interval", "__all"}, "" // Grafana's own
	for _, v := range m.dashboard.Templating.List {
		declared = append(declared, v.Name)
		if v.Name == "runbooks" {
			base, _ = v.Query.(string)
		}
	}
	if want := m.rules.Annotations["pipeops.io/runbooks"]; base != want {
		t.Errorf("the dashboard has the runbooks at %q, the alerts at %q", base, want)
	}
	for _, match := range regexp.MustCompile(`\$\{?(\w+)`).FindAllStringSubmatch(m.dashboardJSON, -1) {
		if !slices.Contains(declared, match[1]) {
			t.Errorf("no variable %s", match[0])
		}
	}
	selector := regexp.MustCompile(`\{[^{}]*\}`)
	check := func(where, expr string) {
		for _, labels := range selector.FindAllString(expr, -1) {
			if !strings.Contains(labels, `cluster=~"$cluster",namespace=~"$namespace"`) {
				t.Errorf("%s: %s does not follow the variables", where, labels)
			}
		}
	}
	runbooks := sections(t)
	linked := 0
	for _, panel := range m.dashboard.Panels {
		for _, target := range panel.Targets {
			check(panel.Title, target.Expr)
		}
		for _, link := range panel.Links {
			_, name, found := strings.Cut(link.URL, "${runbooks}#")
			for section := range runbooks {
				found = found && strings.ToLower(section) != name
			}
			if linked++; found || !strings.HasPrefix(link.URL, "${runbooks}") {
				t.Errorf("%s links to %s, and there is no such runbook", panel.Title, link.URL)
			}
		}
	}
	for _, annotation := range m.dashboard.Annotations.List {
		check("annotation", annotation.Expr)
	}
	if linked == 0 || len(m.dashboard.Annotations.List) != 1 {
		t.Error("no links, or no annotations")
	}
}

// TestPodMonitorSelectsTheAgent checks that the base's pods have the labels and the port that the PodMonitor selects.
func TestPodMonitorSelectsTheAgent(t *testing.T) {
	data, err := os.ReadFile("../../manifests/base/deployment.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var deployment appsv1.Deployment
	if err := yaml.UnmarshalStrict(data, &deployment); err != nil {
		t.Fatal(err)
	}
	monitor := render(t).monitor
	// The API server checks the pods' labels against this selector.
	if diff := cmp.Diff(monitor.Spec.Selector.MatchLabels, deployment.Spec.Selector.MatchLabels); diff != "" {
		t.Errorf("the selectors differ (-PodMonitor +Deployment):\n%s", diff)
	}
	ports := deployment.Spec.Template.Spec.Containers[0].Ports
	if len(ports) != 1 || ports[0].Name != *monitor.Spec.PodMetricsEndpoints[0].Port || ports[0].ContainerPort != 9090 {
		t.Errorf("the proxy has the ports %v", ports)
	}
}
