"""Fixtures of the model tests: kernels in plain PyTorch, and the training tests' checkpoints and runs."""

from tests.model.plain_kernels import kernels
from tests.training.conftest import checkpoint, raw_config

__all__ = ["checkpoint", "kernels", "raw_config"]
