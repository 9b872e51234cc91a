package lease

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/frpc"
)

// issuer gives a lease: the control plane, or the operator's own token for their own frps. certificate is that of a
// tunnel of type https, PEM, or empty.
type issuer func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure)

// adminUser is frpc's name for bootstrap and the proxy.
const adminUser = "pipeops"

// newIssuer returns the issuer that the configuration chooses.
func newIssuer(cfg *config.Config) (issuer, error) {
	if cfg.FRP.Token == "" {
		client, err := controlplane.New(cfg.Agent)
		if err != nil {
			return nil, err
		}
		return client.RequestLease, nil
	}
	return func(context.Context, []byte) (controlplane.Answer, *controlplane.Failure) {
		token, err := cfg.FRP.CurrentToken()
		if err != nil {
			return controlplane.Answer{}, &controlplane.Failure{Err: fmt.Errorf("%s: %w", config.Name("frp.token_file"), err)}
		}
		return controlplane.Answer{FRPToken: token}, nil
	}, nil
}

// Try requests a lease and writes nothing. It shows the certificate that is in use, because the control plane would
// trust another one in its place.
func Try(ctx context.Context, cfg *config.Config) (frpc.Lease, error) {
	issue, err := newIssuer(cfg)
	if err != nil {
		return frpc.Lease{}, err
	}
	var certificate []byte
	if current, err := Read(cfg.RunDir); err == nil {
		certificate = current.Certificate
	}
	answer, fail := issue(ctx, certificate)
	if fail != nil {
		return frpc.Lease{}, fail
	}
	return newLease(cfg, answer, frpc.Admin{})
}

// requestLease gets a lease, and for a tunnel of type https one whose certificate the control plane has been shown. What
// the certificate must be follows from the lease, which is not known when it is asked for: so a certificate is
// made for what was last known, and if it does not fit, the one that does is shown in a second request.
func requestLease(ctx context.Context, cfg *config.Config, issue issuer, last frpc.Lease) (frpc.Lease, *controlplane.Failure) {
	tunnel, end := last.Frpc.Tunnel, time.Time{}
	switch {
	case tunnel.Type == "": // the first
		tunnel, end = cfg.FRP.Tunnel, time.Now().Add(24*time.Hour)
	case !last.ExpiresAt.IsZero():
		end = time.Now().Add(last.ExpiresAt.Sub(last.IssuedAt))
	}
	var shown *certificate
	for range 3 {
		var pem []byte
		if tunnel.Type == "https" {
			var err error
			if shown, err = newCertificate(cfg.Agent.ID, tunnel, end); err != nil {
				return frpc.Lease{}, &controlplane.Failure{Err: fmt.Errorf("the tunnel's certificate cannot be made: %w", err), Final: true}
			}
			pem = shown.cert
		}
		answer, fail := issue(ctx, pem)
		if fail != nil {
			return frpc.Lease{}, fail
		}
		lease, err := newLease(cfg, answer, last.Frpc.Admin)
		if err != nil {
			return frpc.Lease{}, &controlplane.Failure{Err: err, Final: true}
		}
		tunnel, end = lease.Frpc.Tunnel, answer.ExpiresAt
		if tunnel.Type != "https" {
			return lease, nil
		}
		if shown.fits(cfg.Agent.ID, tunnel, end) {
			lease.Certificate, lease.Key = shown.cert, shown.key
			return lease, nil
		}
	}
	return frpc.Lease{}, &controlplane.Failure{Final: true, Err: errors.New("the control plane's lease has another tunnel or another end each time: tell those who run it")}
}

// retryUntilLease asks until it gets a lease, the failure is final, or ctx ends.
func retryUntilLease(ctx context.Context, issue issuer, log *slog.Logger, certificate []byte) (controlplane.Answer, *controlplane.Failure) {
	stopped := errors.New("stopped by a signal before there was a lease")
	for delay := time.Second; ; delay = min(2*delay, 30*time.Second) {
		answer, fail := issue(ctx, certificate)
		if fail == nil || fail.Final {
			return answer, fail
		}
		wait := max(jitter(delay), fail.RetryAfter)
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
			return controlplane.Answer{}, &controlplane.Failure{Err: fmt.Errorf("%w (gave up after --timeout)", fail)}
		}
		log.Warn("no lease yet", "error", fail, "next_attempt_in", wait.String())
		select {
		case <-time.After(wait):
		case <-ctx.Done(): // there was time to wait, so it is a signal
			return controlplane.Answer{}, &controlplane.Failure{Err: stopped}
		}
	}
}

// jitter is a time around d, so that agents that failed together do not try again together.
func jitter(d time.Duration) time.Duration {
	return d/2 + mathrand.N(max(d, 1)) //nolint:gosec // no secret
}
