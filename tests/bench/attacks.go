package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/pipeops/vm-agent/tests/harness/attack"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

const (
	attackTime = 15 * time.Second
	attackRamp = 5 * time.Second
)

// attacks runs one kind of attack after the other against our proxy and its peers. Each is a fresh process with the
// memory limit of the proxy's container.
func attacks(ctx context.Context) error {
	names := []string{"this proxy", "kubectl proxy", "bare ReverseProxy"}
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	limit, how := []string{"env"}, "killed at 256 MiB of RSS" // where there can be no such control group
	if cgroup, err := group.Cgroup("peer"); err == nil && cgroup.Limit(256<<20) == nil {
		limit, how = cgroup.Enter(), "memory limited to 256 MiB by a cgroup"
	}
	fmt.Printf("| %s; RSS MB at most | %s |\n| --- | --- | --- | --- |\n", how, strings.Join(names, " | "))
	for _, wave := range []struct {
		name   string
		n      int
		attack func(attack.Target) attack.Attack
	}{
		{"header floods", 200, func(t attack.Target) attack.Attack { return attack.HeaderFlood(t, false) }},
		{"stalled watches, 10 MB each", 500, func(t attack.Target) attack.Attack {
			return attack.StalledRead(t, "/api/v1/list?watch=true")
		}},
		{"stalled lists of 10 MB", 100, func(t attack.Target) attack.Attack { return attack.StalledRead(t, "/api/v1/list") }},
		{"stalled uploads of 256 KiB", 2000, func(t attack.Target) attack.Attack {
			return attack.StalledUpload(t, "/api/v1/large", 256<<10)
		}},
		{"idle connections", 5000, attack.IdleConnection},
	} {
		row := fmt.Sprintf("| %d %s |", wave.n, wave.name)
		for _, name := range names {
			fmt.Fprintf(os.Stderr, "%d %s: %s\n", wave.n, wave.name, name)
			result, err := attackOne(ctx, limit, name, wave.n, wave.attack)
			if err != nil {
				return fmt.Errorf("%s: %s: %w", wave.name, name, err)
			}
			row += " " + result + " |"
		}
		fmt.Println(row)
	}
	return ctx.Err()
}

// attackOne attacks one peer, and returns its peak memory, or when it was killed.
func attackOne(ctx context.Context, limit []string, name string, n int,
	kind func(attack.Target) attack.Attack) (string, error) {
	group, err := process.NewGroup()
	if err != nil {
		return "", err
	}
	defer group.Close()
	peers, err := startPeers(ctx, group, limit, name)
	if err != nil {
		return "", err
	}
	p := peers[0]
	addr, prefix, _ := strings.Cut(strings.TrimPrefix(p.url, "http://"), "/")
	target := attack.Target{Addr: addr, Host: addr, Token: strings.TrimPrefix(p.header.Get("Authorization"), "Bearer ")}
	if prefix != "" {
		target.Prefix = "/" + prefix
	}
	ctx, cancel := context.WithTimeout(ctx, attackTime)
	defer cancel()
	killed := make(chan string, 1)
	go func() {
		defer cancel()
		defer close(killed)
		begin := time.Now()
		if process.Poll(ctx, attackTime, nil, func() error { // until the attack or the peer ends
			rss, err := process.Memory(p.pid, "VmRSS")
			if err == nil && rss <= attack.Limit {
				return errors.New("the peer still runs")
			}
			return nil
		}) == nil {
			killed <- fmt.Sprintf("killed after %.1f s", time.Since(begin).Seconds())
		}
	}()
	counts := attack.Run(ctx, n, float64(n)/attackRamp.Seconds(), kind(target))
	fmt.Fprintln(os.Stderr, counts)
	if err := counts.Broken(); err != nil {
		return "", err
	}
	if result, ok := <-killed; ok {
		return result, nil
	}
	peak, err := process.Memory(p.pid, "VmHWM")
	return fmt.Sprintf("%.0f", peak), err
}
