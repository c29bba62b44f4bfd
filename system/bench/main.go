// Command bench compares the service with other programs on the same machine, in turn, and measures
// how its latency depends on the number of users. It prints tables, writes them to docs/performance.md,
// and draws docs/bench.svg. With -svg it only prints and draws.
//
//	go run ./bench [-users N] [-large N] [-rounds N] [-time D] [-svg FILE]
//
// It needs wrk and pgbench, and starts a PostgreSQL and a RabbitMQ of its own in TMPDIR, which has
// to be on a disk: on a file system in memory, fsync costs nothing.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"user-service/system/env"
)

// options are the flags.
type options struct {
	users  int
	large  int
	rounds int
	time   time.Duration
	svg    string
	out    io.Writer // of the tables
}

func main() {
	log.SetFlags(log.Ltime)
	if len(os.Args) == 3 && os.Args[1] == "serve" {
		log.Fatal(serve(os.Args[2]))
	}
	var o options
	flag.IntVar(&o.users, "users", 1_000_000, "users in the comparison")
	flag.IntVar(&o.large, "large", 10_000_000, "users in the large database; 0 leaves that part out")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of the comparison")
	flag.DurationVar(&o.time, "time", 3*time.Second, "time of each measurement")
	flag.StringVar(&o.svg, "svg", "", "file to draw (default docs/bench.svg in the repository)")
	flag.Parse()
	if err := run(o); err != nil {
		log.Fatal(err)
	}
}

func run(o options) error {
	for _, tool := range []string{"wrk", "pgbench"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: apt-get install wrk postgresql-contrib provides both", err)
		}
	}
	var tables bytes.Buffer
	o.out = io.MultiWriter(os.Stdout, &tables)
	document := o.svg == ""
	if document {
		root, err := env.Root()
		if err != nil {
			return err
		}
		o.svg = filepath.Join(root, "docs", "bench.svg")
	}
	e, err := env.New()
	if err != nil {
		return err
	}
	defer e.Close()
	defer e.CloseOnSignal(time.Time{})()
	if err := checkDisk(e.Dir); err != nil {
		return err
	}
	s, err := startServers(e)
	if err != nil {
		return err
	}
	if err := compare(s, o); err != nil {
		return fmt.Errorf("comparing: %w", err)
	}
	if o.large > 0 {
		if err := growth(s, o); err != nil {
			return fmt.Errorf("measuring a large database: %w", err)
		}
	}
	if !document {
		return nil
	}
	return env.WriteResults("docs/performance.md", tables.String())
}

// checkDisk returns an error if a directory is on a file system in memory.
func checkDisk(dir string) error {
	const tmpfsMagic = 0x01021994
	var stat syscall.Statfs_t
	if err := syscall.Statfs(dir, &stat); err != nil {
		return err
	}
	if stat.Type == tmpfsMagic {
		return errors.New(dir + " is on a tmpfs: set TMPDIR to a directory on a disk")
	}
	return nil
}

// servers are the PostgreSQL and the RabbitMQ of all measurements.
type servers struct {
	*env.Env
	postgres *env.Postgres
	rabbit   *env.RabbitMQ
}

func startServers(e *env.Env) (*servers, error) {
	s := &servers{Env: e}
	var err error
	if s.postgres, err = e.StartPostgres("max_connections=200"); err != nil {
		return nil, err
	}
	if err := s.postgres.SQL("CREATE ROLE bench LOGIN"); err != nil {
		return nil, err
	}
	s.rabbit, err = e.StartRabbitMQ()
	return s, err
}
