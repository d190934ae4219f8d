"""Hidden states out of verl's Megatron engine. engine.py says what they are for, and has the same for FSDP.

This file has run on CPUs alone: Megatron-Core 0.16 on gloo, with stand-ins for the attention and the norms of
Transformer Engine. It has not run on GPUs.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from maestro_fast.integrations.verl.batch import CONTEXT_FIELD
from maestro_fast.integrations.verl.contexts import Reading, pooled, spans, wanted_kind


class MegatronContexts(Reading):
    """Before a ``MegatronEngineWithLMHead`` of verl's among the bases of a class.

    The states are what the LM head's layer is called with, on the last stage of the pipeline. They go through the dict
    of verl's that holds the log-probs. So it is verl who puts the sequences together again where context parallelism
    has split them, and removes their padding.
    """

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        run = functools.partial(
            super().forward_backward_batch,  # type: ignore[misc]
            data,
            loss_function,
            forward_only,
        )
        kind = wanted_kind(data, forward_only)
        if kind is None:
            return run()
        self._refuse()
        with self._reading(
            kind, [head.register_forward_pre_hook(self._keep, with_kwargs=True) for head in self._heads()]
        ):
            return run()

    def _refuse(self) -> None:
        """Raises ValueError under settings with which the head's layer does not see the states of the log-probs."""
        engine, model = self.engine_config, self.model_config  # type: ignore[attr-defined]
        unserved = {
            "use_fused_kernels=True": engine.use_fused_kernels,
            "mtp.enable=True": model.mtp.enable,
            "dynamic_context_parallel=True": engine.dynamic_context_parallel,
        }
        if found := [name for name, is_set in unserved.items() if is_set]:
            raise ValueError(f"{', '.join(found)}: no hidden states can be read from Megatron with it, expected False")

    def _heads(self) -> list[nn.Module]:
        """The LM heads of the parts of the model that this process has: one on the last stage, else none."""
        from verl.utils.megatron_utils import unwrap_model

        models = [unwrap_model(part) for part in self.module]  # type: ignore[attr-defined]
        heads = [getattr(getattr(model, "language_model", model), "output_layer", None) for model in models]
        return [head for head in heads if head is not None]

    def _keep(self, _head: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._hidden = inputs[0] if inputs else named["input_"]

    def _lm_head_logits_processor(self, logits: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = super()._lm_head_logits_processor(logits, *args, **kwargs)  # type: ignore[misc]
        if self._context_kind is not None:
            outputs[CONTEXT_FIELD] = self._like(logits)
        return outputs

    def _like(self, logits: Tensor) -> Tensor:
        """The states [rows, tokens, d] of the tokens of ``logits`` [rows, tokens, .], of which each may have a share.

        Raises:
            RuntimeError: they are not the states of these tokens.
        """
        hidden = self._seen()  # [tokens, rows, d]
        if hidden.shape[0] != logits.shape[1]:  # With sequence parallelism each process has a part of the tokens.
            from megatron.core.tensor_parallel.mappings import (  # type: ignore[import-not-found]
                gather_from_sequence_parallel_region,
            )

            hidden = gather_from_sequence_parallel_region(hidden)
        states = hidden.transpose(0, 1).contiguous()
        if states.ndim != 3 or states.shape[:2] != logits.shape[:2]:
            rows, tokens = logits.shape[:2]
            raise RuntimeError(f"hidden states: shape {tuple(states.shape)}, expected ({rows}, {tokens}, d)")
        return states

    def prepare_model_outputs(self, output: Any, data: Any) -> Any:
        outputs = super().prepare_model_outputs(output, data)  # type: ignore[misc]
        if self._context_kind is not None:
            states = outputs[CONTEXT_FIELD]  # jagged [rows, tokens, d]
            begin_B, length_B = spans(data, self._context_kind)
            outputs[CONTEXT_FIELD] = pooled(states.values(), states.offsets()[:-1] + begin_B, length_B)
        return outputs
