package main

// This file owns the settings: environment variables and the file .env.

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgconn"
	amqp "github.com/rabbitmq/amqp091-go"
)

// settings are the values of the environment variables; README.md describes them.
type settings struct {
	databaseURL       string // empty: users are stored in memory
	rabbitURL         string // empty: events are delivered in process
	exchange          string // has no variable; only tests change it
	appName           string
	host              string
	port              int // 0: the system picks a free one
	logLevel          slog.Level
	passwordMinLength int // in code points
	passwordBlocklist bool
	shutdownDelay     time.Duration
	apiKeys           []apiKey // nil: everybody has full access; empty: nobody has
	open              bool     // API_KEYS=open: access without keys is intended
	rateLimit         float64  // requests per second and client; 0: no limit
	trustedProxies    []netip.Prefix
	corsOrigins       []string
	jwtIssuer         string // empty: tokens of every issuer whose keys jwksURL has
	jwksURL           string // empty: the configuration of jwtIssuer names it
	jwtAudience       string // empty: no access tokens
}

// settingError names a variable that cannot be used, and what it must be. It never contains the
// value, which may be a secret.
type settingError struct {
	name   string
	takes  string
	reason reason // empty if takes says enough
	source string // file and line; empty for an environment variable
}

// Error implements error.
func (e *settingError) Error() string {
	text := e.name + " must be " + e.takes
	if e.reason != "" {
		text += "; " + string(e.reason)
	}
	if e.source != "" {
		text += " (" + e.source + ")"
	}
	return text
}

// reason is the error of a parser that says what is wrong with a value, without a secret.
type reason string

// Error implements error.
func (r reason) Error() string { return string(r) }

// variable is a setting as it was found.
type variable struct {
	value  string
	set    bool   // in the environment, maybe to ""
	source string // file and line; empty for an environment variable
}

// loadSettings reads every setting through lookup, which returns the value "" for one that is not
// set. It fails with a *settingError for the first variable that cannot be used.
func loadSettings(lookup func(string) variable) (settings, error) {
	env := &environment{lookup: lookup}
	var withoutKeys []apiKey
	keys := lookup("API_KEYS")
	if keys.set { // to "", such as from an empty file: it must not give everybody access
		withoutKeys = []apiKey{}
	}
	defaultLevel := slog.LevelInfo
	if setting(env, "DEBUG", false, "true or false", strconv.ParseBool) {
		defaultLevel = slog.LevelDebug
	}
	s := settings{
		exchange: "user_events",
		databaseURL: setting(env, "DATABASE_URL", "",
			"a URL such as postgres://user:password@host:5432/database", parseDatabaseURL),
		rabbitURL: setting(env, "RABBITMQ_URL", "",
			"a URL such as amqp://user:password@host:5672/, with hosts separated by commas",
			parseRabbitURL),
		appName: setting(env, "APP_NAME", "user-service",
			"1 to 255 bytes of text without control characters", parseAppName),
		host: setting(env, "HOST", "127.0.0.1",
			"an IP address or a host name to listen on", parseHost),
		port: setting(env, "PORT", 8000,
			"a port number, 0 to 65535", intBetween(0, 65535)),
		logLevel: setting(env, "LOG_LEVEL", defaultLevel,
			"DEBUG, INFO, WARNING, ERROR or CRITICAL", parseLevel),
		passwordMinLength: setting(env, "PASSWORD_MIN_LENGTH", 8,
			"a number of characters, 1 to 128", intBetween(1, maxPasswordLength)),
		passwordBlocklist: setting(env, "PASSWORD_BLOCKLIST", false,
			"on or off", parseSwitch),
		apiKeys: setting(env, "API_KEYS", withoutKeys,
			"open, or a list of name:sha256hex or name:sha256hex:read, separated by commas",
			parseAPIKeys),
		open: keys.value == "open",
		rateLimit: setting(env, "RATE_LIMIT", 0,
			"a number of requests per second, 0.01 to 1000000", parseRate),
		trustedProxies: setting(env, "TRUSTED_PROXIES", nil,
			"a list of IP addresses or networks, such as 10.0.0.0/8, separated by commas",
			listOf(parsePrefix)),
		corsOrigins: setting(env, "CORS_ORIGINS", nil,
			"a list of origins, such as https://app.example.com, separated by commas",
			listOf(parseOrigin)),
		shutdownDelay: setting(env, "SHUTDOWN_DELAY", 0,
			"a duration of 0 or more with its unit, such as 500ms or 5s", parseDelay),
		jwtIssuer: setting(env, "JWT_ISSUER", "",
			"the URL of an identity provider, such as https://id.example.com/", parseProviderURL),
		jwksURL: setting(env, "JWT_JWKS_URL", "",
			"the URL of a JSON Web Key Set, such as https://id.example.com/keys", parseProviderURL),
		jwtAudience: setting(env, "JWT_AUDIENCE", "",
			"1 to 255 bytes of text without control characters", parseAppName),
	}
	return s, cmp.Or(env.err, s.checkTokens())
}

