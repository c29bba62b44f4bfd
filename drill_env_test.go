package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
)

// servers are a PostgreSQL and a RabbitMQ that only the drill has, so that it may treat
// them as it likes. They are in a directory of their own and gone when the test ends.
type servers struct {
	dir      string
	postgres *daemon
	rabbit   *daemon
	epmd     *daemon   // where Erlang nodes find each other; not the one of the machine
	nodes    []*daemon // of a RabbitMQ cluster, while a row has one; under mu

	postgresPort string
	rabbitPorts  []string // of the node, or of the nodes of a cluster
	rabbitEnv    []string
	rabbitServer string // paths of programs
	rabbitmqctl  string
	databases    int

	postgresOwner *syscall.Credential // who runs what refuses to run as root; nil: we are not root

	mu      sync.Mutex
	others  []*os.Process // what else must not outlive the test
	cleanup []func()      // ends the servers of single trials
	frozen  []int         // processes of PostgreSQL
}

// daemon is a process in a process group of its own, which can be started again.
type daemon struct {
	command  func() *exec.Cmd
	answers  func() error
	patience time.Duration // until it answers; 0: 60 s

	mu      sync.Mutex
	process *os.Process
	ended   chan struct{}
}

func (s *daemon) start() error {
	if err := s.launch(); err != nil {
		return err
	}
	var err error
	patience := cmp.Or(s.patience, 60*time.Second)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if err = s.answers(); err == nil {
			return nil
		}
		select {
		case <-s.ended:
			return fmt.Errorf("%s ended at its start: %w", s.command().Path, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
	return fmt.Errorf("%s does not answer: %w", s.command().Path, err)
}

func (s *daemon) launch() error {
	cmd := s.command()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	s.process, s.ended = cmd.Process, ended
	go func() {
		cmd.Wait()
		close(ended)
	}()
	return nil
}

// signal goes to the whole process group.
func (s *daemon) signal(signal syscall.Signal) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process != nil {
		syscall.Kill(-s.process.Pid, signal)
	}
}

// end sends a signal to the first process, waits, and leaves nothing of the group.
func (s *daemon) end(signal syscall.Signal) {
	if s == nil {
		return
	}
	s.mu.Lock()
	process := s.process
	s.mu.Unlock()
	if process == nil {
		return
	}
	s.signal(syscall.SIGCONT)
	process.Signal(signal)
	select {
	case <-s.ended:
	case <-time.After(10 * time.Second):
	}
	s.signal(syscall.SIGKILL)
	<-s.ended
	s.mu.Lock()
	defer s.mu.Unlock()
	s.process = nil // the system may give its id to another process
}

// findProgram looks in TEST_POSTGRES_BIN, which .ci/compat sets, then where Debian keeps what
// is not for every user, then in PATH.
func findProgram(name string, patterns ...string) (string, error) {
	if bin := os.Getenv("TEST_POSTGRES_BIN"); bin != "" {
		patterns = slices.Insert(patterns, 0, bin)
	}
	for _, pattern := range patterns {
		if paths, _ := filepath.Glob(filepath.Join(pattern, name)); len(paths) > 0 {
			return paths[len(paths)-1], nil
		}
	}
	return exec.LookPath(name)
}

// freePort is one that nobody listens on. It is below those that the system hands out, so
// that it stays free while a server restarts.
func freePort() string {
	for {
		port := 10000 + int(time.Now().UnixNano()/1000+serial.Add(1)*7919)%20000
		listener, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
		if err == nil {
			listener.Close()
			return strconv.Itoa(port)
		}
	}
}

// startServers starts both servers, or ends the test where they are not installed.
func startServers(t *testing.T) *servers {
	t.Helper()
	dir, err := os.MkdirTemp("", "drill")
	if err != nil {
		t.Fatal(err)
	}
	s := &servers{dir: dir, postgresPort: freePort(), rabbitPorts: []string{freePort()}}
	s.removeAtEnd(t)
	initdb, err := s.preparePostgres()
	if err != nil {
		missing(t, "PostgreSQL's server", err)
	}
	if err := s.prepareRabbitMQ(); err != nil {
		missing(t, "RabbitMQ's server", err)
	}
	failed := make(chan error)
	go func() {
		output, err := initdb.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("initdb: %w\n%s", err, output)
		} else {
			err = s.postgres.start()
		}
		failed <- err
	}()
	go func() { failed <- errors.Join(s.epmd.start(), s.rabbit.start()) }()
	if err := errors.Join(<-failed, <-failed); err != nil {
		t.Fatalf("%v\n%s%s", err, s.tail("postgres.log"), s.tail("rabbit.log"))
	}
	s.sql(t, "CREATE ROLE drill LOGIN", "CREATE ROLE filler LOGIN",
		"CREATE ROLE writer LOGIN", "ALTER ROLE writer SET search_path = ''")
	return s
}

