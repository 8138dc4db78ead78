package tc

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/dstm-project/dstm/lease"
)

// table is the map of bindings. Nobody but its user adds or removes any; the programs only write when they have seen them.
type table struct{ *ebpf.Map }

// batch is how many bindings the kernel is given or asked for at a time: a table has up to a million.
const batch = 4096

// each calls f with every binding.
func (t table) each(f func(bindingKey, *bindingRecord)) error {
	keys, records := make([]bindingKey, batch), make([]bindingRecord, batch)
	for at := (ebpf.MapBatchCursor{}); ; {
		n, err := t.BatchLookup(&at, keys, records, nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("data path tc: read bindings: %w", err)
		}
		for i := range n {
			f(keys[i], &records[i])
		}
		if err != nil {
			return nil
		}
	}
}

// replace makes the table exactly bs. What stays as it is is not touched, and what changes keeps the time it was last seen.
func (t table) replace(bs []lease.Binding) error {
	want := make(map[bindingKey]int, len(bs))
	for i, b := range bs {
		want[keyOf(b.Resource)] = i
	}
	var gone, keys []bindingKey
	var records []bindingRecord
	err := t.each(func(k bindingKey, have *bindingRecord) {
		i, ok := want[k]
		if !ok {
			gone = append(gone, k)
			return
		}
		delete(want, k)
		r := recordOf(bs[i])
		if r.LastSeen = have.LastSeen; r != *have {
			keys, records = append(keys, k), append(records, r)
		}
	})
	if err != nil {
		return err
	}
	if len(gone) > 0 {
		if _, err := t.BatchDelete(gone, nil); err != nil {
			return fmt.Errorf("data path tc: delete %d bindings: %w", len(gone), err)
		}
	}
	if err := t.put(keys, records); err != nil {
		return err
	}
	keys, records = keys[:0], records[:0]
	for k, i := range want {
		keys, records = append(keys, k), append(records, recordOf(bs[i]))
		if len(keys) == batch {
			if err := t.put(keys, records); err != nil {
				return err
			}
			keys, records = keys[:0], records[:0]
		}
	}
	return t.put(keys, records)
}

// The kernel takes memory for new bindings from a reserve that it fills up in the background, so it may have none for a
// moment (ENOMEM). It is asked again this often while nothing is taken.
const (
	refills    = 100
	refillTime = time.Millisecond
)

// put adds or replaces bindings.
func (t table) put(keys []bindingKey, records []bindingRecord) error {
	for tries := 0; len(keys) > 0; tries++ {
		n := min(len(keys), batch)
		done, err := t.BatchUpdate(keys[:n], records[:n], nil)
		if err == nil {
			done = n
		} else if !errors.Is(err, unix.ENOMEM) || tries == refills {
			return fmt.Errorf("data path tc: put bindings, %d to go: %w", len(keys)-done, err)
		}
		if done > 0 {
			tries = 0
		} else {
			time.Sleep(refillTime)
		}
		keys, records = keys[done:], records[done:]
	}
	return nil
}
