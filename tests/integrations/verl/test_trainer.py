"""What becomes of verl's trainers, without Ray: subclasses under the same names, figures, data, legacy trainers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from maestro_fast.settings import SettingsError
from maestro_fast.weighting import build_weight_policy

pytestmark = pytest.mark.verl
NAMES = ("correct", "brief")
OURS = ("algorithm.adv_estimator=maestro", "+algorithm.gdpo_reward_keys=[correct,brief]")


def test_trainers_keep_their_names_and_classes() -> None:
    from verl.trainer.ppo import v1
    from verl.trainer.ppo.v1 import trainer_base

    for name, trainer in trainer_base.TRAINER_REGISTRY.items():
        found = v1.get_trainer_cls(name)
        assert issubclass(found, trainer) and found.__name__ == trainer.__name__
        assert found is v1.get_trainer_cls(name) is trainer_base.get_trainer_cls(name)
    with pytest.raises(ValueError, match="Unknown trainer 'nope'"):
        v1.get_trainer_cls("nope")


def test_a_trainer_of_the_users_own_stays_as_it_is(
    verl_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is registered after the plugin, has attributes of any name, and takes the config by name alone."""
    from verl.trainer.ppo import v1
    from verl.trainer.ppo.v1 import trainer_base

    class Mine(v1.PPOTrainerSync):  # type: ignore[misc]
        def __init__(self, *, config: Any) -> None:
            super().__init__(config)
            self.settings, self.weigher = {"mine": 1}, "mine"

        def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
            return "mine", batch, metrics

    monkeypatch.setattr(trainer_base, "TRAINER_REGISTRY", dict(trainer_base.TRAINER_REGISTRY))
    v1.register_trainer("mine")(Mine)
    made = v1.get_trainer_cls("mine")(config=verl_config("algorithm.adv_estimator=grpo"))
    assert isinstance(made, Mine) and made.settings == {"mine": 1}
    assert made._compute_advantage("batch", {}) == ("mine", "batch", {})


def test_figures_are_averaged_whatever_words_are_in_their_names() -> None:
    """verl sums up what has "sum" in its name, and so on, where a step makes several updates."""
    from verl.trainer.ppo.v1 import trainer_base

    aggregator = trainer_base.MetricsAggregator()
    for value in (1.0, 3.0):
        figures = {f"maestro/rewards/{name}": value for name in ("summary", "max_length", "terminal", "total")}
        aggregator.add_step_metrics({**figures, "response/max": value}, sample_count=4)
    found = aggregator.get_aggregated_metrics()
    assert found.pop("response/max") == 3.0 and {*found.values()} == {2.0} and len(found) == 4


def test_legacy_trainers_are_refused_by_their_names(verl_config: Callable[..., Any]) -> None:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    class OneStepOff(RayPPOTrainer):  # type: ignore[misc]
        pass

    for command in (OURS, ("algorithm.adv_estimator=fast_gdpo", OURS[1])):
        with pytest.raises(SettingsError, match=r"OneStepOff is one of verl's legacy trainers.*expected a V1 trainer"):
            OneStepOff(config=verl_config(*command))
    with pytest.raises(TypeError, match="missing"):  # It is verl's own turn.
        OneStepOff(config=verl_config("algorithm.adv_estimator=fast_grpo"))


def router(column: str) -> Any:
    routes = {"sums": {"correct": 1.0, "brief": 0.0}, "poems": {"correct": 0.0, "brief": 1.0}}
    return build_weight_policy({"type": "router", "column": column, "routes": routes}, NAMES, 8)


def dataset(kind: type, rows: dict[str, list[Any]]) -> Any:
    import datasets

    made = kind.__new__(kind)
    made.dataframe = datasets.Dataset.from_dict(rows)
    return made


def test_the_data_are_compared_with_the_policy_before_the_first_step() -> None:
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from maestro_fast.integrations.verl.trainer import check_data

    rows = {"data_source": ["sums", "poems"], "extra_info": [{"topic": "sums"}, {"topic": "plays"}]}
    check_data(router("data_source"), dataset(RLHFDataset, rows))
    with pytest.raises(ValueError, match=r"weights\.routes: none for extra_info\.topic 'plays'"):
        check_data(router("extra_info.topic"), dataset(RLHFDataset, rows))
    with pytest.raises(ValueError, match="column 'kind': the data have none, expected one of data_source, extra_info"):
        check_data(router("kind"), dataset(RLHFDataset, rows))

    class Mine(RLHFDataset):  # type: ignore[misc]
        def __getitem__(self, item: int) -> Any:
            return {**super().__getitem__(item), "kind": "sums"}

    check_data(router("kind"), dataset(Mine, rows))


def test_another_version_of_verl_is_warned_about(
    verl_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from maestro_fast.integrations.verl import trainer

    for found, warned in (("0.9.1", 0), ("0.9", 0), ("0.90.0", 1), ("1.0.0", 1)):
        caplog.clear()
        monkeypatch.setattr(trainer, "version", lambda _, found=found: found)
        with caplog.at_level(logging.WARNING, "verl.maestro_fast"):
            trainer.checked(verl_config(*OURS))
        assert len(caplog.records) == warned, found
