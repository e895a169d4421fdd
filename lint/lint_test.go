package lint

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const workspaceYAML = `apiVersion: rendezvous.dev/v1alpha1
kind: Workspace
metadata: {name: desktops, namespace: trial}
spec:
  hostname: desktops.example.com
  identity: {oidc: {issuerURL: "https://id.example.com", clientID: rdv}}
  certificates: {issuerRef: {kind: ClusterIssuer, name: company-ca}}
  signing: {issuerRef: {kind: ClusterIssuer, name: company-ca}}
`

const poolYAML = `apiVersion: rendezvous.dev/v1alpha1
kind: HostPool
metadata: {name: linux, namespace: trial}
spec:
  workspaceRef: {name: desktops}
  type: Personal
`

const gatewayYAML = `apiVersion: rendezvous.dev/v1alpha1
kind: Gateway
metadata: {name: west, namespace: trial}
spec:
  hostname: west.example.com
  certificates: {issuerRef: {kind: ClusterIssuer, name: company-ca}}
`

// replaced is text with pairs replaced, each of which must be there.
func replaced(t *testing.T, text string, pairs ...string) string {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(text, pairs[i]) {
			t.Fatalf("%q is not in %s", pairs[i], text)
		}
		text = strings.Replace(text, pairs[i], pairs[i+1], 1)
	}
	return text
}

