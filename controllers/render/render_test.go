package render

import (
	"errors"
	"flag"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

var options = Options{BrokerImage: "broker:v1", GatewayImage: "gateway:v1", RelayImage: "relay:v1", AgentImage: "agent:v1", OperatorNamespace: "rendezvous-system"}

func workspace(change ...func(*rdv.Workspace)) *rdv.Workspace {
	ws := &rdv.Workspace{
		ObjectMeta: metav1.ObjectMeta{Namespace: "desk", Name: "demo"},
		Spec: rdv.WorkspaceSpec{
			DisplayName:  "Demo desktops",
			Hostname:     "broker.example.test",
			Identity:     rdv.Identity{OIDC: rdv.OIDC{IssuerURL: "https://id.example.test", ClientID: "rdv"}},
			Signing:      rdv.Signing{IssuerRef: rdv.IssuerReference{Kind: "ClusterIssuer", Name: "company"}},
			Certificates: rdv.WorkspaceCertificates{IssuerRef: rdv.IssuerReference{Kind: "ClusterIssuer", Name: "company"}},
		},
	}
	for _, c := range change {
		c(ws)
	}
	return ws
}

func gateway(change ...func(*rdv.Gateway)) *rdv.Gateway {
	gw := &rdv.Gateway{
		ObjectMeta: metav1.ObjectMeta{Namespace: "desk", Name: "gateway-a"},
		Spec: rdv.GatewaySpec{
			Region:       "here",
			Hostname:     "gateway-a.example.test",
			Certificates: rdv.GatewayCertificates{IssuerRef: rdv.IssuerReference{Kind: "ClusterIssuer", Name: "company"}},
		},
	}
	for _, c := range change {
		c(gw)
	}
	return gw
}

func pool(template string) *rdv.HostPool {
	p := &rdv.HostPool{
		ObjectMeta: metav1.ObjectMeta{Namespace: "desk", Name: "linux"},
		Spec:       rdv.HostPoolSpec{WorkspaceRef: rdv.LocalReference{Name: "demo"}, Type: rdv.Pooled},
	}
	if template != "" {
		p.Spec.Template = &runtime.RawExtension{Raw: []byte(template)}
	}
	return p
}

func host() *rdv.SessionHost {
	return &rdv.SessionHost{
		ObjectMeta: metav1.ObjectMeta{Namespace: "desk", Name: "linux-0"},
		Spec:       rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "linux"}},
	}
}

const desktopTemplate = `{"metadata":{"labels":{"team":"a"},"annotations":{"note":"x"}},
	"spec":{"containers":[{"name":"desktop","image":"desktop:v1"}],"nodeSelector":{"kubernetes.io/os":"linux"}}}`

// must takes the error away from a builder that can't fail on a valid spec.
func must[T client.Object](t *testing.T) func(T, error) client.Object {
	return func(obj T, err error) client.Object {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return obj
	}
}

