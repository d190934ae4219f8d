"""Measures on a few tokens what the forward, the backward and the sampling of a policy allocate, as rules for any size.

The policy reads rows of token ids, R of them, each W long. What a pass through its layers holds is

    constant + R W token + R W^2 pair

bytes: ``token`` is what a token leaves behind in all layers, and ``pair`` what a mask, or an attention without a fused
kernel, holds for each pair of tokens. Every tensor is counted, operation by operation, so the three numbers are exact,
and a few short passes give them for rows of any length. Three passes are measured apart, because their peaks do not
come at the same time: the layers with a gradient, the head with the loss, and the layers without a gradient.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from maestro_fast.model.forward import last_hidden
from maestro_fast.model.head import causal_lm, vocabulary_of
from maestro_fast.model.layouts import Layouts, TokenCount
from maestro_fast.model.rows import Sequences
from maestro_fast.ops import linear_policy_loss, token_logprobs
from maestro_fast.ops.head import chunk_rows, product_rows
from maestro_fast.training.step import Step

_WIDTHS = {"cpu": (32, 64, 96), "cuda": (128, 256, 384)}  # tokens of the rows that are measured


class LiveMemory(TorchDispatchMode):
    """Counts each storage once, from the first operation that returns it until it is freed; the same on every device.

    Attributes:
        live: bytes at this moment.
        peak: the most that ``live`` has been. What an operation allocates for itself and frees again is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(tree_leaves((args, kwargs, out)))  # Arguments count too, because weights are older than the count.
        return out

    def see(self, values: Sequence[Any]) -> None:
        """Counts the tensors among ``values`` that are not counted yet."""
        for value in values:
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        self.peak = max(self.peak, self.live)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self.live += self._seen[key]
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._seen.pop(key)


@dataclass(frozen=True)
class Growth:
    """The bytes that a pass holds beyond what was held before it, as a rule for R rows of W tokens."""

    constant: float
    token: float
    pair: float = 0.0

    def bytes(self, rows: int, width: int = 1) -> float:
        return self.constant + rows * width * (self.token + width * self.pair)

    @staticmethod
    def through(points: Sequence[tuple[int, int, float]]) -> Growth:
        """The rule that fits measurements (R, W, bytes) best; what grows with W^2 cannot be negative."""
        found = _fitted(points, pairs=True)
        return found if found.pair >= 0 else _fitted(points, pairs=False)


def _fitted(points: Sequence[tuple[int, int, float]], *, pairs: bool) -> Growth:
    rows = [[1.0, r * w, r * w * w][: 3 if pairs else 2] for r, w, _ in points]
    terms = torch.tensor(rows, dtype=torch.float64)
    scale = terms.amax(0)
    target = torch.tensor([[value] for _, _, value in points], dtype=torch.float64)
    solved = torch.linalg.lstsq(terms / scale, target).solution[:, 0] / scale
    return Growth(*solved.tolist())


