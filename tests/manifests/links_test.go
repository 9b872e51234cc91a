package manifests

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestLinksLeadSomewhere checks the links between the pages of the repository: the file is there, and the heading too.
func TestLinksLeadSomewhere(t *testing.T) {
	fenced, link := regexp.MustCompile("(?s)```.*?```"), regexp.MustCompile(`\]\(([^)\s]+)\)`)
	links := 0
	err := filepath.WalkDir(filepath.Dir(source), func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && strings.HasPrefix(entry.Name(), ".") && entry.Name() != "..":
			return filepath.SkipDir
		case filepath.Ext(path) != ".md":
			return nil
		}
		for _, match := range link.FindAllStringSubmatch(fenced.ReplaceAllString(string(read(t, path)), ""), -1) {
			target, heading, _ := strings.Cut(match[1], "#")
			if strings.Contains(target, ":") {
				continue // elsewhere
			}
			links++
			file := path
			if target != "" {
				file = filepath.Join(filepath.Dir(path), target)
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s links to %s: %v", path, match[1], err)
			} else if heading != "" && !headings(string(read(t, file)))[heading] {
				t.Errorf("%s links to %s: there is no such heading", path, match[1])
			}
		}
		return nil
	})
	if err != nil || links < 100 {
		t.Errorf("%d links; %v", links, err)
	}
}

// headings returns the anchors that GitHub gives to the headings of a page, all of which differ.
func headings(page string) map[string]bool {
	anchors := map[string]bool{}
	for _, match := range regexp.MustCompile(`(?m)^#+ (.+)$`).FindAllStringSubmatch(page, -1) {
		text := regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(match[1]), "")
		anchors[strings.ReplaceAll(text, " ", "-")] = true
	}
	return anchors
}
