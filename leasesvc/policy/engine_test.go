package policy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// world starts fake processes by the name of their plugin, on the clock of synctest.
type world struct {
	t   *testing.T
	reg *prometheus.Registry
	log strings.Builder

	mu     sync.Mutex
	answer map[string]func(context.Context) (Decision, error)
	fail   map[string]error // of the start
	starts map[string][]time.Duration
	procs  map[string]*fakeProcess
	begin  time.Time
}

type fakeProcess struct {
	w    *world
	name string
	done chan struct{}
	once sync.Once
}

func (p *fakeProcess) Decide(ctx context.Context, r Request) (Decision, error) {
	if r != request() {
		p.w.t.Errorf("request %+v", r)
	}
	if _, ok := ctx.Deadline(); !ok {
		p.w.t.Error("a call without a deadline")
	}
	p.w.mu.Lock()
	f := p.w.answer[p.name]
	p.w.mu.Unlock()
	return f(ctx)
}
func (p *fakeProcess) Done() <-chan struct{} { return p.done }
func (p *fakeProcess) End() string           { return "signal: killed" }
func (p *fakeProcess) Close()                { p.kill() }
func (p *fakeProcess) kill()                 { p.once.Do(func() { close(p.done) }) }

func newWorld(t *testing.T) *world {
	return &world{
		t: t, reg: prometheus.NewRegistry(), answer: map[string]func(context.Context) (Decision, error){},
		fail: map[string]error{}, starts: map[string][]time.Duration{}, procs: map[string]*fakeProcess{}, begin: time.Now(),
	}
}

func (w *world) Start(ctx context.Context, c PluginConfig) (Process, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.starts[c.Name] = append(w.starts[c.Name], time.Since(w.begin))
	if err := w.fail[c.Name]; err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	w.procs[c.Name] = &fakeProcess{w: w, name: c.Name, done: make(chan struct{})}
	return w.procs[c.Name], nil
}

// engine runs the given plugins, all asked with the budget of the policy.
func (w *world) engine(quotas QuotasConfig, plugins ...PluginConfig) *Engine {
	e := New(Config{Budget: 50 * time.Millisecond, Quotas: quotas, Plugins: plugins}, Deps{
		Start: w.Start, Registry: w.reg, Log: slog.New(slog.NewTextHandler(&w.log, nil)),
	})
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		if err := e.Run(ctx, func() { close(ready) }); err != nil {
			w.t.Error(err)
		}
	}()
	<-ready
	w.t.Cleanup(func() {
		cancel()
		<-ended
		for name, p := range w.procs {
			select {
			case <-p.done:
			default:
				w.t.Errorf("plugin %s still runs", name)
			}
		}
		if problems, err := testutil.GatherAndLint(w.reg); err != nil || len(problems) > 0 {
			w.t.Errorf("metrics: %v, %v", problems, err)
		}
	})
	return e
}

