package render

import (
	"fmt"
	"time"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/wire/config"
	"rendezvous.dev/rendezvous/wire/identity"
)

// GatewayTLS names the Certificate of a gateway's public listener, and its Secret.
func GatewayTLS(gateway string) string { return gateway + "-tls" }

// GatewayIdentityName names the Certificate with which a gateway stands on one workspace's bus, and its Secret. The dots,
// which neither name may hold, keep two pairs of names from meeting.
func GatewayIdentityName(gateway, workspace string) string {
	return gateway + "." + workspace + ".identity"
}

func gatewayRelays(gateway string) string { return gateway + "-relays" }

// gatewayRelayConfig and gatewayAdmissionConfig name the containers' ConfigMaps.
func gatewayRelayConfig(gateway string) string     { return gateway + "-relay" }
func gatewayAdmissionConfig(gateway string) string { return gateway + "-gateway" }

// What a Gateway gets that says nothing.
const (
	relayMaxSessions          = 5000
	relayMaxPending           = 1000
	relayHandshakeTimeout     = 20
	relayJoinTimeout          = 30
	relayDrainDeadline        = 8 * 60 * 60
	gatewayReplicas           = 1
	gatewayCPUTarget          = 70
	gatewayScaleDownStability = 10 * 60
)

// Annotations by which a new image of the gateway container is told from a template that needs new pods.
const (
	// AnnotationGatewayImage, on a gateway's Deployment, on its ReplicaSet and on a pod, is the image that its gateway
	// container was last given. What stands in the template may be another text: admission webhooks rewrite images.
	AnnotationGatewayImage = "rendezvous.dev/gateway-image"
	// AnnotationRolling on a Deployment says that its pods get a new gateway image in place, and which.
	AnnotationRolling = "rendezvous.dev/rolling-gateway-image"
	// AnnotationReplaced on a pod is the id of the gateway container that its new image is to replace.
	AnnotationReplaced = "rendezvous.dev/replaced-container"
	// AnnotationRetired on a ReplicaSet's template keeps an old one from being taken for the newest.
	AnnotationRetired = "rendezvous.dev/retired"
)

// GatewayContainer names the container that decides; the relay is the other one.
const GatewayContainer = "gateway"

// GatewayGraceBeyondDrain is how many seconds a gateway pod that must go has beyond its relay's drain deadline.
const GatewayGraceBeyondDrain = 30

// GatewayReplicas is how many pods the gateway wants; fixed is false where an autoscaler decides.
func GatewayReplicas(gw *rdv.Gateway) (replicas int32, fixed bool) {
	if gw.Spec.Autoscaling != nil {
		return 0, false
	}
	return or(gw.Spec.Replicas, gatewayReplicas), true
}

func gatewayLabels(gw *rdv.Gateway, component string) map[string]string {
	return labels(rdv.LabelGateway, gw.Name, component)
}

// GatewayPodLabels find a gateway's pods and their ReplicaSets.
func GatewayPodLabels(gateway string) map[string]string { return gatewaySelector(gateway) }

func gatewaySelector(gateway string) map[string]string {
	return selector(rdv.LabelGateway, gateway, componentGateway)
}

// GatewayCertificate is what the gateway's public listener shows.
func GatewayCertificate(gw *rdv.Gateway) *certmanager.Certificate {
	return certificate(gw.Namespace, GatewayTLS(gw.Name), gatewayLabels(gw, ""), certmanager.CertificateSpec{
		CommonName: commonName(gw.Spec.Hostname),
		DNSNames:   []string{gw.Spec.Hostname},
		Usages:     []certmanager.KeyUsage{certmanager.UsageDigitalSignature, certmanager.UsageServerAuth},
		PrivateKey: ecdsaKey(),
		IssuerRef:  issuerRef(gw.Spec.Certificates.IssuerRef),
	})
}

// GatewayIdentityCertificate is the gateway's place on one workspace's bus.
func GatewayIdentityCertificate(gw *rdv.Gateway, ws *rdv.Workspace) *certmanager.Certificate {
	return certificate(gw.Namespace, GatewayIdentityName(gw.Name, ws.Name), gatewayLabels(gw, ""), certmanager.CertificateSpec{
		URIs:       []string{identity.Gateway(ws.Namespace, ws.Name, gw.Name).String()},
		Usages:     []certmanager.KeyUsage{certmanager.UsageDigitalSignature, certmanager.UsageClientAuth},
		PrivateKey: ecdsaKey(),
		IssuerRef:  issuerRef(InternalIssuer(ws)),
	})
}

