package client

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/clock"
	"rendezvous.dev/rendezvous/wire/idpurl"
	"rendezvous.dev/rendezvous/wire/terminal"
)

// loginTimeout is how long a person may take to sign in.
const loginTimeout = 10 * time.Minute

// LoginOptions says how to sign in.
type LoginOptions struct {
	URL       string
	CAFile    string
	Device    bool // device flow: sign in on another device
	NoBrowser bool // print the URL and open nothing
	// RedirectPort is the loopback port to be sent back to, for providers that know one redirect URI. 0 is a free one, or
	// the port of the login before.
	RedirectPort int
	// SecretFile has the client's secret, for providers that know no public clients.
	SecretFile string
}

// Login signs in to a workspace and makes it the current one.
//
// The URL to open stands alone on one line of Out; all else goes to Err.
func (c *Client) Login(ctx context.Context, o LoginOptions) error {
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	base, err := workspaceURL(o.URL)
	if err != nil {
		return err
	}
	a := &Account{URL: base}
	if a.CA, err = readCA(o.CAFile); err != nil {
		return err
	}
	old, err := c.Store.Find(base)
	if err == nil && a.CA == "" {
		a.CA = old.CA // a login renewed keeps the CA of the one before
	}
	f, err := c.newFeed(a, "")
	if err != nil {
		return err
	}
	if err := f.get(ctx, brokerapi.PathWorkspace, nil, &a.Workspace); err != nil {
		return err
	}
	if old != nil {
		if changes := old.TokensOf.changes(a.Workspace); len(changes) > 0 {
			fmt.Fprintf(c.err(), "workspace %s has changed since you last signed in: %s\n", terminal.OneLine(a.Workspace.Name), strings.Join(changes, "; "))
		} else {
			a.ClientSecret, a.RedirectPort = old.ClientSecret, old.RedirectPort // another provider gets no secret of this one
		}
	}
	if o.RedirectPort != 0 {
		a.RedirectPort = o.RedirectPort
	}
	if o.SecretFile != "" {
		if a.ClientSecret, err = readSecret(o.SecretFile); err != nil {
			return err
		}
	}
	p, err := c.provider(ctx, a)
	if err != nil {
		return err
	}
	var tok *oauth2.Token
	var nonce string
	if o.Device {
		tok, err = c.deviceFlow(p)
	} else {
		nonce = random()
		tok, err = c.browserFlow(p, nonce, o.NoBrowser)
	}
	if err != nil {
		return clean(fmt.Errorf("signing in to workspace %s at %s: %w", a.Workspace.Name, a.Workspace.IssuerURL, err))
	}
	if err := p.accept(a, tok, nonce); err != nil {
		return clean(err)
	}
	if err := c.Store.Save(a); err != nil {
		return err
	}
	if err := c.Store.Use(a); err != nil {
		return err
	}
	fmt.Fprintf(c.err(), "signed in to workspace %s as %s\n", terminal.OneLine(a.Workspace.Name), terminal.OneLine(a.User))
	return nil
}

// Logout forgets the tokens of a workspace.
func (c *Client) Logout() error {
	a, err := c.Store.Find(c.Workspace)
	if err != nil {
		return err
	}
	if err := c.Store.Delete(a); err != nil {
		return err
	}
	fmt.Fprintf(c.err(), "signed out of workspace %s\n", terminal.OneLine(a.Workspace.Name))
	return nil
}

// provider is a workspace's identity provider, discovered.
type provider struct {
	ctx      context.Context // carries the HTTP client that trusts the issuer
	account  *Account
	clock    *clock.Watch
	verifier *oidc.IDTokenVerifier
	conf     oauth2.Config
}

func (c *Client) provider(ctx context.Context, a *Account) (*provider, error) {
	p, err := c.discover(ctx, a)
	return p, clean(err)
}

