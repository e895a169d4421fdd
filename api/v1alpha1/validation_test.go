package v1alpha1_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/lint"
)

const namespace = "default"

// apiServer starts a kube-apiserver with our CRDs.
func apiServer(t *testing.T) client.Client {
	t.Helper()
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		if os.Getenv("RDV_REQUIRE_ENVTEST") != "" {
			t.Fatal("KUBEBUILDER_ASSETS is not set: make unit sets it")
		}
		t.Skip("KUBEBUILDER_ASSETS is not set: make unit sets it")
	}
	env := &envtest.Environment{CRDDirectoryPaths: []string{"../../config/crd/bases"}, ErrorIfCRDPathMissing: true}
	config, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := env.Stop(); err != nil {
			t.Error(err)
		}
	})
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{rdv.AddToScheme, corev1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	c, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func workspace() *rdv.Workspace {
	return &rdv.Workspace{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "ws"},
		Spec: rdv.WorkspaceSpec{
			Hostname:     "desk.example.test",
			Identity:     rdv.Identity{OIDC: rdv.OIDC{IssuerURL: "https://id.example.test/dex", ClientID: "rdv"}},
			Signing:      rdv.Signing{IssuerRef: rdv.IssuerReference{Name: "ca"}},
			Certificates: rdv.WorkspaceCertificates{IssuerRef: rdv.IssuerReference{Name: "ca"}},
		},
	}
}

func pool() *rdv.HostPool {
	return &rdv.HostPool{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "hp"},
		Spec:       rdv.HostPoolSpec{WorkspaceRef: rdv.LocalReference{Name: "ws"}, Type: rdv.Pooled},
	}
}

func claim(name string) rdv.VolumeClaimTemplate {
	return rdv.VolumeClaimTemplate{
		Metadata: rdv.ClaimMetadata{Name: name},
		Spec:     corev1.PersistentVolumeClaimSpec{AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}},
	}
}

func host() *rdv.SessionHost {
	return &rdv.SessionHost{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "sh"},
		Spec:       rdv.SessionHostSpec{HostPoolRef: rdv.LocalReference{Name: "hp"}},
	}
}

func gateway() *rdv.Gateway {
	return &rdv.Gateway{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "gw"},
		Spec: rdv.GatewaySpec{
			Hostname:     "gw.example.test",
			Certificates: rdv.GatewayCertificates{IssuerRef: rdv.IssuerReference{Name: "ca"}},
		},
	}
}

// row is one object and the message with which it is refused; none means that it is taken.
type row struct {
	name    string
	obj     client.Object
	refusal string
}

// with changes a fresh object.
func with[T client.Object](fresh func() T, change func(T)) client.Object {
	obj := fresh()
	change(obj)
	return obj
}

