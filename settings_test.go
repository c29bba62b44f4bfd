package main

import (
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode"
)

// envOf returns an environment that has one variable.
func envOf(name, value string) func(string) string {
	return func(asked string) string {
		if asked == name {
			return value
		}
		return ""
	}
}

// defaultSettings returns the settings of an empty environment.
func defaultSettings() settings {
	return settings{
		exchange:          "user_events",
		appName:           "user-service",
		host:              "127.0.0.1",
		port:              8000,
		logLevel:          slog.LevelInfo,
		passwordMinLength: 8,
	}
}

// withDatabaseURL returns a function that sets databaseURL.
func withDatabaseURL(url string) func(*settings) {
	return func(s *settings) { s.databaseURL = url }
}

// withLogLevel returns a function that sets logLevel.
func withLogLevel(level slog.Level) func(*settings) {
	return func(s *settings) { s.logLevel = level }
}

// validSettings are environments of one variable. want makes the expected settings of the defaults.
var validSettings = []struct {
	name, value string
	want        func(*settings)
}{
	{"NOT_A_SETTING", "value", func(*settings) {}},
	{"DATABASE_URL", "postgres://u:p@h:5433/d", withDatabaseURL("postgres://u:p@h:5433/d")},
	{"DATABASE_URL", "postgresql://u:p@h/d?sslmode=disable",
		withDatabaseURL("postgresql://u:p@h/d?sslmode=disable")},
	{"DATABASE_URL", "postgresql+asyncpg://u:p@h/d", withDatabaseURL("postgresql://u:p@h/d")},
	{"DATABASE_URL", "postgres+psycopg2://u:p@h/d", withDatabaseURL("postgres://u:p@h/d")},
	{"DATABASE_URL", "postgres://u:p@ss+w@h/d", withDatabaseURL("postgres://u:p@ss+w@h/d")},
	{"DATABASE_URL", "postgres://u@a:1,b:2/d?target_session_attrs=read-write",
		withDatabaseURL("postgres://u@a:1,b:2/d?target_session_attrs=read-write")},
	{"RABBITMQ_URL", "amqp://u:p@h:5673/%2F",
		func(s *settings) { s.rabbitURL = "amqp://u:p@h:5673/%2F" }},
	{"RABBITMQ_URL", "amqps://h", func(s *settings) { s.rabbitURL = "amqps://h" }},
	{"APP_NAME", "ein Dienst für Leute", func(s *settings) { s.appName = "ein Dienst für Leute" }},
	{"APP_NAME", strings.Repeat("a", 255),
		func(s *settings) { s.appName = strings.Repeat("a", 255) }},
	{"HOST", "0.0.0.0", func(s *settings) { s.host = "0.0.0.0" }},
	{"HOST", "::1", func(s *settings) { s.host = "::1" }},
	{"HOST", "localhost", func(s *settings) { s.host = "localhost" }},
	{"PORT", "0", func(s *settings) { s.port = 0 }},
	{"PORT", "65535", func(s *settings) { s.port = 65535 }},
	{"LOG_LEVEL", "DEBUG", withLogLevel(slog.LevelDebug)},
	{"LOG_LEVEL", "info", withLogLevel(slog.LevelInfo)},
	{"LOG_LEVEL", "WARNING", withLogLevel(slog.LevelWarn)},
	{"LOG_LEVEL", "Warn", withLogLevel(slog.LevelWarn)},
	{"LOG_LEVEL", "error", withLogLevel(slog.LevelError)},
	{"LOG_LEVEL", "critical", withLogLevel(slog.LevelError)},
	{"DEBUG", "true", withLogLevel(slog.LevelDebug)},
	{"DEBUG", "1", withLogLevel(slog.LevelDebug)},
	{"DEBUG", "False", withLogLevel(slog.LevelInfo)},
	{"PASSWORD_MIN_LENGTH", "1", func(s *settings) { s.passwordMinLength = 1 }},
	{"PASSWORD_MIN_LENGTH", "128", func(s *settings) { s.passwordMinLength = 128 }},
	{"PASSWORD_BLOCKLIST", "on", func(s *settings) { s.passwordBlocklist = true }},
	{"PASSWORD_BLOCKLIST", "OFF", func(*settings) {}},
	{"API_KEYS", "a:" + strings.Repeat("00", 32) + ", b.c:" + strings.Repeat("00", 32) + ":read",
		func(s *settings) { s.apiKeys = []apiKey{{name: "a"}, {name: "b.c", readOnly: true}} }},
	{"RATE_LIMIT", "0.5", func(s *settings) { s.rateLimit = 0.5 }},
	{"TRUSTED_PROXIES", "10.0.0.0/8, ::1", func(s *settings) {
		s.trustedProxies = []netip.Prefix{
			netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	}},
	{"CORS_ORIGINS", "https://a.example, http://localhost:3000", func(s *settings) {
		s.corsOrigins = []string{"https://a.example", "http://localhost:3000"}
	}},
	{"SHUTDOWN_DELAY", "0s", func(*settings) {}},
	{"SHUTDOWN_DELAY", "1m500ms", func(s *settings) { s.shutdownDelay = 60500 * time.Millisecond }},
}

// TestSettings checks the settings for each of validSettings.
func TestSettings(t *testing.T) {
	t.Parallel()
	for _, test := range validSettings {
		want := defaultSettings()
		test.want(&want)
		got, err := loadSettings(envOf(test.name, test.value))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s=%s: %+v, %v, want %+v", test.name, test.value, got, err, want)
		}
	}
}

