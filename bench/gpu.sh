#!/usr/bin/env bash
# Runs what needs a CUDA device, on a machine without a network that already holds torch, Triton and pytest. Nothing is
# installed: the package is used from this folder. It should hold maestro_fast.egg-info, and in maestro_fast/ the extension
# for the Python of that machine; `make gpu-rehearsal` makes both.
#
#     bash bench/gpu.sh first      the GPU tests, in at most 330 s
#     bash bench/gpu.sh second     the figures that the README promises, in at most 360 s
#     bash bench/gpu.sh third      whole training steps and shared prompts, in at most 165 s
#     bash bench/gpu.sh sanitize   compute-sanitizer's memcheck of every kernel
#     bash bench/gpu.sh bench [OP|OP:dxVxT,...]...   whole benchmarks of these ops, or of all, without a limit of time
#
# If a step fails or runs out of time, the next one begins. Figures are written line by line, so those so far are kept.
#   OUT        the folder for logs and results; bench/results if it is not set
#   PYTHON     the Python to use; python3 if it is not set
#   COMMIT     the commit that the results name where there is no git history
#   PEERS      a folder on top of the path that holds the peers (pip install --no-deps --target): trl, liger-kernel, verl,
#              cut-cross-entropy; one that is missing is skipped
#   BENCH_DRY  1 rehearses with tiny sizes, and without a device in Triton's interpreter
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
[[ -n ${VIRTUAL_ENV:-} ]] && python=$VIRTUAL_ENV/bin/python
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
[[ -n ${PEERS:-} ]] && export PYTHONPATH=$PEERS${PYTHONPATH:+:$PYTHONPATH}
dry=0
[[ ${BENCH_DRY:-0} == 1 ]] && dry=1 && export TRITON_INTERPRET=1
out=${OUT:-bench/results}
pytest=("$python" -m pytest -q -W default -p no:cacheprovider --tb=short) # warnings are torch.compile's, about the peers
ops=(group_advantages counterfactual_advantages pool_hidden conductor_weights maestro_advantages policy_loss token_logprobs
  linear_policy_loss)

say() { printf '\n== %s\n' "$*"; }

# step NAME SECONDS COMMAND... interrupts the command when its time or that of the part is over, and kills it 20 s later.
step() {
  local name=$1 limit=$2 begun=$SECONDS status=0 left
  shift 2
  left=$((deadline - SECONDS))
  ((limit > left)) && limit=$left
  if ((limit < 5)); then
    rows+=("$(printf '%-36s %6s    not begun, no time is left' "$name" -)") && failures=$((failures + 1))
    return
  fi
  say "$name, at most $limit s"
  # env restores SIGINT, which a shell makes its background commands ignore
  timeout -s INT -k 20 "$limit" env --default-signal=INT "$@" || status=$?
  ((status)) && failures=$((failures + 1))
  case $status in
    0) status=passed ;;
    124 | 137) status="out of time" ;;
    *) status="failed, exit status $status" ;;
  esac
  rows+=("$(printf '%-36s %6d s of %4d  %s' "$name" $((SECONDS - begun)) "$limit" "$status")")
}

# part NAME SECONDS runs the function of this name, writes its output to a file too, and sums up.
part() {
  local name=$1
  mkdir -p "$out"
  export BENCH_JSON=$out/$name.jsonl
  rm -f "$BENCH_JSON"
  {
    rows=() failures=0 deadline=$((SECONDS + $2 - 15)) # an interrupted step needs some seconds, in which xdist ends its workers
    "$name" "${@:3}"
    say "$name: $failures of ${#rows[@]} steps failed, $SECONDS s"
    printf '  %s\n' "${rows[@]}"
    ((failures == 0))
  } 2>&1 | tee "$out/$name.log"
}

first() {
  local workers=14 marked tests
  mapfile -t marked < <(grep -rl "pytest.mark.gpu" tests --include="test_*.py")
  tests=(-m gpu bench/sanitize.py tests/kernels "${marked[@]}")
  ((dry)) && workers=1 tests=(-m "not vllm" -k "finite or prompts" bench/sanitize.py tests/kernels/test_pool_hidden.py)
  ((dry)) || step "the device" 15 nvidia-smi -L
  ((dry)) || step "the installation" 40 "$python" -m maestro_fast info
  export CUBLAS_WORKSPACE_CONFIG=:4096:8 # the tests ask torch for determinism, to have its memory poisoned
  # a process that compiles kernels uses one core
  step "GPU tests" 290 "${pytest[@]}" -n $workers --dist worksteal -rfE --durations=15 --junitxml="$out/first.xml" "${tests[@]}"
}

headline() { # NAME SECONDS ARGUMENTS...
  step "$1" "$2" env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "${pytest[@]}" --no-peers -m "gpu and headline" "${@:3}"
}

# Cheap steps come first, and torch.compile, which takes the longest, comes last, so that an early end loses little.
second() {
  local wide=4096x151936x16384 middle=2048x151936x16384 narrow=1024x151936x16384
  local heads=$wide,$narrow
  ((dry)) && wide=16x70x9 middle=20x60x7 heads=24x50x6
  step "ceilings" 30 "$python" -m bench.gpu_ceilings
  headline "group_advantages" 40 --no-compile bench/bench_gpu_group_advantages.py
  headline "maestro_advantages" 45 --no-compile bench/bench_gpu_maestro_advantages.py
  headline "policy_loss" 40 --no-compile bench/bench_gpu_policy_loss.py
  headline "pool_hidden" 40 --no-compile bench/bench_gpu_pool_hidden.py
  headline "token_logprobs" 100 --no-compile bench/bench_gpu_token_logprobs.py --head="$heads"
  headline "linear_policy_loss" 110 --no-compile bench/bench_gpu_linear_policy_loss.py --head="$wide"
  headline "token_logprobs, d = 2,048" 50 --no-compile bench/bench_gpu_token_logprobs.py --head="$middle"
  headline "the compiled peers" 90 -k "contexts or dapo" bench/bench_gpu_maestro_advantages.py bench/bench_gpu_policy_loss.py
}

third() {
  step "training steps" 90 "$python" -m bench.gpu_step
  step "shared prompts" 60 "$python" -m bench.gpu_shared_prefix
}

sanitize() {
  local tool
  tool=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer") || return
  step "every kernel once" 150 "${pytest[@]}" -n 5 -m gpu bench/sanitize.py # compiled, so that the run below need not
  # torch's allocator hands out parts of large blocks, in which an access past the end is not seen
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "memcheck" 380 "$tool" --tool memcheck --error-exitcode 1 "$python" -m bench.sanitize
}

bench() {
  local names=("$@") name op shapes
  ((${#names[@]})) || names=("${ops[@]}")
  for name in "${names[@]}"; do
    op=${name%%:*} shapes=${name#"$op"} shapes=${shapes#:}
    step "$name" 86400 "${pytest[@]}" -m gpu "bench/bench_gpu_$op.py" ${shapes:+"--head=$shapes"}
  done
}

case ${1:-} in
  first) part first 330 ;;
  second) part second 360 ;;
  third) part third 165 ;;
  sanitize) part sanitize 600 ;;
  bench) part bench 604800 "${@:2}" ;;
  *) sed -n '2,18p' "$0" && exit 2 ;;
esac
