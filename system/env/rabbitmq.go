package env

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// RabbitMQ is a broker of one or several nodes. Its user is guest.
type RabbitMQ struct {
	Nodes []*Node

	erlang *erlang
}

// Node is a node of a RabbitMQ cluster.
type Node struct {
	*Process
	Name string
	Port string
}

// erlang is what the nodes of an Env share: a home with the cookie that lets them talk to each
// other, and the port mapper daemon epmd by which they find each other.
type erlang struct {
	env            *Env
	home           string
	variables      []string
	server, ctl    string // paths of programs
	epmd           *Process
	startedCluster int
}

const rabbitLog = "rabbitmq.log"

// StartRabbitMQ starts a broker of one node. It calls the scripts behind Debian's wrappers, which
// have to run as root and change to the user rabbitmq.
func (e *Env) StartRabbitMQ() (*RabbitMQ, error) {
	shared, err := e.newErlang()
	if err != nil {
		return nil, err
	}
	if err := shared.epmd.Start(); err != nil {
		return nil, err
	}
	b := &RabbitMQ{erlang: shared}
	if err := b.addNodes("single", 1); err != nil {
		return nil, err
	}
	return b, b.Nodes[0].Start()
}

// StartCluster starts another broker, of several nodes. They share Erlang's port mapper with b.
func (b *RabbitMQ) StartCluster(size int) (*RabbitMQ, error) {
	b.erlang.startedCluster++
	c := &RabbitMQ{erlang: b.erlang}
	if err := c.addNodes(fmt.Sprint("cluster", b.erlang.startedCluster), size); err != nil {
		return nil, err
	}
	// The first node forms the cluster, and the others join it.
	if err := c.Nodes[0].Start(); err != nil {
		return nil, err
	}
	joined := make(chan error)
	for _, n := range c.Nodes[1:] {
		go func() { joined <- n.Start() }()
	}
	var err error
	for range c.Nodes[1:] {
		err = errors.Join(err, <-joined)
	}
	return c, err
}

func (e *Env) newErlang() (*erlang, error) {
	const debian = "/usr/lib/rabbitmq/bin"
	s := &erlang{env: e, home: filepath.Join(e.Dir, "rabbitmq")}
	var err error
	if s.server, err = findProgram("rabbitmq-server", debian); err != nil {
		return nil, err
	}
	if s.ctl, err = findProgram("rabbitmqctl", debian); err != nil {
		return nil, err
	}
	epmdPath, err := findProgram("epmd", "/usr/lib/erlang/bin", "/usr/lib/erlang/erts-*/bin",
		"/usr/local/lib/erlang/bin")
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(s.home, 0o700); err != nil {
		return nil, err
	}
	if err := errors.Join(s.write("plugins", "[].\n"), s.write("env.conf", "")); err != nil {
		return nil, err
	}
	epmdPort := FreePort()
	s.variables = []string{
		"PATH=" + os.Getenv("PATH"),
		"LC_ALL=C.UTF-8",
		"HOME=" + s.home, // of the cookie
		"ERL_EPMD_PORT=" + epmdPort,
		"RABBITMQ_NODE_IP_ADDRESS=127.0.0.1",
		"RABBITMQ_CTL_DIST_PORT_MIN=30000",
		"RABBITMQ_CTL_DIST_PORT_MAX=32000",
		"RABBITMQ_MNESIA_BASE=" + filepath.Join(s.home, "mnesia"),
		"RABBITMQ_LOG_BASE=" + filepath.Join(s.home, "log"),
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + filepath.Join(s.home, "plugins"),
		"RABBITMQ_CONF_ENV_FILE=" + filepath.Join(s.home, "env.conf"),
		"RABBITMQ_CONFIG_FILES=" + filepath.Join(s.home, "conf.d"),
		"RABBITMQ_ADVANCED_CONFIG_FILE=" + filepath.Join(s.home, "advanced.config"),
		// Threads that spin while they wait for work take the cores from everything else.
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=+sbwt none +sbwtdcpu none +sbwtdio none" +
			" -kernel inet_dist_use_interface {127,0,0,1}",
	}
	s.epmd = &Process{
		Command: func() (*exec.Cmd, error) {
			return s.command(nil, epmdPath, "-address", "127.0.0.1", "-port", epmdPort)
		},
		Answers: func() error { return exec.Command(epmdPath, "-port", epmdPort, "-names").Run() },
	}
	e.OnClose(func() { s.epmd.End(syscall.SIGKILL) })
	return s, nil
}

