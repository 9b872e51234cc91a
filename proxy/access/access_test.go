package access

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/proxy/kube"
)

func request(headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, kube.Prefix+"/version", nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	return r
}

func TestAgentForwardsNoImpersonation(t *testing.T) {
	if c, _, err := Identify(request("Authorization", "Bearer x"), Agent, "pipeops:"); err != nil || c.Headers != nil {
		t.Errorf("got %v, %v", c, err)
	}
	for _, name := range []string{"impersonate-user", "IMPERSONATE-GROUP", "Impersonate-Uid", "Impersonate-Extra-x"} {
		if _, code, err := Identify(request(name, "a"), Agent, "pipeops:"); err == nil || code != http.StatusForbidden {
			t.Errorf("%s: %d, %v", name, code, err)
		}
	}
}

func TestNamedCallers(t *testing.T) {
	r := request("impersonate-user", "alice", "Impersonate-Group", "devs", "Impersonate-Group", "system:masters")
	want := http.Header{
		"Impersonate-User":  {"p-alice"},
		"Impersonate-Group": {"p-devs", "p-system:masters", "pipeops:tunnel"},
	}
	c, _, err := Identify(r, Named, "p-")
	if err != nil || !reflect.DeepEqual(c.Headers, want) {
		t.Errorf("got %v, %v, want %v", c.Headers, err, want)
	}
	other, _, _ := Identify(request("Impersonate-User", "alice"), Named, "p-")
	if other.ID() == c.ID() || other.Share != c.Share {
		t.Error("one user with other groups has the same rights, or another share")
	}
	long := strings.Repeat("a", 256)
	_, _, err = Identify(request("Impersonate-User", long, "Impersonate-Group", "ütf-8 name"), Named, "p-")
	if err != nil {
		t.Error(err)
	}
	for _, headers := range [][]string{
		{},
		{"Impersonate-Group", "a"},
		{"Impersonate-User", ""},
		{"Impersonate-User", "a", "Impersonate-User", "b"},
		{"Impersonate-User", "a", "Impersonate-User", "a"},
		{"Impersonate-User", long + "a"},
		{"Impersonate-User", "a\x7f"},
		{"Impersonate-User", "a\u200b"}, // zero width
		{"Impersonate-User", "a\u202e"}, // right to left
		{"Impersonate-User", "a\xff"},
		{"Impersonate-User", "a", "Impersonate-Group", ""},
		{"Impersonate-User", "a", "Impersonate-Group", "b\t"},
		{"Impersonate-User", "a", "Impersonate-Uid", "1"},
		{"Impersonate-User", "a", "Impersonate-Extra-Scopes", "x"},
		{"Impersonate-User", "a", "Impersonate-", "x"},
		{"Impersonate-User", "a", "Connection", "keep-alive, impersonate-user"},
		{"Impersonate-User", "a", "Connection", "Impersonate-Group"},
		{"Impersonate-User", "a", "Connection", "authorization"},
	} {
		if c, code, err := Identify(request(headers...), Named, "p-"); err == nil || code != http.StatusBadRequest {
			t.Errorf("%q: %v, %d, %v", headers, c.Headers, code, err)
		}
	}
}

// jwt returns a token whose signature nobody has made.
func jwt(claims string) string {
	return "e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".x"
}

