"""Settings that all benchmarks share."""

import os

# Set before torch is imported: the figures are per thread, and a second one would time the machine's other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
