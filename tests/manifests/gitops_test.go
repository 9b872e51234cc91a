package manifests

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/pipeops/vm-agent/tests/harness"
)

// gitops is the overlay that Argo CD and Flux take as it is.
const gitops = "overlays/gitops"

// kinds are the custom resources that the examples of gitops use: files of Go modules, pinned by their checksums.
var kinds = []struct{ module, sum, file string }{
	{"github.com/external-secrets/external-secrets@v1.3.2", "h1:u2J8RjlHIeF0oZCqtl92adI/uZWUwOesJIDkfql6LqQ=",
		"config/crds/bases/external-secrets.io_externalsecrets.yaml"},
	{"github.com/bitnami-labs/sealed-secrets@v0.40.0", "h1:rvCP35JL8ZV5LNA2SrwNR6iLyoM3ulrSFWN0lBtYEYI=",
		"helm/sealed-secrets/crds/bitnami.com_sealedsecrets.yaml"},
	{"github.com/fluxcd/kustomize-controller@v1.7.3", "h1:SzNnGn/4ObAPEHHleM5U7y/AKxKXph3Vj6ZhteeXw8M=",
		"config/crd/bases/kustomize.toolkit.fluxcd.io_kustomizations.yaml"},
	{"github.com/fluxcd/source-controller@v1.8.5", "h1:3zKSTGc2FPoZcQ5BjnyOrwdHDWeYqst3uAoZ+c0DG3c=",
		"config/crd/bases/source.toolkit.fluxcd.io_gitrepositories.yaml"},
	{"github.com/argoproj/argo-cd/v3@v3.5.7", "h1:Xm1BF+I5OgDKUG3SDK49vn2/Y5AMyaNVko+/JT08gj0=",
		"manifests/crds/application-crd.yaml"},
}

// withKinds defines kinds, until the test ends.
func withKinds(t *testing.T) {
	t.Helper()
	for _, k := range kinds {
		cmd := exec.Command("go", "mod", "download", "-json", k.module)
		cmd.Dir = t.TempDir() // in no module
		out, err := cmd.Output()
		var module struct{ Dir, Sum string }
		if err == nil {
			err = json.Unmarshal(out, &module)
		}
		if err != nil || module.Sum != k.sum {
			t.Fatalf("%s: %v: %s", k.module, err, out)
		}
		file := filepath.Join(module.Dir, k.file)
		// Created, not applied: some are larger than an annotation may be, and have fields that an old Kubernetes lacks.
		mustKubectl(t, "", "create", "--validate=ignore", "-f", file)
		t.Cleanup(func() { mustKubectl(t, "", "delete", "-f", file) })
		harness.Eventually(t, 30*time.Second, func() error { // wait fails where there are no conditions yet
			_, err := kubectl(t, "", "wait", "--for", "condition=Established", "-f", file)
			return err
		})
	}
}

// TestGitOpsExamplesAreValid creates the objects of each example, which the API server validates by the schemas of
// their operators. Each operator makes the Secret that the Deployment mounts.
func TestGitOpsExamplesAreValid(t *testing.T) {
	withKinds(t)
	dir := filepath.Join(installation(t), gitops)
	file := filepath.Join(dir, "kustomization.yaml")
	kustomization := string(read(t, file))
	for _, example := range []string{"external-secret.yaml", "sealed-secret.yaml", "sops-secret.yaml"} {
		write(t, file, strings.Replace(kustomization, "- external-secret.yaml", "- "+example, 1))
		rendering := build(t, dir)
		if example == "sops-secret.yaml" { // Flux decrypts it before it applies it
			rendering = regexp.MustCompile(`(?s)\nsops:\n.*?(\n---|$)`).ReplaceAllString(rendering, "$1")
			rendering = regexp.MustCompile(`ENC\[.*\]`).ReplaceAllString(rendering, "dG9rZW4=")
		}
		mustKubectl(t, rendering, "apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")

		var secret struct {
			Kind     string
			Metadata metav1.ObjectMeta
			Data     map[string]string
			Spec     struct {
				Target        metav1.ObjectMeta
				Data          []struct{ SecretKey string }
				EncryptedData map[string]string
				Template      struct{ Metadata metav1.ObjectMeta }
			}
		}
		docs := documents(rendering)
		n := slices.IndexFunc(docs, func(doc string) bool {
			return regexp.MustCompile(`(?m)^kind: (ExternalSecret|SealedSecret|Secret)$`).MatchString(doc)
		})
		if err := yaml.Unmarshal([]byte(docs[n]), &secret); err != nil {
			t.Fatal(err)
		}
		names := map[string]string{"ExternalSecret": secret.Spec.Target.Name,
			"SealedSecret": secret.Spec.Template.Metadata.Name, "Secret": secret.Metadata.Name}
		hasToken := secret.Data["token"] != "" || secret.Spec.EncryptedData["token"] != "" ||
			slices.ContainsFunc(secret.Spec.Data, func(d struct{ SecretKey string }) bool { return d.SecretKey == "token" })
		if names[secret.Kind] != "pipeops-agent" || secret.Metadata.Namespace != "pipeops-system" || !hasToken {
			t.Errorf("%s makes another Secret than the Deployment mounts: %+v", example, secret)
		}
	}
	for ns, example := range map[string]string{"argocd": "argocd.yaml", "flux-system": "flux.yaml"} {
		apply(t, `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "`+ns+`"}}`)
		mustKubectl(t, "", "apply", "--server-side", "--dry-run=server", "--validate=strict",
			"-f", filepath.Join(source, gitops, example))
	}
}

