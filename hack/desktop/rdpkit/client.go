package rdpkit

import (
	"bytes"
	"context"
	"fmt"
	"image/color"
	"image/png"
	"strconv"
	"strings"
	"time"
)

// ClientOptions describe a user's machine.
type ClientOptions struct {
	BoxOptions
	// Width and Height of the screen in pixels; 1280 by 720 when zero.
	Width, Height int
}

// Client is a user's machine: a [Box] over Roots.Client with an X server on display :0. Commands run in it see DISPLAY.
type Client struct {
	*Box
	screen *Program
}

// NewClient starts a user's machine.
func NewClient(ctx context.Context, roots Roots, opts ClientOptions) (*Client, error) {
	if opts.Width == 0 || opts.Height == 0 {
		opts.Width, opts.Height = 1280, 720
	}
	opts.Env = append([]string{"DISPLAY=:0"}, opts.Env...)
	box, err := NewBox(ctx, roots.Client, opts.BoxOptions)
	if err != nil {
		return nil, err
	}
	c := &Client{Box: box}
	// No abstract socket: it belongs to the network namespace, which other boxes may share.
	c.screen, err = box.Start("Xvfb", ":0", "-screen", "0", fmt.Sprintf("%dx%dx24", opts.Width, opts.Height),
		"-nolisten", "tcp", "-nolisten", "local", "-noreset")
	if err == nil {
		err = poll(ctx, 20*time.Millisecond, func() (bool, error) { return exists(c.Path("/tmp/.X11-unix/X0")), nil })
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("starting Xvfb: %w", err)
	}
	return c, nil
}

// FreeRDP is the command line of FreeRDP with what a test wants: TLS with certificate checks on and no questions asked
// (an unknown certificate is refused), no window frame, and nothing redirected. Of repeated options FreeRDP takes the
// last, so those in args win. An .rdp file must be the first of args.
func FreeRDP(args ...string) []string {
	argv := []string{"xfreerdp3"}
	if len(args) > 0 && strings.HasSuffix(args[0], ".rdp") {
		argv, args = append(argv, args[0]), args[1:]
	}
	argv = append(argv, "/sec:tls", "/cert:deny", "/size:1280x720", "-decorations", "-clipboard", "/log-level:INFO")
	return append(argv, args...)
}

// Screenshot takes a picture of the whole screen.
func (c *Client) Screenshot(ctx context.Context) (Picture, error) {
	cmd := c.Command(ctx, "import", "-window", "root", "-depth", "8", "png:-")
	var problems bytes.Buffer
	cmd.Stderr = &problems
	data, err := cmd.Output()
	if err != nil {
		return Picture{}, fmt.Errorf("taking a screenshot: %w: %s", err, problems.String())
	}
	img, err := png.Decode(bytes.NewReader(data))
	if err != nil {
		return Picture{}, fmt.Errorf("reading the screenshot: %w", err)
	}
	return Picture{Image: img, PNG: data}, nil
}

// WaitForColor takes pictures until at least the given fraction of the screen (0 to 1) is in want. It returns the last
// picture in either case.
func (c *Client) WaitForColor(ctx context.Context, want color.RGBA, fraction float64) (Picture, error) {
	var last Picture
	err := poll(ctx, 250*time.Millisecond, func() (bool, error) {
		p, err := c.Screenshot(ctx)
		if err != nil {
			return false, err
		}
		last = p
		if p.Fraction(want) >= fraction {
			return true, nil
		}
		main, share := p.Dominant()
		return false, fmt.Errorf("the screen is %.0f%% %s, and %.0f%% %s", 100*share, Hex(main), 100*p.Fraction(want), Hex(want))
	})
	return last, err
}

// LogOut is what to Type to end a session. (`exit` ends only the terminal.)
const LogOut = "xfce4-session-logout --logout\n"

// Where the session's first terminal surely is, in an empty place of it.
const terminalX, terminalY = 600, 330

// Type types text into the first terminal of the session on the screen, which it clicks on; \n is Return.
func (c *Client) Type(ctx context.Context, text string) error {
	steps := [][]string{{"mousemove", "--sync", strconv.Itoa(terminalX + 5), strconv.Itoa(terminalY),
		"mousemove", "--sync", strconv.Itoa(terminalX), strconv.Itoa(terminalY), "click", "1", "sleep", "0.3"}}
	for i, line := range strings.Split(text, "\n") {
		if i > 0 {
			steps = append(steps, []string{"key", "Return"})
		}
		if line != "" {
			steps = append(steps, []string{"type", "--clearmodifiers", "--delay", "25", "--", line})
		}
	}
	for _, step := range steps {
		if out, err := c.Command(ctx, append([]string{"xdotool"}, step...)...).CombinedOutput(); err != nil {
			return fmt.Errorf("typing: %w: %s", err, out)
		}
	}
	return nil
}
