"""A wrong set-up fails when verl's trainer is made, before Ray starts a worker, and the setting is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.verl

KEYS = "+algorithm.gdpo_reward_keys=[correct,brief]"
MAESTRO = ["algorithm.adv_estimator=maestro", KEYS]


@pytest.fixture
def trainer(verl_config: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the trainer that verl would make of a command, as far as that needs no Ray."""

    def make(*command: str) -> Any:
        from verl.trainer.ppo.v1 import get_trainer_cls

        config = verl_config(*command)
        return get_trainer_cls(config.trainer.v1.trainer_mode)(config=config)

    return make


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["algorithm.adv_estimator=maestro"], "algorithm.gdpo_reward_keys: missing, expected the names of the rewards"),
        ([*MAESTRO, "algorithm.rollout_correction.bypass_mode=True"], "rollout_correction.bypass_mode: not with"),
        ([*MAESTRO, "+algorithm.maestro.weights={type: nope}"], "algorithm.maestro.weights.*'nope', expected one of"),
        ([*MAESTRO, "+algorithm.maestro.weights={type: conductor, nope: 1}"], "algorithm.maestro.weights.*nope"),
        ([*MAESTRO, "+algorithm.maestro.profil=maestro"], "algorithm.maestro.*profil"),
        ([*MAESTRO, "actor_rollout_ref.rollout.n=1"], "actor_rollout_ref.rollout.n below 2: not with"),
        ([*MAESTRO, "trainer.use_v1=False"], "trainer.use_v1=False: not with"),
        (["algorithm.adv_estimator=fast_gdpo"], "algorithm.gdpo_reward_keys: missing"),
    ],
)
def test_a_broken_setup_is_refused(trainer: Callable[..., Any], command: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trainer(*command)


@pytest.mark.parametrize(
    "command",
    [
        MAESTRO,
        [*MAESTRO, "+algorithm.maestro.weights={type: conductor, period: 1}", "+algorithm.maestro.profile=verl_grpo"],
        [*MAESTRO, "+algorithm.maestro.weights=equal", "algorithm.rollout_correction.bypass_mode=True"],
        ["algorithm.adv_estimator=fast_gdpo", KEYS],
        ["algorithm.adv_estimator=grpo"],
    ],
)
def test_a_good_setup_is_taken(trainer: Callable[..., Any], command: list[str]) -> None:
    made = trainer(*command)
    assert (made._maestro_settings is None) == ("algorithm.adv_estimator=grpo" in command)
    assert made.config.algorithm.adv_estimator == command[0].partition("=")[2]
