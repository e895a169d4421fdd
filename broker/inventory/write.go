package inventory

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/broker/model"
)

// Field managers. An apply states all that its manager wants, so what is written for different reasons has its own:
// else an agent's report, made from a cache that lags, would take back an enrolment.
const (
	fieldManager = "rendezvous-broker"
	agentManager = "rendezvous-broker-agent"
)

// CreateHost implements model.Writer. The pool owns the host, but doesn't control it: it was made by nobody's template.
func (i *Inventory) CreateHost(ctx context.Context, pool *model.Pool, name, tokenHash string) error {
	h := &v1alpha1.SessionHost{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: i.namespace, Name: name,
			Labels: map[string]string{
				v1alpha1.LabelHostPool: pool.Name, v1alpha1.LabelWorkspace: i.workspace, v1alpha1.LabelMadeByToken: v1alpha1.MadeByToken(tokenHash),
			},
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: v1alpha1.GroupVersion.String(), Kind: "HostPool", Name: pool.Name, UID: types.UID(pool.UID),
			}},
		},
		Spec: v1alpha1.SessionHostSpec{HostPoolRef: v1alpha1.LocalReference{Name: pool.Name}},
	}
	return i.failed("create", "SessionHost", name, i.client.Create(ctx, h, client.FieldOwner(fieldManager)))
}

// CountHosts implements model.Writer. It asks the API server itself: the cache may not know yet of what was just made.
func (i *Inventory) CountHosts(ctx context.Context, tokenHash string, most int) (int, error) {
	list := &metav1.PartialObjectMetadataList{}
	list.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("SessionHostList"))
	err := i.client.List(ctx, list, client.InNamespace(i.namespace), client.Limit(int64(most)),
		client.MatchingLabels{v1alpha1.LabelMadeByToken: v1alpha1.MadeByToken(tokenHash)})
	return len(list.Items), i.failed("count", "SessionHosts made by token", tokenHash[:min(len(tokenHash), 8)], err)
}

// GetHost implements model.Writer.
func (i *Inventory) GetHost(ctx context.Context, name string) (*model.Host, string, error) {
	var h v1alpha1.SessionHost
	if err := i.client.Get(ctx, i.key(name), &h); err != nil {
		return nil, "", i.failed("get", "SessionHost", name, err)
	}
	return host(&h), h.ResourceVersion, nil
}

// MarkEnrolled implements model.Writer.
func (i *Inventory) MarkEnrolled(ctx context.Context, name, version string, e model.Enrolment) error {
	return i.applyStatus(ctx, "SessionHost", name, version, fieldManager, map[string]any{
		"enrolment": v1alpha1.Enrolment{
			Time: metav1.NewTime(e.At), TokenHash: e.TokenHash, CertificateSerial: e.Serial, HostUID: e.HostUID,
			KeyFingerprint: e.Key, NextKeyFingerprint: e.NextKey, Renewed: timePointer(e.Renewed), RevokedFor: e.RevokedFor,
		},
	})
}

// WriteAgent implements model.Writer.
func (i *Inventory) WriteAgent(ctx context.Context, name string, s model.AgentStatus) error {
	return i.applyStatus(ctx, "SessionHost", name, "", agentManager, map[string]any{"agent": v1alpha1.AgentStatus{
		Connected: s.Connected, LastHeartbeat: timePointer(s.LastHeartbeat), Version: clip(s.Version, 128), OS: clip(s.OS, 128),
		RDPReady: s.RDPReady, Message: clip(s.Message, 1024), Sessions: s.Sessions,
		DrainAcknowledged: s.DrainAcknowledged, AcknowledgedGeneration: s.AcknowledgedGeneration,
		CertificateFingerprint: clip(s.CertificateFingerprint, 64), CertificateExpires: timePointer(s.CertificateExpires),
		SecondMachineSeen: timePointer(s.SecondMachine),
	}})
}

