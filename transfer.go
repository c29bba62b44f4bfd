package main

// This file owns the commands import and export: their arguments, users as JSON lines, and the
// progress. How users are imported is in import.go.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/schollz/progressbar/v3"
)

const (
	maxLine      = 64 << 10 // bytes
	progressTime = 10 * time.Second
)

// transfer is an import or an export. Data is on standard input and output, everything else on
// standard error.
type transfer struct {
	*progress
	settings    settings
	machine     limits
	std         streams
	log         *slog.Logger
	file        string // "-" is standard input
	predecessor bool
	noEvents    bool
	hashes      bool
}

// parse reads the arguments, and reports whether they are valid.
func (t *transfer) parse(args []string) bool {
	flags := map[string]*bool{"import --predecessor": &t.predecessor,
		"import --no-events": &t.noEvents, "export --password-hashes": &t.hashes}
	for _, arg := range args[1:] {
		if flag := flags[args[0]+" "+arg]; flag != nil {
			*flag = true
		} else if t.file != "" || strings.HasPrefix(arg, "--") {
			return false
		} else {
			t.file = arg
		}
	}
	return (args[0] == "import" && !t.predecessor) == (t.file != "")
}

// runTransfer runs import or export, and returns the exit code: 2 for wrong arguments or no
// database, 1 for a failure or if users were refused.
func runTransfer(ctx context.Context, args []string, s settings, machine limits, std streams,
	log *slog.Logger) int {
	t := &transfer{settings: s, machine: machine, std: std, log: log}
	if !t.parse(args) {
		log.Error("Invalid arguments", "error", "usage: import [--no-events] FILE, where - is "+
			"standard input; import [--no-events] --predecessor; export [--password-hashes]")
		return 2
	}
	if s.databaseURL == "" {
		log.Error("Invalid setting", "error", args[0]+" needs a database: set DATABASE_URL")
		return 2
	}
	what, run := "Import", t.importUsers
	if args[0] == "export" {
		what, run = "Export", t.exportUsers
	}
	t.progress = newProgress(std.err, log)
	err := run(ctx)
	t.finish()
	counts := []any{"users", t.written.Load(), "unchanged", t.unchanged.Load(),
		"refused", t.refused.Load()}
	switch {
	case ctx.Err() != nil:
		log.Warn(what+" interrupted", append(counts, "remedy", "run the same command again")...)
		return 1
	case err != nil:
		log.Error(what+" failed", append(counts, "error", err)...)
		return 1
	}
	log.Info(what+" finished", counts...)
	return int(min(t.refused.Load(), 1))
}

// unlimited returns the options of a transaction whose duration is not limited by the timeouts that
// the site sets for the role or the database. BEGIN is sent together with the settings, so that no
// timeout ends the transaction between them. The settings are those of the transaction alone,
// because a pooler may give the session to another client.
func unlimited(modes pgx.TxIsoLevel) pgx.TxOptions {
	return pgx.TxOptions{BeginQuery: "BEGIN ISOLATION LEVEL " + string(modes) + `;
		SET LOCAL statement_timeout = 0;
		SELECT set_config(name, '0', true) FROM pg_settings WHERE name IN ('lock_timeout',
			'idle_in_transaction_session_timeout', 'transaction_timeout')`} // the last since PostgreSQL 17
}

