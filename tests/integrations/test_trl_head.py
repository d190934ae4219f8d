"""``loss="maestro_fast"`` from hidden states: what TRL's loss is, without its logits, and only where that is exact."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer

from maestro_fast.integrations.trl import MaestroGRPOTrainer
from maestro_fast.integrations.trl.head import head_dtype, why_trls_logprobs
from maestro_fast.integrations.trl.loss import head_policy_loss, loss_config, packed_policy_loss
from tests.integrations.test_trl_loss import micro_batch
from tests.integrations.test_trl_training import history
from tests.training.live_memory import LiveMemory

Make = Callable[..., Any]


def on_policy(trainer: Any) -> dict[str, Any]:
    """A micro-batch without log-probs of other policies; a whole group has no advantage, one response no live token."""
    inputs = micro_batch(trainer)
    for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
        del inputs[name]
    inputs["advantages"][2:6] = 0.0
    assert (inputs["prompt_mask"] == 0).any()
    return inputs


def make(settings: Make, ingredients: Make, **case: Any) -> Any:
    if unknown := case.keys() - set(GRPOConfig.__dataclass_fields__):
        pytest.skip(f"this TRL has no {unknown}")
    args = settings(**{"gradient_accumulation_steps": 2, "steps_per_generation": 2, "temperature": 0.7, **case})
    trainer = MaestroGRPOTrainer(args=args, loss="maestro_fast", **ingredients())
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    return trainer


def computed(trainer: Any, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Loss, the gradients of all that is trained in one vector, and the log."""
    trainer._metrics["train"].clear()
    value = loss()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    gradient = torch.cat([grad.flatten() for grad in torch.autograd.grad(value, trained)])
    return value.detach(), gradient, dict(trainer._metrics["train"])


