package lease

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

const (
	pollInterval = 2 * time.Second  // between two requests for frpc's state
	renewalMin   = 10 * time.Second // between two leases, however short they are
	waitMax      = 90 * time.Second // between two attempts, whatever the control plane asks for
	confirmAfter = 30 * time.Second // between two answers that together close the tunnel of a revoked agent
	stuckFor     = 25 * time.Second // how long StuckFile stays: three liveness probes, 5 s apart

	backoffMin, backoffMax = time.Second, time.Minute // between two attempts: has jitter, and doubles each time

	// While frpc is logged out. All have jitter; the first two double each time.
	probeMin, probeMax     = 15 * time.Second, time.Minute     // until a trial login
	requestMin, requestMax = 30 * time.Second, 5 * time.Minute // until another lease is requested
	hangsAfter             = 2 * time.Minute                   // frpc hangs if frps accepts trial logins for this long
	settleTime             = 5 * time.Minute                   // from an outage to a restart for a new lease
)

// outage is what the renewer knows while frpc has no tunnel.
type outage struct {
	since    time.Time // zero: it has one
	rejected bool
	outdated bool      // a login fails with what frpc was started with, and succeeds with the new lease
	logged   string    // the error that was logged last
	accepted time.Time // since when frps accepts trial logins; zero: it did not accept the last one

	probe, request         time.Time // next trial login, next request for another lease
	probeWait, requestWait time.Duration
}

// renewer renews the lease: it requests the next one in time and writes it. It restarts frpc for a new lease while no
// request is in flight; else, even if that cuts requests, when frps accepts only the new lease, 5 s before the old
// credential expires, or when frpc hangs. While frps is unreachable, it leaves frpc alone: a restart would only add the
// kubelet's back-off to the outage.
type renewer struct {
	cfg   *config.Config
	issue issuer
	login func(context.Context, frpc.Config) (version string, err error) // frpc.Login
	log   *slog.Logger

	lease   frpc.Lease    // in the files
	token   secret.Secret // the credential that the lease was requested with
	renewAt time.Time     // when to request the next lease; zero: this one never expires
	backoff time.Duration // after the next failed request
	notYet  time.Time     // no request before this

	failed       *controlplane.Failure // why the last request got no lease; nil: it got one
	revokedSince time.Time             // since when the control plane says that the agent is revoked; zero: it does not
	confirmed    bool                  // the last answer said so again, after confirmAfter

	outage              outage
	noIdleRestartBefore time.Time // before this, frpc is not restarted for a new lease just because the tunnel is idle
	versionKnown        bool      // a trial login has told the version of frps
	stopFailureLogged   bool      // frpc could not be stopped, and that was logged
	writeFailureLogged  bool      // the run directory could not be written, and that was logged
	certificateProblem  string    // the last that was logged
}

// inherit records in the next lease that frpc may still run with the configuration of an earlier one.
func (r *renewer) inherit(next *frpc.Lease) {
	next.Stale = r.lease.Stale
	if old := r.lease.Frpc; next.Stale == nil && old.Tunnel.Type != "" && !sameTOML(old, next.Frpc) {
		next.Stale = &frpc.Stale{Until: r.lease.ExpiresAt, Frpc: old}
	}
}

// adopt makes lease, which is written, the current one, and schedules its renewal.
func (r *renewer) adopt(lease frpc.Lease, now time.Time) {
	r.lease = lease
	r.backoff, r.notYet, r.renewAt = backoffMin, now.Add(renewalMin), time.Time{}
	if lease.ExpiresAt.IsZero() {
		return
	}
	// After 65 to 75% of its lifetime, at random: agents that started together should not renew together.
	life := lease.ExpiresAt.Sub(now)
	r.renewAt = now.Add(max(renewalMin, life/10*6+jitter(life/10)))
	if life <= time.Second {
		r.log.Warn("the lease has already expired: check the control plane's clock, or the lifetime of its leases",
			"expires_at", lease.ExpiresAt)
	}
}

// unwanted reports whether the tunnel must be closed: the control plane has confirmed that the agent is revoked, or the
// agent was refused until its lease expired.
func (r *renewer) unwanted(now time.Time) bool {
	expired := !r.lease.ExpiresAt.IsZero() && now.After(r.lease.ExpiresAt)
	return r.failed != nil && (r.confirmed || r.failed.Refused && expired)
}

