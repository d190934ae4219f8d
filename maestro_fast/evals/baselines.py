"""The baselines and ablations of the MAESTRO paper (arXiv 2601.07208), as changes of a user's own run.

    python -m maestro_fast.evals.baselines my_run.yaml em_grpo > em_grpo.yaml

prints the run's config with one of them, for ``maestro-fast train``, and a suite may name them among its arms. All else
stays as it is in the run, so that arms differ in what they are named for.

    base                    the paper's untrained model
    sft                     supervised fine-tuning on the references, a training of another kind, see ``supervised``
    nover, em_grpo          its single rewards, the perplexity of the reference and the policy's own entropy
    equal, random           its fixed weights: the same for every reward, or drawn anew
    single:<reward>         each reward of the run alone
    conductor               MAESTRO as published, and then its ablations:
    conductor_synchronous   the Conductor is updated with every batch instead of after every M batches
    conductor_no_entropy    its objective has no entropy
    conductor_first_layer   it reads the first layer instead of the last
    conductor_shuffled      it reads the state of another response, so the states carry no information
    conductor_prompt        it reads the prompt alone
    conductor_mean          it reads the mean over the tokens of the response

The paper has the first two of these ablations, and the first layer; its reviewers asked for the others. They also asked
for a static weighting chosen by a grid search with the grid reported: ``grid_arms`` has the grid.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from maestro_fast.config_file import read_config
from maestro_fast.evals.training_arms import ARMS, SINGLE, Arm, named_arms, static
from maestro_fast.rewards import build_rewards
from maestro_fast.settings import SettingsError, near, override
from maestro_fast.training import parse_config

SFT = "sft"
_PUBLISHED: dict[str, Any] = ARMS["conductor"].changes["weights"]
# The options of the Conductor that each ablation changes, and a sentence on it.
_ABLATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "synchronous": ({"period": 1}, "It is updated with every batch, not apart from the policy on a slower clock."),
    "no_entropy": ({"entropy_coef": 0.0}, "Its objective is the meta-reward alone, without the entropy."),
    "first_layer": ({"context": "response_first_layer"}, "It reads the terminal state after the first layer."),
    "shuffled": ({"shuffle": True}, "It reads the terminal state of another response of the batch."),
    "prompt": ({"context": "prompt_last"}, "It reads the state of the prompt's last token, the same for a group."),
    "mean": ({"context": "response_mean"}, "It reads the mean state over the tokens of the response."),
}


def baseline_arms(raw: Mapping[str, Any]) -> dict[str, Arm]:
    """The baselines and ablations of a run, by name.

    Args:
        raw: the config of the run, as it was written.

    Raises:
        SettingsError: the config is wrong.
    """
    config = parse_config({"run_dir": "none", **raw})
    rewards = build_rewards(config.rewards).names
    arms = [
        Arm("base", "The policy that training starts from.", {"weights": "equal", "trainer.learning_rate": 0.0}),
        _sft(trains_adapter=config.model.lora is not None),
        _nover(config.sampling.max_new_tokens),
        _em_grpo(),
        *named_arms(["equal", "random", SINGLE, "conductor"], rewards),
    ]
    for name, (options, about) in _ABLATIONS.items():
        arms.append(Arm(f"conductor_{name}", f"An ablation of it: {about}", {"weights": {**_PUBLISHED, **options}}))
    return {arm.name: arm for arm in arms}


def _sft(*, trains_adapter: bool) -> Arm:
    """SFT on the column ``reference``, with a learning rate of its own: those of policy gradients are far too small.

    2e-5 for all weights is common, and ten times that for an adapter (LoRA Without Regret, Schulman et al. 2025).
    """
    rate = 2e-4 if trains_adapter else 2e-5
    return Arm(SFT, "Supervised fine-tuning on the references.", {"trainer.learning_rate": rate})


def _nover(max_new_tokens: int) -> Arm:
    """NOVER (arXiv 2505.16022), as its authors released it; examples/recipes/nover.yaml has the formula.

    The format gates the ranks of the reference's perplexity and of short reasoning. The loss and the advantages are
    NOVER's. Sampling, the KL, the learning rate and the batch are the run's.
    """
    nover = {"type": "nover", "formula": "released", "reasoning_weight": 1.0, "efficiency_weight": 1.0}
    changes = {
        "rewards": [{"type": "format"}, nover],
        "weights": {"type": "static", "values": {"format": 1.0, "nover": 1.0}},
        "advantages": {"profile": "dr_grpo"},
        "loss.normalization": "dr_grpo",
        "loss.max_completion_length": max_new_tokens,
        "loss.ratio": "sequence",
        "loss.clip_low": 0.1,
        "loss.clip_high": 0.28,
    }
    return Arm("nover", "NOVER: the perplexity of the reference answer after the reasoning.", changes)


def _em_grpo() -> Arm:
    """EM-GRPO: minus the mean entropy of the policy's tokens is the only reward; see examples/recipes/em_grpo.yaml."""
    entropy = {"type": "entropy", "direction": "minimise", "estimate": "exact", "reduction": "mean"}
    changes = {"rewards": [entropy], "weights": "equal", "advantages": {"profile": "grpo"}}
    return Arm("em_grpo", "EM-GRPO: the policy's own certainty, GRPO on its entropy alone.", changes)


