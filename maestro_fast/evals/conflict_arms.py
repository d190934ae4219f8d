"""The arms of the conflict worlds: what is compared there, and the 12 settings that each arm may choose from.

An arm is a weight policy. Its settings are three learning rates of the network, times four choices that matter to the
policy: options of its own, or coefficients of the KL for a policy that has none. Equal weights choose as freely as
adaptive ones do. Controls take over what was chosen for the arm that they are a control of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from maestro_fast.evals.conflict import REWARDS, WORLDS
from maestro_fast.evals.training_arms import SINGLE, STATIC, STATIC_ORACLE, static, weightings

SETTINGS = 12  # for each arm that is tuned
WEIGHTINGS = 36  # static ones: three times as many, because they are the rival that costs nothing
RATES = (0.01, 0.02, 0.04)
Setting = dict[str, dict[str, Any]]  # {"training": options of ConflictConfig, "weights": options of the policy}


def _choices(**options: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Every combination of the options' values."""
    return tuple(dict(zip(options, values, strict=True)) for values in product(*options.values()))


@dataclass(frozen=True)
class Arm:
    """One way to weigh rewards.

    Attributes:
        name: its name in results and tables.
        weights: the entry of its weight policy.
        choices: the options of the policy that are tuned, four of them; with none, beta is tuned.
        labels: whether it learns from labels, and so depends on their share.
        like: the arm whose settings it takes over; "" means that it is tuned itself.
        control: whether it is a control, which is run only where arms are tuned.
        shuffled: whether contexts are dealt out anew among the prompts of each batch.
        cost: what a step costs, in steps with equal weights.
    """

    name: str
    weights: Mapping[str, Any]
    choices: tuple[dict[str, Any], ...] = ()
    labels: bool = False
    like: str = ""
    control: bool = False
    shuffled: bool = False
    cost: float = 1.0

    @property
    def settings(self) -> list[Setting]:
        """The settings that are tried."""
        own = self.choices or _BETAS
        kind = "weights" if self.choices else "training"
        empty: Setting = {"training": {}, "weights": {}}
        return [
            {**empty, kind: dict(choice)}
            | {"training": {"learning_rate": rate} | (choice if kind == "training" else {})}
            for choice in own
            for rate in RATES
        ]

    def entry(self, world: str, setting: Setting) -> dict[str, Any]:
        """The entry of the weight policy in a world."""
        if self.weights["type"] == "router":
            routes = {str(f): dict(zip(REWARDS, row, strict=True)) for f, row in enumerate(WORLDS[world].needs)}
            return {**self.weights, "column": "family", "routes": routes}
        return {**self.weights, **setting["weights"]}


_BETAS = _choices(beta=(0.0, 0.01, 0.03, 0.1))
_STEPS = 3  # Adam steps after each batch: a network of this size needs no more, and 20 would take most of the time.
# The published meta-objective: it reads the response, draws an action for each, and reinforces group advantages.
_PUBLISHED = {"type": "conductor", "estimator": "reinforce", "min_prob": 0.0, "entropy_coef": 0.01}
_ANCHORED = {"type": "anchored", "residual": False, "hybrid": False, "steps": _STEPS}
_REWARD_MODEL = {"type": "reward_model", "steps": _STEPS}
_WEIGHTS = _choices(learning_rate=(0.03, 0.1), entropy_coef=(0.01, 0.1))
_RESIDUAL = _choices(learning_rate=(0.03, 0.1), residual_factor=(0.5, 1.0))
_REGRESSION = _choices(learning_rate=(0.03, 0.1), l2=(0.003, 0.03))
_ALL = [
    Arm("equal", {"type": "equal"}),
    Arm("random", {"type": "random"}),
    *(
        Arm(f"{SINGLE}:{name}", static(REWARDS, [float(name == one) for one in REWARDS]), like="equal")
        for name in REWARDS
    ),
    Arm("router", {"type": "router"}),
    Arm("labelled", {"type": "utility"}, labels=True),
    Arm("reward_model", _REWARD_MODEL, _REGRESSION, labels=True, cost=4.5),
    Arm("reward_model_hybrid", {**_REWARD_MODEL, "hybrid": True}, _REGRESSION, labels=True, cost=4.5),
    Arm("conductor", _PUBLISHED, _choices(alpha=(0.3, 0.7), learning_rate=(0.005, 0.05)), cost=2),
    Arm("global", {**_ANCHORED, "context": "none"}, _WEIGHTS, labels=True, cost=7),
    Arm("anchored", _ANCHORED, _WEIGHTS, labels=True, cost=7),
    Arm("anchored_hybrid", {**_ANCHORED, "hybrid": True}, _WEIGHTS, labels=True, cost=7),
    Arm("anchored_residual", {**_ANCHORED, "residual": True, "hybrid": True}, _RESIDUAL, labels=True, cost=10),
    Arm("saw", {"type": "saw"}, _choices(delta=(1e-4, 0.1, 1.0, 10.0))),
    Arm("dvao", {"type": "dvao"}),
    Arm("weakest_first", {"type": "weakest_first"}, _choices(tau=(0.1, 0.5), decay=(0.5, 0.9))),
    Arm("exp3", {"type": "exp3"}, _choices(gamma=(0.1, 0.3), alpha=(0.3, 1.0)), cost=2),
    Arm("conductor_prompt", {**_PUBLISHED, "context": "prompt_mean"}, like="conductor", control=True, cost=2),
    Arm("conductor_shuffled", {**_PUBLISHED, "shuffle": True}, like="conductor", control=True, cost=2),
    Arm("anchored_shuffled", _ANCHORED, labels=True, like="anchored", control=True, shuffled=True, cost=7),
]
ARMS = {arm.name: arm for arm in _ALL}
STATICS = (STATIC, STATIC_ORACLE)  # Each takes one of the static weightings, which validation worlds choose.


def static_arm(name: str, weighting: int) -> Arm:
    """The arm, under this name, of one of the static weightings. It trains as equal weights do."""
    values = weightings(WEIGHTINGS, len(REWARDS))[weighting]
    return Arm(name, static(REWARDS, values), labels=name == STATIC, like="equal")
