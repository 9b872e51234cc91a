package integration

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/pipeops/vm-agent/tests/attack"
	"github.com/pipeops/vm-agent/tests/process"
)

// TestAttack: under attacks on its memory from all sides at once, the proxy stays below the memory limit of its
// container, honest callers notice nothing but time, and it returns what it took. Each attack has an address of its
// own. ATTACKS="stalled loop" leaves out those whose names contain none of these words.
func TestAttack(t *testing.T) {
	// Four fifths of the limit, as the proxy makes of it in a container.
	w, ns := withRunners(t, "PIPEOPS_FRP_TUNNEL_TYPE=https", "GOMEMLIMIT=204MiB")
	for i := range 40 { // a list of 10 MB
		object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("large-%d", i)}, Data: map[string]string{"x": strings.Repeat("x", 250_000)}}
		if _, err := api.Client.CoreV1().ConfigMaps(ns).Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	addr, config := w.cp.Direct(agentID)
	honest := attack.Target{Addr: addr, TLS: config, Host: config.ServerName, Prefix: "/api/k8s", Token: agentToken}
	from := func(t attack.Target, ip string) attack.Target {
		t.From = ip
		return t
	}
	listener := func(rawURL string, config *tls.Config) attack.Target {
		u, err := url.Parse(rawURL)
		if err != nil {
			t.Fatal(err)
		}
		return attack.Target{Addr: u.Host, TLS: config, Host: honest.Host, Prefix: honest.Prefix, Token: honest.Token}
	}
	operations, plain, secure := listener(w.agent.Operations, nil), listener(w.agent.Tunnel, nil), listener(w.agent.Tunnel, config)

	for name, handler := range map[string]http.Handler{
		"hostile": attack.HostileRunner(), "loop": attack.LoopRunner(from(honest, "127.0.0.2"), "loop"),
	} {
		runner := httptest.NewServer(handler)
		t.Cleanup(func() { runner.CloseClientConnections(); runner.Close() })
		w.assign(name, runner.URL)
	}

	maps := "/api/v1/namespaces/" + ns + "/configmaps"
	waves := []attack.Wave{
		{Name: "header floods, operations listener", N: 25, Rate: 25, Attack: attack.HeaderFlood(from(operations, "127.0.0.3"), false)},
		{Name: "header floods, operations listener, whole", N: 25, Rate: 25, Attack: attack.HeaderFlood(from(operations, "127.0.0.3"), true)},
		{Name: "header floods, tunnel listener, TLS", N: 25, Rate: 25, Attack: attack.HeaderFlood(from(secure, "127.0.0.3"), false)},
		{Name: "header floods, tunnel listener, plain, whole", N: 25, Rate: 25, Attack: attack.HeaderFlood(from(plain, "127.0.0.3"), true)},
		{Name: "header floods, frps", N: 25, Rate: 25, Attack: attack.HeaderFlood(from(honest, "127.0.0.3"), false)},
		// frps and the sockets on the way hold most of an answer; straight at the listener, nobody else does.
		{Name: "stalled watches, frps", N: 50, Rate: 20, Attack: attack.StalledRead(from(honest, "127.0.0.4"), maps+"?watch=true")},
		{Name: "stalled lists, frps", N: 20, Rate: 20, Attack: attack.StalledRead(from(honest, "127.0.0.4"), maps)},
		{Name: "stalled watches, tunnel listener", N: 50, Rate: 20, Attack: attack.StalledRead(from(secure, "127.0.0.4"), maps+"?watch=true")},
		{Name: "stalled lists, tunnel listener", N: 100, Rate: 20, Attack: attack.StalledRead(from(secure, "127.0.0.4"), maps)},
		{Name: "stalled uploads of 256 KiB", N: 200, Rate: 50, Attack: attack.StalledUpload(from(honest, "127.0.0.5"), maps, 256<<10)},
		{Name: "stalled uploads of 1 MiB", N: 100, Rate: 50, Attack: attack.StalledUpload(from(honest, "127.0.0.5"), maps, 1<<20)},
		{Name: "idle connections, operations listener", N: 500, Rate: 100, Attack: attack.IdleConnection(from(operations, "127.0.0.6"))},
		{Name: "idle connections, tunnel listener", N: 250, Rate: 100, Attack: attack.IdleConnection(from(secure, "127.0.0.6"))},
		{Name: "idle connections, frps", N: 250, Rate: 100, Attack: attack.IdleConnection(from(honest, "127.0.0.6"))},
		{Name: "hostile runner", N: 10, Rate: 10, Attack: attack.Command(from(honest, "127.0.0.7"), "hostile")},
		{Name: "loop of runners", N: 10, Rate: 10, Attack: attack.Command(from(honest, "127.0.0.7"), "loop")},
	}
	if words := strings.Fields(os.Getenv("ATTACKS")); len(words) > 0 {
		waves = slices.DeleteFunc(waves, func(w attack.Wave) bool {
			return !slices.ContainsFunc(words, func(word string) bool { return strings.Contains(w.Name, word) })
		})
		if len(waves) == 0 {
			t.Fatalf("ATTACKS=%q: no attack has such a name", words)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	victim := &attack.Victim{Pid: w.agent.Proxy.Pid(), Operations: operations, Honest: honest, Within: 90 * time.Second}
	if err := victim.Attack(ctx, waves, t.Logf); err != nil {
		t.Error(err)
	}
	// frpc holds what callers send until the proxy has read it, and its container has the same limit.
	if peak, err := process.Memory(w.agent.Frpc.Pid(), "VmHWM"); err != nil || peak > attack.Limit {
		t.Errorf("frpc had %.0f MB, %v", peak, err)
	}
	for _, p := range []interface{ Done() <-chan struct{} }{w.agent.Bootstrap, w.agent.Frpc, w.agent.Proxy} {
		select {
		case <-p.Done():
			t.Error("a process of the agent has ended")
		default:
		}
	}
}

// assign assigns a runner, as the control plane does, through the tunnel.
func (w *world) assign(runner, endpoint string) {
	w.t.Helper()
	addr, config := w.cp.Direct(agentID)
	transport := attack.Target{Addr: addr, TLS: config}.Transport(false)
	body := fmt.Sprintf(`{"id":"assign-%s","type":"runner_assigned","timestamp":"2026-01-02T03:04:05Z","data":%s}`, runner, assignment(runner, endpoint))
	header := http.Header{"Authorization": {"Bearer " + agentToken}, "Content-Type": {"application/json"}}
	resp, answer := exchange(w.t, &http.Client{Transport: transport}, http.MethodPost, "https://"+net.JoinHostPort(config.ServerName, "443")+"/api/control-plane/message", header, body)
	if resp.StatusCode != http.StatusOK {
		w.t.Fatalf("assign %s: %s %s", runner, resp.Status, answer)
	}
}
