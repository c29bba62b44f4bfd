// Prints the span context that OpenTelemetry extracts from the headers of each message: one line of
// JSON for each, after the line "ready".
import { ROOT_CONTEXT, defaultTextMapGetter, trace } from "@opentelemetry/api";
import { W3CTraceContextPropagator } from "@opentelemetry/core";
import { connect } from "amqplib";

const connection = await connect(process.argv[2]);
const channel = await connection.createChannel();
const { queue } = await channel.assertQueue("", { exclusive: true });
await channel.bindQueue(queue, "user_events", "user.*");

const propagator = new W3CTraceContextPropagator();
await channel.consume(queue, ({ content, properties }) => {
  const context = propagator.extract(ROOT_CONTEXT, properties.headers, defaultTextMapGetter);
  const span = trace.getSpanContext(context);
  console.log(JSON.stringify({
    event_id: JSON.parse(content).event_id,
    trace_id: span?.traceId ?? "",
    span_id: span?.spanId ?? "",
    flags: span?.traceFlags ?? 0,
    state: span?.traceState?.serialize() ?? "",
  }));
}, { noAck: true });
console.log("ready");
