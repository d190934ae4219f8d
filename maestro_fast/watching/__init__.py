"""Watches a run by what it logs: alarms, the best checkpoint, and a few responses to look at.

What stands here decides; ``training`` acts on it, and ``reporting`` writes and prints what there is to see.
"""

from maestro_fast.watching.alarms import Alarm, AlarmConfig, Alarms, check_alarms
from maestro_fast.watching.best_checkpoint import BestCheckpoint
from maestro_fast.watching.samples import ConsoleConfig, Sample, TrackersConfig, is_due, pick_samples

__all__ = [
    "Alarm",
    "AlarmConfig",
    "Alarms",
    "BestCheckpoint",
    "ConsoleConfig",
    "Sample",
    "TrackersConfig",
    "check_alarms",
    "is_due",
    "pick_samples",
]
