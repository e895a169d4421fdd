// Package rdpkit has a real RDP server and a real RDP client at hand for the demo and the end-to-end tests: xrdp with
// Xorg and Xfce, and FreeRDP 3 under Xvfb, both from Debian 13, in root file systems that are built once and cached.
//
// [Ensure] builds or finds the roots. [NewMachine] starts a session host outside any cluster, and [NewClient] a user's
// machine; each is a [Box]: an overlay of a root in namespaces of its own, gone without a trace at Close or when the
// calling process dies, however it dies. Linux only, and as root.
package rdpkit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"rendezvous.dev/rendezvous/hack/cluster/apt"
)

//go:embed recipe
var recipe embed.FS

// Roots are the paths of the cached root file systems. They are read-only for users of this package: work on overlays.
type Roots struct {
	// Desktop is a session host: xrdp, Xorg, Xfce and /usr/local/bin/desktop-entrypoint.
	Desktop string
	// Client is a user's machine: xfreerdp3, Xvfb, xdotool, ImageMagick, openssl.
	Client string
}

// cacheDir is where everything that can be made again is kept, by the XDG base directory rules.
func cacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "rendezvous", "roots"), nil
}

// Ensure returns the root file systems, building those that the cache lacks: about 90 seconds on two cores, with the
// network, when it has none. It may be killed at any point and called again, and by many processes at once.
// RDV_DEBIAN_MIRROR names another Debian mirror than the one that this machine installs from.
func Ensure(ctx context.Context, log *slog.Logger) (Roots, error) {
	cache, common, err := openCache()
	if err != nil {
		return Roots{}, err
	}
	desktop, err := hashRecipe(common, "desktop")
	if err != nil {
		return Roots{}, err
	}
	roots := Roots{
		Desktop: filepath.Join(cache, "desktop-"+desktop),
		Client:  filepath.Join(cache, "client-"+common),
	}
	return roots, ensure(ctx, log, cache, common, "build.sh", map[string]string{"desktop": roots.Desktop, "client": roots.Client})
}

// EnsureMachine returns, as Ensure does, the root of a machine on which an administrator has installed Debian's xrdp and
// configured nothing. It has systemd: see [BoxOptions].
func EnsureMachine(ctx context.Context, log *slog.Logger) (string, error) {
	return ensureOne(ctx, log, "machine")
}

// EnsureDebian12 returns, as Ensure does, the root of a user's machine of the Debian before ours: FreeRDP 2.11, as xfreerdp.
func EnsureDebian12(ctx context.Context, log *slog.Logger) (string, error) {
	return ensureOne(ctx, log, "debian12")
}

// EnsureRemmina returns, as Ensure does, the root of a user's machine with Debian 13's Remmina, and no other RDP client.
func EnsureRemmina(ctx context.Context, log *slog.Logger) (string, error) {
	return ensureOne(ctx, log, "remmina")
}

// EnsureWine returns, as Ensure does, the root of a machine that runs Windows programs, under Debian 13's wine.
func EnsureWine(ctx context.Context, log *slog.Logger) (string, error) {
	return ensureOne(ctx, log, "wine")
}

// ensureOne builds a root that has a folder of its own in the recipe: with a script, or with a list of packages.
func ensureOne(ctx context.Context, log *slog.Logger, kind string) (string, error) {
	cache, common, err := openCache()
	if err != nil {
		return "", err
	}
	script, parts := kind+"/build.sh", []string{kind}
	if _, err := fs.Stat(recipe, "recipe/"+script); err != nil { // the base and some packages
		script = "packages.sh"
		parts = append(parts, script)
	}
	hash, err := hashRecipe(common, parts...)
	if err != nil {
		return "", err
	}
	root := filepath.Join(cache, kind+"-"+hash)
	return root, ensure(ctx, log, cache, common, script, map[string]string{kind: root})
}

