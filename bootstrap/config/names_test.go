package config

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestMessagesNameSettingsThatExist walks the string literals of all that ships: a setting that is renamed or removed
// must not live on in a message.
func TestMessagesNameSettingsThatExist(t *testing.T) {
	known := map[string]bool{"frp.pipeops.io": true, "kubernetes.protobuf": true} // a host and a media type
	for _, s := range settings {
		known[s.key], known[s.env] = true, true
	}
	names := regexp.MustCompile(`\b(?:(?:agent|frp|kubernetes|proxy|runners|logging)\.[a-z_]+(?:\.[a-z_]+)*|PIPEOPS_\w+)`)
	pairs := regexp.MustCompile(`([a-z_.]+) \((?:PIPEOPS_\w+|KUBECONFIG)\)`)
	found := 0
	check := func(at token.Position, name string) {
		found++
		if !known[name] {
			t.Errorf("%s names %s, which is no setting", at, name)
		}
	}
	for _, module := range []string{"frpc", "bootstrap", "proxy"} {
		err := filepath.WalkDir(filepath.Join("../..", module), func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			files := token.NewFileSet()
			file, err := parser.ParseFile(files, path, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.ImportSpec:
					return false
				case *ast.CallExpr: // such as config.Name("run_dir"), a key without a section
					called, ok := n.Fun.(*ast.SelectorExpr)
					if !ok || called.Sel.Name != "Name" || len(n.Args) != 1 {
						break
					}
					if key, ok := n.Args[0].(*ast.BasicLit); ok {
						check(files.Position(n.Pos()), strings.Trim(key.Value, `"`))
					}
				case *ast.BasicLit:
					if n.Kind != token.STRING {
						break
					}
					text, err := strconv.Unquote(n.Value)
					if err != nil {
						t.Error(err)
					}
					for _, name := range names.FindAllString(text, -1) {
						check(files.Position(n.Pos()), name)
					}
					for _, pair := range pairs.FindAllStringSubmatch(text, -1) {
						if pair[0] != Name(pair[1]) {
							t.Errorf("%s names the setting %s as %s", files.Position(n.Pos()), Name(pair[1]), pair[0])
						}
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if found < 2*len(settings) {
		t.Errorf("found only %d names", found)
	}
}
