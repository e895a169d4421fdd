package inventory

import (
	"cmp"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/wire/config"
)

// Defaults of the API, as its field comments state them.
const (
	defaultTicketLifetime = 8 * time.Hour
	defaultHeartbeat      = 30 * time.Second
	defaultConnect        = 5 * time.Second
	defaultRDPDuration    = 30 * 24 * time.Hour
	defaultGatewayPort    = 443
	defaultFirstUID       = 10000
	defaultLastUID        = 59999
)

var defaultScopes = []string{"openid", "profile", "email", "groups", "offline_access"}

// objects is one reading of the caches.
type objects struct {
	workspace *v1alpha1.Workspace
	pools     []v1alpha1.HostPool
	hosts     []v1alpha1.SessionHost
	gateways  []v1alpha1.Gateway
}

// snapshot turns objects into the broker's own types: what belongs to the workspace, defaults applied. Pure.
func snapshot(o objects) *model.Snapshot {
	s := &model.Snapshot{Pools: map[string]*model.Pool{}, Hosts: map[string]*model.Host{}}
	if o.workspace == nil {
		return s
	}
	s.Workspace = workspace(o.workspace)
	closing, closed := v1alpha1.Leaving(o.workspace), map[string]bool{}
	for i := range o.pools {
		if p := &o.pools[i]; p.Spec.WorkspaceRef.Name == o.workspace.Name && !v1alpha1.Gone(p) {
			s.Pools[p.Name] = pool(p)
			if closing {
				s.Pools[p.Name].Generation++ // for agents to take in that they drain
			}
			if closing || v1alpha1.Leaving(p) {
				closed[p.Name] = true
			}
		}
	}
	for i := range o.hosts {
		if h := &o.hosts[i]; s.Pools[h.Spec.HostPoolRef.Name] != nil && !v1alpha1.Gone(h) {
			s.Hosts[h.Name] = host(h)
			if closed[h.Spec.HostPoolRef.Name] || v1alpha1.Leaving(h) {
				drainForGood(s.Hosts[h.Name], "it is being removed")
			}
			// Whose files a host holds counts before what somebody has written since.
			s.Hosts[h.Name].AssignedUser = s.Workspace.OIDC.User(cmp.Or(h.Status.FilesOf, h.Spec.AssignedUser))
		}
	}
	selector := labels.Everything()
	if o.workspace.Spec.GatewaySelector != nil {
		var err error
		if selector, err = metav1.LabelSelectorAsSelector(o.workspace.Spec.GatewaySelector); err != nil {
			selector = labels.Nothing() // the operator's condition says why
		}
	}
	for i := range o.gateways {
		if g := &o.gateways[i]; selector.Matches(labels.Set(g.Labels)) && !v1alpha1.Gone(g) {
			s.Gateways = append(s.Gateways, gateway(g))
		}
	}
	slices.SortFunc(s.Gateways, func(a, b *model.Gateway) int { return strings.Compare(a.Name, b.Name) })
	return s
}

func workspace(w *v1alpha1.Workspace) *model.Workspace {
	oidc := w.Spec.Identity.OIDC
	m := &model.Workspace{
		Name: w.Name, DisplayName: cmp.Or(w.Spec.DisplayName, w.Name), Hostname: w.Spec.Hostname,
		OIDC: model.OIDC{
			IssuerURL: oidc.IssuerURL, ClientID: oidc.ClientID, Audiences: slices.Clone(oidc.Audiences),
			UsernameClaim: cmp.Or(oidc.UsernameClaim, "email"), GroupsClaim: cmp.Or(oidc.GroupsClaim, "groups"),
			Scopes: slices.Clone(oidc.Scopes),
		},
		TicketLifetime: seconds(w.Spec.Tickets.LifetimeSeconds, defaultTicketLifetime),
	}
	if len(m.OIDC.Audiences) == 0 {
		m.OIDC.Audiences = []string{oidc.ClientID}
	}
	if len(m.OIDC.Scopes) == 0 {
		m.OIDC.Scopes = defaultScopes
	}
	for _, r := range w.Spec.Resources {
		res := resource(r)
		res.Users = m.OIDC.Users(res.Users)
		m.Resources = append(m.Resources, res)
	}
	for _, r := range w.Spec.Revocations {
		m.Revocations = append(m.Revocations, model.Revocation{User: m.OIDC.User(r.User), Ticket: r.Ticket, Reason: r.Reason, Before: moment(r.Before)})
	}
	return m
}

func resource(r v1alpha1.Resource) model.Resource {
	m := model.Resource{
		Name: r.Name, DisplayName: cmp.Or(r.DisplayName, r.Name), Type: string(r.Type), Pool: r.HostPoolRef.Name,
		Users: slices.Clone(r.Access.Users), Groups: slices.Clone(r.Access.Groups), Icon: slices.Clone(r.Icon),
		Redirection: model.Redirection{
			Clipboard: r.Redirection.Clipboard != v1alpha1.Disabled, Audio: r.Redirection.Audio != v1alpha1.Disabled,
			Microphone: r.Redirection.Microphone == v1alpha1.Enabled, Drives: r.Redirection.Drives == v1alpha1.Enabled,
			Printers: r.Redirection.Printers == v1alpha1.Enabled, SmartCards: r.Redirection.SmartCards == v1alpha1.Enabled,
			Ports: r.Redirection.Ports == v1alpha1.Enabled,
		},
	}
	if r.Program != nil {
		m.Program, m.Arguments = r.Program.Path, r.Program.Arguments
	}
	return m
}

