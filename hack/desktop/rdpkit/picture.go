package rdpkit

import (
	"fmt"
	"image"
	"image/color"
	"math/rand/v2"
	"os"
)

// Picture is a screenshot, decoded and as it came.
type Picture struct {
	image.Image
	PNG []byte
}

// tolerance is how far each channel may be off and still count: RDP's codecs lose a little.
const tolerance = 12

// Fraction of the pixels, 0 to 1, that look like want.
func (p Picture) Fraction(want color.RGBA) float64 {
	if p.Image == nil || p.Bounds().Empty() {
		return 0
	}
	n := 0
	p.each(func(c color.RGBA) {
		if near(c.R, want.R) && near(c.G, want.G) && near(c.B, want.B) {
			n++
		}
	})
	return float64(n) / float64(p.Bounds().Dx()*p.Bounds().Dy())
}

// Dominant is the most frequent colour and the fraction of pixels, 0 to 1, that have exactly it.
func (p Picture) Dominant() (color.RGBA, float64) {
	if p.Image == nil || p.Bounds().Empty() {
		return color.RGBA{}, 0
	}
	count := map[color.RGBA]int{}
	p.each(func(c color.RGBA) { count[c]++ })
	var most color.RGBA
	for c, n := range count {
		if n > count[most] {
			most = c
		}
	}
	return most, float64(count[most]) / float64(p.Bounds().Dx()*p.Bounds().Dy())
}

func (p Picture) each(f func(color.RGBA)) {
	b := p.Bounds()
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			f(color.RGBAModel.Convert(p.At(x, y)).(color.RGBA))
		}
	}
}

// Save writes the picture as PNG.
func (p Picture) Save(file string) error { return os.WriteFile(file, p.PNG, 0o644) }

func near(a, b uint8) bool { return max(a, b)-min(a, b) <= tolerance }

// Hex is #rrggbb, as RDV_DESKTOP_COLOR takes it.
func Hex(c color.RGBA) string { return fmt.Sprintf("#%02x%02x%02x", c.R, c.G, c.B) }

// RandomColor is a colour that no screen shows by chance: away from black, white and grey, and not the desktop's own.
func RandomColor() color.RGBA {
	for {
		// One strong channel, one middling, one weak, in any order.
		v := []uint8{uint8(120 + rand.N(60)), uint8(60 + rand.N(50)), uint8(10 + rand.N(40))}
		rand.Shuffle(3, func(i, j int) { v[i], v[j] = v[j], v[i] })
		if near(v[0], 0x1f) && near(v[1], 0x4e) && near(v[2], 0x79) {
			continue // as in desktop-welcome
		}
		return color.RGBA{R: v[0], G: v[1], B: v[2], A: 255}
	}
}
