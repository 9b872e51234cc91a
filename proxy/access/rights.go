package access

import (
	"fmt"
	"slices"

	"github.com/pipeops/vm-agent/proxy/kube"
)

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

// connects are the subresources that run something or open a connection, by any method.
var connects = []string{"exec", "attach", "portforward", "proxy"}

// Connects reports whether a request runs something or opens a connection to it.
func Connects(d *kube.Description) bool { return slices.Contains(connects, d.Subresource) }

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

// Guard keeps callers out of the agent's own namespace, as far as paths show.
type Guard struct {
	Namespace string
	ConfigMap string // the owner's, which stays closed even if the namespace is open; empty: there is none
	Open      bool   // the namespace is
}

// Refuse returns what a request is refused for, which is a label of metrics, and why; or nothing.
func (g *Guard) Refuse(d *kube.Description) (outcome, why string) {
	if d.Namespace != g.Namespace {
		return "", ""
	}
	changes := Needs(d) >= Write
	// Without a name, the name is in the body.
	if changes && g.ConfigMap != "" && d.Resource == "configmaps" && (d.Name == "" || d.Name == g.ConfigMap) {
		return "config_map", fmt.Sprintf("ConfigMap %s/%s, by which the cluster's owner limits access, "+
			"cannot be changed through the agent: change it in the cluster", g.Namespace, g.ConfigMap)
	}
	if !g.Open && (changes || d.Group == "" && d.Resource == "secrets") {
		return "own_namespace", fmt.Sprintf("the agent's own namespace %s is closed to writes, exec and Secrets "+
			"through the agent (access.own_namespace): do that in the cluster", g.Namespace)
	}
	return "", ""
}
