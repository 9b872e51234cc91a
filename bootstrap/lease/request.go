package lease

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
)

// issuer is [controlplane.Client.RequestLease], or one that retries it.
type issuer func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure)

// Try requests a lease and writes nothing. It shows the certificate in use: the control plane would otherwise trust the
// new one instead.
func Try(ctx context.Context, cfg *config.Config) (frpc.Lease, error) {
	client, err := controlplane.New(cfg)
	if err != nil {
		return frpc.Lease{}, err
	}
	current, _ := Read(cfg.RunDir) // there may be none
	answer, fail := client.RequestLease(ctx, cmp.Or(current, &frpc.Lease{}).Certificate)
	if fail != nil {
		return frpc.Lease{}, fail
	}
	return newLease(cfg, answer, frpc.Admin{})
}

// requestLease returns a new lease. For a tunnel of type https the request shows a certificate, whose names and end
// depend on the lease that comes back. So the first request shows one that fits the last lease, and up to two more
// follow until it fits the new one. A configured certificate fits any lease.
func requestLease(
	ctx context.Context, cfg *config.Config, issue issuer, last frpc.Lease,
) (frpc.Lease, *controlplane.Failure) {
	fail := func(err error) (frpc.Lease, *controlplane.Failure) {
		return frpc.Lease{}, &controlplane.Failure{Err: err, Final: true}
	}
	tunnel, end := last.Frpc.Tunnel, time.Time{}
	switch {
	case tunnel.Type == "": // the first
		tunnel, end = cfg.FRP.Tunnel, time.Now().Add(24*time.Hour)
	case !last.ExpiresAt.IsZero():
		end = time.Now().Add(last.ExpiresAt.Sub(last.IssuedAt))
	}
	for range 3 {
		shown, key, err := configured(cfg)
		if err != nil {
			return fail(err)
		}
		given := shown != nil
		names := certificateNames(cfg.Agent.ID, tunnel)
		if tunnel.Type == "https" && !given {
			if shown, key, err = newCertificate(names, end); err != nil {
				return fail(fmt.Errorf("make the tunnel's certificate: %w", err))
			}
		}
		answer, refusal := issue(ctx, shown)
		if refusal != nil {
			return frpc.Lease{}, refusal
		}
		lease, err := newLease(cfg, answer, last.Frpc.Admin)
		if err != nil {
			return fail(err)
		}
		tunnel = lease.Frpc.Tunnel
		if tunnel.Type != "https" {
			return lease, nil
		}
		sameNames := slices.Equal(names, certificateNames(cfg.Agent.ID, tunnel))
		if given || shown != nil && sameNames && sameEnd(end, answer.ExpiresAt) {
			lease.Certificate, lease.Key = shown, key
			return lease, nil
		}
		end = answer.ExpiresAt
	}
	return fail(errors.New("the control plane's lease has another tunnel or another end each time: contact its operator"))
}

// retryUntilLease returns an issuer that retries until there is a lease, the failure is final, or ctx ends. Meanwhile
// the file waiting says why there is none, for Ready.
func retryUntilLease(issue issuer, waiting string, log *slog.Logger) issuer {
	return func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure) {
		var last *controlplane.Failure
		for delay := time.Second; ; delay = min(2*delay, 30*time.Second) {
			answer, fail := issue(ctx, certificate)
			if fail == nil || fail.Final {
				return answer, fail
			}
			if ctx.Err() != nil && last != nil {
				fail = last // the deadline has cut this attempt short: the one before says why there is no lease
			}
			last = fail
			wait := max(jitter(delay), fail.RetryAfter)
			if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
				return answer, &controlplane.Failure{Err: fmt.Errorf("%w (gave up after --timeout)", fail)}
			}
			log.Warn("no lease yet", "error", fail, "next_attempt_in", wait.String())
			_ = os.WriteFile(waiting, []byte(fail.Error()), 0o600)
			select {
			case <-time.After(wait):
			case <-ctx.Done(): // by a signal: the deadline is later
				return answer, &controlplane.Failure{Err: errors.New("stopped by a signal before there was a lease")}
			}
		}
	}
}

// jitter returns a random duration around d, so that agents which failed together do not retry together.
func jitter(d time.Duration) time.Duration {
	return d/2 + mathrand.N(max(d, 1)) //nolint:gosec // no secret
}
