"""Tiny models, a batch whose prompts are shared in every way, and all that is read off a forward, also in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from maestro_fast.model.attention import Layout
from maestro_fast.model.forward import completion_logprobs, last_hidden
from maestro_fast.model.head import backbone_of, head_of
from maestro_fast.model.layouts import Layouts
from maestro_fast.model.rows import Sequences
from maestro_fast.ops import PolicyLossConfig, policy_loss, pool_hidden
from maestro_fast.ops.pool_hidden import PoolMode
from maestro_fast.training.batches import MicroBatch, TokenLogprobs
from maestro_fast.training.loss import loss_of_states

SHARED = Layouts("padded", "always")
TEMPERATURE = 0.8
MODES: tuple[PoolMode, ...] = ("last", "mean", "prompt_last", "prompt_mean")
LOSS = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.02)

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
WINDOW = {"sliding_window": 5}  # It is shorter than the prompts that are shared.
MIXED = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"], **WINDOW}

MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, **WINDOW, head_dim=8, attn_logit_softcapping=2.0)),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SMALL, **WINDOW)),
    "qwen3, mixed": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, **MIXED, head_dim=8)),
}


def lively(model: Any, seed: int = 0) -> Any:
    """Gives the weights a size at which every token that is seen, or not seen, shows in the states."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread, middle = (0.2, 0.0) if parameter.ndim > 1 else (0.1, parameter.mean())
            parameter.copy_(middle + spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def model_of(name: str) -> Any:
    return lively(MODELS[name]())


def with_lora(model: nn.Module) -> Any:
    """Puts adapters on the attention, which change what it computes from the start."""
    import peft

    tuned: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return tuned.eval()


# --- the batch ---


def batch() -> Sequences:
    """Groups of 5, 2, 1, 1 and 1 in mixed order: prompts that begin alike or begin one another, empty responses,
    responses of one token, equal responses."""
    generator = torch.Generator().manual_seed(3)

    def some(count: int) -> list[int]:
        return torch.randint(3, 96, (count,), generator=generator).tolist()

    stem, twice = some(18), some(6)
    long, short = stem + some(6), stem + some(2)
    prompts = [long, short, [7], long, some(5), long, stem, long, short, long]
    completions = [twice, some(9), some(2), [], some(4), twice, some(3), some(1), some(5), some(12)]
    return Sequences(prompts, completions)


def micro_batch(sequences: Sequences) -> MicroBatch:
    """Advantages, one of them 0, and log-probs of two other policies, to compare with."""
    lengths = [len(c) for c in sequences.completion_ids]
    generator = torch.Generator().manual_seed(4)
    advantages = torch.randn(len(lengths), generator=generator)
    advantages[1] = 0.0
    old, ref = (-4.0 + torch.rand(sum(lengths), generator=generator) for _ in range(2))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return MicroBatch(sequences, advantages, bounds, TokenLogprobs(old, ref), 30.0, 40.0)


# --- what is read off a forward ---


def found(
    model: Any, sequences: Sequences, layout: Layout | Layouts, autocast: bool = False, *, packed: bool = False
) -> dict[str, Tensor]:
    """Log-probs, entropies, contexts, the loss and the gradient of every parameter that trains.

    Args:
        packed: whether to return the states of all tokens, too.
    """
    head, batch = head_of(model), micro_batch(sequences)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = last_hidden(model, sequences, layout)
        logprobs, entropies = completion_logprobs(hidden.detach(), head, TEMPERATURE, "value")
        contexts = {f"context {mode}": hidden.detach().contexts(mode) for mode in MODES}
        loss = loss_of_states(hidden, batch, head, TEMPERATURE, LOSS).loss
    loss.backward()
    assert entropies is not None
    out = {"log-probs": logprobs, "entropies": entropies, **contexts, "loss": loss, **gradients(model)}
    return {name: x.detach() for name, x in out.items()} | ({"states": hidden.packed().detach()} if packed else {})


def truth(model: Any, sequences: Sequences) -> dict[str, Tensor]:
    """The same in float64, from the model's own logits: each sequence is alone, without padding."""
    exact = copy.deepcopy(model).double()
    logprobs, entropies, states = [], [], []
    with Float64(), captured(exact) as outputs:
        for prompt, completion in zip(sequences.prompt_ids, sequences.completion_ids, strict=True):
            logits = exact(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0] / TEMPERATURE
            logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
            logprobs.append(logp.gather(1, torch.tensor(completion, dtype=torch.int64)[:, None])[:, 0])
            entropies.append(-(logp.exp() * logp).sum(-1))
            states.append(outputs.pop()[0])
        batch, lp, ent = micro_batch(sequences), torch.cat(logprobs), torch.cat(entropies)
        assert batch.logprobs.old_C is not None and batch.logprobs.ref_C is not None
        loss = policy_loss(
            lp,
            batch.advantages_B.double(),
            batch.cu_seqlens,
            old_logprobs=batch.logprobs.old_C.double(),
            ref_logprobs=batch.logprobs.ref_C.double(),
            entropies=ent,
            normalizer=batch.normalizer,
            entropy_normalizer=batch.entropy_normalizer,
            config=LOSS,
        ).loss
        loss.backward()
        packed = torch.cat(states).detach()
        bounds = torch.tensor([0, *sequences.lengths]).cumsum(0)
        prompts = torch.tensor([len(p) for p in sequences.prompt_ids])
        contexts = {
            f"context {mode}": pool_hidden(packed, cu_seqlens=bounds, mode=mode, prompt_lengths=prompts)
            for mode in MODES
        }
    out = {"log-probs": lp, "entropies": ent, **contexts, "loss": loss, **gradients(exact), "states": packed}
    return {name: x.detach() for name, x in out.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Takes the gradients off the parameters that train; none may be missing."""
    out = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            out[f"gradient of {name}"], parameter.grad = parameter.grad, None
    return out


@contextlib.contextmanager
def captured(model: nn.Module) -> Any:
    """Collects the last hidden states of the model's forwards."""
    outputs: list[Tensor] = []
    handle = backbone_of(model).register_forward_hook(lambda _m, _a, out: outputs.append(out.last_hidden_state))
    try:
        yield outputs
    finally:
        handle.remove()


class Float64(TorchFunctionMode):
    """Takes float64 wherever a model asks for float32, as norms, softmax and rotary positions do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def errors(values: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, relative to the largest value of the exact one; that of the whole gradient is
    its norm."""
    found = {
        name: ((value.double() - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-30)).item()
        for name, value in values.items()
    }
    names = [name for name in values if name.startswith("gradient of")]
    gaps = torch.stack([(values[name].double() - exact[name]).norm() for name in names])
    sizes = torch.stack([exact[name].norm() for name in names])
    return found | {"whole gradient": (gaps.norm() / sizes.norm()).item()}
