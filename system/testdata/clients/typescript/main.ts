// Uses the types that openapi-typescript generates from openapi.json.
import createClient from "openapi-fetch";
import type { components, paths, webhooks } from "./api.js";

declare const process: { argv: string[] };

const client = createClient<paths>({ baseUrl: process.argv[2]! });

function expect(operation: string, got: unknown, want: unknown): void {
  if (got !== want) {
    throw new Error(`${operation}: ${JSON.stringify(got)}, want ${JSON.stringify(want)}`);
  }
}

const body: components["schemas"]["UserCreate"] = {
  name: "Ada",
  surname: "Lovelace",
  password: "correct-horse-s3cr3t",
};
// @ts-expect-error: the password is required
const incomplete: components["schemas"]["UserCreate"] = { name: "Ada", surname: "Lovelace" };

const created = await client.POST("/users", { body });
expect("createUser", created.response.status, 201);
const id = created.data!.id;
const path = { id };
const tag = created.response.headers.get("ETag")!;

const read = await client.GET("/users/{id}", { params: { path } });
expect("getUser", JSON.stringify(read.data), JSON.stringify(created.data));

const list = await client.GET("/users", { params: { query: { per_page: 1 } } });
expect("listUsers", list.data!.total, 1);
expect("listUsers", list.data!.users[0]!.id, id);
const next: number | null = list.data!.next_after;
expect("listUsers", next, null);

const updated = await client.PUT("/users/{id}", {
  params: { path, header: { "If-Match": tag } },
  body: { name: "Augusta" },
});
expect("updateUser", updated.data!.name, "Augusta");

const stale = await client.DELETE("/users/{id}", { params: { path, header: { "If-Match": tag } } });
expect("deleteUser with an old tag", stale.error!.status, 412);

const deleted = await client.DELETE("/users/{id}", { params: { path } });
expect("deleteUser", deleted.data!.message, `User with id ${id} has been deleted`);

const missing = await client.GET("/users/{id}", { params: { path } });
const problem: components["schemas"]["Problem"] = missing.error!;
expect("getUser after deleteUser", missing.response.status, 404);
expect("getUser after deleteUser", problem.detail, `User with id ${id} not found`);

// The messages have a type, too.
type Message = webhooks["user.created"]["post"]["requestBody"]["content"]["application/json"];
const userID = (message: Message): number => message.data.user_id;
userID satisfies (event: components["schemas"]["Event"]) => number;
