"""Settings that all tests share."""

from importlib.util import find_spec

# A machine that only runs the GPU tests need not have hypothesis.
if find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples in every run, and no time limit per example: a busy machine is not a failure.
    settings.register_profile("maestro_fast", derandomize=True, deadline=None)
    settings.load_profile("maestro_fast")