// openCache makes the cache's folder, and gives the hash of what all roots have in common.
func openCache() (cache, common string, err error) {
	if cache, err = cacheDir(); err != nil {
		return "", "", err
	}
	if os.Geteuid() != 0 {
		return "", "", errors.New("building and running root file systems needs root")
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", "", err
	}
	common, err = hashRecipe("", "build.sh", "dpkg-slim.cfg")
	return cache, common, err
}

// ensure builds the roots that are missing, by kind, over the base.
func ensure(ctx context.Context, log *slog.Logger, cache, common, script string, targets map[string]string) error {
	missing := false
	for _, target := range targets {
		missing = missing || !exists(target)
	}
	if !missing {
		return nil
	}
	unlock, err := lock(ctx, filepath.Join(cache, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if err := removeUnfinished(cache); err != nil {
		return err
	}
	scripts, err := os.MkdirTemp(cache, "building-recipe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scripts)
	if err := os.CopyFS(scripts, recipe); err != nil {
		return err
	}
	base := filepath.Join(cache, "base-"+common)
	b := builder{cache: cache, script: filepath.Join(scripts, "recipe", "build.sh"), log: log}
	if err := b.build(ctx, "base", base, ""); err != nil {
		return err
	}
	b.script = filepath.Join(scripts, "recipe", script)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for kind, target := range targets {
		wg.Go(func() {
			if err := b.build(ctx, kind, target, base); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// removeUnfinished removes what a killed process was making. Whoever holds the lock knows that nobody is at it any more.
func removeUnfinished(cache string) error {
	stale, err := filepath.Glob(filepath.Join(cache, "building-*"))
	for _, dir := range stale {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

type builder struct {
	cache, script string
	log           *slog.Logger
}

// build makes one root in a directory beside its place and moves it there when it is whole.
func (b builder) build(ctx context.Context, kind, target, base string) error {
	if exists(target) {
		return nil
	}
	if kind == "base" {
		if err := ensureDebootstrap(ctx, b.log); err != nil {
			return err
		}
	}
	b.log.Info("building root file system", "kind", kind)
	begin := time.Now()
	dir, err := os.MkdirTemp(b.cache, "building-"+kind+"-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	logFile := filepath.Join(b.cache, "build-"+kind+".log")
	out, err := os.Create(logFile)
	if err != nil {
		return err
	}
	defer out.Close()
	err = runBound(ctx, out, "unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", b.script, kind, root, base)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		tail, _ := os.ReadFile(logFile)
		return fmt.Errorf("building the %s root: %w (whole log in %s)\n%s", kind, err, logFile, lastLines(tail, 15))
	}
	size, _ := os.ReadFile(root + ".size")
	if err := os.Rename(root, target); err != nil {
		return err
	}
	b.log.Info("built root file system", "kind", kind, "size", strings.TrimSpace(string(size)),
		"took", time.Since(begin).Round(time.Second).String())
	return nil
}

// ensureDebootstrap installs the one program of the host that the recipe needs.
func ensureDebootstrap(ctx context.Context, log *slog.Logger) error {
	if _, err := exec.LookPath("debootstrap"); err == nil {
		return nil
	}
	log.Info("installing debootstrap")
	if err := apt.Install(ctx, "debootstrap"); err != nil {
		return fmt.Errorf("debootstrap is missing: %w", err)
	}
	return nil
}

// hashRecipe names what the given files or folders of the recipe, the mirror and parent lead to.
func hashRecipe(parent string, names ...string) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%s\n", parent, os.Getenv("RDV_DEBIAN_MIRROR"))
	for _, name := range names {
		err := fs.WalkDir(recipe, "recipe/"+name, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			data, err := recipe.ReadFile(path)
			fmt.Fprintf(h, "%s %d\n%s", path, len(data), data)
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:12], nil
}

// lock takes the lock on file, waiting for other processes, and returns what releases it.
func lock(ctx context.Context, file string) (unlock func(), err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", file, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func lastLines(text []byte, n int) string {
	lines := strings.Split(string(bytes.TrimSpace(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
