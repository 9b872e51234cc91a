package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/frpc"
)

// tunnelCheck checks the tunnel to frps, and records its state.
type tunnelCheck struct {
	runDir  string
	metrics *metrics

	loginAt time.Time // of the last login check
	login   error     // its result

	https atomic.Bool // frpc's tunnel is of type https

	mu       sync.Mutex
	last     tunnelStatus
	frpcSeen bool // frpc has answered once
	frpcDown bool // and had ended at the last check
}

// run returns why the tunnel is not connected, nil if it is. Calls must not overlap.
func (t *tunnelCheck) run(ctx context.Context) error {
	lease, err := frpc.ReadLease(t.runDir)
	var proxies []frpc.ProxyStatus
	if err == nil {
		proxies, err = lease.Frpc.Admin.Status(ctx)
		if err == nil {
			err = t.explain(ctx, lease, proxies)
		} else {
			err = fmt.Errorf("%w: check that the frpc container runs, and its log", err)
		}
		if problem := leaseProblem(lease); problem != "" && err != nil {
			err = fmt.Errorf("%w; %s", err, problem)
		}
	}
	t.record(lease, proxies, err)
	return err
}

// record updates the status and the metrics. lease and proxies are nil if they could not be read.
func (t *tunnelCheck) record(lease *frpc.Lease, proxies []frpc.ProxyStatus, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if proxies != nil { // frpc answers
		if t.frpcDown {
			t.last.FrpcRestarts++
			t.metrics.frpcRestarts.Inc()
		}
		t.frpcSeen, t.frpcDown = true, false
	} else if t.frpcSeen && errors.Is(err, syscall.ECONNREFUSED) { // frpc has ended: nothing listens
		t.frpcDown = true
	}
	now := tunnelStatus{Connected: err == nil, Since: t.last.Since, FrpcRestarts: t.last.FrpcRestarts, Proxies: proxies}
	if now.Since == nil || now.Connected != t.last.Connected {
		now.Since = timeOrNil(time.Now())
	}
	if err != nil {
		now.Detail = err.Error()
	}
	if len(proxies) > 0 { // not the lease's type: frpc may not have been restarted since
		t.https.Store(!slices.ContainsFunc(proxies, func(p frpc.ProxyStatus) bool { return p.Type != "https" }))
	} else if lease != nil {
		t.https.Store(lease.Frpc.Tunnel.Type == "https")
	}
	failing, leaseEnd := false, 0.0
	if lease != nil {
		now.LeaseProblem, failing = leaseProblem(lease), lease.Renewal != nil || overdue(lease)
		now.LeaseIssuedAt, now.LeaseExpiresAt = timeOrNil(lease.IssuedAt), timeOrNil(lease.ExpiresAt)
		if !lease.ExpiresAt.IsZero() {
			leaseEnd = float64(lease.ExpiresAt.Unix())
		}
	}
	t.last = now
	t.metrics.tunnelUp.Set(boolValue(now.Connected))
	t.metrics.renewalFailing.Set(boolValue(failing))
	t.metrics.leaseEnd.Set(leaseEnd)
}

// leaseProblem returns why the lease is not renewed, and since when; empty if the renewal works.
func leaseProblem(lease *frpc.Lease) string {
	switch expired := !lease.ExpiresAt.IsZero() && time.Now().After(lease.ExpiresAt); {
	case lease.Renewal != nil:
		return fmt.Sprintf("the renewal of the lease has failed since %s: %s",
			lease.Renewal.FailingSince.Format(time.RFC3339), lease.Renewal.Error)
	case expired:
		return fmt.Sprintf("the lease expired at %s, and frps will refuse the next login: %s",
			lease.ExpiresAt.Format(time.RFC3339), checkBootstrap)
	case overdue(lease):
		return fmt.Sprintf("the renewal of the lease is overdue, and it expires at %s: %s",
			lease.ExpiresAt.Format(time.RFC3339), checkBootstrap)
	default:
		return ""
	}
}

const checkBootstrap = "check the bootstrap container and its log, and that the run directory is not full"

// overdue reports whether more than 85% of the lease's life is over. bootstrap renews a lease after 65 to 75% and
// records a failure in it, but cannot if it has ended or the run directory is full. Leases shorter than two minutes are
// never overdue.
func overdue(lease *frpc.Lease) bool {
	life := lease.ExpiresAt.Sub(lease.IssuedAt) // negative for a lease without an end
	return life >= 2*time.Minute && time.Since(lease.IssuedAt) > life/100*85
}

func (t *tunnelCheck) status() tunnelStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.last
}

// loginAge is how long the result of a login check is reused. When a frps restarts, all of its agents log in at once:
// their checks must not double that.
const loginAge = 15 * time.Second

// explain returns nil if one of frpc's proxies is running, else why none is. To find out, it may log in to frps.
func (t *tunnelCheck) explain(ctx context.Context, lease *frpc.Lease, proxies []frpc.ProxyStatus) error {
	for _, p := range proxies {
		if p.Status == "running" {
			t.loginAt = time.Time{}
			return nil
		}
		if p.Err != "" {
			return fmt.Errorf("frps refuses the tunnel (%s: %s): check what frps.toml allows "+
				"(vhostHTTPSPort, subDomainHost, allowPorts), the agent's id, and that no other agent has the same",
				p.Status, p.Err)
		}
		if p.Status == "check failed" {
			return errors.New("frpc has withdrawn the tunnel, because the proxy drains or does not answer frpc: " +
				"check that proxy.listen_addr (PIPEOPS_LISTEN_ADDR) is the same for bootstrap and the proxy")
		}
	}
	if time.Since(t.loginAt) > loginAge {
		_, t.login = frpc.Login(ctx, lease.Frpc)
		t.loginAt = time.Now()
	}
	if t.login != nil {
		return t.login
	}
	return errors.New("frps accepts the login, but frpc has no tunnel yet: if it does not connect within 20 s, check frpc's log")
}
