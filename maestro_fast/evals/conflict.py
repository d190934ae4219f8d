"""The conflict benchmark: small worlds with K conflicting rewards and a known true utility that nothing optimises.

It asks whether a weight policy, trained on the rewards, serves the utility.

A prompt of family f is a vector x near the centre of the family. A response consists of D choices among L options,
sampled from a small network. Each option adds to 2K hidden qualities v: the rewards measure the first K, and the other
K can be exploited:

    r_k = v_k + hack_k v_{K+k} + noise
    U   = sum_k w*[f, k] tanh(v_k / 1.5)  -  sum_k harm_k relu(tanh(v_{K+k} / 1.5))

Families need different mixes w*, and some qualities are negatively correlated, so no fixed weighting serves all
families. There are five kinds of worlds:

    strong   the families want opposite things
    mild     they want much of the same, and qualities are less opposed
    hack     as strong, but richness and creativity can be exploited, which harms the utility
    anyof    any one of the qualities that a family needs is enough: max over k of tanh(v_k / 1.5) takes the sum's place
    null     every family wants the same equal mix, and nothing is opposed: adaptive weights have nothing to gain

The network is trained with GRPO on the rewards under a weight policy of ``maestro_fast.weighting``. The worlds of all
seeds advance together, and every weight policy sees the same random draws. The loss of a batch is the mean over the
groups that have a signal, as with ``batch.no_signal: drop``, and a network whose batch has none is not updated. Only a
policy that scores nothing but labelled groups ever meets such groups here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maestro_fast.specs import resolve_profile
from maestro_fast.weighting import (
    Comparison,
    Outcome,
    WeightContext,
    WeightPolicy,
    build_weight_policy,
    weigh_and_compare,
)
from maestro_fast.weighting.diagnostics import Watch, diagnose, healthy_ranges
from maestro_fast.weighting.families import spread_between_families

REWARDS = ("brevity", "richness", "creativity", "facts", "format")
K, FAMILIES, POSITIONS, OPTIONS = len(REWARDS), 4, 8, 4
PROMPT, HIDDEN, CONTEXT = 16, 32, 64
_STRONG = ((0.5, 0, 0, 0.5, 0), (0, 0.5, 0.5, 0, 0), (0, 0.35, 0, 0.35, 0.3), (0.5, 0, 0.5, 0, 0))
_SHARED = (0.0, 0.3, 0.0, 0.4, 0.3)
WATCHED = "labelled_utility/"


@dataclass(frozen=True)
class World:
    """What the families need, and how the rewards measure it. The module gives the formulas.

    Attributes:
        needs: w*, [families][K].
        opposition: How strongly brevity opposes richness, and creativity opposes facts: the correlations, negated.
        hack: [K], how much each reward counts the quality that can be exploited.
        harm: [K], how much that quality lowers the utility.
        noise: The standard deviation of a reward's noise.
        any_of: Whether one of the qualities that a family needs is enough for it.
    """

    needs: tuple[tuple[float, ...], ...]
    opposition: tuple[float, float]
    hack: tuple[float, ...] = (0.0,) * K
    harm: tuple[float, ...] = (0.0,) * K
    noise: float = 0.3
    any_of: bool = False


WORLDS = {
    "strong": World(_STRONG, (0.9, 0.6)),
    "mild": World(
        tuple(tuple(0.4 * a + 0.6 * b for a, b in zip(row, _SHARED, strict=True)) for row in _STRONG), (0.5, 0.3)
    ),
    "hack": World(_STRONG, (0.9, 0.6), (0.0, 1.5, 1.5, 0.0, 0.0), (0.0, 0.4, 0.4, 0.0, 0.0)),
    "anyof": World(_STRONG, (0.9, 0.6), any_of=True),
    "null": World(((1 / K,) * K,) * FAMILIES, (0.0, 0.0)),
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
        profile: The advantage profile. Where it leaves the KL to the loss, the exact KL of the network is added there.
        labelled: The share of the groups whose utility is known to the weight policy.
        early: The number of first batches in which all groups are labelled. Later ones have as many fewer labels.
        label_noise: The standard deviation of the noise in these utilities.
        watched: Shares of labels. For each, the figure "labelled_utility/<share>" is the mean of the noisy utilities
            that labels at that share, evenly spread, would have shown in the second half of the training.
        shuffled: Whether the contexts are dealt out anew among the prompts of each batch, which leaves the weight
            policy nothing to tell prompts apart by.
        evaluation: The number of prompts per seed on which the true utility is measured, with 16 responses each.
        points: The number of points of the figures over time.
    """

    steps: int = 300
    prompts: int = 16
    group_size: int = 8
    learning_rate: float = 0.015
    beta: float = 0.01
    profile: str = "maestro"
    labelled: float = 0.25
    early: int = 0
    label_noise: float = 0.3
    watched: tuple[float, ...] = ()
    shuffled: bool = False
    evaluation: int = 64
    points: int = 12

    def __post_init__(self) -> None:
        resolve_profile(self.profile)
        for name in ("steps", "prompts", "evaluation", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        if not 0 <= self.early <= self.labelled * self.steps:
            raise ValueError(
                f"early: {self.early} of {self.steps} batches, expected at most the labelled share {self.labelled}"
            )

    def label_chance(self, step: int) -> float:
        """The probability that a group of this batch is labelled."""
        if step < self.early:
            return 1.0
        return (self.labelled * self.steps - self.early) / max(1, self.steps - self.early)


@dataclass(frozen=True)
class ConflictResult:
    """What came of a weight policy in the worlds of S seeds.

    Attributes:
        utility_S: [S], the true utility after training, as a mean over families.
        start_S: [S], the same before training.
        family_SF: [S, families], the true utility of each family after training.
        figures_S: For each seed, each diagnostic as a mean over the last quarter of the steps.
        history_S: For each seed, the utility and the diagnostics over time, as pairs of a step and a value.
        alarms_S: For each seed, the diagnostics that left their healthy range for five batches in a row in the last
            quarter of the steps.
    """

    utility_S: Tensor
    start_S: Tensor
    family_SF: Tensor
    figures_S: list[dict[str, float]]
    history_S: list[dict[str, list[tuple[int, float]]]]
    alarms_S: list[set[str]]

    @property
    def alarms(self) -> dict[str, int]:
        """The number of seeds by the name of a diagnostic that left its healthy range."""
        warned = [name for names in self.alarms_S for name in names]
        return {name: warned.count(name) for name in sorted(set(warned))}

    @property
    def figures(self) -> dict[str, float]:
        """Each diagnostic as a mean over the seeds that have it."""
        seen: dict[str, list[float]] = {}
        for figures in self.figures_S:
            for name, value in figures.items():
                seen.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in seen.items()}


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
        return _most_likely(log_probs, self._gumbel(step, log_probs.shape[1], count))

    def _gumbel(self, step: int, prompts: int, count: int) -> Tensor:
        uniform = self.random(step, prompts, count, POSITIONS, OPTIONS, kind="uniform", stream=2)
        return -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()

    def qualities(self, y: Tensor) -> Tensor:
        """The hidden qualities v [S, N, G, 2K] of one-hot responses."""
        return (y.flatten(3).flatten(1, 2) @ self.fixed["qualities"]).view(*y.shape[:3], 2 * K)

    def utility(self, v: Tensor, families_N: Tensor) -> Tensor:
        """The true utility U [S, N, G] of the qualities, without noise."""
        needs_N1K = torch.tensor(self.world.needs)[families_N][:, None]
        good = torch.tanh(v / 1.5)
        harm = (torch.tensor(self.world.harm) * torch.relu(good[..., K:])).sum(-1)
        if self.world.any_of:
            return torch.where(needs_N1K > 0, good[..., :K], float("-inf")).amax(-1) - harm
        return (needs_N1K * good[..., :K]).sum(-1) - harm

    def rewards(self, v: Tensor, step: int) -> Tensor:
        """The rewards r [S, N, G, K] of the qualities, with the noise of this step."""
        noise = self.world.noise * self.random(step, *v.shape[1:3], K, stream=3)
        return v[..., :K] + torch.tensor(self.world.hack) * v[..., K:] + noise

    def contexts(self, x: Tensor, y: Tensor, kind: str) -> Tensor:
        """The contexts [S, N, G, CONTEXT] of a weight policy.

        They stand for hidden states: of prompt and response if ``kind`` is one of a response, else of the prompt alone.
        """
        prompt = (x @ self.fixed["prompt_state"])[:, :, None]
        if kind.startswith("response"):
            prompt = prompt + (y.flatten(3).flatten(1, 2) @ self.fixed["response_state"]).view(*y.shape[:3], CONTEXT)
        return functional.layer_norm(torch.tanh(prompt), (CONTEXT,)).expand(*y.shape[:3], CONTEXT)

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The true utility [S, families] on prompts that are the same in every call."""
        families_N, x, gumbel = self._held_out
        y = _most_likely(self.log_probs(x), gumbel)
        utility_SN = self.utility(self.qualities(y), families_N).mean(-1)
        return torch.stack([utility_SN[:, families_N == f].mean(1) for f in range(FAMILIES)], 1)

    @cached_property
    def _held_out(self) -> tuple[Tensor, Tensor, Tensor]:
        """The families and prompts of ``evaluate``, and the noise by which it samples."""
        families_N = torch.arange(self.config.evaluation) % FAMILIES
        return families_N, self.prompts(-1, families_N), self._gumbel(-1, len(families_N), 16)


def _most_likely(log_probs: Tensor, gumbel: Tensor) -> Tensor:
    """The one-hot options [S, N, count, POSITIONS, OPTIONS] whose log-prob and Gumbel noise add up to the most."""
    return functional.one_hot((log_probs[:, :, None] + gumbel).argmax(-1), OPTIONS).float()


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
    training = _Training(bench, weights)
    start_SF = bench.evaluate()
    history, late = [_History() for _ in seeds], [_History() for _ in seeds]
    for one, utility in zip(history, start_SF.mean(1).tolist(), strict=True):
        one.add(0, {"utility": utility})
    every = max(1, config.steps // config.points)
    for step in range(config.steps):
        is_late, is_point = step >= config.steps * 3 // 4, (step + 1) % every == 0 or step + 1 == config.steps
        figures = training.step(step, diagnosed=is_late or is_point)
        for s in range(len(seeds)):
            if is_late:
                late[s].add(step, figures[s])
                training.watches[s].see(figures[s])
            elif watched := {name: value for name, value in figures[s].items() if name.startswith(WATCHED)}:
                late[s].add(step, watched)
        if is_point:
            for one, utility, seen in zip(history, bench.evaluate().mean(1).tolist(), figures, strict=True):
                one.add(step + 1, {"utility": utility} | seen)
    family_SF = bench.evaluate()
    return ConflictResult(
        family_SF.mean(1),
        start_SF.mean(1),
        family_SF,
        [one.means() for one in late],
        [one.values for one in history],
        [watch.warned for watch in training.watches],
    )


class _History:
    """Figures over time, by name, as pairs of a step and a value."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[int, float]]] = {}

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.values.setdefault(name, []).append((step, value))

    def means(self) -> dict[str, float]:
        return {name: sum(value for _, value in pairs) / len(pairs) for name, pairs in self.values.items()}


