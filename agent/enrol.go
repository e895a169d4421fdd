package agent

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/clock"
	"rendezvous.dev/rendezvous/wire/identity"
	"rendezvous.dev/rendezvous/wire/rdpkey"
	"rendezvous.dev/rendezvous/wire/refusal"
)

// enrolTimeout bounds one request; an issuer may take a while to sign.
const enrolTimeout = 60 * time.Second

const (
	// maxAnswer bounds what a broker may answer, in bytes.
	maxAnswer = 1 << 20
	// maxActivity bounds an activity id in an answer's header, which is a GUID.
	maxActivity = 64
)

// errNoToken says that there is nothing to enrol with.
var errNoToken = errors.New("no registration token")

// Enroll makes this machine a session host, once: it does nothing where a good membership is there already, retries
// what may pass, and returns a refusal that will not.
func (a *Agent) Enroll(ctx context.Context) (pool string, err error) {
	if err := a.store.prepare(); err != nil {
		return "", err
	}
	m, err := a.membership(ctx, false)
	if err != nil {
		return "", err
	}
	return m.Pool, nil
}

// membership is the one on disk where it is good, else a new one. A patient caller (a service) waits for a token that
// works; any other gets the refusal.
func (a *Agent) membership(ctx context.Context, patient bool) (*member, error) {
	m, err := a.store.load()
	switch {
	case err == nil && time.Now().Before(m.client.NotAfter):
		if m.Host != a.opts.Host {
			a.log.Warn("the state folder belongs to another host name, which stays in force: remove the folder to enrol anew", "enrolledAs", m.Host)
		}
		return m, nil
	case err == nil:
		a.log.Warn("the certificate of this host has expired, enrolling again", "notAfter", m.client.NotAfter)
	case !errors.Is(err, errNoState):
		a.log.Error("the saved membership can't be used, enrolling again", "error", err)
	}

	retry := backoff{min: a.opts.timing.retryMin, max: a.opts.timing.retryMax}
	for {
		token, err := a.readToken()
		if err == nil {
			if m, err = a.enrolOnce(ctx, token); err == nil {
				a.trouble(nil, false)
				return m, nil
			}
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		final := isFinal(err)
		if final && !patient {
			return nil, fmt.Errorf("enrolment of session host %s at %s: %w", a.opts.Host, a.opts.Broker, err)
		}
		retry.max = a.opts.timing.retryMax
		if final {
			retry.max = a.opts.timing.refusedMax
		}
		wait := retry.delay()
		a.trouble(err, final)
		a.log.Error("enrolment failed", "broker", a.opts.Broker, "error", err, "final", final, "retryIn", wait.Round(time.Millisecond).String())
		if err := a.waitForToken(ctx, token, wait); err != nil {
			return nil, err
		}
	}
}

// waitForToken waits for d, or for another token in the file.
func (a *Agent) waitForToken(ctx context.Context, old string, d time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d, errors.New("waited"))
	defer cancel()
	for {
		if err := sleep(ctx, min(d, time.Second)); err != nil {
			if context.Cause(ctx).Error() == "waited" {
				return nil
			}
			return err
		}
		if token, err := a.readToken(); err == nil && token != old {
			return nil
		}
	}
}

// isFinal says that trying again with the same token is of no use.
func isFinal(err error) bool {
	var r *refusal.Error
	if !errors.As(err, &r) {
		return errors.Is(err, errNoToken)
	}
	switch r.Code {
	case refusal.RegistrationInvalid, refusal.RegistrationExpired, refusal.RegistrationSpent, refusal.BadRequest, refusal.WrongRole:
		return true
	}
	return false
}

