package monitoring

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"sigs.k8s.io/yaml"
)

// writeRules writes the rules in Prometheus's own format, without the operator's envelope.
func writeRules(t *testing.T, spec monitoringv1.PrometheusRuleSpec, path string) {
	t.Helper()
	data, err := yaml.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestAlertsFireAsExpected runs rules_test.yaml with promtool.
func TestAlertsFireAsExpected(t *testing.T) {
	promtool := installed(t, "promtool")
	dir := t.TempDir()
	writeRules(t, render(t).rules.Spec, filepath.Join(dir, "rules.yaml"))
	tests, err := os.ReadFile("rules_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "rules_test.yaml"), tests, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check", "rules", "rules.yaml"}, {"test", "rules", "rules_test.yaml"}} {
		cmd := exec.Command(promtool, args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// sections returns the text of each section of the runbooks, by its heading.
func sections(t *testing.T) map[string]string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(component, "runbooks.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, section := range strings.Split(string(data), "\n## ")[1:] {
		name, text, _ := strings.Cut(section, "\n")
		found[name] = text
	}
	return found
}

// TestEveryAlertHasATestAndARunbook checks that rules_test.yaml shows each alert firing, with the labels that its
// text uses, and that each alert has a section in the runbooks, and each section an alert.
func TestEveryAlertHasATestAndARunbook(t *testing.T) {
	tests, err := os.ReadFile("rules_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	runbooks := sections(t)
	firing := regexp.MustCompile(`ALERTS\{alertname="(\w+)",alertstate="firing",([^}]*)\}', value: 1`)
	label := regexp.MustCompile(`(\w+)="`)
	seen := map[string][]string{}
	for _, match := range firing.FindAllStringSubmatch(string(tests), -1) {
		for _, name := range label.FindAllStringSubmatch(match[2], -1) {
			seen[match[1]] = append(seen[match[1]], name[1])
		}
	}
	used := regexp.MustCompile(`\$labels\.(\w+)`)
	rules := render(t).rules
	base := rules.Annotations["pipeops.io/runbooks"]
	if !strings.HasPrefix(base, "https://") || !strings.HasSuffix(base, "/manifests/components/monitoring/runbooks.md") {
		t.Errorf("the runbooks are at %q", base)
	}
	for _, rule := range rules.Spec.Groups[0].Rules {
		if len(seen[rule.Alert]) == 0 {
			t.Errorf("no test of rules_test.yaml sees %s fire", rule.Alert)
		}
		if severity := rule.Labels["severity"]; !slices.Contains([]string{"critical", "warning", "info"}, severity) {
			t.Errorf("%s has severity %q", rule.Alert, severity)
		}
		summary, description := rule.Annotations["summary"], rule.Annotations["description"]
		if summary == "" || !strings.HasPrefix(description, "Hop: ") {
			t.Errorf("%s does not say what has happened, or to which hop", rule.Alert)
		}
		for _, name := range used.FindAllStringSubmatch(summary+description, -1) {
			if !slices.Contains(seen[rule.Alert], name[1]) {
				t.Errorf("the text of %s uses the label %q, which it has not", rule.Alert, name[1])
			}
		}
		if want := base + "#" + strings.ToLower(rule.Alert); rule.Annotations["runbook_url"] != want {
			t.Errorf("the runbook of %s is %s, want %s", rule.Alert, rule.Annotations["runbook_url"], want)
		}
		for _, part := range []string{"**Meaning**", "**Impact**", "**Fix**", "\n1. "} {
			if !strings.Contains(runbooks[rule.Alert], part) {
				t.Errorf("the runbook of %s has no %q", rule.Alert, part)
			}
		}
		delete(runbooks, rule.Alert)
	}
	for name := range runbooks {
		t.Errorf("runbooks.md has a section %q, and there is no such alert", name)
	}
}
