// Command release is the part of `make release` that is not packing: it checks that a version can be released, and
// writes what describes the files of a release.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

const (
	repository = "https://github.com/pipeops/vm-agent"
	image      = "docker.io/pipeops/vm-agent"

	installFile    = "install.yaml"
	notesFile      = "release-notes.md"
	provenanceFile = "provenance.json"
	sumsFile       = "SHA256SUMS"
)

func main() {
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 3 && args[0] == "check":
		err = check(args[1], args[2])
	case len(args) == 4 && args[0] == "write":
		err = write(args[1], args[2], args[3])
	default:
		err = errors.New("usage: release check ROOT VERSION, or release write ROOT VERSION DIRECTORY")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// semver is a version that can also be the tag of an image, so it has no build metadata.
var semver = regexp.MustCompile(`^v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?$`)

// sources are the directories that a release is built from.
var sources = []string{"frpc", "bootstrap", "proxy", "manifests", "tests"}

// unwatched matches the files in the output of `git ls-files -v` whose changes `git status` does not show.
var unwatched = regexp.MustCompile(`(?m)^([a-z]|S) .*`)

// check returns every reason why the commit at root cannot be released as the version.
func check(root, version string) error {
	const base = "manifests/base/kustomization.yaml"
	data, err := os.ReadFile(filepath.Join(root, base))
	if err != nil {
		return err
	}
	next := regexp.MustCompile(regexp.QuoteMeta(image) + `\n\s+newTag: (\S+)`).FindSubmatch(data)
	if next == nil {
		return fmt.Errorf("%s names no tag of %s", base, image)
	}
	if !semver.MatchString(version) {
		return fmt.Errorf("%q is not a version such as v0.2.0 or v0.2.0-rc.1: the next is make release VERSION=%s",
			version, next[1])
	}
	var mistakes []error
	mistake := func(format string, args ...any) { mistakes = append(mistakes, fmt.Errorf(format, args...)) }
	if _, err := section(root, version); err != nil {
		mistakes = append(mistakes, err)
	}
	if string(next[1]) != version {
		mistake("%s names the image %s: replace it by %s wherever `git grep -n vm-agent:v` and "+
			"`git grep -n ref=v` show it, and in newTag", base, next[1], version)
	}
	for _, c := range []struct {
		what string
		args []string
	}{
		{"a release is built from a commit: commit or remove these changes",
			[]string{"status", "--porcelain", "--untracked-files=all"}},
		{"git ignores these files, and the build may read them: remove them, or release from a new clone",
			append([]string{"ls-files", "--others", "--ignored", "--exclude-standard", "--"}, sources...)},
	} {
		files, err := git(root, c.args...)
		if err != nil {
			return err
		}
		if files != "" {
			mistake("%s:\n%s", c.what, files)
		}
	}
	tracked, err := git(root, "ls-files", "-v")
	if err != nil {
		return err
	}
	if hidden := unwatched.FindAllString(tracked, -1); hidden != nil {
		mistake("git does not see changes of these files: git update-index --no-assume-unchanged, --no-skip-worktree:\n%s",
			strings.Join(hidden, "\n"))
	}
	head, err := git(root, "rev-parse", "HEAD")
	if err != nil {
		return err
	}
	if tagged, err := git(root, "rev-parse", "--verify", "--quiet", "refs/tags/"+version+"^{commit}"); err == nil &&
		tagged != head {
		mistake("%s was released from commit %.12s, and this is %.12s: open the next version, as CONTRIBUTING.md says",
			version, tagged, head)
	}
	return errors.Join(mistakes...)
}

func git(root string, args ...string) (string, error) {
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Stderr = root, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("git %s: %w", strings.Join(args, " "), err)
	}
	return strings.TrimRight(string(out), "\n"), err
}

// section returns what CHANGELOG.md says about the version.
func section(root, version string) (string, error) {
	data, err := os.ReadFile(filepath.Join(root, "CHANGELOG.md"))
	if err != nil {
		return "", err
	}
	var have []string
	for _, s := range strings.Split("\n"+string(data), "\n## ")[1:] {
		heading, body, _ := strings.Cut(s, "\n")
		name, _, _ := strings.Cut(heading, " ")
		if body = strings.TrimSpace(body); name == version && body != "" {
			return body, nil
		}
		have = append(have, name)
	}
	return "", fmt.Errorf("CHANGELOG.md says nothing about %s: write a section \"## %[1]s\". It has: %s",
		version, strings.Join(have, ", "))
}

// write completes the directory of a release, which holds the images and the rendered manifests.
func write(root, version, dir string) error {
	if err := complete(version, dir); err != nil {
		return err
	}
	commit, err := git(root, "rev-parse", "HEAD")
	if err != nil {
		return err
	}
	digest, err := imageDigest(filepath.Join(dir, "vm-agent-"+version+"-oci.tar"))
	if err != nil {
		return err
	}
	rendering, err := os.ReadFile(filepath.Join(dir, installFile))
	if err != nil {
		return err
	}
	changes, err := section(root, version)
	if err != nil {
		return err
	}
	for _, file := range []struct {
		name    string
		content func() ([]byte, error)
	}{
		{installFile, func() ([]byte, error) { return install(version, commit, digest, rendering) }},
		{notesFile, func() ([]byte, error) { return notes(version, digest, changes), nil }},
		{provenanceFile, func() ([]byte, error) { return provenance(version, commit, digest, dir) }},
		{sumsFile, func() ([]byte, error) { return sums(dir) }}, // last: it covers the others
	} {
		content, err := file.content()
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, file.name), content, 0o644)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", file.name, err)
		}
	}
	return nil
}

