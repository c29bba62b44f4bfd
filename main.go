// Command user-service is a REST API for users over PostgreSQL that publishes every change,
// and nothing but changes, as an event on RabbitMQ.
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
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// The bounds of a stop. Together with closeWait they stay below 10 s.
const (
	drainIdle     = 500 * time.Millisecond     // for connections that are kept alive
	drainRequests = 5500 * time.Millisecond    // for requests under way
	drainEvents   = relayDrain + time.Second/2 // for events that are committed
	drainConsumer = 500 * time.Millisecond     // for the event in hand
)

const memoryLimit = 64 << 20 // bytes, beyond which garbage is collected sooner

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-signals
		signal.Stop(signals) // before anything else: a second signal ends the process at once
		cancel()
	}()
	os.Exit(command(ctx, os.Args[1:], os.Stdout))
}

// command runs the service, or the one command that it has, and returns the exit code: 2
// for what was asked wrongly, 1 for what failed. The last line on stdout says why.
func command(ctx context.Context, args []string, stdout io.Writer) int {
	log := newLogger(stdout, slog.LevelInfo)
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
		tune(s)
		err = run(ctx, s, newLogger(stdout, s.logLevel))
	case "healthcheck":
		err = checkHealth(s)
	default:
		log.Error("Unknown command", "error", "the commands are none, to serve, key and healthcheck")
		return 2
	}
	if err != nil {
		log.Error("Service failed", "error", err)
		return 1
	}
	return 0
}

// makeKey prints a new API key, and the line that lets it in.
func makeKey(args []string, stdout io.Writer, log *slog.Logger) int {
	readOnly := len(args) == 2 && args[1] == "read"
	if len(args) != 1 && !readOnly {
		log.Error("Unknown command", "error",
			"the arguments of key are a name and, for a key to read only, read")
		return 2
	}
	key, setting, err := newAPIKey(args[0], readOnly)
	if err != nil {
		log.Error("Unknown command", "error", "a name has 1 to 64 of A-Z a-z 0-9 . _ -")
		return 2
	}
	fmt.Fprintf(stdout, "The key, which is shown only now:\n%s\n"+
		"Its setting; several are separated by commas:\nAPI_KEYS=%s\n", key, setting)
	return 0
}

// store is what both stores are.
type store interface {
	userStore
	outbox
	ready(context.Context) string
	// maintain does regular work on the tables until ctx ends.
	maintain(ctx context.Context)
	close()
}

// tune sets what GOGC, GOMEMLIMIT and GOMAXPROCS do not. Garbage may wait: the heap is small,
// but each password takes 12 MiB; with users in memory the heap has no limit. And the
// kernel has to choose between one thread more than cores: where passwords are hashed, Go
// alone lets other requests wait for 10 ms at each step. With more threads hashing is slower.
func tune(s settings) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if os.Getenv("GOMEMLIMIT") == "" && s.databaseURL != "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(cores + 1)
	}
}

// run serves until ctx ends, and returns when everything that it began has ended.
func run(ctx context.Context, s settings, log *slog.Logger) error {
	defer flushLog(log)
	set := metrics.NewSet()
	store, err := openStore(ctx, s, log)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	defer store.close()
	consumer := newConsumer(log, set)
	broker := newBroker(s, consumer, log, set)
	if len(s.apiKeys) == 0 {
		log.Warn("No API_KEYS: everybody who reaches the service may do everything")
	}
	server := newServer(s, log, set)
	api := newAPI(store, s, &server.traffic, log)
	health := &health{store: store, broker: broker, metrics: set, draining: &server.draining}
	server.addRoutes(openRoutes(health), keyedRoutes(api, health))

	listener, err := net.Listen("tcp", net.JoinHostPort(s.host, strconv.Itoa(s.port)))
	if err != nil {
		return fmt.Errorf("listening on HOST and PORT: %w", err)
	}
	stopConsumer := start(func(ctx context.Context) { consumer.run(ctx, broker) })
	stopUpkeep := start(store.maintain)
	stopRelay := start(newRelay(store, broker, &server.traffic, log, set).run)
	httpServer := newHTTPServer(server, log)
	served := make(chan error, 1)
	go func() { served <- httpServer.Serve(listener) }()
	address := listener.Addr().(*net.TCPAddr)
	log.Info("Service started", "app", s.appName, "host", s.host, "port", address.Port,
		"docs", docsURL(s.host, address.Port))

	select {
	case err = <-served: // only a listener that broke ends it before its Shutdown
	case <-ctx.Done():
		_ = stopCollecting(log) // a second signal ends the process without a word
		log.Info("Service stopping")
		server.draining.Store(true)
		time.Sleep(s.shutdownDelay)
		err = httpServer.shutDown(listener)
	}
	stopUpkeep(0)
	stopRelay(drainEvents)
	stopConsumer(drainConsumer)
	log.Info("Service stopped")
	return err
}

