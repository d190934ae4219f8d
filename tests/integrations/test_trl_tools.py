"""Tools, environments and rollouts of several turns: TRL runs them, and ours weighs, reads and trains what comes back.

A random model never calls a tool, so ``generate`` is replaced by a script, and all that follows is TRL's own.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer
from trl import chat_template_utils as trl_templates

from maestro_fast.integrations.trl import MaestroGRPOTrainer
from maestro_fast.model import Layouts
from tests.integrations.test_trl_context import Spy, expected_states
from tests.integrations.test_trl_loss import by_head, by_logprobs, computed, gap
from tests.integrations.test_trl_training import CONDUCTOR, FREE, history
from tests.tiny import TEXT, tiny_model

Make = Callable[..., Any]

newest = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"),
    reason="older TRL renders tool calls by another template, and knows neither rollout functions without vLLM nor "
    "environments that own a reward",
)
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.13") and find_spec("jmespath") is None,
    reason="older transformers reads tool calls by jmespath",
)
RESULT = "the sea was wide"
VOCABULARY = 768  # so many that the template's words about tools are few tokens


def look_up(topic: str) -> str:
    """Looks a topic up.

    Args:
        topic: the topic.
    """
    return RESULT if topic == "sea" else 1 / 0  # type: ignore[return-value]


def call(topic: str) -> str:
    return f'<tool_call>\n{{"name": "look_up", "arguments": {{"topic": "{topic}"}}}}\n</tool_call>'


# What the policy writes in each turn, for the eight responses; "" stands for those that have called no tool.
TURNS = [
    [call("sea"), "red", call("sea"), call("night"), "the fox", call("sea"), "a", "red dog"],
    ["wide", call("night"), "lazy", "the sea"],
    ["long"],
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the chat template of Qwen3, whose tool calls TRL can read."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|pad|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    template = trl_templates.qwen3_chat_template
    schema = '{"type": "function", "function": {"name": "look_up", "description": "Looks a topic up.", "parameters": {'
    core.train_from_iterator([*TEXT, call("sea"), schema, template], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=template
    )


def parity(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(sum(ids) % 5) for ids in completion_ids]


def answered(completions: list[Any], **columns: Any) -> list[float]:
    """1 for each word of the last message; the completions are conversations, with the tools' messages."""
    return [float(len(completion[-1].get("content", "").split())) for completion in completions]


@pytest.fixture
def build(settings: Make, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a trainer whose policy writes TURNS in every generation batch."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # It only silences a warning of TRL's.

    def make(kind: type = MaestroGRPOTrainer, turns: list[list[str]] = TURNS, **options: Any) -> Any:
        model = tiny_model()
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        model.config.max_position_embeddings = 4096
        rows = [{"prompt": [{"role": "user", "content": text}], "topic": text} for text in ("the sea", "a red dog")]
        args = settings(max_completion_length=240, **options.pop("changes", {}))
        trainer = kind(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows * 4),
            reward_funcs=options.pop("reward_funcs", [parity, answered]),
            **options,
        )
        trainer.model.generate = Script(tokenizer, turns)
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


class Script:
    """Stands for ``model.generate``: writes the turns one after another, and begins anew behind the last one."""

    def __init__(self, tokenizer: Any, turns: list[list[str]]) -> None:
        self.tokenizer, self.turns, self.calls = tokenizer, turns, 0

    def __call__(self, input_ids: Tensor, **_: Any) -> Tensor:
        texts = self.turns[self.calls % len(self.turns)]
        self.calls += 1
        assert len(texts) == len(input_ids)
        ids = [torch.tensor(self.tokenizer(text + "<|im_end|>")["input_ids"]) for text in texts]
        rows = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return torch.cat([input_ids, rows], dim=1)


def batch_of(trainer: Any) -> dict[str, Any]:
    """A generation batch of two groups."""
    trainer.model.train()
    rows = [trainer.train_dataset[i] for i in (0, 1) for _ in range(4)]
    output: dict[str, Any] = trainer._generate_and_score_completions(rows)
    return output


def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Rollouts of a user's own. The environment speaks in the middle of each, and has the last word in every other."""
    generator = torch.Generator().manual_seed(len(prompts))
    prompt_ids = trainer.processing_class.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
    completion_ids, masks = [], []
    for row in range(len(prompts)):
        length = 9 + 2 * row
        completion_ids.append(torch.randint(3, 320, (length,), generator=generator).tolist())
        masks.append([1] * 4 + [0] * 3 + [1] * (length - 9) + [row % 2] * 2)
    logprobs = [[-1.0] * len(ids) for ids in completion_ids]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs, "env_mask": masks}


SOURCES: dict[str, dict[str, Any]] = {"tools": {"tools": [look_up]}, "rollouts": {"rollout_func": rollout}}


