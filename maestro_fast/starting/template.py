"""The text of the config that ``maestro-fast init`` writes: settings with their reasons, and alternatives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maestro_fast.data import PromptDataset
from maestro_fast.data.files import Row
from maestro_fast.model.chat import ChatConfig

_BEHIND = 46  # the column in which reasons begin, where the setting is not longer
_ANSWERS = ("answer", "reference", "solution", "label", "target", "output", "response", "ground_truth")


@dataclass(frozen=True)
class Choices:
    """Everything that the text depends on.

    Attributes:
        out, model, data: where the file stands, and the paths as they stand in it.
        rewards, weights: the entries of the rewards, and the weight policy.
        prompt_column, family_column, columns: the columns of the data; ``columns`` has the first value of the others.
        system_prompt: the system prompt, or None.
        lora: whether an adapter trains, and not all weights.
        parameters: the number of parameters, in words.
        device: the kind of device.
        vllm: whether vLLM samples.
        rows, lengths, positions: the number of prompts, their median, 95 % and largest length, and the positions.
        max_new_tokens, prompts_per_batch, group_size, micro_batch: the sizes of a step.
    """

    out: Path
    model: str
    data: str
    rewards: Sequence[dict[str, Any] | str]
    weights: str
    prompt_column: str
    family_column: str | None
    columns: dict[str, str]
    system_prompt: str | None
    lora: bool
    parameters: str
    device: str
    vllm: bool
    rows: int = 0
    lengths: tuple[int, int, int] = (0, 0, 0)
    positions: int | None = None
    max_new_tokens: int = 0
    prompts_per_batch: int = 1
    group_size: int = 2
    micro_batch: int = 1

    def dataset(self, rows: Sequence[Row]) -> PromptDataset:
        """The data set of the run."""
        return PromptDataset(
            rows, self.prompt_column, self.family_column, ChatConfig(self.system_prompt), field="--data"
        )


@dataclass
class _Lines:
    """Lines of a YAML file, with the reasons in one column."""

    lines: list[str] = field(default_factory=list)

    def add(self, setting: str, reason: str = "") -> None:
        self.lines.append(f"{setting:<{_BEHIND}}  # {reason}" if reason else setting)

    def say(self, *sentences: str) -> None:
        self.lines += [f"# {sentence}" if sentence else "" for sentence in sentences]


def written(chosen: Choices) -> str:
    """The text of the config."""
    lines = _Lines()
    lines.say(
        "Written by maestro-fast init. All settings: maestro-fast train --help. Paths start in this file's folder.",
        f"maestro-fast check {chosen.out.name}    tries it    maestro-fast train {chosen.out.name}    trains",
        "",
    )
    lines.add(f"run_dir: runs/{chosen.out.stem}", "everything that the run writes; it must be new")
    for part in (_model, _data, _rewards, _sampling, _trainer, _alternatives):
        lines.lines.append("")
        part(chosen, lines)
    return "\n".join(line.rstrip() for line in lines.lines) + "\n"


def _text(value: Any) -> str:
    """A value as YAML within a line, which JSON is."""
    return json.dumps(value, ensure_ascii=False) if not _plain(value) else str(value)


def _plain(value: Any) -> bool:
    """Whether a text needs no quotes in a YAML flow mapping."""
    return (
        isinstance(value, str) and bool(value) and all(c.isalnum() or c in "_-./" for c in value) and value[0].isalpha()
    )


def _flow(entry: dict[str, Any] | str) -> str:
    if isinstance(entry, str):
        return _text(entry)
    return "{" + ", ".join(f"{name}: {_text(value)}" for name, value in entry.items()) + "}"


def _model(chosen: Choices, lines: _Lines) -> None:
    lines.add("model:")
    lines.add(f"  path: {_text(chosen.model)}", f"{chosen.parameters} parameters")
    if chosen.lora:
        lines.add("  lora: {r: 16}", "an adapter: all weights with Adam would not fit here")
    else:
        lines.add("  # lora: {r: 16}", "trains an adapter alone; all weights fit here")
    lines.add("  # attention: auto", "auto takes the fastest that serves, see maestro-fast info")
    lines.add("  # dtype: auto", "float32 trains best; GPUs compute in bfloat16 (trainer.bf16)")


def _data(chosen: Choices, lines: _Lines) -> None:
    median, most_have, longest = chosen.lengths
    lines.add("data:")
    lines.add(f"  path: {_text(chosen.data)}", f"{chosen.rows} prompts of {median} (median) to {longest} tokens")
    lines.add(f"  prompt_column: {_text(chosen.prompt_column)}", "text, or a list of messages")
    if chosen.family_column is not None:
        lines.add(f"  family_column: {_text(chosen.family_column)}", "what sorts prompts in logs and reports")
    else:
        lines.add("  # family_column: family", "a column that sorts prompts in logs and reports")
    lines.add(f"  # max_prompt_tokens: {most_have}", "95 % of the prompts have no more")
    others = "; ".join(f"{name} ({value})" for name, value in chosen.columns.items())
    lines.say(f"  The rewards may read the other columns: {others}" if others else "  There are no other columns.")
    if chosen.system_prompt is not None:
        lines.add("chat:")
        lines.add(f"  system_prompt: {json.dumps(chosen.system_prompt, ensure_ascii=False)}")
        lines.say("  ^ With it, prompts go through the model's chat template, as the model was trained to read them.")
    held_out = max(1, min(chosen.rows // 10, 100))
    lines.say(
        "Mean rewards on held-out prompts at every checkpoint. Put some rows into a file of their own, for example the",
        f"last {held_out} (tail -n {held_out}), and take them out of data.path:",
        "evaluation: {data: {path: held_out.jsonl}, samples: 2}",
    )


def _rewards(chosen: Choices, lines: _Lines) -> None:
    lines.add("rewards:")
    for entry in chosen.rewards:
        name = entry if isinstance(entry, str) else str(entry.get("type"))
        lines.add(f"  - {_flow(entry)}", _REASONS.get(name, "a function of your own" if ":" in name else ""))
    answer = next((name for name in chosen.columns if name.lower() in _ANSWERS), None)
    argument = answer or "answer"
    lines.say(
        "  A reward of your own is a function in a file beside this one:",
        f"    def score(completions, {argument if argument.isidentifier() else '**columns'}, **kwargs):"
        "    # lists, one entry for each response",
        "        return [1.0, None, ...]                     # a number for each; None abstains",
        '  - "my_rewards.py:score"',
        "  Others: {type: preference, model: path/to/reward-model}, {type: judge, ...}, entropy, perplexity, nover.",
        "  Each may have a name, `where: {family: [poem]}`, a `gate`, a `timeout: 30` and `on_error: abstain`.",
    )
    lines.add(f"weights: {chosen.weights}", _WEIGHTS.get(chosen.weights, "see maestro-fast train --help"))
    lines.add("# weights: equal", "the baseline: compare with it") if chosen.weights != "equal" else None
    lines.say("weights: {type: static, values: {format: 1, length: 0.5}}")


_REASONS = {
    "format": "1 for <think> ... </think> <answer> ... </answer>; it works on any data",
    "length": "0 up to half of max_new_tokens, then falling; it works on any data",
}
_WEIGHTS = {
    "conductor": "a small network learns the weight of each reward for each response",
    "equal": "every reward counts the same",
}


def _sampling(chosen: Choices, lines: _Lines) -> None:
    G, responses = chosen.group_size, chosen.group_size * chosen.prompts_per_batch
    room = "the model names no limit" if chosen.positions is None else f"the model has {chosen.positions:,} positions"
    lines.add("sampling:")
    lines.add(f"  group_size: {G}", "responses to each prompt, which are compared with each other")
    lines.add(f"  max_new_tokens: {chosen.max_new_tokens}", f"{room}; longer is slower")
    lines.add("  temperature: 1.0", "below 1 the responses of a group become alike")
    lines.add("batch:")
    lines.add(f"  prompts_per_batch: {chosen.prompts_per_batch}", f"{responses} responses in a step")
    lines.add(f"  micro_batch: {chosen.micro_batch}", "responses in one forward; what fits, by maestro-fast check")
    lines.add("  # no_signal: refill", "other prompts in place of those whose responses score alike (DAPO)")
    lines.add("  # truncated: mask", "leaves responses that were cut off out of the loss")
    if chosen.vllm:
        lines.add("generation: vllm", "installed here; samples much faster than transformers")
        lines.add("# generation: transformers", "the policy itself samples")
    else:
        lines.add("generation: transformers", "the policy itself samples; vllm is faster, on a GPU")
        lines.add("# generation: vllm")


def _trainer(chosen: Choices, lines: _Lines) -> None:
    rate = "1.0e-5" if chosen.lora else "1.0e-6"
    lines.add("trainer:", "fields of transformers.TrainingArguments")
    lines.add(f"  learning_rate: {rate}", "the default for " + ("LoRA" if chosen.lora else "all weights"))
    batches = max(1, chosen.rows // chosen.prompts_per_batch)
    lines.add("  num_train_epochs: 1", f"{batches} steps; or max_steps: 500")
    lines.add("  save_steps: 100", "steps between two checkpoints, and between two evaluations")
    lines.add("  # report_to: [tensorboard]", "or wandb, beside the log in run_dir")
    lines.add("  # gradient_checkpointing: true", "less memory, about a third more time")
    lines.add("seed: 0")


def _alternatives(chosen: Choices, lines: _Lines) -> None:
    lines.say(
        "What else people set:",
        "loss: {kl_coef: 0.05}                          # keeps near the first policy; costs a forward",
        "loss: {normalization: dapo, clip_high: 0.28}   # DAPO's loss",
        "alarms: [{metric: kl, above: 0.5, lines: 3, then: stop}]",
        "console: {every: 10}                           # samples above the progress bar",
        "advantages: {profile: grpo}                    # how rewards become advantages; the default is maestro",
    )