func TestOwnCredentials(t *testing.T) {
	protocol := kube.TokenProtocol + base64.RawURLEncoding.EncodeToString([]byte("in-a-protocol"))
	for _, test := range []struct {
		headers []string
		want    http.Header
	}{
		{[]string{"Authorization", "Bearer x.y"}, http.Header{"Authorization": {"Bearer x.y"}}},
		{[]string{"Authorization", "bearer x"}, http.Header{"Authorization": {"Bearer x"}}},
		{
			[]string{"Authorization", "Bearer x", "Impersonate-User", "a", "Impersonate-Uid", "1", kube.GateHeader, "Bearer t"},
			http.Header{"Authorization": {"Bearer x"}, "Impersonate-User": {"a"}, "Impersonate-Uid": {"1"}},
		},
		{
			[]string{"Upgrade", "WebSocket", "Sec-Websocket-Protocol", "v5.channel.k8s.io, " + protocol},
			http.Header{"Authorization": {"Bearer in-a-protocol"}},
		},
	} {
		c, _, err := Identify(request(test.headers...), Own, "p-")
		if err != nil || !reflect.DeepEqual(c.Headers, test.want) {
			t.Errorf("%q: got %v, %v", test.headers, c.Headers, err)
		}
	}
	for _, headers := range [][]string{
		{},
		{"Authorization", ""},
		{"Authorization", "Bearer"},
		{"Authorization", "Bearer "},
		{"Authorization", "Bearer  x"}, // for the API server the token is empty, and the caller anonymous
		{"Authorization", "Bearer x y"},
		{"Authorization", "Basic eDp5"},
		{"Authorization", "Bearer x", "Authorization", "Bearer y"},
		{"Authorization", "Bearer x", "Upgrade", "websocket", "Sec-Websocket-Protocol", protocol},
		{"Upgrade", "websocket", "Sec-Websocket-Protocol", protocol + "," + protocol},
		{"Upgrade", "websocket", "Sec-Websocket-Protocol", kube.TokenProtocol},
		{"Upgrade", "websocket", "Sec-Websocket-Protocol", kube.TokenProtocol + "YQ=="},
		{"Upgrade", "websocket", "Sec-Websocket-Protocol", strings.ToUpper(protocol)},
		{"Sec-Websocket-Protocol", protocol}, // is read of a WebSocket only
		{"Upgrade", "SPDY/3.1", "Sec-Websocket-Protocol", protocol},
	} {
		if c, code, err := Identify(request(headers...), Own, "p-"); err == nil || code != http.StatusUnauthorized {
			t.Errorf("%q: %v, %d, %v", headers, c.Headers, code, err)
		}
	}
	for _, name := range []string{"authorization", kube.GateHeader, "Impersonate-User"} {
		_, code, err := Identify(request("Authorization", "Bearer x", "Connection", name), Own, "p-")
		if err == nil || code != http.StatusBadRequest {
			t.Errorf("Connection: %s: %d, %v", name, code, err)
		}
	}
}

func TestWhatATokenSaysOfItself(t *testing.T) {
	for _, test := range []struct {
		token, user string
		expired     bool
	}{
		{jwt(`{"sub":"alice","exp":1}`), "alice", true},
		{jwt(fmt.Sprintf(`{"sub":"bob","exp":%d}`, time.Now().Add(time.Hour).Unix())), "bob", false},
		{jwt(`{}`), "", false},
		{"opaque", "", false},
		{"a.%%%.c", "", false},
		{jwt(`{"exp":"soon"}`), "", false},
	} {
		c, _, err := Identify(request("Authorization", "Bearer "+test.token), Own, "p-")
		if err != nil || c.User != test.user || c.Expired() != test.expired {
			t.Errorf("%s: user %q, expired %v, %v", test.token, c.User, c.Expired(), err)
		}
	}
}

