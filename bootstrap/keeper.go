package main

import (
	"bufio"
	"bytes"
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
	waitMax       = 90 * time.Second // between two attempts, whatever the control plane asks for
	loggedOutMax  = 5 * time.Minute  // between two leases that are asked for because frpc is logged out
	confirmAfter  = 30 * time.Second // between two answers that together close the tunnel of a revoked agent
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
	token   frpc.Secret   // what the lease was asked for with
	renewAt time.Time     // when to ask for the next; zero: this one has no end
	backoff time.Duration // after the attempt that failed last
	notYet  time.Time     // no attempt before this

	failed       *failure  // why the last attempt got no lease; nil: it got one
	revokedSince time.Time // when the control plane first said that the agent is revoked; zero: not since the last lease

	outSince time.Time // since when frpc is logged out
	outWait  time.Duration
	unheard  bool // frpc could not be told to end, and that was said
	unsaved  bool // the run directory could not be written, and that was said
}

// write puts the lease's files into the run directory.
func write(cfg *config.Config, lease frpc.Lease, log *slog.Logger) error {
	if _, err := lease.Write(cfg.RunDir); err != nil {
		return unwritable(err)
	}
	if cfg.FRP.Tunnel.Type == "https" && lease.Frpc.Tunnel.Type != "https" {
		log.Warn("the lease turns off TLS as far as the agent", "tunnel_type", lease.Frpc.Tunnel.Type, "next_step", "set frp.tunnel.type (PIPEOPS_FRP_TUNNEL_TYPE) to https to refuse such leases")
	}
	if !lease.ExpiresAt.IsZero() {
		log = log.With("expires_at", lease.ExpiresAt)
	}
	log.Info("lease written", "run_dir", cfg.RunDir, "server_addr", lease.Frpc.ServerAddr,
		"server_port", lease.Frpc.ServerPort, "tunnel_type", lease.Frpc.Tunnel.Type)
	return nil
}

func unwritable(err error) error {
	return fmt.Errorf("the run directory cannot be written: %w: check run_dir (PIPEOPS_RUN_DIR), and that the volume mounted there is not full", err)
}

// inherit notes in the next lease that frpc may still run with what it was told before.
func (k *keeper) inherit(next *frpc.Lease) {
	before, _ := k.lease.Frpc.TOML() // it was written once
	after, _ := next.Frpc.TOML()     // it will be
	next.Stale = k.lease.Stale
	if next.Stale == nil && k.lease.Frpc.Tunnel.Type != "" && !bytes.Equal(before, after) {
		next.Stale = &frpc.Stale{Until: k.lease.ExpiresAt}
	}
}

// adopt makes lease, which has been written, the one that is kept.
func (k *keeper) adopt(lease frpc.Lease, now time.Time) {
	k.lease = lease
	k.backoff, k.notYet = backoffMin, now.Add(renewalMin)
	k.renewAt = time.Time{}
	if lease.ExpiresAt.IsZero() {
		return
	}
	// At two thirds of its life, more or less, so that agents which started together part ways.
	life := lease.ExpiresAt.Sub(now)
	k.renewAt = now.Add(max(renewalMin, life/10*6+jitter(life/10)))
	if life <= time.Second {
		k.log.Warn("the lease has ended before it could be used: check the clock of the control plane, or the life of its leases", "expires_at", lease.ExpiresAt)
	}
}

// unwanted reports whether the tunnel must be closed: the control plane has said twice that the agent is revoked, or
// the agent was refused until its lease ended.
func (k *keeper) unwanted(now time.Time) bool {
	ended := !k.lease.ExpiresAt.IsZero() && now.After(k.lease.ExpiresAt)
	return k.failed != nil && (k.failed.confirmed || k.failed.refused && ended)
}

// run keeps the lease until ctx ends. Its error means that the control plane does not want this agent: then the
// tunnel is closed.
func (k *keeper) run(ctx context.Context) error {
	admin := frpc.NewAdminClient(k.lease.Frpc.Admin)
	for {
		now := time.Now()
		k.repair()
		k.see(look(ctx, admin), now)
		if k.due(now) {
			_ = k.renew(ctx) // k.failed has it
		}
		if k.unwanted(time.Now()) {
			return closeTunnel(ctx, k.cfg.RunDir, k.lease.Frpc.Admin, k.failed)
		}
		why := k.restart(now)
		if why == "" && k.lease.Stale != nil && k.idle(ctx) {
			why = "nothing runs through the tunnel"
		}
		if why != "" {
			k.stop(ctx, admin, why)
		}
		select {
		case <-time.After(lookInterval):
		case <-ctx.Done():
			return nil
		}
	}
}

