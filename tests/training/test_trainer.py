"""The trainer on a user's own files: what it trains, what it leaves behind, what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from maestro_fast.model.rows import Sequences
from maestro_fast.ops import group_advantages
from maestro_fast.records import StepRecord
from maestro_fast.settings import SettingsError, override
from maestro_fast.training import MaestroTrainer, parse_config, train


def run(raw: dict[str, Any], *, resume: bool = False, **changes: Any) -> tuple[MaestroTrainer, list[StepRecord]]:
    for dotted, value in changes.items():
        override(raw, dotted.replace("__", "."), value)
    records: list[StepRecord] = []
    return train(parse_config(raw), raw, resume=resume, observers=[records.append]), records


def parameters(trainer: MaestroTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_a_local_checkpoint_is_trained_and_saved(
    raw_config: dict[str, Any], checkpoint: Callable[..., Path], family: str, tied: bool, lora: dict[str, int] | None
) -> None:
    path = checkpoint(family, tied)
    trainer, records = run(raw_config, model__path=str(path), model__lora=lora, loss__kl_coef=0.01)
    final = Path(raw_config["run_dir"]) / "final"
    before = AutoModelForCausalLM.from_pretrained(path)

    assert [record.step for record in records] == [1, 2]
    assert (final / "weight_policy.safetensors").is_file()
    if lora:
        adapter = load_file(final / "adapter_model.safetensors")
        assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)
        assert not any("lm_head" in name for name in adapter)
    else:
        after = AutoModelForCausalLM.from_pretrained(final)
        assert not torch.equal(after.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
        assert not torch.equal(after.lm_head.weight, before.lm_head.weight)
        assert (after.lm_head.weight is after.model.embed_tokens.weight) == tied
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    "options",
    [{"trainer__bf16": True}, {"model__dtype": "bfloat16"}, {"trainer__activation_checkpointing": True}],
    ids=["autocast", "bfloat16 weights", "activation checkpointing"],
)
@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_transformers_own_options_work(raw_config: dict[str, Any], options: Any, lora: dict[str, int] | None) -> None:
    trainer, _ = run(raw_config, model__lora=lora, loss__kl_coef=0.01, **options)
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]

    assert [line["ratio/mean"] for line in lines] == [1.0, 1.0]
    assert all(math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 for line in lines)


def test_records_hold_the_batch_and_its_advantages(raw_config: dict[str, Any]) -> None:
    _, (record, _) = run(raw_config)

    assert record.reward_names == ("format", "brevity", "entropy")
    assert record.rewards_BK.shape == record.weights_BK.shape == (16, 3)
    assert [record.prompts[i] for i in range(0, 16, 4)] == [record.prompts[i + 3] for i in range(0, 16, 4)]
    assert set(record.families) == {"fact", "opening"}
    torch.testing.assert_close(record.advantages_B.view(4, 4).sum(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(record.weights_BK.sum(1), torch.ones(16))


def test_one_step_follows_the_policy_gradient(raw_config: dict[str, Any], checkpoint: Callable[..., Path]) -> None:
    """One step of SGD is compared with a float64 model that forms all logits."""
    rate = 0.1
    raw_config["trainer"] |= {"max_steps": 1, "optim": "sgd", "learning_rate": rate, "max_grad_norm": 0.0}
    seen: list[Any] = []
    original = MaestroTrainer.compute_loss

    class Spy(MaestroTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(inputs)
            return original(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maestro_fast.training.run.MaestroTrainer", Spy)
        trainer, _ = run(raw_config)
    model = AutoModelForCausalLM.from_pretrained(checkpoint()).double()
    tokens = sum(len(c) for batch in seen for c in batch.sequences.completion_ids)
    loss = sum(_materialised_loss(model, batch.sequences, batch.advantages_B.double()) for batch in seen) / tokens
    loss.backward()

    assert len(seen) == 2
    for (name, ours), theirs in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        assert theirs.grad is not None
        expected = theirs.detach() - rate * theirs.grad
        torch.testing.assert_close(ours.detach().double(), expected, rtol=0, atol=1e-6, msg=name)
        assert theirs.grad.abs().max() > 1e-5, name


def _materialised_loss(model: Any, sequences: Sequences, advantages: torch.Tensor) -> torch.Tensor:
    """The sum over tokens of -A * rho, whose gradient on-policy is -A grad log pi."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt, completion, advantage in zip(sequences.prompt_ids, sequences.completion_ids, advantages, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        total = total - advantage * (logp - logp.detach()).exp().sum()
    return total


