package monitoring

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metricsql"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

const (
	agentID, agentToken = harness.AgentID, harness.AgentToken
	namespace           = "pipeops-system"
)

var pictureOf = flag.Duration("picture", 0, "make calls for so long, then draw the dashboard to dashboard.png")

// TestEveryQueryFindsItsMetrics asks a real Prometheus every query of the dashboard and the rules, after a real agent
// has had traffic.
func TestEveryQueryFindsItsMetrics(t *testing.T) {
	m := render(t)
	w := newWorld(t)
	// Prometheus stores either native or classic histograms.
	classic := w.prometheus(t, m, "classic")
	native := w.prometheus(t, m, "native", "--enable-feature=native-histograms")
	both := []*prometheus{classic, native}

	stop := w.traffic(t)
	for _, p := range m.dashboard.Panels {
		for _, target := range p.Targets {
			for _, prometheus := range both {
				eventually(t, func() error {
					found, err := prometheus.query(resolve(target.Expr))
					if err != nil {
						return fmt.Errorf("panel %q: %w", p.Title, err)
					}
					return checkVisible(found, target.Expr, target.LegendFormat)
				})
			}
			w.checkLabels(t, resolve(target.Expr), both)
		}
	}
	for _, rule := range m.rules.Spec.Groups[0].Rules {
		w.checkLabels(t, rule.Expr.String(), both)
	}
	// These alerts match errors that callers see, and the traffic causes many. No other alert may fire.
	noisy := []string{
		"PipeOpsAgentAuthenticationFailures", "PipeOpsAgentKubernetesErrors", "PipeOpsAgentRequestsRefused",
	}
	wantAlerts(t, m, classic, noisy...)
	if *pictureOf > 0 {
		start := time.Now()
		if err := process.Poll(t.Context(), *pictureOf+time.Minute, nil, func() error {
			if left := *pictureOf - time.Since(start); left > 0 {
				return fmt.Errorf("%s to go", left)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		drawDashboard(t, m.dashboard, classic, start, time.Now())
	}
	stop()

	// Break what can be broken for real.
	wait := func(name string) {
		t.Helper()
		eventually(t, func() error {
			if fires, err := classic.query(expr(t, m, name)); err != nil || len(fires) == 0 {
				return fmt.Errorf("%s does not notice: %w", name, err)
			}
			return nil
		})
	}
	w.cluster.APIServer.Stop()
	wait("PipeOpsAgentKubernetesUnreachable")
	w.ControlPlane.StopFrps()
	wait("PipeOpsAgentTunnelDown")
	wait("PipeOpsAgentRoundTripFailing")
	w.Agent.Proxy.Kill()
	wait("PipeOpsAgentDown")
}

// world is a cluster, a control plane and an agent.
type world struct {
	*harness.World

	cluster  *cluster.Cluster
	exporter *httptest.Server // serves what kube-state-metrics and a kubelet would
	blackbox string           // address of a blackbox exporter
}

func newWorld(t *testing.T) *world {
	t.Helper()
	group := harness.NewGroup(t)
	c, err := cluster.Start(t.Context(), group)
	if err != nil {
		t.Fatal(err)
	}
	kubeconfig := filepath.Join(group.Dir(), "agent.kubeconfig")
	if _, err := c.WriteAgentKubeconfig(t.Context(), kubeconfig); err != nil {
		t.Fatal(err)
	}
	w := &world{World: harness.NewWorld(t, kubeconfig), cluster: c, blackbox: harness.FreeAddr(t)}
	w.exporter = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, "testdata/cluster.prom")
	}))
	t.Cleanup(w.exporter.Close)
	authority := filepath.Join(group.Dir(), "gateway.crt")
	config := filepath.Join(group.Dir(), "blackbox.yaml")
	for path, text := range map[string]string{
		authority: string(w.ControlPlane.CA),
		config:    "modules: {http_2xx: {prober: http, http: {tls_config: {ca_file: " + authority + "}}}}",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := group.Start("blackbox", nil, installed(t, "prometheus-blackbox-exporter"),
		"--config.file="+config, "--web.listen-address="+w.blackbox); err != nil {
		t.Fatal(err)
	}
	w.Agent.Env = append(w.Agent.Env, "PIPEOPS_NAMESPACE="+namespace, "PIPEOPS_RUNNERS_ALLOWED_HOSTS=127.0.0.1")
	harness.StartAgent(t, w.Agent)
	w.Agent.RestartFrpc(t.Context())
	return w
}

// prometheus is a running Prometheus.
type prometheus struct{ url string }

