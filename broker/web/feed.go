package web

import (
	"cmp"
	"crypto/rand"
	"fmt"
	"mime"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"rendezvous.dev/rendezvous/broker/accounts"
	"rendezvous.dev/rendezvous/broker/feed"
	"rendezvous.dev/rendezvous/broker/model"
	"rendezvous.dev/rendezvous/broker/oidc"
	"rendezvous.dev/rendezvous/wire/brokerapi"
	"rendezvous.dev/rendezvous/wire/refusal"
	"rendezvous.dev/rendezvous/wire/ticket"
	"rendezvous.dev/rendezvous/wire/trace"
)

// pingPath is where a gateway's listener answers 204.
const pingPath = "/rendezvous/v1/ping"

// declared gives the snapshot, or a refusal while there is no Workspace in it.
func (a *api) declared() (*model.Snapshot, error) {
	snap := a.o.Source.Snapshot()
	if snap.Workspace == nil {
		return nil, refusal.New(refusal.BrokerAway, "Workspace %s does not exist, or its broker has not read it yet: try again in a moment.", a.o.Workspace)
	}
	return snap, nil
}

func (a *api) workspace(w http.ResponseWriter, _ *request) error {
	snap, err := a.declared()
	if err != nil {
		return err
	}
	o := snap.Workspace.OIDC
	return writeJSON(w, http.StatusOK, brokerapi.Workspace{
		Name: snap.Workspace.Name, DisplayName: snap.Workspace.DisplayName, IssuerURL: o.IssuerURL, ClientID: o.ClientID, Scopes: o.Scopes,
		IssuerCA: a.o.Identity.CA(),
	})
}

// discovery answers the identity provider's own discovery document, where clients of the ARM form insist on reading one
// before they do anything; their ticket stands for the sign-in. So it is there also while the provider was never heard.
func (a *api) discovery(w http.ResponseWriter, _ *request) error {
	snap, err := a.declared()
	if err != nil {
		return err
	}
	if doc := a.o.Identity.Discovery(); len(doc) > 0 {
		return write(w, http.StatusOK, "application/json", doc)
	}
	return writeJSON(w, http.StatusOK, map[string]string{"issuer": snap.Workspace.OIDC.IssuerURL})
}

// granted are the resources that the user may use.
func granted(ws *model.Workspace, r *request) []*model.Resource {
	var mine []*model.Resource
	for i := range ws.Resources {
		if res := &ws.Resources[i]; res.Grants(r.user.Name, r.user.Groups) {
			mine = append(mine, res)
		}
	}
	return mine
}

func (a *api) resources(w http.ResponseWriter, r *request) error {
	snap, err := a.declared()
	if err != nil {
		return err
	}
	answer := brokerapi.Resources{User: r.user.Name, Resources: []brokerapi.Resource{}, Gateways: []brokerapi.Gateway{}}
	for _, res := range granted(snap.Workspace, r) {
		account := ""
		if pool := snap.Pools[res.Pool]; pool != nil && pool.Accounts != nil {
			// Who has none is told why when the file is downloaded.
			account, _ = accounts.Name(pool, accounts.Person{Name: r.user.Name, Claims: r.user.Claims(pool.Accounts.Claims())})
		}
		answer.Resources = append(answer.Resources, brokerapi.Resource{
			Name: res.Name, DisplayName: res.DisplayName, Type: res.Type, HostPool: res.Pool, Account: account, RDPFile: filePath(res.Name),
		})
	}
	// A token without the claim is nothing to tell people of who have what they need: they may be in no group.
	if len(answer.Resources) == 0 || r.user.GroupsProblem != oidc.GroupsAbsent {
		answer.Notice = groupsNotice(snap.Workspace, r)
	}
	connections := a.o.Gateways.Connections()
	for _, g := range snap.Gateways {
		if g.Ready {
			answer.Gateways = append(answer.Gateways, brokerapi.Gateway{
				Name: g.Name, Region: g.Region, Hostname: g.Hostname, Port: g.Port, PingPath: pingPath, Connections: connections[g.Name],
			})
		}
	}
	return writeJSON(w, http.StatusOK, answer)
}

// whoAmI answers the token as it is read here: the user, the groups, and the account on the hosts of each resource.
func (a *api) whoAmI(w http.ResponseWriter, r *request) error {
	snap, err := a.declared()
	if err != nil {
		return err
	}
	o := snap.Workspace.OIDC
	answer := brokerapi.Identity{
		User: r.user.Name, UserClaim: o.UsernameClaim, Groups: r.user.Groups, GroupsClaim: o.GroupsClaim, GroupsNotice: groupsNotice(snap.Workspace, r),
		Claims: r.user.ClaimNames(), SignedIn: r.user.SignedIn, Expires: r.user.Expires, Resources: []brokerapi.IdentityResource{},
	}
	for _, res := range granted(snap.Workspace, r) {
		one := brokerapi.IdentityResource{Name: res.Name, HostPool: res.Pool}
		if pool := snap.Pools[res.Pool]; pool == nil {
			one.Problem = fmt.Sprintf("HostPool %s does not exist", res.Pool)
		} else if pool.Accounts != nil {
			one.AccountClaim = pool.Accounts.NameClaim
			if one.Account, err = accounts.Name(pool, accounts.Person{Name: r.user.Name, Claims: r.user.Claims(pool.Accounts.Claims())}); err != nil {
				one.Problem = refusal.From(err).Message
			}
		}
		answer.Resources = append(answer.Resources, one)
	}
	return writeJSON(w, http.StatusOK, answer)
}

