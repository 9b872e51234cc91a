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
		{"GET", "/api/v1/namespaces/a/pods?limit=1", Description{Verb: "list", Resource: "pods", Namespace: "a"}},
		{"GET", "/api/v1/namespaces/a/pods?watch=1", Description{Verb: "watch", Resource: "pods", Namespace: "a"}},
		{"GET", "/api/v1/namespaces/a/pods?watch", Description{Verb: "watch", Resource: "pods", Namespace: "a"}},
		{"GET", "/api/v1/namespaces/a/pods?w%61tch=1", Description{Verb: "watch", Resource: "pods", Namespace: "a"}},
		{"GET", "/api/v1/namespaces/a/pods?watch=0", Description{Verb: "list", Resource: "pods", Namespace: "a"}},
		{"GET", "/api/v1/namespaces/a/pods/p%0Ax", Description{Verb: "get", Resource: "pods", Namespace: "a", Name: "invalid"}},
		{"GET", "/api/v1/namespaces/a/pods?watch=False", Description{Verb: "list", Resource: "pods", Namespace: "a"}},
		{"GET", "/api/v1/namespaces/a/pods?allowWatchBookmarks=true", Description{Verb: "list", Resource: "pods", Namespace: "a"}},
		{"GET", "/api/v1/watch/namespaces/a/pods", Description{Verb: "watch", Resource: "pods", Namespace: "a"}},
		{"GET", "/api/v1/namespaces/a/pods/p?watch=true", Description{Verb: "get", Resource: "pods", Namespace: "a", Name: "p"}},
		{"GET", "/api/v1/namespaces/a/pods/p/log?follow=true", Description{Verb: "get", Resource: "pods", Namespace: "a", Name: "p", Subresource: "log"}},
		{"HEAD", "/api/v1/namespaces/a", Description{Verb: "get", Resource: "namespaces", Namespace: "a", Name: "a"}},
		{"PUT", "/api/v1/namespaces/a/finalize", Description{Verb: "update", Resource: "namespaces", Namespace: "a", Name: "a", Subresource: "finalize"}},
		{"GET", "/api/v1/namespaces", Description{Verb: "list", Resource: "namespaces"}},
		{"POST", "/apis/apps/v1/namespaces/a/deployments", Description{Verb: "create", Group: "apps", Resource: "deployments", Namespace: "a"}},
		{"PATCH", "/apis/apps/v1/namespaces/a/deployments/d/scale", Description{Verb: "patch", Group: "apps", Resource: "deployments", Namespace: "a", Name: "d", Subresource: "scale"}},
		{"DELETE", "/apis/apps/v1/namespaces/a/deployments", Description{Verb: "deletecollection", Group: "apps", Resource: "deployments", Namespace: "a"}},
		{"DELETE", "/apis/apps/v1/namespaces/a/deployments/d", Description{Verb: "delete", Group: "apps", Resource: "deployments", Namespace: "a", Name: "d"}},
		{"GET", "/apis/apps/v1", Description{Verb: "get"}},
		{"GET", "/version", Description{Verb: "get"}},
		{"GET", "", Description{Verb: "get"}},
		{"BREW", "/api/v1/watch", Description{Verb: "other", Resource: "watch"}},
		{"GET", "/api/v1/watch", Description{Verb: "list", Resource: "watch"}},
		{"GET", "/api/v1/namespaces//a/secrets/s", Description{Verb: "other", Resource: "secrets", Namespace: "a", Name: "s"}},
		{"GET", "/api/v1/namespaces/a/pods//exec", Description{Verb: "other", Resource: "pods", Namespace: "a", Name: "exec"}},
		{"GET", "/api/v1/namespaces/a/services/s/proxy//x", Description{Verb: "get", Resource: "services", Namespace: "a", Name: "s", Subresource: "proxy"}},
		{"GET", "/api/v1/namespaces/a/pods?watch=1&fieldSelector=metadata.name%3Dp", Description{Verb: "watch", Resource: "pods", Namespace: "a", Name: "p"}},
		{"GET", "/api/v1/namespaces/a/pods%2Fp/exec", Description{Verb: "get", Resource: "pods", Namespace: "a", Name: "p", Subresource: "exec"}},
		{"GET", "/apis/Not%20A%20Group/v1/x", Description{Verb: "list", Group: "invalid", Resource: "x"}},
	} {
		if got := Describe(httptest.NewRequest(test.method, Prefix+test.target, nil)); got != test.want {
			t.Errorf("%s %s: got %+v, want %+v", test.method, test.target, got, test.want)
		}
	}
	r := httptest.NewRequest(http.MethodGet, Prefix+"/api/v1/namespaces/a/pods/p/exec?command=rm", nil)
	r.Header.Set("Upgrade", "websocket")
	want := Description{Verb: "get", Resource: "pods", Namespace: "a", Name: "p", Subresource: "exec"}
	if got := Describe(r); got != want {
		t.Errorf("Upgrade without Connection: got %+v, want %+v", got, want)
	}
	r.Header["Connection"] = []string{"keep-alive", "x, upgrade"}
	want.Upgrade = true
	if got := Describe(r); got != want {
		t.Errorf("exec: got %+v, want %+v", got, want)
	}
}
