#!/usr/bin/env bash
# Makes an environment in which maestro_fast is installed with the named extras, and prints its Python.
#
#     python=$(bash .ci/setup.sh "torch==2.13.0" dev)
#
# The first argument is the torch requirement to install where torch is missing, and the others are the extras. This script
# finds a Python that can run the other half, setup.py: that of the active virtual environment, else the one that PYTHON
# names, else one on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

[[ $(uname -s) == Linux ]] || fail "maestro_fast supports Linux; this is $(uname -s)."

hint="Name one: make PYTHON=/path/to/python3.12 ..."
if [[ -n ${VIRTUAL_ENV:-} ]]; then
  candidates=("$VIRTUAL_ENV/bin/python")
  hint="Leave this virtual environment, or activate another."
elif [[ -n ${PYTHON:-} ]]; then
  candidates=("$PYTHON")
else
  candidates=(python3 python3.13 python3.12 python3.11)
fi

for python in "${candidates[@]}"; do
  if is_new_enough "$python"; then
    exec "$python" .ci/setup.py "$@"
  fi
done
fail "maestro_fast needs Python 3.11 or newer; tried ${candidates[*]}. $hint"
