# Everything here works on a bare Debian machine with Go, as root: what is missing is installed with apt-get.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CLUSTER := go -C hack/cluster run .
DEV     := go -C hack run ./dev
ASSETS  := $(CURDIR)/bin/envtest

##@ See it work
.PHONY: demo
demo: ## Boot a cluster, install the operator, apply the samples, connect a real RDP client; the picture is demo.png
	$(DEV) demo

.PHONY: test
test: lint unit e2e ## All tests: lint, unit, golden, CEL and envtest, then end to end on the embedded cluster

##@ Develop
.PHONY: build
build: ## Compile every binary into bin/
	go build -o bin/ ./cmd/...

.PHONY: generate
generate: tools ## Generate deep copies, CRDs, RBAC, the gRPC of the sidecar and the API reference
	bin/controller-gen object paths=./api/...
	bin/controller-gen crd paths=./api/... output:crd:dir=config/crd/bases
	bin/controller-gen rbac:roleName=rendezvous-manager paths=./controllers/... output:rbac:dir=config/rbac
	PATH="$(CURDIR)/bin:$$PATH" go generate ./wire/admission
	bin/crd-ref-docs --source-path=api/v1alpha1 --config=docs/api-config.yaml --renderer=markdown --output-path=docs/api.md --log-level=ERROR

.PHONY: tools
tools: bin/.tools
bin/.tools: hack/tools/go.mod hack/tools/go.sum
	command -v protoc >/dev/null || { apt-get update -q && apt-get install -y -q protobuf-compiler; }
	go -C hack/tools build -o $(CURDIR)/bin/ tool
	touch $@

.PHONY: lint
lint: tools ## gofmt, go vet, staticcheck, govulncheck, import walls, generated files up to date
	hack/lint/check.sh

.PHONY: unit
unit: ## Unit, golden, CEL and envtest tests (kube-apiserver and etcd from the cluster's own binary)
	$(CLUSTER) assets $(ASSETS)
	command -v haproxy >/dev/null || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends haproxy; }
	KUBEBUILDER_ASSETS=$(ASSETS) RDV_REQUIRE_ENVTEST=1 RDV_REQUIRE_HAPROXY=1 go test ./...
	go -C hack/cluster test ./...
	go -C hack/cluster/dex test ./...
	go -C hack/cluster/localpath test ./...
	go -C hack/desktop test ./...
	go -C hack test ./wiretap ./fleet ./fuzz
	go -C hack/bench test ./...
	go -C hack/sim test ./...

FUZZTIME ?= 1m
.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME (1m) and keep new inputs that reach further in testdata/fuzz
	go -C hack run ./fuzz -time $(FUZZTIME) -keep 8

.PHONY: e2e
e2e: ## The end-to-end tests, on the embedded cluster
	go -C hack test ./e2e -count=1 -timeout 45m -v

.PHONY: bench
bench: ## Measure the relay beside HAProxy, nginx, stunnel and a naive proxy, and the fleet by simulation; all in bin/bench/
	$(CLUSTER) assets $(ASSETS)
	mkdir -p bin/bench
	{ go -C hack/bench run . -out $(CURDIR)/bin/bench; \
	  go -C hack/sim run .; \
	  go -C hack/sim run . agents -plot $(CURDIR)/bin/bench/agents.svg; \
	  KUBEBUILDER_ASSETS=$(ASSETS) go -C hack/sim run . operator -plot $(CURDIR)/bin/bench/operator.svg; \
	} | tee bin/bench/report.txt

.PHONY: fleet
fleet: ## 200 live sessions while everything is rolled, scaled, renewed and killed: a table, bin/fleet.svg
	$(DEV) fleet

##@ The embedded cluster
.PHONY: cluster-up cluster-down
cluster-up: ## Boot the embedded Kubernetes with cert-manager, DNS and Dex
	$(CLUSTER) up
cluster-down: ## Remove it and all that it made
	$(CLUSTER) down

.PHONY: images
images: ## Build every image without a container engine and load it into the embedded cluster
	$(DEV) images

##@ Your own cluster (the current kubeconfig)
.PHONY: deploy undeploy
deploy: ## Install the CRDs and the operator
	hack/deploy.sh deploy
undeploy: ## Remove the operator, keep the CRDs and people's objects; with PURGE=true, remove those first
	hack/deploy.sh undeploy $(if $(filter true,$(PURGE)),--purge)

.PHONY: help
help:
	@awk 'BEGIN {FS = ":.*##"} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*##/ {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
