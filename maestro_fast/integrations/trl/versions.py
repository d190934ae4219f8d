"""Which versions of TRL are known to work: the oldest and the newest are trained with in the tests."""

from __future__ import annotations

import warnings
from importlib.metadata import version

from packaging.version import Version

OLDEST = "0.29"  # the first with multi_objective_aggregation, so that a profile of TRL's can be named
NEWEST = "1.16"

_warned = False


def check_version() -> None:
    """Warns once about a TRL that the tests do not train with.

    Raises:
        ImportError: it is older than ``OLDEST``, and lacks the methods that are overridden here.
    """
    global _warned
    found = Version(version("trl"))
    if found < Version(OLDEST):
        raise ImportError(
            f"trl {found} is too old, maestro_fast needs {OLDEST} or newer: pip install 'maestro-fast[trl]'"
        )
    if _is_tested(found) or _warned:
        return
    _warned = True
    warnings.warn(f"maestro_fast is tested with TRL {OLDEST} and {NEWEST}, this is {found}; it may work", stacklevel=4)


def _is_tested(found: Version) -> bool:
    return any(found.release[:2] == Version(tested).release for tested in (OLDEST, NEWEST))
