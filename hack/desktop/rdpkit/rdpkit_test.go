package rdpkit

import (
	"image"
	"image/color"
	"net/netip"
	"slices"
	"testing"
)

func TestParseListeners(t *testing.T) {
	const header = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
	for _, test := range []struct {
		name, table string
		want        []netip.AddrPort
	}{
		{"only a header", header, nil},
		{"loopback", header + "   0: 0100007F:0D3D 00000000:0000 0A 00000000:00000000 00:00000000 00000000   103\n",
			[]netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:3389")}},
		{"every address", header + "   0: 00000000:0050 00000000:0000 0A 0\n", []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:80")}},
		{"IPv6 loopback", header + "   0: 00000000000000000000000001000000:1716 00000000000000000000000000000000:0000 0A 0\n",
			[]netip.AddrPort{netip.MustParseAddrPort("[::1]:5910")}},
		{"established", header + "   0: 0100007F:0D3D 0100007F:9C40 01 0\n", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := parseListeners(test.table)
			if err != nil || !slices.Equal(got, test.want) {
				t.Errorf("got %v, %v; want %v", got, err, test.want)
			}
		})
	}
	if _, err := parseListeners(header + "   0: nonsense:0050 0:0 0A\n"); err == nil {
		t.Error("an address that is none was taken")
	}
}

func TestPicture(t *testing.T) {
	desk, text := color.RGBA{R: 10, G: 180, B: 100, A: 255}, color.RGBA{R: 16, G: 20, B: 24, A: 255}
	img := image.NewRGBA(image.Rect(5, 5, 15, 15))
	for i := range 100 {
		c := desk
		if i < 25 {
			c = text
		}
		if i == 99 {
			c.R += tolerance // what a lossy codec may do
		}
		if i == 98 {
			c.R += tolerance + 1
		}
		img.SetRGBA(5+i%10, 5+i/10, c)
	}
	p := Picture{Image: img}
	if got := p.Fraction(desk); got != 0.74 {
		t.Errorf("Fraction(desk) = %v, want 0.74", got)
	}
	if got := p.Fraction(color.RGBA{R: 255, A: 255}); got != 0 {
		t.Errorf("a colour that is not there has fraction %v", got)
	}
	if c, share := p.Dominant(); c != desk || share != 0.73 {
		t.Errorf("Dominant() = %v, %v; want %v, 0.73", c, share, desk)
	}
	if _, share := (Picture{}).Dominant(); share != 0 || (Picture{}).Fraction(desk) != 0 {
		t.Error("no picture has no colours")
	}
	if Hex(desk) != "#0ab464" {
		t.Errorf("Hex = %s", Hex(desk))
	}
}

func TestRecipeHash(t *testing.T) {
	common, err := hashRecipe("", "build.sh", "dpkg-slim.cfg")
	if err != nil {
		t.Fatal(err)
	}
	desktop, err := hashRecipe(common, "desktop")
	if err != nil {
		t.Fatal(err)
	}
	if other, _ := hashRecipe("another base", "desktop"); other == desktop {
		t.Error("a changed base does not rebuild the desktop")
	}
	t.Setenv("RDV_DEBIAN_MIRROR", "http://mirror.example/debian")
	if other, _ := hashRecipe(common, "desktop"); other == desktop {
		t.Error("another mirror leads to the same root")
	}
	if _, err := hashRecipe("", "missing"); err == nil {
		t.Error("a missing part of the recipe goes unnoticed")
	}
}
