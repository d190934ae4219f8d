"""The prompts of a run: where they come from, how they are checked, and how they become what the policy reads."""

from maestro_fast.data.conditions import check_conditions
from maestro_fast.data.config import DataConfig
from maestro_fast.data.dataset import PromptDataset, Row
from maestro_fast.data.load import load_prompts

__all__ = ["DataConfig", "PromptDataset", "Row", "check_conditions", "load_prompts"]
