package kube

import (
	"cmp"
	"net/http"
	"slices"
	"strings"
	"unicode"

	"k8s.io/apimachinery/pkg/fields"
)

// Description says what a request below Prefix asks for, in the terms of RBAC.
type Description struct {
	Verb        string // get, list, watch, create, update, patch, delete or deletecollection; else other
	Group       string // empty for the core group, and for requests without a resource
	Resource    string // plural; empty for discovery, /version and the like
	Subresource string
	Namespace   string // empty for resources without one, and for requests to all
	Name        string // of the object; empty for requests to a collection
	Upgrade     bool   // to another protocol
}

// Describe describes a request as the API server reads it. Where a segment is empty, the verb is other: a server in
// front of the API server may read such a path in another way.
// Source: k8s.io/apiserver/pkg/endpoints/request/requestinfo.go.
func Describe(r *http.Request) Description {
	path := strings.Trim(strings.TrimPrefix(r.URL.Path, Prefix), "/")
	if !strings.Contains(path, "//") {
		return describe(r, strings.Split(path, "/"))
	}
	d := describe(r, strings.FieldsFunc(path, func(c rune) bool { return c == '/' }))
	if d.Subresource != "proxy" {
		d.Verb = "other"
	}
	return d
}

func describe(r *http.Request, parts []string) Description {
	isUpgrade := func(token string) bool { return strings.EqualFold(token, "upgrade") }
	d := Description{
		Verb:    cmp.Or(verbs[r.Method], "other"),
		Upgrade: r.Header.Get("Upgrade") != "" && slices.ContainsFunc(ListOf(r, "Connection"), isUpgrade), // as ReverseProxy
	}
	switch {
	case len(parts) >= 3 && parts[0] == "api":
		parts = parts[2:]
	case len(parts) >= 4 && parts[0] == "apis":
		d.Group, parts = label(parts[1]), parts[3:]
	default:
		return d
	}
	watchPath := parts[0] == "watch" && len(parts) > 1 // an old form that is still served
	if watchPath {
		parts = parts[1:]
	}
	if len(parts) > 1 && parts[0] == "namespaces" {
		d.Namespace = name(parts[1])
		if len(parts) > 2 && parts[2] != "status" && parts[2] != "finalize" {
			parts = parts[2:]
		}
	}
	d.Resource = label(parts[0])
	if len(parts) > 1 {
		d.Name = name(parts[1])
	}
	if len(parts) > 2 {
		d.Subresource = label(parts[2])
	}
	switch named := len(parts) > 1; {
	case d.Verb == "get" && (watchPath || !named && isWatch(r.URL)):
		d.Verb = "watch"
	case d.Verb == "get" && !named:
		d.Verb = "list"
	case d.Verb == "delete" && !named:
		d.Verb = "deletecollection"
	}
	if d.Name == "" && (d.Verb == "watch" || d.Verb == "list") && strings.Contains(r.URL.RawQuery, "metadata.name") {
		// RBAC takes this for the name, so that a right to one object includes to watch it.
		selector, err := fields.ParseSelector(r.URL.Query().Get("fieldSelector"))
		if exact := ""; err == nil {
			exact, _ = selector.RequiresExactMatch("metadata.name")
			d.Name = name(exact)
		}
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

// label returns s if it can be the name of a group or resource, and else "invalid": callers choose it, and it goes into
// the log.
func label(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" {
		return "invalid"
	}
	return name(s)
}

// name returns s if it can be the name of an object.
func name(s string) string {
	if len(s) > 253 || strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) }) {
		return "invalid"
	}
	return s
}

var verbs = map[string]string{
	http.MethodGet: "get", http.MethodHead: "get", http.MethodPost: "create", http.MethodPut: "update",
	http.MethodPatch: "patch", http.MethodDelete: "delete",
}
