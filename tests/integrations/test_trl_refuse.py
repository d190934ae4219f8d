"""The trainer refuses what it cannot serve when it is made, and says why."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")

import trl
from packaging.version import Version
from torch import Tensor

from maestro_fast.integrations.trl import (
    NEWEST,
    OLDEST,
    MaestroGRPOMixin,
    MaestroGRPOTrainer,
    refusal_table,
    refusals,
    refuse,
)
from maestro_fast.ops import LossInputs

Make = Callable[..., Any]
STATIC = {"type": "static", "values": {"parity": 1, "brevity": 2}}
BASELINE = {"type": "conductor", "estimator": "baseline"}
FIRST_LAYER, REFERENCE = (
    {"type": "conductor", "context": kind} for kind in ("response_first_layer", "reference_prompt_mean")
)


def own_loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return -inputs.logprobs.mean(), {}


@pytest.mark.parametrize(
    ("config", "arguments", "said"),
    [
        ({"reward_weights": [1.0, 2.0]}, {"weights": STATIC}, "reward_weights: not with weights: static"),
        ({}, {"weights": BASELINE, "profile": "gdpo"}, "a profile that compares scores beyond their group"),
        ({"scale_rewards": "batch"}, {"weights": BASELINE}, "a profile that compares scores beyond their group"),
        ({}, {"weights": {"type": "anchored", "context": "prompt_mean"}}, "no known utility (anchored): not with"),
        ({}, {"weights": {"type": "anchored", "residual": True}}, "no known utility (anchored)"),
        ({}, {"weights": "utility"}, "no known utility (utility)"),
        ({}, {"weights": "reward_model"}, "no known utility (reward_model)"),
        ({}, {"weights": {"type": "equal", "guard": {}}}, "no known utility (equal)"),
        ({}, {"weights": {"type": "conductor", "objective": "first_order"}}, "no known utility (conductor)"),
        ({}, {"weights": FIRST_LAYER}, "context: response_first_layer or reference_prompt_mean (response_first_layer)"),
        ({}, {"weights": REFERENCE}, "context: response_first_layer or reference_prompt_mean (reference_prompt_mean)"),
        ({"loss_type": "sapo"}, {"loss": "maestro_fast"}, "loss_type luspo, sapo, vespo"),
        ({"off_policy_mask_threshold": 0.5}, {"loss": "maestro_fast"}, "off_policy_mask_threshold"),
        ({"top_entropy_quantile": 0.2}, {"loss": "maestro_fast"}, "top_entropy_quantile below 1"),
        ({"delta": 0.5}, {"loss": "maestro_fast"}, "delta: 0.5, expected clip_max >= 1"),
        ({"loss_type": "cispo", "epsilon_high": 0.0}, {"loss": "maestro_fast"}, "epsilon_high: 0.0, expected"),
        ({"use_adaptive_entropy": True}, {"loss": "maestro_fast"}, "use_adaptive_entropy"),
        ({"vllm_importance_sampling_clip_min": 0.1}, {"loss": "maestro_fast"}, "vllm_importance_sampling_clip_min"),
        ({"off_policy_mask_threshold": 0.5}, {"loss": own_loss}, "off_policy_mask_threshold: not with loss="),
        ({"top_entropy_quantile": 0.2}, {"loss": own_loss}, "top_entropy_quantile below 1"),
        ({}, {"loss": "mine"}, "loss: 'mine', expected 'trl', 'maestro_fast' or a function"),
        ({}, {"profile": "mine"}, "profile: 'mine', expected one of"),
        ({}, {"weights": "mine"}, "weights.type: 'mine'"),
        ({}, {"weights": {"type": "static", "values": {"parity": 1}}}, "weights.values.brevity: missing"),
    ],
)
def test_a_setting_is_refused(settings: Make, ingredients: Make, config: Any, arguments: Any, said: str) -> None:
    if unknown := config.keys() - set(trl.GRPOConfig.__dataclass_fields__):
        pytest.skip(f"this TRL has no {unknown}")
    with pytest.raises(ValueError, match=re.escape(said)):
        MaestroGRPOTrainer(args=settings(**config), **arguments, **ingredients())


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({}, {"weights": "conductor", "profile": "gdpo"}),
        ({"loss_type": "sapo"}, {"loss": own_loss}),
        ({"reward_weights": [1.0, 2.0]}, {"weights": BASELINE, "profile": "maestro"}),
    ],
)
def test_only_what_has_to_be_is_refused(settings: Make, ingredients: Make, config: Any, arguments: Any) -> None:
    if unknown := config.keys() - set(trl.GRPOConfig.__dataclass_fields__):
        pytest.skip(f"this TRL has no {unknown}")
    MaestroGRPOTrainer(args=settings(**config), **arguments, **ingredients())


@pytest.mark.parametrize(
    "config", [{"loss_type": "sapo"}, {"off_policy_mask_threshold": 0.5}, {"top_entropy_quantile": 0.2}]
)
def test_with_trls_loss_they_are_served(settings: Make, ingredients: Make, config: Any) -> None:
    MaestroGRPOTrainer(args=settings(**config), **ingredients())


@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        ({}, False),
        ({"top_k": 0, "top_p": 1.0, "generation_kwargs": {"top_k": -1, "seed": 3}}, False),
        ({"top_p": 0.9}, True),
        ({"top_k": 50}, True),
        ({"min_p": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"generation_kwargs": {"top_p": 0.9}}, True),
        ({"generation_kwargs": {"presence_penalty": 0.5}}, True),
        ({"generation_kwargs": {"frequency_penalty": -0.5}}, True),
        ({"generation_kwargs": {"logit_bias": {7: -100}}}, True),
        ({"temperature": 0.8, "generation_kwargs": {"temperature": 1.0}}, True),
        ({"temperature": 0.8, "generation_kwargs": {"temperature": 0.8, "presence_penalty": 0.0}}, False),
        ({"top_p": 0.9, "vllm_importance_sampling_correction": False}, False),
        ({"top_p": 0.9, "use_vllm": False}, False),
    ],
    ids=str,
)
def test_a_correction_for_truncated_sampling_is_refused(settings: Make, options: Any, is_refused: bool) -> None:
    """A trainer with ``use_vllm`` cannot be made without vLLM, so the refusal is asked itself."""
    (refusal,) = [row for row in refusals() if row.setting.startswith("vllm_importance_sampling_correction with")]
    args = settings(**{"use_vllm": True, **options})
    assert bool(refusal.applies(SimpleNamespace(args=args), None)) is is_refused  # type: ignore[arg-type]


def test_a_loss_that_is_no_function(settings: Make, ingredients: Make) -> None:
    with pytest.raises(TypeError, match=r"^loss: got int, expected 'trl', 'maestro_fast' or a function"):
        MaestroGRPOTrainer(args=settings(), loss=3, **ingredients())


def test_prompt_learning(settings: Make, ingredients: Make) -> None:
    peft = pytest.importorskip("peft")
    tuning = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")

    MaestroGRPOTrainer(args=settings(), peft_config=tuning, **ingredients())
    with pytest.raises(ValueError, match="prompt learning of PEFT"):
        MaestroGRPOTrainer(args=settings(), peft_config=tuning, weights="conductor", **ingredients())


def test_a_model_that_forms_all_logits(settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ingredients()
    whole = type(parts["model"]).forward

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
        return whole(self, input_ids=input_ids, attention_mask=attention_mask, **inputs)

    monkeypatch.setattr(type(parts["model"]), "forward", forward)
    with pytest.raises(ValueError, match="no logits_to_keep"):
        MaestroGRPOTrainer(args=settings(), weights="conductor", **parts)


def test_no_rewards(settings: Make, ingredients: Make) -> None:
    with pytest.raises(ValueError, match=r"[Nn]o reward"):
        MaestroGRPOTrainer(args=settings(), **{**ingredients(), "reward_funcs": []})


def test_the_mixin_alone() -> None:
    with pytest.raises(TypeError, match=r"no trl\.GRPOTrainer"):
        MaestroGRPOMixin()


def test_the_table_for_the_documentation() -> None:
    table = refusals()
    lines = refusal_table().splitlines()

    assert len({(row.setting, row.where) for row in table}) == len(table)
    assert all(row.setting and row.where and row.reason for row in table)
    assert [len(line.split("|")) for line in lines] == [5] * (2 + len(table))
    for row, line in zip(table, lines[2:], strict=True):
        assert line == f"| {row.setting} | {row.where} | {row.reason} |"


@pytest.mark.parametrize("found", ["1.0.0", "1.8.2", "2.0.0"])
def test_another_version_warns_once(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(refuse, "version", lambda _name: found)
    monkeypatch.setattr(refuse, "_warned", False)
    with pytest.warns(UserWarning, match=f"tested with TRL {OLDEST} and {NEWEST}, this is {found}"):
        refuse.check_version()
    with warnings.catch_warnings(record=True) as again:
        refuse.check_version()

    assert not again


@pytest.mark.parametrize("found", [f"{OLDEST}.0", f"{OLDEST}.1", f"{NEWEST}.0", f"{NEWEST}.3"])
def test_the_tested_versions_do_not_warn(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(refuse, "version", lambda _name: found)
    monkeypatch.setattr(refuse, "_warned", False)
    with warnings.catch_warnings(record=True) as said:
        refuse.check_version()

    assert not said


def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refuse, "version", lambda _name: "0.28.0")
    with pytest.raises(ImportError, match=r"too old.*maestro-fast\[trl\]"):
        refuse.check_version()


def test_the_installed_version_is_one_of_the_tested() -> None:
    assert Version(trl.__version__).release[:2] in {Version(OLDEST).release, Version(NEWEST).release}


def test_the_trainer_of_this_package_is_not_loaded() -> None:
    code = (
        "import sys, maestro_fast.integrations.trl\n"
        "print([name for name in sys.modules if name.startswith('maestro_fast.training')])"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert said.splitlines()[-1] == "[]"


def test_without_trl(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import maestro_fast, maestro_fast.integrations\n"
        "try:\n    import maestro_fast.integrations.trl\nexcept ImportError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert said.strip() == "maestro_fast.integrations.trl needs TRL: pip install 'maestro-fast[trl]'"
