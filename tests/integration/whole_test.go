package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
)

// TestNoResponseToAWriteIsLost sends writes of 4 to 100 KB, eight at a time, while all cores are busy, and expects
// each answer complete and each write done once. Go's transport loses such answers where it reads a body that
// net/http closes.
//
// LOST_WRITES=20000 sets the number of writes each way to a server that counts them; a fortieth of that goes to an
// API server, three requests each. The default, 400, is short enough for every run of the tests, but too few for one
// run to prove anything.
func TestNoResponseToAWriteIsLost(t *testing.T) {
	count := 400
	if value := os.Getenv("LOST_WRITES"); value != "" {
		var err error
		if count, err = strconv.Atoi(value); err != nil {
			t.Fatal(err)
		}
	}
	done := &counter{writes: map[string]int{}}
	server := httptest.NewUnstartedServer(done)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	for _, tunnel := range []string{"https", "http"} {
		counted := connectedBy(t, tunnel, &rest.Config{Host: server.URL, BearerToken: "any",
			TLSClientConfig: rest.TLSClientConfig{Insecure: true}})
		stored := connectedBy(t, tunnel, api.agent)
		ns := stored.namespace()
		for _, way := range []string{"the gateway over HTTP1", "the gateway over HTTP2", "frps alone"} {
			if tunnel == "http" && way == "frps alone" {
				continue // frps itself loses answers, and our code cannot prevent it
			}
			t.Run(tunnel+" by "+way, func(t *testing.T) {
				keepCoresBusy(t, counted)
				client, base := clientVia(t, way, counted)
				lost := inParallel(count, func(i int) error {
					path, body := fmt.Sprintf("/api/k8s/%s/%d", t.Name(), i), payload(i)
					answer, err := write(t.Context(), client, http.MethodPut, base+path, "text/plain", body)
					if err == nil && !bytes.Equal(answer, body) {
						err = fmt.Errorf("%d bytes came back of %d", len(answer), len(body))
					}
					return err
				})
				for i := range count {
					if n := done.count(fmt.Sprintf("/%s/%d", t.Name(), i)); n != 1 {
						t.Errorf("write %d was done %d times", i, n)
					}
				}
				reportLost(t, lost, count)
				client, base = clientVia(t, way, stored)
				prefix := strings.ToLower(strings.NewReplacer("/", "-", " ", "-", ".", "-", "_", "-").Replace(way))
				reportLost(t, inParallel(count/40, func(i int) error {
					return threeWrites(t.Context(), client, base+"/api/k8s/api/v1/namespaces/"+ns+"/configmaps",
						fmt.Sprintf("%s-%d", prefix, i), string(payload(i)))
				}), count/40)
			})
		}
	}
}

// connectedBy returns a world whose agent is ready, has a tunnel of this type and uses the API server of config.
func connectedBy(t *testing.T, tunnel string, config *rest.Config, options ...func(*controlplane.Options)) *world {
	t.Helper()
	w := newWorld(t, options...)
	kubeconfig := filepath.Join(w.group.Dir(), "agent.kubeconfig")
	if err := cluster.WriteKubeconfig(kubeconfig, config); err != nil {
		t.Fatal(err)
	}
	w.agent.Env = append(w.agent.Env, "KUBECONFIG="+kubeconfig, "PIPEOPS_FRP_TUNNEL_TYPE="+tunnel)
	w.startAgent()
	return w
}

// counter is an API server that counts the writes, and answers each with its body.
type counter struct {
	mu     sync.Mutex
	writes map[string]int
}

func (c *counter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	if r.Method != http.MethodGet {
		c.mu.Lock()
		c.writes[r.URL.Path]++
		c.mu.Unlock()
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body)
}

func (c *counter) count(path string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.writes[path]
}

// threeWrites creates, updates and patches a ConfigMap. Each of these fails if it is done a second time.
func threeWrites(ctx context.Context, client *http.Client, list, name, padding string) error {
	type object struct {
		Metadata map[string]any    `json:"metadata"`
		Data     map[string]string `json:"data"`
	}
	o := object{map[string]any{"name": name}, map[string]string{"padding": padding, "step": "created"}}
	for _, step := range []struct{ method, url, contentType, want string }{
		{http.MethodPost, list, "application/json", "created"},
		{http.MethodPut, list + "/" + name, "application/json", "updated"},
		{http.MethodPatch, list + "/" + name, "application/json-patch+json", "patched"},
	} {
		o.Data["step"] = step.want
		var body any = o
		if step.method == http.MethodPatch {
			body = []any{
				map[string]string{"op": "test", "path": "/data/step", "value": "updated"},
				map[string]string{"op": "replace", "path": "/data/step", "value": step.want},
				map[string]string{"op": "replace", "path": "/data/padding", "value": padding},
			}
		}
		data, err := json.Marshal(body)
		if err != nil {
			return err
		}
		answer, err := write(ctx, client, step.method, step.url, step.contentType, data)
		if err != nil {
			return fmt.Errorf("%s: %w", step.want, err)
		}
		o = object{}
		if err := json.Unmarshal(answer, &o); err != nil || o.Data["step"] != step.want || o.Data["padding"] != padding {
			return fmt.Errorf("%s: %d bytes came back: %w", step.want, len(answer), err)
		}
	}
	return nil
}

// payload returns a body of 4 to 100 KB.
func payload(i int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "%015d\n", i), 256+(i*7919)%(6*1024))
}

// write sends a body and returns the answer. A status other than 2xx is an error.
func write(ctx context.Context, client *http.Client, method, url, contentType string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = http.Header{"Authorization": {"Bearer " + agentToken}, "Content-Type": {contentType}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %.300s", resp.Status, answer)
	}
	return answer, err
}

// clientVia returns a client for one way to an agent, and the agent's URL on that way.
func clientVia(t *testing.T, way string, w *world) (*http.Client, string) {
	t.Helper()
	transport := &http.Transport{MaxIdleConnsPerHost: 100}
	t.Cleanup(transport.CloseIdleConnections)
	client := &http.Client{Transport: transport, Timeout: time.Minute}
	if way == "frps alone" {
		addr, config := w.cp.Direct(agentID)
		transport.TLSClientConfig = config
		transport.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, addr)
		}
		return client, "https://" + config.ServerName
	}
	trusted := x509.NewCertPool()
	trusted.AppendCertsFromPEM(w.cp.CA)
	transport.TLSClientConfig = &tls.Config{RootCAs: trusted, MinVersion: tls.VersionTLS12}
	transport.ForceAttemptHTTP2 = way == "the gateway over HTTP2"
	return client, w.cp.GatewayURL + "/agents/" + agentID
}

// inParallel calls do n times, eight at a time, and returns the errors.
func inParallel(n int, do func(i int) error) (failed []error) {
	var mu sync.Mutex
	var next atomic.Int64
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				if err := do(int(i)); err != nil {
					mu.Lock()
					failed = append(failed, err)
					mu.Unlock()
				}
			}
		})
	}
	group.Wait()
	return failed
}

func reportLost(t *testing.T, lost []error, of int) {
	t.Helper()
	t.Logf("%d of %d lost", len(lost), of)
	if len(lost) > 0 {
		t.Errorf("%d of %d have lost their answer; the first: %v", len(lost), of, lost[0])
	}
}

// keepCoresBusy loads all cores until the test ends, so that each hop is interrupted wherever it can be.
func keepCoresBusy(t *testing.T, w *world) {
	t.Helper()
	for i := range 4 * runtime.NumCPU() {
		p, err := w.group.Start(fmt.Sprintf("busy-%d", i), nil, "sh", "-c", "while :; do :; done")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Kill)
	}
}
