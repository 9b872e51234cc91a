//go:build images

package manifests

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	provenance "github.com/in-toto/attestation/go/predicates/provenance/v1"
	intoto "github.com/in-toto/attestation/go/v1"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/pipeops/vm-agent/bootstrap/config"
	"github.com/pipeops/vm-agent/tests/harness"
)

// releaseFiles are the files of `make release`, which `make verify-images` has called.
type releaseFiles struct {
	dir, version string
	digest       string // of the image
}

func openRelease(t *testing.T) releaseFiles {
	t.Helper()
	r := releaseFiles{dir: filepath.Join(harness.Root(t), ".build", "release")}
	agent := deployments(t, build(t, filepath.Join(installation(t), "base")))[0].Spec.Template.Spec.Containers[0].Image
	_, r.version, _ = strings.Cut(agent, ":")
	var index struct{ Manifests []struct{ Digest string } }
	decode(t, untar(t, r.read(t, "vm-agent-"+r.version+"-oci.tar"))["index.json"], &index)
	r.digest = index.Manifests[0].Digest
	return r
}

func (r releaseFiles) read(t *testing.T, name string) []byte {
	t.Helper()
	return read(t, filepath.Join(r.dir, name))
}

// TestReleaseIsWhole compares the files with the checksums and the provenance.
func TestReleaseIsWhole(t *testing.T) {
	r := openRelease(t)
	check := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	check.Dir = r.dir
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	sums := map[string]string{}
	for line := range strings.Lines(string(r.read(t, "SHA256SUMS"))) {
		sum, name, _ := strings.Cut(strings.TrimSpace(line), "  ")
		sums[name] = sum
	}
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if sums[entry.Name()] == "" && entry.Name() != "SHA256SUMS" {
			t.Errorf("no checksum of %s", entry.Name())
		}
	}

	var statement intoto.Statement
	if err := protojson.Unmarshal(r.read(t, "provenance.json"), &statement); err != nil {
		t.Fatal(err)
	}
	if err := statement.Validate(); err != nil {
		t.Error(err)
	}
	predicate, err := protojson.Marshal(statement.GetPredicate())
	var slsa provenance.Provenance
	if err == nil {
		err = protojson.Unmarshal(predicate, &slsa)
	}
	if err == nil {
		err = slsa.Validate()
	}
	if err != nil || statement.GetPredicateType() != "https://slsa.dev/provenance/v1" {
		t.Errorf("%s: %v", statement.GetPredicateType(), err)
	}
	delete(sums, "provenance.json")
	sums["docker.io/pipeops/vm-agent"] = strings.TrimPrefix(r.digest, "sha256:")
	subjects := map[string]string{}
	for _, s := range statement.GetSubject() {
		subjects[s.GetName()] = s.GetDigest()["sha256"]
	}
	if diff := cmp.Diff(sums, subjects); diff != "" {
		t.Errorf("subjects of the provenance (-checksums +provenance)\n%s", diff)
	}
	head, err := exec.Command("git", "rev-parse", "HEAD").Output()
	if from := slsa.GetBuildDefinition().GetResolvedDependencies(); err != nil || len(from) != 1 ||
		from[0].GetDigest()["gitCommit"] != strings.TrimSpace(string(head)) {
		t.Errorf("built from %v, not %s, %v", from, head, err)
	}

	notes := string(r.read(t, "release-notes.md"))
	_, changes, _ := strings.Cut(string(read(t, filepath.Join(harness.Root(t), "CHANGELOG.md"))), "\n## "+r.version)
	changes, _, _ = strings.Cut(changes, "\n## ")
	if lines := strings.Count(changes, "\n- "); lines < 10 || strings.Count(notes, "\n- ") != lines ||
		!strings.Contains(notes, r.digest) {
		t.Errorf("the notes lack the digest, or the %d lines of their section:\n%s", lines, notes)
	}
	if links := regexp.MustCompile(`\]\((?:[^h#]|h[^t])[^)]*\)`).FindAllString(notes, -1); links != nil {
		t.Errorf("links that lead nowhere outside of the repository: %v", links)
	}
}

