package frpc

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Names of the files in the run directory that bootstrap writes.
const (
	ConfigFile = "frpc.toml"  // read by the stock frpc
	LeaseFile  = "lease.json" // read by the proxy
	TokenFile  = "frp.token"  // read by the stock frpc, where the method is oidc
	CertFile   = "tls.crt"    // of a tunnel of type https: the proxy shows it to callers
	KeyFile    = "tls.key"
	RootsFile  = "roots.crt"  // read by the stock frpc: public authorities, where no other is configured
	StuckFile  = "frpc.stuck" // exists while frpc hangs and its container must be restarted
)

// Lease is what the control plane granted for the tunnel, and the configuration of frpc for it.
type Lease struct {
	IssuedAt  time.Time      `json:"issued_at"`
	ExpiresAt time.Time      `json:"expires_at,omitzero"` // by the clock of this host; zero: never
	Frpc      Config         `json:"frpc"`
	Renewal   *FailedRenewal `json:"renewal,omitempty"` // set while bootstrap cannot get the next lease
	Stale     *Stale         `json:"stale,omitempty"`   // set while frpc may run with an earlier frpc.toml

	Certificate, Key []byte `json:"-"` // PEM, for a tunnel of type https: files of their own
	Roots            []byte `json:"-"` // PEM, for RootsFile
}

// FailedRenewal says why there is no next lease.
type FailedRenewal struct {
	FailingSince time.Time `json:"failing_since"`
	Error        string    `json:"error"`
}

// Stale records the credential and configuration that frpc still runs with.
type Stale struct {
	Until time.Time `json:"until,omitzero"` // when its credential expires, by the clock of this host; zero: never
	Frpc  Config    `json:"frpc,omitzero"`  // zero: unknown
}

// Write writes the lease's files into dir, with mode 0600 and each replaced in one step: a reader sees the old file or
// the new one, never a part. It leaves files with the right content alone, and returns the names of the others.
// frpc.toml is written last, so that a reader of it finds the others too.
func (l Lease) Write(dir string) (written []string, err error) {
	toml, err := l.Frpc.TOML()
	if err != nil {
		return nil, err
	}
	state, _ := json.MarshalIndent(l, "", "  ") // fails for none of its types
	var token []byte
	if l.Frpc.AuthMethod == "oidc" {
		token = []byte(l.Frpc.Token.Reveal())
	}
	for _, file := range []struct {
		name string
		data []byte // nil: this lease has none
	}{
		{TokenFile, token},
		{RootsFile, l.Roots},
		{KeyFile, l.Key},
		{CertFile, l.Certificate},
		{LeaseFile, append(state, '\n')},
		{ConfigFile, toml},
	} {
		path := filepath.Join(dir, file.name)
		if file.data == nil && l.Stale == nil { // left by an earlier lease
			_ = os.Remove(path)
		}
		if old, err := os.ReadFile(path); file.data == nil || err == nil && bytes.Equal(old, file.data) {
			continue
		}
		if err := writeFile(path, file.data); err != nil {
			return written, fmt.Errorf("write the run directory: %w: "+
				"check run_dir (PIPEOPS_RUN_DIR), and that it is not full", err)
		}
		written = append(written, file.name)
	}
	return written, nil
}

// RemoveLogin removes the files that frpc would log in with, if they exist.
func RemoveLogin(dir string) error {
	return cmp.Or(os.RemoveAll(filepath.Join(dir, ConfigFile)), os.RemoveAll(filepath.Join(dir, TokenFile)))
}

// ReadLease reads lease.json from dir.
func ReadLease(dir string) (*Lease, error) {
	path := filepath.Join(dir, LeaseFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: bootstrap has not run, or run_dir is not the volume it writes to", err)
	}
	if err != nil {
		return nil, err
	}
	var l Lease
	if err := json.Unmarshal(data, &l); err != nil {
		return nil, fmt.Errorf("%s is not a lease: %w", path, err)
	}
	if l.Frpc.Admin.Port == 0 {
		return nil, fmt.Errorf("%s is not a lease: it does not name frpc's admin port", path)
	}
	return &l, nil
}

// writeFile replaces path in one step, through a temporary file beside it. It also replaces a temporary file left by a
// process that was killed.
func writeFile(path string, data []byte) error {
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	_ = os.Remove(tmp)
	err := CreateFile(tmp, data)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	return err
}

// CreateFile creates a file with mode 0600. It follows no link, and leaves nothing behind if it fails.
func CreateFile(path string, data []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if err = cmp.Or(err, file.Close()); err != nil {
		_ = os.Remove(path)
	}
	return err
}
