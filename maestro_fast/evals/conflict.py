"""The conflict benchmark: small worlds with K conflicting rewards and a known true utility that nothing optimises.

It asks whether a weight policy, trained on the rewards, serves the utility.

A prompt of family f is a vector x near the centre of the family. A response consists of D choices among L options,
sampled from a small network. Each option adds to 2K hidden qualities v: the rewards measure the first K, and the other
K can be exploited:

    r_k = v_k + hack_k v_{K+k} + noise
    U   = sum_k w*[f, k] tanh(v_k / 1.5)  -  sum_k harm_k relu(tanh(v_{K+k} / 1.5))

Families need different mixes w*, and some qualities are negatively correlated, so no fixed weighting serves all
families. The network is trained with GRPO on the rewards under a weight policy of ``maestro_fast.weighting``. The
worlds of all seeds advance together, and every weight policy sees the same random draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maestro_fast.weighting import (
    Comparison,
    Outcome,
    WeightContext,
    WeightPolicy,
    build_weight_policy,
    weigh_and_compare,
)
from maestro_fast.weighting.diagnostics import Watch, diagnose, healthy_ranges

REWARDS = ("brevity", "richness", "creativity", "facts", "format")
K, FAMILIES, POSITIONS, OPTIONS = len(REWARDS), 4, 8, 4
PROMPT, HIDDEN, CONTEXT = 16, 32, 64
_STRONG = ((0.5, 0, 0, 0.5, 0), (0, 0.5, 0.5, 0, 0), (0, 0.35, 0, 0.35, 0.3), (0.5, 0, 0.5, 0, 0))
_SHARED = (0.0, 0.3, 0.0, 0.4, 0.3)


@dataclass(frozen=True)
class World:
    """What the families need, and how the rewards measure it. The module gives the formulas.

    Attributes:
        needs: w*, [families][K].
        opposition: How strongly brevity opposes richness, and creativity opposes facts: the correlations, negated.
        hack: [K], how much each reward counts the quality that can be exploited.
        harm: [K], how much that quality lowers the utility.
        noise: The standard deviation of a reward's noise.
    """

    needs: tuple[tuple[float, ...], ...]
    opposition: tuple[float, float]
    hack: tuple[float, ...] = (0.0,) * K
    harm: tuple[float, ...] = (0.0,) * K
    noise: float = 0.3


WORLDS = {
    "strong": World(_STRONG, (0.9, 0.6)),
    "mild": World(
        tuple(tuple(0.4 * a + 0.6 * b for a, b in zip(row, _SHARED, strict=True)) for row in _STRONG), (0.5, 0.3)
    ),
    "aligned": World(((1 / K,) * K,) * FAMILIES, (0.0, 0.0)),
    "hack": World(_STRONG, (0.9, 0.6), (0.0, 1.5, 1.5, 0.0, 0.0), (0.0, 0.4, 0.4, 0.0, 0.0)),
}


@dataclass(frozen=True)
class ConflictConfig:
    """The size of a benchmark.

    Attributes:
        steps: The number of training steps, each on one batch.
        prompts: The number of prompts in a batch.
        group_size: The number of responses to each prompt of a batch.
        learning_rate: The learning rate of Adam.
        beta: The coefficient of the KL in the score.
        labelled: The share of the groups whose utility is known to the weight policy.
        label_noise: The standard deviation of the noise in these utilities.
        evaluation: The number of prompts per seed on which the true utility is measured, with 16 responses each.
    """

    steps: int = 300
    prompts: int = 16
    group_size: int = 8
    learning_rate: float = 0.015
    beta: float = 0.01
    labelled: float = 0.25
    label_noise: float = 0.3
    evaluation: int = 64


@dataclass(frozen=True)
class ConflictResult:
    """What came of a weight policy in the worlds of S seeds.

    Attributes:
        utility_S: [S], the true utility after training, as a mean over families.
        start_S: [S], the same before training.
        family_SF: [S, families], the true utility of each family after training.
        figures: Each diagnostic as a mean over the seeds and the last quarter of the steps.
        alarms: Maps each diagnostic that left its healthy range for five batches in a row to the number of seeds in
            which it did.
    """

    utility_S: Tensor
    start_S: Tensor
    family_SF: Tensor
    figures: dict[str, float]
    alarms: dict[str, int]


@dataclass
class Bench:
    """The worlds of S seeds, and the network that is trained in each. N counts prompts and G responses to a prompt.

    Attributes:
        world: The kind of world.
        seeds: The S seeds.
        config: The size of the benchmark.
        fixed: What ``_draw_world`` draws for each seed, stacked to [S, ...].
        parameters: The parameters of the networks, [S, ...] each.
    """

    world: World
    seeds: Sequence[int]
    config: ConflictConfig
    fixed: dict[str, Tensor] = field(init=False)
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        drawn = [_draw_world(self.world, seed) for seed in self.seeds]
        self.fixed = {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
        start = (self.fixed["w1"], torch.zeros(self.count, 1, HIDDEN), self.fixed["w2"])
        self.parameters = [
            p.clone().requires_grad_() for p in (*start, torch.zeros(self.count, 1, POSITIONS * OPTIONS))
        ]
        self.families_N = torch.arange(self.config.prompts) % FAMILIES

    @property
    def count(self) -> int:
        """S, the number of seeds."""
        return len(self.seeds)

    def random(self, step: int, *shape: int, kind: str = "normal", stream: int = 0) -> Tensor:
        """Random numbers [S, *shape], which depend only on each seed, the step and the stream."""
        rows = []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)
            rows.append((torch.randn if kind == "normal" else torch.rand)(*shape, generator=generator))
        return torch.stack(rows)

    def prompts(self, step: int, families_N: Tensor) -> Tensor:
        """Draws the prompts of a step, x [S, N, PROMPT]."""
        return self.fixed["centres"][:, families_N] + 0.5 * self.random(step, len(families_N), PROMPT, stream=1)

    def log_probs(self, x: Tensor, parameters: Sequence[Tensor] | None = None) -> Tensor:
        """The log-probs of all options, [S, N, POSITIONS, OPTIONS], under the network's or the given parameters."""
        w1, b1, w2, b2 = self.parameters if parameters is None else parameters
        logits = torch.tanh(x @ w1 + b1) @ w2 + b2
        return logits.view(*x.shape[:2], POSITIONS, OPTIONS).log_softmax(-1)

    def sample(self, log_probs: Tensor, count: int, step: int) -> Tensor:
        """Samples one-hot responses [S, N, count, POSITIONS, OPTIONS] with the Gumbel trick."""
        uniform = self.random(step, *log_probs.shape[1:2], count, POSITIONS, OPTIONS, kind="uniform", stream=2)
        gumbel = -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()
        return functional.one_hot((log_probs[:, :, None] + gumbel).argmax(-1), OPTIONS).float()

    def qualities(self, y: Tensor) -> Tensor:
        """The hidden qualities v [S, N, G, 2K] of one-hot responses."""
        return (y.flatten(3).flatten(1, 2) @ self.fixed["qualities"]).view(*y.shape[:3], 2 * K)

    def utility(self, v: Tensor, families_N: Tensor) -> Tensor:
        """The true utility U [S, N, G] of the qualities, without noise."""
        needs_N1K = torch.tensor(self.world.needs)[families_N][:, None]
        good = torch.tanh(v / 1.5)
        harm = (torch.tensor(self.world.harm) * torch.relu(good[..., K:])).sum(-1)
        return (needs_N1K * good[..., :K]).sum(-1) - harm

    def rewards(self, v: Tensor, step: int) -> Tensor:
        """The rewards r [S, N, G, K] of the qualities, with the noise of this step."""
        noise = self.world.noise * self.random(step, *v.shape[1:3], K, stream=3)
        return v[..., :K] + torch.tensor(self.world.hack) * v[..., K:] + noise

    def contexts(self, x: Tensor, y: Tensor, kind: str) -> Tensor:
        """The contexts [S, N, G, CONTEXT] of a weight policy.

        They stand for hidden states: of prompt and response if ``kind`` is "response", else of the prompt alone.
        """
        prompt = (x @ self.fixed["prompt_state"])[:, :, None]
        if kind == "response":
            prompt = prompt + (y.flatten(3).flatten(1, 2) @ self.fixed["response_state"]).view(*y.shape[:3], CONTEXT)
        return functional.layer_norm(torch.tanh(prompt), (CONTEXT,)).expand(*y.shape[:3], CONTEXT)

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The true utility [S, families] on prompts that are the same in every call."""
        families_N = torch.arange(self.config.evaluation) % FAMILIES
        y = self.sample(self.log_probs(self.prompts(-1, families_N)), 16, -1)
        utility_SN = self.utility(self.qualities(y), families_N).mean(-1)
        return torch.stack([utility_SN[:, families_N == f].mean(1) for f in range(FAMILIES)], 1)


def _draw_world(world: World, seed: int) -> dict[str, Tensor]:
    """Draws a world's options and prompts, its maps to contexts, and the network's first parameters."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    correlation = torch.eye(2 * K)
    for (i, j), opposed in zip(((0, 1), (2, 3)), world.opposition, strict=True):
        correlation[i, j] = correlation[j, i] = -opposed
    z = normal(POSITIONS, OPTIONS, 2 * K) @ torch.linalg.cholesky(correlation).T
    z = z - z.mean(1, keepdim=True)
    z = z / z.square().mean(1).sum(0).sqrt()  # If all options are equally likely, v now has standard deviation 1.
    return {
        "qualities": z.flatten(0, 1),
        "centres": normal(FAMILIES, PROMPT),
        "prompt_state": normal(PROMPT, CONTEXT) / math.sqrt(PROMPT),
        "response_state": normal(POSITIONS * OPTIONS, CONTEXT) / math.sqrt(POSITIONS),
        "w1": normal(PROMPT, HIDDEN) / math.sqrt(PROMPT),
        "w2": 0.1 * normal(HIDDEN, POSITIONS * OPTIONS) / math.sqrt(HIDDEN),
    }


