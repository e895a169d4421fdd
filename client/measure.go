package client

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/choose"
	"rendezvous.dev/rendezvous/wire/proxydial"
	"rendezvous.dev/rendezvous/wire/terminal"
)

const (
	// measureTimeout bounds the measuring of all gateways together.
	measureTimeout = 3 * time.Second
	// roundTrips are counted after one that warms the connection. Their minimum is taken: noise only ever adds.
	roundTrips = 5
)

// Measured is one gateway as this machine reaches it.
type Measured struct {
	brokerapi.Gateway
	// Open is how long TCP and TLS took.
	Open time.Duration `json:"open"`
	// RoundTrip is the shortest of several.
	RoundTrip time.Duration `json:"roundTrip"`
	// Problem says why the gateway did not answer; empty where it did.
	Problem string `json:"problem,omitempty"`
	// Group is what the rule made of RoundTrip; -1 where there is none.
	Group int `json:"group"`
}

// measure asks all gateways at once.
func (f *feed) measure(ctx context.Context, gateways []brokerapi.Gateway) []Measured {
	ctx, cancel := context.WithTimeout(ctx, measureTimeout)
	defer cancel()
	found := make([]Measured, len(gateways))
	var wg sync.WaitGroup
	for i, g := range gateways {
		wg.Go(func() {
			found[i] = Measured{Gateway: g, Group: -1}
			if err := f.measureOne(ctx, &found[i]); err != nil {
				found[i].Problem = Clean(err)
			}
		})
	}
	wg.Wait()
	return found
}

// measureOne times round trips on one connection to a gateway's own listener. One round trip is enough for an answer:
// a slow gateway is slow, not silent.
func (f *feed) measureOne(ctx context.Context, m *Measured) error {
	pool, err := roots(f.account.CA)
	if err != nil {
		return err
	}
	addr := net.JoinHostPort(m.Hostname, strconv.Itoa(int(m.Port)))
	began := time.Now()
	raw, err := proxydial.Dialer{}.DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer raw.Close()
	conn := tls.Client(raw, &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool, ServerName: m.Hostname})
	if err := conn.HandshakeContext(ctx); err != nil {
		return err
	}
	m.Open = time.Since(began)
	// The connection is made already, and only one is ever asked for.
	taken := false
	t := &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
		if taken {
			return nil, fmt.Errorf("%s closed the connection", addr)
		}
		taken = true
		return conn, nil
	}}
	defer t.CloseIdleConnections()
	for i := range 1 + roundTrips {
		began = time.Now()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+addr+m.PingPath, nil)
		if err != nil {
			return err
		}
		if f.activity != "" {
			req.Header.Set(brokerapi.HeaderActivity, f.activity)
		}
		res, err := t.RoundTrip(req)
		if err == nil {
			io.Copy(io.Discard, io.LimitReader(res.Body, 4<<10))
			res.Body.Close()
			if res.StatusCode/100 != 2 {
				return fmt.Errorf("%s answered %s to %s", addr, res.Status, m.PingPath)
			}
		}
		switch took := time.Since(began); {
		case err != nil && m.RoundTrip > 0:
			return nil
		case err != nil:
			return err
		case i <= 1 || took < m.RoundTrip: // the first counted one replaces the warming one
			m.RoundTrip = took
		}
	}
	return nil
}

// rank orders what was measured by the rule of step 7; ok says that the first can be used.
func rank(found []Measured) (ordered []Measured, ok bool) {
	byName := map[string]Measured{}
	var candidates []choose.Candidate
	for _, m := range found {
		byName[m.Name] = m
		candidates = append(candidates, choose.Candidate{Name: m.Name, Answered: m.Problem == "", Latency: m.RoundTrip, Connections: int(m.Connections)})
	}
	weighed, ok := choose.Gateway(candidates)
	for _, w := range weighed {
		m := byName[w.Name]
		m.Group = w.Group
		ordered = append(ordered, m)
	}
	return ordered, ok
}

// nearest gives the gateways of the lowest group, best first.
func nearest(ordered []Measured) (names []string) {
	for _, m := range ordered {
		if m.Problem == "" && m.Group == ordered[0].Group {
			names = append(names, m.Name)
		}
	}
	return names
}

// describe says what was weighed, on one line.
func describe(ordered []Measured) string {
	var parts []string
	for _, m := range ordered {
		if m.Problem != "" {
			parts = append(parts, m.Name+" silent")
			continue
		}
		parts = append(parts, fmt.Sprintf("%s %s %d connections", m.Name, group(m), m.Connections))
	}
	return strings.Join(parts, ", ")
}

func group(m Measured) string {
	if m.Group < 0 {
		return "-"
	}
	width := int(choose.GroupWidth / time.Millisecond)
	return fmt.Sprintf("%d-%dms", m.Group*width, (m.Group+1)*width)
}

// Gateways prints what this machine measures, best first.
func (c *Client) Gateways(ctx context.Context, asJSON bool) error {
	f, err := c.open(ctx)
	if err != nil {
		return err
	}
	r, err := f.resources(ctx)
	if err != nil {
		return err
	}
	ordered, ok := rank(f.measure(ctx, r.Gateways))
	if asJSON {
		return c.printJSON(ordered)
	}
	w := tabwriter.NewWriter(c.out(), 0, 4, 3, ' ', 0)
	fmt.Fprintln(w, "GATEWAY\tREGION\tADDRESS\tROUND TRIP\tGROUP\tCONNECTIONS\tCHOSEN")
	for i, m := range ordered {
		trip, chosen := m.RoundTrip.Round(10*time.Microsecond).String(), ""
		if i == 0 && ok {
			chosen = "yes"
		}
		if m.Problem != "" {
			trip, chosen = "-", m.Problem
		}
		fmt.Fprintf(w, "%s\t%s\t%s:%d\t%s\t%s\t%d\t%s\n", terminal.OneLine(m.Name), terminal.OneLine(m.Region), terminal.OneLine(m.Hostname), m.Port, trip, group(m), m.Connections, chosen)
	}
	return w.Flush()
}
