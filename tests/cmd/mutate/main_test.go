package main

import (
	"testing"

	"github.com/pipeops/vm-agent/tests/harness/process"
)

// TestEveryMutantCanBePlanted: its text is in the code, and its test exists. `make mutate` plants them.
func TestEveryMutantCanBePlanted(t *testing.T) {
	root, err := process.Root()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, m := range all() {
		if err := m.check(root); err != nil {
			t.Error(err)
		}
		if key := m.file + ": " + m.name; seen[key] || m.test == "" {
			t.Errorf("%s: is there twice, or names no test", key)
		} else {
			seen[key] = true
		}
	}
}