def by_head(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return computed(trainer, lambda: head_policy_loss(trainer, loss_config(trainer), trainer.model, inputs))


def by_logprobs(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return computed(trainer, lambda: packed_policy_loss(trainer, loss_config(trainer), trainer.model, inputs))


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The error of a vector, relative to its length."""
    return float((ours - theirs).norm() / theirs.norm())


CASES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo")),
    {"loss_type": "cispo", "epsilon_high": 2.0},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "bnpo", "epsilon_high": 0.3, "delta": 1.5},
    {"loss_type": "grpo", "entropy_coef": 0.2},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_same_loss_gradient_and_log(settings: Make, ingredients: Make, case: dict[str, Any]) -> None:
    trainer = make(settings, ingredients, **case)
    inputs = on_policy(trainer)
    ours, present = by_head(trainer, inputs), by_logprobs(trainer, inputs)
    trls = computed(trainer, lambda: GRPOTrainer._compute_loss(trainer, trainer.model, inputs))

    for theirs in (present, trls):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
        assert gap(ours[1], theirs[1]) < 1e-5
    assert ours[2].keys() == present[2].keys() and ours[2]["ratio"] == [1.0]
    for name, values in present[2].items():
        assert ours[2][name] == pytest.approx(values, rel=1e-5, abs=1e-7), name
    assert ours[2]["entropy"] == pytest.approx(trls[2]["entropy"], rel=1e-5)


def test_a_model_in_float64(settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's head is in float32 at best: the log-probs to compare with come from the model's own logits."""

    def logprobs(self: Any, model: Any, ids: Tensor, mask: Tensor, keep: int, **_: Any) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -keep - 1 : -1]
        log_p = (logits / self.temperature).log_softmax(-1)
        return log_p.gather(2, ids[:, -keep:, None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    trainer = make(settings, ingredients, loss_type="dapo")
    inputs = on_policy(trainer)
    trainer.model.double()
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", logprobs)
    ours, exact = by_head(trainer, inputs), by_logprobs(trainer, inputs)

    assert ours[0].dtype is ours[1].dtype is torch.float64
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-12, atol=0.0)
    assert gap(ours[1], exact[1]) < 1e-12


def test_an_adapter_below_the_head(settings: Make, ingredients: Make) -> None:
    peft = pytest.importorskip("peft")
    parts = ingredients() | {"peft_config": peft.LoraConfig(target_modules=["q_proj", "down_proj"])}
    trainer = make(settings, lambda: parts)
    assert why_trls_logprobs(trainer) is None
    inputs = on_policy(trainer)

    assert gap(by_head(trainer, inputs)[1], by_logprobs(trainer, inputs)[1]) < 1e-5


def test_mixed_precision(settings: Make, ingredients: Make) -> None:
    trainer = make(settings, ingredients, bf16=True)
    inputs = on_policy(trainer)
    weight = trainer.model.lm_head.weight

    assert head_dtype(trainer, weight) is torch.bfloat16
    assert gap(by_head(trainer, inputs)[1], by_logprobs(trainer, inputs)[1]) < 3e-2
    trainer.args.cast_lm_head_to_fp32 = True
    assert head_dtype(trainer, weight) is torch.float32
    assert gap(by_head(trainer, inputs)[1], by_logprobs(trainer, inputs)[1]) < 3e-2


def test_nothing_live(settings: Make, ingredients: Make) -> None:
    trainer = make(settings, ingredients)
    inputs = on_policy(trainer)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss, gradient, _ = by_head(trainer, inputs)

    assert loss == 0 and bool((gradient == 0).all())


def test_no_logits_of_all_tokens(settings: Make, ingredients: Make) -> None:
    vocabulary, length = 8192, 240
    parts = ingredients()
    parts["model"].resize_token_embeddings(vocabulary, mean_resizing=False)
    trainer = make(settings, lambda: parts, max_completion_length=length)
    inputs = {
        "prompt_ids": torch.full((8, 3), 7),
        "prompt_mask": torch.ones(8, 3, dtype=torch.int64),
        "completion_ids": torch.arange(8 * length).view(8, length) % 300,
        "completion_mask": torch.ones(8, length, dtype=torch.int64),
        "advantages": torch.linspace(-1, 1, 8),
        "num_items_in_batch": torch.tensor(8 * length),
    }
    by_head(trainer, inputs)
    with LiveMemory() as memory:
        by_head(trainer, inputs)

    assert memory.peak < 8 * length * vocabulary * 4 / 2  # half of float32 logits


class OtherLogprobs(MaestroGRPOTrainer):
    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


class Doubled(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_iterations": 2}, "old log-probs"),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, "old log-probs"),
        ({"beta": 0.1, "use_bias_correction_kl": False}, "beta"),
        ({}, "one sweep"),
    ],
    ids=str,
)
def test_the_choice_is_said_once(
    settings: Make, ingredients: Make, caplog: pytest.LogCaptureFixture, config: dict[str, Any], said: str
) -> None:
    with caplog.at_level(logging.INFO, logger="maestro_fast.integrations.trl.head"):
        trainer = make(settings, ingredients, max_steps=2, **config)
        trainer.train()
    lines = [r.message for r in caplog.records if r.name == "maestro_fast.integrations.trl.head"]

    assert len(lines) == 1 and said in lines[0]
    assert trainer._head_in_loss is (said == "one sweep")


def test_what_keeps_trls_logprobs(settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(settings, ingredients)
    assert why_trls_logprobs(trainer) is None
    for owner, name, value, said in (
        (trainer, "is_fsdp_enabled", True, "FSDP"),
        (trainer, "is_deepspeed_enabled", True, "DeepSpeed"),
        (trainer.args, "_n_gpu", 2, "DataParallel"),
        (trainer.args, "torch_compile", True, "compiled"),
        (trainer, "__class__", OtherLogprobs, "overridden"),
        (trainer.model.lm_head, "__class__", Doubled, "Doubled"),
        (trainer.model.lm_head, "forward", lambda x: x @ (2 * trainer.model.lm_head.weight.T), "not supported"),
        (trainer.model.config, "logit_scale", 0.5, "not supported"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value, raising=False)
            assert said in str(why_trls_logprobs(trainer)), name
    assert why_trls_logprobs(trainer) is None


def test_an_adapter_on_the_head(settings: Make, ingredients: Make) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    parts = ingredients() | {"peft_config": adapter}

    assert "output head" in str(why_trls_logprobs(make(settings, lambda: parts)))


def test_log_probs_that_come_all_the_same(settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(settings, ingredients)
    inputs = on_policy(trainer)
    inputs["old_per_token_logps"] = torch.full(inputs["completion_ids"].shape, -3.0)
    ours = computed(trainer, lambda: trainer._compute_loss(trainer.model, inputs))

    assert torch.equal(ours[1], by_logprobs(trainer, inputs)[1])


def test_it_trains_ten_steps(settings: Make, ingredients: Make) -> None:
    parts = ingredients()
    trainer = MaestroGRPOTrainer(
        args=settings(max_steps=10, eval_strategy="steps", eval_steps=5, mask_truncated_completions=True),
        loss="maestro_fast",
        weights={"policy": "conductor", "period": 1, "learning_rate": 0.1},
        eval_dataset=parts["train_dataset"].select(range(4)),
        **parts,
    )
    assert trainer._head_in_loss
    trainer.train()

    assert len(history(trainer, "entropy")) == 10 and history(trainer, "eval_entropy")
    assert set(history(trainer, "ratio")) <= {0.0, 1.0}  # 0 where all is truncated
