package inventory

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/config"
)

func meta(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "ns", Name: name} }

func testWorkspace() *v1alpha1.Workspace {
	return &v1alpha1.Workspace{ObjectMeta: meta("ws"), Spec: v1alpha1.WorkspaceSpec{
		Hostname: "ws.example.com", Identity: v1alpha1.Identity{OIDC: v1alpha1.OIDC{IssuerURL: "https://idp", ClientID: "rdv"}},
		Resources: []v1alpha1.Resource{{
			Name: "desk", Type: v1alpha1.ResourceDesktop, HostPoolRef: v1alpha1.LocalReference{Name: "pool"},
			Access: v1alpha1.Access{Users: []string{"alice"}, Groups: []string{"eng"}},
		}},
	}}
}

func testPool(name, ws string) v1alpha1.HostPool {
	return v1alpha1.HostPool{ObjectMeta: meta(name), Spec: v1alpha1.HostPoolSpec{Type: v1alpha1.Pooled, WorkspaceRef: v1alpha1.LocalReference{Name: ws}}}
}

func testHost(name, pool string) v1alpha1.SessionHost {
	return v1alpha1.SessionHost{ObjectMeta: meta(name), Spec: v1alpha1.SessionHostSpec{HostPoolRef: v1alpha1.LocalReference{Name: pool}}}
}

func TestDefaults(t *testing.T) {
	s := snapshot(objects{
		workspace: testWorkspace(),
		pools:     []v1alpha1.HostPool{testPool("pool", "ws")},
		hosts:     []v1alpha1.SessionHost{testHost("h", "pool")},
		gateways:  []v1alpha1.Gateway{{ObjectMeta: meta("gw"), Spec: v1alpha1.GatewaySpec{Hostname: "gw.example.com"}}},
	})
	for what, c := range map[string]struct{ got, want any }{
		"workspace": {s.Workspace, &model.Workspace{
			Name: "ws", DisplayName: "ws", Hostname: "ws.example.com", TicketLifetime: 8 * time.Hour,
			OIDC: model.OIDC{
				IssuerURL: "https://idp", ClientID: "rdv", Audiences: []string{"rdv"}, UsernameClaim: "email", GroupsClaim: "groups", Scopes: defaultScopes,
			},
			Resources: []model.Resource{{
				Name: "desk", DisplayName: "desk", Type: model.Desktop, Pool: "pool", Users: []string{"alice"}, Groups: []string{"eng"},
				Redirection: model.Redirection{Clipboard: true, Audio: true},
			}},
		}},
		"pool":    {s.Pools["pool"], &model.Pool{Name: "pool", MaxSessions: 16, HeartbeatTimeout: 30 * time.Second, ConnectTimeout: 5 * time.Second, MaxHosts: 100}},
		"host":    {s.Hosts["h"], &model.Host{Name: "h", Pool: "pool"}},
		"gateway": {s.Gateways, []*model.Gateway{{Name: "gw", Hostname: "gw.example.com", Port: 443}}},
	} {
		if !reflect.DeepEqual(c.got, c.want) {
			t.Errorf("%s: got %+v, want %+v", what, c.got, c.want)
		}
	}
}

