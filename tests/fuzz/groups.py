"""Group structures of all kinds: advantages and the division into micro-batches are right, or an error says "groups".

    python -m tests.fuzz groups --inputs 20000 --json tests/fuzz/groups.json

Every input is a batch of groups of any sizes, in any order, with rewards that abstain, are equal, or are far from 0,
under a named profile or a random one. What is right is evaluated here in Python's floats, response by response, from
the documentation of ``AdvantageProfile``; it shares no code with the ops. Counterfactuals are that evaluation with one
response's weights replaced. A NaN among the weights may reach its own group alone. Other inputs divide a batch whose
responses are left out at random: each of the others stands in exactly one micro-batch.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from maestro_fast import ops
from maestro_fast.model.rows import Sequences
from maestro_fast.ops import PROFILES, AdvantageProfile, Groups
from maestro_fast.specs.advantages import Center, Scale, ScoreCenter, ScoreScale
from maestro_fast.training.batches import (
    BatchConfig,
    BatchPlan,
    TokenLogprobs,
    UpdateTotals,
    cut_order,
    split_micro_batches,
)
from tests.fuzz.trial import Input, add_options, as_tally, try_inputs

__all__ = ["add_options", "main", "run"]

_EPS = 5e-7  # A few roundings of float32, by which a score may be off.


@dataclass(frozen=True)
class Batch:
    """A batch as plain numbers. A NaN among the rewards is an abstention."""

    ids: list[int]
    rewards: list[list[float]]
    weights: list[list[float]]
    kl: list[float]
    beta: float
    lengths: list[int]


@dataclass(frozen=True)
class Truth:
    """What is right for each response. ``undecided`` says that rounding decides whether its group
    has a spread, or that a mean is over no token."""

    scores: list[float]
    advantages: list[float]
    degenerate: list[bool]
    undecided: list[bool]
    size: float  # of the terms that scores are added up from
    stds: list[float]


# --- the rule ---


def _moments(values: list[float], counts: list[float], ddof: int) -> tuple[float, float]:
    """Mean and standard deviation of values that count so often; the deviation of fewer than two is 0."""
    total = math.fsum(counts)
    if not total:
        return 0.0, 0.0
    mean = math.fsum(c * x for c, x in zip(counts, values, strict=True)) / total
    squares = math.fsum(c * (x - mean) ** 2 for c, x in zip(counts, values, strict=True))
    spread = max(values) > min(values)
    return mean, math.sqrt(squares / max(total - ddof, 1)) if spread else 0.0


def _compared(
    x: list[float], live: list[bool], batch: Batch, center: str, scale: str, profile: AdvantageProfile
) -> tuple[list[float], list[float]]:
    """Centred values and standard deviations, by the scopes of one column."""
    B = range(len(x))

    def members(i: int, scope: str) -> list[int]:
        near = scope in ("group", "leave_one_out")
        return [j for j in B if live[j] and (not near or batch.ids[j] == batch.ids[i])]

    centred, stds = [], []
    for i in B:
        raw = profile.singleton == "raw" and len(members(i, "group")) == 1
        mean, std = 0.0, 0.0
        if center == "leave_one_out":
            others = [x[j] for j in members(i, center) if j != i]
            mean = math.fsum(others) / len(others) if others else x[i]
        elif center != "none":
            of = members(i, center)
            mean, _ = _moments([x[j] for j in of], _counts(of, center, batch), profile.ddof)
        if raw and center in ("group", "leave_one_out"):
            mean = 0.0
        of = members(i, scale)
        _, std = _moments([x[j] for j in of], _counts(of, scale, batch), profile.ddof)
        centred.append(x[i] - mean)
        stds.append(1.0 if raw and scale == "group" else std)
    return centred, stds


def _counts(members: list[int], scope: str, batch: Batch) -> list[float]:
    return [float(batch.lengths[j]) if scope == "tokens" else 1.0 for j in members]


def evaluate(batch: Batch, profile: AdvantageProfile) -> Truth:
    """Scores and advantages of a batch, from the documentation."""
    B, K = range(len(batch.ids)), range(len(batch.rewards[0]) if batch.rewards else 0)
    normalized = [[0.0] * len(K) for _ in B]
    for k in K:
        x = [batch.rewards[b][k] for b in B]
        live = [not math.isnan(value) for value in x]
        x = [value if alive else 0.0 for value, alive in zip(x, live, strict=True)]
        centred, stds = _compared(x, live, batch, profile.reward_center, profile.reward_scale, profile)
        scope = profile.reward_scale if profile.reward_scale != "none" else profile.reward_center
        for b in B:
            value = centred[b]
            if profile.reward_scale != "none":
                divisor = stds[b] + profile.reward_eps
                value = value / divisor if divisor else 0.0
            alone = sum(live[j] for j in B if scope == "batch" or batch.ids[j] == batch.ids[b]) < 2
            if scope != "none" and alone and (profile.singleton == "zero" or scope == "batch"):
                value = 0.0
            normalized[b][k] = value if live[b] else 0.0
    raw, alive, size = [], [], 0.0
    for b in B:
        known = [k for k in K if not math.isnan(batch.rewards[b][k])]
        whole, rest = math.fsum(batch.weights[b]), math.fsum(batch.weights[b][k] for k in known)
        factor = 1.0
        alive.append(bool(known))
        if profile.missing == "renormalize" and known and len(known) < len(K):
            alive[-1] = rest != 0
            factor = whole / rest if rest else 1.0
        terms = [factor * batch.weights[b][k] * normalized[b][k] for k in known] if alive[-1] else [0.0]
        raw.append(math.fsum(terms))
        size = max([size, *map(abs, terms), abs(batch.beta * batch.kl[b])])
    scores = [raw[b] - batch.beta * batch.kl[b] if alive[b] else 0.0 for b in B]
    spread = profile.score_scale if profile.score_scale != "none" else "group"
    centred, stds = _compared(scores, alive, batch, profile.score_center, spread, profile)
    advantages, degenerate, undecided = [], [], []
    for b in B:
        group = [j for j in B if alive[j] and batch.ids[j] == batch.ids[b]]
        low, high = min((raw[j] for j in group), default=0.0), max((raw[j] for j in group), default=0.0)
        same = all(_same(batch, normalized, group[0], j) for j in group) if group else True
        degenerate.append(same or high == low)
        no_mean = profile.needs_lengths and not any(batch.lengths[j] for j in B if alive[j])
        undecided.append(no_mean or (not same and high - low <= _EPS * max(size, 1e-30) * 4))
        value = centred[b]
        if profile.score_scale != "none":
            std = stds[b]
            divisor = (
                std + profile.score_eps if profile.score_eps_in == "std" else math.sqrt(std**2 + profile.score_eps)
            )
            value = value / divisor if divisor else 0.0
        kept = profile.singleton == "raw" and len(group) == 1
        advantages.append(0.0 if not alive[b] or (degenerate[-1] and not kept) else value)
    return Truth(scores, advantages, degenerate, undecided, size, stds)


def _same(batch: Batch, normalized: list[list[float]], i: int, j: int) -> bool:
    """Whether two responses have the same rewards and weights, so that their scores are the same in any precision."""
    rewards = all(a == b or (a != a and b != b) for a, b in zip(batch.rewards[i], batch.rewards[j], strict=True))
    return (rewards or not any([*normalized[i], *normalized[j]])) and batch.weights[i] == batch.weights[j]


# --- inputs ---


def draw(rng: random.Random) -> Batch:
    """A batch of up to five groups of any sizes; its numbers are those of float32."""
    sizes = [rng.choice([1, 2, 2, 3, 4, 6]) for _ in range(rng.choice([0, 1, 1, 2, 3, 5]))]
    if rng.random() < 0.4:
        sizes = [sizes[0]] * len(sizes) if sizes else []
    names = rng.sample([0, 1, 2, 3, 7, -1, -5, 2**40, 10**6], len(sizes))
    ids = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
    if rng.random() < 0.4:
        rng.shuffle(ids)
    B, K, kind = len(ids), rng.randint(1, 3), rng.choice(["levels", "levels", "normal", "far", "equal", "tiny"])

    def reward() -> float:
        value = {
            "levels": rng.choice([0.0, 0.5, 1.0]),
            "normal": rng.gauss(0, 1),
            "far": 1000 + rng.choice([0.0, 0.25, 0.5]),
            "equal": 0.3,
            "tiny": rng.gauss(0, 1e-12),
        }[kind]
        return math.nan if rng.random() < abstains else value

    abstains = rng.choice([0.0, 0.0, 0.1, 0.5, 1.0])
    weights = [[rng.choice([0.0, 0.25, 0.5, 1.0, rng.random()]) for _ in range(K)] for _ in range(B)]
    if rng.random() < 0.5:
        weights = [weights[0]] * B if B else []
    kl = [abs(rng.gauss(0, 0.1)) for _ in ids]
    beta = rng.choice([0.0, 0.1])
    drawn = Batch(ids, [[reward() for _ in range(K)] for _ in ids], weights, kl, beta, [rng.randint(0, 5) for _ in ids])
    floats: Any = lambda rows: torch.tensor(rows, dtype=torch.float32).double().tolist()  # noqa: E731
    return replace(drawn, rewards=floats(drawn.rewards), weights=floats(drawn.weights), kl=floats(drawn.kl))


def draw_profile(rng: random.Random) -> tuple[AdvantageProfile, str]:
    """A profile, and its name or its fields."""
    if rng.random() < 0.5:
        name = rng.choice([*PROFILES])
        return PROFILES[name], name
    own = AdvantageProfile(
        rng.choice(get_args(Center)),
        rng.choice(get_args(Scale)),
        rng.choice(get_args(ScoreCenter)),
        rng.choice(get_args(ScoreScale)),
        reward_eps=rng.choice([1e-4, 1e-6]),
        score_eps=rng.choice([1e-4, 1e-6]),
        ddof=rng.choice([0, 1]),
        singleton=rng.choice(["zero", "raw"]),
        missing=rng.choice(["zero", "renormalize"]),
        score_eps_in=rng.choice(["std", "variance"]),
    )
    return own, str(own)


def _groups_of(rng: random.Random, ids: list[int]) -> Any:
    """The same groups in one of the ways in which an op takes them."""
    size = len(ids) // max(1, len({*ids}))
    blocks = [ids[i : i + size] for i in range(0, len(ids), max(size, 1))]
    consecutive = all(len({*block}) == 1 and len(block) == size for block in blocks) and len(blocks) == len({*ids})
    ways: list[Any] = [ids, torch.tensor(ids, dtype=torch.int64), Groups.of(ids, len(ids))]
    ways += [Groups.of_keys([f"prompt {i}" for i in ids]), Groups.of_keys([("key", i) for i in ids])]
    return rng.choice([*ways, size, size, Groups.of(size, len(ids))] if consecutive and size else ways)


WRONG_GROUPS = (0, -1, 2.0, True, "2", b"22", [0.0], [True, False], {0: 1}, torch.tensor([0.5]), object(), 10**30)


def _arguments(batch: Batch, profile: AdvantageProfile, groups: Any) -> dict[str, Any]:
    K = len(batch.rewards[0]) if batch.rewards else 1
    rewards = torch.tensor(batch.rewards, dtype=torch.float32).view(-1, K)
    weights = torch.tensor(batch.weights, dtype=torch.float32).view(-1, K)
    found: dict[str, Any] = {"rewards": rewards, "weights": weights, "groups": groups, "profile": profile}
    if profile.kl_in == "score" and batch.beta:
        found |= {"kl": torch.tensor(batch.kl), "beta": batch.beta}
    return found | ({"lengths": torch.tensor(batch.lengths)} if profile.needs_lengths else {})


# --- outcomes ---


def _judge(batch: Batch, profile: AdvantageProfile, groups: Any, backend: Any) -> tuple[str, str]:
    found = ops.group_advantages(**_arguments(batch, profile, groups), backend=backend)
    truth = evaluate(batch if profile.kl_in == "score" else replace(batch, beta=0.0), profile)
    fault = _differ(found.scores, truth.scores, [3e-5 * max(truth.size, 1e-30)] * len(batch.ids), "score")
    flags = [a == b or c for a, b, c in zip(found.degenerate.tolist(), truth.degenerate, truth.undecided, strict=True)]
    fault = fault or ("" if all(flags) else f"degenerate {found.degenerate.tolist()}, expected {truth.degenerate}")
    fault = fault or _differ(found.advantages, truth.advantages, _allowed(truth, profile), "advantage")
    return ("wrong", f"{fault}\n{batch}") if fault else ("right", "")


def _allowed(truth: Truth, profile: AdvantageProfile) -> list[float]:
    """The error that each advantage may have; where rounding decides whether there is a spread, it may be any."""
    largest, allowed = max(map(abs, truth.advantages), default=0.0), []
    for undecided, std in zip(truth.undecided, truth.stds, strict=True):
        eps = profile.score_eps if profile.score_eps_in == "std" else math.sqrt(profile.score_eps)
        noise = truth.size * _EPS * 4 / (1.0 if profile.score_scale == "none" else max(std, eps))
        allowed.append(math.inf if undecided else 1e-4 * largest + noise * (1 + largest))
    return allowed


def _differ(ours: Tensor, truth: list[float], allowed: list[float], what: str) -> str:
    for b, (x, right, most) in enumerate(zip(ours.tolist(), truth, allowed, strict=True)):
        if most < math.inf and not abs(x - right) <= most:
            return f"{what} {b} is {x}, expected {right}, off by at most {most:.2g}"
    return ""


def _counterfactual(rng: random.Random, batch: Batch, profile: AdvantageProfile, groups: Any, backend: Any) -> Any:
    K = len(batch.rewards[0]) if batch.rewards else 1
    actions = torch.tensor([[rng.choice([0.0, 0.3, 1.0]) for _ in range(K)] for _ in range(2)]).double().tolist()
    given = _arguments(batch, profile, groups)
    found = ops.counterfactual_advantages(
        **given, action_weights=torch.tensor(actions, dtype=torch.float32).view(-1, K), backend=backend
    )
    plain = batch if profile.kl_in == "score" else replace(batch, beta=0.0)
    for j in range(len(batch.ids)):
        for a, action in enumerate(actions):
            weights = [action if i == j else row for i, row in enumerate(plain.weights)]
            truth = evaluate(replace(plain, weights=weights), profile)
            fault = _differ(found[j : j + 1, a], truth.advantages[j : j + 1], _allowed(truth, profile)[j : j + 1], "cf")
            if fault:
                return "wrong", f"response {j}, action {action}: {fault}\n{batch}"
    return "right", ""


def _poisoned(rng: random.Random, batch: Batch, profile: AdvantageProfile, groups: Any, backend: Any) -> Any:
    """A NaN weight leaves all groups as they are but its own."""
    given = _arguments(batch, profile, groups)
    before = ops.group_advantages(**given, backend=backend).advantages
    row = rng.randrange(len(batch.ids))
    given["weights"][row, rng.randrange(given["weights"].shape[1])] = math.nan
    after = ops.group_advantages(**given, backend=backend).advantages
    own = torch.tensor([i == batch.ids[row] for i in batch.ids])
    if not torch.equal(before[~own], after[~own]):
        return "wrong", f"a NaN weight of response {row} changes {before.tolist()} to {after.tolist()}\n{batch}"
    return "right", ""


def _refused(batch: Batch, profile: AdvantageProfile, groups: Any, backend: Any) -> tuple[str, str]:
    try:
        ops.group_advantages(**_arguments(batch, profile, groups), backend=backend)
    except (ValueError, TypeError) as error:
        return ("refused by name" if str(error).startswith("groups") else "refused without a name"), str(error)
    # [0.5] and the like are right for no batch; sizes are where they divide it.
    fits = (isinstance(groups, int) and not isinstance(groups, bool) and groups > 0) and len(batch.ids) % groups == 0
    return ("right", "") if fits else ("wrong", f"groups {groups!r} were taken for {len(batch.ids)} responses")


def _divided(rng: random.Random) -> tuple[str, str]:
    """A generation batch, and how it is dealt to micro-batches."""
    config = BatchConfig(rng.randint(1, 12), rng.randint(1, 12), rng.randint(1, 4), rng.choice(["drop", "train"]))
    size, processes = rng.randint(1, 6), rng.randint(1, 3)
    words = f"{config}, groups of {size}, {processes} processes"
    try:
        plan = BatchPlan.of(config, size, processes)
    except ValueError as error:
        return ("refused by name" if str(error).startswith("batch.") else "refused without a name"), str(error)
    order = [j for g in rng.sample(range(plan.prompts), plan.prompts) for j in range(g * size, (g + 1) * size)]
    chance = rng.choice([0.0, 0.5, 1.0])
    live = [rng.random() >= chance for _ in order]
    lengths = [rng.randint(0, 3) for _ in order]
    cut = cut_order(plan, order, torch.tensor(live))
    totals = UpdateTotals("grpo", *([float(len(order))] * plan.updates for _ in range(3)))
    sequences = Sequences([[1, 2]] * len(order), [[j % 7] * n for j, n in enumerate(lengths)])
    numbers = torch.arange(sum(lengths), dtype=torch.float32)
    batches = split_micro_batches(
        plan,
        sequences,
        torch.ones(len(order)),
        TokenLogprobs(numbers),
        cut,
        torch.tensor(live),
        totals,
        torch.device("cpu"),
    )
    trained = [j for members in cut for j in members if live[j]]
    if sorted(trained) != [j for j in range(len(order)) if live[j]]:
        return "wrong", f"{words}: {trained} are trained on, expected those of {live}"
    if len(batches) != plan.micro_steps or not all(cut):
        return "wrong", f"{words}: {len(batches)} micro-batches {cut}, expected {plan.micro_steps} that hold something"
    tokens = sum(lengths[j] for j in trained)
    starts = [sum(lengths[:j]) for j in range(len(order))]
    for batch, members in zip(batches, cut, strict=True):
        mine = [float(starts[j] + t) for j in members for t in range(lengths[j])]
        if batch.logprobs.old_C is None or batch.logprobs.old_C.tolist() != mine:
            return "wrong", f"{words}: responses {members} have the log-probs of others"
        kept = batch.live(torch.ones(len(mine)))
        tokens -= int(kept.sum())
    return ("right", "") if not tokens else ("wrong", f"{words}: {tokens} tokens too few are in the loss")


def make(rng: random.Random) -> Input:
    """A batch, and what is asked of it."""
    if rng.random() < 0.2:
        return Input("a division into micro-batches", lambda: _divided(rng))
    batch, (profile, name) = draw(rng), draw_profile(rng)
    backend, groups, how = rng.choice(["torch", "cpp"]), _groups_of(rng, batch.ids), rng.random()
    words = f"{len(batch.ids)} responses, groups {groups!r:.80} by {backend}, {name}"
    if how < 0.1:
        wrong = rng.choice(
            [*WRONG_GROUPS, [*batch.ids, 1], torch.tensor([*batch.ids, 1]), Groups.of(1, len(batch.ids) + 1), 2, 3]
        )
        return Input(f"{words}, but {wrong!r:.60}", lambda: _refused(batch, profile, wrong, backend))
    beyond = {"batch", "tokens"} & {
        profile.reward_center,
        profile.reward_scale,
        profile.score_center,
        profile.score_scale,
    }
    if how < 0.3 and not {"batch", "tokens"} & {profile.score_center, profile.score_scale}:
        return Input(f"counterfactuals, {words}", lambda: _counterfactual(rng, batch, profile, groups, backend))
    if how < 0.4 and batch.ids and not beyond:
        return Input(f"a NaN weight, {words}", lambda: _poisoned(rng, batch, profile, groups, backend))
    return Input(words, lambda: _judge(batch, profile, groups, backend))


def run(inputs: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str]]:
    """Tries batches, see ``trial.try_inputs``."""
    return try_inputs(make, ("right", "refused by name"), inputs=inputs, seed=seed, first=first)


def main(given: argparse.Namespace) -> dict[str, Any]:
    """Runs the command, and returns its tally."""
    return as_tally(given, *run(given.inputs, given.seed, given.first))
