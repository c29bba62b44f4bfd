package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/crypto/argon2"
)

var compare = flag.Bool("compare", false, "TestCompare: measure this service beside others, for some minutes")

const (
	compareUsers  = 1_000_000
	compareRounds = 5
	compareTime   = 3 * time.Second // for each measurement of a round
	connections   = 64
	creators      = 16 // connections that create users: more would wait too long for their hash
)

// subject is what is measured: a server, or a command that prints its own rate.
type subject struct {
	name    string
	url     string
	pid     int
	command func() (rate float64, err error)
}

// workload is the requests that some of the subjects get. Its script is one of wrk.
type workload struct {
	name     string
	script   string
	subjects []string
}

const (
	ours        = "this service"
	uncoalesced = "without coalescing"
	plain       = "net/http + pool.QueryRow"
	noDatabase  = "net/http without database"
	pgbench     = "pgbench"
	onlyArgon   = "argon2id alone"
)

var workloads = []workload{
	{"GET /users/{id}", `wrk.format("GET", "/users/" .. math.random(1, users))`,
		[]string{ours, uncoalesced, plain, noDatabase, pgbench}},
	{"GET /users", `wrk.format("GET", "/users")`, []string{ours, uncoalesced, plain}},
	{"GET /users?after=", `wrk.format("GET", "/users?after=" .. math.random(1, users))`,
		[]string{ours, uncoalesced}},
	{"PUT /users/{id}", `wrk.format("PUT", "/users/" .. math.random(1, users), header,
		'{"name": "N' .. math.random(1, 1e9) .. '"}')`, []string{ours, uncoalesced, pgbench}},
	{"POST /users", `wrk.format("POST", "/users", header,
		'{"name": "John", "surname": "Doe", "password": "correct horse"}')`, []string{ours, onlyArgon}},
}

// measurement is what one subject did in one round.
type measurement struct {
	Rate     float64 `json:"rate"` // per second
	P50      float64 `json:"p50"`  // ms
	P99      float64 `json:"p99"`  // ms
	Bad      int     `json:"bad"`  // answers that are not 2xx, and none
	cpu      float64 // us of the server, for each request
	postgres float64 // us of PostgreSQL, for each request
}

// TestCompare measures subjects in turn, round after round, so that what the machine does
// meanwhile meets all of them.
func TestCompare(t *testing.T) {
	if !*compare {
		return // `make bench` runs it
	}
	r := newRig(t, compareUsers, ours, uncoalesced, plain, noDatabase)
	results := make(map[string]map[string][]measurement)
	latency := make(map[string][]measurement)
	for round := range compareRounds {
		for _, w := range workloads {
			if results[w.name] == nil {
				results[w.name] = make(map[string][]measurement)
			}
			for i := range w.subjects { // each round begins with another one
				name := w.subjects[(i+round)%len(w.subjects)]
				m := r.measure(w, r.subjects[name])
				results[w.name][name] = append(results[w.name][name], m)
				t.Logf("round %d of %d: %s, %s: %.0f/s", round+1, compareRounds, w.name, name, m.Rate)
			}
		}
		tenth := results[workloads[0].name][ours][0].Rate / 10
		for _, name := range []string{ours, uncoalesced} {
			latency[name] = append(latency[name], r.paced(r.subjects[name].url, tenth))
		}
	}
	r.check(results)
	text := report(results, latency, r.resident())
	fmt.Print(text)
	picture := filepath.Join("docs", "bench.svg")
	err := os.WriteFile(picture, drawing(results), 0o644) // #nosec G306 -- for everybody
	if err != nil {
		t.Error(err)
	}
}

