package main

import (
	"fmt"
	"math"
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

// columns are those of the table of compare, after the ratio.
var columns = []struct {
	title string
	value func(measurement) float64
	of    func(subject string) bool // whether the subject has the value
}{
	{"p50 ms", func(m measurement) float64 { return m.P50 },
		func(s string) bool { return s != pgbench && s != onlyArgon }},
	{"p99 ms", func(m measurement) float64 { return m.P99 },
		func(s string) bool { return s != pgbench && s != onlyArgon }},
	{"server us", func(m measurement) float64 { return m.server },
		func(s string) bool { return s != pgbench && s != onlyArgon }},
	{"database us", func(m measurement) float64 { return m.database },
		func(s string) bool { return s != noDatabase && s != onlyArgon }},
}

// compareTable returns the results as Markdown.
func compareTable(all results) string {
	var b strings.Builder
	b.WriteString("\n| request | subject | per second | this service has | range |")
	for _, c := range columns {
		b.WriteString(" " + c.title + " |")
	}
	b.WriteString("\n|:--|:--|--:|--:|:--|--:|--:|--:|--:|\n")
	for _, w := range workloads {
		for _, name := range w.subjects {
			got := all[w.name][name]
			ratio, spreading := "", ""
			if name != service {
				middle, least, most := spread(ratios(all[w.name], name))
				ratio = digits(middle) + " x"
				spreading = digits(least) + " to " + digits(most)
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |", code(w.name), name,
				digits(median(got, func(m measurement) float64 { return m.Rate })), ratio, spreading)
			for _, c := range columns {
				value := ""
				if c.of(name) {
					value = digits(median(got, c.value))
				}
				b.WriteString(" " + value + " |")
			}
			b.WriteString("\n")
		}
	}
	return b.String()
}

// code formats the name of a request.
func code(name string) string {
	if strings.Contains(name, "/") {
		return "`" + name + "`"
	}
	return name
}

// digits formats a value with about three significant digits, and commas between thousands.
func digits(x float64) string {
	switch {
	case x < 10:
		return fmt.Sprintf("%.2f", x)
	case x < 100:
		return fmt.Sprintf("%.1f", x)
	case x < 1000:
		return whole(x)
	case x < 10_000:
		return whole(math.Round(x/10) * 10)
	}
	return whole(math.Round(x/100) * 100)
}

// whole formats a rounded value with commas between thousands.
func whole(x float64) string {
	text := fmt.Sprintf("%.0f", x)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
