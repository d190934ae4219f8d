"""``loss="maestro_fast"`` has the value, the gradient and the log of TRL's loss."""

from __future__ import annotations

import logging
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
from maestro_fast.integrations.trl.loss import (
    head_dtype,
    head_policy_loss,
    loss_config,
    packed_policy_loss,
    why_trls_logprobs,
)
from maestro_fast.model import Layouts
from tests.integrations.test_trl_training import FREE, history
from tests.training.live_memory import LiveMemory

Make = Callable[..., Any]


def micro_batch(trainer: Any) -> dict[str, Any]:
    """A batch that the trainer sampled, with made-up log-probs of other policies; the last response is masked."""
    generator = torch.Generator().manual_seed(1)
    rows = [trainer.train_dataset[i] for i in (0, 13) for _ in range(4)]  # These prompts differ in length.
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
    """Computes loss, gradients and log by TRL's code, then by ours."""
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


CORRECTED = {"use_bias_correction_kl": True}  # The default of TRL 1.16; the KL is multiplied by the unclipped ratio.
CASES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo")),
    {"loss_type": "cispo", "epsilon_high": 2.0},
    {"loss_type": "cispo"},  # With TRL's defaults the cap of the ratio is 0.2.
    {"loss_type": "grpo", "epsilon": 1.5},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    {"loss_type": "bnpo", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.5},
    {"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False},
    *({"loss_type": name, "beta": 0.3, **CORRECTED} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")),
    {"loss_type": "grpo", "beta": 0.3, **CORRECTED, "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "beta": 0.3, **CORRECTED, "delta": 1.3},
    {"loss_type": "grpo", "entropy_coef": 0.2},
    {"loss_type": "dapo", "entropy_coef": 0.2},
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
    assert logs[0].keys() - shared <= {"clip_ratio/low_min", "clip_ratio/high_max"}
    if case.get("importance_sampling_level") == "sequence":
        shared -= {name for name in shared if name.startswith("clip_ratio")}  # TRL counts responses, we count tokens.
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
    inputs["sampling_per_token_logps"][1, 3] = float("nan")  # vLLM did not have it.
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    inputs["importance_sampling_ratio"] = sampler_ratio(trainer, inputs, mode)
    (theirs, ours), _ = both(trainer, inputs)

    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    for ours_grad, theirs_grad in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-7)


def sampler_ratio(trainer: Any, inputs: dict[str, Any], mode: str) -> Tensor:
    """The ratio pi_old / pi_sampler as TRL's documentation defines it, capped at 1.2."""
    for name in ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"):
        if hasattr(trainer, name):
            setattr(trainer, name, 1.2)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    gap = ((inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * mask).nan_to_num(nan=0.0)
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


# --- from the hidden states ---


def on_policy(trainer: Any) -> dict[str, Any]:
    """A micro-batch without log-probs of other policies; four advantages are 0, and all of one response is masked."""
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
    """The loss, the gradients of all trained parameters as one vector, and the log."""
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
    """The norm of the difference, relative to the norm of the second vector."""
    return float((ours - theirs).norm() / theirs.norm())


HEAD_CASES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo")),
    {"loss_type": "cispo"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "bnpo", "epsilon_high": 0.3, "delta": 1.5},
    {"loss_type": "grpo", "entropy_coef": 0.2},
]


@pytest.mark.parametrize("case", HEAD_CASES, ids=lambda case: "-".join(map(str, case.values())))
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
    for name in {"entropy", "policy_loss", "entropy_coef"} & trls[2].keys():
        assert ours[2][name] == pytest.approx(trls[2][name], rel=1e-5), name


@pytest.mark.parametrize("train", [True, False])
def test_a_coefficient_is_logged_only_at_an_update(settings: Make, ingredients: Make, train: bool) -> None:
    """This micro-batch of a training step is not its last, and an evaluation updates nothing."""
    trainer = make(settings, ingredients, entropy_coef=0.2)
    inputs = on_policy(trainer)
    trainer.model.train(train)
    state = trainer.accelerator.gradient_state
    state._set_sync_gradients(not train)
    log = trainer._metrics["train" if train else "eval"]
    log.clear()
    for compute in (GRPOTrainer._compute_loss, MaestroGRPOTrainer._compute_loss):
        compute(trainer, trainer.model, inputs)
    state._set_sync_gradients(True)

    assert "entropy_coef" not in log
    theirs, ours = log["policy_loss"]
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_model_in_float64(settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's head has float32 at best, so the log-probs to compare with come from the model's own logits.

    The model rounds its rotations and norms to float32, and that shall happen to the same numbers. So the positions
    count from the first token of a prompt, as ours do, and no prompt is shared.
    """

    def logprobs(self: Any, model: Any, ids: Tensor, mask: Tensor, keep: int, **_: Any) -> tuple[Tensor, Tensor]:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        logits = out.logits[:, -keep - 1 : -1]
        log_p = (logits / self.temperature).log_softmax(-1)
        return log_p.gather(2, ids[:, -keep:, None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    trainer = make(settings, ingredients, loss_type="dapo")
    trainer._layouts = Layouts("padded")
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


def test_no_logits_of_all_tokens(settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, length = 8192, 240
    monkeypatch.setattr("maestro_fast.ops.head.chunk_rows", lambda vocabulary, device: 256)
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

    assert memory.peak < 8 * length * vocabulary * 4 / 2  # Half of the size of all logits in float32.


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
        ({"beta": 0.1}, "beta"),
        ({}, "one sweep"),
    ],
    ids=str,
)
def test_the_choice_is_said_once(
    settings: Make, ingredients: Make, caplog: pytest.LogCaptureFixture, config: dict[str, Any], said: str
) -> None:
    with caplog.at_level(logging.INFO, logger="maestro_fast.integrations.trl.loss"):
        trainer = make(settings, ingredients, max_steps=2, **config)
        trainer.train()
    lines = [r.message for r in caplog.records if r.name == "maestro_fast.integrations.trl.loss"]

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


def test_it_trains_ten_steps_from_hidden_states(
    settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of logits go through C++, not through PyTorch."""
    for function in ("_block_statistics", "_block_dlogits"):
        monkeypatch.delattr(f"maestro_fast.ops.head_rows.{function}")
    parts = ingredients()
    trainer = MaestroGRPOTrainer(
        args=settings(max_steps=10, eval_strategy="steps", eval_steps=5, mask_truncated_completions=True),
        loss="maestro_fast",
        weights={"type": "conductor", "period": 1, "learning_rate": 0.1},
        eval_dataset=parts["train_dataset"].select(range(4)),
        **parts,
    )
    assert trainer._head_in_loss
    trainer.train()

    assert len(history(trainer, "entropy")) == 10 and history(trainer, "eval_entropy")
    assert set(history(trainer, "ratio")) <= {0.0, 1.0}  # It is 0 if all responses are truncated.
