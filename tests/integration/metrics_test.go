package integration

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// scrape reads /metrics as Prometheus does.
func scrape(t *testing.T, url string) map[string]*dto.MetricFamily {
	t.Helper()
	_, text := get(t, http.DefaultClient, url+"/metrics", nil)
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// value returns the sum over all series with the labels: of a counter or gauge its value, of a histogram its count.
func value(families map[string]*dto.MetricFamily, name string, labels map[string]string) float64 {
	var sum float64
	for _, m := range families["pipeops_agent_"+name].GetMetric() {
		have := map[string]string{}
		for _, pair := range m.GetLabel() {
			have[pair.GetName()] = pair.GetValue()
		}
		if slices.ContainsFunc(slices.Collect(maps.Keys(labels)), func(key string) bool { return have[key] != labels[key] }) {
			continue
		}
		sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
	}
	return sum
}

// TestMetricsCountTheTraffic makes a known number of requests, and compares it with the metrics.
func TestMetricsCountTheTraffic(t *testing.T) {
	t.Parallel()
	w, ns := connectedWithRunners(t)
	sendMessage(t, w.agent, "1", "runner_assigned",
		assignment("r", serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))), false)
	if resp, body := post(t, w.agent, "/api/runners/r/command", "{}"); resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status, body)
	}
	token := http.Header{"Authorization": {"Bearer " + agentToken}}
	for range 3 {
		_, _ = get(t, http.DefaultClient, w.agent.Tunnel+"/api/k8s/api/v1/namespaces/"+ns+"/pods", token)
	}
	_, _ = get(t, http.DefaultClient, w.agent.Tunnel+"/api/k8s/api/v1/namespaces/"+ns+"/pods/none", token)
	_, _ = get(t, http.DefaultClient, w.agent.Tunnel+"/api/k8s/version", http.Header{"Authorization": {"Bearer wrong"}})
	for range 2 { // the second answer is cached
		_, _ = get(t, http.DefaultClient, w.agent.Tunnel+"/api/agent/status", token)
	}
	_, _ = post(t, w.agent, "/api/agent/heartbeat", "")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet,
		w.agent.Tunnel+"/api/k8s/api/v1/pods?watch=true", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = token
	watch, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watch.Body.Close() }()

	families := scrape(t, w.agent.Operations)
	for _, test := range []struct {
		name   string
		labels map[string]string
		want   float64
	}{
		{"kubernetes_requests_total", map[string]string{"verb": "list", "code": "200", "lane": "call", "origin": "api_server"}, 3},
		{"kubernetes_upstream_duration_seconds", map[string]string{"lane": "call"}, 4},
		{"kubernetes_requests_total", map[string]string{"verb": "get", "code": "404", "lane": "call"}, 1},
		{"kubernetes_requests_in_flight", map[string]string{"lane": "watch"}, 1},
		{"http_requests_total", map[string]string{"route": "/api/k8s/", "code": "200"}, 3},
		{"http_requests_total", map[string]string{"route": "/api/k8s/", "code": "401"}, 1},
		{"http_requests_total", map[string]string{"route": "/api/agent/status", "method": "GET", "code": "200"}, 2},
		{"cluster_read_duration_seconds", nil, 1},
		{"authentication_failures_total", map[string]string{"reason": "token"}, 1},
		{"authentication_failures_total", nil, 1},
		{"runner_commands_total", map[string]string{"code": "200"}, 1},
		{"tunnel_up", nil, 1},
		{"ready_check", map[string]string{"check": "kubernetes"}, 1},
		{"build_info", nil, 1},
	} {
		if got := value(families, test.name, test.labels); got != test.want {
			t.Errorf("%s%v is %v, want %v", test.name, test.labels, got, test.want)
		}
	}
	for _, name := range []string{
		"tunnel_lease_issue_timestamp_seconds", "tunnel_lease_expiry_timestamp_seconds", "last_heartbeat_timestamp_seconds",
	} {
		if value(families, name, nil) < 1.7e9 {
			t.Errorf("%s is no time of today: %v", name, value(families, name, nil))
		}
	}
}