func (c *Client) discover(ctx context.Context, a *Account) (*provider, error) {
	hc, err := c.httpClient(a.CA, a.Workspace.IssuerCA)
	if err != nil {
		return nil, fmt.Errorf("workspace %s: %w", a.Workspace.Name, err)
	}
	if err := idpurl.CheckIssuer(a.Workspace.IssuerURL); err != nil {
		return nil, fmt.Errorf("workspace %s names an identity provider that rdv refuses: %w", a.Workspace.Name, err)
	}
	ctx = oidc.ClientContext(ctx, hc)
	p, err := oidc.NewProvider(ctx, a.Workspace.IssuerURL)
	if err != nil {
		return nil, fmt.Errorf("identity provider %s of workspace %s: %w: it must be reachable from here, and its certificate's CA be known (--ca-file)%s", a.Workspace.IssuerURL, a.Workspace.Name, err, c.watch().Hint(err))
	}
	var endpoints idpurl.Endpoints
	if err := p.Claims(&endpoints); err != nil {
		return nil, fmt.Errorf("identity provider %s of workspace %s: %w", a.Workspace.IssuerURL, a.Workspace.Name, err)
	}
	if err := endpoints.Check(a.Workspace.IssuerURL); err != nil {
		return nil, fmt.Errorf("the discovery document of identity provider %s is refused: %w", a.Workspace.IssuerURL, err)
	}
	scopes := a.Workspace.Scopes
	if len(scopes) == 0 {
		scopes = []string{oidc.ScopeOpenID, "profile", "email", oidc.ScopeOfflineAccess}
	}
	endpoint := p.Endpoint()
	if endpoint.AuthStyle, err = authStyle(p, a.ClientSecret); err != nil {
		return nil, fmt.Errorf("identity provider %s of workspace %s: %w", a.Workspace.IssuerURL, a.Workspace.Name, err)
	}
	return &provider{ctx: ctx, account: a, clock: c.watch(), verifier: p.Verifier(&oidc.Config{ClientID: a.Workspace.ClientID}),
		conf: oauth2.Config{ClientID: a.Workspace.ClientID, ClientSecret: a.ClientSecret, Endpoint: endpoint, Scopes: scopes}}, nil
}

// authStyle is how the client names itself at the token endpoint: without a secret in the request's body alone, as public
// clients do; with one as the provider says (OpenID Connect Discovery 1.0, section 3: in a header unless it says otherwise).
// Trying both would show some providers one code twice.
func authStyle(p *oidc.Provider, secret string) (oauth2.AuthStyle, error) {
	if secret == "" {
		return oauth2.AuthStyleInParams, nil
	}
	var says struct {
		Methods []string `json:"token_endpoint_auth_methods_supported"`
	}
	if err := p.Claims(&says); err != nil {
		return 0, err
	}
	switch {
	case len(says.Methods) == 0 || slices.Contains(says.Methods, "client_secret_basic"):
		return oauth2.AuthStyleInHeader, nil
	case slices.Contains(says.Methods, "client_secret_post"):
		return oauth2.AuthStyleInParams, nil
	}
	return 0, fmt.Errorf("rdv knows none of the ways in which it takes a client secret: it names %s", terminal.OneLine(strings.Join(says.Methods, ", ")))
}

// readSecret reads --client-secret-file.
func readSecret(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("--client-secret-file: %w", err)
	}
	secret := strings.TrimSpace(string(data))
	if secret == "" || strings.ContainsAny(secret, "\r\n") {
		return "", fmt.Errorf("--client-secret-file: %s must hold the secret alone, on one line", path)
	}
	return secret, nil
}

// accept verifies the ID token of an answer and puts it into the account.
func (p *provider) accept(a *Account, tok *oauth2.Token, nonce string) error {
	raw, _ := tok.Extra("id_token").(string)
	if raw == "" {
		return fmt.Errorf("identity provider %s gave no ID token: its client %q needs the scope openid", a.Workspace.IssuerURL, a.Workspace.ClientID)
	}
	id, err := p.verifier.Verify(p.ctx, raw)
	if err != nil {
		return fmt.Errorf("identity provider %s: %w%s", a.Workspace.IssuerURL, err, p.clock.Hint(err))
	}
	if nonce != "" && id.Nonce != nonce {
		return fmt.Errorf("identity provider %s: the ID token answers another sign-in: run `rdv login` again", a.Workspace.IssuerURL)
	}
	var claims struct {
		Username string `json:"preferred_username"`
		Email    string `json:"email"`
		Name     string `json:"name"`
	}
	if err := id.Claims(&claims); err != nil {
		return fmt.Errorf("identity provider %s: %w", a.Workspace.IssuerURL, err)
	}
	for _, name := range []string{claims.Username, claims.Email, claims.Name, id.Subject} {
		if name != "" {
			a.User = name
			break
		}
	}
	a.IDToken, a.Expiry, a.TokensOf = raw, id.Expiry, providerOf(a.Workspace)
	if tok.RefreshToken != "" {
		a.RefreshToken = tok.RefreshToken
	}
	return nil
}

