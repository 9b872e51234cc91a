package kube

import (
	"net/http"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"

	"github.com/pipeops/vm-agent/proxy/answer"
)

// WriteStatus answers r with a metav1.Status, which kubectl prints and client-go understands. Its reason follows from
// code. retryAfter is in seconds; 0 sends none.
//
// kubectl first requests discovery. It prints no Status that answers discovery, but it prints warnings; and it sends
// five such requests with ten retries each, so that a Retry-After would delay its first word. Discovery is therefore
// answered with a warning and without Retry-After.
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
	answer.WriteJSON(w, code, "application/json", status) // kubectl decodes a Status from no other type
}
