"""An invented outcome of a suite, of 18 arms with 4 shares of labels and 10 seeds."""

from __future__ import annotations

from functools import cache

import numpy as np

from maestro_fast.evals.results import Result

SHARES = (0.025, 0.05, 0.1, 0.25)
# The true utility of each arm; of those that read labels, at each share.
FREE = {
    "equal": 0.517,
    "random": 0.505,
    "single:brevity": 0.31,
    "single:richness": 0.42,
    "single:format": 0.38,
    "static_oracle": 0.632,
    "router": 0.682,
    "conductor": 0.501,
    "saw": 0.52,
    "dvao": 0.53,
    "weakest_first": 0.525,
    "exp3": 0.51,
}
READERS = {
    "static": (0.54, 0.57, 0.6, 0.62),
    "labelled": (0.529, 0.582, 0.632, 0.693),
    "reward_model_hybrid": (0.538, 0.625, 0.669, 0.69),
    "anchored": (0.592, 0.612, 0.627, 0.675),
    "anchored_residual": (0.59, 0.64, 0.692, 0.7),
    "global": (0.54, 0.56, 0.58, 0.6),
}
FAMILIES = ("fact", "essay", "report", "poem")


@cache
def invented(
    seeds: int = 10, shares: tuple[float, ...] = SHARES, places: tuple[str, ...] = ("strong",)
) -> list[Result]:
    """Results whose utility is the arm's true one, what the seed has in common for all arms, and noise of its own."""
    found = []
    for place in places:
        for seed in range(1, seeds + 1):
            common = 0.04 * np.random.default_rng(seed).normal()
            arms = [(arm, value, {}) for arm, value in FREE.items()]
            arms += [
                (arm, values[SHARES.index(share)], {"share": share})
                for arm, values in READERS.items()
                for share in shares
            ]
            for arm, value, share in arms:
                noise = np.random.default_rng([seed, *map(ord, arm), int(1000 * sum(share.values()))])
                found.append(_result(arm, seed, {"world": place, **share, "steps": 80}, value + common, noise))
    return found


def _result(arm: str, seed: int, condition: dict, utility: float, noise: np.random.Generator) -> Result:
    utility += 0.02 * noise.normal()
    steps = list(range(0, 81, 10))
    rise = [utility - 0.25 * (1 - step / 80) ** 2 + 0.01 * noise.normal() for step in steps[:-1]]
    history = {"utility": list(zip(steps, [*rise, utility], strict=True))}
    if arm in ("conductor", "anchored", "anchored_residual", "global"):
        history["conductor/objective"] = [(s, 0.4 * s / 80 + 0.05 * noise.normal()) for s in steps]
        history["diagnostics/entropy"] = [(s, 1.6 - s / 160 + 0.02 * noise.normal()) for s in steps]
    if arm == "anchored_residual":
        history["conductor/residual_share"] = [(s, 0.3 + 0.1 * noise.normal()) for s in steps]
    return Result(
        arm,
        seed,
        condition,
        utility,
        {name: utility + 0.05 * i for i, name in enumerate(FAMILIES)},
        15 + noise.normal(),
        153_600,
        {"kept_step": 60.0} if "share" in condition else {},
        history,
        {"values": {"brevity": 0.5, "richness": 0.5}} if arm == "static" else {},
    )