// checkTokens fails with a *settingError if the settings of access tokens do not fit together.
func (s settings) checkTokens() error {
	hasProvider := s.jwtIssuer != "" || s.jwksURL != ""
	switch {
	case hasProvider && s.jwtAudience == "":
		return &settingError{name: "JWT_AUDIENCE",
			takes: "the aud of the access tokens, because JWT_ISSUER or JWT_JWKS_URL is set"}
	case !hasProvider && s.jwtAudience != "":
		return &settingError{name: "JWT_ISSUER", takes: "the URL of an identity provider, because " +
			"JWT_AUDIENCE is set; or set JWT_JWKS_URL"}
	case hasProvider && s.open:
		return &settingError{name: "API_KEYS", takes: "a list of keys, or unset, because JWT_AUDIENCE " +
			"is set; open would admit everybody"}
	}
	return nil
}

// warnings returns what the operator should know about valid settings.
func (s settings) warnings() (texts []string) {
	switch {
	case s.jwtAudience != "":
	case s.apiKeys == nil && !s.open && !isLoopback(s.host):
		texts = append(texts, "No API_KEYS: every client that reaches the service has full "+
			"access; set keys, or API_KEYS=open")
	case s.apiKeys != nil && len(s.apiKeys) == 0:
		texts = append(texts, "API_KEYS is set but empty: no client has access; "+
			"set keys, or unset it, or set API_KEYS=open")
	}
	if s.databaseURL != "" && mayConnectInClear(s.databaseURL) {
		texts = append(texts, "DATABASE_URL names a remote host and does not require TLS; "+
			"add sslmode=verify-full")
	}
	if slices.ContainsFunc(splitHosts(s.rabbitURL), isRemoteInClear) {
		texts = append(texts, "RABBITMQ_URL names a remote host and does not use TLS; use amqps://")
	}
	if isRemoteInClear(cmp.Or(s.jwksURL, s.jwtIssuer)) {
		texts = append(texts, "JWT_ISSUER or JWT_JWKS_URL names a remote host and does not use TLS, "+
			"so that others could replace the keys; use https://")
	}
	if s.jwksURL != "" && s.jwtIssuer == "" {
		texts = append(texts, "No JWT_ISSUER: the keys at JWT_JWKS_URL may sign for every issuer")
	}
	return texts
}

// mayConnectInClear reports whether a remote host of a database URL can be reached without TLS.
func mayConnectInClear(databaseURL string) bool {
	config, err := pgconn.ParseConfig(databaseURL)
	if err != nil {
		return false
	}
	first := &pgconn.FallbackConfig{Host: config.Host, TLSConfig: config.TLSConfig}
	inClear := func(c *pgconn.FallbackConfig) bool {
		return c.TLSConfig == nil && !filepath.IsAbs(c.Host) && !isLoopback(c.Host)
	}
	return slices.ContainsFunc(append(config.Fallbacks, first), inClear)
}

// isLoopback reports whether a host is only reachable from this machine.
func isLoopback(host string) bool {
	return strings.EqualFold(host, "localhost") || net.ParseIP(host).IsLoopback()
}