// expiryMargin is how long a token must still hold to be used.
const expiryMargin = 30 * time.Second

// fresh makes sure that the account's token holds, with the refresh token where it must. The refresh token is a secret
// between the user and the provider that gave it: no other sees it, whatever the workspace says by now.
func (c *Client) fresh(ctx context.Context, a *Account) (detail string, err error) {
	defer func() { err = clean(err) }()
	if changes := a.TokensOf.changes(a.Workspace); len(changes) > 0 {
		return "", fmt.Errorf("workspace %s has changed since you signed in: %s. Your sign-in stays with the provider that gave it. If the change is expected, run `rdv login %s` to sign in again; otherwise ask the workspace's administrator first",
			a.Workspace.Name, strings.Join(changes, "; "), a.URL)
	}
	if time.Until(a.Expiry) > expiryMargin {
		return "signed in until " + a.Expiry.UTC().Format(time.RFC3339), nil
	}
	again := fmt.Sprintf("run `rdv login %s` again", a.URL)
	// Some providers take a refresh token once, and one that comes a second time for stolen: one rdv renews, the others wait
	// and find what it got.
	unlock, err := c.Store.lock(ctx, a)
	if err != nil {
		return "", err
	}
	defer unlock()
	if stored, err := c.Store.read(c.Store.path(key(a.URL))); err == nil && stored.TokensOf == a.TokensOf && stored.Expiry.After(a.Expiry) {
		a.IDToken, a.RefreshToken, a.Expiry, a.User = stored.IDToken, stored.RefreshToken, stored.Expiry, stored.User
		if time.Until(a.Expiry) > expiryMargin {
			return "signed in until " + a.Expiry.UTC().Format(time.RFC3339), nil
		}
	}
	if a.RefreshToken == "" {
		return "", fmt.Errorf("the sign-in to workspace %s ended at %s: %s%s", a.Workspace.Name, a.Expiry.Local().Format(time.DateTime), again, c.watch().Hint(nil))
	}
	p, err := c.provider(ctx, a)
	if err != nil {
		return "", err
	}
	tok, err := p.conf.TokenSource(p.ctx, &oauth2.Token{RefreshToken: a.RefreshToken}).Token()
	if err != nil {
		return "", fmt.Errorf("the sign-in to workspace %s could not be renewed: %w: %s%s", a.Workspace.Name, err, again, c.watch().Hint(err))
	}
	if err := p.accept(a, tok, ""); err != nil {
		return "", fmt.Errorf("the sign-in to workspace %s could not be renewed: %w: %s", a.Workspace.Name, err, again)
	}
	return "token renewed until " + a.Expiry.UTC().Format(time.RFC3339), c.Store.Save(a)
}

// deviceFlow is RFC 8628: the person signs in wherever there is a browser.
func (c *Client) deviceFlow(p *provider) (*oauth2.Token, error) {
	if p.conf.Endpoint.DeviceAuthURL == "" {
		return nil, errors.New("this identity provider has no device flow: leave --device out")
	}
	da, err := p.conf.DeviceAuth(p.ctx)
	if err != nil {
		return nil, err
	}
	open := da.VerificationURIComplete
	if open == "" {
		open = da.VerificationURI
	}
	if !idpurl.IsWebPage(open) {
		return nil, fmt.Errorf("the page to confirm the code at is %q, which is no web page", open)
	}
	fmt.Fprintf(c.err(), "Open this page on any device and confirm the code %s:\n", terminal.OneLine(da.UserCode))
	fmt.Fprintln(c.out(), terminal.OneLine(open))
	return p.conf.DeviceAccessToken(p.ctx, da)
}

