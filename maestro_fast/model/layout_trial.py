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
from maestro_fast.model.head import causal_lm, product_dtype
from maestro_fast.model.layouts import Layouts, Sharing, cost_of_a_pair
from maestro_fast.model.rows import Sequences
from maestro_fast.settings import SettingsError

logger = logging.getLogger(__name__)

_WINDOW = 6  # Sliding windows are as short as this in a trial, so that a few tokens show whether they are kept.


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
    kernel = implementation == VARLEN
    if sharing == "never":
        return Layouts(plain)
    name = type(causal_lm(model)).__name__
    shared = Layouts(plain, "always", kernel=kernel)
    with _short_window(causal_lm(model).config.get_text_config()):
        found = _difference(model, shared, _SHARED_PROBE)
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
    return Layouts(plain, sharing, cost_of_a_pair(causal_lm(model).config.get_text_config()), kernel)


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


_PROBE = Sequences([[*range(1, 10)], [10, 11, 12], [13, 14, 15]], [[16]] * 3)  # The two short ones may share a row.
# Two prompts begin with the same 16 tokens; one of the first one's completions has a single token, one has none.
_SHARED_PROBE = Sequences(
    [[*range(1, 20)]] * 4 + [[*range(1, 17), 20]] * 2,
    [[21, 22, 23], [24], [], [25, 26], [27, 28], [29, 30, 31, 32]],
)


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


def _difference(model: nn.Module, layouts: Layouts, probe: Sequences) -> float | str:
    """Returns the largest relative difference between a layout and ``padded``, or what is wrong with the layout."""
    vocabulary = causal_lm(model).get_input_embeddings().weight.shape[0]
    probe = Sequences(
        *([[i % vocabulary for i in ids] for ids in each] for each in (probe.prompt_ids, probe.completion_ids))
    )
    exact = product_dtype(next(model.parameters())) == torch.float32
    with evaluating(model):
        padded = _padded_states_and_gradients(model, probe)
        try:
            found = _states_and_gradients(model, probe, layouts)
        except (RuntimeError, ValueError, TypeError) as error:  # A model's own attention may raise any of these.
            return f"{type(error).__name__}: {error}"
    gaps = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, padded, strict=True)]
    # Half-precision numbers have 8 or 11 significant bits, and a gradient passes through every layer twice.
    if all(gap < tolerance for gap, tolerance in zip(gaps, (1e-4, 1e-4) if exact else (5e-2, 1e-1), strict=True)):
        return max(gaps)
    return f"it mixes packed sequences (states differ by {gaps[0]:.1e}, gradients by {gaps[1]:.1e})"


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


def _states_and_gradients(model: nn.Module, probe: Sequences, layouts: Layouts) -> tuple[Tensor, Tensor]:
    """The last hidden states, float32 [T, d], and the gradient of a weighted sum of them by each token's embedding.

    The gradient [V, d] adds up all occurrences of a token, because a shared prompt occurs once for all its responses.
    """
    ids: list[Tensor] = []
    embedded: list[Tensor] = []

    def as_leaf(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        ids.append(inputs[0])
        embedded.append(out.detach().requires_grad_())
        return embedded[0].clone()  # Some models scale the embeddings in place, which autograd forbids for a leaf.

    embedding = causal_lm(model).get_input_embeddings()
    handle = embedding.register_forward_hook(as_leaf)
    try:
        with torch.enable_grad():
            states = last_hidden(model, probe, layouts).packed().float()
            direction = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
            gradient = torch.autograd.grad((states * direction).sum(), embedded[0])[0].float().flatten(0, 1)
    finally:
        handle.remove()
    highest = max(map(max, probe.tokens)) + 1
    by_token = gradient.new_zeros(highest, gradient.shape[1])
    by_token.index_put_((ids[0].flatten().clamp(max=highest - 1),), gradient, accumulate=True)
    return states.detach(), by_token
