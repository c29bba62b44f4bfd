package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	connections = 64
	creators    = 16 // connections that create users; with more, requests would wait too long
)

// The names of the subjects.
const (
	service    = "this service"
	plain      = "net/http + pgx"
	publishing = "net/http + pgx + RabbitMQ"
	withRedis  = "net/http + Redis"
	noDatabase = "net/http without database"
	pgbench    = "pgbench"
	onlyArgon  = "argon2id alone"
)

// workload is a kind of request, and the subjects that receive it. Its script is one of wrk;
// without a script, the requests are mixed.
type workload struct {
	name     string
	script   string
	subjects []string
}

const putScript = `wrk.format("PUT", "/users/" .. math.random(1, users), header,
	'{"name": "N' .. math.random(1, 1e9) .. '"}')`

var workloads = []workload{
	{"GET /users/{id}", `wrk.format("GET", "/users/" .. math.random(1, users))`,
		[]string{service, plain, withRedis, noDatabase, pgbench}},
	{"GET /users", `wrk.format("GET", "/users")`, []string{service, plain}},
	{"GET /users?after=", `wrk.format("GET", "/users?after=" .. math.random(1, users))`,
		[]string{service, plain}},
	{"PUT /users/{id}", putScript, []string{service, plain, pgbench}},
	{"POST /users", `wrk.format("POST", "/users", header, '` + newUser + `')`,
		[]string{service, onlyArgon}},
	{"mixed", "", []string{service, plain}},
}

// measurement is the result of one subject in one round.
type measurement struct {
	Rate     float64 `json:"rate"`     // per second
	P50      float64 `json:"p50"`      // ms
	P99      float64 `json:"p99"`      // ms
	Requests int     `json:"requests"` // with an answer of 2xx
	Bad      int     `json:"bad"`      // other answers, and requests without an answer
	server   float64 // us of the server per request
	database float64 // us of the database per request
}

// results are the measurements of all rounds, by workload and subject.
type results map[string]map[string][]measurement

// compare measures the subjects in turn, round after round, so that other work of the machine
// affects all of them.
func compare(s *servers, o options) (string, error) {
	r, subjects, err := s.startAll([]string{service, plain, noDatabase})
	m := &meter{rig: r, time: o.time, subjects: subjects}
	if err == nil {
		m.subjects[withRedis], err = r.startRedis()
	}
	if err == nil {
		m.update, err = r.updateStatement(m.subjects[service])
	}
	all := make(results)
	for round := 0; round < o.rounds && err == nil; round++ {
		log.Printf("round %d of %d", round+1, o.rounds)
		err = m.round(round, all)
	}
	if err == nil {
		err = o.draw("bench.svg", bars(all))
	}
	if err != nil {
		return "", err
	}
	return compareTable(all) + fmt.Sprintf("\n%d users, %d connections, %d rounds of %v.\n",
		o.users, connections, o.rounds, o.time), r.finish()
}

// meter measures the subjects of a rig.
type meter struct {
	*rig
	subjects map[string]*subject
	time     time.Duration
	update   string // the service's statement, for pgbench
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
	var servers []*subject
	if s := m.subjects[name]; s != nil {
		servers = append(servers, s)
	}
	before := m.processorTime(servers...)
	switch {
	case name == pgbench:
		got, err = m.pgbench(w)
	case name == onlyArgon:
		got.Rate = m.argonRate()
	case w.script == "":
		got, err = m.mixed(servers[0])
	case w.name == "POST /users":
		got, err = m.wrk(w.script, creators, m.time, servers...)
	default:
		got, err = m.wrk(w.script, connections, m.time, servers...)
	}
	got.server, got.database = m.processorTime(servers...).sub(before, got.Rate*m.time.Seconds())
	if name == service && strings.HasPrefix(w.name, "PUT") {
		m.acknowledged.Add(int64(got.Requests))
	}
	if err != nil {
		return got, err
	}
	return got, m.settle()
}

// mixed sends mixed requests. The service may refuse to hash passwords.
func (m *meter) mixed(s *subject) (measurement, error) {
	got := m.load(s, mixed).closedLoop(connections, m.time)
	p := got.percentiles(50, 99)
	return measurement{Rate: got.where(answered).rate(), P50: p[0], P99: p[1]}, got.unexpected()
}

const wrkScript = `
math.randomseed(%d)
users, header = %d, {["Content-Type"] = "application/json"}
request = function() return %s end
done = function(summary, latency)
	local e = summary.errors
	io.write(string.format(
		'\n{"rate": %%f, "p50": %%f, "p99": %%f, "requests": %%d, "bad": %%d}\n',
		summary.requests / summary.duration * 1e6, latency:percentile(50) / 1000,
		latency:percentile(99) / 1000, summary.requests - e.status,
		e.status + e.timeout + e.read + e.write + e.connect))
end
`

