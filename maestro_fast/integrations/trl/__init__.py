"""TRL's GRPOTrainer with adaptive reward weights: change the import and the class name, keep everything else.

from maestro_fast.integrations.trl import MaestroGRPOTrainer

trainer = MaestroGRPOTrainer(model, reward_funcs=[f, g], args=config, train_dataset=data, weights="conductor")
"""

try:
    import trl as _trl  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError("maestro_fast.integrations.trl needs TRL: pip install 'maestro-fast[trl]'") from error

from maestro_fast.integrations.refusals import Refusal
from maestro_fast.integrations.trl.refuse import NEWEST, OLDEST, refusal_table, refusals
from maestro_fast.integrations.trl.trainer import MaestroGRPOMixin, MaestroGRPOTrainer

__all__ = ["NEWEST", "OLDEST", "MaestroGRPOMixin", "MaestroGRPOTrainer", "Refusal", "refusal_table", "refusals"]
