// Command bench measures and prints Markdown. Compare its results within one run only: they differ by a factor of two
// between machines and runs, their ratios do not. Linux only. Its arguments name the parts to measure. Without any it
// leaves out attack, distance, latency, identities and tunnels, which take long or need root.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
)

func main() {
	switch { // the processes that it measures with run until they fail
	case len(os.Args) > 2 && os.Args[1] == "upstream":
		fail(upstream(os.Args[2]))
	case len(os.Args) > 3 && os.Args[1] == "bare":
		fail(bare(os.Args[2], os.Args[3]))
	case len(os.Args) > 5 && os.Args[1] == "controlplane":
		if err := controlPlane(os.Args[2], os.Args[3], os.Args[4], os.Args[5]); err != nil {
			fail(err)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	for _, part := range []struct {
		name    string
		measure func(context.Context) error
	}{{"start", start}, {"recovery", recovery}, {"status", status}, {"proxies", proxies}, {"identities", identities},
		{"attack", attacks}, {"distance", distance},
		{"latency", latency}, {"latency", frozen}, {"latency", restarted}, {"tunnels", tunnels}} {
		if len(os.Args) == 1 &&
			slices.Contains([]string{"attack", "distance", "latency", "identities", "tunnels"}, part.name) ||
			len(os.Args) > 1 && !slices.Contains(os.Args, part.name) {
			continue
		}
		if err := part.measure(ctx); err != nil {
			fail(err)
		}
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}
