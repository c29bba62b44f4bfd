// Command bench measures the service and other programs on the same machine, in turn. It consists
// of sections, each with its own table. It prints the tables, writes them to docs/performance.md,
// and draws pictures beside it.
//
//	go run ./bench [-only NAME,NAME] [-quick] [-users N] [-large N] [-rounds N] [-time D] [-dir DIR]
//
// With -only it runs some of the sections, prints their tables, and draws into -dir.
//
// It needs wrk, pgbench and redis-server, and starts a PostgreSQL, a RabbitMQ and a Redis of its
// own in TMPDIR, which has to be on a disk: on a file system in memory, fsync costs nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
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
	quick  bool
	only   []string
	dir    string // of pictures
}

// section is a part of the program. It returns Markdown.
type section struct {
	name string
	run  func(*servers, options) (string, error)
}

var sections = []section{
	{"compare", compare},
	{"latency", latency},
	{"mixed", mixedLoad},
	{"overload", overload},
	{"replicas", replicas},
	{"events", relayRate},
	{"growth", growth},
}

func main() {
	log.SetFlags(log.Ltime)
	if len(os.Args) == 3 && os.Args[1] == "serve" {
		log.Fatal(serve(os.Args[2]))
	}
	o, err := parseFlags()
	if err == nil {
		err = run(o)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func parseFlags() (o options, err error) {
	only := flag.String("only", "", "names of sections, separated by commas (default all)")
	flag.BoolVar(&o.quick, "quick", false, "100,000 users, one round, and less time everywhere")
	flag.IntVar(&o.users, "users", 1_000_000, "users in the database")
	flag.IntVar(&o.large, "large", 10_000_000, "users in the large database of growth")
	flag.IntVar(&o.rounds, "rounds", 5, "rounds of compare")
	flag.DurationVar(&o.time, "time", 3*time.Second, "time of each measurement of compare")
	flag.StringVar(&o.dir, "dir", "", "directory of pictures with -only (default none)")
	flag.Parse()
	if o.quick {
		o.users, o.large, o.rounds, o.time = 100_000, 100_000, 1, 2*time.Second
	}
	if *only == "" {
		return o, nil
	}
	o.only = strings.Split(*only, ",")
	for _, name := range o.only {
		if !slices.ContainsFunc(sections, func(s section) bool { return s.name == name }) {
			return o, fmt.Errorf("there is no section %q", name)
		}
	}
	return o, nil
}

func run(o options) error {
	for _, tool := range []string{"wrk", "pgbench", "redis-server"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: apt-get install wrk postgresql-contrib redis-server", err)
		}
	}
	root, err := env.Root()
	if err != nil {
		return err
	}
	if o.only == nil {
		o.dir = filepath.Join(root, "docs")
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
	s, err := startServers(e, o.users)
	if err != nil {
		return err
	}
	return runSections(s, o)
}

// runSections writes the document after each section, so that an error in a later one loses
// nothing.
func runSections(s *servers, o options) error {
	version, err := s.postgres.Version(context.Background())
	if err != nil {
		return err
	}
	for _, part := range sections {
		if o.only != nil && !slices.Contains(o.only, part.name) {
			continue
		}
		begin := time.Now()
		text, err := part.run(s, o)
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		text += fmt.Sprintf("\n%s, %s, PostgreSQL %s, %d cores\n",
			time.Now().UTC().Format(time.DateOnly), runtime.Version(), version, runtime.NumCPU())
		fmt.Printf("\n## %s\n%s\n", part.name, text)
		log.Printf("%s took %v", part.name, time.Since(begin).Round(time.Second))
		if o.only == nil {
			if err := env.WriteBlock("docs/performance.md", part.name, text); err != nil {
				return err
			}
		}
	}
	return nil
}

// short returns d, or a fifth of it with -quick.
func (o options) short(d time.Duration) time.Duration {
	if o.quick {
		return d / 5
	}
	return d
}

// draw writes a picture.
func (o options) draw(name string, svg []byte) error {
	if o.dir == "" {
		return nil
	}
	return os.WriteFile(filepath.Join(o.dir, name), svg, 0o644)
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
