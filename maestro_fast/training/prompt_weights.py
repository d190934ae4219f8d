"""Loads a saved Conductor and the model whose states it reads, and computes the weights that it gives to prompts.

``maestro-fast conductor show`` prints and plots these weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from maestro_fast.config_file import read_run_config
from maestro_fast.data.dataset import PromptDataset
from maestro_fast.generation import SamplingConfig, TransformersGenerator
from maestro_fast.manifest import tensors_of
from maestro_fast.model.forward import last_hidden, prompt_mean, response_contexts
from maestro_fast.model.hidden_states import ContextMode
from maestro_fast.model.layout_trial import choose_layout
from maestro_fast.model.load import ModelConfig, load_policy
from maestro_fast.model.rows import Sequences
from maestro_fast.model_path import check_model_path, loading_model
from maestro_fast.records import Rollouts, plain_text
from maestro_fast.training.config import TrainConfig, parse_config
from maestro_fast.training.plan import context_mode
from maestro_fast.weighting import (
    Anchored,
    Conductor,
    Guarded,
    WeightContext,
    WeightPolicy,
    build_weight_policy,
    from_pretrained,
)
from maestro_fast.weighting.saved import CONFIG_FILE, WEIGHTS_FILE, load_weight_policy

CHUNK = 64  # the number of responses that are sampled or read at a time
_DELAY = 5.0  # the seconds after which a progress bar shows


@dataclass(frozen=True)
class SavedConductor:
    """A Conductor that was saved in a folder.

    Attributes:
        folder: the folder that holds its files.
        policy: the weight policy as it was saved, with its guard.
        run: the config of the run that saved it; None for a folder of ``save_pretrained``.
    """

    folder: Path
    policy: WeightPolicy
    run: TrainConfig | None

    @property
    def inner(self) -> Conductor | Anchored:
        """The weight policy without its guard."""
        inner = self.policy.policy if isinstance(self.policy, Guarded) else self.policy
        assert isinstance(inner, Conductor | Anchored)
        return inner

    def model(self, given: str | None) -> tuple[ModelConfig, str]:
        """Finds the model on whose states the Conductor was trained, and says in words which one that is.

        Args:
            given: path or name of that model; None looks for it in the folder and in the run's config.

        Raises:
            ValueError: the model is not found there.
        """
        reference = self.inner.context_kind == "reference_prompt_mean"
        dtype = "auto" if self.run is None else self.run.model.dtype
        role = "the frozen reference, which training started from" if reference else "the policy"
        if given is not None:
            return ModelConfig(given, dtype), f"{given}, given as {role}"
        if reference and self.run is not None:
            path = Path(self.run.model.path)
            if path.is_dir():
                return ModelConfig(str(path), dtype), f"{path}, {role}"
            raise ValueError(f"--model: missing; it reads {role}, which was {path}: there is no such directory here")
        if not reference and any((self.folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            return ModelConfig(str(self.folder), dtype), f"{self.folder}, {role} that it was saved with"
        raise ValueError(f"--model: missing; {self.folder} does not tell where {role}, is, which it reads")


def load_conductor(folder: Path) -> SavedConductor:
    """Loads a Conductor from a folder.

    Args:
        folder: a folder that ``save_pretrained`` wrote, a run directory, or the ``final/`` or a checkpoint in one.

    Raises:
        ValueError: the folder is none of these, or the run had another weight policy.
    """
    for candidate in (folder, folder / "final"):
        if (candidate / CONFIG_FILE).is_file():
            return SavedConductor(candidate, from_pretrained(candidate), None)
        if (candidate / WEIGHTS_FILE).is_file():
            return _of_run(candidate)
    raise ValueError(f"DIR: {folder} holds neither {CONFIG_FILE} nor {WEIGHTS_FILE}, expected a saved Conductor")


def _of_run(folder: Path) -> SavedConductor:
    config = folder.absolute().parent / "config.yaml"
    if not config.is_file():
        raise ValueError(
            f"DIR: {folder} is of a run, but beside it there is no config.yaml, which has the Conductor's options; "
            "expected it in its run directory"
        )
    run = parse_config(read_run_config(config))
    with tensors_of(folder / WEIGHTS_FILE) as saved:
        about = saved.metadata() or {}
        names = saved.keys()
        sizes = [saved.get_slice(name).get_shape()[0] for name in names if _is_context_mean(name)]
    if about.get("policy") not in ("conductor", "anchored") or not sizes:
        raise ValueError(f"DIR: {folder} holds weight policy {about.get('policy')!r}, expected conductor or anchored")
    rewards = tuple(json.loads(about["rewards"]))
    policy = build_weight_policy(run.weights, rewards, int(sizes[0]))
    load_weight_policy(folder, policy, rewards)
    return SavedConductor(folder, policy, run)


def _is_context_mean(name: str) -> bool:
    return name.removeprefix("policy.") == "statistics.mean"


@dataclass(frozen=True)
class PromptWeights:
    """The weights that a Conductor gives to N prompts.

    Attributes:
        policy: the name of the weight policy.
        reward_names: the names of the K rewards.
        prompts: the texts of the N prompts.
        families: their task families, "" where the data names none.
        weights_NK: float32, the mean over the policy's own random draws. If the Conductor reads responses, a row is
            also the mean over the prompt's responses.
        source: sentences that say which hidden states were read, and of which model.
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
    """Reads hidden states of the kind that the Conductor was trained with, and asks it for the weights.

    Args:
        saved: what ``load_conductor`` returned.
        dataset: the prompts.
        model: the path or name of the model that the Conductor reads, see ``SavedConductor.model``.
        samples, seed: how many responses to each prompt are sampled, and with which seed, if it reads responses.

    Raises:
        ValueError: the model is not known, or its width is not the Conductor's.
    """
    if saved.inner.needs_context:
        states, samples, source = _states(saved, dataset, model, samples, seed)
    else:
        states, samples, source = torch.empty(len(dataset), 0), 1, ["It reads no context: every prompt weighs alike."]
    return PromptWeights(
        saved.policy.name,
        saved.inner.reward_names,
        [plain_text(row[dataset.prompt_column]) for row in dataset.rows],
        dataset.families,
        _weights(saved, states.float().cpu(), samples),
        source,
    )


