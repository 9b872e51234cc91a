package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Summary is what the agent may read of the cluster. Fields that could not be read are nil, and Unavailable says why.
type Summary struct {
	Reachable   bool              `json:"reachable"`
	Version     *string           `json:"version"`  // of the API server
	Platform    *string           `json:"platform"` // its operating system and architecture
	Nodes       *Nodes            `json:"nodes"`
	Namespaces  *int64            `json:"namespaces"`
	Deployments *int64            `json:"deployments"`
	Services    *int64            `json:"services"`
	Pods        *int64            `json:"pods"`
	Unavailable map[string]string `json:"unavailable,omitempty"` // field: why it is null

	Requests int `json:"-"` // sent to read it
}

// Nodes is the sum of all nodes.
type Nodes struct {
	Total       int              `json:"total"`
	Ready       int              `json:"ready"`    // those whose condition Ready is True
	Versions    map[string]int64 `json:"versions"` // kubelet's version: number of nodes
	Capacity    Resources        `json:"capacity"`
	Allocatable Resources        `json:"allocatable"`
}

// Resources of all nodes together.
type Resources struct {
	CPU    int64 `json:"cpu_millicores"`
	Memory int64 `json:"memory_bytes"`
}

// nodePage is how many nodes one request reads: a thousand nodes cost two requests.
const nodePage = 500

// Summarize reads the API server's version, one object of each resource that is counted, and the nodes page by page.
// But for the nodes, the cost does not depend on the size of the cluster.
func (c *Client) Summarize(ctx context.Context) Summary {
	s := Summary{Unavailable: map[string]string{}}
	get := func(path, accept string, read reader) error {
		s.Requests++
		return c.call(ctx, http.MethodGet, path, accept, nil, read)
	}
	var version struct{ GitVersion, Platform string }
	err := get("/version", acceptObjects, decodeInto(&version))
	if err != nil {
		s.Unavailable["version"], s.Unavailable["platform"] = err.Error(), err.Error()
	} else {
		s.Version, s.Platform = &version.GitVersion, &version.Platform
	}
	// An API server that answers with an error is reachable.
	_, answered := errors.AsType[*apierrors.StatusError](err)
	s.Reachable = err == nil || answered
	if !s.Reachable {
		for _, field := range []string{"nodes", "namespaces", "deployments", "services", "pods"} {
			s.Unavailable[field] = err.Error()
		}
		return s
	}
	for _, resource := range []struct {
		field, path string
		count       **int64
	}{
		{"namespaces", "/api/v1/namespaces", &s.Namespaces},
		{"deployments", "/apis/apps/v1/deployments", &s.Deployments},
		{"services", "/api/v1/services", &s.Services},
		{"pods", "/api/v1/pods", &s.Pods},
	} {
		n, err := count(get, resource.path)
		if err != nil {
			s.Unavailable[resource.field] = err.Error()
			continue
		}
		*resource.count = &n
	}
	if s.Nodes, err = readNodes(get); err != nil {
		s.Nodes, s.Unavailable["nodes"] = nil, err.Error()
	}
	return s
}

// getter reads the answer to a GET.
type getter func(path, accept string, read reader) error

// count reads one object's metadata, and how many objects there are beside it.
func count(get getter, path string) (int64, error) {
	var list metav1.PartialObjectMetadataList
	err := get(path+"?limit=1", acceptMetadata, decodeInto(&list))
	n := int64(len(list.Items))
	if list.RemainingItemCount != nil {
		n += *list.RemainingItemCount
	} else if err == nil && list.Continue != "" {
		err = errors.New("the API server does not say how many there are")
	}
	return n, err
}

// node holds the fields that are read of a node.
type node struct {
	Status struct {
		Conditions  []struct{ Type, Status string }
		Capacity    map[string]resource.Quantity
		Allocatable map[string]resource.Quantity
		NodeInfo    struct{ KubeletVersion string }
	}
}

func readNodes(get getter) (*Nodes, error) {
	nodes := &Nodes{Versions: map[string]int64{}}
	for next := ""; ; {
		var meta metav1.ListMeta
		path := "/api/v1/nodes?limit=" + strconv.Itoa(nodePage) + "&continue=" + url.QueryEscape(next)
		err := get(path, acceptObjects, func(body io.Reader) error { return eachNode(body, &meta, nodes.add) })
		if err != nil || meta.Continue == "" {
			return nodes, err
		}
		next = meta.Continue
	}
}

func (n *Nodes) add(node *node) {
	n.Total++
	n.Versions[node.Status.NodeInfo.KubeletVersion]++
	for _, condition := range node.Status.Conditions {
		if condition.Type == "Ready" && condition.Status == "True" {
			n.Ready++
		}
	}
	n.Capacity.add(node.Status.Capacity)
	n.Allocatable.add(node.Status.Allocatable)
}

func (r *Resources) add(list map[string]resource.Quantity) {
	cpu, memory := list["cpu"], list["memory"]
	r.CPU += cpu.MilliValue()
	r.Memory += memory.Value()
}

// eachNode decodes a list of nodes, with one node in memory at a time.
func eachNode(body io.Reader, meta *metav1.ListMeta, add func(*node)) error {
	decoder := json.NewDecoder(body)
	expect := func(want json.Delim) error {
		got, err := decoder.Token()
		if err == nil && got != want {
			err = fmt.Errorf("found %v, expected %v", got, want)
		}
		return err
	}
	if err := expect('{'); err != nil {
		return err
	}
	for decoder.More() {
		key, err := decoder.Token()
		if err != nil {
			return err
		}
		switch key {
		case "metadata":
			err = decoder.Decode(meta)
		case "items":
			err = expect('[')
			for err == nil && decoder.More() {
				var item node
				if err = decoder.Decode(&item); err == nil {
					add(&item)
				}
			}
			if err == nil {
				err = expect(']')
			}
		default:
			err = decoder.Decode(&json.RawMessage{})
		}
		if err != nil {
			return err
		}
	}
	return expect('}')
}
