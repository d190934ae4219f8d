"""Rewards over a batch of completions: built-in ones, any function with TRL's signature, and sets of them."""

from maestro_fast.rewards.build import KINDS, RewardSpec, build_anchor, build_rewards
from maestro_fast.rewards.entropy import EntropyReward
from maestro_fast.rewards.format import FormatReward, split_tags
from maestro_fast.rewards.function import FunctionReward, load_function
from maestro_fast.rewards.gate import Gate, gate
from maestro_fast.rewards.labelled import Labelled, LabelsConfig
from maestro_fast.rewards.length import LengthReward
from maestro_fast.rewards.nover import NoverReward
from maestro_fast.rewards.perplexity import PerplexityReward
from maestro_fast.rewards.preference import PreferenceReward
from maestro_fast.rewards.reward import Reward, RewardSet, RewardValues
from maestro_fast.rewards.where import Where

__all__ = [
    "KINDS",
    "EntropyReward",
    "FormatReward",
    "FunctionReward",
    "Gate",
    "Labelled",
    "LabelsConfig",
    "LengthReward",
    "NoverReward",
    "PerplexityReward",
    "PreferenceReward",
    "Reward",
    "RewardSet",
    "RewardSpec",
    "RewardValues",
    "Where",
    "build_anchor",
    "build_rewards",
    "gate",
    "load_function",
    "split_tags",
]