// count compares one counter or gauge, named as in the exposition format.
func (w *world) count(want float64, series string) {
	w.t.Helper()
	all, err := w.reg.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	got := 0.0
	for _, f := range all {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			if f.GetName()+"{"+strings.Join(labels, ",")+"}" == series {
				got = m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	if got != want {
		w.t.Errorf("%s is %v, want %v", series, got, want)
	}
}

func plugin(name string, f OnFailure) PluginConfig { return PluginConfig{Name: name, OnFailure: f} }

func says(d Decision) func(context.Context) (Decision, error) {
	return func(context.Context) (Decision, error) { return d, nil }
}

func hangs(ctx context.Context) (Decision, error) {
	<-ctx.Done()
	return Decision{}, ctx.Err()
}

func after(d time.Duration, f func(context.Context) (Decision, error)) func(context.Context) (Decision, error) {
	return func(ctx context.Context) (Decision, error) {
		if sleep(ctx, d); ctx.Err() != nil {
			return Decision{}, ctx.Err()
		}
		return f(ctx)
	}
}

var (
	yes = Decision{Verdict: Allow}
	no  = Decision{Deny, "not today"}
)

func TestPlugins(t *testing.T) {
	closedA := Decision{Deny, "policy a does not answer"}
	for _, c := range []struct {
		name    string
		a, b    func(context.Context) (Decision, error) // nil = does not start
		failA   OnFailure
		want    Decision
		took    time.Duration
		result  result
		callOfA outcome // "" = its call goes on when the decision is there
	}{
		{"both allow", says(yes), says(yes), Closed, yes, 0, allowed, outAllowed},
		{"the later one denies", says(yes), after(time.Millisecond, says(no)), Closed, no, time.Millisecond, deniedByPlugin, outAllowed},
		{"without a reason", says(Decision{Verdict: Deny}), says(yes), Open, Decision{Deny, "denied by policy a"}, 0, deniedByPlugin, outDenied},
		{"reason is cleaned", says(Decision{Deny, "\x1b[31mred\n" + strings.Repeat("x", 1000)}), says(yes), Open, Decision{Deny, "[31mred " + strings.Repeat("x", 192)}, 0, deniedByPlugin, outDenied},
		{"reason of who allows is dropped", says(Decision{Allow, "because"}), says(Decision{Allow, "why not"}), Open, yes, 0, allowed, outAllowed},
		{"a denial does not wait for the others", hangs, after(time.Millisecond, says(no)), Open, no, time.Millisecond, deniedByPlugin, outCanceled},
		{"slow ones are asked at the same time", after(40*time.Millisecond, says(yes)), after(40*time.Millisecond, says(yes)), Closed, yes, 40 * time.Millisecond, allowed, outAllowed},
		{"hangs, open", hangs, says(yes), Open, yes, 50 * time.Millisecond, allowedDespite, outTimeout},
		{"hangs, closed", hangs, says(yes), Closed, closedA, 50 * time.Millisecond, deniedByFailure, outTimeout},
		{"error, open", func(context.Context) (Decision, error) { return yes, errors.New("x") }, says(yes), Open, yes, 0, allowedDespite, outError},
		{"error, closed", func(context.Context) (Decision, error) { return yes, errors.New("x") }, says(yes), Closed, closedA, 0, deniedByFailure, outError},
		{"deadline of the other side", func(context.Context) (Decision, error) { return yes, fmt.Errorf("%w: x", context.DeadlineExceeded) }, says(yes), Open, yes, 0, allowedDespite, outTimeout},
		{"no verdict, open", says(Decision{}), says(yes), Open, yes, 0, allowedDespite, outInvalid},
		{"no verdict, closed", says(Decision{Verdict: 7}), says(yes), Closed, closedA, 0, deniedByFailure, outInvalid},
		{"invalid", func(context.Context) (Decision, error) { return yes, fmt.Errorf("%w: y", ErrInvalid) }, says(yes), Closed, closedA, 0, deniedByFailure, outInvalid},
		{"does not start, open", nil, says(yes), Open, yes, 0, allowedDespite, outDown},
		{"does not start, closed", nil, says(yes), Closed, closedA, 0, deniedByFailure, outDown},
		{"fails open and the other denies", nil, after(time.Millisecond, says(no)), Open, no, time.Millisecond, deniedByPlugin, outDown},
		{"the other denies in the last moment", hangs, after(50*time.Millisecond-1, says(no)), Open, no, 50*time.Millisecond - 1, deniedByPlugin, outCanceled},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.answer["a"], w.answer["b"] = c.a, c.b
				if c.a == nil {
					w.fail["a"] = errors.New("no such file")
				}
				e := w.engine(QuotasConfig{}, plugin("a", c.failA), plugin("b", Closed))
				begin := time.Now()
				if got := e.Decide(t.Context(), request()); got != c.want {
					t.Errorf("decision %+v, want %+v", got, c.want)
				}
				if took := time.Since(begin); took != c.took {
					t.Errorf("took %s, want %s", took, c.took)
				}
				synctest.Wait()
				w.count(1, "dstm_policy_decisions_total{result="+string(c.result)+"}")
				w.count(1, "dstm_policy_plugin_calls_total{plugin=a,result="+string(c.callOfA)+"}")
			})
		})
	}
}

