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
install: build ## install programs below PREFIX
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/sbin
	install -m 755 bin/dstm $(DESTDIR)$(PREFIX)/bin/
	install -m 755 bin/leasesvc bin/tepd bin/dstmd $(DESTDIR)$(PREFIX)/sbin/
	install -m 755 bin/coredns $(DESTDIR)$(PREFIX)/sbin/dstm-coredns

.PHONY: gen
gen: ## regenerate protobuf and BPF code
	hack/deps gen
	hack/gen-proto
	$(GO) generate ./dataplane/...

.PHONY: check
check: ## vet, staticcheck, gofumpt
	$(GO) vet ./...
	$(TOOL) staticcheck ./...
	@out=$$($(TOOL) gofumpt -l . | grep -v '\.pb\.go$$' || true); if [ -n "$$out" ]; then echo "not formatted (gofumpt):"; echo "$$out"; exit 1; fi

.PHONY: test
test: check ## all tests, privileged ones included (needs root)
	hack/deps test
	DSTM_TEST_ROOT=1 $(GO) test -timeout 10m ./...

.PHONY: lab
lab: ## build and run the whole system in network namespaces, and leave it up (needs root)
	hack/deps lab
	@$(MAKE) --no-print-directory build
	@hack/lab

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME each
	hack/fuzz $(FUZZTIME)

.PHONY: bench
bench: ## measure durable leases over TLS and bbolt
	$(GO) test ./leasesvc -run '^$$' -bench Bind -benchtime 3s

.PHONY: clean
clean: ## remove what the build made
	rm -rf bin
