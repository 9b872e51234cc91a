package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// repo makes a repository with one commit.
func repo(t *testing.T) (root string, run func(args ...string)) {
	t.Helper()
	root = t.TempDir()
	run = func(args ...string) {
		t.Helper()
		args = append([]string{"-c", "user.name=a", "-c", "user.email=a@b.example"}, args...)
		if _, err := git(root, args...); err != nil {
			t.Fatal(err)
		}
	}
	add(t, root, "CHANGELOG.md", "# Changelog\n\n## v0.2.0-rc.1\n\n"+
		"## v0.1.0 (a date)\n\nThe [first](a.md).\n\n### Added\n\n- All.\n\n## v0.0.1\n\n- Less.\n")
	add(t, root, "manifests/base/kustomization.yaml",
		"images:\n  - name: docker.io/pipeops/vm-agent\n    newTag: v0.1.0\n")
	run("init", "--quiet")
	run("add", ".")
	run("commit", "--quiet", "--message", "first")
	return root, run
}

func add(t *testing.T, root, name, content string) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestOnlyACompleteVersionCanBeReleased(t *testing.T) {
	root, run := repo(t)
	for _, c := range []struct {
		version string
		want    []string // in the error, in this order
	}{
		{"v0.1.0", nil},
		{"", []string{`"" is not a version`}},
		{"0.1.0", []string{`"0.1.0" is not a version such as `, "make release VERSION=v0.1.0"}},
		{"v0.1", []string{"is not a version"}},
		{"v0.1.0-3fd4e21+dirty", []string{"is not a version"}},
		{"v01.1.0", []string{"is not a version"}},
		{"v0.3.0", []string{`write a section "## v0.3.0". It has: v0.2.0-rc.1, v0.1.0, v0.0.1`,
			"names the image v0.1.0: replace it by v0.3.0"}},
		{"v0.2.0-rc.1", []string{"CHANGELOG.md says nothing about v0.2.0-rc.1",
			"names the image v0.1.0"}}, // the section is empty
	} {
		wantMistakes(t, check(root, c.version), c.version, c.want...)
	}
	run("config", "status.showUntrackedFiles", "no")
	add(t, root, "main.go", "package main\n")
	wantMistakes(t, check(root, "v0.1.0"), "with a new file", "commit or remove these changes:\n?? main.go")
	add(t, root, ".git/info/exclude", "*.go\n")
	add(t, root, "proxy/debug.go", "package main\n")
	wantMistakes(t, check(root, "v0.1.0"), "with an ignored file", "git ignores these files", "\nproxy/debug.go")
	remove(t, root, "proxy/debug.go")
	add(t, root, "manifests/.gitignore", "*\n") // also itself
	wantMistakes(t, check(root, "v0.1.0"), "with an ignored .gitignore", "\nmanifests/.gitignore")
	remove(t, root, "manifests/.gitignore")
	remove(t, root, ".git/info/exclude")
	run("add", ".")
	run("commit", "--quiet", "--message", "second")
	run("tag", "v0.1.0")
	wantMistakes(t, check(root, "v0.1.0"), "tagged")
	add(t, root, "main.go", "package release\n")
	run("update-index", "--assume-unchanged", "main.go")
	wantMistakes(t, check(root, "v0.1.0"), "with a hidden change", "git does not see changes", "h main.go")
	run("update-index", "--no-assume-unchanged", "main.go")
	run("update-index", "--skip-worktree", "main.go")
	wantMistakes(t, check(root, "v0.1.0"), "in a sparse checkout", "git does not see changes", "S main.go")
	run("update-index", "--no-skip-worktree", "main.go")
	run("commit", "--quiet", "--all", "--message", "third")
	wantMistakes(t, check(root, "v0.1.0"), "with a later commit", "v0.1.0 was released from commit ")
}

func remove(t *testing.T, root, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(root, name)); err != nil {
		t.Fatal(err)
	}
}

func wantMistakes(t *testing.T, err error, what string, want ...string) {
	t.Helper()
	if err == nil {
		if len(want) > 0 {
			t.Errorf("%s: accepted", what)
		}
		return
	}
	rest := err.Error()
	if len(want) == 0 {
		t.Errorf("%s: %s", what, rest)
	}
	for _, words := range want {
		_, after, found := strings.Cut(rest, words)
		if !found {
			t.Errorf("%s: no %q in %s", what, words, err)
		}
		rest = after
	}
}

func TestNotesAreTheSectionWithAbsoluteLinks(t *testing.T) {
	root, _ := repo(t)
	changes, err := section(root, "v0.1.0")
	if err != nil {
		t.Fatal(err)
	}
	if want := "The [first](a.md).\n\n### Added\n\n- All."; changes != want {
		t.Errorf("section: %q, not %q", changes, want)
	}
	changes = "[a](a/b.md#c) [d](https://e.example/f) [g](#h)"
	want := "[a](" + repository + "/blob/v0.1.0/a/b.md#c) [d](https://e.example/f) [g](#h)\n"
	if got := string(notes("v0.1.0", "sha256:1", changes)); !strings.HasSuffix(got, want) {
		t.Errorf("notes: %s", got)
	}
}

func TestOnlyTheFilesOfAReleaseAreReleased(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{
		"install.yaml", "vm-agent-v0.1.0-amd64.cdx.json", "vm-agent-v0.1.0-amd64.tar", "vm-agent-v0.1.0-arm64.cdx.json",
		"vm-agent-v0.1.0-arm64.tar", "vm-agent-v0.1.0-manifests.tar.gz",
	} {
		add(t, dir, name, "")
	}
	wantMistakes(t, complete("v0.1.0", dir), "without the layout",
		"-manifests.tar.gz: a release is made of install.yaml, ", ", vm-agent-v0.1.0-oci.tar")
	add(t, dir, "vm-agent-v0.1.0-oci.tar", "")
	wantMistakes(t, complete("v0.1.0", dir), "whole")
	add(t, dir, "vm-agent-v0.1.0-debug.tar", "")
	wantMistakes(t, write(dir, "v0.1.0", dir), "with a stranger", "holds ", "-debug.tar", ": a release is made of ")
}
