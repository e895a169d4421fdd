// Package stage sets up what the demo and the end-to-end tests play on: the embedded cluster, the product's images, the
// operator, the samples, and people with machines of their own. Every step is idempotent: a second run changes nothing,
// and a run after a kill goes on.
package stage

import (
	"bytes"
	"context"
	"fmt"
	"image/color"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	rdv "rendezvous.dev/rendezvous/api/v1alpha1"
	"rendezvous.dev/rendezvous/hack/images"
)

// Where the samples and the operator live.
const (
	Namespace         = "rendezvous-demo"
	OperatorNamespace = "rendezvous-system"
	// DNS is the cluster's DNS, which stands for the public one: it answers NAME.rdv.test.
	DNS = "10.96.0.10"
)

// Stage is a cluster with the operator and the samples on it.
type Stage struct {
	// Root is the source tree.
	Root string
	// Kubeconfig of the embedded cluster.
	Kubeconfig string
	// Client reads and writes its objects.
	Client client.Client
	// CompanyCA (PEM) is the CA that users and machines trust.
	CompanyCA []byte

	assets string
	say    *Progress
}

// Progress prints what happens, with the time since the start.
type Progress struct {
	mu    sync.Mutex
	out   io.Writer
	start time.Time
}

// NewProgress writes to out.
func NewProgress(out io.Writer) *Progress { return &Progress{out: out, start: time.Now()} }

// Say prints one line.
func (p *Progress) Say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.out, "[%5.1fs] %s\n", time.Since(p.start).Seconds(), fmt.Sprintf(format, args...))
}

