package monitoring

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness"
)

// blocks returns the code blocks of the README, by language.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(component, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, match := range regexp.MustCompile("(?s)```(\\w+)\n(.*?)```").FindAllStringSubmatch(string(data), -1) {
		if match[1] == language {
			found = append(found, match[2])
		}
	}
	return found
}

// block returns the README's block that contains text.
func block(t *testing.T, language, text string) string {
	t.Helper()
	for _, b := range blocks(t, language) {
		if strings.Contains(b, text) {
			return b
		}
	}
	t.Fatalf("the README has no %s block with %s", language, text)
	return ""
}

// TestServiceMonitorReplacesThePodMonitor checks that it finds the same pods and gives the same job.
func TestServiceMonitorReplacesThePodMonitor(t *testing.T) {
	m := overlay(t, "", "monitoring", "monitoring-service-monitor")
	if m.monitor.Name != "" || m.rules.Name == "" {
		t.Error("the PodMonitor is still there, or the rules are not")
	}
	spec := m.serviceMonitor.Spec
	if diff := cmp.Diff(spec.Selector.MatchLabels["app.kubernetes.io/name"], m.service.Labels[spec.JobLabel]); diff != "" {
		t.Errorf("the ServiceMonitor does not select the Service, or has another job:\n%s", diff)
	}
	if diff := cmp.Diff(m.service.Spec.Selector, m.deployment.Spec.Selector.MatchLabels); diff != "" {
		t.Errorf("the selectors differ (-Service +Deployment):\n%s", diff)
	}
	if m.service.Labels[spec.JobLabel] != "pipeops-agent" {
		t.Errorf("the job is %q, and the rules select pipeops-agent", m.service.Labels[spec.JobLabel])
	}
	port := m.service.Spec.Ports[0]
	container := m.deployment.Spec.Template.Spec.Containers[0].Ports[0]
	if spec.Endpoints[0].Port != port.Name || port.TargetPort.StrVal != container.Name ||
		port.Port != container.ContainerPort {
		t.Errorf("the ports differ: %+v, %+v", port, container)
	}
	if endpoint := render(t).monitor.Spec.PodMetricsEndpoints[0]; spec.Endpoints[0].Path != endpoint.Path ||
		spec.Endpoints[0].Interval != endpoint.Interval {
		t.Error("path or interval are not those of the PodMonitor")
	}
}

// TestRunbooksCanBeElsewhere checks the README's way to set the runbooks' URL.
func TestRunbooksCanBeElsewhere(t *testing.T) {
	for _, rule := range overlay(t, block(t, "yaml", "pipeops.io~1runbooks"), "monitoring").rules.Spec.Groups[0].Rules {
		want := "https://wiki.example.com/pipeops-agent#" + strings.ToLower(rule.Alert)
		if got := rule.Annotations["runbook_url"]; got != want {
			t.Errorf("%s has %s, want %s", rule.Alert, got, want)
		}
	}
}

// TestProbeCanBeSet checks the README's way to set the URLs of the probe.
func TestProbeCanBeSet(t *testing.T) {
	text := block(t, "yaml", "monitoring-probe")
	text = text[strings.Index(text, "patches:"):]
	spec := overlay(t, strings.ReplaceAll(text, "blackbox-exporter.monitoring.svc", "exporter.example"),
		"monitoring", "monitoring-probe").probe.Spec
	if spec.ProberSpec.URL != "exporter.example:9115" || spec.JobName != "pipeops-agent-probe" ||
		cmp.Diff(spec.Targets.StaticConfig.Targets, []string{"https://gateway.example.com/agents/agent-001/health"}) != "" {
		t.Errorf("the probe is %+v", spec)
	}
}

// TestPlainPrometheusFindsTheAgent loads the README's scrape job and rules into a Prometheus without the operator. It
// must find a pod by its annotations, and give its series the labels that the rules need.
func TestPlainPrometheusFindsTheAgent(t *testing.T) {
	w := newWorld(t)
	m := overlay(t, "", "monitoring", "monitoring-annotations")
	if m.monitor.Name != "" || m.rules.Name != "" || len(m.dashboard.Panels) == 0 {
		t.Error("what needs the operator is still there, or the dashboard is not")
	}
	template := m.deployment.Spec.Template
	declared := fmt.Sprint(template.Spec.Containers[0].Ports[0].ContainerPort)
	if got := template.Annotations["prometheus.io/port"]; got != declared {
		t.Errorf("the annotation has port %s, the container %s", got, declared)
	}
	// The agent of this test listens on another port of this machine.
	host, port, err := net.SplitHostPort(strings.TrimPrefix(w.Agent.Operations, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	template.Annotations["prometheus.io/port"] = port
	// What the role pod of kubernetes_sd_configs makes of it. Debian's Prometheus is built without that.
	meta := map[string]string{
		"__meta_kubernetes_namespace": namespace, "__meta_kubernetes_pod_name": "pipeops-agent-7d9f",
	}
	escape := regexp.MustCompile(`[^a-zA-Z0-9_]`)
	for prefix, values := range map[string]map[string]string{
		"__meta_kubernetes_pod_annotation_": template.Annotations, "__meta_kubernetes_pod_label_": template.Labels,
	} {
		for name, value := range values {
			meta[prefix+escape.ReplaceAllString(name, "_")] = value
		}
	}
	targets, err := json.Marshal([]any{map[string]any{"targets": []string{host + ":" + declared}, "labels": meta}})
	if err != nil {
		t.Fatal(err)
	}

	dir, err := w.Group.Mkdir("plain")
	if err != nil {
		t.Fatal(err)
	}
	command := exec.Command("sh", "-c", strings.ReplaceAll(block(t, "sh", "sed "), "> ", "> "+dir+"/"))
	command.Dir = harness.Root(t)
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var plain, want any
	data, err := os.ReadFile(filepath.Join(dir, "pipeops-agent.rules.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	rules, err := yaml.Marshal(render(t).rules.Spec)
	if err := errors.Join(err, yaml.Unmarshal(data, &plain), yaml.Unmarshal(rules, &want)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, plain); diff != "" {
		t.Errorf("the file's rules are others (-PrometheusRule +file)\n%s", diff)
	}
	job := block(t, "yaml", "scrape_configs")
	discovery := "kubernetes_sd_configs: [{role: pod}]"
	if !strings.Contains(job, discovery) {
		t.Fatalf("the job discovers other things: %s", job)
	}
	p := w.startPrometheus(t, dir, "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"+
		"rule_files: [pipeops-agent.rules.yaml]\n"+
		strings.Replace(job, discovery, "static_configs: "+string(targets), 1))
	eventually(t, func() error {
		found, err := p.query(`up{job="pipeops-agent", namespace="` + namespace + `", pod="pipeops-agent-7d9f"} == 1`)
		if err == nil && len(found) != 1 {
			err = fmt.Errorf("Prometheus scrapes %v", found)
		}
		return err
	})
	if found, err := p.query(expr(t, render(t), "PipeOpsAgentDown")); err != nil || len(found) > 0 {
		t.Errorf("PipeOpsAgentDown: %v, %v", found, err)
	}
}
