package client

import (
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf16"
)

// What rdv prints of others' texts (a broker's, a provider's, a gateway's) goes to a terminal: controls, C1 ones too, and what
// turns the direction of text or breaks lines comes out as blanks.

// unsafeRune says which characters those are.
func unsafeRune(r rune) bool {
	return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || unicode.Is(unicode.Zl, r) || unicode.Is(unicode.Zp, r)
}

// oneLine keeps what others wrote on its line.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unsafeRune(r) {
			return ' '
		}
		return r
	}, s)
}

// Clean gives an error's text for a terminal.
func Clean(err error) string { return oneLine(err.Error()) }

// cleanError is an error whose text others had a hand in.
type cleanError struct{ error }

func (e cleanError) Error() string { return oneLine(e.error.Error()) }
func (e cleanError) Unwrap() error { return e.error }

// clean makes an error's text fit for a terminal.
func clean(err error) error {
	if err == nil {
		return nil
	}
	return cleanError{err}
}

// cleanWriter passes text on, with line feeds and tabs.
type cleanWriter struct{ w io.Writer }

func (c cleanWriter) Write(p []byte) (int, error) {
	text := strings.Map(func(r rune) rune {
		if r != '\n' && r != '\t' && unsafeRune(r) {
			return ' '
		}
		return r
	}, string(p))
	if _, err := io.WriteString(c.w, text); err != nil {
		return 0, err
	}
	return len(p), nil
}

// jsonWriter passes JSON on, and writes such characters as JSON can: they stand in strings alone.
type jsonWriter struct{ w io.Writer }

func (j jsonWriter) Write(p []byte) (int, error) {
	var b strings.Builder
	for _, r := range string(p) {
		switch {
		case r == '\n' || !unsafeRune(r):
			b.WriteRune(r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	if _, err := io.WriteString(j.w, b.String()); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *Client) out() io.Writer { return cleanWriter{c.Out} }
func (c *Client) err() io.Writer { return cleanWriter{c.Err} }
