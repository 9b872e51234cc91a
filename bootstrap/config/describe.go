package config

import (
	"errors"
	"io"
	"strings"
	"text/tabwriter"
)

// Describe writes the configuration that Load would give, as a configuration file: each value with its origin,
// secrets as "[redacted]". The error is Load's or w's.
func Describe(w io.Writer, path string, env map[string]string) error {
	c, origins, err := load(path, env)
	if err != nil {
		return err
	}
	columns := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, err = io.WriteString(columns, asFile(func(name string, s setting) string {
		value, origin := s.yaml(c), origins[s.key]
		if strings.HasPrefix(origin, "[redacted]") {
			value = "" // a secret would contradict the file that holds it
		}
		return name + ": " + value + "\t# " + origin
	}))
	return errors.Join(err, columns.Flush())
}

// asFile returns a configuration file with the entry of each setting, in the sections of its key.
func asFile(entry func(name string, s setting) string) string {
	var file strings.Builder
	line := func(depth int, text string) { file.WriteString(strings.Repeat("  ", depth) + text + "\n") }
	last := ""
	for _, s := range settings {
		sections := strings.Split(s.key, ".")
		depth := len(sections) - 1
		for d, section := range sections[:depth] {
			if !strings.HasPrefix(last, strings.Join(sections[:d+1], ".")+".") {
				line(d, section+":")
			}
		}
		for text := range strings.SplitSeq(entry(sections[depth], s), "\n") {
			line(depth, text)
		}
		last = s.key
	}
	return file.String()
}
