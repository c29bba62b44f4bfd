// Command user-service is a REST API for users over PostgreSQL that publishes each change of a user
// as an event on RabbitMQ.
//
// This file owns the commands, the routes, and the start and stop of the service.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// release is the version of this source. CHANGELOG.md and openapi.json name the same.
const release = "1.4.1"

// main runs a command until it ends, or until SIGINT or SIGTERM. A second signal ends the process
// at once.
func main() {
	signal.Ignore(syscall.SIGPIPE) // the service goes on if the reader of the log has gone
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		signal.Stop(signals) // first of all, so that a second signal ends the process at once
		cancel()
	}()
	os.Exit(command(ctx, os.Args[1:], streams{os.Stdin, os.Stdout, os.Stderr}))
}

const usage = `user-service is a REST API for users over PostgreSQL with events on RabbitMQ.

  user-service                  run the service
  user-service import FILE      import users from JSON lines; - is standard input
  user-service import --predecessor
                                import the table "user" of the predecessor
  user-service export           print all users as JSON lines
  user-service key NAME [read]  print a new API key and its entry for API_KEYS
  user-service healthcheck      exit with 0 if the service with the same settings answers
  user-service version          print the version, the commit and the Go version
  user-service help             print this text

Import takes --no-events too, and export takes --password-hashes; see docs/takeover.md.
Settings: environment variables or .env; see README.md, section Configuration.
`

// streams are the standard streams of a process.
type streams struct {
	in       io.Reader
	out, err io.Writer
}

// command runs the service or another command, and returns the exit code: 2 for wrong arguments or
// settings, 1 for a failure. The last line of the log gives the reason. The log is on standard output,
// but that of import and export on standard error. If it blocks, command returns logWait later.
func command(ctx context.Context, args []string, std streams) int {
	stdout := std.out
	out := &logWriter{w: stdout}
	if len(args) > 0 && (args[0] == "import" || args[0] == "export") {
		out.w = std.err
	}
	defer func() { _ = out.flush() }()
	log := newLogger(out, slog.LevelInfo)
	if slices.Contains(args, "-h") || slices.Contains(args, "--help") {
		args = []string{"help"}
	}
	switch strings.Join(args, " ") {
	case "", "healthcheck":
		return withSettings(ctx, args, std, out, log)
	case "help":
		fmt.Fprint(stdout, usage)
		return 0
	case "version", "--version":
		number, _, _ := strings.Cut(version(), "+")
		fmt.Fprintf(stdout, "user-service %s, commit %s, %s\n", number, commit(), runtime.Version())
		return 0
	}
	switch args[0] {
	case "key":
		return makeKey(args[1:], stdout, log)
	case "import", "export":
		return withSettings(ctx, args, std, out, log)
	}
	log.Error("Unknown command", "error",
		"commands: none to run the service, import, export, key, healthcheck, version, help")
	return 2
}

// withSettings runs the service, or one of the commands import, export and healthcheck.
func withSettings(ctx context.Context, args []string, std streams, out *logWriter,
	log *slog.Logger) int {
	lookup, err := lookupWithFile(".env")
	var s settings
	if err == nil {
		s, err = loadSettings(lookup)
	}
	if err != nil {
		log.Error("Invalid setting", "error", err)
		return 2
	}
	machine := machineLimits()
	switch {
	case len(args) == 0:
		floor := machine.applyToRuntime()
		err = run(ctx, s, machine, out)
		runtime.KeepAlive(floor)
	case args[0] == "healthcheck":
		err = checkHealth(s)
	default:
		return runTransfer(ctx, args, s, machine, std, log)
	}
	if err != nil {
		log.Error("Service failed", "error", err)
		return 1
	}
	return 0
}

// makeKey prints a new API key and its entry for API_KEYS.
func makeKey(args []string, stdout io.Writer, log *slog.Logger) int {
	readOnly := len(args) == 2 && args[1] == "read"
	if len(args) != 1 && !readOnly {
		log.Error("Invalid arguments", "error", "usage: key NAME [read]")
		return 2
	}
	key, setting, err := newAPIKey(args[0], readOnly)
	if err != nil {
		log.Error("Invalid arguments", "error", "NAME must be 1 to 64 of A-Z a-z 0-9 . _ -")
		return 2
	}
	fmt.Fprintf(stdout, "API key, shown only once:\n%s\n"+
		"Setting; separate several keys by commas:\nAPI_KEYS=%s\n", key, setting)
	return 0
}

var releaseTag = regexp.MustCompile(`^v(\d+\.\d+\.\d+)$`)

// version returns the version of the tag that the binary was built from, else release and the
// commit.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		if tag := releaseTag.FindStringSubmatch(info.Main.Version); tag != nil {
			return tag[1]
		}
	}
	if c := commit(); c != "unknown" {
		return release + "+" + c
	}
	return release
}

