package fleet

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/stage"
)

// step is something that happens to the fleet while it works.
type step struct {
	name string
	do   func(*fleet, context.Context) error
}

// steps are all of them, in their order.
var steps = []step{
	{"relay image", func(f *fleet, ctx context.Context) error {
		return f.rollGateways(ctx, func(gw *rdv.Gateway) { gw.Spec.Relay.Image = f.images["relay"] })
	}},
	{"gateway image", func(f *fleet, ctx context.Context) error { return f.gatewayImage(ctx) }},
	{"one gateway pod more", func(f *fleet, ctx context.Context) error {
		return f.rollGateways(ctx, func(gw *rdv.Gateway) { gw.Spec.Replicas = new(int32(f.o.Gateways + 1)) })
	}},
	{"one gateway pod fewer than at first", func(f *fleet, ctx context.Context) error {
		return f.rollGateways(ctx, func(gw *rdv.Gateway) { gw.Spec.Replicas = new(int32(f.o.Gateways - 1)) })
	}},
	{"kill -9 of every gateway container", (*fleet).killGatewayContainers},
	{"broker image", (*fleet).rollBrokers},
	{"kill -9 of a broker", (*fleet).killBroker},
	{"certificates renewed", (*fleet).renewCertificates},
	{"agents' certificates renewed", (*fleet).renewAgents},
	{"operator replaced", (*fleet).replaceOperator},
	{"workspace, pool and gateway edited", (*fleet).edit},
	{"a host drained, its agent replaced", (*fleet).replaceAgent},
}

// StepNames are the names of all steps.
func StepNames() (names []string) {
	for _, s := range steps {
		names = append(names, s.name)
	}
	return names
}

// stepLimit bounds one step.
const stepLimit = 3 * time.Minute

// pods are those with a label that nobody has told to go.
func (f *fleet) pods(ctx context.Context, label, value string) (all []corev1.Pod, going int, err error) {
	var list corev1.PodList
	match := client.MatchingLabels{label: value}
	if label == rdv.LabelWorkspace {
		match[rdv.LabelComponent] = "broker"
	}
	if err := f.Client.List(ctx, &list, client.InNamespace(Namespace), match); err != nil {
		return nil, 0, err
	}
	for _, p := range list.Items {
		if p.DeletionTimestamp.IsZero() {
			all = append(all, p)
		} else {
			going++
		}
	}
	return all, going, nil
}

