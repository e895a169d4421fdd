// Command signin is the browser of the demo and the end-to-end tests: it follows a sign-in URL, fills in the provider's
// form as a person would, and follows the way back to the client's loopback listener.
//
//	RDV_SIGNIN_USER=… RDV_SIGNIN_PASSWORD=… signin URL
package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"strings"
	"time"

	"golang.org/x/net/html"
)

func main() {
	if len(os.Args) != 2 {
		fatal(fmt.Errorf("usage: signin URL"))
	}
	if err := signIn(os.Args[1], os.Getenv("RDV_SIGNIN_USER"), os.Getenv("RDV_SIGNIN_PASSWORD")); err != nil {
		fatal(err)
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "signin:", err)
	os.Exit(1)
}

// maxPages bounds the forms that a sign-in may take.
const maxPages = 5

func signIn(start, user, password string) error {
	jar, _ := cookiejar.New(nil)
	client := &http.Client{Jar: jar, Timeout: 20 * time.Second}
	resp, err := client.Get(start)
	for page := 0; ; page++ {
		if err != nil {
			return err
		}
		body, rerr := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
		resp.Body.Close()
		if rerr != nil {
			return rerr
		}
		at := resp.Request.URL
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s answered %s: %s", at.Redacted(), resp.Status, firstLine(body))
		}
		if at.Scheme == "http" && (at.Hostname() == "localhost" || at.Hostname() == "127.0.0.1") {
			return nil
		}
		form, ok := findForm(string(body))
		if !ok || page == maxPages {
			return fmt.Errorf("%s shows no form to fill in", at.Redacted())
		}
		values := url.Values{}
		for name, f := range form.fields {
			switch {
			case f.kind == "password":
				values.Set(name, password)
			case f.kind == "text" || f.kind == "email":
				values.Set(name, user)
			default:
				values.Set(name, f.value)
			}
		}
		action, perr := at.Parse(form.action)
		if perr != nil {
			return perr
		}
		resp, err = client.PostForm(action.String(), values)
	}
}

type field struct{ kind, value string }

type form struct {
	action string
	fields map[string]field
}

func findForm(page string) (form, bool) {
	doc, err := html.Parse(strings.NewReader(page))
	if err != nil {
		return form{}, false
	}
	f := form{fields: map[string]field{}}
	found := false
	for n := range doc.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		switch {
		case n.Data == "form" && !found:
			found, f.action = true, attr(n, "action")
		case n.Data == "input" && found && attr(n, "name") != "":
			f.fields[attr(n, "name")] = field{kind: attr(n, "type"), value: attr(n, "value")}
		}
	}
	return f, found
}

func attr(n *html.Node, key string) string {
	for _, a := range n.Attr {
		if a.Key == key {
			return a.Val
		}
	}
	return ""
}

func firstLine(b []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return line
}
