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

// pluginContent is the part of frps's request to the plugin that is used here. Source: frp
// pkg/plugin/server/types.go.
type pluginContent struct {
	PrivilegeKey string            `json:"privilege_key"` // of a Login: the token, with method oidc
	Metas        map[string]string `json:"metas"`         // of a Login
	User         struct {
		Metas map[string]string `json:"metas"` // of the Login before a NewProxy, as this plugin let it pass
	} `json:"user"`
	ProxyName     string   `json:"proxy_name"`
	ProxyType     string   `json:"proxy_type"`
	Subdomain     string   `json:"subdomain"`
	CustomDomains []string `json:"custom_domains"`
	Group         string   `json:"group"`
	GroupKey      string   `json:"group_key"`
}

// plugin decides about Login and NewProxy for frps. It must decide about both, or any agent could claim any free
// domain. With method oidc it replaces the metadatas of a Login by what the token names. frps sends them with every
// NewProxy.
func (c *ControlPlane) plugin(w http.ResponseWriter, r *http.Request) {
	var request struct {
		Op      string
		Content json.RawMessage
	}
	var content pluginContent
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&request)
	if err == nil {
		err = json.Unmarshal(request.Content, &content)
	}
	answer := map[string]any{"reject": false, "unchange": true}
	if request.Op == "Login" && c.issuer != nil && err == nil {
		content.Metas = c.issuer.metadatas(content.PrivilegeKey)
		var login map[string]any
		err = json.Unmarshal(request.Content, &login)
		login["metas"] = content.Metas
		answer = map[string]any{"reject": false, "unchange": false, "content": login}
	}
	if err == nil {
		err = c.decide(request.Op, content)
	}
	if err != nil {
		c.options.Log.Warn("frps told to refuse", "op", request.Op, "reason", err)
		answer = map[string]any{"reject": true, "reject_reason": err.Error()}
	}
	writeJSON(w, http.StatusOK, answer)
}

func (c *ControlPlane) decide(op string, in pluginContent) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	metas := in.Metas
	if op == "NewProxy" {
		metas = in.User.Metas
	}
	l, ok := c.leases[metas["lease"]]
	if op == "NewProxy" && c.issuer != nil {
		l, ok = c.latest[metas["agent_id"]] // a session outlives the token of its login
	}
	var err error
	switch {
	case !ok:
		err = errors.New("the control plane has given no such lease, or has revoked it")
	case c.revoked[l.agentID]:
		err = errors.New("the agent was revoked")
	case l.ended():
		err = fmt.Errorf("the lease ended at %s", l.expires.Format(time.RFC3339))
	case op == "Login":
		return nil
	case op != "NewProxy":
		err = fmt.Errorf("op %q is not expected", op)
	case in.ProxyType != l.tunnel.Type || in.Subdomain != l.tunnel.Subdomain ||
		!slices.Equal(in.CustomDomains, l.tunnel.CustomDomains) ||
		in.Group != l.agentID || in.GroupKey != l.groupKey || !strings.HasPrefix(in.ProxyName, l.agentID+"."):
		err = fmt.Errorf("the lease of agent %q is not for this tunnel", l.agentID)
	}
	if err == nil {
		delete(c.refusals, l.agentID)
		c.tunnels[l.agentID], c.opened[l.agentID] = in.ProxyType, time.Now()
		return nil
	}
	if _, known := c.agents[metas["agent_id"]]; known {
		c.refusals[metas["agent_id"]] = refusal{at: time.Now(), reason: err.Error()}
	}
	return err
}
