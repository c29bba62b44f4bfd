package main

import (
	"bytes"
	"encoding/json"
	"testing"
	"time"
)

// FuzzAppendJSON compares appendJSON with encoding/json.
func FuzzAppendJSON(f *testing.F) {
	for _, text := range []string{"John", "", "a\"b\\c", "<&>", "\x00\x1f\x7f", "\u2028é😀", "\xff", "\xed\xa0\x80"} {
		f.Add(int64(7), text, text, int64(1767268800123456))
	}
	f.Fuzz(func(t *testing.T, n int64, name, surname string, at int64) {
		type plainUser User // without the method
		type plainList struct {
			Users     []plainUser `json:"users"`
			Total     int64       `json:"total"`
			Page      int64       `json:"page,omitempty"`
			PerPage   int64       `json:"per_page"`
			NextAfter *int64      `json:"next_after"`
		}
		u := User{ID: n, Name: name, Surname: surname, Version: n,
			CreatedAt: timestamp{time.UnixMicro(at % 1e17)}, UpdatedAt: timestamp{time.UnixMicro(n % 1e17)}}
		page := max(n, 0)
		for list, plain := range map[*userList]plainList{
			{Users: []User{}, Total: n, Page: page, PerPage: at}: {[]plainUser{}, n, page, at, nil},
			{Users: []User{u}, Total: at, PerPage: n}:            {[]plainUser{plainUser(u)}, at, 0, n, nil},
			{Users: []User{u, u}, NextAfter: &n}:                 {[]plainUser{plainUser(u), plainUser(u)}, 0, 0, 0, &n},
		} {
			want, err := json.Marshal(plain)
			if err != nil {
				t.Fatal(err)
			}
			if got := list.appendJSON(nil); !bytes.Equal(got, want) {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		}
	})
}
