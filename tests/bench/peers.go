package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

const (
	small = 2 << 10
	large = 64 << 20
	list  = 10 << 20
)

// api stands in for the API server, so that its speed does not decide the results. It gives answers of 2 KiB, 10 and
// 64 MiB, takes an upload, and holds watches that stay silent after one event.
func api() http.Handler {
	part := bytes.Repeat([]byte("x"), small)
	mux := http.NewServeMux()
	mux.HandleFunc("/api/v1/small", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(part)
	})
	for path, size := range map[string]int{"large": large, "list": list} {
		mux.HandleFunc("GET /api/v1/"+path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			block := bytes.Repeat(part, 16)
			for range size / len(block) {
				_, _ = w.Write(block)
			}
		})
	}
	mux.HandleFunc("POST /api/v1/large", func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		_, _ = fmt.Fprint(w, n)
	})
	mux.HandleFunc("/api/v1/pods", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte("{}\n"))
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) {})
	return mux
}

// upstream serves the api over TLS, HTTP/2 and HTTP/1.1.
func upstream(addr string) error {
	server := httptest.NewUnstartedServer(api()) // for its certificate
	_ = server.Listener.Close()
	var err error
	if server.Listener, err = net.Listen("tcp", addr); err != nil {
		return err
	}
	server.EnableHTTP2 = true
	server.StartTLS()
	select {}
}

// startUpstream starts the upstream as a process of its own, and returns its address and a kubeconfig for it.
func startUpstream(group *process.Group) (addr, kubeconfig string, err error) {
	self, err := os.Executable()
	if err != nil {
		return "", "", err
	}
	if addr, err = process.FreeAddr(); err != nil {
		return "", "", err
	}
	if _, err := group.Start("upstream", nil, self, "upstream", addr); err != nil {
		return "", "", err
	}
	kubeconfig = filepath.Join(group.Dir(), "kubeconfig")
	return addr, kubeconfig, cluster.WriteKubeconfig(kubeconfig, &rest.Config{
		Host: "https://" + addr, BearerToken: "t", TLSClientConfig: rest.TLSClientConfig{Insecure: true},
	})
}

// bare is a reverse proxy in ten lines.
func bare(addr, target string) error {
	u, err := url.Parse(target)
	if err != nil {
		return err
	}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(u) },
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true},
	}
	server := &http.Server{Addr: addr, Handler: proxy, ReadHeaderTimeout: time.Minute}
	return server.ListenAndServe()
}

// peer is a running proxy in front of the upstream.
type peer struct {
	name   string
	url    string // of the API's root
	header http.Header
	pid    int // 0: there is none
}

// beforeName names another build of our proxy, whose path is in BEFORE.
const beforeName = "the build BEFORE"

