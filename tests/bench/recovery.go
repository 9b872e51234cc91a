package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/cluster"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// recovery measures the cost of renewing the lease, and how long callers cannot use the tunnel after a fault. All
// parts are real; the control plane is on this machine.
func recovery(ctx context.Context) error {
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	c, err := cluster.Start(ctx, group)
	if err != nil {
		return err
	}
	kubeconfig := filepath.Join(group.Dir(), "agent.kubeconfig")
	if _, err := c.WriteAgentKubeconfig(ctx, kubeconfig); err != nil {
		return err
	}
	for _, shared := range []bool{true, false} {
		if err := recoveryWith(ctx, kubeconfig, shared); err != nil {
			return err
		}
	}
	return nil
}

// recoveryWith measures with frp's shared token, or with an OpenID Connect token for each lease.
func recoveryWith(ctx context.Context, kubeconfig string, shared bool) error {
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	const id = "agent-001"
	method := map[bool]string{true: "method token", false: "method oidc"}[shared]
	cp, err := controlplane.Start(ctx, controlplane.Options{
		Group: group, Agents: map[string]string{id: "first"}, Log: slog.New(slog.DiscardHandler), Token: shared,
	})
	if err != nil {
		return err
	}
	defer cp.Close()
	a, err := agent.New(group, cp, id, "", kubeconfig)
	if err != nil {
		return err
	}
	tokenFile := filepath.Join(group.Dir(), "token")
	if err := os.WriteFile(tokenFile, []byte("first"), 0o600); err != nil {
		return err
	}
	a.Env = append(a.Env, "PIPEOPS_AGENT_TOKEN=", "PIPEOPS_AGENT_TOKEN_FILE="+tokenFile)

	var written []float64
	for range 11 {
		begin := time.Now()
		once, err := a.Once()
		if err != nil {
			return err
		}
		if once.ExitCode() != 0 {
			return once.Failed()
		}
		written = append(written, float64(time.Since(begin).Milliseconds()))
	}
	if err := os.Remove(filepath.Join(a.RunDir, frpc.ConfigFile)); err != nil {
		return err
	}
	if err := a.Start(); err != nil {
		return err
	}
	a.RestartFrpc(ctx)
	if err := a.WaitReady(ctx); err != nil {
		return err
	}

	// One caller reads a small object again and again; another holds a watch.
	const token = "first"
	ask := func(path string) (*http.Response, error) {
		caller := agent.Caller(cp, id, token)
		client, err := rest.HTTPClientFor(caller)
		if err != nil {
			return nil, err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, caller.Host+path, nil)
		if err != nil {
			return nil, err
		}
		return client.Do(req)
	}
	fmt.Printf("| what | figure |\n| --- | --- |\n")
	fmt.Printf("| %s: bootstrap, from its start to its end with frpc.toml written | %.0f ms |\n", method, median(written))
	// happening calls do, and reports how long callers cannot use the tunnel, until done returns true.
	happening := func(what string, do func() error, done func() bool) error {
		//nolint:bodyclose // closed below, unless an error ends the whole measurement
		watch, err := ask("/api/v1/namespaces/default/configmaps?watch=true")
		if err != nil {
			return err
		}
		cut := make(chan time.Time, 1)
		go func() {
			_, _ = io.Copy(io.Discard, watch.Body)
			cut <- time.Now()
		}()
		if err := do(); err != nil {
			return err
		}
		begin := time.Now()
		var lost, asked int
		var first, last, over time.Time // first and last refused call, and when done returned true
		released := false
		for over.IsZero() || time.Since(over) < 5*time.Second {
			at := time.Now()
			resp, err := ask("/api/v1/namespaces/default")
			asked++
			if err != nil || resp.StatusCode != http.StatusOK {
				lost++
				last = time.Now()
				if first.IsZero() {
					first = at
				}
			}
			if err == nil {
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
			}
			if over.IsZero() && done() {
				over = time.Now()
			}
			if over.IsZero() && !released && time.Since(begin) > 10*time.Second { // the caller of the watch gives up
				released = true
				_ = watch.Body.Close()
			}
			if time.Since(begin) > time.Minute {
				return fmt.Errorf("%s: not over after a minute", what)
			}
			time.Sleep(max(0, 20*time.Millisecond-time.Since(at)))
		}
		running := "not cut"
		select {
		case <-cut:
			if running = "cut"; released {
				running = "not cut until its caller left"
			}
		default:
		}
		_ = watch.Body.Close()
		fmt.Printf("| %s: callers cannot use the tunnel for | %.1f s |\n", what, last.Sub(first).Seconds())
		fmt.Printf("| … of %d calls, one every 20 ms, were told to retry | %d |\n", asked, lost)
		fmt.Printf("| … a watch that ran | %s |\n", running)
		return nil
	}
	over := func() bool { return true }
	if shared { // the rest does not depend on the method
		pid := cp.FrpsPid()
		for _, fault := range []struct {
			what string
			do   func() error
		}{
			{"frps killed, and restarted at once", func() error { return syscall.Kill(pid, syscall.SIGKILL) }},
			{"frps frozen for 30 s", func() error {
				if err := syscall.Kill(cp.FrpsPid(), syscall.SIGSTOP); err != nil {
					return err
				}
				time.Sleep(30 * time.Second)
				return syscall.Kill(cp.FrpsPid(), syscall.SIGCONT)
			}},
			{"frpc killed, and restarted after 0.5 s", func() error { return syscall.Kill(a.FrpcPid(), syscall.SIGKILL) }},
		} {
			if err := happening(fault.what, fault.do, over); err != nil {
				return err
			}
		}
	}
	restarts, leases := a.FrpcRestarts(), strings.Count(a.Bootstrap.Log(), "lease written")
	if err := happening("renewal with "+method, func() error {
		cp.SetAgent(id, "second")
		return process.ReplaceFile(tokenFile, "second") // callers use the old token, which is still valid
	}, func() bool {
		return strings.Count(a.Bootstrap.Log(), "lease written") > leases && (!shared || a.FrpcRestarts() > restarts)
	}); err != nil {
		return err
	}
	rss, err := memory(a.Bootstrap.Pid(), "VmRSS")
	if err != nil {
		return err
	}
	fmt.Printf("| RSS of bootstrap, waiting | %.1f MB |\n\n", rss)
	if restarted := a.FrpcRestarts() > restarts; restarted != shared {
		return fmt.Errorf("%s: frpc was restarted for the renewal: %v", method, restarted)
	}
	return nil
}
