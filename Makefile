SHELL       := bash
.SHELLFLAGS := -euo pipefail -c

# Tools run from the module cache at these versions and stay out of go.mod.
STATICCHECK := go run honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOSEC       := go run github.com/securego/gosec/v2/cmd/gosec@v2.30.0
GOTESTSUM   := go run gotest.tools/gotestsum@v1.13.0

TEST_LOG     := test-log.json
CONFINED_LOG := test-log-confined.json

# In inputs, about five minutes of each target: before Go 1.27 a limit in time sometimes fails by
# itself (golang/go#75804).
FUZZTIME ?= 1000000x

.PHONY: help run build test fuzz confined compat drill bench lint services clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 12

run: ## run the service; settings come from .env and the environment
	go run .

build: ## build ./user-service, a static binary
	CGO_ENABLED=0 go build -trimpath -ldflags="-s -w" -o user-service .

test: lint ## lint, all tests with the race detector against real services, some of each fuzz target
	exports=$$(.ci/services); eval "$$exports"; \
	REQUIRE_SERVICES=1 $(GOTESTSUM) --format pkgname-and-test-fails --hide-summary output \
		--jsonfile $(TEST_LOG) -- -race -count=1 -parallel 8 -timeout 20m ./...
	@! grep -E '"Action":"skip".*"Test":' $(TEST_LOG) || { echo "skipped tests count as failed"; exit 1; }
	$(MAKE) --no-print-directory fuzz FUZZTIME=5000x

fuzz: ## run each fuzz target for FUZZTIME; an input that fails one goes to testdata/fuzz
	targets=$$(go test -list '^Fuzz' . | grep '^Fuzz'); \
	for target in $$targets; do \
		echo "$$target"; \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x .; \
	done

confined: ## all tests as the image runs the service: no root, no capability, nothing to write to
	exports=$$(.ci/services); eval "$$exports"; \
	REQUIRE_SERVICES=1 $(GOTESTSUM) --format pkgname-and-test-fails --hide-summary output \
		--jsonfile $(CONFINED_LOG) --raw-command -- .ci/confined -test.parallel=8
	@! grep -E '"Action":"skip".*"Test":' $(CONFINED_LOG) || { echo "skipped tests count as failed"; exit 1; }

compat: ## run the database tests and a short drill on PostgreSQL 14, 16, 17 and 18 from npm
	exports=$$(.ci/services); eval "$$exports"; .ci/compat

drill: ## run the service under every fault that the README lists, and print what became of it
	go test -count=1 -timeout 60m -run '^TestDrill$$' -v . -drill

bench: ## measure the service beside others and draw docs/bench.svg; then the hot functions
	go test -count=1 -timeout 60m -run '^Test(Compare|Growth)$$' -v . -compare
	go test -count=1 -run '^$$' -bench . -benchmem .

lint: ## go vet, staticcheck, gosec, gofmt
	go vet ./...
	$(STATICCHECK) ./...
	@# Noise in tests: they drop errors that show in what they check, start programs, roll dice.
	$(GOSEC) -quiet -tests -nosec-require-rules -nosec-require-justification \
		-exclude-rules='_test\.go$$:G104,G204,G404' ./...
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt: $$unformatted"; exit 1; }

services: ## provide PostgreSQL, RabbitMQ, PgBouncer and Chromium for the tests, and print their URLs
	@.ci/services

clean: ## remove what the other targets made
	rm -f user-service $(TEST_LOG) $(CONFINED_LOG)
