"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from maestro_fast.ops import PROFILES
from maestro_fast.training import parse_config

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_ops_block_runs_and_gives_gradients() -> None:
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    exec(blocks("python")[0], namespace)
    hidden, loss = namespace["hidden"], namespace["loss"]

    assert isinstance(hidden, torch.Tensor) and isinstance(loss, torch.Tensor)
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert loss.isfinite()


def test_the_loop_of_ones_own_learns(capsys: pytest.CaptureFixture[str]) -> None:
    (loop,) = [block for block in blocks("python") if "for step in range" in block]
    exec(loop, {})
    first, *_, last = capsys.readouterr().out.splitlines()

    def even(line: str) -> float:
        return float(line.split("even")[1].split()[0])

    assert even(last) > even(first) + 0.05


@pytest.mark.parametrize("text", blocks("yaml"))
def test_the_configs_are_understood(text: str) -> None:
    config = parse_config(yaml.safe_load(text))

    assert config.method.profile in PROFILES


def test_every_link_to_a_file_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([\w./]+)\)", README)

    assert targets
    for target in targets:
        assert (Path(__file__).resolve().parent.parent / target).exists(), target