// browserFlow is the authorization code flow with PKCE and a redirect to the loopback address (RFC 8252).
func (c *Client) browserFlow(p *provider, nonce string, noBrowser bool) (*oauth2.Token, error) {
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", p.account.RedirectPort))
	switch {
	case err != nil && p.account.RedirectPort != 0:
		return nil, fmt.Errorf("port %d, which the identity provider is to send the answer to, can't be had: %w: end the program that has it, or name another with --redirect-port that the provider knows", p.account.RedirectPort, err)
	case err != nil:
		return nil, fmt.Errorf("no loopback port for the answer: %w: try --device", err)
	}
	// By name, because some providers take only "localhost" for a public client. Where the name means ::1 first, we
	// listen there too.
	port := l.Addr().(*net.TCPAddr).Port
	p.conf.RedirectURL = fmt.Sprintf("http://localhost:%d/callback", port)
	state, verifier := random(), oauth2.GenerateVerifier()

	type answer struct {
		code string
		err  error
	}
	answers := make(chan answer, 1)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /callback", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if subtle.ConstantTimeCompare([]byte(q.Get("state")), []byte(state)) != 1 {
			http.Error(w, "This answer belongs to another sign-in. Run rdv login again.", http.StatusBadRequest)
			return
		}
		a := answer{code: q.Get("code")}
		text := "You are signed in. You may close this window."
		if a.code == "" {
			a.err = fmt.Errorf("the identity provider refused: %s %s", q.Get("error"), q.Get("error_description"))
			text = "The sign-in failed. See the terminal."
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintln(w, text)
		select {
		case answers <- a:
		default:
		}
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go srv.Serve(l)
	if l6, err := net.Listen("tcp", fmt.Sprintf("[::1]:%d", port)); err == nil {
		go srv.Serve(l6)
	}
	defer func() {
		// The browser gets its page before the listener goes.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx), 2*time.Second)
		defer cancel()
		srv.Shutdown(ctx)
	}()

	// provider has checked the endpoint. The desktop's opener would take any scheme, so this one place checks the page too.
	page := p.conf.AuthCodeURL(state, oidc.Nonce(nonce), oauth2.S256ChallengeOption(verifier))
	if !idpurl.IsWebPage(page) {
		return nil, fmt.Errorf("the page to sign in at is %q, which is no web page", page)
	}
	fmt.Fprintln(c.err(), "Open this page to sign in:")
	fmt.Fprintln(c.out(), page)
	if !noBrowser {
		open := c.openBrowser
		if open == nil {
			open = openBrowser
		}
		if err := open(page); err != nil {
			fmt.Fprintf(c.err(), "(no browser was opened: %v)\n", err)
		}
	}
	select {
	case a := <-answers:
		if a.err != nil {
			return nil, a.err
		}
		return p.conf.Exchange(p.ctx, a.code, oauth2.VerifierOption(verifier))
	case <-p.ctx.Done():
		return nil, fmt.Errorf("nobody signed in in time: %w", p.ctx.Err())
	}
}

// openBrowser starts the desktop's browser, where there is a desktop.
func openBrowser(page string) error {
	var cmd *exec.Cmd
	switch runtime.GOOS {
	case "windows":
		cmd = exec.Command("rundll32", "url.dll,FileProtocolHandler", page)
	case "darwin":
		cmd = exec.Command("open", page)
	default:
		if os.Getenv("DISPLAY") == "" && os.Getenv("WAYLAND_DISPLAY") == "" {
			return errors.New("no graphical session")
		}
		cmd = exec.Command("xdg-open", page)
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	go cmd.Wait()
	return nil
}

// random is 256 bits as text.
func random() string {
	b := make([]byte, 32)
	rand.Read(b)
	return strings.TrimRight(base64.URLEncoding.EncodeToString(b), "=")
}
