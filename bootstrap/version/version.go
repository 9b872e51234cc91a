// Package version says what was built.
package version

import "runtime"

// Set by the linker: -X github.com/pipeops/vm-agent/bootstrap/version.Version=v1.2.3, the others likewise.
var (
	Version   = "dev"
	Commit    = ""
	BuildDate = "" // RFC 3339, of the commit, so that a build can be repeated
)

// Info is what GET /version and --version tell.
type Info struct {
	Version   string `json:"version"`
	Commit    string `json:"commit"`
	BuildDate string `json:"build_date"`
	GoVersion string `json:"go_version"`
	Contract  string `json:"contract"` // version of the HTTP API and of the exchange with the control plane
}

// Get returns the version of the running binary.
func Get() Info {
	return Info{Version: Version, Commit: Commit, BuildDate: BuildDate, GoVersion: runtime.Version(), Contract: "1"}
}