def run_conflict(
    world: str | World,
    weights: str | Mapping[str, Any],
    seeds: Sequence[int],
    config: ConflictConfig | None = None,
) -> ConflictResult:
    """Trains a network for each seed under a weight policy, and measures its true utility.

    Args:
        world: A ``World`` or the name of one in ``WORLDS``.
        weights: The entry for ``build_weight_policy``. A policy that reads a column finds ``family``, a number as text.
        seeds: The seeds, each of which fixes a world and all draws in it.
        config: The size of the benchmark.

    Raises:
        ValueError: The world is unknown, there are no seeds, or the weight policy refuses its entry.
    """
    if isinstance(world, str) and world not in WORLDS:
        raise ValueError(f"world: {world!r}, expected one of {', '.join(WORLDS)}")
    if not seeds:
        raise ValueError("seeds: none given, expected at least one")
    config = config or ConflictConfig()
    bench = Bench(WORLDS[world] if isinstance(world, str) else world, seeds, config)
    policies = [build_weight_policy(weights, REWARDS, CONTEXT) for _ in seeds]
    watches = [Watch(healthy_ranges(REWARDS)) for _ in seeds]
    reference = [p.detach().clone() for p in bench.parameters]
    optimizer = torch.optim.Adam(bench.parameters, lr=config.learning_rate, betas=(0.9, 0.99))
    start_S = bench.evaluate().mean(1)
    seen: dict[str, list[float]] = {}
    for step in range(config.steps):
        figures = _step(bench, policies, watches, reference, optimizer, step)
        if step >= config.steps * 3 // 4:
            for one in figures:
                for name, value in one.items():
                    seen.setdefault(name, []).append(value)
    family_SF = bench.evaluate()
    warned = [name for watch in watches for name in watch.warned]
    return ConflictResult(
        family_SF.mean(1),
        start_S,
        family_SF,
        {name: sum(values) / len(values) for name, values in seen.items()},
        {name: warned.count(name) for name in sorted(set(warned))},
    )


