"""Calls the ops with arguments that are almost right: the answer is right, or an error names the argument.

    python -m tests.fuzz ops --inputs 100000 --json tests/fuzz/ops.json
    TRITON_INTERPRET=1 python -m tests.fuzz ops --backend triton --inputs 4000 --json tests/fuzz/ops_of_triton.json

Every input is a valid call of an op with up to two arguments changed: another number, type, dtype, shape, layout, or
values that are large, small, equal, infinite or NaN; see ``tests.fuzz.calls``. What is right is what PyTorch's
reference gives in float64 for the same arguments: the values and gradients where they are finite, something that is
not finite where it is not, an error where it raises. Lists of sequences have to be those of the reference, and whole.
A failing input is found again by its number and the seed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from maestro_fast.ops import ConductorBatch, ConductorParams, ConductorState
from tests.fuzz import trial
from tests.fuzz.calls import FUNCTIONS, Call, changed, valid
from tests.fuzz.trial import Input, as_tally, try_inputs

__all__ = ["add_options", "main", "run"]

# Times the largest truth of a result, by the dtype of the result.
_TOLERANCES = {torch.float64: 3e-5, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# The interpreter runs on the CPU: its bfloat16 arithmetic is silently wrong (Triton issue 11584).
_NOT_INTERPRETED = ("bfloat16", "another dtype")


# --- answers ---


def answer(call: Call, backend: str, exact: bool = False) -> dict[str, Tensor] | Exception:
    """The tensors that the op returns, or the error of a kind that is meant for its user. Any other error passes."""
    if call.refusal is not None:
        return call.refusal
    arguments = {name: _own(value, exact) for name, value in call.arguments.items()}
    try:
        result = _tensors(FUNCTIONS[call.op](**arguments, backend=backend))
    except (ValueError, TypeError) as error:
        return error
    return {name: x.detach() for name, x in result.items()} | _gradients(arguments, result)


def _own(value: Any, exact: bool) -> Any:
    """The argument with tensors that are leaves of autograd; in float64 where ``exact`` holds."""
    if isinstance(value, Tensor):
        own = value.detach().double() if exact and value.is_floating_point() else value.detach()
        return own.requires_grad_(value.requires_grad)
    if isinstance(value, ConductorParams):
        return ConductorParams(*(_own(x, exact) for x in value.tensors))
    if isinstance(value, ConductorBatch):
        return ConductorBatch(*(_own(getattr(value, name), exact) for name in value.__dataclass_fields__))
    if isinstance(value, ConductorState):  # An update changes it in place.
        params = value.params
        if isinstance(params, ConductorParams):
            params = ConductorParams(*(_written(x, exact) for x in params.tensors))
        first, second = (
            {key: _written(x, exact) for key, x in kind.items()} if isinstance(kind, dict) else kind
            for kind in (value.first, value.second)
        )
        return ConductorState(params, first, second, value.step)
    return value


def _written(value: Any, exact: bool) -> Any:
    """A tensor that the op may write to. One that is not contiguous it has to refuse."""
    own = _own(value, exact)
    return own.detach().clone() if isinstance(own, Tensor) and own.is_contiguous() else own


def _tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in a result, by the names of the fields that lead to them; lists of numbers become tensors."""
    if isinstance(value, Tensor):
        return {name or "result": value}
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return {name or "result": torch.tensor(value)}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple | list) else ()
    return {path: x for key, item in items for path, x in _tensors(item, f"{name}.{key}".strip(".")).items()}


