//go:build images

package manifests

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pipeops/vm-agent/tests/harness"
)

// TestImagesHoldOnlyWhatTheyNeed inspects the images of `make images`. `make verify-images` runs it before the second
// build.
func TestImagesHoldOnlyWhatTheyNeed(t *testing.T) {
	root := harness.Root(t)
	images := filepath.Join(root, ".build", "images")
	pod := deployments(t, build(t, filepath.Join(installation(t), "base")))[0].Spec.Template.Spec
	for _, arch := range []string{"amd64", "arm64"} {
		archive := untar(t, read(t, filepath.Join(images, "vm-agent-"+arch+".tar")))
		var manifest []struct {
			Config           string
			RepoTags, Layers []string
		}
		decode(t, archive["manifest.json"], &manifest)
		if len(manifest) != 1 || !slices.Equal(manifest[0].RepoTags, []string{pod.InitContainers[0].Image}) {
			t.Fatalf("%s holds %+v, the Deployment names %s", arch, manifest, pod.InitContainers[0].Image)
		}
		var image struct {
			Architecture, OS string
			Created          string
			Config           struct {
				User       string
				Entrypoint []string
				Labels     map[string]string
			}
		}
		decode(t, archive[manifest[0].Config], &image)
		if image.Architecture != arch || image.OS != "linux" || image.Config.User != "65532:65532" ||
			!slices.Equal(image.Config.Entrypoint, []string{"/bootstrap"}) {
			t.Errorf("%s: %+v", arch, image)
		}
		for _, label := range []string{"title", "description", "source", "licenses", "version", "revision", "created"} {
			if image.Config.Labels["org.opencontainers.image."+label] == "" {
				t.Errorf("%s: no label %s", arch, label)
			}
		}
		var files []string
		for _, layer := range manifest[0].Layers {
			for name, data := range untar(t, archive[layer]) {
				files = append(files, name)
				if strings.HasPrefix(name, "etc/") && bytes.Count(data, []byte("BEGIN CERTIFICATE")) < 50 {
					t.Errorf("%s: %s holds hardly a root", arch, name)
				}
			}
		}
		slices.Sort(files)
		if diff := cmp.Diff([]string{"bootstrap", "etc/ssl/certs/ca-certificates.crt", "proxy"}, files); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", arch, diff)
		}
		var list struct {
			Components []struct{ Type, Name string }
		}
		decode(t, read(t, filepath.Join(images, "vm-agent-"+arch+".cdx.json")), &list)
		var programs []string
		for _, c := range list.Components {
			if c.Type == "application" {
				programs = append(programs, c.Name)
			}
		}
		if diff := cmp.Diff([]string{"github.com/pipeops/vm-agent/bootstrap", "github.com/pipeops/vm-agent/proxy"},
			programs); diff != "" || len(list.Components) < 10 {
			t.Errorf("%s: the list of what is in it: %d components (-want +got)\n%s", arch, len(list.Components), diff)
		}
	}
}

// untar returns the contents of the files by name.
func untar(t *testing.T, data []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err == nil && header.Typeflag == tar.TypeReg {
			files[header.Name], err = io.ReadAll(r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func decode(t *testing.T, data []byte, into any) {
	t.Helper()
	if err := json.Unmarshal(data, into); err != nil {
		t.Fatal(err)
	}
}
