package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/retry"
)

// failedCheck is a line of the API server's /readyz.
var failedCheck = regexp.MustCompile(`\[-\][^:\n]*`)

// call sends a request with the header, which may name the caller that it is for, else as the agent. body is JSON, or
// nil. A 2xx answer is decoded into object, unless that is nil; any other answer is an *apierrors.StatusError.
func (c *Client) call(ctx context.Context, header http.Header, method, path string, body io.Reader, object any) error {
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimRight(c.target.String(), "/")+path, body)
	if err != nil {
		return err
	}
	req.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json"}}
	maps.Copy(req.Header, header)
	resp, err := c.RoundTrip(req)
	if err != nil {
		_, message := explain(c.target.Host, err)
		return errors.New(message)
	}
	defer func() {
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // a body read to its end frees its connection
		_ = resp.Body.Close()
	}()
	if resp.StatusCode >= 300 {
		var status metav1.Status
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		if err := json.Unmarshal(body, &status); err != nil || status.Message == "" {
			failed := failedCheck.FindAllString(string(body), -1)
			status.Message = strings.Join(append([]string{resp.Status}, failed...), "; ")
		}
		message := fmt.Sprintf("the Kubernetes API server at %s answers %s %s: %s",
			c.target.Host, method, req.URL.Path, status.Message)
		if resp.StatusCode == http.StatusUnauthorized {
			message = errCredential.Error()
		}
		// Without the answer's reason: with AlreadyExists, IsConflict would be false, and ChangeSecret would not retry.
		return &apierrors.StatusError{ErrStatus: metav1.Status{Code: int32(resp.StatusCode), Message: message}}
	}
	if object == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(object); err != nil {
		return fmt.Errorf("the answer of the Kubernetes API server at %s to %s %s cannot be read: %w",
			c.target.Host, method, req.URL.Path, err)
	}
	return nil
}