// removeAtEnd kills the servers and removes their directory when the test ends: also when
// it runs out of time, or is interrupted.
func (s *servers) removeAtEnd(t *testing.T) {
	remove := sync.OnceFunc(func() {
		s.killOthers()
		s.thawPostgres()
		s.runCleanup()
		s.postgres.end(syscall.SIGQUIT) // killed, it would leave shared memory behind
		s.rabbit.end(syscall.SIGKILL)
		s.killNodes()
		s.epmd.end(syscall.SIGKILL)
		os.RemoveAll(s.dir)
	})
	t.Cleanup(remove)
	deadline, ok := t.Deadline()
	if !ok {
		deadline = time.Now().Add(24 * time.Hour)
	}
	outOfTime := time.NewTimer(time.Until(deadline) - 20*time.Second)
	interrupt := make(chan os.Signal, 1)
	signal.Notify(interrupt, syscall.SIGINT, syscall.SIGTERM)
	t.Cleanup(func() { signal.Stop(interrupt) })
	go func() {
		select {
		case <-t.Context().Done(): // just before the cleanup
			return
		case <-outOfTime.C:
		case <-interrupt:
		}
		remove()
		os.RemoveAll(executable.dir) // TestMain does not get to it
		fmt.Println("The drill was interrupted, or had no time left")
		os.Exit(1)
	}()
}

func (s *servers) killAtEnd(p *os.Process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.others = append(s.others, p)
}

func (s *servers) killOthers() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.others {
		p.Kill()
	}
}

// atEnd runs f once, when the test t ends or the drill is interrupted.
func (s *servers) atEnd(t *testing.T, f func()) {
	f = sync.OnceFunc(f)
	s.mu.Lock()
	s.cleanup = append(s.cleanup, f)
	s.mu.Unlock()
	t.Cleanup(f)
}

func (s *servers) runCleanup() {
	s.mu.Lock()
	cleanup := s.cleanup
	s.mu.Unlock()
	for _, f := range slices.Backward(cleanup) {
		f()
	}
}

func (s *servers) log(name string) *os.File {
	const flags = os.O_CREATE | os.O_APPEND | os.O_WRONLY
	path := filepath.Join(s.dir, name)
	file, err := os.OpenFile(path, flags, 0o600) // #nosec G304 -- in our own directory
	if err != nil {
		panic(err)
	}
	return file
}

func (s *servers) tail(name string) string {
	content, _ := os.ReadFile(filepath.Join(s.dir, name)) // #nosec G304 -- in our own directory
	return string(content[max(0, len(content)-2000):])
}

const debianPostgres = "/usr/lib/postgresql/*/bin"

// preparePostgres returns the command that has to run before the server.
func (s *servers) preparePostgres() (initdb *exec.Cmd, err error) {
	err = os.Chmod(s.dir, 0o755) // #nosec G302 -- PostgreSQL's own user passes through
	if err != nil {
		return nil, err
	}
	if s.postgresOwner, err = findPostgresOwner(); err != nil {
		return nil, err
	}
	p, err := s.newPostgres("postgres", s.postgresPort)
	if err != nil {
		return nil, err
	}
	s.postgres = p.daemon
	return s.initdb(p)
}

