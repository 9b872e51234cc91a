// Package doctor walks the way from the configuration to the API server.
package doctor

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/pipeops/vm-agent/bootstrap/agentapi"
	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/bootstrap/controlplane"
	"github.com/pipeops/vm-agent/bootstrap/lease"
	"github.com/pipeops/vm-agent/bootstrap/version"
	"github.com/pipeops/vm-agent/frpc"
	"github.com/pipeops/vm-agent/frpc/tlsutil"
)

// finding is the result of one step.
type finding struct {
	Step   string `json:"step"`
	Result string `json:"result"` // ok, failed or skipped
	Detail string `json:"detail"` // what was found, or what to do
}

// skipped is the reason why a step was skipped.
type skipped string

func (s skipped) Error() string { return string(s) }

// Run takes every step of the way, writes what it finds to stdout, and reports whether no step failed. It writes no
// file; the lease that it requests is not used.
func Run(ctx context.Context, configPath string, env map[string]string, stdout io.Writer, asJSON bool) (healthy bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	p := &patient{}
	cfg, err := config.Load(configPath, env)
	valid := "valid"
	if cfg != nil && cfg.Agent.TokenWarning() != "" {
		valid += ", but " + cfg.Agent.TokenWarning()
	}
	findings := []finding{}
	healthy = true
	for _, step := range []struct {
		name string
		take func(context.Context) (string, error)
	}{
		{"configuration", func(context.Context) (string, error) { p.cfg = cfg; return valid, err }},
		{"dns", p.dns},
		{"control plane", p.controlPlane},
		{"authentication", p.authentication},
		{"frps", p.frps},
		{"tunnel", p.tunnel},
		{"proxy", p.proxy},
		{"kubernetes", p.kubernetes},
		{"permissions", p.permissions},
	} {
		f := finding{Step: step.name, Result: "skipped", Detail: "the configuration comes first"}
		if cfg != nil || step.name == "configuration" {
			detail, err := step.take(ctx)
			f.Result, f.Detail = "ok", detail
			if why := skipped(""); errors.As(err, &why) {
				f.Result, f.Detail = "skipped", string(why)
			} else if err != nil {
				f.Result, f.Detail, healthy = "failed", err.Error(), false
			}
		}
		findings = append(findings, f)
		if !asJSON {
			_, _ = fmt.Fprintf(stdout, "%-8s %-15s %s\n", f.Result, f.Step, f.Detail)
		}
	}
	if asJSON {
		encoder := json.NewEncoder(stdout)
		encoder.SetIndent("", "  ")
		_ = encoder.Encode(findings)
	}
	return healthy
}

// patient is what doctor examines, and what it has learned so far.
type patient struct {
	cfg     *config.Config
	reached bool        // the control plane answers
	lease   *frpc.Lease // from the control plane
}

const ownToken = skipped("frp.token is set: there is no control plane")

func (p *patient) dns(ctx context.Context) (string, error) {
	if p.cfg.FRP.Token != "" {
		return "", ownToken
	}
	u, _ := url.Parse(p.cfg.Agent.APIURL) // checked by its setting
	if proxy, err := http.ProxyFromEnvironment(&http.Request{URL: u}); err == nil && proxy != nil {
		return "", skipped("HTTPS_PROXY is set: the proxy at " + proxy.Host + " resolves " + u.Hostname())
	}
	addrs, err := net.DefaultResolver.LookupHost(ctx, u.Hostname())
	if err != nil {
		return "", fmt.Errorf("%w: check %s and the cluster's DNS", err, config.Name("agent.api_url"))
	}
	return u.Hostname() + " is " + strings.Join(addrs, ", "), nil
}

// controlPlane sends a request without the token: any answer will do.
func (p *patient) controlPlane(ctx context.Context) (string, error) {
	if p.cfg.FRP.Token != "" {
		return "", ownToken
	}
	client, err := controlplane.New(p.cfg.Agent)
	if err != nil {
		return "", err
	}
	state, err := client.Reach(ctx)
	if err != nil {
		return "", err
	}
	p.reached = true
	detail := p.cfg.Agent.APIURL + " answers"
	if state != nil {
		detail += " over TLS with " + tlsutil.DescribeCertificate(state.PeerCertificates[0])
	}
	return detail, nil
}

func (p *patient) authentication(ctx context.Context) (string, error) {
	if p.cfg.FRP.Token == "" && !p.reached {
		return "", skipped("the control plane comes first")
	}
	granted, err := lease.Try(ctx, p.cfg)
	if err != nil {
		return "", err
	}
	p.lease = &granted
	if p.cfg.FRP.Token != "" {
		return "", ownToken
	}
	end := "without an end"
	if !granted.ExpiresAt.IsZero() {
		end = "until " + granted.ExpiresAt.Format(time.RFC3339)
	}
	return fmt.Sprintf("the control plane gives a lease %s for a tunnel of type %s", end, granted.Frpc.Tunnel.Type), nil
}

func (p *patient) frps(ctx context.Context) (string, error) {
	if p.lease == nil {
		return "", skipped("a lease comes first")
	}
	c := p.lease.Frpc
	addr := fmt.Sprintf("%s:%d", c.ServerAddr, c.ServerPort)
	verified := "verified"
	if c.TLS.InsecureSkipVerify {
		verified = "NOT verified, because " + config.Name("frp.tls.insecure_skip_verify") + " is set"
	}
	version, err := frpc.Login(ctx, c)
	if errors.Is(err, frpc.ErrCannotLogin) {
		return "", skipped(addr + " cannot be tried with protocol " + c.Protocol +
			" or through this proxy: see the step tunnel")
	}
	if err != nil {
		return "", p.cfg.FRP.ExplainLogin(err)
	}
	detail := fmt.Sprintf("%s, version %s, accepts the login; its certificate is %s; %s",
		addr, version, verified, frpc.Outdated(version))
	return strings.TrimSuffix(detail, "; "), nil // most are not outdated
}