// TestIgnoresItsDeadline: not even a process that does not return keeps a Bind.
func TestIgnoresItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := make(chan struct{})
		w.answer["a"] = func(context.Context) (Decision, error) { <-end; return no, nil }
		e := w.engine(QuotasConfig{}, plugin("a", Open))
		var binds sync.WaitGroup
		for range 3 * maxCalls {
			binds.Go(func() {
				begin := time.Now()
				if got := e.Decide(t.Context(), request()); got != yes || time.Since(begin) != 50*time.Millisecond {
					t.Errorf("%+v after %s, want allow after 50ms", got, time.Since(begin))
				}
			})
		}
		binds.Wait()
		synctest.Wait()
		w.count(2*maxCalls, "dstm_policy_plugin_calls_total{plugin=a,result=busy}")
		close(end)
		synctest.Wait()
		w.count(maxCalls, "dstm_policy_plugin_calls_total{plugin=a,result=deny}")
	})
}

func TestCallerGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.answer["a"] = hangs
		e := w.engine(QuotasConfig{}, plugin("a", Open))
		for range 3 * breakAfter {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			begin := time.Now()
			if got := e.Decide(ctx, request()); got.Allowed() || time.Since(begin) != 10*time.Millisecond {
				t.Fatalf("%+v after %s: want a denial after 10ms", got, time.Since(begin))
			}
			cancel()
		}
		synctest.Wait()
		w.count(3*breakAfter, "dstm_policy_decisions_total{result=canceled}")
		w.count(0, "dstm_policy_plugin_breaker_state{plugin=a}")
	})
}

// TestOwnBudget: a plugin may have less time than the policy.
func TestOwnBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.answer["a"], w.answer["b"] = hangs, after(30*time.Millisecond, says(yes))
		a := plugin("a", Open)
		a.Budget = 20 * time.Millisecond
		e := w.engine(QuotasConfig{}, a, plugin("b", Closed))
		begin := time.Now()
		if got := e.Decide(t.Context(), request()); got != yes || time.Since(begin) != 30*time.Millisecond {
			t.Errorf("%+v after %s, want allow after 30ms", got, time.Since(begin))
		}
	})
}

// TestQuotaBeforePlugins: a host over its quota does not reach the plugins.
func TestQuotaBeforePlugins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.answer["a"] = says(yes)
		e := w.engine(QuotasConfig{PerHost: Quota{2, time.Minute}}, plugin("a", Closed))
		for i, want := range []bool{true, true, false, false} {
			if got := e.Decide(t.Context(), request()); got.Allowed() != want {
				t.Errorf("bind %d: %+v", i, got)
			}
		}
		w.count(2, "dstm_policy_plugin_calls_total{plugin=a,result=allow}")
		w.count(2, "dstm_policy_decisions_total{result=denied_quota}")
	})
}

