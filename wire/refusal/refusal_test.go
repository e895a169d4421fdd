package refusal

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
	"testing"
)

// The set of codes is that of the constants.
func TestCodesAreClosed(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "refusal.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	declared := 0
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 {
			return true
		}
		if kind, ok := spec.Type.(*ast.Ident); !ok || kind.Name != "Code" {
			return true
		}
		value, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		declared++
		if !codes[Code(value)] {
			t.Errorf("%s (%q) is missing in codes", spec.Names[0].Name, value)
		}
		return true
	})
	if declared != len(codes) || declared == 0 {
		t.Errorf("%d constants, %d codes", declared, len(codes))
	}
}

func TestReceived(t *testing.T) {
	long := strings.Repeat("é", MaxMessage)
	for _, c := range []struct {
		name      string
		in        *Error
		code      Code
		message   string
		exactText bool
	}{
		{"one of ours", &Error{Code: HostFull, Message: "Host h is full.", ActivityID: "lies"}, HostFull, "Host h is full.", true},
		{"an unknown code", &Error{Code: "made-up", Message: "no"}, HostRefused, "no", true},
		{"no code", &Error{Message: "no"}, HostRefused, "no", true},
		{"a code of 200 KB", &Error{Code: Code(long)}, HostRefused, "", true},
		{"control characters", &Error{Code: HostFull, Message: "a\r\nb\x00c\x1b[0m\u202ed"}, HostFull, "a  b c [0m d", true},
		{"bytes that are no text", &Error{Code: HostFull, Message: "a\xff\xfeb"}, HostFull, "ab", true},
		{"a long message", &Error{Code: HostFull, Message: "x" + long}, HostFull, "xé", false},
	} {
		got := Received(c.in, HostRefused)
		if got.Code != c.code || got.ActivityID != "" || len(got.Message) > MaxMessage ||
			c.exactText && got.Message != c.message || !strings.HasPrefix(got.Message, c.message) {
			t.Errorf("%s: got %+v", c.name, got)
		}
	}
	if Received(nil, HostRefused) != nil {
		t.Error("a refusal out of nothing")
	}
}
