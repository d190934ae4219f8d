"""Inside TRL, too, responses share their prompt in our forwards, and nothing but the rounding changes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl import GRPOTrainer
from trl.trainer import utils as trl_utils

from maestro_fast.integrations.trl import MaestroGRPOMixin, MaestroGRPOTrainer
from maestro_fast.integrations.trl import loss as loss_page
from maestro_fast.integrations.trl.sharing import regrouped, sequences_to_read
from maestro_fast.model import Layouts
from maestro_fast.ops import LossInputs
from tests.integrations.conftest import checkpointing_field
from tests.integrations.test_trl_context import Spy, expected_states, one_batch
from tests.integrations.test_trl_loss import by_head, by_logprobs, gap, make
from tests.integrations.test_trl_training import history

Make = Callable[..., Any]
ALWAYS = Layouts("padded", "always")


def rows(ids: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Pads as TRL does; returns the ids and their mask."""
    pad = trl_utils.pad
    side = "left" if left else "right"
    masks = [torch.ones(len(row), dtype=torch.int64) for row in ids]
    return pad([torch.tensor(row) for row in ids], 1, side), pad(masks, 0, side)


def ragged(seed: int = 0) -> dict[str, Any]:
    """Groups of 4, 2, 1 and 1. Two prompts begin alike, a tool answers twice, a response is hidden and one is empty."""
    generator = torch.Generator().manual_seed(seed)

    def sample(length: int) -> list[int]:
        return torch.randint(2, 320, (length,), generator=generator).tolist()

    long = sample(60)
    prompts = [*[sample(40)] * 4, *[sample(25)] * 2, long, long[:30] + sample(9)]
    completions = [sample(length) for length in (12, 3, 1, 9, 0, 7, 12, 5)]
    order = [6, 0, 4, 1, 7, 2, 5, 3]
    prompt_ids, prompt_mask = rows([prompts[i] for i in order], left=True)
    completion_ids, completion_mask = rows([completions[i] for i in order], left=False)
    completion_mask[order.index(3)] = 0  # As mask_truncated_completions does.
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[order.index(0), 4:7] = 0
    tool_mask[order.index(5), 5:] = 0  # The response ends with what a tool said.
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.randn(8, generator=generator),
        "num_items_in_batch": (completion_mask * tool_mask).sum(),
    }


# --- the loss ---


@pytest.mark.parametrize("kind", ["whole model", "adapter", "checkpointing", "adapter, checkpointing"])
def test_loss_and_gradients_are_those_of_padded_rows(settings: Make, ingredients: Make, kind: str) -> None:
    parts = ingredients()
    if "adapter" in kind:
        peft = pytest.importorskip("peft")
        parts["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = make(settings, lambda: parts, loss_type="dapo")
    if "checkpointing" in kind:
        getattr(trainer.model, f"{checkpointing_field()}_enable")({"use_reentrant": False})
        assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    inputs = ragged()
    results = {}
    for layouts in (ALWAYS, Layouts("padded")):
        trainer._layouts = layouts
        layouts.count.pop()
        results[layouts.sharing] = by_head(trainer, inputs)
    theirs = by_logprobs(trainer, inputs)

    # The tokens of four prompts and of what the loss reads of the completions; padding fills the rows.
    assert ALWAYS.count.of_sequences == 4 * 40 + 2 * 25 + 60 + 39 + 11 + 2 + 0 + 0 + 0 + 4 + 11 + 4
    assert 9 + 25 + 60 + 40 + 32 <= ALWAYS.count.computed <= 0.6 * ALWAYS.count.of_sequences
    for expected in (results["never"], theirs):
        torch.testing.assert_close(results["always"][0], expected[0], rtol=1e-5, atol=1e-7)
        assert gap(results["always"][1], expected[1]) < 1e-5
        for name, values in expected[2].items():
            assert results["always"][2][name] == pytest.approx(values, rel=1e-5, abs=1e-7), name


def test_what_the_model_reads() -> None:
    prompt_ids, prompt_mask = rows([[5], [6, 7, 8], [6, 7, 8]], left=True)
    completion_ids, completion_mask = rows([[11, 12, 13], [14, 15], [16, 17, 18]], left=False)
    counted = completion_mask * torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0]])
    inputs = dict(
        zip(
            ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
            (prompt_ids, prompt_mask, completion_ids, completion_mask),
            strict=True,
        )
    )
    sequences, predicting = sequences_to_read(inputs, counted.bool())

    assert sequences.prompt_ids == [[5], [6, 7, 8], [6, 7, 8]]
    assert sequences.completion_ids == [[11, 12], [], []]
    packed = [token for tokens in sequences.tokens for token in tokens]
    assert [packed[i] for i in predicting] == [5, 12, 8]


