"""maestro_fast: adaptive multi-reward weighting for GRPO at no measurable cost, and a faster step around it.

Importing this package imports nothing else of it. The functional API is in :mod:`maestro_fast.ops`.
"""

from importlib.metadata import version

__version__ = version("maestro-fast")