// startPeers starts the upstream, our proxy and its peers, or those with the given names. A non-empty enter is the
// beginning of their commands, which limits their memory to 256 MiB.
func startPeers(ctx context.Context, group *process.Group, enter []string, names ...string) ([]peer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	addr, kubeconfig, err := startUpstream(group)
	if err != nil {
		return nil, err
	}
	target := "https://" + addr

	run := func(name string, env []string, binary string, args ...string) (*process.Process, error) {
		command := slices.Concat(enter, []string{binary}, args)
		return group.Start(name, env, command[0], command[1:]...)
	}
	limited := len(enter) > 0
	var peers []peer
	add := func(name, root string, header http.Header, start func(addr string) (*process.Process, error)) error {
		if len(names) > 0 && !slices.Contains(names, name) {
			return nil
		}
		addr, err := process.FreeAddr()
		if err != nil {
			return err
		}
		p, err := start(addr)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		found := peer{name: name, url: "http://" + addr + root, header: header, pid: p.Pid()}
		if name == "nginx" { // the master starts one worker, which does the work
			err := process.Poll(ctx, 10*time.Second, p.Done(), func() (err error) {
				found.pid, err = childOf(p.Pid())
				return err
			})
			if err != nil {
				return err
			}
		}
		peers = append(peers, found)
		return process.Poll(ctx, 10*time.Second, p.Done(),
			func() error { return call(ctx, http.DefaultClient, found, "/api/v1/small") })
	}

	ours := func(name, binary string, header http.Header, more ...string) error {
		return add(name, "/api/k8s", header, func(addr string) (*process.Process, error) {
			metrics, err := process.FreeAddr()
			if err != nil {
				return nil, err
			}
			env := append([]string{
				"PIPEOPS_AGENT_ID=bench", "PIPEOPS_AGENT_TOKEN=callers", "KUBECONFIG=" + kubeconfig,
				"PIPEOPS_LISTEN_ADDR=" + addr, "PIPEOPS_METRICS_ADDR=" + metrics,
			}, more...)
			if limited {
				env = append(env, "GOMEMLIMIT=204MiB") // four fifths, as it sets itself in a container
			}
			return run("proxy", env, binary)
		})
	}
	binary, err := process.Binary("proxy")
	if err != nil {
		return nil, err
	}
	gate := http.Header{"Authorization": {"Bearer callers"}}
	if err := ours("this proxy", binary, gate); err != nil {
		return nil, err
	}
	for _, other := range []struct {
		name, binary, identity string
		header                 http.Header
	}{
		{beforeName, os.Getenv("BEFORE"), "", gate},
		{"identity named", binary, "named", http.Header{
			"Authorization": {"Bearer callers"}, "Impersonate-User": {"alice"}, "Impersonate-Group": {"developers"},
		}},
		{"identity own", binary, "own", http.Header{
			"Authorization": {"Bearer own"}, "Pipeops-Agent-Authorization": {"Bearer callers"},
		}},
	} {
		if !slices.Contains(names, other.name) || other.binary == "" {
			continue
		}
		var env []string
		if other.identity != "" { // an earlier build refuses the setting
			env = []string{"PIPEOPS_ACCESS_IDENTITY=" + other.identity}
		}
		if err := ours(other.name, other.binary, other.header, env...); err != nil {
			return nil, err
		}
	}
	err = add("kubectl proxy", "", nil, func(addr string) (*process.Process, error) {
		binary, err := process.Binary("kubectl")
		if err != nil {
			return nil, err
		}
		_, port, _ := net.SplitHostPort(addr)
		return run("kubectl-proxy", []string{"KUBECONFIG=" + kubeconfig}, binary, "proxy", "--port", port)
	})
	if err != nil {
		return nil, err
	}
	err = add("nginx", "", nil, func(addr string) (*process.Process, error) {
		binary, err := exec.LookPath("nginx")
		if err != nil {
			return nil, fmt.Errorf("%w: install nginx-light", err)
		}
		dir, err := group.Mkdir("nginx")
		if err != nil {
			return nil, err
		}
		file := filepath.Join(dir, "nginx.conf")
		text := strings.NewReplacer("DIR", dir, "ADDR", addr, "UPSTREAM",
			strings.TrimPrefix(target, "https://")).Replace(nginxConf)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return nil, err
		}
		return run("nginx", nil, binary, "-c", file, "-p", dir, "-g", "daemon off;")
	})
	if err != nil {
		return nil, err
	}
	err = add("bare ReverseProxy", "", nil, func(addr string) (*process.Process, error) {
		return run("bare", nil, self, "bare", addr, target)
	})
	if err != nil {
		return nil, err
	}
	return append(peers, peer{name: "no proxy", url: target}), nil
}

// nginxConf is nginx as a careful user would set it up, with an access log like ours.
const nginxConf = `
worker_processes 1;
user root;
pid DIR/pid;
error_log DIR/error.log;
events { worker_connections 8192; }
http {
	access_log DIR/access.log;
	client_body_temp_path DIR/body;
	proxy_temp_path DIR/proxy;
	client_max_body_size 0;
	upstream api { server UPSTREAM; keepalive 64; }
	server {
		listen ADDR;
		keepalive_requests 1000000;
		location / {
			proxy_pass https://api;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_set_header Authorization "Bearer t";
			proxy_buffering off;
			proxy_request_buffering off;
			proxy_read_timeout 1h;
		}
	}
}
`

// childOf returns the pid of a process's only child.
func childOf(pid int) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}