def _step(
    bench: Bench,
    policies: Sequence[WeightPolicy],
    watches: Sequence[Watch],
    reference: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> list[dict[str, float]]:
    """Trains the network of every world on one batch. Returns the diagnostics of each world."""
    config, families_N = bench.config, bench.families_N
    x = bench.prompts(step, families_N)
    log_probs = bench.log_probs(x)
    with torch.no_grad():
        y = bench.sample(log_probs, config.group_size, step)
        v = bench.qualities(y)
        rewards = bench.rewards(v, step)
        utility = bench.utility(v, families_N)
        utility = utility + config.label_noise * bench.random(step, *utility.shape[1:], stream=4)
        labelled = bench.random(step, config.prompts, 1, kind="uniform", stream=5) < config.labelled
        utility = torch.where(labelled, utility, float("nan"))
        shift = log_probs - bench.log_probs(x, reference)
        kl = (shift[:, :, None] * y).sum((-1, -2))
        kind = policies[0].context_kind if policies[0].needs_context else "prompt_mean"
        h = bench.contexts(x, y, kind)
        columns = {"family": [str(f) for f in families_N.tolist() for _ in range(config.group_size)]}
        advantages, figures = [], []
        for s, (policy, watch) in enumerate(zip(policies, watches, strict=True)):
            context = WeightContext(
                REWARDS,
                config.group_size,
                step,
                rewards[s].flatten(0, 1),
                h[s].flatten(0, 1),
                utility[s].flatten(),
                columns,
            )
            comparison = Comparison("maestro", kl[s].flatten(), config.beta)
            found, result = weigh_and_compare(policy, context, comparison)
            outcome = Outcome(context, found, result, comparison.profile, comparison.kl_B, comparison.beta)
            with torch.enable_grad():
                policy.observe(outcome)
            figures.append(diagnose(outcome) | policy.metrics())
            watch.see(figures[-1])
            advantages.append(result.advantages.view(config.prompts, config.group_size))
    response_log_probs = (log_probs[:, :, None] * y).sum((-1, -2))
    # The seeds have separate parameters, so the sum of their losses trains each of them alone.
    loss = -(response_log_probs * torch.stack(advantages)).mean((1, 2)).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return figures
