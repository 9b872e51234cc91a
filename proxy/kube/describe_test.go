package kube

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestRequestsAreDescribedAsInRBAC(t *testing.T) {
	for _, test := range []struct {
		method, target string
		want           Description
	}{
		{"GET", "/api/v1/pods", Description{Verb: "list", Resource: "pods"}},
		{"GET", "/api/v1/namespaces/a/pods?limit=1", Description{Verb: "list", Resource: "pods"}},
		{"GET", "/api/v1/namespaces/a/pods?watch=1", Description{Verb: "watch", Resource: "pods"}},
		{"GET", "/api/v1/namespaces/a/pods?watch", Description{Verb: "watch", Resource: "pods"}},
		{"GET", "/api/v1/namespaces/a/pods?watch=False", Description{Verb: "list", Resource: "pods"}},
		{"GET", "/api/v1/namespaces/a/pods?allowWatchBookmarks=true", Description{Verb: "list", Resource: "pods"}},
		{"GET", "/api/v1/watch/namespaces/a/pods", Description{Verb: "watch", Resource: "pods"}},
		{"GET", "/api/v1/namespaces/a/pods/p?watch=true", Description{Verb: "get", Resource: "pods"}},
		{"GET", "/api/v1/namespaces/a/pods/p/log?follow=true", Description{Verb: "get", Resource: "pods", Subresource: "log"}},
		{"HEAD", "/api/v1/namespaces/a", Description{Verb: "get", Resource: "namespaces"}},
		{"PUT", "/api/v1/namespaces/a/finalize", Description{Verb: "update", Resource: "namespaces", Subresource: "finalize"}},
		{"GET", "/api/v1/namespaces", Description{Verb: "list", Resource: "namespaces"}},
		{"POST", "/apis/apps/v1/namespaces/a/deployments", Description{Verb: "create", Group: "apps", Resource: "deployments"}},
		{"PATCH", "/apis/apps/v1/namespaces/a/deployments/d/scale", Description{Verb: "patch", Group: "apps", Resource: "deployments", Subresource: "scale"}},
		{"DELETE", "/apis/apps/v1/namespaces/a/deployments", Description{Verb: "deletecollection", Group: "apps", Resource: "deployments"}},
		{"DELETE", "/apis/apps/v1/namespaces/a/deployments/d", Description{Verb: "delete", Group: "apps", Resource: "deployments"}},
		{"GET", "/apis/apps/v1", Description{Verb: "get"}},
		{"GET", "/version", Description{Verb: "get"}},
		{"GET", "", Description{Verb: "get"}},
		{"BREW", "/api/v1/watch", Description{Verb: "other"}},
		{"GET", "/api/v1/watch", Description{Verb: "watch"}},
		{"GET", "/api/v1/namespaces//secrets/top-secret", Description{Verb: "get"}},
		{"GET", "/apis/Not%20A%20Group/v1/x", Description{Verb: "list", Group: "invalid", Resource: "x"}},
	} {
		if got := Describe(httptest.NewRequest(test.method, Prefix+test.target, nil)); got != test.want {
			t.Errorf("%s %s: got %+v, want %+v", test.method, test.target, got, test.want)
		}
	}
	r := httptest.NewRequest(http.MethodGet, Prefix+"/api/v1/namespaces/a/pods/p/exec?command=rm", nil)
	r.Header.Set("Upgrade", "websocket")
	if got, want := Describe(r), (Description{Verb: "get", Resource: "pods", Subresource: "exec"}); got != want {
		t.Errorf("Upgrade without Connection: got %+v, want %+v", got, want)
	}
	r.Header["Connection"] = []string{"keep-alive", "x, upgrade"}
	if got, want := Describe(r), (Description{Verb: "connect", Resource: "pods", Subresource: "exec"}); got != want {
		t.Errorf("exec: got %+v, want %+v", got, want)
	}
}