def baseline_config(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of a run with one of its baselines, for ``parse_config``.

    Raises:
        SettingsError: there is no such baseline, or the run cannot be made into it.
    """
    arms = baseline_arms(raw)
    if name == SFT:
        raise SettingsError("name: 'sft' is no config of this kind, see python -m maestro_fast.evals.supervised")
    if name not in arms:
        raise SettingsError(f"name: {name!r}, expected one of {', '.join(arms)}{near(name, arms)}")
    changed: dict[str, Any] = copy.deepcopy(dict(raw))
    for dotted, value in arms[name].changes.items():
        override(changed, dotted, copy.deepcopy(value))
    parse_config({"run_dir": "none", **copy.deepcopy(changed)})
    return changed


# --- the grid of static weightings ---


def simplex_grid(size: int, parts: int) -> list[tuple[float, ...]]:
    """All weightings of ``size`` rewards whose weights are multiples of 1 / ``parts`` and add up to 1.

    There are C(parts + size - 1, size - 1) of them, in ascending order: 15 for three rewards in quarters, 36 in
    sevenths, 15 for five rewards in halves.

    Raises:
        ValueError: a number is below 1.
    """
    for name, value in (("size", size), ("parts", parts)):
        if value < 1:
            raise ValueError(f"{name}: {value}, expected at least 1")
    return [tuple(unit / parts for unit in units) for units in _compositions(size, parts)]


def _compositions(size: int, total: int) -> list[tuple[int, ...]]:
    """All tuples of ``size`` whole numbers from 0 that add up to ``total``, in ascending order."""
    if size == 1:
        return [(total,)]
    return [(first, *rest) for first in range(total + 1) for rest in _compositions(size - 1, total - first)]


def grid_arms(rewards: Sequence[str], parts: int) -> list[Arm]:
    """The static weightings of ``simplex_grid`` as arms, which are named by their weights."""
    arms = []
    for values in simplex_grid(len(rewards), parts):
        name = ",".join(f"{reward}={value:.3g}" for reward, value in zip(rewards, values, strict=True))
        arms.append(Arm(f"static:{name}", "Static weights.", {"weights": static(rewards, values)}))
    return arms


def main(words: Sequence[str]) -> None:
    """Prints the config of the run ``words[0]`` with the baseline ``words[1]``; the rest are settings of the run."""
    if len(words) < 2:
        raise SystemExit("usage: python -m maestro_fast.evals.baselines CONFIG.yaml NAME [--setting value ...]")
    print(yaml.safe_dump(baseline_config(read_config(Path(words[0]), words[2:]), words[1]), sort_keys=False), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
