package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"rendezvous.dev/rendezvous/hack/cluster/imagetar"
)

const (
	modulePath        = "rendezvous.dev/rendezvous/hack/cluster"
	kubernetesVersion = "v1.36.3"
	certManagerModule = "github.com/cert-manager/cert-manager"
)

// artifact is one build whose result is kept in the cache under a key made from
// its sources, so that a fresh clone with the same sources builds nothing.
type artifact struct {
	name     string   // names the cache entry
	dir      string   // the module's directory, relative to this one
	sources  []string // directories or files below dir that decide the key
	packages []string // what go build gets; each makes one program
	extra    func(ctx context.Context, source, out string) error
}

var (
	kubeArtifact = artifact{
		name: "kube", dir: "kube", sources: []string{"."},
		packages: []string{".", "./coredns", "./certmanager"}, extra: collectCRDs,
	}
	dexArtifact    = artifact{name: "dex", dir: "dex", sources: []string{"."}, packages: []string{"."}}
	netpolArtifact = artifact{name: "netpol", dir: "netpol", sources: []string{"."}, packages: []string{"."}}
	// The provisioner has a module of its own, as it is built against an earlier Kubernetes.
	localPathArtifact = artifact{
		name: "localpath", dir: "localpath", sources: []string{"."},
		packages: []string{"github.com/rancher/local-path-provisioner", "./volume"},
	}
	pauseArtifact = artifact{name: "pause", dir: ".", sources: []string{"pause"}, packages: []string{"./pause"}}
)

// artifacts says where the built things are.
type artifacts struct{ kube, dex, netpol, localPath, pause string }

// ldflags strips the programs and tells Kubernetes its version, which clients
// and the kubelet's skew checks read.
func ldflags() string {
	parts := strings.Split(strings.TrimPrefix(kubernetesVersion, "v"), ".")
	flags := []string{"-s", "-w"}
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags = append(flags, "-X", pkg+".gitVersion="+kubernetesVersion, "-X", pkg+".gitMajor="+parts[0],
			"-X", pkg+".gitMinor="+parts[1], "-X", pkg+".gitTreeState=clean")
	}
	return strings.Join(flags, " ")
}

// sourceDir finds hack/cluster from the working directory: "go -C hack/cluster
// run ." starts in it.
func sourceDir() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		for _, candidate := range []string{dir, filepath.Join(dir, "hack", "cluster")} {
			data, err := os.ReadFile(filepath.Join(candidate, "go.mod"))
			if err == nil && strings.HasPrefix(string(data), "module "+modulePath+"\n") {
				return candidate, nil
			}
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("%s is not in a clone of the project: run \"go -C hack/cluster run . …\" at its root", wd)
		}
	}
}

// buildAll builds what is not in the cache.
func buildAll(ctx context.Context) (artifacts, error) {
	var a artifacts
	for _, build := range []struct {
		into *string
		what artifact
	}{{&a.pause, pauseArtifact}, {&a.dex, dexArtifact}, {&a.netpol, netpolArtifact}, {&a.localPath, localPathArtifact}, {&a.kube, kubeArtifact}} {
		dir, err := build.what.ensure(ctx)
		if err != nil {
			return a, err
		}
		*build.into = dir
	}
	return a, nil
}

// ensure returns the cache directory with the artifact, building it if need be.
func (a artifact) ensure(ctx context.Context) (string, error) {
	source, err := sourceDir()
	if err != nil {
		return "", err
	}
	source = filepath.Join(source, a.dir)
	key, err := a.key(source)
	if err != nil {
		return "", err
	}
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, a.name+"-"+key)
	if isDir(dir) {
		return dir, nil
	}
	unlock, err := lock(ctx, filepath.Join(cache, "lock")) // one build at a time; the second finds the first's result
	if err != nil {
		return "", err
	}
	defer unlock()
	if isDir(dir) {
		return dir, nil
	}
	if a.name == kubeArtifact.name {
		say("building Kubernetes, CoreDNS and cert-manager: some ten minutes if Go's build cache is cold")
	} else {
		say("building %s", a.name)
	}
	temporary, err := os.MkdirTemp(cache, ".building-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temporary)
	args := append([]string{"-C", source, "build", "-trimpath", "-ldflags", ldflags(), "-o", temporary + "/"}, a.packages...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", a.name, err, tail(out, 4000))
	}
	if a.extra != nil {
		if err := a.extra(ctx, source, temporary); err != nil {
			return "", err
		}
	}
	if err := os.Chmod(temporary, 0o755); err != nil {
		return "", err
	}
	if err := os.Rename(temporary, dir); err != nil {
		return "", err
	}
	prune(cache, a.name)
	return dir, nil
}