@dataclass(frozen=True)
class Shape:
    """The size of what passes through a policy at once.

    Attributes:
        prompt, completion: the tokens of each prompt and of each completion.
        responses, group: the number of responses, and how many of them in a row answer one prompt.
    """

    prompt: int
    completion: int
    responses: int
    group: int

    def sequences(self, vocabulary: int) -> Sequences:
        """Sequences of this size. Every second one is a token shorter: real ones need a mask, as they are not equal."""
        prompts = [[j // self.group % vocabulary] * self.prompt for j in range(self.responses)]
        lengths = [max(1, self.completion - j % 2) for j in range(self.responses)]
        return Sequences(prompts, [[(j + 7) % vocabulary] * n for j, n in enumerate(lengths)])


@dataclass(frozen=True)
class HeadMemory:
    """The most that head and loss hold, by the number of completion tokens.

    Attributes:
        product, chunk: the tokens of one product of the head, and the most whose logits exist at once.
        within, beyond: the rules up to a chunk of tokens, and from there on.
    """

    product: int
    chunk: int
    within: Growth
    beyond: Growth

    def bytes(self, tokens: int) -> float:
        tokens = -(-tokens // self.product) * self.product
        return (self.within if tokens <= self.chunk else self.beyond).bytes(tokens)


@dataclass(frozen=True)
class PassMemory:
    """What the passes of a policy allocate.

    Attributes:
        saved: what the forward of the layers leaves for the backward.
        scoring: the most that the layers of the reference hold, if it scores while the policy's forward waits for its
            backward, else None.
        backward: the most that exists while the gradients go back through the layers, ``saved`` among it.
        head: the most that head and loss hold.
        head_gradient: the gradient of the head's weight that waits for that of the embedding, if the two are one.
        embedding: the gradients of embedding and head that exist at the end of the backward.
        prefill: the most that a forward of the prompts holds that fills the cache.
        cache: what the cache of the attention holds, by the number of tokens.
        layers: the number of layers; the keys or the values of one are copied at a time when the cache grows.
        step_token: what sampling holds for each response, beside the cache: a few rows of logits.
        layouts: how sequences become rows.
        vocabulary: the number of tokens that the policy knows.
    """

    saved: Growth
    scoring: Growth | None
    backward: Growth
    head: HeadMemory
    head_gradient: int
    embedding: int
    prefill: Growth
    cache: Growth
    layers: int
    step_token: float
    layouts: Layouts
    vocabulary: int

    def training(self, shape: Shape) -> float:
        """The most that the forward, the loss and the backward of a micro-batch hold, in bytes."""
        rows, width = self.layouts.rows_of(shape.sequences(self.vocabulary)).input_ids.shape
        scoring = 0.0 if self.scoring is None else self.scoring.bytes(rows, width)
        return max(
            self.saved.bytes(rows, width) + max(self.head.bytes(shape.responses * shape.completion), scoring),
            self.backward.bytes(rows, width) + self.head_gradient,
            self.embedding,
        )

    def sampling(self, shape: Shape) -> tuple[float, float]:
        """The bytes of the cache at its fullest, and the most that exists beside it, if the policy samples itself."""
        B, longest = shape.responses, shape.prompt + shape.completion
        cache = self.cache.bytes(B, longest)
        growing = cache / (2 * self.layers) + B * self.step_token
        return cache, max(growing, self.prefill.bytes(B, shape.prompt) - cache)


def measure(step: Step, model: nn.Module, shape: Shape, *, samples: bool, progress: bool = False) -> PassMemory:
    """Measures a policy with passes of a few dozen tokens, and its head with those of a chunk.

    The gradients of the trained parameters are allocated meanwhile, as they are in a run, and dropped at the end.

    Args:
        step: the parts of the run's steps.
        model: the policy.
        shape: a micro-batch of the run at its largest, which decides whether prompts are shared, see ``layouts``.
        samples: whether the policy itself samples.
        progress: whether to show a bar.
    """
    vocabulary = vocabulary_of(causal_lm(model))
    layouts = replace(step.scorer.layouts, count=TokenCount())
    shared = layouts.rows_of(shape.sequences(vocabulary)).trees is not None
    fixed = replace(layouts, sharing="always" if shared else "never")
    device = step.processes.device
    widths = _WIDTHS.get(device.type, _WIDTHS["cuda"])
    sizes = [_scaled(shape, width, 2 if i else 4, shared) for i, width in enumerate((widths[0], *widths))]
    saved, scoring, backward, filled = [], [], [], []
    scores_meanwhile = step.scoring.source == "training" and step.reference is not None and step.terms.reads_reference
    with tqdm(
        total=2 * len(sizes) + 2, desc="measuring memory", leave=False, disable=None if progress else True
    ) as bar:
        with _gradients(model):
            for size in sizes:
                rows, width = fixed.rows_of(size.sequences(vocabulary)).input_ids.shape
                left, most, dtype = _layers(step, model, size.sequences(vocabulary), fixed)
                saved.append((rows, width, left))
                backward.append((rows, width, most))
                if scores_meanwhile:
                    scoring.append((rows, width, _scoring(step, model, size.sequences(vocabulary), fixed)))
                bar.update()
            chunk, product = chunk_rows(vocabulary, device), product_rows(device)
            head = [(n, 1, _head(step, n, dtype)) for n in (product, chunk, chunk + product)]
            bar.update()
        for rows, width in ((2, widths[0]), (2, widths[1]), (2, widths[2]), (4, widths[0])) if samples else ():
            filled.append((rows, width, *_prefill(step, model, rows, width, vocabulary)))
            bar.update()
    weight: Any = step.scorer.head.module.weight
    embedding = causal_lm(model).get_input_embeddings().weight
    tied, head_bytes = weight is embedding, weight.numel() * 4 * bool(weight.requires_grad)
    own = embedding.numel() * embedding.element_size() * bool(embedding.requires_grad)
    return PassMemory(
        Growth.through(saved),
        Growth.through(scoring) if scoring else None,
        Growth.through(backward),
        HeadMemory(product, chunk, _fitted(head[:2], pairs=False), _fitted(head[1:], pairs=False)),
        head_bytes if tied else 0,
        own + (2 * head_bytes if tied else 0),
        Growth.through([(r, w, most) for r, w, most, _ in filled]) if filled else Growth(0.0, 0.0),
        Growth.through([(r, w, kept) for r, w, _, kept in filled]) if filled else Growth(0.0, 0.0),
        int(getattr(causal_lm(model).config.get_text_config(), "num_hidden_layers", None) or 1),
        _LOGITS * 4.0 * vocabulary,
        layouts,
        vocabulary,
    )


_LOGITS = 4  # rows of float32 logits of a response: the model's, the processed ones, log-probs, and probabilities


def _scaled(shape: Shape, width: int, rows: int, shared: bool) -> Shape:
    """A shape like ``shape`` whose rows have about ``width`` tokens."""
    if not shared:
        return Shape(width // 2, width - width // 2, rows, 1)
    group = min(shape.group, shape.responses)
    scale = width / (shape.prompt + group * shape.completion)
    prompt, completion = max(4, round(shape.prompt * scale)), max(2, round(shape.completion * scale))
    return Shape(prompt, completion, group * rows // 2, group)


@contextlib.contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Has every trained parameter hold a gradient, and the model in training mode; both are undone afterwards."""
    was = model.training
    try:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        model.train()
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was)


def _held(model: nn.Module) -> list[Tensor]:
    parameters = [*model.parameters()]
    return [*parameters, *(p.grad for p in parameters if p.grad is not None), *model.buffers()]


def _layers(step: Step, model: nn.Module, sequences: Sequences, layouts: Layouts) -> tuple[int, int, torch.dtype]:
    """What the layers' forward leaves, the most until the end of their backward, and the dtype of their states.

    The embedding gets no gradient here: that one is as large as the vocabulary and comes last, when all else is freed.
    """
    embedding = causal_lm(model).get_input_embeddings().weight
    trains = embedding.requires_grad
    with LiveMemory() as memory:
        memory.see(_held(model))
        before = memory.live
        embedding.requires_grad_(False)
        try:
            with step.scorer.autocast():
                states = last_hidden(model, sequences, layouts).states_Ud
            left = memory.live - before
            memory.peak = memory.live
            states.backward(torch.ones_like(states))
        finally:
            embedding.requires_grad_(trains)
        return left, memory.peak - before, states.dtype


@torch.no_grad()
def _scoring(step: Step, model: nn.Module, sequences: Sequences, layouts: Layouts) -> int:
    """The most that a forward of the layers holds without gradients."""
    with LiveMemory() as memory, step.scorer.autocast():
        memory.see(_held(model))
        before = memory.live
        memory.peak = before
        last_hidden(model, sequences, layouts)
        return int(memory.peak - before)


def _head(step: Step, tokens: int, dtype: torch.dtype) -> int:
    """The most that the head and the loss of ``tokens`` completion tokens hold, from their states to the gradients."""
    scorer, terms, head = step.scorer, step.terms, step.scorer.head
    weight: Any = head.module.weight
    states = torch.zeros(tokens, weight.shape[1], device=weight.device, dtype=dtype, requires_grad=True)
    zeros, targets = states.new_zeros(tokens, dtype=torch.float32), torch.zeros_like(states[:, 0], dtype=torch.int64)
    with LiveMemory() as memory:
        memory.see([weight, weight.grad, states, zeros, targets])
        before = memory.live
        with scorer.autocast():
            own = head.weight
            taken = states[targets].to(own.dtype)
            if step.scoring.source == "training":
                found = token_logprobs(
                    taken, own, targets, **head.numbers, temperature=scorer.temperature, entropy=terms.entropy
                )
                loss = found.logprobs.sum()
                if found.entropies is not None and terms.entropy == "grad":
                    loss = loss + found.entropies.sum()
            else:
                loss = linear_policy_loss(
                    taken,
                    own,
                    targets,
                    torch.tensor([1.0, -1.0]),
                    torch.tensor([0, tokens // 2, tokens]),
                    **head.numbers,
                    temperature=scorer.temperature,
                    old_logprobs=zeros if step.plan.updates > 1 else None,
                    ref_logprobs=zeros if terms.needs_reference else None,
                    sampling_logprobs=zeros if terms.wants_sampling else None,
                    normalizer=float(tokens),
                    entropy_normalizer=float(tokens),
                    config=terms.function,
                ).loss
        loss.backward()
        return int(memory.peak - before)


@torch.no_grad()
def _prefill(step: Step, model: nn.Module, rows: int, width: int, vocabulary: int) -> tuple[int, int]:
    """The most that a forward which fills the cache holds, and what the cache holds."""
    device = next(model.parameters()).device
    ids = torch.arange(rows * width, device=device).view(rows, width) % vocabulary
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # as on the left of a shorter prompt
    was = model.training
    model.eval()
    try:
        with LiveMemory() as memory:
            memory.see([*_held(model), ids, mask])
            before = memory.live
            with step.scorer.autocast():
                out = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
            out.logits = None
            return memory.peak - before, memory.live - before
    finally:
        model.train(was)
