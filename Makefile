# The PipeOps VM agent. `make` lists the targets; a fresh clone needs Go and make.

# SHIPPED and MODULES list our modules in the order of their imports. `make verify` fails if one is missing here.
SHIPPED := frpc bootstrap proxy
MODULES := $(SHIPPED) tests
TOOL_MODULES := $(addprefix tests/tools/,compose coredns frp kube-router kubernetes lint tunnels vulndb)
# CODE lists the modules that hold Go code of ours.
CODE := $(MODULES) $(addprefix tests/tools/,coredns frp tunnels)

$(if $(word 2,$(CURDIR)),$(error make cannot work in a path with spaces: move the repository))
BIN := $(CURDIR)/.build/bin
# RELEASED is not empty if the command line names a version, as for a release.
RELEASED := $(filter command,$(origin VERSION))
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
# DATE is the commit's date, not today's, so that a build can be repeated bit for bit.
DATE := $(shell git log -1 --format=%cI 2>/dev/null)
STAMP := github.com/pipeops/vm-agent/bootstrap/version
COMMIT := $(shell git rev-parse HEAD 2>/dev/null)
STAMPS := -X $(STAMP).Version=$(VERSION) -X $(STAMP).BuildDate=$(DATE) -X $(STAMP).Commit=$(COMMIT)

export CGO_ENABLED := 0
# go.work is for editors. Make builds each module with the dependencies that its own go.mod names, so that what is
# tested is what ships.
export GOWORK := off
# STAMPS name the commit already, and Go's own stamp fails in a checkout that another user owns.
export GOFLAGS += -buildvcs=false

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: build tools ## Run control plane, agent and cluster on this machine and print a kubeconfig; stop with Ctrl-C
	@exec $(BIN)/run

# `make verify` sets UNIT and UNIT_FLAGS. Of module tests, these packages need no built parts.
UNIT := $(MODULES)
UNIT_FLAGS :=
.PHONY: unit
unit: ## Run the unit tests of all modules: takes seconds, builds no other programs
	@for m in $(UNIT); do \
		packages=./...; [ $$m != tests ] || packages='./harness/... ./cmd/...'; \
		echo "== unit: $$m"; (cd $$m && go test $(UNIT_FLAGS) $$packages) || exit 1; done

.PHONY: lint
lint: $(BIN)/golangci-lint ## Check that all modules are formatted, build, and pass vet and golangci-lint
	@echo "== format"
	@files=$$(gofmt -l $(MODULES)); [ -z "$$files" ] || { echo "not formatted, run gofmt -w: $$files"; exit 1; }
	@for m in $(CODE); do \
		echo "== $$m: build, vet, lint"; \
		(cd $$m && go build -o /dev/null ./... && go vet ./... && \
			$(BIN)/golangci-lint run --config $(CURDIR)/.golangci.yml ./...) || exit 1; done

.PHONY: test
test: unit build tools ## Run the unit and integration tests: no root, no network beyond Go modules
	@echo "== the stock frp reads what the agent writes"
	@cd tests/tools/frp && go test -count=1 ./...
	@echo "== integration: real API server, real frps and frpc"
	@cd tests && go test -count=1 -v -parallel 16 -timeout 30m ./integration ./manifests

.PHONY: mutate
mutate: ## Plant faults in the shipped code, and check that a unit test notices each (MUTANTS selects some); results are in tests/MUTANTS.md
	@cd tests && exec nice -n 19 go run ./cmd/mutate '$(MUTANTS)'

# E2E_PACKAGES lists the Debian packages that the node, the images and the tests of the alerts need.
E2E_PACKAGES := buildah busybox-static containerd containernetworking-plugins curl docker-registry iproute2 ipset \
	iptables netcat-openbsd podman procps prometheus prometheus-blackbox-exporter runc skopeo