// run renews the lease until ctx ends. It closes the tunnel and fails if the control plane no longer wants this agent.
func (r *renewer) run(ctx context.Context) error {
	admin := r.lease.Frpc.Admin
	for {
		now := time.Now()
		r.repair()
		state := frpc.StateOf(admin.Status(ctx))
		r.recordState(state, now)
		if state >= frpc.Withdrawn && !r.versionKnown { // the tunnel is up, so frps answers: learn its version, once
			_ = r.tryLogin(ctx, r.lease.Frpc)
		}
		r.probeFrps(ctx, now)
		if r.inputChanged() || r.renewalDue(now) {
			_ = r.renew(ctx) // r.failed holds the failure
		}
		if r.unwanted(time.Now()) {
			return closeTunnel(ctx, r.cfg.RunDir, r.lease.Frpc.Admin, r.failed)
		}
		r.reload(ctx, admin)
		if reason := r.restartReason(time.Now()); reason != "" {
			r.restartFrpc(ctx, admin, reason)
		} else if r.lease.Stale != nil && r.outage.since.IsZero() && now.After(r.noIdleRestartBefore) && r.idle(ctx) {
			r.restartFrpc(ctx, admin, "there is a new lease, and no request is in flight")
		}
		if sleep(ctx, pollInterval) != nil {
			return nil
		}
	}
}

// reload has frpc apply a new lease that differs only in the tunnel. That interrupts no request.
func (r *renewer) reload(ctx context.Context, admin frpc.Admin) {
	if r.lease.Stale == nil {
		return
	}
	reloaded := r.lease.Stale.Frpc
	if reloaded.Tunnel = r.lease.Frpc.Tunnel; !sameTOML(reloaded, r.lease.Frpc) {
		return
	}
	if err := admin.Reload(ctx); err != nil {
		r.log.Warn("frpc cannot reload its configuration", "error", err)
		r.lease.Stale.Frpc = frpc.Config{} // unknown: only a restart helps
		return
	}
	r.log.Info("frpc reloaded its configuration", "tunnel_type", r.lease.Frpc.Tunnel.Type)
	r.markFresh()
}

// restartFrpc stops frpc, which the kubelet then restarts.
func (r *renewer) restartFrpc(ctx context.Context, admin frpc.Admin, reason string) {
	err := stopFrpc(ctx, r.cfg.RunDir, admin)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED): // it does not run
		r.markFresh()
	case errors.Is(err, frpc.ErrStuck):
		r.log.Warn("frpc hangs: its liveness probe restarts it; outside Kubernetes, restart its container",
			"reason", reason, "error", err)
		r.outage = outage{} // Stale stays: outside Kubernetes, frpc may go on
	case err == nil:
		r.log.Info("restarting frpc", "reason", reason)
		r.outage, r.stopFailureLogged = outage{}, false
		r.markFresh()
	case !r.stopFailureLogged:
		r.log.Warn("frpc must be restarted and cannot be stopped: restart its container", "reason", reason, "error", err)
		r.stopFailureLogged = true
	}
}

// stopFrpc stops frpc. If frpc hangs, it writes StuckFile for the time stuckFor, so that frpc's liveness probe fails
// and the kubelet kills frpc; the error is then frpc.ErrStuck.
func stopFrpc(ctx context.Context, runDir string, admin frpc.Admin) error {
	err := admin.Stop(ctx)
	if errors.Is(err, frpc.ErrStuck) {
		file := filepath.Join(runDir, frpc.StuckFile)
		time.AfterFunc(stuckFor, func() { _ = os.Remove(file) })
		err = errors.Join(err, os.WriteFile(file, nil, 0o600))
	}
	return err
}

// markFresh records that frpc runs, or will run, with the current files.
func (r *renewer) markFresh() {
	if r.lease.Stale != nil {
		r.lease.Stale = nil
		r.save()
	}
}

// save writes the lease to the run directory, and returns the names of the files that were missing or different.
func (r *renewer) save() []string {
	written, err := r.lease.Write(r.cfg.RunDir)
	if err != nil && !r.writeFailureLogged {
		r.log.Warn("retrying every few seconds to write the lease's files", "error", err)
	}
	r.writeFailureLogged = err != nil
	return written
}

