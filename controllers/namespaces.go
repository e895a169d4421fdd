package controllers

import (
	"context"
	"fmt"
	"slices"
	"strings"

	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/controller-runtime/pkg/client"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
)

// Namespaces reads a list of namespaces with commas between them. An empty one gives none, which stands for all.
func Namespaces(list string) (names []string, err error) {
	for name := range strings.SplitSeq(list, ",") {
		name = strings.TrimSpace(name)
		if name == "" {
			continue
		}
		if faults := validation.IsDNS1123Label(name); len(faults) > 0 {
			return nil, fmt.Errorf("%q is no name of a namespace: %s", name, strings.Join(faults, "; "))
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// MayNotReadClusterIssuers asks the API server whether the operator may watch ClusterIssuers, which no Role can grant.
func MayNotReadClusterIssuers(ctx context.Context, c client.Client) (bool, error) {
	for _, verb := range []string{"list", "watch", "get"} {
		review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
			ResourceAttributes: &authorizationv1.ResourceAttributes{Group: certmanager.SchemeGroupVersion.Group, Resource: "clusterissuers", Verb: verb},
		}}
		if err := c.Create(ctx, review); err != nil {
			return false, fmt.Errorf("ask what the operator may read: %w", err)
		}
		if !review.Status.Allowed {
			return true, nil
		}
	}
	return false, nil
}
