package kube

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ErrShutdown is the cause with which a request's context ends when the agent stops before the API server has answered.
var ErrShutdown = errors.New("the agent has stopped before the Kubernetes API server answered: check whether the request took effect, and try again")

// errCredential is a 401 of the API server: it does not accept the agent's own credential.
var errCredential = errors.New("the Kubernetes API server refuses the agent's credential (401 Unauthorized): check the agent's ServiceAccount or kubeconfig; the caller's token was accepted")

// errNoMemory is an answer whose headers do not fit beside those of the other requests.
var errNoMemory = errors.New("the headers of the answer are too large while the agent answers so many other requests: try again")

const largeHeaders = "the headers of the request are too large"

// pluginError is a credential plugin that does not return.
type pluginError struct{ command string }

func (e *pluginError) Error() string {
	return fmt.Sprintf("the kubeconfig's credential plugin %s does not answer: check it, or use a kubeconfig with another credential", e.command)
}

// statusError is an answer of the API server that the agent's own request did not ask for. Only its code says what it
// is: for an existing Secret the API server's reason is AlreadyExists, which ChangeSecret must see as a conflict.
func statusError(resp *http.Response, message string) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{Code: int32(resp.StatusCode), Message: message}}
}

// explain returns the status and the message for an err of sending a request to the API server at host: which hop
// failed, how, and what to do.
func explain(host string, err error) (code int, message string) {
	var timeout net.Error
	var operation *net.OpError // "dial": nothing was sent yet
	var certificate *tls.CertificateVerificationError
	var plugin *pluginError
	switch {
	case errors.Is(err, errNoMemory), errors.Is(err, errCredential):
		return http.StatusBadGateway, err.Error()
	case errors.As(err, &plugin):
		return http.StatusGatewayTimeout, err.Error()
	case strings.Contains(err.Error(), "request header list larger"): // x/net/http2 has no type for it
		return http.StatusRequestHeaderFieldsTooLarge, largeHeaders
	case strings.Contains(err.Error(), "cannot retry err") || strings.Contains(err.Error(), "cannot rewind body"): // nor for these
		return http.StatusServiceUnavailable,
			fmt.Sprintf("the Kubernetes API server at %s closed the connection before it read the request, and the agent keeps no copy of a body as large as this one: send it again", host)
	case errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout():
		return http.StatusGatewayTimeout,
			fmt.Sprintf("the Kubernetes API server at %s does not answer the agent: %v: check its health and the network between", host, err)
	case (!errors.As(err, &operation) || operation.Op != "dial") && !errors.As(err, &certificate):
		return http.StatusBadGateway,
			fmt.Sprintf("the Kubernetes API server at %s broke off before it answered: %v: check whether the request took effect, and its log", host, err)
	default:
		return http.StatusBadGateway,
			fmt.Sprintf("the agent cannot reach the Kubernetes API server at %s: %v: check that it runs, and the agent's kubeconfig", host, err)
	}
}