func TestCheck(t *testing.T) {
	template := func(spec string) string {
		return poolYAML + "  template:\n    spec:\n" + spec
	}
	for name, tc := range map[string]struct {
		files []string
		want  []string // each finding begins with one of these, in order
	}{
		"all is well":   {[]string{workspaceYAML + "---\n" + poolYAML, gatewayYAML}, nil},
		"other kinds":   {[]string{"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n---\nhelm: values\n---\n# nothing\n---\n- a list\n"}, nil},
		"unknown field": {[]string{workspaceYAML, poolYAML + "  replicaz: 3\n"}, []string{"1.yaml:7: error: HostPool trial/linux: spec.replicaz: unknown field"}},
		"wrong value":   {[]string{workspaceYAML, replaced(t, poolYAML, "Personal", "Poled")}, []string{`1.yaml:6: error: HostPool trial/linux: spec.type: Unsupported value: "Poled": supported values: `}},
		"a rule of the definition": {[]string{workspaceYAML, poolYAML + "  replicas: 3\n"},
			[]string{"1.yaml:4: error: HostPool trial/linux: spec: replicas needs template: only hosts that are pods can be made by the pool"}},
		"a name that is too long": {[]string{replaced(t, workspaceYAML, "name: desktops,", "name: "+strings.Repeat("a", 41)+",")},
			[]string{"0.yaml:1: error: Workspace trial/" + strings.Repeat("a", 41) + ": metadata.name must be a DNS label of at most 40 characters"}},
		"no kind of ours": {[]string{replaced(t, poolYAML, "kind: HostPool", "kind: Hostpool")}, []string{"0.yaml:2: error: Hostpool trial/linux: rendezvous.dev has no kind Hostpool in version v1alpha1: there are Gateway, HostPool, SessionHost, Workspace"}},
		"no version":      {[]string{replaced(t, poolYAML, "apiVersion: rendezvous.dev/v1alpha1\n", "")}, []string{"0.yaml:1: error: a HostPool without apiVersion: write apiVersion: rendezvous.dev/v1alpha1"}},
		"one document of several can't be read": {[]string{workspaceYAML + "---\na: [\n---\n" + poolYAML + "  replicaz: 1\n"},
			[]string{"0.yaml:10: error: can't be read: ", "0.yaml:18: error: HostPool trial/linux: spec.replicaz: unknown field"}},
		"a key twice": {[]string{poolYAML + "  type: Pooled\n"}, []string{`0.yaml:7: error: can't be read: key "type" already set in map`}},
		"a list": {[]string{"apiVersion: v1\nkind: List\nitems:\n- apiVersion: rendezvous.dev/v1alpha1\n  kind: HostPool\n  metadata: {name: x}\n  spec: {type: Pooled, workspaceRef: {name: other}, bad: 1}\n"},
			[]string{`0.yaml:7: error: HostPool x: spec.bad: unknown field`, `0.yaml:7: warning: HostPool x: spec.workspaceRef: Workspace "other" not found`}},
		"template: a typo": {[]string{workspaceYAML, template("      containers: [{name: desktop, imgae: x}]\n")}, []string{`1.yaml:7: error: HostPool trial/linux: spec.template: unknown field "spec.containers[0].imgae"`}},
		"template: two faults": {[]string{workspaceYAML, template("      hostPID: true\n      shareProcessNamespace: true\n      containers: [{name: desktop, image: x}]\n")},
			[]string{"1.yaml:9: error: HostPool trial/linux: spec.template.spec.hostPID: must not be true", "1.yaml:10: error: HostPool trial/linux: spec.template.spec.shareProcessNamespace: must not be true"}},
		"template: a workspace's keys": {[]string{workspaceYAML, template("      containers: [{name: desktop, image: x}]\n      volumes:\n      - {name: k, secret: {secretName: desktops-tickets}}\n")},
			[]string{`1.yaml:11: error: HostPool trial/linux: spec.template.spec.volumes[k].secret: Secret "desktops-tickets" holds keys`}},
		"template: overridden": {[]string{workspaceYAML, poolYAML + "  template:\n    metadata: {name: x}\n    spec: {containers: [{name: desktop, image: x}]}\n"},
			[]string{"1.yaml:8: warning: HostPool trial/linux: spec.template.metadata.name is set by the operator"}},
		"another namespace": {[]string{workspaceYAML, replaced(t, poolYAML, "trial", "default")},
			[]string{`1.yaml:5: error: HostPool default/linux: spec.workspaceRef: Workspace "desktops" not found: create it; it is not among these files in namespace "default", but in "trial"`}},
		"a misspelt reference": {[]string{workspaceYAML, replaced(t, poolYAML, "{name: desktops}", "{name: desktop}")},
			[]string{`1.yaml:5: error: HostPool trial/linux: spec.workspaceRef: Workspace "desktop" not found: create it; it is not among these files, which have desktops`}},
		"perhaps in the cluster": {[]string{poolYAML}, []string{`0.yaml:5: warning: HostPool trial/linux: spec.workspaceRef: Workspace "desktops" not found`}},
		"a resource's pool": {[]string{workspaceYAML + "  resources:\n  - {name: a, type: Desktop, hostPoolRef: {name: linus}}\n", poolYAML},
			[]string{`0.yaml:10: error: Workspace trial/desktops: spec.resources[a].hostPoolRef: HostPool "linus" not found: create it or name another; it is not among these files, which have linux`}},
		"a pool of another workspace": {[]string{workspaceYAML + "  resources:\n  - {name: a, type: Desktop, hostPoolRef: {name: linux}}\n---\n" + replaced(t, workspaceYAML, "name: desktops,", "name: other,", "desktops.example", "other.example"),
			replaced(t, poolYAML, "{name: desktops}", "{name: other}")}, []string{`0.yaml:10: error: Workspace trial/desktops: spec.resources[a].hostPoolRef: HostPool "linux" belongs to Workspace "other"`}},
		"a hostname twice": {[]string{workspaceYAML, replaced(t, gatewayYAML, "west.example.com", "desktops.example.com")},
			[]string{"1.yaml:5: error: Gateway trial/west: spec.hostname: desktops.example.com is the hostname of Workspace trial/desktops (0.yaml:5), too"}},
		"an address as hostname": {[]string{replaced(t, gatewayYAML, "west.example.com", "192.0.2.1")}, []string{"0.yaml:5: error: Gateway trial/west: spec.hostname: 192.0.2.1 is an IP address"}},
		"an object twice":        {[]string{gatewayYAML, replaced(t, gatewayYAML, "west.example.com", "east.example.com")}, []string{"1.yaml:3: error: Gateway trial/west: is declared twice, also at 0.yaml:3"}},
		"a selector that picks nothing": {[]string{workspaceYAML + "  gatewaySelector: {matchLabels: {region: west}}\n", gatewayYAML},
			[]string{"0.yaml:9: error: Workspace trial/desktops: spec.gatewaySelector region=west picks no Gateway among these files, which have west (no labels)"}},
		"an issuer's kind": {[]string{replaced(t, gatewayYAML, "kind: ClusterIssuer, ", ""), "apiVersion: cert-manager.io/v1\nkind: ClusterIssuer\nmetadata: {name: company-ca}\nspec: {selfSigned: {}}\n"},
			[]string{`0.yaml:6: error: Gateway trial/west: spec.certificates.issuerRef: these files have no Issuer "company-ca", but a ClusterIssuer of that name: set kind: ClusterIssuer`}},
		"no issuer's kind": {[]string{replaced(t, gatewayYAML, "ClusterIssuer", "Issuers")}, []string{`0.yaml:6: error: Gateway trial/west: spec.certificates.issuerRef.kind: "Issuers" is no kind of cert-manager.io`}},
		"a CA that is none": {[]string{replaced(t, workspaceYAML, `clientID: rdv}`, `clientID: rdv, caBundleRef: {kind: ConfigMap, name: ca, key: ca.crt}}`),
			"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: ca, namespace: trial}\ndata: {ca.crt: none}\n"},
			[]string{`0.yaml:6: error: Workspace trial/desktops: spec.identity.oidc.caBundleRef: key "ca.crt" of ConfigMap "ca" holds no PEM certificate`}},
	} {
		t.Run(name, func(t *testing.T) {
			var sources []Source
			for i, text := range tc.files {
				sources = append(sources, Source{string(rune('0'+i)) + ".yaml", []byte(text)})
			}
			result, err := Check(t.Context(), sources)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range result.Findings {
				got = append(got, f.String())
			}
			if !slices.EqualFunc(got, tc.want, strings.HasPrefix) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
		})
	}
}

// What we ship is in order.
func TestSamples(t *testing.T) {
	sources, err := Read([]string{filepath.Join("..", "config", "samples")}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range sources { // the production samples are another installation, with the same names
		if !strings.Contains(sources[i].Name, "production") {
			continue
		}
		sources[i].Data = nil
	}
	result, err := Check(t.Context(), sources)
	if err != nil || len(result.Findings) > 0 || result.Checked == 0 {
		t.Errorf("%+v, %v", result, err)
	}
}

func TestRead(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"a.yaml": "x: 1", "sub/b.json": "{}", "c.txt": "no", ".git/d.yaml": "y: 1"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sources, err := Read([]string{dir, "-"}, strings.NewReader("z: 1"))
	if err != nil || len(sources) != 3 || sources[2].Name != "<stdin>" {
		t.Errorf("%+v, %v", sources, err)
	}
	if _, err := Read([]string{filepath.Join(dir, ".git", "none.yaml")}, nil); err == nil {
		t.Error("a file that isn't there was read")
	}
	empty := t.TempDir()
	if _, err := Read([]string{empty}, nil); err == nil {
		t.Error("an empty folder passes for checked")
	}
}
