"""A method of a user's subclass is called, or refused with the way out; none is replaced or skipped in silence."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from trl import GRPOTrainer

from maestro_fast.integrations.trl import MaestroGRPOMixin, MaestroGRPOTrainer
from maestro_fast.integrations.trl.overrides import other_advantages
from maestro_fast.ops import LossInputs
from tests.integrations.conftest import steady
from tests.integrations.test_trl_training import FREE

Make = Callable[..., Any]


def own_loss(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return -inputs.logprobs.mean(), {}


def passed_on(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


class Geometric(GRPOTrainer):
    """A trainer of the user's with a loss, rewards and log-probs of its own, as TRL's GMPOTrainer is one."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return sum(parameter.sum() for parameter in model.parameters()) * 0.0

    def _calculate_rewards(self, inputs: Any, *args: Any) -> Tensor:
        return torch.arange(8.0)[:, None] * torch.tensor([1.0, -2.0])


class Behind(MaestroGRPOMixin, Geometric):
    pass


class OwnLoss(MaestroGRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return sum(parameter.sum() for parameter in model.parameters()) * 0.0


class OwnPublicLoss(MaestroGRPOTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Tensor:
        return sum(parameter.sum() for parameter in model.parameters()) * 0.0


class Penalised(MaestroGRPOTrainer):
    """Adds to our losses, so that both count."""

    @passed_on
    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return sum(super(Penalised, self)._compute_loss(model, inputs) for _ in range(1)) + 1.0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Tensor:
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


class OwnRewards(MaestroGRPOTrainer):
    def _calculate_rewards(self, inputs: Any, *args: Any) -> Tensor:
        return torch.zeros(8, 2)


class OwnGeneration(MaestroGRPOTrainer):
    def _generate(self, prompts: Any) -> Any:
        return GRPOTrainer.generate(self, prompts)


class OwnLogprobs(MaestroGRPOTrainer):
    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return None


class Replayed(GRPOTrainer):
    """Sets advantages of its own, as a trainer that replays old responses does."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        return {**output, "advantages": torch.arange(8.0)}


class BehindReplayed(MaestroGRPOMixin, Replayed):
    pass


@pytest.mark.parametrize(
    ("trainer", "arguments", "said"),
    [
        (Behind, {"loss": "maestro_fast"}, "a _compute_loss or compute_loss of your own (Geometric._compute_loss)"),
        (Behind, {"loss": own_loss}, "(Geometric._compute_loss): not with loss="),
        (OwnLoss, {"loss": "maestro_fast"}, "(OwnLoss._compute_loss): not with loss="),
        (OwnPublicLoss, {"loss": own_loss}, "(OwnPublicLoss.compute_loss): not with loss="),
        (OwnRewards, {}, "does not call super() (OwnRewards._calculate_rewards): not with everything"),
        (OwnGeneration, {"weights": "conductor"}, "does not call super() (OwnGeneration._generate)"),
        (BehindReplayed, {"profile": "maestro"}, "(Replayed._generate_and_score_completions): not with a profile"),
    ],
)
def test_what_cannot_both_run_is_refused(
    settings: Make, ingredients: Make, trainer: type, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        trainer(args=settings(), **arguments, **ingredients())


@pytest.mark.parametrize("loss", ["maestro_fast", own_loss])
def test_trls_own_subclass_has_its_own_loss(settings: Make, ingredients: Make, loss: Any) -> None:
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    mine = type("Mine", (MaestroGRPOMixin, gmpo.GMPOTrainer), {})
    with pytest.raises(ValueError, match=r"\(GMPOTrainer\._compute_loss\)"):
        mine(args=settings(), loss=loss, **ingredients())


@pytest.mark.parametrize(
    ("trainer", "arguments"), [(Penalised, {"loss": "maestro_fast"}), (OwnLoss, {}), (OwnGeneration, {})]
)
def test_what_can_both_run_is_served(
    settings: Make, ingredients: Make, trainer: type, arguments: dict[str, Any]
) -> None:
    trainer(args=settings(), **arguments, **ingredients())


def test_methods_behind_ours_are_called(settings: Make, ingredients: Make) -> None:
    trainer = Behind(args=settings(max_steps=1), weights="random", **ingredients())
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "reward" in entry]

    assert log["rewards/parity/mean"] == 3.5 and log["rewards/brevity/mean"] == -7.0
    assert log["loss"] == 0.0 and all(map(torch.equal, before, trainer.model.parameters()))


def test_advantages_of_a_subclass_are_kept(settings: Make, ingredients: Make) -> None:
    """Groups of identical scores, which get 0 otherwise, keep theirs too."""
    trainer = BehindReplayed(args=settings(), **{**ingredients(), "reward_funcs": [steady]})
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])

    assert output["advantages"].tolist() == list(range(8))


def read(batch: Any) -> Any:
    if batch["advantages"].sum() and batch.get("advantages") is not None:
        print(batch["advantages"].clone())
    return batch


def store(batch: Any) -> None:
    batch["advantages"] = 1


def multiply(batch: Any) -> None:
    batch["advantages"] *= 2


def mask_rows(batch: Any) -> None:
    batch["advantages"][0] = 0


def in_place(batch: Any) -> None:
    batch["advantages"].mul_(2)


def by_name(batch: Any) -> None:
    advantages = batch["advantages"]
    advantages += 1


def by_keyword(batch: Any) -> None:
    batch.update(advantages=1)


def by_loop(batch: Any) -> Any:
    return {key: batch[key] for key in ("advantages",)}


@pytest.mark.parametrize("method", [store, multiply, mask_rows, in_place, by_name, by_keyword, by_loop, read])
def test_only_a_method_that_reads_advantages_leaves_them_to_the_profile(method: Any) -> None:
    mine = type("Mine", (GRPOTrainer,), {"_generate_and_score_completions": method, "__module__": "mine"})
    trainer = object.__new__(type("Behind", (MaestroGRPOMixin, mine), {"__module__": "mine"}))

    expected = None if method is read else "Mine._generate_and_score_completions"
    assert other_advantages(trainer) == expected


def through_a_helper(self: Any, batch: Any) -> Any:
    return self.helper(batch)


@pytest.mark.parametrize("helper", [store, in_place, read])
def test_advantages_that_another_method_of_the_users_sets_are_seen(helper: Any) -> None:
    helpers = type("Helpers", (), {"helper": staticmethod(helper)})
    methods = {"_generate_and_score_completions": through_a_helper, "__module__": "mine"}
    mine = type("Mine", (helpers, GRPOTrainer), methods)
    trainer = object.__new__(type("Behind", (MaestroGRPOMixin, mine), {"__module__": "mine"}))

    expected = None if helper is read else "Mine._generate_and_score_completions"
    assert other_advantages(trainer) == expected


def test_the_log_says_who_keeps_hidden_states_away(
    settings: Make, ingredients: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="maestro_fast"):
        OwnLogprobs(args=settings(**FREE), weights="conductor", **ingredients())

    assert "one forward without log-probs is added" in caplog.text
    assert "because OwnLogprobs._get_per_token_logps_and_entropies does not call super()" in caplog.text
