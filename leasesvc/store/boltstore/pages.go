package boltstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// The form of a bbolt file (version 2), as far as a check needs it. On damage bbolt itself panics, or reads behind its
// mapping, in part on goroutines of its own where nobody can recover. So every page is looked at here before bbolt sees
// the file. Numbers are in the byte order of the machine.
//
//	page:           id 8, kind 2, count 2, overflow 4; then count elements; then what they point to
//	branch element: offset of the key from here 4, length of the key 4, page 8
//	leaf element:   1 = bucket 4, offset of key and value from here 4, length of the key 4, length of the value 4
//	bucket:         root page 8 (0 = a page follows right here), sequence 8
//	meta:           magic 4, version 4, page size 4, flags 4, root bucket 16, free list page 8, pages 8, transaction 8, FNV-1a of it 8
const (
	pageHeader    = 16
	elementSize   = 16
	bucketHeader  = 16
	metaSize      = 64
	metaMagic     = 0xED0CDAED
	metaVersion   = 2
	kindBranch    = 1
	kindLeaf      = 2
	kindMeta      = 4
	kindFree      = 16
	noFreeList    = math.MaxUint64
	maxDepth      = 32 // of a tree; bbolt's grow by a level for every 30-fold at least
	smallestPages = 4  // two meta pages, a free list, a root
)

var native = binary.NativeEndian

// meta is the newest valid meta page.
type meta struct {
	pageSize            int
	root, free          uint64
	pages, transactions uint64
}

// readMeta returns the newest meta page. Both must be good: one that is written is a few bytes of one sector, old or new
// after a power cut, so one that is neither is damage, and what the newest transaction wrote may be lost with it.
func readMeta(b []byte) (meta, error) {
	first, ok := metaAt(b, 0)
	if !ok {
		return meta{}, errors.New("meta page 0 is damaged")
	}
	if n := first.pageSize; n < 1<<10 || n > 1<<16 || n&(n-1) != 0 {
		return meta{}, fmt.Errorf("pages of %d bytes", n)
	}
	best, ok := metaAt(b, first.pageSize)
	switch {
	case !ok || best.pageSize != first.pageSize:
		return meta{}, errors.New("meta page 1 is damaged")
	case first.transactions > best.transactions:
		best = first
	}
	if best.pages < smallestPages || best.pages > uint64(len(b)/best.pageSize) {
		return meta{}, fmt.Errorf("file of %d bytes: want %d pages of %d", len(b), best.pages, best.pageSize)
	}
	return best, nil
}

func metaAt(b []byte, at int) (meta, bool) {
	if at+pageHeader+metaSize > len(b) {
		return meta{}, false
	}
	b = b[at+pageHeader : at+pageHeader+metaSize]
	sum := fnv.New64a()
	_, _ = sum.Write(b[:56]) // never fails, see hash.Hash
	if native.Uint32(b) != metaMagic || native.Uint32(b[4:]) != metaVersion || native.Uint64(b[56:]) != sum.Sum64() {
		return meta{}, false
	}
	return meta{
		pageSize: int(native.Uint32(b[8:])), root: native.Uint64(b[16:]), free: native.Uint64(b[32:]),
		pages: native.Uint64(b[40:]), transactions: native.Uint64(b[48:]),
	}, true
}

// visitor is called with every pair of a bucket, in order of keys.
type visitor func(bucket string, k, v []byte) error

// checkPages looks at every page that is in use, and sees to it that each is used once, that keys are in order, and that
// the rest is in the free list.
func checkPages(f *os.File, visit visitor) (m meta, err error) {
	err = withPages(f, func(c *pages) error {
		c.visit, m = visit, c.meta
		return c.check()
	})
	return m, err
}

// onePair gives one pair to do, and looks at no other bucket.
func onePair(f *os.File, bucket, key []byte, do func(v []byte) error) error {
	found := false
	err := withPages(f, func(c *pages) error {
		c.only = bucket
		c.visit = func(_ string, k, v []byte) error {
			if !bytes.Equal(k, key) {
				return nil
			}
			found = true
			return do(v)
		}
		return c.tree(c.root, nil, nil, 0, c.buckets)
	})
	if err == nil && !found {
		return fmt.Errorf("record %q is missing", key)
	}
	return err
}

