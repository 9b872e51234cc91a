package integration

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/agent"
	"github.com/pipeops/vm-agent/tests/harness/ledger"
)

// TestNoWriteIsLostOrRepeated kills a hop during writes of client-go, which retries a write that is answered with
// Retry-After. Every acknowledged write is stored once, and nothing is stored or missing that the ledger does not
// know.
//
// LEDGER_WRITES=1000 sets the number of writes during which a hop is killed, three times then. By default there are
// few enough for every run of the tests.
func TestNoWriteIsLostOrRepeated(t *testing.T) {
	t.Parallel()
	writes, kills := 240, 1
	if value := os.Getenv("LEDGER_WRITES"); value != "" {
		var err error
		if writes, err = strconv.Atoi(value); err != nil {
			t.Fatal(err)
		}
		kills = 3
	}
	for _, tunnel := range []string{"https", "http"} {
		t.Run(tunnel, func(t *testing.T) {
			t.Parallel()
			w := connectedBy(t, tunnel, api.agent)
			ns := w.namespace()
			for _, hop := range []struct {
				name string
				kill func() error
			}{
				{"frps", func() error { return kill(w.cp.FrpsPid()) }}, // the control plane restarts it
				{"frpc", func() error { w.agent.Frpc.Kill(); return w.agent.StartFrpc() }},
				{"proxy", func() error { w.agent.Proxy.Kill(); return w.agent.StartProxy() }},
			} {
				t.Run(hop.name, func(t *testing.T) {
					l, err := ledger.New(agent.Caller(w.cp, agentID, agentToken), ns, hop.name)
					if err != nil {
						t.Fatal(err)
					}
					ended := make(chan error, 1)
					go func() { ended <- l.Write(t.Context(), api.Client, writes, 8) }()
					for i := range kills {
						after := (i + 1) * writes / (kills + 1)
						harness.Eventually(t, time.Minute, func() error {
							if done := l.Done(); done < after {
								return fmt.Errorf("%d of %d writes are done", done, after)
							}
							return nil
						})
						if err := hop.kill(); err != nil {
							t.Fatal(err)
						}
					}
					if err := <-ended; err != nil {
						t.Fatal(err)
					}
					balance, err := l.Compare(t.Context(), api.Client)
					if err != nil {
						t.Fatal(err)
					}
					t.Logf("%d writes: %s", writes, balance)
					for _, what := range balance.Wrong {
						t.Error(what)
					}
					if balance.Acknowledged < writes/2 {
						t.Error("the tunnel did not recover: most writes were not done")
					}
					w.waitAnswering()
				})
			}
		})
	}
}

func kill(pid int) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return p.Kill()
}