@pytest.mark.parametrize(
    ("name", "place", "said"),
    [
        ("prompt_mask", (0, -1), "prompt_mask: .* in row 0"),
        ("prompt_mask", (3, -5), "prompt_mask: .* in row 3"),
        ("completion_mask", (1, 2), "completion_mask: hides a token of row 1"),
    ],
)
def test_a_mask_that_hides_more_than_padding_is_refused(name: str, place: tuple[int, int], said: str) -> None:
    inputs = ragged()
    inputs[name][place] = 0
    with pytest.raises(ValueError, match=said):
        sequences_to_read(inputs, (inputs["completion_mask"] * inputs["tool_mask"]).bool())


def test_a_model_without_any_layout_keeps_trls_forward(
    settings: Make, ingredients: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_trainer: Any) -> Layouts:
        raise ValueError("model: Odd fails on a few padded tokens")

    monkeypatch.setattr(loss_page, "layouts_of", fail)
    with caplog.at_level(logging.INFO, logger="maestro_fast"):
        trainer = make(settings, ingredients)

    assert not trainer._head_in_loss
    assert "from the log-probs of TRL's forward: model: Odd fails" in caplog.text


# --- hidden states for the weights ---


def test_completions_without_any_token_are_read() -> None:
    prompt_ids, prompt_mask = rows([[5, 6], [7]], left=True)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
    inputs |= {"completion_ids": nothing, "completion_mask": nothing}
    sequences, predicting = sequences_to_read(inputs, nothing.bool())
    assert sequences.tokens == [[5, 6], [7]] and predicting.numel() == 0


def test_the_forward_for_hidden_states_shares_prompts(settings: Make, ingredients: Make) -> None:
    class Keeping(MaestroGRPOTrainer):
        def _generate(self, prompts: Any) -> Any:
            out = super()._generate(prompts)
            self.ids = out[:2]
            return out

    trainer = Keeping(args=settings(), weights=Spy(), **ingredients())
    assert trainer._layouts.sharing == "auto"
    trainer._layouts = Layouts("packed", "always")
    one_batch(trainer)

    (seen,) = trainer.weight_policy.seen
    torch.testing.assert_close(seen, expected_states(trainer.model, *trainer.ids), rtol=1e-4, atol=1e-5)
    count = trainer._layouts.count
    assert count.computed < count.of_sequences == sum(len(ids) for part in trainer.ids for ids in part)


# --- the micro-batches of an update ---


def test_all_that_belongs_to_a_response_moves_with_it() -> None:
    batch = ragged()
    numbers = torch.arange(8)
    whole = {**batch, "number": numbers, "text": list("abcdefgh"), "tokens": numbers[:, None] + torch.zeros(8, 3)}
    whole |= {"num_items_in_batch": torch.tensor(29), "nothing": None}
    parts = trl_utils.split_tensor_dict(whole, 4)
    found = regrouped(parts)

    assert [part.keys() for part in found] == [whole.keys()] * 4
    assert all(part["num_items_in_batch"] == 29 and part["nothing"] is None for part in found)
    order = torch.cat([part["number"] for part in found])
    assert sorted(order.tolist()) == list(range(8))
    for name in ("prompt_ids", "completion_ids", "completion_mask", "tool_mask", "advantages", "tokens"):
        assert torch.equal(torch.cat([part[name] for part in found]), whole[name][order]), name
        assert all(part[name].shape[0] == 2 for part in found), name
    assert [text for part in found for text in part["text"]] == ["abcdefgh"[i] for i in order]
    prompts = [tuple(row) for row in whole["prompt_ids"][order].tolist()]
    changes = sum(a != b for a, b in itertools.pairwise(prompts))
    assert changes == len(set(prompts)) - 1


def trained(settings: Make, ingredients: Make, *, regroups: bool, resume: int | None = None, **changes: Any) -> Any:
    """Trains with micro-batches of two, and keeps those in ``trained_on``."""
    parts = ingredients()
    parts["train_dataset"] = parts["train_dataset"].map(
        lambda row: {"prompt": row["prompt"] + " and so on, and on, and on" * 3}
    )
    values: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
    }
    trainer: Any = MaestroGRPOTrainer(args=settings(**values | changes), loss="maestro_fast", **parts)
    assert trainer._regroups
    trainer._regroups = regroups
    prepare, trainer.trained_on = trainer._prepare_inputs, []

    def watched(generation_batch: Any) -> Any:
        trainer.trained_on.append(prepare(generation_batch))
        return trainer.trained_on[-1]

    trainer._prepare_inputs = watched
    folder = None if resume is None else f"{trainer.args.output_dir}/checkpoint-{resume}"
    trainer.train(resume_from_checkpoint=folder)
    return trainer