func filePath(resource string) string { return brokerapi.PathResources + "/" + resource + ".rdp" }
func iconPath(resource string) string { return brokerapi.PathResources + "/" + resource + ".png" }

func (a *api) webFeed(w http.ResponseWriter, r *request) error {
	snap, err := a.declared()
	if err != nil {
		return err
	}
	// Clients that name no type of feed are those that read the first schema.
	schema := feed.Schema11
	if strings.Contains(r.Header.Get("Accept"), "application/x-msts-radc+xml") {
		schema = feed.Schema20
	}
	doc, err := feed.Document(feed.Web{
		ID: a.o.Namespace + "/" + a.o.Workspace, Name: snap.Workspace.DisplayName, Resources: granted(snap.Workspace, r), Now: a.o.Now(),
		FilePath: filePath, IconPath: iconPath,
	}, schema)
	if err != nil {
		return err
	}
	return write(w, http.StatusOK, feed.ContentType(schema), doc)
}

// file answers NAME.rdp, step 5, and NAME.png.
func (a *api) file(w http.ResponseWriter, r *request) error {
	snap, err := a.declared()
	if err != nil {
		return err
	}
	file := r.PathValue("file")
	name, isRDP := strings.CutSuffix(file, ".rdp")
	name, isPNG := strings.CutSuffix(name, ".png")
	res := snap.Workspace.Resource(name)
	switch {
	case res == nil || !isRDP && !isPNG:
		return refusal.New(refusal.UnknownResource, "Workspace %s has no resource %q: `rdv list` shows what there is.", a.o.Workspace, name)
	case !res.Grants(r.user.Name, r.user.Groups):
		notice := ""
		if len(res.Groups) > 0 {
			notice = groupsNotice(snap.Workspace, r)
		}
		return refusal.New(refusal.NotGranted, "%s", strings.TrimSpace(fmt.Sprintf("%s may not use %q: ask an administrator of workspace %s to name you, or a group of yours, in the resource's access. %s", r.user.Name, name, a.o.Workspace, notice)))
	case isPNG && len(res.Icon) == 0:
		return refusal.New(refusal.UnknownResource, "Resource %q has no icon.", name)
	case isPNG:
		return write(w, http.StatusOK, "image/png", res.Icon)
	}
	id := rand.Text() // of the ticket
	data, through, err := a.connectionFile(snap, res, r, id)
	e := trace.Event{
		ActivityID: r.activity, Step: trace.StepFeed, Component: "feed/" + a.o.Name, At: r.begin, Duration: a.o.Now().Sub(r.begin), User: r.user.Name,
		Detail: fmt.Sprintf("%s for %s through gateway %s", file, r.user.Name, through),
	}
	if err != nil {
		refused := refusal.From(err)
		e.Error, e.Detail = string(refused.Code), refused.Message
	}
	a.o.Trace(e)
	if err != nil {
		return err
	}
	a.o.Log.Info("connection file made", "activity", r.activity, "user", r.user.Name, "resource", name, "ticket", id, "remote", r.RemoteAddr)
	w.Header().Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": file}))
	return write(w, http.StatusOK, "application/x-rdp", data)
}

// connectionFile makes a signed file with a fresh ticket of that id, for the gateway that the client chose, or we. through names the
// gateway and says why it is that one.
func (a *api) connectionFile(snap *model.Snapshot, res *model.Resource, r *request, id string) (data []byte, through string, err error) {
	pool := snap.Pools[res.Pool]
	if pool == nil {
		return nil, "", refusal.New(refusal.NoHost, "Resource %q names HostPool %q, which does not exist in this workspace: an administrator must make it, or change the resource's hostPoolRef.", res.Name, res.Pool)
	}
	form := r.URL.Query().Get("form")
	if form != "" && form != brokerapi.FormARM {
		return nil, "", refusal.New(refusal.BadRequest, "There is no form %q of a connection file: leave it out, or use %s.", form, brokerapi.FormARM)
	}
	key, err := a.o.TicketKey()
	if err != nil {
		return nil, "", fmt.Errorf("the broker can't sign tickets: %w", err)
	}
	gw, through, err := a.gateway(snap, r.URL.Query()["gateway"], id)
	if err != nil {
		return nil, "", err
	}
	address, now := brokerapi.PoolName(a.o.Namespace, res.Pool), a.o.Now()
	person := accounts.Person{Name: r.user.Name, Claims: r.user.Claims(pool.Accounts.Claims())}
	name := ""
	if pool.Accounts != nil {
		if name, err = accounts.Name(pool, person); err != nil {
			return nil, "", err
		}
	}
	raw, err := ticket.Sign(ticket.Claims{
		ID: id, Namespace: a.o.Namespace, Workspace: a.o.Workspace, User: r.user.Name, Resource: res.Name, Target: address,
		Groups: ticket.FitGroups(res.GrantedGroups(r.user.Groups)), ActivityID: given(r.Request), RedirectFlags: feed.RedirectFlags(res.Redirection),
		Account: person.Claims, SignedIn: r.user.SignedIn, IssuedAt: now, Expires: now.Add(snap.Workspace.TicketLifetime),
	}, key)
	if err != nil {
		return nil, "", refusal.New(refusal.Internal, "No ticket can be made for %q: %v. An administrator must shorten the names that it holds.", res.Name, err)
	}
	lines, err := feed.Sign(feed.Lines(feed.File{
		Resource: res, Gateway: gw, Address: address, Ticket: raw, Properties: pool.Properties, Verified: pool.RDPIssuer != nil, Account: name,
		ARM: form == brokerapi.FormARM,
	}), a.o.Signer())
	if err != nil {
		return nil, "", err
	}
	return feed.Encode(lines), through, nil
}