// TestReleaseImageIsThatOfTheArchives checks every blob of the OCI layout, and that it holds the same files for the
// same architectures as the archives for one architecture.
func TestReleaseImageIsThatOfTheArchives(t *testing.T) {
	r := openRelease(t)
	layout := untar(t, r.read(t, "vm-agent-"+r.version+"-oci.tar"))
	blob := func(digest string) []byte { return layout["blobs/"+strings.Replace(digest, ":", "/", 1)] }
	for name := range layout {
		want, isBlob := strings.CutPrefix(name, "blobs/sha256/")
		if sum := sha256.Sum256(layout[name]); isBlob && hex.EncodeToString(sum[:]) != want {
			t.Errorf("%s has the digest %x", name, sum)
		}
	}
	type image struct {
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	var index struct {
		Manifests []struct {
			Digest   string
			Platform struct{ OS, Architecture string }
		}
	}
	decode(t, blob(r.digest), &index)
	var platforms []string
	for _, m := range index.Manifests {
		platforms = append(platforms, m.Platform.OS+"/"+m.Platform.Architecture)
		var manifest struct{ Config struct{ Digest string } }
		decode(t, blob(m.Digest), &manifest)
		var got, want image
		decode(t, blob(manifest.Config.Digest), &got)
		archive := untar(t, r.read(t, "vm-agent-"+r.version+"-"+m.Platform.Architecture+".tar"))
		var docker []struct{ Config string }
		decode(t, archive["manifest.json"], &docker)
		decode(t, archive[docker[0].Config], &want)
		if diff := cmp.Diff(want.RootFS, got.RootFS); diff != "" || len(got.RootFS.DiffIDs) == 0 {
			t.Errorf("%s (-archive +layout)\n%s", m.Platform.Architecture, diff)
		}
	}
	slices.Sort(platforms)
	if diff := cmp.Diff([]string{"linux/amd64", "linux/arm64"}, platforms); diff != "" {
		t.Error(diff)
	}
}

// TestReleaseInstallsWithoutATree uses install.yaml and the tarball as somebody does who has nothing else.
func TestReleaseInstallsWithoutATree(t *testing.T) {
	r := openRelease(t)
	file := string(r.read(t, "install.yaml"))
	for _, word := range []string{"YOUR-AGENT-ID", "YOUR-AGENT-TOKEN"} {
		if n := strings.Count(file, word); n != 2 { // the comment names it too
			t.Errorf("%s: %d times", word, n)
		}
	}
	if _, err := config.Load("", map[string]string{
		"PIPEOPS_AGENT_ID": "YOUR-AGENT-ID", "PIPEOPS_AGENT_TOKEN": "YOUR-AGENT-TOKEN",
	}); err == nil || !strings.Contains(err.Error(), "YOUR-AGENT-ID") {
		t.Errorf("the agent starts although nobody has edited the file: %v", err)
	}
	file = strings.NewReplacer("YOUR-AGENT-ID", "agent-001", "YOUR-AGENT-TOKEN", "your-agent-token").Replace(file)
	apply(t, file)
	if got := deployments(t, file)[0].Spec.Template.Spec.Containers[0].Image; !strings.HasSuffix(got, "@"+r.digest) {
		t.Errorf("the pod runs %s, and the image is %s", got, r.digest)
	}

	dir := t.TempDir()
	if out, err := exec.Command("tar", "--extract", "--gzip", "--directory", dir,
		"--file", filepath.Join(r.dir, "vm-agent-"+r.version+"-manifests.tar.gz")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	tree := filepath.Join(dir, "vm-agent-"+r.version)
	overlay := func(name, tree string) string {
		at := filepath.Join(dir, name)
		write(t, filepath.Join(at, "kustomization.yaml"), strings.ReplaceAll("resources: [TREE/manifests/base]\n"+
			"components: [TREE/manifests/components/namespace, TREE/manifests/components/high-availability]\n", "TREE", tree))
		return build(t, at)
	}
	root, err := filepath.EvalSymlinks(harness.Root(t))
	if err != nil {
		t.Fatal(err)
	}
	back, err := filepath.Rel(filepath.Join(dir, "theirs"), root)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(overlay("theirs", back), overlay("mine", "../"+filepath.Base(tree))); diff != "" {
		t.Errorf("an overlay on the tarball (-repository +tarball)\n%s", diff)
	}
	for _, path := range []string{"LICENSE", "CHANGELOG.md", "bootstrap/README.md", "manifests/docker/compose.yaml"} {
		if _, err := os.Stat(filepath.Join(tree, path)); err != nil {
			t.Error(err)
		}
	}
}