func TestEverythingSet(t *testing.T) {
	at := metav1.NewTime(time.Unix(1000, 0))
	ws := testWorkspace()
	ws.Spec.DisplayName, ws.Spec.Tickets.LifetimeSeconds = "Demo", new(int32(60))
	ws.Spec.Identity.OIDC.Audiences, ws.Spec.Identity.OIDC.UsernameClaim = []string{"a"}, "sub"
	ws.Spec.Resources[0].Type, ws.Spec.Resources[0].Program = v1alpha1.ResourceRemoteApp, &v1alpha1.Program{Path: "||e", Arguments: "-x"}
	ws.Spec.Resources[0].Redirection = v1alpha1.Redirection{Clipboard: v1alpha1.Disabled, Audio: v1alpha1.Disabled, Drives: v1alpha1.Enabled}
	ws.Spec.Revocations = []v1alpha1.Revocation{{User: "alice", Reason: "left"}, {User: "bob", Before: &at}, {Ticket: "T"}}
	p := testPool("pool", "ws")
	p.UID, p.Generation = "uid", 7
	p.Spec.Type, p.Spec.Assignment = v1alpha1.Personal, v1alpha1.Direct
	p.Spec.Health = v1alpha1.Health{HeartbeatTimeoutSeconds: new(int32(9)), ConnectTimeoutSeconds: new(int32(2))}
	p.Spec.RDPCertificate = &v1alpha1.RDPCertificate{IssuerRef: v1alpha1.IssuerReference{Name: "ca", Kind: "ClusterIssuer"}, DurationSeconds: new(int32(3600))}
	p.Spec.CustomRDPProperties = []string{"a:i:1"}
	p.Spec.Registration.MaxHostsPerToken = new(int32(7))
	p.Status.Registration = v1alpha1.RegistrationStatus{TokenHash: "hash", Expires: &at}
	auto := testPool("auto", "ws")
	auto.Spec.Type = v1alpha1.Personal
	auto.Spec.MaxSessionsPerHost = new(int32(3))
	h := testHost("h", "pool")
	h.Generation = 4
	h.Spec.AssignedUser, h.Spec.Drain = "alice", &v1alpha1.Drain{Reason: "why", Until: &at}
	h.Status.Enrolment = &v1alpha1.Enrolment{TokenHash: "used", Time: at}
	h.Status.Agent = &v1alpha1.AgentStatus{Connected: true, Version: "v1", Sessions: 2}
	g := v1alpha1.Gateway{ObjectMeta: meta("gw"), Spec: v1alpha1.GatewaySpec{Hostname: "g", Port: new(int32(8443)), Region: "eu"}}
	g.Status.CABundle, g.Status.Workspaces = "PEM", []string{"ws", "other"}
	g.Status.Instances = []v1alpha1.GatewayInstance{{Name: "1", Workspace: "ws", Sessions: 2}, {Name: "1", Workspace: "other", Sessions: 3, Draining: true}, {Name: "1", Workspace: "left", Sessions: 4}}
	g.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue}}

	s := snapshot(objects{workspace: ws, pools: []v1alpha1.HostPool{p, auto}, hosts: []v1alpha1.SessionHost{h}, gateways: []v1alpha1.Gateway{g}})
	if r := s.Workspace.Resources[0]; s.Workspace.DisplayName != "Demo" || s.Workspace.TicketLifetime != time.Minute || s.Workspace.OIDC.UsernameClaim != "sub" ||
		s.Workspace.OIDC.Audiences[0] != "a" || r.Program != "||e" || r.Arguments != "-x" || r.Redirection != (model.Redirection{Drives: true}) {
		t.Errorf("workspace %+v", s.Workspace)
	}
	if want := []model.Revocation{{User: "alice", Reason: "left"}, {User: "bob", Before: at.Time}, {Ticket: "T"}}; !reflect.DeepEqual(s.Workspace.Revocations, want) {
		t.Errorf("revocations %+v, want %+v", s.Workspace.Revocations, want)
	}
	want := &model.Pool{
		Name: "pool", UID: "uid", Generation: 7, Personal: true, MaxSessions: 1, HeartbeatTimeout: 9 * time.Second, ConnectTimeout: 2 * time.Second,
		RDPIssuer: &config.Issuer{Name: "ca", Kind: "ClusterIssuer", Group: "cert-manager.io"}, RDPDuration: time.Hour, Properties: []string{"a:i:1"},
		Registration: model.Registration{TokenHash: "hash", Expires: at.Time}, MaxHosts: 7,
	}
	if !reflect.DeepEqual(s.Pools["pool"], want) {
		t.Errorf("pool %+v, want %+v", s.Pools["pool"], want)
	}
	if a := s.Pools["auto"]; !a.Automatic || a.MaxSessions != 3 {
		t.Errorf("automatic pool %+v", a)
	}
	if h := s.Hosts["h"]; h.AssignedUser != "alice" || h.Drain.Reason != "why" || !h.Drain.Until.Equal(at.Time) || h.Enrolment.TokenHash != "used" || !h.Enrolment.At.Equal(at.Time) || h.Generation != 4 || h.Agent.Version != "v1" {
		t.Errorf("host %+v", h)
	}
	instances := []model.GatewayInstance{{Name: "1", Workspace: "ws", Sessions: 2}, {Name: "1", Workspace: "other", Sessions: 3, Draining: true}}
	if g := s.Gateways[0]; !slices.Equal(g.Instances, instances) || !g.Shared || !g.Ready || g.Port != 8443 || g.Region != "eu" || g.CABundle != "PEM" {
		t.Errorf("gateway %+v", g)
	}
}

