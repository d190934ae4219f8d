"""Bandit worlds in which K proxy rewards conflict and the true utility is known: does a weight policy serve it?

A prompt of family f is a vector x near the family's centre. A response is D choices among L options, drawn from a small
network; each option adds to 2K hidden qualities v, K that the rewards measure and K that can be exploited:

    r_k = v_k + hack_k v_{K+k} + noise
    U   = sum_k w*[f, k] tanh(v_k / 1.5)  -  sum_k harm_k relu(tanh(v_{K+k} / 1.5))

Which mix w* a family needs differs between families, and qualities are negatively correlated, so no fixed weighting
serves all of them. The policy is trained with GRPO on the rewards under the weights of a weight policy. It is the
real one, of ``maestro_fast.weighting``; the worlds of all seeds advance together, with the same draws for every policy.
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
    """What a family needs and how the rewards measure it.

    Attributes:
        needs: [families][K], w* of the module.
        opposition: correlation, negated, of brevity with richness and of creativity with facts.
        hack, harm: [K], of the module.
        noise: standard deviation of a reward's noise.
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
    """Size of a benchmark.

    Attributes:
        steps: of the policy, one per batch of ``prompts`` groups of ``group_size``.
        learning_rate: of Adam; beta: of the KL in the score.
        labelled: share of the groups whose utility is known, with noise of standard deviation ``label_noise``.
        evaluation: prompts per seed, 16 responses each, on which the true utility is measured.
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
    """
    Attributes:
        utility_S: [S], the true utility after training, mean over families; start_S before it.
        family_SF: [S, families], the same by family.
        figures: diagnostics by name, mean over seeds and the last quarter of the steps.
        alarms: figures that left their healthy range for five batches in a row, with the number of seeds.
    """

    utility_S: Tensor
    start_S: Tensor
    family_SF: Tensor
    figures: dict[str, float]
    alarms: dict[str, int]


@dataclass
class Bench:
    """The worlds of S seeds, and the policy that is trained in each."""

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
        return len(self.seeds)

    def random(self, step: int, *shape: int, kind: str = "normal", stream: int = 0) -> Tensor:
        """[S, *shape]; follows from each seed, the step and the stream alone."""
        rows = []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)
            rows.append((torch.randn if kind == "normal" else torch.rand)(*shape, generator=generator))
        return torch.stack(rows)

    def prompts(self, step: int, families_N: Tensor) -> Tensor:
        """x [S, N, PROMPT]."""
        return self.fixed["centres"][:, families_N] + 0.5 * self.random(step, len(families_N), PROMPT, stream=1)

    def log_probs(self, x: Tensor, parameters: Sequence[Tensor] | None = None) -> Tensor:
        """[S, N, POSITIONS, OPTIONS]."""
        w1, b1, w2, b2 = self.parameters if parameters is None else parameters
        logits = torch.tanh(x @ w1 + b1) @ w2 + b2
        return logits.view(*x.shape[:2], POSITIONS, OPTIONS).log_softmax(-1)

    def sample(self, log_probs: Tensor, count: int, step: int) -> Tensor:
        """One-hot responses [S, N, count, POSITIONS, OPTIONS], by the Gumbel trick."""
        uniform = self.random(step, *log_probs.shape[1:2], count, POSITIONS, OPTIONS, kind="uniform", stream=2)
        gumbel = -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()
        return functional.one_hot((log_probs[:, :, None] + gumbel).argmax(-1), OPTIONS).float()

    def qualities(self, y: Tensor) -> Tensor:
        """v [S, N, G, 2K]."""
        return (y.flatten(3).flatten(1, 2) @ self.fixed["qualities"]).view(*y.shape[:3], 2 * K)

    def utility(self, v: Tensor, families_N: Tensor) -> Tensor:
        """U [S, N, G] without noise."""
        needs_N1K = torch.tensor(self.world.needs)[families_N][:, None]
        good = torch.tanh(v / 1.5)
        harm = (torch.tensor(self.world.harm) * torch.relu(good[..., K:])).sum(-1)
        return (needs_N1K * good[..., :K]).sum(-1) - harm

    def rewards(self, v: Tensor, step: int) -> Tensor:
        """r [S, N, G, K]."""
        noise = self.world.noise * self.random(step, *v.shape[1:3], K, stream=3)
        return v[..., :K] + torch.tensor(self.world.hack) * v[..., K:] + noise

    def contexts(self, x: Tensor, y: Tensor, kind: str) -> Tensor:
        """[S, N, G, CONTEXT]: a state of the prompt alone, or of prompt and response."""
        prompt = (x @ self.fixed["prompt_state"])[:, :, None]
        if kind == "response":
            prompt = prompt + (y.flatten(3).flatten(1, 2) @ self.fixed["response_state"]).view(*y.shape[:3], CONTEXT)
        return functional.layer_norm(torch.tanh(prompt), (CONTEXT,)).expand(*y.shape[:3], CONTEXT)

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """True utility [S, families] on prompts that are the same at every call."""
        families_N = torch.arange(self.config.evaluation) % FAMILIES
        y = self.sample(self.log_probs(self.prompts(-1, families_N)), 16, -1)
        utility_SN = self.utility(self.qualities(y), families_N).mean(-1)
        return torch.stack([utility_SN[:, families_N == f].mean(1) for f in range(FAMILIES)], 1)


def _draw_world(world: World, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    correlation = torch.eye(2 * K)
    for (i, j), opposed in zip(((0, 1), (2, 3)), world.opposition, strict=True):
        correlation[i, j] = correlation[j, i] = -opposed
    z = normal(POSITIONS, OPTIONS, 2 * K) @ torch.linalg.cholesky(correlation).T
    z = z - z.mean(1, keepdim=True)
    z = z / z.square().mean(1).sum(0).sqrt()  # v has standard deviation 1 under uniform choices
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
    """Trains a policy per seed under a weight policy, and measures the utility that nobody optimised directly.

    Args:
        world: a name of ``WORLDS``, or one.
        weights: entry for ``build_weight_policy``; a policy by column may read ``family``, a number as text.
        seeds: of the worlds and of all draws.

    Raises:
        ValueError: an unknown world, no seeds, or what the weight policy refuses.
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
    """One batch in every world; the diagnostics of each."""
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
    loss = -(response_log_probs * torch.stack(advantages)).mean((1, 2)).sum()  # one term per seed: they do not mix
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return figures
