"""Times scoring and training on the responses to one prompt, on a random Qwen3 of 0.6 billion parameters in bfloat16.

    python -m bench.gpu_shared_prefix [SECONDS]

G responses of R tokens have a prompt of P tokens in common. The contenders are what the package offers on a device:

    shared    all tokens in one row with the prompt once, and the kernels that ``Layouts.kernel`` stands for
    varlen    one row with a prompt for each response, and torch's varlen kernel
    padded    one row for each response, and SDPA
    masked    the tokens of ``shared``, and SDPA with a mask of all pairs
    flex      the row of ``shared``, and FlexAttention; it comes last, since it has to be compiled

They train the same model on the same tokens. Before they are timed, log-probs and gradients are compared with those of
a float32 copy of the model: an error may be at most twice that of ``varlen``. A contender that fails is left out, and
one that is wrong is timed and called wrong; both make the run fail at its end. Contenders take turns in rounds, which
run until the seconds are over or an interrupt comes.

BENCH_DRY=1 runs everything on tiny sizes. Without a device, SDPA with masks takes the place of the kernels.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.gpu_race import DEVICE, DRY, wait
from bench.gpu_step import DTYPE, HEADS, SHAPE
from bench.shared_prefix import Batch, Group, Step, step
from bench.table import judged
from bench.tables import record
from maestro_fast.model import VARLEN, Layouts, use_attention
from maestro_fast.model.attention import varlen_obstacle
from maestro_fast.model.layouts import cost_of_a_pair

GROUPS = [Group(2048, 512, 8), Group(512, 512, 8)] if not DRY else [Group(20, 3, 4)]
ROUNDS = 20 if not DRY else 2
_KERNEL = Layouts("varlen", "always", kernel=True)
_TRUTH_ROWS = 2  # responses per forward of the float32 model, which needs more memory
_ROUNDING = 1e-2  # What an error may be beyond the allowed one, relative to log-probs or to the norm of a gradient.


@dataclass
class Contender:
    """What is timed.

    Attributes:
        name: The name in the table.
        implementation: The name of its attention in transformers.
        layouts: How it lays the group out.
        around: What its steps are made in.
        milliseconds: The time of each round.
        peak: The most bytes that the device has allocated in a step, the model among them.
        tokens: The tokens of one forward.
        errors: Its largest error in log-probs and in the gradient of a weight; see ``errors_of``.
    """

    name: str
    implementation: str
    layouts: Layouts
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    milliseconds: list[float] = field(default_factory=list)
    peak: int = 0
    tokens: int = 0
    errors: tuple[float, float] = (0.0, 0.0)

    def step(self, model: Any, batch: Batch) -> Step:
        """Makes one step with a model that has its attention. The gradient is in the model afterwards."""
        model.zero_grad()
        self.layouts.count.pop()
        with self.around():
            made = step(model, batch, self.layouts)
        self.tokens = self.layouts.count.pop().computed // 2  # A step makes two forwards.
        return made


def contenders(config: Any) -> list[Contender]:
    """All contenders but FlexAttention."""
    cost = cost_of_a_pair(config)
    masked = Layouts("padded", "always", cost)
    if DEVICE.type == "cpu":
        return [
            Contender("shared", "sdpa", masked),
            Contender("packed", "sdpa", Layouts("packed")),
            Contender("padded", "sdpa", Layouts("padded")),
        ]
    if (obstacle := varlen_obstacle(DEVICE, DTYPE)) is not None:
        raise SystemExit(obstacle)
    return [
        Contender("shared", VARLEN, _KERNEL),
        Contender("varlen", VARLEN, Layouts("varlen")),
        Contender("padded", "sdpa", Layouts("padded")),
        Contender("masked", "sdpa", masked),
    ]


def with_flex(config: Any) -> list[Contender]:
    """FlexAttention, beside our kernels and what both are compared with. Merged calls are taken away for it."""
    merging = "maestro_fast.model.shared_attention.merging_obstacle"
    without = partial(patch, merging, return_value="FlexAttention is timed")
    return [*contenders(config)[:2], Contender("flex", VARLEN, _KERNEL, without)]


def random_model() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, **HEADS, tie_word_embeddings=True, eos_token_id=None, use_cache=False)
    config._attn_implementation = "sdpa"
    with torch.device(DEVICE):
        return Qwen3ForCausalLM(config).to(DTYPE).train()


# --- what is right ---


Truth = tuple[Tensor, list[Tensor]]  # the log-probs, and the gradient of each weight, in float32


def truth_of(model: Any, batch: Batch) -> Truth:
    """Computes log-probs and gradients of a group in float32, with padded rows."""
    wide = deepcopy(model).float()
    use_attention(wide, "sdpa")
    made = step(wide, batch, Layouts("padded"), min(_TRUTH_ROWS, batch.group.G))
    return made.logprobs, [x.grad for x in wide.parameters()]


def errors_of(made: Step, model: Any, truth: Truth) -> tuple[float, float]:
    """Compares a step with the truth.

    Returns:
        The largest error of a log-prob, relative to the log-prob or to 1, and of the gradient of a weight, relative to
        its norm.
    """
    logprobs, gradients = truth
    of_logprobs = ((made.logprobs - logprobs).abs() / logprobs.abs().clamp(min=1.0)).max().item()
    pairs = zip(model.parameters(), gradients, strict=True)
    return of_logprobs, max(((x.grad.float() - true).norm() / true.norm()).item() for x, true in pairs)


def check(model: Any, batch: Batch, found: list[Contender]) -> tuple[list[Contender], list[str]]:
    """Makes a step with each contender, which warms it up, too, and compares it with the truth.

    Returns:
        The contenders that ran, and what is wrong.
    """
    truth = truth_of(model, batch)
    ran, faults = [], []
    for contender in found:
        try:
            use_attention(model, contender.implementation)
            contender.errors = errors_of(contender.step(model, batch), model, truth)
        except Exception as error:  # A kernel may raise anything, and the others are still of interest.
            faults.append(f"{contender.name}: left out, {type(error).__name__}: {error}".splitlines()[0][:300])
            torch.cuda.empty_cache()
        else:
            ran.append(contender)
    for contender in ran:
        pairs = zip(("log-probs", "gradients"), contender.errors, _plain(ran).errors, strict=True)
        faults += [
            f"{contender.name}: WRONG, the error of its {what} is {error:.2g}, that of {_plain(ran).name} {plain:.2g}"
            for what, error, plain in pairs
            if not error <= 2 * plain + _ROUNDING
        ]
    return ran, faults


def _plain(found: list[Contender]) -> Contender:
    """What others are compared with: the contender without shared prompts that comes first."""
    return next((x for x in found if x.layouts.sharing == "never"), found[0])


# --- how long it takes ---


def timed(run: Callable[[], Any]) -> float:
    """The milliseconds that a call takes, from an idle device to an idle device."""
    wait()
    start = time.perf_counter()
    run()
    wait()
    return 1e3 * (time.perf_counter() - start)


def peak_of(model: Any, batch: Batch, contender: Contender) -> int:
    """The most bytes that are allocated during a step; 0 without a device."""
    if DEVICE.type == "cpu":
        return 0
    use_attention(model, contender.implementation)
    model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    contender.step(model, batch)
    return torch.cuda.max_memory_allocated()


def race(model: Any, batch: Batch, found: list[Contender], until: float) -> None:
    """Times the contenders in turn, at least once each."""
    longest = 0.0
    for done in range(ROUNDS):
        start = time.monotonic()
        if done and start + longest > until:
            return
        for contender in found:
            use_attention(model, contender.implementation)
            contender.milliseconds.append(timed(partial(contender.step, model, batch)))
        longest = max(longest, time.monotonic() - start)


def report(batch: Batch, found: list[Contender], faults: list[str], chosen: str) -> None:
    """Prints and records what was measured of a group."""
    times = {x.name: median(x.milliseconds) for x in found}
    rounds = max((len(x.milliseconds) for x in found), default=0)
    print(f"{batch.group.title}, {batch.group.tokens:,} tokens if each response has its own prompt; {rounds} rounds")
    print(f"  {'':10}{'tokens':>9}{'ms':>10}{'/ shared':>11}{'GB at most':>12}{'errors of log-probs, gradients':>34}")
    for x in found:
        of_ours = f"{times[x.name] / times['shared']:.2f}" if "shared" in times else "-"
        errors = "{:.2g}, {:.2g}".format(*x.errors)
        print(f"  {x.name:10}{x.tokens:9,}{times[x.name]:10.1f}{of_ours:>11}{x.peak / 1e9:12.2f}{errors:>34}")
    print(f"  Layouts chooses {chosen}")
    line = {
        "op": "shared_prefix",
        "dry": DRY,
        "group": batch.group._asdict(),
        "chosen": chosen,
        "ms": {x.name: x.milliseconds for x in found},
        "peak_bytes": {x.name: x.peak for x in found},
        "tokens": {x.name: x.tokens for x in found},
        "errors": {x.name: x.errors for x in found},
        "faults": faults,
    }
    for text in (*judged(line), *faults):
        print(f"  {text}")
    record(line)


def measure(model: Any, batch: Batch, found: list[Contender], until: float) -> bool:
    """Measures and reports a group, and says whether all is right. After an interrupt it reports what there is.

    Raises:
        KeyboardInterrupt: An interrupt came.
    """
    faults: list[str] = []
    ran: list[Contender] = []
    ours = found[0].layouts
    rule = Layouts(found[1].layouts.plain, "auto", cost_of_a_pair(model.config), ours.kernel)
    chosen = "shared" if rule.rows_of(batch.sequences).trees is not None else rule.plain
    try:
        ran, faults = check(model, batch, found)
        for contender in ran:
            contender.peak = peak_of(model, batch, contender)
        race(model, batch, ran, until)
    finally:
        report(batch, [x for x in ran if x.milliseconds], faults, chosen)
    return not faults


def main() -> None:
    """Measures the groups one after the other; each has its share of the seconds of the command line."""
    start = time.monotonic()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 45.0
    model = random_model()
    dry = " (dry run: the times mean nothing)" if DRY else ""
    print(f"Score and train on one group{dry}: {sum(x.numel() for x in model.parameters()) / 1e6:.1f} M parameters")
    cases = [(group, contenders(model.config)) for group in GROUPS]
    if DEVICE.type == "cuda":
        cases.append((GROUPS[0], with_flex(model.config)))
    right = True
    try:
        for number, (group, found) in enumerate(cases, 1):
            until = start + seconds * number / len(cases)
            right &= measure(model, Batch(group, SHAPE["vocab_size"]), found, until)
    except KeyboardInterrupt:
        print("interrupted")
    sys.exit(not right)


if __name__ == "__main__":
    main()