// Only what belongs to the workspace is there.
func TestScope(t *testing.T) {
	if s := snapshot(objects{pools: []v1alpha1.HostPool{testPool("pool", "ws")}}); s.Workspace != nil || len(s.Pools) != 0 {
		t.Errorf("without a Workspace: %+v", s)
	}
	ws := testWorkspace()
	ws.Spec.GatewaySelector = &metav1.LabelSelector{MatchLabels: map[string]string{"region": "eu"}}
	gone := testPool("gone", "ws")
	gone.DeletionTimestamp = &metav1.Time{}
	labelled := meta("z")
	labelled.Labels = map[string]string{"region": "eu"}
	also := *labelled.DeepCopy()
	also.Name = "a"
	s := snapshot(objects{
		workspace: ws, pools: []v1alpha1.HostPool{testPool("pool", "ws"), testPool("other", "else"), gone},
		hosts:    []v1alpha1.SessionHost{testHost("h", "pool"), testHost("o", "other"), testHost("n", "none"), testHost("g", "gone")},
		gateways: []v1alpha1.Gateway{{ObjectMeta: labelled}, {ObjectMeta: meta("x")}, {ObjectMeta: also}},
	})
	if len(s.Pools) != 1 || len(s.Hosts) != 1 || s.Hosts["h"] == nil {
		t.Errorf("pools %v, hosts %v", s.Pools, s.Hosts)
	}
	if len(s.Gateways) != 2 || s.Gateways[0].Name != "a" || s.Gateways[1].Name != "z" {
		t.Errorf("gateways %+v", s.Gateways)
	}
}

// A host that its pool has too many of drains without an end, whatever a person's own drain says.
func TestRetiring(t *testing.T) {
	past := metav1.NewTime(time.Unix(1000, 0))
	for name, tc := range map[string]struct {
		drain  *v1alpha1.Drain
		reason string
	}{
		"alone":                       {nil, "it is no longer needed and goes with its last session"},
		"with a drain that has ended": {&v1alpha1.Drain{Reason: "why", Until: &past}, "why"},
	} {
		t.Run(name, func(t *testing.T) {
			h := testHost("h", "pool")
			h.Spec.Retiring, h.Spec.Drain = true, tc.drain
			if got := host(&h); !got.Draining(time.Now()) || got.Drain.Reason != tc.reason {
				t.Errorf("drain is %+v", got.Drain)
			}
		})
	}
}

// A token that an annotation has revoked enrols nobody, though the operator has yet to replace it.
func TestRevokedTokens(t *testing.T) {
	for _, c := range []struct {
		name          string
		annotations   map[string]string
		rotatedFor    string
		good          bool
		revoke, wants string
	}{
		{"no annotation", nil, "", true, "", ""},
		{"to be rotated", map[string]string{v1alpha1.AnnotationRotate: "a"}, "", false, "", ""},
		{"rotated", map[string]string{v1alpha1.AnnotationRotate: "a"}, "a", true, "", ""},
		{"to be revoked", map[string]string{v1alpha1.AnnotationRotate: "a", v1alpha1.AnnotationRevoke: "b"}, "a", false, "b", ""},
		{"revoked", map[string]string{v1alpha1.AnnotationRotate: "a", v1alpha1.AnnotationRevoke: "b"}, "a/b", true, "b", ""},
		{"revoked for a long reason", map[string]string{v1alpha1.AnnotationRevoke: strings.Repeat("x", 300)}, "", false, "", "64 hex digits"},
	} {
		h, p := testHost("h", "pool"), testPool("pool", "ws")
		h.Annotations, p.Annotations = c.annotations, c.annotations
		h.Status.Registration = v1alpha1.RegistrationStatus{TokenHash: "hash", RotatedFor: c.rotatedFor}
		p.Status.Registration = h.Status.Registration
		got := host(&h)
		if (got.Registration.TokenHash == "hash") != c.good || (pool(&p).Registration.TokenHash == "hash") != c.good {
			t.Errorf("%s: token %+v", c.name, got.Registration)
		}
		if c.wants == "" && got.Revoke != c.revoke || c.wants != "" && len(got.Revoke) != 64 {
			t.Errorf("%s: revoke %q", c.name, got.Revoke)
		}
	}
}