// commit returns the first 12 digits of the commit that the binary was built from.
func commit() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value[:min(len(s.Value), 12)]
			}
		}
	}
	return "unknown"
}

// store is implemented by postgres and memory.
type store interface {
	userStore
	outbox
	// ready returns the state of the database.
	ready() state
	// watch keeps ready up to date until ctx ends.
	watch(ctx context.Context)
	// maintain keeps the tables small until ctx ends.
	maintain(ctx context.Context)
	// writeMetrics writes the metrics of the connections to a database, if there are any.
	writeMetrics(w io.Writer)
	close()
}

// run serves until ctx ends. On return, the relay and the consumer have stopped or exceeded their
// share of stopBudget; other goroutines were only told to stop. The caller flushes out.
func run(ctx context.Context, s settings, machine limits, out *logWriter) error {
	log := newLogger(out, s.logLevel)
	free, err := listen(s) // reports a port in use before the wait for the database
	if err != nil {
		return err
	}
	_ = free.Close() // nothing listens until the database answers
	for _, text := range s.warnings() {
		log.Warn(text)
	}
	store, err := openStore(ctx, s, log)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	defer store.close()
	set := newMetrics()
	set.RegisterMetricsWriter(func(w io.Writer) {
		metrics.WriteCounterUint64(w, "log_lines_dropped_total", out.dropped.Load())
	})
	consumer := newConsumer(log, set)
	broker := newBroker(s, consumer, log, set)
	draining := &atomic.Bool{}
	tokens := newTokens(s, log)
	handler := newHandler(dependencies{s, machine, store, broker, log, set, tokens, draining})
	server := newHTTPServer(handler, machine, log)
	listener, err := listen(s)
	if err != nil {
		return err
	}
	stopConsumer := start(func(ctx context.Context) { consumer.run(ctx, broker) })
	stopWatch, stopUpkeep := start(store.watch), start(store.maintain)
	stopTokens := start(tokens.run)
	stopRelay := start(newRelay(store, broker, log, set).run)
	served := make(chan error, 1)
	go func() { served <- server.Serve(limitedListener{listener, server}) }()
	address := listener.Addr().(*net.TCPAddr)
	log.Info("Service started", "app", s.appName, "version", version(), "host", s.host,
		"port", address.Port, "docs", docsURL(s.host, address.Port))

	select {
	case err = <-served: // the listener failed
	case <-ctx.Done():
		out.stopBuffering() // a second signal ends the process without a flush
		log.Info("Service stopping")
		draining.Store(true)
		time.Sleep(s.shutdownDelay)
		err = server.shutDown(listener)
	}
	stopTokens(0)
	stopWatch(0)
	stopUpkeep(0)
	stopRelay(relayDrain + resignWait)
	stopConsumer(drainConsumer)
	log.Info("Service stopped")
	return err
}

// protectedRoutes are the routes that require an API key, if there are keys.
func protectedRoutes(a *api, h *health) []route {
	return []route{
		{"GET", "/users", a.listUsers},
		{"POST", "/users", a.createUser},
		{"GET", "/users/{$}", a.listUsers},
		{"POST", "/users/{$}", a.createUser},
		{"GET", "/users/{id}", a.getUser},
		{"PUT", "/users/{id}", a.updateUser},
		{"PATCH", "/users/{id}", a.updateUser},
		{"DELETE", "/users/{id}", a.deleteUser},
		{"POST", "/users/{id}/password/verify", a.verifyPassword},
		{"GET", "/metrics", h.prometheus},
	}
}

// publicRoutes are the routes that every client may use.
func publicRoutes(h *health) []route {
	return []route{
		{"GET", "/docs", serveDocs},
		{"GET", "/docs/start.js", serveAsset("assets/docs.js")},
		{"GET", "/docs/swagger-ui-bundle.js", serveSwaggerUI},
		{"GET", "/docs/swagger-ui.css", serveSwaggerUI},
		{"GET", "/docs/favicon-32x32.png", serveSwaggerUI},
		{"GET", "/openapi.json", serveAsset("openapi.json")},
		{"GET", "/asyncapi.json", serveAsset("assets/asyncapi.json")},
		{"GET", "/docs/{$}", redirectToDocs},
		{"GET", "/schema", redirectToDocs},
		{"GET", "/{$}", redirectToDocs},
		{"GET", "/healthz", h.live},
		{"GET", "/readyz", h.ready},
	}
}

// listen returns a listener on HOST and PORT.
func listen(s settings) (net.Listener, error) {
	listener, err := net.Listen("tcp", net.JoinHostPort(s.host, strconv.Itoa(s.port)))
	remedy := ""
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		remedy = "; stop the other process on this port, or set PORT to another"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		remedy = "; HOST must be an address of this machine"
	case errors.Is(err, fs.ErrPermission):
		remedy = "; a port below 1024 needs a privilege"
	}
	if err != nil {
		return nil, fmt.Errorf("HOST and PORT: %w%s", err, remedy)
	}
	return listener, nil
}

