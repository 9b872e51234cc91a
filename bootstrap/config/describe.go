package config

import (
	"errors"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
)

// Describe writes the configuration that Load would give, as a configuration file: each value with its origin,
// secrets as "[redacted]". The error is Load's or w's.
func Describe(w io.Writer, path string, env map[string]string) error {
	l, err := load(path, env)
	if err != nil {
		return err
	}
	columns := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, err = io.WriteString(columns, asFile(func(name string, s *setting) string {
		value, origin := s.yaml(s.get(l.config)), l.origins[s.key]
		if file := find(s.key + "_file"); file != nil && file.get(l.config) != "" {
			value, origin = "", "[redacted], from "+file.key // the secret beside it would contradict it
		}
		return name + ": " + value + "\t# " + origin
	}))
	return errors.Join(err, columns.Flush())
}

// asFile returns a configuration file with the entry of each setting, in the sections of its key.
func asFile(entry func(name string, s *setting) string) string {
	var file strings.Builder
	line := func(depth int, text string) { file.WriteString(strings.Repeat("  ", depth) + text + "\n") }
	begun := map[string]bool{}
	for i := range settings {
		sections := strings.Split(settings[i].key, ".")
		depth := len(sections) - 1
		for d, section := range sections[:depth] {
			if key := strings.Join(sections[:d+1], "."); !begun[key] {
				line(d, section+":")
				begun[key] = true
			}
		}
		for text := range strings.SplitSeq(entry(sections[depth], &settings[i]), "\n") {
			line(depth, text)
		}
	}
	return file.String()
}

// yaml returns a value's text as YAML. Strings quoted by Go are valid YAML.
func (s *setting) yaml(text string) string {
	switch {
	case holds[int](s), holds[bool](s):
		return text
	case holds[[]string](s) && text == "":
		return "[]"
	case holds[[]string](s):
		return `["` + strings.ReplaceAll(text, ",", `", "`) + `"]`
	default:
		return strconv.Quote(text)
	}
}