def _states(
    saved: SavedConductor, dataset: PromptDataset, model: str | None, samples: int, seed: int
) -> tuple[Tensor, int, list[str]]:
    """The hidden states that the Conductor reads, how many there are of each prompt, and whose they are, in words."""
    inner = saved.inner
    config, origin = saved.model(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_model_path(config.path, "--model")
    with loading_model(config.path, "--model"):
        network, tokenizer = load_policy(config, device)
    network = network.to(device).eval()
    width, expected = network.config.get_text_config().hidden_size, inner.statistics.mean.numel()  # type: ignore[union-attr,operator]
    if width != expected:
        raise ValueError(f"--model: {config.path} has states of width {width}, expected {expected}: another model?")
    shuffled = (
        ", which another one has, as in training" if isinstance(inner, Conductor) and inner.config.shuffle else ""
    )
    source = [f"Contexts: {_NAMES[inner.config.context]} of {origin}{shuffled}."]
    mode = context_mode(inner)
    with torch.no_grad():
        if mode is None or not inner.context_kind.startswith("response"):
            return _prompt_states(network, tokenizer, dataset, mode), 1, source
        sampling = saved.run.sampling if saved.run is not None else SamplingConfig()
        by = "as the run sampled" if saved.run is not None else "by the defaults of the section sampling"
        source.append(
            f"Responses: {samples} to each prompt, sampled by this model with seed {seed}, {by}, at most "
            f"{sampling.max_new_tokens} tokens; weights are means over them."
        )
        return _response_states(network, tokenizer, dataset, sampling, samples, seed, mode), samples, source


_NAMES = {
    "response": "the terminal state of each response",
    "response_mean": "the mean state of each response",
    "response_first_layer": "the terminal state of each response after the first layer",
    "prompt_last": "the state of the prompt's last token",
    "prompt_mean": "the mean state of the prompt",
    "reference_prompt_mean": "the mean state of the prompt",
}


def _weights(saved: SavedConductor, states_Bd: Tensor, samples: int) -> Tensor:
    """The weights [N, K] that the policy gives for these states if no rewards and no utilities are known."""
    names, count = saved.inner.reward_names, len(states_Bd)
    context = WeightContext(
        names, samples, 0, torch.zeros(count, len(names)), states_Bd, torch.full((count,), float("nan"))
    )
    return saved.policy.weights(context).expected_BK.view(-1, samples, len(names)).mean(1)


def _prompt_states(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, dataset: PromptDataset, mode: ContextMode | None
) -> Tensor:
    """The hidden state of each prompt, [N, d], pooled by ``mode``; None: the mean that ``PromptContexts`` gives.

    Each prompt is alone in its forward.
    """
    layouts = choose_layout(model)
    states = []
    for ids in tqdm(dataset.prompts(dataset.rows, tokenizer).token_ids, "Prompts", leave=False, delay=_DELAY):
        if mode is None:
            states.append(prompt_mean(model, ids, layouts))
        else:
            alone = Sequences([ids], [[]])
            states.append(last_hidden(model, alone, layouts).contexts(mode)[0])
    return torch.stack(states)


def _response_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PromptDataset,
    sampling: SamplingConfig,
    samples: int,
    seed: int,
    mode: ContextMode,
) -> Tensor:
    """The context of each response, [N * samples, d]."""
    layouts = choose_layout(model, "auto")
    states = []
    for rollouts in sample_responses(model, tokenizer, dataset, sampling, samples, seed):
        sequences = Sequences(rollouts.prompts.token_ids, rollouts.completion_ids)
        states.append(response_contexts(model, sequences, layouts, CHUNK, mode))
    return torch.cat(states)


def sample_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PromptDataset,
    sampling: SamplingConfig,
    samples: int,
    seed: int,
) -> Sequence[Rollouts]:
    """Samples ``samples`` responses to each prompt, side by side, in pieces of about ``CHUNK`` responses.

    The same model and arguments give the same responses.
    """
    generator = TransformersGenerator(tokenizer, sampling)
    size = max(1, CHUNK // samples)
    pieces = [dataset.rows[i : i + size] for i in range(0, len(dataset), size)]
    return [
        generator.generate(model, dataset.prompts(rows, tokenizer).repeat(samples), seed=(seed * 65_537 + i) % 2**63)
        for i, rows in enumerate(tqdm(pieces, "Responses", leave=False, delay=_DELAY))
    ]
