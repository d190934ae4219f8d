"""Calls of the ops that are right, and what may be changed in them; ``tests.fuzz.ops`` makes the calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maestro_fast import ops
from maestro_fast.ops import (
    PROFILES,
    SERVED_BY,
    ConductorBatch,
    ConductorParams,
    ConductorState,
    ConductorUpdateConfig,
    PolicyLossConfig,
)

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, "", "abc", "torch", -1, 0, 1, 2, 3, 2**31, 2**63, -(2**63), 10**400, 1.5, -0.5, 0.0),
    *(float("nan"), float("inf"), -float("inf"), 1e-300, 1e300, [], {}, [1, 2], [0.5], "mean", 1j, object()),
)
_DTYPES = (
    *(torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.complex64),
)


class Call(NamedTuple):
    """A call of an op: its name in ``FUNCTIONS``, the arguments by name, and the error that making one of them raised.

    A record of options refuses by itself what it does not take, so then there is no call.
    """

    op: str
    arguments: dict[str, Any]
    refusal: Exception | None = None

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that serve the op."""
        return SERVED_BY[self.op]

    @property
    def names(self) -> list[str]:
        """Everything that an error may begin with: the arguments, and the fields of those that are records."""
        records = [value for value in self.arguments.values() if is_dataclass(value)]
        return [
            *signature(FUNCTIONS[self.op]).parameters,
            "params",
            *(x.name for record in records for x in fields(record)),
        ]


def _token_mask(mask: Any, values: Any = None, *, backend: Any = None) -> dict[str, Tensor]:
    """What ``ops.token_mask`` finds in a mask, and the values that it spreads over the tokens."""
    found = ops.token_mask(mask, backend=backend)
    return {"lengths": found.lengths_B, "spread": found.spread(values)}


def _conductor_update(state: Any, batch: Any, config: Any = None, *, backend: Any = None) -> dict[str, Tensor]:
    """What ``ops.conductor_update`` returns, by names; ``state`` is changed."""
    after, metrics = ops.conductor_update(state, batch, config, backend=backend)
    named = {"parameter": after.params.learned, "first": after.first, "second": after.second}
    return {f"{kind}.{name}": x for kind, tensors in named.items() for name, x in tensors.items()} | metrics


FUNCTIONS: dict[str, Callable[..., Any]] = {name: getattr(ops, name) for name in SERVED_BY}
FUNCTIONS |= {"token_mask": _token_mask, "conductor_update": _conductor_update}


# --- what is right ---


class _Sizes(NamedTuple):
    """Sizes of a batch, and the generator of its numbers."""

    rng: random.Random
    generator: torch.Generator
    groups: int
    size: int
    rewards: int
    hidden: int = 5
    vocabulary: int = 7

    @property
    def batch(self) -> int:
        return self.groups * self.size

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


