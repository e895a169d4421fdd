package main

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"

	"sigs.k8s.io/controller-runtime/pkg/cache"
)

// readiness is true once the caches have been filled, leader or not.
type readiness struct{ synced atomic.Bool }

// watch waits for the caches in the background, until ctx ends.
func (r *readiness) watch(ctx context.Context, c cache.Cache) {
	go func() { r.synced.Store(c.WaitForCacheSync(ctx)) }()
}

func (r *readiness) check(*http.Request) error {
	if !r.synced.Load() {
		return errors.New("the caches are being filled")
	}
	return nil
}