func pool(p *v1alpha1.HostPool) *model.Pool {
	m := &model.Pool{
		Name: p.Name, UID: string(p.UID), Generation: p.Generation,
		Personal: p.Spec.Type == v1alpha1.Personal, MaxSessions: p.Spec.MaxSessions(),
		DepthFirst:       p.Spec.LoadBalancing == v1alpha1.DepthFirst,
		HeartbeatTimeout: seconds(p.Spec.Health.HeartbeatTimeoutSeconds, defaultHeartbeat),
		ConnectTimeout:   seconds(p.Spec.Health.ConnectTimeoutSeconds, defaultConnect),
		Properties:       slices.Clone(p.Spec.CustomRDPProperties),
		Registration:     registration(p.Status.Registration, p.Annotations),
		MaxHosts:         int(p.Spec.Registration.MaxHosts()),
	}
	if m.Personal {
		m.Automatic = p.Spec.Assignment != v1alpha1.Direct
	}
	if rc := p.Spec.RDPCertificate; rc != nil {
		m.RDPIssuer = &config.Issuer{Name: rc.IssuerRef.Name, Kind: cmp.Or(rc.IssuerRef.Kind, "Issuer"), Group: cmp.Or(rc.IssuerRef.Group, "cert-manager.io")}
		m.RDPDuration = seconds(rc.DurationSeconds, defaultRDPDuration)
	}
	if a := p.Spec.Accounts; a != nil {
		m.Accounts = &model.Accounts{
			Create: a.Policy == v1alpha1.AccountsCreate, NameClaim: a.NameClaim, UIDClaim: a.UIDClaim, FirstUID: defaultFirstUID, LastUID: defaultLastUID,
		}
		if r := a.UIDRange; r != nil {
			m.Accounts.FirstUID, m.Accounts.LastUID = uint32(r.First), uint32(r.Last)
		}
	}
	return m
}

func host(h *v1alpha1.SessionHost) *model.Host {
	m := &model.Host{
		Name: h.Name, UID: string(h.UID), Pool: h.Spec.HostPoolRef.Name, Generation: h.Generation, Created: h.CreationTimestamp.Time,
		Pod: h.Labels[v1alpha1.LabelManagedBy] == v1alpha1.ManagedBy, AssignedUser: h.Spec.AssignedUser,
		Registration: registration(h.Status.Registration, h.Annotations), MadeByToken: h.Labels[v1alpha1.LabelMadeByToken] != "",
		Revoke: v1alpha1.RevokeFor(h.Annotations),
	}
	if d := h.Spec.Drain; d != nil {
		m.Drain = &model.Drain{Reason: d.Reason, Until: moment(d.Until)}
	}
	if h.Spec.Retiring {
		drainForGood(m, "it is no longer needed and goes with its last session")
	}
	if e := h.Status.Enrolment; e != nil {
		m.Enrolment = model.Enrolment{
			TokenHash: e.TokenHash, Serial: e.CertificateSerial, At: e.Time.Time, HostUID: e.HostUID,
			Key: e.KeyFingerprint, NextKey: e.NextKeyFingerprint, Renewed: moment(e.Renewed), RevokedFor: e.RevokedFor,
		}
	}
	if a := h.Status.Agent; a != nil {
		m.Agent = &model.AgentStatus{
			Connected: a.Connected, LastHeartbeat: moment(a.LastHeartbeat), Version: a.Version, OS: a.OS, RDPReady: a.RDPReady,
			Message: a.Message, Sessions: a.Sessions,
			DrainAcknowledged: a.DrainAcknowledged, AcknowledgedGeneration: a.AcknowledgedGeneration,
			CertificateFingerprint: a.CertificateFingerprint, CertificateExpires: moment(a.CertificateExpires),
			SecondMachine: moment(a.SecondMachineSeen),
		}
	}
	return m
}

// drainForGood drains a host without end, whatever a person's drain says.
func drainForGood(m *model.Host, reason string) {
	if m.Drain == nil {
		m.Drain = &model.Drain{Reason: reason}
	}
	m.Drain.Until = time.Time{}
}

func gateway(g *v1alpha1.Gateway) *model.Gateway {
	m := &model.Gateway{
		Name: g.Name, Region: g.Spec.Region, Hostname: g.Spec.Hostname, Port: defaultGatewayPort,
		CABundle: g.Status.CABundle, Sessions: g.Status.Sessions, Shared: len(g.Status.Workspaces) > 1,
	}
	if g.Spec.Port != nil {
		m.Port = *g.Spec.Port
	}
	for _, i := range g.Status.Instances {
		if !slices.Contains(g.Status.Workspaces, i.Workspace) {
			continue // it left, and nobody clears up after it
		}
		m.Instances = append(m.Instances, model.GatewayInstance{Name: i.Name, Workspace: i.Workspace, Sessions: i.Sessions, Draining: i.Draining})
	}
	for _, c := range g.Status.Conditions {
		if c.Type == v1alpha1.ConditionReady {
			m.Ready = c.Status == metav1.ConditionTrue && !v1alpha1.Leaving(g)
		}
	}
	return m
}

// registration tells of the token, but of one that an annotation has since revoked: the operator is about to replace it.
func registration(r v1alpha1.RegistrationStatus, annotations map[string]string) model.Registration {
	if r.RotatedFor != v1alpha1.RotateFor(annotations) {
		return model.Registration{}
	}
	return model.Registration{TokenHash: r.TokenHash, Expires: moment(r.Expires)}
}

func seconds(v *int32, standard time.Duration) time.Duration {
	if v == nil {
		return standard
	}
	return time.Duration(*v) * time.Second
}

func moment(t *metav1.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.Time
}