// Up brings the stage about.
func Up(ctx context.Context, root string, say *Progress) (*Stage, error) {
	s := &Stage{Root: root, assets: filepath.Join(root, "bin", "envtest"), say: say}
	if err := os.MkdirAll(s.imageDir(), 0o755); err != nil {
		return nil, fmt.Errorf("stage: %w", err)
	}
	var built []images.Image
	desktopTar := filepath.Join(s.imageDir(), "desktop.tar")

	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.tool(gctx, "hack/cluster", "up") })
	g.Go(func() error {
		say.Say("desktop and client: Debian 13 roots, real xrdp and FreeRDP")
		return s.tool(gctx, "hack/desktop", "image", desktopTar)
	})
	g.Go(func() (err error) {
		say.Say("images: compiling %s", strings.Join(images.Names, ", "))
		built, err = images.Build(gctx, root, s.imageDir())
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if err := s.connect(ctx); err != nil {
		return nil, err
	}
	if err := s.heal(ctx); err != nil {
		return nil, err
	}

	say.Say("images: loading into the cluster")
	load := []string{"load", desktopTar}
	for _, i := range built {
		load = append(load, i.Tar)
	}
	if err := s.tool(ctx, "hack/cluster", load...); err != nil {
		return nil, err
	}
	if err := s.installOperator(ctx, built); err != nil {
		return nil, err
	}
	if err := s.applySamples(ctx); err != nil {
		return nil, err
	}
	return s, s.brokersCurrent(ctx, built)
}

// brokersCurrent waits until the brokers run the images that were just built. On a stage of before they are being replaced,
// and what one that goes remembers of a connect goes with it.
func (s *Stage) brokersCurrent(ctx context.Context, built []images.Image) error {
	i := slices.IndexFunc(built, func(i images.Image) bool { return i.Name == "broker" })
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for {
		image, err := s.Kubectl(ctx, "", "-n", Namespace, "get", "deployment", "demo-broker", "-o", "jsonpath={.spec.template.spec.containers[0].image}")
		if err != nil {
			return err
		}
		if image == built[i].Ref {
			_, err := s.Kubectl(ctx, "", "-n", Namespace, "rollout", "status", "deployment/demo-broker", "--timeout=120s")
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stage: the brokers still have image %s, not %s: does the operator run?", image, built[i].Ref)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// Images builds the images and loads them, and nothing else.
func Images(ctx context.Context, root string, say *Progress) error {
	s := &Stage{Root: root, say: say}
	built, err := images.Build(ctx, root, s.imageDir())
	if err != nil {
		return err
	}
	desktopTar := filepath.Join(s.imageDir(), "desktop.tar")
	if err := s.tool(ctx, "hack/desktop", "image", desktopTar); err != nil {
		return err
	}
	load := []string{"load", desktopTar}
	for _, i := range built {
		say.Say("%s", i.Ref)
		load = append(load, i.Tar)
	}
	return s.tool(ctx, "hack/cluster", load...)
}

func (s *Stage) imageDir() string { return filepath.Join(s.Root, "bin", "images") }

// tool runs one of hack's commands, passing its progress on.
func (s *Stage) tool(ctx context.Context, module string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"-C", filepath.Join(s.Root, module), "run", "."}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("stage: %s %s: %w", module, args[0], err)
	}
	return nil
}

// connect finds the kubeconfig and a client for it.
func (s *Stage) connect(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "go", "-C", filepath.Join(s.Root, "hack/cluster"), "run", ".", "kubeconfig").Output()
	if err != nil {
		return fmt.Errorf("stage: where is the kubeconfig? %w", err)
	}
	s.Kubeconfig = strings.TrimSpace(string(out))
	if err := s.tool(ctx, "hack/cluster", "assets", s.assets); err != nil {
		return err
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig)
	if err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	cfg.QPS, cfg.Burst = 100, 200
	ctrllog.SetLogger(logr.Discard())
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, rdv.AddToScheme} {
		if err := add(scheme); err != nil {
			return fmt.Errorf("stage: %w", err)
		}
	}
	s.Client, err = client.New(cfg, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	return nil
}

// Kubectl runs kubectl against the stage and returns what it printed.
func (s *Stage) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.assets, "kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+s.Kubeconfig)
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

// AwayLabel in a Service's selector is how a test takes the Service's endpoints away.
const AwayLabel = "e2e"

// heal gives Dex its endpoints back, where a test was killed that had taken them away.
func (s *Stage) heal(ctx context.Context) error {
	var dex corev1.Service
	err := s.Client.Get(ctx, client.ObjectKey{Namespace: "dex", Name: "dex"}, &dex)
	if _, away := dex.Spec.Selector[AwayLabel]; err == nil && away {
		delete(dex.Spec.Selector, AwayLabel)
		err = s.Client.Update(ctx, &dex)
	}
	if err != nil {
		return fmt.Errorf("stage: Dex's Service: %w", err)
	}
	return nil
}

// KubectlRdv runs the plugin `kubectl rdv` against the stage and returns what it printed.
func (s *Stage) KubectlRdv(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, s.Tool("kubectl-rdv"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+s.Kubeconfig)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("kubectl rdv %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// installOperator applies config/default with the images that were just built.
func (s *Stage) installOperator(ctx context.Context, built []images.Image) error {
	s.say.Say("operator: applying config/default")
	var overlay strings.Builder
	overlay.WriteString("resources: [../../../config/default]\nimages:\n")
	var env strings.Builder
	for _, i := range built {
		name, tag, _ := strings.Cut(i.Ref, ":")
		if i.Name == "manager" {
			fmt.Fprintf(&overlay, "- {name: %s, newTag: %s}\n", name, tag)
			continue
		}
		fmt.Fprintf(&env, "        - {name: RELATED_IMAGE_%s, value: %q}\n", strings.ToUpper(i.Name), i.Ref)
	}
	overlay.WriteString(`patches:
- patch: |
    apiVersion: apps/v1
    kind: Deployment
    metadata: {name: rendezvous-manager, namespace: ` + OperatorNamespace + `}
    spec:
      template:
        spec:
          containers:
          - name: manager
            env:
` + strings.ReplaceAll(env.String(), "        -", "            -"))
	dir := filepath.Join(s.Root, "bin", "overlay", "operator")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(overlay.String()), 0o644); err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	if _, err := s.Kubectl(ctx, "", "apply", "--server-side", "--force-conflicts", "-k", dir); err != nil {
		return err
	}
	_, err := s.Kubectl(ctx, "", "-n", OperatorNamespace, "rollout", "status", "deployment/rendezvous-manager", "--timeout=180s")
	return err
}

// applySamples applies config/samples and the company CA that they name, and waits until all is ready.
func (s *Stage) applySamples(ctx context.Context) error {
	s.say.Say("samples: applying config/samples")
	ca, err := s.Kubectl(ctx, "", "-n", "cert-manager", "get", "secret", "rdv-demo-ca", "-o", `go-template={{index .data "ca.crt" | base64decode}}`)
	if err != nil {
		return err
	}
	s.CompanyCA = []byte(ca)
	namespace := &corev1.Namespace{}
	namespace.Name = Namespace
	if err := client.IgnoreAlreadyExists(s.Client.Create(ctx, namespace)); err != nil {
		return fmt.Errorf("stage: %w", err)
	}
	companyCA := fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: company-ca, namespace: %s}\ndata:\n  ca.crt: |\n    %s\n",
		Namespace, strings.ReplaceAll(strings.TrimSpace(ca), "\n", "\n    "))
	if _, err := s.Kubectl(ctx, companyCA, "apply", "--server-side", "-f", "-"); err != nil {
		return err
	}
	if _, err := s.Kubectl(ctx, "", "apply", "--server-side", "--force-conflicts", "-k", filepath.Join(s.Root, "config/samples")); err != nil {
		return err
	}
	return s.WaitReady(ctx, 5*time.Minute)
}

