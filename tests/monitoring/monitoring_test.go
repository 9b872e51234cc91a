// Package monitoring tests manifests/components/monitoring with a real Prometheus and real metrics of a real agent.
// It needs Debian's prometheus package.
package monitoring

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness"
)

const component = "../../manifests/components/monitoring"

// manifests is what kustomize renders from the component.
type manifests struct {
	monitor   monitoringv1.PodMonitor
	rules     monitoringv1.PrometheusRule
	dashboard dashboard
}

// render runs kustomize, and decodes the output strictly into the operator's own types, so that a misspelled field is
// an error.
func render(t *testing.T) manifests {
	t.Helper()
	out, err := exec.Command(harness.Binary(t, "kubectl"), "kustomize", component).CombinedOutput()
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
		into, known := map[string]any{"PodMonitor": &m.monitor, "PrometheusRule": &m.rules, "ConfigMap": &config}[meta.Kind]
		if !known {
			t.Fatalf("unexpected: %s", document)
		}
		if err := yaml.UnmarshalStrict(document, into); err != nil {
			t.Fatal(err)
		}
	}
	if config.Labels["grafana_dashboard"] != "1" || len(config.Data) != 1 {
		t.Fatalf("Grafana's sidecar does not find the dashboard: labels %v, %d files", config.Labels, len(config.Data))
	}
	for _, text := range config.Data {
		if err := json.Unmarshal([]byte(text), &m.dashboard); err != nil {
			t.Fatal(err)
		}
	}
	if len(m.monitor.Spec.PodMetricsEndpoints) != 1 || len(m.rules.Spec.Groups) != 1 || len(m.dashboard.Panels) == 0 {
		t.Fatalf("something is missing:\n%s", out)
	}
	return m
}

// dashboard is the part of Grafana's model that says what is queried and how it is shown.
type dashboard struct {
	Panels []panel `json:"panels"`
}

type panel struct {
	ID          int    `json:"id"`
	Type        string `json:"type"` // row, stat or timeseries
	Title       string `json:"title"`
	Description string `json:"description"`
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
	return strings.NewReplacer("$__rate_interval", "10s", "$namespace", ".*").Replace(expr)
}

// installed returns the path of a program of Debian's package prometheus.
func installed(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is not installed: apt-get install --no-install-recommends prometheus (the service need not run)", name)
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
