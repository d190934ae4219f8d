"""verl's own ``main_ppo`` trains a tiny model with the plugin: two FSDP2 ranks, a reference model, checkpoints, Ray.

One run is killed in its third step and another goes on from the second checkpoint, so together they are three steps.
For each step a module of the tests has saved what verl's queue held once the advantages were there, and here it is all
computed again: the hidden states with transformers, the weights and the advantages with a policy of our own.

A plain run of GRPO, with the same command but for two lines, shows that the harness itself is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from maestro_fast.ops import group_advantages
from maestro_fast.rewards.conditional import LabelsConfig
from maestro_fast.weighting import Conductor, Outcome, WeightContext, WeightPolicy, build_weight_policy, scored
from maestro_fast.weighting.saved import load_weight_policy
from tests.integrations.verl.harness import (
    PROMPTS_A_STEP,
    RESPONSE_TOKENS,
    RESPONSES_A_PROMPT,
    Run,
    make_ingredients,
    plain_command,
    written,
)
from tests.integrations.verl.rewards import NAMES

pytestmark = pytest.mark.verl

SECONDS = 400  # for three steps on a busy machine; 60 on an idle one
K, D = len(NAMES), 32
CONDUCTOR = {"type": "conductor", "period": 1, "learning_rate": 0.05}
TWO_LINES = {"algorithm.adv_estimator": "maestro", "+algorithm.gdpo_reward_keys": list(NAMES)}


def command(model: Path, data: Path, out: Path) -> dict[str, Any]:
    """The command of a user who has two GPUs, packs, makes micro-batches by tokens and has a reference model.

    verl fills a batch up to whole mini-batches: three prompts in mini-batches of two get rows that nobody sampled.
    """
    overrides = plain_command(model, data, out, ranks=2, steps=3) | {
        "actor_rollout_ref.model.use_remove_padding": True,
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
        "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        "trainer.save_freq": 1,
    }
    for part, tokens in (
        ("actor.", "actor.ppo_"),
        ("rollout.log_prob_", "rollout.log_prob_"),
        ("ref.log_prob_", "ref.log_prob_"),
    ):
        overrides[f"actor_rollout_ref.{part}use_dynamic_bsz"] = True
        overrides[f"actor_rollout_ref.{tokens}max_token_len_per_gpu"] = 128
    return overrides


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_ingredients(tmp_path_factory.mktemp("ingredients"))


@pytest.fixture(scope="module")
def plain(ingredients: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run of GRPO on one rank. Others begin while it goes on: starting Ray's processes leaves a core idle."""
    out = tmp_path_factory.mktemp("plain")
    run = Run(out, plain_command(*ingredients, out, ranks=1, steps=3))
    yield run
    run.end()


@dataclass(frozen=True)
class Step:
    """What verl's queue held in one step, without padding, sorted by prompt and session, where groups stand together.

    Attributes:
        model: the checkpoint of the policy as it was in this step.
    """

    dump: dict[str, Any]
    model: Path

    @property
    def number(self) -> int:
        return int(self.dump["step"])

    @cached_property
    def padding(self) -> list[int]:
        return [i for i, tag in enumerate(self.dump["tags"]) if tag.get("is_padding", False)]

    @cached_property
    def order(self) -> list[int]:
        index, keys = self.dump["columns"]["index"], self.dump["keys"]
        responses = [i for i in range(len(keys)) if i not in self.padding]
        return sorted(responses, key=lambda i: (int(index[i]), int(keys[i].split("_")[-2])))

    def column(self, name: str) -> list[Any]:
        values = self.dump["columns"][name]
        return [values[i] for i in self.order]

    @property
    def rewards_BK(self) -> Tensor:
        infos = [fields["reward_extra_info"] for fields in self.column("extra_fields")]
        return torch.tensor([[float("nan") if info[name] is None else info[name] for name in NAMES] for info in infos])

    @property
    def context_Bd(self) -> Tensor:
        return torch.stack(self.column("maestro_h"))

    @property
    def advantages_B(self) -> Tensor:
        """The advantage of each response, which all its tokens share."""
        rows = self.column("advantages")
        assert all(torch.equal(row, row[:1].expand_as(row)) for row in rows)
        return torch.stack([row[0] for row in rows])


