"""One process of verl's Megatron engine on a CPU; test_engine_megatron.py starts them.

    RANK=0 WORLD_SIZE=2 MASTER_PORT=... python megatron_ranks.py TENSOR PIPELINE CONTEXT FOLDER

The forward is verl's ``forward_backward_batch`` on Megatron-Core's GPTModel. What needs a GPU has a stand-in: the
attention and the norms of Transformer Engine, and CUDA's generators of random numbers. The three arguments are the
sizes of the tensor, pipeline and context parallel groups; with tensor parallelism there is sequence parallelism, too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

CPU = torch.device("cpu")


def on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory of tensors that takes "cuda" for the CPU."""

    @functools.wraps(make)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("pin_memory", None)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return make(*args, **kwargs)

    return wrapped


for _name in ("zeros", "empty", "tensor"):
    setattr(torch, _name, on_cpu(getattr(torch, _name)))
torch.Tensor.cuda = lambda self, *args, **kwargs: self
torch.cuda.current_device = lambda: CPU
torch.cuda.synchronize = lambda *args: None

# Megatron keeps the names that it imports, so the above comes first.
import verl  # noqa: E402, F401
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.workers.engine import MegatronEngineWithLMHead  # noqa: E402

from maestro_fast.integrations.verl.batch import CONTEXT_FLAG  # noqa: E402
from maestro_fast.integrations.verl.contexts import KINDS  # noqa: E402
from maestro_fast.integrations.verl.engine import with_contexts  # noqa: E402
from tests.integrations.verl.ranks import error_of  # noqa: E402

ROWS, VOCABULARY = 8, 64


# --- the model ---


class NoRandomNumbers:
    """Stands for the states of CUDA's generators."""

    def fork(self, *args: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True


class Attention(nn.Module):
    """Stands for attention: a function of each token and its position, the same however the tokens are shared."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (query * value).flatten(-2)


def initialize(tensor: int, pipeline: int, context: int) -> None:
    dist.init_process_group("gloo")
    create = parallel_state.create_group
    parallel_state.create_group = lambda *args, **kwargs: create(
        *args, **(kwargs | {"backend": "gloo", "pg_options": None})
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, context_parallel_size=context
    )
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and hasattr(module, "get_cuda_rng_tracker"):
            module.get_cuda_rng_tracker = lambda *args, **kwargs: NoRandomNumbers()
    WrappedTorchNorm.__new__ = lambda cls, config, hidden_size, eps=1e-5, **_: nn.RMSNorm(hidden_size, eps)


def config_of(tensor: int, pipeline: int, context: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # There are no experts, but Megatron checks it.
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def model_of(config: TransformerConfig) -> GPTModel:
    """This process' part of a model whose weights are the same however it is split."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = Attention
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=128,
        position_embedding_type="rope",
        pre_process=first,
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    )
    parts, part = config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        name = name if first else name.replace("layers.0.", "layers.1.")
        shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", -1)
        split = parts > 1 and getattr(parameter, "tensor_model_parallel", False)
        if split:
            shape[dim] *= parts
        weight = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
        weight = 1 + weight if weight.ndim == 1 else weight
        parameter.data.copy_(weight.chunk(parts, dim)[part] if split else weight)
    return model.eval()


def engine_of(model: GPTModel, config: TransformerConfig) -> Any:
    """verl's engine around a model, without what only building and training it needs."""
    engine = object.__new__(with_contexts(MegatronEngineWithLMHead))
    engine.module = [model]
    engine.tf_config, engine.enable_routing_replay = config, False
    engine.engine_config = SimpleNamespace(
        context_parallel_size=config.context_parallel_size,
        dynamic_context_parallel=False,
        use_remove_padding=True,
        pad_bshd_to_minibatch_max=False,
        virtual_pipeline_model_parallel_size=None,
        use_fused_kernels=False,
        pad_to_length=False,
        pad_to_length_bucket=64,
        entropy_from_logits_with_chunking=False,
        router_replay=SimpleNamespace(mode="disabled"),
    )
    engine.model_config = SimpleNamespace(
        mtp=SimpleNamespace(enable=False, enable_train=False),
        hf_config=SimpleNamespace(architectures=["Any"]),
        tokenizer=SimpleNamespace(pad_token_id=0),
        model_type="language_model",
    )
    return engine