// CheckReady returns an error unless the API server says that it is ready, which includes its storage. A credential
// that may not ask for that passes too.
func (c *Client) CheckReady(ctx context.Context) error {
	err := c.call(ctx, nil, http.MethodGet, "/readyz", nil, nil)
	if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// ReadConfigMap returns the data of a ConfigMap, with empty values for what is not text.
func (c *Client) ReadConfigMap(ctx context.Context, namespace, name string) (map[string]string, error) {
	var configMap struct{ Data, BinaryData map[string]string }
	path := "/api/v1/namespaces/" + namespace + "/configmaps/" + name
	err := c.call(ctx, nil, http.MethodGet, path, nil, &configMap)
	data := map[string]string{}
	maps.Copy(data, configMap.Data)
	for key := range configMap.BinaryData {
		data[key] = ""
	}
	return data, err
}

// Review asks the API server whether the caller that the headers of identity name may do what d describes.
func (c *Client) Review(ctx context.Context, identity http.Header, d *Description) (allowed bool, err error) {
	const group = "authorization.k8s.io/v1"
	body, _ := json.Marshal(map[string]any{ // cannot fail: strings only
		"apiVersion": group, "kind": "SelfSubjectAccessReview",
		"spec": map[string]any{"resourceAttributes": map[string]string{
			"verb": d.Verb, "group": d.Group, "resource": d.Resource, "subresource": d.Subresource,
			"namespace": d.Namespace, "name": d.Name,
		}},
	})
	var review struct{ Status struct{ Allowed bool } }
	path := "/apis/" + group + "/selfsubjectaccessreviews"
	err = c.call(ctx, identity, http.MethodPost, path, bytes.NewReader(body), &review)
	return review.Status.Allowed, err
}

// Secret is a Kubernetes Secret.
type Secret struct {
	metav1.PartialObjectMetadata

	Data map[string][]byte `json:"data"`
}

// ReadSecret returns a Secret, an empty one if it does not exist.
func (c *Client) ReadSecret(ctx context.Context, namespace, name string) (*Secret, error) {
	secret := &Secret{}
	secret.APIVersion, secret.Kind, secret.Namespace, secret.Name = "v1", "Secret", namespace, name
	err := c.call(ctx, nil, http.MethodGet, secretsPath(namespace)+"/"+name, nil, secret)
	if secret.Data == nil { // null in the answer
		secret.Data = map[string][]byte{}
	}
	if apierrors.IsNotFound(err) {
		err = nil
	}
	return secret, err
}

func secretsPath(namespace string) string { return "/api/v1/namespaces/" + namespace + "/secrets" }

// Change changes a Secret's data. If it returns an error, nothing is written.
type Change func(data map[string][]byte) error

// ChangeSecret reads a Secret, applies change and writes it. If the Secret was written by another in between, it starts
// again until ctx ends, so that no change is lost.
func (c *Client) ChangeSecret(ctx context.Context, namespace, name string, change Change) error {
	backoff := wait.Backoff{Steps: math.MaxInt, Duration: 25 * time.Millisecond, Jitter: 3}
	return retry.RetryOnConflict(backoff, func() error {
		secret, err := c.ReadSecret(ctx, namespace, name)
		if err == nil {
			err = change(secret.Data)
		}
		if err != nil {
			return err
		}
		method, path := http.MethodPut, secretsPath(namespace)+"/"+name
		if secret.ResourceVersion == "" {
			method, path = http.MethodPost, secretsPath(namespace)
		}
		data, _ := json.Marshal(secret) // cannot fail: it was JSON
		return c.call(ctx, nil, method, path, bytes.NewReader(data), nil)
	})
}

// Summary is what the agent's own credential may read of the cluster. Fields that could not be read are nil, and
// Unavailable says why.
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

// nodePage is how many nodes one request reads, and how many are in memory: their lists of images make them large.
const nodePage = 100

// Summarize reads the API server's version, one object of each resource that is counted, and the nodes page by page.
// But for the nodes, the cost does not depend on the size of the cluster.
func (c *Client) Summarize(ctx context.Context) Summary {
	s := Summary{Unavailable: map[string]string{}}
	var version struct{ GitVersion, Platform string }
	err := c.call(ctx, nil, http.MethodGet, "/version", nil, &version)
	if err == nil {
		s.Version, s.Platform = &version.GitVersion, &version.Platform
	} else {
		s.Unavailable["version"], s.Unavailable["platform"] = err.Error(), err.Error()
	}
	// An API server that answers with an error is reachable.
	_, answered := errors.AsType[*apierrors.StatusError](err)
	s.Reachable = err == nil || answered
	part := func(field string, read func() error) {
		if s.Reachable { // else err is the reason for all
			err = read()
		}
		if err != nil {
			s.Unavailable[field] = err.Error()
		}
	}
	part("namespaces", func() error { return c.count(ctx, "/api/v1/namespaces", &s.Namespaces) })
	part("deployments", func() error { return c.count(ctx, "/apis/apps/v1/deployments", &s.Deployments) })
	part("services", func() error { return c.count(ctx, "/api/v1/services", &s.Services) })
	part("pods", func() error { return c.count(ctx, "/api/v1/pods", &s.Pods) })
	part("nodes", func() error { return c.readNodes(ctx, &s.Nodes) })
	return s
}

// count sets n to the number of objects: it reads the metadata of one, and how many there are beside it.
func (c *Client) count(ctx context.Context, path string, n **int64) error {
	var list metav1.PartialObjectMetadataList
	const metadata = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
	if err := c.call(ctx, http.Header{"Accept": {metadata}}, http.MethodGet, path+"?limit=1", nil, &list); err != nil {
		return err
	}
	total := int64(len(list.Items))
	if list.RemainingItemCount != nil {
		total += *list.RemainingItemCount
	} else if list.Continue != "" {
		return errors.New("the API server does not say how many there are")
	}
	*n = &total
	return nil
}

// readNodes sets sum to the sum of all nodes, which it reads page by page.
func (c *Client) readNodes(ctx context.Context, sum **Nodes) error {
	nodes := &Nodes{Versions: map[string]int64{}}
	for next, more := "", true; more; more = next != "" {
		var list struct {
			Metadata metav1.ListMeta
			Items    []struct {
				Status struct {
					Conditions            []struct{ Type, Status string }
					Capacity, Allocatable map[string]resource.Quantity
					NodeInfo              struct{ KubeletVersion string }
				}
			}
		}
		path := fmt.Sprintf("/api/v1/nodes?limit=%d&continue=%s", nodePage, url.QueryEscape(next))
		if err := c.call(ctx, nil, http.MethodGet, path, nil, &list); err != nil {
			return err
		}
		for i := range list.Items {
			status := &list.Items[i].Status
			nodes.Total++
			nodes.Versions[status.NodeInfo.KubeletVersion]++
			for _, condition := range status.Conditions {
				if condition.Type == "Ready" && condition.Status == "True" {
					nodes.Ready++
				}
			}
			nodes.Capacity.add(status.Capacity)
			nodes.Allocatable.add(status.Allocatable)
		}
		next = list.Metadata.Continue
	}
	*sum = nodes
	return nil
}

func (r *Resources) add(list map[string]resource.Quantity) {
	cpu, memory := list["cpu"], list["memory"]
	r.CPU += cpu.MilliValue()
	r.Memory += memory.Value()
}
