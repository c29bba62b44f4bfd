package main

// This file owns how values become JSON: timestamps, answers, and the types that are encoded so
// often that reflection would cost a noticeable share of a request.

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

// jsonAppender is implemented by types with an encoder of their own. It appends the bytes that
// encoding/json would produce.
type jsonAppender interface {
	appendJSON(b []byte) []byte
}

// writeJSON answers with v and a line feed. The Content-Type is application/json unless one is set.
// It fails, without having written anything, only if v cannot be encoded.
func writeJSON(w http.ResponseWriter, status int, v any) error {
	var body []byte
	var err error
	if a, ok := v.(jsonAppender); ok {
		body = a.appendJSON(make([]byte, 0, 256))
	} else if body, err = json.Marshal(v); err != nil {
		return err
	}
	body = append(body, '\n')
	h := w.Header()
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", "application/json")
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // #nosec G705 -- never HTML; response records a failure
	return nil
}

// timestamp is a time in the format of every time that leaves the service: RFC 3339 in UTC with six
// fractional digits.
type timestamp struct{ time.Time }

// nowAfter returns the current time, or t plus a microsecond if the clock has not passed t.
func nowAfter(t timestamp) timestamp {
	now := time.Now().Truncate(time.Microsecond)
	if next := t.Add(time.Microsecond); now.Before(next) {
		now = next
	}
	return timestamp{now}
}

// MarshalJSON implements json.Marshaler.
func (t timestamp) MarshalJSON() ([]byte, error) {
	return t.appendJSON(make([]byte, 0, 32)), nil
}

// appendJSON implements jsonAppender.
func (u User) appendJSON(b []byte) []byte {
	b = strconv.AppendInt(append(b, `{"id":`...), u.ID, 10)
	b = appendJSONString(append(b, `,"name":`...), u.Name)
	b = appendJSONString(append(b, `,"surname":`...), u.Surname)
	b = u.CreatedAt.appendJSON(append(b, `,"created_at":`...))
	b = u.UpdatedAt.appendJSON(append(b, `,"updated_at":`...))
	return append(b, '}')
}

// appendJSON implements jsonAppender.
func (l userList) appendJSON(b []byte) []byte {
	b = append(b, `{"users":[`...)
	for i, u := range l.Users {
		if i > 0 {
			b = append(b, ',')
		}
		b = u.appendJSON(b)
	}
	b = strconv.AppendInt(append(b, `],"total":`...), l.Total, 10)
	if l.Page > 0 {
		b = strconv.AppendInt(append(b, `,"page":`...), l.Page, 10)
	}
	b = strconv.AppendInt(append(b, `,"per_page":`...), l.PerPage, 10)
	b = append(b, `,"next_after":`...)
	if l.NextAfter == nil {
		return append(b, `null}`...)
	}
	return append(strconv.AppendInt(b, *l.NextAfter, 10), '}')
}

// appendJSON formats seconds with time.RFC3339, for which package time has a fast path, and appends
// the microseconds.
func (t timestamp) appendJSON(b []byte) []byte {
	b = t.UTC().AppendFormat(append(b, '"'), time.RFC3339)
	b[len(b)-1] = '.' // replaces the Z
	for micro, unit := t.Nanosecond()/1000, 100_000; unit > 0; unit /= 10 {
		b = append(b, '0'+byte(micro/unit%10)) // #nosec G115 -- a digit
	}
	return append(b, `Z"`...)
}

// appendJSONString appends text as a JSON string. It leaves text that needs escapes to
// encoding/json.
func appendJSONString(b []byte, text string) []byte {
	for i := range len(text) {
		switch c := text[i]; {
		case c < ' ', c >= 0x7f, c == '"', c == '\\', c == '<', c == '>', c == '&':
			quoted, _ := json.Marshal(text) // cannot fail for a string
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), text...), '"')
}
