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
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// release is the version of this source. CHANGELOG.md and openapi.json name the same.
const release = "1.1.0"

// main runs a command until it ends, or until SIGINT or SIGTERM. A second signal ends the process
// at once.
func main() {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		signal.Stop(signals) // first of all, so that a second signal ends the process at once
		cancel()
	}()
	os.Exit(command(ctx, os.Args[1:], os.Stdout))
}

// command runs the service or another command, and returns the exit code: 2 for wrong arguments or
// settings, 1 for a failure. The last line on stdout gives the reason.
func command(ctx context.Context, args []string, stdout io.Writer) int {
	out := &logWriter{w: stdout}
	log := newLogger(out, slog.LevelInfo)
	if len(args) > 0 && args[0] == "key" {
		return makeKey(args[1:], stdout, log)
	}
	getenv, err := getenvWithFile(".env")
	var s settings
	if err == nil {
		s, err = loadSettings(getenv)
	}
	if err != nil {
		log.Error("Invalid setting", "error", err)
		return 2
	}
	switch strings.Join(args, " ") {
	case "":
		machine := machineLimits()
		floor := machine.applyToRuntime()
		err = run(ctx, s, machine, out)
		runtime.KeepAlive(floor)
	case "healthcheck":
		err = checkHealth(s)
	default:
		log.Error("Unknown command", "error", "commands: none to serve, key, healthcheck")
		return 2
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
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return release
	}
	if tag := releaseTag.FindStringSubmatch(info.Main.Version); tag != nil {
		return tag[1]
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return release + "+" + s.Value[:min(len(s.Value), 12)]
		}
	}
	return release
}

// store is implemented by postgres and memory.
type store interface {
	userStore
	outbox
	ready(context.Context) state
	// maintain keeps the tables small until ctx ends.
	maintain(ctx context.Context)
	// writeMetrics writes the metrics of the connections to a database, if there are any.
	writeMetrics(w io.Writer)
	close()
}

// run serves until ctx ends. It returns when everything that it started has ended.
func run(ctx context.Context, s settings, machine limits, out *logWriter) error {
	log := newLogger(out, s.logLevel)
	defer func() { _ = out.flush() }()
	store, err := openStore(ctx, s, log)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	defer store.close()
	set := newMetrics()
	consumer := newConsumer(log, out, set)
	broker := newBroker(s, consumer, log, set)
	if len(s.apiKeys) == 0 {
		log.Warn("No API_KEYS: every client that reaches the service has full access")
	}
	draining := &atomic.Bool{}
	handler := newHandler(dependencies{s, machine, store, broker, log, set, draining})
	server := newHTTPServer(handler, log)

	listener, err := net.Listen("tcp", net.JoinHostPort(s.host, strconv.Itoa(s.port)))
	if err != nil {
		return fmt.Errorf("listening on HOST and PORT: %w", err)
	}
	stopConsumer := start(func(ctx context.Context) { consumer.run(ctx, broker) })
	stopUpkeep := start(store.maintain)
	stopRelay := start(newRelay(store, broker, log, set).run)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
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
		{"GET", "/docs/start.js", serveDocsScript},
		{"GET", "/docs/swagger-ui-bundle.js", serveSwaggerUI},
		{"GET", "/docs/swagger-ui.css", serveSwaggerUI},
		{"GET", "/docs/favicon-32x32.png", serveSwaggerUI},
		{"GET", "/openapi.json", serveOpenAPI},
		{"GET", "/docs/{$}", redirectToDocs},
		{"GET", "/schema", redirectToDocs},
		{"GET", "/{$}", redirectToDocs},

		{"GET", "/healthz", h.live},
		{"GET", "/readyz", h.ready},
	}
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
	set.NewCounter("log_lines_dropped_total")
	set.NewGauge(fmt.Sprintf("build_info{version=%q,go=%q}", version(), runtime.Version()),
		func() float64 { return 1 })
	return set
}

// httpServer is an http.Server that counts its connections.
type httpServer struct {
	http.Server
	open atomic.Int64
}

// newHTTPServer returns a server with timeouts, for which zero would mean no limit. Errors of
// single connections are logged at DEBUG.
func newHTTPServer(h http.Handler, log *slog.Logger) *httpServer {
	s := &httpServer{Server: http.Server{
		Handler:                      h,
		ReadHeaderTimeout:            readHeaderTimeout,
		ReadTimeout:                  readTimeout,
		WriteTimeout:                 writeTimeout,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeaderBytes,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
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

// shutDown closes the listener, lets requests in progress finish, and closes what takes too long.
// It does not close an idle connection at once, because its client may be sending a request: that
// request's answer tells the client to close the connection.
func (s *httpServer) shutDown(listener net.Listener) error {
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