// machinesPool is the sample's pool without a template.
const machinesPool = "machines"

// WaitReady waits until every object of ours is Ready, and prints each that changes on the way. The pool of machines, and what
// a test left in it that was killed, wait for agents that nobody may have started: they need not be.
func (s *Stage) WaitReady(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	last := map[string]string{}
	for {
		pending := ""
		table, err := s.Kubectl(ctx, "", "-n", Namespace, "get", "workspaces,hostpools,sessionhosts,gateways", "-o",
			`jsonpath={range .items[*]}{.kind}{"/"}{.metadata.name}{"\t"}{.status.conditions[?(@.type=="Ready")].status}{"\t"}{.status.conditions[?(@.type=="Ready")].message}{"\t"}{.spec.hostPoolRef.name}{"\n"}{end}`)
		if err != nil && ctx.Err() == nil {
			return err
		}
		for _, line := range strings.Split(strings.Trim(table, "\n"), "\n") {
			f := strings.SplitN(line, "\t", 4)
			if len(f) < 4 {
				continue
			}
			if now := f[1] + " " + f[2]; last[f[0]] != now {
				last[f[0]] = now
				s.say.Say("  %-28s Ready=%s  %s", f[0], f[1], f[2])
			}
			if f[1] != "True" && f[0] != "HostPool/"+machinesPool && f[3] != machinesPool {
				pending = f[0] + ": " + f[2]
			}
		}
		if pending == "" && len(last) > 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stage: not ready after %s: %s (see `kubectl get rdv -n %s`)", limit, pending, Namespace)
		case <-time.After(time.Second):
		}
	}
}

// DesktopColor is the colour that the desktop of a pool with one host paints: its pod's env RDV_DESKTOP_COLOR, which is not
// the template's while a pod waits for a session of before to end.
func (s *Stage) DesktopColor(ctx context.Context, pool string) (color.RGBA, error) {
	out, err := s.Kubectl(ctx, "", "-n", Namespace, "get", "pods", "-l", rdv.LabelHostPool+"="+pool, "-o",
		`jsonpath={.items[*].spec.containers[?(@.name=="desktop")].env[?(@.name=="RDV_DESKTOP_COLOR")].value}`)
	if err != nil {
		return color.RGBA{}, err
	}
	c := color.RGBA{A: 255}
	if _, err := fmt.Sscanf(strings.TrimSpace(out), "#%02x%02x%02x", &c.R, &c.G, &c.B); err != nil {
		return c, fmt.Errorf("stage: the pod of HostPool %s has no RDV_DESKTOP_COLOR of the form #rrggbb: %q", pool, out)
	}
	return c, nil
}

// VariantImages loads further images of components into the cluster, of the same programs, but with a tag and a file of
// their own: what a rollout of a new image needs. It returns their references by component.
func (s *Stage) VariantImages(ctx context.Context, tag string, components ...string) (map[string]string, error) {
	refs, load := map[string]string{}, []string{"load"}
	for _, name := range components {
		variant, err := images.Variant(name, filepath.Join(s.toolDir(), name), s.imageDir(), tag)
		if err != nil {
			return nil, err
		}
		refs[name], load = variant.Ref, append(load, variant.Tar)
	}
	return refs, s.tool(ctx, "hack/cluster", load...)
}
