"""Which forward is read, and what the trainer knows of a loss."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maestro_fast.generation import SamplingConfig
from maestro_fast.ops import LossInputs, PolicyLossConfig
from maestro_fast.settings import SettingsError
from maestro_fast.specs import PROFILES
from maestro_fast.training import MaestroTrainer, TrainConfig, parse_config, train
from maestro_fast.training.plan import LossTerms, Method, has_dropout
from tests.training.test_step import CASES, case
from tests.training.test_trainer import parameters


@pytest.mark.parametrize("name", CASES)
def test_the_case_is_logged_with_its_reason(
    raw_config: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "maestro_fast"):
        trainer, _ = case(raw_config, name, trainer={"max_steps": 1})
    source = "training" if name == "training" else "scoring"

    assert trainer.step.scoring.source == source
    (line,) = [record.message for record in caplog.records if record.message.startswith("log-probs and hidden states")]
    assert f": {source}, " in line and name in line and "the weight policy and an entropy reward" in line


def test_too_few_prompts_are_found_before_a_model_loads(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maestro_fast.training.run.load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    raw_config["batch"]["prompts_per_batch"] = 32
    with pytest.raises(ValueError, match=r"^batch\.prompts_per_batch: 32, but the data holds 16 prompts"):
        train(parse_config(raw_config), raw_config)


def test_nothing_is_scored_for_nobody(raw_config: dict[str, Any]) -> None:
    raw_config |= {"weights": "equal", "rewards": ["format"]}
    trainer, _ = case(raw_config, "an extra forward")

    assert trainer.step.scoring.source == "none"


def test_dropout_keeps_the_forwards_apart(raw_config: dict[str, Any]) -> None:
    trainer, _ = case(raw_config, "training", model={"lora": {"r": 2, "dropout": 0.5}})

    assert trainer.step.scoring.source == "scoring"
    assert "dropout" in trainer.step.scoring.reason


def test_dropout_is_found() -> None:
    attention = nn.Module()
    attention.attention_dropout = 0.0  # type: ignore[assignment]
    model = nn.Sequential(nn.Dropout(0.0), attention)
    assert not has_dropout(model)
    attention.attention_dropout = 0.1  # type: ignore[assignment]
    assert has_dropout(model)
    assert has_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout1d(0.1)))


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"top_p": 0.9}, r"sampling\.top_p: 0\.9"),
        ({"top_k": 20}, r"sampling\.top_k: 20"),
        ({"top_p": 0.5, "top_k": 3, "temperature": 0.7}, r"sampling\.top_p: 0\.5 and sampling\.top_k: 3"),
    ],
    ids=str,
)
def test_a_correction_for_a_truncated_sampler_is_refused(
    raw_config: dict[str, Any], sampling: dict[str, Any], named: str
) -> None:
    raw_config["sampling"] |= sampling
    raw_config["loss"] = {"sampler_correction": "token_truncate"}
    words = rf"^loss\.sampler_correction: token_truncate with {named}: the sampler's log-probs are those after trunc"
    with pytest.raises(SettingsError, match=words):
        parse_config(raw_config)
    loss = PolicyLossConfig(sampler_correction="sequence_mask")
    with pytest.raises(ValueError, match=r"^loss\.sampler_correction: sequence_mask with .*expected sampler_corr"):
        Method(SamplingConfig(**sampling), loss=loss)
    raw_config["loss"] = "policy_loss"
    parse_config(raw_config)
    Method(SamplingConfig(temperature=0.7), loss=loss)  # Sampler and scorer divide by the same temperature.


def dapo(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """What ``PolicyLossConfig("dapo", kl_coef=0.1)`` computes on-policy, without clipping; it notes what it gets."""
    GIVEN.append(inputs)
    lengths = inputs.cu_seqlens.diff()
    ratio = (inputs.logprobs - inputs.logprobs.detach()).exp()
    loss = -(ratio * inputs.advantages.repeat_interleave(lengths)).sum()
    if inputs.ref_logprobs is not None:
        gap = inputs.ref_logprobs - inputs.logprobs
        loss = loss + 0.1 * (gap.exp() - 1 - gap).sum()
    return loss / inputs.normalizer, {"own": ratio.detach().mean()}


class WithReference:
    """A loss function that says what it needs, as ``specs.FunctionLoss`` does."""

    needs_reference = True

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        return dapo(inputs)


GIVEN: list[LossInputs] = []


def trained(raw: dict[str, Any], name: str, loss: Any, **sections: Any) -> tuple[dict[str, Tensor], MaestroTrainer]:
    """The parameters after two steps with ``loss`` in place of the config's own."""
    method = TrainConfig.method.fget  # type: ignore[attr-defined]
    GIVEN.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainConfig, "method", property(lambda config: replace(method(config), loss=loss)))
        trainer, _ = case(raw, name, **sections)
    return parameters(trainer), trainer


@pytest.mark.parametrize("name", ["training", "an extra forward"])
@pytest.mark.parametrize(
    ("own", "ours"), [(dapo, PolicyLossConfig()), (WithReference(), PolicyLossConfig(kl_coef=0.1))], ids=["plain", "kl"]
)
def test_a_loss_of_ones_own_trains_as_the_same_loss_of_ours(
    steady: dict[str, Any], name: str, own: Any, ours: PolicyLossConfig
) -> None:
    advantages = {"profile": "grpo"}  # its KL stands in the loss
    theirs, _ = trained(steady, name, ours, advantages=advantages)
    steady["run_dir"] += "-own"
    found, trainer = trained(steady, name, own, advantages=advantages)

    for key, value in theirs.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert all((inputs.ref_logprobs is None) == (own is dapo) for inputs in GIVEN) and GIVEN
    assert trainer.state.log_history[0]["loss/own"] == 1.0  # the figures of the function are logged


def test_what_is_read_of_a_loss_depends_on_where_the_kl_enters() -> None:
    loss = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.2, sampler_correction="token_mask")
    in_score = LossTerms.of(loss, replace(PROFILES["maestro"], kl_in="score"))
    in_loss = LossTerms.of(loss, replace(PROFILES["maestro"], kl_in="loss"))

    assert (in_score.kl_in_score, in_score.needs_reference, in_score.function) == (0.1, False, replace(loss, kl_coef=0))
    assert (in_loss.kl_in_score, in_loss.needs_reference, in_loss.function) == (0.0, True, loss)
    assert in_score.reads_reference and in_loss.reads_reference and in_loss.needs_sampling
    assert in_loss.entropy == "grad"
    own = LossTerms.of(dapo, PROFILES["maestro"])
    assert not own.reads_reference and own.entropy == "value" and not own.needs_sampling and own.wants_sampling


def test_a_kl_in_the_score_has_no_bias_correction() -> None:
    loss = PolicyLossConfig(kl_coef=0.1, kl_bias_correction=True)
    with pytest.raises(ValueError, match=r"^loss\.kl_bias_correction: True, and the profile subtracts the KL from the"):
        Method(loss=loss, profile="maestro")
    assert LossTerms.of(loss, replace(PROFILES["maestro"], kl_in="loss")).function == loss


def test_a_loss_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^loss: got str, expected a PolicyLossConfig or a function of LossInputs"):
        LossTerms.of("dapo", PROFILES["maestro"])  # type: ignore[arg-type]