missing-packages = for p in $(E2E_PACKAGES); do \
	dpkg-query -W -f '$${Status}\n' $$p 2>/dev/null | grep -qx 'install ok installed' || echo $$p; done
# NODE lists the parts that only a whole node needs. They and Compose take minutes to build.
KUBE_NODE := kube-controller-manager kube-proxy kube-scheduler kubelet
NODE := $(KUBE_NODE) kube-router

# CONFORMANCE lists what Kubernetes' own conformance specs need.
CONFORMANCE := agnhost e2e.test ginkgo nonewprivs sample-apiserver

E2E_PARTS := e2e-ready build tools test-images previous $(addprefix $(BIN)/,$(NODE) $(CONFORMANCE) docker-compose)

.PHONY: e2e
e2e: $(E2E_PARTS) ## Run the end-to-end tests on a real Kubernetes node: needs root and Debian
	@cd tests && go test -count=1 -v -parallel 8 -timeout 30m ./e2e ./monitoring
	@cd tests && go test -count=1 -v -timeout 30m ./chaos

.PHONY: attack
attack: $(E2E_PARTS) ## Attack the agent's memory on a real node for three minutes (ATTACK_DURATION): root, Debian
	@cd tests && ATTACK_DURATION=$(or $(ATTACK_DURATION),3m) \
		go test -count=1 -v -timeout 20m -run 'TestAttacksKillNoContainer$$' ./e2e

# FAULTS, PAIRS, DURATION and SEED select what fails: see TestChaos.
.PHONY: chaos
chaos: build tools ## Break every part, alone, in pairs and at random, for two and a half hours: needs root; results are in tests/CHAOS.md
	@cd tests && CHAOS_FAULTS='$(or $(FAULTS),.)' CHAOS_PAIRS=$(or $(PAIRS),40) CHAOS_DURATION=$(or $(DURATION),30m) \
		CHAOS_SEED=$(SEED) go test -count=1 -v -timeout 6h $(and $(TESTS),-run '$(TESTS)') ./chaos

.PHONY: soak
soak: build tools ## Look for growth under steady load for two hours (DURATION): needs root; results are in tests/SOAK.md
	@cd tests && SOAK_DURATION=$(or $(DURATION),2h) SOAK_WATCHES=$(or $(WATCHES),200) \
		go test -count=1 -v -timeout 12h -run 'TestSoak$$' ./chaos

# SCALE holds its arguments, such as -agents 5000.
.PHONY: scale
scale: build tools ## Measure a frps with 2,000 agents, and their return after outages; results are in tests/SCALE.md
	@cd tests && go build -o $(BIN)/scale ./scale && exec $(BIN)/scale $(SCALE)

# By hand the specs have a DNS server and dig, too.
.PHONY: conformance
conformance: E2E_PACKAGES += bind9-dnsutils
conformance: $(filter-out previous,$(E2E_PARTS)) $(BIN)/coredns ## Run Kubernetes' conformance specs through the agent (FOCUS, ROLL, IDENTITY, DIRECT); results are in tests/CONFORMANCE.md
	@cd tests && $(foreach v,FOCUS SKIP ROLL IDENTITY DIRECT PROCS,CONFORMANCE_$(v)='$($(v))') \
		CONFORMANCE_TIMEOUT=$(or $(TIMEOUT),4h) CONFORMANCE_REPORT='$(abspath $(REPORT))' \
		go test -count=1 -v -timeout 12h -run 'TestConformance$$' ./e2e

.PHONY: e2e-ready
e2e-ready:
	@missing=$$($(missing-packages) | xargs); \
	if [ "$$(id -u)" != 0 ]; then echo "make e2e starts a Kubernetes node: it must run as root"; fi; \
	if [ -n "$$missing" ]; then \
		echo "missing: $$missing; on Debian, as root: apt-get install -y --no-install-recommends $$missing"; fi; \
	[ "$$(id -u)" = 0 ] && [ -z "$$missing" ]

