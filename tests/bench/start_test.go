// Package bench measures. Its figures are for reading side by side in one run; no test asserts them.
package bench

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/process"
)

// BenchmarkStart is what a new user waits for: from `make run`, with everything built, to kubectl's first
// answer. It also reads the proxy's memory then, and the size of both binaries.
func BenchmarkStart(b *testing.B) {
	var rss float64
	for b.Loop() {
		group, err := process.NewGroup()
		if err != nil {
			b.Fatal(err)
		}
		run, err := group.Start("run", nil, binary(b, "run"))
		if err != nil {
			b.Fatal(err)
		}
		var found []string
		err = process.Poll(b.Context(), time.Minute, run.Done(), func() error {
			found = regexp.MustCompile(`export KUBECONFIG=(\S+)`).FindStringSubmatch(run.Log())
			if found == nil {
				return errors.New("make run prints no kubeconfig")
			}
			return nil
		})
		if err != nil {
			b.Fatal(err, run.Failed())
		}
		kubectl := exec.Command(binary(b, "kubectl"), "get", "pods", "-A")
		kubectl.Env = []string{"KUBECONFIG=" + found[1], "HOME=" + group.Dir()}
		if out, err := kubectl.CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		b.StopTimer()
		rss = max(rss, proxyRSS(b, filepath.Dir(found[1])))
		group.Close()
		b.StartTimer()
	}
	b.ReportMetric(b.Elapsed().Seconds()/float64(b.N), "s/start")
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(rss, "MB-proxy-RSS")
	for _, name := range []string{"bootstrap", "proxy"} {
		info, err := os.Stat(binary(b, name))
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(info.Size())/1e6, "MB-"+name)
	}
}

// proxyRSS finds the proxy among the processes of a run and returns its resident memory in MB.
func proxyRSS(b *testing.B, dir string) float64 {
	b.Helper()
	pids, err := filepath.Glob(filepath.Join(dir, "pids", "*"))
	if err != nil {
		b.Fatal(err)
	}
	for _, pid := range pids {
		status, err := os.ReadFile(filepath.Join("/proc", filepath.Base(pid), "status"))
		if err != nil || !bytes.HasPrefix(status, []byte("Name:\tproxy\n")) {
			continue
		}
		for line := range strings.Lines(string(status)) {
			if kb, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				n, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(kb), "kB")), 64)
				if err != nil {
					b.Fatal(err)
				}
				return n * 1024 / 1e6
			}
		}
	}
	b.Fatal(fmt.Errorf("no proxy runs in %s", dir))
	return 0
}

func binary(b *testing.B, name string) string {
	b.Helper()
	path, err := process.Binary(name)
	if err != nil {
		b.Fatal(err)
	}
	return path
}
