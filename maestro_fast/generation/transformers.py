"""Samples with transformers' own ``generate``. It needs nothing else and runs everywhere, but large models are slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from maestro_fast.generation.sampling import SamplingConfig, completion_texts
from maestro_fast.model.head import vocabulary_of
from maestro_fast.records import Prompts, Rollouts


class TransformersGenerator:
    """Samples from the training model itself, so no weights have to be synchronised."""

    concurrent_parts = 0

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        *,
        synced_gpus: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """
        Args:
            tokenizer: The tokenizer that decodes the sampled tokens.
            sampling: The sampling options.
            synced_gpus: Whether all processes stay in the loop until the last one has finished. Sharded weights need
                this.
            autocast: Makes the context in which the model samples. One context holds a whole call, so that autocast
                casts each weight once and not for every token.
        """
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.synced_gpus = synced_gpus
        self.autocast = autocast

    @torch.no_grad()
    def generate(self, model: nn.Module, prompts: Prompts, *, seed: int) -> Rollouts:
        """See ``Generator.generate``. ``model`` is a causal language model of transformers and is left as it was."""
        stops = stop_ids(model, self.tokenizer)
        pad = padding_id(model, self.tokenizer)
        device = next(model.parameters()).device
        input_ids, attention_mask = left_padded(prompts.token_ids, pad)
        recorder = _LogprobRecorder()
        watcher = _StopStrings(self.tokenizer, self.sampling.stop, input_ids.shape[1])
        devices = [device] if device.type == "cuda" else []
        with _as_sampler(model), torch.random.fork_rng(devices=devices), self.autocast():
            torch.manual_seed(seed)
            sequences: Tensor = model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=self._generation_config(stops, pad),
                logits_processor=self._processors(recorder),
                stopping_criteria=StoppingCriteriaList([watcher] if self.sampling.stop else []),
                synced_gpus=self.synced_gpus,
            )
        sampled = sequences[:, input_ids.shape[1] :]
        return self._rollouts(prompts, sampled.cpu(), recorder.finish(sampled).cpu(), stops, watcher.ends)

    def _generation_config(self, stops: set[int], pad: int) -> GenerationConfig:
        # Temperature and truncation are set in ``_processors``. If they stood here, transformers would apply them after
        # the recorder, which would then record log-probs of another distribution.
        return GenerationConfig(
            do_sample=True,
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=sorted(stops),
            pad_token_id=pad,
            use_cache=True,
        )

    def _processors(self, recorder: _LogprobRecorder) -> LogitsProcessorList:
        sampling = self.sampling
        processors: list[LogitsProcessor] = []
        if sampling.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(TopPLogitsWarper(sampling.top_p))
        return LogitsProcessorList([*processors, recorder])

    def _rollouts(
        self, prompts: Prompts, sampled: Tensor, logprobs: Tensor, stops: set[int], string_ends: dict[int, int]
    ) -> Rollouts:
        completion_ids, kept, truncated = [], [], []
        for i, (row, row_logprobs) in enumerate(zip(sampled.tolist(), logprobs, strict=True)):
            # A row that a stop string ended is padded, perhaps with an id that also ends responses. So the end is
            # whichever came first.
            ends = [n + 1 for n, token in enumerate(row) if token in stops][:1]
            ends += [string_ends[i]] if i in string_ends else []
            length = min(ends, default=len(row))
            truncated.append(not ends)
            completion_ids.append(row[:length])
            kept.append(row_logprobs[:length])
        completions = completion_texts(
            self.tokenizer,
            prompts,
            completion_ids,
            skip_special_tokens=self.sampling.skip_special_tokens,
            stop_ids=stops,
        )
        return Rollouts(prompts, completion_ids, completions, torch.tensor(truncated), torch.cat(kept))


@contextmanager
def _as_sampler(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode and hides its own generation config; restores both afterwards.

    ``generate`` takes every setting that it is not given from the model's generation config, which would change the
    distribution.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    owned = [(module, vars(module)["generation_config"]) for module in modules if "generation_config" in vars(module)]
    try:
        model.eval()
        for module, _ in owned:
            module.generation_config = GenerationConfig()  # type: ignore[assignment]
        yield
    finally:
        for module, own in owned:
            module.generation_config = own
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


class _StopStrings(StoppingCriteria):
    """Ends a response with the token that completes a stop string.

    The criterion of transformers also searches the end of the prompt, and does not tell which rows it stopped.

    Attributes:
        ends: Maps each row that a stop string ended to its length in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: list[str], prompt_width: int) -> None:
        self.ends: dict[int, int] = {}
        self._tokenizer = tokenizer
        self._strings = strings
        self._prompt_width = prompt_width
        # Only the last tokens are decoded at each step. A token has at least one byte, so as many tokens as the longest
        # string has bytes hold it; the margin of 8 is for a character cut at the start and for tokens without text.
        self._window = max((len(string.encode()) for string in strings), default=0) + 8

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        length = input_ids.shape[1] - self._prompt_width
        for i, tail in enumerate(input_ids[:, -min(length, self._window) :].tolist()):
            if i not in self.ends:
                text = self._tokenizer.decode(tail)
                if any(string in text for string in self._strings):
                    self.ends[i] = length
        return torch.tensor([i in self.ends for i in range(len(input_ids))], device=input_ids.device)


class _LogprobRecorder(LogitsProcessor):
    """Records the log-prob of each sampled token, as the last processor of the list.

    At each step it sees which token was sampled from the distribution of the step before. So it keeps one step's
    distribution only.
    """

    def __init__(self) -> None:
        self._chosen: list[Tensor] = []
        self._distribution: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._distribution is not None:
            self._chosen.append(self._distribution.gather(1, input_ids[:, -1:]))
        self._distribution = scores.float().log_softmax(-1)
        return scores

    def finish(self, sampled: Tensor) -> Tensor:
        """Returns the log-probs, float32 [B, L], of the sampled tokens, int64 [B, L]."""
        if self._distribution is not None:
            self._chosen.append(self._distribution.gather(1, sampled[:, -1:]))
        return torch.cat(self._chosen, dim=1)


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token id that ends a response: the tokenizer's, and those in the model's generation config.

    Raises:
        ValueError: Neither of them names one.
    """
    config = getattr(model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id} | set(listed if isinstance(listed, list) else [listed])
    ids.discard(None)
    if not ids:
        raise ValueError("tokenizer: has no eos_token_id, and neither has the model's generation config")
    return ids


def padding_id(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id for padding. It is masked, but the model embeds it, so it has to be one that the model knows.

    It is the tokenizer's own if the model has a row for it: a token that was added to the tokenizer alone has none.
    """
    rows = vocabulary_of(model)
    known = [i for i in (tokenizer.pad_token_id, *sorted(stop_ids(model, tokenizer))) if i is not None and i < rows]
    return known[0] if known else 0


def left_padded(token_ids: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Returns token ids and attention mask, both int64 [B, L], with the padding on the left."""
    width = max(map(len, token_ids))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in token_ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in token_ids])
    return ids, mask
