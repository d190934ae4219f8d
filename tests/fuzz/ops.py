"""Calls the ops with arguments that are almost right: the answer is right, or an error names the argument.

    python -m tests.fuzz ops --inputs 20000 --json tests/fuzz/ops.json

Every input is a valid call of an op with up to two arguments changed: another number, type, dtype, shape, layout, or
values that are large, small, equal, infinite or NaN. What is right is what PyTorch's reference gives in float64 for the
same arguments: the values where it is finite, something that is not finite where it is not, an error where it raises.
A failing input is found again by its number and the seed.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maestro_fast import ops
from maestro_fast.ops import PROFILES, ConductorParams, PolicyLossConfig
from tests.fuzz.trial import Input, add_options, as_tally, try_inputs

__all__ = ["add_options", "main", "run"]

_TOLERANCE = 3e-5  # times the largest truth of a result
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, "", "abc", "torch", -1, 0, 1, 2, 3, 2**31, 2**63, -(2**63), 10**400, 1.5, -0.5, 0.0),
    *(float("nan"), float("inf"), -float("inf"), 1e-300, 1e300, [], {}, [1, 2], [0.5], "mean", 1j, object()),
)
_DTYPES = (
    *(torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.complex64),
)


class Call(NamedTuple):
    """A call of an op: its name, the arguments by name, and the backends that serve it on the CPU."""

    op: str
    arguments: dict[str, Any]
    backends: tuple[str, ...]


def valid(rng: random.Random) -> Call:
    """A call with small arguments that an op has to take."""
    seed = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seed)

    groups, size, K = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 3)
    B, d, V = groups * size, 5, 7
    lengths = torch.randint(1, 4, (B,), generator=seed)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    T = int(bounds[-1])
    profile = rng.choice([*PROFILES])
    of_groups: dict[str, Any] = {"groups": rng.choice([size, [i // size for i in range(B)]]), "profile": profile}
    if PROFILES[profile].kl_in == "score" and rng.random() < 0.5:
        of_groups |= {"kl": normal(B).abs(), "beta": 0.1}
    if PROFILES[profile].needs_lengths:
        of_groups["lengths"] = lengths
    rewards, weights = normal(B, K), normal(B, K).abs()
    if rng.random() < 0.3:
        rewards[rng.randrange(B), rng.randrange(K)] = torch.nan
    params = ConductorParams(normal(d), normal(d).abs() + 0.5, normal(K, d) / 4, normal(K))
    tokens = {"old_logprobs": -normal(T).abs(), "ref_logprobs": -normal(T).abs()}
    config = PolicyLossConfig(kl_coef=0.05, normalization=rng.choice(["grpo", "dapo", "bnpo"]))
    loss = {"advantages": normal(B), "cu_seqlens": bounds, **tokens, "normalizer": float(T), "config": config}
    head = {"hidden": normal(T, d), "lm_head": normal(V, d), "targets": torch.randint(0, V, (T,), generator=seed)}
    head |= {"bias": normal(V), "logit_scale": 0.7, "softcap": 5.0, "temperature": 0.8}
    scores = {"rewards": rewards, "weights": weights}
    within = of_groups if profile not in ("grpo_batch", "gdpo", "verl_gdpo") else {**of_groups, "profile": "maestro"}
    within = {name: value for name, value in within.items() if name != "lengths"}
    draw = {"tau": 0.9, "min_prob": 0.05, "alpha": 0.4, "mode": "soft", "seed": 3, "step": 2, "offset": 1}
    calls = [
        Call("group_advantages", {**scores, **of_groups}, ("torch", "cpp")),
        Call("counterfactual_advantages", {**scores, "action_weights": normal(2, K).abs(), **within}, ("torch", "cpp")),
        Call("conductor_weights", {"h": normal(B, d), "params": params, **draw}, ("torch", "cpp")),
        Call(
            "maestro_advantages",
            {"rewards": rewards, "conductor": params, "h": normal(B, d), **draw, **of_groups},
            ("torch", "cpp"),
        ),
        Call("pool_hidden", {"hidden": normal(T, d), "cu_seqlens": bounds, "mode": "mean"}, ("torch",)),
        Call("pool_hidden", {"hidden": normal(B, 4, d), "lengths": lengths, "mode": "last"}, ("torch",)),
        Call("token_logprobs", {**head, "entropy": "value", "ignore_index": -100}, ("torch",)),
        Call("policy_loss", {"logprobs": -normal(T).abs(), **loss, "entropies": normal(T).abs()}, ("torch",)),
        Call("linear_policy_loss", {**head, **loss}, ("torch",)),
    ]
    return rng.choice(calls)


# --- changes ---


def changed(rng: random.Random, call: Call) -> tuple[Call, str]:
    """The call with up to two arguments changed, and what was changed."""
    arguments, done = dict(call.arguments), []
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        name = rng.choice([*arguments, *signature(getattr(ops, call.op)).parameters])
        if name == "backend":
            continue
        value = arguments.get(name)
        if isinstance(value, Tensor) and rng.random() < 0.8:
            how = rng.choice([*_TENSORS])
            try:
                arguments[name] = _TENSORS[how](rng, value)
            except (RuntimeError, NotImplementedError, TypeError):  # The second change does not go with the first.
                continue
        elif isinstance(value, PolicyLossConfig) and rng.random() < 0.8:
            field = rng.choice([*value.__dataclass_fields__])
            try:
                arguments[name] = replace(value, **{field: rng.choice(HOSTILE)})
            except (ValueError, TypeError):
                continue  # A config refuses by itself.
            how = f"{field} {getattr(arguments[name], field)!r}"
        elif isinstance(value, ConductorParams) and rng.random() < 0.8:
            # Logits of thousands would lose the precision of small differences.
            place, how = rng.randrange(4), rng.choice([how for how in _TENSORS if how != "shifted by 1e3"])
            parts: list[Any] = [*value.tensors]
            try:
                parts[place] = _TENSORS[how](rng, parts[place])
                arguments[name] = ConductorParams(*parts[:4])
            except (ValueError, TypeError, RuntimeError):
                continue
        else:
            arguments[name] = rng.choice(HOSTILE)
            how = repr(arguments[name])[:40]
        done.append(f"{name}: {how}")
    return call._replace(arguments=arguments), "; ".join(done) or "as it is"


def _with(value: float) -> Callable[[random.Random, Tensor], Tensor]:
    def put(rng: random.Random, x: Tensor) -> Tensor:
        if not x.numel() or not (x.is_floating_point() or x.is_complex()):
            return x
        x = x.clone()
        x.view(-1)[rng.randrange(x.numel())] = value
        return x

    return put


def _other_dtype(rng: random.Random, x: Tensor) -> Tensor:
    return x.to(rng.choice(_DTYPES))


def _expanded(rng: random.Random, x: Tensor) -> Tensor:
    return x[:1].expand_as(x) if x.ndim else x


_TENSORS: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "another dtype": _other_dtype,
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
    "a NumPy array": lambda rng, x: x.detach().to_dense().cpu().numpy() if x.device.type == "cpu" else x,  # type: ignore[return-value]
    "a list": lambda rng, x: x.tolist(),
}


# --- answers ---


def answer(call: Call, backend: str, exact: bool = False) -> dict[str, Tensor] | Exception:
    """The tensors that the op returns, or the error of a kind that is meant for its user. Any other error passes."""
    arguments = {name: _wide(value) if exact else value for name, value in call.arguments.items()}
    try:
        return _tensors(getattr(ops, call.op)(**arguments, backend=backend))
    except (ValueError, TypeError) as error:
        return error


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, ConductorParams):
        return ConductorParams(*(_wide(x) for x in value.tensors[:4]))
    return value


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in a result, by the names of the fields that lead to them."""
    if isinstance(value, Tensor):
        return {name or "result": value.detach()}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    return {path: x for key, item in items for path, x in _tensors(item, f"{name}.{key}".strip(".")).items()}


