package controllers

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/render"
	"rendezvous.dev/rendezvous/controllers/rules"
)

// NewScheme holds every kind that the operator reads or writes.
func NewScheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	utilruntime.Must(clientgoscheme.AddToScheme(scheme))
	utilruntime.Must(certmanager.AddToScheme(scheme))
	utilruntime.Must(rdv.AddToScheme(scheme))
	return scheme
}

// MaxConcurrentReconciles of each kind.
const MaxConcurrentReconciles = 4

// CacheOptions are what a manager of the operator holds in memory: of the kinds that others use too only what has our label,
// and of no object who wrote which of its fields. What lacks the label is looked up where it is named. With namespaces, of
// objects in these alone.
func CacheOptions(namespaces ...string) cache.Options {
	ours := labels.SelectorFromSet(labels.Set{rdv.LabelManagedBy: rdv.ManagedBy})
	asIs := func(obj any) (any, error) { return obj, nil }
	opts := cache.Options{
		DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&corev1.Pod{}:        {Label: ours, Transform: slimPod},
			&appsv1.Deployment{}: {Label: ours, Transform: asIs}, // HandOverReplicas asks whose its replicas are
		},
	}
	for _, kind := range []client.Object{
		&corev1.Secret{}, &corev1.ConfigMap{}, &corev1.Service{}, &corev1.ServiceAccount{}, &corev1.PersistentVolumeClaim{}, &appsv1.ReplicaSet{},
		&rbacv1.Role{}, &rbacv1.RoleBinding{}, &networkingv1.NetworkPolicy{}, &policyv1.PodDisruptionBudget{},
		&autoscalingv2.HorizontalPodAutoscaler{}, &certmanager.Certificate{},
	} {
		opts.ByObject[kind] = cache.ByObject{Label: ours}
	}
	for _, namespace := range namespaces {
		if opts.DefaultNamespaces == nil {
			opts.DefaultNamespaces = map[string]cache.Config{}
		}
		opts.DefaultNamespaces[namespace] = cache.Config{}
	}
	return opts
}

// slimPod leaves of a pod what the operator looks at: thousands of them are most of its memory otherwise.
func slimPod(obj any) (any, error) {
	if pod, ok := obj.(*corev1.Pod); ok {
		pod.ManagedFields = nil
		containers := pod.Spec.Containers
		pod.Spec = corev1.PodSpec{}
		for _, c := range containers {
			pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: c.Name, Image: c.Image})
		}
	}
	return obj, nil
}

// Options of the operator.
type Options struct {
	Render render.Options
	// ClusterNetworks are addresses of the cluster beside those that its nodes, Services and API server tell.
	ClusterNetworks []netip.Prefix
	// NoClusterIssuers is set where the operator, held to namespaces, may not read ClusterIssuers: what is wrong with one shows
	// on the Certificates that name it.
	NoClusterIssuers bool
	// Discovery defaults to NewDiscovery.
	Discovery *Discovery
	// Now defaults to time.Now.
	Now func() time.Time
}

// Setup adds the four reconcilers to a manager.
func Setup(mgr ctrl.Manager, opts Options) error {
	if opts.Discovery == nil {
		opts.Discovery = NewDiscovery()
	}
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if err := addIndexes(mgr); err != nil {
		return err
	}
	base := base{
		Applier:     &Applier{Client: mgr.GetClient(), Live: mgr.GetAPIReader()},
		events:      mgr.GetEventRecorder(FieldManager),
		authorities: &authorities{known: map[types.NamespacedName]authority{}},
		namespaces:  &namespaceRefs{known: map[string]namespaceRef{}},
		networks:    &networks{live: mgr.GetAPIReader(), given: opts.ClusterNetworks, now: opts.Now},
		render:      opts.Render,
		now:         opts.Now,

		noClusterIssuers: opts.NoClusterIssuers,
	}
	for _, add := range []func(ctrl.Manager) error{
		(&workspaceReconciler{base: base, discovery: opts.Discovery}).setup,
		(&hostPoolReconciler{base: base}).setup,
		(&sessionHostReconciler{base: base}).setup,
		(&gatewayReconciler{base: base}).setup,
	} {
		if err := add(mgr); err != nil {
			return err
		}
	}
	return nil
}