// TestGrowth measures one client's requests on a small and a large table, in turn.
func TestGrowth(t *testing.T) {
	if !*compare {
		return // `make bench` runs it
	}
	sizes := []int{1000, 10_000_000}
	var urls []string
	for _, size := range sizes {
		urls = append(urls, newRig(t, size, ours).subjects[ours].url)
	}
	fmt.Printf("\n| request | p50 ms, %d users | p50 ms, %d users | ratio |\n|:--|--:|--:|--:|\n", sizes[0], sizes[1])
	for _, request := range []struct {
		name, method, path, body string // path: %d is an id
		times                    int
	}{
		{"GET /users/{id}", "GET", "/users/%d", "", 3000},
		{"GET /users", "GET", "/users", "", 2000},
		{"GET /users?after=", "GET", "/users?after=%d", "", 2000},
		{"PUT /users/{id}", "PUT", "/users/%d", `{"name": "N%d"}`, 2000},
		{"POST /users", "POST", "/users", `{"name": "John", "surname": "Doe", "password": "correct horse"}`, 100},
	} {
		var elapsed [2][]float64 // ms
		for n := range 2 * request.times {
			i := (n + n/2) % 2 // each begins as often as the other
			path, body := request.path, request.body
			if strings.Contains(path, "%d") {
				path = fmt.Sprintf(path, 1+rand.IntN(sizes[i]))
			}
			if strings.Contains(body, "%d") {
				body = fmt.Sprintf(body, rand.Int())
			}
			start := time.Now()
			send(t, request.method, urls[i]+path, body)
			elapsed[i] = append(elapsed[i], time.Since(start).Seconds()*1000)
		}
		small, _, _ := spread(elapsed[0])
		large, _, _ := spread(elapsed[1])
		fmt.Printf("| %s | %.3f | %.3f | %.2f |\n", request.name, small, large, large/small)
	}
}

// send wants a 2xx.
func send(t *testing.T, method, url, body string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, response.Body); err != nil || response.StatusCode/100 != 2 {
		t.Fatalf("%s %s: %s, %v", method, url, response.Status, err)
	}
}

// rig is the subjects at work on one database.
type rig struct {
	t        *testing.T
	database string // its name
	db       *pgxpool.Pool
	dir      string // of logs and scripts
	subjects map[string]*subject
}

// newRig has so many users, and the servers that are named.
func newRig(t *testing.T, users int, servers ...string) *rig {
	for _, tool := range []string{"wrk", "pgbench"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v: apt-get install wrk postgresql-contrib provides both", err)
		}
	}
	url := newDatabase(t)
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, database: config.ConnConfig.Database, dir: t.TempDir(), subjects: make(map[string]*subject)}
	if r.db, err = pgxpool.NewWithConfig(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.db.Close)
	r.seed(users)
	for _, name := range servers {
		r.subjects[name] = r.startServer(name, "DATABASE_URL="+url, "RABBITMQ_URL="+testRabbitURL,
			"BENCH_EXCHANGE="+newExchange(t))
	}
	r.subjects[pgbench] = &subject{name: pgbench}
	r.subjects[onlyArgon] = &subject{name: onlyArgon, command: argonRate}
	return r
}

func (r *rig) exec(sql string, args ...any) {
	r.t.Helper()
	if _, err := r.db.Exec(r.t.Context(), sql, args...); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) seed(users int) {
	r.t.Logf("seeding %d users", users)
	r.exec(`INSERT INTO users (name, surname, password)
		SELECT 'John ' || n, 'Doe', repeat('x', 97) FROM generate_series(1, $1::int) AS n`, users)
	r.exec("VACUUM (FREEZE, ANALYZE) users")
}

// startServer runs this test binary as a server.
func (r *rig) startServer(kind string, env ...string) *subject {
	r.t.Helper()
	log, err := os.CreateTemp(r.dir, "log")
	if err != nil {
		r.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(os.Args[0]) // #nosec G702 -- this program again
	cmd.Env = append(os.Environ(), append(env, "PORT=0", "BENCH_SERVER="+kind)...)
	cmd.Stdout = log
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	var line struct{ Port int }
	eventually(r.t, kind+" that listens", func() bool {
		text, _ := os.ReadFile(log.Name())
		lines := json.NewDecoder(bytes.NewReader(text))
		for line.Port == 0 && lines.Decode(&line) == nil {
		}
		return line.Port > 0
	})
	return &subject{name: kind, url: fmt.Sprintf("http://127.0.0.1:%d", line.Port), pid: cmd.Process.Pid}
}

// benchServer is the main function of such a server. It prints its port as a JSON object.
func benchServer(kind string) int {
	if kind == uncoalesced {
		coalescing.readsAlone, coalescing.writesAlone = 1<<30, 1<<30
	}
	if kind == ours || kind == uncoalesced {
		s, err := loadSettings(os.Getenv)
		if err != nil {
			return 2
		}
		s.exchange = os.Getenv("BENCH_EXCHANGE")
		tune(s)
		run(context.Background(), s, newLogger(os.Stdout, s.logLevel))
		return 1
	}
	pool, err := pgxpool.New(context.Background(), os.Getenv("DATABASE_URL"))
	if err != nil {
		return 1
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any, err error) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(v)
	}
	mux.HandleFunc("GET /users/{id}", func(w http.ResponseWriter, r *http.Request) {
		id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
		u := User{ID: id, Name: "John", Surname: "Doe"}
		if err == nil && kind == plain {
			err = pool.QueryRow(r.Context(), "SELECT "+userColumns+" FROM users WHERE id = $1", id).Scan(u.scanInto()...)
		}
		answer(w, u, err)
	})
	mux.HandleFunc("GET /users", func(w http.ResponseWriter, r *http.Request) {
		var list userList
		rows, _ := pool.Query(r.Context(), "SELECT "+userColumns+" FROM users ORDER BY id LIMIT 10")
		users, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (u User, err error) {
			return u, row.Scan(u.scanInto()...)
		})
		if list.Users = users; err == nil {
			err = pool.QueryRow(r.Context(), "SELECT count(*) FROM users").Scan(&list.Total)
		}
		answer(w, list, err)
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 1
	}
	fmt.Printf("{\"port\": %d}\n", listener.Addr().(*net.TCPAddr).Port)
	http.Serve(listener, mux) // #nosec G114 -- no stranger reaches it
	return 0
}

