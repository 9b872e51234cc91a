package access

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/proxy/kube"
)

// OwnerInterval is the time between two readings of the owner's ConfigMap.
const OwnerInterval = 2 * time.Second

const maxReason = 500 // bytes of the owner's reason that are quoted

// Owner is what the cluster's owner allows, by a ConfigMap. Safe for concurrent use.
type Owner struct {
	client    *kube.Client
	namespace string
	settings  config.Access // without a ConfigMap everything is allowed
	log       *slog.Logger

	last   atomic.Pointer[State]
	logged State // by Follow
}

// State is what the owner allows at a time.
type State struct {
	Allow  Level      `json:"allow"`
	Until  *time.Time `json:"until"`            // Allow is None from then; nil: no end
	Reason string     `json:"reason,omitempty"` // the owner's
	Detail string     `json:"detail,omitempty"` // why Allow is not what the ConfigMap says; empty if it is
	Held   string     `json:"-"`                // why the ConfigMap is not read, and Allow is what it last said
}

// NewOwner returns the owner of the ConfigMap that the settings name, in the agent's namespace. Until it is read,
// nothing is allowed.
func NewOwner(client *kube.Client, namespace string, settings config.Access, log *slog.Logger) *Owner {
	o := &Owner{client: client, namespace: namespace, settings: settings, log: log}
	o.last.Store(&State{Detail: "it is not read yet"})
	if settings.ConfigMap == "" {
		o.last.Store(&State{Allow: All})
	}
	return o
}

// State returns what is allowed now.
func (o *Owner) State() State {
	now := *o.last.Load()
	if now.Until != nil && !time.Now().Before(*now.Until) {
		now.Allow, now.Detail = None, "its until, "+now.Until.Format(time.RFC3339)+", has passed"
	}
	return now
}

// Refuse returns why a request that needs a level is refused, or "".
func (o *Owner) Refuse(needs Level) string {
	now := o.State()
	if now.Allow >= needs {
		return ""
	}
	why := fmt.Sprintf("the owner of this cluster allows %q, and this needs %q", now.Allow, needs)
	if now.Detail != "" {
		why += ", because of ConfigMap " + o.namespace + "/" + o.settings.ConfigMap + ": " + now.Detail
	}
	if now.Reason != "" {
		why += fmt.Sprintf("; reason: %q", now.Reason)
	}
	return why + ": ask who may change ConfigMap " + o.namespace + "/" + o.settings.ConfigMap
}

// Follow reads the ConfigMap, and logs a change. It keeps what it knows if the API server cannot be reached or is busy,
// and allows nothing if it may not read the ConfigMap, or there is no valid one.
func (o *Owner) Follow(ctx context.Context) {
	if o.settings.ConfigMap == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*OwnerInterval)
	defer cancel()
	data, err := o.client.ReadConfigMap(ctx, o.namespace, o.settings.ConfigMap)
	refusal, _ := errors.AsType[*apierrors.StatusError](err)
	last := o.State()
	last.Held = "the API server cannot be reached or is busy: what the ConfigMap last said holds"
	switch {
	case err == nil:
		last = parse(data)
	case refusal != nil && refusal.ErrStatus.Code < 500 && !apierrors.IsTooManyRequests(err):
		last = State{Detail: err.Error()}
	}
	o.last.Store(&last)
	now := o.State()
	if now.Allow != o.logged.Allow || now.Detail != o.logged.Detail || now.Held != o.logged.Held {
		o.log.Warn("what the owner of the cluster allows, or how it is known, has changed", "allow", now.Allow.String(),
			"before", o.logged.Allow.String(), "until", now.Until, "reason", now.Reason, "detail", now.Detail, "held", now.Held)
	}
	o.logged = now
}

// parse reads the ConfigMap's data. What is not exactly right allows nothing.
func parse(data map[string]string) State {
	reason := data["reason"][:min(len(data["reason"]), maxReason)]
	invalid := func(format, value string) State { return State{Reason: reason, Detail: fmt.Sprintf(format, value)} }
	for key := range data {
		if !slices.Contains([]string{"allow", "until", "reason"}, key) {
			return invalid("it has an unknown key %.64q: give allow, until and reason", key)
		}
	}
	s := State{Reason: reason, Allow: Level(slices.Index(Levels, data["allow"]))}
	if s.Allow < None {
		return invalid("its allow is %.64q: give none, read, write or all", data["allow"])
	}
	if until, given := data["until"]; given {
		s.Until = new(time.Time)
		if err := s.Until.UnmarshalText([]byte(until)); err != nil { // strictly RFC 3339
			return invalid("its until is %.64q: give a time as 2026-01-02T03:04:05Z", until)
		}
	}
	return s
}

// Level is how much a cluster's owner allows, or a request needs. Each includes those before it.
type Level int

// The levels, as the owner's ConfigMap names them.
const (
	None Level = iota
	Read
	Write
	All
)

// Levels are their names.
var Levels = []string{"none", "read", "write", "all"}

func (l Level) String() string { return Levels[l] }

// MarshalText implements [encoding.TextMarshaler].
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// Connects reports whether a request runs something or opens a connection to it, by any method.
func Connects(d *kube.Description) bool {
	return slices.Contains([]string{"exec", "attach", "portforward", "proxy"}, d.Subresource)
}

// selfReviews ask what the caller itself may do.
var selfReviews = []string{"selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews"}

// Needs returns the level that a request for the Kubernetes API needs.
func Needs(d *kube.Description) Level {
	read := slices.Contains([]string{"get", "list", "watch"}, d.Verb)
	switch {
	case d.Verb == "other", Connects(d), d.Upgrade && d.Verb != "watch" && d.Subresource != "log":
		return All
	case read, d.Verb == "create" && slices.Contains(selfReviews, d.Resource) &&
		slices.Contains([]string{"authorization.k8s.io", "authentication.k8s.io"}, d.Group):
		return Read
	}
	return Write
}

// Guard returns what a request for the agent's own namespace is refused for, which is a label of metrics, and why; or
// nothing. It goes by the path. The owner's ConfigMap stays closed even if the namespace is open.
func (o *Owner) Guard(d *kube.Description) (outcome, why string) {
	if d.Namespace != o.namespace {
		return "", ""
	}
	changes, name := Needs(d) >= Write, o.settings.ConfigMap
	// Without a name, the name is in the body.
	if changes && name != "" && d.Resource == "configmaps" && (d.Name == "" || d.Name == name) {
		return "config_map", fmt.Sprintf("ConfigMap %s/%s, by which the cluster's owner limits access, "+
			"cannot be changed through the agent: change it in the cluster", o.namespace, name)
	}
	if o.settings.OwnNamespace != "open" && (changes || d.Group == "" && d.Resource == "secrets") {
		return "own_namespace", fmt.Sprintf("the agent's own namespace %s is closed to writes, exec and Secrets "+
			"through the agent (access.own_namespace): do that in the cluster", o.namespace)
	}
	return "", ""
}
