package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
)

// Image is an image FROM scratch.
type Image struct {
	References []string
	Layers     []Layer
	Config     ImageConfig
}

// Layer is a tar archive, from NewLayer. Images that have the same layers share them.
type Layer []byte

// ImageConfig says how the image's program is started.
type ImageConfig struct {
	User       string   `json:",omitempty"`
	Entrypoint []string `json:",omitempty"`
	Cmd        []string `json:",omitempty"`
}

// WriteImage writes a docker-archive of an image FROM scratch with one program: the file at path, at the path of the
// entrypoint's first element.
func WriteImage(archive, reference, path string, entrypoint ...string) error {
	program, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	layer, err := NewLayer(map[string][]byte{entrypoint[0]: program}, nil)
	if err != nil {
		return err
	}
	return WriteImages(archive, Image{[]string{reference}, []Layer{layer}, ImageConfig{Entrypoint: entrypoint}})
}

// WriteImages writes a docker-archive of images.
func WriteImages(archive string, images ...Image) error {
	type entry struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	var entries []entry
	files := map[string][]byte{}
	for n, image := range images {
		e := entry{Config: fmt.Sprintf("config-%d.json", n), RepoTags: image.References}
		var ids []string
		for _, layer := range image.Layers {
			id := fmt.Sprintf("%x", sha256.Sum256(layer))
			ids = append(ids, "sha256:"+id)
			e.Layers = append(e.Layers, id+".tar")
			files[id+".tar"] = layer
		}
		config, err := json.Marshal(map[string]any{
			"os": "linux", "architecture": runtime.GOARCH, "config": image.Config,
			"rootfs": map[string]any{"type": "layers", "diff_ids": ids},
		})
		if err != nil {
			return err
		}
		files[e.Config] = config
		entries = append(entries, e)
	}
	manifest, err := json.Marshal(entries)
	if err != nil {
		return err
	}
	files["manifest.json"] = manifest
	file, err := os.Create(archive)
	if err != nil {
		return err
	}
	return errors.Join(pack(file, files, nil), file.Close())
}

// NewLayer packs programs and other files, by path, and symbolic links, by path with their target. A path that ends
// with a slash is a directory that everyone may write to. Programs whose path is in setuid run as their owner, root.
func NewLayer(files map[string][]byte, links map[string]string, setuid ...string) (Layer, error) {
	var layer bytes.Buffer
	err := pack(&layer, files, links, setuid...)
	return layer.Bytes(), err
}

func pack(to io.Writer, files map[string][]byte, links map[string]string, setuid ...string) error {
	w := tar.NewWriter(to)
	for name, data := range files {
		header := &tar.Header{Name: name, Mode: 0o755, Size: int64(len(data))}
		if strings.HasSuffix(name, "/") {
			header.Mode = 0o1777
		}
		if slices.Contains(setuid, name) {
			header.Mode |= 0o4000
		}
		if err := w.WriteHeader(header); err != nil {
			return err
		}
		if _, err := w.Write(data); err != nil {
			return err
		}
	}
	for name, target := range links {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}); err != nil {
			return err
		}
	}
	return w.Close()
}
