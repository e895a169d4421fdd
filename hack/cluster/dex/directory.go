package main

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"fmt"
	"log/slog"
	"strings"

	"github.com/dexidp/dex/connector"
)

// directoryType is both the connector's type and its id.
const directoryType = "directory"

// user is one person of the directory.
type user struct {
	ID       string   `json:"id"` // becomes part of the sub claim
	Name     string   `json:"name"`
	Email    string   `json:"email"` // what the person types to log in
	Password string   `json:"password"`
	Groups   []string `json:"groups"`
}

// directoryConfig is the connector's configuration: the users, in clear. It is
// for demonstration and tests; nobody's real password belongs here.
type directoryConfig struct {
	Users []user `json:"users"`
}

// Open implements Dex's server.ConnectorConfig.
func (c *directoryConfig) Open(string, *slog.Logger) (connector.Connector, error) {
	return directory(c.Users), nil
}

// directory checks passwords and knows groups. It implements
// connector.PasswordConnector and connector.RefreshConnector.
type directory []user

// Prompt labels the login form's first field.
func (directory) Prompt() string { return "Email" }

// Login compares in constant time; an unknown user costs the same as a wrong password.
func (d directory) Login(_ context.Context, s connector.Scopes, email, password string) (connector.Identity, bool, error) {
	u, known := d.find(func(u user) bool { return strings.EqualFold(u.Email, email) })
	want, got := sha256.Sum256([]byte(u.Password)), sha256.Sum256([]byte(password))
	if subtle.ConstantTimeCompare(want[:], got[:]) != 1 || !known {
		return connector.Identity{}, false, nil
	}
	return u.identity(s), true, nil
}

// Refresh reads the user's groups again, as a real directory would.
func (d directory) Refresh(_ context.Context, s connector.Scopes, old connector.Identity) (connector.Identity, error) {
	if u, known := d.find(func(u user) bool { return u.ID == old.UserID }); known {
		return u.identity(s), nil
	}
	return old, fmt.Errorf("user %q is not in the directory any more", old.UserID)
}

func (d directory) find(match func(user) bool) (user, bool) {
	for _, u := range d {
		if match(u) {
			return u, true
		}
	}
	return user{}, false
}

func (u user) identity(s connector.Scopes) connector.Identity {
	id := connector.Identity{
		UserID:            u.ID,
		Username:          u.Name,
		PreferredUsername: strings.ToLower(u.Name),
		Email:             u.Email,
		EmailVerified:     true,
	}
	if s.Groups {
		id.Groups = u.Groups
	}
	return id
}

// reloading reads the key pair at each handshake, so that a renewed certificate
// needs no restart. A handshake is rare enough here that this costs nothing.
func reloading(cert, key string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(cert, key)
			return &pair, err
		},
	}
}
