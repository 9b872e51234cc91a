package config

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// Environ returns this process's environment, for Load.
func Environ() map[string]string {
	env := map[string]string{}
	for _, variable := range os.Environ() {
		name, value, _ := strings.Cut(variable, "=")
		env[name] = value
	}
	return env
}

// Load reads the file at path and the environment; environment over file over default. An empty path is
// DefaultPath, which may be absent. The error, if any, is an *Error.
func Load(path string, env map[string]string) (*Config, error) {
	l, err := load(path, env)
	if err != nil {
		return nil, err
	}
	return l.config, nil
}

func load(path string, env map[string]string) (*loader, error) {
	l := &loader{config: &Config{}, origins: map[string]string{}, told: map[string]bool{}}
	values := l.readFile(path)
	unknown := maps.Clone(env)
	maps.DeleteFunc(unknown, func(name, _ string) bool { return !strings.HasPrefix(name, "PIPEOPS_") })
	for i := range settings {
		s := &settings[i]
		value, source, name := s.def, "default", ""
		if value == "" {
			source = "not set"
		}
		if v, ok := values[s.key]; ok {
			value, source, name = v, "file", " "+cmp.Or(path, DefaultPath)
			delete(values, s.key)
		}
		if v := env[s.env]; s.env != "" && v != "" {
			value, source, name = v, "environment", " "+s.env
		}
		delete(unknown, s.env)
		l.origins[s.key] = source + name
		if value == "" {
			continue
		}
		if err := s.set(l.config, value); err != nil {
			l.mistake(s.key, "%v (from the %s)", err, source)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		if name := keyName.FindString(key); name != key {
			// What follows the name may be a secret.
			l.mistakes = append(l.mistakes, name+": is not followed by a colon and a space: write NAME: VALUE")
		} else {
			l.mistakes = append(l.mistakes, key+": unknown key: remove it or correct its name")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(unknown)) {
		l.mistakes = append(l.mistakes, name+": unknown variable: remove it or correct its name")
	}
	l.complete()
	if len(l.mistakes) > 0 {
		return nil, &Error{Mistakes: l.mistakes}
	}
	return l, nil
}

// loader collects the mistakes, so that Load reports all of them at once.
type loader struct {
	config   *Config
	origins  map[string]string // of each value, by key: for Describe
	mistakes []string
	told     map[string]bool // keys with a mistake: they are not reported as missing too
}

func (l *loader) mistake(key, format string, args ...any) {
	l.told[key] = true
	l.mistakes = append(l.mistakes, Name(key)+": "+fmt.Sprintf(format, args...))
}

// unreadable records a mistake of the whole file. Then nothing is reported as missing.
func (l *loader) unreadable(format string, args ...any) {
	l.told["agent.id"], l.told["agent.token"] = true, true
	l.mistakes = append(l.mistakes, fmt.Sprintf(format, args...))
}

// readFile returns the file's values as text, by dotted key; lists are joined with commas.
func (l *loader) readFile(path string) map[string]string {
	values := map[string]string{}
	name := cmp.Or(path, DefaultPath)
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && path == "" {
		return values
	}
	if err != nil {
		l.unreadable("%v: correct --config or create the file", err)
		return values
	}
	if yamlSecond.Match(data) {
		l.unreadable("%s: holds a second document after ---: give one", name)
		return values
	}
	var tree any
	exactNumbers := func(d *json.Decoder) *json.Decoder { d.UseNumber(); return d }
	if err := yaml.UnmarshalStrict(data, &tree, exactNumbers); err != nil {
		l.unreadable("%s: %s", name, explainYAML(err))
		return values
	}
	switch tree := tree.(type) {
	case nil: // an empty file
	case map[string]any:
		l.flatten(tree, "", values)
	default:
		l.unreadable("%s: is not a mapping of keys to values", name)
	}
	return values
}

var (
	yamlSecond  = regexp.MustCompile(`(?m)^[^#\s-].*\n([^\n]*\n)*---(\s|$)`)
	yamlMistake = regexp.MustCompile(`line \d+(: key "[^"]*" already set)?`)
	keyName     = regexp.MustCompile(`^[\w.-]*`)
)

// explainYAML says where the YAML is invalid, without repeating the text there: it may be a secret.
func explainYAML(err error) string {
	switch found := yamlMistake.FindStringSubmatch(err.Error()); {
	case found == nil:
		return "is not YAML: check its quotes, anchors and tags"
	case found[1] == "":
		return "is not YAML, at or before " + found[0]
	default:
		return found[0]
	}
}

// flatten adds the tree's values to values, by dotted key.
func (l *loader) flatten(tree map[string]any, prefix string, values map[string]string) {
	for _, k := range slices.Sorted(maps.Keys(tree)) {
		key := prefix + k
		s := find(key)
		if s == nil {
			section, isMap := tree[k].(map[string]any)
			switch {
			case !isSection(key):
				values[key] = "" // unknown
			case isMap:
				l.flatten(section, key+".", values)
			case tree[k] != nil:
				l.mistake(key, "is a section: give it keys")
			}
			continue
		}
		switch v := tree[k].(type) {
		case map[string]any:
			l.mistake(key, "is a mapping: give one value")
		case []any:
			if !holds[[]string](s) {
				l.mistake(key, "is a list: give one value")
				continue
			}
			items := make([]string, len(v))
			for i, item := range v {
				text, ok := item.(string)
				if !ok {
					l.mistake(key, "item %d of the list is not a text: put it in quotes", i+1)
				}
				items[i] = text
			}
			if !l.told[key] {
				values[key] = strings.Join(items, ",")
			}
		case string:
			if v != "" { // else none; only an empty list is a value
				values[key] = v
			}
		case bool, json.Number:
			kind, fits := "number", holds[int](s)
			if _, isBool := v.(bool); isBool {
				kind, fits = "boolean", holds[bool](s)
			}
			if fits {
				values[key] = fmt.Sprint(v)
			} else {
				l.mistake(key, "YAML takes it for a %s: put it in quotes", kind)
			}
		}
	}
}

// Name returns a setting's key with its variable, if it has one: as messages name it.
func Name(key string) string {
	if s := find(key); s != nil && s.env != "" {
		return key + " (" + s.env + ")"
	}
	return key
}

// find returns the setting of a key, nil if there is none.
func find(key string) *setting {
	for i := range settings {
		if settings[i].key == key {
			return &settings[i]
		}
	}
	return nil
}

func isSection(key string) bool {
	return slices.ContainsFunc(settings, func(s setting) bool { return strings.HasPrefix(s.key, key+".") })
}