// TestBreakerKeepsBindsOff: once a plugin hangs, Binds wait for it no more; it is probed, replaced, and asked again.
func TestBreakerKeepsBindsOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.answer["a"] = hangs
		e := w.engine(QuotasConfig{}, plugin("a", Open))
		bind := func() time.Duration {
			t.Helper()
			begin := time.Now()
			if got := e.Decide(t.Context(), request()); got != yes {
				t.Fatalf("%+v, want allow", got)
			}
			took := time.Since(begin)
			synctest.Wait()
			return took
		}
		for range breakAfter {
			if took := bind(); took != 50*time.Millisecond {
				t.Fatalf("took %s before the breaker opens, want 50ms", took)
			}
		}
		w.count(2, "dstm_policy_plugin_breaker_state{plugin=a}")
		for range 1000 {
			if took := bind(); took != 0 {
				t.Fatalf("took %s with the breaker open, want nothing", took)
			}
		}
		for i, open := range []time.Duration{firstOpen, 2 * firstOpen, 4 * firstOpen} {
			time.Sleep(open)
			if took := bind(); took != 50*time.Millisecond {
				t.Fatalf("probe %d took %s, want 50ms", i, took)
			}
		}
		// Three probes without an answer: the process is replaced.
		w.answer["a"] = says(yes)
		time.Sleep(time.Second)
		synctest.Wait()
		if n := len(w.starts["a"]); n != 2 {
			t.Fatalf("%d starts, want 2", n)
		}
		bind()
		w.count(1, "dstm_policy_plugin_calls_total{plugin=a,result=allow}")
		w.count(1, "dstm_policy_plugin_restarts_total{plugin=a}")
		w.count(0, "dstm_policy_plugin_breaker_state{plugin=a}")
		for _, line := range []string{"old=closed new=open reason=timeout", "does not answer: it is ended", "old=open new=closed reason=\"another process\""} {
			if n := strings.Count(w.log.String(), line); n != 1 {
				t.Errorf("log has %d lines with %q, want 1:\n%s", n, line, w.log.String())
			}
		}
	})
}

func TestBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.fail["a"] = errors.New("no such file")
		e := w.engine(QuotasConfig{}, plugin("a", Closed))
		time.Sleep(2 * time.Minute)
		wait, want := firstRetry, []time.Duration{0}
		w.mu.Lock()
		for len(want) < len(w.starts["a"]) {
			want = append(want, want[len(want)-1]+wait)
			wait = min(2*wait, maxRetry)
		}
		if got := w.starts["a"]; fmt.Sprint(got) != fmt.Sprint(want) || len(got) < 12 || len(got) > 16 {
			t.Errorf("started at %v, want %v", got, want)
		}
		// It starts at last, runs for a while and dies: the next comes soon.
		delete(w.fail, "a")
		w.answer["a"] = says(yes)
		w.mu.Unlock()
		time.Sleep(maxRetry + steady)
		synctest.Wait()
		if got := e.Decide(t.Context(), request()); got != yes {
			t.Fatalf("%+v, want allow", got)
		}
		w.procs["a"].kill()
		synctest.Wait()
		if got := e.Decide(t.Context(), request()); got.Allowed() {
			t.Error("allowed without a process, with on_failure closed")
		}
		time.Sleep(firstRetry)
		synctest.Wait()
		if got := e.Decide(t.Context(), request()); got != yes {
			t.Errorf("%+v after the restart, want allow", got)
		}
		w.count(1, "dstm_policy_plugin_up{plugin=a}")
	})
}

// TestDiesAtOnce: a process that starts and dies is not started again and again without a pause.
func TestDiesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.engine(QuotasConfig{}, plugin("a", Closed))
		for range 600 {
			w.mu.Lock()
			w.procs["a"].kill()
			w.mu.Unlock()
			time.Sleep(100 * time.Millisecond)
		}
		if n := len(w.starts["a"]); n < 8 || n > 14 {
			t.Errorf("%d starts in a minute, want about 12", n)
		}
	})
}

func TestClean(t *testing.T) {
	for _, c := range []struct {
		in   string
		most int
		want string
	}{
		{"", 10, ""},
		{" plain text ", 20, "plain text"},
		{"a\x00b\x1b[1mc\r\nd\te", 20, "a b [1mc  d e"},
		{"bad \xff\xfe bytes", 20, "bad    bytes"},
		{"\u202eright to left\u2066", 40, "right to left"},
		{"äöü", 5, "äö"},
		{"aäöü", 4, "aä"},
		{strings.Repeat("x", 1<<20), 200, strings.Repeat("x", 200)},
		{strings.Repeat("\n", 1<<20), 200, ""},
	} {
		if got := Clean(c.in, c.most); got != c.want {
			t.Errorf("Clean(%.20q, %d) = %q, want %q", c.in, c.most, got, c.want)
		}
	}
}
