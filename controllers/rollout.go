package controllers

import (
	"context"
	"fmt"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/controllers/plan"
)

const (
	// rolloutPatience is how long a host that doesn't come back holds up the others of its pool.
	rolloutPatience = 2 * time.Minute
	// rolloutRetry is how soon a host asks again for its turn.
	rolloutRetry = 5 * time.Second
)

// rollout paces the replacement of a pool's pods after a change of its template. It is kept in memory: after a restart of
// the operator a few more pods may go at once, which is no harm, for none with a session goes.
type rollout struct {
	mu    sync.Mutex
	going map[types.NamespacedName]map[string]time.Time // by pool, then by host: since when
	full  map[types.NamespacedName]time.Time            // by pool: when it was last seen that no more may go
}

// turn says whether a host's pod may be replaced now, and notes that it is.
func (r *rollout) turn(ctx context.Context, c client.Reader, host *rdv.SessionHost, now time.Time) (bool, error) {
	if !meta.IsStatusConditionTrue(host.Status.Conditions, rdv.ConditionReady) {
		return true, nil // nobody misses it
	}
	pool := types.NamespacedName{Namespace: host.Namespace, Name: host.Spec.HostPoolRef.Name}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, mine := r.going[pool][host.Name]; !mine && now.Sub(r.full[pool]) < rolloutRetry/2 {
		return false, nil // a thousand hosts that wait need not each look at a thousand
	}
	hosts := &rdv.SessionHostList{}
	if err := c.List(ctx, hosts, client.InNamespace(pool.Namespace), client.MatchingFields{indexHostPool: pool.Name}, client.UnsafeDisableDeepCopy); err != nil {
		return false, fmt.Errorf("list SessionHosts: %w", err)
	}
	still := map[string]time.Time{}
	for i := range hosts.Items {
		other := &hosts.Items[i]
		since, ok := r.going[pool][other.Name]
		if !ok || now.Sub(since) > rolloutPatience {
			continue
		}
		ready := meta.FindStatusCondition(other.Status.Conditions, rdv.ConditionReady)
		if ready == nil || ready.Status != "True" || !ready.LastTransitionTime.After(since) {
			still[other.Name] = since
		}
	}
	_, mine := still[host.Name]
	turn := mine || len(still) < plan.ReplaceAtOnce(len(hosts.Items))
	if r.going == nil {
		r.going, r.full = map[types.NamespacedName]map[string]time.Time{}, map[types.NamespacedName]time.Time{}
	}
	delete(r.full, pool)
	switch {
	case !turn:
		r.full[pool] = now
	case !mine:
		still[host.Name] = now
	}
	r.going[pool] = still
	if len(still) == 0 {
		delete(r.going, pool)
	}
	return turn, nil
}