.PHONY: e2e-missing
e2e-missing:
	@$(missing-packages)

# MATRIX lists other versions than the pinned ones: the oldest Kubernetes that the agent supports, one in the middle and
# the newest, each with its own kubectl, and other versions of frps and frpc. The programs of a row are built in a
# directory of its own; tests take the others from $(BIN).
MATRIX := kubernetes-v1.29.15 kubernetes-v1.33.13 kubernetes-v1.37.2 frps-v0.68.1 frps-v0.70.0 frpc-v0.68.1 frpc-v0.70.0
MATRIX_E2E := kubernetes-v1.29.15
MATRIX_DIR := $(CURDIR)/.build/matrix

.PHONY: matrix
matrix: $(addprefix matrix-,$(MATRIX)) $(addprefix matrix-e2e-,$(MATRIX_E2E)) ## Test with other versions of Kubernetes and frp, for hours; results are in tests/MATRIX.md

# TESTS selects some of the tests, as go test's -run does.
matrix-test = cd tests && PARTS_DIR=$(MATRIX_DIR)/$(1) go test -count=1 -v -timeout 60m $(and $(TESTS),-run '$(TESTS)') $(2)
matrix-kubernetes-%: build tools $(addprefix $(MATRIX_DIR)/kubernetes-%/,kube-apiserver kubectl)
	$(call matrix-test,kubernetes-$*,-parallel 8 ./integration ./manifests)
matrix-frps-%: build tools $(MATRIX_DIR)/frps-%/frps
	$(call matrix-test,frps-$*,-parallel 8 ./integration)
matrix-frpc-%: build tools $(MATRIX_DIR)/frpc-%/frpc
	$(call matrix-test,frpc-$*,-parallel 8 ./integration)
matrix-e2e-kubernetes-%: $(E2E_PARTS) $(addprefix $(MATRIX_DIR)/kubernetes-%/,kube-apiserver kubectl $(KUBE_NODE) e2e.test)
	$(call matrix-test,kubernetes-$*,./e2e)

# TUNNELS are measured by PARTS=tunnels alone.
TUNNELS := chisel konnectivity-agent konnectivity-server tunnels

.PHONY: bench
bench: build tools $(if $(filter tunnels,$(PARTS)),$(addprefix $(BIN)/,$(TUNNELS))) ## Measure performance (PARTS names some of the parts); results are in tests/bench/README.md
	@cd tests && go build -o $(BIN)/bench ./bench && exec $(BIN)/bench $(PARTS)

# GO_RELEASE is the Go release that releases are built with. A machine that downloads no toolchain (GOTOOLCHAIN=local)
# may have an older one: `make verify` checks GO_RELEASE, and reports the known vulnerabilities of the machine's.
GO_RELEASE = $(or $(shell sed -n 's/^toolchain //p' go.work),$(error go.work names no toolchain))

# The vulnerability database is a pinned module, so that the check needs no network and cannot be skipped. It does not
# know what was published after its date; tests/README.md says how to update it.
VULNDB := tests/tools/vulndb
VULNDB_DIR := $(CURDIR)/.build/vulndb
VULNDB_INDEX := $(VULNDB_DIR)/index/db.json
VULNDB_VERSION := golang.org/x/vulndb v0\.0\.0-
VULNDB_DATE = $(or $(shell sed -n 's|.*$(VULNDB_VERSION)\(....\)\(..\)\(..\).*|\1-\2-\3|p' $(VULNDB)/go.mod),$(error \
	$(VULNDB)/go.mod names no golang.org/x/vulndb))
GOVULNCHECK = $(BIN)/govulncheck -db file://$(VULNDB_DIR)

