package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"syscall"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/secret"
)

const (
	lookInterval = 2 * time.Second  // between two looks at frpc
	renewalMin   = 10 * time.Second // between two leases, however short they are
	backoffMin   = time.Second
	backoffMax   = time.Minute
	waitMax      = 90 * time.Second // between two attempts, whatever the control plane asks for
	confirmAfter = 30 * time.Second // between two answers that together close the tunnel of a revoked agent
	stuckFor     = 25 * time.Second // how long StuckFile stays: a liveness probe every 5 s sees it three times, and kills frpc

	// While frpc is logged out; all of them with jitter, and doubled after each time.
	probeMin, probeMax     = 15 * time.Second, time.Minute     // until a trial login
	requestMin, requestMax = 30 * time.Second, 5 * time.Minute // until another lease is requested
	hangsAfter             = 2 * time.Minute                   // frpc hangs if frps accepts trial logins for so long
	settleTime             = 5 * time.Minute                   // after it, more or less, until frpc is restarted for its sake
)

// outage is what is known while frpc has no tunnel.
type outage struct {
	since    time.Time // zero: it has one
	rejected bool
	outdated bool      // it fails with what frpc was started with, and succeeds with the new lease
	said     string    // the error that was logged last
	accepted time.Time // since when frps accepts trial logins; zero: it did not accept the last one

	probe, request         time.Time // when to try a login, and when to request another lease
	probeWait, requestWait time.Duration
}

// renewer keeps the lease fresh: it requests the next one in time and writes it. It restarts frpc when it must log in
// with the new one and that cuts nobody off, or when frpc cannot log in with what it has. While frps is away, it leaves
// frpc alone: a restart would only add the kubelet's back-off to the outage.
type renewer struct {
	cfg   *config.Config
	issue issuer
	login func(context.Context, frpc.Config) (version string, err error) // frpc.Login
	log   *slog.Logger

	lease   frpc.Lease    // what the files hold
	token   secret.Secret // what the lease was asked for with
	renewAt time.Time     // when to ask for the next; zero: this one has no end
	backoff time.Duration // after the attempt that failed last
	notYet  time.Time     // no attempt before this

	failed       *controlplane.Failure // why the last attempt got no lease; nil: it got one
	revokedSince time.Time             // when the control plane first said that the agent is revoked; zero: not since the last lease
	confirmed    bool                  // it has said so again with the last attempt, after confirmAfter

	outage  outage
	settled time.Time // before this, frpc is not restarted merely because nothing runs through the tunnel
	tried   bool      // there was a trial login, which tells the version of frps
	unheard bool      // frpc could not be told to end, and that was said
	unsaved bool      // the run directory could not be written, and that was said
}

// inherit notes in the next lease that frpc may still run with what it was told before.
func (r *renewer) inherit(next *frpc.Lease) {
	next.Stale = r.lease.Stale
	if old := r.lease.Frpc; next.Stale == nil && old.Tunnel.Type != "" && !sameTOML(old, next.Frpc) {
		next.Stale = &frpc.Stale{Until: r.lease.ExpiresAt, Frpc: old}
	}
}

// adopt makes lease, which has been written, the one that is kept.
func (r *renewer) adopt(lease frpc.Lease, now time.Time) {
	r.lease = lease
	r.backoff, r.notYet = backoffMin, now.Add(renewalMin)
	r.renewAt = time.Time{}
	if lease.ExpiresAt.IsZero() {
		return
	}
	// At two thirds of its life, more or less, so that agents which started together part ways.
	life := lease.ExpiresAt.Sub(now)
	r.renewAt = now.Add(max(renewalMin, life/10*6+jitter(life/10)))
	if life <= time.Second {
		r.log.Warn("the lease has ended before it could be used: check the clock of the control plane, or the life of its leases", "expires_at", lease.ExpiresAt)
	}
}

// unwanted reports whether the tunnel must be closed: the control plane has said twice that the agent is revoked, or
// the agent was refused until its lease ended.
func (r *renewer) unwanted(now time.Time) bool {
	ended := !r.lease.ExpiresAt.IsZero() && now.After(r.lease.ExpiresAt)
	return r.failed != nil && (r.confirmed || r.failed.Refused && ended)
}

