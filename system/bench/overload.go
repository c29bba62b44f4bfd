package main

import (
	"fmt"
	"log"
	"math"
	"strings"
	"time"
)

const (
	overloadTime = 5 * time.Second // of each measurement
	podMemory    = 192             // MiB, the limit of deploy/kubernetes.yaml
)

// goMemoryLimit is what the service derives from the limit of the pod.
var goMemoryLimit = fmt.Sprintf("GOMEMLIMIT=%dMiB", podMemory*7/8)

// point is the result of one load on one subject. Rates are per second.
type point struct {
	traffic, subject, load string
	offered, sent          float64
	good                   float64 // answered 2xx within a second
	refused, failed, late  float64
	p50, p99               float64 // ms, of what was answered 2xx
	peak                   float64 // MiB
}

// overload measures what subjects do with more requests than they can answer.
func overload(s *servers, o options) (string, error) {
	names := []string{service, plain}
	r, subjects, err := s.startAll(names, goMemoryLimit)
	if err != nil {
		return "", err
	}
	var points []point
	for _, traffic := range []struct {
		name string
		mix
	}{{"mixed", mixed}, {"GET", onlyGet}} {
		for _, name := range names {
			got, err := r.overloadOf(subjects[name], traffic.mix, o.short(overloadTime))
			if err != nil {
				return "", fmt.Errorf("%s, %s: %w", traffic.name, name, err)
			}
			for _, p := range got {
				p.traffic = traffic.name
				points = append(points, p)
			}
		}
	}
	if err := o.draw("overload.svg", overloadPicture(points)); err != nil {
		return "", err
	}
	return overloadTable(points), r.finish()
}

// overloadOf offers increasing loads to a subject: first by numbers of clients that wait for their
// answers, then by multiples of the highest rate, by clients that do not wait.
func (r *rig) overloadOf(s *subject, m mix, d time.Duration) (points []point, err error) {
	l := r.load(s, m)
	highest := 0.0
	for _, n := range []int{64, 500, 2000} {
		p, err := r.point(s, fmt.Sprint(n, " connections"), func() outcome {
			return l.closedLoop(n, d)
		})
		if err != nil {
			return nil, err
		}
		if n == 64 {
			highest = p.good
		}
		points = append(points, p)
	}
	for _, times := range []float64{0.5, 1, 2, 5} {
		p, err := r.point(s, fmt.Sprintf("%g x", times), func() outcome {
			return l.openLoop(times*highest, d)
		})
		if err != nil {
			return nil, err
		}
		points = append(points, p)
	}
	return points, nil
}

func (r *rig) point(s *subject, load string, run func() outcome) (p point, err error) {
	if err := s.resetPeak(); err != nil {
		return p, err
	}
	got := run()
	p = point{subject: s.name, load: load, offered: got.rate(), sent: got.where(sent).rate(),
		good: got.where(inTime).rate(), refused: got.where(refused).rate(),
		failed: got.where(failed).rate(), late: got.where(late).rate()}
	times := got.percentiles(50, 99)
	p.p50, p.p99 = times[0], times[1]
	if p.peak, err = s.peak(); err != nil {
		return p, err
	}
	log.Printf("%s, %s: offered %.0f/s, good %.0f/s, p99 %.0f ms, %.0f MiB", s.name, load, p.offered,
		p.good, p.p99, p.peak)
	if err := got.unexpected(); err != nil {
		return p, err
	}
	return p, r.settle()
}

func overloadTable(points []point) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n| requests | subject | load | offered/s | sent/s | good/s "+
		"| refused/s | broken/s | timeouts/s | p50 ms | p99 ms | MiB of %d |\n"+
		"|:--|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n", podMemory)
	for _, p := range points {
		fmt.Fprintf(&b, "| %s | %s | %s |", p.traffic, p.subject, p.load)
		for _, x := range []float64{p.offered, p.sent, p.good, p.refused, p.failed, p.late} {
			b.WriteString(" " + whole(x) + " |")
		}
		fmt.Fprintf(&b, " %s | %s | %.0f |\n", digits(p.p50), digits(p.p99), p.peak)
	}
	return b.String()
}

// panel is a part of a picture: a value of the points of one kind of traffic.
type panel struct {
	traffic, title string
	x, y           scale
	value          func(point) float64
}

// overloadPicture draws goodput and p99 over the offered load of the open loops.
func overloadPicture(points []point) []byte {
	const width, height = 380, 250
	p := newSVG(2*(width+110), 2*(height+110)+60)
	p.text(20, 28, "start", `font-weight="bold" font-size="16"`,
		"Requests offered by clients that do not wait for answers")
	for i, name := range []string{service, plain} {
		x := 480 + 200*float64(i)
		p.path(colorOf(name), `stroke-width="3"`, "M%.0f 23h30", x)
		p.text(x+36, 28, "start", "", "%s", name)
	}
	for column, traffic := range []string{"mixed", "GET"} {
		left := float64(80 + column*(width+100))
		x := scale{math.Inf(1), 0, left, left + width, true}
		most := 0.0
		for _, q := range points {
			if q.traffic == traffic && q.isOpen() {
				x.low, x.high = min(x.low, q.offered*0.8), max(x.high, q.offered*1.25)
				most = max(most, q.good*1.1)
			}
		}
		p.panel(points, panel{traffic, "answered within 1 s, per second", x,
			scale{0, most, 70 + height, 70, false}, func(q point) float64 { return q.good }})
		p.panel(points, panel{traffic, "p99, ms (logarithmic)", x,
			scale{1, 6000, 180 + 2*height, 180 + height, true}, func(q point) float64 { return q.p99 }})
	}
	return p.bytes()
}

func colorOf(subject string) string {
	if subject == service {
		return ours
	}
	return theirs
}

func (p point) isOpen() bool { return strings.HasSuffix(p.load, " x") }

// panel draws the axes and a line per subject.
func (p *svg) panel(points []point, v panel) {
	p.text(v.x.from, v.y.to-10, "start", `font-weight="bold"`, "%s: %s", v.traffic, v.title)
	for _, t := range v.y.ticks() {
		p.path("#ddd", "", "M%.1f %.1fH%.1f", v.x.from, v.y.at(t), v.x.to)
		p.text(v.x.from-6, v.y.at(t)+5, "end", "", "%s", whole(t))
	}
	for t := math.Pow(10, math.Floor(math.Log10(v.x.low))); t < v.x.high; t *= 10 {
		for _, n := range []float64{t, 2 * t, 5 * t} {
			if n < v.x.low || n > v.x.high {
				continue
			}
			p.path("#ddd", "", "M%.1f %.1fV%.1f", v.x.at(n), v.y.from, v.y.to)
			p.text(v.x.at(n), v.y.from+18, "middle", `font-size="12"`, "%s", whole(n))
		}
	}
	p.text((v.x.from+v.x.to)/2, v.y.from+38, "middle", "", "requests offered per second (logarithmic)")
	for _, name := range []string{service, plain} {
		command, line := "M", ""
		for _, q := range points {
			if q.traffic != v.traffic || q.subject != name || !q.isOpen() {
				continue
			}
			x, y := v.x.at(q.offered), v.y.at(v.value(q))
			line += fmt.Sprintf("%s%.1f %.1f", command, x, y)
			command = "L"
			fmt.Fprintf(p, `<circle cx="%.1f" cy="%.1f" r="4" fill="%s"/>`+"\n", x, y, colorOf(name))
		}
		p.path(colorOf(name), `stroke-width="2"`, "%s", line)
	}
}
