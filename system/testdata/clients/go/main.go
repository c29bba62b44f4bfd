// Command client uses the client that oapi-codegen generates from openapi.json.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
)

func main() {
	log.SetFlags(0)
	if err := use(context.Background(), os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

// check returns an error unless a request has succeeded with the expected status.
func check(operation string, err error, response interface{ StatusCode() int }, want int) error {
	if err != nil {
		return fmt.Errorf("%s: %w", operation, err)
	}
	if got := response.StatusCode(); got != want {
		return fmt.Errorf("%s: status %d, want %d", operation, got, want)
	}
	return nil
}

// use creates, reads, lists, changes and deletes a user.
func use(ctx context.Context, url string) error {
	client, err := NewClientWithResponses(url)
	if err != nil {
		return err
	}
	created, err := client.CreateUserWithResponse(ctx, nil,
		UserCreate{Name: "Ada", Surname: "Lovelace", Password: "correct-horse-s3cr3t"})
	if err := check("createUser", err, created, 201); err != nil {
		return err
	}
	id := created.JSON201.Id
	tag := created.HTTPResponse.Header.Get("ETag")

	read, err := client.GetUserWithResponse(ctx, id, nil)
	if err := check("getUser", err, read, 200); err != nil {
		return err
	}
	if *read.JSON200 != *created.JSON201 {
		return fmt.Errorf("getUser: %+v, want %+v", read.JSON200, created.JSON201)
	}
	unchanged, err := client.GetUserWithResponse(ctx, id, &GetUserParams{IfNoneMatch: &tag})
	if err := check("getUser with If-None-Match", err, unchanged, 304); err != nil {
		return err
	}
	limit := PerPage(1)
	list, err := client.ListUsersWithResponse(ctx, &ListUsersParams{PerPage: &limit})
	if err := check("listUsers", err, list, 200); err != nil {
		return err
	}
	l := list.JSON200
	if l.Total != 1 || len(l.Users) != 1 || l.Users[0].Id != id || l.NextAfter != nil {
		return fmt.Errorf("listUsers: %+v", l)
	}
	return change(ctx, client, id, tag)
}

// change changes the user whose version has the tag, and deletes it.
func change(ctx context.Context, client *ClientWithResponses, id UserId, tag string) error {
	name := "Augusta"
	updated, err := client.UpdateUserWithResponse(ctx, id, &UpdateUserParams{IfMatch: &tag},
		UserUpdate{Name: &name})
	if err := check("updateUser", err, updated, 200); err != nil {
		return err
	}
	if updated.JSON200.Name != name {
		return fmt.Errorf("updateUser: %+v", updated.JSON200)
	}
	stale, err := client.DeleteUserWithResponse(ctx, id, &DeleteUserParams{IfMatch: &tag})
	if err := check("deleteUser with an old tag", err, stale, 412); err != nil {
		return err
	}
	deleted, err := client.DeleteUserWithResponse(ctx, id, nil)
	if err := check("deleteUser", err, deleted, 200); err != nil {
		return err
	}
	missing, err := client.GetUserWithResponse(ctx, id, nil)
	if err := check("getUser after deleteUser", err, missing, 404); err != nil {
		return err
	}
	problem := missing.ApplicationproblemJSONDefault
	if want := fmt.Sprintf("User with id %d not found", id); problem.Detail != want {
		return fmt.Errorf("getUser after deleteUser: %+v, want %q", problem, want)
	}
	return nil
}

// The messages have a type, too.
var _ = Event{EventType: EventEventTypeUserCreated, Data: EventData{UserId: 1, Version: 1}}