// findPostgresOwner returns nil where this process is not root.
func findPostgresOwner() (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	owner, err := user.Lookup("postgres")
	if err != nil {
		owner, err = user.Lookup("nobody")
	}
	if err != nil {
		return nil, err
	}
	uid, _ := strconv.ParseUint(owner.Uid, 10, 31)
	gid, _ := strconv.ParseUint(owner.Gid, 10, 31)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// unprivileged returns a command for a program that refuses to run as root: there, it runs
// as postgresOwner.
func (s *servers) unprivileged(dir, path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.Dir, cmd.SysProcAttr = dir, &syscall.SysProcAttr{Credential: s.postgresOwner}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	return cmd
}

// unprivilegedDir makes a directory for such a program.
func (s *servers) unprivilegedDir(name string) (string, error) {
	dir := filepath.Join(s.dir, name)
	err := os.Mkdir(dir, 0o700)
	if err == nil && s.postgresOwner != nil {
		err = os.Chown(dir, int(s.postgresOwner.Uid), int(s.postgresOwner.Gid))
	}
	return dir, err
}

// postgresServer is a PostgreSQL server with a data directory of its own.
type postgresServer struct {
	*daemon
	data, port string
	killed     bool
}

func (p *postgresServer) url(role, database string) string {
	return fmt.Sprintf("postgres://%s@127.0.0.1:%s/%s", role, p.port, database)
}

// newPostgres returns a server whose data directory is still empty.
func (s *servers) newPostgres(name, port string) (*postgresServer, error) {
	path, err := findProgram("postgres", debianPostgres)
	if err != nil {
		return nil, err
	}
	data, err := s.unprivilegedDir(name)
	if err != nil {
		return nil, err
	}
	p := &postgresServer{data: data, port: port}
	p.daemon = &daemon{
		command: func() *exec.Cmd {
			cmd := s.unprivileged(data, path, "-D", data, "-p", port,
				"-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="+data,
				"-c", "max_connections=60", "-c", "fsync=on",
				// A primary that stops may wait for the next status of its standby.
				"-c", "wal_receiver_status_interval=1s")
			cmd.Stderr = s.log(name + ".log")
			return cmd
		},
		answers: func() error { return trySQLAt(p.url("postgres", "postgres"), "SELECT 1") },
	}
	return p, nil
}

// initdb returns the command that fills the data directory of p.
func (s *servers) initdb(p *postgresServer) (*exec.Cmd, error) {
	path, err := findProgram("initdb", debianPostgres)
	if err != nil {
		return nil, err
	}
	return s.unprivileged(p.data, path, "-D", p.data, "-U", "postgres", "-A", "trust",
		"-E", "UTF8", "--no-locale", "--no-sync"), nil
}

// prepareRabbitMQ calls the scripts behind Debian's wrappers, which want to be root and to
// change to the user rabbitmq.
func (s *servers) prepareRabbitMQ() error {
	const debian = "/usr/lib/rabbitmq/bin"
	var err error
	if s.rabbitServer, err = findProgram("rabbitmq-server", debian); err != nil {
		return err
	}
	if s.rabbitmqctl, err = findProgram("rabbitmqctl", debian); err != nil {
		return err
	}
	epmdPath, err := findProgram("epmd", "/usr/lib/erlang/bin", "/usr/lib/erlang/erts-*/bin",
		"/usr/local/lib/erlang/bin")
	if err != nil {
		return err
	}
	home := filepath.Join(s.dir, "rabbit")
	if err := os.Mkdir(home, 0o700); err != nil {
		return err
	}
	for name, content := range map[string]string{
		"plugins": "[].\n", "env.conf": "", "rabbitmq.conf": "vm_memory_high_watermark.relative = 0.4\n",
	} {
		if err := os.WriteFile(filepath.Join(home, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	epmdPort := freePort()
	s.rabbitEnv = []string{
		"PATH=" + os.Getenv("PATH"),
		"LC_ALL=C.UTF-8",
		"HOME=" + home, // of the cookie
		"ERL_EPMD_PORT=" + epmdPort,
		"RABBITMQ_NODENAME=drill_" + strconv.Itoa(os.Getpid()) + "@localhost",
		"RABBITMQ_NODE_IP_ADDRESS=127.0.0.1",
		"RABBITMQ_NODE_PORT=" + s.rabbitPorts[0],
		"RABBITMQ_DIST_PORT=" + freePort(),
		"RABBITMQ_CTL_DIST_PORT_MIN=30000",
		"RABBITMQ_CTL_DIST_PORT_MAX=32000",
		"RABBITMQ_MNESIA_BASE=" + filepath.Join(home, "mnesia"),
		"RABBITMQ_LOG_BASE=" + filepath.Join(home, "log"),
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + filepath.Join(home, "plugins"),
		"RABBITMQ_CONF_ENV_FILE=" + filepath.Join(home, "env.conf"),
		"RABBITMQ_CONFIG_FILE=" + filepath.Join(home, "rabbitmq.conf"),
		"RABBITMQ_CONFIG_FILES=" + filepath.Join(home, "conf.d"),
		"RABBITMQ_ADVANCED_CONFIG_FILE=" + filepath.Join(home, "advanced.config"),
		"RABBITMQ_GENERATED_CONFIG_DIR=" + filepath.Join(home, "config"),
		"RABBITMQ_PID_FILE=" + filepath.Join(home, "pid"),
		// Threads that spin for work take the cores from everybody else.
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=+sbwt none +sbwtdcpu none +sbwtdio none" +
			" -kernel inet_dist_use_interface {127,0,0,1}",
	}
	env, port := s.rabbitEnv, s.rabbitPorts[0]
	command := func(path string, args ...string) *exec.Cmd { return s.erlang(env, path, args...) }
	s.epmd = &daemon{
		command: func() *exec.Cmd { return command(epmdPath, "-address", "127.0.0.1", "-port", epmdPort) },
		answers: func() error { return command(epmdPath, "-port", epmdPort, "-names").Run() },
	}
	s.rabbit = &daemon{
		command: func() *exec.Cmd { return command(s.rabbitServer) },
		answers: func() error { return acceptsAMQP(port) },
	}
	return nil
}

// erlang returns a command of RabbitMQ or Erlang that writes to rabbit.log.
func (s *servers) erlang(env []string, path string, args ...string) *exec.Cmd {
	cmd := exec.Command(path, args...)
	cmd.Dir, cmd.Env = filepath.Join(s.dir, "rabbit"), env
	log := s.log("rabbit.log")
	cmd.Stdout, cmd.Stderr = log, log
	return cmd
}

// ctl runs rabbitmqctl and returns its output.
func (s *servers) ctl(t *testing.T, args ...string) string {
	t.Helper()
	output, err := s.tryCtl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return output
}

func (s *servers) tryCtl(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, s.rabbitmqctl, args...)
	cmd.Env, cmd.WaitDelay = s.rabbitEnv, time.Second
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("rabbitmqctl %s: %w\n%s%s",
			strings.Join(args, " "), err, &stdout, &stderr)
	}
	return stdout.String(), nil
}

// rabbitURL returns the RABBITMQ_URL that names every node.
func (s *servers) rabbitURL() string {
	return "amqp://guest:guest@127.0.0.1:" + strings.Join(s.rabbitPorts, ",127.0.0.1:") + "/"
}

// dialRabbit connects to the first node that answers.
func (s *servers) dialRabbit() (conn *amqp.Connection, err error) {
	for _, port := range s.rabbitPorts {
		if conn, err = dialNode(port); err == nil {
			return conn, nil
		}
	}
	return nil, err
}

func dialNode(port string) (*amqp.Connection, error) {
	return amqp.DialConfig("amqp://guest:guest@127.0.0.1:"+port+"/", amqp.Config{
		Heartbeat: 10 * time.Second, Dial: amqp.DefaultDial(2 * time.Second)})
}

func acceptsAMQP(port string) error {
	conn, err := dialNode(port)
	if err != nil {
		return err
	}
	return conn.Close()
}

// rabbitChannel is for one use or a few.
func (s *servers) rabbitChannel(t *testing.T) *amqp.Channel {
	t.Helper()
	conn, err := s.dialRabbit()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.CloseDeadline(time.Now().Add(time.Second)) })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func (s *servers) databaseURL(role, database string) string {
	return fmt.Sprintf("postgres://%s@127.0.0.1:%s/%s", role, s.postgresPort, database)
}

func (s *servers) trySQL(statements ...string) error {
	return trySQLAt(s.databaseURL("postgres", "postgres"), statements...)
}

// trySQLAt runs statements over one connection.
func trySQLAt(url string, statements ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for _, statement := range statements {
		if _, err := conn.Exec(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}

// sql runs statements as the superuser, in no database of the service.
func (s *servers) sql(t *testing.T, statements ...string) {
	t.Helper()
	if err := s.trySQL(statements...); err != nil {
		t.Fatalf("%v: %v", statements, err)
	}
}

// newDatabase returns the name of an empty one that the role drill owns. What it leaves
// behind would make a restart slower.
func (s *servers) newDatabase(t *testing.T) string {
	t.Helper()
	s.databases++
	name := "drill_" + strconv.Itoa(s.databases)
	s.sql(t, "CREATE DATABASE "+name+" OWNER drill")
	t.Cleanup(func() { s.trySQL("DROP DATABASE " + name + " WITH (FORCE)") })
	return name
}

// restartPostgres does what pg_ctl restart does.
func (s *servers) restartPostgres(t *testing.T, signal syscall.Signal) {
	t.Helper()
	s.postgres.end(signal)
	if err := s.postgres.start(); err != nil {
		t.Fatal(err)
	}
}

// freezePostgres stops every process of it for a while: each is in a group of its own.
func (s *servers) freezePostgres(t *testing.T, db *pgxpool.Pool, d time.Duration) {
	t.Helper()
	conn, err := db.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	s.postgres.signal(syscall.SIGSTOP) // from here on there is no new process
	defer s.thawPostgres()
	rows, _ := conn.Query(t.Context(), "SELECT pid FROM pg_stat_activity")
	s.mu.Lock()
	s.frozen, err = pgx.CollectRows(rows, pgx.RowTo[int])
	for _, pid := range s.frozen {
		syscall.Kill(pid, syscall.SIGSTOP)
	}
	s.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(d)
}

func (s *servers) thawPostgres() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, pid := range s.frozen {
		syscall.Kill(pid, syscall.SIGCONT)
	}
	s.frozen = nil
	s.postgres.signal(syscall.SIGCONT)
}

// wire is a network between two programs that can go wrong.
type wire struct {
	url      string
	listener net.Listener

	mu     sync.Mutex
	moved  *sync.Cond
	down   bool    // refuses connections
	silent [2]bool // swallows what is sent: by the client (0), by the server (1)
	conns  map[net.Conn]bool
}

const fromClient, fromServer = 0, 1

// newWire leads to the server of a URL until the test ends.
func newWire(t *testing.T, target string) *wire {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(target, "@")
	address, path, _ := strings.Cut(rest, "/")
	w := &wire{
		url:      strings.TrimSuffix(target, rest) + listener.Addr().String() + "/" + path,
		listener: listener,
		conns:    make(map[net.Conn]bool),
	}
	w.moved = sync.NewCond(&w.mu)
	t.Cleanup(w.close)
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			go w.connect(in, address)
		}
	}()
	return w
}

