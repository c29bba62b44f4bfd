package drill

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"user-service/system/env"
)

const password = "correct-horse-s3cr3t"

// attempt is a change that a client requested.
type attempt struct {
	requested   time.Time // the first time, if the request was repeated
	begun, done time.Time
	outcome     outcome
	change      change // if outcome is outcomeOK
}

// change identifies a state of a user. The version is 0 in the answer to a deletion.
type change struct{ userID, version int64 }

type outcome int

const (
	outcomeOK      outcome = iota // acknowledged
	outcomeFailed                 // certainly not made
	outcomeUnknown                // neither
)

// answer is a response whose body was read. The zero answer stands for none.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// version returns the version of the user in an answer, or 0.
func (a answer) version() int64 {
	n, _ := strconv.ParseInt(strings.Trim(a.header.Get("ETag"), `"`), 10, 64)
	return n
}

// ownUser is what a client knows about a user that no other client changes.
type ownUser struct {
	id      int64
	version int64 // the last that was acknowledged
	unknown int64 // changes since then that may have been made, or may yet be made
	gone    bool  // lost with a database
}

// load creates the first users and returns the clients. Of 10 changes, 9 are updates.
func (r *trial) load() (clients []func(context.Context)) {
	create := func() *ownUser {
		u := r.create()
		if u == nil {
			r.t.Fatalf("a user could not be created before the fault: %v", r.problems)
		}
		return u
	}
	var common []*ownUser
	for range r.shared {
		common = append(common, create())
	}
	for range r.clients {
		own := slices.Clone(common)
		if r.shared == 0 { // sequentially, because each hashes a password
			own = append(own, create())
		}
		clients = append(clients, func(ctx context.Context) {
			for ; ctx.Err() == nil; sleep(ctx, rand.N(2*r.pause)) {
				own = r.changeOne(own)
			}
		})
	}
	return clients
}

// changeOne makes one change to a client's users, and returns the users after it.
func (r *trial) changeOne(own []*ownUser) []*ownUser {
	own = slices.DeleteFunc(own, func(u *ownUser) bool { return u.gone })
	dice := rand.N(100)
	switch {
	case r.shared == 0 && (dice < 4 && len(own) < 6 || len(own) == 0):
		if u := r.create(); u != nil {
			own = append(own, u)
		}
	case r.shared == 0 && dice < 7 && len(own) > 1:
		r.remove(own[0])
		own = own[1:]
	default:
		r.update(own[rand.N(len(own))])
	}
	return own
}

func (r *trial) newName() string { return fmt.Sprint("name-", r.turns.Add(1)) }

// keepCreating creates users until ctx ends.
func (r *trial) keepCreating(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, 50*time.Millisecond) {
		r.create()
	}
}

// create creates a user. As long as the outcome is unknown, it repeats the request with the same
// Idempotency-Key. It returns nil if there is no user.
func (r *trial) create() *ownUser {
	name := r.newName()
	body := fmt.Sprintf(`{"name": %q, "surname": "Doe", "password": %q}`, name, password)
	requested, unsure := time.Now(), false
	for {
		a, answer := r.send("POST", "/users", body, name)
		if a.outcome == outcomeOK {
			var u struct{ ID int64 }
			if err := json.Unmarshal(answer.body, &u); err != nil {
				r.problem("the answer to a creation is not a user: %s", answer.body)
			}
			a.change = change{u.ID, answer.version()}
			a.requested = requested
		}
		r.keep(a)
		if a.outcome == outcomeOK {
			return &ownUser{id: a.change.userID, version: a.change.version}
		}
		unsure = unsure || a.outcome == outcomeUnknown
		if !unsure || time.Since(requested) > 30*time.Second {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (r *trial) update(u *ownUser) {
	body := fmt.Sprintf(`{"name": %q}`, r.newName())
	a, answer := r.send("PUT", fmt.Sprint("/users/", u.id), body, "")
	a.change = change{u.id, answer.version()}
	r.keep(a)
	if r.lossy {
		u.gone = answer.status == http.StatusNotFound
	}
	if r.shared > 0 || r.lossy {
		return
	}
	switch a.outcome {
	case outcomeUnknown:
		u.unknown++
	case outcomeOK:
		extra := a.change.version - u.version - 1
		if extra < 0 || extra > u.unknown {
			r.problem("a change was undone, made twice, or made although it had failed")
		}
		u.version, u.unknown = a.change.version, u.unknown-extra
	}
}

func (r *trial) remove(u *ownUser) {
	r.ledger.setRemoved(u.id, true)
	a, _ := r.send("DELETE", fmt.Sprint("/users/", u.id), "", "")
	a.change = change{userID: u.id}
	r.keep(a)
	if a.outcome == outcomeFailed {
		r.ledger.setRemoved(u.id, false)
	}
}

// send sends one request. It uses another replica if a replica refuses the connection.
func (r *trial) send(method, path, body, key string) (attempt, answer) {
	a := attempt{begun: time.Now()}
	a.requested = a.begun
	var response *http.Response
	var err error
	for range r.replicas {
		s := r.pick()
		request, _ := http.NewRequest(method, s.URL+path, strings.NewReader(body))
		request.Header.Set("Content-Type", "application/json")
		if key != "" {
			request.Header.Set("Idempotency-Key", key)
		}
		if response, err = r.client.Do(request); err == nil {
			break
		}
		a.outcome = outcomeUnknown
		if refusal, ok := errors.AsType[*net.OpError](err); !ok || refusal.Op != "dial" {
			break
		}
		a.outcome = outcomeFailed
		s.Ready.Store(false)
	}
	var content []byte
	if err == nil {
		content, err = io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil {
			a.outcome = outcomeUnknown
		}
	}
	a.done = time.Now()
	if err != nil {
		r.problemIf(r.onlyRabbit || r.database, "no answer: %v", err)
		return a, answer{}
	}
	got := answer{response.StatusCode, response.Header, content}
	a.outcome = r.classify(got, key != "")
	return a, got
}

// classify returns the outcome of an answered request, and reports answers that the service must
// not give in this scenario. keyed says that the request had an Idempotency-Key.
func (r *trial) classify(a answer, keyed bool) outcome {
	// Without the trace id, the bodies of many problems are the same.
	said, _, _ := bytes.Cut(a.body, []byte(`,"trace_id"`))
	switch {
	case a.status < 300:
		return outcomeOK
	case a.status == http.StatusServiceUnavailable:
		r.problemIf(a.header.Get("Retry-After") == "", "503 without Retry-After")
		r.problemIf(r.onlyRabbit, "%d %s", a.status, said)
		if bytes.Contains(a.body, []byte(env.DetailUnchanged)) {
			return outcomeFailed
		}
		return outcomeUnknown
	case a.status == http.StatusConflict && keyed && !r.onlyRabbit:
		return outcomeFailed // the first request with this key still runs
	case a.status == http.StatusNotFound && r.lossy:
		return outcomeFailed // the user was lost with its database
	}
	r.problem("%d %s", a.status, said)
	if a.status >= 500 {
		return outcomeUnknown
	}
	return outcomeFailed
}

// pick returns the next of the replicas that are ready, or of all if none is.
func (r *trial) pick() *env.Service {
	r.mu.Lock()
	defer r.mu.Unlock()
	first := int(r.turns.Add(1))
	for i := range r.running {
		if s := r.running[(first+i)%len(r.running)]; s.Ready.Load() {
			return s
		}
	}
	return r.running[first%len(r.running)]
}

func (r *trial) keep(a attempt) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.attempts = append(r.attempts, a)
}