// base is what the reconcilers share.
type base struct {
	*Applier
	events      events.EventRecorder
	authorities *authorities
	namespaces  *namespaceRefs
	networks    *networks
	render      render.Options
	now         func() time.Time

	noClusterIssuers bool
}

// watchIssuers wakes those in newList that name an issuer that changes.
func (b *base) watchIssuers(controller *builder.Builder, c client.Reader, newList func() client.ObjectList) *builder.Builder {
	controller = controller.Watches(&certmanager.Issuer{}, byIssuer(c, certmanager.IssuerKind, newList))
	if b.noClusterIssuers {
		return controller
	}
	return controller.Watches(&certmanager.ClusterIssuer{}, byIssuer(c, certmanager.ClusterIssuerKind, newList))
}

// pass is what every reconcile of one object carries. Each reconciler's scope embeds it.
type pass struct {
	// refs gathers what is wrong with references and children; certificates what is wrong with those. Any phase adds.
	refs, certificates problems
	// requeue is the earliest time at which something changes by itself, 0 for never. Any phase sets it by wakeAfter.
	requeue time.Duration
}

// wakeAfter asks for another pass after d; the earliest wish counts.
func (p *pass) wakeAfter(d time.Duration) {
	if d > 0 && (p.requeue == 0 || d < p.requeue) {
		p.requeue = d
	}
}

// rejectedRetry is how soon a child that the API server refused is tried again: quotas and webhooks change unseen.
const rejectedRetry = time.Minute

// goneRetry is how soon it is looked again whether an earlier child is gone: its end need not wake its new owner.
const goneRetry = 5 * time.Second

// applyAll applies children. What a person must put right becomes a problem of the pass; other errors end it.
func (b *base) applyAll(ctx context.Context, p *pass, owner client.Object, children ...client.Object) error {
	for _, child := range children {
		if _, err := b.applyOne(ctx, p, owner, child); err != nil {
			return err
		}
	}
	return nil
}

// applyOne is applyAll for one child; done says that it is as wanted.
func (b *base) applyOne(ctx context.Context, p *pass, owner, child client.Object) (done bool, err error) {
	err = b.Apply(ctx, owner, child)
	if refused, ok := err.(*RefusedError); ok {
		if refused.Leaving != "" {
			p.refs.addLeaving(refused.Leaving)
			p.wakeAfter(goneRetry)
			return false, nil
		}
		p.refs.add(refused.Reason, refused.Message)
		p.wakeAfter(rejectedRetry)
		return false, nil
	}
	return err == nil, err
}

// Field indexes, by which a change of one object finds those that name it.
const (
	indexHostPool  = "refersTo.hostPool"  // Workspaces and SessionHosts, by HostPool name
	indexWorkspace = "refersTo.workspace" // HostPools, by Workspace name
	indexIssuer    = "refersTo.issuer"    // Workspaces, HostPools and Gateways, by issuerKey
)

func addIndexes(mgr ctrl.Manager) error {
	indexer := mgr.GetFieldIndexer()
	for _, index := range []struct {
		obj   client.Object
		field string
		keys  client.IndexerFunc
	}{
		{&rdv.Workspace{}, indexHostPool, func(o client.Object) (names []string) {
			for _, r := range o.(*rdv.Workspace).Spec.Resources {
				names = append(names, r.HostPoolRef.Name)
			}
			return names
		}},
		{&rdv.Workspace{}, indexIssuer, func(o client.Object) (keys []string) {
			for _, named := range rules.WorkspaceIssuers(o.(*rdv.Workspace)) {
				keys = append(keys, issuerKey(named.Ref))
			}
			return keys
		}},
		{&rdv.HostPool{}, indexWorkspace, func(o client.Object) []string {
			return []string{o.(*rdv.HostPool).Spec.WorkspaceRef.Name}
		}},
		{&rdv.HostPool{}, indexIssuer, func(o client.Object) []string {
			if c := o.(*rdv.HostPool).Spec.RDPCertificate; c != nil {
				return []string{issuerKey(c.IssuerRef)}
			}
			return nil
		}},
		{&rdv.SessionHost{}, indexHostPool, func(o client.Object) []string {
			return []string{o.(*rdv.SessionHost).Spec.HostPoolRef.Name}
		}},
		{&rdv.Gateway{}, indexIssuer, func(o client.Object) []string {
			return []string{issuerKey(o.(*rdv.Gateway).Spec.Certificates.IssuerRef)}
		}},
	} {
		if err := indexer.IndexField(context.Background(), index.obj, index.field, index.keys); err != nil {
			return fmt.Errorf("index %T by %s: %w", index.obj, index.field, err)
		}
	}
	return nil
}