// repair restores files of the run directory that were removed or changed.
func (r *renewer) repair() {
	if restored := r.save(); len(restored) > 0 {
		r.log.Warn("restored missing or changed files of the run directory", "run_dir", r.cfg.RunDir, "files", restored)
	}
}

// closeTunnel removes what frpc would log in with, and stops frpc. It returns the refusal, and whether frpc has ended.
func closeTunnel(ctx context.Context, runDir string, admin frpc.Admin, refusal *controlplane.Failure) error {
	err := frpc.RemoveLogin(runDir)
	for attempt := 0; err == nil; attempt++ {
		if frpc.StateOf(admin.Status(ctx)) == frpc.Down {
			return fmt.Errorf("%w; the tunnel is closed", refusal)
		}
		if stopErr := stopFrpc(ctx, runDir, admin); attempt == 10 || errors.Is(stopErr, frpc.ErrStuck) {
			err = cmp.Or(stopErr, errors.New("it still runs"))
		}
		err = cmp.Or(sleep(ctx, 500*time.Millisecond), err)
	}
	return fmt.Errorf("%w; the tunnel may still be open, because frpc does not stop (%w): delete the pod", refusal, err)
}

// recordState updates the outage with frpc's state.
func (r *renewer) recordState(state frpc.State, now time.Time) {
	switch state {
	case frpc.Down:
		r.outage = outage{}
		r.markFresh()
	case frpc.Withdrawn, frpc.Starting, frpc.Running:
		if r.outage.logged != "" {
			r.log.Info("the tunnel is up again", "down_for", now.Sub(r.outage.since).Round(time.Second).String())
		}
		if r.outage.requestWait > requestMin { // all agents are back now, with new leases, and must not all log in again
			r.noIdleRestartBefore = now.Add(jitter(settleTime))
		}
		r.outage = outage{}
	case frpc.LoggedOut, frpc.Rejected:
		if r.outage.since.IsZero() {
			r.outage = outage{since: now, probeWait: probeMin, requestWait: requestMin}
			r.outage.probe, r.outage.request = now.Add(jitter(probeMin)), now.Add(jitter(requestMin))
		}
		r.outage.rejected = state == frpc.Rejected
	}
}

// probeFrps finds out now and then, while frpc is logged out, whether frps accepts what frpc was started with.
func (r *renewer) probeFrps(ctx context.Context, now time.Time) {
	o, started := &r.outage, r.lease.Frpc
	if o.rejected && o.logged == "" {
		o.logged = "frps refuses the tunnel"
		r.log.Warn("the tunnel is down", "error", o.logged, "next_step", "see the proxy's /ready for the reason")
	}
	if o.since.IsZero() || o.rejected || now.Before(o.probe) {
		return
	}
	if stale := r.lease.Stale; stale != nil {
		if started = stale.Frpc; started.AuthMethod == "oidc" && r.lease.Frpc.AuthMethod == "oidc" {
			started.Token = r.lease.Frpc.Token // from TokenFile, which frpc reads at every login
		}
	}
	err := r.tryLogin(ctx, started)
	if r.lease.Stale != nil && err != nil {
		err = r.tryLogin(ctx, r.lease.Frpc)
		o.outdated = err == nil
	}
	if err != nil && err.Error() != o.logged {
		o.logged = err.Error()
		r.log.Warn("the tunnel is down", "error", err)
	}
	if o.accepted = cmp.Or(o.accepted, now); err != nil {
		o.accepted = time.Time{}
	}
	o.probeWait = min(2*o.probeWait, probeMax)
	o.probe = now.Add(jitter(o.probeWait))
}

// tryLogin logs in to frps as frpc would, and warns once of an outdated frps.
func (r *renewer) tryLogin(ctx context.Context, as frpc.Config) error {
	version, err := r.login(ctx, as)
	if outdated := frpc.Outdated(version); outdated != "" && !r.versionKnown {
		r.log.Warn("frps is outdated", "version", version, "consequence", outdated)
	}
	r.versionKnown = r.versionKnown || version != ""
	return r.cfg.FRP.ExplainLogin(err)
}

