"""A compiled module from before a change of the C++ code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from maestro_fast import _C
from maestro_fast.ops.cpp import check_build


def test_a_stale_build_is_named() -> None:
    check_build(_C)
    stale = SimpleNamespace(group_advantages=None, conductor_weights=None, counterfactual_advantages=None)
    with pytest.raises(ImportError, match=r"_C has no AdvantageProfile, Partition: .* rebuild it"):
        check_build(stale)
