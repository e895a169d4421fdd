package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/trace"
)

// Modes of `rdv connect`.
const (
	ModeTSGU = "tsgu" // the gateway protocol that every RDP client speaks
	ModeRaw  = "raw"  // raw RDP in a WebSocket, FreeRDP 3 only
	ModeARM  = "arm"  // FreeRDP 3's type:arm: the gateway says which gateway is to serve, then as raw
)

// ConnectOptions says what to connect to, and how.
type ConnectOptions struct {
	Resource string
	// Gateway is a name to use instead of the rule's choice.
	Gateway string
	Mode    string
	// Print writes the connection file (raw mode: FreeRDP's arguments, one per line) to Out instead of starting a client.
	Print bool
	// RDPClient is a program to use instead of the first one found.
	RDPClient string
	// Args are passed on to the RDP client.
	Args []string
}

// connect is one connect under way.
type connect struct {
	*feed
	steps []trace.Event
}

// step runs one step of the sequence and notes when it was, how long it took, and how it ended.
func (c *connect) step(n int, run func() (detail string, err error)) error {
	began := time.Now()
	detail, err := run()
	e := trace.Event{ActivityID: c.activity, Step: n, Component: "rdv", At: began, Duration: time.Since(began), Detail: detail}
	if err != nil {
		e.Detail, e.Error = err.Error(), "client-error"
	}
	c.steps = append(c.steps, e)
	return err
}

// Connect opens a resource on the user's screen. It returns when the RDP client ends, with its *ExitError where it failed.
func (c *Client) Connect(ctx context.Context, o ConnectOptions) error {
	if o.Mode == "" {
		o.Mode = ModeTSGU
	}
	if o.Mode != ModeTSGU && o.Mode != ModeRaw && o.Mode != ModeARM {
		return fmt.Errorf("--mode %q: it is %s, %s or %s", o.Mode, ModeTSGU, ModeRaw, ModeARM)
	}
	var program rdpClient
	var err error
	if !o.Print { // before any ticket is made
		if program, err = findRDPClient(o.RDPClient, o.Mode); err != nil {
			return err
		}
	}
	a, err := c.Store.Find(c.Workspace)
	if err != nil {
		return err
	}
	f, err := c.newFeed(a, newActivity())
	if err != nil {
		return err
	}
	fmt.Fprintf(c.err(), "activity %s\n", f.activity)
	began := time.Now()
	cn := &connect{feed: f}
	dir, err := runtimeDir()
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	file, rdp, account, err := c.prepare(ctx, cn, o, dir)
	err = clean(err)
	if err != nil {
		if a.IDToken != "" {
			c.postSteps(ctx, cn)
		}
		return err
	}
	secrets, err := rdp.gatewayOptions(o.Mode, a.URL)
	if err != nil {
		return fmt.Errorf("resource %s: %w (activity %s)", o.Resource, err, f.activity)
	}
	if o.Print {
		c.postSteps(ctx, cn)
		return c.print(file, o.Mode, secrets)
	}
	// The steps travel while the client starts: they must not make the user wait.
	posted := make(chan struct{})
	go func() {
		defer close(posted)
		c.postSteps(ctx, cn)
	}()
	err = c.launch(ctx, program, file, secrets, slices.Concat(signIn(program, account), o.Args), a.CA)
	<-posted
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		c.refusals(ctx, f, began)
		return exitError(filepath.Base(program.path), f.activity, exit)
	}
	return err
}

// prepare goes through steps 1 to 7 and leaves a connection file for the chosen gateway in dir.
func (c *Client) prepare(ctx context.Context, cn *connect, o ConnectOptions, dir string) (path string, rdp rdpFile, account string, err error) {
	a := cn.account
	err = cn.step(trace.StepSubscribe, func() (string, error) {
		// The workspace may have changed its identity provider since the login: fresh sees to that. What the answer lacks is
		// absent, not as before.
		var ws brokerapi.Workspace
		if err := cn.get(ctx, brokerapi.PathWorkspace, nil, &ws); err != nil {
			return a.URL, err
		}
		a.Workspace = ws
		return a.URL, nil
	})
	if err != nil {
		return "", rdp, "", err
	}
	if err = cn.step(trace.StepAuthenticate, func() (string, error) { return c.fresh(ctx, a) }); err != nil {
		return "", rdp, "", err
	}
	var list *brokerapi.Resources
	err = cn.step(trace.StepPassToken, func() (string, error) {
		list, err = cn.resources(ctx)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%d resources, %d gateways", len(list.Resources), len(list.Gateways)), nil
	})
	if err != nil {
		return "", rdp, "", err
	}
	resource, err := findResource(list, o.Resource, a, cn.activity)
	if err != nil {
		return "", rdp, "", err
	}
	var near []string
	err = cn.step(trace.StepDialGateway, func() (detail string, err error) {
		near, detail, err = cn.chooseGateway(ctx, list.Gateways, o.Gateway)
		return detail, err
	})
	if err != nil {
		return "", rdp, "", err
	}
	fmt.Fprintf(c.err(), "gateway %s\n", cn.steps[len(cn.steps)-1].Detail)
	err = cn.step(trace.StepStore, func() (string, error) {
		query := url.Values{"gateway": near, "activity": {cn.activity}}
		if o.Mode == ModeARM {
			query.Set("form", brokerapi.FormARM)
		}
		data, err := cn.do(ctx, http.MethodGet, resource.RDPFile, query, nil)
		if err != nil {
			return "", err
		}
		if rdp, err = parseRDP(data); err != nil {
			return "", fmt.Errorf("resource %s: %w", resource.Name, err)
		}
		if o.Mode == ModeRaw {
			data = rdp.withoutGateway()
		}
		path = filepath.Join(dir, resource.Name+".rdp")
		return fmt.Sprintf("%s, %d bytes, for %s", resource.Name, len(data), rdp.get("gatewayhostname")), os.WriteFile(path, data, 0o600)
	})
	return path, rdp, resource.Account, err
}

