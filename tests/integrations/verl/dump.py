"""Saves what verl's queue held when the advantages of a step were done, for the tests to compute it anew.

    VERL_USE_EXTERNAL_MODULES=...,tests.integrations.verl.dump  VERL_TEST_DUMPS=/some/folder

Only verl is extended here, so it does not matter whether maestro_fast is there.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import wrapt

from tests.integrations.verl.names import DUMPS, HOLD, dump_name


def _listed(column: Any) -> list[Any]:
    """A column of the queue as a list of plain values, whichever of three types it has."""
    if isinstance(column, torch.Tensor):
        return [row.clone() for row in column.unbind()]
    return list(column.tolist() if hasattr(column, "tolist") else column)


def _save(trainer: Any, batch: Any) -> None:
    import transfer_queue

    data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
    columns = {name: _listed(data[name]) for name in data.keys()}  # noqa: SIM118 (a TensorDict iterates over rows)
    content = {"step": trainer.global_steps, "keys": list(batch.keys), "tags": list(batch.tags), "columns": columns}
    path = Path(os.environ[DUMPS], dump_name(trainer.global_steps))
    torch.save(content, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def _extend(trainer_base: ModuleType) -> None:
    trainer = next(
        cls for cls in vars(trainer_base).values() if isinstance(cls, type) and "_compute_advantage" in vars(cls)
    )
    compute = trainer._compute_advantage

    @functools.wraps(compute)
    def computing(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = compute(self, batch, metrics)
        _save(self, batch)
        if os.environ.get(HOLD) == str(self.global_steps):
            time.sleep(3600)  # The test ends the run here.
        return batch

    trainer._compute_advantage = computing


wrapt.register_post_import_hook(_extend, "verl.trainer.ppo.v1.trainer_base")
