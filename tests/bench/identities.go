package main

import (
	"context"
	"fmt"
	"os"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// identities measures what a call costs in each identity, beside another build of the proxy if BEFORE names one, and
// beside a bare ReverseProxy.
func identities(ctx context.Context) error {
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	peers, err := startPeers(ctx, group, nil, "this proxy", beforeName, "identity named", "identity own",
		"bare ReverseProxy")
	if err != nil {
		return err
	}
	peers = peers[:len(peers)-1] // the last is the upstream itself
	all := make([]figures, len(peers))
	for round := range rounds {
		for i, p := range peers {
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", round+1, rounds, p.name)
			if err := measureCalls(ctx, p, &all[i]); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
	}
	fmt.Println("| | CPU µs/call | its / identity agent | its / bare | calls/s | p50, p99 ms |")
	fmt.Println("| --- | --- | --- | --- | --- | --- |")
	for i, p := range peers {
		f := &all[i]
		fmt.Printf("| %s | %.0f | %.2f | %.2f | %.0f | %.2f, %.2f |\n", p.name, median(f.cpu),
			ratio(f.cpu, all[0].cpu), ratio(f.cpu, all[len(all)-1].cpu), median(f.rate), median(f.p50)/1e3, median(f.p99)/1e3)
	}
	return nil
}
