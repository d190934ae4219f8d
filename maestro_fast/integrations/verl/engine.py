"""Hidden states out of verl's training engines: one context per response, from the forward that gives the log-probs.

If a batch asks for contexts (contexts.py), the engine's output has one entry more, ``batch.CONTEXT_FIELD``, float32
[rows, d], which verl sorts, sends and stores like its log-probs. Otherwise an engine does what verl's does, and what is
trained on never gives any. The states are read by a hook while the forward runs; ``output_hidden_states`` would keep
those of every layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from maestro_fast.integrations.verl.batch import CONTEXT_FIELD
from maestro_fast.integrations.verl.contexts import Reading, pooled, spans, wanted_kind
from maestro_fast.integrations.verl.engine_megatron import MegatronContexts

# --- FSDP, FSDP2, and engines that derive from them ---


class FSDPContexts(Reading):
    """Before an ``FSDPEngineWithLMHead`` of verl's, or a subclass of it, among the bases of a class."""

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        step = functools.partial(super().forward_step, micro_batch, loss_function, forward_only)  # type: ignore[misc]
        kind = wanted_kind(micro_batch, forward_only)
        if kind is None:
            return step()
        with self._reading(kind, [self._backbone().register_forward_hook(self._keep)]):
            return step()

    def _backbone(self) -> nn.Module:
        """The module whose output the LM head reads.

        Raises:
            RuntimeError: the sequences are sharded, and verl does not gather them for this attention.
        """
        from maestro_fast.model import backbone_of, causal_lm

        module: nn.Module = self.module  # type: ignore[attr-defined]
        if self.use_ulysses_sp:  # type: ignore[attr-defined]
            attention = str(causal_lm(module).config.get_text_config()._attn_implementation)
            if "flash_attention" not in attention:
                raise RuntimeError(
                    f"ulysses_sequence_parallel_size: is above 1 with attn_implementation={attention}, expected flash "
                    "attention: verl gathers sequences for no other, so hidden states and log-probs would be wrong"
                )
        return backbone_of(module)

    def _keep(self, backbone: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            raise RuntimeError(
                f"hidden states: {type(backbone).__name__} returned {type(output).__name__}, expected an output with "
                "last_hidden_state"
            )
        self._hidden = hidden

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> Any:
        prepare = super().prepare_model_outputs  # type: ignore[misc]
        outputs = prepare(output, output_args, micro_batch, logits_processor_func)
        if self._context_kind is not None:
            outputs[CONTEXT_FIELD] = self._contexts(micro_batch, output_args.get("pad_size"))
        return outputs

    def _contexts(self, micro_batch: Any, pad_size: int | None) -> Tensor:
        """The contexts of a micro-batch, [rows, d].

        Args:
            micro_batch: what verl's forward was made of.
            pad_size: the tokens that verl put behind the packed sequences; None if it padded each row on the right.

        Raises:
            RuntimeError: the states were not seen, or they are not those of these rows.
        """
        assert self._context_kind is not None
        ids, hidden = micro_batch["input_ids"], self._seen()
        begin_B, length_B = spans(micro_batch, self._context_kind)
        sharded = bool(self.use_ulysses_sp)  # type: ignore[attr-defined]
        rows, tokens = len(length_B), int(ids.offsets().diff().max()) if pad_size is None else 0
        if pad_size is not None:
            shares = int(self.ulysses_sequence_parallel_size) if sharded else 1  # type: ignore[attr-defined]
            rows, tokens = 1, (ids.values().shape[0] + pad_size) // shares
        if hidden.ndim != 3 or hidden.shape[:2] != (rows, tokens):
            raise RuntimeError(f"hidden states: shape {tuple(hidden.shape)}, expected ({rows}, {tokens}, d)")
        row_B = torch.arange(rows, device=length_B.device) * tokens if pad_size is None else ids.offsets()[:-1].long()
        group = self.ulysses_parallel_group if sharded else None  # type: ignore[attr-defined]
        return pooled(hidden.flatten(0, 1), row_B + begin_B, length_B, group)


# --- how verl comes by these classes ---


@functools.cache
def with_contexts(engine: type) -> type:
    """The subclass of an engine that gives contexts; an engine of another kind itself."""
    from verl.workers import engine as engines

    for base_name, mixin in (("FSDPEngineWithLMHead", FSDPContexts), ("MegatronEngineWithLMHead", MegatronContexts)):
        base = getattr(engines, base_name, None)  # None where Megatron is not installed.
        if base is not None and issubclass(engine, base) and not issubclass(engine, mixin):
            return type(engine.__name__, (mixin, engine), {"__module__": engine.__module__})
    return engine


def extend(registry: Any) -> None:
    """Makes verl's look-up of engines answer with subclasses that give contexts, also for those registered later."""
    found = registry.get_engine_cls.__func__
    if hasattr(found, "gives_contexts"):
        return

    @functools.wraps(found)
    def get_engine_cls(cls: Any, model_type: str, backend: str) -> type:
        engine: type = found(cls, model_type, backend)
        return with_contexts(engine) if model_type == "language_model" else engine

    get_engine_cls.gives_contexts = True  # type: ignore[attr-defined]
    registry.get_engine_cls = classmethod(get_engine_cls)
