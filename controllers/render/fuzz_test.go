package render

import (
	"encoding/json"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// Whatever a pool's template says, the pod has one agent, which alone sees the machine's token, and nothing reaches it from
// outside.
func FuzzPodTemplate(f *testing.F) {
	f.Add([]byte(desktopTemplate), false)
	f.Add([]byte(`{"spec":{"containers":[{"name":"desktop","image":"x","ports":[{"hostPort":3389,"containerPort":3389}]}]}}`), true)
	f.Add([]byte(`{"metadata":{"labels":{"rendezvous.dev/sessionhost":"evil"}},"spec":{"hostNetwork":true,"automountServiceAccountToken":true,"containers":[{"name":"desktop"}]}}`), true)
	f.Add([]byte(`{"spec":{"containers":[{"name":"desktop"},{"name":"desktop"}],"volumes":[{"name":"registration"}]},"Spec":{}}`), false)
	f.Add([]byte(`{"spec":{"containers":[{"name":"desktop","volumeMounts":[{"name":"registration","mountPath":"/x"}]}]}}`), false)
	f.Fuzz(func(t *testing.T, raw []byte, accounts bool) {
		p := pool(string(raw))
		if accounts {
			p.Spec.Accounts = &rdv.Accounts{Policy: rdv.AccountsCreate}
		}
		template, err := PodTemplate(p)
		if err != nil || template == nil {
			return
		}
		before, err := json.Marshal(template)
		if err != nil {
			t.Fatal(err)
		}
		host := &rdv.SessionHost{ObjectMeta: metav1.ObjectMeta{Namespace: "desk", Name: "linux-0"}, Spec: rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: p.Name}}}
		pod, err := options.Pod(host, p, template)
		if err != nil {
			t.Fatal(err)
		}
		if after, _ := json.Marshal(template); string(after) != string(before) {
			t.Error("the template itself was changed")
		}
		if pod.Name != host.Name || pod.Namespace != host.Namespace || pod.Labels[rdv.LabelSessionHost] != host.Name || pod.Labels[rdv.LabelManagedBy] != rdv.ManagedBy {
			t.Errorf("the pod is %s/%s with %v", pod.Namespace, pod.Name, pod.Labels)
		}
		if pod.Spec.HostNetwork || pod.Spec.AutomountServiceAccountToken == nil || *pod.Spec.AutomountServiceAccountToken {
			t.Error("the node's network, or the account's token")
		}
		agents := 0
		for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
			if c.Name == agentContainer {
				agents++
				continue
			}
			if slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.HostPort != 0 }) {
				t.Errorf("container %q has a host port", c.Name)
			}
			for _, m := range c.VolumeMounts {
				if m.Name == "agent-state" || m.Name == "registration" {
					t.Errorf("container %q mounts %q", c.Name, m.Name)
				}
			}
		}
		if agents != 1 {
			t.Errorf("%d agents", agents)
		}
		seen := map[string]bool{}
		for _, v := range pod.Spec.Volumes {
			switch v.Name {
			case "rdp-cert", "agent-state", "registration", "agent-ca":
				if seen[v.Name] {
					t.Errorf("two volumes %q", v.Name)
				}
				seen[v.Name] = true
			}
		}
	})
}
