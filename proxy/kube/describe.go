package kube

import (
	"cmp"
	"net/http"
	"slices"
	"strings"
)

// Description says what a request below Prefix asks for, in the terms of RBAC, without objects' names: they may be
// secret, and are too many for labels.
type Description struct {
	Verb        string // get, list, watch, create, update, patch, delete, deletecollection; connect for upgrades
	Group       string // empty for the core group, and for requests without a resource
	Resource    string // plural; empty for discovery, /version and the like
	Subresource string
}

// Describe describes a request as the API server reads it.
// Source: k8s.io/apiserver/pkg/endpoints/request/requestinfo.go.
func Describe(r *http.Request) Description {
	d := Description{Verb: cmp.Or(verbs[r.Method], "other")}
	isUpgrade := func(token string) bool { return strings.EqualFold(token, "upgrade") }
	if r.Header.Get("Upgrade") != "" && slices.ContainsFunc(ListOf(r, "Connection"), isUpgrade) { // as for ReverseProxy
		d.Verb = "connect"
	}
	parts := strings.Split(strings.Trim(strings.TrimPrefix(r.URL.Path, Prefix), "/"), "/")
	switch {
	case slices.Contains(parts, ""):
		return d // not a path of the API server: any segment could be a secret
	case len(parts) >= 3 && parts[0] == "api":
		parts = parts[2:]
	case len(parts) >= 4 && parts[0] == "apis":
		d.Group, parts = name(parts[1]), parts[3:]
	default:
		return d
	}
	watchPath := parts[0] == "watch" // an old form that is still served
	if watchPath {
		parts = parts[1:]
	}
	if len(parts) > 2 && parts[0] == "namespaces" && parts[2] != "status" && parts[2] != "finalize" {
		parts = parts[2:]
	}
	if len(parts) > 0 {
		d.Resource = name(parts[0])
	}
	if len(parts) > 2 {
		d.Subresource = name(parts[2])
	}
	switch named := len(parts) > 1; {
	case d.Verb == "get" && (watchPath || !named && isWatch(r.URL)):
		d.Verb = "watch"
	case d.Verb == "get" && !named:
		d.Verb = "list"
	case d.Verb == "delete" && !named:
		d.Verb = "deletecollection"
	}
	return d
}

// ListOf returns the elements of a header that is a comma-separated list, all its lines together.
func ListOf(r *http.Request, header string) []string {
	elements := strings.Split(strings.Join(r.Header.Values(header), ","), ",")
	for i := range elements {
		elements[i] = strings.TrimSpace(elements[i])
	}
	return elements
}

// name returns s if it can be the name of a group or resource, and else "invalid": callers choose it.
func name(s string) string {
	if len(s) > 253 || strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" {
		return "invalid"
	}
	return s
}

var verbs = map[string]string{
	http.MethodGet: "get", http.MethodHead: "get", http.MethodPost: "create", http.MethodPut: "update",
	http.MethodPatch: "patch", http.MethodDelete: "delete",
}
