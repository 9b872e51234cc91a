package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/frpc"
)

const (
	lookInterval  = 2 * time.Second  // between two looks at frpc
	renewalMin    = 10 * time.Second // between two leases, however short they are
	loggedOutWait = 15 * time.Second // how long frpc may try by itself before the next lease is asked for
	backoffMin    = time.Second
	backoffMax    = time.Minute
	loggedOutMax  = 5 * time.Minute // between two leases that are asked for because frpc is logged out
)

// frpcState is what a look at frpc finds.
type frpcState int

const (
	unknown   frpcState = iota
	away                // it does not run: when it starts, it reads the files as they then are
	loggedOut           // frps does not let it in, or cannot be reached
	connected
)

// keeper keeps the lease fresh: it asks for the next one in time, writes it, and has frpc log in with it when that
// cuts nobody off, or when it must be.
type keeper struct {
	cfg *config.Config
	ask source
	log *slog.Logger

	lease   frpc.Lease    // what the files hold
	ends    time.Time     // when it ends by the clock of this host, which may differ from the control plane's; zero: never
	token   frpc.Secret   // what the lease was asked for with
	renewAt time.Time     // when to ask for the next; zero: this one has no end
	backoff time.Duration // after the attempt that failed last
	notYet  time.Time     // no attempt before this

	stale      bool      // frpc may run with an frpc.toml from before
	staleUntil time.Time // whose credential is refused from then on; zero: never
	outSince   time.Time // since when frpc is logged out
	outWait    time.Duration
}

// write puts the lease's files into the run directory.
func write(cfg *config.Config, lease frpc.Lease, log *slog.Logger) error {
	if err := lease.Write(cfg.RunDir); err != nil {
		return fmt.Errorf("the run directory cannot be written: %w: check run_dir (PIPEOPS_RUN_DIR) and the volume mounted there", err)
	}
	if !lease.ExpiresAt.IsZero() {
		log = log.With("expires_at", lease.ExpiresAt)
	}
	log.Info("lease written", "run_dir", cfg.RunDir, "server_addr", lease.Frpc.ServerAddr,
		"server_port", lease.Frpc.ServerPort, "tunnel_type", lease.Frpc.Tunnel.Type)
	return nil
}

// adopt makes lease the one that is kept. life is how long it is good for, 0: for ever.
func (k *keeper) adopt(lease frpc.Lease, life time.Duration, now time.Time) {
	before, err := k.lease.Frpc.TOML()
	after, err2 := lease.Frpc.TOML()
	if k.lease.Frpc.Tunnel.Type != "" && (err != nil || err2 != nil || string(before) != string(after)) && !k.stale {
		k.stale, k.staleUntil = true, k.ends
	}
	k.lease, k.ends = lease, time.Time{}
	k.backoff, k.notYet = backoffMin, now.Add(renewalMin)
	k.renewAt = time.Time{}
	if life > 0 {
		k.ends = now.Add(life)
		// At two thirds of its life, more or less, so that agents which started together part ways.
		k.renewAt = now.Add(max(renewalMin, life*6/10+jitter(life/10)))
		if life <= time.Second {
			k.log.Warn("the lease has ended before it could be used: check the clock of the control plane, or the life of its leases", "expires_at", lease.ExpiresAt)
		}
	}
}

// run keeps the lease until ctx ends. Its error means that the control plane does not want this agent: then the
// tunnel is closed.
func (k *keeper) run(ctx context.Context) error {
	admin := frpc.NewAdminClient(k.lease.Frpc.Admin)
	for {
		now := time.Now()
		k.see(look(ctx, admin), now)
		if k.due(now) {
			if fail := k.renew(ctx); fail != nil && fail.refused {
				if err := frpc.Withdraw(k.cfg.RunDir); err != nil {
					k.log.Error("frpc.toml is still there", "error", err)
				}
				_ = admin.Stop(ctx) // if it runs
				return fmt.Errorf("%w; the tunnel is closed", fail)
			}
		}
		if why := k.restart(now); why != "" || k.stale && k.idle(ctx) {
			k.log.Info("restarting frpc, so that it logs in with the new lease", "because", cmp.Or(why, "nothing runs through the tunnel"))
			if err := admin.Stop(ctx); err == nil {
				k.stale = false
			}
		}
		select {
		case <-time.After(lookInterval):
		case <-ctx.Done():
			return nil
		}
	}
}

