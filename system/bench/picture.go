package main

import (
	"fmt"
	"math"
	"strings"
)

const (
	ours   = "#2a7d4f"
	theirs = "#b0562b"
	grey   = "#8a93a0"
)

// scale maps values to a range of pixels.
type scale struct {
	low, high  float64 // values
	from, to   float64 // pixels
	logarithms bool
}

// at returns the pixel of a value. Values outside the scale are moved to its ends.
func (s scale) at(value float64) float64 {
	low, high := s.low, s.high
	value = min(max(value, low), high)
	if s.logarithms {
		low, high, value = math.Log(low), math.Log(high), math.Log(value)
	}
	return s.from + (value-low)/(high-low)*(s.to-s.from)
}

// ticks returns round values on the scale, at most about eight.
func (s scale) ticks() (values []float64) {
	if s.logarithms {
		for v := math.Pow(10, math.Ceil(math.Log10(s.low)-1e-9)); v <= s.high*1.0001; v *= 10 {
			values = append(values, v)
		}
		return values
	}
	step := math.Pow(10, math.Floor(math.Log10(s.high)))
	for ; s.high/step < 4; step /= 2 {
	}
	for v := s.low; v <= s.high; v += step {
		values = append(values, v)
	}
	return values
}

// svg is a picture.
type svg struct{ strings.Builder }

func newSVG(width, height int) *svg {
	p := &svg{}
	fmt.Fprintf(p, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" `+
		`font-family="sans-serif" font-size="14"><rect width="%d" height="%d" fill="#fff"/>`+"\n",
		width, height, width, height)
	return p
}

// text writes text. anchor is start, middle or end; more are attributes.
func (p *svg) text(x, y float64, anchor, more, format string, args ...any) {
	text := strings.NewReplacer("&", "&amp;", "<", "&lt;").Replace(fmt.Sprintf(format, args...))
	fmt.Fprintf(p, `<text x="%.1f" y="%.1f" text-anchor="%s" %s>%s</text>`+"\n",
		x, y, anchor, more, text)
}

func (p *svg) path(color, more, format string, args ...any) {
	fmt.Fprintf(p, `<path d="%s" stroke="%s" fill="none" %s/>`+"\n", fmt.Sprintf(format, args...),
		color, more)
}

func (p *svg) bytes() []byte { return []byte(p.String() + "</svg>\n") }

// bars returns a picture of the service's rates as multiples of the other subjects'.
func bars(all results) []byte {
	const row, top, left, width = 26, 60, 370, 420
	rows := 0
	for _, w := range workloads {
		rows += len(w.subjects) - 1
	}
	bottom := float64(top + rows*row)
	p := newSVG(left+width+70, int(bottom)+60)
	p.text(20, 28, "start", `font-weight="bold" font-size="16"`,
		"Requests per second of this service, as a multiple of an alternative's")
	x := scale{0.1, 10_000, left, left + width, true}
	for _, name := range x.ticks() {
		p.path("#ddd", "", "M%.1f %dV%.1f", x.at(name), top-8, bottom)
		p.text(x.at(name), bottom+18, "middle", "", "%g", name)
	}
	p.text(left+width/2, bottom+44, "middle", "",
		"multiple (logarithmic scale; bar: median, line: range of all rounds)")
	y := float64(top)
	for _, w := range workloads {
		for _, name := range w.subjects[1:] {
			middle, least, most := spread(ratios(all[w.name], name))
			color := grey
			if middle >= 1 {
				color = ours
			}
			p.text(left-10, y+14, "end", "", "%s: %s", w.name, name)
			from, to := min(x.at(1), x.at(middle)), max(x.at(1), x.at(middle))
			fmt.Fprintf(p, `<rect x="%.1f" y="%.1f" width="%.1f" height="18" fill="%s"/>`+"\n",
				from, y, to-from, color)
			p.path("#111", `stroke-width="1.5"`, "M%.1f %.1fH%.1f", x.at(least), y+9, x.at(most))
			p.text(max(x.at(most), x.at(1))+8, y+14, "start", "", "%s", digits(middle))
			y += row
		}
	}
	p.path("#c33", `stroke-width="1.5"`, "M%.1f %dV%.1f", x.at(1), top-8, bottom)
	return p.bytes()
}
