package main

import (
	"encoding/json"
	"strconv"
	"time"
)

// jsonAppender is what is encoded so often that reflection would show. The bytes are those
// of encoding/json.
type jsonAppender interface {
	appendJSON(b []byte) []byte
}

func (u User) appendJSON(b []byte) []byte {
	b = strconv.AppendInt(append(b, `{"id":`...), u.ID, 10)
	b = appendJSONString(append(b, `,"name":`...), u.Name)
	b = appendJSONString(append(b, `,"surname":`...), u.Surname)
	b = u.CreatedAt.appendJSON(append(b, `,"created_at":`...))
	b = u.UpdatedAt.appendJSON(append(b, `,"updated_at":`...))
	return append(b, '}')
}

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

// appendJSON takes the fast path that package time has for RFC 3339, and for no other layout.
func (t timestamp) appendJSON(b []byte) []byte {
	b = t.UTC().AppendFormat(append(b, '"'), time.RFC3339)
	b[len(b)-1] = '.' // for the "Z"
	for micro, unit := t.Nanosecond()/1000, 100_000; unit > 0; unit /= 10 {
		b = append(b, '0'+byte(micro/unit%10)) // #nosec G115 -- a digit
	}
	return append(b, `Z"`...)
}

// appendJSONString leaves what is not plain ASCII to encoding/json.
func appendJSONString(b []byte, text string) []byte {
	for i := range len(text) {
		switch c := text[i]; {
		case c < ' ', c >= 0x7f, c == '"', c == '\\', c == '<', c == '>', c == '&':
			quoted, _ := json.Marshal(text) // a string has no error
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), text...), '"')
}