// withPages maps a file while do looks at it. A disk that cannot be read is a memory fault there, and an error here.
func withPages(f *os.File, do func(*pages) error) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() == 0 || st.Size() > math.MaxInt {
		return fmt.Errorf("file of %d bytes", st.Size())
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	err = guard(func() error {
		m, err := readMeta(b)
		if err != nil {
			return err
		}
		return do(&pages{b: b, meta: m, seen: make([]uint64, m.pages/64+1)})
	})
	return errors.Join(err, unix.Munmap(b))
}

type pages struct {
	meta
	b     []byte
	seen  []uint64 // a bit for each page
	visit visitor
	only  []byte // the one bucket to look at; nil = all
}

func (c *pages) check() error {
	for id := range uint64(2) {
		if err := c.use(id, 0); err != nil {
			return err
		}
	}
	if err := c.tree(c.root, nil, nil, 0, c.buckets); err != nil {
		return err
	}
	if c.free == noFreeList {
		return errors.New("no free list")
	}
	if err := c.freeList(); err != nil {
		return err
	}
	for id := range c.meta.pages {
		if c.seen[id/64]&(1<<(id%64)) == 0 {
			return fmt.Errorf("page %d is neither used nor free", id)
		}
	}
	return nil
}

// use marks a page and those that it runs over into.
func (c *pages) use(id, overflow uint64) error {
	if id >= c.meta.pages || overflow >= c.meta.pages-id {
		return fmt.Errorf("page %d and %d more: the file has %d", id, overflow, c.meta.pages)
	}
	for ; ; id++ {
		bit := uint64(1) << (id % 64)
		if c.seen[id/64]&bit != 0 {
			return fmt.Errorf("page %d is used twice", id)
		}
		c.seen[id/64] |= bit
		if overflow == 0 {
			return nil
		}
		overflow--
	}
}

// page returns a page of a kind, with what it runs over into.
func (c *pages) page(id uint64) (b []byte, kind uint16, count int, err error) {
	if id < 2 || id >= c.meta.pages {
		return nil, 0, 0, fmt.Errorf("page %d: the file has 2 to %d", id, c.meta.pages)
	}
	b = c.b[int(id)*c.pageSize:]
	kind, count = native.Uint16(b[8:]), int(native.Uint16(b[10:]))
	overflow := uint64(native.Uint32(b[12:]))
	if got := native.Uint64(b); got != id {
		return nil, 0, 0, fmt.Errorf("page %d says that it is page %d", id, got)
	}
	if err := c.use(id, overflow); err != nil {
		return nil, 0, 0, err
	}
	return b[:(int(overflow)+1)*c.pageSize], kind, count, nil
}

// each gets a pair of a tree.
type each func(flags uint32, k, v []byte) error

// tree looks at the pages from id down. Keys are from low to below high; nil is no bound.
func (c *pages) tree(id uint64, low, high []byte, depth int, do each) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d: tree of more than %d levels", id, maxDepth)
	}
	b, kind, count, err := c.page(id)
	if err != nil {
		return err
	}
	switch {
	case kind == kindLeaf:
		err = leaf(b, count, low, high, do)
	case kind == kindBranch && count > 0:
		return c.branch(b, count, low, high, depth, do)
	default:
		return fmt.Errorf("page %d of kind %#x with %d elements", id, kind, count)
	}
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

func (c *pages) branch(b []byte, count int, low, high []byte, depth int, do each) error {
	id := native.Uint64(b)
	for i := range count {
		k, _, child, err := element(b, i, count, kindBranch)
		if err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		next := high
		if i+1 < count {
			if next, _, _, err = element(b, i+1, count, kindBranch); err != nil {
				return fmt.Errorf("page %d: %w", id, err)
			}
		}
		if bytes.Compare(k, low) < 0 || next != nil && bytes.Compare(k, next) >= 0 {
			return fmt.Errorf("page %d: key %x is not between %x and %x", id, k, low, next)
		}
		low = k
		if err := c.tree(child, low, next, depth+1, do); err != nil {
			return err
		}
	}
	return nil
}