func isReady(p corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// settled waits until there are n pods that are ready, none of them among gone.
func (f *fleet) settled(ctx context.Context, label, value string, n int, gone map[types.UID]bool) error {
	return eventually(ctx, func() error {
		now, _, err := f.pods(ctx, label, value)
		if err != nil {
			return err
		}
		ready := 0
		for _, p := range now {
			if isReady(p) && !gone[p.UID] {
				ready++
			}
		}
		if ready != n || len(now) != n {
			return fmt.Errorf("%d of %d pods of %s are the new ones and ready, want %d", ready, len(now), value, n)
		}
		return nil
	})
}

func uids(pods []corev1.Pod) map[types.UID]bool {
	all := map[types.UID]bool{}
	for _, p := range pods {
		all[p.UID] = true
	}
	return all
}

// change edits an object, trying again where somebody else was faster.
func change[T client.Object](ctx context.Context, f *fleet, obj T, do func(T)) error {
	return eventually(ctx, func() error {
		if err := f.Client.Get(ctx, client.ObjectKeyFromObject(obj), obj); err != nil {
			return err
		}
		do(obj)
		return f.Client.Update(ctx, obj)
	})
}

// rollGateways edits the Gateway, and waits for its pods: as many as it wants, new ones where the pod changed.
func (f *fleet) rollGateways(ctx context.Context, do func(*rdv.Gateway)) error {
	before, _, err := f.pods(ctx, rdv.LabelGateway, gatewayName)
	if err != nil {
		return err
	}
	gw := &rdv.Gateway{ObjectMeta: meta(gatewayName)}
	replicas := int32(0)
	if err := change(ctx, f, gw, func(gw *rdv.Gateway) {
		replicas = *gw.Spec.Replicas
		do(gw)
	}); err != nil {
		return err
	}
	gone := uids(before)
	if *gw.Spec.Replicas != replicas {
		gone = nil
	}
	return f.settled(ctx, rdv.LabelGateway, gatewayName, int(*gw.Spec.Replicas), gone)
}

// gatewayImage gives the gateway container another image, and waits until every pod runs it.
func (f *fleet) gatewayImage(ctx context.Context) error {
	gw := &rdv.Gateway{ObjectMeta: meta(gatewayName)}
	if err := change(ctx, f, gw, func(gw *rdv.Gateway) { gw.Spec.Admission.Image = f.images["gateway"] }); err != nil {
		return err
	}
	return eventually(ctx, func() error {
		pods, _, err := f.pods(ctx, rdv.LabelGateway, gatewayName)
		if err != nil {
			return err
		}
		if len(pods) != int(*gw.Spec.Replicas) {
			return fmt.Errorf("%d gateway pods, want %d", len(pods), *gw.Spec.Replicas)
		}
		for _, p := range pods {
			for _, c := range p.Status.ContainerStatuses {
				if c.Name == "gateway" && (!c.Ready || !strings.HasSuffix(c.Image, f.images["gateway"])) {
					return fmt.Errorf("pod %s: container gateway runs %s, ready=%t", p.Name, c.Image, c.Ready)
				}
			}
			if !isReady(p) {
				return fmt.Errorf("pod %s is not ready", p.Name)
			}
		}
		return nil
	})
}

// kill kills processes of a program in the fleet's pods, n at most, and waits until their containers are ready again.
func (f *fleet) kill(ctx context.Context, program string, n int, label, value, container string) error {
	restarts := func() (sum int32, err error) {
		pods, _, err := f.pods(ctx, label, value)
		for _, p := range pods {
			for _, c := range slices.Concat(p.Status.ContainerStatuses, p.Status.InitContainerStatuses) {
				if c.Name == container && c.Ready {
					sum += c.RestartCount
				} else if c.Name == container {
					return 0, fmt.Errorf("container %s of pod %s is not ready", container, p.Name)
				}
			}
		}
		return sum, err
	}
	before, err := restarts()
	if err != nil {
		return err
	}
	pods, _, err := f.pods(ctx, label, value)
	if err != nil {
		return err
	}
	pids := processes(program, pods)
	if len(pids) == 0 {
		return fmt.Errorf("no process runs %s in %s", program, Namespace)
	}
	pids = pids[:min(n, len(pids))]
	want := before + int32(len(pids))
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	}
	return eventually(ctx, func() error {
		now, err := restarts()
		if err == nil && now < want {
			err = fmt.Errorf("container %s was restarted %d times, want %d", container, now-before, want-before)
		}
		return err
	})
}