.PHONY: verify
verify: lint $(BIN)/govulncheck $(VULNDB_INDEX) ## Run lint, race detector, and checks of modules and vulnerabilities
	@echo "== every module is listed"
	@want=$$(find . -name go.mod -not -path './.build/*' | sed 's|^./||; s|/go.mod$$||' | sort | xargs); \
	have=$$(printf '%s\n' $(MODULES) $(TOOL_MODULES) | sort | xargs); \
	[ "$$want" = "$$have" ] || { echo "the Makefile lists: $$have"; echo "the tree holds:     $$want"; exit 1; }
	@for m in $(MODULES); do grep -qx "	./$$m" go.work || { echo "go.work lacks $$m"; exit 1; }; done
	@echo "== every module names the same Go release"
	@for m in $(MODULES); do grep -qx 'toolchain $(GO_RELEASE)' $$m/go.mod || { \
		echo "$$m/go.mod does not name $(GO_RELEASE), as go.work does"; exit 1; }; done
	@echo "== the README names the versions that are tested"
	@versions='Kubernetes $(call minor,$(KUBE)) and frp $(call minor,$(FRP_VERSION))'; \
	grep -q "$$versions " README.md || { echo "README.md does not say $$versions"; exit 1; }
	@oldest='Kubernetes $(call minor,$(patsubst kubernetes-%,%,$(firstword $(MATRIX))))'; \
	grep -q "$$oldest or later" manifests/README.md || { echo "manifests/README.md does not say $$oldest"; exit 1; }
	@for m in $(MODULES) $(TOOL_MODULES); do \
		echo "== $$m: tidy"; (cd $$m && go mod tidy -diff) || exit 1; done
	@echo "== unit tests with the race detector"
	@$(MAKE) --no-print-directory unit CGO_ENABLED=1 UNIT='$(SHIPPED)' UNIT_FLAGS=-race
	@echo "== known vulnerabilities, as of $(VULNDB_DATE)"
	@cd proxy && $(GOVULNCHECK) -mode query -format json golang.org/x/net@v0.49.0 | grep -q GO-2026-4918 || { \
		echo "the database in $(VULNDB_DIR) does not find GO-2026-4918: remove the directory and repeat"; exit 1; }
	@for m in bootstrap proxy; do \
		echo "$$m, built with $(GO_RELEASE):"; (cd $$m && GOVERSION=$(GO_RELEASE) $(GOVULNCHECK) ./...) || exit 1; done
	@go=$$(go env GOVERSION); [ $$go = $(GO_RELEASE) ] || { \
		echo "DO NOT RELEASE what this machine builds: it has $$go, go.work names $(GO_RELEASE)."; \
		echo "Known vulnerabilities in the standard library of $$go:"; \
		out=$$(cd proxy && $(GOVULNCHECK) -scan module) || [ $$? = 3 ] || exit 1; \
		echo "$$out" | sed -n 's/^Vulnerability #[0-9]*: /  /p'; }

.PHONY: build
build: ## Build bootstrap, proxy and the development commands into .build/bin
	@mkdir -p $(BIN)
	@for m in bootstrap proxy; do \
		(cd $$m && go build -trimpath -ldflags '-s -w $(STAMPS)' -o $(BIN)/$$m .) || exit 1; done
	@cd tests && go build -o $(BIN)/ ./cmd/...

# IMAGES is where the images go. They have the tags that the manifests name, so that the manifests run what was built.
IMAGES := $(CURDIR)/.build/images
IMAGE_LIST := manifests/base/kustomization.yaml
image = docker.io/$(1):$(or $(shell sed -n '\|name: docker.io/$(1)$$|{n;s/.*newTag: //p;}' $(IMAGE_LIST)),$(error \
	$(IMAGE_LIST) names no tag of $(1)))
FRPC_IMAGE = $(call image,fatedier/frpc)
IMAGE_VERSION = $(lastword $(subst :, ,$(call image,pipeops/vm-agent)))
SOURCE_DATE_EPOCH := $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
export SOURCE_DATE_EPOCH

