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

// issuer grants a lease: the control plane does, or the operator's own token for their own frps. certificate is the PEM
// that callers of a tunnel of type https will see, or empty.
type issuer func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure)

// adminUser is the user that bootstrap and the proxy are for frpc's admin API.
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
			err = fmt.Errorf("%s: %w", config.Name("frp.token_file"), err)
			return controlplane.Answer{}, &controlplane.Failure{Err: err}
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

// requestLease returns a new lease; for a tunnel of type https, the issuer has seen its certificate. The lease decides
// what the certificate must hold, and is not known before the request: so the first request shows a certificate made
// for the last lease, and if that does not fit, a second request shows one that does.
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
	var shown *certificate
	for range 3 {
		var pem []byte
		if tunnel.Type == "https" {
			var err error
			if shown, err = newCertificate(cfg.Agent.ID, tunnel, end); err != nil {
				return fail(fmt.Errorf("make the tunnel's certificate: %w", err))
			}
			pem = shown.cert
		}
		answer, refusal := issue(ctx, pem)
		if refusal != nil {
			return frpc.Lease{}, refusal
		}
		lease, err := newLease(cfg, answer, last.Frpc.Admin)
		if err != nil {
			return fail(err)
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
	return fail(errors.New("the control plane's lease has another tunnel or another end each time: contact its operator"))
}

// retryUntilLease returns an issuer that retries until there is a lease, the failure is final, or ctx ends.
func retryUntilLease(issue issuer, log *slog.Logger) issuer {
	return func(ctx context.Context, certificate []byte) (controlplane.Answer, *controlplane.Failure) {
		for delay := time.Second; ; delay = min(2*delay, 30*time.Second) {
			answer, fail := issue(ctx, certificate)
			if fail == nil || fail.Final {
				return answer, fail
			}
			wait := max(jitter(delay), fail.RetryAfter)
			if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
				return answer, &controlplane.Failure{Err: fmt.Errorf("%w (gave up after --timeout)", fail)}
			}
			log.Warn("no lease yet", "error", fail, "next_attempt_in", wait.String())
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
