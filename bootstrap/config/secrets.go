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
func (l *loader) secret(key string, value *secret.Secret, file string, valid check) {
	if file == "" {
		return
	}
	if *value != "" {
		l.mistake(key, "contradicts "+key+"_file: remove one of them")
		return
	}
	var err error
	if *value, err = current("", file, valid); err != nil {
		l.mistake(key+"_file", err.Error())
	}
	l.origins[key] = fromFile + key + "_file"
}

// CurrentToken returns the agent's token, read anew where it comes from a file.
func (a Agent) CurrentToken() (secret.Secret, error) {
	return current(a.Token, a.TokenFile, checkToken)
}

// CurrentToken returns frp's token, read anew where it comes from a file; empty where the control plane gives it.
func (f FRP) CurrentToken() (secret.Secret, error) { return current(f.Token, f.TokenFile, checkToken) }

// TokenWarning says that the agent's token is so short that it could be guessed. It is empty for other tokens.
func (a Agent) TokenWarning() string {
	if len(a.Token) >= 16 {
		return ""
	}
	return Name("agent.token") + " has fewer than 16 characters and could be guessed: replace it by a random one"
}

// ErrNoSecret reports that the file of a secret is empty or missing, and not just unreadable for a moment.
var ErrNoSecret = errors.New("no secret")

// current returns the secret that the file holds, if one is configured, else the configured value.
func current(value secret.Secret, file string, valid check) (secret.Secret, error) {
	if file == "" {
		return value, nil
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", ErrNoSecret, err)
	}
	if err != nil {
		return "", fmt.Errorf("%w: create the file or correct its path", err)
	}
	text := strings.TrimSpace(string(data))
	if text == "" {
		return "", fmt.Errorf("%w: %s is empty: write the secret into it", ErrNoSecret, file)
	}
	if text, err = valid(text); err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	return secret.Secret(text), nil
}