// exportUsers writes the users of one snapshot, in the order of ids.
func (t *transfer) exportUsers(ctx context.Context) error {
	config, err := poolConfig(t.settings.databaseURL, t.settings.appName)
	if err != nil {
		return err
	}
	conn, err := pgx.ConnectConfig(ctx, config.ConnConfig)
	if err != nil {
		return explainFailure(err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	out := bufio.NewWriterSize(t.std.out, maxLine)
	options := unlimited(pgx.RepeatableRead + ", READ ONLY")
	err = pgx.BeginTxFunc(ctx, conn, options, func(tx pgx.Tx) error {
		var total int64
		err := tx.QueryRow(ctx, "SELECT greatest(sum(n), 0)::bigint FROM user_counts").Scan(&total)
		if err != nil {
			return err
		}
		t.begin("Export", total)
		rows, _ := tx.Query(ctx, "SELECT "+userColumns+", password FROM users ORDER BY id",
			pgx.QueryExecModeDescribeExec)
		var u memoryUser
		var line []byte
		_, err = pgx.ForEachRow(rows, append(u.scanInto(), &u.password), func() error {
			line = u.appendJSON(line[:0])
			if t.hashes {
				line = append(line[:len(line)-1], `,"password_hash":`...)
				line = append(appendJSONString(line, u.password), '}')
			}
			t.count(&t.written)
			_, err := out.Write(append(line, '\n'))
			return err
		})
		return err
	})
	return cmp.Or(err, out.Flush())
}

// open returns the input, and its number of lines if that is known, else -1.
func (t *transfer) open() (in io.Reader, lines int64, err error) {
	if t.predecessor || t.file == "-" {
		return t.std.in, -1, nil
	}
	file, err := os.Open(t.file)
	if err != nil {
		return nil, 0, err
	}
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		return file, -1, err
	}
	buffer := make([]byte, importMemory)
	for n := 0; err == nil; n, err = file.Read(buffer) {
		lines += int64(bytes.Count(buffer[:n], []byte{'\n'}))
	}
	_, err = file.Seek(0, io.SeekStart)
	return file, lines, err
}

// readLines passes the records of JSON lines to emit. It refuses lines that are not valid, and skips
// empty ones.
func (im *importer) readLines(in io.Reader, emit func([]*importRecord) bool) error {
	rules := map[string]fieldRule{"name": textRule(checkName), "surname": textRule(checkName),
		"password": textRule(newPasswordRule(im.settings.passwordMinLength,
			im.settings.passwordBlocklist)),
		"password_hash": textRule(checkHash), "id": checkPositive, "version": checkPositive,
		"created_at": textRule(checkTime), "updated_at": textRule(checkTime)}
	reader := bufio.NewReaderSize(in, maxLine)
	var records []*importRecord
	for number, size, more := int64(1), 0, true; more; number++ {
		line, err := reader.ReadSlice('\n')
		r := &importRecord{Number: number}
		if errors.Is(err, bufio.ErrBufferFull) {
			im.refuse(r, "", fmt.Sprintf("must not be longer than %d bytes", maxLine))
			for line = nil; errors.Is(err, bufio.ErrBufferFull); {
				_, err = reader.ReadSlice('\n')
			}
		}
		if number == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
		}
		if line = bytes.TrimSpace(line); len(line) > 0 {
			if field, reason := r.parse(line, rules); reason != "" {
				im.refuse(r, field, reason)
			} else {
				records = append(records, r)
			}
		}
		size += len(line)
		if more = err == nil; len(records) == importBatch || size > importMemory || !more {
			more = emit(records) && more
			records, size = nil, 0
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	return nil
}

// parse reads a line. If it is not valid, parse returns the field that is wrong, if it is one, and
// what would be right.
func (r *importRecord) parse(line []byte, rules map[string]fieldRule) (field, reason string) {
	members, err := parseObject(line, maxMembers)
	if err != nil {
		return "", strings.TrimPrefix(err.Error(), "The body ")
	}
	fields, wrong := checkMembers(members, rules, []string{"name", "surname"})
	if len(wrong) > 0 {
		return strings.TrimPrefix(wrong[0].Pointer, "#/"), wrong[0].Detail
	}
	r.Name, r.Surname, r.password, r.Hash = fields["name"], fields["surname"], fields["password"],
		fields["password_hash"]
	switch {
	case r.password == "" && r.Hash == "":
		return "password", "is required, or password_hash instead"
	case r.password != "" && r.Hash != "":
		return "password", "must not be given together with password_hash"
	}
	r.ID, _ = strconv.ParseInt(fields["id"], 10, 64) // both are valid or empty
	r.Version, _ = strconv.ParseInt(fields["version"], 10, 64)
	if t, err := time.Parse(time.RFC3339Nano, fields["created_at"]); err == nil {
		r.CreatedAt = &t
	}
	if t, err := time.Parse(time.RFC3339Nano, fields["updated_at"]); err == nil {
		r.UpdatedAt = &t
	}
	return "", ""
}

// checkPositive is the fieldRule of ids and versions.
func checkPositive(value json.RawMessage) (string, error) {
	n, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil || n < 1 {
		return "", fmt.Errorf("must be an integer from 1 to %d", math.MaxInt64)
	}
	return string(value), nil
}

// checkTime is the rule of times. It cuts them to microseconds.
func checkTime(text string) (string, error) {
	t, err := time.Parse(time.RFC3339Nano, text)
	if t = t.UTC().Truncate(time.Microsecond); err != nil || t.Year() < 1 || t.Year() > 9999 {
		return "", errors.New("must be a time such as 2026-01-01T12:00:00.123456Z")
	}
	return t.Format(time.RFC3339Nano), nil
}

// checkHash is the rule of password hashes.
func checkHash(text string) (string, error) {
	if _, err := parseHash(text); err != nil {
		return "", errors.New("must be a hash of argon2id, bcrypt or PBKDF2, within the bounds that " +
			"docs/takeover.md lists")
	}
	return text, nil
}

// progress counts users. It shows them as a bar if standard error is a terminal, and otherwise as a
// line in the log every ten seconds. Its methods may be called at the same time.
type progress struct {
	written, unchanged, refused atomic.Int64

	stderr   io.Writer
	log      *slog.Logger
	terminal bool
	bar      *progressbar.ProgressBar
	stop     func(time.Duration)
}

// newProgress returns a progress that shows nothing before begin.
func newProgress(stderr io.Writer, log *slog.Logger) *progress {
	p := &progress{stderr: stderr, log: log, stop: func(time.Duration) {}}
	if file, ok := stderr.(*os.File); ok {
		info, err := file.Stat()
		p.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	p.bar = progressbar.DefaultSilent(-1)
	return p
}

// begin starts to show what has been done of a total, which is -1 if it is not known.
func (p *progress) begin(what string, total int64) {
	if p.terminal {
		p.bar = progressbar.NewOptions64(total, progressbar.OptionSetWriter(p.stderr),
			progressbar.OptionSetDescription(what), progressbar.OptionShowCount(),
			progressbar.OptionShowIts(), progressbar.OptionSetItsString("users"),
			progressbar.OptionThrottle(100*time.Millisecond))
		return
	}
	p.bar = progressbar.DefaultSilent(total)
	p.stop = start(func(ctx context.Context) {
		for sleep(ctx, progressTime); ctx.Err() == nil; sleep(ctx, progressTime) {
			now := p.bar.State()
			attrs := []any{"users", now.CurrentBytes, // CurrentNum starts again if the total is unknown
				"users_per_second", math.Round(now.CurrentBytes / now.SecondsSince)}
			if total >= 0 {
				attrs = append(attrs, "total", total, "seconds_left", math.Ceil(now.SecondsLeft))
			}
			p.log.Info(what+" in progress", attrs...)
		}
	})
}

// count counts a user.
func (p *progress) count(counter *atomic.Int64) {
	counter.Add(1)
	_ = p.bar.Add(1)
}

// print writes a line to standard error.
func (p *progress) print(line []byte) {
	_ = p.bar.Clear()
	_, _ = p.stderr.Write(append(line, '\n'))
}

// finish stops what begin has started.
func (p *progress) finish() {
	p.stop(closeWait)
	if p.terminal {
		_ = p.bar.Exit()
		_, _ = p.stderr.Write([]byte{'\n'})
	}
}
