# Every target works from a clean clone and installs what it needs through hack/deps.
# Users need Go, make and root; `make gen` also needs clang (hack/deps gen).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GO       ?= go
PREFIX   ?= /usr/local
PROGRAMS := leasesvc tepd dstmd dstm coredns
TOOL      = $(GO) tool -modfile=tools/go.mod
VERSION  := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X github.com/dstm-project/dstm/internal/daemon.version=$(VERSION)
FUZZTIME ?= 20s

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## build all programs into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ $(PROGRAMS:%=./cmd/%)

.PHONY: coredns
coredns: ## build CoreDNS with the plugin into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/coredns

.PHONY: install
install: build ## install programs and man pages below PREFIX
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/sbin
	install -m 755 bin/dstm $(DESTDIR)$(PREFIX)/bin/
	install -m 755 bin/leasesvc bin/tepd bin/dstmd $(DESTDIR)$(PREFIX)/sbin/
	install -m 755 bin/coredns $(DESTDIR)$(PREFIX)/sbin/dstm-coredns
	install -d $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(PREFIX)/share/man/man8
	install -m 644 man/dstm.1 $(DESTDIR)$(PREFIX)/share/man/man1/
	install -m 644 man/leasesvc.8 man/tepd.8 man/dstmd.8 $(DESTDIR)$(PREFIX)/share/man/man8/

.PHONY: gen
gen: ## regenerate protobuf and BPF code
	hack/deps gen
	hack/gen-proto
	$(GO) generate ./dataplane/...

.PHONY: check
check: ## vet, staticcheck, gofumpt
	$(GO) vet ./...
	$(GO) vet -tags seedbugs,failpoints ./lease/... ./leasesvc/... ./tepd ./internal/failpoint
	$(TOOL) staticcheck ./...
	@out=$$($(TOOL) gofumpt -l . | grep -v '\.pb\.go$$' || true); if [ -n "$$out" ]; then echo "not formatted (gofumpt):"; echo "$$out"; exit 1; fi

.PHONY: test
test: check ## all tests, privileged ones included (needs root)
	hack/deps test
	DSTM_TEST_ROOT=1 $(GO) test -timeout 15m ./...
	$(GO) test -tags seedbugs -run SeededBugs ./lease/leasesim

.PHONY: lab
lab: ## build and run the whole system in network namespaces, and leave it up (needs root)
	hack/deps lab
	@$(MAKE) --no-print-directory build
	@hack/lab

.PHONY: model
model: ## check the models of the fencing with spin
	hack/deps model
	model/run.sh

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME each
	hack/fuzz $(FUZZTIME)

.PHONY: test-full
test-full: test ## test, its long forms, and every step of the labs
	hack/deps lab
	DSTM_TEST_ROOT=1 DSTM_TEST_FULL=1 $(GO) test -count=1 -timeout 20m ./cmd
	@$(MAKE) --no-print-directory build
	@hack/lab && bin/dstm lab down lab/dstm01/dstm01.clab.yml

.PHONY: soak
soak: ## 10,000 worlds of the simulation, 300 kills of a lease service under load, and every fuzz target for 30 s
	DSTM_SOAK=1 $(GO) test -count=1 -timeout 30m ./lease/leasesim
	DSTM_SOAK=1 $(GO) test -count=1 -timeout 20m -run KilledAtRandom ./cmd
	hack/fuzz 30s

.PHONY: bench
bench: bench-lease bench-kea bench-size bench-attend bench-bgp bench-dns bench-path ## measure everything that docs/performance.md shows

.PHONY: bench-lease
bench-lease: ## durable leases per second over TLS, on bbolt and on etcd
	@mkdir -p bin
	$(GO) test ./leasesvc -run '^$$' -bench 'Bind/.*/streams=64' -benchtime 12800x -count 10 >bin/bench-lease.txt
	$(GO) test ./leasesvc -run '^$$' -bench 'Bind/.*/streams=1$$' -benchtime 1000x -count 6 >>bin/bench-lease.txt
	$(TOOL) benchstat bin/bench-lease.txt

.PHONY: bench-kea
bench-kea: ## leases per second beside a Kea DHCPv6 server
	hack/deps bench
	hack/bench-kea

.PHONY: bench-size
bench-size: ## restart, memory and a gateway's first table with 10 thousand to a million leases
	@mkdir -p bin
	$(GO) test ./lease -run '^$$' -bench Core -benchtime 1x -count 6 >bin/bench-size.txt
	DSTM_TEST_ROOT=1 $(GO) test ./cmd -run '^$$' -bench Restart -benchtime 1x -count 6 >>bin/bench-size.txt
	$(TOOL) benchstat bin/bench-size.txt

.PHONY: bench-attend
bench-attend: ## idle hosts by the thousand, and all of them coming back after the service was killed
	hack/bench-attend

.PHONY: bench-bgp
bench-bgp: ## announcing and withdrawing leases
	@mkdir -p bin
	$(GO) test ./bgp/gobgp -run '^$$' -bench . -count 6 >bin/bench-bgp.txt
	$(TOOL) benchstat bin/bench-bgp.txt

.PHONY: bench-dns
bench-dns: build ## what the plugin costs a query, and how long an answer waits for a lease
	hack/deps bench
	hack/bench dns
	hack/bench answer

.PHONY: bench-path
bench-path: build ## TCP and ping through the tunnel against plain IPv6
	hack/deps bench
	hack/bench path

.PHONY: clean
clean: ## remove what the build made
	rm -rf bin
