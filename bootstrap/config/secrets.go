package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/pipeops/vm-agent/frpc/secret"
)

// secret reads a secret from its file if one is configured.
func (l *loader) secret(key string) {
	s, file := find(key), find(key+"_file")
	path := file.get(l.config)
	if path == "" {
		return
	}
	if s.get(l.config) != "" {
		l.mistake(key, "contradicts %s: remove one of them", file.key)
		return
	}
	value, err := readSecret(path, s.check)
	if err != nil {
		l.mistake(file.key, "%v", err)
	}
	*s.field(l.config).(*secret.Secret) = value
}

// CurrentToken returns the agent's token, read anew where it comes from a file.
func (a Agent) CurrentToken() (secret.Secret, error) {
	return current(a.Token, a.TokenFile)
}

// TokenWarning says that the agent's token is so short that it could be guessed. It is empty for other tokens.
func (a Agent) TokenWarning() string {
	if len(a.Token) >= 16 {
		return ""
	}
	return Name("agent.token") + " has fewer than 16 characters and could be guessed: replace it by a random one"
}

// CurrentToken returns frp's token, read anew where it comes from a file; empty where the control plane gives it.
func (f FRP) CurrentToken() (secret.Secret, error) { return current(f.Token, f.TokenFile) }

func current(token secret.Secret, file string) (secret.Secret, error) {
	if file == "" {
		return token, nil
	}
	return readSecret(file, checkToken)
}

// ErrNoSecret reports that the file of a secret is empty or missing, and not just unreadable for a moment.
var ErrNoSecret = errors.New("no secret")

// readSecret reads the file of a setting such as agent.token_file.
func readSecret(file string, check func(string) (string, error)) (secret.Secret, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: %w: create the file or correct its path", ErrNoSecret, err)
	}
	if err != nil {
		return "", fmt.Errorf("%w: create the file or correct its path", err)
	}
	value := strings.TrimSpace(string(data))
	if value == "" {
		return "", fmt.Errorf("%w: %s is empty: write the secret into it", ErrNoSecret, file)
	}
	if _, err := check(value); err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	return secret.Secret(value), nil
}
