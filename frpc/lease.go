package frpc

import (
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
)

// Lease is what the agent got for its tunnel, and all that frpc was told.
type Lease struct {
	IssuedAt    time.Time `json:"issued_at"`
	ExpiresAt   time.Time `json:"expires_at,omitzero"` // zero: the lease has no end
	Permissions []string  `json:"permissions,omitempty"`
	Frpc        Config    `json:"frpc"`
}

// Write puts frpc.toml and lease.json into dir, each with mode 0600 and replaced in one step: a reader sees
// the old file or the new one, never a part. frpc.toml comes last, so that who sees it finds the lease too.
func (l Lease) Write(dir string) error {
	toml, err := l.Frpc.TOML()
	if err != nil {
		return err
	}
	lease, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", LeaseFile, err)
	}
	if err := writeFile(filepath.Join(dir, LeaseFile), append(lease, '\n')); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, ConfigFile), toml)
}

// ReadLease reads lease.json from dir.
func ReadLease(dir string) (*Lease, error) {
	path := filepath.Join(dir, LeaseFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s does not exist: bootstrap has not run, or run_dir is not the volume it writes to", path)
	}
	if err != nil {
		return nil, err
	}
	var l Lease
	if err := json.Unmarshal(data, &l); err != nil {
		return nil, fmt.Errorf("%s is not a lease: %w", path, err)
	}
	return &l, nil
}

// writeFile replaces path by way of a temporary file beside it. os.CreateTemp makes that with mode 0600.
func writeFile(path string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
	}
	return err
}