// TestLogLevelOverridesDebug checks that LOG_LEVEL takes precedence over DEBUG.
func TestLogLevelOverridesDebug(t *testing.T) {
	t.Parallel()
	env := map[string]string{"DEBUG": "true", "LOG_LEVEL": "error"}
	s, err := loadSettings(func(name string) string { return env[name] })
	if err != nil || s.logLevel != slog.LevelError {
		t.Errorf("level %v, %v, want ERROR", s.logLevel, err)
	}
}

// invalidSettings are values that a variable must not have, and a substring of the error, which
// says what would be valid.
var invalidSettings = map[string]struct {
	accepts string
	values  []string
}{
	"DATABASE_URL": {"postgres://user:password@host:5432/database", []string{
		"mysql://u:" + secret + "@h/d", "http://h/d", "h:5432/d",
		"postgresql", "postgresql+asyncpg", "postgres:h", "postgres:/h/d", // no "://"
		"POSTGRES://h/d", // libpq does not accept upper case either
		"host=localhost password=" + secret, "user=u dbname=d",
		"postgres://u:" + secret + "@h:abc/d", "postgres://u:" + secret + "@h:0/d",
		"postgres://u:" + secret + "@h:99999/d", "postgres://u:" + secret + "@h:1:2/d",
		"postgres://u:%zz" + secret + "@h/d", "postgres://u:" + secret + "@h/d\n",
		"postgres://u:" + secret + "@h/d?sslmode=unknown",
		"postgres://u:" + secret + "@h/d?connect_timeout=x",
		"postgres://u:" + secret + "@h/d?pool_max_conns=0",
		// Passwords that should be percent-encoded: pgx parses them as the name of a
		// database, for example, and its errors contain that name.
		"postgres://u:/" + secret + "@h/d", "postgres://u:1/" + secret + "@h/d",
		"postgres://u:1?" + secret + "@h/d", "postgres://u:1#" + secret + "@h/d",
	}},
	"RABBITMQ_URL": {"amqp://user:password@host:5672/", []string{
		"http://u:" + secret + "@h/", "amqps", "amqps:", "amqp+x://h/", "AMQP://h/", "h:5672",
		"amqp://u:" + secret + "@h:abc/", "amqp://u:" + secret + "@h:99999/",
		"amqp://u:" + secret + "@h:0/", "amqp://u:%zz" + secret + "@h/",
		"amqp://u:" + secret + "@h/a b", "amqp://u:" + secret + "@h/?heartbeat=x",
	}},
	"APP_NAME": {"1 to 255 bytes", []string{
		strings.Repeat("a", 256), "two\nlines", "nul\x00byte", "half\xc3",
	}},
	"HOST": {"IP address or a host name", []string{
		"[::1]", "127.0.0.1:80", ":8000", "two words", "http://h",
	}},
	"PORT": {"0 to 65535", []string{
		"65536", "-1", "+1", "http", "80.0", "0x50", " 80", "99999999999999999999",
	}},
	"LOG_LEVEL": {"DEBUG, INFO, WARNING, ERROR or CRITICAL", []string{"TRACE", "-4", "INFO "}},
	"DEBUG":     {"true or false", []string{"yes", "2", "on"}},
	"PASSWORD_MIN_LENGTH": {"1 to 128", []string{
		"0", "129", "-8", "eight", "4294967297",
	}},
	"PASSWORD_BLOCKLIST": {"on or off", []string{"yes", "2"}},
	"API_KEYS": {"name:sha256hex", []string{
		"shop", "shop:" + strings.Repeat("a", 63), "shop:" + strings.Repeat("g", 64),
		":" + strings.Repeat("a", 64), "shop:" + strings.Repeat("a", 64) + ":write",
		"a b:" + strings.Repeat("a", 64), "shop:" + strings.Repeat("a", 64) + ",",
	}},
	"RATE_LIMIT": {"0.01 to 1000000", []string{
		"0.001", "-1", "1e9", "NaN", "Inf", "ten", "10/s",
	}},
	"TRUSTED_PROXIES": {"IP addresses or networks", []string{
		"proxy", "10.0.0.0/33", "10.0.0.1,", "fe80::1%eth0",
	}},
	"CORS_ORIGINS": {"https://app.example.com", []string{
		"*", "shop.example", "https://shop.example/", "ftp:/shop.example", "https://Shop.example",
		"https://shop.example,",
	}},
	"SHUTDOWN_DELAY": {"a duration of 0 or more", []string{"-1s", "7", "soon", "7 s"}},
}

