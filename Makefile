SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(shell find proto -name '*.proto')
GOOGLEAPIS := third_party/googleapis
FILE ?=
WORKERS ?= 2

.DEFAULT_GOAL := help

help: ## Show what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# --- what everything needs -------------------------------------------------------------------

$(VENV)/installed: requirements/dev.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned dependencies into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/dev.txt
	@touch $@

$(GOOGLEAPIS)/.copied: $(VENV)/installed
	@mkdir -p $(GOOGLEAPIS)/google/api $(GOOGLEAPIS)/google/rpc
	@source=$$($(BIN)/python -c 'import google.api, os; print(os.path.dirname(list(google.api.__path__)[0]))') && \
	  cp $$source/api/{annotations,http}.proto $(GOOGLEAPIS)/google/api/ && \
	  cp $$source/rpc/{status,error_details}.proto $(GOOGLEAPIS)/google/rpc/
	@touch $@

build/kimberly.binpb: $(PROTOS) $(GOOGLEAPIS)/.copied buf.yaml
	@mkdir -p build && $(BIN)/buf build -o $@

ready: $(VENV)/installed build/kimberly.binpb

# --- the commands ----------------------------------------------------------------------------

gen: $(GOOGLEAPIS)/.copied ## Generate client/kimberly/*/v1 from proto/
	@rm -rf client/kimberly/*/v1
	@PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -Iproto -I$(GOOGLEAPIS) \
	  --python_out=client --grpc_python_out=client --mypy_out=quiet:client --mypy_grpc_out=quiet:client \
	  $(PROTOS)

.PHONY: help ready gen
