package idpurl

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// maxDocument bounds a discovery document, in bytes.
const maxDocument = 1 << 20

// Discover reads an issuer's discovery document (OpenID Connect Discovery 1.0, section 4), and holds the issuer that it names
// (section 4.3) and its addresses against the rules. The client must have CheckRedirect.
//
// Who names an issuer has it asked from inside the cluster's network, and reads the error: that repeats of an answer no more
// than its status, and of a document its issuer. A request that fails gives a *url.Error.
func Discover(ctx context.Context, client *http.Client, issuer string) (document []byte, e Endpoints, err error) {
	address := strings.TrimSuffix(issuer, "/") + "/.well-known/openid-configuration"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, e, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, e, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, e, fmt.Errorf("%s answers %s", address, Status(res))
	}
	if document, err = io.ReadAll(io.LimitReader(res.Body, maxDocument)); err != nil {
		return nil, e, err
	}
	var d struct {
		Issuer string `json:"issuer"`
		Endpoints
	}
	if json.Unmarshal(document, &d) != nil {
		return nil, e, fmt.Errorf("%s is no discovery document: it is not JSON", address)
	}
	switch {
	case d.Issuer != issuer:
		return nil, e, fmt.Errorf("%s names the issuer %q: write it exactly so", address, shown(d.Issuer))
	case d.JWKS == "":
		return nil, e, fmt.Errorf("%s names no keys (jwks_uri)", address)
	}
	if err := d.Check(issuer); err != nil {
		return nil, e, fmt.Errorf("%s is refused: %w", address, err)
	}
	return document, d.Endpoints, nil
}

// Status is an answer's status, in the standard's words in place of the server's.
func Status(res *http.Response) string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", res.StatusCode, http.StatusText(res.StatusCode)))
}

// shown is somebody's text as an error quotes it.
func shown(text string) string {
	if len(text) > maxShown {
		return text[:maxShown] + "..."
	}
	return text
}