// prometheus starts a Prometheus that scrapes the agent, with the labels that the operator derives from a PodMonitor.
func (w *world) prometheus(t *testing.T, m manifests, name string, flags ...string) *prometheus {
	t.Helper()
	dir, err := w.Group.Mkdir("prometheus-" + name)
	if err != nil {
		t.Fatal(err)
	}
	writeRules(t, m.rules.Spec, filepath.Join(dir, "rules.yaml"))
	job := m.monitor.Spec.Selector.MatchLabels[m.monitor.Spec.JobLabel]
	endpoint := m.monitor.Spec.PodMetricsEndpoints[0]
	probe := overlay(t, "", "monitoring", "monitoring-probe").probe.Spec
	health := w.ControlPlane.GatewayURL + "/agents/" + agentID + "/health"
	config := fmt.Sprintf(`
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [rules.yaml]
scrape_configs:
  - job_name: %s
    metrics_path: %s
    static_configs:
      - targets: [%q]
        labels: {cluster: eu-1, namespace: %s, pod: pipeops-agent-7d9f, container: proxy, endpoint: %s}
  - job_name: kube-state-metrics-and-kubelet
    honor_labels: true
    static_configs:
      - targets: [%q]
        labels: {cluster: eu-1}
  - job_name: %s
    metrics_path: /probe
    params: {module: [%s], target: [%q]}
    static_configs:
      - targets: [%q]
        labels: {cluster: eu-1, namespace: %s, instance: %q}
`, job, endpoint.Path, strings.TrimPrefix(w.Agent.Operations, "http://"), namespace, *endpoint.Port,
		strings.TrimPrefix(w.exporter.URL, "http://"), probe.JobName, probe.Module, health, w.blackbox, namespace, health)
	return w.startPrometheus(t, dir, config, flags...)
}

// startPrometheus starts a Prometheus with a configuration, whose files are in dir.
func (w *world) startPrometheus(t *testing.T, dir, config string, flags ...string) *prometheus {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "prometheus.yaml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	addr := harness.FreeAddr(t)
	p, err := w.Group.Start(filepath.Base(dir), nil, installed(t, "prometheus"),
		append([]string{"--config.file=" + filepath.Join(dir, "prometheus.yaml"),
			"--storage.tsdb.path=" + filepath.Join(dir, "data"), "--web.listen-address=" + addr}, flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	started := &prometheus{url: "http://" + addr}
	if err := process.Poll(t.Context(), time.Minute, p.Done(),
		func() error { return started.get("/api/v1/labels", nil, new([]string)) }); err != nil {
		t.Fatalf("%v\n%s", err, p.Log())
	}
	return started
}

// get calls Prometheus's HTTP API.
func (p *prometheus) get(path string, query url.Values, into any) error {
	resp, err := http.Get(p.url + path + "?" + query.Encode())
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: into}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", query, answer.Error)
	}
	return nil
}

// series is one series of an answer.
type series struct {
	Metric map[string]string
	Value  sample   // of query, but for native histograms
	Values []sample // of a range
}

type sample struct{ at, value float64 }

func (s *sample) UnmarshalJSON(data []byte) (err error) {
	var value string
	if err := json.Unmarshal(data, &[2]any{&s.at, &value}); err != nil {
		return err
	}
	s.value, err = strconv.ParseFloat(value, 64)
	return err
}

func (p *prometheus) query(expr string) ([]series, error) {
	var answer struct{ Result []series }
	return answer.Result, p.get("/api/v1/query", url.Values{"query": {expr}}, &answer)
}

// legendLabel matches the labels in a legend.
var legendLabel = regexp.MustCompile(`\{\{(\w+)\}\}`)

// checkVisible returns an error unless the series hold a number, and the labels of the legend.
func checkVisible(found []series, expr, legend string) error {
	for _, s := range found {
		for _, name := range legendLabel.FindAllStringSubmatch(legend, -1) {
			if s.Metric[name[1]] == "" {
				return fmt.Errorf("%s has no label %q for its legend: %v", expr, name[1], s.Metric)
			}
		}
	}
	if !slices.ContainsFunc(found, func(s series) bool {
		return !math.IsNaN(s.Value.value) && !math.IsInf(s.Value.value, 0)
	}) {
		return fmt.Errorf("%s shows nothing: %v", expr, found)
	}
	return nil
}

