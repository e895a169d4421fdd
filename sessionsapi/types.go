package sessionsapi

import (
	"encoding/json"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/duration"
	"k8s.io/apimachinery/pkg/util/validation"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

const kind = "Session"

// Session is one session on a host. Delete it to log its user off.
type Session struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Status            SessionStatus `json:"status"`
}

// SessionStatus is what brokers and hosts say of it. Without proof of a broker only pool, host, state and since are known.
type SessionStatus struct {
	User       string      `json:"user,omitempty"`
	Account    string      `json:"account,omitempty"`
	Resource   string      `json:"resource,omitempty"`
	Workspace  string      `json:"workspace"`
	Pool       string      `json:"pool"`
	Host       string      `json:"host"`
	State      string      `json:"state"`
	Since      metav1.Time `json:"since"`
	Client     string      `json:"client,omitempty"`
	Gateway    string      `json:"gateway,omitempty"`
	Instance   string      `json:"instance,omitempty"`
	ActivityID string      `json:"activityId,omitempty"`
	Proven     bool        `json:"proven"`
}

// SessionList is a list of them.
type SessionList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`
	Items           []Session `json:"items"`
}

var groupVersion = Group + "/" + Version

// session makes the object.
func session(f Found) Session {
	s := Session{
		TypeMeta: metav1.TypeMeta{APIVersion: groupVersion, Kind: kind},
		ObjectMeta: metav1.ObjectMeta{
			Name: f.ID, Namespace: f.Namespace, UID: types.UID(f.Workspace + "/" + f.ID), Labels: map[string]string{},
		},
		Status: SessionStatus{
			User: f.User, Account: f.Account, Resource: f.Resource, Workspace: f.Workspace, Pool: f.Pool, Host: f.Host, State: f.State,
			Since: metav1.NewTime(f.Since), Client: f.Client, Gateway: f.Gateway, Instance: f.Instance, ActivityID: f.ActivityID, Proven: f.Proven,
		},
	}
	if started := f.Started; !started.IsZero() {
		s.CreationTimestamp = metav1.NewTime(started)
	} else {
		s.CreationTimestamp = metav1.NewTime(f.Since)
	}
	for key, value := range map[string]string{
		rdv.LabelWorkspace: f.Workspace, rdv.LabelHostPool: f.Pool, rdv.LabelSessionHost: f.Host, rdv.LabelGateway: f.Gateway,
		Group + "/resource": f.Resource, Group + "/account": f.Account, Group + "/state": f.State,
	} {
		if value != "" && len(validation.IsValidLabelValue(value)) == 0 {
			s.Labels[key] = value
		}
	}
	return s
}

// fields are what field selectors may name, besides with "status." before those that are not metadata's.
func (s *Session) fields() fields.Set {
	set := fields.Set{
		"metadata.name": s.Name, "metadata.namespace": s.Namespace,
	}
	for key, value := range map[string]string{
		"user": s.Status.User, "account": s.Status.Account, "resource": s.Status.Resource, "workspace": s.Status.Workspace, "pool": s.Status.Pool,
		"host": s.Status.Host, "state": s.Status.State, "gateway": s.Status.Gateway, "instance": s.Status.Instance, "activityId": s.Status.ActivityID,
	} {
		set[key], set["status."+key] = value, value
	}
	return set
}

// selection is which sessions a request is about.
type selection struct {
	labels labels.Selector
	fields fields.Selector
}

func parseSelection(labelSelector, fieldSelector string) (selection, error) {
	l, err := labels.Parse(labelSelector)
	if err != nil {
		return selection{}, badRequest("labelSelector: %v", err)
	}
	f, err := fields.ParseSelector(fieldSelector)
	if err != nil {
		return selection{}, badRequest("fieldSelector: %v", err)
	}
	known := (&Session{}).fields()
	for _, r := range f.Requirements() {
		if _, ok := known[r.Field]; !ok {
			return selection{}, badRequest("fieldSelector: %q is not a field of sessions: use metadata.name, user, account, resource, workspace, pool, host, state, gateway, instance or activityId", r.Field)
		}
	}
	return selection{l, f}, nil
}

func (s selection) picks(o *Session) bool {
	return s.labels.Matches(labels.Set(o.Labels)) && s.fields.Matches(o.fields())
}

// columns are kubectl's; those of priority 1 show with -o wide.
var columns = []metav1.TableColumnDefinition{
	{Name: "Name", Type: "string", Format: "name", Description: "Id of the session."},
	{Name: "User", Type: "string", Description: "Whom a broker sent there; <unknown> where no broker vouches for it."},
	{Name: "Account", Type: "string", Description: "Account on the host."},
	{Name: "Resource", Type: "string", Description: "Resource of the Workspace that was opened."},
	{Name: "Pool", Type: "string", Description: "HostPool."},
	{Name: "Host", Type: "string", Description: "SessionHost."},
	{Name: "State", Type: "string", Description: "Pending, Active or Disconnected."},
	{Name: "Since", Type: "string", Description: "How long it has been in that state."},
	{Name: "Client", Type: "string", Priority: 1, Description: "Address that the gateway saw."},
	{Name: "Gateway", Type: "string", Priority: 1, Description: "Gateway that carries it."},
	{Name: "Instance", Type: "string", Priority: 1, Description: "Pod of the gateway."},
	{Name: "Activity", Type: "string", Priority: 1, Description: "For rdv explain."},
}

// table gives sessions as kubectl prints them. include is the parameter includeObject.
func table(items []Session, resourceVersion, include string, now time.Time, header bool) (*metav1.Table, error) {
	t := &metav1.Table{TypeMeta: metav1.TypeMeta{APIVersion: "meta.k8s.io/v1", Kind: "Table"}, ListMeta: metav1.ListMeta{ResourceVersion: resourceVersion}, Rows: []metav1.TableRow{}}
	if header {
		t.ColumnDefinitions = columns
	}
	for i := range items {
		s := &items[i]
		orNone := func(v string) string {
			if v == "" {
				return "<none>"
			}
			return v
		}
		user := s.Status.User
		if !s.Status.Proven {
			user = "<unknown>"
		}
		row := metav1.TableRow{Cells: []any{
			s.Name, user, orNone(s.Status.Account), orNone(s.Status.Resource), s.Status.Pool, s.Status.Host, s.Status.State,
			duration.HumanDuration(now.Sub(s.Status.Since.Time)), orNone(s.Status.Client), orNone(s.Status.Gateway), orNone(s.Status.Instance), orNone(s.Status.ActivityID),
		}}
		var object any
		switch include {
		case "None":
		case "Object":
			object = s
		default:
			object = metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{APIVersion: "meta.k8s.io/v1", Kind: "PartialObjectMetadata"}, ObjectMeta: s.ObjectMeta}
		}
		if object != nil {
			raw, err := json.Marshal(object)
			if err != nil {
				return nil, err
			}
			row.Object = runtime.RawExtension{Raw: raw}
		}
		t.Rows = append(t.Rows, row)
	}
	return t, nil
}

// wantsTable says whether the client prefers a table.
func wantsTable(accept string) bool {
	first, _, _ := strings.Cut(accept, ",")
	return strings.Contains(first, "as=Table")
}