// TestGolden compares every object with its file in testdata. After a change that is meant: go test ./controllers/render -update
func TestGolden(t *testing.T) {
	ws := workspace()
	exposed := workspace(func(ws *rdv.Workspace) {
		ws.Spec.Broker.Replicas = new(int32(3))
		ws.Spec.Broker.Image = "mirror.example.test/broker:v1"
		ws.Spec.Broker.Resources = corev1.ResourceRequirements{}
		ws.Spec.Broker.Service = rdv.Service{Type: corev1.ServiceTypeLoadBalancer, Annotations: map[string]string{"dns": "broker.example.test"}, LoadBalancerClass: new("internal")}
		ws.Spec.Broker.Bus = rdv.BusExposure{Hostname: "bus.example.test", Service: rdv.Service{Type: corev1.ServiceTypeNodePort}}
		ws.Spec.Certificates.InternalIssuerRef = &rdv.IssuerReference{Name: "vault"}
		ws.Spec.Signing.CommonName = "Example Corp"
	})
	narrow := workspace(func(ws *rdv.Workspace) {
		ws.Spec.Broker.Network.Egress = &rdv.Egress{Base: rdv.EgressNeeded, Allow: []networkingv1.NetworkPolicyEgressRule{{
			To: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "203.0.113.0/24"}}},
		}}}
		ws.Spec.Broker.Network.MetricsFrom = []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "prometheus"}}}}
	})
	around := Surroundings{
		Cluster:  prefixes("10.244.0.0/16", "10.96.0.0/16", "10.89.0.1/32", "fd00:244::/48"),
		Gateways: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:443")},
	}
	second := workspace(func(ws *rdv.Workspace) { ws.Name = "second" })
	gw := gateway()
	scaled := gateway(func(gw *rdv.Gateway) {
		gw.Spec.Autoscaling = &rdv.Autoscaling{MinReplicas: new(int32(2)), MaxReplicas: 6}
		gw.Spec.Relay.Drain.DeadlineSeconds = new(int32(60))
		gw.Spec.Relay.IdleTimeoutSeconds = new(int32(600))
		gw.Spec.Relay.Limits = rdv.RelayLimits{MaxSessions: new(int32(10)), MaxPending: new(int32(5))}
		gw.Spec.Relay.Image = "mirror.example.test/relay:v1"
		gw.Spec.Service.Type = corev1.ServiceTypeLoadBalancer
	})
	bySessions := gateway(func(gw *rdv.Gateway) {
		gw.Spec.Autoscaling = &rdv.Autoscaling{MaxReplicas: 6, TargetSessionsPerPod: new(int32(2000)), TargetCPUUtilizationPercentage: new(int32(60))}
	})
	// Behind load balancers with everything that a Service can be told.
	balanced := rdv.Service{Type: corev1.ServiceTypeLoadBalancer, Annotations: map[string]string{"service.beta.kubernetes.io/aws-load-balancer-proxy-protocol": "*"},
		LoadBalancerClass: new("service.k8s.aws/nlb"), LoadBalancerSourceRanges: []rdv.Network{"203.0.113.0/24", "2001:db8::/32"},
		ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyLocal, HealthCheckNodePort: new(int32(30999)), NodePorts: []rdv.NodePort{{Name: "https", NodePort: 30443}},
		AllocateLoadBalancerNodePorts: new(true), IPFamilyPolicy: new(corev1.IPFamilyPolicyPreferDualStack), IPFamilies: []corev1.IPFamily{corev1.IPv6Protocol, corev1.IPv4Protocol},
		ProxyProtocol: &rdv.ProxyProtocol{Networks: []rdv.Network{"10.0.0.0/16", "2001:db8:1::/48"}}}
	behind := gateway(func(gw *rdv.Gateway) { gw.Spec.Service = balanced })
	wsBehind := workspace(func(ws *rdv.Workspace) {
		ws.Spec.Broker.Service = balanced
		ws.Spec.Broker.Bus = rdv.BusExposure{Hostname: "bus.example.test", Service: rdv.Service{Type: corev1.ServiceTypeNodePort,
			NodePorts: []rdv.NodePort{{Name: "wss", NodePort: 30444}, {Name: "nats", NodePort: 30422}}, ProxyProtocol: &rdv.ProxyProtocol{Networks: []rdv.Network{"10.0.0.0/16"}}}}
	})
	both := []*rdv.Workspace{ws, second}
	linux := pool(desktopTemplate)
	signedIn := pool(desktopTemplate)
	signedIn.Spec.Accounts = &rdv.Accounts{Policy: rdv.AccountsCreate}
	template, err := PodTemplate(linux)
	if err != nil {
		t.Fatal(err)
	}
	gatewayDeployment := must[*appsv1.Deployment](t)(options.GatewayDeployment(gw, both)).(*appsv1.Deployment)
	registration := Registration{Token: "rdvreg.desk.linux.-.x", Expires: time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC), CA: "ca", Broker: "https://broker.example.test"}

	for file, obj := range map[string]client.Object{
		"workspace-selfsigned-issuer":        InternalSelfSignedIssuer(ws),
		"workspace-internal-ca":              InternalCACertificate(ws),
		"workspace-internal-issuer":          InternalCAIssuer(ws),
		"workspace-feed-certificate":         options.FeedCertificate(ws),
		"workspace-broker-identity":          options.BrokerIdentityCertificate(ws),
		"workspace-broker-identity-exposed":  options.BrokerIdentityCertificate(exposed),
		"workspace-tickets-certificate":      TicketCertificate(ws),
		"workspace-signing-certificate":      SigningCertificate(ws),
		"workspace-operator-identity":        OperatorIdentityCertificate(ws),
		"workspace-sessions-service":         BrokerSessionsService(ws),
		"workspace-signing-certificate-name": SigningCertificate(exposed),
		"workspace-configmap":                must[*corev1.ConfigMap](t)(options.BrokerConfigMap(ws, "")),
		"workspace-configmap-exposed":        must[*corev1.ConfigMap](t)(options.BrokerConfigMap(exposed, "PEM")),
		"workspace-scope":                    BrokerScope(ws, []rdv.HostPool{*linux}),
		"workspace-serviceaccount":           BrokerServiceAccount(ws),
		"workspace-role":                     BrokerRole(ws),
		"workspace-rolebinding":              BrokerRoleBinding(ws),
		"workspace-deployment":               must[*appsv1.Deployment](t)(options.BrokerDeployment(ws)),
		"workspace-deployment-exposed":       must[*appsv1.Deployment](t)(options.BrokerDeployment(exposed)),
		"workspace-configmap-balanced":       must[*corev1.ConfigMap](t)(options.BrokerConfigMap(wsBehind, "")),
		"workspace-service-balanced":         BrokerService(wsBehind),
		"workspace-bus-service-balanced":     BusService(wsBehind),
		"gateway-service-balanced":           GatewayService(behind),
		"gateway-relay-balanced":             must[*corev1.ConfigMap](t)(RelayConfigMap(behind)),
		"workspace-service":                  BrokerService(ws),
		"workspace-service-exposed":          BrokerService(exposed),
		"workspace-bus-service":              BusService(ws),
		"workspace-bus-service-exposed":      BusService(exposed),
		"workspace-peers-service":            BrokerPeersService(ws),
		"workspace-pdb":                      BrokerDisruptionBudget(ws),
		"workspace-networkpolicy":            options.BrokerNetworkPolicy(ws, around),
		"workspace-networkpolicy-needed":     options.BrokerNetworkPolicy(narrow, around),

		"gateway-certificate":        GatewayCertificate(gw),
		"gateway-identity":           GatewayIdentityCertificate(gw, ws),
		"gateway-identity-vault":     GatewayIdentityCertificate(gw, exposed),
		"gateway-relay-configmap":    must[*corev1.ConfigMap](t)(RelayConfigMap(gw)),
		"gateway-relay-limits":       must[*corev1.ConfigMap](t)(RelayConfigMap(scaled)),
		"gateway-configmap":          must[*corev1.ConfigMap](t)(options.GatewayConfigMap(gw, both)),
		"gateway-configmap-none":     must[*corev1.ConfigMap](t)(options.GatewayConfigMap(gw, nil)),
		"gateway-deployment":         gatewayDeployment,
		"gateway-deployment-rolling": RollingGatewayDeployment(gatewayDeployment, "registry.example.test/gateway:before"),
		"gateway-deployment-scaled":  must[*appsv1.Deployment](t)(options.GatewayDeployment(scaled, nil)),
		"gateway-service":            GatewayService(gw),
		"gateway-service-exposed":    GatewayService(scaled),
		"gateway-relays-service":     GatewayRelaysService(gw),
		"gateway-pdb":                GatewayDisruptionBudget(gw),
		"gateway-hpa":                GatewayAutoscaler(scaled),
		"gateway-hpa-sessions":       GatewayAutoscaler(bySessions),
		"gateway-networkpolicy":      GatewayNetworkPolicy(gw, around),

		"hostpool-registration":         PoolRegistrationSecret(linux, registration),
		"hostpool-networkpolicy":        PoolNetworkPolicy(linux, around),
		"hostpool-accounts":             PoolAccounts(signedIn),
		"hostpool-accounts-role":        PoolAccountsRole(signedIn),
		"hostpool-accounts-rolebinding": PoolAccountsRoleBinding(signedIn),
		"sessionhost-pod-accounts":      must[*corev1.Pod](t)(options.Pod(host(), signedIn, template)),
		"hostpool-sessionhost":          SessionHost(linux, "linux-0", false),
		"hostpool-sessionhost-retiring": SessionHost(linux, "linux-0", true),
		"sessionhost-registration":      HostRegistrationSecret(host(), registration),
		"sessionhost-pod":               must[*corev1.Pod](t)(options.Pod(host(), linux, template)),
	} {
		t.Run(file, func(t *testing.T) {
			got, err := yaml.Marshal(obj)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join("testdata", file+".yaml")
			if *update {
				if err := os.WriteFile(path, got, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != string(want) {
				t.Errorf("%s differs; got:\n%s", path, got)
			}
		})
	}
}

// TestSampleTemplates reads the samples' pod templates as the operator does, for the API server takes any.
func TestSampleTemplates(t *testing.T) {
	files, err := filepath.Glob("../../config/samples/production/hostpool_*.yaml")
	if err != nil || len(files) < 2 {
		t.Fatalf("samples are %v, %v", files, err)
	}
	for _, file := range append(files, "../../config/samples/hostpool_linux.yaml") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		pool := &rdv.HostPool{}
		if err := yaml.UnmarshalStrict(text, pool); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if template, err := PodTemplate(pool); err != nil || template == nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}

// TestSeparation holds the walls between the containers of a gateway pod: who mounts what.
func TestSeparation(t *testing.T) {
	d := must[*appsv1.Deployment](t)(options.GatewayDeployment(gateway(), []*rdv.Workspace{workspace()})).(*appsv1.Deployment)
	spec := d.Spec.Template.Spec
	if a := spec.AutomountServiceAccountToken; a == nil || *a {
		t.Error("a gateway pod must hold no Kubernetes credential")
	}
	mounts := func(c corev1.Container) (names []string) {
		for _, m := range c.VolumeMounts {
			names = append(names, m.Name)
		}
		return names
	}
	relay, gateway := spec.InitContainers[0], spec.Containers[0]
	if slices.Contains(mounts(relay), "workspaces") {
		t.Error("the relay must hold no bus credential")
	}
	if slices.Contains(mounts(gateway), "tls") {
		t.Error("the gateway container must not hold the listener's key")
	}
	for _, v := range spec.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, source := range v.Projected.Sources {
			for _, item := range source.Secret.Items {
				if source.Secret.Name == WorkspaceTickets("demo") && item.Key != corev1.TLSCertKey {
					t.Errorf("a gateway pod mounts %s of the ticket signer; only its certificate is allowed", item.Key)
				}
			}
		}
	}
}

