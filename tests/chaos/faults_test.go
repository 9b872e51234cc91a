package chaos

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/link"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// fault is something that breaks. begin strikes, and end, if there is one, repairs after the time that it lasts.
// What neither repairs must recover without help.
type fault struct {
	name  string
	part  string // that it breaks
	lasts time.Duration
	begin func(*world) error
	end   func(*world) error
}

// faults returns the list. A seed selects from it by index: another list is another run.
func faults() []fault {
	var all []fault
	add := func(part, what string, lasts time.Duration, begin, end func(*world) error) {
		name := strings.TrimSpace(part + " " + what)
		if lasts > 0 {
			name += fmt.Sprintf(" for %s", lasts)
		}
		all = append(all, fault{name, part, lasts, begin, end})
	}
	durations := []time.Duration{time.Second, 20 * time.Second, 90 * time.Second}
	for _, part := range []struct {
		name    string
		signals func(*world, syscall.Signal) error
		restart func(*world) error
	}{
		{"frps", func(w *world, s syscall.Signal) error { return syscall.Kill(w.cp.FrpsPid(), s) }, func(w *world) error {
			w.cp.StopFrps()
			return w.cp.StartFrps(context.Background())
		}},
		{"frpc", each(frpcs), restart(frpcs)},
		{"proxy", each(proxies), restart(proxies)},
		{"bootstrap", each(bootstraps), restart(bootstraps)},
		{"API server", each(apiServers), restart(apiServers)},
		{"etcd", each(etcds), restart(etcds)},
	} {
		signal := func(s syscall.Signal) func(*world) error {
			return func(w *world) error { return part.signals(w, s) }
		}
		add(part.name, "killed", 0, signal(syscall.SIGKILL), nil)
		add(part.name, "restarted", 0, part.restart, nil)
		for _, d := range durations {
			add(part.name, "frozen", d, signal(syscall.SIGSTOP), signal(syscall.SIGCONT))
		}
	}
	for _, part := range []struct {
		name   string
		server func(*world) *controlplane.Server
	}{
		{"gateway", func(w *world) *controlplane.Server { return w.cp.Gateway }},
		{"control plane", func(w *world) *controlplane.Server { return w.cp.API }},
	} {
		add(part.name, "away", 5*time.Second,
			func(w *world) error { part.server(w).Stop(); return nil },
			func(w *world) error { return part.server(w).Start(context.Background()) })
		for _, d := range durations {
			add(part.name, "frozen", d,
				func(w *world) error { part.server(w).Freeze(); return nil },
				func(w *world) error { part.server(w).Thaw(); return nil })
		}
	}
	restore := func(w *world) error { w.tunnel.Set(link.Options{}); return nil }
	for _, d := range durations {
		// Neither end is told: their connections are half open.
		add("network to frps", "cut", d, func(w *world) error { w.tunnel.Set(link.Options{Loss: 1}); return nil }, restore)
	}
	const while = 20 * time.Second
	add("network to frps", "300 ms away", while,
		func(w *world) error { w.tunnel.Set(link.Options{RTT: 300 * time.Millisecond}); return nil }, restore)
	add("network to frps", "loses 1%", while,
		func(w *world) error {
			w.tunnel.Set(link.Options{RTT: 20 * time.Millisecond, Loss: 0.01})
			return nil
		}, restore)
	add("network to frps", "loses packets over 600 bytes", while,
		func(w *world) error { w.tunnel.Set(link.Options{MaxPacket: 600}); return nil }, restore)
	add("network to the API server", "cuts connections", 0, func(w *world) error { w.api.Cut(); return nil }, nil)
	add("network to the API server", "silent", while,
		func(w *world) error { w.api.Silent.Store(true); w.api.Cut(); return nil },
		func(w *world) error { w.api.Silent.Store(false); w.api.Cut(); return nil })
	add("run directories", "full", 90*time.Second, fill, unfill)
	add("file descriptors", "of frpc and proxy used up", while,
		func(w *world) error {
			err := limitFiles(w, func(pid int) (uint64, error) {
				open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
				return uint64(len(open)) / 2, err
			})
			w.api.Cut() // and new connections are needed
			return err
		}, func(w *world) error {
			return limitFiles(w, func(int) (uint64, error) { return 1 << 20, nil })
		})
	add("CPU", "of frpc, proxy and bootstrap: a tenth", while, throttle, nil)
	add("frps", "killed, leases revoked", 0, func(w *world) error {
		w.cp.RevokeLeases()
		return syscall.Kill(w.cp.FrpsPid(), syscall.SIGKILL)
	}, nil)
	hour := func(ahead time.Duration) func(*world) error {
		return func(w *world) error { w.cp.SetTerms(controlplane.Terms{Life: leaseLife, Ahead: ahead}); return nil }
	}
	add("clock", "of the control plane an hour ahead", leaseLife, hour(time.Hour), hour(0))
	add("clock", "of the control plane an hour behind", leaseLife, hour(-time.Hour), hour(0))
	add("names", "do not resolve", leaseLife,
		func(w *world) error { return os.WriteFile(hostsFile, nil, 0o644) },
		func(w *world) error { return w.writeHosts() })
	add("frps", "at another port", 0, func(w *world) error { return w.cp.MoveFrps(context.Background()) }, nil)
	add("memory", "of frpc, proxy and bootstrap at its limit", while, limitMemory, unlimitMemory)
	away := func(w *world) error { w.cp.API.Stop(); return nil }
	back := func(w *world) error { return w.cp.API.Start(context.Background()) }
	add("control plane", "away, and frpc killed when leases have expired,", leaseLife+time.Second, away,
		func(w *world) error { return errors.Join(each(frpcs)(w, syscall.SIGKILL), back(w)) })
	// A certificate outlives its lease by five and a half minutes.
	add("control plane", "away, until certificates have expired,", leaseLife+6*time.Minute, away, back)
	var before string
	remember := func(path string) (err error) {
		data, err := os.ReadFile(path)
		before = string(data)
		return err
	}
	// The API server accepts a revoked token for up to 10 s more.
	add("token", "of the ServiceAccount revoked, with a new one in its file,", 30*time.Second,
		func(w *world) error {
			if err := remember(w.accountTokenFile()); err != nil {
				return err
			}
			// The API server may be away too.
			return process.Poll(context.Background(), recovery, nil, func() error {
				return w.writeAccountToken(context.Background(), true)
			})
		},
		func(w *world) error {
			config := rest.CopyConfig(w.cluster.Config)
			config.BearerToken = before
			return refused(config)
		})
	add("token", "of the agent replaced", tokenOverlap+10*time.Second,
		func(w *world) error {
			if err := remember(w.agentTokenFile()); err != nil {
				return err
			}
			return w.setAgentToken(context.Background(), rand.Text())
		},
		func(w *world) error { return refused(agent.Caller(w.cp, harness.AgentID, before)) })
	return all
}

