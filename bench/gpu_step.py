"""Times whole training steps with the Conductor and with equal weights, on a random Qwen3 of 0.6 billion parameters.

    python -m bench.gpu_step [SECONDS]

A step trains on 64 sequences of 2,048 tokens in bfloat16, in micro-batches: hidden states and old log-probs, weights
and advantages, head and loss in one sweep, backward, AdamW. Forwards and backwards are the same work in both kinds of
step. The Conductor adds its pooling, its weights and its update.

What it adds is measured in two ways: by device clocks around its stages, and as the difference between whole steps.
Whole steps come in blocks of Conductor - equal - equal - Conductor, so a drift of the clocks cancels within a block.
Blocks run until the seconds are over or an interrupt comes, and each is recorded as soon as it is done.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.gpu_race import DEVICE, DRY, wait
from bench.table import bound_of
from bench.tables import record
from maestro_fast import ops
from maestro_fast.evals.statistics import paired_difference

K, G, P = 4, 8, 512  # the numbers of rewards, of responses to a prompt, and of tokens in a prompt
B, LENGTH, BLOCKS = 64, 2048, 12
SHAPE: dict[str, Any] = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
if DRY:
    G, P, B, LENGTH, BLOCKS = 2, 3, 4, 8, 2
    SHAPE = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # the interpreter computes bfloat16 wrongly
C = LENGTH - P  # the number of tokens in a completion
CONDUCTOR_STAGES = ("pooling", "adaptive step", "Conductor's update", "advantages")
CONFIG = ops.PolicyLossConfig("dapo")
TARGET = bound_of("step")  # the share of a step that the Conductor may add, in per cent


class Stages:
    """The milliseconds of each stage, measured between marks in the device's queue."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any]] = []
        self("begin")

    def __call__(self, name: str) -> None:
        """Marks the end of stage ``name``, which began at the mark before."""
        if DEVICE.type == "cpu":
            self.marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((name, event))

    def milliseconds(self) -> dict[str, float]:
        """The milliseconds by stage; a stage that was marked several times has the sum."""
        wait()
        found: dict[str, float] = defaultdict(float)
        for (_, before), (name, after) in pairwise(self.marks):
            found[name] += 1e3 * (after - before) if DEVICE.type == "cpu" else before.elapsed_time(after)
        return dict(found)


class Training:
    """The model, its optimizer, the Conductor's state, and the one batch that every step trains on."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = Qwen3Config(**SHAPE, **HEADS, tie_word_embeddings=True, eos_token_id=None, use_cache=False)
        with torch.device(DEVICE):
            self.model = Qwen3ForCausalLM(config).to(DTYPE)
            self.ids = torch.randint(SHAPE["vocab_size"], (B, LENGTH))
            self.rewards, self.equal = torch.randn(B, K), torch.full((K,), 1 / K)
            d = SHAPE["hidden_size"]
            weight, bias = torch.randn(K, d) / d**0.5, torch.zeros(K)
            params = ops.ConductorParams(torch.zeros(d), torch.ones(d), weight, bias)
        self.conductor = ops.ConductorState.start(params)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=DEVICE.type == "cuda")
        self.head = self.model.lm_head.weight

    def hidden(self, rows: slice) -> Tensor:
        """The last hidden states [rows, LENGTH, d] of some sequences."""
        states: Tensor = self.model.model(input_ids=self.ids[rows]).last_hidden_state
        return states

    def predicting(self, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The hidden states [rows * C, d] that predict the completions, and the tokens [rows * C] of these."""
        return hidden[:, P - 1 : -1].flatten(0, 1), self.ids[rows, P:].flatten()

    def step(self, adaptive: bool, micro: int) -> tuple[float, dict[str, float]]:
        """Makes one step with micro-batches of ``micro`` sequences.

        Returns:
            The milliseconds of wall time, and the milliseconds by stage.

        Raises:
            AssertionError: The loss is not finite.
        """
        wait()
        start, mark = time.perf_counter(), Stages()
        parts = [slice(i, i + micro) for i in range(0, B, micro)]
        old, pooled = [], []
        with torch.no_grad():
            for rows in parts:
                hidden = self.hidden(rows)
                mark("hidden states")
                old.append(
                    ops.token_logprobs(self.predicting(hidden, rows)[0], self.head, self.ids[rows, P:].flatten())
                )
                mark("old log-probs")
                if adaptive:
                    bounds = torch.arange(0, len(hidden) * LENGTH + 1, LENGTH, device=DEVICE)
                    pooled.append(ops.pool_hidden(hidden.flatten(0, 1), cu_seqlens=bounds))
                    mark("pooling")
            advantages = self.advantages(torch.cat(pooled) if adaptive else None, mark)
        losses = [self.backward(*x, mark) for x in zip(parts, old, advantages.split(micro), strict=True)]
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark("AdamW")
        wait()
        wall = 1e3 * (time.perf_counter() - start)
        assert torch.stack(losses).isfinite().all(), "the loss is not finite"
        return wall, mark.milliseconds()

    def advantages(self, h: Tensor | None, mark: Stages) -> Tensor:
        """Advantages [B] under the Conductor's weights, with its update, or without ``h`` under equal weights."""
        if h is None:
            found = ops.group_advantages(self.rewards, self.equal, G, profile="maestro")
            mark("advantages")
            return found.advantages
        number = self.conductor.step
        sample, found = ops.maestro_advantages(self.rewards, self.conductor.params, G, h=h, seed=1, step=number)
        mark("adaptive step")
        experience = ops.ConductorBatch(h, found.advantages, sample.actions)
        self.conductor, _ = ops.conductor_update(self.conductor, experience)
        mark("Conductor's update")
        return found.advantages

    def backward(self, rows: slice, old: ops.TokenLogprobs, advantages: Tensor, mark: Stages) -> Tensor:
        """Adds the gradient of one micro-batch, and returns its loss."""
        states, targets = self.predicting(self.hidden(rows), rows)
        mark("forward")
        bounds = torch.arange(0, len(targets) + 1, C)
        options: dict[str, Any] = {"old_logprobs": old.logprobs, "normalizer": float(B * C), "config": CONFIG}
        loss = ops.linear_policy_loss(states, self.head, targets, advantages, bounds, **options).loss
        mark("head and loss")
        loss.backward()
        mark("backward")
        return loss.detach()

    def operations(self) -> float:
        """The FLOPs of one step's products in layers, in causal attention (half of all pairs) and in the LM head."""
        layers = sum(x.numel() for x in self.model.model.layers.parameters())
        pairs = SHAPE["num_hidden_layers"] * HEADS["num_attention_heads"] * HEADS["head_dim"] * LENGTH
        head = SHAPE["hidden_size"] * SHAPE["vocab_size"]
        forward = 2 * B * (LENGTH * (layers + pairs) + C * head)
        return 4.0 * forward  # one forward for the old log-probs, one for training, and a backward of two