func TestLevels(t *testing.T) {
	const ns = "/api/v1/namespaces/a"
	for _, test := range []struct {
		method, target string
		upgrade        bool
		want           Level
	}{
		{"GET", "/version", false, Read},
		{"HEAD", ns + "/pods/p", false, Read},
		{"GET", ns + "/pods?watch=1", false, Read},
		{"GET", ns + "/pods?watch=1", true, Read},
		{"GET", ns + "/pods/p/log?follow=1", false, Read},
		{"POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", false, Read},
		{"POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", false, Read},
		{"POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", false, Read},
		{"POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", false, Write},
		{"POST", "/apis/example.com/v1/selfsubjectreviews", false, Write},
		{"POST", ns + "/pods?dryRun=All", false, Write},
		{"PUT", ns + "/pods/p/status", false, Write},
		{"PATCH", ns + "/pods/p", false, Write},
		{"DELETE", ns + "/pods", false, Write},
		{"POST", "/anything", false, Write},
		{"GET", ns + "/pods/p/exec", false, All},
		{"POST", ns + "/pods/p/attach", false, All},
		{"POST", ns + "/pods/p/portforward", false, All},
		{"GET", ns + "/pods/p/portforward", true, All},
		{"GET", ns + "/services/s/proxy/x", false, All},
		{"HEAD", "/apis/example.com/v1/namespaces/a/things/t/proxy", false, All},
		{"GET", "/apis/subresources.kubevirt.io/v1/namespaces/a/virtualmachineinstances/v/vnc", true, All},
		{"GET", ns + "/pods//p/exec", false, All},
		{"OPTIONS", ns + "/pods", false, All},
	} {
		r := httptest.NewRequest(test.method, kube.Prefix+test.target, nil)
		if test.upgrade {
			r.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}}
		}
		d := kube.Describe(r)
		if got := Needs(&d); got != test.want {
			t.Errorf("%s %s: %s, want %s", test.method, test.target, got, test.want)
		}
	}
}

func TestOwnNamespaceIsClosed(t *testing.T) {
	const ns = "/api/v1/namespaces/agent"
	for _, test := range []struct{ method, target, closed, open string }{
		{"GET", ns + "/pods", "", ""},
		{"GET", ns + "/pods/p/log", "", ""},
		{"GET", ns, "", ""},
		{"GET", ns + "/configmaps/owner", "", ""},
		{"GET", ns + "/configmaps?watch=1", "", ""},
		{"GET", ns + "/secrets", "own_namespace", ""},
		{"GET", ns + "/secrets/s", "own_namespace", ""},
		{"GET", ns + "/secrets?watch=1", "own_namespace", ""},
		{"POST", ns + "/pods", "own_namespace", ""},
		{"DELETE", ns, "own_namespace", ""},
		{"PUT", ns + "/finalize", "own_namespace", ""},
		{"PATCH", "/apis/apps/v1/namespaces/agent/deployments/d", "own_namespace", ""},
		{"GET", ns + "/pods/p/exec", "own_namespace", ""},
		{"GET", ns + "/services/s/proxy/", "own_namespace", ""},
		{"POST", ns + "/configmaps", "config_map", "config_map"},
		{"DELETE", ns + "/configmaps", "config_map", "config_map"},
		{"PATCH", ns + "/configmaps/owner", "config_map", "config_map"},
		{"PUT", ns + "/configmaps/other", "own_namespace", ""},
		{"POST", "/api/v1/namespaces//agent/configmaps", "config_map", "config_map"},
		{"DELETE", "/api/v1/namespaces/agent%2Fconfigmaps/owner", "config_map", "config_map"},
		{"PUT", "/api/v1/////namespaces/agent/configmaps/owner", "config_map", "config_map"},
		{"GET", "/api//////v1/namespaces/agent/secrets/s", "own_namespace", ""},
		{"GET", "/api/v1/secrets", "", ""}, // a path does not show it
		{"DELETE", "/api/v1/namespaces/other/secrets/s", "", ""},
	} {
		d := kube.Describe(httptest.NewRequest(test.method, kube.Prefix+test.target, nil))
		owner := Owner{namespace: "agent", settings: config.Access{ConfigMap: "owner", OwnNamespace: "closed"}}
		closed, why := owner.Guard(&d)
		owner.settings.OwnNamespace = "open"
		open, _ := owner.Guard(&d)
		if closed != test.closed || open != test.open || (why != "") != (closed != "") {
			t.Errorf("%s %s: closed %q, open %q (%s)", test.method, test.target, closed, open, why)
		}
	}
}

