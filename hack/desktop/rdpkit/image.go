package rdpkit

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"rendezvous.dev/rendezvous/hack/cluster/imagetar"
)

// ImageRef is the name of the session host's image.
const ImageRef = "rendezvous/desktop:dev"

// Image returns the path of a docker-archive of the session host, for `ctr images import`. It is kept in the cache beside
// the root that it is made of; copy it, don't change it.
func Image(ctx context.Context, log *slog.Logger, roots Roots) (string, error) {
	file := roots.Desktop + ".tar"
	if exists(file) {
		return file, nil
	}
	cache := filepath.Dir(file)
	unlock, err := lock(ctx, filepath.Join(cache, "lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if exists(file) {
		return file, nil
	}
	if err := removeUnfinished(cache); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(cache, "building-image-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	begin := time.Now()
	unfinished := filepath.Join(dir, "image.tar")
	if err := imagetar.WriteFile(unfinished, imagetar.Image{
		Ref:        ImageRef,
		Root:       roots.Desktop,
		Entrypoint: []string{"/usr/local/bin/desktop-entrypoint"},
		Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"},
	}); err != nil {
		return "", err
	}
	if err := os.Rename(unfinished, file); err != nil {
		return "", err
	}
	log.Info("packed image", "ref", ImageRef, "took", time.Since(begin).Round(100*time.Millisecond).String())
	return file, nil
}