func TestValidation(t *testing.T) {
	c := apiServer(t)
	ws := func(change func(*rdv.Workspace)) client.Object { return with(workspace, change) }
	revoking := func(r ...rdv.Revocation) client.Object {
		return ws(func(w *rdv.Workspace) { w.Spec.Revocations = r })
	}
	var many []rdv.Revocation
	for i := range 257 {
		many = append(many, rdv.Revocation{User: fmt.Sprint("user", i)})
	}
	hp := func(change func(*rdv.HostPool)) client.Object { return with(pool, change) }
	accounts := func(a rdv.Accounts) client.Object { return hp(func(h *rdv.HostPool) { h.Spec.Accounts = &a }) }
	sh := func(change func(*rdv.SessionHost)) client.Object { return with(host, change) }
	gw := func(change func(*rdv.Gateway)) client.Object { return with(gateway, change) }
	resources := func(r ...rdv.Resource) client.Object {
		return ws(func(w *rdv.Workspace) { w.Spec.Resources = r })
	}
	desktop := func(name string) rdv.Resource {
		return rdv.Resource{Name: name, Type: rdv.ResourceDesktop, HostPoolRef: rdv.LocalReference{Name: "hp"}}
	}
	properties := func(p ...string) client.Object {
		return hp(func(h *rdv.HostPool) { h.Spec.CustomRDPProperties = p })
	}
	scaled := func(a rdv.HostPoolAutoscaling) client.Object {
		return hp(func(h *rdv.HostPool) {
			h.Spec.Template, h.Spec.Autoscaling = &runtime.RawExtension{Raw: []byte(`{"spec":{"containers":[{"name":"desktop"}]}}`)}, &a
		})
	}
	served := func(s rdv.Service) client.Object { return gw(func(g *rdv.Gateway) { g.Spec.Service = s }) }
	onBus := func(s rdv.Service) client.Object {
		return ws(func(w *rdv.Workspace) { w.Spec.Broker.Bus.Service = s })
	}
	behind := func(networks ...rdv.Network) client.Object {
		return served(rdv.Service{ProxyProtocol: &rdv.ProxyProtocol{Networks: networks}})
	}
	const balancer, nodes = corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeNodePort
	const (
		badNetwork     = "write the network as ADDRESS/BITS with no bit set beyond BITS, such as 10.0.0.0/8 or 2001:db8::/32; a single address ends in /32 or /128"
		badHostname    = "hostname must be a DNS name in lower case, without scheme, port or path"
		badName        = "metadata.name must be a DNS label of at most 40 characters: it becomes part of other names"
		badHostName    = "metadata.name must be a DNS label of at most 52 characters: it becomes part of other names"
		badIssuer      = "issuerURL must be an https:// URL without a query"
		badResource    = "name must be a DNS label: lower-case letters, digits and hyphens"
		badProperty    = "each property must read name:type:value, type being i, s or b"
		policyProperty = "redirections are set by the Workspace for each resource"
		ownProperty    = "gateway*, full address, signature, signscope, pcb, loadbalanceinfo and password properties are set by Rendezvous"
	)
	rows := []row{
		{"service: all of a load balancer", served(rdv.Service{Type: balancer, LoadBalancerClass: new("service.k8s.aws/nlb"), LoadBalancerSourceRanges: []rdv.Network{"203.0.113.0/24", "2001:db8::/32"},
			ExternalTrafficPolicy: "Local", HealthCheckNodePort: new(int32(30999)), NodePorts: []rdv.NodePort{{Name: "https", NodePort: 30443}}, AllocateLoadBalancerNodePorts: new(true),
			IPFamilyPolicy: new(corev1.IPFamilyPolicyPreferDualStack), IPFamilies: []corev1.IPFamily{"IPv6", "IPv4"}, ProxyProtocol: &rdv.ProxyProtocol{Networks: []rdv.Network{"10.0.0.0/8", "2001:db8::/32", "192.0.2.7/32"}}}), ""},
		{"service: node ports", onBus(rdv.Service{Type: nodes, ExternalTrafficPolicy: "Local", NodePorts: []rdv.NodePort{{Name: "nats", NodePort: 30422}, {Name: "wss", NodePort: 30443}}}), ""},
		{"service: one family", served(rdv.Service{IPFamilies: []corev1.IPFamily{"IPv6"}}), ""},
		{"service: dual where there is", served(rdv.Service{IPFamilyPolicy: new(corev1.IPFamilyPolicyPreferDualStack)}), ""},
		{"service: class without load balancer", served(rdv.Service{LoadBalancerClass: new("x")}), "loadBalancerClass needs type: LoadBalancer"},
		{"service: ranges without load balancer", served(rdv.Service{Type: nodes, LoadBalancerSourceRanges: []rdv.Network{"10.0.0.0/8"}}), "loadBalancerSourceRanges needs type: LoadBalancer"},
		{"service: a range that is an address", served(rdv.Service{Type: balancer, LoadBalancerSourceRanges: []rdv.Network{"10.0.0.1"}}), badNetwork},
		{"service: no ranges", served(rdv.Service{Type: balancer, LoadBalancerSourceRanges: []rdv.Network{}}), ""},
		{"service: allocation without load balancer", served(rdv.Service{Type: nodes, AllocateLoadBalancerNodePorts: new(false)}), "allocateLoadBalancerNodePorts needs type: LoadBalancer"},
		{"service: policy inside the cluster", served(rdv.Service{ExternalTrafficPolicy: "Local"}), "externalTrafficPolicy needs type: NodePort or LoadBalancer"},
		{"service: another policy", served(rdv.Service{Type: balancer, ExternalTrafficPolicy: "local"}), "supported values: \"Cluster\", \"Local\""},
		{"service: node ports inside the cluster", served(rdv.Service{Type: corev1.ServiceTypeClusterIP, NodePorts: []rdv.NodePort{{Name: "https", NodePort: 30443}}}), "nodePorts needs type: NodePort or LoadBalancer"},
		{"service: a node port of a port that isn't there", served(rdv.Service{Type: nodes, NodePorts: []rdv.NodePort{{Name: "http", NodePort: 30443}}}), "a Gateway's Service has one port: name it https in nodePorts"},
		{"service: a node port of the feed", ws(func(w *rdv.Workspace) {
			w.Spec.Broker.Service = rdv.Service{Type: nodes, NodePorts: []rdv.NodePort{{Name: "wss", NodePort: 30443}}}
		}), "the Service of feed and enrolment has one port: name it https in nodePorts"},
		{"service: a node port of the bus", onBus(rdv.Service{Type: nodes, NodePorts: []rdv.NodePort{{Name: "https", NodePort: 30443}}}), "the bus's Service has the ports nats and wss: name these in nodePorts"},
		{"service: the same node port twice", onBus(rdv.Service{Type: nodes, NodePorts: []rdv.NodePort{{Name: "nats", NodePort: 30443}, {Name: "wss", NodePort: 30443}}}), "nodePorts must differ from each other"},
		{"service: node port 0", onBus(rdv.Service{Type: nodes, NodePorts: []rdv.NodePort{{Name: "nats"}}}), "should be greater than or equal to 1"},
		{"service: health check of no local policy", served(rdv.Service{Type: balancer, HealthCheckNodePort: new(int32(30999))}), "healthCheckNodePort needs type: LoadBalancer and externalTrafficPolicy: Local"},
		{"service: health check on the node port", served(rdv.Service{Type: balancer, ExternalTrafficPolicy: "Local", HealthCheckNodePort: new(int32(30443)), NodePorts: []rdv.NodePort{{Name: "https", NodePort: 30443}}}), "healthCheckNodePort must differ from nodePorts"},
		{"service: two families, no policy", served(rdv.Service{IPFamilies: []corev1.IPFamily{"IPv4", "IPv6"}}), "two ipFamilies need ipFamilyPolicy: PreferDualStack or RequireDualStack"},
		{"service: two families, one stack", served(rdv.Service{IPFamilyPolicy: new(corev1.IPFamilyPolicySingleStack), IPFamilies: []corev1.IPFamily{"IPv4", "IPv6"}}), "two ipFamilies need ipFamilyPolicy: PreferDualStack or RequireDualStack"},
		{"service: one family twice", served(rdv.Service{IPFamilyPolicy: new(corev1.IPFamilyPolicyPreferDualStack), IPFamilies: []corev1.IPFamily{"IPv4", "IPv4"}}), "ipFamilies must differ from each other"},
		{"service: a family that isn't one", served(rdv.Service{IPFamilies: []corev1.IPFamily{"ipv4"}}), "ipFamilies are IPv4 and IPv6"},
		{"service: PROXY protocol from nowhere", behind(), "spec.service.proxyProtocol.networks"},
		{"service: PROXY protocol from everywhere", behind("10.0.0.0/8", "0.0.0.0/0"), "a network of all addresses would let every client claim any address"},
		{"service: PROXY protocol from everywhere, IPv6", behind("::/0"), "a network of all addresses would let every client claim any address"},
		{"service: PROXY protocol from an address", behind("10.0.0.1"), badNetwork},
		{"service: PROXY protocol from a host's network", behind("10.0.0.1/8"), badNetwork},
		{"service: PROXY protocol from a name", behind("lb.example.test/32"), badNetwork},
		{"service: PROXY protocol twice from one network", behind("10.0.0.0/8", "10.0.0.0/8"), "Duplicate value"},
		{"workspace: least", workspace(), ""},
		{"workspace: a disabled user", revoking(rdv.Revocation{User: "alice@example.test", Reason: "left the company"}), ""},
		{"workspace: a user as of a time", revoking(rdv.Revocation{User: "alice@example.test", Before: &metav1.Time{Time: time.Unix(1_900_000_000, 0)}}), ""},
		{"workspace: a ticket", revoking(rdv.Revocation{Ticket: "ABCDEFGHIJKLMNOPQRSTUVWX27"}), ""},
		{"workspace: a user and tickets", revoking(rdv.Revocation{User: "alice"}, rdv.Revocation{Ticket: strings.Repeat("A", 26)}, rdv.Revocation{Ticket: strings.Repeat("B", 26)}), ""},
		{"workspace: a revocation of nothing", revoking(rdv.Revocation{Reason: "x"}), "a revocation names a user or a ticket, one of them"},
		{"workspace: a revocation of a user's ticket", revoking(rdv.Revocation{User: "alice", Ticket: strings.Repeat("A", 26)}), "a revocation names a user or a ticket, one of them"},
		{"workspace: a ticket as of a time", revoking(rdv.Revocation{Ticket: strings.Repeat("A", 26), Before: &metav1.Time{Time: time.Unix(1_900_000_000, 0)}}), "before goes with user"},
		{"workspace: a whole ticket in place of its id", revoking(rdv.Revocation{Ticket: "eyJhbGciOiJFZERTQSIsInR5cCI6"}), "ticket must be the id of a ticket, as brokers log it"},
		{"workspace: a reason of two lines", revoking(rdv.Revocation{User: "alice", Reason: "a\nb"}), "reason must be one line"},
		{"workspace: a user twice", revoking(rdv.Revocation{User: "alice"}, rdv.Revocation{User: "alice"}), "Duplicate value"},
		{"workspace: 257 revocations", revoking(many...), "must have at most 256 items"},
		{"workspace: name of 40", ws(func(w *rdv.Workspace) { w.Name = strings.Repeat("a", 40) }), ""},
		{"workspace: name of 41", ws(func(w *rdv.Workspace) { w.Name = strings.Repeat("a", 41) }), badName},
		{"workspace: name with a dot", ws(func(w *rdv.Workspace) { w.Name = "a.b" }), badName},
		{"workspace: hostname with a scheme", ws(func(w *rdv.Workspace) { w.Spec.Hostname = "https://desk.example.test" }), badHostname},
		{"workspace: hostname with a port", ws(func(w *rdv.Workspace) { w.Spec.Hostname = "desk.example.test:443" }), badHostname},
		{"workspace: hostname in capitals", ws(func(w *rdv.Workspace) { w.Spec.Hostname = "Desk.example.test" }), badHostname},
		{"workspace: hostname of one label", ws(func(w *rdv.Workspace) { w.Spec.Hostname = "desk" }), ""},
		{"oidc: http", ws(func(w *rdv.Workspace) { w.Spec.Identity.OIDC.IssuerURL = "http://id.example.test" }), badIssuer},
		{"oidc: no URL", ws(func(w *rdv.Workspace) { w.Spec.Identity.OIDC.IssuerURL = "id.example.test" }), badIssuer},
		{"oidc: with a query", ws(func(w *rdv.Workspace) { w.Spec.Identity.OIDC.IssuerURL = "https://id.example.test?a=b" }), badIssuer},
		{"oidc: with a port and a path", ws(func(w *rdv.Workspace) { w.Spec.Identity.OIDC.IssuerURL = "https://id.example.test:5556/dex" }), ""},
		{"oidc: one CA bundle", ws(func(w *rdv.Workspace) { w.Spec.Identity.OIDC.CABundle = "PEM" }), ""},
		{"oidc: two CA bundles", ws(func(w *rdv.Workspace) {
			w.Spec.Identity.OIDC.CABundle = "PEM"
			w.Spec.Identity.OIDC.CABundleRef = &rdv.KeyReference{Kind: "ConfigMap", Name: "ca", Key: "ca.crt"}
		}), "set caBundle or caBundleRef, not both"},
		{"oidc: CA bundle from a Secret", ws(func(w *rdv.Workspace) {
			w.Spec.Identity.OIDC.CABundleRef = &rdv.KeyReference{Kind: "Secret", Name: "ca", Key: "ca.crt"}
		}), ""},
		{"oidc: CA bundle from a Pod", ws(func(w *rdv.Workspace) {
			w.Spec.Identity.OIDC.CABundleRef = &rdv.KeyReference{Kind: "Pod", Name: "ca", Key: "ca.crt"}
		}), "kind must be ConfigMap or Secret"},
		{"resource: desktop", resources(desktop("a")), ""},
		{"resource: two of one name", resources(desktop("a"), desktop("a")), "Duplicate value"},
		{"resource: name with capitals", resources(desktop("Desk")), badResource},
		{"resource: name with a dot", resources(desktop("a.b")), badResource},
		{"resource: desktop with a program", resources(func() rdv.Resource {
			r := desktop("a")
			r.Program = &rdv.Program{Path: "x"}
			return r
		}()), "a Desktop takes no program; use type RemoteApp"},
		{"resource: app without a program", resources(func() rdv.Resource {
			r := desktop("a")
			r.Type = rdv.ResourceRemoteApp
			return r
		}()), "a RemoteApp needs program: the alias or path of the program to start"},
		{"resource: app", resources(func() rdv.Resource {
			r := desktop("a")
			r.Type, r.Program = rdv.ResourceRemoteApp, &rdv.Program{Path: "||calc"}
			return r
		}()), ""},
		{"tickets: a minute", ws(func(w *rdv.Workspace) { w.Spec.Tickets.LifetimeSeconds = new(int32(60)) }), ""},
		{"tickets: less", ws(func(w *rdv.Workspace) { w.Spec.Tickets.LifetimeSeconds = new(int32(59)) }), "should be greater than or equal to 60"},
		{"broker: ten", ws(func(w *rdv.Workspace) { w.Spec.Broker.Replicas = new(int32(10)) }), "should be less than or equal to 9"},
		{"broker: headless type", ws(func(w *rdv.Workspace) { w.Spec.Broker.Service.Type = corev1.ServiceTypeExternalName }), "Unsupported value"},
		{"bus: hostname with a port", ws(func(w *rdv.Workspace) { w.Spec.Broker.Bus.Hostname = "bus.example.test:4222" }), badHostname},
		{"bus: hostname", ws(func(w *rdv.Workspace) { w.Spec.Broker.Bus.Hostname = "bus.example.test" }), ""},

		{"pool: least", pool(), ""},
		{"pool: name with a dot", hp(func(h *rdv.HostPool) { h.Name = "a.b" }), badName},
		{"pool: pooled and balanced", hp(func(h *rdv.HostPool) { h.Spec.LoadBalancing = rdv.DepthFirst }), ""},
		{"pool: personal and balanced", hp(func(h *rdv.HostPool) { h.Spec.Type, h.Spec.LoadBalancing = rdv.Personal, rdv.DepthFirst }),
			"loadBalancing is for type Pooled; a Personal pool's users have hosts of their own"},
		{"pool: personal and assigned", hp(func(h *rdv.HostPool) { h.Spec.Type, h.Spec.Assignment = rdv.Personal, rdv.Direct }), ""},
		{"pool: pooled and assigned", hp(func(h *rdv.HostPool) { h.Spec.Assignment = rdv.Direct }), "assignment is for type Personal"},
		{"pool: replicas alone", hp(func(h *rdv.HostPool) { h.Spec.Replicas = new(int32(1)) }),
			"replicas needs template: only hosts that are pods can be made by the pool"},
		{"pool: replicas and template", hp(func(h *rdv.HostPool) {
			h.Spec.Replicas = new(int32(0))
			h.Spec.Template = &runtime.RawExtension{Raw: []byte(`{"spec":{"containers":[{"name":"desktop"}]}}`)}
		}), ""},
		{"pool: accounts made", accounts(rdv.Accounts{Policy: rdv.AccountsCreate}), ""},
		{"pool: accounts by claims", accounts(rdv.Accounts{Policy: rdv.AccountsCreate, NameClaim: "upn", UIDClaim: "uidNumber"}), ""},
		{"pool: accounts from a range", accounts(rdv.Accounts{Policy: rdv.AccountsCreate, UIDRange: &rdv.UIDRange{First: 70000, Last: 80000}}), ""},
		{"pool: accounts with no policy", accounts(rdv.Accounts{}), "policy"},
		{"pool: existing accounts with a user id", accounts(rdv.Accounts{Policy: rdv.AccountsExisting, UIDClaim: "uidNumber"}), "uidClaim is for policy Create"},
		{"pool: existing accounts with a range", accounts(rdv.Accounts{Policy: rdv.AccountsExisting, UIDRange: &rdv.UIDRange{First: 2000, Last: 3000}}), "uidRange is for policy Create"},
		{"pool: user ids from two places", accounts(rdv.Accounts{Policy: rdv.AccountsCreate, UIDClaim: "u", UIDRange: &rdv.UIDRange{First: 2000, Last: 3000}}), "set uidClaim or uidRange, not both"},
		{"pool: a range of the system's", accounts(rdv.Accounts{Policy: rdv.AccountsCreate, UIDRange: &rdv.UIDRange{First: 0, Last: 3000}}), "should be greater than or equal to 1000"},
		{"pool: a range backwards", accounts(rdv.Accounts{Policy: rdv.AccountsCreate, UIDRange: &rdv.UIDRange{First: 3000, Last: 2000}}), "first must not be greater than last"},
		{"pool: a range with nobody in it", accounts(rdv.Accounts{Policy: rdv.AccountsCreate, UIDRange: &rdv.UIDRange{First: 60000, Last: 70000}}), "must not hold 65534"},
		{"pool: a token for no host", hp(func(h *rdv.HostPool) { h.Spec.Registration.MaxHostsPerToken = new(int32(0)) }), "should be greater than or equal to 1"},
		{"pool: a token for one host", hp(func(h *rdv.HostPool) { h.Spec.Registration.MaxHostsPerToken = new(int32(1)) }), ""},
		{"pool: a token for 10000 hosts", hp(func(h *rdv.HostPool) { h.Spec.Registration.MaxHostsPerToken = new(int32(10000)) }), ""},
		{"pool: a token for too many hosts", hp(func(h *rdv.HostPool) { h.Spec.Registration.MaxHostsPerToken = new(int32(10001)) }), "should be less than or equal to 10000"},
		{"pool: token life too short", hp(func(h *rdv.HostPool) { h.Spec.Registration.TokenLifetimeSeconds = new(int32(60)) }), "should be greater than or equal to 3600"},
		{"pool: properties", properties("use multimon:i:0", "Camera:s:*", "username:s:EXAMPLE\\someone", "redirectwebauthn:i:1", "serverport:i:1", "desktop size id:i:1"), ""},
		{"pool: property of the port", properties("server port:i:3390"), "server port is set by Rendezvous"},
		{"pool: property of the port, with blanks", properties("Server   Port :i:3390"), "server port is set by Rendezvous"},
		{"pool: property of the address, with blanks", properties("Full  Address:s:evil"), ownProperty},
		{"pool: property of drives", properties("redirectdrives:i:1"), policyProperty},
		{"pool: property of which drives", properties("DrivesToRedirect:s:*"), policyProperty},
		{"pool: property of USB devices", properties("usbdevicestoredirect:s:*"), policyProperty},
		{"pool: property of the microphone", properties("use multimon:i:1", "audiocapturemode:i:1"), policyProperty},
		{"pool: property that verifies nobody", properties("authentication level:i:0"), "so that clients verify hosts"},
		{"pool: property that verifies nobody, with blanks", properties("Authentication   Level :i:0"), "so that clients verify hosts"},
		{"pool: property without NLA", properties("enablecredsspsupport:i:0"), "so that clients verify hosts"},
		{"pool: property of a KDC proxy", properties("KDCProxyName:s:evil.example"), "so that clients verify hosts"},
		{"pool: property of a shell", properties("alternate  shell:s:cmd.exe"), "use a resource of type RemoteApp"},
		{"pool: property of an app", properties("remoteapplicationprogram:s:||cmd"), "use a resource of type RemoteApp"},
		{"pool: property of the user in a pool with accounts", hp(func(h *rdv.HostPool) {
			h.Spec.Accounts = &rdv.Accounts{Policy: rdv.AccountsCreate}
			h.Spec.CustomRDPProperties = []string{"username:s:root"}
		}), "logs people in to their own"},
		{"pool: property without a type", properties("audiocapturemode=1"), badProperty},
		{"pool: property of two lines", properties("a:s:b\r\nfull address:s:evil"), badProperty},
		{"pool: property of the gateway", properties("GatewayHostname:s:evil"), ownProperty},
		{"pool: property of the address", properties("full address:s:evil"), ownProperty},
		{"pool: property with a password", properties("password 51:b:00"), ownProperty},

		{"host: least", host(), ""},
		{"pool: claims without a template", with(pool, func(p *rdv.HostPool) { p.Spec.VolumeClaimTemplates = []rdv.VolumeClaimTemplate{claim("home")} }),
			"volumeClaimTemplates needs template: only hosts that are pods mount claims"},
		{"pool: claims", with(pool, func(p *rdv.HostPool) {
			p.Spec.Template, p.Spec.VolumeClaimTemplates = &runtime.RawExtension{Raw: []byte(`{}`)}, []rdv.VolumeClaimTemplate{claim("home"), claim("data")}
		}), ""},
		{"pool: two claims of one name", with(pool, func(p *rdv.HostPool) {
			p.Spec.Template, p.Spec.VolumeClaimTemplates = &runtime.RawExtension{Raw: []byte(`{}`)}, []rdv.VolumeClaimTemplate{claim("home"), claim("home")}
		}), "each volumeClaimTemplate needs a metadata.name of its own"},
		{"gateway: pods", with(gateway, func(g *rdv.Gateway) {
			g.Spec.Pod = rdv.PodSettings{Labels: map[string]string{"team": "a"}, Env: []rdv.EnvValue{{Name: "HTTPS_PROXY", Value: "http://proxy:3128"}}}
		}), ""},
		{"gateway: a label of ours", with(gateway, func(g *rdv.Gateway) { g.Spec.Pod.Labels = map[string]string{"rendezvous.dev/gateway": "x"} }),
			"labels of rendezvous.dev and app.kubernetes.io are set by Rendezvous; leave them out"},
		{"workspace: an annotation of ours", with(workspace, func(w *rdv.Workspace) { w.Spec.Broker.Pod.Annotations = map[string]string{"rendezvous.dev/x": "x"} }),
			"annotations of rendezvous.dev are set by Rendezvous; leave them out"},
		{"workspace: an env of ours", with(workspace, func(w *rdv.Workspace) { w.Spec.Broker.Pod.Env = []rdv.EnvValue{{Name: "POD_IP", Value: "1"}} }),
			"POD_NAME, POD_NAMESPACE and POD_IP are set by Rendezvous"},
		{"host: name of 52", sh(func(h *rdv.SessionHost) { h.Name = strings.Repeat("a", 52) }), ""},
		{"host: name of 53", sh(func(h *rdv.SessionHost) { h.Name = strings.Repeat("a", 53) }), badHostName},
		{"host: name with a dot", sh(func(h *rdv.SessionHost) { h.Name = "a.b" }), badHostName},
		{"host: unknown drain", sh(func(h *rdv.SessionHost) { h.Spec.Drain = &rdv.Drain{Mode: "Kill"} }), "Unsupported value"},
		{"host: drain", sh(func(h *rdv.SessionHost) { h.Spec.Drain = &rdv.Drain{Mode: rdv.DrainNoNewSessions} }), ""},

		{"gateway: least", gateway(), ""},
		{"gateway: name of 41", gw(func(g *rdv.Gateway) { g.Name = strings.Repeat("a", 41) }), badName},
		{"gateway: hostname with a path", gw(func(g *rdv.Gateway) { g.Spec.Hostname = "gw.example.test/x" }), badHostname},
		{"pool: autoscaling", scaled(rdv.HostPoolAutoscaling{MinReplicas: new(int32(2)), MaxReplicas: 9, MinFreePlaces: new(int32(4))}), ""},
		{"pool: autoscaling by a share", scaled(rdv.HostPoolAutoscaling{MaxReplicas: 9, MinFreePercent: new(int32(20)), ScaleDownDelaySeconds: new(int32(0))}), ""},
		{"pool: autoscaling by nothing", scaled(rdv.HostPoolAutoscaling{MaxReplicas: 9}), "set either minFreePlaces or minFreePercent"},
		{"pool: autoscaling by both", scaled(rdv.HostPoolAutoscaling{MaxReplicas: 9, MinFreePlaces: new(int32(4)), MinFreePercent: new(int32(20))}), "set either minFreePlaces or minFreePercent"},
		{"pool: autoscaling from more to less", scaled(rdv.HostPoolAutoscaling{MinReplicas: new(int32(5)), MaxReplicas: 4, MinFreePlaces: new(int32(4))}), "minReplicas must not be greater than maxReplicas"},
		{"pool: autoscaling by all places", scaled(rdv.HostPoolAutoscaling{MaxReplicas: 4, MinFreePercent: new(int32(100))}), "should be less than or equal to 90"},
		{"pool: autoscaling and replicas", hp(func(h *rdv.HostPool) {
			h.Spec.Template, h.Spec.Replicas = &runtime.RawExtension{Raw: []byte(`{}`)}, new(int32(1))
			h.Spec.Autoscaling = &rdv.HostPoolAutoscaling{MaxReplicas: 4, MinFreePlaces: new(int32(4))}
		}), "set replicas or autoscaling, not both"},
		{"pool: autoscaling of machines", hp(func(h *rdv.HostPool) {
			h.Spec.Autoscaling = &rdv.HostPoolAutoscaling{MaxReplicas: 4, MinFreePlaces: new(int32(4))}
		}), "autoscaling needs template: only hosts that are pods can be made by the pool"},
		{"gateway: replicas", gw(func(g *rdv.Gateway) { g.Spec.Replicas = new(int32(3)) }), ""},
		{"gateway: replicas and autoscaling", gw(func(g *rdv.Gateway) {
			g.Spec.Replicas, g.Spec.Autoscaling = new(int32(3)), &rdv.Autoscaling{MaxReplicas: 3}
		}), "set replicas or autoscaling, not both"},
		{"gateway: autoscaling", gw(func(g *rdv.Gateway) {
			g.Spec.Autoscaling = &rdv.Autoscaling{MinReplicas: new(int32(2)), MaxReplicas: 2}
		}), ""},
		{"gateway: autoscaling by sessions", gw(func(g *rdv.Gateway) {
			g.Spec.Autoscaling = &rdv.Autoscaling{MaxReplicas: 2, TargetSessionsPerPod: new(int32(2000))}
		}), ""},
		{"gateway: autoscaling by no session", gw(func(g *rdv.Gateway) {
			g.Spec.Autoscaling = &rdv.Autoscaling{MaxReplicas: 2, TargetSessionsPerPod: new(int32(0))}
		}), "should be greater than or equal to 1"},
		{"gateway: autoscaling upside down", gw(func(g *rdv.Gateway) {
			g.Spec.Autoscaling = &rdv.Autoscaling{MinReplicas: new(int32(3)), MaxReplicas: 2}
		}),
			"minReplicas must not be greater than maxReplicas"},
		{"gateway: never idle", gw(func(g *rdv.Gateway) { g.Spec.Relay.IdleTimeoutSeconds = new(int32(0)) }), ""},
		{"gateway: idle for a minute", gw(func(g *rdv.Gateway) { g.Spec.Relay.IdleTimeoutSeconds = new(int32(60)) }), ""},
		{"gateway: idle for a second", gw(func(g *rdv.Gateway) { g.Spec.Relay.IdleTimeoutSeconds = new(int32(1)) }),
			"idleTimeoutSeconds must be 0 (never) or 60 to 604800"},
	}
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			expect(t, c.Create(context.Background(), r.obj, client.DryRunAll), r.refusal)
			if r.refusal != "" {
				expect(t, offline(t, r.obj), r.refusal)
			}
		})
	}
}

