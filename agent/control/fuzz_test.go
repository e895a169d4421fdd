package control

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
)

// acts remembers what was done.
type acts struct {
	on   []Desktop
	text string
}

func (a *acts) LogOff(_ context.Context, d Desktop) error {
	a.on = append(a.on, d)
	return nil
}

func (a *acts) Message(_ context.Context, d Desktop, text string) error {
	a.on, a.text = append(a.on, d), text
	return nil
}

// Whatever comes on the helper's socket, a line does one thing to one desktop or nothing, and what is sent reads back.
func FuzzCommand(f *testing.F) {
	f.Add([]byte(`{"id":1,"act":"logoff","uid":10001,"display":10}` + "\n"))
	f.Add([]byte(`{"id":2,"act":"message","uid":10001,"display":10,"text":"hello"} trailing` + "\n"))
	f.Add([]byte(`{"act":"run","text":"rm"}` + "\n"))
	f.Add([]byte(strings.Repeat("x", maxMessage) + "\n"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		in := bufio.NewReaderSize(bytes.NewReader(sent), maxMessage)
		for {
			var c command
			if err := readLine(in, &c); err != nil {
				return
			}
			done := &acts{}
			err := c.carryOut(t.Context(), done)
			if known := c.Act == actLogOff || c.Act == actMessage; known != (err == nil) || known != (len(done.on) == 1) {
				t.Fatalf("%+v: %v, %v", c, done.on, err)
			}
			var out bytes.Buffer
			if err := writeLine(&out, c); err != nil {
				continue // longer as we write it
			}
			var again command
			if err := readLine(bufio.NewReaderSize(&out, maxMessage), &again); err != nil || again != c {
				t.Fatalf("%+v reads back as %+v: %v", c, again, err)
			}
		}
	})
}

// Whatever a helper answers, it is heard by who asked, and an answer to nobody is dropped.
func FuzzResult(f *testing.F) {
	f.Add([]byte(`{"id":1,"error":"no window"}` + "\n"))
	f.Add([]byte(`{"id":7,"gone":true}` + "\n" + `{"id":1}` + "\n"))
	f.Fuzz(func(t *testing.T, sent []byte) {
		in := bufio.NewReaderSize(bytes.NewReader(sent), maxMessage)
		for {
			var res result
			switch err := readLine(in, &res); {
			case err != nil:
				return
			case res.Error != "" && len(res.Error) > maxMessage:
				t.Fatal(errors.New("longer than its line"))
			}
		}
	})
}
