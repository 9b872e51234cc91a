// Command imagefiles writes the files that an image needs beside its binaries: the CA roots, and a list of all
// components.
package main

import (
	"debug/buildinfo"
	"encoding/pem"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

const (
	rootsFile   = "etc/ssl/certs/ca-certificates.crt" // where Go looks first
	rootsModule = "golang.org/x/crypto/x509roots/fallback"
)

func main() {
	version := flag.String("version", "", "`version` of the image")
	root := flag.String("root", "", "`directory` that becomes the image, with its binaries in it")
	sbom := flag.String("sbom", "", "`file` for the CycloneDX list")
	flag.Parse()
	if err := run(*version, *root, *sbom); err != nil {
		fmt.Fprintln(os.Stderr, "imagefiles:", err)
		os.Exit(1)
	}
}

func run(version, root, sbom string) error {
	list, err := components(version, root)
	if err != nil {
		return err
	}
	if err := writeRoots(filepath.Join(root, rootsFile)); err != nil {
		return err
	}
	out, err := os.Create(sbom)
	if err != nil {
		return err
	}
	encoder := cdx.NewBOMEncoder(out, cdx.BOMFileFormatJSON).SetPretty(true)
	if err := encoder.EncodeVersion(list, cdx.SpecVersion1_6); err != nil {
		return err
	}
	return out.Close()
}

// writeRoots writes Mozilla's roots in the version that go.mod names, so that every build has the same. It leaves out
// those that Mozilla trusts for old certificates only, because a PEM file cannot say so.
func writeRoots(path string) error {
	var file []byte
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			file = append(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate})...)
		}
	}
	// The image's user must be able to read it.
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, file, 0o644)
}

// components reads from the binaries which modules they consist of. The list has neither a time nor a serial number,
// so that the same image has the same list.
func components(version, root string) (*cdx.BOM, error) {
	found := map[string]cdx.Component{}
	add := func(kind cdx.ComponentType, m *debug.Module) {
		v := m.Version
		if strings.HasPrefix(m.Path, "github.com/pipeops/vm-agent/") { // our modules have the version of the image
			v = version
		} else if m.Replace != nil {
			m, v = m.Replace, m.Replace.Version
		}
		purl := "pkg:golang/" + m.Path + "@" + v
		found[purl] = cdx.Component{Type: kind, BOMRef: purl, Name: m.Path, Version: v, PackageURL: purl}
	}
	var mains []*debug.Module
	binaries, err := filepath.Glob(filepath.Join(root, "*"))
	if err != nil {
		return nil, err
	}
	for _, path := range binaries {
		if info, err := os.Stat(path); err != nil || info.IsDir() {
			continue
		}
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			return nil, err
		}
		add(cdx.ComponentTypeLibrary, &debug.Module{Path: "std", Version: strings.TrimPrefix(info.GoVersion, "go")})
		for _, dep := range info.Deps {
			add(cdx.ComponentTypeLibrary, dep)
		}
		mains = append(mains, &info.Main)
	}
	for _, m := range mains { // last, so that bootstrap counts as a program, although the proxy contains its packages
		add(cdx.ComponentTypeApplication, m)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("there are no binaries in %s", root)
	}
	if own, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range own.Deps {
			if dep.Path == rootsModule {
				add(cdx.ComponentTypeData, dep)
			}
		}
	}
	list := cdx.NewBOM()
	list.Metadata = &cdx.Metadata{Component: &cdx.Component{
		Type: cdx.ComponentTypeContainer, BOMRef: "image", Name: "pipeops/vm-agent", Version: version,
	}}
	all := make([]cdx.Component, 0, len(found))
	for _, c := range found {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b cdx.Component) int { return strings.Compare(a.PackageURL, b.PackageURL) })
	list.Components = &all
	return list, nil
}
