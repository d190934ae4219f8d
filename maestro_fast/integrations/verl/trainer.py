"""verl's V1 trainers with K rewards, hidden states and a weight policy.

``extend`` makes verl's ``get_trainer_cls`` answer with a subclass under the same name. (Under a name of its own a
trainer would run with other buffers: verl asks whether the name is "sync".) The subclass does nothing unless the run
has one of our estimators. Then, for each batch, it

    before the old log-probs      asks the engine for hidden states, which come from that very forward
    before the advantages         leaves rewards and states in ``batch.current``, where the estimator finds them
    before verl's checkpoint      writes the weight policy beside it; verl's own file that says "complete" comes last

and calls verl's own method each time, so padding, KL penalty, rollout correction and write-back stay verl's.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maestro_fast.integrations.verl.batch import CONTEXT_FIELD, CONTEXT_FLAG, TrainerBatch, current
from maestro_fast.integrations.verl.columns import as_list, data_columns, named_values
from maestro_fast.integrations.verl.rows import prompt_rank
from maestro_fast.integrations.verl.settings import RunSettings, run_settings
from maestro_fast.integrations.verl.weigher import Weigher
from maestro_fast.settings import SettingsError

# verl's root logger shows warnings alone; its own logger shows what a user should know, such as where states come from.
logger = logging.getLogger("verl.maestro_fast")
TESTED = "0.9"  # the version of verl that the tests train with
FOLDER = "maestro"  # the weight policy's folder in a checkpoint of verl's
REFERENCE = "reference_prompt_mean"


_Base: Any = Any if TYPE_CHECKING else object


class MaestroMixin(_Base):  # type: ignore[misc]
    """Before a V1 trainer of verl among the bases of a class. What it adds has ``maestro`` in its name."""

    _maestro_settings: RunSettings | None = None
    _maestro_weigher: Weigher | None = None

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        self._maestro_settings = checked(config)
        self._maestro_known: set[str] = set()  # the rewards that batches have had so far
        super().__init__(*args, config=config, **kwargs)  # verl, too, gives it by name.

    # --- start ---

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        if self._maestro_settings is not None and self._maestro_settings.maestro is not None:
            self._maestro_weigher = Weigher(self._maestro_settings, self._maestro_context_size())
            check_data(self._maestro_weigher.policy, self.train_dataset)
            logger.info("maestro_fast: %s", self._maestro_costs())

    def _maestro_context_size(self) -> int:
        """d, the width of the policy model's hidden states."""
        from verl.utils.config import omega_conf_to_dataclass

        model = omega_conf_to_dataclass(self.config.actor_rollout_ref.model)
        return int(model.hf_config.get_text_config().hidden_size)

    def _maestro_costs(self) -> str:
        assert self._maestro_weigher is not None
        policy = self._maestro_weigher.policy
        if not policy.needs_context:
            return f"the weights ({policy.name}) read no hidden states"
        forward = "reference" if policy.context_kind == REFERENCE else "old log-probs"
        return (
            f"the weights ({policy.name}) read {policy.context_kind} off the forward for the {forward}; none is added"
        )

    # --- a batch ---

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return self._maestro_forward(super()._compute_old_log_prob, batch, metrics, reference=False)

    def _compute_ref_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return self._maestro_forward(super()._compute_ref_log_prob, batch, metrics, reference=True)

    def _maestro_forward(self, forward: Any, batch: Any, metrics: dict[str, Any], *, reference: bool) -> Any:
        """Runs one of verl's forwards and has the engine hand out what the policy reads, if this is its forward.

        The flag is taken away afterwards. Otherwise the next forward would put its own states in their place.
        """
        policy = None if self._maestro_weigher is None else self._maestro_weigher.policy
        if policy is None or not policy.needs_context or (policy.context_kind == REFERENCE) != reference:
            return forward(batch, metrics)
        batch.extra_info[CONTEXT_FLAG] = "prompt_mean" if reference else policy.context_kind
        try:
            batch = forward(batch, metrics)
        finally:
            batch.extra_info.pop(CONTEXT_FLAG, None)
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if self._maestro_settings is None:
            return super()._compute_advantage(batch, metrics)
        ours = self._maestro_batch(batch)
        token = current.set(ours)
        try:
            batch = super()._compute_advantage(batch, metrics)
        finally:
            current.reset(token)
        metrics.update(ours.metrics)
        if self._maestro_weigher is not None and self._maestro_weigher.policy.should_stop:
            self._maestro_stop()
        return batch

    def _maestro_batch(self, batch: Any) -> TrainerBatch:
        """Fetches what the estimator of this run reads, and nothing else, from the queue."""
        assert self._maestro_settings is not None
        weigher = self._maestro_weigher
        keys, padding = list(batch.keys), [bool(tag.get("is_padding", False)) for tag in batch.tags]
        names = list(self._maestro_settings.reward_names)
        wanted = ["extra_fields", *names] if names else []
        asked: tuple[str, ...] = ()
        if weigher is not None:
            asked = weigher.policy.needs_columns
            wanted += ["index", "data_source", *(name.partition(".")[0] for name in asked)]
            wanted += [CONTEXT_FIELD] if weigher.policy.needs_context else []
            if weigher.utility is not None:
                wanted += [weigher.utility.key, *(["raw_prompt"] if weigher.utility.labels is not None else [])]
            if self.config.algorithm.use_kl_in_reward:
                wanted.append("rm_scores")
        found = fetch(batch, wanted)
        ours = TrainerBatch(keys, padding, None, partial(_values, found, padding, self._maestro_known))
        if weigher is None:
            return ours
        ours.advantages = weigher.advantages
        columns = {str(name): found[name] for name in wanted if name in found}
        ours.columns = data_columns(asked, columns)
        sources = as_list(columns["data_source"]) if "data_source" in columns else [""] * len(keys)
        ours.families = [str(source) for source in sources]
        if "index" in columns:
            numbers = as_list(columns["index"])
            ours.order = [prompt_rank(*pair) for pair in zip(numbers, ours.families, strict=True)]
        ours.prompts = as_list(found.get("raw_prompt", ()))
        if "rm_scores" in found:
            ours.scores_B = torch.stack([row.sum() for row in found["rm_scores"].unbind()]).float()
        if weigher.policy.needs_context:
            ours.context_Bd = _contexts(found)
        return ours

    def _maestro_stop(self) -> None:
        """Makes the next step the last one, which verl saves and validates like any last step."""
        last: int = self.global_steps + 1
        if last < self.total_training_steps:  # type: ignore[has-type]
            logger.warning("the weight policy wants training to stop: step %d is the last one", last)
            self.total_training_steps = last

    # --- checkpoints ---

    def _save_checkpoint(self) -> None:
        if self._maestro_weigher is not None:
            root = self.config.trainer.default_local_dir
            self._maestro_weigher.save(Path(root, f"global_step_{self.global_steps}", FOLDER))
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self._maestro_weigher is not None and self.global_steps > 0:
            folder = self._maestro_resumed_from() / FOLDER
            self._maestro_weigher.load(folder)
            logger.info("maestro_fast: the weight policy goes on from %s", folder)

    def _maestro_resumed_from(self) -> Path:
        """The folder of the checkpoint that verl has just loaded; the rules are verl's."""
        trainer = self.config.trainer
        if trainer.resume_mode == "resume_path":
            return Path(os.path.abspath(trainer.resume_from_path))
        step = self.global_steps
        return Path(os.path.abspath(trainer.default_local_dir), f"global_step_{step}")