.PHONY: images
images: ## Build the images for amd64 and arm64, with their lists of components, into .build/images
	@rm -rf $(IMAGES) && mkdir -p $(IMAGES)
	@for arch in amd64 arm64; do \
		root=$(IMAGES)/root-$$arch && mkdir $$root || exit 1; \
		for m in bootstrap proxy; do \
			(cd $$m && GOARCH=$$arch GOOS=linux go build -trimpath -ldflags '-s -w $(STAMPS)' -o $$root/$$m .) || exit 1; done; \
		(cd tests && go run -trimpath ./cmd/imagefiles \
			--version $(VERSION) --root $$root --sbom $(IMAGES)/vm-agent-$$arch.cdx.json) && \
		chmod -R u=rwX,go=rX $$root && \
		manifests/images/build manifests/images/Dockerfile $$root $$arch \
			$(call image,pipeops/vm-agent) $(IMAGES)/vm-agent-$$arch.tar \
			--label org.opencontainers.image.version=$(VERSION) --label org.opencontainers.image.revision=$(COMMIT) \
			--label org.opencontainers.image.created=$(DATE) && \
		rm -r $$root || exit 1; done
	@manifests/images/oci $(IMAGES)/vm-agent-oci.tar $(IMAGES)/vm-agent-amd64.tar $(IMAGES)/vm-agent-arm64.tar
	@echo $(VERSION) >$(IMAGES)/VERSION
	@cd $(IMAGES) && sha256sum * >SHA256SUMS && cat SHA256SUMS

# test-images builds images of frpc and frps too, because the test node reaches no registry: see
# manifests/images/frpc.Dockerfile.
.PHONY: test-images
test-images: images $(BIN)/frpc $(BIN)/frps
	@mkdir -p $(IMAGES)/context && install -m 755 $(BIN)/frpc $(BIN)/frps $(IMAGES)/context && \
		install -m 755 /bin/busybox $(IMAGES)/context/test
	@for name in frpc frps; do \
		manifests/images/build manifests/images/$$name.Dockerfile $(IMAGES)/context $$(go env GOARCH) \
			$(subst fatedier/frpc,fatedier/$$name,$(FRPC_IMAGE)) $(IMAGES)/$$name.tar || exit 1; done
	@rm -r $(IMAGES)/context

# previous builds the images of the version that the tests upgrade from, with the manifests beside them: the last tag
# before this commit, or the parent commit while there is no tag.
PREVIOUS := $(CURDIR)/.build/previous
.PHONY: previous
previous:
	@version=$$(git describe --tags --abbrev=0 --match 'v*' HEAD^ 2>/dev/null || echo HEAD^); \
	commit=$$(git rev-parse --quiet --verify $$version^{commit}) || { \
		echo "there is no version to upgrade from: git fetch --unshallow --tags"; exit 1; }; \
	if [ "$$(cat $(PREVIOUS)/.build/COMMIT 2>/dev/null)" != $$commit ]; then \
		rm -rf $(PREVIOUS) && git clone --quiet --no-checkout . $(PREVIOUS) && \
			git -C $(PREVIOUS) -c advice.detachedHead=false checkout --quiet $$commit && \
			$(MAKE) --no-print-directory -C $(PREVIOUS) test-images && echo $$commit >$(PREVIOUS)/.build/COMMIT; fi

