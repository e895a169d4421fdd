package client

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/terminal"
	"rendezvous.dev/rendezvous/wire/trace"
)

// Explain prints the timeline of one connect.
func (c *Client) Explain(ctx context.Context, activity string, asJSON bool) error {
	activity = strings.ToLower(strings.Trim(activity, "{} "))
	if !isActivity(activity) {
		return fmt.Errorf("%q is no activity id: it looks like %s, and stands in the first line of `rdv connect` and in every error", activity, newActivity())
	}
	f, err := c.open(ctx)
	if err != nil {
		return err
	}
	var events []trace.Event
	if err := f.get(ctx, brokerapi.PathActivities+activity, nil, &events); err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(events)
	}
	if len(events) == 0 {
		return fmt.Errorf("workspace %s knows nothing of activity %s: timelines are kept for a while only, and only for their own user", f.account.Workspace.Name, activity)
	}
	return explain(c.out(), activity, events)
}

// Recent prints the user's latest connects, and what gateways refused before they knew whose it is.
func (c *Client) Recent(ctx context.Context, asJSON bool) error {
	f, err := c.open(ctx)
	if err != nil {
		return err
	}
	list, err := f.recent(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(list)
	}
	if len(list) == 0 {
		fmt.Fprintf(c.err(), "Workspace %s knows of no connect of yours: timelines are kept for a while only.\n", terminal.OneLine(f.account.Workspace.Name))
		return nil
	}
	w := tabwriter.NewWriter(c.out(), 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "BEGAN\tACTIVITY\tSTEP\tRESULT\tDETAIL")
	for _, s := range list {
		result := "-"
		switch {
		case s.Error != "":
			result = "ERROR " + s.Error
		case s.Step >= trace.StepJoin:
			result = "ok"
		}
		detail := s.Detail
		if s.Anonymous {
			detail = "(before any ticket was shown; it may be somebody else's) " + detail
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\n", s.At.Local().Format(time.DateTime), terminal.OneLine(s.ActivityID), s.Step, terminal.OneLine(result), terminal.OneLine(detail))
	}
	return w.Flush()
}

// ExplainLast prints the timeline of the user's latest connect.
func (c *Client) ExplainLast(ctx context.Context, asJSON bool) error {
	f, err := c.open(ctx)
	if err != nil {
		return err
	}
	list, err := f.recent(ctx)
	if err != nil {
		return err
	}
	for _, s := range list {
		if !s.Anonymous {
			return c.Explain(ctx, s.ActivityID, asJSON)
		}
	}
	return fmt.Errorf("workspace %s knows of no connect of yours: timelines are kept for a while only", terminal.OneLine(f.account.Workspace.Name))
}

func (f *feed) recent(ctx context.Context) (list []trace.Summary, err error) {
	return list, f.get(ctx, brokerapi.PathActivities, nil, &list)
}

// refusals tells what gateways and brokers refused since a moment: many RDP clients show a failure and nothing else.
func (c *Client) refusals(ctx context.Context, f *feed, since time.Time) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	list, err := f.recent(ctx)
	if err != nil {
		return
	}
	for _, s := range list {
		if s.Error == "" || s.At.Before(since) && s.ActivityID != f.activity {
			continue
		}
		fmt.Fprintf(c.err(), "refused: %s (%s, activity %s)\n", terminal.OneLine(s.Detail), terminal.OneLine(s.Error), terminal.OneLine(s.ActivityID))
	}
}

func isActivity(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, r := range s {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (r == '-') || !dash && !strings.ContainsRune("0123456789abcdef", r) {
			return false
		}
	}
	return true
}

// explain writes the table: each step in order, its events by time, and which steps nobody told of.
func explain(out io.Writer, activity string, events []trace.Event) error {
	events = slices.Clone(events)
	slices.SortStableFunc(events, func(a, b trace.Event) int { return a.At.Compare(b.At) })
	first := events[0].At
	byStep := map[int][]trace.Event{}
	for _, e := range events {
		byStep[e.Step] = append(byStep[e.Step], e)
	}
	fmt.Fprintf(out, "activity %s, began %s\n\n", activity, first.UTC().Format("2006-01-02 15:04:05.000 MST"))
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "STEP\tWHAT\tBY\tAT\tTOOK\tDETAIL")
	var missing []string
	for step, title := range trace.Titles {
		list := byStep[step]
		if len(list) == 0 && step != trace.StepEnrol { // a host enrols once, not in each connect
			missing = append(missing, fmt.Sprintf("%d %s", step, title))
			fmt.Fprintf(w, "%d\t%s\t-\t-\t-\tnot reported\n", step, title)
		}
		for i, e := range list {
			number, what := fmt.Sprint(step), title
			if i > 0 {
				number, what = "", ""
			}
			detail := e.Detail
			if e.Error != "" {
				detail = "ERROR " + e.Error + ": " + detail
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t+%s\t%s\t%s\n", number, what, terminal.OneLine(e.Component), short(e.At.Sub(first)), short(e.Duration), terminal.OneLine(detail))
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(missing) > 0 {
		fmt.Fprintf(out, "\nnot reported: %s\n", strings.Join(missing, "; "))
	}
	return nil
}

// short is a duration in milliseconds, or seconds where there are many.
func short(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%.1fms", float64(d)/float64(time.Millisecond))
	}
	return fmt.Sprintf("%.1fs", d.Seconds())
}