func (w *wire) close() {
	w.listener.Close()
	w.cut(true)
}

func (w *wire) connect(in net.Conn, address string) {
	out, err := net.Dial("tcp", address)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil || w.down {
		in.Close()
		if err == nil {
			out.Close()
		}
		return
	}
	w.conns[in], w.conns[out] = true, true
	go w.carry(out, in, fromClient)
	go w.carry(in, out, fromServer)
}

func (w *wire) carry(to, from net.Conn, direction int) {
	defer to.Close()
	defer from.Close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			w.mu.Lock()
			for w.silent[direction] && w.conns[from] {
				w.moved.Wait()
			}
			connected := w.conns[from]
			w.mu.Unlock()
			if !connected {
				return
			}
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// cut closes all connections; what is under way is lost. down says what becomes of new ones.
func (w *wire) cut(down bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down = down
	for c := range w.conns {
		c.Close()
	}
	clear(w.conns)
	w.moved.Broadcast()
}

// swallow holds back what one side sends from now on, or delivers it after all.
func (w *wire) swallow(direction int, silent bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.silent[direction] = silent
	w.moved.Broadcast()
}

// replica is the service as a process.
type replica struct {
	cmd   *exec.Cmd
	url   string
	ready atomic.Bool  // what /readyz said last
	heard atomic.Int64 // when its consumer logged an event last
	ended chan struct{}

	output    *os.File   // the reading end of the standard output
	reading   sync.Mutex // held while nobody reads the output
	stderr    logBuffer
	important logBuffer // the lines at WARN and above, and what they make good
}

// startReplica returns when the service listens. The program is the present build where path is
// empty. heard gets every event that its consumer logs.
func (s *servers) startReplica(path string, heard func(string, eventData),
	env ...string) (*replica, error) {
	executable.once.Do(func() { executable.err = buildExecutable() })
	if executable.err != nil {
		return nil, executable.err
	}
	path = cmp.Or(path, filepath.Join(executable.dir, "user-service"))
	output, input, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	r := &replica{output: output, ended: make(chan struct{})}
	r.cmd = exec.Command(path)
	r.cmd.Dir = executable.dir
	r.cmd.Env = append([]string{"PORT=0"}, env...)
	r.cmd.Stdout, r.cmd.Stderr = input, &r.stderr
	err = r.cmd.Start()
	input.Close()
	if err != nil {
		return nil, err
	}
	s.killAtEnd(r.cmd.Process)
	started := make(chan string, 1)
	go func() {
		r.readOutput(started, heard)
		r.output.Close()
		r.cmd.Wait()
		close(r.ended)
	}()
	select {
	case port := <-started:
		r.url = "http://127.0.0.1:" + port
		r.ready.Store(true)
		return r, nil
	case <-r.ended:
		return nil, fmt.Errorf("the service ended at its start: %s%s", &r.important, &r.stderr)
	case <-time.After(70 * time.Second):
		r.cmd.Process.Kill()
		return nil, fmt.Errorf("the service does not start: %s", &r.important)
	}
}

func (r *replica) readOutput(started chan<- string, heard func(string, eventData)) {
	lines := bufio.NewScanner(r.output)
	lines.Buffer(nil, 1<<20)
	for {
		r.reading.Lock()
		more := lines.Scan()
		r.reading.Unlock()
		if !more {
			return
		}
		text := lines.Bytes()
		isEvent := bytes.Contains(text, []byte(`"event":"Received event`))
		if !isEvent && bytes.Contains(text, []byte(`"event":"Request `)) {
			continue
		}
		var line struct {
			Level, Event string
			Port         int
			Type         string `json:"event_type"`
			User         int64  `json:"user_id"`
			Version      int64
		}
		if err := json.Unmarshal(text, &line); err != nil {
			line.Level = "ERROR"
		}
		switch {
		case isEvent:
			r.heard.Store(time.Now().UnixNano())
			heard(line.Type, eventData{line.User, line.Version})
		case line.Event == "Service started":
			started <- strconv.Itoa(line.Port)
		case line.Level != "INFO" || line.Event == "Event connection restored":
			r.important.Write(append(slices.Clone(text), '\n'))
		}
	}
}

// blockOutput lets the service wait in its next writes until the function that comes back
// is called. A small pipe is full at once.
func (r *replica) blockOutput() (unblock func()) {
	r.reading.Lock()
	const setPipeSize = 1031 // F_SETPIPE_SZ of Linux, without which it takes a little longer
	if raw, err := r.output.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { syscall.Syscall(syscall.SYS_FCNTL, fd, setPipeSize, 4096) })
	}
	return r.reading.Unlock
}

func (r *replica) alive() bool {
	select {
	case <-r.ended:
		return false
	default:
		return true
	}
}

// probe asks /readyz again and again, as a load balancer does.
func (r *replica) probe() {
	prober := &http.Client{Timeout: time.Second}
	defer prober.CloseIdleConnections()
	for r.alive() {
		response, err := prober.Get(r.url + "/readyz")
		if err == nil {
			response.Body.Close()
		}
		r.ready.Store(err == nil && response.StatusCode == http.StatusOK)
		time.Sleep(100 * time.Millisecond)
	}
	r.ready.Store(false)
}

// metric is a number from /metrics, 0 where it cannot be had.
func (r *replica) metric(name string) float64 {
	prober := &http.Client{Timeout: time.Second}
	defer prober.CloseIdleConnections()
	response, err := prober.Get(r.url + "/metrics")
	if err != nil {
		return 0
	}
	defer response.Body.Close()
	for lines := bufio.NewScanner(response.Body); lines.Scan(); {
		if text, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			value, _ := strconv.ParseFloat(text, 64)
			return value
		}
	}
	return 0
}