// RelayConfigMap is the relay's configuration.
func RelayConfigMap(gw *rdv.Gateway) (*corev1.ConfigMap, error) {
	return configMap(gw.Namespace, gatewayRelayConfig(gw.Name), gatewayLabels(gw, componentGateway), config.Relay{
		Gateway:                 gw.Name,
		Hostname:                gw.Spec.Hostname,
		Callers:                 callers(gw.Spec.Service),
		MaxSessions:             or(gw.Spec.Relay.Limits.MaxSessions, relayMaxSessions),
		MaxPending:              or(gw.Spec.Relay.Limits.MaxPending, relayMaxPending),
		HandshakeTimeoutSeconds: relayHandshakeTimeout,
		JoinTimeoutSeconds:      relayJoinTimeout,
		IdleTimeoutSeconds:      or(gw.Spec.Relay.IdleTimeoutSeconds, 0),
		DrainDeadlineSeconds:    drainDeadline(gw),
	}, nil)
}

// GatewayDrain is how long a pod of the gateway that must go waits for its last session.
func GatewayDrain(gw *rdv.Gateway) time.Duration {
	return time.Duration(drainDeadline(gw)) * time.Second
}
func drainDeadline(gw *rdv.Gateway) int32 {
	return or(gw.Spec.Relay.Drain.DeadlineSeconds, relayDrainDeadline)
}

// GatewayConfigMap is the admission container's configuration, for these workspaces (sorted by name).
func (o Options) GatewayConfigMap(gw *rdv.Gateway, workspaces []*rdv.Workspace) (*corev1.ConfigMap, error) {
	file := config.Gateway{
		Namespace:   gw.Namespace,
		Gateway:     gw.Name,
		Region:      gw.Spec.Region,
		Hostname:    gw.Spec.Hostname,
		PeersHost:   o.serviceHost(gw.Namespace, gatewayRelays(gw.Name)),
		MaxSessions: or(gw.Spec.Relay.Limits.MaxSessions, relayMaxSessions),
		Workspaces:  []config.GatewayWorkspace{},
	}
	for _, ws := range workspaces {
		file.Workspaces = append(file.Workspaces, config.GatewayWorkspace{Name: ws.Name, BusURLs: []string{o.clusterBusURL(ws)}})
	}
	return configMap(gw.Namespace, gatewayAdmissionConfig(gw.Name), gatewayLabels(gw, componentGateway), file, nil)
}

// GatewayDeployment is the gateway's pods: the relay, a native sidecar, which starts before and stops after the gateway
// container that decides for it. The two share one small folder, for the admission socket; each sees its own secrets,
// and neither has a Kubernetes credential. Its annotations say what the pods were rendered from, apart from the gateway
// container's image, and that image.
func (o Options) GatewayDeployment(gw *rdv.Gateway, workspaces []*rdv.Workspace) (*appsv1.Deployment, error) {
	sel := gatewaySelector(gw.Name)
	podLabels := gatewayLabels(gw, componentGateway)
	d := &appsv1.Deployment{
		TypeMeta:   typeMeta(appsv1.SchemeGroupVersion.String(), "Deployment"),
		ObjectMeta: meta(gw.Namespace, gw.Name, podLabels),
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: sel},
			Strategy: surgeFirst(),
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: podLabels},
				Spec: corev1.PodSpec{
					AutomountServiceAccountToken:  new(false),
					SecurityContext:               hardenedPod(),
					TopologySpreadConstraints:     spread(sel),
					TerminationGracePeriodSeconds: new(int64(drainDeadline(gw)) + GatewayGraceBeyondDrain),
					EnableServiceLinks:            new(false),
					InitContainers:                []corev1.Container{o.relayContainer(gw)},
					Containers:                    []corev1.Container{o.gatewayContainer(gw)},
					Volumes: []corev1.Volume{
						memoryVolume("admission", "1Mi"),
						configMapVolume("relay-config", gatewayRelayConfig(gw.Name)),
						configMapVolume("gateway-config", gatewayAdmissionConfig(gw.Name)),
						secretVolume("tls", GatewayTLS(gw.Name), corev1.TLSCertKey, corev1.TLSPrivateKeyKey),
						workspacesVolume(gw, workspaces),
					},
				},
			},
		},
	}
	if replicas, fixed := GatewayReplicas(gw); fixed {
		d.Spec.Replicas = new(replicas)
	}
	dress(&d.Spec.Template, sel, &gw.Spec.Pod)
	image := &d.Spec.Template.Spec.Containers[0].Image
	given := *image
	*image = ""
	hash, err := hashOf(d.Spec.Template)
	*image = given
	if err != nil {
		return nil, err
	}
	d.Annotations = map[string]string{AnnotationPodHash: hash, AnnotationGatewayImage: given}
	return d, nil
}