// gateway gives the named gateway; of several, or where none is named, the one that serves the ticket's holder best. It
// says why. Several are those that are equally near by the client's own measurements.
func (a *api) gateway(snap *model.Snapshot, names []string, ticket string) (gw *model.Gateway, why string, err error) {
	candidates, of := snap.Gateways, ""
	if len(names) > 0 {
		candidates, of = nil, " of those that are nearest"
		for _, g := range snap.Gateways {
			if slices.Contains(names, g.Name) {
				candidates = append(candidates, g)
			}
		}
	}
	switch {
	case len(names) > 0 && len(candidates) == 0:
		return nil, "", refusal.New(refusal.UnknownInstance, "Workspace %s has no gateway %q.", a.o.Workspace, names[0])
	case len(names) == 1:
		a.o.Gateways.Expect(names[0], ticket)
		return candidates[0], names[0] + ", which the client chose", nil
	}
	g, weighed := a.o.Gateways.Choose(candidates, ticket)
	if g == nil {
		return nil, "", refusal.New(refusal.AdmissionAway, "No gateway of workspace %s is ready (%d there): try again in a moment; an administrator finds more with `kubectl get gateways.rendezvous.dev`.", a.o.Workspace, len(snap.Gateways))
	}
	return g, fmt.Sprintf("%s, the emptiest%s (%s)", g.Name, of, weighed), nil
}

// maxAdded bounds the steps that a client may add in one request.
const maxAdded = 32

func (a *api) activity(w http.ResponseWriter, r *request) error {
	id := strings.ToLower(r.PathValue("id"))
	events, ok := a.o.Traces.Get(id, r.user.Name)
	if !ok {
		return refusal.New(refusal.UnknownResource, "There is no activity %s of yours here. Brokers remember the latest few thousand since they started.", cmp.Or(id, "?"))
	}
	return writeJSON(w, http.StatusOK, events)
}

// maxListed bounds a list of activities.
const maxListed = 50

// activities lists the user's latest connects, and what gateways refused at the user's address without knowing whose it is.
func (a *api) activities(w http.ResponseWriter, r *request) error {
	addr := ""
	if from, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		addr = from.Addr().Unmap().String()
	}
	return writeJSON(w, http.StatusOK, a.o.Traces.List(r.user.Name, addr, maxListed))
}

// addToActivity takes a client's own steps. They are its word: whose they are and that rdv says so is ours.
func (a *api) addToActivity(w http.ResponseWriter, r *request) error {
	id := strings.ToLower(r.PathValue("id"))
	if !a.o.Traces.MayAdd(id, r.user.Name) {
		return refusal.New(refusal.UnknownResource, "There is no activity %s of yours here.", id)
	}
	var events []trace.Event
	if err := readJSON(r, &events); err != nil {
		return err
	}
	if len(events) > maxAdded {
		return refusal.New(refusal.BadRequest, "%d steps are more than the %d that one request may add.", len(events), maxAdded)
	}
	for _, e := range events {
		e.ActivityID, e.User = id, r.user.Name
		if e.Component != "rdv" && !strings.HasPrefix(e.Component, "rdv/") {
			e.Component = "rdv"
		}
		a.o.Trace(e)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *api) preEnroll(w http.ResponseWriter, r *request) error {
	token, _ := bearer(r.Request)
	pre, err := a.o.Enrol.Pre(token)
	if err != nil {
		return err
	}
	r.vouch()
	return writeJSON(w, http.StatusOK, pre)
}

func (a *api) enroll(w http.ResponseWriter, r *request) error {
	var req brokerapi.EnrollRequest
	if err := readJSON(r, &req); err != nil {
		return err
	}
	res, err := a.o.Enrol.Enroll(r.Context(), req)
	if err != nil {
		return err
	}
	r.vouch()
	return writeJSON(w, http.StatusOK, res)
}
