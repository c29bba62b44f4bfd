SHELL       := bash
.SHELLFLAGS := -euo pipefail -c

# Tools run from the module cache at these versions and stay out of go.mod.
STATICCHECK := go run honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOSEC       := go run github.com/securego/gosec/v2/cmd/gosec@v2.30.0
GOTESTSUM   := go run gotest.tools/gotestsum@v1.13.0

TEST_LOG     := test-log.json
SYSTEM_LOG   := test-log-system.json
CONFINED_LOG := test-log-confined.json

# Tests of everything that a machine lacks are skipped. $(call no-skips,LOG) fails if one was.
no-skips = ! grep -E '"Action":"skip".*"Test":' $(1) || \
	{ echo "skipped tests count as failed"; exit 1; }

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

test: lint ## lint, all tests against real services, the drill's selection, some of each fuzz target
	exports=$$(.ci/services); eval "$$exports"; \
	REQUIRE_SERVICES=1 $(GOTESTSUM) --format pkgname-and-test-fails --hide-summary output \
		--jsonfile $(TEST_LOG) -- -race -count=1 -parallel 8 -timeout 20m ./...; \
	cd system; \
	REQUIRE_SERVICES=1 $(GOTESTSUM) --format pkgname-and-test-fails --hide-summary output \
		--jsonfile ../$(SYSTEM_LOG) -- -p 1 -count=1 -timeout 20m ./...
	@$(call no-skips,$(TEST_LOG) $(SYSTEM_LOG))
	$(MAKE) --no-print-directory fuzz FUZZTIME=5000x

fuzz: ## run each fuzz target for FUZZTIME; an input that fails one goes to testdata/fuzz
	targets=$$(go test -list '^Fuzz' . | grep '^Fuzz'); \
	for target in $$targets; do \
		echo "$$target"; \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x .; \
	done

confined: ## the tests of the service and the program, and the drill's selection, as in the image
	exports=$$(.ci/services); eval "$$exports"; \
	REQUIRE_SERVICES=1 $(GOTESTSUM) --format pkgname-and-test-fails --hide-summary output \
		--jsonfile $(CONFINED_LOG) --raw-command -- .ci/confined -test.parallel=8
	@$(call no-skips,$(CONFINED_LOG))

compat: ## run the database tests and a short drill on PostgreSQL 14, 16, 17 and 18 from npm
	exports=$$(.ci/services); eval "$$exports"; .ci/compat

drill: ## run the service under every fault, about 10 minutes, and write docs/drill.md
	cd system; go test -count=1 -timeout 60m -run '^TestDrill$$' -v ./drill -drill

bench: ## compare the service with others and draw docs/bench.svg; then benchmark single functions
	cd system; go run ./bench
	cd system; REQUIRE_SERVICES=1 TRANSFER_USERS=1000000 go test -count=1 -run '^TestRoundTrip$$' \
		-v ./process
	go test -count=1 -run '^$$' -bench . -benchmem .

lint: ## go vet, staticcheck, gosec and gofmt; build for Windows and macOS
	for module in . system; do \
		(cd $$module; go vet ./...; $(STATICCHECK) ./...); \
	done
	@# Tests ignore errors that show in what they check, start programs, use random numbers, and try
	@# tokens, weak keys and redirects.
	$(GOSEC) -quiet -tests -nosec-require-rules -nosec-require-justification -exclude-dir=system \
		-exclude-rules='_test\.go$$:G101,G104,G204,G403,G404,G710' ./...
	@unformatted=$$(gofmt -l .); \
		test -z "$$unformatted" || { echo "gofmt: $$unformatted"; exit 1; }
	for os in windows darwin; do CGO_ENABLED=0 GOOS=$$os go build -o /dev/null .; done

services: ## provide PostgreSQL, RabbitMQ and tools for the tests, and print their URLs
	@.ci/services

clean: ## remove what the other targets made
	rm -f user-service $(TEST_LOG) $(SYSTEM_LOG) $(CONFINED_LOG)
