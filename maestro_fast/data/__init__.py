"""The prompts of a run: where they come from, how they are checked, and how they become what the policy reads."""

from maestro_fast.data.dataset import DataConfig, PromptDataset, Row, check_conditions, load_prompts

__all__ = ["DataConfig", "PromptDataset", "Row", "check_conditions", "load_prompts"]
