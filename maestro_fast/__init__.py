"""maestro_fast: adaptive multi-reward weighting for GRPO at no measurable cost, and a faster step around it.

Importing this package imports nothing else of it. The functional API is in :mod:`maestro_fast.ops`.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("maestro-fast")
except PackageNotFoundError:  # a checkout that is used without being installed
    __version__ = "0+unknown"