func (p *patient) tunnel(ctx context.Context) (string, error) {
	current, err := lease.Read(p.cfg.RunDir)
	if err != nil {
		return "", err
	}
	proxies, err := current.Frpc.Admin.Status(ctx)
	state := frpc.StateOf(proxies, err)
	if err != nil {
		return "", fmt.Errorf("%w: check that the frpc container runs, and its log", err)
	}
	if state == frpc.LoggedOut {
		return "", errors.New("frpc is not logged in to frps: see the step frps, and frpc's log")
	}
	t := proxies[0]
	if state != frpc.Running {
		return "", fmt.Errorf("%s of type %s: %s %s: see frpc's log", t.Name, t.Type, t.Status, t.Err)
	}
	detail := fmt.Sprintf("%s of type %s is running at %s; %s",
		t.Name, t.Type, t.RemoteAddr, current.Frpc.Tunnel.GivesUp())
	return strings.TrimSuffix(detail, "; "), nil // https gives up nothing
}

func (p *patient) proxy(ctx context.Context) (string, error) {
	var info version.Info
	if err := p.call(ctx, p.cfg.Proxy.MetricsAddr, agentapi.VersionPath, nil, &info); err != nil {
		return "", fmt.Errorf("%w: check that the proxy container runs, and its log", err)
	}
	if p.tunnelTLS() != nil {
		if err := p.call(ctx, p.cfg.Proxy.ListenAddr, agentapi.VersionPath, nil, &info); err != nil {
			return "", fmt.Errorf("TLS with the proxy and the tunnel's certificate failed: %w: see the proxy's log", err)
		}
	}
	return "version " + info.Version + " serves at " + config.Local(p.cfg.Proxy.MetricsAddr), nil
}

func (p *patient) kubernetes(ctx context.Context) (string, error) {
	var ready agentapi.Ready
	path := agentapi.ReadyPath + "?only=" + agentapi.CheckKubernetes
	if err := p.call(ctx, p.cfg.Proxy.MetricsAddr, path, nil, &ready); err != nil {
		return "", skipped("the proxy comes first")
	}
	if check := ready.Checks[agentapi.CheckKubernetes]; !check.OK {
		return "", errors.New(check.Detail)
	}
	return "the API server answers the agent's credential", nil
}

// permissions asks the API server, through the proxy, whether the agent has the rights that its own features need.
func (p *patient) permissions(ctx context.Context) (string, error) {
	const reviews = agentapi.KubernetesPrefix + "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
	var may, mayNot []string
	for _, access := range []struct {
		what       string
		attributes map[string]string
	}{
		{"list pods", map[string]string{"verb": "list", "resource": "pods"}},
		{"list nodes", map[string]string{"verb": "list", "resource": "nodes"}},
		{"keep runners", map[string]string{
			"verb": "update", "resource": "secrets", "name": agentapi.RunnersSecret, "namespace": p.cfg.Kubernetes.Namespace,
		}},
	} {
		review, _ := json.Marshal(map[string]any{ // cannot fail: strings only
			"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
			"spec": map[string]any{"resourceAttributes": access.attributes},
		})
		var answer struct{ Status struct{ Allowed bool } }
		err := p.call(ctx, p.cfg.Proxy.ListenAddr, reviews, review, &answer)
		switch {
		case err != nil:
			return "", skipped("the proxy and the API server come first")
		case answer.Status.Allowed:
			may = append(may, access.what)
		default:
			mayNot = append(mayNot, access.what)
		}
	}
	if len(may) == 0 {
		return "", fmt.Errorf("may not %s: apply the agent's manifests again; "+
			"another agent in this cluster may have taken over its role bindings", strings.Join(mayNot, ", "))
	}
	detail := "may " + strings.Join(may, ", ")
	if len(mayNot) > 0 {
		detail += "; may not " + strings.Join(mayNot, ", ") + ": grant it to the agent's ServiceAccount if it should"
	}
	return detail, nil
}

// tunnelTLS returns the callers' side of TLS with the proxy: for the agent's id, and trusting only the tunnel's
// certificate. It is nil unless the tunnel is of type https.
func (p *patient) tunnelTLS() *tls.Config {
	current, err := lease.Read(p.cfg.RunDir)
	if err != nil || current.Certificate == nil {
		return nil
	}
	trusted := x509.NewCertPool()
	trusted.AppendCertsFromPEM(current.Certificate)
	return &tls.Config{ServerName: p.cfg.Agent.ID, RootCAs: trusted, MinVersion: tls.VersionTLS12}
}

// call sends a request with the agent's token to the proxy's listener at addr: a POST if there is a body.
func (p *patient) call(ctx context.Context, addr, path string, body []byte, answer any) error {
	token, err := p.cfg.Agent.CurrentToken()
	if err != nil {
		return err
	}
	proxy := agentapi.Client{ListenAddr: addr, Token: token}
	if addr == p.cfg.Proxy.ListenAddr {
		proxy.TLS = p.tunnelTLS()
	}
	return proxy.Call(ctx, path, body, answer)
}
