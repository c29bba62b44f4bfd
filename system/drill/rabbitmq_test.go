package drill

import (
	"encoding/json"
	"slices"
	"strings"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"user-service/system/env"
)

func stopRabbit(r *trial) {
	r.ctl("close_all_connections", "drill")
	time.Sleep(2 * time.Second)
	r.ctl("stop_app")
	time.Sleep(time.Second)
	r.ctl("start_app")
}

func killRabbit(r *trial) {
	r.broker.Kill()
	time.Sleep(time.Second)
	require(r.t, r.broker.Nodes[0].Start())
}

func freezeRabbit(r *trial) {
	node := r.broker.Nodes[0]
	node.SignalGroup(syscall.SIGSTOP)
	time.Sleep(20 * time.Second)
	node.SignalGroup(syscall.SIGCONT)
}

func raiseAlarm(r *trial) {
	r.ctl("set_vm_memory_high_watermark", "0.0000001")
	time.Sleep(8 * time.Second)
	r.terminate(0)
	r.startReplica(0)
	r.ctl("set_vm_memory_high_watermark", "0.4")
}

func endAbsence(r *trial) {
	time.Sleep(4 * time.Second)
	r.toRabbit.Cut(false)
}

// cutRabbit cuts the connections three times while events are on their way, and then lets them
// exist for 100 ms at a time.
func cutRabbit(r *trial) {
	for range 3 {
		r.toRabbit.Hold(env.FromClient)
		time.Sleep(300 * time.Millisecond)
		r.toRabbit.Cut(true)
		r.toRabbit.Release(env.FromClient)
		time.Sleep(700 * time.Millisecond)
		r.toRabbit.Cut(false)
		time.Sleep(700 * time.Millisecond)
	}
	for range 20 {
		r.toRabbit.Cut(false)
		time.Sleep(100 * time.Millisecond)
	}
}

// swallow drops the packets of one direction. It ends with a cut, as TCP itself would after a
// while.
func swallow(p *env.Proxy, direction env.Direction, d time.Duration) {
	p.Hold(direction)
	time.Sleep(d)
	p.Cut(false)
	p.Release(direction)
}

func deleteQueue(r *trial) {
	_, err := r.rabbitChannel().QueueDelete(env.Queue, false, false, false)
	require(r.t, err)
	r.over = time.Now()
	r.within(3*time.Second, "the queue exists again", func() bool {
		_, err := r.rabbitChannel().QueueDeclarePassive(env.Queue, true, false, false, false, nil)
		return err == nil
	})
	back := time.Now()
	r.finally(func() {
		eventually(r.t, "an event arrives from the new queue", func() bool {
			r.ledger.mu.Lock()
			defer r.ledger.mu.Unlock()
			return slices.ContainsFunc(r.attempts, func(a attempt) bool {
				return a.requested.After(back) && r.ledger.heard[a.change]
			})
		})
	})
}

// deleteExchange also removes the recorder's binding, which is restored as soon as the service has
// declared the exchange again.
func deleteExchange(r *trial) {
	require(r.t, r.rabbitChannel().ExchangeDelete(env.Exchange, false, false))
	r.over = time.Now()
	r.within(3*time.Second, "the exchange exists again", func() bool {
		return bindRecorder(r.rabbitChannel()) == nil
	})
}

// removeBindings leaves no queue that receives events. Each must stay in the outbox, although the
// broker confirms it.
func removeBindings(r *trial) {
	ch := r.rabbitChannel()
	for _, queue := range []string{recorderQueue, env.Queue} {
		require(r.t, ch.QueueUnbind(queue, "user.*", env.Exchange, nil))
	}
	time.Sleep(4 * time.Second)
	require(r.t, bindRecorder(ch))
}

func declareMismatchedQueue(r *trial) {
	_, err := r.rabbitChannel().QueueDeclare(env.Queue, true, false, false, false, nil)
	require(r.t, err)
}

func sendUnreadable(r *trial) {
	ch := r.rabbitChannel()
	bad := []string{"not JSON", `{"event_type": "user.renamed"}`, strings.Repeat("x", 1<<20)}
	for _, body := range bad {
		require(r.t, ch.Publish("", env.Queue, false, false, amqp.Publishing{Body: []byte(body)}))
		time.Sleep(time.Second)
	}
	r.finally(func() {
		var got []string
		eventually(r.t, "each message is in the dead letter queue", func() bool {
			d, ok, err := ch.Get(env.DeadLetterQueue, true)
			require(r.t, err)
			if ok {
				got = append(got, string(d.Body))
			}
			return len(got) == len(bad)
		})
		if slices.Sort(bad); !slices.Equal(slices.Sorted(slices.Values(got)), bad) {
			r.t.Error("the dead letters are not the messages that were sent")
		}
	})
}