# RELEASE is where the files of a release go. CONTRIBUTING.md has the procedure.
RELEASE := $(CURDIR)/.build/release
.PHONY: release
release: release-ready $(BIN)/kubectl ## Build the files of a release, such as VERSION=v0.1.0, into .build/release
	@rm -rf $(RELEASE)
	@$(MAKE) --no-print-directory images >/dev/null
	@mkdir $(RELEASE)
	@for f in $(IMAGES)/vm-agent-*; do cp $$f $(RELEASE)/vm-agent-$(VERSION)$${f#$(IMAGES)/vm-agent} || exit 1; done
	@git -c tar.umask=0022 archive --format tar --prefix vm-agent-$(VERSION)/ HEAD \
		--output $(RELEASE)/vm-agent-$(VERSION)-manifests.tar manifests LICENSE ':(glob)*.md' ':(glob)*/*.md'
	@gzip -n $(RELEASE)/vm-agent-$(VERSION)-manifests.tar
	@$(BIN)/kubectl kustomize manifests/overlays/install >$(RELEASE)/install.yaml
	@cd tests && go run -trimpath ./cmd/release write $(CURDIR) $(VERSION) $(RELEASE)
	@echo "in $(RELEASE):" && cat $(RELEASE)/SHA256SUMS
	@go=$$(go env GOVERSION); [ $$go = $(GO_RELEASE) ] || \
		echo "DO NOT PUBLISH this: it is built with $$go, and go.work names $(GO_RELEASE). make verify says why."

.PHONY: release-ready
release-ready:
	@cd tests && go run -trimpath ./cmd/release check $(CURDIR) '$(VERSION)'

# verify-images builds the release that the manifests name, so that what is released later is what CI has compared. The
# second build uses the kubectl of the first.
.PHONY: verify-images
verify-images: ## Build a release, check it, and compare it bit for bit with a second build in a clone elsewhere
	@$(MAKE) --no-print-directory release VERSION=$(IMAGE_VERSION)
	@cd tests && go test -count=1 -tags images -run 'TestImages|TestRelease' ./manifests
	@again=$$(mktemp -d) && trap 'rm -rf $$again' EXIT && git clone --quiet . $$again && \
		$(MAKE) --no-print-directory -C $$again -o $(BIN)/kubectl release VERSION=$(IMAGE_VERSION) BIN=$(BIN) >/dev/null && \
		diff $(RELEASE)/SHA256SUMS $$again/.build/release/SHA256SUMS && echo "the same, bit for bit"

# registry returns REGISTRY. $(1) is an example of a path there.
registry = $(if $(filter 1,$(words $(REGISTRY))),$(strip $(REGISTRY)),$(error \
	REGISTRY is "$(REGISTRY)": say where to, without spaces: make $@ REGISTRY=registry.example.com/$(1)))

.PHONY: push
push: ## Push the image of `make images`, or with VERSION that of `make release`, to REGISTRY/vm-agent
	@$(if $(RELEASED),cd $(RELEASE) && sha256sum --quiet -c SHA256SUMS && grep -q '"$(COMMIT)"' provenance.json || { \
		echo "$(RELEASE) is not whole or of another commit: run make release VERSION=$(VERSION)"; exit 1; })
	@manifests/images/copy oci-archive:$(if $(RELEASED),$(RELEASE)/vm-agent-$(VERSION),$(IMAGES)/vm-agent)-oci.tar \
		$(call registry,pipeops)/vm-agent:$(if $(RELEASED),$(VERSION),$$(cat $(IMAGES)/VERSION 2>/dev/null))

.PHONY: frpc-digest
frpc-digest: ## Pin the stock frpc image by the digest that Docker Hub has now
	@manifests/images/frpc-digest $(FRPC_IMAGE) $(IMAGE_LIST) manifests/docker/compose.yaml

.PHONY: mirror
mirror: ## Copy the stock frpc image to REGISTRY/frpc, all architectures, with the same digest
	@manifests/images/copy docker://$(FRPC_IMAGE) $(call registry,mirror)/$(notdir $(FRPC_IMAGE))

.PHONY: tools
tools: $(addprefix $(BIN)/,frpc frps kube-apiserver kubectl etcd) ## Build frp, Kubernetes and etcd for the tests, once

.PHONY: clean
clean: ## Remove everything that was built
	rm -rf .build

# build-tool builds package $(2) of module $(1) with the flags $(3), or its tests if $(4) is `test -c`. It replaces the
# target only after a complete build. Without caches that takes minutes, so it prints how many modules are downloaded
# and packages compiled: by the shell, because some awks read a pipe only in blocks of 4 KiB.
define build-tool
	@mkdir -p $(BIN)
	@echo "building $(@F) (once)"
	@rm -f $@.new
	@cd $(1) && { go $(or $(4),build) -v -trimpath $(3) -o $@.new $(2) 2>&1 || echo "$(@F) does not build"; } | { \
		d=0; n=0; while IFS= read -r line; do case "$$line" in \
			'go: downloading '*) [ $$((d % 20)) != 0 ] || echo "  downloading modules ($$d done)"; d=$$((d + 1)) ;; \
			*[!A-Za-z0-9._/~-]*) echo "$$line" ;; \
			*) n=$$((n + 1)); [ $$((n % 100)) != 0 ] || echo "  $$n packages compiled" ;; \
		esac; done; }
	@mv $@.new $@
