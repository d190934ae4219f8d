"""Options pass through text, outside of graphs and in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.ops import PROFILES, AdvantageProfile, ConductorUpdateConfig, PolicyLossConfig
from maestro_fast.specs import HeadSpec, as_text, from_text

library = torch.library.Library("maestro_fast_tests", "FRAGMENT")
library.define("measured(Tensor x, str text) -> Tensor")
library.impl("measured", lambda x, text: x + SEEN.append(text), "CPU")
torch.library.register_fake("maestro_fast_tests::measured", lambda x, text: torch.empty_like(x), lib=library)


class Seen(list[str]):
    """The texts that reached the operator."""

    def append(self, text: str) -> int:  # type: ignore[override]
        super().append(text)
        return len(self)


SEEN = Seen()


@dataclass(frozen=True)
class Options:
    name: str
    size: int | None = None
    scale: float = 1.0
    on: bool = False


SPECS: dict[str, Any] = {
    **PROFILES,
    "no number is rounded": AdvantageProfile(reward_eps=0.1 + 0.2, score_eps=float("inf")),
    "loss": PolicyLossConfig("dr_grpo", max_completion_length=7, clip_max=2.5, kl_coef=1e-3),
    "update": ConductorUpdateConfig(tau=0.5),
    "head": HeadSpec(0.5, None, 0.7, -100, "grad"),
    "flag": Options('with "quotes" and a \\\\', on=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_options_come_back_from_their_text(name: str) -> None:
    spec = SPECS[name]
    assert from_text(type(spec), as_text(spec)) == spec
    assert from_text(type(spec), as_text(spec)) is from_text(type(spec), as_text(spec))  # they are made once


def test_options_of_other_values_have_another_text() -> None:
    assert len({as_text(spec) for spec in SPECS.values()}) == len(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_a_graph_has_the_text_of_eager_mode(name: str) -> None:
    torch._dynamo.reset()
    SEEN.clear()

    def function(x: Tensor) -> Tensor:
        return torch.ops.maestro_fast_tests.measured(x, as_text(SPECS[name]))

    torch.compile(function, fullgraph=True, backend="aot_eager")(torch.zeros(2))
    assert [as_text(SPECS[name])] == SEEN


def test_numbers_that_change_between_calls_change_the_text() -> None:
    """The second value makes them symbols of the graph, unless they are kept from that."""
    torch._dynamo.reset()
    SEEN.clear()

    def function(x: Tensor, size: int, scale: float) -> Tensor:
        return torch.ops.maestro_fast_tests.measured(x, as_text(Options("a", size, scale, size > 3)))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    given = [(2, 0.5), (3, 0.25), (4, 0.125), (2, 0.5)]
    for size, scale in given:
        compiled(torch.zeros(2), size, scale)
    assert [from_text(Options, text) for text in SEEN] == [Options("a", n, x, n > 3) for n, x in given]
