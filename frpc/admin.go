package frpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

// adminClient has a transport of its own, so that the environment's proxy settings do not apply to loopback calls.
var adminClient = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}

// addr is the address of the admin API of the frpc in this pod. Calls take five seconds at most.
func (a Admin) addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(a.Port)) }

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

func (a Admin) call(ctx context.Context, method, path string) ([]byte, error) {
	addr := a.addr()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+addr+path, nil)
	if err != nil {
		return nil, err
	}
	req.SetBasicAuth(a.User, a.Password.Reveal())
	resp, err := adminClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("frpc's admin API at %s does not answer: %w", addr, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("frpc's admin API at %s: %w", addr, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("frpc's admin API at %s answers %s to %s %s", addr, resp.Status, method, path)
	}
	return body, nil
}
