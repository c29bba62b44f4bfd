package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/crypto/argon2"
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
// one statement of pgx per request. Of the kind noDatabase, it answers without a statement; of the
// kind withRedis, from Redis; of the kind publishing, it also publishes an event of each PUT. It
// listens on PORT, hashes at the cost of ARGON2, and returns only an error.
func serve(kind string) error {
	pool, err := pgxpool.New(context.Background(), os.Getenv("DATABASE_URL"))
	if err != nil {
		return err
	}
	p := &peer{pool: pool}
	fmt.Sscanf(os.Getenv("ARGON2"), argonFormat, &p.argon.memory, &p.argon.time, &p.argon.threads)
	http.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	switch kind {
	case noDatabase:
		http.HandleFunc("GET /users/{id}", func(w http.ResponseWriter, r *http.Request) {
			id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
			answer(w, http.StatusOK, user{ID: id, Name: "John", Surname: "Doe"}, err)
		})
	case withRedis:
		http.HandleFunc("GET /users/{id}", redisHandler())
	case publishing:
		if p.events, err = openChannel(os.Getenv("RABBITMQ_URL")); err != nil {
			return err
		}
		fallthrough
	default:
		http.HandleFunc("GET /users/{id}", p.get)
		http.HandleFunc("GET /users", p.list)
		http.HandleFunc("POST /users", p.post)
		http.HandleFunc("PUT /users/{id}", p.put)
		http.HandleFunc("DELETE /users/{id}", p.delete)
	}
	return http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil)
}

type peer struct {
	pool   *pgxpool.Pool
	argon  argonParameters
	events *amqp.Channel // nil: none are published
}

func answer(w http.ResponseWriter, status int, v any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

func (p *peer) get(w http.ResponseWriter, r *http.Request) {
	rows, _ := p.pool.Query(r.Context(),
		"SELECT "+userColumns+" FROM users WHERE id = $1", r.PathValue("id"))
	u, err := pgx.CollectExactlyOneRow(rows, scanUser)
	answer(w, http.StatusOK, u, err)
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
	answer(w, http.StatusOK, list, err)
}

func (p *peer) post(w http.ResponseWriter, r *http.Request) {
	var in struct{ Name, Surname, Password string }
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		answer(w, 0, nil, fmt.Errorf("reading the body: %w", err))
		return
	}
	salt := make([]byte, 16)
	rand.Read(salt)
	hash := base64.RawStdEncoding.EncodeToString(p.argon.hash(in.Password, salt))
	rows, _ := p.pool.Query(r.Context(), "INSERT INTO users (name, surname, password) "+
		"VALUES ($1, $2, $3) RETURNING "+userColumns, in.Name, in.Surname, hash)
	u, err := pgx.CollectExactlyOneRow(rows, scanUser)
	answer(w, http.StatusCreated, u, err)
}

func (p *peer) put(w http.ResponseWriter, r *http.Request) {
	var in struct{ Name string }
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		answer(w, 0, nil, fmt.Errorf("reading the body: %w", err))
		return
	}
	rows, _ := p.pool.Query(r.Context(), "UPDATE users SET name = $1, updated_at = now() "+
		"WHERE id = $2 RETURNING "+userColumns, in.Name, r.PathValue("id"))
	u, err := pgx.CollectExactlyOneRow(rows, scanUser)
	if err == nil && p.events != nil {
		err = publish(p.events, u)
	}
	answer(w, http.StatusOK, u, err)
}

func (p *peer) delete(w http.ResponseWriter, r *http.Request) {
	tag, err := p.pool.Exec(r.Context(), "DELETE FROM users WHERE id = $1", r.PathValue("id"))
	switch {
	case err != nil:
		answer(w, 0, nil, err)
	case tag.RowsAffected() == 0:
		http.NotFound(w, r)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

const argonFormat = "m=%d,t=%d,p=%d"

// argonParameters are the cost of a hash.
type argonParameters struct {
	memory, time uint32
	threads      uint8
}

func (a argonParameters) String() string {
	return fmt.Sprintf(argonFormat, a.memory, a.time, a.threads)
}

func (a argonParameters) hash(password string, salt []byte) []byte {
	return argon2.IDKey([]byte(password), salt, a.time, a.memory, a.threads, 32)
}