def valid(rng: random.Random) -> Call:
    """A call with small arguments that an op has to take."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    sizes = _Sizes(rng, generator, rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 3))
    return rng.choice([_of_rewards, _of_rewards, _of_tokens, _of_tokens, _of_a_conductor, _of_lengths])(sizes)


def _of_rewards(sizes: _Sizes) -> Call:
    rng, normal, B, K = sizes.rng, sizes.normal, sizes.batch, sizes.rewards
    profile = rng.choice([*PROFILES])
    given: dict[str, Any] = {
        "groups": rng.choice([sizes.size, [i // sizes.size for i in range(B)]]),
        "profile": profile,
    }
    if PROFILES[profile].kl_in == "score" and rng.random() < 0.5:
        given |= {"kl": normal(B).abs(), "beta": 0.1}
    if PROFILES[profile].needs_lengths:
        given["lengths"] = sizes.integers(1, 4, B)
    rewards, weights = normal(B, K), normal(B, K).abs()
    if rng.random() < 0.3:
        rewards[rng.randrange(B), rng.randrange(K)] = torch.nan
    within = {name: value for name, value in given.items() if name != "lengths"}
    if profile in ("grpo_batch", "gdpo", "verl_gdpo"):  # Counterfactuals are served in groups alone.
        within |= {"profile": "maestro"}
    contexts: dict[str, Any] = {"h": normal(B, sizes.hidden)}
    if rng.random() < 0.4:
        bounds = _bounds(sizes.integers(1, 4, B))
        contexts = {"hidden": normal(int(bounds[-1]), sizes.hidden), "cu_seqlens": bounds, "pool": "mean"}
    step = {"rewards": rewards, "conductor": _params(sizes), **contexts, **_draw(rng), **given}
    return rng.choice(
        [
            Call("group_advantages", {"rewards": rewards, "weights": weights, **given}),
            Call("counterfactual_advantages", _counterfactual(rewards, weights, normal(2, K).abs(), within)),
            Call("maestro_advantages", step),
        ]
    )


def _counterfactual(rewards: Tensor, weights: Tensor, actions: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    return {"rewards": rewards, "weights": weights, "action_weights": actions, **given}


def _of_a_conductor(sizes: _Sizes) -> Call:
    rng, normal, B, K = sizes.rng, sizes.normal, sizes.batch, sizes.rewards
    params = _params(sizes)
    if rng.random() < 0.5:
        return Call("conductor_weights", {"h": normal(B, sizes.hidden), "params": params, **_draw(rng)})
    learned = params.learned
    first = {name: normal(*x.shape) / 10 for name, x in learned.items()}
    second = {name: normal(*x.shape).square() + 0.1 for name, x in learned.items()}
    state = ConductorState(params, first, second, rng.randint(1, 9))
    actions = sizes.integers(0, K, B) if rng.random() < 0.6 else None
    drawn = normal(B).abs().clamp(0.1, 1.0) if actions is not None and rng.random() < 0.5 else None
    live = sizes.integers(0, 2, B).bool() if rng.random() < 0.5 else None
    meta = normal(B, K) if actions is None else normal(B)
    batch = ConductorBatch(normal(B, sizes.hidden), meta, actions, drawn, live)
    return Call("conductor_update", {"state": state, "batch": batch, "config": ConductorUpdateConfig(tau=0.8)})


def _of_tokens(sizes: _Sizes) -> Call:
    rng, normal, B, d, V = sizes.rng, sizes.normal, sizes.batch, sizes.hidden, sizes.vocabulary
    lengths = sizes.integers(1, 4, B)
    bounds = _bounds(lengths)
    T = int(bounds[-1])
    config = PolicyLossConfig(kl_coef=0.05, normalization=rng.choice(["grpo", "dapo", "bnpo"]))
    loss: dict[str, Any] = {"advantages": normal(B), "cu_seqlens": bounds, "normalizer": float(T), "config": config}
    loss |= {"old_logprobs": -normal(T).abs(), "ref_logprobs": -normal(T).abs()}
    if rng.random() < 0.3:
        loss["token_mask"] = sizes.integers(0, 2, T)
    head: dict[str, Any] = {"hidden": normal(T, d), "lm_head": normal(V, d), "targets": sizes.integers(0, V, T)}
    head |= {"bias": normal(V), "logit_scale": 0.7, "softcap": 5.0, "temperature": 0.8}
    logprobs = -normal(T).abs()
    if rng.random() < 0.5:
        for x in (logprobs, head["hidden"], head["lm_head"]):
            x.requires_grad_()
    padded = {
        "hidden": normal(B, 4, d),
        **rng.choice([{"lengths": lengths}, {"mask": torch.arange(4) < lengths[:, None]}]),
    }
    pool = rng.choice(["last", "mean", "prompt_last", "prompt_mean"])
    of_pool = {"mode": pool} | ({"prompt_lengths": sizes.integers(0, 3, B)} if pool.startswith("prompt") else {})
    return rng.choice(
        [
            Call("pool_hidden", {"hidden": normal(T, d), "cu_seqlens": bounds, **of_pool}),
            Call("pool_hidden", {**padded, **of_pool}),
            Call("token_logprobs", {**head, "entropy": rng.choice(["value", "none", "grad"]), "ignore_index": -100}),
            Call("policy_loss", {"logprobs": logprobs, **loss, "entropies": normal(T).abs()}),
            Call("linear_policy_loss", {**head, **loss}),
        ]
    )


def _of_lengths(sizes: _Sizes) -> Call:
    rng, B = sizes.rng, sizes.batch
    n, mask = rng.randint(1, 12), sizes.integers(0, 2, B, 6)
    if rng.random() < 0.5:
        mask = (torch.arange(6) < sizes.integers(0, 7, B, 1)).to(rng.choice([torch.int64, torch.bool, torch.float32]))
    lengths: Any = sizes.integers(0, 50, n)
    lengths = rng.choice([lengths, lengths.tolist(), lengths.int()])
    return rng.choice(
        [
            Call("token_mask", {"mask": mask, "values": sizes.normal(B)}),
            Call("sum_tokens", {"values": sizes.normal(B, 6)}),
            Call("pack_sequences", {"lengths": lengths, "max_tokens": rng.randint(50, 120)}),
            Call("balance_sequences", {"lengths": lengths, "parts": rng.randint(1, n), "equal_size": False}),
        ]
    )


def _params(sizes: _Sizes) -> ConductorParams:
    normal, d, K = sizes.normal, sizes.hidden, sizes.rewards
    if sizes.rng.random() < 0.6:
        return ConductorParams(normal(d), normal(d).abs() + 0.5, normal(K, d) / 4, normal(K))
    return ConductorParams(normal(d), normal(d).abs() + 0.5, normal(K, 4) / 4, normal(K), normal(4, d) / 3, normal(4))


def _draw(rng: random.Random) -> dict[str, Any]:
    mode = rng.choice(["soft", "sample"])
    return {"tau": 0.9, "min_prob": 0.05, "alpha": 0.4, "mode": mode, "seed": 3, "step": 2, "offset": 1}


def _bounds(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


# --- changes ---


def changed(rng: random.Random, call: Call, without: tuple[str, ...] = ()) -> tuple[Call, str]:
    """The call with up to two arguments changed, and what was changed; the changes in ``without`` are not made."""
    done: list[str] = []
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        arguments = dict(call.arguments)
        name = rng.choice([*arguments, *signature(FUNCTIONS[call.op]).parameters])
        if name == "backend":
            continue
        value, how = arguments.get(name), ""
        try:
            if is_dataclass(value) and rng.random() < 0.8:
                arguments[name], how = _changed_record(rng, value, without)
            elif isinstance(value, Tensor) and rng.random() < 0.8:
                # Logits of thousands lose the precision of small differences.
                far = ("shifted by 1e3",) if name in ("hidden", "lm_head") else ()
                arguments[name], how = _changed_tensor(rng, value, (*without, *far))
            else:
                arguments[name] = rng.choice(HOSTILE)
                how = repr(arguments[name])[:40]
        except _Refused as refused:
            return call._replace(refusal=refused.error), "; ".join([*done, f"{name}.{refused}"])
        except (RuntimeError, NotImplementedError, TypeError):  # The second change does not go with the first.
            continue
        call = call._replace(arguments=arguments)
        done.append(f"{name}: {how}")
    return call, "; ".join(done) or "as it is"


class _Refused(Exception):
    """A record of options did not take a value."""

    def __init__(self, words: str, error: Exception) -> None:
        super().__init__(words)
        self.error = error


def _changed_record(rng: random.Random, record: Any, without: tuple[str, ...]) -> tuple[Any, str]:
    """The record with another value of one field, and what was changed."""
    field = rng.choice([x.name for x in fields(record)])
    value = getattr(record, field)
    if is_dataclass(value):
        inner, how = _changed_record(rng, value, without)
        return replace(record, **{field: inner}), f"{field}.{how}"
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice([*value])
        x, how = _changed_tensor(rng, value[key], without)
        return replace(record, **{field: {**value, key: x}}), f"{field}.{key}: {how}"
    if isinstance(value, Tensor) and rng.random() < 0.8:
        # Logits of thousands would lose the precision of small differences.
        x, how = _changed_tensor(rng, value, (*without, "shifted by 1e3"))
        return replace(record, **{field: x}), f"{field}: {how}"
    other = rng.choice(HOSTILE)
    try:
        return replace(record, **{field: other}), f"{field}: {other!r:.40}"
    except Exception as error:
        raise _Refused(f"{field}: {str(other)[:40]!r}", error) from error


def _changed_tensor(rng: random.Random, x: Tensor, without: tuple[str, ...]) -> tuple[Any, str]:
    how = rng.choice([name for name in _TENSORS if name not in without])
    return _TENSORS[how](rng, x), how


def _with(value: float) -> Callable[[random.Random, Tensor], Tensor]:
    def put(rng: random.Random, x: Tensor) -> Tensor:
        if not x.numel() or not (x.is_floating_point() or x.is_complex()):
            return x
        x = x.detach().clone()
        x.view(-1)[rng.randrange(x.numel())] = value
        return x

    return put


def _other_dtype(rng: random.Random, x: Tensor) -> Tensor:
    return x.to(rng.choice(_DTYPES))


def _expanded(rng: random.Random, x: Tensor) -> Tensor:
    return x[:1].expand_as(x) if x.ndim else x


_TENSORS: dict[str, Callable[[random.Random, Tensor], Any]] = {
    "another dtype": _other_dtype,
    "bfloat16": lambda rng, x: x.to(torch.bfloat16) if x.is_floating_point() else x,
    "one more": lambda rng, x: torch.cat([x, x[:1]]) if x.ndim else x,
    "one less": lambda rng, x: x[1:] if x.ndim else x,
    "none": lambda rng, x: x[:0] if x.ndim else x,
    "a scalar": lambda rng, x: x.reshape(-1)[0] if x.numel() else x,
    "one more axis": lambda rng, x: x.unsqueeze(rng.randint(0, x.ndim)),
    "one axis less": lambda rng, x: x[0] if x.ndim and len(x) else x,
    "the last axis shorter": lambda rng, x: x[..., :-1] if x.ndim else x,
    "transposed": lambda rng, x: x.T if x.ndim == 2 else x,
    "with strides": lambda rng, x: torch.stack([x, x], -1)[..., 0],
    "all rows the same": _expanded,
    "reversed": lambda rng, x: x.flip(0) if x.ndim else x,
    "negative": lambda rng, x: -x if x.dtype != torch.bool else x,
    "1e-30 of it": lambda rng, x: x * 1e-30 if x.is_floating_point() else x,
    "1e15 of it": lambda rng, x: x * 1e15 if x.is_floating_point() else x,
    "shifted by 1e3": lambda rng, x: x + 1000,
    "zeros": lambda rng, x: torch.zeros_like(x),
    "a NaN": _with(float("nan")),
    "an infinity": _with(float("inf")),
    "minus infinity": _with(-float("inf")),
    "meta": lambda rng, x: x.to("meta"),
    "with a gradient": lambda rng, x: x.clone().requires_grad_() if x.is_floating_point() else x,
    "sparse": lambda rng, x: x.to_sparse() if x.ndim else x,
    "a NumPy array": lambda rng, x: x.detach().to_dense().cpu().numpy() if x.device.type == "cpu" else x,
    "a list": lambda rng, x: x.tolist(),
}
