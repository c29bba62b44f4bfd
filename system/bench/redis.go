package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"user-service/system/env"
)

// startRedis starts a Redis without persistence that has all users, and a peer that reads it.
func (r *rig) startRedis() (*subject, error) {
	port := env.FreePort()
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + port})
	defer client.Close()
	ctx := context.Background()
	server := &env.Process{
		Command: func() (*exec.Cmd, error) {
			return exec.Command("redis-server", "--port", port, "--bind", "127.0.0.1",
				"--save", "", "--appendonly", "no"), nil
		},
		Answers: func() error { return client.Ping(ctx).Err() },
	}
	r.OnClose(func() { server.End(syscall.SIGKILL) })
	if err := server.Start(); err != nil {
		return nil, err
	}
	for begin := 1; begin <= r.users; begin += 1000 {
		_, err := client.Pipelined(ctx, func(p redis.Pipeliner) error {
			for id := begin; id < min(begin+1000, r.users+1); id++ {
				now := time.Now()
				body, _ := json.Marshal(user{int64(id), fmt.Sprint("John ", id), "Doe", now, now})
				p.Set(ctx, redisKey(id), body, 0)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	s, err := r.start(withRedis, "REDIS_PORT="+port)
	if err == nil {
		s.store = server.PID()
	}
	return s, err
}

func redisKey(id any) string { return fmt.Sprint("user:", id) }

// redisHandler answers with the user's JSON from Redis.
func redisHandler() http.HandlerFunc {
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + os.Getenv("REDIS_PORT")})
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := client.Get(r.Context(), redisKey(r.PathValue("id"))).Bytes()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(body)
	}
}
