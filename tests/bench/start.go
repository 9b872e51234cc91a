package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// start measures how long a new user waits from `make run`, with everything built, to kubectl's first answer, and the
// idle proxy's memory and the size of both binaries.
func start(ctx context.Context) error {
	var waited []float64
	var rss float64
	for range 5 {
		seconds, memory, err := startOnce(ctx)
		if err != nil {
			return err
		}
		waited, rss = append(waited, seconds), max(rss, memory)
	}
	fmt.Printf("| what | figure | aim |\n| --- | --- | --- |\n")
	fmt.Printf("| `make run`, everything built, to kubectl's first answer | %.1f s | under 15 s |\n", median(waited))
	for name, aim := range map[string]string{"proxy": "under 30 MB", "bootstrap": "under 10 MB"} {
		path, err := process.Binary(name)
		if err != nil {
			return err
		}
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		fmt.Printf("| size of `%s` | %.1f MB | %s |\n", name, float64(info.Size())/1e6, aim)
	}
	fmt.Printf("| RSS of the proxy, idle | %.0f MB | under 25 MB |\n\n", rss)
	return nil
}

func startOnce(ctx context.Context) (seconds, rss float64, err error) {
	group, err := process.NewGroup()
	if err != nil {
		return 0, 0, err
	}
	defer group.Close()
	binary, err := process.Binary("run")
	if err != nil {
		return 0, 0, err
	}
	kubectl, err := process.Binary("kubectl")
	if err != nil {
		return 0, 0, err
	}
	begin := time.Now()
	run, err := group.Start("run", nil, binary)
	if err != nil {
		return 0, 0, err
	}
	var found []string
	if err := process.Poll(ctx, time.Minute, run.Done(), func() error {
		found = regexp.MustCompile(`export KUBECONFIG=(\S+)`).FindStringSubmatch(run.Log())
		if found == nil {
			return errors.New("make run prints no kubeconfig")
		}
		return nil
	}); err != nil {
		return 0, 0, err
	}
	cmd := exec.CommandContext(ctx, kubectl, "get", "pods", "-A")
	cmd.Env = []string{"KUBECONFIG=" + found[1], "HOME=" + group.Dir()}
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, 0, fmt.Errorf("%w: %s", err, out)
	}
	seconds = time.Since(begin).Seconds()
	pids, err := filepath.Glob(filepath.Join(filepath.Dir(found[1]), "pids", "*"))
	if err != nil {
		return 0, 0, err
	}
	for _, name := range pids {
		if comm, _ := os.ReadFile(filepath.Join("/proc", filepath.Base(name), "comm")); string(comm) == "proxy\n" {
			pid, err := strconv.Atoi(filepath.Base(name))
			if err != nil {
				return 0, 0, err
			}
			rss, err = memory(pid, "VmRSS")
			return seconds, rss, err
		}
	}
	return 0, 0, errors.New("make run runs no proxy")
}

// median leaves values in their order: ratio compares those of a round.
func median(values []float64) float64 {
	return slices.Sorted(slices.Values(values))[len(values)/2]
}
