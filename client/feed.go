package client

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"text/tabwriter"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/clock"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/terminal"
	"rendezvous.dev/rendezvous/wire/trace"
)

// maxAnswer bounds what a broker may answer, in bytes.
const maxAnswer = 8 << 20

// maxCode bounds a refusal's code, in bytes.
const maxCode = 64

// feed speaks to one workspace's broker.
type feed struct {
	account *Account
	// activity is the connect's; empty outside of one, where the broker gives each request its own.
	activity string
	http     *http.Client
	clock    *clock.Watch
}

func (c *Client) newFeed(a *Account, activity string) (*feed, error) {
	hc, err := c.httpClient(a.CA)
	if err != nil {
		return nil, fmt.Errorf("workspace %s: %w", a.URL, err)
	}
	return &feed{account: a, activity: activity, http: hc, clock: c.watch()}, nil
}

// open finds the account, makes its token fresh and gives its feed.
func (c *Client) open(ctx context.Context) (*feed, error) {
	a, err := c.Store.Find(c.Workspace)
	if err != nil {
		return nil, err
	}
	if _, err := c.fresh(ctx, a); err != nil {
		return nil, err
	}
	return c.newFeed(a, "")
}

// do sends one request and gives the body of its answer. A refusal comes back as *refusal.Error with the activity id.
func (f *feed) do(ctx context.Context, method, path string, query url.Values, body []byte) ([]byte, error) {
	data, err := f.request(ctx, method, path, query, body)
	return data, clean(err)
}

func (f *feed) request(ctx context.Context, method, path string, query url.Values, body []byte) ([]byte, error) {
	u := f.account.URL + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if f.activity != "" {
		req.Header.Set(brokerapi.HeaderActivity, f.activity)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if f.account.IDToken != "" {
		req.Header.Set("Authorization", "Bearer "+f.account.IDToken)
	}
	res, err := f.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("workspace %s: %w: check its URL, the network, and the CA of its certificate (rdv login --ca-file)%s%s", f.account.URL, unwrapURL(err), f.clock.Hint(err), suffix(f.activity))
	}
	defer res.Body.Close()
	activity := cmp.Or(f.activity, res.Header.Get(brokerapi.HeaderActivity))
	data, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("workspace %s: %w%s", f.account.URL, err, suffix(activity))
	}
	if res.StatusCode/100 == 2 {
		return data, nil
	}
	var e brokerapi.ErrorBody
	if json.Unmarshal(data, &e) == nil && e.Error != nil {
		if !isActivity(e.Error.ActivityID) {
			e.Error = e.Error.With(activity)
		}
		e.Error.Code = refusal.Code(e.Error.Code[:min(len(e.Error.Code), maxCode)]) // a newer broker may know more codes
		e.Error.Message = refusal.Received(e.Error, e.Error.Code).Message
		switch e.Error.Code {
		case refusal.TokenExpired, refusal.TokenInvalid, refusal.TokenMissing, refusal.TokenWrongAudience:
			return nil, fmt.Errorf("workspace %s: %w: run `rdv login %s` again%s", f.account.Workspace.Name, e.Error, f.account.URL, f.clock.Hint(nil))
		}
		return nil, fmt.Errorf("workspace %s: %w", f.account.Workspace.Name, e.Error)
	}
	return nil, fmt.Errorf("workspace %s answered %s to %s: is that the URL of a Rendezvous workspace?%s", f.account.URL, res.Status, path, suffix(activity))
}

// suffix ends an error with its activity id, where there is one.
func suffix(activity string) string {
	if activity == "" {
		return ""
	}
	return " (activity " + activity + ")"
}

// unwrapURL takes away the method and URL that net/http puts before an error; the caller names the workspace.
func unwrapURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func (f *feed) get(ctx context.Context, path string, query url.Values, out any) error {
	data, err := f.do(ctx, http.MethodGet, path, query, nil)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("workspace %s: its answer to %s can't be read: %w: is that the URL of a Rendezvous workspace?%s", f.account.URL, path, err, suffix(f.activity))
	}
	return nil
}

func (f *feed) resources(ctx context.Context) (*brokerapi.Resources, error) {
	var r brokerapi.Resources
	return &r, f.get(ctx, brokerapi.PathResources, nil, &r)
}

// post sends rdv's own steps of a connect.
func (f *feed) post(ctx context.Context, events []trace.Event) error {
	data, err := json.Marshal(events)
	if err != nil {
		return err
	}
	_, err = f.do(ctx, http.MethodPost, brokerapi.PathActivities+f.activity, nil, data)
	return err
}

// List prints what the user may use, and the gateways.
func (c *Client) List(ctx context.Context, asJSON bool) error {
	f, err := c.open(ctx)
	if err != nil {
		return err
	}
	r, err := f.resources(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(r)
	}
	if r.Notice != "" {
		fmt.Fprintln(c.err(), terminal.OneLine(r.Notice))
	}
	if len(r.Resources) == 0 {
		fmt.Fprintf(c.err(), "Workspace %s grants %s nothing yet: ask its administrator for a resource that names you or one of your groups.\n", terminal.OneLine(f.account.Workspace.Name), terminal.OneLine(r.User))
		return nil
	}
	w := tabwriter.NewWriter(c.out(), 0, 4, 3, ' ', 0)
	fmt.Fprintln(w, "NAME\tDISPLAY NAME\tTYPE\tPOOL")
	for _, x := range r.Resources {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", terminal.OneLine(x.Name), terminal.OneLine(x.DisplayName), terminal.OneLine(x.Type), terminal.OneLine(x.HostPool))
	}
	fmt.Fprintln(w, "\nGATEWAY\tREGION\tADDRESS\tCONNECTIONS")
	for _, g := range r.Gateways {
		fmt.Fprintf(w, "%s\t%s\t%s:%d\t%d\n", terminal.OneLine(g.Name), terminal.OneLine(g.Region), terminal.OneLine(g.Hostname), g.Port, g.Connections)
	}
	return w.Flush()
}

func (c *Client) printJSON(v any) error {
	e := json.NewEncoder(terminal.JSON(c.Out))
	e.SetIndent("", "  ")
	return e.Encode(v)
}
