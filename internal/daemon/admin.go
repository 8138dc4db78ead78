package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Admin is the listener for operators and their monitoring. It has no authentication and therefore binds to loopback
// only.
type Admin struct {
	Addr     netip.AddrPort
	Registry *prometheus.Registry
	Ready    func() error            // nil error = ready; the error is the answer's text
	Handlers map[string]http.Handler // by pattern of net/http, e.g. "GET /status"
}

// CheckAdmin says what is wrong with an admin address. The zero value is allowed and means no listener.
func CheckAdmin(a netip.AddrPort) error {
	if a.IsValid() && !a.Addr().IsLoopback() {
		return fmt.Errorf("admin address %s: want a loopback address such as [::1]:%d, the listener has no authentication", a, a.Port())
	}
	return nil
}

// NewRegistry returns a registry with the process's own metrics.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Handler serves /metrics, /healthz, /readyz, /debug/pprof and the daemon's own pages.
func (a *Admin) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.Registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if a.Ready != nil {
			if err := a.Ready(); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	for pattern, h := range a.Handlers {
		mux.Handle(pattern, h)
	}
	return mux
}

// Task returns the listener as a task. Without an address it does nothing.
func (a *Admin) Task(log *slog.Logger) Task {
	return NewTask("admin", func(ctx context.Context, ready func()) error {
		if !a.Addr.IsValid() {
			ready()
			<-ctx.Done()
			return nil
		}
		l, err := net.Listen("tcp", a.Addr.String())
		if err != nil {
			return err
		}
		log.Info("admin listener", "addr", l.Addr().String())
		s := &http.Server{Handler: a.Handler(), ReadHeaderTimeout: 5 * time.Second}
		stop := context.AfterFunc(ctx, func() { s.Close() })
		defer stop()
		ready()
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
}

// JSON serves what f returns, an object, with its schema ("dstm.status/1") as the first key. An error becomes status
// 500 with its text.
func JSON(schema string, f func(*http.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		if err == nil {
			var b []byte
			if b, err = MarshalSchema(schema, v); err == nil {
				w.Header().Set("Content-Type", "application/json")
				_, _ = w.Write(append(b, '\n')) // a client that went away is not our error
				return
			}
		}
		http.Error(w, err.Error(), http.StatusInternalServerError)
	})
}

// MarshalSchema returns v, which must marshal to a JSON object, with "schema" as its first key.
func MarshalSchema(schema string, v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	if len(b) < 2 || b[0] != '{' {
		return nil, fmt.Errorf("json of schema %s: %T is not an object", schema, v)
	}
	head, err := json.Marshal(map[string]string{"schema": schema})
	if err != nil {
		return nil, err
	}
	if string(b) == "{}" {
		return head, nil
	}
	return append(append(head[:len(head)-1], ','), b[1:]...), nil
}