// Names of users are spelled one way, however people write them, but for the claim sub.
func TestUserNames(t *testing.T) {
	for claim, want := range map[string]string{"": "alice@example.com", "upn": "alice@example.com", "sub": "Alice@Example.com"} {
		ws := testWorkspace()
		ws.Spec.Identity.OIDC.UsernameClaim = claim
		ws.Spec.Resources[0].Access.Users = []string{"Alice@Example.com"}
		ws.Spec.Revocations = []v1alpha1.Revocation{{User: "Alice@Example.com"}}
		h := testHost("h", "pool")
		h.Spec.AssignedUser = "Alice@Example.com"
		s := snapshot(objects{workspace: ws, pools: []v1alpha1.HostPool{testPool("pool", "ws")}, hosts: []v1alpha1.SessionHost{h}})
		if got := []string{s.Workspace.Resources[0].Users[0], s.Workspace.Revocations[0].User, s.Hosts["h"].AssignedUser}; !slices.Equal(got, []string{want, want, want}) {
			t.Errorf("claim %q: %q, want %q", claim, got, want)
		}
		if ws.Spec.Resources[0].Access.Users[0] != "Alice@Example.com" {
			t.Error("the cache's object was changed")
		}
	}
}

// Whose files a host holds counts before what somebody has written into its spec since.
func TestFilesOf(t *testing.T) {
	for assigned, files := range map[string]string{"": "alice", "bob": "alice", "alice": "alice", "carol": ""} {
		h := testHost("h", "pool")
		h.Spec.AssignedUser, h.Status.FilesOf = assigned, files
		s := snapshot(objects{workspace: testWorkspace(), pools: []v1alpha1.HostPool{testPool("pool", "ws")}, hosts: []v1alpha1.SessionHost{h}})
		want := files
		if want == "" {
			want = assigned
		}
		if got := s.Hosts["h"].AssignedUser; got != want {
			t.Errorf("assigned to %q, with the files of %q: %q's", assigned, files, got)
		}
	}
}

// What is being deleted drains while the operator holds it, and is gone for brokers once it doesn't.
func TestLeaving(t *testing.T) {
	leave := func(o metav1.Object) {
		o.SetDeletionTimestamp(&metav1.Time{Time: time.Unix(1, 0)})
		o.SetFinalizers([]string{v1alpha1.Finalizer})
	}
	for name, tc := range map[string]struct {
		change  func(o *objects)
		drained []string // of the hosts a1, a2 in pool a and b1 in pool b
	}{
		"nothing":       {func(*objects) {}, nil},
		"a host":        {func(o *objects) { leave(&o.hosts[0]) }, []string{"a1"}},
		"a pool":        {func(o *objects) { leave(&o.pools[0]) }, []string{"a1", "a2"}},
		"the workspace": {func(o *objects) { leave(o.workspace) }, []string{"a1", "a2", "b1"}},
	} {
		g := v1alpha1.Gateway{ObjectMeta: meta("gw"), Spec: v1alpha1.GatewaySpec{Hostname: "g"}}
		g.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue}}
		o := objects{
			workspace: testWorkspace(), pools: []v1alpha1.HostPool{testPool("a", "ws"), testPool("b", "ws")},
			hosts:    []v1alpha1.SessionHost{testHost("a1", "a"), testHost("a2", "a"), testHost("b1", "b")},
			gateways: []v1alpha1.Gateway{g},
		}
		before := snapshot(o)
		tc.change(&o)
		s := snapshot(o)
		var drained []string
		for _, h := range []string{"a1", "a2", "b1"} {
			if s.Hosts[h].Draining(time.Now()) {
				drained = append(drained, h)
			}
		}
		if !slices.Equal(drained, tc.drained) {
			t.Errorf("%s: drained %q, want %q", name, drained, tc.drained)
		}
		if name == "the workspace" && s.Pools["a"].Generation == before.Pools["a"].Generation {
			t.Error("agents would not take in that their workspace is going")
		}
		if !s.Gateways[0].Ready {
			t.Errorf("%s: the gateway is not ready", name)
		}
		leave(&o.gateways[0])
		if s := snapshot(o); len(s.Gateways) != 1 || s.Gateways[0].Ready {
			t.Errorf("%s: people are still sent to a gateway that is going, or its sessions are no longer counted", name)
		}
		o.gateways[0].Finalizers, o.hosts[0].DeletionTimestamp, o.hosts[0].Finalizers = nil, &metav1.Time{}, nil
		if s := snapshot(o); len(s.Gateways) != 0 || s.Hosts["a1"] != nil {
			t.Errorf("%s: what nobody holds is still there", name)
		}
	}
}
