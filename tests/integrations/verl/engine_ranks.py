"""One process of verl's FSDP engine on a CPU, which saves what it gave for each case; test_engine.py starts them.

    RANK=0 WORLD_SIZE=1 MASTER_PORT=... python engine_ranks.py CHECKPOINT FOLDER

It runs without Ray, on gloo over the loopback interface.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import verl  # noqa: F401  It loads the plugin and the CPU's platform, which must come before the engines.
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import _init_utils
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead

from maestro_fast.integrations.verl.batch import CONTEXT_FLAG
from maestro_fast.integrations.verl.engine import FSDPContexts, extend, with_contexts
from maestro_fast.model import backbone_of
from tests.integrations.verl.ranks import error_of

ROWS = 8
KINDS = ("response", "response_mean", "prompt_last", "prompt_mean")


@dataclass(frozen=True)
class Case:
    """A way in which verl runs the forward.

    Attributes:
        processes: how many share the rows; with ``ulysses`` they share the tokens of each row.
        packed: whether the sequences of a micro-batch follow each other without padding.
        bucket: the multiple to which a packed micro-batch is padded at its end; 0 leaves it as it is.
        dynamic: whether micro-batches are made by tokens, which reorders the rows.
        lora: the rank of an adapter; 0 for none.
    """

    name: str
    processes: int = 1
    strategy: str = "fsdp2"
    packed: bool = True
    bucket: int = 0
    dynamic: bool = False
    lora: int = 0
    fused: bool = False
    ulysses: int = 1
    precision: str = "fp32"


CASES = (
    Case("padded", packed=False),
    Case("packed"),
    Case("packed, dynamic", dynamic=True),
    Case("padded, dynamic", packed=False, dynamic=True),
    Case("bucketed", bucket=64),
    Case("fsdp1", strategy="fsdp"),
    Case("fsdp1, lora", strategy="fsdp", lora=4),
    Case("lora", lora=4),
    Case("bfloat16", precision="bf16"),
    # verl changes the class of the model, so all that comes after this would be fused, too. Its FSDP2 cannot do it.
    Case("fused", strategy="fsdp", fused=True),
    Case("two ranks", processes=2, dynamic=True),
    Case("ulysses", processes=2, ulysses=2),
    Case("ulysses, dynamic", processes=2, ulysses=2, dynamic=True),
    Case("ulysses, bucketed", processes=2, ulysses=2, bucket=7),
)


def sequences() -> tuple[list[Tensor], list[int]]:
    """The token ids of all rows, and the lengths of their prompts."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 40, (ROWS,), generator=generator).tolist()
    rows = [torch.randint(5, 300, (length,), generator=generator) for length in lengths]
    return rows, [1 if i == 0 else max(1, length // 3) for i, length in enumerate(lengths)]


def batch_of(case: Case, rows: list[int], **settings: Any) -> TensorDict:
    """What verl's trainer sends to a worker for these rows."""
    ids, prompts = sequences()

    def jagged(values: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    batch = TensorDict(
        {
            "input_ids": jagged([ids[i] for i in rows]),
            "position_ids": jagged([torch.arange(len(ids[i])) for i in rows]),
            "prompts": jagged([ids[i][: prompts[i]] for i in rows]),
            "responses": jagged([ids[i][prompts[i] :] for i in rows]),
            "loss_mask": jagged([torch.ones(len(ids[i]) - prompts[i], dtype=torch.long) for i in rows]),
        },
        batch_size=len(rows),
    )
    tensordict_utils.assign_non_tensor(
        batch,
        use_remove_padding=case.packed,
        use_dynamic_bsz=case.dynamic,
        max_token_len_per_gpu=64,
        micro_batch_size_per_gpu=2,
        use_fused_kernels=case.fused,
        temperature=1.0,
        calculate_entropy=True,
        compute_loss=False,
        **settings,
    )
    return batch


def engine_of(case: Case, checkpoint: str) -> Any:
    # FSDP1 refuses to synchronise weights on a CPU, which verl asks of it. gloo can do it.
    _init_utils._check_module_states_for_sync_module_states = lambda _states: None
    model = HFModelConfig(
        path=checkpoint,
        use_remove_padding=case.packed,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
        lora_rank=case.lora,
        lora_alpha=8,
        target_modules="all-linear",
        use_fused_kernels=case.fused,
        fused_kernel_options={"impl_backend": "torch"},
    )
    settings = FSDPEngineConfig(
        strategy=case.strategy,
        fsdp_size=-1,
        use_torch_compile=False,
        ulysses_sequence_parallel_size=case.ulysses,
        mixed_precision={"param_dtype": case.precision, "reduce_dtype": "fp32"},
        wrap_policy={"min_num_params": 0},
        use_dynamic_bsz=case.dynamic,
        use_orig_params=True,
        pad_to_length=case.bucket > 0,
        pad_to_length_bucket=case.bucket or 512,
    )
    engine = EngineRegistry.new(
        "language_model",
        case.strategy,
        model_config=model,
        engine_config=settings,
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=3),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def attention_across_ranks(
    query: Tensor, key: Tensor, value: Tensor, mask: None, length: int, *args: Any, position_ids: Tensor, **kwargs: Any
) -> Tensor:
    """Stands for flash attention over packed sequences, which verl wraps in its exchange of heads and tokens."""
    segment = (position_ids[0] == 0).cumsum(0)
    place = torch.arange(len(segment))
    seen = (segment[:, None] == segment) & (place[:, None] >= place)
    repeats = query.shape[2] // key.shape[2]
    heads = (x.transpose(1, 2) for x in (query, key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)))
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2)


def use_flash_attention(engine: Any) -> None:
    from verl.models.transformers import monkey_patch

    monkey_patch._flash_attention_forward = attention_across_ranks
    engine.module.config._attn_implementation = "flash_attention_2"


def outputs(engine: Any, batch: TensorDict) -> dict[str, list[Tensor]]:
    with engine.eval_mode():
        found = engine.infer_batch(batch, loss_function=None)["model_output"]
    return {name: list(value.unbind()) for name, value in found.items()}


def seen_in_training(engine: Any, batch: TensorDict) -> set[str]:
    """The names of what the loss function gets."""
    names: set[str] = set()

    def loss(model_output: dict[str, Tensor], data: TensorDict, dp_group: Any) -> tuple[Tensor, dict[str, Any]]:
        names.update(model_output)
        return model_output["log_probs"].values().sum(), {}

    with engine.train_mode():
        engine.forward_backward_batch(batch, loss, forward_only=False)
    return names


def adapter_of(engine: Any) -> dict[str, Tensor]:
    """Gives the adapter weights other than 0, and returns them."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, parameter in engine.module.named_parameters():
        if "lora_" in name:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            with torch.no_grad():
                local.normal_(std=0.3, generator=generator)
            found[name.replace("_fsdp_wrapped_module.", "")] = local.detach().clone()
    return found


def results_of(case: Case, checkpoint: str) -> dict[str, Any]:
    engine = engine_of(case, checkpoint)
    found: dict[str, Any] = {"gives contexts": isinstance(engine, FSDPContexts)}
    first = engine.get_data_parallel_rank()
    found["rows"] = rows = list(range(ROWS))[first :: engine.get_data_parallel_size()]

    def asking(kind: str) -> TensorDict:
        return batch_of(case, rows, **{CONTEXT_FLAG: kind})

    if case.ulysses > 1:
        found["other attention"] = error_of(lambda: outputs(engine, asking("response")))
        use_flash_attention(engine)
    if case.lora:
        found["adapter"] = adapter_of(engine)
    for kind in KINDS:
        found[kind] = outputs(engine, asking(kind))
        if case.lora:
            with engine.disable_adapter():
                found[f"{kind}, adapter off"] = outputs(engine, asking(kind))
    found["unasked"] = outputs(engine, batch_of(case, rows))
    found["hooks left"] = len(backbone_of(engine.module)._forward_hooks), engine._hidden is not None
    if case.name == "packed":
        found |= refusals_of(case, engine)
        found["training"] = seen_in_training(engine, asking("response"))
    return found


def refusals_of(case: Case, engine: Any) -> dict[str, str]:
    """What an engine says where it cannot give contexts."""
    rows = list(range(ROWS))
    found = {"unknown kind": error_of(lambda: outputs(engine, batch_of(case, rows, **{CONTEXT_FLAG: "terminal"})))}
    batch = batch_of(case, rows, **{CONTEXT_FLAG: "prompt_mean"})
    del batch["prompts"]
    found["no prompts"] = error_of(lambda: outputs(engine, batch))
    for name, module in (("not seen", torch.nn.Linear(1, 1)), ("no states", engine.module)):
        engine._backbone = lambda module=module: module
        found[name] = error_of(lambda: outputs(engine, batch_of(case, rows, **{CONTEXT_FLAG: "response"})))
        del engine._backbone
    for name, pad_size in (("other tokens", 0), ("other rows", None)):
        with engine._reading("response", []):
            engine._hidden = torch.zeros(1, 3, 4)
            found[name] = error_of(lambda pad_size=pad_size: engine._contexts(batch, pad_size))
    return found


def registry() -> dict[str, bool]:
    """What verl's look-up of engines answers."""
    language, value = (EngineRegistry.get_engine_cls(kind, "fsdp2") for kind in ("language_model", "value_model"))
    look_up = EngineRegistry.get_engine_cls.__func__
    extend(EngineRegistry)
    own = type("Own", (FSDPEngineWithLMHead,), {})
    EngineRegistry.register("language_model", "own", device="cpu")(own)
    later = EngineRegistry.get_engine_cls("language_model", "own")
    return {
        "an engine with contexts": issubclass(language, FSDPContexts) and issubclass(language, FSDPEngineWithLMHead),
        "its name is verl's": language.__name__ == "FSDPEngineWithLMHead",
        "the same class again": EngineRegistry.get_engine_cls(model_type="language_model", backend="fsdp2") is language,
        "no second layer": with_contexts(language) is language,
        "another kind of engine is left alone": value is FSDPEngineWithValueHead and with_contexts(dict) is dict,
        "extended once": EngineRegistry.get_engine_cls.__func__ is look_up,
        "an engine that is registered later": issubclass(later, FSDPContexts) and issubclass(later, own),
    }


def main(checkpoint: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    cases = {case.name: results_of(case, checkpoint) for case in CASES if case.processes == processes}
    torch.save({"registry": registry(), "sequences": sequences(), "cases": cases}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