// environment remembers the first error.
type environment struct {
	lookup func(string) variable
	err    error
}

// setting returns the parsed value of a variable, or fallback if it is not set or cannot be used.
// takes says what it must be.
func setting[T any](env *environment, name string, fallback T, takes string,
	parse func(string) (T, error)) T {
	found := env.lookup(name)
	if found.value == "" {
		return fallback
	}
	value, err := parse(found.value)
	if err != nil && env.err == nil {
		why, _ := errors.AsType[reason](err)
		env.err = &settingError{name, takes, why, found.source}
	}
	return value
}

var errUnusable = errors.New("unusable value")

// intBetween returns a parser of integers from low to high.
func intBetween(low, high int) func(string) (int, error) {
	return func(text string) (int, error) {
		n, err := strconv.ParseUint(text, 10, 31)
		if err != nil || int(n) < low || int(n) > high {
			return 0, errUnusable
		}
		return int(n), nil
	}
}

// parseDatabaseURL returns a valid URL without its driver suffix, such as in postgresql+asyncpg.
func parseDatabaseURL(text string) (string, error) {
	scheme, rest, _ := strings.Cut(text, ":")
	scheme, _, _ = strings.Cut(scheme, "+")
	text = scheme + ":" + rest
	if err := checkURL(text, "postgres", "postgresql"); err != nil {
		return "", err
	}
	_, err := poolConfig(text, "")
	if unreadable, ok := errors.AsType[*fs.PathError](err); ok { // such as sslrootcert
		err = reason("it names a file that cannot be read: " + unreadable.Error())
	}
	return text, err
}

// parseRabbitURL returns text if it is a valid URL of one or several hosts.
func parseRabbitURL(text string) (string, error) {
	if err := checkURL(text, "amqp", "amqps"); err != nil {
		return "", err
	}
	hosts := splitHosts(text)
	for _, single := range hosts {
		if u, err := url.Parse(single); err != nil || u.Host == "" && len(hosts) > 1 {
			return "", errUnusable
		}
		if _, err := amqp.ParseURI(single); err != nil {
			return "", err
		}
	}
	return text, nil
}

// checkURL refuses mistakes that the drivers accept. An "@" after the host belongs to a password
// that is not percent-encoded: part of it would be taken for the path, and appear in error
// messages.
func checkURL(text string, schemes ...string) error {
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok || !slices.Contains(schemes, scheme) {
		return errUnusable
	}
	for _, single := range splitHosts(text) {
		u, err := url.Parse(single)
		if err != nil || strings.HasSuffix(u.Host, ":") ||
			strings.Count(u.Host, ":") > 1 && !strings.HasPrefix(u.Host, "[") {
			return errUnusable
		}
		if port := u.Port(); port != "" {
			if _, err := intBetween(1, 65535)(port); err != nil {
				return err
			}
		}
	}
	if end := strings.IndexAny(rest, "/?#"); end >= 0 && strings.Contains(rest[end:], "@") {
		return errUnusable
	}
	return nil
}

// splitHosts returns one URL per host of a URL such as amqp://user:password@a:5672,b:5672/vhost.
func splitHosts(text string) (urls []string) {
	scheme, rest, _ := strings.Cut(text, "://")
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	host := strings.LastIndex(rest[:end], "@") + 1
	for single := range strings.SplitSeq(rest[host:end], ",") {
		urls = append(urls, scheme+"://"+rest[:host]+single+rest[end:])
	}
	return urls
}

// parseAppName accepts what AMQP and PostgreSQL can carry as a name.
func parseAppName(text string) (string, error) {
	if len(text) > 255 || !utf8.ValidString(text) || strings.ContainsFunc(text, unicode.IsControl) {
		return "", errUnusable
	}
	return text, nil
}

// parseHost accepts an address or a name. It asks the DNS, so an unknown name is invalid.
func parseHost(text string) (string, error) {
	_, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(text, "0"))
	return text, err
}

