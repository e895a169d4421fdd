package controllers

import (
	"testing"

	autoscalingv2 "k8s.io/api/autoscaling/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// Statuses are written all the time, and must not have their objects applied anew.
func TestVersionOf(t *testing.T) {
	hpa := func() *autoscalingv2.HorizontalPodAutoscaler {
		return &autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{UID: "u", ResourceVersion: "1"}, Spec: autoscalingv2.HorizontalPodAutoscalerSpec{MaxReplicas: 3}}
	}
	host := func() *rdv.SessionHost {
		return &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{UID: "u", ResourceVersion: "1", Generation: 1}}
	}
	secret := func() *metav1.PartialObjectMetadata {
		return &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{UID: "u", ResourceVersion: "1"}}
	}
	for name, tc := range map[string]struct {
		before, after client.Object
		same          bool
	}{
		"a status, without generations": {hpa(), change(hpa(), func(o *autoscalingv2.HorizontalPodAutoscaler) {
			o.ResourceVersion, o.Status.CurrentReplicas = "2", 2
		}), true},
		"a spec, without generations": {hpa(), change(hpa(), func(o *autoscalingv2.HorizontalPodAutoscaler) {
			o.ResourceVersion, o.Spec.MaxReplicas = "2", 4
		}), false},
		"a status":                  {host(), change(host(), func(o *rdv.SessionHost) { o.ResourceVersion, o.Status.Agent = "2", &rdv.AgentStatus{} }), true},
		"a spec":                    {host(), change(host(), func(o *rdv.SessionHost) { o.ResourceVersion, o.Generation = "2", 2 }), false},
		"a label":                   {host(), change(host(), func(o *rdv.SessionHost) { o.ResourceVersion, o.Labels = "2", map[string]string{"a": "b"} }), false},
		"another of that name":      {host(), change(host(), func(o *rdv.SessionHost) { o.UID = "v" }), false},
		"content that is not known": {secret(), change(secret(), func(o *metav1.PartialObjectMetadata) { o.ResourceVersion = "2" }), false},
	} {
		t.Run(name, func(t *testing.T) {
			if same := versionOf(tc.before) == versionOf(tc.after); same != tc.same {
				t.Errorf("taken for the same: %v", same)
			}
		})
	}
}

func change[T client.Object](obj T, by func(T)) T {
	by(obj)
	return obj
}
