package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
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
func compare(s *servers, o options) (string, error) {
	r, err := s.rig()
	if err != nil {
		return "", err
	}
	m := &meter{rig: r, time: o.time}
	if m.subjects, err = r.startPeers(service, plain, noDatabase); err != nil {
		return "", err
	}
	all := make(results)
	for round := range o.rounds {
		log.Printf("round %d of %d", round+1, o.rounds)
		if err := m.round(round, all); err != nil {
			return "", err
		}
	}
	text := report(all) + fmt.Sprintf("\n%d users, %d connections, %d rounds of %v.\n",
		o.users, connections, o.rounds, o.time)
	if err := o.draw("bench.svg", drawing(all)); err != nil {
		return "", err
	}
	return text, r.finish()
}

// meter measures the subjects of a rig.
type meter struct {
	*rig
	subjects map[string]*subject
	time     time.Duration
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
	pid, database := 0, m.database
	if s := m.subjects[name]; s != nil {
		pid, database = s.PID(), s.database
	}
	serverCPU, postgresCPU := processorTime(pid, database)
	switch name {
	case pgbench:
		got, err = m.pgbench(w)
	case onlyArgon:
		got.Rate = m.argonRate()
	default:
		got, err = m.wrk(w, m.subjects[name].url)
	}
	serverEnd, postgresEnd := processorTime(pid, database)
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

// startPeers starts the service and other servers, which hash with the service's parameters.
func (r *rig) startPeers(names ...string) (map[string]*subject, error) {
	subjects, err := r.startAll(service)
	if err != nil {
		return nil, err
	}
	if r.argon.memory == 0 {
		if err := r.readArgon(subjects[service].url); err != nil {
			return nil, err
		}
	}
	for _, name := range names {
		if name != service {
			if subjects[name], err = r.start(name, "ARGON2="+r.argon.String()); err != nil {
				return nil, err
			}
		}
	}
	return subjects, nil
}

// readArgon learns the cost of the service's hashes from one in the database.
func (r *rig) readArgon(url string) error {
	err := send(http.MethodPost, url+"/users",
		`{"name": "John", "surname": "Doe", "password": "correct horse"}`)
	if err != nil {
		return err
	}
	var hash string
	err = r.db.QueryRow(context.Background(),
		"SELECT password FROM users ORDER BY id DESC LIMIT 1").Scan(&hash)
	if err == nil {
		_, err = fmt.Sscanf(hash, "$argon2id$v=19$"+argonFormat+"$",
			&r.argon.memory, &r.argon.time, &r.argon.threads)
	}
	return err
}

// argonRate returns how many passwords all cores hash per second without any other work.
func (m *meter) argonRate() float64 {
	var hashing sync.WaitGroup
	var n atomic.Int64
	begin := time.Now()
	for range runtime.NumCPU() {
		hashing.Go(func() {
			for time.Since(begin) < m.time {
				m.argon.hash("correct horse", make([]byte, 16))
				n.Add(1)
			}
		})
	}
	hashing.Wait()
	return float64(n.Load()) / time.Since(begin).Seconds()
}

// processorTime returns the processor time of a process, and of PostgreSQL's processes that are
// connected to a database.
func processorTime(pid int, database string) (server, postgres time.Duration) {
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
		} else if bytes.HasPrefix(commandLine, []byte("postgres: bench "+database+" ")) {
			postgres += used
		}
	}
	return server, postgres
}
