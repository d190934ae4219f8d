"""The parts of a causal language model that the loss needs: its backbone, and its LM head as plain tensors and numbers.

The ops compute the head's product themselves and never form the logits of all tokens. For that they need the head's
weight and what the model does to its logits (bias, scale, softcap), and ``check_head`` tests that nothing was missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from maestro_fast.ops import token_logprobs


class HeadNumbers(TypedDict):
    """What the ops need to know of a head besides its weight, by the names of their parameters."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None


@dataclass(frozen=True)
class LanguageHead:
    """The LM head of a model: logits = softcap(scale * h @ weight.T + bias), as in ``ops.token_logprobs``.

    Attributes:
        module: the layer that holds the weight, and the bias if there is one.
    """

    module: nn.Module
    scale: float
    softcap: float | None

    @property
    def weight(self) -> Tensor:
        """The weight [V, d], in the dtype in which a linear layer would multiply it, see ``product_dtype``.

        The gradient reaches the weight itself. A sharded weight is gathered, by all processes together.

        Raises:
            ValueError: a gradient is wanted of a sharded weight, see ``check_gradient_of``.
        """
        if torch.is_grad_enabled():
            check_gradient_of(self)
        weight = whole(self.module.weight)
        return weight.to(product_dtype(weight))

    @property
    def bias(self) -> Tensor | None:
        """The bias [V], gathered like the weight; None if the head has none."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else whole(bias)

    @property
    def numbers(self) -> HeadNumbers:
        """The keyword arguments of the head for ``ops.token_logprobs`` and ``ops.linear_policy_loss``."""
        return {"bias": self.bias, "logit_scale": self.scale, "softcap": self.softcap}


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of ``F.linear`` with this weight: autocast's where autocast is on, else the weight's own.

    The ops do not see autocast, so their operands are cast by this rule. Autocast leaves float64 as it is.
    """
    device = weight.device.type
    casts = torch.is_autocast_enabled(device) and weight.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if casts else weight.dtype


def causal_lm(model: Any) -> Any:
    """The transformers model inside the wrappers of DDP, FSDP, PEFT and torch.compile."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            model = model.module
        else:
            return model


def backbone_of(model: nn.Module) -> nn.Module:
    """The module that computes the ``last_hidden_state`` which the head reads."""
    backbone: nn.Module = causal_lm(model).base_model
    return backbone


def first_layer_of(model: nn.Module) -> nn.Module:
    """The first of the layers of the backbone, which stand in a list of as many as the model's config says.

    Raises:
        ValueError: the backbone has no such list.
    """
    count = causal_lm(model).config.get_text_config().num_hidden_layers
    for module in backbone_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module[0]
    raise ValueError(
        f"context: response_first_layer, but {type(causal_lm(model)).__name__} has no list of its {count} layers, "
        "expected another context, such as response"
    )


def head_of(model: nn.Module) -> LanguageHead:
    """Reads the LM head of a model; ``check_head`` tells whether it was read right.

    Raises:
        ValueError: the model has no output embedding, or an adapter changes it.
    """
    language_model = causal_lm(model)
    module = language_model.get_output_embeddings()
    if module is None:
        raise ValueError(
            f"model: {type(language_model).__name__} has no output embedding, expected a causal language model"
        )
    if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
        raise ValueError(
            "model.lora: an adapter on the output head is not supported, leave the head out of its targets, or merge "
            "it (model.adapter: merge)"
        )
    config = language_model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LanguageHead(module, scale, softcap)


def vocabulary_of(model: Any) -> int:
    """The number of tokens that the model's input embedding knows, also where peft has wrapped it."""
    embedding = model.get_input_embeddings()
    known = getattr(embedding, "num_embeddings", None)  # Sharded weights have other shapes, so this comes first.
    return int(embedding.weight.shape[0] if known is None else known)


@torch.no_grad()
def check_head(model: nn.Module, head: LanguageHead) -> None:
    """Compares log-probs that ``head`` gives with those of the model's own logits, on a few tokens.

    Raises:
        ValueError: they differ, so the model does something to its logits that ``head`` does not do.
    """
    language_model, captured = causal_lm(model), []
    device, vocabulary = next(model.parameters()).device, vocabulary_of(language_model)
    ids = (torch.arange(8, device=device) * 97 + 11).remainder(vocabulary)[None]
    was_training = model.training
    model.eval()
    # The model itself is called, because one that is sharded is put together by its outermost forward.
    keep = backbone_of(model).register_forward_hook(lambda _m, _a, out: captured.append(out.last_hidden_state[0]))
    try:
        own = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        keep.remove()
        model.train(was_training)
    check_gradient_of(head)
    (states,) = captured
    targets, weight = own.argmax(-1), head.weight
    ours = token_logprobs(states.to(weight.dtype), weight, targets, **head.numbers).logprobs
    theirs = own.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    # Logits in half precision are themselves rounded to 8 or 11 significant bits.
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2}.get(weight.dtype, 1e-1)
    worst = (ours - theirs).abs().max().item()
    if worst > tolerance * max(1.0, theirs.abs().max().item()):
        raise ValueError(
            f"model: {type(language_model).__name__} computes its logits in a way that is not supported: log-probs "
            f"from its last hidden state and its head differ from its own by {worst:.3g} (expected below {tolerance:g})"
        )


def check_gradient_of(head: LanguageHead) -> None:
    """Checks, behind a forward, that the gradient of the head would be that of all processes.

    FSDP2 adds up the gradients of the weights that it has gathered for the forward, up to the backward. A head that is
    sharded again by then would get the gradient of its own process alone. accelerate keeps the head whole since 1.14.

    Raises:
        ValueError: the head trains, and it is sharded.
    """
    weight = head.module.weight
    if weight.requires_grad and hasattr(weight, "full_tensor"):
        raise ValueError(
            "trainer.fsdp: the LM head is sharded again between forward and backward, so its gradient would be lost, "
            f"expected accelerate of at least 1.14, found {version('accelerate')}"
        )


def whole(tensor: Any) -> Tensor:
    """Gathers a sharded tensor, by all processes together; returns any other tensor as it is."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered
