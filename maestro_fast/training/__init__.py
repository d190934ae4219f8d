"""The trainer, the config of a run, and the data that it trains on."""

from maestro_fast.config_file import read_config
from maestro_fast.data.config import DataConfig
from maestro_fast.data.dataset import PromptDataset
from maestro_fast.data.load import load_prompts
from maestro_fast.model.load import ModelConfig
from maestro_fast.training.batches import BatchConfig
from maestro_fast.training.config import TrainConfig, parse_config
from maestro_fast.training.plan import Method
from maestro_fast.training.run import train
from maestro_fast.training.trainer import MaestroTrainer

__all__ = [
    "BatchConfig",
    "DataConfig",
    "MaestroTrainer",
    "Method",
    "ModelConfig",
    "PromptDataset",
    "TrainConfig",
    "load_prompts",
    "parse_config",
    "read_config",
    "train",
]