func (a *Agent) readToken() (string, error) {
	if a.opts.TokenFile == "" {
		return "", fmt.Errorf("%w: put the one of the HostPool's registration Secret into a file and name it with --token-file", errNoToken)
	}
	data, err := os.ReadFile(a.opts.TokenFile)
	if err != nil {
		return "", fmt.Errorf("%w: %v: put the one of the HostPool's registration Secret there", errNoToken, err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return "", fmt.Errorf("%w: %s is empty: put the one of the HostPool's registration Secret there", errNoToken, a.opts.TokenFile)
	}
	return token, nil
}

// enrolOnce is one attempt: learn the names, ask for the certificates, save them.
func (a *Agent) enrolOnce(ctx context.Context, token string) (m *member, err error) {
	ctx, cancel := context.WithTimeout(ctx, enrolTimeout)
	defer cancel()
	client, err := a.brokerClient()
	if err != nil {
		return nil, err
	}
	defer client.CloseIdleConnections()
	watch := &clock.Watch{}
	client.Transport = watch.Transport(client.Transport)
	defer func() { err = watch.Wrap(err) }()

	var pre brokerapi.PreEnroll
	if err := a.call(ctx, client, http.MethodGet, token, nil, &pre); err != nil {
		return nil, err
	}
	host := a.opts.Host
	if pre.Host != "" && pre.Host != host {
		a.log.Warn("the registration token is another host's, whose name is taken", "tokenHost", pre.Host)
		host = pre.Host
	}
	id := identity.Agent(pre.Namespace, pre.Workspace, pre.Pool, host)
	var rdp *rdpkey.Kind
	if pre.RDPCertificate && a.install != nil {
		rdp = &pre.RDPKey
	}
	m, req, err := a.enrolling.request(id, token, rdp)
	if err != nil {
		return nil, err
	}
	body := brokerapi.EnrollRequest{Token: token, Host: host, ClientCSR: req.ClientCSR, RDPCSR: req.RDPCSR}
	var res brokerapi.EnrollResponse
	if err := a.call(ctx, client, http.MethodPost, token, body, &res); err != nil {
		return nil, err
	}
	m.BusURLs, m.BusCA = res.BusURLs, res.BusCA
	m.ClientCertificate = res.ClientCertificate
	if req.RDPCSR != "" {
		m.RDPCertificate = res.RDPCertificate
	}
	if len(m.BusURLs) == 0 || m.BusCA == "" {
		return nil, errors.New("the broker's answer names no bus or no CA for it: look at the Workspace's conditions")
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("the broker's answer: %w", err)
	}
	if err := a.store.save(m); err != nil {
		return nil, fmt.Errorf("--state-dir: %w", err)
	}
	a.enrolling = enrolling{}
	a.log.Info("enrolled", "pool", m.Pool, "workspace", m.Workspace, "notAfter", m.client.NotAfter)
	return m, nil
}

// enrolling is an enrolment under way, whose keys stay the same until there is an answer: a broker whose answer was lost
// knows the machine by its key when it asks again.
type enrolling struct {
	id    identity.ID
	token string
	rdp   *rdpkey.Kind
	m     *member
	req   brokerapi.RenewRequest
}

// request gives the membership to be, with its keys, and the CSRs for it. rdp is the kind of the RDP server's key; nil for none.
func (e *enrolling) request(id identity.ID, token string, rdp *rdpkey.Kind) (*member, brokerapi.RenewRequest, error) {
	if e.m == nil || e.id != id || e.token != token || (e.rdp == nil) != (rdp == nil) || rdp != nil && *rdp != *e.rdp {
		sum := sha256.Sum256([]byte(token))
		m := &member{Namespace: id.Namespace, Workspace: id.Workspace, Pool: id.Pool, Host: id.Host, TokenHash: hex.EncodeToString(sum[:])}
		req, err := certificateRequest(id, m, rdp)
		if err != nil {
			return nil, req, err
		}
		*e = enrolling{id, token, rdp, m, req}
	}
	return e.m, e.req, nil
}

// certificateRequest makes the CSRs for id over new keys, which go into m. rdp is the kind of the RDP server's; nil for none.
func certificateRequest(id identity.ID, m *member, rdp *rdpkey.Kind) (brokerapi.RenewRequest, error) {
	var req brokerapi.RenewRequest
	key, err := rdpkey.Kind{}.Generate()
	if err != nil {
		return req, err
	}
	m.ClientKey = string(key)
	if req.ClientCSR, err = clientCSR(id, key); err != nil || rdp == nil {
		return req, err
	}
	if key, err = rdp.Generate(); err != nil {
		return req, err
	}
	m.RDPKey = string(key)
	req.RDPCSR, err = rdpCSR(id, key)
	return req, err
}

// brokerClient speaks HTTPS to the broker. The CA file is read anew each time: it may be mounted and renewed.
func (a *Agent) brokerClient() (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if a.opts.CAFile != "" {
		data, err := os.ReadFile(a.opts.CAFile)
		if err != nil {
			return nil, fmt.Errorf("--ca-file: %w", err)
		}
		if len(bytes.TrimSpace(data)) > 0 {
			conf.RootCAs = x509.NewCertPool()
			if !conf.RootCAs.AppendCertsFromPEM(data) {
				return nil, fmt.Errorf("--ca-file: %s holds no certificate", a.opts.CAFile)
			}
		}
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: conf, DialContext: a.dialer().DialContext}}, nil
}

// call sends one request to the broker's enrolment path. A refusal comes back as *refusal.Error.
func (a *Agent) call(ctx context.Context, c *http.Client, method, token string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.opts.Broker+brokerapi.PathEnroll, body)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusCreated {
		var e brokerapi.ErrorBody
		if json.Unmarshal(data, &e) == nil && e.Error != nil {
			activity := cmp.Or(e.Error.ActivityID, res.Header.Get(brokerapi.HeaderActivity))
			return refusal.Received(e.Error, refusal.Internal).With(refusal.Line(activity, maxActivity))
		}
		return fmt.Errorf("%s answered %s to %s: is that the URL of a Rendezvous broker?", a.opts.Broker, res.Status, brokerapi.PathEnroll)
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("%s: its answer can't be read: %w", a.opts.Broker, err)
	}
	return nil
}
