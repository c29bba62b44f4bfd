package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/argon2"
)

const (
	connections = 64
	creators    = 16 // connections that create users; with more, requests would wait too long
)

// workload is a kind of request, and the subjects that receive it. Its script is one of wrk.
type workload struct {
	name     string
	script   string
	subjects []string
}

var workloads = []workload{
	{"GET /users/{id}", `wrk.format("GET", "/users/" .. math.random(1, users))`,
		[]string{service, plain, noDatabase, pgbench}},
	{"GET /users", `wrk.format("GET", "/users")`, []string{service, plain}},
	{"GET /users?after=", `wrk.format("GET", "/users?after=" .. math.random(1, users))`,
		[]string{service, plain}},
	{"PUT /users/{id}", `wrk.format("PUT", "/users/" .. math.random(1, users), header,
		'{"name": "N' .. math.random(1, 1e9) .. '"}')`, []string{service, plain, pgbench}},
	{"POST /users", `wrk.format("POST", "/users", header,
		'{"name": "John", "surname": "Doe", "password": "correct horse"}')`,
		[]string{service, onlyArgon}},
}

// measurement is the result of one subject in one round.
type measurement struct {
	Rate     float64 `json:"rate"` // per second
	P50      float64 `json:"p50"`  // ms
	P99      float64 `json:"p99"`  // ms
	Bad      int     `json:"bad"`  // answers other than 2xx, and requests without an answer
	cpu      float64 // us of the server per request
	postgres float64 // us of PostgreSQL per request
}

// results are the measurements of all rounds, by workload and subject.
type results map[string]map[string][]measurement

// compare measures the subjects in turn, round after round, so that other work of the machine
// affects all of them.
func compare(s *servers, o options) error {
	r, err := s.newRig("compare", o.users, service, plain, noDatabase)
	if err != nil {
		return err
	}
	m := &meter{rig: r, time: o.time}
	if m.argon, err = r.argonParameters(); err != nil {
		return err
	}
	version, err := s.postgres.Version(context.Background())
	if err != nil {
		return err
	}
	all, latency := make(results), make(map[string][]measurement)
	for round := range o.rounds {
		log.Printf("round %d of %d", round+1, o.rounds)
		if err := m.round(round, all); err != nil {
			return err
		}
		tenth := all[workloads[0].name][service][0].Rate / 10
		for _, name := range []string{service, plain} {
			paced, err := m.paced(r.subjects[name].url, tenth)
			if err != nil {
				return err
			}
			latency[name] = append(latency[name], paced)
		}
	}
	resident, err := m.resident()
	if err != nil {
		return err
	}
	if err := r.check(); err != nil {
		return err
	}
	if err := r.stop(); err != nil {
		return err
	}
	fmt.Fprint(o.out, report(all, latency))
	fmt.Fprintf(o.out, "The service had %.0f MB at most.\n\n%s, PostgreSQL %s, %d users, %d connections, "+
		"%d rounds of %v, %s, %d cores\n", resident, time.Now().UTC().Format(time.DateOnly),
		version, o.users, connections, o.rounds, o.time, runtime.Version(), runtime.NumCPU())
	return os.WriteFile(o.svg, drawing(all), 0o644)
}

// meter measures the subjects of a rig.
type meter struct {
	*rig
	time  time.Duration
	argon argonParameters
}

// round measures every subject of every workload once. Each round begins with another subject.
func (m *meter) round(round int, all results) error {
	for _, w := range workloads {
		if all[w.name] == nil {
			all[w.name] = make(map[string][]measurement)
		}
		for i := range w.subjects {
			name := w.subjects[(i+round)%len(w.subjects)]
			got, err := m.measure(w, name)
			if err == nil && got.Bad > 0 {
				err = fmt.Errorf("%d bad answers", got.Bad)
			}
			if err != nil {
				return fmt.Errorf("%s, %s: %w", w.name, name, err)
			}
			all[w.name][name] = append(all[w.name][name], got)
			log.Printf("%s, %s: %.0f/s", w.name, name, got.Rate)
		}
	}
	return nil
}

func (m *meter) measure(w workload, name string) (got measurement, err error) {
	pid := 0
	if s := m.subjects[name]; s != nil {
		pid = s.PID()
	}
	serverCPU, postgresCPU := m.processorTime(pid)
	switch name {
	case pgbench:
		got, err = m.pgbench(w)
	case onlyArgon:
		got.Rate = m.argonRate()
	default:
		got, err = m.wrk(w, m.subjects[name].url)
	}
	serverEnd, postgresEnd := m.processorTime(pid)
	requests := got.Rate * m.time.Seconds()
	got.cpu = float64((serverEnd - serverCPU).Microseconds()) / requests
	got.postgres = float64((postgresEnd - postgresCPU).Microseconds()) / requests
	time.Sleep(time.Second) // for events and writes that are still under way
	return got, err
}

const wrkScript = `
math.randomseed(%d)
users, header = %d, {["Content-Type"] = "application/json"}
request = function() return %s end
done = function(summary, latency)
	local e = summary.errors
	io.write(string.format('\n{"rate": %%f, "p50": %%f, "p99": %%f, "bad": %%d}\n',
		summary.requests / summary.duration * 1e6, latency:percentile(50) / 1000,
		latency:percentile(99) / 1000, e.status + e.timeout + e.read + e.write + e.connect))
end
`

