package client

import (
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/terminal"
)

// WhoAmI prints the user's token as the workspace reads it.
func (c *Client) WhoAmI(ctx context.Context, asJSON bool) error {
	f, err := c.open(ctx)
	if err != nil {
		return err
	}
	var who brokerapi.Identity
	if err := f.get(ctx, brokerapi.PathWhoAmI, nil, &who); err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(who)
	}
	list := func(names []string) string {
		if len(names) == 0 {
			return "none"
		}
		return terminal.OneLine(strings.Join(names, ", "))
	}
	w := tabwriter.NewWriter(c.out(), 0, 4, 3, ' ', 0)
	fmt.Fprintf(w, "workspace\t%s\t%s\n", terminal.OneLine(f.account.Workspace.Name), f.account.URL)
	fmt.Fprintf(w, "user\t%s\tfrom claim %s\n", terminal.OneLine(who.User), terminal.OneLine(who.UserClaim))
	fmt.Fprintf(w, "groups\t%s\tfrom claim %s\n", list(who.Groups), terminal.OneLine(who.GroupsClaim))
	fmt.Fprintf(w, "claims in the token\t%s\t\n", list(who.Claims))
	if !who.Expires.IsZero() {
		fmt.Fprintf(w, "token expires\t%s\t\n", who.Expires.Local().Format(time.DateTime))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(who.Resources) > 0 {
		fmt.Fprintln(w, "\nRESOURCE\tPOOL\tACCOUNT")
		for _, r := range who.Resources {
			account := r.Account
			switch {
			case r.Problem != "":
				account = "none: " + r.Problem
			case r.AccountClaim != "":
				account += " (from claim " + r.AccountClaim + ")"
			case account == "":
				account = "(the host asks)"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\n", terminal.OneLine(r.Name), terminal.OneLine(r.HostPool), terminal.OneLine(account))
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	if who.GroupsNotice != "" {
		fmt.Fprintln(c.err(), terminal.OneLine(who.GroupsNotice))
	}
	return nil
}