func (r *rig) measure(w workload, s *subject) (m measurement) {
	r.t.Helper()
	serverCPU, postgresCPU := r.processorTime(s.pid)
	var err error
	switch {
	case s.name == pgbench:
		m, err = r.pgbench(w)
	case s.command != nil:
		m.Rate, err = s.command()
	default:
		m, err = r.wrk(w, s.url)
	}
	if err != nil {
		r.t.Fatalf("%s, %s: %v", w.name, s.name, err)
	}
	serverEnd, postgresEnd := r.processorTime(s.pid)
	requests := m.Rate * compareTime.Seconds()
	m.cpu = float64((serverEnd - serverCPU).Microseconds()) / requests
	m.postgres = float64((postgresEnd - postgresCPU).Microseconds()) / requests
	time.Sleep(time.Second) // for events and writes that are still under way
	return m
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

func (r *rig) wrk(w workload, url string) (m measurement, err error) {
	script := filepath.Join(r.dir, "wrk.lua")
	text := fmt.Sprintf(wrkScript, time.Now().UnixNano()%1e9, compareUsers, w.script)
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		return m, err
	}
	n := connections
	if strings.HasPrefix(w.name, "POST") {
		n = creators
	}
	output, err := exec.Command("wrk", "-t1", "--timeout", "20s", fmt.Sprintf("-c%d", n),
		fmt.Sprintf("-d%ds", int(compareTime.Seconds())), "-s", script, url).Output()
	if err != nil {
		return m, err
	}
	lines := bytes.Split(bytes.TrimSpace(output), []byte("\n"))
	return m, json.Unmarshal(lines[len(lines)-1], &m)
}

// pgbench runs the statement of a request, or for reads the best of some numbers of clients.
func (r *rig) pgbench(w workload) (best measurement, err error) {
	sql, clients := "SELECT "+userColumns+" FROM users WHERE id = :id;", []int{8, 16}
	if strings.HasPrefix(w.name, "PUT") {
		change := strings.NewReplacer("$1", "('{' || :id || '}')", "$2", `'{"t"}'`, "$3", "'{NULL}'",
			"$4", "('{N' || :n || '}')", "$5", "'{NULL}'", "$6", "'{NULL}'")
		sql, clients = change.Replace(updateUsers)+";", []int{connections}
	}
	script := filepath.Join(r.dir, "pgbench.sql")
	text := fmt.Sprintf("\\set id random(1, %d)\n\\set n random(1, 1000000000)\n%s\n", compareUsers, sql)
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		return best, err
	}
	for _, n := range clients {
		output, err := exec.Command("pgbench", "--no-vacuum", "--protocol=prepared", "--jobs=2",
			fmt.Sprintf("--client=%d", n), fmt.Sprintf("--time=%d", int(compareTime.Seconds())),
			"--file="+script, databaseURL(r.database)).Output()
		if err != nil {
			return best, err
		}
		var m measurement
		for line := range strings.Lines(string(output)) {
			fmt.Sscanf(line, "tps = %f", &m.Rate)
			fmt.Sscanf(line, "latency average = %f ms", &m.P50)
		}
		if m.Rate > best.Rate {
			best = m
		}
	}
	return best, nil
}