// RollingGatewayDeployment is a gateway's Deployment while its pods get a new gateway image in place: paused, and still
// with the image that it was given before.
func RollingGatewayDeployment(d *appsv1.Deployment, before string) *appsv1.Deployment {
	d = d.DeepCopy()
	d.Annotations[AnnotationRolling] = d.Annotations[AnnotationGatewayImage]
	d.Annotations[AnnotationGatewayImage] = before
	d.Spec.Paused = true
	d.Spec.Template.Spec.Containers[0].Image = before
	return d
}

func (o Options) relayContainer(gw *rdv.Gateway) corev1.Container {
	return corev1.Container{
		Name:            "relay",
		Image:           orString(gw.Spec.Relay.Image, o.RelayImage),
		ImagePullPolicy: corev1.PullIfNotPresent,
		RestartPolicy:   new(corev1.ContainerRestartPolicyAlways),
		Args:            []string{"--config=" + config.RelayFile},
		Env:             []corev1.EnvVar{podName(), podIP()},
		Ports: []corev1.ContainerPort{
			containerPort("public", config.PortPublic),
			containerPort("metrics", config.PortMetrics),
		},
		// The gateway container starts once this probe succeeds, so /healthz must not wait for that container.
		StartupProbe:    probe("/healthz", "metrics", 1, 60),
		LivenessProbe:   probe("/healthz", "metrics", 10, 6),
		ReadinessProbe:  probe("/readyz", "metrics", 2, 3),
		Resources:       resourcesOr(gw.Spec.Relay.Resources, "50m", "64Mi", "1Gi"),
		SecurityContext: hardenedContainer(),
		VolumeMounts: []corev1.VolumeMount{
			{Name: "admission", MountPath: config.AdmissionDir},
			readOnly("relay-config", "/etc/rendezvous/relay"),
			readOnly("tls", config.TLSDir),
		},
	}
}

func (o Options) gatewayContainer(gw *rdv.Gateway) corev1.Container {
	return corev1.Container{
		Name:            GatewayContainer,
		Image:           orString(gw.Spec.Admission.Image, o.GatewayImage),
		ImagePullPolicy: corev1.PullIfNotPresent,
		Args:            []string{"--config=" + config.GatewayFile, fmt.Sprintf("--metrics-addr=:%d", config.PortGatewayMetrics)},
		Env:             []corev1.EnvVar{podName(), podNamespace(), podIP()},
		Ports:           []corev1.ContainerPort{containerPort("gw-metrics", config.PortGatewayMetrics)},
		StartupProbe:    probe("/healthz", "gw-metrics", 1, 60),
		LivenessProbe:   probe("/healthz", "gw-metrics", 10, 6),
		ReadinessProbe:  probe("/readyz", "gw-metrics", 2, 3),
		Resources:       resourcesOr(gw.Spec.Admission.Resources, "20m", "48Mi", "256Mi"),
		SecurityContext: hardenedContainer(),
		VolumeMounts: []corev1.VolumeMount{
			{Name: "admission", MountPath: config.AdmissionDir},
			readOnly("gateway-config", "/etc/rendezvous/gateway"),
			readOnly("workspaces", config.WorkspacesDir),
		},
	}
}

// workspacesVolume shows, for each workspace, the gateway's identity on its bus and the certificate that tickets are
// checked with; of the ticket signer's Secret nothing else, above all not its key.
func workspacesVolume(gw *rdv.Gateway, workspaces []*rdv.Workspace) corev1.Volume {
	sources := []corev1.VolumeProjection{}
	add := func(secret, folder string, files ...corev1.KeyToPath) {
		for i := range files {
			files[i].Path = folder + "/" + files[i].Path
		}
		sources = append(sources, corev1.VolumeProjection{Secret: &corev1.SecretProjection{
			LocalObjectReference: corev1.LocalObjectReference{Name: secret},
			Items:                files,
		}})
	}
	for _, ws := range workspaces {
		add(GatewayIdentityName(gw.Name, ws.Name), ws.Name,
			corev1.KeyToPath{Key: corev1.TLSCertKey, Path: corev1.TLSCertKey},
			corev1.KeyToPath{Key: corev1.TLSPrivateKeyKey, Path: corev1.TLSPrivateKeyKey},
			corev1.KeyToPath{Key: "ca.crt", Path: "ca.crt"})
		add(WorkspaceTickets(ws.Name), ws.Name,
			corev1.KeyToPath{Key: corev1.TLSCertKey, Path: config.TicketCert})
	}
	return corev1.Volume{Name: "workspaces", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources:     sources,
		DefaultMode: new(int32(0o440)),
	}}}
}

