package main

import (
	"context"
	"fmt"
	"log"
	"strings"
	"time"
)

const (
	replicaRounds = 3
	replicaTime   = 6 * time.Second

	// replicaWarmUp is how long requests are sent before a measurement. The first time that a
	// session of PostgreSQL touches a page of its shared buffers, it takes a page fault, and so does
	// a server with each page of its heap. These faults are half of what a PUT costs at first.
	replicaWarmUp = 15 * time.Second
)

// setup is a number of replicas, and the connections of all their clients.
type setup struct{ replicas, connections int }

// setups divide the same load among more replicas; the last one gives each replica the whole load.
var setups = []setup{{1, connections}, {2, connections}, {4, connections}, {4, 4 * connections}}

// replication is the result of a setup.
type replication struct {
	rate      float64
	server    float64 // us of all replicas per PUT
	leader    float64 // us of the replica that relays, per PUT
	database  float64 // us of PostgreSQL per PUT
	perCommit float64 // PUT requests
	wal       float64 // bytes per PUT
}

// replicas measures PUT requests to several replicas on one database.
func replicas(s *servers, o options) (string, error) {
	r, err := s.rig()
	if err != nil {
		return "", err
	}
	all := make(map[setup][]replication)
	for round := range replicaRounds {
		for i := range setups {
			which := setups[(i+round)%len(setups)]
			got, err := r.replicate(which, o)
			if err != nil {
				return "", fmt.Errorf("%d replicas: %w", which.replicas, err)
			}
			log.Printf("%d replicas, %d connections: %.0f/s", which.replicas, which.connections,
				got.rate)
			all[which] = append(all[which], got)
		}
	}
	return replicaTable(all), nil
}

func (r *rig) replicate(which setup, o options) (got replication, err error) {
	var subjects []*subject
	for range which.replicas {
		s, err := r.start(service)
		if err != nil {
			return got, err
		}
		subjects = append(subjects, s)
	}
	var leader *subject
	deadline := time.Now().Add(20 * time.Second)
	for ; leader == nil; time.Sleep(100 * time.Millisecond) {
		for _, s := range subjects {
			if s.metric("relay_leader") == 1 {
				leader = s
			}
		}
		if time.Now().After(deadline) {
			return got, fmt.Errorf("no replica relays events after 20 s")
		}
	}
	if _, err := r.putAll(which, o.short(replicaWarmUp), subjects); err != nil {
		return got, err
	}
	commits, wal, err := r.databaseCounters()
	if err != nil {
		return got, err
	}
	before, leaderBefore := r.processorTime(subjects...), r.processorTime(leader)
	m, err := r.putAll(which, o.short(replicaTime), subjects)
	if err != nil {
		return got, err
	}
	requests := float64(m.Requests)
	got.rate = m.Rate
	got.server, got.database = r.processorTime(subjects...).sub(before, requests)
	got.leader, _ = r.processorTime(leader).sub(leaderBefore, requests)
	commitsAfter, walAfter, err := r.databaseCounters()
	if err != nil {
		return got, err
	}
	got.perCommit = requests / float64(commitsAfter-commits)
	got.wal = float64(walAfter-wal) / requests
	return got, r.finish()
}

// putAll sends PUT requests to all replicas, and waits for the events.
func (r *rig) putAll(which setup, d time.Duration, subjects []*subject) (measurement, error) {
	m, err := r.wrk(putScript, which.connections, d, subjects...)
	if err == nil && m.Bad > 0 {
		err = fmt.Errorf("%d bad answers", m.Bad)
	}
	r.acknowledged.Add(int64(m.Requests))
	if err != nil {
		return m, err
	}
	return m, r.settle()
}

// databaseCounters returns the transactions of the service's database and the bytes of WAL so far.
// Sessions report their transactions once a second.
func (r *rig) databaseCounters() (commits, wal int64, err error) {
	time.Sleep(time.Second)
	err = r.db.QueryRow(context.Background(), `
		SELECT xact_commit, pg_current_wal_lsn() - '0/0'::pg_lsn
		FROM pg_stat_database WHERE datname = $1`, r.database).Scan(&commits, &wal)
	return commits, wal, err
}

func replicaTable(all map[setup][]replication) string {
	var b strings.Builder
	b.WriteString("\n| replicas | connections of all | PUT/s | server us per PUT " +
		"| of which relaying replica | PostgreSQL us per PUT | both, relative to one replica | range " +
		"| PUT per commit | WAL bytes |\n|--:|--:|--:|--:|--:|--:|--:|:--|--:|--:|\n")
	for _, n := range setups {
		middle := func(value func(replication) float64) float64 {
			var values []float64
			for _, got := range all[n] {
				values = append(values, value(got))
			}
			m, _, _ := spread(values)
			return m
		}
		var relative []float64
		for i, got := range all[n] {
			one := all[setups[0]][i]
			relative = append(relative, (got.server+got.database)/(one.server+one.database))
		}
		ratio, least, most := spread(relative)
		fmt.Fprintf(&b, "| %d | %d | %s | %.0f | %.0f | %.0f | %.2f | %.2f to %.2f | %.1f | %.0f |\n",
			n.replicas, n.connections, digits(middle(func(g replication) float64 { return g.rate })),
			middle(func(g replication) float64 { return g.server }),
			middle(func(g replication) float64 { return g.leader }),
			middle(func(g replication) float64 { return g.database }), ratio, least, most,
			middle(func(g replication) float64 { return g.perCommit }),
			middle(func(g replication) float64 { return g.wal }))
	}
	return b.String()
}
