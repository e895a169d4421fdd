package main

import (
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"
)

//go:embed addons/*
var addonFiles embed.FS

// addons is everything that is put into the cluster, ready to apply.
type addons struct {
	Images []image
	// CRDs are applied first, then Base; Issued holds objects of the CRDs' kinds
	// and what depends on them.
	CRDs, Base, Issued string
}

// loadAddons packs the addons' images and renders their manifests.
func (c *cluster) loadAddons() (addons, error) {
	var a addons
	refs := map[string]string{}
	for _, build := range []struct{ dir, program string }{
		{c.built.pause, "pause"}, {c.built.kube, "coredns"}, {c.built.kube, "certmanager"}, {c.built.dex, "dex"},
		{c.built.localPath, "local-path-provisioner"}, {c.built.localPath, "volume"},
	} {
		img, err := programImage(build.dir, build.program)
		if err != nil {
			return a, err
		}
		a.Images = append(a.Images, img)
		refs[strings.ReplaceAll(build.program, "-", "")] = img.ref // as templates can name it
	}
	crds, err := os.ReadFile(filepath.Join(c.built.kube, "crds.yaml"))
	if err != nil {
		return a, err
	}
	a.CRDs = string(crds)

	dexConfig, err := addonFiles.ReadFile("addons/dex.json")
	if err != nil {
		return a, err
	}
	values := map[string]any{
		"Image": refs, "DNSIP": dnsIP, "Domain": clusterDomain,
		"Upstreams": strings.Join(upstreams(hostResolvConf()), " "),
		"Volumes":   c.path("volumes"),
		"DexConfig": string(dexConfig), "DexConfigHash": fingerprint(string(dexConfig)),
	}
	for file, into := range map[string]*string{"base.yaml": &a.Base, "issued.yaml": &a.Issued} {
		if *into, err = renderAddon(file, values); err != nil {
			return a, err
		}
	}
	return a, nil
}

func renderAddon(name string, values any) (string, error) {
	text, err := addonFiles.ReadFile("addons/" + name)
	if err != nil {
		return "", err
	}
	t, err := template.New(name).Option("missingkey=error").Funcs(template.FuncMap{
		"quote": func(s string) (string, error) { // a JSON string is a YAML string
			data, err := json.Marshal(s)
			return string(data), err
		},
	}).Parse(string(text))
	if err != nil {
		return "", err
	}
	var b strings.Builder
	err = t.Execute(&b, values)
	return b.String(), err
}

// importImages puts the images into containerd, which is quick for those it has.
func (c *cluster) importImages(ctx context.Context, a addons) error {
	began := time.Now()
	for _, img := range a.Images {
		if have, err := c.ctr(ctx, "images", "ls", "-q", "name=="+img.ref); err == nil && strings.TrimSpace(have) == img.ref {
			continue
		}
		if _, err := c.ctr(ctx, "images", "import", img.tar); err != nil {
			return err
		}
	}
	say("images are in (%.1f s)", time.Since(began).Seconds())
	return nil
}

// applyAddons applies everything and waits until it is available.
func (c *cluster) applyAddons(ctx context.Context, a addons) error {
	for _, manifest := range []string{a.CRDs, a.Base} {
		if err := c.apply(ctx, manifest); err != nil {
			return err
		}
	}
	if _, err := c.kubectl(ctx, a.CRDs, "wait", "--for=condition=Established", "--timeout=60s", "-f", "-"); err != nil {
		return err
	}
	if err := c.apply(ctx, a.Issued); err != nil {
		return err
	}
	say("addons are applied")
	return c.awaitAddons(ctx)
}

func (c *cluster) apply(ctx context.Context, manifest string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	// The first tries of a new API server may meet a namespace or a kind that it
	// knows only a moment later.
	return eventually(ctx, 500*time.Millisecond, func(ctx context.Context) error {
		_, err := c.kubectl(ctx, manifest, "apply", "--server-side", "--force-conflicts", "--field-manager=rdv-cluster", "-f", "-")
		return err
	})
}

// awaitAddons waits until the node and the addons are ready.
func (c *cluster) awaitAddons(ctx context.Context) error {
	timeout := "--timeout=" + addonTimeout.String()
	waits := [][]string{
		{"wait", "--for=condition=Ready", timeout, "node/" + nodeName},
		{"--namespace=kube-system", "rollout", "status", timeout, "deployment/coredns"},
		{"--namespace=cert-manager", "rollout", "status", timeout, "deployment/cert-manager"},
		{"wait", "--for=condition=Ready", timeout, "clusterissuer/rdv-demo-ca"},
		{"--namespace=local-path-storage", "rollout", "status", timeout, "deployment/local-path-provisioner"},
		{"--namespace=dex", "rollout", "status", timeout, "deployment/dex"},
	}
	ctx, cancel := context.WithTimeout(ctx, addonTimeout)
	defer cancel()
	for _, args := range waits {
		began := time.Now()
		// kubectl wait fails at once on an object that is not there yet.
		err := eventually(ctx, 300*time.Millisecond, func(ctx context.Context) error {
			_, err := c.kubectl(ctx, "", args...)
			return err
		})
		what := args[len(args)-1]
		if err != nil {
			return fmt.Errorf("%s is not ready: %w", what, err)
		}
		if waited := time.Since(began); waited > time.Second {
			say("%s is ready", what)
		}
	}
	return nil
}
