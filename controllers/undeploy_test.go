package controllers

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	corev1 "k8s.io/api/core/v1"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

// What `make deploy` and `make undeploy` do to a cluster: people's objects stay unless told otherwise.
func TestUndeployKeepsObjects(t *testing.T) {
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		if os.Getenv("RDV_REQUIRE_ENVTEST") != "" {
			t.Fatal("KUBEBUILDER_ASSETS is not set: make unit sets it")
		}
		t.Skip("KUBEBUILDER_ASSETS is not set: make unit sets it")
	}
	env := &envtest.Environment{}
	config, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = env.Stop() })
	user, err := env.AddUser(envtest.User{Name: "admin", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := user.KubeConfig()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, kubeconfig, 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "../hack/deploy.sh", args...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+file, "PATH="+assets+":"+os.Getenv("PATH"), "DRAIN_LOOK_SECONDS=0.2")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	must := func(words string, args ...string) {
		t.Helper()
		if out, err := run(args...); err != nil || !strings.Contains(out, words) {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	c, err := client.New(config, client.Options{Scheme: NewScheme()})
	if err != nil {
		t.Fatal(err)
	}
	must("context envtest, server https://127.0.0.1:", "deploy")
	go func() { // the namespace controller's part
		for t.Context().Err() == nil {
			ns := &corev1.Namespace{}
			if c.Get(t.Context(), client.ObjectKey{Name: "rendezvous-system"}, ns) == nil && !ns.DeletionTimestamp.IsZero() {
				ns.Spec.Finalizers = nil
				_ = c.SubResource("finalize").Update(t.Context(), ns)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}()
	host := machineIn("default", "pc")
	host.Finalizers = []string{rdv.Finalizer} // the operator would set it
	eventually(t, func() error { return client.IgnoreAlreadyExists(c.Create(t.Context(), host)) })

	must("keeps the CRDs and 1 objects with their pods, in context ", "undeploy")
	if err := c.Get(t.Context(), client.ObjectKeyFromObject(host), host); err != nil {
		t.Errorf("people's objects: %v", err)
	}
	// Without an operator nothing would ever let the object go: it says so rather than to hang.
	if out, err := run("undeploy", "--purge"); err == nil || !strings.Contains(out, "There is no operator that would let them go: make deploy, and try again.") {
		t.Errorf("a purge without the operator: %v\n%s", err, out)
	}
	must("context envtest, server https://127.0.0.1:", "deploy")
	go func() { // the operator's part
		for range 100 {
			time.Sleep(200 * time.Millisecond)
			seen := &rdv.SessionHost{}
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(host), seen); err != nil {
				return
			}
			if !seen.DeletionTimestamp.IsZero() {
				seen.Finalizers = nil
				_ = c.Update(t.Context(), seen)
			}
		}
	}()
	must("SessionHost default/pc", "undeploy", "--purge")
	if err := c.List(t.Context(), &rdv.SessionHostList{}); err == nil {
		t.Error("the CRDs are still there")
	}
}
