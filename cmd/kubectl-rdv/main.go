// Command kubectl-rdv is a kubectl plugin: kubectl rdv disconnect, message and logoff act on live sessions, one or many;
// kubectl rdv lint checks manifests without a cluster.
// Listing, watching and logging off one need no plugin: kubectl get sessions, kubectl delete session NAME.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"rendezvous.dev/rendezvous/sessionsapi"
	"rendezvous.dev/rendezvous/wire/bus"
	"rendezvous.dev/rendezvous/wire/version"
)

// linked is the version, set by the linker.
var linked = ""

// maxAtOnce bounds the sessions that are acted on at one time.
const maxAtOnce = 8

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command(os.Stdout).ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		var exit *exitError
		if errors.As(err, &exit) {
			os.Exit(exit.code)
		}
		os.Exit(1)
	}
}

// plugin is what all commands have in common.
type plugin struct {
	out            io.Writer
	rules          *clientcmd.ClientConfigLoadingRules
	overrides      clientcmd.ConfigOverrides
	labels, fields string
	all, dryRun    bool
}

func command(out io.Writer) *cobra.Command {
	p := &plugin{out: out, rules: clientcmd.NewDefaultClientConfigLoadingRules()}
	root := &cobra.Command{
		Use: "kubectl-rdv", Short: "Act on live sessions, and check manifests", SilenceUsage: true, SilenceErrors: true, Version: version.Line(linked),
		Long: "Act on live sessions. `kubectl get sessions` lists them, with -w, -o wide, -l and --field-selector user=NAME.",
	}
	fs := root.PersistentFlags()
	fs.StringVar(&p.rules.ExplicitPath, "kubeconfig", "", "kubeconfig file")
	fs.StringVar(&p.overrides.CurrentContext, "context", "", "context of the kubeconfig")
	fs.StringVarP(&p.overrides.Context.Namespace, "namespace", "n", "", "namespace of the workspace")
	fs.StringVarP(&p.labels, "selector", "l", "", "act on the sessions with these labels")
	fs.StringVar(&p.fields, "field-selector", "", "act on the sessions with these fields, such as user=alice@example.com,pool=linux,state=Disconnected")
	fs.BoolVar(&p.all, "all", false, "act on all sessions of the namespace")
	fs.BoolVar(&p.dryRun, "dry-run", false, "say on which sessions, and change nothing")
	add := func(use, short, done string, act func(context.Context, *rest.RESTClient, string, string) error) {
		root.AddCommand(&cobra.Command{
			Use: use + " [SESSION...]", Short: short,
			RunE: func(cmd *cobra.Command, args []string) error { return p.run(cmd.Context(), args, done, act) },
		})
	}
	add("logoff", "Log users off: their desktops and all that runs in them end", "logged off", func(ctx context.Context, c *rest.RESTClient, ns, name string) error {
		return c.Delete().Namespace(ns).Resource(sessionsapi.Resource).Name(name).Do(ctx).Error()
	})
	add("disconnect", "End connections: the desktops go on, and connecting again leads back to them", "disconnected", func(ctx context.Context, c *rest.RESTClient, ns, name string) error {
		return c.Post().Namespace(ns).Resource(sessionsapi.Resource).Name(name).SubResource(sessionsapi.Disconnect).Body([]byte("{}")).SetHeader("Content-Type", "application/json").Do(ctx).Error()
	})
	var text string
	message := &cobra.Command{
		Use: "message [SESSION...] --text TEXT", Short: "Show a message on users' desktops",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := bus.CheckMessageText(text); err != nil {
				return fmt.Errorf("--text: %w", err)
			}
			body, err := json.Marshal(map[string]string{"text": text})
			if err != nil {
				return err
			}
			return p.run(cmd.Context(), args, "shown the message", func(ctx context.Context, c *rest.RESTClient, ns, name string) error {
				return c.Post().Namespace(ns).Resource(sessionsapi.Resource).Name(name).SubResource(sessionsapi.Message).Body(body).SetHeader("Content-Type", "application/json").Do(ctx).Error()
			})
		},
	}
	message.Flags().StringVar(&text, "text", "", "what to show: plain text, at most 2 KiB")
	root.AddCommand(message, lintCommand(out))
	return root
}

// client speaks to the API server with the kubeconfig's credentials, whatever kind these are.
func (p *plugin) client() (*rest.RESTClient, string, error) {
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(p.rules, &p.overrides)
	namespace, _, err := loader.Namespace()
	if err != nil {
		return nil, "", err
	}
	config, err := loader.ClientConfig()
	if err != nil {
		return nil, "", err
	}
	config.GroupVersion = &schema.GroupVersion{Group: sessionsapi.Group, Version: sessionsapi.Version}
	config.APIPath, config.NegotiatedSerializer = "/apis", scheme.Codecs.WithoutConversion()
	config.UserAgent = "kubectl-rdv/" + version.String(linked)
	c, err := rest.RESTClientFor(config)
	return c, namespace, err
}

// choose gives the names of the sessions that are meant.
func (p *plugin) choose(ctx context.Context, c *rest.RESTClient, namespace string, names []string) ([]string, error) {
	bySelector := p.labels != "" || p.fields != "" || p.all
	switch {
	case len(names) > 0 && bySelector:
		return nil, errors.New("name sessions, or select them by -l, --field-selector or --all, but not both")
	case len(names) > 0:
		for i, n := range names {
			for _, prefix := range []string{"session/", "sessions/", "session." + sessionsapi.Group + "/", "sessions." + sessionsapi.Group + "/"} {
				names[i] = strings.TrimPrefix(names[i], prefix)
			}
			if strings.ContainsAny(names[i], "/%") || names[i] == "" {
				return nil, fmt.Errorf("%q is not the name of a session: `kubectl get sessions` lists them", n)
			}
		}
		return names, nil
	case !bySelector:
		return nil, errors.New("which sessions? Name them, or select them by -l, --field-selector or --all; `kubectl get sessions` lists them")
	}
	data, err := c.Get().Namespace(namespace).Resource(sessionsapi.Resource).Param("labelSelector", p.labels).Param("fieldSelector", p.fields).Do(ctx).Raw()
	if err != nil {
		return nil, err
	}
	var list sessionsapi.SessionList
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, err
	}
	for _, s := range list.Items {
		if s.Status.Proven { // nothing can be done to others
			names = append(names, s.Name)
		}
	}
	return names, nil
}

// run acts on the sessions, several at a time, and says what became of each.
func (p *plugin) run(ctx context.Context, names []string, done string, act func(context.Context, *rest.RESTClient, string, string) error) error {
	c, namespace, err := p.client()
	if err != nil {
		return err
	}
	names, err = p.choose(ctx, c, namespace, names)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		fmt.Fprintf(p.out, "no session in namespace %s is selected\n", namespace)
		return nil
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	failed := 0
	slots := make(chan struct{}, maxAtOnce)
	for _, name := range names {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			var err error
			suffix := ""
			if p.dryRun {
				suffix = " (dry run)"
			} else {
				err = act(ctx, c, namespace, name)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed++
				fmt.Fprintf(p.out, "session/%s failed: %v\n", name, err)
				return
			}
			fmt.Fprintf(p.out, "session/%s %s%s\n", name, done, suffix)
		})
	}
	wg.Wait()
	if failed > 0 {
		return fmt.Errorf("%d of %d sessions: nothing was done", failed, len(names))
	}
	return nil
}
