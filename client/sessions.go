package client

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"text/tabwriter"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/terminal"
)

// watchEvery is how often Sessions looks again.
const watchEvery = 2 * time.Second

func (f *feed) sessions(ctx context.Context) ([]brokerapi.Session, error) {
	var s brokerapi.Sessions
	return s.Sessions, f.get(ctx, brokerapi.PathSessions, nil, &s)
}

// Sessions prints the user's own sessions, and with watch again each time that they change, until ctx ends.
func (c *Client) Sessions(ctx context.Context, asJSON, watch bool) error {
	f, err := c.open(ctx)
	if err != nil {
		return err
	}
	var before []brokerapi.Session
	for first := true; ; first = false {
		all, err := f.sessions(ctx)
		if ctx.Err() != nil && watch && !first {
			return nil
		}
		if err != nil {
			return err
		}
		if first || !reflect.DeepEqual(all, before) {
			if err := c.printSessions(f, all, asJSON); err != nil || !watch {
				return err
			}
			before = all
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchEvery):
		}
		if _, err := c.fresh(ctx, f.account); err != nil { // a sign-in may end while one watches
			return err
		}
	}
}

func (c *Client) printSessions(f *feed, all []brokerapi.Session, asJSON bool) error {
	if asJSON {
		return c.printJSON(brokerapi.Sessions{Sessions: all})
	}
	if len(all) == 0 {
		fmt.Fprintf(c.err(), "You have no session in workspace %s: `rdv list` shows what you may open.\n", f.account.Workspace.Name)
		return nil
	}
	w := tabwriter.NewWriter(c.out(), 0, 4, 3, ' ', 0)
	fmt.Fprintln(w, "SESSION\tRESOURCE\tHOST\tACCOUNT\tSTATE\tSINCE\tCLIENT\tACTIVITY")
	for _, s := range all {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", terminal.OneLine(s.ID), terminal.OneLine(s.Resource), terminal.OneLine(s.Host), terminal.OneLine(s.Account), terminal.OneLine(s.State),
			s.Since.Local().Format("2006-01-02 15:04:05"), terminal.OneLine(s.Client), terminal.OneLine(s.ActivityID))
	}
	return w.Flush()
}

// Act does something to one of the user's own sessions: bus.ActEnd, or bus.ActDisconnect.
func (c *Client) Act(ctx context.Context, act, session string) error {
	f, err := c.open(ctx)
	if err != nil {
		return err
	}
	f.http.Timeout = actTimeout
	body, err := json.Marshal(brokerapi.ActRequest{SessionID: session, Act: act})
	if err != nil {
		return err
	}
	data, err := f.do(ctx, http.MethodPost, brokerapi.PathSessions, nil, body)
	if err != nil {
		return err
	}
	var done brokerapi.ActResponse
	if err := json.Unmarshal(data, &done); err != nil {
		return fmt.Errorf("workspace %s: its answer can't be read: %w", f.account.URL, err)
	}
	fmt.Fprintf(c.out(), "session %s: %s\n", session, terminal.OneLine(done.Detail))
	return nil
}

// actTimeout is for a host that ends what runs on it; the broker gives up sooner.
const actTimeout = 45 * time.Second