// GatewayService is the public listener.
func GatewayService(gw *rdv.Gateway) *corev1.Service {
	return service(gw.Namespace, gw.Name, gatewayLabels(gw, componentGateway), gatewaySelector(gw.Name),
		gw.Spec.Service, servicePort("https", portHTTPS, "public"))
}

// GatewayRelaysService is how one relay finds another that holds a client.
func GatewayRelaysService(gw *rdv.Gateway) *corev1.Service {
	return headless(gw.Namespace, gatewayRelays(gw.Name), gatewayLabels(gw, componentGateway), gatewaySelector(gw.Name),
		servicePort("public", config.PortPublic, "public"))
}

// GatewayDisruptionBudget lets one pod go at a time.
func GatewayDisruptionBudget(gw *rdv.Gateway) *policyv1.PodDisruptionBudget {
	return disruptionBudget(gw.Namespace, gw.Name, gatewayLabels(gw, componentGateway), gatewaySelector(gw.Name))
}

// GatewayAutoscaler is nil where the gateway has a fixed number of pods. It scales down slowly: each pod that goes must
// first drain.
func GatewayAutoscaler(gw *rdv.Gateway) *autoscalingv2.HorizontalPodAutoscaler {
	a := gw.Spec.Autoscaling
	if a == nil {
		return nil
	}
	return &autoscalingv2.HorizontalPodAutoscaler{
		TypeMeta:   typeMeta(autoscalingv2.SchemeGroupVersion.String(), "HorizontalPodAutoscaler"),
		ObjectMeta: meta(gw.Namespace, gw.Name, gatewayLabels(gw, componentGateway)),
		Spec: autoscalingv2.HorizontalPodAutoscalerSpec{
			ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: appsv1.SchemeGroupVersion.String(), Kind: "Deployment", Name: gw.Name},
			MinReplicas:    new(or(a.MinReplicas, gatewayReplicas)),
			MaxReplicas:    a.MaxReplicas,
			Metrics:        scalingMetrics(a),
			Behavior: &autoscalingv2.HorizontalPodAutoscalerBehavior{
				ScaleDown: &autoscalingv2.HPAScalingRules{
					StabilizationWindowSeconds: new(int32(gatewayScaleDownStability)),
				},
			},
		},
	}
}

// sessionsMetric is what relays call the number of their sessions.
const sessionsMetric = "rendezvous_relay_sessions"

// scalingMetrics are what an autoscaler goes by: of several, the one that asks for the most pods.
func scalingMetrics(a *rdv.Autoscaling) (metrics []autoscalingv2.MetricSpec) {
	if sessions := a.TargetSessionsPerPod; sessions != nil {
		metrics = append(metrics, autoscalingv2.MetricSpec{
			Type: autoscalingv2.PodsMetricSourceType,
			Pods: &autoscalingv2.PodsMetricSource{
				Metric: autoscalingv2.MetricIdentifier{Name: sessionsMetric},
				Target: autoscalingv2.MetricTarget{
					Type:         autoscalingv2.AverageValueMetricType,
					AverageValue: resource.NewQuantity(int64(*sessions), resource.DecimalSI),
				},
			},
		})
	}
	if cpu := a.TargetCPUUtilizationPercentage; cpu != nil || len(metrics) == 0 {
		metrics = append(metrics, autoscalingv2.MetricSpec{
			Type: autoscalingv2.ResourceMetricSourceType,
			Resource: &autoscalingv2.ResourceMetricSource{
				Name: corev1.ResourceCPU,
				Target: autoscalingv2.MetricTarget{
					Type:               autoscalingv2.UtilizationMetricType,
					AverageUtilization: new(or(cpu, gatewayCPUTarget)),
				},
			},
		})
	}
	return metrics
}