func (s *erlang) write(name, content string) error {
	return os.WriteFile(filepath.Join(s.home, name), []byte(content), 0o600)
}

// command returns a command that writes to rabbitmq.log.
func (s *erlang) command(variables []string, path string, args ...string) (*exec.Cmd, error) {
	log, err := s.env.Log(rabbitLog)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, args...)
	// Of two values for a name, the last counts.
	cmd.Dir, cmd.Env = s.home, append(s.variables[:len(s.variables):len(s.variables)], variables...)
	cmd.Stdout, cmd.Stderr = log, log
	return cmd, nil
}

// addNodes adds nodes that are not started yet. The end of the Env kills them.
func (b *RabbitMQ) addNodes(kind string, size int) error {
	config := "vm_memory_high_watermark.relative = 0.4\n"
	if size > 1 {
		config += "cluster_partition_handling = pause_minority\n" +
			"cluster_formation.peer_discovery_backend = classic_config\n"
	}
	for i := range size {
		n := &Node{Name: fmt.Sprintf("%s_%d_%d@localhost", kind, os.Getpid(), i+1), Port: FreePort()}
		if size > 1 {
			config += fmt.Sprintf("cluster_formation.classic_config.nodes.%d = %s\n", i+1, n.Name)
		}
		b.Nodes = append(b.Nodes, n)
	}
	for _, n := range b.Nodes {
		s := b.erlang
		variables := []string{
			"RABBITMQ_NODENAME=" + n.Name,
			"RABBITMQ_NODE_PORT=" + n.Port,
			"RABBITMQ_DIST_PORT=" + FreePort(),
			"RABBITMQ_CONFIG_FILE=" + filepath.Join(s.home, kind+".conf"),
			"RABBITMQ_GENERATED_CONFIG_DIR=" + filepath.Join(s.home, "config-"+n.Name),
			"RABBITMQ_PID_FILE=" + filepath.Join(s.home, "pid-"+n.Name),
		}
		n.Process = &Process{
			Command: func() (*exec.Cmd, error) { return s.command(variables, s.server) },
			Answers: func() error { return acceptsAMQP(n.Port) },
			Timeout: time.Duration(size) * time.Minute,
		}
		s.env.OnClose(func() { n.End(syscall.SIGKILL) })
	}
	return b.erlang.write(kind+".conf", config)
}

// Start starts the node.
func (n *Node) Start() error {
	if err := n.Process.Start(); err != nil {
		return fmt.Errorf("RabbitMQ node %s: %w", n.Name, err)
	}
	return nil
}

// Kill kills every node.
func (b *RabbitMQ) Kill() {
	for _, n := range b.Nodes {
		n.End(syscall.SIGKILL)
	}
}

// Log returns the end of the log of all nodes.
func (b *RabbitMQ) Log() string { return b.erlang.env.Tail(rabbitLog) }

// URL returns a RABBITMQ_URL that names every node.
func (b *RabbitMQ) URL() string {
	var hosts []string
	for _, n := range b.Nodes {
		hosts = append(hosts, "127.0.0.1:"+n.Port)
	}
	return "amqp://guest:guest@" + strings.Join(hosts, ",") + "/"
}

// Dial connects to the first node that answers.
func (b *RabbitMQ) Dial() (conn *amqp.Connection, err error) {
	for _, n := range b.Nodes {
		if conn, err = dialNode(n.Port); err == nil {
			return conn, nil
		}
	}
	return nil, err
}

func dialNode(port string) (*amqp.Connection, error) {
	return amqp.DialConfig("amqp://guest:guest@127.0.0.1:"+port+"/", amqp.Config{
		Heartbeat: 10 * time.Second, Dial: amqp.DefaultDial(2 * time.Second)})
}

func acceptsAMQP(port string) error {
	conn, err := dialNode(port)
	if err != nil {
		return err
	}
	return conn.Close()
}

// Ctl runs rabbitmqctl on the node, within a minute, and returns its standard output.
func (b *RabbitMQ) Ctl(ctx context.Context, n *Node, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, b.erlang.ctl, append([]string{"-n", n.Name}, args...)...)
	cmd.Env, cmd.WaitDelay = b.erlang.variables, time.Second
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", cmd, err, &stdout, &stderr)
	}
	return stdout.String(), nil
}
