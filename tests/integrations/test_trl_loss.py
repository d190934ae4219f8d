"""``loss="maestro_fast"`` is TRL's loss, computed by ``ops.policy_loss``: same value, same gradient, same log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

import trl
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer

from maestro_fast.integrations.trl import MaestroGRPOTrainer
from maestro_fast.integrations.trl.loss import loss_config, packed_policy_loss
from tests.integrations.test_trl_training import FREE, history

Make = Callable[..., Any]


def micro_batch(trainer: Any) -> dict[str, Any]:
    """Sampled by the trainer; log-probs of other policies are made up, and the last response has no live token."""
    generator = torch.Generator().manual_seed(1)
    rows = [trainer.train_dataset[i] for i in (0, 13) for _ in range(4)]  # prompts of two lengths
    inputs = trainer._generate_and_score_completions(rows)
    mask = inputs["completion_mask"].clone()
    mask[0, 5:] = 0
    mask[-1] = 0
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], mask], 1)
    with torch.no_grad():
        logprobs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, mask.shape[1])[0]

    def moved(by: float) -> Tensor:
        return logprobs + by * torch.randn(logprobs.shape, generator=generator)

    return {
        **inputs,
        "completion_mask": mask,
        "advantages": torch.randn(8, generator=generator),
        "num_items_in_batch": torch.tensor(29),
        "old_per_token_logps": moved(0.3),
        "ref_per_token_logps": moved(0.5),
        "sampling_per_token_logps": moved(0.3),
        "tool_mask": torch.ones_like(mask).index_fill(1, torch.tensor([2]), 0),
    }


def gradients(trainer: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(trainer.model.parameters())))


def both(trainer: Any, inputs: dict[str, Any]) -> tuple[list[tuple[Tensor, list[Tensor]]], list[dict[str, Any]]]:
    """Loss and gradients, and the log: of TRL's code, then of ours."""
    results, logs = [], []
    for compute in (
        lambda: GRPOTrainer._compute_loss(trainer, trainer.model, inputs),
        lambda: packed_policy_loss(trainer, loss_config(trainer), trainer.model, inputs),
    ):
        trainer._metrics["train"].clear()
        loss = compute()
        results.append((loss.detach(), gradients(trainer, loss)))
        logs.append(dict(trainer._metrics["train"]))
    return results, logs


CASES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo")),
    {"loss_type": "cispo", "epsilon_high": 2.0},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    {"loss_type": "bnpo", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5},
    {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
    {"loss_type": "grpo", "entropy_coef": 0.2},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_same_loss_and_gradient_as_trls(settings: Make, ingredients: Make, case: dict[str, Any]) -> None:
    if unknown := case.keys() - set(GRPOConfig.__dataclass_fields__):
        pytest.skip(f"this TRL has no {unknown}")
    args = settings(gradient_accumulation_steps=2, steps_per_generation=2, **case)
    trainer = MaestroGRPOTrainer(args=args, loss="maestro_fast", **ingredients())
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    (theirs, ours), logs = both(trainer, micro_batch(trainer))

    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    for ours_grad, theirs_grad in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-7)
    shared = logs[1].keys() & logs[0].keys()
    assert {"entropy", "kl"} & logs[0].keys() <= shared
    assert {name for name in logs[0] if name.endswith(("_mean", "cispo_clip_ratio"))} <= shared
    if case.get("importance_sampling_level") == "sequence":
        shared -= {name for name in shared if name.startswith("clip_ratio")}  # TRL: by responses, ours: by tokens
    for name in shared:
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_correction_for_vllm(settings: Make, ingredients: Make, mode: str) -> None:
    trainer = MaestroGRPOTrainer(
        args=settings(vllm_importance_sampling_mode=mode), loss="maestro_fast", **ingredients()
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = micro_batch(trainer)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    inputs["importance_sampling_ratio"] = sampler_ratio(trainer, inputs, mode)
    (theirs, ours), _ = both(trainer, inputs)

    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    for ours_grad, theirs_grad in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-7)


def sampler_ratio(trainer: Any, inputs: dict[str, Any], mode: str) -> Tensor:
    """pi_old / pi_sampler as TRL's docs define it, capped at 1.2."""
    for name in ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"):
        if hasattr(trainer, name):
            setattr(trainer, name, 1.2)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * mask
    ratio = (gap.sum(1, keepdim=True) if mode.startswith("sequence") else gap).exp()
    assert (ratio > 1.2).any()
    return ratio.clamp(max=1.2) if mode.endswith("truncate") else ratio.masked_fill(ratio > 1.2, 0.0)


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="older TRL divides by all the tokens of a batch")
@pytest.mark.parametrize("train", [True, False])
def test_a_window_smaller_than_the_batch(settings: Make, ingredients: Make, train: bool) -> None:
    args = settings(loss_type="dapo", steps_per_generation=4, gradient_accumulation_steps=2)
    trainer = MaestroGRPOTrainer(args=args, loss="maestro_fast", **ingredients())
    trainer.current_gradient_accumulation_steps = 2
    inputs = micro_batch(trainer)
    trainer.model.train(train)
    (theirs, ours), _ = both(trainer, inputs)

    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)


def test_it_trains_ten_steps(settings: Make, ingredients: Make) -> None:
    parts = ingredients()
    trainer = MaestroGRPOTrainer(
        args=settings(max_steps=10, eval_strategy="steps", eval_steps=5, **FREE),
        loss="maestro_fast",
        weights="random",
        eval_dataset=parts["train_dataset"].select(range(4)),
        **parts,
    )
    trainer.train()

    assert len(history(trainer, "clip_ratio/region_mean")) == 10
    assert history(trainer, "eval_entropy")
    assert all(value == pytest.approx(1, abs=0.2) for value in history(trainer, "ratio"))
