// Command controlplane runs the development control plane with a stock frps until Ctrl-C. It prints the addresses of
// its parts as one line of JSON. `controlplane check` checks another control plane against the contract.
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
	"slices"
	"strings"
	"syscall"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/pipeops/vm-agent/tests/harness/controlplane"
	"github.com/pipeops/vm-agent/tests/harness/process"
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
	if len(args) > 0 && args[0] == "check" {
		return check(ctx, args[1:], os.Stdout)
	}
	agents := map[string]string{}
	flags := flag.NewFlagSet("controlplane", flag.ContinueOnError)
	flags.Func("agents", "`file` of the agents that may connect, one id=token a line", func(path string) error {
		return readPairs(path, func(id, token string) error {
			if token == "" || len(validation.IsDNS1123Label(id)) > 0 {
				return errors.New("each line is id=token, the id of lower-case letters, digits and hyphens")
			}
			agents[id] = token
			return nil
		})
	})
	identity := flags.String("identity", "agent", "the agents' access.identity: agent, named or own")
	users := map[string]controlplane.User{}
	flags.Func("users", "`file` of the gateway's users for identity named, one token=name,group,… a line",
		func(path string) error {
			return readPairs(path, func(token, user string) error {
				names := strings.Split(user, ",")
				if token == "" || slices.Contains(names, "") {
					return errors.New("each line is token=name,group,…")
				}
				users[token] = controlplane.User{Name: names[0], Groups: names[1:]}
				return nil
			})
		})
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unknown argument %q", flags.Arg(0))
	}
	if len(agents) == 0 {
		return errors.New("no agent may connect: give --agents FILE")
	}
	if !slices.Contains([]string{"agent", "named", "own"}, *identity) || (*identity == "named") != (len(users) > 0) {
		return errors.New("--identity is agent, named or own; --users FILE goes with named")
	}
	group, err := process.NewGroup()
	if err != nil {
		return err
	}
	defer group.Close()
	cp, err := controlplane.Start(ctx, controlplane.Options{Group: group, Agents: agents, Identity: *identity,
		Users: users, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
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

// readPairs calls add for each line of a file, which has the form key=value.
func readPairs(path string, add func(key, value string) error) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if err := add(key, value); err != nil {
			return err
		}
	}
	return nil
}