// wrk sends requests over n connections, which are divided among servers. The percentiles are those
// of the last server.
func (r *rig) wrk(script string, n int, d time.Duration, servers ...*subject) (
	sum measurement, err error) {
	outputs := make([]bytes.Buffer, len(servers))
	errs := make([]error, len(servers))
	var running sync.WaitGroup
	for i, s := range servers {
		path := filepath.Join(r.Dir, fmt.Sprintf("wrk_%d.lua", i))
		text := fmt.Sprintf(wrkScript, rand.IntN(1e9), r.users/2, script)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return sum, err
		}
		running.Go(func() {
			cmd := exec.Command("wrk", "-t1", "--timeout", "20s", fmt.Sprintf("-c%d", n/len(servers)),
				fmt.Sprintf("-d%ds", int(d.Seconds())), "-s", path, s.url)
			cmd.Stdout = &outputs[i]
			errs[i] = cmd.Run()
		})
	}
	running.Wait()
	for i := range servers {
		lines := bytes.Split(bytes.TrimSpace(outputs[i].Bytes()), []byte("\n"))
		var got measurement
		errs[i] = errors.Join(errs[i], json.Unmarshal(lines[len(lines)-1], &got))
		got.Rate, got.Requests, got.Bad = got.Rate+sum.Rate, got.Requests+sum.Requests,
			got.Bad+sum.Bad
		sum = got
	}
	return sum, errors.Join(errs...)
}

// pgbench runs the statement that a request needs. For reads, it returns the best of several
// numbers of clients.
func (m *meter) pgbench(w workload) (best measurement, err error) {
	sql, clients := "SELECT "+userColumns+" FROM users WHERE id = :id", []int{8, 16}
	if strings.HasPrefix(w.name, "PUT") {
		sql, clients = m.update, []int{connections}
	}
	script := filepath.Join(m.Dir, "pgbench.sql")
	text := fmt.Sprintf("\\set id random(1, %d)\n\\set n random(1, 1000000000)\n%s;\n", m.users/2, sql)
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		return best, err
	}
	for _, n := range clients {
		cmd := exec.Command("pgbench", "--no-vacuum", "--protocol=prepared", "--jobs=2",
			fmt.Sprintf("--client=%d", n), fmt.Sprintf("--time=%d", int(m.time.Seconds())),
			"--file="+script, m.rig.postgres.URL("bench", m.database))
		cmd.Env = append(os.Environ(), // as openSession of the service sets
			"PGOPTIONS=-c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c jit=off")
		var got measurement
		output, err := cmd.CombinedOutput()
		if err != nil {
			return best, fmt.Errorf("%w: %s", err, output)
		}
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

// updateArguments are the parameters of the service's UPDATE for one change, in pgbench's language:
// ids, origins, accepted versions, names, surnames and passwords.
var updateArguments = []string{"ARRAY[:id]::bigint[]",
	"ARRAY[repeat('f', 32) || chr(10) || 'anonymous' || chr(10) || chr(10)]::text[]",
	"ARRAY[NULL]::text[]", "ARRAY['N' || :n]::text[]", "ARRAY[NULL]::text[]", "ARRAY[NULL]::text[]"}

var parameter = regexp.MustCompile(`\$\d+`)

// updateStatement returns the statement that the service runs for a PUT, for pgbench. The session
// that ran it may soon run another one, so it looks while requests are sent.
func (r *rig) updateStatement(s *subject) (string, error) {
	l := r.load(s, onlyPut)
	var sending sync.WaitGroup
	sending.Go(func() { l.closedLoop(4, time.Second) })
	defer sending.Wait()
	var sql string
	err := pgx.ErrNoRows
	for range 50 {
		if err = r.db.QueryRow(context.Background(), `
			SELECT query FROM pg_stat_activity
			WHERE datname = $1 AND usename = 'bench' AND query LIKE '%UPDATE users SET%'
			ORDER BY query_start DESC LIMIT 1`, r.database).Scan(&sql); err == nil {
			return pgbenchStatement(sql)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return "", fmt.Errorf("no session of the service shows its UPDATE users SET: %w", err)
}

// pgbenchStatement replaces the parameters of the service's UPDATE.
func pgbenchStatement(sql string) (string, error) {
	for _, p := range parameter.FindAllString(sql, -1) {
		var n int
		fmt.Sscanf(p, "$%d", &n)
		if n < 1 || n > len(updateArguments) {
			return "", fmt.Errorf("the service's UPDATE has an unknown parameter %s:\n%s", p, sql)
		}
	}
	for i, argument := range updateArguments {
		p := fmt.Sprint("$", i+1)
		if !strings.Contains(sql, p) {
			return "", fmt.Errorf("the service's UPDATE has no parameter %s:\n%s", p, sql)
		}
		sql = strings.ReplaceAll(sql, p, argument)
	}
	return sql, nil
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