// complete returns an error unless the directory holds what write needs, and nothing else that would be released.
func complete(version, dir string) error {
	want := []string{installFile}
	for _, name := range []string{
		"amd64.cdx.json", "amd64.tar", "arm64.cdx.json", "arm64.tar", "manifests.tar.gz", "oci.tar",
	} {
		want = append(want, "vm-agent-"+version+"-"+name)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var have []string
	for _, entry := range entries {
		have = append(have, entry.Name())
	}
	if !slices.Equal(have, want) {
		return fmt.Errorf("%s holds %s: a release is made of %s", dir, strings.Join(have, ", "), strings.Join(want, ", "))
	}
	return nil
}

// imageDigest returns the digest of the only image in an OCI layout: that of all architectures together.
func imageDigest(archive string) (string, error) {
	file, err := os.Open(archive)
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	for r := tar.NewReader(file); ; {
		header, err := r.Next()
		if err != nil {
			return "", fmt.Errorf("%s: index.json: %w", archive, err)
		}
		if header.Name != "index.json" {
			continue
		}
		var index struct{ Manifests []struct{ Digest string } }
		if err := json.NewDecoder(r).Decode(&index); err != nil {
			return "", fmt.Errorf("%s: index.json: %w", archive, err)
		}
		if len(index.Manifests) != 1 {
			return "", fmt.Errorf("%s has %d images", archive, len(index.Manifests))
		}
		return index.Manifests[0].Digest, nil
	}
}

// install returns the rendering with the image pinned by its digest, and with what its user must know above it.
func install(version, commit, digest string, rendering []byte) ([]byte, error) {
	name := []byte(image + ":" + version + "\n")
	if bytes.Count(rendering, name) != 2 {
		return nil, fmt.Errorf("the manifests do not run %s twice", name)
	}
	rendering = bytes.ReplaceAll(rendering, name, []byte(image+":"+version+"@"+digest+"\n"))
	return append(fmt.Appendf(nil, `# PipeOps VM agent %[1]s, from commit %[2]s.
#
# Replace these words, then apply the file with kubectl apply -f install.yaml:
#
#   YOUR-AGENT-ID      the id that the control plane gave this agent
#   YOUR-AGENT-TOKEN   its token. The file then holds a secret
#
# Other settings go into the ConfigMap. After a change there: kubectl -n pipeops-system rollout restart
# deployment/pipeops-agent. For images in a registry of your own, replace docker.io/pipeops and docker.io/fatedier; the
# digest stays the same. On nodes without a registry, remove the digest: @sha256:...
#
# Callers may read, without Secrets. More rights, a frps of your own and all else are in the manifests:
# %[3]s/blob/%[1]s/manifests/README.md
`, version, commit, repository), rendering...), nil
}

// relative matches the target of a Markdown link that is neither a URL nor an anchor.
var relative = regexp.MustCompile(`\]\(([^):#]+)(#[^)]*)?\)`)

// notes returns the changes for a page outside of the repository.
func notes(version, digest, changes string) []byte {
	at := repository + "/blob/" + version + "/"
	return fmt.Appendf(nil, "Image: `%s:%s@%s`, for linux/amd64 and linux/arm64.\n\n"+
		"[Install](%smanifests/README.md). [What is promised, and how to upgrade](%[4]smanifests/VERSIONS.md). "+
		"`sha256sum -c %s` checks the files.\n\n%s\n",
		image, version, digest, at, sumsFile, relative.ReplaceAllString(changes, "]("+at+"$1$2)"))
}

// provenance returns an in-toto statement with the predicate of SLSA v1: what the files are, and what they were built
// from. It has no time and no id of the build, which are optional, so that it is the same each time.
func provenance(version, commit, digest, dir string) ([]byte, error) {
	type digests map[string]string
	type artifact struct {
		Name   string  `json:"name,omitempty"`
		URI    string  `json:"uri,omitempty"`
		Digest digests `json:"digest"`
	}
	subjects := []artifact{{Name: image, Digest: digests{"sha256": strings.TrimPrefix(digest, "sha256:")}}}
	err := eachFile(dir, func(name, sum string) {
		subjects = append(subjects, artifact{Name: name, Digest: digests{"sha256": sum}})
	})
	if err != nil {
		return nil, err
	}
	procedure := repository + "/blob/" + version + "/CONTRIBUTING.md#releases"
	tools := map[string]string{"go": runtime.Version()}
	for _, tool := range []string{"buildah", "podman"} { // the first that is installed has built the images
		if out, err := exec.Command(tool, "--version").Output(); err == nil {
			tools[tool] = strings.TrimSpace(string(out))
			break
		}
	}
	content, err := json.MarshalIndent(map[string]any{
		"_type":         "https://in-toto.io/Statement/v1",
		"subject":       subjects,
		"predicateType": "https://slsa.dev/provenance/v1",
		"predicate": map[string]any{
			"buildDefinition": map[string]any{
				"buildType":          procedure,
				"externalParameters": map[string]string{"version": version},
				"resolvedDependencies": []artifact{
					{URI: "git+" + repository + "@" + commit, Digest: digests{"gitCommit": commit}},
				},
			},
			"runDetails": map[string]any{
				"builder": map[string]any{"id": procedure, "version": tools},
			},
		},
	}, "", "  ")
	return append(content, '\n'), err
}

// sums returns the checksums in the format of sha256sum.
func sums(dir string) (list []byte, err error) {
	err = eachFile(dir, func(name, sum string) { list = fmt.Appendf(list, "%s  %s\n", sum, name) })
	return list, err
}

// eachFile calls do with the name and the SHA-256 of each file, by name.
func eachFile(dir string, do func(name, sum string)) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		sum, err := fileSum(filepath.Join(dir, entry.Name()))
		if err != nil {
			return err
		}
		do(entry.Name(), sum)
	}
	return nil
}

func fileSum(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", hash.Sum(nil)), nil
}
