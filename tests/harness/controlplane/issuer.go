package controlplane

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"net/http"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// audience is the audience of the tokens.
const audience = "frps"

// issuer is a minimal OpenID Connect provider. frps asks it for the key that the tokens are signed with.
type issuer struct {
	url string
	key jose.JSONWebKey
}

func newIssuer() (*issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return &issuer{key: jose.JSONWebKey{Key: key, KeyID: "1", Algorithm: string(jose.ES256), Use: "sig"}}, err
}

func (i *issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		writeJSON(w, http.StatusOK, map[string]any{
			"issuer": i.url, "jwks_uri": i.url + "/keys", "id_token_signing_alg_values_supported": []string{string(jose.ES256)},
		})
	case "/keys":
		writeJSON(w, http.StatusOK, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{i.key.Public()}})
	default:
		http.NotFound(w, r)
	}
}

// token returns a token that names an agent and its lease, and expires at until. If until is zero it expires in ten
// years, because frps refuses a token without an expiry.
func (i *issuer) token(agentID, lease string, until time.Time) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: i.key}, nil)
	if err != nil {
		return "", err
	}
	if until.IsZero() {
		until = time.Now().AddDate(10, 0, 0)
	}
	return jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: i.url, Subject: agentID, ID: lease, Audience: jwt.Audience{audience},
		IssuedAt: jwt.NewNumericDate(time.Now()), Expiry: jwt.NewNumericDate(until),
	}).Serialize()
}

// metadatas returns what a token of this issuer names, and nothing for another token. It leaves issuer, audience and
// expiry to frps, which checks them after the plugin.
func (i *issuer) metadatas(token string) map[string]string {
	var claims jwt.Claims
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil || parsed.Claims(i.key.Public(), &claims) != nil {
		return nil
	}
	return metadatas(claims.Subject, claims.ID)
}
