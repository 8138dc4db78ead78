package lease

import (
	"container/list"
	"time"
)

// RequestID is what a host sends along so that a call that it repeats gives the same answer.
type RequestID [16]byte

// maxAnswers is how many answers are remembered for one host; a host that repeats calls has one or two under way.
const maxAnswers = 8

// Answers remembers answers by host and request id. The zero value is not usable; see NewAnswers.
type Answers[T any] struct {
	keep  time.Duration
	order *list.List // of *answer[T], oldest first
	hosts map[string][]*list.Element
}

type answer[T any] struct {
	host  string
	id    RequestID
	at    time.Duration
	value T
}

// NewAnswers returns an empty memory that keeps each answer for keep: twice the longest validity.
func NewAnswers[T any](keep time.Duration) *Answers[T] {
	return &Answers[T]{keep: keep, order: list.New(), hosts: map[string][]*list.Element{}}
}

// Get returns the answer that the host got for id before.
func (a *Answers[T]) Get(now time.Duration, host string, id RequestID) (T, bool) {
	a.expire(now)
	for _, e := range a.hosts[host] {
		if v := e.Value.(*answer[T]); v.id == id {
			return v.value, true
		}
	}
	var zero T
	return zero, false
}

// Put remembers an answer. A zero id is none and is not remembered. Of one host the oldest answer is forgotten when
// there are too many.
func (a *Answers[T]) Put(now time.Duration, host string, id RequestID, value T) {
	a.expire(now)
	if id == (RequestID{}) {
		return
	}
	if have := a.hosts[host]; len(have) >= maxAnswers {
		a.drop(have[0])
	}
	e := a.order.PushBack(&answer[T]{host: host, id: id, at: now, value: value})
	a.hosts[host] = append(a.hosts[host], e)
}

// Len returns the number of answers remembered.
func (a *Answers[T]) Len() int { return a.order.Len() }

func (a *Answers[T]) expire(now time.Duration) {
	for e := a.order.Front(); e != nil && now-e.Value.(*answer[T]).at >= a.keep; e = a.order.Front() {
		a.drop(e)
	}
}

// drop forgets the oldest answer of a host.
func (a *Answers[T]) drop(e *list.Element) {
	host := a.order.Remove(e).(*answer[T]).host
	if a.hosts[host] = a.hosts[host][1:]; len(a.hosts[host]) == 0 {
		delete(a.hosts, host)
	}
}
