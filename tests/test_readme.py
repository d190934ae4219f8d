"""What the READMEs show runs: the ops, the loop of one's own, the configs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml

from maestro_fast.ops import PROFILES
from maestro_fast.training import parse_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "maestro_fast" / part / "README.md" for part in ("training", "weighting"))]
README = PAGES[0].read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """The code in a page that is marked as ``language``."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


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
    runpy.run_path(str(ROOT / "examples" / "own_loop.py"))
    first, *_, last = capsys.readouterr().out.splitlines()

    def even(line: str) -> float:
        return float(line.split("even")[1].split()[0])

    assert even(last) > even(first) + 0.05


@pytest.mark.parametrize("text", [text for page in PAGES for text in blocks("yaml", page.read_text(encoding="utf-8"))])
def test_the_configs_are_understood(text: str) -> None:
    config = parse_config(yaml.safe_load(text))

    assert config.method.profile in PROFILES
