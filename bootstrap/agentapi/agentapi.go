// Package agentapi holds what bootstrap and the proxy of one agent must agree on: paths, names and JSON types. The
// answer of VersionPath is a version.Info.
package agentapi

// Paths of the proxy's HTTP API that bootstrap and frpc use.
const (
	HealthPath       = "/health"
	ReadyPath        = "/ready"
	VersionPath      = "/version"
	ActivityPath     = "/activity" // operations listener only
	KubernetesPrefix = "/api/k8s"

	// TunnelHealthPath is where frpc asks whether to keep the tunnel registered. It names the one check that decides
	// this, so that another check of readiness never withdraws every tunnel. frpc asks in plain HTTP, also where the
	// tunnel is of type https.
	TunnelHealthPath = ReadyPath + "?only=" + CheckShutdown
)

// Names of the checks of ReadyPath. Its query may select some of them with only=NAME, and leave some out with
// exclude=NAME, each as often as needed.
const (
	CheckKubernetes = "kubernetes"
	CheckTunnel     = "tunnel"
	CheckShutdown   = "shutdown"
)

// RunnersSecret is the name of the Secret, in the agent's namespace, that holds the registry of runners.
const RunnersSecret = "pipeops-agent-runners"

// Ready is the answer of ReadyPath.
type Ready struct {
	Checks map[string]Check `json:"checks"`
	Status string           `json:"status"` // ready or not ready
}

// Check is the outcome of one check of readiness.
type Check struct {
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"` // for callers that may know it
}

// Activity is the answer of ActivityPath.
type Activity struct {
	RequestsInFlight int64 `json:"requests_in_flight"` // on the tunnel listener, streams included
}