const clusterSize = 3

// useCluster has everything in this row use a cluster: the replicas, the recorder and the checks.
func useCluster(r *trial) {
	cluster, err := r.rabbit.StartCluster(clusterSize)
	if cluster != nil {
		r.t.Cleanup(cluster.Kill)
	}
	if err != nil {
		r.t.Fatalf("%v\n%s", err, r.rabbit.Log())
	}
	r.broker, r.rabbitURL = cluster, cluster.URL()
	r.prepareRabbit()
}

// quorumQueue says on which nodes the replicas of a queue are.
type quorumQueue struct {
	Name    string
	Leader  string
	Members []string
	Online  []string
}

// quorumQueues asks a running node of the cluster. It returns none if the node does not answer.
func (r *trial) quorumQueues(node *env.Node) map[string]quorumQueue {
	output, err := r.broker.Ctl(r.t.Context(), node, "-q", "list_queues",
		"--formatter", "json", "name", "leader", "members", "online")
	var list []quorumQueue
	if err == nil {
		err = json.Unmarshal([]byte(output), &list)
	}
	if err != nil {
		r.t.Logf("no list of queues: %v", err)
	}
	queues := make(map[string]quorumQueue)
	for _, q := range list {
		queues[q.Name] = q
	}
	return queues
}

// awaitMembers returns the queues when each has a running replica on every node.
func (r *trial) awaitMembers(node *env.Node) map[string]quorumQueue {
	r.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Second) {
		queues := r.quorumQueues(node)
		complete := true
		for _, name := range []string{env.Queue, env.DeadLetterQueue, recorderQueue} {
			q := queues[name]
			complete = complete && len(q.Members) == clusterSize && len(q.Online) == clusterSize
		}
		if complete {
			return queues
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("not every queue is on %d nodes: %+v", clusterSize, queues)
		}
	}
}

// killQueueLeader kills twice the node that leads the queue of the service's consumer. At first,
// the service is connected to that node too. The cluster continues without the node and accepts it
// again.
func killQueueLeader(r *trial) {
	nodes := r.broker.Nodes
	queues := r.awaitMembers(nodes[0])
	for range 2 {
		leader := queues[env.Queue].Leader
		i := slices.IndexFunc(nodes, func(n *env.Node) bool { return n.Name == leader })
		if i < 0 {
			r.t.Fatalf("no node leads the queue: %+v", queues)
		}
		node, other := nodes[i], nodes[(i+1)%clusterSize]
		r.over = time.Now()
		node.End(syscall.SIGKILL)
		r.awaitEvents(r.over, 15*time.Second)
		time.Sleep(5 * time.Second)
		now := r.quorumQueues(other)[env.Queue]
		r.t.Logf("node %d led the queue; then %d of its %d members ran, and another led it: %t",
			i+1, len(now.Online), len(now.Members), now.Leader != "" && now.Leader != leader)
		restarted := time.Now()
		if err := node.Start(); err != nil {
			r.t.Fatalf("%v\n%s", err, r.broker.Log())
		}
		queues = r.awaitMembers(other)
		r.t.Logf("the node was a member of every queue again after %v",
			time.Since(restarted).Round(100*time.Millisecond))
		r.awaitEvents(time.Now(), 5*time.Second)
	}
}

// nameDeadHosts puts two hosts before the one that works: the first refuses connections, and the
// second accepts them and never answers.
func nameDeadHosts(r *trial) {
	silent := r.newProxy(r.broker.URL())
	silent.Hold(env.FromClient)
	live := env.Host(r.rabbitURL)
	r.rabbitURL = strings.Replace(r.rabbitURL, live,
		"127.0.0.1:"+env.FreePort()+","+env.Host(silent.URL)+","+live, 1)
}

// loseLiveHost cuts the connections to the one host that works, so that the service has to try the
// hosts again.
func loseLiveHost(r *trial) {
	r.awaitEvents(r.begun, 15*time.Second)
	r.toRabbit.Cut(false)
	r.over = time.Now()
	r.awaitEvents(r.over, 15*time.Second)
}
