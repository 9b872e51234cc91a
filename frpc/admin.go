package frpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// adminClient has a transport of its own, so that the environment's proxy settings do not apply to loopback calls.
var adminClient = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}

// ErrStuck reports that frpc does not stop, because it hangs in its first login.
var ErrStuck = errors.New("frpc does not stop")

// Stop stops frpc and waits up to five seconds for its end. The kubelet restarts it, with the then current frpc.toml.
func (a Admin) Stop(ctx context.Context) error {
	// This connection ends with the process; a new one could reach the restarted frpc.
	alive, err := (&net.Dialer{}).DialContext(ctx, "tcp", a.addr())
	if err != nil {
		return fmt.Errorf("frpc's admin API does not answer: %w", err)
	}
	defer func() { _ = alive.Close() }()
	if _, err := a.call(ctx, http.MethodPost, "/api/stop"); err != nil {
		return err
	}
	_ = alive.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := alive.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return ErrStuck
	}
	return nil
}

// Reload has frpc apply the [[proxies]] of its frpc.toml, and nothing else of it. Running requests go on.
func (a Admin) Reload(ctx context.Context) error {
	_, err := a.call(ctx, http.MethodGet, "/api/reload?strictConfig=true")
	return err
}

// Status returns frpc's proxies. There are none while frpc is not logged in to frps.
func (a Admin) Status(ctx context.Context) ([]ProxyStatus, error) {
	body, err := a.call(ctx, http.MethodGet, "/api/status")
	if err != nil {
		return nil, err
	}
	var byType map[string][]ProxyStatus
	if err := json.Unmarshal(body, &byType); err != nil {
		return nil, fmt.Errorf("frpc's admin API: status is not JSON: %w", err)
	}
	return append([]ProxyStatus{}, slices.Concat(slices.Collect(maps.Values(byType))...)...), nil // not nil: frpc answers
}

func (a Admin) addr() string { return fmt.Sprintf("127.0.0.1:%d", a.Port) }

func (a Admin) call(ctx context.Context, method, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+a.addr()+path, nil)
	if err != nil {
		return nil, err
	}
	req.SetBasicAuth(a.User, a.Password.Reveal())
	resp, err := adminClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("frpc's admin API at %s does not answer: %w", a.addr(), err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("it answers %s to %s %s", resp.Status, method, path)
	}
	if err != nil {
		err = fmt.Errorf("frpc's admin API at %s: %w", a.addr(), err)
	}
	return body, err
}

// ProxyStatus is frpc's view of one of its proxies. Source: frp client/http/model.
type ProxyStatus struct {
	Name       string `json:"name"`
	Type       string `json:"type"`
	Status     string `json:"status"` // new, wait start, start error, running, check failed or closed
	Err        string `json:"err"`    // why frps refused it
	RemoteAddr string `json:"remote_addr"`
}

// State is how far frpc has come on its way to frps.
type State int

// The states, from the answer of the admin API or its absence.
const (
	Unknown   State = iota // the admin API gives no usable answer
	Down                   // frpc does not run: nobody listens at the admin API; at its start it reads frpc.toml anew
	LoggedOut              // frpc is not logged in to frps, or cannot log in
	Rejected               // frps accepts the login and refuses the tunnel
	Withdrawn              // frpc has withdrawn the tunnel, because its health check fails
	Starting               // frpc is logged in and about to register the tunnel
	Running                // the tunnel is registered at frps
)

// StateOf classifies the result of Status. frpc.toml has one proxy, so the first one decides.
//
// Its callers differ by intention in Withdrawn and Starting: bootstrap takes them for connected, because a new lease
// or a restart would improve nothing; the proxy and doctor report them, because callers cannot reach the agent.
func StateOf(proxies []ProxyStatus, err error) State {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return Down
	case err != nil:
		return Unknown
	case len(proxies) == 0:
		return LoggedOut
	}
	switch p := proxies[0]; {
	case p.Status == "running":
		return Running
	case p.Status == "check failed": // the error may be from before
		return Withdrawn
	case p.Status == "start error" || p.Err != "": // frpc keeps the error while it tries again
		return Rejected
	default:
		return Starting
	}
}

// Explain returns why there is no running tunnel, by the result of Status, and what to do; nil if there is one.
// Source: frp pkg/config/v1/validation/proxy.go and server/proxy.
func Explain(proxies []ProxyStatus, err error) error {
	switch StateOf(proxies, err) {
	case Down, Unknown:
		return fmt.Errorf("%w: check that the frpc container runs, and its log", err)
	case LoggedOut:
		return errors.New("frpc is not logged in to frps: see frpc's log")
	case Rejected:
		do := "check what frps.toml allows (vhostHTTPPort, vhostHTTPSPort, subDomainHost, allowPorts), the agent's id, and " +
			"that no other agent has the same"
		if strings.Contains(proxies[0].Err, "should not belong to subdomain host") {
			do = "a name below frps's subDomainHost must be the tunnel's subdomain, not one of its custom domains"
		}
		return fmt.Errorf("frps refuses the tunnel (%s: %s): %s", proxies[0].Status, proxies[0].Err, do)
	case Withdrawn:
		return errors.New("frpc has withdrawn the tunnel, because the proxy drains or does not answer frpc: " +
			"check that proxy.listen_addr (PIPEOPS_LISTEN_ADDR) is the same for bootstrap and the proxy")
	case Starting:
		return errors.New("frpc is logged in, but has no tunnel yet: check its log if it has none after 20 s")
	default:
		return nil
	}
}