func TestPodTemplate(t *testing.T) {
	for name, tc := range map[string]struct{ template, err string }{
		"good":             {desktopTemplate, ""},
		"no template":      {"", ""},
		"typo":             {`{"spec":{"containers":[{"name":"desktop","imgae":"x"}]}}`, `unknown field "spec.containers[0].imgae"`},
		"wrong type":       {`{"spec":{"containers":"desktop"}}`, "spec.template: "},
		"no desktop":       {`{"spec":{"containers":[{"name":"main"}]}}`, `none is named "desktop"`},
		"host network":     {`{"spec":{"hostNetwork":true,"containers":[{"name":"desktop"}]}}`, "hostNetwork: must not be true"},
		"host processes":   {`{"spec":{"hostPID":true,"containers":[{"name":"desktop"}]}}`, "hostPID: must not be true, for desktops would reach the node's processes"},
		"host ipc":         {`{"spec":{"hostIPC":true,"containers":[{"name":"desktop"}]}}`, "hostIPC: must not be true"},
		"shared processes": {`{"spec":{"shareProcessNamespace":true,"containers":[{"name":"desktop"}]}}`, "shareProcessNamespace: must not be true, for a desktop would reach the agent's process and its key"},
		"restart policy":   {`{"spec":{"restartPolicy":"Never","containers":[{"name":"desktop"}]}}`, "restartPolicy: is Never, and a session host's is always Always"},
		"token":            {`{"spec":{"automountServiceAccountToken":true,"containers":[{"name":"desktop"}]}}`, "automountServiceAccountToken: must not be true"},
		"agent's mount":    {`{"spec":{"containers":[{"name":"desktop","volumeMounts":[{"name":"agent-state","mountPath":"/x"}]}]}}`, `container "desktop" mounts "agent-state", a volume of the agent's`},
		"all at once":      {`{"spec":{"hostPID":true,"shareProcessNamespace":true,"containers":[{"name":"main"}]}}`, `spec.template.spec.containers: none is named "desktop"; name the one that runs the RDP server so; spec.template.spec.hostPID: must`},
		"host port":        {`{"spec":{"containers":[{"name":"desktop","ports":[{"containerPort":3389,"hostPort":3389}]}]}}`, `asks for hostPort 3389`},
		"agent's name":     {`{"spec":{"containers":[{"name":"desktop"},{"name":"agent"}]}}`, `is named "agent"`},
		"agent's volume":   {`{"spec":{"containers":[{"name":"desktop"}],"volumes":[{"name":"registration"}]}}`, `"registration" is the name of a volume`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := PodTemplate(pool(tc.template))
			switch {
			case tc.err == "" && err != nil:
				t.Errorf("got %v, want none", err)
			case tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)):
				t.Errorf("got %v, want one with %q", err, tc.err)
			}
		})
	}
}