endef

# version-of returns the version of $(2) that the go.mod of module $(1) requires.
version-of = $(or $(shell sed -n 's|^.*$(2) \(v[0-9.]*\).*|\1|p' $(1)/go.mod),$(error $(1)/go.mod names no $(2)))
# minor returns 1.2 for v1.2.3.
minor = $(subst v,,$(word 1,$(subst ., ,$(1)))).$(word 2,$(subst ., ,$(1)))

FRP := tests/tools/frp
FRP_VERSION = $(call version-of,$(FRP),github.com/fatedier/frp)
$(BIN)/frpc $(BIN)/frps: $(FRP)/go.mod $(FRP)/go.sum
	$(call build-tool,$(FRP),github.com/fatedier/frp/cmd/$(@F),-tags noweb -ldflags '-s -w')

# kube-flags set the version $(1), because a build from a module reports v0.0.0.
kube-stamps = gitVersion=$(1) gitMajor=1 gitMinor=$(word 2,$(subst ., ,$(1)))
kube-flags = -ldflags '-s -w $(foreach v,$(kube-stamps),-X k8s.io/component-base/version.$(v))'
KUBERNETES := tests/tools/kubernetes
KUBE = $(call version-of,$(KUBERNETES),k8s.io/kubernetes)
# build-kube builds a program of version $(2) in module $(1), with more flags $(3).
build-kube = $(call build-tool,$(1),k8s.io/kubernetes/$(if $(filter e2e.test,$(@F)),test/e2e,cmd/$(@F)),$(3) $(call \
	kube-flags,$(2)),$(if $(filter e2e.test,$(@F)),test -c))
$(addprefix $(BIN)/,kube-apiserver kubectl $(KUBE_NODE) e2e.test): $(KUBERNETES)/go.mod $(KUBERNETES)/go.sum
	$(call build-kube,$(KUBERNETES),$(KUBE))
$(BIN)/agnhost $(BIN)/nonewprivs: $(KUBERNETES)/go.mod $(KUBERNETES)/go.sum
	$(call build-tool,$(KUBERNETES),k8s.io/kubernetes/test/images/$(@F),-ldflags '-s -w')
$(BIN)/ginkgo: $(KUBERNETES)/go.mod $(KUBERNETES)/go.sum
	$(call build-tool,$(KUBERNETES),github.com/onsi/ginkgo/v2/ginkgo,-ldflags '-s -w')
$(BIN)/sample-apiserver: $(KUBERNETES)/go.mod $(KUBERNETES)/go.sum
	$(call build-tool,$(KUBERNETES),k8s.io/sample-apiserver,-ldflags '-s -w')
$(BIN)/etcd: $(KUBERNETES)/go.mod $(KUBERNETES)/go.sum
	$(call build-tool,$(KUBERNETES),go.etcd.io/etcd/server/v3,-ldflags '-s -w')