// checkLabels checks every selector of an expression: it must find series, and these must have each label that the
// expression names. So a query that rightly finds nothing, such as an alert's, is known to select something.
func (w *world) checkLabels(t *testing.T, expr string, servers []*prometheus) {
	t.Helper()
	parsed, err := metricsql.Parse(expr)
	if err != nil {
		t.Errorf("%s: %v", expr, err)
		return
	}
	var named []string
	have := map[string]bool{}
	metricsql.VisitAll(parsed, func(e metricsql.Expr) {
		switch e := e.(type) {
		case *metricsql.ModifierExpr:
			named = append(named, e.Args...)
		case *metricsql.MetricExpr:
			selector := string(e.AppendString(nil))
			if strings.HasPrefix(selector, "ALERTS{") {
				for _, name := range []string{"cluster", "namespace", "severity"} {
					have[name] = true
				}
				return // Prometheus's own metric, and no alert fires here
			}
			for _, filter := range e.LabelFilterss[0] {
				named = append(named, filter.Label)
			}
			// One of the two servers has it, because one stores classic histograms and the other native ones.
			var found []map[string]string
			eventually(t, func() error {
				for _, server := range servers {
					var some []map[string]string
					if err := server.get("/api/v1/series", url.Values{"match[]": {selector}}, &some); err != nil {
						return err
					}
					found = append(found, some...)
				}
				if len(found) == 0 {
					return fmt.Errorf("the agent exports nothing that is %s", selector)
				}
				return nil
			})
			for _, labels := range found {
				for name := range labels {
					have[name] = true
				}
			}
		}
	})
	for _, name := range named {
		if !have[name] {
			t.Errorf("%s names the label %q, and none of its series has it", expr, name)
		}
	}
}

// wantAlerts evaluates all rules, and expects exactly those with the given names to find something.
func wantAlerts(t *testing.T, m manifests, p *prometheus, names ...string) {
	t.Helper()
	eventually(t, func() error {
		var loaded struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError string }
			}
		}
		if err := p.get("/api/v1/rules", nil, &loaded); err != nil {
			return err
		}
		if len(loaded.Groups) != 1 || len(loaded.Groups[0].Rules) != len(m.rules.Spec.Groups[0].Rules) {
			return fmt.Errorf("Prometheus has not loaded all rules: %v", loaded)
		}
		for _, rule := range loaded.Groups[0].Rules {
			if rule.Health != "ok" {
				return fmt.Errorf("%s is %s: %s", rule.Name, rule.Health, rule.LastError)
			}
			found, err := p.query(expr(t, m, rule.Name))
			if err != nil {
				return err
			}
			if want := slices.Contains(names, rule.Name); want != (len(found) > 0) {
				return fmt.Errorf("%s finds %v", rule.Name, found)
			}
		}
		return nil
	})
}

func expr(t *testing.T, m manifests, alert string) string {
	t.Helper()
	for _, rule := range m.rules.Spec.Groups[0].Rules {
		if rule.Alert == alert {
			return rule.Expr.String()
		}
	}
	t.Fatalf("no alert %s", alert)
	return ""
}

// eventually polls for a minute until ready returns nil.
func eventually(t *testing.T, ready func() error) {
	t.Helper()
	harness.Eventually(t, time.Minute, ready)
}