func TestTemplateReferences(t *testing.T) {
	template, err := PodTemplate(pool(`{"metadata":{"name":"a","namespace":"b","labels":{"team":"x","rendezvous.dev/hostpool":"other"}},
		"spec":{"initContainers":[{"name":"prepare","envFrom":[{"secretRef":{"name":"two"}}]}],
		"containers":[{"name":"desktop","env":[{"name":"KEY","valueFrom":{"secretKeyRef":{"name":"three","key":"k"}}}]}],
		"volumes":[{"name":"v","secret":{"secretName":"one"}},{"name":"p","projected":{"sources":[{"secret":{"name":"four"}}]}},
			{"name":"home","persistentVolumeClaim":{"claimName":"homes"}}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"one": "spec.template.spec.volumes[v].secret", "two": `spec.template.spec: container "prepare", envFrom`,
		"three": `spec.template.spec: container "desktop", env KEY`, "four": "spec.template.spec.volumes[p].projected",
	}
	if got := TemplateSecrets(template); !maps.Equal(got, want) {
		t.Errorf("secrets %q, want %q", got, want)
	}
	if got := TemplateClaims(template); !maps.Equal(got, map[string]string{"homes": "home"}) {
		t.Errorf("claims %q", got)
	}
	if got := TemplateOverrides(template); !slices.Equal(got, []string{"metadata.labels[rendezvous.dev/hostpool]", "metadata.name", "metadata.namespace"}) {
		t.Errorf("overridden: %q", got)
	}
}

// What people set for pods of ours reaches them, and takes nothing from what the operator needs.
func TestPodSettings(t *testing.T) {
	settings := rdv.PodSettings{
		Labels: map[string]string{"team": "a"}, Annotations: map[string]string{"mesh": "off"}, NodeSelector: map[string]string{"zone": "x"},
		Tolerations: []corev1.Toleration{{Key: "edge", Operator: corev1.TolerationOpExists}}, PriorityClassName: "high",
		Affinity:                  &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{}},
		TopologySpreadConstraints: []corev1.TopologySpreadConstraint{{MaxSkew: 2, TopologyKey: "rack", WhenUnsatisfiable: corev1.DoNotSchedule}},
		ImagePullSecrets:          []rdv.LocalSecret{{Name: "registry"}}, Env: []rdv.EnvValue{{Name: "GOMEMLIMIT", Value: "200MiB"}},
	}
	plainBroker, err1 := options.BrokerDeployment(workspace())
	plainGateway, err2 := options.GatewayDeployment(gateway(), nil)
	broker, err3 := options.BrokerDeployment(workspace(func(ws *rdv.Workspace) { ws.Spec.Broker.Pod = settings }))
	gw, err4 := options.GatewayDeployment(gateway(func(gw *rdv.Gateway) { gw.Spec.Pod = settings }), nil)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	for _, pair := range [][2]*appsv1.Deployment{{broker, plainBroker}, {gw, plainGateway}} {
		d, plain := pair[0], pair[1]
		template, spec := d.Spec.Template, d.Spec.Template.Spec
		for k, v := range plain.Spec.Template.Labels {
			if template.Labels[k] != v {
				t.Errorf("%s: label %s is %q", d.Name, k, template.Labels[k])
			}
		}
		for k, v := range plain.Spec.Template.Annotations {
			if template.Annotations[k] != v {
				t.Errorf("%s: annotation %s is %q", d.Name, k, template.Annotations[k])
			}
		}
		spread := spec.TopologySpreadConstraints
		if template.Labels["team"] != "a" || template.Annotations["mesh"] != "off" || spec.NodeSelector["zone"] != "x" || len(spec.Tolerations) != 1 ||
			spec.Affinity == nil || spec.PriorityClassName != "high" || spec.ImagePullSecrets[0].Name != "registry" ||
			len(spread) != 1 || spread[0].TopologyKey != "rack" || !maps.Equal(spread[0].LabelSelector.MatchLabels, d.Spec.Selector.MatchLabels) {
			t.Errorf("%s: %+v", d.Name, template)
		}
		for _, c := range allContainers(&spec) {
			if !slices.Contains(c.Env, corev1.EnvVar{Name: "GOMEMLIMIT", Value: "200MiB"}) || c.Env[0].Name != "POD_NAME" {
				t.Errorf("%s: env of %s is %+v", d.Name, c.Name, c.Env)
			}
		}
	}
	if gw.Annotations[AnnotationPodHash] == plainGateway.Annotations[AnnotationPodHash] {
		t.Error("another placement does not ask for other pods")
	}
}

// TestPodOwnWishes shows that what a template says of the pod is kept, but for what would open it.
func TestPodOwnWishes(t *testing.T) {
	p := pool(`{"spec":{"automountServiceAccountToken":false,"restartPolicy":"Always","hostname":"pc","securityContext":{"fsGroup":5},
		"initContainers":[{"name":"prepare"}],"containers":[{"name":"desktop"},{"name":"helper"}]}}`)
	template, err := PodTemplate(p)
	if err != nil {
		t.Fatal(err)
	}
	pod, err := options.Pod(host(), p, template)
	if err != nil {
		t.Fatal(err)
	}
	if *pod.Spec.AutomountServiceAccountToken || pod.Spec.RestartPolicy != corev1.RestartPolicyAlways {
		t.Error("the pod must have no service account token, and restart")
	}
	if pod.Spec.Hostname != "pc" || *pod.Spec.SecurityContext.FSGroup != 5 {
		t.Errorf("the template's hostname and fsGroup are lost: %q, %d", pod.Spec.Hostname, *pod.Spec.SecurityContext.FSGroup)
	}
	if got := []string{pod.Spec.InitContainers[0].Name, pod.Spec.InitContainers[1].Name}; !slices.Equal(got, []string{"prepare", "agent"}) {
		t.Errorf("init containers are %v", got)
	}
	if len(pod.Spec.Containers[0].VolumeMounts) != 1 || len(pod.Spec.Containers[1].VolumeMounts) != 0 {
		t.Error("the desktop container, and no other, has the RDP certificate")
	}
	again, _ := options.Pod(host(), p, template)
	if again.Annotations[AnnotationPodHash] != pod.Annotations[AnnotationPodHash] {
		t.Error("the same template gives another hash")
	}
	newer := options
	newer.AgentImage = "agent:v2"
	other, _ := newer.Pod(host(), p, template)
	if other.Annotations[AnnotationPodHash] == pod.Annotations[AnnotationPodHash] {
		t.Error("another agent gives the same hash")
	}
}

func TestSigningNameFits(t *testing.T) {
	ws := workspace(func(ws *rdv.Workspace) { ws.Spec.DisplayName = strings.Repeat("ü", 100) })
	if name := SigningCertificate(ws).Spec.CommonName; name != strings.Repeat("ü", 32) {
		t.Errorf("got %d bytes: %q", len(name), name)
	}
}

func TestCommonName(t *testing.T) {
	for length, want := range map[int]bool{1: true, 64: true, 65: false, 253: false} {
		host := strings.Repeat("x", length)
		if got := commonName(host); (got == host) != want || !want && got != "" {
			t.Errorf("%d characters: %q", length, got)
		}
	}
}

// TestCallers says when clients' addresses tell them apart.
func TestCallers(t *testing.T) {
	networks := &rdv.ProxyProtocol{Networks: []rdv.Network{"10.0.0.0/16"}}
	const cluster, local = corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal
	for name, c := range map[string]struct {
		service rdv.Service
		hidden  bool
	}{
		"nothing said":                           {rdv.Service{}, false},
		"inside the cluster":                     {rdv.Service{Type: corev1.ServiceTypeClusterIP}, false},
		"node ports":                             {rdv.Service{Type: corev1.ServiceTypeNodePort}, true},
		"a load balancer":                        {rdv.Service{Type: corev1.ServiceTypeLoadBalancer, ExternalTrafficPolicy: cluster}, true},
		"a load balancer, local":                 {rdv.Service{Type: corev1.ServiceTypeLoadBalancer, ExternalTrafficPolicy: local}, false},
		"node ports, local":                      {rdv.Service{Type: corev1.ServiceTypeNodePort, ExternalTrafficPolicy: local}, false},
		"a load balancer that says who it is":    {rdv.Service{Type: corev1.ServiceTypeLoadBalancer, ProxyProtocol: networks}, false},
		"one of our own, before node ports":      {rdv.Service{Type: corev1.ServiceTypeNodePort, ProxyProtocol: networks}, false},
		"one in the cluster that says who it is": {rdv.Service{ProxyProtocol: networks}, false},
	} {
		t.Run(name, func(t *testing.T) {
			got := callers(c.service)
			if got.AddressesHidden != c.hidden || (got.ProxyNetworks == nil) != (c.service.ProxyProtocol == nil) {
				t.Errorf("got %+v", got)
			}
		})
	}
}