// openStore returns the store that the settings ask for. It never falls back to memory if a
// database does not answer. The caller closes the store.
func openStore(ctx context.Context, s settings, log *slog.Logger) (store, error) {
	if s.databaseURL == "" {
		log.Warn("No DATABASE_URL: users are stored in memory, and everything is lost on exit")
		return newMemory(), nil
	}
	return openPostgres(ctx, s.databaseURL, s.appName, log)
}

// newBroker returns the broker that delivers messages to handler.
func newBroker(s settings, handler messageHandler, log *slog.Logger, set *metrics.Set) broker {
	var b broker = inProcess{handler, log}
	if s.rabbitURL != "" {
		b = newRabbitMQ(s, log, set)
	}
	set.GetOrCreateCounter("events_returned_total") // also without RabbitMQ
	set.NewGauge("broker_connected", func() float64 { return oneIf(b.state() != stateDown) })
	return b
}

// newMetrics returns a set with the metrics that belong to no other part. The library has only a
// global switch for the types of metrics, which describe requires.
func newMetrics() *metrics.Set {
	metrics.ExposeMetadata(true)
	set := metrics.NewSet()
	set.NewGauge(fmt.Sprintf("build_info{version=%q,go=%q}", version(), runtime.Version()),
		func() float64 { return 1 })
	return set
}

// httpServer is an http.Server that limits its connections.
type httpServer struct {
	http.Server
	most       int64
	open       atomic.Int64
	stopping   atomic.Bool
	closedIdle time.Time // when Accept last closed the idle connections
}

// newHTTPServer returns a server with timeouts, for which zero would mean no limit.
func newHTTPServer(h http.Handler, l limits, log *slog.Logger) *httpServer {
	reports := serverErrors{log, newLimiter[string]("", 4.0/60, 4)}
	s := &httpServer{most: int64(l.connections), Server: http.Server{
		Handler:                      h,
		ReadHeaderTimeout:            readHeaderTimeout,
		ReadTimeout:                  readTimeout,
		WriteTimeout:                 writeTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeaderBytes,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     stdlog.New(reports, "", 0),
	}}
	s.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			s.open.Add(1)
		case http.StateClosed:
			s.open.Add(-1)
		}
	}
	return s
}

// serverErrors logs what net/http reports: that it cannot accept connections, such as for lack of
// file descriptors, a few times a minute at WARN, and errors of single connections at DEBUG.
type serverErrors struct {
	log   *slog.Logger
	rates *limiter[string]
}

// Write implements io.Writer.
func (e serverErrors) Write(line []byte) (int, error) {
	text, level := strings.TrimSpace(string(line)), slog.LevelDebug
	if strings.HasPrefix(text, "http: Accept error") {
		if _, allowed := e.rates.take("", 1); allowed {
			level = slog.LevelWarn
		}
	}
	e.log.Log(context.Background(), level, "HTTP server error", "error", text)
	return len(line), nil
}

// limitedListener accepts a connection when the server has room for it.
type limitedListener struct {
	net.Listener
	server *httpServer
}

// Accept closes the idle connections if there are too many, once per fullPause, and waits until one
// ends. Clients that send much keep theirs: to connect again costs more than a request. The kernel
// holds at most twice sendBuffer of an answer that its client does not read.
func (l limitedListener) Accept() (net.Conn, error) {
	for l.server.isFull() {
		if time.Since(l.server.closedIdle) > fullPause {
			l.server.closedIdle = time.Now()
			l.server.SetKeepAlivesEnabled(false) // closes the idle ones
			l.server.SetKeepAlivesEnabled(true)
		}
		time.Sleep(10 * time.Millisecond)
	}
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetWriteBuffer(sendBuffer) // else it stays larger
	}
	return conn, err
}

// isFull reports whether another connection would be too many, unless the server is stopping.
func (s *httpServer) isFull() bool { return s.open.Load() >= s.most && !s.stopping.Load() }

// shutDown closes the listener, lets requests in progress finish, and closes what takes too long.
// It does not close an idle connection at once, because its client may be sending a request: that
// request's answer tells the client to close the connection.
func (s *httpServer) shutDown(listener net.Listener) error {
	s.stopping.Store(true)
	_ = listener.Close()
	for end := time.Now().Add(drainIdle); s.open.Load() > 0 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainRequests)
	defer cancel()
	err := s.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.Close()
	}
	if errors.Is(err, net.ErrClosed) { // the listener is closed already
		err = nil
	}
	return err
}

// docsURL returns the URL of /docs for a browser on this machine.
func docsURL(host string, port int) string {
	if ip := net.ParseIP(host); ip != nil && (ip.IsUnspecified() || ip.IsLoopback()) {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, strconv.Itoa(port)) + "/docs"
}
