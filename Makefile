# Each target does all of its own set-up: it reuses the virtual environment that you are in, else makes .venv.
#   TORCH   what pip installs where torch is missing, e.g. TORCH="torch==2.11.0"; an installed torch is never touched
#   PYTHON  the Python to make .venv with, where python3 is not the one to take
#   COMMIT, PEERS  for the GPU targets, see bench/gpu.sh
#   ARGS    arguments for the command, e.g. make test ARGS="tests/ops -x"
TORCH ?= torch==2.13.0
ARGS ?=
export PYTHON COMMIT PEERS

# $(call in_environment,EXTRA): sets the shell variable `python`
in_environment = python=$$(bash .ci/setup.sh "$(TORCH)" $(1))

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint bench gpu gpu-test gpu-sanitize gpu-bench clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\): ## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: ## Set up, then train a small model with adaptive reward weights
	@$(call in_environment,report) && "$$python" -m maestro_fast quickstart $(ARGS)

test: ## Set up, then run the tests
	@$(call in_environment,dev) && "$$python" -m pytest -q $(ARGS)

lint: ## Set up, then check style, format and types
	@$(call in_environment,dev) && "$$python" -m ruff check . && "$$python" -m ruff format --check . && "$$python" -m mypy

bench: ## Set up, then run the CPU benchmarks: a table per op, and bench/results/cpu.json
	@$(call in_environment,dev) && mkdir -p bench/results && \
	"$$python" -m pytest bench -q --benchmark-quiet --benchmark-json=bench/results/cpu.json $(ARGS)

gpu: ## On a GPU machine, without a network: install, GPU tests, compute-sanitizer, all GPU benchmarks
	@bash bench/gpu.sh all

gpu-test: ## Of make gpu, the tests alone; ARGS="tests/kernels/test_pool_hidden.py" picks
	@bash bench/gpu.sh test $(ARGS)

gpu-sanitize: ## Of make gpu, compute-sanitizer alone
	@bash bench/gpu.sh sanitize

gpu-bench: ## Of make gpu, the benchmarks alone; ARGS="pool_hidden policy_loss" picks
	@bash bench/gpu.sh bench $(ARGS)

clean: ## Remove what builds and checks leave behind; environments stay
	rm -rf build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find maestro_fast kernels tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
