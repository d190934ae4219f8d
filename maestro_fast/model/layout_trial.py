"""Which layouts serve a model: each is tried on a few tokens and compared with padded rows.

Hidden states and their gradients have to be those of ``padded``, in which each sequence stands alone in its row. A
padded forward never uses a kernel for several sequences, so the two have only the model in common.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maestro_fast.model.attention import VARLEN, Layout, layout_of
from maestro_fast.model.forward import evaluating, implementation_of, last_hidden
from maestro_fast.model.head import causal_lm, product_dtype, vocabulary_of
from maestro_fast.model.layouts import Layouts, Sharing, cost_of_a_pair
from maestro_fast.model.rows import Sequences
from maestro_fast.settings import SettingsError

logger = logging.getLogger(__name__)

_TAKES_TREES = ("sdpa", "eager", VARLEN)  # The implementations that shared rows are made for.
_WINDOW = 6  # Sliding windows are as short as this in a trial, so that a few tokens show whether they are kept.
_ROUNDINGS = 4.0  # A layout that is right differs by about as much as rounding does, a wrong one by 7 times as much.
_MOST = 0.5  # The largest difference that is put down to rounding, in a model that rounding changes beyond recognition.


def choose_layout(model: nn.Module, sharing: Sharing = "never") -> Layouts:
    """Tries the layouts that the model's attention offers, and says which serve. The log has the choice and its reason.

    Without padding the model takes several sequences at once, by its kernel or in packed rows; if it mixes them, it
    gets padded rows. Where prompts may be shared, shared rows are tried, too.

    Args:
        sharing: whether responses share their prompt where that costs less ("auto"), always, or never.

    Raises:
        ValueError: the model cannot compute even padded rows, for example because its attention has no kernel for its
            device.
        SettingsError: ``sharing`` is "always", and the model cannot share prompts.
    """
    implementation = implementation_of(model)
    plain = _plain_layout(model, layout_of(implementation))
    if sharing == "never":
        return Layouts(plain)
    name = type(causal_lm(model)).__name__
    kernel = implementation == VARLEN
    pair_cost, found = _try_sharing(model, Layouts(plain, "always", kernel=kernel))
    if not isinstance(found, float):
        if sharing == "always":
            raise SettingsError(f"model.attention: shared does not serve {name} with {implementation}: {found}")
        logger.info("layout: prompts are not shared, %s with %s cannot: %s", name, implementation, found)
        return Layouts(plain)
    logger.info(
        "layout: prompts that responses have in common are computed once %s, states and gradients equal the padded "
        "ones to %.1e",
        "always" if sharing == "always" else "where that costs less",
        found,
    )
    return Layouts(plain, sharing, pair_cost, kernel)


def _try_sharing(model: nn.Module, layouts: Layouts) -> tuple[float, float | str]:
    """Returns what a pair costs, and the difference of shared rows from padded ones or why they do not serve."""
    implementation = implementation_of(model)
    if implementation not in _TAKES_TREES:  # Other kernels read a mask in their own way, some past its end.
        return 0.0, f"its attention is {implementation}, and only {', '.join(_TAKES_TREES)} take shared prompts"
    # A model's own code may raise anything where it meets a mask that it does not know. Then it trains without sharing.
    try:
        config = causal_lm(model).config.get_text_config()
        if (limit := _limit_by_place(config)) is not None:
            return 0.0, limit
        with _short_window(config):
            found = _difference(model, layouts, _SHARED_PROBE)
        return cost_of_a_pair(config) if isinstance(found, float) else 0.0, found
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {error}"


def _plain_layout(model: nn.Module, wanted: Layout) -> Layout:
    implementation = implementation_of(model)
    found = _difference(model, Layouts(wanted), _PROBE)
    if isinstance(found, float):
        logger.info(
            "layout: %s with %s, states and gradients equal the padded ones to %.1e", wanted, implementation, found
        )
        return wanted
    name = type(causal_lm(model)).__name__
    logger.info("layout: padded with %s, %s cannot take %s: %s", implementation, name, wanted, found)
    return "padded"


# The two short ones may share a row. Numbers stand for tokens, see ``_spread``.
_PROBE = Sequences([[*range(1, 10)], [10, 11, 12], [13, 14, 15]], [[16]] * 3)
# Two prompts begin with the same 16 tokens; one of the first one's completions has a single token, one has none.
_SHARED_PROBE = Sequences(
    [[*range(1, 20)]] * 4 + [[*range(1, 17), 20]] * 2,
    [[21, 22, 23], [24], [], [25, 26], [27, 28], [29, 30, 31, 32]],
)


def _spread(probe: Sequences, vocabulary: int) -> Sequences:
    """Puts tokens from all over the vocabulary in place of the numbers.

    The first tokens of a vocabulary are often special ones, on which rounding errors grow a hundredfold.
    """
    stride = max(1, vocabulary // 40)
    prompts, completions = (
        [[i * stride % vocabulary for i in ids] for ids in each] for each in (probe.prompt_ids, probe.completion_ids)
    )
    return Sequences(prompts, completions)


@contextlib.contextmanager
def _short_window(config: Any) -> Iterator[None]:
    """Shortens the sliding window of a text config that has one."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        yield
        return
    config.sliding_window = _WINDOW
    try:
        yield
    finally:
        config.sliding_window = window


