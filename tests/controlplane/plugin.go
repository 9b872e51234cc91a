package controlplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// pluginRequest is what frps asks before it accepts a login or a proxy.
// Source: frp pkg/plugin/server/types.go.
type pluginRequest struct {
	Op      string `json:"op"`
	Content struct {
		Metas map[string]string `json:"metas"` // of a Login
		User  struct {
			Metas map[string]string `json:"metas"` // of the Login before a NewProxy
		} `json:"user"`
		ProxyName     string   `json:"proxy_name"`
		ProxyType     string   `json:"proxy_type"`
		Subdomain     string   `json:"subdomain"`
		CustomDomains []string `json:"custom_domains"`
		Group         string   `json:"group"`
		GroupKey      string   `json:"group_key"`
	} `json:"content"`
}

// plugin decides for frps on Login and NewProxy: on both, or any agent could claim any free domain.
func (c *ControlPlane) plugin(w http.ResponseWriter, r *http.Request) {
	var request pluginRequest
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&request)
	if err == nil {
		err = c.decide(request)
	}
	if err != nil {
		c.options.Log.Warn("frps told to refuse", "op", request.Op, "reason", err)
		writeJSON(w, http.StatusOK, map[string]any{"reject": true, "reject_reason": err.Error()})
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{"reject": false, "unchange": true})
}

func (c *ControlPlane) decide(request pluginRequest) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	in, metas := request.Content, request.Content.Metas
	if request.Op == "NewProxy" {
		metas = in.User.Metas
	}
	l, ok := c.leases[metas["lease"]]
	var err error
	switch {
	case !ok:
		err = errors.New("the control plane has given no such lease, or has revoked it")
	case l.ended():
		err = fmt.Errorf("the lease ended at %s", l.expires.Format(time.RFC3339))
	case request.Op == "Login":
		return nil
	case request.Op != "NewProxy":
		err = fmt.Errorf("op %q is not expected", request.Op)
	case in.ProxyType != l.tunnel.Type || in.Subdomain != l.tunnel.Subdomain || !slices.Equal(in.CustomDomains, l.tunnel.CustomDomains) ||
		in.Group != l.agentID || in.GroupKey != l.groupKey || !strings.HasPrefix(in.ProxyName, l.agentID+"."):
		err = fmt.Errorf("the lease of agent %q is not for this tunnel", l.agentID)
	}
	if err == nil {
		delete(c.refusals, l.agentID)
		c.tunnels[l.agentID] = in.ProxyType
		return nil
	}
	if _, known := c.agents[metas["agent_id"]]; known {
		c.refusals[metas["agent_id"]] = refusal{at: time.Now(), reason: err.Error()}
	}
	return err
}
