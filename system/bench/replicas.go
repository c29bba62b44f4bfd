package main

import (
	"context"
	"fmt"
	"log"
	"strings"
	"time"
)

const replicaRounds = 3

// replication is the result of a number of replicas.
type replication struct {
	rate      float64
	server    float64 // us of all replicas per PUT
	leader    float64 // us of the replica that relays, per PUT
	database  float64 // us of PostgreSQL per PUT
	perCommit float64 // PUT requests
	wal       float64 // bytes per PUT
}

// replicas measures PUT requests to 1, 2 and 4 replicas on one database.
func replicas(s *servers, o options) (string, error) {
	r, err := s.rig()
	if err != nil {
		return "", err
	}
	counts := []int{1, 2, 4}
	all := make(map[int][]replication)
	for round := range replicaRounds {
		for i := range counts {
			n := counts[(i+round)%len(counts)]
			got, err := r.replicate(n, o.time)
			if err != nil {
				return "", fmt.Errorf("%d replicas: %w", n, err)
			}
			log.Printf("%d replicas: %.0f/s", n, got.rate)
			all[n] = append(all[n], got)
		}
	}
	return replicaTable(counts, all), nil
}

func (r *rig) replicate(n int, d time.Duration) (got replication, err error) {
	var subjects []*subject
	for range n {
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
	commits, wal, err := r.databaseCounters()
	if err != nil {
		return got, err
	}
	before, leaderBefore := r.processorTime(subjects...), r.processorTime(leader)
	m, err := r.wrk(putScript, connections, d, subjects...)
	if err == nil && m.Bad > 0 {
		err = fmt.Errorf("%d bad answers", m.Bad)
	}
	if err != nil {
		return got, err
	}
	requests := float64(m.Requests)
	got.rate = m.Rate
	got.server, got.database = r.processorTime(subjects...).sub(before, requests)
	got.leader, _ = r.processorTime(leader).sub(leaderBefore, requests)
	r.acknowledged.Add(int64(m.Requests))
	if err := r.settle(); err != nil {
		return got, err
	}
	commitsAfter, walAfter, err := r.databaseCounters()
	if err != nil {
		return got, err
	}
	got.perCommit = requests / float64(commitsAfter-commits)
	got.wal = float64(walAfter-wal) / requests
	return got, r.finish()
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

func replicaTable(counts []int, all map[int][]replication) string {
	var b strings.Builder
	b.WriteString("\n| replicas | PUT/s | relative to 1 | range | server us " +
		"| of which relaying replica | PostgreSQL us | PUT per commit | WAL bytes |\n" +
		"|--:|--:|--:|:--|--:|--:|--:|--:|--:|\n")
	for _, n := range counts {
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
			relative = append(relative, got.rate/all[counts[0]][i].rate)
		}
		ratio, least, most := spread(relative)
		fmt.Fprintf(&b, "| %d | %s | %.2f | %.2f to %.2f | %.0f | %.0f | %.0f | %.1f | %.0f |\n", n,
			digits(middle(func(g replication) float64 { return g.rate })), ratio, least, most,
			middle(func(g replication) float64 { return g.server }),
			middle(func(g replication) float64 { return g.leader }),
			middle(func(g replication) float64 { return g.database }),
			middle(func(g replication) float64 { return g.perCommit }),
			middle(func(g replication) float64 { return g.wal }))
	}
	return b.String()
}
