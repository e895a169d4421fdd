// Package lint holds the rules that no compiler checks: which room may import what, and that every package says what
// it is for.
package lint

import (
	"bufio"
	"encoding/json"
	"go/parser"
	"go/token"
	"os/exec"
	"path"
	"strings"
	"testing"
)

const (
	module = "rendezvous.dev/rendezvous"
	root   = "../.."
)

// kubernetes is every module that knows Kubernetes.
var kubernetes = []string{"k8s.io/", "sigs.k8s.io/", "github.com/cert-manager/"}

// walls says what a room may not reach, directly or through what it imports. except names packages of the room with
// rules of their own.
var walls = []struct {
	room   string
	except []string
	forbid []string
}{
	{"api", nil, []string{"k8s.io/client-go", "sigs.k8s.io/controller-runtime", "github.com/cert-manager/", "github.com/nats-io/", "google.golang.org/grpc"}},
	{"controllers/plan", nil, []string{"k8s.io/client-go/kubernetes", "k8s.io/client-go/rest", "sigs.k8s.io/controller-runtime/pkg/client"}},
	{"controllers/render", nil, []string{"k8s.io/client-go/kubernetes", "k8s.io/client-go/rest", "sigs.k8s.io/controller-runtime/pkg/client"}},
	{"controllers", nil, []string{module + "/relay", module + "/gateway", module + "/broker", module + "/agent", module + "/client", "github.com/nats-io/"}},
	{"sessionsapi", nil, []string{module + "/relay", module + "/gateway", module + "/broker", module + "/agent", module + "/client", module + "/controllers", "github.com/nats-io/", "k8s.io/apiserver"}},
	{"lint", nil, []string{module + "/relay", module + "/gateway", module + "/broker", module + "/agent", module + "/client", "github.com/nats-io/", "sigs.k8s.io/controller-runtime/pkg/client"}},
	{"cmd/kubectl-rdv", nil, []string{module + "/relay", module + "/gateway", module + "/broker", module + "/agent", module + "/client", "github.com/nats-io/"}},
	{"controllers/rules", nil, []string{"k8s.io/client-go/kubernetes", "k8s.io/client-go/rest", "sigs.k8s.io/controller-runtime/pkg/client"}},
	{"wire", nil, kubernetes},
	{"relay", nil, append([]string{"github.com/nats-io/", "github.com/coreos/go-oidc", "github.com/go-jose/", module + "/gateway", module + "/broker", module + "/agent"}, kubernetes...)},
	{"gateway", nil, append([]string{"github.com/coreos/go-oidc", "github.com/nats-io/nats-server", module + "/relay", module + "/broker", module + "/agent"}, kubernetes...)},
	{"agent", nil, append([]string{"github.com/coreos/go-oidc", "github.com/nats-io/nats-server", module + "/relay", module + "/broker", module + "/gateway"}, kubernetes...)},
	{"client", nil, append([]string{"github.com/nats-io/", module + "/relay", module + "/broker", module + "/gateway", module + "/agent"}, kubernetes...)},
	{"broker", nil, []string{module + "/relay", module + "/gateway", module + "/agent", module + "/controllers"}},
	{"broker/inventory", nil, []string{module + "/relay", module + "/gateway", module + "/agent", module + "/controllers", "github.com/nats-io/"}},
}

// direct holds packages by their own import lines, because what they may import knows more than they may.
var direct = []struct {
	room   string
	except string
	forbid []string
}{
	{"controllers/render", "", []string{"context"}},
	{"broker", "broker/inventory", kubernetes},
}

type pkg struct {
	ImportPath, Dir, Name string
	GoFiles               []string
	Imports, Deps         []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Name,GoFiles,Imports,Deps", "./...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for dec := json.NewDecoder(bufio.NewReader(strings.NewReader(string(out)))); dec.More(); {
		var p pkg
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

func inRoom(importPath, room string) bool {
	p := strings.TrimPrefix(importPath, module+"/")
	return p == room || strings.HasPrefix(p, room+"/")
}

func under(importPath, tree string) bool {
	tree = strings.TrimSuffix(tree, "/")
	return importPath == tree || strings.HasPrefix(importPath, tree+"/")
}

func TestImportWalls(t *testing.T) {
	all := packages(t)
	for _, w := range walls {
		seen := 0
	nextPackage:
		for _, p := range all {
			if !inRoom(p.ImportPath, w.room) {
				continue
			}
			for _, e := range w.except {
				if inRoom(p.ImportPath, e) {
					continue nextPackage
				}
			}
			seen++
			for _, dep := range p.Deps {
				for _, f := range w.forbid {
					if under(dep, f) {
						t.Errorf("%s reaches %s; docs/architecture.md says why room %s may not", p.ImportPath, dep, w.room)
					}
				}
			}
		}
		if seen == 0 {
			t.Errorf("room %s holds no package: the wall guards nothing", w.room)
		}
	}
	for _, d := range direct {
		for _, p := range all {
			if !inRoom(p.ImportPath, d.room) || d.except != "" && inRoom(p.ImportPath, d.except) {
				continue
			}
			for _, i := range p.Imports {
				for _, f := range d.forbid {
					if under(i, f) {
						t.Errorf("%s imports %s; docs/architecture.md says why room %s may not", p.ImportPath, i, d.room)
					}
				}
			}
		}
	}
	for _, p := range all {
		for _, i := range p.Imports {
			if strings.HasPrefix(i, module+"/cmd/") && !strings.HasPrefix(p.ImportPath, module+"/cmd/") {
				t.Errorf("%s imports %s: mains are nobody's library", p.ImportPath, i)
			}
		}
	}
}

func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	for _, p := range packages(t) {
		documented := false
		for _, f := range p.GoFiles {
			file, err := parser.ParseFile(token.NewFileSet(), path.Join(p.Dir, f), nil, parser.ParseComments|parser.PackageClauseOnly)
			if err != nil {
				t.Fatal(err)
			}
			documented = documented || (file.Doc != nil && len(strings.TrimSpace(file.Doc.Text())) > 0)
		}
		if !documented {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}
