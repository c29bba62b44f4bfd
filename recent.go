package main

// recent is a map that keeps the entries put last: at least max/2 of them, and at most max. It is
// not safe for concurrent use.
type recent[K comparable, V any] struct {
	max          int
	newer, older map[K]V
}

func (r *recent[K, V]) get(key K) (V, bool) {
	if value, ok := r.newer[key]; ok {
		return value, true
	}
	value, ok := r.older[key]
	return value, ok
}

func (r *recent[K, V]) put(key K, value V) {
	if r.newer == nil || len(r.newer) >= r.max/2 {
		r.newer, r.older = make(map[K]V), r.newer
	}
	r.newer[key] = value
}
