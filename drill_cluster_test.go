package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// rabbitNode is one node of a RabbitMQ cluster.
type rabbitNode struct {
	*daemon
	name string
	port string
}

const clusterSize = 3

// startCluster starts a cluster of three nodes and has everything in this row use it: the
// replicas, the recorder and the checks. The drill's own node stays as it is.
func startCluster(r *trial) {
	nodes, err := r.newCluster()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(r.killNodes)
	// The first node forms the cluster, and the others join it.
	if err := nodes[0].start(); err != nil {
		r.t.Fatalf("%v\n%s", err, r.tail("rabbit.log"))
	}
	joined := make(chan error)
	for _, n := range nodes[1:] {
		go func() { joined <- n.start() }()
	}
	for range nodes[1:] {
		err = errors.Join(err, <-joined)
	}
	if err != nil {
		r.t.Fatalf("%v\n%s", err, r.tail("rabbit.log"))
	}
	ports := r.rabbitPorts
	r.t.Cleanup(func() { r.rabbitPorts = ports })
	r.rabbitPorts = nil
	for _, n := range nodes {
		r.rabbitPorts = append(r.rabbitPorts, n.port)
	}
	r.cluster, r.toRabbit.url = nodes, r.rabbitURL()
	r.prepareRabbit()
}

// newCluster prepares nodes that find each other by the epmd, the cookie and the
// configuration that they share. They are killed at the end of the test.
func (s *servers) newCluster() ([]*rabbitNode, error) {
	home := filepath.Join(s.dir, "rabbit")
	config := "vm_memory_high_watermark.relative = 0.4\n" +
		"cluster_partition_handling = pause_minority\n" +
		"cluster_formation.peer_discovery_backend = classic_config\n"
	var nodes []*rabbitNode
	for i := range clusterSize {
		name := fmt.Sprintf("drill_%d_%d@localhost", os.Getpid(), i+1)
		n := &rabbitNode{name: name, port: freePort()}
		config += fmt.Sprintf("cluster_formation.classic_config.nodes.%d = %s\n", i+1, n.name)
		nodes = append(nodes, n)
	}
	configPath := filepath.Join(home, "cluster.conf")
	if err := os.WriteFile(configPath, []byte(config), 0o600); err != nil {
		return nil, err
	}
	for _, n := range nodes {
		env := append(slices.Clone(s.rabbitEnv), // of two values for a name, the last counts
			"RABBITMQ_NODENAME="+n.name,
			"RABBITMQ_NODE_PORT="+n.port,
			"RABBITMQ_DIST_PORT="+freePort(),
			"RABBITMQ_CONFIG_FILE="+configPath,
			"RABBITMQ_GENERATED_CONFIG_DIR="+filepath.Join(home, "config-"+n.name),
			"RABBITMQ_PID_FILE="+filepath.Join(home, "pid-"+n.name),
		)
		n.daemon = &daemon{
			command:  func() *exec.Cmd { return s.erlang(env, s.rabbitServer) },
			answers:  func() error { return acceptsAMQP(n.port) },
			patience: 3 * time.Minute,
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range nodes {
		s.nodes = append(s.nodes, n.daemon)
	}
	return nodes, nil
}

func (s *servers) killNodes() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.nodes {
		n.end(syscall.SIGKILL)
	}
	s.nodes = nil
}

// quorumQueue is what RabbitMQ says about the replicas of a queue: names of nodes.
type quorumQueue struct {
	Name    string
	Leader  string
	Members []string
	Online  []string
}

// quorumQueues asks a node of the cluster that runs. Without an answer it returns none.
func (r *trial) quorumQueues(node *rabbitNode) map[string]quorumQueue {
	output, err := r.tryCtl(r.t.Context(), "-q", "-n", node.name, "list_queues",
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

// awaitMembers returns the queues when each is on all nodes, and all of its replicas run.
func (r *trial) awaitMembers(node *rabbitNode) map[string]quorumQueue {
	r.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Second) {
		queues := r.quorumQueues(node)
		complete := true
		for _, name := range []string{r.names.queue(), r.names.deadLetterQueue(), recorderQueue} {
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

// killQueueLeader kills, twice, the node that leads the queue of the service's consumer. At
// first that is also the node to which the service is connected. The cluster goes on
// without the node and takes it back.
func killQueueLeader(r *trial) {
	queues := r.awaitMembers(r.cluster[0])
	for range 2 {
		leader := queues[r.names.queue()].Leader
		i := slices.IndexFunc(r.cluster, func(n *rabbitNode) bool { return n.name == leader })
		if i < 0 {
			r.t.Fatalf("no node leads the queue: %+v", queues)
		}
		node, other := r.cluster[i], r.cluster[(i+1)%clusterSize]
		r.over = time.Now()
		node.end(syscall.SIGKILL)
		r.awaitEvents(r.over, 15*time.Second)
		time.Sleep(5 * time.Second)
		now := r.quorumQueues(other)[r.names.queue()]
		r.t.Logf("node %d led the queue; then %d of its %d members ran, and another led it: %t",
			i+1, len(now.Online), len(now.Members), now.Leader != "" && now.Leader != leader)
		restarted := time.Now()
		if err := node.start(); err != nil {
			r.t.Fatalf("%v\n%s", err, r.tail("rabbit.log"))
		}
		queues = r.awaitMembers(other)
		r.t.Logf("the node is in every queue again after %v",
			time.Since(restarted).Round(100*time.Millisecond))
		r.awaitEvents(time.Now(), 5*time.Second)
	}
}

// awaitEvents waits for an event of a change that was asked for after a time.
func (r *trial) awaitEvents(after time.Time, within time.Duration) {
	r.t.Helper()
	r.eventsFlow(after, within)
	eventually(r.t, "events", func() bool {
		time.Sleep(50 * time.Millisecond)
		return r.eventAfter(after) < never
	})
}

// nameDeadHosts puts two hosts before the one that works: the first refuses connections,
// and the second accepts them and never says a word.
func nameDeadHosts(r *trial) {
	silent := newWire(r.t, r.rabbitURL())
	silent.swallow(fromClient, true)
	living := hostOf(r.toRabbit.url)
	r.toRabbit.url = strings.Replace(r.toRabbit.url, living,
		"127.0.0.1:"+freePort()+","+hostOf(silent.url)+","+living, 1)
}

// hostOf returns the host and port of a URL with user information.
func hostOf(url string) string {
	_, rest, _ := strings.Cut(url, "@")
	host, _, _ := strings.Cut(rest, "/")
	return host
}

// loseLivingHost cuts the connections to the one host that works, so that the search
// begins anew.
func loseLivingHost(r *trial) {
	r.awaitEvents(r.begun, 15*time.Second)
	r.toRabbit.cut(false)
	r.over = time.Now()
	r.awaitEvents(r.over, 15*time.Second)
}