def _limit_by_place(config: Any) -> str | None:
    """Says which limit the attention of a model has that its masks do not tell, by its name in the text config.

    Such a limit counts places in the row, as windows of GPT-Neo do. It is far longer than a trial, which cannot see it.
    """
    names = ("window", "window_size", "window_len", "attention_chunk_size")
    for name, value in sorted(vars(config).items()):
        if name.endswith(names) and name != "sliding_window" and type(value) is int and value > 0:
            return f"its {name} of {value} counts places in the row, where shared rows have other responses, too"
    return None


def _difference(model: nn.Module, layouts: Layouts, probe: Sequences) -> float | str:
    """Returns how far a layout is from ``padded``, or what is wrong with the layout.

    The differences are those of single tokens, relative to the token's state or gradient. The largest one may be as
    large as a few times what rounding the embeddings once more makes of padded rows, which depends on the model.
    """
    probe = _spread(probe, vocabulary_of(causal_lm(model)))
    dtype = product_dtype(next(model.parameters()))
    with evaluating(model):
        padded = _padded_states_and_gradients(model, probe)
        try:
            found = _states_and_gradients(model, probe, layouts)
        except (RuntimeError, ValueError, TypeError) as error:  # A model's own attention may raise any of these.
            return f"{type(error).__name__}: {error}"
        rounded = _states_and_gradients(model, probe, Layouts("padded"), rounding=torch.finfo(dtype).eps)
    gaps, noise = _gaps(found, padded), _gaps(rounded, padded)
    # Half-precision numbers have 8 or 11 significant bits, and a gradient passes through every layer twice.
    least = (1e-4, 1e-4) if dtype == torch.float32 else (5e-2, 1e-1)
    allowed = [min(max(low, _ROUNDINGS * n), _MOST) for low, n in zip(least, noise, strict=True)]
    if all(gap < most for gap, most in zip(gaps, allowed, strict=True)):
        return max(gaps)
    return (
        f"it mixes packed sequences (states differ by {gaps[0]:.1e}, gradients by {gaps[1]:.1e}, "
        f"rounding explains {allowed[0]:.1e} and {allowed[1]:.1e})"
    )


def _gaps(found: tuple[Tensor, Tensor], padded: tuple[Tensor, Tensor]) -> list[float]:
    """The largest difference of a token's states and of its gradients, relative to what ``padded`` gives."""
    sizes = [expected.norm(dim=-1) for expected in padded]
    sizes = [size.clamp(min=1e-3 * size.mean().item()) for size in sizes]
    return [((a - b).norm(dim=-1) / size).max().item() for a, b, size in zip(found, padded, sizes, strict=True)]


def _padded_states_and_gradients(model: nn.Module, probe: Sequences) -> tuple[Tensor, Tensor]:
    """What ``_states_and_gradients`` gives for the layout that every model must be able to compute.

    Raises:
        ValueError: the model cannot compute it, for example because its attention has no kernel for its device.
    """
    try:
        return _states_and_gradients(model, probe, Layouts("padded"))
    except (RuntimeError, ValueError, TypeError) as error:
        weight = next(model.parameters())
        raise ValueError(
            f"model: {type(causal_lm(model)).__name__} with attention {implementation_of(model)} fails on a few padded "
            f"tokens in {weight.dtype} on {weight.device}, expected an attention that works there: "
            f"{type(error).__name__}: {error}"
        ) from error


def _states_and_gradients(
    model: nn.Module, probe: Sequences, layouts: Layouts, rounding: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The last hidden states, float32 [T, d], and the gradient of a weighted sum of them by each token's embedding.

    The gradient [V, d], for the V different tokens of the probe, adds up all occurrences of a token, because a shared
    prompt occurs once for all its responses.

    Args:
        rounding: changes the embeddings by up to this factor, up and down.
    """
    ids: list[Tensor] = []
    embedded: list[Tensor] = []

    def as_leaf(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        ids.append(inputs[0].flatten())
        leaf = out.detach()
        if rounding:
            leaf = (leaf.float() * (1 + rounding * _wave(leaf))).to(leaf.dtype)
        embedded.append(leaf.requires_grad_())
        return embedded[0].clone()  # Some models scale the embeddings in place, which autograd forbids for a leaf.

    embedding = causal_lm(model).get_input_embeddings()
    handle = embedding.register_forward_hook(as_leaf)
    try:
        with torch.enable_grad():
            states = last_hidden(model, probe, layouts).packed().float()
            gradient = torch.autograd.grad((states * _wave(states)).sum(), embedded[0])[0].float().flatten(0, 1)
    finally:
        handle.remove()
    known = torch.tensor(sorted({token for tokens in probe.tokens for token in tokens}), device=gradient.device)
    place = torch.searchsorted(known, ids[0]).clamp(max=len(known) - 1)
    gradient = gradient.masked_fill((known[place] != ids[0])[:, None], 0.0)  # That is padding.
    by_token = gradient.new_zeros(len(known), gradient.shape[1])
    by_token.index_put_((place,), gradient, accumulate=True)
    return states.detach(), by_token


def _wave(like: Tensor) -> Tensor:
    """Numbers between -1 and 1 in no visible order, float32, the same in every run."""
    return torch.arange(like.numel(), device=like.device).float().cos().view_as(like)
