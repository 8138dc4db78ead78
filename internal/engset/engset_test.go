package engset

import (
	"math"
	"math/big"
	"strings"
	"testing"
	"time"
)

// exact is the textbook form in exact arithmetic: binomial terms of the other sources over their sum.
func exact(sources, servers int, busy *big.Rat) float64 {
	a := new(big.Rat).Quo(busy, new(big.Rat).Sub(big.NewRat(1, 1), busy))
	term, sum := big.NewRat(1, 1), big.NewRat(1, 1)
	for k := 1; k <= servers; k++ {
		term.Mul(term, a)
		term.Mul(term, big.NewRat(int64(sources-k), int64(k)))
		sum.Add(sum, term)
	}
	f, _ := new(big.Rat).Quo(term, sum).Float64()
	return f
}

// logs is the same with logarithms of the gamma function, which reaches any size with fewer digits.
func logs(sources, servers int, busy float64) float64 {
	m := float64(sources - 1)
	logTerm := func(k float64) float64 {
		lg := func(x float64) float64 { v, _ := math.Lgamma(x + 1); return v }
		return lg(m) - lg(k) - lg(m-k) + k*math.Log(busy/(1-busy))
	}
	top, sum := logTerm(float64(servers)), 0.0
	for k := 0; k <= servers; k++ {
		sum += math.Exp(logTerm(float64(k)) - top)
	}
	return 1 / sum
}

func near(got, want, relative float64) bool { return math.Abs(got-want) <= relative*math.Abs(want) }

func TestExact(t *testing.T) {
	for _, tt := range []struct {
		sources  int
		num, den int64
	}{{1, 1, 2}, {2, 1, 3}, {10, 1, 4}, {40, 1, 40}, {100, 9, 10}, {300, 1, 7}} {
		busy, _ := big.NewRat(tt.num, tt.den).Float64()
		l := Load{Sources: tt.sources, Busy: busy}
		for servers := 0; servers <= tt.sources; servers++ {
			got, want := l.Blocking(servers), exact(tt.sources, servers, big.NewRat(tt.num, tt.den))
			if !near(got, want, 1e-13) {
				t.Fatalf("%+v with %d servers: %g, exact is %g", l, servers, got, want)
			}
		}
	}
}

func TestLarge(t *testing.T) {
	for _, tt := range []struct {
		l       Load
		servers int
	}{
		{Load{100_000, 180.0 / 3600}, 5_198},
		{Load{MaxSources, 0.025}, 25_500},
		{Load{MaxSources, 0.5}, 501_500},
		{Load{MaxSources, 0.97}, 970_700},
	} {
		got, want := tt.l.Blocking(tt.servers), logs(tt.l.Sources, tt.servers, tt.l.Busy)
		if !near(got, want, 1e-6) { // the logarithms lose digits, not the recursion
			t.Errorf("%+v with %d servers: %g, by logarithms %g", tt.l, tt.servers, got, want)
		}
	}
}

// TestRequirement has the figures that the requirements give: one use of 60 s an hour by 100,000 hosts.
func TestRequirement(t *testing.T) {
	for tail, want := range map[time.Duration]int{30 * time.Second: 2_648, 120 * time.Second: 5_198, 900 * time.Second: 27_029} {
		l := Load{Sources: 100_000, Busy: (time.Minute + tail).Hours()}
		got, blocking := l.Servers(1e-4)
		if got != want {
			t.Errorf("tail %s: %d servers, want %d", tail, got, want)
		}
		if one := l.Blocking(got - 1); blocking > 1e-4 || one <= 1e-4 || blocking != l.Blocking(got) {
			t.Errorf("tail %s: %d servers block %g, one less %g: the target 1e-4 is not between", tail, got, blocking, one)
		}
	}
}

func TestEdges(t *testing.T) {
	for _, tt := range []struct {
		name     string
		l        Load
		target   float64
		servers  int
		blocking float64
	}{
		{"alone", Load{1, 0.5}, 1e-4, 1, 0},
		{"anything goes", Load{10, 0.5}, 1, 0, 1},
		{"two for two", Load{2, 0.01}, 1e-9, 2, 0},
		{"always busy", Load{1000, 1}, 0.5, 1000, 0},
		{"nearly always busy", Load{1000, 0.999999}, 1e-4, 1000, 0},
	} {
		if s, b := tt.l.Servers(tt.target); s != tt.servers || b != tt.blocking {
			t.Errorf("%s: %d servers block %g, want %d and %g", tt.name, s, b, tt.servers, tt.blocking)
		}
	}
	for _, l := range []Load{{0, 0.5}, {MaxSources + 1, 0.5}, {1, 0}, {1, -1}, {1, 1.01}, {1, math.NaN()}} {
		if err := l.Check(); err == nil || !strings.Contains(err.Error(), ": want ") {
			t.Errorf("%+v: %v", l, err)
		}
	}
	if err := (Load{MaxSources, 1}).Check(); err != nil {
		t.Error(err)
	}
}

// erlang is Erlang's B formula: as Engset's, with a load that does not shrink when sources are busy.
func erlang(offered float64, servers int) float64 {
	b := 1.0
	for c := 1; c <= servers; c++ {
		x := offered * b
		b = x / (float64(c) + x)
	}
	return b
}

func TestErlangIsTheLimit(t *testing.T) {
	const mean, servers = 20, 30
	last, limit := 0.0, erlang(mean, servers)
	for _, n := range []int{50, 200, 1000, 10_000, MaxSources} {
		b := Load{n, float64(mean) / float64(n)}.Blocking(servers)
		if b <= last || b >= limit {
			t.Errorf("%d sources block %g: want more than %g of fewer and less than %g of infinitely many", n, b, last, limit)
		}
		last = b
	}
	if !near(last, limit, 1e-4) {
		t.Errorf("%g with a million sources, the limit is %g", last, limit)
	}
}

func TestAddresses(t *testing.T) {
	for _, tt := range []struct{ leases, psidLen, addresses, bits int }{
		{0, 0, 0, 32},
		{1, 0, 1, 32},
		{1, 4, 1, 32},
		{16, 4, 1, 32},
		{17, 4, 2, 31},
		{5_198, 0, 5_198, 19},
		{5_198, 4, 325, 23},
		{256, 0, 256, 24},
		{257, 0, 257, 23},
		{1 << 20, 10, 1024, 22},
		{1 << 20, 0, 1 << 20, 12},
	} {
		a := Addresses(tt.leases, tt.psidLen)
		if b := PrefixBits(a); a != tt.addresses || b != tt.bits {
			t.Errorf("%d leases, 2^%d hosts an address: %d addresses, /%d; want %d, /%d", tt.leases, tt.psidLen, a, b, tt.addresses, tt.bits)
		}
	}
}

func BenchmarkServers(b *testing.B) {
	for b.Loop() {
		Load{Sources: MaxSources, Busy: 0.5}.Servers(1e-4)
	}
}
