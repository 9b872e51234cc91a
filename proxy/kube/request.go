package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"regexp"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// failedCheck is a line of the API server's /readyz.
var failedCheck = regexp.MustCompile(`\[-\][^:\n]*`)

// call asks the API server with the agent's own credential and hands the body of a 2xx to read; object is what to
// send, if not nil. Lists are asked for without their objects' contents, except for nodes.
func (p *Proxy) call(ctx context.Context, method, path string, object any, read func(io.Reader) error) error {
	var body io.Reader
	if object != nil {
		data, err := json.Marshal(object)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimRight(p.target.String(), "/")+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	if strings.HasSuffix(path, "?limit=1") {
		req.Header.Set("Accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json")
	}
	resp, err := p.lanes.RoundTrip(req)
	if err != nil {
		_, message := explain(p.target.Host, err)
		return errors.New(message)
	}
	defer func() {
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // what is read to its end leaves a connection for the next
		_ = resp.Body.Close()
	}()
	if resp.StatusCode == http.StatusUnauthorized {
		return statusError(resp, errCredential.Error())
	}
	if resp.StatusCode >= 300 {
		var status metav1.Status
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		if err := json.Unmarshal(body, &status); err != nil || status.Message == "" {
			failed := failedCheck.FindAllString(string(body), -1) // of /readyz
			status.Message = strings.Join(append([]string{resp.Status}, failed...), "; ")
		}
		return statusError(resp, fmt.Sprintf("the Kubernetes API server at %s answers %s %s: %s", p.target.Host, method, req.URL.Path, status.Message))
	}
	if err := read(resp.Body); err != nil {
		return fmt.Errorf("the answer of the Kubernetes API server at %s to %s %s cannot be read: %w", p.target.Host, method, req.URL.Path, err)
	}
	return nil
}

// statusError is an answer of the API server that is none of what the agent has asked for. Only its code tells what it
// is: a Secret that exists already has the reason AlreadyExists, and is a conflict for ChangeSecret.
func statusError(resp *http.Response, message string) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{Code: int32(resp.StatusCode), Message: message}}
}

// Secret is a Secret of the agent's own.
type Secret struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Data map[string][]byte `json:"data"`
}

// ReadSecret returns a Secret, an empty one if there is none.
func (p *Proxy) ReadSecret(ctx context.Context, namespace, name string) (*Secret, error) {
	secret := &Secret{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
	}
	path := "/api/v1/namespaces/" + namespace + "/secrets/" + name
	err := p.call(ctx, http.MethodGet, path, nil, func(body io.Reader) error { return json.NewDecoder(body).Decode(secret) })
	if secret.Data == nil {
		secret.Data = map[string][]byte{}
	}
	if apierrors.IsNotFound(err) {
		err = nil
	}
	return secret, err
}

// ChangeSecret reads a Secret, applies change to its data and writes it, unless change returns false. If
// another has written it in between, all of that is done again: no change of anyone is lost.
func (p *Proxy) ChangeSecret(ctx context.Context, namespace, name string, change func(data map[string][]byte) (bool, error)) error {
	for {
		secret, err := p.ReadSecret(ctx, namespace, name)
		if err != nil {
			return err
		}
		if write, err := change(secret.Data); err != nil || !write {
			return err
		}
		method, path := http.MethodPut, "/api/v1/namespaces/"+namespace+"/secrets/"+name
		if secret.ResourceVersion == "" {
			method, path = http.MethodPost, "/api/v1/namespaces/"+namespace+"/secrets"
		}
		err = p.call(ctx, method, path, secret, func(io.Reader) error { return nil })
		if !apierrors.IsConflict(err) {
			return err
		}
		select {
		case <-time.After(rand.N(100 * time.Millisecond)): //nolint:gosec // no secret
		case <-ctx.Done():
			return err
		}
	}
}