@dataclass(frozen=True)
class _Batch:
    """The responses of all worlds to the prompts of a step.

    Attributes:
        log_probs: [S, N, POSITIONS, OPTIONS], those of all options, with their gradient.
        y: [S, N, G, POSITIONS, OPTIONS], the one-hot responses.
        qualities: [S, N, G, 2K], the hidden qualities of the responses.
        utility: [S, N, G], with the noise of labels.
        chance: [S, N, 1], uniform in [0, 1). A group is labelled if it is below the share of labels.
        shift: [S, N, POSITIONS, OPTIONS], how far the log-probs are above those of the first network, with gradient.
        kl: [S, N, G], the sum of this over the options of the response.
        contexts: [S, N, G, CONTEXT].
    """

    log_probs: Tensor
    y: Tensor
    qualities: Tensor
    utility: Tensor
    chance: Tensor
    shift: Tensor
    kl: Tensor
    contexts: Tensor


class _Training:
    """The networks of all worlds with their optimisers and weight policies."""

    def __init__(self, bench: Bench, weights: str | Mapping[str, Any]) -> None:
        self.bench = bench
        self.policies: list[WeightPolicy] = [build_weight_policy(weights, REWARDS, CONTEXT) for _ in bench.seeds]
        self.watches = [Watch(healthy_ranges(REWARDS)) for _ in bench.seeds]
        self.profile = resolve_profile(bench.config.profile)
        self.reference = [p.detach().clone() for p in bench.parameters]
        rate = bench.config.learning_rate
        # Each seed has an optimiser of its own, whose parameters are views of the stacked ones.
        self.optimizers = [
            torch.optim.Adam([p.detach()[s] for p in bench.parameters], rate, betas=(0.9, 0.99), fused=True)
            for s in range(bench.count)
        ]
        self.families = [str(f) for f in bench.families_N.tolist()]
        self.columns = {"family": [f for f in self.families for _ in range(bench.config.group_size)]}

    def step(self, step: int, *, diagnosed: bool) -> list[dict[str, float]]:
        """Trains the network of every world on one batch. Returns figures of each world, few if not ``diagnosed``."""
        bench, config = self.bench, self.bench.config
        batch = self._batch(step)
        rewards = bench.rewards(batch.qualities, step)
        outcomes = [self._weigh(batch, rewards[s], s, step) for s in range(bench.count)]
        shape = (bench.count, config.prompts, config.group_size)
        advantages = torch.stack([one.advantages.advantages for one in outcomes]).view(shape)
        live = ~torch.stack([one.advantages.degenerate for one in outcomes]).view(shape)
        response_log_probs = (batch.log_probs[:, :, None] * batch.y).sum((-1, -2))
        loss_S = -(response_log_probs * advantages * live).sum((1, 2)) / live.sum((1, 2)).clamp(min=1)
        if self.profile.kl_in == "loss":
            loss_S = loss_S + config.beta * (batch.log_probs.exp() * batch.shift).sum((-1, -2)).mean(1)
        # The seeds have separate parameters, so the sum of their losses trains each of them alone.
        gradients = torch.autograd.grad(loss_S.sum(), bench.parameters)
        for s, optimizer in enumerate(self.optimizers):
            if live[s].any():
                for own, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
                    own.grad = gradient[s]
                optimizer.step()
        figures = [self._figures(one, batch.kl[s], s) if diagnosed else {} for s, one in enumerate(outcomes)]
        if 2 * step >= config.steps:
            for share in config.watched:
                for s, one in enumerate(figures):
                    seen = batch.utility[s][batch.chance[s, :, 0] < share]
                    one.update({f"{WATCHED}{share:g}": seen.mean().item()} if len(seen) else {})
        return figures

    def _batch(self, step: int) -> _Batch:
        bench, config, families_N = self.bench, self.bench.config, self.bench.families_N
        x = bench.prompts(step, families_N)
        log_probs = bench.log_probs(x)
        with torch.no_grad():
            y = bench.sample(log_probs, config.group_size, step)
            v = bench.qualities(y)
            utility = bench.utility(v, families_N)
            utility = utility + config.label_noise * bench.random(step, *utility.shape[1:], stream=4)
            chance = bench.random(step, config.prompts, 1, kind="uniform", stream=5)
            policy = self.policies[0]
            contexts = bench.contexts(x, y, policy.context_kind if policy.needs_context else "prompt_mean")
            if config.shuffled:
                order_SN = bench.random(step, config.prompts, kind="uniform", stream=6).argsort(1)
                contexts = torch.stack([one[order] for one, order in zip(contexts, order_SN, strict=True)])
            first = bench.log_probs(x, self.reference)
        shift = log_probs - first
        kl = (shift.detach()[:, :, None] * y).sum((-1, -2))
        return _Batch(log_probs, y, v, utility, chance, shift, kl, contexts)

    @torch.no_grad()
    def _weigh(self, batch: _Batch, rewards: Tensor, s: int, step: int) -> Outcome:
        """Lets the weight policy of seed s weigh the rewards [N, G, K] of its world, and learn from the outcome."""
        config, policy = self.bench.config, self.policies[s]
        labelled_N1 = batch.chance[s] < config.label_chance(step)
        context = WeightContext(
            REWARDS,
            config.group_size,
            step,
            rewards.flatten(0, 1),
            batch.contexts[s].flatten(0, 1),
            torch.where(labelled_N1, batch.utility[s], float("nan")).flatten(),
            self.columns,
        )
        in_score = self.profile.kl_in == "score"
        kl_B = batch.kl[s].flatten() if in_score else None
        comparison = Comparison(self.profile, kl_B, config.beta if in_score else 0.0)
        found, result = weigh_and_compare(policy, context, comparison)
        outcome = Outcome(context, found, result, comparison.profile, comparison.kl_B, comparison.beta)
        with torch.enable_grad():
            policy.observe(outcome)
        return outcome

    def _figures(self, outcome: Outcome, kl: Tensor, s: int) -> dict[str, float]:
        """Diagnostics of a batch, the policy's own figures, and how far the weights of the families lie apart."""
        figures = diagnose(outcome) | self.policies[s].metrics()
        figures["kl"] = kl.mean().item()
        weights_NK = outcome.weights.expected_BK.view(len(self.families), -1, K).mean(1)
        spread = spread_between_families(weights_NK, self.families, shuffles=1, seed=outcome.context.step)
        if spread is not None:
            figures["diagnostics/family_spread"] = spread[0]
            figures["diagnostics/family_spread_shuffled"] = spread[1].mean().item()
        return figures
