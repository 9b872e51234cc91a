package kube

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"

	"github.com/pipeops/vm-agent/proxy/answer"
)

// WriteStatus answers r with a metav1.Status, which kubectl prints and client-go understands. Its reason follows from
// code. retryAfter is in seconds; 0 sends none.
//
// Discovery, which kubectl requests first, is answered with a warning, for kubectl does not print its Status, and
// without Retry-After: kubectl would retry each of five requests ten times before its first word. Nor is there one
// beyond the caller's timeout: client-go waits all the same, and then reports its timeout in place of the cause.
func WriteStatus(w http.ResponseWriter, r *http.Request, code int, message string, retryAfter int32) {
	if strings.Contains(r.Header.Get("Accept"), "g=apidiscovery.k8s.io") {
		if warning, err := utilnet.NewWarningHeader(299, "-", message); err == nil {
			w.Header().Add("Warning", warning)
		}
		retryAfter = 0
	}
	timeout, err := time.ParseDuration(r.URL.Query().Get("timeout"))
	if err == nil && timeout <= time.Duration(retryAfter)*time.Second {
		retryAfter = 0
	}
	status := newStatus(code, message)
	if retryAfter > 0 {
		status.Details = &metav1.StatusDetails{RetryAfterSeconds: retryAfter}
		w.Header().Set("Retry-After", strconv.Itoa(int(retryAfter)))
	}
	answer.WriteJSON(w, code, status) // kubectl decodes a Status from no other type
}

func newStatus(code int, message string) metav1.Status {
	reason := metav1.StatusReason(strings.ReplaceAll(http.StatusText(code), " ", "")) // as Kubernetes names its own
	if code == http.StatusRequestTimeout || code == http.StatusGatewayTimeout {
		reason = metav1.StatusReasonTimeout
	}
	return metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure, Message: message, Reason: reason, Code: int32(code),
	}
}

// Ended is the cause with which a request's context ends when the caller may no longer do what it does.
type Ended struct {
	Why  string
	Code int32 // of the Status in a watch's last event; 0: no event, and the caller watches again
}

func (e *Ended) Error() string { return "the agent has ended the request: " + e.Why }

// ErrShutdown is the cause with which a request's context ends when the agent stops before the API server has answered.
var ErrShutdown = errors.New("the agent has stopped before the Kubernetes API server answered: " +
	"check whether the request took effect, and try again")

var (
	errCredential = errors.New("the Kubernetes API server refuses the agent's credential (401 Unauthorized): " +
		"check the agent's ServiceAccount or kubeconfig; the caller's token was accepted")
	errNoMemory = errors.New("the headers of the answer are too large while so many requests are answered: try again")
	errPlugin   = errors.New("does not answer: check it, or use a kubeconfig with another credential") // after its name
)

const largeHeaders = "the headers of the request are too large"

// explain returns the status and the message for an err of sending a request to the API server at host: which hop
// failed, how, and what to do.
func explain(host string, err error) (code int, message string) {
	const server = "the Kubernetes API server at %s"
	code = http.StatusBadGateway
	var timeout net.Error
	var operation *net.OpError // "dial": nothing was sent yet
	var certificate *tls.CertificateVerificationError
	switch text := err.Error(); {
	case errors.Is(err, errNoMemory), errors.Is(err, errCredential):
		return code, text
	case errors.Is(err, errPlugin):
		return http.StatusGatewayTimeout, text
	case strings.Contains(text, "request header list larger"): // net/http has no type for this error
		return http.StatusRequestHeaderFieldsTooLarge, largeHeaders
	case strings.Contains(text, "cannot retry err") || strings.Contains(text, "cannot rewind body"): // nor for these
		return http.StatusServiceUnavailable, fmt.Sprintf(server+" closed the connection before it read the request, "+
			"and the agent keeps no copy of a body as large as this one: send it again", host)
	case errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout():
		code, message = http.StatusGatewayTimeout,
			server+" does not answer the agent: %v: check its health and the network between"
	case (!errors.As(err, &operation) || operation.Op != "dial") && !errors.As(err, &certificate):
		message = server + " broke off before it answered: %v: check whether the request took effect, and its log"
	default:
		message = "the agent cannot reach " + server + ": %v: check that it runs, and the agent's kubeconfig"
	}
	return code, fmt.Sprintf(message, host, err)
}