// signIn is what FreeRDP needs in order to log in without asking, where the host knows the user by the connection. The file says
// it too; a broker of before does not, and xrdp logs in at once only with a password, whatever it is.
func signIn(program rdpClient, account string) []string {
	if account == "" || program.kind != kindFreeRDP {
		return nil
	}
	return []string{"/u:" + account, "/p:" + brokerapi.NotAPassword}
}

// findResource gives the one that the user named.
func findResource(list *brokerapi.Resources, name string, a *Account, activity string) (brokerapi.Resource, error) {
	var have []string
	for _, r := range list.Resources {
		if r.Name == name {
			if !isPathOf(r) || filepath.Base(r.Name) != r.Name {
				return r, fmt.Errorf("workspace %s sends resource %q to %q, which is no path of a feed (activity %s)", a.Workspace.Name, r.Name, r.RDPFile, activity)
			}
			return r, nil
		}
		have = append(have, r.Name)
	}
	if len(have) == 0 {
		have = []string{"nothing"}
	}
	return brokerapi.Resource{}, fmt.Errorf("workspace %s grants %s no resource %q, but: %s (activity %s)", a.Workspace.Name, list.User, name, strings.Join(have, ", "), activity)
}

// chooseGateway measures and applies the rule; a gateway that the user names is taken without. It gives all gateways of
// the lowest group, best first: of these the feed, which sees at once who else is on the way, has the last word.
func (f *feed) chooseGateway(ctx context.Context, gateways []brokerapi.Gateway, named string) (near []string, detail string, err error) {
	if named != "" {
		var have []string
		for _, g := range gateways {
			if g.Name == named { // its client may have a way to it that this process has not
				return []string{named}, named + ": named by the user, not measured", nil
			}
			have = append(have, g.Name)
		}
		return nil, "", fmt.Errorf("--gateway %s: workspace %s has: %s (activity %s)", named, f.account.Workspace.Name, strings.Join(have, ", "), f.activity)
	}
	ordered, ok := rank(f.measure(ctx, gateways))
	if !ok {
		return nil, "", noGateway(f, ordered)
	}
	best := ordered[0]
	detail = fmt.Sprintf("%s: opened in %s, round trip %s", best.Name, best.Open.Round(10*time.Microsecond), best.RoundTrip.Round(10*time.Microsecond))
	return nearest(ordered), detail + "; weighed " + describe(ordered), nil
}

// noGateway says why none can be used.
func noGateway(f *feed, ordered []Measured) error {
	if len(ordered) == 0 {
		return fmt.Errorf("workspace %s has no gateway: its administrator must make a Gateway that its gatewaySelector selects (activity %s)", f.account.Workspace.Name, f.activity)
	}
	var parts []string
	for _, m := range ordered {
		parts = append(parts, fmt.Sprintf("%s (%s:%d): %s", m.Name, m.Hostname, m.Port, m.Problem))
	}
	return fmt.Errorf("no gateway of workspace %s can be reached: %s: check the network, and the CA of their certificates (rdv login --ca-file)%s (activity %s)",
		f.account.Workspace.Name, strings.Join(parts, "; "), f.clock.Hint(nil), f.activity)
}

// postSteps hands our steps to the brokers' timeline. It is worth a line when it fails, and no more.
func (c *Client) postSteps(ctx context.Context, cn *connect) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := cn.post(ctx, cn.steps); err != nil {
		fmt.Fprintf(c.err(), "the timeline lacks rdv's own steps: %v\n", err)
	}
}

// print writes what a client would have been started with.
func (c *Client) print(file, mode string, secrets []string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if mode != ModeRaw {
		_, err = c.Out.Write(data)
		return err
	}
	// Raw mode has no file that a later start could name: its target stands in the arguments.
	rdp, err := parseRDP(data)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.out(), "/v:%s\n%s\n", rdp.get("full address"), secrets[0])
	return err
}

// runtimeDir is a new private folder for the connection file, in memory where the system has one for that.
func runtimeDir() (string, error) {
	base := os.Getenv("XDG_RUNTIME_DIR")
	if fi, err := os.Stat(base); err != nil || !fi.IsDir() {
		base = ""
	}
	return os.MkdirTemp(base, "rdv-") // 0700
}