@pytest.mark.parametrize(
    "changes",
    [{}, {"steps_per_generation": 2, "num_iterations": 2, "num_generations": 2, "loss_type": "grpo"}],
    ids=["a batch for each update", "a batch used twice in an update"],
)
def test_an_update_is_that_of_scattered_responses(settings: Make, ingredients: Make, changes: dict[str, Any]) -> None:
    scattered, together = (
        trained(settings, ingredients, regroups=regroups, max_steps=1, **changes) for regroups in (False, True)
    )

    def seen(trainer: Any) -> list[list[int]]:
        return sorted(
            [*ids.tolist(), *completion.tolist(), round(float(advantage) * 1e4)]
            for batch in trainer.trained_on
            for ids, completion, advantage in zip(
                batch["prompt_ids"], batch["completion_ids"], batch["advantages"], strict=True
            )
        )

    assert len(together.trained_on) == 4 and seen(together) == seen(scattered)
    # A micro-batch has two responses, of the four or two to a prompt.
    assert all(len({tuple(row) for row in batch["prompt_ids"].tolist()}) == 1 for batch in together.trained_on)
    for (name, ours), theirs in zip(together.model.named_parameters(), scattered.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    computed = [history(trainer, "tokens/computed")[0] for trainer in (scattered, together)]
    assert computed[1] < 0.7 * history(together, "tokens/of_sequences")[0]
    assert computed[1] < computed[0]


def test_a_killed_run_goes_on_with_the_same_micro_batches(settings: Make, ingredients: Make) -> None:
    whole = trained(settings, ingredients, regroups=True, save_strategy="steps", save_steps=1)
    again = trained(settings, ingredients, regroups=True, resume=1)

    assert [len(trainer.trained_on) for trainer in (whole, again)] == [8, 4]
    for ours, theirs in zip(again.trained_on, whole.trained_on[4:], strict=True):
        assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    for (name, ours), theirs in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def own_loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return -inputs.logprobs.sum() / inputs.normalizer, {}


class Own(GRPOTrainer):
    def _prepare_inputs(self, generation_batch: Any) -> Any:
        return super()._prepare_inputs(generation_batch)


class Behind(MaestroGRPOMixin, Own):
    pass


class Before(MaestroGRPOTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Tensor:
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


@pytest.mark.parametrize(
    ("trainer", "changes", "said"),
    [
        (MaestroGRPOTrainer, {}, "stand together"),
        (MaestroGRPOTrainer, {"loss_type": "cispo"}, "stand together"),
        (MaestroGRPOTrainer, {"loss_type": "bnpo"}, "scattered as TRL shuffles them: loss_type bnpo"),
        (MaestroGRPOTrainer, {"entropy_coef": 0.1}, "scattered as TRL shuffles them: entropy_coef"),
        (MaestroGRPOTrainer, {"loss": own_loss}, "a loss of your own may"),
        (Before, {}, "Before.compute_loss is overridden"),
        (Behind, {}, "Own._prepare_inputs is overridden"),
        (MaestroGRPOTrainer, {"steps_per_generation": 1}, None),
        (MaestroGRPOTrainer, {"steps_per_generation": 4}, None),  # TRL scores old log-probs.
    ],
)
def test_where_responses_stand_is_said(
    settings: Make,
    ingredients: Make,
    caplog: pytest.LogCaptureFixture,
    trainer: type,
    changes: dict[str, Any],
    said: str | None,
) -> None:
    values = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, **changes}
    loss = values.pop("loss", "maestro_fast")
    if "entropy_coef" in changes and "entropy_coef" not in type(settings()).__dataclass_fields__:
        pytest.skip("this TRL has no entropy_coef")
    with caplog.at_level(logging.INFO, logger="maestro_fast"):
        made = trainer(args=settings(**values), loss=loss, **ingredients())
    lines = [record.message for record in caplog.records if record.message.startswith("micro-batches")]

    assert made._regroups is (said == "stand together")
    assert len(lines) == (said is not None) and (said is None or said in lines[0])
