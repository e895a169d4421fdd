// Package v1alpha1 is the API of Rendezvous, group rendezvous.dev: what people declare (Workspace, HostPool,
// SessionHost, Gateway) and what the operator answers in their status. Defaults are applied by the operator's pure
// builders, not by the API server, so that an object shows what its author meant and nothing else.
// +kubebuilder:object:generate=true
// +groupName=rendezvous.dev
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is the group and version of everything in this package.
var GroupVersion = schema.GroupVersion{Group: "rendezvous.dev", Version: "v1alpha1"}

// AddToScheme registers the four kinds.
func AddToScheme(s *runtime.Scheme) error { return schemeBuilder.AddToScheme(s) }

var schemeBuilder = runtime.NewSchemeBuilder(func(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion,
		&Workspace{}, &WorkspaceList{},
		&HostPool{}, &HostPoolList{},
		&SessionHost{}, &SessionHostList{},
		&Gateway{}, &GatewayList{},
	)
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
})