// argonRate is how many passwords all cores hash in a second, with nothing else to do.
func argonRate() (float64, error) {
	var hashes sync.WaitGroup
	var n [256]int
	begin := time.Now()
	for i := range runtime.NumCPU() {
		hashes.Go(func() {
			for time.Since(begin) < compareTime {
				argon2.IDKey([]byte("correct horse"), make([]byte, argonSalt), argonTime, argonMemory, argonThreads, argonKey)
				n[i]++
			}
		})
	}
	hashes.Wait()
	total := 0
	for _, each := range n {
		total += each
	}
	return float64(total) / time.Since(begin).Seconds(), nil
}

// paced sends GET requests at a fixed rate, as clients who do not wait for each other.
func (r *rig) paced(url string, rate float64) measurement {
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: connections}}
	defer client.CloseIdleConnections()
	var mu sync.Mutex
	var took []float64
	var requests sync.WaitGroup
	tick := time.NewTicker(time.Duration(float64(time.Second) / rate))
	defer tick.Stop()
	for begin := time.Now(); time.Since(begin) < compareTime; {
		<-tick.C
		requests.Go(func() {
			asked := time.Now()
			res, err := client.Get(fmt.Sprintf("%s/users/%d", url, 1+asked.UnixNano()%compareUsers))
			if err != nil {
				r.t.Error(err)
				return
			}
			io.Copy(io.Discard, res.Body)
			res.Body.Close()
			mu.Lock()
			defer mu.Unlock()
			took = append(took, float64(time.Since(asked).Microseconds())/1000)
		})
	}
	requests.Wait()
	slices.Sort(took)
	return measurement{Rate: rate, P50: took[len(took)/2], P99: took[len(took)*99/100]}
}

// processorTime is what a process and the sessions on our database have used.
func (r *rig) processorTime(pid int) (server, postgres time.Duration) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		stat, err := os.ReadFile(path) // #nosec G304 -- below /proc
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
		} else if bytes.HasPrefix(commandLine, []byte("postgres: ")) && bytes.Contains(commandLine, []byte(r.database)) {
			postgres += used
		}
	}
	return server, postgres
}

// resident is the most memory that the service had, in MB.
func (r *rig) resident() float64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.subjects[ours].pid))
	if err != nil {
		r.t.Fatal(err)
	}
	var kB float64
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, "VmHWM: %f kB", &kB)
	}
	return kB / 1024
}

// check says whether all was well: an answer for each request, each acknowledged change in
// the table with its event, and an exact total.
func (r *rig) check(results map[string]map[string][]measurement) {
	for name, subjects := range results {
		for subject, measurements := range subjects {
			for _, m := range measurements {
				if m.Bad > 0 {
					r.t.Errorf("%s, %s: %d bad answers", name, subject, m.Bad)
				}
			}
		}
	}
	eventually(r.t, "an empty outbox", func() bool {
		var left int
		return r.db.QueryRow(r.t.Context(), "SELECT count(*) FROM outbox").Scan(&left) == nil && left == 0
	})
	var counted, total int
	err := r.db.QueryRow(r.t.Context(),
		"SELECT (SELECT count(*) FROM users), (SELECT sum(n) FROM user_counts)").Scan(&counted, &total)
	if err != nil || counted != total {
		r.t.Errorf("%d users, and the total is %d: %v", counted, total, err)
	}
}

// spread is the median of values, and the least and the most.
func spread(values []float64) (median, least, most float64) {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2], values[0], values[len(values)-1]
}

// ratios is our rate in terms of a subject's, round by round.
func ratios(subjects map[string][]measurement, name string) (of []float64) {
	for i, m := range subjects[name] {
		of = append(of, subjects[ours][i].Rate/m.Rate)
	}
	return of
}

func column(measurements []measurement, value func(measurement) float64) float64 {
	var values []float64
	for _, m := range measurements {
		values = append(values, value(m))
	}
	median, _, _ := spread(values)
	return median
}