// key hashes everything that decides the result.
func (a artifact) key(source string) (string, error) {
	sum := sha256.New()
	fmt.Fprintln(sum, runtime.Version(), runtime.GOARCH, ldflags(), a.packages)
	for _, part := range a.sources {
		err := filepath.WalkDir(filepath.Join(source, part), func(file string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			base := filepath.Base(file)
			if strings.HasSuffix(base, "_test.go") || filepath.Ext(base) != ".go" && base != "go.mod" && base != "go.sum" {
				return nil
			}
			name, err := filepath.Rel(source, file)
			if err != nil {
				return err
			}
			data, err := os.ReadFile(file)
			fmt.Fprintln(sum, name, len(data))
			sum.Write(data)
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(sum.Sum(nil))[:12], nil
}

// prune keeps the three newest entries of an artifact: other clones on this
// machine may stand at other commits.
func prune(cache, name string) {
	entries, _ := filepath.Glob(filepath.Join(cache, name+"-*"))
	slices.SortFunc(entries, func(a, b string) int { return modified(b).Compare(modified(a)) })
	for _, old := range entries[min(3, len(entries)):] {
		os.RemoveAll(old)
	}
}

// collectCRDs puts cert-manager's resource definitions beside its program, from
// the very module that the program is built from.
func collectCRDs(ctx context.Context, source, out string) error {
	dir, err := command(ctx, "go", "-C", source, "list", "-m", "-f", "{{.Dir}}", certManagerModule)
	if err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(dir), "deploy", "crds", "*.yaml"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("module %s has no deploy/crds (%v)", certManagerModule, err)
	}
	var all []byte
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		all = append(append(all, "---\n"...), data...)
	}
	return os.WriteFile(filepath.Join(out, "crds.yaml"), all, 0o644)
}

// image is a container image of one static program.
type image struct{ ref, tar string }

// programImage packs program from an artifact's directory, once: the image's tag
// is the directory's key.
func programImage(dir, program string) (image, error) {
	base := filepath.Base(dir)
	img := image{ref: "localhost/rdv-cluster/" + program + ":" + base[strings.LastIndex(base, "-")+1:]}
	// The tar holds its reference, so a tar of another reference won't do.
	img.tar = filepath.Join(dir, strings.NewReplacer("/", "_", ":", "_").Replace(img.ref)+".tar")
	if _, err := os.Stat(img.tar); err == nil {
		return img, nil
	}
	return img, imagetar.WriteFile(img.tar, imagetar.Image{
		Ref: img.ref,
		Files: []imagetar.File{
			{Path: "/" + program, Source: filepath.Join(dir, program), Mode: 0o755},
			{Path: "/etc/passwd", Data: []byte("root:x:0:0::/:/none\nnonroot:x:65532:65532::/:/none\n")},
			{Path: "/tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
		},
		Entrypoint: []string{"/" + program},
		User:       "65532:65532",
	})
}

// linkOrCopy makes to the same file as from: a hard link where both are on one
// file system, so that removing either leaves the other.
func linkOrCopy(from, to string) error {
	if a, err := os.Stat(from); err == nil {
		if b, err := os.Stat(to); err == nil && os.SameFile(a, b) {
			return nil
		}
	}
	if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if os.Link(from, to) == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// lock takes an exclusive lock on file, waiting for its holder. The kernel frees
// it when this process ends, however it ends.
func lock(ctx context.Context, file string) (unlock func(), err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	told := false
	err = eventually(ctx, lockInterval, func(context.Context) error {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err != nil && !told {
			say("waiting for another run of this command (lock %s)", file)
			told = true
		}
		return err
	})
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", file, err)
	}
	return func() { f.Close() }, nil
}

func modified(name string) time.Time {
	info, err := os.Stat(name)
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}