def judge(call: Call, backend: str) -> tuple[str, str]:
    """How a call ends: "right", "refused by name", or a fault, and words on it."""
    found = answer(call, backend)
    names = [*signature(getattr(ops, call.op)).parameters, "params"]
    if isinstance(found, Exception):
        named = re.match(rf"(?:{'|'.join(names)})\b", str(found)) is not None
        words = f"{type(found).__name__}: {str(found)[:300]}"
        # Arguments that are missing are Python's own error.
        if named or re.search(r"missing \d required|missing a required", str(found)):
            return "refused by name", words
        return "refused without a name", words
    truth = answer(call, "torch", exact=True)
    if isinstance(truth, Exception):
        return "refused in float64 alone", f"{type(truth).__name__}: {truth}"
    if truth.keys() != found.keys():
        return "wrong", f"results {[*found]}, expected {[*truth]}"
    for name, ours in found.items():
        if ours.device.type == "meta":
            return "right", "without values"
        expected = truth[name]
        if name.endswith("actions"):  # Rounding decides where two probabilities are nearly the same.
            two = truth[f"{name[:-7]}probs"].topk(min(2, truth[f"{name[:-7]}probs"].shape[1]), 1).values
            clear = (two[:, 0] - two[:, -1]).abs() > 1e-5
            ours, expected = ours[clear], expected[clear]
        size = _size(call, truth, name)
        fault = _differs(ours, expected, size)
        if fault:
            return "wrong", f"{name}: {fault}\nours {ours.flatten()[:12]}\ntruth {expected.flatten()[:12]}"
    return "right", ""