# In these rules, % is a version, or a version and a program. The go.mod of a row is whole before its programs are built,
# which can then be at the same time.
.PRECIOUS: $(foreach r,kubernetes-% frps-% frpc-%,$(MATRIX_DIR)/$r $(MATRIX_DIR)/$r/go.mod)
.SECONDEXPANSION:
$(MATRIX_DIR)/kubernetes-%/go.mod:
	@tests/tools/matrix k8s.io/kubernetes@$* $(@D) $(addprefix cmd/,kube-apiserver kubectl $(KUBE_NODE)) test/e2e
$(MATRIX_DIR)/frps-%/go.mod:
	@tests/tools/matrix github.com/fatedier/frp@$* $(@D) cmd/frps
$(MATRIX_DIR)/frpc-%/go.mod:
	@tests/tools/matrix github.com/fatedier/frp@$* $(@D) cmd/frpc
$(MATRIX_DIR)/kubernetes-%: $$(@D)/go.mod
	$(call build-kube,$(@D),$(*D),-mod=mod)
$(MATRIX_DIR)/frps-% $(MATRIX_DIR)/frpc-%: $$(@D)/go.mod
	$(call build-tool,$(@D),github.com/fatedier/frp/cmd/$(@F),-tags noweb -ldflags '-s -w')

KUBE_ROUTER := tests/tools/kube-router
$(BIN)/kube-router: $(KUBE_ROUTER)/go.mod $(KUBE_ROUTER)/go.sum
	$(call build-tool,$(KUBE_ROUTER),github.com/cloudnativelabs/kube-router/v2/cmd/kube-router,-ldflags '-s -w')

COREDNS := tests/tools/coredns
$(BIN)/coredns: $(wildcard $(COREDNS)/*)
	$(call build-tool,$(COREDNS),.,-ldflags '-s -w')

COMPOSE := tests/tools/compose
$(BIN)/docker-compose: $(COMPOSE)/go.mod $(COMPOSE)/go.sum
	$(call build-tool,$(COMPOSE),github.com/docker/compose/v2/cmd,-ldflags '-s -w')

TUNNEL_MODULE := tests/tools/tunnels
$(BIN)/chisel: $(TUNNEL_MODULE)/go.mod $(TUNNEL_MODULE)/go.sum
	$(call build-tool,$(TUNNEL_MODULE),github.com/jpillora/chisel,-ldflags '-s -w')
$(BIN)/konnectivity-agent $(BIN)/konnectivity-server: $(TUNNEL_MODULE)/go.mod $(TUNNEL_MODULE)/go.sum
	$(call build-tool,$(TUNNEL_MODULE),sigs.k8s.io/apiserver-network-proxy/cmd/$(@F:konnectivity-%=%),-ldflags '-s -w')
$(BIN)/tunnels: $(wildcard $(TUNNEL_MODULE)/*)
	$(call build-tool,$(TUNNEL_MODULE),.,-ldflags '-s -w')

LINT := tests/tools/lint
$(BIN)/golangci-lint: $(LINT)/go.mod $(LINT)/go.sum
	$(call build-tool,$(LINT),github.com/golangci/golangci-lint/v2/cmd/golangci-lint)
$(BIN)/govulncheck: $(LINT)/go.mod $(LINT)/go.sum
	$(call build-tool,$(LINT),golang.org/x/vuln/cmd/govulncheck)

# The index is replaced only by a complete one, like a tool.
$(VULNDB_INDEX): $(VULNDB)/go.mod $(VULNDB)/go.sum
	@echo "indexing the vulnerability database (once)"
	@rm -rf $(VULNDB_DIR) $(VULNDB_DIR).new
	@cd $(VULNDB) && go mod download golang.org/x/vulndb && \
		go run golang.org/x/vulndb/cmd/indexdb -out $(VULNDB_DIR).new \
			-vulns "$$(go list -m -f '{{.Dir}}' golang.org/x/vulndb)/data/osv"
	@mv $(VULNDB_DIR).new $(VULNDB_DIR)