// TestOwner: only a valid ConfigMap allows anything, and only until its end.
func TestOwner(t *testing.T) {
	answer, code := "", http.StatusOK
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/namespaces/ns/configmaps/owner" {
			t.Errorf("reads %s", r.URL)
		}
		w.WriteHeader(code)
		_, _ = w.Write([]byte(answer))
	}))
	defer api.Close()
	client, err := kube.NewClient(&rest.Config{Host: api.URL}, func(*http.Request, float64) {})
	if err != nil {
		t.Fatal(err)
	}
	log := &strings.Builder{}
	o := NewOwner(client, "ns", config.Access{ConfigMap: "owner"}, slog.New(slog.NewTextHandler(log, nil)))
	if got := o.State(); got.Allow != None {
		t.Errorf("before the first reading: %+v", got)
	}
	future, past := time.Now().Add(time.Hour).Format(time.RFC3339), time.Now().Add(-time.Second).Format(time.RFC3339)
	for _, test := range []struct {
		code int
		data string
		want Level
	}{
		{200, `{"allow":"all"}`, All},
		{503, ``, All},
		{429, ``, All},
		{403, ``, None},
		{200, `{"allow":"read","reason":"an \"audit\"","until":"` + future + `"}`, Read},
		{500, ``, Read},
		{404, ``, None},
		{500, ``, None},
		{200, `{"allow":"write"}`, Write},
		{200, `{"allow":"all","until":"` + past + `"}`, None},
		{200, `{"allow":"none"}`, None},
		{200, `{"allow":"All"}`, None},
		{200, `{"allow":""}`, None},
		{200, `{"allow":"all","ends":"` + future + `"}`, None},
		{200, `{"allow":"all","until":"tomorrow"}`, None},
		{200, `{"allow":"all","until":""}`, None},
		{200, `{"allow":"write"}`, Write},
		{200, `{"allow":"all"},"binaryData":{"until":"YQ=="}`, None},
		{200, `{}`, None},
		{200, `{"allow":"write"}`, Write},
		{401, ``, None},
	} {
		code, answer = test.code, `{"data":`+test.data+`}`
		o.Follow(t.Context())
		got := o.State()
		if got.Allow != test.want {
			t.Errorf("%d %s: %+v, want %s", test.code, test.data, got, test.want)
		}
		for level := None; level <= All; level++ {
			why := o.Refuse(level)
			if (why == "") != (level <= test.want) || why != "" &&
				(!strings.Contains(why, "ConfigMap ns/owner") || !strings.Contains(why, got.Detail)) {
				t.Errorf("%d %s: %s: %q", test.code, test.data, level, why)
			}
		}
		if why := o.Refuse(All); got.Reason != "" && !strings.Contains(why, `reason: "an \"audit\""`) {
			t.Errorf("no reason: %s", why)
		}
	}
	api.Close()
	o.last.Store(&State{Allow: Read, Until: new(time.Now().Add(time.Hour))})
	if o.Follow(t.Context()); o.State().Allow != Read {
		t.Error("an API server that is away changes what is allowed")
	}
	o.last.Store(&State{Allow: Read, Until: new(time.Now())})
	if o.Follow(t.Context()); o.State().Allow != None {
		t.Error("an API server that is away keeps what has ended")
	}
	if n := strings.Count(log.String(), "has changed"); n < 8 {
		t.Errorf("logged %d changes: %s", n, log)
	}
	if all := NewOwner(client, "ns", config.Access{}, slog.Default()); all.Refuse(All) != "" {
		t.Error("without a ConfigMap something is refused")
	}
}

// TestOwnersReasonIsCut: to 500 bytes, for every refused request repeats it.
func TestOwnersReasonIsCut(t *testing.T) {
	for size, want := range map[int]int{500: 500, 501: 500} {
		if s := parse(map[string]string{"allow": "read", "reason": strings.Repeat("x", size)}); len(s.Reason) != want {
			t.Errorf("of %d bytes, %d are quoted", size, len(s.Reason))
		}
	}
}