// TestSettingsRefuse checks that the error of an invalid value names the variable and what it
// accepts, and does not contain the value, which may be a password.
func TestSettingsRefuse(t *testing.T) {
	t.Parallel()
	for name, test := range invalidSettings {
		for _, value := range test.values {
			_, err := loadSettings(envOf(name, value))
			refusal, ok := errors.AsType[*settingError](err)
			if !ok || refusal.name != name {
				t.Errorf("%s=%q: error %v, want a settingError of this variable", name, value, err)
				continue
			}
			text := err.Error()
			if !strings.HasPrefix(text, name+" must be ") || !strings.Contains(text, test.accepts) {
				t.Errorf("%s=%q: error %q, want %q in it", name, value, text, test.accepts)
			}
			if strings.Contains(text, value) || strings.Contains(text, secret) {
				t.Errorf("%s=%q: the error contains the value: %s", name, value, text)
			}
		}
	}
}

// TestParseEnvFile checks the syntax of .env files. The error of an invalid line has its number but
// not its content, which may be a password.
func TestParseEnvFile(t *testing.T) {
	t.Parallel()
	type values = map[string]string
	for content, want := range map[string]values{
		"":                              {},
		"A=1\nB=2":                      {"A": "1", "B": "2"},
		"A=1\nA=2\n":                    {"A": "2"},
		"# A=1\n\n  #B=2\n \t\nC=3\n":   {"C": "3"},
		"A=1 # no comment\nB=#2\n":      {"A": "1 # no comment", "B": "#2"},
		"export A=1\n export  B=2\n":    {"A": "1", "B": "2"},
		"exported=1\n":                  {"exported": "1"},
		"A=\"x y\"\nB=' z '\n":          {"A": "x y", "B": " z "},
		"A=\"x\nB='\nC='x\"\nD=x'y'\n":  {"A": `"x`, "B": "'", "C": `'x"`, "D": "x'y'"},
		"A=\"x\" \nB=\"\"\n":            {"A": "x", "B": ""},
		"A=1\r\nB=\"2\"\r\n":            {"A": "1", "B": "2"},
		"\ufeffA=1\n":                   {"A": "1"},
		"  A=1\n\tB=2\n":                {"A": "1", "B": "2"},
		"A= x \n":                       {"A": " x "},
		"A=b=c==\n":                     {"A": "b=c=="},
		"A=\n":                          {"A": ""},
		"A\n":                           {"A": ""},
		"A=" + strings.Repeat("x", 9e4): {"A": strings.Repeat("x", 9e4)},
	} {
		if got, err := parseEnvFile(content); err != nil || !maps.Equal(got, want) {
			t.Errorf("%.60q: %.60q, %v, want %.60q", content, got, err, want)
		}
	}
	for content, want := range map[string]string{
		"A=1\n# B\nDATABASE URL=" + secret: "line 3",
		"A =" + secret:                     "line 1",
		"A=1\r\n=" + secret:                "line 2",
		"export =" + secret:                "line 1",
	} {
		_, err := parseEnvFile(content)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: error %v, want %s in it", content, err, want)
		} else if strings.Contains(err.Error(), secret) {
			t.Errorf("%.60q: the error contains the value: %v", content, err)
		}
	}
}

// FuzzParseEnvFile checks that parseEnvFile returns either values or an error, and valid names.
func FuzzParseEnvFile(f *testing.F) {
	for _, content := range []string{
		"", "A=1\r\nexport B='2'\n", "\ufeff# x\nA=\"", "A B=1", "=", "export ",
	} {
		f.Add([]byte(content))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		values, err := parseEnvFile(string(content))
		if (values == nil) == (err == nil) {
			t.Errorf("values %v and error %v, want exactly one of them", values, err)
		}
		for name := range values {
			if name == "" || strings.Contains(name, "=") ||
				strings.ContainsFunc(name, unicode.IsSpace) {
				t.Errorf("%q: invalid name of a variable %q", content, name)
			}
		}
	})
}

// TestGetenvWithFile checks that the environment takes precedence over the file. It uses PATH,
// which every environment has, because parallel tests cannot set a variable.
func TestGetenvWithFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, ".env")
	getenv, err := getenvWithFile(path)
	if err != nil || getenv("PATH") != os.Getenv("PATH") {
		t.Errorf("PATH without a file: %q, %v, want %q", getenv("PATH"), err, os.Getenv("PATH"))
	}
	content := []byte("PATH=file\nUS_TEST_ONLY_IN_FILE=file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	getenv, err = getenvWithFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"PATH": os.Getenv("PATH"), "US_TEST_ONLY_IN_FILE": "file", "US_TEST_NOWHERE": "",
	} {
		if got := getenv(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	_, err = getenvWithFile(dir)
	if err == nil || !strings.HasPrefix(err.Error(), dir+" must be ") {
		t.Errorf("a directory as the file: error %v, want one that begins with %q",
			err, dir+" must be ")
	}
}
