package lease

import "time"

// RequestID is what a host sends along so that a call that it repeats gives the same answer.
type RequestID [16]byte

// maxAnswers is how many answers are remembered for one host; a host that repeats calls has one or two under way.
const maxAnswers = 2

// Answers remembers answers by host and request id. There is one or two for every host that came within the time, so they
// lie in one array, in a ring in order of age. The zero value is not usable; see NewAnswers.
type Answers[T any] struct {
	keep  time.Duration
	slots []slot[T] // the first is where the ring begins: next is the oldest, prev the newest
	free  int32     // of a list of free slots through next; 0 = none
	n     int
	hosts map[string][maxAnswers]int32 // newest first; 0 = none
}

type slot[T any] struct {
	host       string
	id         RequestID
	at         time.Duration
	prev, next int32
	value      T
}

// NewAnswers returns an empty memory that keeps each answer for keep: twice the longest validity.
func NewAnswers[T any](keep time.Duration) *Answers[T] {
	return &Answers[T]{keep: keep, slots: make([]slot[T], 1), hosts: map[string][maxAnswers]int32{}}
}

// Get returns the answer that the host got for id before.
func (a *Answers[T]) Get(now time.Duration, host string, id RequestID) (T, bool) {
	a.expire(now)
	for _, i := range a.hosts[host] {
		if i != 0 && a.slots[i].id == id {
			return a.slots[i].value, true
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
	have := a.hosts[host]
	if last := have[maxAnswers-1]; last != 0 {
		a.drop(last)
	}
	copy(have[1:], have[:])
	i := a.take()
	newest := a.slots[0].prev
	a.slots[i] = slot[T]{host: host, id: id, at: now, prev: newest, value: value}
	a.slots[newest].next, a.slots[0].prev = i, i
	have[0] = i
	a.hosts[host] = have
	a.n++
}

// Len returns the number of answers remembered.
func (a *Answers[T]) Len() int { return a.n }

// take returns a free slot.
func (a *Answers[T]) take() int32 {
	i := a.free
	if i == 0 {
		a.slots = append(a.slots, slot[T]{})
		return int32(len(a.slots) - 1)
	}
	a.free = a.slots[i].next
	return i
}

func (a *Answers[T]) expire(now time.Duration) {
	for i := a.slots[0].next; i != 0 && now-a.slots[i].at >= a.keep; i = a.slots[0].next {
		a.drop(i)
	}
}

// drop forgets the oldest answer of a host.
func (a *Answers[T]) drop(i int32) {
	s := &a.slots[i]
	have := a.hosts[s.host]
	for j := range have {
		if have[j] == i {
			have[j] = 0
		}
	}
	if have == ([maxAnswers]int32{}) {
		delete(a.hosts, s.host)
	} else {
		a.hosts[s.host] = have
	}
	a.slots[s.prev].next, a.slots[s.next].prev = s.next, s.prev
	*s = slot[T]{next: a.free}
	a.free = i
	a.n--
}
