"""What cannot be served is refused when the trainer is made, with the reason."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import trl
from packaging.version import Version

from maestro_fast.integrations.trl import NEWEST, OLDEST, MaestroGRPOMixin, MaestroGRPOTrainer, refusals, versions

Make = Callable[..., Any]
STATIC = {"policy": "static", "values": {"parity": 1, "brevity": 2}}


@pytest.mark.parametrize(
    ("config", "arguments", "said"),
    [
        ({"reward_weights": [1.0, 2.0]}, {"weights": STATIC}, "reward_weights: not with weights: static"),
        ({"loss_type": "sapo"}, {"loss": "maestro_fast"}, "loss_type luspo, sapo, vespo"),
        ({"off_policy_mask_threshold": 0.5}, {"loss": "maestro_fast"}, "off_policy_mask_threshold"),
        ({"top_entropy_quantile": 0.2}, {"loss": "maestro_fast"}, "top_entropy_quantile below 1"),
        ({"use_bias_correction_kl": True, "beta": 0.1}, {"loss": "maestro_fast"}, "beta with use_bias_correction_kl"),
        ({"use_adaptive_entropy": True}, {"loss": "maestro_fast"}, "use_adaptive_entropy"),
        ({"vllm_importance_sampling_clip_min": 0.1}, {"loss": "maestro_fast"}, "vllm_importance_sampling_clip_min"),
        ({}, {"loss": "mine"}, "loss: 'mine', expected 'trl' or 'maestro_fast'"),
        ({}, {"profile": "mine"}, "profile: 'mine', expected one of"),
        ({}, {"weights": "mine"}, "weights.type: 'mine'"),
        ({}, {"weights": {"policy": "static", "values": {"parity": 1}}}, "weights.values.brevity: missing"),
    ],
)
def test_a_setting_is_refused(settings: Make, ingredients: Make, config: Any, arguments: Any, said: str) -> None:
    if unknown := config.keys() - set(trl.GRPOConfig.__dataclass_fields__):
        pytest.skip(f"this TRL has no {unknown}")
    with pytest.raises(ValueError, match=re.escape(said)):
        MaestroGRPOTrainer(args=settings(**config), **arguments, **ingredients())


@pytest.mark.parametrize(
    "config", [{"loss_type": "sapo"}, {"off_policy_mask_threshold": 0.5}, {"top_entropy_quantile": 0.2}]
)
def test_with_trls_loss_they_are_served(settings: Make, ingredients: Make, config: Any) -> None:
    MaestroGRPOTrainer(args=settings(**config), **ingredients())


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


def test_the_table_for_the_readme() -> None:
    table = refusals()

    assert len({(row.setting, row.where) for row in table}) == len(table)
    assert all(row.setting and row.where and row.reason for row in table)


@pytest.mark.parametrize("found", ["1.0.0", "1.8.2", "2.0.0"])
def test_another_version_warns_once(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(versions, "version", lambda _name: found)
    monkeypatch.setattr(versions, "_warned", False)
    with pytest.warns(UserWarning, match=f"tested with TRL {OLDEST} and {NEWEST}, this is {found}"):
        versions.check_version()
    with warnings.catch_warnings(record=True) as again:
        versions.check_version()

    assert not again


@pytest.mark.parametrize("found", [f"{OLDEST}.0", f"{OLDEST}.1", f"{NEWEST}.0", f"{NEWEST}.3"])
def test_the_tested_versions_do_not_warn(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(versions, "version", lambda _name: found)
    monkeypatch.setattr(versions, "_warned", False)
    with warnings.catch_warnings(record=True) as said:
        versions.check_version()

    assert not said


def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda _name: "0.28.0")
    with pytest.raises(ImportError, match=r"too old.*maestro-fast\[trl\]"):
        versions.check_version()


def test_the_installed_version_is_one_of_the_tested() -> None:
    assert Version(trl.__version__).release[:2] in {Version(OLDEST).release, Version(NEWEST).release}


def test_without_trl(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import maestro_fast, maestro_fast.integrations\n"
        "try:\n    import maestro_fast.integrations.trl\nexcept ImportError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert said.strip() == "maestro_fast.integrations.trl needs TRL: pip install 'maestro-fast[trl]'"