def micro_batch(training: Training) -> int:
    """The largest micro-batch with which a step of each kind fits the memory. These steps also warm everything up."""
    for micro in (8, 4, 2, 1) if not DRY else (2,):
        try:
            for adaptive in (True, False):
                training.step(adaptive, micro)
        except torch.OutOfMemoryError:
            training.optimizer.zero_grad()
            torch.cuda.empty_cache()
        else:
            return micro
    raise SystemExit("not even one sequence at a time fits the memory")


Block = tuple[list[tuple[float, dict[str, float]]], list[tuple[float, dict[str, float]]]]


def blocks(training: Training, micro: int, until: float) -> Iterator[Block]:
    """Blocks of steps with the Conductor and with equal weights. An interrupt ends the blocks, but not the run."""
    longest = 0.0
    try:
        for done in range(BLOCKS):
            start = time.monotonic()
            if done >= 2 and start + longest > until:
                return
            found: dict[bool, list[tuple[float, dict[str, float]]]] = {True: [], False: []}
            for adaptive in (True, False, False, True):
                found[adaptive].append(training.step(adaptive, micro))
            longest = max(longest, time.monotonic() - start)
            yield found[True], found[False]
    except KeyboardInterrupt:
        print("interrupted")


def report(done: list[Block], operations: float) -> None:
    """Prints and records the time of each stage, and what the Conductor adds to a step."""
    ours, equal = ([step for block in done for step in block[kind]] for kind in (0, 1))
    step_ms, equal_ms = (median(wall for wall, _ in steps) for steps in (ours, equal))
    names = list(dict.fromkeys(name for _, stages in (*ours, *equal) for name in stages))
    columns = [{n: median(s.get(n, 0.0) for _, s in steps) for n in names} for steps in (ours, equal)]
    print(f"{'ms of a step, medians':28}{'Conductor':>12}{'equal':>12}{'% of a step':>14}")
    for name in names:
        one, other = (column[name] for column in columns)
        print(f"  {name:26}{one:12.3f}{other:12.3f}{100 * one / step_ms:14.2f}")
    print(f"  {'whole, on the wall':26}{step_ms:12.3f}{equal_ms:12.3f}")
    print(f"  {operations / 1e12:.1f} TFLOP of products, {operations / equal_ms / 1e9:.1f} TFLOP/s with equal weights")
    added = sum(columns[0].get(name, 0.0) - columns[1].get(name, 0.0) for name in CONDUCTOR_STAGES)
    share = 100 * added / equal_ms
    verdict = "not measured" if DRY else f"{share:.3f}, {'met' if share < TARGET else 'MISSED'}"
    print(f"  target: the Conductor minus equal weights, by the clocks, < {TARGET:g} % of a step: {verdict}")
    facts: dict[str, Any] = {"ms": [step_ms, equal_ms], "stages": columns, "added_ms": added, "share": share}
    if len(done) > 1:
        means = [torch.tensor([sum(w for w, _ in b[kind]) / 2 for b in done]) for kind in (0, 1)]
        gap = paired_difference(*means)
        facts["difference_ms"] = [gap.mean, gap.half_width]
        middle = (means[0] - means[1]).median()
        print(
            f"  difference of whole steps: median {middle:.3f} ms, mean {gap.mean:.3f} +- {gap.half_width:.3f} (95 %)"
        )
    record({"op": "step", "dry": DRY, "blocks": len(done), "operations": operations, **facts})


def main() -> None:
    """Runs blocks for the seconds of the command line, and reports them."""
    until = time.monotonic() + (float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
    training = Training()
    micro = micro_batch(training)
    count = sum(x.numel() for x in training.model.parameters())
    dry = " (dry run: the times mean nothing)" if DRY else ""
    print(f"A training step{dry}: {count / 1e6:.1f} M parameters, {B} x {LENGTH} tokens, {micro} sequences at a time")
    done: list[Block] = []
    for block in blocks(training, micro, until):
        done.append(block)
        walls = [[wall for wall, _ in steps] for steps in block]
        record({"op": "step", "dry": DRY, "block": len(done), "conductor_ms": walls[0], "equal_ms": walls[1]})
    if DEVICE.type == "cuda":
        print(f"  {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most")
    if done:
        report(done, training.operations())


if __name__ == "__main__":
    main()
