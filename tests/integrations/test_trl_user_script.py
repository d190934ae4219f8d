"""A user's script works unchanged, but for the import and the class name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

SCRIPT = Path(__file__).with_name("user_script.py")
# TRL switches gradient checkpointing off and on by the old names of these methods.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


def run(source: str, checkpoint: Path, out: Path) -> Any:
    namespace: dict[str, Any] = {"__name__": "script"}
    exec(compile(source, str(SCRIPT), "exec"), namespace)
    return namespace["main"](str(checkpoint), str(out))


def changed(source: str, arguments: str = "") -> str:
    for old, new in (
        ("from trl import GRPOConfig, GRPOTrainer", "from trl import GRPOConfig\n" + IMPORT),
        ("trainer = GRPOTrainer(", f"trainer = MaestroGRPOTrainer({arguments}"),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source


IMPORT = "from maestro_fast.integrations.trl import MaestroGRPOTrainer"


def test_the_same_run_by_default(checkpoint: Path, tmp_path: Path) -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    theirs = run(source, checkpoint, tmp_path / "theirs")
    ours = run(changed(source), checkpoint, tmp_path / "ours")

    assert ours.state.global_step == theirs.state.global_step == 10
    for (name, value), expected in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)
    for entry, expected in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        assert expected.keys() <= entry.keys()
        for name in (name for name in expected if name.startswith("reward") or name == "entropy"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5, nan_ok=True), name


def test_with_the_conductor(checkpoint: Path, tmp_path: Path) -> None:
    source = changed(SCRIPT.read_text(encoding="utf-8"), 'weights="conductor", profile="maestro", ')
    trainer = run(source, checkpoint, tmp_path)

    assert trainer.state.global_step == 10
    assert trainer.weight_policy.state_dict()["weight"].abs().max() > 0