// report is the tables for the README.
func report(results map[string]map[string][]measurement, latency map[string][]measurement, resident float64) string {
	var b strings.Builder
	fmt.Fprintln(&b, "\n| request | subject | per second | this service has | p50 ms | p99 ms | CPU us | PostgreSQL us |")
	fmt.Fprintln(&b, "|:--|:--|--:|:--|--:|--:|--:|--:|")
	for _, w := range workloads {
		for _, name := range w.subjects {
			all := results[w.name][name]
			median, least, most := spread(ratios(results[w.name], name))
			fmt.Fprintf(&b, "| %s | %s | %.0f | %.2f (%.2f to %.2f) | %.2f | %.2f | %.0f | %.0f |\n", w.name, name,
				column(all, func(m measurement) float64 { return m.Rate }), median, least, most,
				column(all, func(m measurement) float64 { return m.P50 }),
				column(all, func(m measurement) float64 { return m.P99 }),
				column(all, func(m measurement) float64 { return m.cpu }),
				column(all, func(m measurement) float64 { return m.postgres }))
		}
	}
	for _, quantile := range []struct {
		name  string
		value func(measurement) float64
	}{
		{"p50", func(m measurement) float64 { return m.P50 }},
		{"p99", func(m measurement) float64 { return m.P99 }},
	} {
		mine, others := column(latency[ours], quantile.value), column(latency[uncoalesced], quantile.value)
		fmt.Fprintf(&b, "\nAt a tenth of that load, %s is %.2f ms, %.2f times that without coalescing.", quantile.name, mine, mine/others)
	}
	fmt.Fprintf(&b, "\nThe service had %.0f MB at most.\n\n%s, %d users, %d connections, %d rounds of %v, %s, %d cores\n",
		resident, time.Now().Format(time.DateOnly), compareUsers, connections, compareRounds, compareTime,
		runtime.Version(), runtime.NumCPU())
	return b.String()
}

// drawing is an SVG of how many times the others' rate this service has.
func drawing(results map[string]map[string][]measurement) []byte {
	const row, left, width = 26, 330, 330
	scale := func(ratio float64) float64 { return min(ratio, 4) / 4 * width }
	var bars strings.Builder
	y := 40
	for _, w := range workloads {
		for _, name := range w.subjects {
			if name == ours {
				continue
			}
			median, least, most := spread(ratios(results[w.name], name))
			fmt.Fprintf(&bars, `<text x="%d" y="%d" text-anchor="end">%s vs %s</text>`, left-8, y+13, w.name, name)
			fmt.Fprintf(&bars, `<rect x="%d" y="%d" width="%.1f" height="16" fill="%s"/>`, left, y, scale(median),
				cmp.Or(map[bool]string{true: "#2a7d4f"}[median >= 1], "#8a93a0"))
			fmt.Fprintf(&bars, `<path d="M%.1f %dH%.1f" stroke="#111" stroke-width="1.5"/>`,
				left+scale(least), y+8, left+scale(most))
			fmt.Fprintf(&bars, `<text x="%d" y="%d">%.2f</text>`+"\n", left+width+8, y+13, median)
			y += row
		}
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 730 %d" font-family="sans-serif" font-size="13">`, y+10)
	fmt.Fprintf(&b, `<rect width="730" height="%d" fill="#fff"/><text x="%d" y="24" font-weight="bold">`+
		`Requests per second, as a multiple of the other's (line: all rounds; bars end at 4)</text>`+"\n", y+10, 20)
	b.WriteString(bars.String())
	fmt.Fprintf(&b, `<path d="M%.1f 34V%d" stroke="#c33" stroke-dasharray="3 3"/></svg>`+"\n", left+scale(1), y)
	return b.Bytes()
}

// BenchmarkGetUser is a GET from the trace id to the log lines, without network and database.
func BenchmarkGetUser(b *testing.B) {
	server := newServer(settings{}, newLogger(discard{}, slog.LevelInfo), metrics.NewSet())
	m := newMemory()
	name := "John"
	if _, err := m.createUser(b.Context(), userInput{&name, &name, &name}, ""); err != nil {
		b.Fatal(err)
	}
	server.addRoutes(openRoutes(&health{}), keyedRoutes(&api{store: m}, &health{}))
	r := httptest.NewRequest("GET", "/users/1", nil)
	b.ReportAllocs()
	for b.Loop() {
		server.ServeHTTP(httptest.NewRecorder(), r)
	}
}

func BenchmarkParseObject(b *testing.B) {
	body := []byte(`{"name": "John", "surname": "Doe", "password": "correct horse"}`)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseObject(body); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGroup(b *testing.B) {
	g := Group[int, int]{alone: 4, limit: 1, run: func(_ context.Context, keys []int) (map[int]int, error) {
		return map[int]int{keys[0]: 1}, nil
	}}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			g.Do(b.Context(), 1)
		}
	})
}
