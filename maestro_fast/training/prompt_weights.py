"""The weights that a saved Conductor gives each of some prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from maestro_fast.generation import SamplingConfig, TransformersGenerator
from maestro_fast.model.forward import (
    Layout,
    Sequences,
    choose_layout,
    contexts,
    last_hidden,
    prompt_mean,
    terminal_states,
)
from maestro_fast.records import Rollouts, plain_text
from maestro_fast.training.data import PromptDataset
from maestro_fast.training.run import load_policy
from maestro_fast.training.saved_conductor import SavedConductor
from maestro_fast.weighting import WeightContext

CHUNK = 64  # responses at a time
_DELAY = 5.0  # seconds before a bar shows


@dataclass(frozen=True)
class PromptWeights:
    """
    Attributes:
        policy: name of the weight policy.
        reward_names: K names.
        prompts, families: N texts, and their task families, "" where the data name none.
        weights_NK: float32, expected over the policy's own sampling; each row the mean over the prompt's responses
            where the Conductor reads responses.
        source: sentences on what was read, of which model.
    """

    policy: str
    reward_names: tuple[str, ...]
    prompts: list[str]
    families: list[str]
    weights_NK: Tensor
    source: list[str]


def prompt_weights(
    saved: SavedConductor, dataset: PromptDataset, *, model: str | None = None, samples: int = 4, seed: int = 0
) -> PromptWeights:
    """Reads the context that the Conductor was trained with, and asks it for the weights.

    Args:
        saved: of ``load_conductor``.
        dataset: the prompts.
        model: path or name of the model that it reads, see ``SavedConductor.model``.
        samples, seed: where it reads responses: so many are sampled for each prompt, with this seed.

    Raises:
        ValueError: no model is known, or one of another width.
    """
    inner = saved.inner
    config, origin = saved.model(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, tokenizer = load_policy(config, device)
    network = network.to(device).eval()
    width, expected = network.config.get_text_config().hidden_size, inner.statistics.mean.numel()  # type: ignore[union-attr,operator]
    if width != expected:
        raise ValueError(f"--model: {config.path} has states of width {width}, expected {expected}: another model?")
    reads_responses = inner.context_kind == "response"
    sampling = saved.run.sampling if saved.run is not None else SamplingConfig()
    with torch.no_grad():
        if reads_responses:
            states = _response_states(network, tokenizer, dataset, sampling, samples, seed)
        else:
            samples = 1
            states = _prompt_states(network, tokenizer, dataset, inner.context_kind)
    source = [f"Contexts: {_NAMES[inner.config.context]} of {origin}."]
    if reads_responses:
        by = "as the run sampled" if saved.run is not None else "by the defaults of the section sampling"
        source.append(
            f"Responses: {samples} to each prompt, sampled by this model with seed {seed}, {by}, at most "
            f"{sampling.max_new_tokens} tokens; weights are means over them."
        )
    return PromptWeights(
        saved.policy.name,
        inner.reward_names,
        [plain_text(row[dataset.prompt_column]) for row in dataset.rows],
        dataset.families,
        _weights(saved, states.float().cpu(), samples),
        source,
    )


_NAMES = {
    "response": "the terminal state of each response",
    "shuffled": "the terminal state of another response, as in training,",
    "prompt_last": "the state of the prompt's last token",
    "prompt_mean": "the mean state of the prompt",
    "reference_prompt_mean": "the mean state of the prompt",
}


def _weights(saved: SavedConductor, states_Bd: Tensor, samples: int) -> Tensor:
    """[N, K] by the policy's own way; nothing is rewarded here, and no utility is known."""
    names, count = saved.inner.reward_names, len(states_Bd)
    context = WeightContext(
        names, samples, 0, torch.zeros(count, len(names)), states_Bd, torch.full((count,), float("nan"))
    )
    return saved.policy.weights(context).expected_BK.view(-1, samples, len(names)).mean(1)


def _prompt_states(model: nn.Module, tokenizer: PreTrainedTokenizerBase, dataset: PromptDataset, kind: Any) -> Tensor:
    """[N, d], each prompt alone in its forward."""
    layout = choose_layout(model)
    states = []
    for ids in tqdm(dataset.prompts(dataset.rows, tokenizer).token_ids, "Prompts", leave=False, delay=_DELAY):
        if kind == "reference_prompt_mean":
            states.append(prompt_mean(model, ids, layout))
        else:
            alone = Sequences([ids], [[]])
            states.append(contexts(last_hidden(model, alone, layout), alone, kind)[0])
    return torch.stack(states)


def _response_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PromptDataset,
    sampling: SamplingConfig,
    samples: int,
    seed: int,
) -> Tensor:
    """[N * samples, d]."""
    layout: Layout = choose_layout(model)
    states = []
    for rollouts in sample_responses(model, tokenizer, dataset, sampling, samples, seed):
        sequences = Sequences(rollouts.prompts.token_ids, rollouts.completion_ids)
        states.append(terminal_states(model, sequences, layout, CHUNK))
    return torch.cat(states)


def sample_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PromptDataset,
    sampling: SamplingConfig,
    samples: int,
    seed: int,
) -> Sequence[Rollouts]:
    """``samples`` responses to each prompt, side by side, in pieces; the same for the same model and arguments."""
    generator = TransformersGenerator(tokenizer, sampling)
    size = max(1, CHUNK // samples)
    pieces = [dataset.rows[i : i + size] for i in range(0, len(dataset), size)]
    return [
        generator.generate(model, dataset.prompts(rows, tokenizer).repeat(samples), seed=(seed * 65_537 + i) % 2**63)
        for i, rows in enumerate(tqdm(pieces, "Responses", leave=False, delay=_DELAY))
    ]
