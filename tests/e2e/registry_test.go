package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/pipeops/vm-agent/tests/harness"
	"github.com/pipeops/vm-agent/tests/harness/process"
)

// pushImages pushes the images to a registry on this machine, runs on the node what it gives back, and asks it for
// frpc's digest as if it were Docker Hub.
func pushImages(t *testing.T, p *page) {
	group := harness.NewGroup(t)
	dir, root := group.Dir(), harness.Root(t)
	_, port, err := net.SplitHostPort(harness.FreeAddr(t))
	if err != nil {
		t.Fatal(err)
	}
	registry := net.JoinHostPort(node.HostIP, port) // the node reaches it
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	config := write("registry.yaml", "version: 0.1\nlog: {level: error}\nhttp: {addr: "+registry+"}\n"+
		"storage: {filesystem: {rootdirectory: "+dir+"/registry}}\n")
	if _, err := group.Start("registry", nil, "docker-registry", "serve", config); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return process.Listening(registry) })
	sh := newShell(t, dir, "GOFLAGS="+os.Getenv("GOFLAGS"))
	sh.must("mkdir -p .config/containers")
	write(".config/containers/registries.conf", fmt.Sprintf("[[registry]]\nlocation = %[1]q\ninsecure = true\n"+
		"[[registry]]\nprefix = \"docker.io\"\nlocation = %[1]q\ninsecure = true\n", registry))

	pushing := strings.ReplaceAll(p.command(t, "make push"), "registry.example.com", registry)
	pushed := regexp.MustCompile(regexp.QuoteMeta(registry) +
		`/pipeops/vm-agent:\S+@sha256:\S+`).FindString(sh.must("cd " + root + " && TLS_VERIFY=false " + pushing))
	tagged, digest, _ := strings.Cut(pushed, "@")
	index := sh.must("skopeo inspect --raw docker://" + tagged)
	layout := fmt.Sprintf("%s/.build/images/vm-agent-oci.tar", root)
	was := sh.must("skopeo inspect --raw oci-archive:" + layout + " | sha256sum")
	if !strings.HasPrefix("sha256:"+was, digest) {
		t.Errorf("pushed as %s, from %s", digest, was)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		if strings.Count(index, `"architecture":"`+arch+`"`) != 1 {
			t.Errorf("%s is not in what was pushed: %s", arch, index)
		}
	}

	runByDigest(t, sh, registry+"/pipeops/vm-agent@"+digest)

	// In a copy, because it writes into the manifests; and twice, as for a later version.
	sh.must(fmt.Sprintf("cp -r %[1]s/Makefile %[1]s/manifests .", root))
	frpc := regexp.MustCompile(`fatedier/frpc:v[0-9.]+`).FindString(sh.must("cat manifests/docker/compose.yaml"))
	sh.must(fmt.Sprintf("skopeo copy --quiet docker-archive:%s/.build/images/frpc.tar docker://%s/%s",
		root, registry, frpc))
	digest = strings.TrimSpace(sh.must("skopeo inspect --no-tags --format '{{.Digest}}' docker://docker.io/" + frpc))
	copied := strings.ReplaceAll(p.command(t, "make mirror"), "registry.example.com", registry)
	_, tag, _ := strings.Cut(frpc, "/")
	if out := sh.must("TLS_VERIFY=false " + copied); strings.TrimSpace(out) != registry+"/mirror/"+tag+"@"+digest {
		t.Errorf("the mirror of %s@%s is %s", frpc, digest, out)
	}
	sh.must("skopeo inspect --no-tags docker://" + registry + "/mirror/" + tag)
	for range 2 {
		sh.must(p.command(t, "make frpc-digest"))
		for _, rendered := range []string{
			sh.must("kubectl kustomize manifests/base"), sh.must("cat manifests/docker/compose.yaml"),
		} {
			if !strings.Contains(rendered, "image: docker.io/"+frpc+"@"+digest+"\n") {
				t.Errorf("it does not name %s@%s:\n%s", frpc, digest, rendered)
			}
		}
	}
	unpin(t, filepath.Join(dir, "manifests", "base", "kustomization.yaml"))
	unpin(t, filepath.Join(dir, "manifests", "docker", "compose.yaml"))
	sh.must("diff -r manifests " + filepath.Join(root, "manifests"))

	// A site without internet: with a registry, and without one.
	sh.must("mkdir -p .build/images && cp " + root + "/.build/images/vm-agent-*.tar .build/images")
	atSite := func(words string) string {
		return strings.NewReplacer("amd64", runtime.GOARCH, "registry.example.com", registry).Replace(p.block(t, words))
	}
	sh.must(atSite("skopeo copy --override-arch")) // `make e2e` has built ours
	push := atSite("skopeo copy docker-archive:")
	sh.must(push)
	for _, image := range regexp.MustCompile(`docker://\S+`).FindAllString(push, -1) {
		sh.must("skopeo inspect --no-tags " + image)
	}
	real, err := exec.LookPath("ctr")
	if err != nil {
		t.Fatal(err)
	}
	sh.program("ctr", inNode("env CONTAINERD_SNAPSHOTTER=native "+real))
	loaded := sh.must(atSite("ctr -n k8s.io images import"))
	for _, image := range []string{"pipeops/vm-agent", frpc} {
		if !strings.Contains(loaded, image) {
			t.Errorf("ctr: %s", loaded)
		}
	}
}

// runByDigest runs an image of a registry without TLS in a pod, which prints its version.
func runByDigest(t *testing.T, sh *shell, image string) {
	t.Helper()
	if out, err := node.Command(t.Context(), "ctr", "--namespace", "k8s.io", "images", "pull", "--plain-http",
		"--snapshotter", "native", image).CombinedOutput(); err != nil {
		t.Fatalf("pull: %v: %s", err, out)
	}
	kubectl := "kubectl --kubeconfig " + node.Kubeconfig + " -n " + namespace(t) + " "
	sh.must(kubectl + "run version --restart Never --image-pull-policy Never --image " + image +
		" --command -- /bootstrap --version")
	sh.must(kubectl + "wait --timeout 1m --for jsonpath={.status.phase}=Succeeded pod/version")
	built := strings.TrimSpace(sh.must("cat " + filepath.Join(harness.Root(t), ".build", "images", "VERSION")))
	if out := sh.must(kubectl + "logs version"); !strings.Contains(out, built) {
		t.Errorf("the pod runs %s, not %s", out, built)
	}
}
