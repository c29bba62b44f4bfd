package env

// The strings of the service that the tests look for in its log, its answers and its metrics.
const (
	LogStarted       = "Service started"           // with "port"
	LogReceivedEvent = "Received event"            // a prefix; "event_type", "user_id", "version"
	LogRequest       = "Request "                  // a prefix of every line about a request
	LogLost          = "Event connection lost"     // at WARN
	LogRestored      = "Event connection restored" // at INFO
	LogWaiting       = "Waiting for the database"  // at WARN

	DetailUnchanged = "nothing was changed" // in a 503 whose change was certainly not made

	MetricLeader = "relay_leader" // 1 for the replica that relays events
	MetricMemory = "process_resident_memory_bytes"

	ApplicationName = "user-service" // in pg_stat_activity

	Exchange           = "user_events"
	DeadLetterExchange = "user_events.dlx"
	Queue              = "user_events.consumer"
	DeadLetterQueue    = "user_events.dead"

	EventCreated = "user.created"
	EventUpdated = "user.updated"
	EventDeleted = "user.deleted"
)

// wording is what one release writes to its log.
type wording struct{ started, receivedEvent, request, lost, restored string }

var (
	currentWording = wording{LogStarted, LogReceivedEvent, LogRequest, LogLost, LogRestored}
	// previousWording is that of the commit in .ci/previous.
	previousWording = wording{"Service started", "Received event", "Request ",
		"Event connection lost", "Event connection restored"}
)