def _gradients(arguments: dict[str, Any], result: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the sum of the results that have one, by the arguments that want one."""
    leaves = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    if "rewards" in arguments:  # The gradient of normalised scores is next to nothing, of terms that are not.
        return {}
    roots = [x for x in result.values() if x.requires_grad and x.device.type == "cpu"]
    if not leaves or not roots or not all(bool(x.isfinite().all()) for x in roots):
        return {}
    total = torch.stack([x.double().sum() for x in roots]).sum()
    found = torch.autograd.grad(total, [*leaves.values()], allow_unused=True)
    return {f"gradient of {name}": x for name, x in zip(leaves, found, strict=True) if x is not None}


# --- what is right ---


def judge(call: Call, backend: str) -> tuple[str, str]:
    """How a call ends: "right", "refused by name", or a fault, and words on it."""
    found = answer(call, backend)
    if isinstance(found, Exception):
        named = re.match(rf"(?:{'|'.join(call.names)})\b", str(found)) is not None
        words = f"{type(found).__name__}: {str(found)[:300]}"
        # Arguments that are missing are Python's own error.
        if named or re.search(r"missing \d required|missing a required", str(found)):
            return "refused by name", words
        return "refused without a name", words
    truth = answer(call, "torch", exact=True)
    if isinstance(truth, Exception):
        return "refused in float64 alone", f"{type(truth).__name__}: {truth}"
    if truth.keys() != found.keys():
        if any(not bool(x.isfinite().all()) for x in found.values() if x.device.type == "cpu"):
            truth = {name: x for name, x in truth.items() if name in found}  # There is no gradient of an infinity.
        if truth.keys() != found.keys():
            return "wrong", f"results {[*found]}, expected {[*truth]}"
    if call.op.endswith("_sequences") and (fault := _incomplete(call, found)):
        return "wrong", fault
    for name, ours in found.items():
        if ours.device.type == "meta":
            return "right", "without values"
        expected = truth[name]
        if name.endswith("actions"):
            ours, expected = _clear(ours, expected, truth[f"{name[:-7]}probs"], call)
        if name.startswith("parameter."):  # Adam divides by the root of the moment, which may be rounding noise.
            known = truth[f"second.{name[10:]}"] > 1e-8
            ours, expected = ours[known], expected[known]
        size, noise = _size(call, truth, name)
        if name.endswith(("advantages", "degenerate")) and "rewards" in call.arguments and name != "result":
            clear = ~_tied_by_rounding(found, truth, name.rpartition(".")[0])
            ours, expected = ours[clear], expected[clear]
        fault = _differs(ours, expected, size, noise)
        if fault:
            return "wrong", f"{name}: {fault}\nours {ours.flatten()[:12]}\ntruth {expected.flatten()[:12]}"
    return "right", ""


def _clear(ours: Tensor, truth: Tensor, probs: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The actions of the rows in which rounding does not decide."""
    if call.arguments.get("mode", "sample") == "soft":  # Two probabilities may be nearly the same.
        two = probs.topk(min(2, probs.shape[1]), 1).values
        clear = ((two[:, 0] - two[:, -1]).abs() > 1e-5) | (probs.shape[1] == 1)
    else:  # A draw may fall on the bound between two actions; one that does not differs nowhere.
        clear = torch.ones_like(truth, dtype=torch.bool)
    return ours[clear], truth[clear]


def _tied_by_rounding(found: dict[str, Tensor], truth: dict[str, Tensor], start: str) -> Tensor:
    """bool [B], the responses whose scores are the same in one precision, and nearly the same in the other.

    Their group is degenerate in one of the two precisions alone.
    """
    flags, scores = (f"{start}.{kind}".strip(".") for kind in ("degenerate", "scores"))
    differ = found[flags] != truth[flags]
    near = (truth[scores][:, None] - truth[scores]).abs() <= 5e-7 * truth[scores].nan_to_num(0.0).abs().max()
    return differ & ((near & differ).sum(1) > 1)


def _incomplete(call: Call, found: dict[str, Tensor]) -> str:
    """What is wrong with lists of sequences, whatever the reference says."""
    lengths = torch.as_tensor(call.arguments["lengths"])
    members = torch.cat([torch.zeros(0, dtype=torch.int64), *found.values()])
    if not torch.equal(members.sort().values, torch.arange(len(lengths))):
        return f"the lists hold {members.tolist()}, expected each of {len(lengths)} sequences once"
    most = call.arguments.get("max_tokens")
    largest = max((int(lengths[part].sum()) for part in found.values()), default=0)
    return "" if most is None or largest <= most else f"a bin holds {largest} tokens, expected at most {most}"


def _size(call: Call, truth: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor | float]:
    """What the error of a result may be.

    Returns:
        Numbers as large as those that the result was added up from, where it may be smaller itself; and an error that
        the rounding of these makes unavoidable.
    """
    if call.op == "counterfactual_advantages":
        return truth[name], _noise(call, truth[name])
    if call.op == "conductor_update":
        return torch.cat([truth[name].flatten(), torch.ones(1)]), 0.0
    start, _, kind = name.rpartition(".")
    scores = truth.get(f"{start}.scores".strip("."))
    if kind == "mean" and scores is not None:  # That of normalised scores is near 0.
        return scores, 0.0
    if kind in ("advantages", "std") and scores is not None and scores.isfinite().any():
        noise = 5e-7 * scores[scores.isfinite()].abs().max()
        spread = truth[f"{start}.std".strip(".")]
        divided = kind == "advantages" and bool((spread > 0).any())
        return truth[name], float(noise / spread[spread > 0].min() if divided else noise)
    if kind in ("entropies", "entropy", "logprobs", "log_probs", "probs"):
        return torch.cat([truth[name].flatten(), torch.ones(1)]), 0.0
    if call.op == "sum_tokens":
        return call.arguments["values"].detach().double().abs().sum(1), 0.0
    advantages = call.arguments.get("advantages")
    if call.op.endswith("policy_loss") and isinstance(advantages, Tensor) and advantages.device.type == "cpu":
        return torch.cat([truth[name].flatten(), advantages.detach().double().flatten()]), 0.0
    return truth[name], 0.0


def _noise(call: Call, truth: Tensor) -> Tensor:
    """How far the exact result moves where the weights do so by a rounding error: they may compensate each other.

    What is exactly 0, because there is nothing to compare, has to be so in any precision.
    """
    rng, noise = torch.Generator().manual_seed(0), torch.zeros_like(truth)
    for _ in range(4):
        moved = dict(call.arguments)
        for key in ("weights", "action_weights"):
            if isinstance(x := moved.get(key), Tensor) and x.is_floating_point():
                moved[key] = x.detach().double() * (1 + 2.0**-22 * torch.randn(x.shape, generator=rng))
        found = answer(call._replace(arguments=moved), "torch", exact=True)
        if not isinstance(found, Exception) and found["result"].shape == truth.shape:
            noise = noise.maximum((found["result"] - truth).abs().nan_to_num(0.0))
    return torch.where(truth == 0, 0.0, 4 * noise)


def _differs(ours: Tensor, truth: Tensor, size: Tensor, noise: Tensor | float) -> str:
    if ours.shape != truth.shape:
        return f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if not ours.is_floating_point():
        return "" if torch.equal(ours, truth.to(ours.dtype)) else "other values"
    known = truth.isfinite() & (truth.abs() < 0.99 * torch.finfo(ours.dtype).max)
    if bool((ours.isfinite() & ~truth.isfinite()).any()):
        return "finite where the truth is not"
    if not bool(ours[known].isfinite().all()):
        return "not finite where the truth is"
    if not known.any():
        return ""
    largest = size[size.isfinite()].abs().max().clamp(min=1e-30) if size.isfinite().any() else 1.0
    error = ((ours.double() - truth).abs() - noise)[known].max() / largest
    return f"off by {float(error):.2g} of the largest" if error > _TOLERANCES[ours.dtype] else ""


# --- the trial ---


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m tests.fuzz ops``."""
    trial.add_options(parser)
    parser.add_argument("--backend", choices=("torch", "cpp", "triton"), help="the only one; all on the CPU without it")


def run(inputs: int, seed: int, first: int = 0, backend: str | None = None) -> tuple[Counter[str], list[str]]:
    """Tries calls, see ``trial.try_inputs``. ``backend`` names the only one that serves; None takes all on the CPU.

    Raises:
        ValueError: Triton is wanted outside of its interpreter.
    """
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend: triton, expected TRITON_INTERPRET=1 in the environment")
    allowed = ("torch", "cpp") if backend is None else (backend,)

    def make(rng: random.Random) -> Input:
        call = valid(rng)
        while not {*allowed} & {*call.backends}:
            call = valid(rng)
        call, changes = changed(rng, call, _NOT_INTERPRETED if backend == "triton" else ())
        chosen = rng.choice([name for name in call.backends if name in allowed])
        return Input(f"{call.op} by {chosen}, {changes}", lambda: judge(call, chosen))

    return try_inputs(make, ("right", "refused by name"), inputs=inputs, seed=seed, first=first)


def main(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the command, and returns its tally."""
    tally = as_tally(given, *run(given.inputs, given.seed, given.first, given.backend))
    return tally if given.backend is None else {**tally, "backend": given.backend}
