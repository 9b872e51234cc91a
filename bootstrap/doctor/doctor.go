// Package doctor walks the way from the configuration to the API server.
package doctor

import (
	"cmp"
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

// finding is the result of one step, and what was found or what to do.
type finding struct {
	Step   string `json:"step"`
	Result string `json:"result"`
	Detail string `json:"detail"`
}

const ok, warning, failed, skipped = "ok", "warning", "failed", "skipped" // results of a step

// Run takes every step of the way, writes what it finds to stdout, and reports whether no step failed. It writes no
// file; the lease that it requests is not used.
func Run(ctx context.Context, configPath string, env map[string]string, stdout io.Writer, asJSON bool) (healthy bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cfg, err := config.Load(configPath, env)
	p := &patient{cfg: cfg}
	findings := []finding{}
	healthy = true
	for _, step := range []struct {
		name string
		take func(context.Context) (result, detail string)
	}{
		{"configuration", p.configuration},
		{"dns", p.dns},
		{"control plane", p.controlPlane},
		{"authentication", p.authentication},
		{"frps", p.frps},
		{"tunnel", p.tunnel},
		{"proxy", p.proxy},
		{"kubernetes", p.kubernetes},
		{"permissions", p.permissions},
	} {
		f := finding{step.name, skipped, "the configuration comes first"}
		if err == nil {
			f.Result, f.Detail = step.take(ctx)
		} else if step.name == "configuration" {
			f.Result, f.Detail = failed, err.Error()
		}
		healthy = healthy && f.Result != failed
		findings = append(findings, f)
		if !asJSON {
			_, _ = fmt.Fprintf(stdout, "%-8s %-15s %s\n", f.Result, f.Step, f.Detail)
		}
	}
	if asJSON {
		encoded, _ := json.MarshalIndent(findings, "", "  ") // cannot fail: strings only
		_, _ = fmt.Fprintln(stdout, string(encoded))
	}
	return healthy
}

// patient is what doctor examines, and what it has learned so far.
type patient struct {
	cfg                 *config.Config
	reached             bool            // the control plane answers
	lease               *frpc.Lease     // from the control plane
	operations, callers agentapi.Client // of the proxy's listeners, set by the step proxy
	answered            bool            // the API server has, to the proxy
}

const noControlPlane = "frp.token is set: there is no control plane"

func (p *patient) configuration(context.Context) (result, detail string) {
	if _, _, problem := lease.Configured(p.cfg); problem != "" {
		return warning, "valid, but " + problem
	}
	if warning := p.cfg.Agent.TokenWarning(); warning != "" {
		return ok, "valid, but " + warning
	}
	return ok, "valid"
}

func (p *patient) dns(ctx context.Context) (result, detail string) {
	if p.cfg.FRP.Token != "" {
		return skipped, noControlPlane
	}
	u, _ := url.Parse(p.cfg.Agent.APIURL) // checked by its setting
	if proxy, err := http.ProxyFromEnvironment(&http.Request{URL: u}); err == nil && proxy != nil {
		return skipped, "HTTPS_PROXY is set: the proxy at " + proxy.Host + " resolves " + u.Hostname()
	}
	addrs, err := net.DefaultResolver.LookupHost(ctx, u.Hostname())
	if err != nil {
		return failed, fmt.Sprintf("%v: check %s and the cluster's DNS", err, config.Name("agent.api_url"))
	}
	return ok, u.Hostname() + " is " + strings.Join(addrs, ", ")
}

// controlPlane sends a request without the token: any answer will do.
func (p *patient) controlPlane(ctx context.Context) (result, detail string) {
	if p.cfg.FRP.Token != "" {
		return skipped, noControlPlane
	}
	client, err := controlplane.New(p.cfg)
	if err != nil {
		return failed, err.Error()
	}
	state, err := client.Reach(ctx)
	if err != nil {
		return failed, err.Error()
	}
	p.reached = true
	if state == nil { // plain HTTP
		return ok, p.cfg.Agent.APIURL + " answers"
	}
	return ok, p.cfg.Agent.APIURL + " answers over TLS with " + tlsutil.DescribeCertificate(state.PeerCertificates[0])
}

func (p *patient) authentication(ctx context.Context) (result, detail string) {
	if p.cfg.FRP.Token == "" && !p.reached {
		return skipped, "the control plane comes first"
	}
	granted, err := lease.Try(ctx, p.cfg)
	if err != nil {
		return failed, err.Error()
	}
	p.lease = &granted
	if p.cfg.FRP.Token != "" {
		return skipped, noControlPlane
	}
	end := "without an end"
	if !granted.ExpiresAt.IsZero() {
		end = "until " + granted.ExpiresAt.Format(time.RFC3339)
	}
	return ok, fmt.Sprintf("the control plane gives a lease %s for a tunnel of type %s", end, granted.Frpc.Tunnel.Type)
}

func (p *patient) frps(ctx context.Context) (result, detail string) {
	if p.lease == nil {
		return skipped, "a lease comes first"
	}
	c := p.lease.Frpc
	addr := fmt.Sprintf("%s:%d", c.ServerAddr, c.ServerPort)
	verified := "verified"
	if c.TLS.InsecureSkipVerify {
		verified = "NOT verified, because " + config.Name("frp.tls.insecure_skip_verify") + " is set"
	}
	version, err := frpc.Login(ctx, c)
	if errors.Is(err, frpc.ErrUnsupported) {
		return skipped, addr + " cannot be tried with protocol " + c.Protocol + " or through this proxy: see the step tunnel"
	}
	if err != nil {
		return failed, p.cfg.FRP.ExplainLogin(err).Error()
	}
	detail = fmt.Sprintf("%s, version %s, accepts the login; its certificate is %s; %s",
		addr, version, verified, frpc.Outdated(version))
	return ok, strings.TrimSuffix(detail, "; ") // most are not outdated
}

func (p *patient) tunnel(ctx context.Context) (result, detail string) {
	current, err := lease.Read(p.cfg.RunDir)
	if err != nil {
		return failed, err.Error()
	}
	proxies, err := current.Frpc.Admin.Status(ctx)
	for n := 0; n < 10 && frpc.StateOf(proxies, err) == frpc.Starting; n++ { // right after a start
		time.Sleep(time.Second)
		proxies, err = current.Frpc.Admin.Status(ctx)
	}
	if err := frpc.Explain(proxies, err); err != nil {
		return failed, err.Error()
	}
	lacks := current.Frpc.Tunnel.GivesUp()                 // nothing for https
	if result = ok; lacks != "" && p.cfg.FRP.Token != "" { // else the control plane has chosen it, and has a gateway
		result = warning
	}
	running := proxies[0]
	detail = fmt.Sprintf("%s of type %s is running at %s; %s", running.Name, running.Type, running.RemoteAddr, lacks)
	return result, strings.TrimSuffix(detail, "; ")
}

func (p *patient) proxy(ctx context.Context) (result, detail string) {
	p.operations = agentapi.Client{ListenAddr: p.cfg.Proxy.MetricsAddr, Token: p.cfg.Agent.Token}
	p.callers = agentapi.Client{ListenAddr: p.cfg.Proxy.ListenAddr, Token: p.cfg.Agent.Token}
	current, _ := lease.Read(p.cfg.RunDir) // the step tunnel says what is wrong with it
	current = cmp.Or(current, &frpc.Lease{})
	if shown, err := tls.X509KeyPair(current.Certificate, current.Key); err == nil {
		trusted := x509.NewCertPool() // as a caller: only the tunnel's certificate, and for a name of its own
		trusted.AddCert(shown.Leaf)
		name := cmp.Or(shown.Leaf.DNSNames...)
		p.callers.TLS = &tls.Config{ServerName: name, RootCAs: trusted, MinVersion: tls.VersionTLS12}
	}
	var info version.Info
	if err := p.operations.Call(ctx, agentapi.VersionPath, nil, &info); err != nil {
		return failed, err.Error() + ": check that the proxy container runs, and its log"
	}
	if p.callers.TLS != nil {
		err := p.callers.Call(ctx, agentapi.VersionPath, nil, &info)
		// With proxy.tls.client_ca_file, a caller without a certificate is told that one is required.
		if err != nil && (p.cfg.Proxy.ClientCAFile == "" || !strings.Contains(err.Error(), "certificate required")) {
			return failed, fmt.Sprintf("TLS with the proxy and the tunnel's certificate failed: %v: see the proxy's log", err)
		}
	}
	return ok, "version " + info.Version + " serves at " + config.Local(p.cfg.Proxy.MetricsAddr)
}

func (p *patient) kubernetes(ctx context.Context) (result, detail string) {
	var ready agentapi.Ready
	const path = agentapi.ReadyPath + "?only=" + agentapi.CheckKubernetes
	_ = p.operations.Call(ctx, path, nil, &ready) // if not ready, the answer says why
	switch check, answered := ready.Checks[agentapi.CheckKubernetes]; {
	case !answered:
		return skipped, "the proxy comes first"
	case !check.OK:
		return failed, check.Detail
	}
	p.answered = true
	return ok, "the API server answers the agent's credential"
}

// permissions asks the API server, through the proxy, whether the agent has the rights that its own features need.
func (p *patient) permissions(ctx context.Context) (result, detail string) {
	const reviews = agentapi.KubernetesPrefix + "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
	const review = `{"apiVersion":"authorization.k8s.io/v1","kind":"SelfSubjectAccessReview",` +
		`"spec":{"resourceAttributes":{"verb":%q,"resource":%q,"name":%q,"namespace":%q}}}`
	if p.cfg.Access.Identity != "agent" || p.cfg.Proxy.ClientCAFile != "" {
		return skipped, "only callers of the agent's own identity, without client certificates, can ask: " +
			"the status says what the agent may not read"
	}
	granted := map[bool][]string{}
	for _, access := range []struct{ what, verb, resource, name, namespace string }{
		{"list pods", "list", "pods", "", ""},
		{"list nodes", "list", "nodes", "", ""},
		{"keep runners", "update", "secrets", agentapi.RunnersRegistry, p.cfg.Kubernetes.Namespace},
	} {
		body := fmt.Appendf(nil, review, access.verb, access.resource, access.name, access.namespace)
		var answer struct{ Status struct{ Allowed bool } }
		err := p.callers.Call(ctx, reviews, body, &answer)
		refused, isRefused := errors.AsType[*agentapi.RefusedError](err)
		switch {
		case err == nil:
		case !p.answered:
			return skipped, "the proxy and the API server come first"
		case isRefused && refused.Code == http.StatusForbidden && strings.HasPrefix(refused.Why, "the agent "):
			return skipped, refused.Why
		case isRefused:
			return failed, err.Error() + ": " + cmp.Or(map[int]string{
				http.StatusUnauthorized: "check that bootstrap and the proxy have the same " + config.Name("agent.token"),
				http.StatusForbidden:    "RBAC must let the agent ask for its own rights, as ClusterRole system:basic-user does",
			}[refused.Code], "run doctor again, or see the proxy's log")
		default:
			return failed, err.Error()
		}
		granted[answer.Status.Allowed] = append(granted[answer.Status.Allowed], access.what)
	}
	may, mayNot := strings.Join(granted[true], ", "), strings.Join(granted[false], ", ")
	switch {
	case may == "": // nothing but the rights in some namespaces is asked for
		return warning, "may not " + mayNot + ": grant it to the agent's ServiceAccount, by its manifests, or " +
			"to the user of its kubeconfig; another agent in this cluster may have taken over its role bindings"
	case mayNot == "":
		return ok, "may " + may
	}
	return ok, "may " + may + "; may not " + mayNot + ": grant it to the agent's ServiceAccount if it should"
}