def checked(config: Any) -> RunSettings | None:
    """The settings of a run, from the config of verl's trainer.

    Raises:
        SettingsError: see ``run_settings``.
    """
    from omegaconf import OmegaConf

    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    settings = run_settings(config)
    if settings is not None:
        found = version("verl")
        if not f"{found}.".startswith(f"{TESTED}."):
            logger.warning("maestro_fast is tested with verl %s, this is %s; it may work", TESTED, found)
    return settings


def check_data(policy: Any, dataset: Any) -> None:
    """Checks before the first step that the data have the columns that a policy reads, and the values that it knows.

    Args:
        policy: the weight policy.
        dataset: verl's data set, whose ``dataframe`` holds the rows. A class that makes its rows in another way is not
            looked at; a missing column is then found with the first batch.

    Raises:
        ValueError: a column is missing, or the policy refuses a value.
    """
    from verl.utils.dataset.rl_dataset import RLHFDataset

    if not policy.needs_columns or getattr(type(dataset), "__getitem__", None) is not RLHFDataset.__getitem__:
        return
    table: Any = dataset.dataframe
    firsts = sorted({name.partition(".")[0] for name in policy.needs_columns} & {*table.column_names})
    columns = data_columns(policy.needs_columns, {name: list(table[name]) for name in firsts}, table.column_names)
    check = getattr(policy, "check_rows", None)
    if check is not None:
        check([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def fetch(batch: Any, names: Sequence[str]) -> Any:
    """The columns ``names`` of a batch, as far as the queue has them."""
    if not names:
        return {}
    import transfer_queue

    wanted = list(dict.fromkeys(names))
    return transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=wanted)


def _values(found: Any, padding: Sequence[bool], known: set[str], names: Sequence[str]) -> Tensor:
    extra = as_list(found["extra_fields"]) if "extra_fields" in found else [{} for _ in padding]
    columns = {name: found[name] for name in names if name in found}
    return named_values(names, extra, columns, padding, known)


def _contexts(found: Any) -> Tensor:
    """The hidden states [B, d].

    Raises:
        RuntimeError: the engine handed none out.
    """
    if CONTEXT_FIELD not in found:
        raise RuntimeError(
            "hidden states: verl's engine returned none with the log-probs, expected the column "
            f"{CONTEXT_FIELD!r}; is maestro_fast installed in the environment of every worker, and does its "
            "VERL_USE_EXTERNAL_PLUGINS allow it? (verl does not hand VERL_USE_EXTERNAL_MODULES on to workers.)"
        )
    return torch.stack([row.float() for row in found[CONTEXT_FIELD].unbind()])


# --- how verl comes by these classes ---


@functools.cache
def with_maestro(trainer: type) -> type:
    """The subclass of a V1 trainer that knows K rewards, under the same name."""
    if issubclass(trainer, MaestroMixin):
        return trainer
    return type(trainer.__name__, (MaestroMixin, trainer), {"__module__": trainer.__module__})


def extend(v1: ModuleType) -> None:
    """Makes verl's look-up of trainers answer with our subclasses, also of trainers that are registered later."""
    from verl.trainer.ppo.v1 import trainer_base

    found = trainer_base.get_trainer_cls

    @functools.wraps(found)
    def get_trainer_cls(name: str) -> type:
        return with_maestro(found(name))

    trainer_base.get_trainer_cls = get_trainer_cls
    v1.get_trainer_cls = get_trainer_cls  # type: ignore[attr-defined]
    own = trainer_base.MetricsAggregator

    class MetricsAggregator(own):  # type: ignore[misc,valid-type]
        """Averages our figures. By its own rules verl would sum up, say, all that has "sum" in its name ("summary")."""

        def _get_aggregation_type(self, metric_name: str) -> str:
            if metric_name.startswith("maestro/"):
                return "weighted_avg"
            return str(super()._get_aggregation_type(metric_name))

    trainer_base.MetricsAggregator = MetricsAggregator


def refuse_legacy(ray_trainer: ModuleType) -> None:
    """Makes verl's legacy trainers check the config, too, and refuse the estimators that they cannot serve."""
    init = ray_trainer.RayPPOTrainer.__init__

    @functools.wraps(init)
    def checking(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        settings = checked(config)
        if settings is not None and settings.reward_names:
            raise SettingsError(
                f"adv_estimator={settings.estimator}: {type(self).__name__} is one of verl's legacy trainers, which "
                "hand an estimator no rewards by name, expected a V1 trainer (python -m verl.trainer.main_ppo, "
                "trainer.use_v1=True)"
            )
        init(self, config, *args, **kwargs)

    ray_trainer.RayPPOTrainer.__init__ = checking
