"""Settings that all tests share."""

import os
from importlib.util import find_spec

# The tensors here are tiny: a second thread costs more than it computes, and far more on a busy machine. Set before
# torch is imported, and inherited by the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine that only runs the GPU tests need not have hypothesis.
if find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples in every run, and no time limit per example: a busy machine is not a failure.
    settings.register_profile("maestro_fast", derandomize=True, deadline=None)
    settings.load_profile("maestro_fast")
