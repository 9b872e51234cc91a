package integration

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/pipeops/vm-agent/tests/harness/agent"
)

// rawClient returns a client that changes nothing: it neither decompresses answers nor adds headers of its own.
func rawClient(t *testing.T, config *rest.Config) *http.Client {
	t.Helper()
	config = rest.CopyConfig(config)
	config.DisableCompression = true
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// TestResponsesAreForwardedUnchanged compares answers byte for byte, with the headers that clients depend on. It runs
// alone, because lists show the version of the last change to anything.
func TestResponsesAreForwardedUnchanged(t *testing.T) {
	w := connected(t)
	ns := w.namespace()
	for i := range 20 { // large enough that the API server compresses the list
		object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("c-%d", i)},
			Data: map[string]string{"a": strings.Repeat("x", 16<<10)}}
		if _, err := api.Client.CoreV1().ConfigMaps(ns).Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	caller := agent.Caller(w.cp, agentID, agentToken)
	direct, tunnel := rawClient(t, api.agent), rawClient(t, caller)
	list := "/api/v1/namespaces/" + ns + "/configmaps"
	for _, test := range []struct {
		name, path string
		header     http.Header
		want       string // in the headers
	}{
		{"JSON", list, nil, "application/json"},
		{"protobuf", list, http.Header{"Accept": {"application/vnd.kubernetes.protobuf"}}, "application/vnd.kubernetes.protobuf"},
		{"table", list, http.Header{"Accept": {"application/json;as=Table;v=v1;g=meta.k8s.io"}}, "application/json"},
		{"YAML", list, http.Header{"Accept": {"application/yaml"}}, "application/yaml"},
		{"gzip", list, http.Header{"Accept-Encoding": {"gzip"}}, "gzip"},
		{"not acceptable", list, http.Header{"Accept": {"image/png"}}, "application/json"},
		{"aggregated discovery", "/apis", http.Header{"Accept": {"application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList," +
			"application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"}}, "apidiscovery"},
		{"OpenAPI v3", "/openapi/v3/apis/apps/v1", nil, "application/json"},
		{"OpenAPI v2, protobuf", "/openapi/v2", http.Header{"Accept": {"application/com.github.proto-openapi.spec.v2@v1.0+protobuf"}}, "protobuf"},
		{"warning", "/api/v1/componentstatuses", nil, "v1 ComponentStatus is deprecated"},
		{"not found", "/api/v1/namespaces/" + ns + "/configmaps/missing", nil, "application/json"},
		{"no such path", "/nothing/here", nil, "text/plain"},
		{"a slash too many", list + "/", nil, ""},
		{"two slashes", "/api//v1/namespaces", nil, ""},
		{"limit", list + "?limit=1&fieldSelector=metadata.name%3Dc-3", nil, "application/json"},
		{"bad query", list + "?limit=x;y", nil, "application/json"},
	} {
		t.Run(test.name, func(t *testing.T) {
			type seen struct {
				Status string
				Header map[string][]string
				Body   string
			}
			var got [2]seen
			for i, from := range []struct {
				client *http.Client
				root   string
			}{{direct, api.agent.Host}, {tunnel, caller.Host}} {
				resp, body := get(t, from.client, from.root+test.path, test.header.Clone())
				got[i] = seen{resp.Status, map[string][]string{}, body}
				for _, name := range []string{
					"Content-Type", "Content-Encoding", "Vary", "Warning", "Cache-Control", "Etag", "Location", "Retry-After",
					"X-Kubernetes-Pf-Flowschema-Uid",
				} {
					got[i].Header[name] = resp.Header.Values(name)
				}
			}
			if test.name == "warning" { // the body changes with every call
				got[0].Body, got[1].Body = "", ""
			}
			if test.name == "table" { // a second may pass between the two
				for i := range got {
					got[i].Body = regexp.MustCompile(`"\d+s"`).ReplaceAllString(got[i].Body, `"age"`)
				}
			}
			if diff := cmp.Diff(got[0], got[1]); diff != "" {
				t.Errorf("(-direct +tunnel):\n%.3000s", diff)
			}
			if !strings.Contains(fmt.Sprint(got[0].Header), test.want) {
				t.Errorf("the answer does not show %q: %v", test.want, got[0].Header)
			}
		})
	}
}

// TestProtobufClientListsAndWatches works as controllers do: client-go with protobuf, lists in chunks, and a watch.
func TestProtobufClientListsAndWatches(t *testing.T) {
	t.Parallel()
	w := connected(t)
	ns := w.namespace()
	config := agent.Caller(w.cp, agentID, agentToken)
	config.ContentType = "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	configMaps := client.CoreV1().ConfigMaps(ns)
	watch, err := configMaps.Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	for i := range 7 {
		object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("c-%d", i)},
			BinaryData: map[string][]byte{"a": {0, 0xff}}}
		if _, err := configMaps.Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if event := <-watch.ResultChan(); event.Type != "ADDED" || event.Object.(*corev1.ConfigMap).Name != object.Name {
			t.Fatalf("the watch shows %+v", event)
		}
	}
	var names []string
	options := metav1.ListOptions{Limit: 3}
	for {
		page, err := configMaps.List(t.Context(), options)
		if err != nil {
			t.Fatal(err)
		}
		if len(page.Items) > 3 {
			t.Errorf("a page of %d", len(page.Items))
		}
		for i := range page.Items {
			names = append(names, page.Items[i].Name)
		}
		if options.Continue = page.Continue; options.Continue == "" {
			break
		}
	}
	if want := []string{"c-0", "c-1", "c-2", "c-3", "c-4", "c-5", "c-6"}; !cmp.Equal(names, want) {
		t.Errorf("listed %v, want %v", names, want)
	}
}
