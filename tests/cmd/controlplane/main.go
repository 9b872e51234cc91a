// Command controlplane runs the development control plane with a stock frps until Ctrl-C. It prints where its
// parts are as one line of JSON.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/pipeops/vm-agent/tests/controlplane"
	"github.com/pipeops/vm-agent/tests/process"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "controlplane:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	agents := map[string]string{}
	flags := flag.NewFlagSet("controlplane", flag.ContinueOnError)
	flags.Func("agent", "an agent that may connect, and its token, as `id=token`; may be given again", func(value string) error {
		id, token, ok := strings.Cut(value, "=")
		if !ok || id == "" || token == "" {
			return errors.New("give id=token")
		}
		agents[id] = token
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	if len(agents) == 0 {
		return errors.New("no agent may connect: give --agent id=token")
	}
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	cp, err := controlplane.Start(ctx, controlplane.Options{Group: group, Agents: agents, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	defer cp.Close()
	if err := json.NewEncoder(os.Stdout).Encode(cp); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}
