// Command bench measures and prints Markdown. Its figures are for reading side by side within one run: they
// move by a factor of two from machine to machine and from run to run, their ratios do not. Linux only.
// With --latency it measures frpc's settings in place of all the rest.
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
	if len(os.Args) > 2 { // one of the processes that it measures with
		var err error
		switch os.Args[1] {
		case "upstream":
			err = upstream(os.Args[2])
		case "bare":
			err = bare(os.Args[2], os.Args[3])
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	measures := []func(context.Context) error{start, recovery, status, proxies}
	if slices.Contains(os.Args, "--latency") {
		measures = []func(context.Context) error{latency, frozen, restarted}
	}
	for _, measure := range measures {
		if err := measure(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
	}
}