@pytest.mark.parametrize("normalization", ["dapo", "grpo"])
def test_the_size_of_micro_batches_does_not_matter(
    raw_config: dict[str, Any], tmp_path: Path, normalization: str
) -> None:
    raw_config["loss"] = {"normalization": normalization}
    raw_config["trainer"]["optim"] = "sgd"
    # the reward is a function of integers, so that a last-bit difference of log-probs does not reach the advantages
    (tmp_path / "own.py").write_text(
        "def mine(completion_ids, **columns):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n",
        encoding="utf-8",
    )
    raw_config |= {"rewards": [f"{tmp_path}/own.py:mine"], "weights": "equal"}
    results = []
    for size in (4, 16):
        raw = json.loads(json.dumps(raw_config)) | {"run_dir": f"{raw_config['run_dir']}-{size}"}
        results.append(parameters(run(raw, batch__micro_batch=size)[0]))

    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "loss",
    [
        {"ratio": "sequence", "normalization": "grpo"},
        {"objective": "cispo", "clip_max": 5.0},
        {"sampler_correction": "token_truncate", "sampler_cap": 2.0},
        {"entropy_coef": 0.01, "normalization": "bnpo"},
    ],
    ids=["gspo", "cispo", "sampler", "entropy"],
)
def test_every_kind_of_loss_trains(raw_config: dict[str, Any], loss: dict[str, Any]) -> None:
    raw_config["trainer"]["max_steps"] = 4
    trainer, _ = run({**raw_config, "loss": loss}, batch__updates_per_batch=2)
    lines = [line for line in trainer.state.log_history if "ratio/mean" in line]

    assert len(lines) == 4
    assert all(math.isfinite(line["loss"]) for line in lines)
    if "sampler_correction" in loss:
        assert lines[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)


def test_the_entropy_bonus_raises_the_entropy(raw_config: dict[str, Any]) -> None:
    raw_config |= {"rewards": ["entropy"], "weights": "equal"}
    raw_config["trainer"] |= {"max_steps": 4, "learning_rate": 0.02}
    means = []
    for coefficient in (0.0, 1.0):
        raw = {**raw_config, "run_dir": f"{raw_config['run_dir']}-{coefficient}", "loss": {"entropy_coef": coefficient}}
        trainer, _ = run(raw)
        means.append([line["entropy"] for line in trainer.state.log_history if "entropy" in line][-1])

    assert means[1] > means[0]


def test_several_updates_per_batch_use_the_log_probs_of_the_sampling_policy(raw_config: dict[str, Any]) -> None:
    raw_config["trainer"] |= {"max_steps": 4, "learning_rate": 0.05}
    trainer, records = run(raw_config, batch__updates_per_batch=2)
    ratios = [line["ratio/mean"] for line in trainer.state.log_history if "ratio/mean" in line]

    assert [record.step for record in records] == [1, 3]
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)
    assert abs(ratios[1] - 1.0) > 1e-3


@pytest.mark.parametrize("profile", ["maestro", "grpo"])
def test_the_kl_enters_once_and_is_zero_at_the_reference(raw_config: dict[str, Any], profile: str) -> None:
    raw_config["trainer"]["learning_rate"] = 0.0
    _, with_kl = run({**raw_config, "advantages": {"profile": profile}}, loss__kl_coef=0.5)
    plain = {**raw_config, "run_dir": raw_config["run_dir"] + "-plain", "advantages": {"profile": profile}}
    _, without = run(plain)

    for one, other in zip(with_kl, without, strict=True):
        torch.testing.assert_close(one.advantages_B, other.advantages_B, rtol=0, atol=1e-4)


def test_a_profile_over_tokens_gets_the_lengths_of_the_completions(raw_config: dict[str, Any]) -> None:
    _, records = run({**raw_config, "advantages": {"profile": "verl_gdpo"}})
    for record in records:
        group_size = raw_config["sampling"]["group_size"]
        expected = group_advantages(
            record.rewards_BK, record.weights_BK, group_size, lengths=record.lengths_B, profile="verl_gdpo"
        )
        torch.testing.assert_close(record.advantages_B, expected.advantages)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rewards": ["entropy", "format", {"type": "length", "name": "brevity", "target": 2}]}, "of rewards .*format"),
        ({"weights": "random"}, "of policy conductor, this run has random"),
    ],
)
def test_a_run_resumed_with_other_rewards_or_policy_is_refused(
    raw_config: dict[str, Any], changes: dict[str, Any], complaint: str
) -> None:
    raw_config["trainer"] |= {"max_steps": 1, "save_steps": 1}
    run(raw_config)

    with pytest.raises(ValueError, match=rf"resume_from_checkpoint: .* is {complaint}"):
        run({**raw_config, **changes, "trainer": {**raw_config["trainer"], "max_steps": 2}}, resume=True)