// look asks frpc for its state.
func look(ctx context.Context, admin *frpc.AdminClient) frpcState {
	proxies, err := admin.Status(ctx)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return away
	case err != nil:
		return unknown
	case len(proxies) == 0, slices.ContainsFunc(proxies, func(p frpc.ProxyStatus) bool { return p.Status == "start error" }):
		return loggedOut
	default:
		return connected
	}
}

// see takes in what a look has found.
func (k *keeper) see(state frpcState, now time.Time) {
	switch state {
	case away:
		k.stale = false
	case connected:
		k.outSince, k.outWait = time.Time{}, loggedOutWait
	case loggedOut:
		if k.outSince.IsZero() {
			k.outSince, k.outWait = now, loggedOutWait
		}
	case unknown:
	}
}

// due says whether it is time for the next lease: this one ends, the token it was asked for with is another now, or
// frpc has been logged out for a while. That may mean that the lease is refused, or that frps is elsewhere now.
func (k *keeper) due(now time.Time) bool {
	if now.Before(k.notYet) {
		return false
	}
	if token, err := k.credential(); err == nil && token != k.token {
		return true
	}
	if !k.renewAt.IsZero() && !now.Before(k.renewAt) {
		return true
	}
	if !k.outSince.IsZero() && !k.stale && k.cfg.FRP.Token == "" && now.Sub(k.outSince) >= k.outWait {
		k.outSince, k.outWait = now, min(2*k.outWait, loggedOutMax)
		return true
	}
	return false
}

// credential is what leases are asked for with, as it now is.
func (k *keeper) credential() (frpc.Secret, error) {
	if k.cfg.FRP.Token != "" {
		return k.cfg.FRPToken()
	}
	return k.cfg.AgentToken()
}

// renew asks for the next lease, once. If there is none, the one that is stays, and its file says why.
func (k *keeper) renew(ctx context.Context) *failure {
	token, err := k.credential()
	if err != nil {
		token = k.token
	}
	lease, life, fail := obtain(ctx, k.cfg, k.ask, k.lease)
	now := time.Now()
	if fail == nil {
		if err := write(k.cfg, lease, k.log); err != nil {
			fail = &failure{err: err}
		}
	}
	if fail == nil {
		k.token = token
		k.adopt(lease, life, now)
		return nil
	}
	if ctx.Err() != nil {
		return nil // stopped
	}
	wait := max(jitter(k.backoff), fail.retryAfter)
	k.backoff, k.notYet = min(2*k.backoff, backoffMax), now.Add(wait)
	k.renewAt = k.notYet
	if !fail.refused {
		k.log.Warn("the lease is not renewed; the tunnel stays as it is", "error", fail, "next_attempt_in", wait.String(), "expires_at", k.lease.ExpiresAt)
	}
	since := now.UTC()
	if k.lease.Renewal != nil {
		since = k.lease.Renewal.FailingSince
	}
	k.lease.Renewal = &frpc.Renewal{FailingSince: since, Error: fail.Error()}
	if err := k.lease.WriteState(k.cfg.RunDir); err != nil {
		k.log.Warn("lease.json cannot be written", "error", err)
	}
	return fail
}

// restart says why frpc must log in with the new lease now, empty if it need not.
func (k *keeper) restart(now time.Time) string {
	switch {
	case !k.stale:
		return ""
	case !k.outSince.IsZero():
		return "it is logged out"
	case !k.staleUntil.IsZero() && now.After(k.staleUntil.Add(-5*time.Second)):
		return "its old credential ends; what runs through the tunnel is cut"
	default:
		return ""
	}
}

// idle says whether nothing runs through the tunnel, by the proxy's own count. If the proxy does not say, something
// may.
func (k *keeper) idle(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, lookInterval)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+config.Local(k.cfg.Proxy.MetricsAddr)+"/metrics", nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	defer func() { _ = resp.Body.Close() }()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), `pipeops_agent_http_requests_in_flight{listener="tunnel"} `); ok {
			n, err := strconv.ParseFloat(value, 64)
			return err == nil && n == 0
		}
	}
	return false
}