func frpcs(w *world) []*process.Supervised      { return w.frpc }
func proxies(w *world) []*process.Supervised    { return w.proxy }
func bootstraps(w *world) []*process.Supervised { return w.bootstrap }
func apiServers(w *world) []*process.Supervised { return w.apiServer }
func etcds(w *world) []*process.Supervised      { return w.etcd }

// each returns a function that signals all containers of a kind.
func each(containers func(*world) []*process.Supervised) func(*world, syscall.Signal) error {
	return func(w *world, s syscall.Signal) error {
		for _, c := range containers(w) {
			// It may have ended by itself, and starts again soon.
			if err := c.Signal(s); err != nil && !errors.Is(err, syscall.ESRCH) {
				return err
			}
		}
		return nil
	}
}

// restart returns a function that stops all containers of a kind, as the kubelet does but with 10 s to stop in.
func restart(containers func(*world) []*process.Supervised) func(*world) error {
	return func(w *world) error {
		var all sync.WaitGroup
		for _, c := range containers(w) {
			all.Go(c.Stop)
		}
		all.Wait()
		return nil
	}
}

const filler = "filler"

func fill(w *world) error {
	for _, a := range w.agents {
		if err := os.WriteFile(filepath.Join(a.RunDir, filler), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
			return fmt.Errorf("the run directory is not full: %w", err)
		}
	}
	return nil
}

func unfill(w *world) error {
	var err error
	for _, a := range w.agents {
		if e := os.Remove(filepath.Join(a.RunDir, filler)); !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// limitFiles sets how many files each frpc and proxy may have open.
func limitFiles(w *world, to func(pid int) (uint64, error)) error {
	for _, c := range slices.Concat(w.frpc, w.proxy) {
		pid := c.Pid()
		n, err := to(pid)
		var current unix.Rlimit
		if err == nil {
			err = unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &current)
		}
		if err == nil {
			err = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: min(n, current.Max), Max: current.Max}, nil)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// limitMemory limits the containers to the memory that they use now.
func limitMemory(w *world) error {
	for c := range w.memory {
		if err := process.Poll(context.Background(), time.Minute, nil, func() error {
			used, err := c.Usage()
			if err == nil {
				err = c.Limit(used) // fails if more is in use by then
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// unlimitMemory restores the limits. It fails if no container has ever been killed: then there was no pressure.
func unlimitMemory(w *world) error {
	killed, err := 0, error(nil)
	for c, limit := range w.memory {
		n, e := c.Killed()
		err = errors.Join(err, e, c.Limit(limit))
		killed += n
	}
	if killed == 0 {
		err = errors.Join(err, errors.New("no container needed more memory"))
	}
	return err
}

// refused returns an error if a caller with this configuration is accepted.
func refused(config *rest.Config) error {
	client, err := kubernetes.NewForConfig(config)
	if err == nil {
		if _, err := client.CoreV1().Namespaces().Get(context.Background(), namespace, metav1.GetOptions{}); err == nil {
			return errors.New("a replaced token is still accepted")
		}
	}
	return err
}

// throttle lets the containers run for 10 of every 100 ms, as a CPU quota of 0.1 does.
func throttle(w *world) error {
	containers := slices.Concat(w.frpc, w.proxy, w.bootstrap)
	all := func(s syscall.Signal) {
		for _, c := range containers {
			_ = c.Signal(s)
		}
	}
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		all(syscall.SIGSTOP)
		time.Sleep(90 * time.Millisecond)
		all(syscall.SIGCONT)
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

// like returns the faults whose names match.
func like(name *regexp.Regexp) (selected []fault) {
	for _, f := range faults() {
		if name.MatchString(f.name) {
			selected = append(selected, f)
		}
	}
	return selected
}
