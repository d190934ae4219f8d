#!/usr/bin/env bash
# Everything that needs a CUDA device, on a machine without a network that already holds torch, Triton and pytest.
#
#     bash bench/gpu.sh install|info|test|sanitize|bench|all [ARGS of pytest | names of ops for bench]
#
# An op of the head pass takes shapes, dxVxT: bench linear_policy_loss:4096x151936x2048,1024x32768x65536
# Every part but `all` fits into ten minutes. JSON goes to bench/results/.
#   PYTHON    the Python to use, where python3 is not the one
#   COMMIT    written into the JSON where there is no git history
#   PEERS     a folder on top of the path that holds the peers (pip install --no-deps --target): trl, liger-kernel, verl,
#             cut-cross-entropy; one that is missing is skipped
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
[[ -n ${VIRTUAL_ENV:-} ]] && python=$VIRTUAL_ENV/bin/python
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # the tests ask torch for determinism, to have its memory poisoned
[[ -n ${PEERS:-} ]] && export PYTHONPATH=$PEERS${PYTHONPATH:+:$PYTHONPATH}
limit=470 # seconds of a slice
ops=(group_advantages counterfactual_advantages pool_hidden conductor_weights maestro_advantages policy_loss token_logprobs
  linear_policy_loss)

say() { printf '\n== %s\n' "$*"; }

install() {
  say "install"
  "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps -e .
}

info() {
  say "machine"
  nvidia-smi || echo "no nvidia-smi"
  "$python" -m maestro_fast info
}

gpu_tests() {
  say "GPU tests"
  local workers=()
  # a process that compiles kernels uses one core
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  local files=("$@")
  ((${#files[@]})) || files=(tests/kernels tests/training/test_attention.py)
  timeout 570 "$python" -m pytest -q -m gpu --durations=10 "${workers[@]}" "${files[@]}"
}

sanitize() {
  local tool
  tool=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null) || {
    say "compute-sanitizer: skipped, it is neither on the PATH nor under CUDA_HOME"
    return 0
  }
  say "every kernel once, by itself" # and compiled, so that the runs below need not
  timeout 200 "$python" bench/sanitize.py || return
  local status=0 check
  for check in memcheck racecheck; do
    say "compute-sanitizer --tool $check"
    # torch's allocator hands out parts of large blocks, in which an access past the end is not seen
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 170 "$tool" --tool "$check" --error-exitcode 1 "$python" bench/sanitize.py || {
      echo "$check: exit status $?"
      status=1
    }
  done
  return $status
}

bench() {
  local names=("$@") status=0 name op shapes head
  ((${#names[@]})) || names=("${ops[@]}")
  mkdir -p bench/results
  for name in "${names[@]}"; do
    op=${name%%:*} shapes=${name#"${name%%:*}"} shapes=${shapes#:} head=()
    [[ -n $shapes ]] && head=("--head=$shapes")
    say "benchmark of $name"
    # warnings are torch.compile's, about the peers; the tests are strict about ours
    timeout $limit "$python" -m pytest -q -m gpu -W default -p no:cacheprovider --benchmark-quiet \
      --benchmark-json="bench/results/gpu_$op${shapes:+_${shapes//,/_}}.json" "bench/bench_gpu_$op.py" "${head[@]}" || {
      echo "$name: exit status $?"
      status=1
    }
  done
  return $status
}

part=${1:-all}
shift || true
case $part in
  install) install ;;
  info) info ;;
  test) install && gpu_tests "$@" ;;
  sanitize) install && sanitize ;;
  bench) install && bench "$@" ;;
  all)
    install && info || exit
    failed=()
    for step in gpu_tests sanitize bench; do
      $step || failed+=("$step")
    done
    say "${failed[*]:+failed: }${failed[*]:-all passed}"
    ((${#failed[@]} == 0))
    ;;
  *) sed -n '2,13p' "$0" && exit 2 ;;
esac