// run keeps the lease until ctx ends. Its error means that the control plane does not want this agent: then the
// tunnel is closed.
func (r *renewer) run(ctx context.Context) error {
	admin := r.lease.Frpc.Admin
	for {
		now := time.Now()
		r.repair()
		state := stateOf(ctx, admin)
		r.recordState(state, now)
		if connected(state) && !r.tried {
			_ = r.tryLogin(ctx, r.lease.Frpc)
		}
		r.probeFrps(ctx, now)
		if r.tokenChanged() || r.renewalDue(now) {
			_ = r.renew(ctx) // r.failed has it
		}
		if r.unwanted(time.Now()) {
			return closeTunnel(ctx, r.cfg.RunDir, r.lease.Frpc.Admin, r.failed)
		}
		r.reload(ctx, admin)
		reason := r.restartReason(time.Now())
		if reason == "" && r.lease.Stale != nil && r.outage.since.IsZero() && now.After(r.settled) && r.idle(ctx) {
			reason = "nothing runs through the tunnel"
		}
		if reason != "" {
			r.restartFrpc(ctx, admin, reason)
		}
		select {
		case <-time.After(lookInterval):
		case <-ctx.Done():
			return nil
		}
	}
}

// reload has frpc apply a new lease that differs in the tunnel alone: that cuts nothing.
func (r *renewer) reload(ctx context.Context, admin frpc.Admin) {
	stale := r.lease.Stale
	if stale == nil {
		return
	}
	reloaded := stale.Frpc
	if reloaded.Tunnel = r.lease.Frpc.Tunnel; !sameTOML(reloaded, r.lease.Frpc) {
		return
	}
	if err := admin.Reload(ctx); err != nil {
		r.log.Warn("frpc does not reload its configuration", "error", err)
		stale.Frpc = frpc.Config{} // it must be restarted
		return
	}
	r.log.Info("frpc has reloaded its configuration", "tunnel_type", r.lease.Frpc.Tunnel.Type)
	r.markFresh()
}

// restartFrpc ends frpc, which the kubelet then restarts. If frpc hangs, StuckFile has the kubelet kill it.
func (r *renewer) restartFrpc(ctx context.Context, admin frpc.Admin, reason string) {
	err := admin.Stop(ctx)
	if errors.Is(err, frpc.ErrStuck) {
		r.log.Warn("frpc hangs and does not stop: its liveness probe restarts it; outside Kubernetes, restart it yourself", "reason", reason)
		r.outage = outage{}
		if err = reportStuck(r.cfg.RunDir); err == nil {
			return // what frpc runs with stays noted: nobody may restart it
		}
	}
	if errors.Is(err, syscall.ECONNREFUSED) { // it does not run
		r.markFresh()
		return
	}
	if err == nil {
		r.log.Info("restarting frpc", "reason", reason)
		r.outage = outage{}
		r.markFresh()
	} else if !r.unheard {
		r.log.Warn("frpc must be restarted and cannot be told to: restart its container", "reason", reason, "error", err)
	}
	r.unheard = err != nil
}

// markFresh notes that frpc runs, or will run, with the files as they are.
func (r *renewer) markFresh() {
	if r.lease.Stale != nil {
		r.lease.Stale = nil
		r.save()
	}
}

// save makes the run directory hold the lease as it is in memory, and returns the names of the files that it wrote.
func (r *renewer) save() []string {
	written, err := r.lease.Write(r.cfg.RunDir)
	if err != nil && !r.unsaved {
		r.log.Warn("trying again every few seconds to write the lease's files", "error", unwritable(err))
	}
	r.unsaved = err != nil
	return written
}

// repair restores what has been removed from the run directory or changed there.
func (r *renewer) repair() {
	if restored := r.save(); len(restored) > 0 {
		r.log.Warn("restored missing or changed files of the run directory", "run_dir", r.cfg.RunDir, "files", restored)
	}
}