// stop ends frpc. The kubelet starts it again.
func (k *keeper) stop(ctx context.Context, admin *frpc.AdminClient, why string) {
	err := admin.Stop(ctx)
	if err == nil {
		k.log.Info("frpc is started again, so that it logs in with the new lease", "because", why)
		k.fresh()
	} else if !k.unheard {
		k.log.Warn("frpc must log in with the new lease and cannot be told to: restart its container", "because", why, "error", err)
	}
	k.unheard = err != nil
}

// fresh notes that frpc runs, or will run, with the files as they are.
func (k *keeper) fresh() {
	if k.lease.Stale != nil {
		k.lease.Stale = nil
		k.save()
	}
}

// save makes the run directory hold the lease as it is in memory, and returns the names of the files that it wrote.
func (k *keeper) save() []string {
	written, err := k.lease.Write(k.cfg.RunDir)
	if err != nil && !k.unsaved {
		k.log.Warn("trying again every few seconds to write the lease's files", "error", unwritable(err))
	}
	k.unsaved = err != nil
	return written
}

// repair restores what has been removed from the run directory or changed there.
func (k *keeper) repair() {
	if restored := k.save(); len(restored) > 0 {
		k.log.Warn("restored missing or changed files of the run directory", "run_dir", k.cfg.RunDir, "files", restored)
	}
}

// closeTunnel takes away what frpc would log in with, ends it, and makes sure that it has ended. It returns the
// refusal, with what has become of the tunnel.
func closeTunnel(ctx context.Context, runDir string, api frpc.Admin, refusal *failure) error {
	admin := frpc.NewAdminClient(api)
	err := frpc.Withdraw(runDir)
	for attempt := 0; err == nil; attempt++ {
		if look(ctx, admin) == away {
			return fmt.Errorf("%w; the tunnel is closed", refusal)
		}
		if stopErr := admin.Stop(ctx); attempt == 10 {
			err = cmp.Or(stopErr, errors.New("it still runs"))
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	return fmt.Errorf("%w; the tunnel may still be open, because frpc could not be ended (%w): delete the pod", refusal, err)
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
		k.fresh()
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
	if !k.outSince.IsZero() && k.lease.Stale == nil && k.cfg.FRP.Token == "" && now.Sub(k.outSince) >= k.outWait {
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
	lease, fail := obtain(ctx, k.cfg, k.ask, k.lease)
	if ctx.Err() != nil {
		return nil // stopped
	}
	now := time.Now()
	if fail == nil {
		k.revokedSince = time.Time{}
		k.inherit(&lease)
		err := write(k.cfg, lease, k.log)
		if err == nil {
			k.token, k.failed = token, nil
			k.adopt(lease, now)
			return nil
		}
		fail = &failure{err: err}
	}
	k.failed = fail
	wait := min(max(jitter(k.backoff), fail.retryAfter), waitMax)
	next := "the tunnel stays as it is"
	if fail.refused && !k.lease.ExpiresAt.IsZero() {
		next = "unless the next attempts succeed, the tunnel is closed when the lease ends"
	}
	if fail.revoked {
		if k.revokedSince.IsZero() {
			k.revokedSince = now
		}
		elapsed := now.Sub(k.revokedSince)
		fail.confirmed, wait = elapsed >= confirmAfter, max(wait, confirmAfter-elapsed)
		next = "the tunnel is closed if the next attempt is answered so too"
	}
	if k.unwanted(now) {
		next = "the tunnel is closed"
	}
	k.backoff, k.notYet = min(2*k.backoff, backoffMax), now.Add(wait)
	k.renewAt = k.notYet
	k.log.Warn("lease not renewed", "error", fail, "consequence", next, "next_attempt_in", wait.String(), "expires_at", k.lease.ExpiresAt)
	since := now.UTC()
	if k.lease.Renewal != nil {
		since = k.lease.Renewal.FailingSince
	}
	k.lease.Renewal = &frpc.Renewal{FailingSince: since, Error: fail.Error() + "; " + next}
	k.save()
	return fail
}

// restart says why frpc must log in with the new lease now, empty if it need not.
func (k *keeper) restart(now time.Time) string {
	stale := k.lease.Stale
	switch {
	case stale == nil:
		return ""
	case !k.outSince.IsZero():
		return "it is logged out"
	case !stale.Until.IsZero() && now.After(stale.Until.Add(-5*time.Second)):
		return "its old credential ends; what runs through the tunnel is cut"
	default:
		return ""
	}
}

// local is a client of the other containers of the pod, past every proxy.
var local = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}

// idle says whether nothing runs through the tunnel, by the proxy's own count. If the proxy does not say, something
// may.
func (k *keeper) idle(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, lookInterval)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+config.Local(k.cfg.Proxy.MetricsAddr)+"/metrics", nil)
	if err != nil {
		return false
	}
	resp, err := local.Do(req)
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
