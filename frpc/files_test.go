package frpc

import (
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

// names returns the names of the files in dir.
func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		names = append(names, f.Name())
	}
	return names
}

// TestFullRunDirectoryKeepsTheOldFiles: a reader finds the old file whole, and nothing is left of the new one.
func TestFullRunDirectoryKeepsTheOldFiles(t *testing.T) {
	dir, l := t.TempDir(), lease()
	if _, err := l.Write(dir); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(dir, LeaseFile))
	if err != nil {
		t.Fatal(err)
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 10, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	l.Frpc.ServerAddr = "another.example"
	written, err := l.Write(dir)
	if restored := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); restored != nil {
		t.Fatal(restored)
	}
	if err == nil || written != nil {
		t.Fatalf("wrote %v, %v", written, err)
	}
	if got := names(t, dir); !slices.Equal(got, []string{ConfigFile, LeaseFile}) {
		t.Errorf("the directory holds %v", got)
	}
	if after, err := os.ReadFile(filepath.Join(dir, LeaseFile)); err != nil || string(after) != string(before) {
		t.Errorf("the old lease is now %q, %v", after, err)
	}
}

// TestWriteAfterAKillSucceeds: a bootstrap that was killed left temporary files, one of them a link elsewhere.
func TestWriteAfterAKillSucceeds(t *testing.T) {
	dir, elsewhere := t.TempDir(), filepath.Join(t.TempDir(), "elsewhere")
	if err := os.WriteFile(filepath.Join(dir, "."+LeaseFile+".new"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, filepath.Join(dir, "."+ConfigFile+".new")); err != nil {
		t.Fatal(err)
	}
	if _, err := lease().Write(dir); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); !slices.Equal(got, []string{ConfigFile, LeaseFile}) {
		t.Errorf("the directory holds %v", got)
	}
	if _, err := os.Lstat(elsewhere); err == nil {
		t.Error("the credential was written where a link leads")
	}
}

// TestFilesOfAnEarlierLeaseAreRemoved: unless frpc may still use them.
func TestFilesOfAnEarlierLeaseAreRemoved(t *testing.T) {
	dir, l := t.TempDir(), lease()
	l.Frpc.AuthMethod, l.Frpc.TokenFile = "oidc", filepath.Join(dir, TokenFile)
	l.Certificate, l.Key, l.Roots = []byte("certificate"), []byte("key"), []byte("roots")
	all := []string{TokenFile, ConfigFile, LeaseFile, RootsFile, CertFile, KeyFile}
	slices.Sort(all)
	next := lease()
	next.Stale = &Stale{}
	for _, test := range []struct {
		lease Lease
		want  []string
	}{{l, all}, {next, all}, {lease(), []string{ConfigFile, LeaseFile}}} {
		if _, err := test.lease.Write(dir); err != nil {
			t.Fatal(err)
		}
		if got := names(t, dir); !slices.Equal(got, test.want) {
			t.Errorf("the directory holds %v, want %v", got, test.want)
		}
	}
}

// TestOtherJSONIsNoLease: it would send the agent to port 0.
func TestOtherJSONIsNoLease(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, LeaseFile), []byte(`{"frpc":{}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := ReadLease(dir); err == nil {
		t.Errorf("read %+v", l)
	}
}
