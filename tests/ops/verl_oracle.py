"""verl's own advantages, from the committed results of its functions; see goldens/make_verl_goldens.py."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FILE = Path(__file__).parent / "goldens" / "verl_0.9.1.json"


class VerlCase(NamedTuple):
    """float64, but ids. ``advantages_B`` by profile, NaN where a response has no tokens."""

    rewards_BK: Tensor
    weights_K: Tensor
    groups: list[int]
    lengths_B: Tensor
    advantages_B: dict[str, Tensor]


@cache
def verl_cases() -> dict[str, VerlCase]:
    return {name: _case(raw) for name, raw in json.loads(FILE.read_text())["cases"].items()}


def _case(raw: dict[str, Any]) -> VerlCase:
    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    advantages = {
        name: tensor([float("nan") if x is None else x for x in row]) for name, row in raw["advantages"].items()
    }
    return VerlCase(
        tensor(raw["rewards"]), tensor(raw["weights"]), raw["groups"], torch.tensor(raw["lengths"]), advantages
    )
