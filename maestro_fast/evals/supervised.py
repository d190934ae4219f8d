"""SFT as a baseline: the run's policy learns the reference answers of the same prompts, as many as a GRPO run takes.

    python -m maestro_fast.evals.supervised my_run.yaml --run_dir runs/sft --trainer.learning_rate 2e-5

A reference answer stands where GRPO has the policy's response: behind the prompt as the policy reads it, with the token
that ends a reply. The loss is the mean cross-entropy, in nats, over the tokens of the references of an optimiser step;
prompts have none. The model, its adapters, the seed, the order of the prompts and the fields of ``trainer`` are those
of the run. Its learning rate was chosen for policy gradients, so choose another one for SFT by itself.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from maestro_fast.config_file import absolute_paths, read_config
from maestro_fast.data.dataset import REPLY_COLUMN, PromptDataset
from maestro_fast.evals import training_job
from maestro_fast.evals.baselines import SFT
from maestro_fast.evals.results import Result
from maestro_fast.evals.training_job import QUIET, made_world
from maestro_fast.model.forward import completion_logprobs, last_hidden
from maestro_fast.model.head import check_head, head_of
from maestro_fast.model.layout_trial import choose_layout
from maestro_fast.model.rows import Sequences
from maestro_fast.settings import SettingsError, override
from maestro_fast.training import TrainConfig, parse_config
from maestro_fast.training.batches import BatchConfig, GroupSampler
from maestro_fast.training.run import MERGED, check_loaded, load, prepare
from maestro_fast.training.run_directory import open_run_directory

logger = logging.getLogger(__name__)
Example = tuple[list[int], list[int]]  # the tokens of a prompt, and those of its reference answer


def train_supervised(config: TrainConfig, raw: Mapping[str, Any], steps: Sequence[int] = ()) -> Path:
    """Trains the policy of a run on the reference answers, and leaves it in the run directory.

    trainer_state.json there has the losses.

    Args:
        config: the run. Its rewards and weights are checked, but not used.
        raw: the mapping that ``config`` was read from; it is written to config.yaml, with absolute paths.
        steps: optimiser steps, from 1, after which the policy is saved in ``step-<n>`` as well.

    Returns:
        The folder ``final`` of the run directory, which ``model.path`` takes.

    Raises:
        SettingsError, ValueError: a setting is wrong, a prompt has no reference answer, or the data is a stream.
    """
    prepared = prepare(config)
    with open_run_directory(Path(config.run_dir), prepared.args, resume=False) as run_dir:
        model, tokenizer = load(prepared, run_dir / MERGED if prepared.args.process_index == 0 else None)
        check_loaded(prepared, model, tokenizer)
        examples = supervised_examples(prepared.dataset, tokenizer, config.sampling.max_new_tokens)
        args = set_sizes(prepared.args, config.batch)
        order = prepared.dataset.order(config.batch.prompts_per_batch, config.seed, 0)
        trainer = SupervisedTrainer(model, tokenizer, examples, args, GroupSampler(order, 1))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_SavedAt(trainer, run_dir, steps))
        if trainer.is_world_process_zero():
            written = yaml.safe_dump(absolute_paths(dict(raw), Path.cwd()), sort_keys=False)
            (run_dir / "config.yaml").write_text(written, encoding="utf-8")
        trainer.train()
        trainer.save_model(str(run_dir / "final"))
        trainer.save_state()
    return run_dir / "final"


def supervised_examples(
    dataset: PromptDataset, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[Example]:
    """The tokens of every prompt, as the policy reads it, and of its reference answer.

    An answer ends in the tokenizer's end token. One of more than ``max_new_tokens`` tokens is cut, as the policy's
    responses are.

    Raises:
        ValueError: a prompt has no reference answer, the data is a stream, or the tokenizer has no end token.
    """
    if dataset.streaming:
        raise ValueError(f"{dataset.field}.streaming: True, expected False: SFT reads all rows at once")
    if tokenizer.eos_token_id is None:
        raise ValueError("model.path: its tokenizer has no end token, so a reference answer would never end")
    rows = [dataset[i] for i in range(len(dataset))]
    answers = []
    for i, row in enumerate(rows):
        answer = row.get(REPLY_COLUMN)
        if not isinstance(answer, str) or not answer:
            raise ValueError(
                f"{dataset.field}.path: {dataset.name_of(i)} has {answer!r} in the column {REPLY_COLUMN!r}, expected a "
                "reference answer"
            )
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        answers.append([*ids, int(tokenizer.eos_token_id)])
    if long := sum(len(ids) > max_new_tokens for ids in answers):
        logger.warning("%d of %d reference answers are cut after %d tokens", long, len(answers), max_new_tokens)
    prompts = dataset.prompts(rows, tokenizer).token_ids
    return [(prompt, answer[:max_new_tokens]) for prompt, answer in zip(prompts, answers, strict=True)]


def set_sizes(args: TrainingArguments, batch: BatchConfig) -> TrainingArguments:
    """Gives an optimiser step the share of prompts that it has in a GRPO run, and turns off what SFT does not do.

    Raises:
        SettingsError: the prompts of a batch do not divide evenly.
    """
    parts = batch.updates_per_batch * args.world_size
    if batch.prompts_per_batch % parts:
        raise SettingsError(
            f"batch.prompts_per_batch: {batch.prompts_per_batch}, expected a multiple of {parts}, the optimiser steps "
            "of a batch times the processes: SFT has one answer to each prompt"
        )
    own = batch.prompts_per_batch // parts
    size = max(n for n in range(1, min(own, batch.micro_batch) + 1) if own % n == 0)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, own // size
    args.remove_unused_columns = args.dataloader_pin_memory = args.load_best_model_at_end = False
    args.save_strategy = SaveStrategy.NO
    args.eval_strategy = type(args.eval_strategy)("no")
    return args


class SupervisedTrainer(Trainer):
    """A ``transformers.Trainer`` whose loss is the cross-entropy of reference answers, without forming all logits."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        args: TrainingArguments,
        sampler: GroupSampler,
    ) -> None:
        dataset: Any = examples  # A list serves as a data set.
        super().__init__(
            model=model, args=args, train_dataset=dataset, data_collator=collated, processing_class=tokenizer
        )
        self._order = sampler
        self._head = head_of(model)
        with self.accelerator.autocast():
            check_head(model, self._head)
            self._layouts = choose_layout(model)
        # The trainer then counts the labels of an optimiser step, and leaves the division by them to the loss.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> GroupSampler:
        return self._order

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part of a micro-batch in the mean over the tokens of its optimiser step, ``num_items_in_batch``."""
        hidden = last_hidden(model, inputs["sequences"], self._layouts)
        with self.accelerator.autocast():
            logprobs_C, _ = completion_logprobs(hidden, self._head, 1.0, "none")
        # Gradients are averaged over the processes, and the tokens are those of all of them.
        loss = -logprobs_C.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss


def collated(examples: Sequence[Example]) -> dict[str, Any]:
    """A micro-batch: the sequences, and the tokens that are learnt as the labels, which the trainer counts.

    transformers counts no label in the first place, where its own losses have nothing to predict from, nor any -100.
    """
    prompts, answers = [prompt for prompt, _ in examples], [answer for _, answer in examples]
    labels = torch.tensor([-100, *(token for answer in answers for token in answer)])
    return {"sequences": Sequences(prompts, answers), "labels": labels}


class _SavedAt(TrainerCallback):
    """Saves the policy after some optimiser steps."""

    def __init__(self, trainer: Trainer, folder: Path, steps: Sequence[int]) -> None:
        self._trainer, self._folder, self._steps = trainer, folder, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self._steps:
            self._trainer.save_model(str(self._folder / f"step-{state.global_step}"))


# --- in a suite ---


def run_arm(payload: dict[str, Any]) -> list[Result]:
    """The job of a suite: SFT if that is the arm, else ``training_job.run_training``."""
    return run_supervised(payload) if payload["arm"] == SFT else training_job.run_training(payload)


def run_supervised(payload: dict[str, Any]) -> list[Result]:
    """Trains by SFT, and measures the policy as ``training_job.run_training`` does, with the same random draws.

    Args:
        payload: as that function takes it. "labels" and "watched" have no meaning here.

    Returns:
        One result for each of "steps". No tokens were sampled to train, so ``tokens`` is 0.
    """
    base = made_world(payload["world"], Path(payload["base"]), payload["seed"])
    raw, steps = absolute_paths(payload["config"], base), payload["steps"]
    raw.pop("anchor", None)
    folder = Path(payload["folder"]).absolute() / "runs" / payload["name"].replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)  # An interrupted training of a suite begins anew.
    changes = {**QUIET, "weights": "equal", "seed": payload["seed"], "trainer.max_steps": steps[-1]}
    for dotted, value in {**changes, **payload["changes"], "run_dir": str(folder)}.items():
        override(raw, dotted, value)
    raw = absolute_paths(raw, base)
    train_supervised(parse_config(raw), raw, steps)
    found, points = [], []
    for step in steps:
        # One step at the learning rate 0 leaves the policy as it is, and then it is measured.
        still = {"weights": "equal", "final": "last", "trainer.learning_rate": 0.0}
        loaded = {"model.path": str(folder / f"step-{step}"), "model.lora": None, "model.adapter": "continue"}
        changed = {**payload["changes"], **still, **loaded}
        asked = {"name": f"{payload['name']}/step-{step}", "changes": changed, "labels": None, "watched": {}}
        (measured,) = training_job.run_training({**payload, **asked, "steps": [1]})
        points.append((step, measured.utility))
        condition = {**payload["condition"], "steps": step}
        found.append(replace(measured, condition=condition, tokens=0, figures={}, history={"utility": [*points]}))
    if not payload["keep"]:
        shutil.rmtree(folder)
    return found


def main(words: Sequence[str]) -> None:
    """Trains the run ``words[0]`` by SFT, with the settings that follow, and prints where the policy is."""
    if not words:
        raise SystemExit("usage: python -m maestro_fast.evals.supervised CONFIG.yaml [--setting value ...]")
    raw = read_config(Path(words[0]), words[1:])
    print(train_supervised(parse_config(raw), raw))


if __name__ == "__main__":
    main(sys.argv[1:])