def _size(call: Call, truth: dict[str, Tensor], name: str) -> Tensor:
    """Numbers as large as those that a result was added up from, where it may be smaller itself."""
    kind = name.rpartition(".")[2]
    if kind == "mean":  # That of normalised scores is near 0.
        return truth[f"{name[:-4]}scores"]
    if kind in ("entropies", "entropy", "logprobs", "log_probs", "probs"):
        return torch.cat([truth[name].flatten(), torch.ones(1)])
    advantages = call.arguments.get("advantages")
    if call.op.endswith("policy_loss") and isinstance(advantages, Tensor) and advantages.device.type == "cpu":
        return torch.cat([truth[name].flatten(), advantages.detach().double().flatten()])
    return truth[name]


def _differs(ours: Tensor, truth: Tensor, size: Tensor) -> str:
    if ours.shape != truth.shape:
        return f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if not ours.is_floating_point():
        return "" if torch.equal(ours, truth.to(ours.dtype)) else "other values"
    known = truth.isfinite() & (truth.abs() < 3e38)
    if bool((ours.isfinite() & ~truth.isfinite()).any()):
        return "finite where the truth is not"
    if not bool(ours[known].isfinite().all()):
        return "not finite where the truth is"
    if not known.any():
        return ""
    largest = size[size.isfinite()].abs().max().clamp(min=1e-30) if size.isfinite().any() else 1.0
    error = (ours.double() - truth)[known].abs().max() / largest
    return f"off by {float(error):.2g} of the largest" if error > _TOLERANCE else ""


def run(inputs: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Tries calls, see ``trial.try_inputs``."""

    def make(rng: random.Random) -> Input:
        call, changes = changed(rng, valid(rng))
        backend = rng.choice(call.backends)
        return Input(f"{call.op} by {backend}, {changes}", lambda: judge(call, backend))

    return try_inputs(make, ("right", "refused by name"), inputs=inputs, seed=seed, first=first)


def main(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the command, and returns its tally."""
    return as_tally(given, *run(given.inputs, given.seed, given.first))
