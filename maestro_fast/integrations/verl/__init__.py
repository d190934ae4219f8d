"""The plugin of verl: ``algorithm.adv_estimator=maestro``, and verl's own group estimators made fast.

verl imports this module by itself where maestro_fast is installed (entry point ``verl.plugins``), in every one of its
processes. So importing it only says what is to be done once verl imports the modules that are extended; it imports
neither verl nor torch, and ``import verl`` gets no slower. The README beside this file says what it serves and refuses.

    verl.trainer.ppo.core_algos    gets the estimators               estimators.py
    verl.trainer.ppo.ray_trainer   refuses what needs the V1 trainer trainer.py
    verl.trainer.ppo.v1            trainers that know K rewards      trainer.py
    verl.workers.engine            engines that give hidden states   engine.py
"""

from __future__ import annotations

from types import ModuleType

from maestro_fast.integrations.verl.when_imported import when_imported


def _estimators(core_algos: ModuleType) -> None:
    from maestro_fast.integrations.verl.estimators import register

    register(core_algos)


def _legacy_trainer(ray_trainer: ModuleType) -> None:
    from maestro_fast.integrations.verl.trainer import refuse_legacy

    refuse_legacy(ray_trainer)


def _trainers(v1: ModuleType) -> None:
    from maestro_fast.integrations.verl.trainer import extend

    extend(v1)


def _engines(engine: ModuleType) -> None:
    from maestro_fast.integrations.verl.engine import extend

    extend(engine.EngineRegistry)


when_imported("verl.trainer.ppo.core_algos", _estimators)
when_imported("verl.trainer.ppo.ray_trainer", _legacy_trainer)
when_imported("verl.trainer.ppo.v1", _trainers)
when_imported("verl.workers.engine", _engines)