// requestsFor lists objects and asks for a reconcile of each. A list from the cache fails only at shutdown.
func requestsFor(ctx context.Context, c client.Reader, list client.ObjectList, opts ...client.ListOption) []reconcile.Request {
	if err := c.List(ctx, list, opts...); err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "could not list what refers to a changed object")
		return nil
	}
	var requests []reconcile.Request
	add := func(o client.Object) {
		requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(o)})
	}
	switch list := list.(type) {
	case *rdv.WorkspaceList:
		for i := range list.Items {
			add(&list.Items[i])
		}
	case *rdv.HostPoolList:
		for i := range list.Items {
			add(&list.Items[i])
		}
	case *rdv.SessionHostList:
		for i := range list.Items {
			add(&list.Items[i])
		}
	case *rdv.GatewayList:
		for i := range list.Items {
			add(&list.Items[i])
		}
	}
	return requests
}

// byIssuer wakes those in newList that name a changed issuer.
func byIssuer(c client.Reader, kind string, newList func() client.ObjectList) handler.EventHandler {
	return handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		opts := []client.ListOption{client.MatchingFields{indexIssuer: issuerKey(rdv.IssuerReference{Kind: kind, Name: o.GetName()})}}
		if o.GetNamespace() != "" {
			opts = append(opts, client.InNamespace(o.GetNamespace()))
		}
		return requestsFor(ctx, c, newList(), opts...)
	})
}

// byField wakes those in newList, in the changed object's namespace, whose index holds key(object).
func byField(c client.Reader, field string, newList func() client.ObjectList, key func(client.Object) string) handler.EventHandler {
	return handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		value := key(o)
		if value == "" {
			return nil
		}
		return requestsFor(ctx, c, newList(), client.InNamespace(o.GetNamespace()), client.MatchingFields{field: value})
	})
}

// inNamespace wakes all of newList in the changed object's namespace.
func inNamespace(c client.Reader, newList func() client.ObjectList) handler.EventHandler {
	return handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		return requestsFor(ctx, c, newList(), client.InNamespace(o.GetNamespace()))
	})
}

// byLabel wakes the object that a label on the changed one names: cert-manager's Secrets carry our labels, but no owner
// until they are adopted.
func byLabel(label string) handler.EventHandler {
	return handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
		name := o.GetLabels()[label]
		if name == "" {
			return nil
		}
		return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: o.GetNamespace(), Name: name}}}
	})
}

func workspaces() client.ObjectList   { return &rdv.WorkspaceList{} }
func hostPools() client.ObjectList    { return &rdv.HostPoolList{} }
func sessionHosts() client.ObjectList { return &rdv.SessionHostList{} }
func gateways() client.ObjectList     { return &rdv.GatewayList{} }

func name(o client.Object) string { return o.GetName() }

// feedTLSOf is the Workspace whose feed certificate a Secret holds, or "".
func feedTLSOf(o client.Object) string {
	workspace := o.GetLabels()[rdv.LabelWorkspace]
	if workspace != "" && o.GetName() == render.WorkspaceTLS(workspace) {
		return workspace
	}
	return ""
}

var secretKind = corev1.SchemeGroupVersion.WithKind("Secret")
