package main

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// spread returns the median, the least and the greatest of some values.
func spread(values []float64) (median, least, most float64) {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2], values[0], values[len(values)-1]
}

// ratios returns the service's rate as a multiple of a subject's, by round.
func ratios(subjects map[string][]measurement, name string) (of []float64) {
	for i, m := range subjects[name] {
		of = append(of, subjects[service][i].Rate/m.Rate)
	}
	return of
}

// median returns the median of one value of the measurements.
func median(measurements []measurement, value func(measurement) float64) float64 {
	var values []float64
	for _, m := range measurements {
		values = append(values, value(m))
	}
	middle, _, _ := spread(values)
	return middle
}

func p50(m measurement) float64 { return m.P50 }
func p99(m measurement) float64 { return m.P99 }

// report returns the results as Markdown.
func report(all results) string {
	var b strings.Builder
	b.WriteString("\n| request | subject | per second | this service has | p50 ms | p99 ms " +
		"| CPU us | PostgreSQL us |\n|:--|:--|--:|--:|--:|--:|--:|--:|\n")
	for _, w := range workloads {
		for _, name := range w.subjects {
			got := all[w.name][name]
			middle, least, most := spread(ratios(all[w.name], name))
			fmt.Fprintf(&b, "| %s | %s | %.0f | %.2f (%.2f to %.2f) | %.2f | %.2f | %.0f | %.0f |\n",
				w.name, name, median(got, func(m measurement) float64 { return m.Rate }),
				middle, least, most, median(got, p50), median(got, p99),
				median(got, func(m measurement) float64 { return m.cpu }),
				median(got, func(m measurement) float64 { return m.postgres }))
		}
	}
	return b.String()
}

// drawing returns an SVG of the service's rates as multiples of the other subjects'.
func drawing(all results) []byte {
	const row, left, width = 26, 330, 330
	scale := func(ratio float64) float64 { return min(ratio, 4) / 4 * width }
	var bars strings.Builder
	y := 40
	for _, w := range workloads {
		for _, name := range w.subjects {
			if name == service {
				continue
			}
			middle, least, most := spread(ratios(all[w.name], name))
			color := "#8a93a0"
			if middle >= 1 {
				color = "#2a7d4f"
			}
			fmt.Fprintf(&bars, `<text x="%d" y="%d" text-anchor="end">%s vs %s</text>`,
				left-8, y+13, w.name, name)
			fmt.Fprintf(&bars, `<rect x="%d" y="%d" width="%.1f" height="16" fill="%s"/>`,
				left, y, scale(middle), color)
			fmt.Fprintf(&bars, `<path d="M%.1f %dH%.1f" stroke="#111" stroke-width="1.5"/>`,
				left+scale(least), y+8, left+scale(most))
			fmt.Fprintf(&bars, `<text x="%d" y="%d">%.2f</text>`+"\n", left+width+8, y+13, middle)
			y += row
		}
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 730 %d" `+
		`font-family="sans-serif" font-size="13"><rect width="730" height="%d" fill="#fff"/>`+
		`<text x="20" y="24" font-weight="bold">Requests per second, as a multiple of the other's `+
		"(line: all rounds; bars end at 4)</text>\n", y+10, y+10)
	b.WriteString(bars.String())
	fmt.Fprintf(&b, `<path d="M%.1f 34V%d" stroke="#c33" stroke-dasharray="3 3"/></svg>`+"\n",
		left+scale(1), y)
	return b.Bytes()
}
