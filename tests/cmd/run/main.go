// Command run is `make run`. It runs the whole path from kubectl to a Kubernetes API server on this machine, until
// Ctrl-C. With KUBECONFIG set it uses that cluster, otherwise it starts an API server of its own.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/discovery"

	"github.com/pipeops/vm-agent/proxy/kube"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

const agentID = "agent-001"

const usage = `run is what "make run" starts: all that is between kubectl and a Kubernetes API server, on this machine.

  make run                              starts a cluster too: an API server that stores objects, without nodes
  KUBECONFIG=~/.kube/config make run    uses your cluster: callers have the rights of that kubeconfig

It starts a control plane with a stock frps, and an agent: bootstrap, a stock frpc and the proxy. It prints a kubeconfig
and commands to try. Everything listens on 127.0.0.1. Ctrl-C stops everything and removes its files.
`

func main() {
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Getenv("KUBECONFIG"), os.Stdout); err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "run:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, kubeconfig string, out io.Writer) error {
	start := time.Now()
	say := func(format string, args ...any) { _, _ = fmt.Fprintf(out, format+"\n", args...) }
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()

	own := kubeconfig == ""
	var etcdDone, apiServerDone <-chan struct{} // nil, which is never ready, for a cluster that was not started here
	var c *cluster.Cluster
	if !own {
		say("cluster        KUBECONFIG is set: using the cluster of %s (unset it to start a new one)", kubeconfig)
		if err := reachable(ctx, kubeconfig); err != nil {
			return err
		}
	} else {
		say("cluster        starting etcd and kube-apiserver (it stores objects; without nodes, nothing runs)")
		if c, err = cluster.Start(ctx, group); err != nil {
			return err
		}
		etcdDone, apiServerDone = c.Etcd.Done(), c.APIServer.Done()
		kubeconfig = filepath.Join(group.Dir(), "agent.kubeconfig")
		if _, err := c.WriteAgentKubeconfig(ctx, kubeconfig); err != nil {
			return err
		}
	}
	token := rand.Text()
	logs, err := os.OpenFile(filepath.Join(group.Dir(), "controlplane.log"), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = logs.Close() }()
	say("control plane  starting with a stock frps")
	cp, err := controlplane.Start(ctx, controlplane.Options{
		Group: group, Agents: map[string]string{agentID: token}, Log: slog.New(slog.NewTextHandler(logs, nil)),
	})
	if err != nil {
		return err
	}
	defer cp.Close()
	say("agent          starting bootstrap, a stock frpc and the proxy")
	a, err := agent.New(group, cp, agentID, token, kubeconfig)
	if err != nil {
		return err
	}
	// Allows runners that the user starts to try them.
	a.Env = append(a.Env, "PIPEOPS_RUNNERS_ALLOWED_HOSTS=127.0.0.1,*.svc,*.svc.cluster.local")
	if err := a.Start(); err != nil {
		return err
	}
	if err := a.WaitReady(ctx); err != nil {
		return err
	}
	tokenFile := filepath.Join(group.Dir(), "token")
	if err := os.WriteFile(tokenFile, []byte(token), 0o600); err != nil {
		return err
	}
	environment := filepath.Join(group.Dir(), "agent.env")
	if err := os.WriteFile(environment, []byte(strings.Join(a.Env, "\n")), 0o600); err != nil {
		return err
	}
	bootstrap, err := process.Binary("bootstrap")
	if err != nil {
		return err
	}
	caller := filepath.Join(group.Dir(), "kubeconfig")
	if err := agent.WriteCaller(caller, cp, agentID, token); err != nil {
		return err
	}
	kubectl, err := process.Binary("kubectl")
	if err != nil {
		return err
	}
	say("ready          after %s; logs in %s\n", time.Since(start).Round(10*time.Millisecond), group.Dir())
	say("In another terminal:\n")
	say("  export KUBECONFIG=%s PATH=%s:$PATH", caller, filepath.Dir(kubectl))
	say("  kubectl get namespaces")
	if own {
		say("  kubectl create configmap hello --from-literal=a=b")
	} else {
		say("  kubectl get pods -A")
	}
	say("  kubectl auth can-i --list")
	base := cp.GatewayURL + "/agents/" + agentID
	say("\nThe agent's own API is at %s (runners may be on 127.0.0.1; /openapi.yaml lists its routes):\n", base)
	say("  curl --cacert %s -H \"Authorization: Bearer $(cat %s)\" %s/api/agent/status", cp.CAFile, tokenFile, base)
	say("\nThe control plane is at %s. To check the whole path, step by step:\n", cp.APIURL)
	say("  env $(cat %s) %s doctor", environment, bootstrap)
	say("\nProbes and metrics: %s/ready and /metrics. Ctrl-C stops everything and removes its files.", a.Operations)

	for {
		select {
		case <-ctx.Done():
			say("stopping")
			return nil
		case <-etcdDone:
			return c.Etcd.Failed()
		case <-apiServerDone:
			return c.APIServer.Failed()
		case <-a.Frpc.Done():
			say("frpc has ended: restarting it, as a kubelet would")
			err = a.StartFrpc()
		case <-a.Bootstrap.Done():
			say("bootstrap has ended: restarting it, as a kubelet would")
			err = a.StartBootstrap()
		case <-a.Proxy.Done():
			say("the proxy has ended: restarting it, as a kubelet would")
			err = a.StartProxy()
		}
		if err != nil {
			return err
		}
		select {
		case <-time.After(time.Second): // avoids a tight loop if it ends at once
		case <-ctx.Done():
		}
	}
}

// reachable returns an error that says what to do, unless the cluster of the kubeconfig answers within 5 s.
func reachable(ctx context.Context, kubeconfig string) error {
	config, err := kube.RESTConfig(kubeconfig, false)
	if err != nil {
		return err
	}
	config.Timeout = 5 * time.Second
	client, err := discovery.NewDiscoveryClientForConfig(config)
	if err == nil {
		_, err = client.RESTClient().Get().AbsPath("/version").DoRaw(ctx)
	}
	if err != nil {
		return fmt.Errorf("the cluster of KUBECONFIG, %s, does not answer: %w: check it with `kubectl version`, "+
			"or unset KUBECONFIG to start a new one", config.Host, err)
	}
	return nil
}