var levels = map[string]slog.Level{
	"DEBUG":    slog.LevelDebug,
	"INFO":     slog.LevelInfo,
	"WARNING":  slog.LevelWarn,
	"WARN":     slog.LevelWarn,
	"ERROR":    slog.LevelError,
	"CRITICAL": slog.LevelError,
}

// parseLevel accepts a level name in any case.
func parseLevel(text string) (slog.Level, error) {
	level, ok := levels[strings.ToUpper(text)]
	if !ok {
		return 0, errUnusable
	}
	return level, nil
}

// parseSwitch accepts on and off, and what strconv.ParseBool accepts.
func parseSwitch(text string) (bool, error) {
	switch strings.ToLower(text) {
	case "on":
		return true, nil
	case "off":
		return false, nil
	}
	return strconv.ParseBool(text)
}

// parseRate accepts a number of requests per second.
func parseRate(text string) (float64, error) {
	rate, err := strconv.ParseFloat(text, 64)
	if err != nil || !(rate >= 0.01 && rate <= 1e6) { // also refuses NaN
		return 0, errUnusable
	}
	return rate, nil
}

// listOf parses a list that is separated by commas and optional white space.
func listOf[T any](parse func(string) (T, error)) func(string) ([]T, error) {
	return func(text string) (list []T, err error) {
		for part := range strings.SplitSeq(text, ",") {
			value, err := parse(strings.TrimSpace(part))
			if err != nil {
				return nil, err
			}
			list = append(list, value)
		}
		return list, nil
	}
}

// parseDelay accepts a duration that is not negative.
func parseDelay(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return 0, errUnusable
	}
	return d, nil
}

// lookupWithFile returns a function that looks up a name in the environment and then in the file at
// path, which may be missing. An empty value counts as not set in both.
func lookupWithFile(path string) (func(string) variable, error) {
	content, err := os.ReadFile(path) // #nosec G304 -- main passes .env
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, &settingError{name: path, takes: "a readable file of NAME=value lines"}
	}
	file, err := parseEnvFile(string(content))
	if err != nil {
		return nil, &settingError{name: path, takes: err.Error()}
	}
	return func(name string) variable {
		value, set := os.LookupEnv(name)
		if line := file[name]; value == "" && line.value != "" {
			return variable{line.value, set, fmt.Sprintf("%s, line %d", path, line.number)}
		}
		return variable{value: value, set: set}
	}, nil
}

// envLine is a value of a .env file, and the number of its line.
type envLine struct {
	value  string
	number int
}

// parseEnvFile reads the format of `docker run --env-file`, and also accepts "export " before a
// name, quotes around a value, and a comment after it. The last line of a name counts. A name
// without "=" is not set.
func parseEnvFile(content string) (map[string]envLine, error) {
	if strings.HasPrefix(content, "\xff\xfe") || strings.HasPrefix(content, "\xfe\xff") ||
		strings.Contains(content, "\x00") {
		return nil, errors.New("UTF-8 text, not UTF-16, which redirections in PowerShell write")
	}
	values := make(map[string]envLine)
	number := 0
	for line := range strings.Lines(strings.TrimPrefix(content, "\ufeff")) {
		number++
		line = strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r")
		line = strings.TrimLeftFunc(line, unicode.IsSpace)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, value, _ := strings.Cut(strings.TrimPrefix(line, "export "), "=")
		name = strings.TrimLeft(name, " \t")
		if name == "" || strings.ContainsFunc(name, unicode.IsSpace) {
			return nil, fmt.Errorf("NAME=value lines; line %d is not one", number)
		}
		values[name] = envLine{unquote(value), number}
	}
	return values, nil
}

var (
	quoted          = regexp.MustCompile(`^\s*(?:"(.*?)"|'(.*?)')\s*(?:\s#.*)?$`)
	trailingComment = regexp.MustCompile(`\s#.*`)
)

// unquote removes a comment that follows white space, white space at both ends, and one pair of
// quotes. Everything between the quotes belongs to the value.
func unquote(value string) string {
	if match := quoted.FindStringSubmatch(value); match != nil {
		return match[1] + match[2]
	}
	return strings.TrimSpace(trailingComment.ReplaceAllString(value, ""))
}