// keyedRoutes is the list of what needs a key, where there are keys.
func keyedRoutes(a *api, h *health) []route {
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

// openRoutes is the list of what everybody may see.
func openRoutes(h *health) []route {
	return []route{
		{"GET", "/docs", serveDocs},
		{"GET", "/docs/start.js", serveDocsFile},
		{"GET", "/docs/swagger-ui-bundle.js", serveDocsFile},
		{"GET", "/docs/swagger-ui.css", serveDocsFile},
		{"GET", "/docs/favicon-32x32.png", serveDocsFile},
		{"GET", "/openapi.json", serveOpenAPI},
		{"GET", "/docs/{$}", redirectToDocs},
		{"GET", "/schema", redirectToDocs},
		{"GET", "/{$}", redirectToDocs},

		{"GET", "/healthz", h.live},
		{"GET", "/readyz", h.ready},
	}
}

func openStore(ctx context.Context, s settings, log *slog.Logger) (store, error) {
	if s.databaseURL == "" {
		log.Warn("No DATABASE_URL: users are kept in memory, and everything is lost on exit")
		return newMemory(), nil
	}
	return openPostgres(ctx, s.databaseURL, s.appName, log)
}

// newBroker is where to gets its messages from.
func newBroker(s settings, to messageHandler, log *slog.Logger, set *metrics.Set) broker {
	var b broker = inProcess{to, log}
	if s.rabbitURL != "" {
		b = newRabbitMQ(s, log, set)
	}
	set.GetOrCreateCounter("events_returned_total") // none is, in process
	set.NewGauge("broker_connected", func() float64 { return oneIf(b.status() != "down") })
	return b
}

// httpServer is an http.Server that knows how many connections it has.
type httpServer struct {
	http.Server
	open atomic.Int64
}

// newHTTPServer bounds what a client may take: zero would mean without end.
func newHTTPServer(h http.Handler, log *slog.Logger) *httpServer {
	s := &httpServer{Server: http.Server{
		Handler:                      h,
		ReadHeaderTimeout:            3 * time.Second,
		ReadTimeout:                  10 * time.Second,
		WriteTimeout:                 15 * time.Second,
		IdleTimeout:                  60 * time.Second,
		MaxHeaderBytes:               8 << 10,
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

// shutDown closes the listener, lets requests under way finish, and cuts off what takes
// too long. A connection that is idle is not closed at once: its client may be sending
// just now, and is told with its next answer that it was the last.
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
	if errors.Is(err, net.ErrClosed) { // the listener, which is closed already
		err = nil
	}
	return err
}

// start runs f in a goroutine. The function that it returns ends f's context and waits for
// f, but no longer than atMost.
func start(f func(context.Context)) (stop func(atMost time.Duration)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	return func(atMost time.Duration) {
		cancel()
		select {
		case <-done:
		case <-time.After(atMost):
		}
	}
}

// docsURL is what a person on this machine opens.
func docsURL(host string, port int) string {
	if ip := net.ParseIP(host); ip != nil && (ip.IsUnspecified() || ip.IsLoopback()) {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, strconv.Itoa(port)) + "/docs"
}
