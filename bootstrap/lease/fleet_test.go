package lease

import (
	"log/slog"
	"testing"
	"time"

	"github.com/pipeops/vm-agent/frpc"
)

// TestFleetSpreadsItsRenewals follows 10,000 agents for a day, by the renewer's own schedule. They got their leases
// within ten seconds, as after an outage of the control plane, and must not come back together.
func TestFleetSpreadsItsRenewals(t *testing.T) {
	const agents = 10_000
	for _, test := range []struct {
		life time.Duration
		peak int // requests a second at most; about twice what was seen
	}{{24 * time.Hour, 16}, {time.Hour, 90}, {20 * time.Minute, 220}} {
		begin := time.Now()
		total, bySecond := 0, map[time.Duration]int{}
		for i := range agents {
			r := &renewer{log: slog.New(slog.DiscardHandler)}
			now := begin.Add(time.Duration(i) * 10 * time.Second / agents)
			for r.adopt(frpc.Lease{ExpiresAt: now.Add(test.life)}, now); r.renewAt.Sub(begin) < 24*time.Hour; {
				now = r.renewAt
				total++
				bySecond[now.Sub(begin).Truncate(time.Second)]++
				r.adopt(frpc.Lease{ExpiresAt: now.Add(test.life)}, now)
			}
		}
		peak, at := 0, time.Duration(0)
		for second, n := range bySecond {
			if n > peak {
				peak, at = n, second
			}
		}
		t.Logf("leases of %s: %d requests in a day, %.2f a second, %d in the second after %s",
			test.life, total, float64(total)/(24*60*60), peak, at)
		if peak > test.peak {
			t.Errorf("leases of %s: %d requests in a second, want at most %d", test.life, peak, test.peak)
		}
	}
}
