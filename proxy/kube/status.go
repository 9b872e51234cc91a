package kube

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
)

// WriteStatus answers r with a metav1.Status, which kubectl prints and client-go understands. Its reason follows from
// code. retryAfter is in seconds, none if 0.
//
// kubectl asks for discovery before anything else and shows no Status that answers it, but it shows warnings;
// and as it asks five times, with ten retries each, a Retry-After there would keep its user waiting for the
// first word. So discovery is answered with a warning and without Retry-After.
func WriteStatus(w http.ResponseWriter, r *http.Request, code int, message string, retryAfter int32) {
	reason := metav1.StatusReason(strings.ReplaceAll(http.StatusText(code), " ", "")) // as Kubernetes names its own
	if code == http.StatusRequestTimeout || code == http.StatusGatewayTimeout {
		reason = metav1.StatusReasonTimeout
	}
	status := metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure, Message: message, Reason: reason, Code: int32(code),
	}
	if strings.Contains(r.Header.Get("Accept"), "g=apidiscovery.k8s.io") {
		if warning, err := utilnet.NewWarningHeader(299, "-", message); err == nil {
			w.Header().Add("Warning", warning)
		}
	} else if retryAfter > 0 {
		status.Details = &metav1.StatusDetails{RetryAfterSeconds: retryAfter}
		w.Header().Set("Retry-After", strconv.Itoa(int(retryAfter)))
	}
	WriteJSON(w, code, "application/json", status) // kubectl decodes a Status from no other type
}

// WriteJSON writes an answer of the agent's own.
func WriteJSON(w http.ResponseWriter, code int, contentType string, body any) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false) // people read it, browsers do not
	_ = encoder.Encode(body)
}

// errCredential is an API server that does not accept the agent's own credential.
var errCredential = errors.New("the Kubernetes API server refuses the agent's credential (401 Unauthorized): check the agent's ServiceAccount or kubeconfig; the caller's token was accepted")

const largeHeaders = "the headers of the request are too large"

// errNoMemory is an answer whose headers are too large beside those of the other requests.
var errNoMemory = errors.New("the headers of the answer are too large beside the other requests that the agent answers now: try again")

// explain says which hop failed on the way to the API server, what happened and what to do.
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
	case strings.Contains(err.Error(), "request header list larger"): // as HTTP/2 counts it
		return http.StatusRequestHeaderFieldsTooLarge, largeHeaders
	case strings.Contains(err.Error(), "cannot retry err") || strings.Contains(err.Error(), "cannot rewind body"):
		return http.StatusServiceUnavailable,
			fmt.Sprintf("the Kubernetes API server at %s has closed the connection before it looked at the request, whose body is too large to be kept for another try: send it again", host)
	case errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout():
		return http.StatusGatewayTimeout,
			fmt.Sprintf("the Kubernetes API server at %s does not answer the agent: %v: check its health and the network between", host, err)
	case (!errors.As(err, &operation) || operation.Op != "dial") && !errors.As(err, &certificate):
		return http.StatusBadGateway,
			fmt.Sprintf("the Kubernetes API server at %s broke off before it answered: %v: look whether what you asked for was done, and at its log", host, err)
	default:
		return http.StatusBadGateway,
			fmt.Sprintf("the agent cannot reach the Kubernetes API server at %s: %v: check that it runs, and the agent's kubeconfig", host, err)
	}
}