// closeTunnel takes away what frpc would log in with, ends it, and makes sure that it has ended. It returns the
// refusal, with what has become of the tunnel.
func closeTunnel(ctx context.Context, runDir string, admin frpc.Admin, refusal *controlplane.Failure) error {
	err := frpc.Withdraw(runDir)
	for attempt := 0; err == nil; attempt++ {
		if stateOf(ctx, admin) == frpc.Down {
			return fmt.Errorf("%w; the tunnel is closed", refusal)
		}
		if stopErr := admin.Stop(ctx); errors.Is(stopErr, frpc.ErrStuck) {
			err = errors.Join(stopErr, reportStuck(runDir)) // its liveness probe ends it
		} else if attempt == 10 {
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

// stateOf asks frpc for its state.
func stateOf(ctx context.Context, admin frpc.Admin) frpc.State {
	return frpc.StateOf(admin.Status(ctx))
}

// connected reports whether frps accepts what frpc was started with.
func connected(state frpc.State) bool { return state >= frpc.Withdrawn }

// recordState takes in what a look has found.
func (r *renewer) recordState(state frpc.State, now time.Time) {
	switch state {
	case frpc.Down:
		r.outage = outage{}
		r.markFresh()
	case frpc.Withdrawn, frpc.Starting, frpc.Running:
		if r.outage.said != "" {
			r.log.Info("the tunnel is up again", "down_for", now.Sub(r.outage.since).Round(time.Second).String())
		}
		if r.outage.requestWait > requestMin { // all agents are back now, with new leases: they must not all log in again
			r.settled = now.Add(jitter(settleTime))
		}
		r.outage = outage{}
	case frpc.LoggedOut, frpc.Rejected:
		if r.outage.since.IsZero() {
			r.outage = outage{
				since: now, probe: now.Add(jitter(probeMin)), probeWait: probeMin, request: now.Add(jitter(requestMin)), requestWait: requestMin,
			}
		}
		r.outage.rejected = state == frpc.Rejected
	}
}

// probeFrps tries now and then, while frpc is logged out, whether frps accepts what frpc was started with.
func (r *renewer) probeFrps(ctx context.Context, now time.Time) {
	o, started := &r.outage, r.lease.Frpc
	if o.rejected && o.said == "" {
		o.said = "frps refuses it"
		r.log.Warn("the tunnel is down", "error", o.said, "next_step", "ask the proxy's /ready for the reason")
	}
	if o.since.IsZero() || o.rejected || now.Before(o.probe) {
		return
	}
	if stale := r.lease.Stale; stale != nil {
		if started = stale.Frpc; started.AuthMethod == "oidc" && r.lease.Frpc.AuthMethod == "oidc" {
			started.Token = r.lease.Frpc.Token // of the file, which frpc reads at every login
		}
	}
	err := r.tryLogin(ctx, started)
	if r.lease.Stale != nil && err != nil {
		err = r.tryLogin(ctx, r.lease.Frpc)
		o.outdated = err == nil
	}
	if err != nil && err.Error() != o.said {
		o.said = err.Error()
		r.log.Warn("the tunnel is down", "error", err)
	}
	switch {
	case err != nil:
		o.accepted = time.Time{}
	case o.accepted.IsZero():
		o.accepted = now
	}
	o.probeWait = min(2*o.probeWait, probeMax)
	o.probe = now.Add(jitter(o.probeWait))
}

// tryLogin logs in to frps as frpc would, and warns, once, of a frps that is outdated.
func (r *renewer) tryLogin(ctx context.Context, as frpc.Config) error {
	version, err := r.login(ctx, as)
	if outdated := frpc.Outdated(version); outdated != "" && !r.tried {
		r.log.Warn("frps is outdated", "version", version, "consequence", outdated)
	}
	r.tried = r.tried || version != ""
	return r.cfg.FRP.ExplainLogin(err)
}

// renewalDue reports whether it is time for the next lease: this one ends, or frpc has been logged out for a while.
// Then frps may be elsewhere, or refuse the lease.
func (r *renewer) renewalDue(now time.Time) bool {
	if now.Before(r.notYet) {
		return false
	}
	out := !r.outage.since.IsZero() && r.cfg.FRP.Token == ""
	return !r.renewAt.IsZero() && !now.Before(r.renewAt) || out && !now.Before(r.outage.request)
}

// tokenChanged reports whether the lease was requested with another token than the one that now stands.
func (r *renewer) tokenChanged() bool {
	token, err := r.credential()
	return err == nil && token != r.token && !time.Now().Before(r.notYet)
}

// credential is what leases are asked for with, as it now is.
func (r *renewer) credential() (secret.Secret, error) {
	if r.cfg.FRP.Token != "" {
		return r.cfg.FRP.CurrentToken()
	}
	return r.cfg.Agent.CurrentToken()
}

// renew asks for the next lease, once. If there is none, the one that is stays, and its file says why.
func (r *renewer) renew(ctx context.Context) *controlplane.Failure {
	token, err := r.credential()
	if err != nil {
		token = r.token
	}
	lease, fail := requestLease(ctx, r.cfg, r.issue, r.lease)
	if ctx.Err() != nil {
		return nil // stopped
	}
	now := time.Now()
	if o := &r.outage; !o.since.IsZero() {
		o.requestWait = min(2*o.requestWait, requestMax)
		o.request, o.probe = now.Add(jitter(o.requestWait)), now
	}
	if fail == nil {
		r.revokedSince = time.Time{}
		r.inherit(&lease)
		err := write(r.cfg, lease, r.log)
		if err == nil {
			r.token, r.failed, r.confirmed = token, nil, false
			r.adopt(lease, now)
			return nil
		}
		fail = &controlplane.Failure{Err: err}
	}
	r.failed, r.confirmed = fail, false
	wait := min(max(jitter(r.backoff), fail.RetryAfter), waitMax)
	next := "the tunnel stays as it is"
	if fail.Refused && !r.lease.ExpiresAt.IsZero() {
		next = "unless the next attempts succeed, the tunnel is closed when the lease ends"
	}
	if fail.Revoked {
		if r.revokedSince.IsZero() {
			r.revokedSince = now
		}
		elapsed := now.Sub(r.revokedSince)
		r.confirmed, wait = elapsed >= confirmAfter, max(wait, confirmAfter-elapsed)
		next = "the tunnel is closed if the next attempt is answered so too"
	}
	if r.unwanted(now) {
		next = "the tunnel is closed"
	}
	r.backoff, r.notYet = min(2*r.backoff, backoffMax), now.Add(wait)
	r.renewAt = r.notYet
	r.log.Warn("lease not renewed", "error", fail, "consequence", next, "next_attempt_in", wait.String(), "expires_at", r.lease.ExpiresAt)
	since := now.UTC()
	if r.lease.Renewal != nil {
		since = r.lease.Renewal.FailingSince
	}
	r.lease.Renewal = &frpc.Renewal{FailingSince: since, Error: fail.Error() + "; " + next}
	r.save()
	return fail
}

// restartReason says why frpc must be restarted now, empty if it need not.
func (r *renewer) restartReason(now time.Time) string {
	o, stale := &r.outage, r.lease.Stale
	out := !o.since.IsZero()
	switch {
	case stale != nil && !stale.Until.IsZero() && now.After(stale.Until.Add(-5*time.Second)):
		return "the credential that it was started with expires"
	case stale != nil && out && (o.outdated || o.rejected):
		return "frps accepts the new lease, and not what it was started with"
	case out && !o.rejected && !o.accepted.IsZero() && now.Sub(o.accepted) >= hangsAfter:
		return "it is logged out although frps accepts logins"
	default:
		return ""
	}
}

// idle reports whether nothing runs through the tunnel, by the proxy's own count. A proxy that does not answer is not
// idle.
func (r *renewer) idle(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, lookInterval)
	defer cancel()
	activity := agentapi.Activity{RequestsInFlight: -1} // an answer without the count is none
	proxy := agentapi.Client{ListenAddr: r.cfg.Proxy.MetricsAddr}
	return proxy.Call(ctx, agentapi.ActivityPath, nil, &activity) == nil && activity.RequestsInFlight == 0
}
