package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// user is a user as the service's clients see it.
type user struct {
	ID        int64     `json:"id"`
	Name      string    `json:"name"`
	Surname   string    `json:"surname"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
}

const userColumns = "id, name, surname, created_at, updated_at"

func scanUser(row pgx.CollectableRow) (u user, err error) {
	return u, row.Scan(&u.ID, &u.Name, &u.Surname, &u.CreatedAt, &u.UpdatedAt)
}

// serve is a peer of the service: the shortest server that answers its requests, with net/http and
// one statement of pgx per request. Of the kind noDatabase, it answers without a statement. It
// listens on PORT, uses DATABASE_URL, and returns only an error.
func serve(kind string) error {
	pool, err := pgxpool.New(context.Background(), os.Getenv("DATABASE_URL"))
	if err != nil {
		return err
	}
	p := &peer{pool}
	http.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	if kind == noDatabase {
		http.HandleFunc("GET /users/{id}", func(w http.ResponseWriter, r *http.Request) {
			id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
			answer(w, user{ID: id, Name: "John", Surname: "Doe"}, err)
		})
	} else {
		http.HandleFunc("GET /users/{id}", p.get)
		http.HandleFunc("GET /users", p.list)
		http.HandleFunc("PUT /users/{id}", p.put)
	}
	return http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil)
}

type peer struct{ pool *pgxpool.Pool }

func answer(w http.ResponseWriter, v any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

func (p *peer) get(w http.ResponseWriter, r *http.Request) {
	rows, _ := p.pool.Query(r.Context(),
		"SELECT "+userColumns+" FROM users WHERE id = $1", r.PathValue("id"))
	u, err := pgx.CollectExactlyOneRow(rows, scanUser)
	answer(w, u, err)
}

func (p *peer) list(w http.ResponseWriter, r *http.Request) {
	var list struct {
		Users []user `json:"users"`
		Total int64  `json:"total"`
	}
	after, _ := strconv.ParseInt(r.FormValue("after"), 10, 64)
	rows, _ := p.pool.Query(r.Context(),
		"SELECT "+userColumns+" FROM users WHERE id > $1 ORDER BY id LIMIT 10", after)
	var err error
	list.Users, err = pgx.CollectRows(rows, scanUser)
	if err == nil {
		err = p.pool.QueryRow(r.Context(), "SELECT count(*) FROM users").Scan(&list.Total)
	}
	answer(w, list, err)
}

func (p *peer) put(w http.ResponseWriter, r *http.Request) {
	var in struct{ Name string }
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		answer(w, nil, fmt.Errorf("reading the body: %w", err))
		return
	}
	rows, _ := p.pool.Query(r.Context(), "UPDATE users SET name = $1 WHERE id = $2 RETURNING "+
		userColumns, in.Name, r.PathValue("id"))
	u, err := pgx.CollectExactlyOneRow(rows, scanUser)
	answer(w, u, err)
}
