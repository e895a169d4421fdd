// Package images builds the product's container images without a container engine: one static binary each, in a
// one-layer docker-archive tar. An image's tag is made from its binary's content, so that a changed program rolls its
// pods and an unchanged one does not.
package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"rendezvous.dev/rendezvous/hack/cluster/imagetar"
)

// Names are the product's images, each of the binary in cmd/NAME.
var Names = []string{"manager", "broker", "gateway", "relay", "agent"}

// nonRoot is the user that all our images run as, the one that distroless images use.
const nonRoot = 65532

// Image is one image, ready to load.
type Image struct {
	Name string
	Ref  string
	Tar  string
}

// Build compiles the binaries in the source tree at root into root/bin/linux and packs each into a tar in dir.
func Build(ctx context.Context, root, dir string) ([]Image, error) {
	bin := filepath.Join(root, "bin", "linux")
	args := []string{"build", "-trimpath", "-ldflags=-s -w", "-o", bin + "/"}
	for _, name := range Names {
		args = append(args, "./cmd/"+name)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Stderr = root, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("images: go build in %s: %w", root, err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	var built []Image
	for _, name := range Names {
		img, err := pack(name, filepath.Join(bin, name), dir)
		if err != nil {
			return nil, err
		}
		built = append(built, img)
	}
	return built, nil
}

func pack(name, binary, dir string) (Image, error) {
	data, err := os.ReadFile(binary)
	if err != nil {
		return Image{}, fmt.Errorf("images: %w", err)
	}
	sum := sha256.Sum256(data)
	tag := hex.EncodeToString(sum[:6])
	img := Image{Name: name, Ref: "rendezvous/" + name + ":" + tag, Tar: filepath.Join(dir, name+"-"+tag+".tar")}
	if _, err := os.Stat(img.Tar); err == nil {
		return img, nil
	}
	old, _ := filepath.Glob(filepath.Join(dir, name+"-*.tar"))
	for _, f := range old {
		os.Remove(f)
	}
	return img, write(img, data)
}

// Variant packs a binary into an image of another tag and with a file more, into dir.
func Variant(name, binary, dir, tag string) (Image, error) {
	data, err := os.ReadFile(binary)
	if err != nil {
		return Image{}, fmt.Errorf("images: %w", err)
	}
	img := Image{Name: name, Ref: "rendezvous/" + name + ":" + tag, Tar: filepath.Join(dir, "variant-"+name+".tar")}
	return img, write(img, data, imagetar.File{Path: "/variant", Data: []byte(tag + "\n"), Mode: 0o644})
}

func write(img Image, binary []byte, more ...imagetar.File) error {
	err := imagetar.WriteFile(img.Tar, imagetar.Image{
		Ref:        img.Ref,
		Files:      append([]imagetar.File{{Path: "/" + img.Name, Data: binary, Mode: 0o755}}, more...),
		Entrypoint: []string{"/" + img.Name},
		User:       fmt.Sprintf("%d:%d", nonRoot, nonRoot),
	})
	if err != nil {
		return fmt.Errorf("images: %s: %w", img.Name, err)
	}
	return nil
}