// WriteGateway implements model.Writer. Each workspace's brokers are a field manager of their own, so that they leave the
// entries of the others alone.
func (i *Inventory) WriteGateway(ctx context.Context, gateway string, sessions int32, mine []model.GatewayInstance) error {
	instances := make([]v1alpha1.GatewayInstance, len(mine))
	for n, m := range mine {
		instances[n] = v1alpha1.GatewayInstance{Name: m.Name, Workspace: m.Workspace, Sessions: m.Sessions, Draining: m.Draining}
	}
	return i.applyStatus(ctx, "Gateway", gateway, "", fieldManager+"."+i.workspace, map[string]any{"sessions": sessions, "instances": instances})
}

// applyStatus is the one place of server-side apply: the whole intent of one manager on an object that exists.
func (i *Inventory) applyStatus(ctx context.Context, kind, name, version, manager string, status map[string]any) error {
	plain, err := toJSON(status)
	if err != nil {
		return err
	}
	u := &unstructured.Unstructured{Object: map[string]any{"status": plain}}
	u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind(kind))
	u.SetNamespace(i.namespace)
	u.SetName(name)
	u.SetResourceVersion(version)
	err = i.client.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner(manager), client.ForceOwnership)
	return i.failed("write the status of", kind, name, err)
}

// Assign implements model.Writer.
func (i *Inventory) Assign(ctx context.Context, name, user string) (string, error) {
	for range 5 {
		var h v1alpha1.SessionHost
		if err := i.client.Get(ctx, i.key(name), &h); err != nil {
			return "", i.failed("get", "SessionHost", name, err)
		}
		if owner := cmp.Or(h.Status.FilesOf, h.Spec.AssignedUser); owner != "" {
			return owner, nil
		}
		if !slices.Contains(h.Finalizers, v1alpha1.Finalizer) { // it may be somebody's from before
			return "", fmt.Errorf("assign SessionHost %s: it is new, and the operator has yet to look at it", name)
		}
		patch := client.MergeFromWithOptions(h.DeepCopy(), client.MergeFromWithOptimisticLock{})
		h.Spec.AssignedUser = user
		err := i.client.Patch(ctx, &h, patch, client.FieldOwner(fieldManager))
		if err == nil {
			return user, nil
		}
		if !apierrors.IsConflict(err) {
			return "", i.failed("assign", "SessionHost", name, err)
		}
	}
	return "", fmt.Errorf("assign SessionHost %s: %w", name, model.ErrConflict)
}

// ReadAccounts implements model.Writer. The operator makes the ConfigMap; what is in it is the brokers'.
func (i *Inventory) ReadAccounts(ctx context.Context, pool string) (map[string]string, string, error) {
	var m corev1.ConfigMap
	if err := i.client.Get(ctx, i.key(v1alpha1.AccountsConfigMap(pool)), &m); err != nil {
		return nil, "", i.failed("get", "ConfigMap", v1alpha1.AccountsConfigMap(pool), err)
	}
	return m.Data, m.ResourceVersion, nil
}

// AddAccount implements model.Writer.
func (i *Inventory) AddAccount(ctx context.Context, pool, version, name, value string) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"resourceVersion": version}, "data": map[string]string{name: value}})
	if err != nil {
		return fmt.Errorf("inventory: %w", err)
	}
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: i.namespace, Name: v1alpha1.AccountsConfigMap(pool)}}
	return i.failed("patch", "ConfigMap", m.Name, i.client.Patch(ctx, m, client.RawPatch(types.MergePatchType, patch), client.FieldOwner(fieldManager)))
}