// TestPruningLeavesWhatRollbackNeeds checks that no generated object may be pruned whose name changes with its content:
// the pods of the previous rollout still use it.
func TestPruningLeavesWhatRollbackNeeds(t *testing.T) {
	dir := filepath.Join(installation(t), gitops)
	file := filepath.Join(dir, "kustomization.yaml")
	// The CA, as the comment at the end of the file says.
	kustomization, example, found := strings.Cut(string(read(t, file)), "# secretGenerator:\n")
	if !found {
		t.Fatal("the file shows no secretGenerator")
	}
	write(t, file, kustomization+"secretGenerator:\n"+strings.ReplaceAll(example, "#   ", "  "))
	hashed := regexp.MustCompile(`^pipeops-agent(-tls)?-[a-z0-9]{10}$`)
	var names []string
	for _, doc := range documents(build(t, dir)) {
		var object metav1.PartialObjectMetadata
		if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
			t.Fatal(err)
		}
		if !hashed.MatchString(object.Name) {
			continue
		}
		names = append(names, object.Kind)
		want := map[string]string{"argocd.argoproj.io/compare-options": "IgnoreExtraneous",
			"argocd.argoproj.io/sync-options": "Prune=false", "kustomize.toolkit.fluxcd.io/prune": "disabled"}
		if diff := cmp.Diff(want, object.Annotations); diff != "" {
			t.Errorf("%s %s (-want +got)\n%s", object.Kind, object.Name, diff)
		}
	}
	if diff := cmp.Diff([]string{"ConfigMap", "Secret"}, slices.Sorted(slices.Values(names))); diff != "" {
		t.Errorf("generated objects (-want +got)\n%s", diff)
	}
}

// TestObjectsAreAppliedInOrder checks that each rendering names an object before what needs it: kubectl, Argo CD and
// Flux apply the Namespace first, then the ServiceAccount, RBAC, the settings, and the Deployment.
func TestObjectsAreAppliedInOrder(t *testing.T) {
	order := []string{"Namespace", "ServiceAccount", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding",
		"ConfigMap", "Secret", "Deployment"}
	for path, rendering := range variants(t) {
		var got []string
		for _, doc := range documents(rendering) {
			var meta metav1.TypeMeta
			if err := yaml.Unmarshal([]byte(doc), &meta); err != nil {
				t.Fatal(err)
			}
			if slices.Contains(order, meta.Kind) {
				got = append(got, meta.Kind)
			}
		}
		if !slices.IsSortedFunc(got, func(a, b string) int { return slices.Index(order, a) - slices.Index(order, b) }) {
			t.Errorf("%s: %v", path, got)
		}
	}
}

// TestBaseWorksFromGit renders an overlay that names the base and the components by the URL of a repository and a tag,
// and one that does so by paths: they are the same.
func TestBaseWorksFromGit(t *testing.T) {
	installed := installation(t)
	repository := t.TempDir()
	if err := os.CopyFS(filepath.Join(repository, "manifests"), os.DirFS(installed)); err != nil {
		t.Fatal(err)
	}
	git(t, repository, "init", "--quiet")
	git(t, repository, "add", ".")
	git(t, repository, "commit", "--quiet", "--message", "a release")
	git(t, repository, "tag", "v0.1.0")
	git(t, repository, "rm", "-r", "--quiet", "manifests") // the tag decides
	git(t, repository, "commit", "--quiet", "--message", "later")

	render := func(from func(path string) string) string {
		t.Helper()
		dir := filepath.Join(installed, "consumers", "cluster")
		overlay := "namespace: pipeops-system\nresources:\n- " + from("base") + "\ncomponents:\n"
		for _, component := range []string{"namespace", "access", "guard", "high-availability", "network-policy", "runners"} {
			overlay += "- " + from("components/"+component) + "\n"
		}
		write(t, filepath.Join(dir, "kustomization.yaml"), overlay+
			"configMapGenerator: [{name: pipeops-agent, behavior: merge, literals: [PIPEOPS_AGENT_ID=agent-001]}]\n")
		return build(t, dir)
	}
	remote := render(func(path string) string { return "file://" + repository + "//manifests/" + path + "?ref=v0.1.0" })
	local := render(func(path string) string { return "../../" + path })
	if diff := cmp.Diff(local, remote); diff != "" || !strings.Contains(remote, "PIPEOPS_AGENT_ID: agent-001") {
		t.Errorf("(-by path +by URL)\n%s", diff)
	}
}

// git runs a git that no configuration of this machine changes.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "GIT_CONFIG_NOSYSTEM=1"}
	for _, who := range []string{"AUTHOR", "COMMITTER"} {
		cmd.Env = append(cmd.Env, "GIT_"+who+"_NAME=a", "GIT_"+who+"_EMAIL=a@example.com")
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("git %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

// TestOnlySecretsAreNotCommitted adds an installation to git. The CA's certificate, which is public, comes with it.
func TestOnlySecretsAreNotCommitted(t *testing.T) {
	dir := installation(t)
	write(t, filepath.Join(dir, "overlays", "production", "agent", "tls.key"), "a key\n")
	git(t, dir, "init", "--quiet")
	git(t, dir, "add", ".")
	var committed []string
	for _, path := range strings.Fields(git(t, dir, "ls-files", "overlays/production")) {
		committed = append(committed, strings.TrimPrefix(path, "overlays/production/"))
	}
	want := []string{"agent/ca.crt", "agent/frps-ca.crt", "agent/kustomization.yaml", "agent/tls.crt", "ca.crt",
		"frps-ca.crt", "kustomization.yaml", "manage-namespaces.yaml", "tls.crt"}
	if diff := cmp.Diff(want, committed); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}