def test_a_run_is_reproducible(raw_config: dict[str, Any]) -> None:
    first, _ = run(raw_config)
    second, _ = run({**raw_config, "run_dir": raw_config["run_dir"] + "-again"})

    for name, value in parameters(first).items():
        assert torch.equal(parameters(second)[name], value), name


@pytest.mark.parametrize(
    "weights", ["equal", "random", {"type": "static", "values": {"format": 1, "brevity": 2, "entropy": 0}}]
)
def test_every_weight_policy_trains(raw_config: dict[str, Any], weights: Any) -> None:
    _, records = run({**raw_config, "weights": weights})

    assert len(records) == 2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"weights": {"type": "static", "values": {"tone": 1}}}, r"^weights\.values\.tone: there is no such reward"),
        ({"weights": "conducter"}, r"^weights\.type: 'conducter', expected one of"),
        ({"sampling": {"group_size": 1}}, r"^sampling\.group_size: 1, expected at least 2"),
        ({"batch": {"prompts_per_batch": 32}}, r"^batch\.prompts_per_batch: 32, but the data holds 16 prompts"),
        ({"data": {"path": "none.jsonl"}}, r"^data\.path: no file none\.jsonl"),
        ({"rewards": ["niceness"]}, "niceness"),
        ({"advantages": {"profile": "ppo"}}, "^advantages\\.profile: 'ppo', expected one of maestro"),
    ],
)
def test_bad_settings_are_named_before_anything_is_trained(
    raw_config: dict[str, Any], changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises((SettingsError, ValueError, FileNotFoundError), match=complaint):
        run({**raw_config, **changes})
    assert not (Path(raw_config["run_dir"]) / "config.yaml").exists()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [("[1.0]", "1 .*16"), ("[float('inf')] * len(completions)", "inf"), ("[float('nan')] * len(completions)", "nan")],
)
def test_a_faulty_reward_is_named(raw_config: dict[str, Any], tmp_path: Path, values: str, complaint: str) -> None:
    (tmp_path / "own.py").write_text(f"def mine(completions, **columns):\n    return {values}\n", encoding="utf-8")
    raw_config["rewards"] = ["format", f"{tmp_path}/own.py:mine"]

    with pytest.raises(ValueError, match=f"(?i)mine.*{complaint}"):
        run(raw_config)


def test_a_reward_that_fails_late_costs_no_finished_step(raw_config: dict[str, Any], tmp_path: Path) -> None:
    source = (
        "calls = 0\n"
        "def mine(completions, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [float('inf') if calls == 3 else float(len(c)) for c in completions]\n"
    )
    (tmp_path / "own.py").write_text(source, encoding="utf-8")
    raw_config["rewards"] = ["format", f"{tmp_path}/own.py:mine"]
    raw_config["trainer"]["max_steps"] = 4

    with pytest.raises(ValueError, match=r"mine.*inf") as caught:
        run(raw_config)
    note = caught.value.__notes__[-1]
    assert "checkpoint-2; mend the cause and go on with --resume" in note

    (tmp_path / "own.py").write_text(source.replace("calls == 3", "False"), encoding="utf-8")
    trainer, records = run(raw_config, resume=True)
    assert [record.step for record in records] == [3, 4]
    assert trainer.state.global_step == 4


def test_a_user_function_gets_the_columns(raw_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "async def mine(prompts, completions, reference, **columns):\n"
        "    return [float(r in c) if p.startswith('Name') else None\n"
        "            for p, c, r in zip(prompts, completions, reference)]\n",
        encoding="utf-8",
    )
    raw_config["rewards"] = ["format", f"{tmp_path}/own.py:mine"]
    _, (record, _) = run(raw_config)

    asked = torch.tensor([str(prompt).startswith("Name") for prompt in record.prompts])
    assert torch.equal(record.rewards_BK[:, 1].isnan(), ~asked)


def test_chat_prompts_are_trained_on(raw_config: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": text}], "reference": "red"} for text in ("Name a colour.", "Sing.") * 8
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    raw_config["rewards"] = ["format", {"name": "perplexity", "require_format": False}]
    _, (record, _) = run(raw_config, data__path=str(tmp_path / "chat.jsonl"))

    assert isinstance(record.completions[0], list)
    assert record.completions[0][0]["role"] == "assistant"
    assert record.rewards_BK[:, 1].isfinite().all()
