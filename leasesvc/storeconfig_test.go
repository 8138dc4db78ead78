package leasesvc_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/dstm-project/dstm/leasesvc"
)

// etcdStore is the store section of the reference with what its comments say of etcd.
func etcdStore(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../deploy/leasesvc.yaml")
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok1 := strings.Cut(string(b), "  type: bolt ")
	_, section, ok2 := strings.Cut(rest, "  # type: etcd ")
	if !ok1 || !ok2 {
		t.Fatal("no store type in the reference")
	}
	section, tail, ok := strings.Cut(section, "  copies:")
	if !ok {
		t.Fatal("no copies behind the store")
	}
	return head + "  type: etcd " + strings.ReplaceAll(section, "\n  # ", "\n  ") + "  copies:" + tail
}

func TestEtcdConfig(t *testing.T) {
	good := etcdStore(t)
	c, err := leasesvc.ParseConfig("leasesvc.yaml", []byte(good))
	if err != nil {
		t.Fatal(err)
	}
	if s := c.Store; s.Type != leasesvc.StoreEtcd || len(s.Endpoints) != 3 || s.TTL != 5*time.Second || s.Prefix != "/dstm/lab" {
		t.Errorf("store %+v", s)
	}
	const third = "    - https://[2001:db8:2::23]:2379\n"
	for _, c := range []struct{ name, from, to, want string }{
		{"two endpoints", third, "", "store.endpoints: the number of voting members is 2: want 3 or 5: the loss of either one stops both"},
		{"four endpoints", third, third + "    - https://[2001:db8:2::24]:2379\n", "the number of voting members is 4: want 3 or 5"},
		{"twice", "[2001:db8:2::23]", "[2001:db8:2::22]", "endpoint https://[2001:db8:2::22]:2379 is there twice"},
		{"plain text", "https://[2001:db8:2::23]", "http://[2001:db8:2::23]", "want https, plain text is for loopback only"},
		{"no port", "[2001:db8:2::23]:2379", "[2001:db8:2::23]", "want a URL such as https://[2001:db8:2::21]:2379"},
		{"no ca", ", ca: /etc/dstm/etcd-ca.pem", "", "store.tls: want cert, key and ca"},
		{"path", "ttl: 5s", "path: /var/lib/dstm/lease.db", "store.path is of type bolt: the type is etcd"},
		{"ttl", "ttl: 5s", "ttl: 1500ms", "store.ttl 1.5s: want whole seconds, 2s to 60s"},
		{"bolt with endpoints", "type: etcd", "type: bolt", "store.endpoints are of type etcd: the type is bolt"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !strings.Contains(good, c.from) {
				t.Fatalf("reference has no %q", c.from)
			}
			_, err := leasesvc.ParseConfig("leasesvc.yaml", []byte(strings.Replace(good, c.from, c.to, 1)))
			if !contains(err, c.want) {
				t.Fatalf("error %v, want %q in it", err, c.want)
			}
		})
	}
	local := strings.NewReplacer("https://[2001:db8:2::2", "http://[::1]:1000", "]:2379\n", "\n", "  tls: {cert: /etc/dstm/etcd-", "  # ").Replace(good)
	if _, err := leasesvc.ParseConfig("leasesvc.yaml", []byte(local)); err != nil {
		t.Errorf("three members on loopback without TLS: %v", err)
	}
}