// traffic makes calls of every kind that is counted, through the tunnel, until stop is called.
func (w *world) traffic(t *testing.T) (stop func()) {
	t.Helper()
	caller := agent.Caller(w.ControlPlane, agentID, agentToken)
	caller.QPS = -1
	client, err := kubernetes.NewForConfig(caller)
	if err != nil {
		t.Fatal(err)
	}
	// An APIService whose server does not exist: the API server answers 503 for it.
	const away = `{"apiVersion":"apiregistration.k8s.io/v1","kind":"APIService","metadata":{"name":"v1.away.example"},
		"spec":{"group":"away.example","version":"v1","groupPriorityMinimum":1,"versionPriority":1,
		"insecureSkipTLSVerify":true,
		"service":{"name":"away","namespace":"default"}}}`
	err = w.cluster.Client.CoreV1().RESTClient().Post().
		AbsPath("/apis/apiregistration.k8s.io/v1/apiservices").Body([]byte(away)).
		SetHeader("Content-Type", "application/json").Do(t.Context()).Error()
	if err != nil {
		t.Fatal(err)
	}
	runner := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if time.Now().UnixMilli()%5 == 0 {
			w.WriteHeader(http.StatusTeapot)
		}
		_, _ = io.Copy(w, r.Body)
	}))
	t.Cleanup(runner.Close)
	base := w.ControlPlane.GatewayURL + "/agents/" + agentID
	send := func(token, method, path, body string) {
		client, err := rest.HTTPClientFor(agent.Caller(w.ControlPlane, agentID, token))
		if err != nil {
			t.Error(err)
			return
		}
		req, err := http.NewRequestWithContext(t.Context(), method, base+path, strings.NewReader(body))
		if err != nil {
			t.Error(err)
			return
		}
		req.Header.Set("Content-Type", "application/json")
		if resp, err := client.Do(req); err == nil { // for the picture, frps is away for a while
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
		}
	}
	send(agentToken, http.MethodPost, "/api/control-plane/message", fmt.Sprintf(
		`{"id":"1","type":"runner_assigned","timestamp":"2026-01-02T03:04:05Z","data":{"runner_id":"r",`+
			`"runner_endpoint":%q,"runner_token":"t","assigned_at":"2026-01-02T03:04:05Z"}}`, runner.URL))

	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	start := time.Now()
	// every repeats do, alternately faster and slower, so that the graphs show something.
	every := func(pause time.Duration, do func()) {
		group.Go(func() {
			for ctx.Err() == nil {
				do()
				swing := 1 + 0.7*math.Sin(time.Since(start).Seconds()/25+float64(pause.Milliseconds()))
				select {
				case <-time.After(time.Duration(float64(pause) * swing)):
				case <-ctx.Done():
				}
			}
		})
	}
	pods, maps := client.CoreV1().Pods("default"), client.CoreV1().ConfigMaps("default")
	every(40*time.Millisecond, func() { _, _ = pods.List(ctx, metav1.ListOptions{}) })
	every(60*time.Millisecond, func() { _, _ = maps.List(ctx, metav1.ListOptions{}) })
	every(50*time.Millisecond, func() { _, _ = client.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{}) })
	every(300*time.Millisecond, func() { _, _ = pods.Get(ctx, "none", metav1.GetOptions{}) })
	every(200*time.Millisecond, func() { _ = client.RESTClient().Get().AbsPath("/apis/away.example/v1").Do(ctx).Error() })
	every(300*time.Millisecond, func() { send("wrong", http.MethodGet, "/api/k8s/version", "") })
	every(700*time.Millisecond, func() { send("", http.MethodGet, "/api/agent/status", "") })
	every(500*time.Millisecond, func() { send(agentToken, http.MethodGet, "/api/k8s/metrics", "") })
	every(900*time.Millisecond, func() {
		send(agentToken, http.MethodDelete, "/api/k8s/api/v1/namespaces/"+namespace, "")
	})
	every(time.Second, func() { send(agentToken, http.MethodPost, "/api/agent/heartbeat", "") })
	every(time.Second, func() { send(agentToken, http.MethodGet, "/api/agent/status", "") })
	every(400*time.Millisecond, func() { send(agentToken, http.MethodPost, "/api/runners/r/command", `{"do":"it"}`) })
	for i := range 6 {
		timeout := int64(5 + 3*i)
		every(time.Second, func() {
			watch, err := maps.Watch(ctx, metav1.ListOptions{TimeoutSeconds: &timeout})
			if err != nil {
				return
			}
			for range watch.ResultChan() { // until it ends
			}
		})
	}
	for range 2 {
		every(time.Second, func() {
			if err := w.upgrade(ctx); err != nil && ctx.Err() == nil && *pictureOf == 0 {
				t.Errorf("an upgrade: %v", err)
			}
		})
	}
	if *pictureOf > 0 {
		group.Go(func() {
			for _, step := range []func() error{
				func() error { w.ControlPlane.StopFrps(); return nil },
				func() error { return w.ControlPlane.StartFrps(t.Context()) },
			} {
				select {
				case <-time.After(*pictureOf / 3):
				case <-ctx.Done():
					return
				}
				if err := step(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	stop = func() { cancel(); group.Wait() }
	t.Cleanup(stop)
	return stop
}

// upgrade watches over a WebSocket for a while, as browsers do.
func (w *world) upgrade(ctx context.Context) error {
	config := agent.Caller(w.ControlPlane, agentID, agentToken)
	config.NextProtos = []string{"http/1.1"}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, config.Host+"/api/v1/configmaps?watch=true", nil)
	if err != nil {
		return err
	}
	req.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"},
		"Sec-Websocket-Key": {"dGhlIHNhbXBsZSBub25jZQ=="}, "Origin": {"http://127.0.0.1"}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return errors.New(resp.Status)
	}
	stop := context.AfterFunc(ctx, func() { _ = resp.Body.Close() })
	defer stop()
	_, _ = io.Copy(io.Discard, resp.Body) // until it is closed
	return nil
}