# --- what it gives ---


def sequences() -> tuple[list[Tensor], list[int]]:
    """The token ids of all rows, and the lengths of their prompts."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 30, (ROWS,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths], [1 + n // 3 for n in lengths]


def outputs(engine: Any, dynamic: bool, kind: str | None) -> dict[str, list[Tensor]]:
    ids, prompts = sequences()

    def jagged(values: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    batch = TensorDict(
        {
            "input_ids": jagged(ids),
            "prompts": jagged([row[:n] for row, n in zip(ids, prompts, strict=True)]),
            "loss_mask": jagged([torch.ones(len(row) - n) for row, n in zip(ids, prompts, strict=True)]),
        },
        batch_size=ROWS,
    )
    asked = {} if kind is None else {CONTEXT_FLAG: kind}
    tensordict_utils.assign_non_tensor(
        batch,
        use_dynamic_bsz=dynamic,
        max_token_len_per_gpu=64,
        micro_batch_size_per_gpu=2,
        temperature=1.0,
        calculate_entropy=True,
        use_fused_kernels=False,
        **asked,
    )
    with torch.no_grad():
        found = engine.forward_backward_batch(batch, None, forward_only=True)
    return {name: list(value.unbind()) for name, value in found.get("model_output", {}).items()}


def truth(model: GPTModel) -> dict[str, list[Tensor]]:
    """The states and log-probs of each sequence by itself, the states from the last norm."""
    states: list[Tensor] = []
    log_probs = []
    hook = model.decoder.register_forward_hook(lambda _module, _inputs, output: states.append(output[:, 0]))
    for ids in sequences()[0]:
        with torch.no_grad():
            logits = model(ids[None], torch.arange(len(ids))[None], None)[0, :-1]
        log_probs.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    hook.remove()
    return {"states": states, "log_probs": log_probs}


def refusals(engine: Any) -> dict[str, str]:
    """What the engine says to settings under which it can give no contexts."""
    found = {}
    for section, name in (("engine_config", "use_fused_kernels"), ("engine_config", "dynamic_context_parallel")):
        with changed(getattr(engine, section), name):
            found[name] = error_of(lambda: engine._refuse())
    with changed(engine.model_config.mtp, "enable"):
        found["mtp.enable"] = error_of(lambda: engine._refuse())
    with engine._reading("response", []):
        engine._hidden = torch.zeros(5, 1, 32)
        found["other tokens"] = error_of(lambda: engine._like(torch.zeros(1, 6, VOCABULARY)))
    engine._heads = lambda: []
    found["not seen"] = error_of(lambda: outputs(engine, False, "response"))
    del engine._heads
    return found


@contextlib.contextmanager
def changed(settings: Any, name: str) -> Any:
    setattr(settings, name, True)
    yield
    setattr(settings, name, False)


def main(tensor: int, pipeline: int, context: int, folder: Path) -> None:
    initialize(tensor, pipeline, context)
    config = config_of(tensor, pipeline, context)
    model = model_of(config)
    engine = engine_of(model, config)
    found: dict[str, Any] = {"sequences": sequences()}
    for packed in (True, False):
        engine.engine_config.use_remove_padding = packed
        for dynamic in (False, True):
            found[f"{'packed' if packed else 'padded'}{', dynamic' if dynamic else ''}"] = {
                kind or "unasked": outputs(engine, dynamic, kind) for kind in (None, *KINDS)
            }
    engine.engine_config.use_remove_padding = engine.engine_config.pad_to_length = True
    found["bucketed"] = {kind or "unasked": outputs(engine, False, kind) for kind in (None, *KINDS)}
    head = getattr(model, "output_layer", None)
    found["left"] = (0 if head is None else len(head._forward_pre_hooks), engine._hidden is not None)
    if dist.get_world_size() == 1:
        found |= {"truth": truth(model), "refusals": refusals(engine)}
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