func leaf(b []byte, count int, low, high []byte, do each) error {
	for i := range count {
		k, v, flags, err := element(b, i, count, kindLeaf)
		if err != nil {
			return err
		}
		order := bytes.Compare(k, low)
		if low != nil && (order < 0 || i > 0 && order == 0) || high != nil && bytes.Compare(k, high) >= 0 {
			return fmt.Errorf("key %x is not between %x and %x", k, low, high)
		}
		low = k
		if err := do(uint32(flags), k, v); err != nil {
			return err
		}
	}
	return nil
}

// element returns the key of an element with its value and flags, or with the page below it.
func element(b []byte, i, count int, kind uint16) (k, v []byte, x uint64, err error) {
	at := pageHeader + i*elementSize
	if pageHeader+count*elementSize > len(b) {
		return nil, nil, 0, fmt.Errorf("%d elements in %d bytes", count, len(b))
	}
	var pos, ksize, vsize uint64
	if kind == kindBranch {
		pos, ksize, x = uint64(native.Uint32(b[at:])), uint64(native.Uint32(b[at+4:])), native.Uint64(b[at+8:])
	} else {
		x, pos = uint64(native.Uint32(b[at:])), uint64(native.Uint32(b[at+4:]))
		ksize, vsize = uint64(native.Uint32(b[at+8:])), uint64(native.Uint32(b[at+12:]))
	}
	from := uint64(at) + pos
	if from < uint64(pageHeader+count*elementSize) || from+ksize+vsize > uint64(len(b)) || ksize == 0 {
		return nil, nil, 0, fmt.Errorf("element %d: key of %d and value of %d bytes at %d of %d", i, ksize, vsize, from, len(b))
	}
	return b[from : from+ksize], b[from+ksize : from+ksize+vsize], x, nil
}

// buckets takes an element of the root: a bucket.
func (c *pages) buckets(flags uint32, name, v []byte) error {
	if flags != 1 || len(v) < bucketHeader {
		return fmt.Errorf("bucket %q of %d bytes, flags %#x", name, len(v), flags)
	}
	if c.only != nil && !bytes.Equal(c.only, name) {
		return nil
	}
	do := func(flags uint32, k, v []byte) error {
		if flags != 0 {
			return fmt.Errorf("key %x has flags %#x", k, flags)
		}
		return c.visit(string(name), k, v)
	}
	root := native.Uint64(v)
	if root != 0 {
		return bucketError(name, c.tree(root, nil, nil, 0, do))
	}
	v = v[bucketHeader:]
	if len(v) < pageHeader || native.Uint16(v[8:]) != kindLeaf {
		return fmt.Errorf("bucket %q: no page in %d bytes", name, len(v))
	}
	return bucketError(name, leaf(v, int(native.Uint16(v[10:])), nil, nil, do))
}

func bucketError(name []byte, err error) error {
	if err != nil {
		return fmt.Errorf("bucket %q: %w", name, err)
	}
	return nil
}

// freeList looks at the pages that hold the list, and marks those in it.
func (c *pages) freeList() error {
	b, kind, count, err := c.page(c.free)
	if err != nil {
		return fmt.Errorf("free list: %w", err)
	}
	b = b[pageHeader:]
	n := uint64(count)
	if count == math.MaxUint16 { // too many to be counted there
		n, b = native.Uint64(b), b[8:]
	}
	if kind != kindFree || n > uint64(len(b)/8) {
		return fmt.Errorf("free list: page %d of kind %#x with %d pages", c.free, kind, n)
	}
	for i := range n {
		if err := c.use(native.Uint64(b[8*i:]), 0); err != nil {
			return fmt.Errorf("free list: %w", err)
		}
	}
	return nil
}