// renewalDue reports whether it is time for the next lease: this one expires soon, or frpc has been logged out for a
// while, because then frps may have moved, or refuse the lease.
func (r *renewer) renewalDue(now time.Time) bool {
	early := !r.outage.since.IsZero() && r.cfg.FRP.Token == "" && !now.Before(r.outage.request)
	expires := !r.renewAt.IsZero() && !now.Before(r.renewAt)
	return (early || expires) && !now.Before(r.notYet)
}

// inputChanged reports whether the lease was requested with another credential than the current one, or shows another
// certificate than the configured one.
func (r *renewer) inputChanged() bool {
	token, err := r.cfg.Credential()
	certificate, _, problem := Configured(r.cfg)
	if problem != r.certificateProblem { // the days to its end count
		r.certificateProblem = problem
		r.log.Warn("configured certificate", "problem", cmp.Or(problem, "solved"))
	}
	return (err == nil && token != r.token ||
		certificate != nil && r.lease.Certificate != nil && !bytes.Equal(certificate, r.lease.Certificate)) &&
		!time.Now().Before(r.notYet)
}

// renew requests the next lease once. If that fails, the current lease stays, and lease.json says why.
func (r *renewer) renew(ctx context.Context) *controlplane.Failure {
	token, err := r.cfg.Credential()
	if err != nil {
		token = r.token
	}
	lease, fail := requestLease(ctx, r.cfg, r.issue, r.lease)
	if ctx.Err() != nil {
		return nil // bootstrap stops
	}
	now := time.Now()
	if o := &r.outage; !o.since.IsZero() {
		o.requestWait = min(2*o.requestWait, requestMax)
		o.request, o.probe = now.Add(jitter(o.requestWait)), now
	}
	r.confirmed = false
	if fail == nil {
		r.revokedSince = time.Time{}
		r.inherit(&lease)
		err := write(r.cfg, lease, r.log)
		if err == nil {
			r.token, r.failed = token, nil
			r.adopt(lease, now)
			return nil
		}
		fail = &controlplane.Failure{Err: err}
	}
	r.failed = fail
	wait := min(max(jitter(r.backoff), fail.RetryAfter), waitMax)
	next := "the tunnel stays as it is"
	if fail.Refused && !r.lease.ExpiresAt.IsZero() {
		next = "unless a retry succeeds, the tunnel is closed when the lease expires"
	}
	if fail.Revoked {
		r.revokedSince = cmp.Or(r.revokedSince, now)
		elapsed := now.Sub(r.revokedSince)
		r.confirmed, wait = elapsed >= confirmAfter, max(wait, confirmAfter-elapsed)
		next = "the tunnel is closed if the next answer is the same"
	}
	if r.unwanted(now) {
		next = "the tunnel is closed"
	}
	r.backoff, r.notYet = min(2*r.backoff, backoffMax), now.Add(wait)
	r.renewAt = r.notYet
	r.log.Warn("lease not renewed", "error", fail, "consequence", next, "next_attempt_in", wait.String(),
		"expires_at", r.lease.ExpiresAt)
	r.lease.Renewal = cmp.Or(r.lease.Renewal, &frpc.FailedRenewal{FailingSince: now.UTC()})
	r.lease.Renewal.Error = fail.Error() + "; " + next
	r.save()
	return fail
}

// restartReason returns why frpc must be restarted now, even if that interrupts requests. Empty: it need not.
func (r *renewer) restartReason(now time.Time) string {
	o, stale := &r.outage, r.lease.Stale
	switch {
	case stale != nil && !stale.Until.IsZero() && now.After(stale.Until.Add(-5*time.Second)):
		return "the credential that it was started with expires"
	case stale != nil && (o.outdated || o.rejected):
		return "frps accepts the new lease, and not the one that it was started with"
	case !o.rejected && !o.accepted.IsZero() && now.Sub(o.accepted) >= hangsAfter:
		return "it is logged out although frps accepts logins"
	}
	return ""
}

// idle reports whether nothing runs through the tunnel, by the proxy's own count. Without an answer, something may run.
func (r *renewer) idle(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, pollInterval)
	defer cancel()
	activity := agentapi.Activity{RequestsInFlight: -1} // an answer without the count is none
	proxy := agentapi.Client{ListenAddr: r.cfg.Proxy.MetricsAddr}
	return proxy.Call(ctx, agentapi.ActivityPath, nil, &activity) == nil && activity.RequestsInFlight == 0
}