// Sign implements model.Writer, by a cert-manager CertificateRequest that is deleted once it is answered.
func (i *Inventory) Sign(ctx context.Context, r model.CertificateRequest) (chain, ca []byte, err error) {
	usages := []cmv1.KeyUsage{cmv1.UsageDigitalSignature}
	if r.Client {
		usages = append(usages, cmv1.UsageClientAuth)
	}
	if r.Server {
		usages = append(usages, cmv1.UsageKeyEncipherment, cmv1.UsageServerAuth)
	}
	req := &cmv1.CertificateRequest{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: i.namespace, GenerateName: r.Host + "-",
			Labels: map[string]string{v1alpha1.LabelWorkspace: i.workspace, v1alpha1.LabelSessionHost: r.Host},
		},
		Spec: cmv1.CertificateRequestSpec{
			Request: r.CSR, Duration: &metav1.Duration{Duration: r.Duration}, Usages: usages,
			IssuerRef: cmmeta.IssuerReference{Name: r.Issuer.Name, Kind: r.Issuer.Kind, Group: r.Issuer.Group},
		},
	}
	if err := i.client.Create(ctx, req, client.FieldOwner(fieldManager)); err != nil {
		return nil, nil, i.failed("create", "CertificateRequest", r.Host, err)
	}
	defer func() {
		// The caller may be gone; the request must be, too.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if err := i.client.Delete(ctx, req); client.IgnoreNotFound(err) != nil {
			i.log.Warn("can't delete a CertificateRequest", "name", req.Name, "error", err)
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, i.pollMost)
	defer cancel()
	last := "it has said nothing yet"
	for {
		if err := i.client.Get(ctx, client.ObjectKeyFromObject(req), req); err == nil {
			done, err := answered(req)
			if err != nil {
				return nil, nil, err
			}
			if done {
				return req.Status.Certificate, req.Status.CA, nil
			}
			last = readiness(req)
		} else if apierrors.IsNotFound(err) {
			return nil, nil, i.failed("get", "CertificateRequest", req.Name, err)
		} else if ctx.Err() == nil { // a look that time cut short tells less than the one before it
			last = err.Error()
		}
		select {
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("issuer %s/%s did not answer in time: %s", r.Issuer.Kind, r.Issuer.Name, last)
		case <-time.After(i.pollEvery):
		}
	}
}

// answered says whether a CertificateRequest is signed, or why it never will be.
func answered(req *cmv1.CertificateRequest) (bool, error) {
	for _, kind := range []cmv1.CertificateRequestConditionType{cmv1.CertificateRequestConditionInvalidRequest, cmv1.CertificateRequestConditionDenied} {
		if c := condition(req, kind); c.Status == cmmeta.ConditionTrue {
			return false, fmt.Errorf("%w: %s", model.ErrDenied, c.Message)
		}
	}
	c := condition(req, cmv1.CertificateRequestConditionReady)
	if c.Reason == cmv1.CertificateRequestReasonFailed || c.Reason == cmv1.CertificateRequestReasonDenied {
		return false, fmt.Errorf("%w: %s", model.ErrDenied, c.Message)
	}
	return c.Status == cmmeta.ConditionTrue && len(req.Status.Certificate) > 0, nil
}

func condition(req *cmv1.CertificateRequest, kind cmv1.CertificateRequestConditionType) cmv1.CertificateRequestCondition {
	for _, c := range req.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return cmv1.CertificateRequestCondition{}
}

func readiness(req *cmv1.CertificateRequest) string {
	return cmp.Or(condition(req, cmv1.CertificateRequestConditionReady).Message,
		"cert-manager has not looked at it; is it running, and is the request approved?")
}

func (i *Inventory) key(name string) client.ObjectKey {
	return client.ObjectKey{Namespace: i.namespace, Name: name}
}

// failed names the object, and turns the API server's reasons into those that callers know.
func (i *Inventory) failed(verb, kind, name string, err error) error {
	if err == nil {
		return nil
	}
	known := error(nil)
	switch {
	case apierrors.IsAlreadyExists(err):
		known = model.ErrExists
	case apierrors.IsNotFound(err):
		known = model.ErrNotFound
	case apierrors.IsConflict(err):
		known = model.ErrConflict
	}
	return fmt.Errorf("%s %s %s/%s: %w", verb, kind, i.namespace, name, errors.Join(known, err))
}

func toJSON(v any) (map[string]any, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	return m, nil
}

func timePointer(t time.Time) *metav1.Time {
	if t.IsZero() {
		return nil
	}
	m := metav1.NewTime(t)
	return &m
}

// clip holds a text that an agent wrote to what the API takes.
func clip(s string, most int) string {
	s = strings.ToValidUTF8(s, "")
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "")
}