// offline is what lint says of an object: the same as the API server.
func offline(t *testing.T, obj client.Object) error {
	t.Helper()
	text, err := json.Marshal(obj)
	if err != nil {
		t.Fatal(err)
	}
	var content map[string]any
	if err := json.Unmarshal(text, &content); err != nil {
		t.Fatal(err)
	}
	kind := strings.TrimPrefix(fmt.Sprintf("%T", obj), "*v1alpha1.")
	content["apiVersion"], content["kind"] = rdv.GroupVersion.String(), kind
	if text, err = json.Marshal(content); err != nil {
		t.Fatal(err)
	}
	result, err := lint.Check(t.Context(), []lint.Source{{Name: "object.json", Data: text}})
	if err != nil {
		t.Fatal(err)
	}
	var errs []error
	for _, f := range result.Findings {
		errs = append(errs, errors.New(f.Message))
	}
	return errors.Join(errs...)
}

// TestImmutable shows what can't be changed once it is there.
func TestImmutable(t *testing.T) {
	c := apiServer(t)
	ctx := context.Background()
	owned := host()
	owned.Name, owned.Spec.AssignedUser = "owned", "alice"
	for _, obj := range []client.Object{pool(), host(), owned.DeepCopy()} {
		if err := c.Create(ctx, obj); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range []struct {
		name    string
		into    client.Object
		patch   string
		refusal string
	}{
		{"pool: type", pool(), `{"spec":{"type":"Personal"}}`, "type can't be changed; make a new HostPool"},
		{"pool: workspace", pool(), `{"spec":{"workspaceRef":{"name":"other"}}}`, "workspaceRef can't be changed, because the hosts' certificates name the workspace; make a new HostPool"},
		{"pool: sessions", pool(), `{"spec":{"maxSessionsPerHost":3}}`, ""},
		{"host: pool", host(), `{"spec":{"hostPoolRef":{"name":"other"}}}`, "hostPoolRef can't be changed, because the host's certificate names its pool; enrol the host in the other pool"},
		{"host: user", host(), `{"spec":{"assignedUser":"alice"}}`, ""},
		{"host: another user", owned, `{"spec":{"assignedUser":"bob"}}`, ""},
		{"host: nobody's", owned, `{"spec":{"assignedUser":""}}`, ""},
		{"host: user left out", owned, `{"spec":{"assignedUser":null}}`, "assignedUser can't be left out once it is set, because the next user would get this person's host: write it as it is, or set it to another user, or to an empty string to free the host"},
	} {
		t.Run(r.name, func(t *testing.T) {
			err := c.Patch(ctx, r.into, client.RawPatch("application/merge-patch+json", []byte(r.patch)), client.DryRunAll)
			expect(t, err, r.refusal)
		})
	}
}

// TestTemplateIsNotPruned shows that a pool's template reaches the operator as it was written, typos included.
func TestTemplateIsNotPruned(t *testing.T) {
	c := apiServer(t)
	p := pool()
	p.Spec.Template = &runtime.RawExtension{Raw: []byte(`{"spec":{"containers":"no list","unknown":1}}`)}
	if err := c.Create(context.Background(), p); err != nil {
		t.Fatal(err)
	}
	list := &rdv.HostPoolList{}
	if err := c.List(context.Background(), list); err != nil {
		t.Fatalf("one wrong template must not keep a list of pools from being read: %v", err)
	}
	if got := string(list.Items[0].Spec.Template.Raw); !strings.Contains(got, `"unknown":1`) {
		t.Errorf("template came back as %s", got)
	}
}

func expect(t *testing.T, err error, refusal string) {
	t.Helper()
	switch {
	case refusal == "" && err != nil:
		t.Errorf("refused: %v", err)
	case refusal != "" && err == nil:
		t.Errorf("taken; want a refusal with %q", refusal)
	case refusal != "" && !strings.Contains(fmt.Sprint(err), refusal):
		t.Errorf("refused with %q; want %q", err, refusal)
	}
}

// The ways to take something back that docs/operations.md tells: each leaves others' entries as they are.
func TestRevocationsAreAdded(t *testing.T) {
	c, ctx := apiServer(t), context.Background()
	if err := c.Create(ctx, workspace()); err != nil {
		t.Fatal(err)
	}
	ticket := strings.Repeat("A", 26)
	apply := func(manager, entry string) error {
		patch := `{"apiVersion":"rendezvous.dev/v1alpha1","kind":"Workspace","metadata":{"name":"ws","namespace":"default"},"spec":{"revocations":[` + entry + `]}}`
		return c.Patch(ctx, workspace(), client.RawPatch(types.ApplyPatchType, []byte(patch)), client.FieldOwner(manager))
	}
	for _, step := range []struct {
		name string
		do   func() error
		want []string
	}{
		{"a merge patch makes the list", func() error {
			return c.Patch(ctx, workspace(), client.RawPatch(types.MergePatchType, []byte(`{"spec":{"revocations":[{"user":"alice"}]}}`)))
		}, []string{"alice/"}},
		{"a JSON patch adds to it", func() error {
			return c.Patch(ctx, workspace(), client.RawPatch(types.JSONPatchType, []byte(`[{"op":"add","path":"/spec/revocations/-","value":{"user":"bob","reason":"lost laptop"}}]`)))
		}, []string{"alice/", "bob/"}},
		{"somebody applies an entry", func() error { return apply("incident-1", `{"ticket":"`+ticket+`"}`) }, []string{"alice/", "bob/", "/" + ticket}},
		{"somebody else applies another", func() error { return apply("incident-2", `{"user":"carol"}`) }, []string{"alice/", "bob/", "/" + ticket, "carol/"}},
		{"and takes it away", func() error { return apply("incident-2", ``) }, []string{"alice/", "bob/", "/" + ticket}},
	} {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		var w rdv.Workspace
		if err := c.Get(ctx, client.ObjectKeyFromObject(workspace()), &w); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, r := range w.Spec.Revocations {
			got = append(got, r.User+"/"+r.Ticket)
		}
		if !slices.Equal(got, step.want) {
			t.Errorf("%s: %q, want %q", step.name, got, step.want)
		}
	}
}
