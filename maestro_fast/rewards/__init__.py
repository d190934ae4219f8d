"""Rewards over a batch of completions: built-in ones, any function with TRL's signature, and sets of them."""

from maestro_fast.rewards.builtin import KINDS, REWARD_TYPES, EntropyReward, LengthReward, OverlongReward
from maestro_fast.rewards.conditional import Gate, Labelled, LabelsConfig, Where, gate, masks, needed_columns
from maestro_fast.rewards.config import (
    AnchorConfig,
    GateConfig,
    RewardConfig,
    RewardSpec,
    build_anchor,
    build_rewards,
)
from maestro_fast.rewards.format import FormatReward, check_tags_are_seen, split_tags
from maestro_fast.rewards.function import FunctionReward, FunctionRewardConfig, load_function
from maestro_fast.rewards.guarded import Guarded, RewardTimeoutError
from maestro_fast.rewards.judge import JudgeConfig, JudgeReward
from maestro_fast.rewards.nover import NoverReward
from maestro_fast.rewards.perplexity import PerplexityReward
from maestro_fast.rewards.preference import PreferenceConfig, PreferenceReward
from maestro_fast.rewards.reward import Reward, RewardSet, RewardValues

__all__ = [
    "KINDS",
    "REWARD_TYPES",
    "AnchorConfig",
    "EntropyReward",
    "FormatReward",
    "FunctionReward",
    "FunctionRewardConfig",
    "Gate",
    "GateConfig",
    "Guarded",
    "JudgeConfig",
    "JudgeReward",
    "Labelled",
    "LabelsConfig",
    "LengthReward",
    "NoverReward",
    "OverlongReward",
    "PerplexityReward",
    "PreferenceConfig",
    "PreferenceReward",
    "Reward",
    "RewardConfig",
    "RewardSet",
    "RewardSpec",
    "RewardTimeoutError",
    "RewardValues",
    "Where",
    "build_anchor",
    "build_rewards",
    "check_tags_are_seen",
    "gate",
    "load_function",
    "masks",
    "needed_columns",
    "split_tags",
]