func (m *meter) wrk(w workload, url string) (got measurement, err error) {
	script := filepath.Join(m.Dir, "wrk.lua")
	text := fmt.Sprintf(wrkScript, time.Now().UnixNano()%1e9, m.users, w.script)
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		return got, err
	}
	n := connections
	if strings.HasPrefix(w.name, "POST") {
		n = creators
	}
	output, err := exec.Command("wrk", "-t1", "--timeout", "20s", fmt.Sprintf("-c%d", n),
		fmt.Sprintf("-d%ds", int(m.time.Seconds())), "-s", script, url).Output()
	if err != nil {
		return got, err
	}
	lines := bytes.Split(bytes.TrimSpace(output), []byte("\n"))
	return got, json.Unmarshal(lines[len(lines)-1], &got)
}

// pgbench runs the statement that a request needs. For reads, it returns the best of several
// numbers of clients.
func (m *meter) pgbench(w workload) (best measurement, err error) {
	sql, clients := "SELECT "+userColumns+" FROM users WHERE id = :id;", []int{8, 16}
	if strings.HasPrefix(w.name, "PUT") {
		sql = "UPDATE users SET name = 'N' || :n WHERE id = :id RETURNING " + userColumns + ";"
		clients = []int{connections}
	}
	script := filepath.Join(m.Dir, "pgbench.sql")
	text := fmt.Sprintf("\\set id random(1, %d)\n\\set n random(1, 1000000000)\n%s\n", m.users, sql)
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		return best, err
	}
	for _, n := range clients {
		output, err := exec.Command("pgbench", "--no-vacuum", "--protocol=prepared", "--jobs=2",
			fmt.Sprintf("--client=%d", n), fmt.Sprintf("--time=%d", int(m.time.Seconds())),
			"--file="+script, m.rig.postgres.URL("bench", m.database)).Output()
		if err != nil {
			return best, err
		}
		var got measurement
		for line := range strings.Lines(string(output)) {
			fmt.Sscanf(line, "tps = %f", &got.Rate)
			fmt.Sscanf(line, "latency average = %f ms", &got.P50)
		}
		if got.Rate > best.Rate {
			best = got
		}
	}
	return best, nil
}

// argonParameters are the cost of a hash.
type argonParameters struct {
	memory, time uint32
	threads      uint8
}

// argonParameters returns the cost of the service's hashes, as a hash in the database states it.
func (r *rig) argonParameters() (p argonParameters, err error) {
	err = send(http.MethodPost, r.subjects[service].url+"/users",
		`{"name": "John", "surname": "Doe", "password": "correct horse"}`)
	if err != nil {
		return p, err
	}
	var hash string
	err = r.db.QueryRow(context.Background(),
		"SELECT password FROM users ORDER BY id DESC LIMIT 1").Scan(&hash)
	if err == nil {
		_, err = fmt.Sscanf(hash, "$argon2id$v=19$m=%d,t=%d,p=%d$", &p.memory, &p.time, &p.threads)
	}
	return p, err
}

// argonRate returns how many passwords all cores hash per second without any other work.
func (m *meter) argonRate() float64 {
	var hashing sync.WaitGroup
	var n atomic.Int64
	begin := time.Now()
	for range runtime.NumCPU() {
		hashing.Go(func() {
			for time.Since(begin) < m.time {
				argon2.IDKey([]byte("correct horse"), make([]byte, 16),
					m.argon.time, m.argon.memory, m.argon.threads, 32)
				n.Add(1)
			}
		})
	}
	hashing.Wait()
	return float64(n.Load()) / time.Since(begin).Seconds()
}

// paced sends GET requests at a fixed rate, whether or not earlier ones were answered.
func (m *meter) paced(url string, rate float64) (measurement, error) {
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: connections}}
	defer client.CloseIdleConnections()
	var mu sync.Mutex
	var took []float64 // ms
	var failure error
	var requests sync.WaitGroup
	tick := time.NewTicker(time.Duration(float64(time.Second) / rate))
	defer tick.Stop()
	for begin := time.Now(); time.Since(begin) < m.time; {
		<-tick.C
		requests.Go(func() {
			begin := time.Now()
			response, err := client.Get(fmt.Sprintf("%s/users/%d", url,
				1+begin.UnixNano()%int64(m.users)))
			if err == nil {
				err = drain(response)
			}
			mu.Lock()
			defer mu.Unlock()
			took = append(took, float64(time.Since(begin).Microseconds())/1000)
			if err != nil {
				failure = err
			}
		})
	}
	requests.Wait()
	slices.Sort(took)
	return measurement{Rate: rate, P50: took[len(took)/2], P99: took[len(took)*99/100]}, failure
}

// drain reads and closes the body, and returns an error if the status is not 2xx.
func drain(response *http.Response) error {
	defer response.Body.Close()
	_, err := io.Copy(io.Discard, response.Body)
	if err == nil && response.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s", response.Request.Method, response.Request.URL, response.Status)
	}
	return err
}

// processorTime returns the processor time of a process, and of PostgreSQL's processes that are
// connected to the rig's database.
func (r *rig) processorTime(pid int) (server, postgres time.Duration) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		commandLine, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		user, _ := strconv.Atoi(fields[11])
		system, _ := strconv.Atoi(fields[12])
		used := time.Duration(user+system) * 10 * time.Millisecond
		if path == fmt.Sprintf("/proc/%d/stat", pid) {
			server = used
		} else if bytes.HasPrefix(commandLine, []byte("postgres: bench "+r.database+" ")) {
			postgres += used
		}
	}
	return server, postgres
}

// resident returns the peak resident memory of the service in MB.
func (r *rig) resident() (float64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.subjects[service].PID()))
	if err != nil {
		return 0, err
	}
	var kB float64
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, "VmHWM: %f kB", &kB)
	}
	return kB / 1024, nil
}
