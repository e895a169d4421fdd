// Package inventory is the one part of the broker that knows Kubernetes. It watches the workspace's objects, hands out
// snapshots of them in the broker's own types, and carries out the broker's few writes. While the API server is away it
// goes on serving the last snapshot.
package inventory

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/broker/model"
)

const (
	// lookEvery is how often the API server is asked whether it is there; watches may be silent for minutes.
	lookEvery   = 10 * time.Second
	lookTimeout = 5 * time.Second
)

// settle is how long a burst of changes is gathered before it becomes one snapshot.
const settle = 100 * time.Millisecond

// Inventory implements model.Source and model.Writer for one workspace.
type Inventory struct {
	namespace, workspace string
	log                  *slog.Logger
	cache                cache.Cache
	client               client.Client
	now                  func() time.Time
	pollEvery, pollMost  time.Duration // of Sign
	lookEvery            time.Duration

	current atomic.Pointer[model.Snapshot]
	synced  atomic.Bool
	dirty   chan struct{}

	mu       sync.Mutex
	onChange []func()
	heard    time.Time // when the API server last answered a look
	lastLook error
}

// Scheme knows every kind that the broker reads or writes.
func Scheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{v1alpha1.AddToScheme, cmv1.AddToScheme, corev1.AddToScheme} {
		if err := add(s); err != nil {
			return nil, fmt.Errorf("inventory: %w", err)
		}
	}
	return s, nil
}

// New prepares an inventory; Run makes it live. Until the caches are filled once, its snapshot is empty.
func New(cfg *rest.Config, namespace, workspace string, log *slog.Logger) (*Inventory, error) {
	scheme, err := Scheme()
	if err != nil {
		return nil, err
	}
	cfg = rest.CopyConfig(cfg)
	cfg.QPS, cfg.Burst = 50, 100
	c, err := cache.New(cfg, cache.Options{
		Scheme:            scheme,
		DefaultNamespaces: map[string]cache.Config{namespace: {}},
		ByObject: map[client.Object]cache.ByObject{
			&v1alpha1.Workspace{}: {Field: fields.OneTermEqualSelector("metadata.name", workspace)},
		},
	})
	if err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	direct, err := client.New(cfg, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	i := &Inventory{
		namespace: namespace, workspace: workspace, log: log, cache: c, client: direct, now: time.Now,
		pollEvery: 250 * time.Millisecond, pollMost: 45 * time.Second, lookEvery: lookEvery, dirty: make(chan struct{}, 1),
	}
	i.current.Store(snapshot(objects{}))
	return i, nil
}

// OnChange has f called after each new snapshot. Call it before Run.
func (i *Inventory) OnChange(f func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.onChange = append(i.onChange, f)
}

// Snapshot gives the newest snapshot.
func (i *Inventory) Snapshot() *model.Snapshot { return i.current.Load() }

// Synced says that the caches were filled once.
func (i *Inventory) Synced() bool { return i.synced.Load() }

// Heard says when the API server last answered, zero for never, and why the last look failed.
func (i *Inventory) Heard() (time.Time, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.heard, i.lastLook
}

// keepLooking asks the API server, again and again, for the Workspace.
func (i *Inventory) keepLooking(ctx context.Context) {
	tick := time.NewTicker(i.lookEvery)
	defer tick.Stop()
	for {
		err := i.look(ctx)
		if ctx.Err() != nil {
			return
		}
		i.mu.Lock()
		was := i.lastLook
		if i.lastLook = err; err == nil {
			i.heard = i.now()
		}
		i.mu.Unlock()
		switch {
		case err != nil && was == nil:
			i.log.Warn("the API server does not answer; serving what was known before", "error", err)
		case err == nil && was != nil:
			i.log.Info("the API server answers again")
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (i *Inventory) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	return client.IgnoreNotFound(i.client.Get(ctx, client.ObjectKey{Namespace: i.namespace, Name: i.workspace}, &v1alpha1.Workspace{}))
}

// Run watches until ctx ends.
func (i *Inventory) Run(ctx context.Context) error {
	var looking sync.WaitGroup
	look, stop := context.WithCancel(ctx)
	defer func() { stop(); looking.Wait() }()
	looking.Go(func() { i.keepLooking(look) })
	changed := toolscache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { i.markDirty() },
		UpdateFunc: func(any, any) { i.markDirty() },
		DeleteFunc: func(any) { i.markDirty() },
	}
	failed := make(chan error, 1)
	go func() { failed <- i.cache.Start(ctx) }()
	for _, obj := range []client.Object{&v1alpha1.Workspace{}, &v1alpha1.HostPool{}, &v1alpha1.SessionHost{}, &v1alpha1.Gateway{}} {
		// Without the API server there is no informer; ask until there is.
		for {
			informer, err := i.cache.GetInformer(ctx, obj, cache.BlockUntilSynced(false))
			if err == nil {
				_, err = informer.AddEventHandler(changed)
			}
			if err == nil {
				break
			}
			i.log.Warn("can't watch yet", "kind", fmt.Sprintf("%T", obj), "error", err)
			select {
			case <-ctx.Done():
				return nil
			case err := <-failed:
				return fmt.Errorf("inventory: %w", err)
			case <-time.After(2 * time.Second):
			}
		}
	}
	if !i.cache.WaitForCacheSync(ctx) {
		return nil
	}
	i.markDirty()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("inventory: the caches stopped: %w", err)
		case <-i.dirty:
		}
		if err := i.refresh(ctx); err != nil {
			i.log.Error("kept the old snapshot", "error", err)
			continue
		}
		i.synced.Store(true)
		i.notify()
		select {
		case <-ctx.Done():
		case <-time.After(settle):
		}
	}
}

func (i *Inventory) markDirty() {
	select {
	case i.dirty <- struct{}{}:
	default:
	}
}

func (i *Inventory) notify() {
	i.mu.Lock()
	fs := i.onChange
	i.mu.Unlock()
	for _, f := range fs {
		f()
	}
}

// refresh reads the caches. The lists are not copied: snapshot takes what it needs by value.
func (i *Inventory) refresh(ctx context.Context) error {
	var o objects
	w := &v1alpha1.Workspace{}
	err := i.cache.Get(ctx, client.ObjectKey{Namespace: i.namespace, Name: i.workspace}, w)
	switch {
	case err == nil:
		o.workspace = w
	case !apierrors.IsNotFound(err):
		return err
	}
	var pools v1alpha1.HostPoolList
	var hosts v1alpha1.SessionHostList
	var gateways v1alpha1.GatewayList
	for _, list := range []client.ObjectList{&pools, &hosts, &gateways} {
		if err := i.cache.List(ctx, list, client.InNamespace(i.namespace), client.UnsafeDisableDeepCopy); err != nil {
			return err
		}
	}
	o.pools, o.hosts, o.gateways = pools.Items, hosts.Items, gateways.Items
	i.current.Store(snapshot(o))
	return nil
}
