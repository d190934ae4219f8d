"""What the READMEs show runs: the ops, the loop of one's own, the configs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml

from maestro_fast.ops import PROFILES
from maestro_fast.records import StepRecord
from maestro_fast.training import parse_config, train
from tests.tiny import tiny_checkpoint

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


def test_the_loss_of_ones_own_trains(tmp_path: Path) -> None:
    (source,) = blocks("python", PAGES[1].read_text(encoding="utf-8"))
    (tmp_path / "my_loss.py").write_text(source, encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say A."}\n{"prompt": "Say B."}\n', encoding="utf-8")
    records: list[StepRecord] = []
    raw = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_checkpoint(tmp_path / "model"))},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "rewards": ["entropy"],
        "loss": {"type": "function", "function": f"{tmp_path}/my_loss.py:loss"},
        "sampling": {"group_size": 4, "max_new_tokens": 6},
        "batch": {"prompts_per_batch": 2, "micro_batch": 8},
        "trainer": {"learning_rate": 1e-2, "max_steps": 2, "disable_tqdm": True, "use_cpu": True},
    }
    trainer = train(parse_config(raw), raw, observers=[records.append])

    assert any(record.advantages_B.abs().max() > 0 for record in records), "there is nothing to learn from"
    before = dict(type(trainer.model).from_pretrained(tmp_path / "model").named_parameters())
    assert any(not torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    assert trainer.state.log_history[0]["loss/gate"] == pytest.approx(0.5, abs=1e-3), "on-policy every ratio is 1"


@pytest.mark.parametrize("text", [text for page in PAGES for text in blocks("yaml", page.read_text(encoding="utf-8"))])
def test_the_configs_are_understood(text: str) -> None:
    config = parse_config(yaml.safe_load(text))

    assert config.method.profile in PROFILES