@pytest.fixture(params=["tools", pytest.param("rollouts", marks=newest)])
def source(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SOURCES[request.param]


class Keeping(MaestroGRPOTrainer):
    """Keeps what was generated."""

    def _generate(self, prompts: Any) -> Any:
        out = super()._generate(prompts)
        self.prompt_ids, self.completion_ids, self.masks, self.completions = out[:4]
        return out


@newest
def test_what_the_tests_are_about(build: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    """Three responses call a tool once, one calls it twice, and four call none; one call fails."""
    trainer = build(Keeping, tools=[look_up])
    output = batch_of(trainer)

    roles = [[message["role"] for message in completion] for completion in trainer.completions]
    assert roles[2] == ["assistant", "tool"] * 2 + ["assistant"]
    assert [len(own) for own in roles] == [3, 1, 5, 3, 1, 3, 1, 1]
    written = [
        tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if own])
        for ids, mask in zip(trainer.completion_ids, trainer.masks, strict=True)
    ]
    assert written[0] == f"{call('sea')}<|im_end|>wide<|im_end|>" and written[4] == "the fox<|im_end|>"
    counted = output["completion_mask"] * output["tool_mask"]
    assert output["num_items_in_batch"] == counted.sum() < output["completion_mask"].sum()
    assert trainer._metrics["train"]["tools/call_frequency"] == [5 / 8]
    assert trainer._metrics["train"]["completions/mean_length"] == [counted.sum() / 8]


@pytest.mark.parametrize("free", [True, False], ids=["read off TRL's forward", "a forward of its own"])
def test_the_context_is_the_state_behind_the_last_token_whoever_wrote_it(
    build: Make, source: dict[str, Any], free: bool
) -> None:
    trainer = build(Keeping, weights=Spy(), changes=FREE if free else {}, **source)
    batch_of(trainer)

    (seen,) = trainer.weight_policy.seen
    expected = expected_states(trainer.model, trainer.prompt_ids, trainer.completion_ids)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [{"loss_type": "dapo"}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}],
    ids=["dapo", "sequence"],
)
def test_loss_gradient_and_entropy_are_trls_under_its_mask(
    build: Make, source: dict[str, Any], case: dict[str, Any]
) -> None:
    trainer = build(loss="maestro_fast", changes={**case, "temperature": 0.7}, **source)
    inputs = batch_of(trainer)
    assert trainer._head_in_loss and "tool_mask" in inputs and bool(inputs["advantages"].any())
    theirs = computed(trainer, lambda: GRPOTrainer._compute_loss(trainer, trainer.model, inputs))

    ours = {"log-probs of TRL's forward": by_logprobs(trainer, inputs)}
    for sharing in ("never", "always"):
        trainer._layouts = Layouts("padded", sharing)
        ours[sharing] = by_head(trainer, inputs)
    for way, found in ours.items():
        torch.testing.assert_close(found[0], theirs[0], rtol=1e-5, atol=1e-7, msg=way)
        assert gap(found[1], theirs[1]) < 1e-5, way
        assert found[2]["entropy"] == pytest.approx(theirs[2]["entropy"], rel=1e-5), way
    unmasked = computed(
        trainer,
        lambda: GRPOTrainer._compute_loss(trainer, trainer.model, {**inputs, "tool_mask": inputs["completion_mask"]}),
    )
    assert gap(unmasked[1], theirs[1]) > 1e-2, "the mask makes no difference here"


def test_equal_weights_leave_everything_as_trl_has_it(build: Make, source: dict[str, Any]) -> None:
    trainers = [build(kind, **source) for kind in (GRPOTrainer, MaestroGRPOTrainer)]
    theirs, ours = (batch_of(trainer) for trainer in trainers)

    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    log = trainers[1]._metrics["train"]
    for name, value in trainers[0]._metrics["train"].items():
        assert log[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


class Sea:
    """An environment of two turns that owns a reward."""

    def reset(self, **columns: Any) -> str:
        self.asked = 0
        return " Look it up."

    def look_up(self, topic: str) -> str:
        """Looks a topic up.

        Args:
            topic: the topic.
        """
        self.asked += 1
        return look_up(topic)

    def get_reward(self) -> float:
        return float(self.asked)


@newest
@pytest.mark.parametrize(
    ("loss", "context"), [("trl", FREE), ("maestro_fast", {})], ids=["TRL's loss", "our loss from hidden states"]
)
def test_the_conductor_trains_on_an_environment(build: Make, loss: str, context: dict[str, Any]) -> None:
    """The environment's own reward is one of the rewards that are weighed."""
    trainer = build(
        environment_factory=Sea,
        weights=CONDUCTOR,
        profile="maestro",
        loss=loss,
        reward_funcs=[parity],
        changes={"max_steps": 2, **context},
    )
    before = [value.clone() for value in trainer.model.parameters()]
    trainer.train()

    assert trainer._reward_names == ("parity", "Sea")
    assert history(trainer, "rewards/Sea/mean")[0] == 5 / 8
    assert history(trainer, "tools/call_frequency")[0] == 5 / 8
    assert trainer.weight_policy.state_dict()["weight"].abs().max() > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    if loss == "maestro_fast" and not context:
        log = next(line for line in trainer.state.log_history if "tokens/of_sequences" in line)
        assert log["tokens/computed"] < log["tokens/of_sequences"]  # The responses have shared their prompt.