// processes are those of pods whose program is path.
func processes(path string, pods []corev1.Pod) (pids []int) {
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, l := range links {
		target, err := os.Readlink(l)
		if err != nil || strings.TrimSuffix(target, " (deleted)") != path {
			continue
		}
		environ, _ := os.ReadFile(filepath.Join(filepath.Dir(l), "environ"))
		if !slices.ContainsFunc(pods, func(p corev1.Pod) bool { return strings.Contains(string(environ), "POD_NAME="+p.Name+"\x00") }) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(l))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (f *fleet) killGatewayContainers(ctx context.Context) error {
	return f.kill(ctx, "/gateway", 1<<10, rdv.LabelGateway, gatewayName, "gateway")
}

func (f *fleet) killBroker(ctx context.Context) error {
	if err := f.kill(ctx, "/broker", 1, rdv.LabelWorkspace, workspaceName, "broker"); err != nil {
		return err
	}
	return f.hostsReady(ctx)
}

func (f *fleet) rollBrokers(ctx context.Context) error {
	before, _, err := f.pods(ctx, rdv.LabelWorkspace, workspaceName)
	if err != nil {
		return err
	}
	ws := &rdv.Workspace{ObjectMeta: meta(workspaceName)}
	if err := change(ctx, f, ws, func(ws *rdv.Workspace) { ws.Spec.Broker.Image = f.images["broker"] }); err != nil {
		return err
	}
	if err := f.settled(ctx, rdv.LabelWorkspace, workspaceName, f.o.Brokers, uids(before)); err != nil {
		return err
	}
	return f.hostsReady(ctx)
}

// renewCertificates has cert-manager renew every certificate of the fleet, as `cmctl renew` does, and waits until the
// gateway shows its new one.
func (f *fleet) renewCertificates(ctx context.Context) error {
	serial := func() (string, error) {
		raw, err := f.dial(ctx, "tcp", net.JoinHostPort(gatewayHost, "443"))
		if err != nil {
			return "", err
		}
		conn := tls.Client(raw, &tls.Config{RootCAs: f.roots, ServerName: gatewayHost})
		defer conn.Close()
		if err := conn.HandshakeContext(ctx); err != nil {
			return "", err
		}
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String(), nil
	}
	old, err := serial()
	if err != nil {
		return err
	}
	type certificates struct {
		Items []struct {
			Metadata struct {
				Name       string
				Generation int64
			}
			Status struct{ Revision int }
		}
	}
	list := func() (all certificates, err error) {
		out, err := f.Kubectl(ctx, "", "-n", Namespace, "get", "certificates", "-o", "json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &all)
		}
		return all, err
	}
	before, err := list()
	if err != nil {
		return err
	}
	for _, c := range before.Items {
		patch, err := json.Marshal([]map[string]any{{"op": "add", "path": "/status/conditions/-", "value": map[string]any{
			"type": "Issuing", "status": "True", "reason": "ManuallyTriggered", "message": "the fleet run renews it",
			"lastTransitionTime": time.Now().UTC().Format(time.RFC3339), "observedGeneration": c.Metadata.Generation,
		}}})
		if err != nil {
			return err
		}
		if _, err := f.Kubectl(ctx, "", "-n", Namespace, "patch", "certificate", c.Metadata.Name, "--subresource=status", "--type=json", "-p", string(patch)); err != nil {
			return err
		}
	}
	if err := eventually(ctx, func() error {
		now, err := list()
		if err != nil {
			return err
		}
		for i, c := range now.Items {
			if c.Status.Revision <= before.Items[i].Status.Revision {
				return fmt.Errorf("certificate %s is still revision %d", c.Metadata.Name, c.Status.Revision)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return eventually(ctx, func() error {
		for range 2 * f.o.Gateways { // any of the pods may answer
			now, err := serial()
			if err != nil || now == old {
				return fmt.Errorf("the gateway still shows the old certificate, or none: %v", err)
			}
		}
		return nil
	})
}

// renewAgents has every agent renew its identity and its RDP certificate.
func (f *fleet) renewAgents(ctx context.Context) error {
	had := map[string]string{}
	for _, h := range f.hosts {
		had[h.name] = h.serial()
		if err := h.agent.Process.Signal(syscall.SIGHUP); err != nil {
			return err
		}
	}
	if err := eventually(ctx, func() error {
		for _, h := range f.hosts {
			if s := h.serial(); s == "" || s == had[h.name] {
				return fmt.Errorf("host %s has no new RDP certificate", h.name)
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return f.hostsReady(ctx)
}

// serial is the number of the RDP certificate that is installed, empty where there is none.
func (h *host) serial() string {
	cert, err := h.certificate(nil)
	if err != nil || cert.Leaf == nil {
		return ""
	}
	return cert.Leaf.SerialNumber.String()
}

func (f *fleet) replaceOperator(ctx context.Context) error {
	for _, args := range [][]string{{"restart"}, {"status", "--timeout=120s"}} {
		if _, err := f.Kubectl(ctx, "", append([]string{"-n", stage.OperatorNamespace, "rollout", args[0], "deployment/rendezvous-manager"}, args[1:]...)...); err != nil {
			return err
		}
	}
	// The new one works: it sees an edit.
	ws := &rdv.Workspace{ObjectMeta: meta(workspaceName)}
	if err := change(ctx, f, ws, func(ws *rdv.Workspace) { ws.Spec.DisplayName = "Fleet, after the operator" }); err != nil {
		return err
	}
	return f.ready(ctx, ws)
}

// edit changes what people change: names, grants, limits, a drain.
func (f *fleet) edit(ctx context.Context) error {
	ws, pool, gw := &rdv.Workspace{ObjectMeta: meta(workspaceName)}, &rdv.HostPool{ObjectMeta: meta(poolName)}, &rdv.Gateway{ObjectMeta: meta(gatewayName)}
	drained := &rdv.SessionHost{ObjectMeta: meta(f.hosts[0].name)}
	if err := errors.Join(
		change(ctx, f, ws, func(ws *rdv.Workspace) {
			more := ws.Spec.Resources[0]
			more.Name, more.DisplayName = "desk-two", "Another name for it"
			ws.Spec.DisplayName, ws.Spec.Resources = "Fleet, edited", append(ws.Spec.Resources, more)
		}),
		change(ctx, f, pool, func(p *rdv.HostPool) { *p.Spec.MaxSessionsPerHost++ }),
		change(ctx, f, gw, func(gw *rdv.Gateway) { gw.Spec.Relay.IdleTimeoutSeconds = new(int32(3600)) }),
		change(ctx, f, drained, func(h *rdv.SessionHost) { h.Spec.Drain = &rdv.Drain{Mode: rdv.DrainNoNewSessions, Reason: "fleet run"} }),
	); err != nil {
		return err
	}
	if err := eventually(ctx, func() error {
		err := f.Client.Get(ctx, client.ObjectKeyFromObject(drained), drained)
		if err == nil && (drained.Status.Agent == nil || !drained.Status.Agent.DrainAcknowledged) {
			err = fmt.Errorf("the agent of %s has not confirmed the drain", drained.Name)
		}
		return err
	}); err != nil {
		return err
	}
	if err := change(ctx, f, drained, func(h *rdv.SessionHost) { h.Spec.Drain = nil }); err != nil {
		return err
	}
	return errors.Join(f.ready(ctx, ws), f.ready(ctx, pool), f.ready(ctx, gw), f.hostsReady(ctx))
}

// replaceAgent tells a host's agent to stop, which it does when its users have left, and starts the next. Their
// sessions are the ones that are ended here.
func (f *fleet) replaceAgent(ctx context.Context) error {
	h := f.hosts[len(f.hosts)-1]
	if err := h.agent.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	// It carries its sessions on.
	if err := pause(ctx, 5*time.Second); err != nil {
		return err
	}
	if err := f.replace(ctx, f.release(1<<10, func(s *session) bool { return s.host == h.name })); err != nil {
		return err
	}
	select {
	case <-h.ended:
	case <-ctx.Done():
		return fmt.Errorf("the agent of %s does not stop, though its last session ended: %w", h.name, ctx.Err())
	}
	if err := h.start(f.exec); err != nil {
		return err
	}
	return f.hostsReady(ctx)
}

// ready waits until an object's status speaks of its spec and says Ready.
func (f *fleet) ready(ctx context.Context, obj client.Object) error {
	return eventually(ctx, func() error {
		if err := f.Client.Get(ctx, client.ObjectKeyFromObject(obj), obj); err != nil {
			return err
		}
		var c []metav1.Condition
		switch o := obj.(type) {
		case *rdv.Workspace:
			c = o.Status.Conditions
		case *rdv.HostPool:
			c = o.Status.Conditions
		case *rdv.Gateway:
			c = o.Status.Conditions
		case *rdv.SessionHost:
			c = o.Status.Conditions
		}
		is := apimeta.FindStatusCondition(c, rdv.ConditionReady)
		if is == nil || is.Status != "True" || is.ObservedGeneration != obj.GetGeneration() {
			return fmt.Errorf("%T %s is not ready: %+v", obj, obj.GetName(), is)
		}
		return nil
	})
}

// hostsReady waits until every host takes sessions.
func (f *fleet) hostsReady(ctx context.Context) error {
	return eventually(ctx, func() error {
		var list rdv.SessionHostList
		if err := f.Client.List(ctx, &list, client.InNamespace(Namespace)); err != nil {
			return err
		}
		n := 0
		why := ""
		for _, h := range list.Items {
			if apimeta.IsStatusConditionTrue(h.Status.Conditions, rdv.ConditionReady) {
				n++
			} else if c := apimeta.FindStatusCondition(h.Status.Conditions, rdv.ConditionReady); c != nil {
				why = h.Name + ": " + c.Message
			}
		}
		if n != len(f.hosts) {
			return fmt.Errorf("%d of %d session hosts are ready; %s", n, len(f.hosts), why)
		}
		return nil
	})
}

// eventually tries until it succeeds or ctx ends.
func eventually(ctx context.Context, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}
		if cause := pause(ctx, 250*time.Millisecond); cause != nil {
			return fmt.Errorf("%w; last: %w", cause, err)
		}
	}
}