@dataclass(frozen=True)
class Trained:
    """The run that was killed in its third step, and the one that went on.

    Attributes:
        steps: the three steps of training, the third from the second run.
        lost: the third step of the run that was killed.
        checkpoints: verl's checkpoints by step.
    """

    first: Run
    second: Run
    steps: list[Step]
    lost: Step
    checkpoints: dict[int, Path]


@pytest.fixture(scope="module")
def trained(plain: Run, ingredients: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    out = tmp_path_factory.mktemp("maestro")
    overrides = command(*ingredients, out) | TWO_LINES | {"+algorithm.maestro.weights": CONDUCTOR}
    first = Run(out / "first", overrides, hold=3)
    try:
        first.wait_for(first.dump(3).exists, SECONDS)
    finally:
        first.end()
    assert first.processes() == []
    checkpoints = {step: out / "checkpoints" / f"global_step_{step}" for step in (1, 2, 3)}
    assert [path.exists() for path in checkpoints.values()] == [True, True, False]
    second = Run(out / "second", overrides)
    try:
        second.finish(SECONDS)
    finally:
        second.end()
    models = [ingredients[0], *(checkpoints[step] / "actor" / "huggingface" for step in (1, 2))]
    dumps = [first.dump(1), first.dump(2), second.dump(3)]
    steps = [Step(torch.load(dump, weights_only=False), model) for dump, model in zip(dumps, models, strict=True)]
    lost = Step(torch.load(first.dump(3), weights_only=False), models[2])
    yield Trained(first, second, steps, lost, checkpoints)


def new_policy() -> WeightPolicy:
    return build_weight_policy(CONDUCTOR, NAMES, D)


def weigh(policy: WeightPolicy, step: Step) -> tuple[Tensor, Tensor, Outcome]:
    """The weights [B, K] and advantages [B] that a policy gives in a step, and what it then learns from.

    verl adds rewards up, so the weights of K rewards sum to K there.
    """
    context = WeightContext(NAMES, RESPONSES_A_PROMPT, step.number - 1, step.rewards_BK, step.context_Bd)
    weights = policy.weights(context)
    found = group_advantages(step.rewards_BK, weights.weights_BK * K, RESPONSES_A_PROMPT, profile="maestro")
    outcome = Outcome(context, weights, found, "maestro", factors_K=torch.full((K,), float(K)))
    return weights.expected_BK, found.advantages, outcome


# --- with the plugin ---


def test_the_hidden_states_are_those_of_the_policy_at_that_step(trained: Trained) -> None:
    def last_states(model: PreTrainedModel, step: Step) -> Tensor:
        with torch.no_grad():
            rows = [model.model(ids[None]).last_hidden_state[0, -1] for ids in step.column("input_ids")]
        return torch.stack(rows)

    reference = AutoModelForCausalLM.from_pretrained(trained.steps[0].model, dtype=torch.float32)
    for step in trained.steps:
        model = AutoModelForCausalLM.from_pretrained(step.model, dtype=torch.float32)
        torch.testing.assert_close(step.context_Bd, last_states(model, step), rtol=0, atol=1e-5)
        if step.number > 1:
            off = (step.context_Bd - last_states(reference, step)).abs().amax(1)
            assert off.min() > 1e-2, "these could as well be the states of the reference"


def test_the_advantages_are_those_of_a_policy_that_sees_the_same_batches(trained: Trained) -> None:
    policy = new_policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    for step in trained.steps:
        assert len(step.order) == PROMPTS_A_STEP * RESPONSES_A_PROMPT
        assert step.rewards_BK.isnan().any(), "no reward abstained"
        _, advantages_B, outcome = weigh(policy, step)
        torch.testing.assert_close(step.advantages_B, advantages_B, rtol=0, atol=1e-6)
        policy.observe(outcome)
    assert any(not torch.equal(before[name], value) for name, value in policy.state_dict().items()), "nothing learned"


def test_the_advantages_reach_every_token_and_nothing_else(trained: Trained) -> None:
    for step in trained.steps:
        for advantages, mask, ids in zip(*map(step.column, ("advantages", "response_mask", "responses")), strict=True):
            assert advantages.shape == mask.shape == ids.shape
            assert torch.equal(advantages, advantages[:1].expand_as(advantages)), "a token has another advantage"
            assert mask.bool().all() and 0 < len(ids) <= RESPONSE_TOKENS
        assert len({len(ids) for ids in step.column("responses")}) > 3
        assert len(step.padding) == 4
        assert all(not step.dump["columns"]["advantages"][i].any() for i in step.padding)


def test_the_log_has_the_weights_by_name(trained: Trained) -> None:
    policy, written_metrics = new_policy(), {**trained.first.metrics, **trained.second.metrics}
    for step in trained.steps:
        expected_BK, _, outcome = weigh(policy, step)
        policy.observe(outcome)
        metrics = written_metrics[step.number]
        weights_K = torch.tensor([metrics[f"maestro/weights/{name}"] for name in NAMES])
        torch.testing.assert_close(weights_K, expected_BK.mean(0), rtol=0, atol=1e-6)
        assert weights_K.sum().item() == pytest.approx(1.0, abs=1e-5)
        for name, rewards_B in zip(NAMES, step.rewards_BK.T, strict=True):
            assert metrics[f"maestro/rewards/{name}"] == pytest.approx(rewards_B.nanmean().item(), abs=1e-6)
        abstained = step.rewards_BK[:, NAMES.index("gated")].isnan().float().mean().item()
        assert metrics["maestro/rewards/gated/abstained"] == pytest.approx(abstained)


def test_a_killed_run_goes_on_from_its_checkpoint(trained: Trained) -> None:
    resumed, policy = trained.steps[2], new_policy()
    assert sorted(trained.second.metrics) == [3], "steps of the first run were made again"
    prompts, lost = ([ids.tolist() for ids in step.column("prompts")] for step in (resumed, trained.lost))
    assert prompts == lost

    load_weight_policy(trained.checkpoints[2] / "maestro", policy, NAMES)
    expected_BK, advantages_B, _ = weigh(policy, resumed)
    torch.testing.assert_close(resumed.advantages_B, advantages_B, rtol=0, atol=1e-6)
    logged_K = torch.tensor([trained.second.metrics[3][f"maestro/weights/{name}"] for name in NAMES])
    torch.testing.assert_close(logged_K, expected_BK.mean(0), rtol=0, atol=1e-6)
    fresh_BK, _, _ = weigh(new_policy(), resumed)
    assert (expected_BK - fresh_BK).abs().max() > 1e-3, "a new policy would give the same weights"


def test_a_killed_run_samples_the_same_responses_again(trained: Trained) -> None:
    """The server's draws depend on step and prompt alone: equal responses say that the policy model is the same."""
    resumed, lost = ([ids.tolist() for ids in step.column("responses")] for step in (trained.steps[2], trained.lost))
    assert sorted(resumed) == sorted(lost)


def test_the_checkpoint_holds_the_policy_of_its_step(trained: Trained) -> None:
    ours = new_policy()
    for step in trained.steps:
        _, _, outcome = weigh(ours, step)
        ours.observe(outcome)
        saved = new_policy()
        assert isinstance(saved, Conductor)
        folder = trained.checkpoints[step.number]
        load_weight_policy(folder / "maestro", saved, NAMES)
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(saved.state_dict()[name], value, rtol=0, atol=1e-6)


# --- anchored weights and verl's KL penalty ---

ANCHORED = {"type": "anchored", "hybrid": True, "steps": 5}
LABELS = LabelsConfig(share=0.5, early=1, seed=0)  # all prompts of the first step, about half of those after it


@pytest.fixture(scope="module")
def anchored(plain: Run, ingredients: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run whose weights read the reference, learn from a utility, and whose scores lose verl's KL penalty."""
    out = tmp_path_factory.mktemp("anchored")
    settings = {
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_ctrl.kl_coef": 0.5,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 4,
        "trainer.save_freq": 2,
        "+algorithm.maestro.weights": ANCHORED,
        "+algorithm.maestro.utility": {"key": "judge", "labels": {"share": 0.5, "early": 1}},
    }
    run = Run(out, plain_command(*ingredients, out, ranks=1, steps=2) | TWO_LINES | settings)
    try:
        run.finish(SECONDS)
        yield run
    finally:
        run.end()


def test_anchored_weights_read_the_reference_and_learn_from_the_utility(
    anchored: Run, ingredients: tuple[Path, Path]
) -> None:
    """Contexts, advantages and what is saved at the end are those of a policy of our own that sees the same batches."""
    reference = AutoModelForCausalLM.from_pretrained(ingredients[0], dtype=torch.float32)
    policy = build_weight_policy(ANCHORED, NAMES, D)
    for number in (1, 2):
        step = Step(torch.load(anchored.dump(number), weights_only=False), ingredients[0])
        with torch.no_grad():
            means = [reference.model(ids[None]).last_hidden_state[0].mean(0) for ids in step.column("prompts")]
        torch.testing.assert_close(step.context_Bd, torch.stack(means), rtol=0, atol=1e-5)
        judged = [fields["reward_extra_info"]["judge"] for fields in step.column("extra_fields")]
        known = [LABELS.chosen(number - 1, prompt) for prompt in step.column("raw_prompt")]
        assert all(known) if number == 1 else 0 < sum(known) < len(known)
        utilities_B = torch.tensor([value if ok else float("nan") for value, ok in zip(judged, known, strict=True)])
        context = WeightContext(NAMES, RESPONSES_A_PROMPT, number - 1, step.rewards_BK, step.context_Bd, utilities_B)
        scores, kept = step.column("rm_scores"), step.column("token_level_rewards")
        penalty_B = torch.stack([a.sum() - b.sum() for a, b in zip(scores, kept, strict=True)])
        assert (penalty_B.abs().max() > 1e-3) == (number > 1), "the policy leaves its reference after the first step"
        weights = policy.weights(context)
        rewards, used = scored(context, weights)
        found = group_advantages(rewards, K * used, RESPONSES_A_PROMPT, kl=penalty_B, beta=1.0, profile="maestro")
        torch.testing.assert_close(step.advantages_B, found.advantages, rtol=1e-5, atol=1e-5)
        factors_K = torch.full((K,), float(K))
        policy.observe(Outcome(context, weights, found, "maestro", penalty_B, 1.0, factors_K))
    saved = build_weight_policy(ANCHORED, NAMES, D)
    load_weight_policy(anchored.out / "checkpoints" / "global_step_2" / "maestro", saved, NAMES)
    for name, value in policy.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], value, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert len(saved.state_dict()["replay.index"]) > PROMPTS_A_STEP - 1, "labelled groups of both steps were kept"


# --- without it ---


def test_the_harness_samples_from_the_trainers_policy(plain: Run) -> None:
    """The log-probs of the rollout server are those of the trainer in each step, so it gets the weights."""
    plain.finish(SECONDS)
    assert sorted(plain.metrics) == [1, 2, 3]
    for metrics in plain.metrics.values():
        assert metrics["training/rollout_probs_diff_valid"] == 1
        assert metrics["training/rollout_probs_diff_max"] < 1e-6
        assert metrics["actor/grad_norm"] > 0
        assert not any(name.startswith("maestro/") for name in metrics)
    assert plain.processes() == []


def test_two_lines_of_the_command_differ() -> None:
    paths = Path("model"), Path("data"), Path("out")
    plain, ours = written(command(*paths)), written(command(*paths) | TWO_LINES)
    assert [word for word in ours if word not in plain] == [
        "algorithm.adv_estimator=maestro",
        "+algorithm.gdpo_reward_keys=[digits,letters,brief,gated]",
    ]
    assert [word for word in plain if word not in ours] == ["algorithm.adv_estimator=grpo"]
