"""What a checkpoint holds of the step in progress: responses not trained on yet, and figures not logged yet.

One file per process, as each has its own responses. Tensors are stored as they are, numbers as JSON (whose repr of a
float is exact), so that a resumed run goes on bit by bit.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from maestro_fast.model.forward import Sequences
from maestro_fast.training.batches import MicroBatch, TokenLogprobs
from maestro_fast.training.metrics import MetricMeans

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepState:
    """
    Attributes:
        micro_batches: of the generation batch that the policy is being updated with; empty between batches.
        means: figures since the last log line.
        loss: sum of the losses since the last log line, which was of ``logged_step``.
        sizes: that decided on ``micro_batches``, by the names of a config.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    means: MetricMeans = field(default_factory=MetricMeans)
    loss: float = 0.0
    logged_step: int = 0
    sizes: dict[str, int] = field(default_factory=dict)

    def check_sizes(self, expected: dict[str, int]) -> None:
        """
        Raises:
            ValueError: responses are left, and they were divided by other sizes.
        """
        for name, size in expected.items() if self.micro_batches else ():
            if self.sizes.get(name) != size:
                raise ValueError(
                    f"{name}: {size}, but the checkpoint holds responses that had still to be trained on, made with "
                    f"{self.sizes.get(name)}, expected the same"
                )


def save_step_state(folder: Path, state: StepState, rank: int, processes: int) -> None:
    """Writes this process's file."""
    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(state.micro_batches):
        tensors |= {f"{i}.{name}": tensor.cpu().contiguous() for name, tensor in _tensors(batch).items()}
    numbers = {
        "normalizers": [(batch.normalizer, batch.entropy_normalizer) for batch in state.micro_batches],
        "means": state.means.state(),
        "loss": state.loss,
        "logged_step": state.logged_step,
        "sizes": state.sizes,
    }
    save_file(tensors, _file(folder, rank, processes), metadata={"numbers": json.dumps(numbers)})


def load_step_state(folder: Path, rank: int, processes: int, device: torch.device) -> StepState | None:
    """Reads this process's file. None if the checkpoint is of another number of processes, between two batches.

    Raises:
        ValueError: there is no such file, or responses of another number of processes are left to train on.
    """
    file = _file(folder, rank, processes)
    if file.is_file():
        tensors, numbers = _read(file)
        batches = [_micro_batch(i, tensors, pair, device) for i, pair in enumerate(numbers["normalizers"])]
        means = MetricMeans.of(numbers["means"])
        return StepState(batches, means, numbers["loss"], numbers["logged_step"], numbers["sizes"])
    others = sorted(folder.glob("step_state_*.safetensors"))
    if not others:
        raise ValueError(f"resume_from_checkpoint: {folder} holds no {file.name}, it is incomplete")
    if any(_read(other)[1]["normalizers"] for other in others):
        raise ValueError(
            f"resume_from_checkpoint: {folder} holds responses that {len(others)} processes had still to train on, "
            f"expected as many processes, this run has {processes}"
        )
    logger.warning("resumed with %d processes from a checkpoint of %d", processes, len(others))
    return None


def _file(folder: Path, rank: int, processes: int) -> Path:
    return folder / f"step_state_{rank}_of_{processes}.safetensors"


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(file, framework="pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 - it is no dictionary
        return tensors, json.loads(saved.metadata()["numbers"])


def _tensors(batch: MicroBatch) -> dict[str, Tensor]:
    sequences, logprobs = batch.sequences, batch.logprobs
    named = {
        "prompt_ids": _flat(sequences.prompt_ids),
        "prompt_lengths": _lengths(sequences.prompt_ids),
        "completion_ids": _flat(sequences.completion_ids),
        "completion_lengths": _lengths(sequences.completion_ids),
        "advantages": batch.advantages_B,
        "cu_seqlens": batch.cu_seqlens,
        "old_logprobs": logprobs.old_C,
        "ref_logprobs": logprobs.ref_C,
        "sampling_logprobs": logprobs.sampling_C,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _micro_batch(
    number: int, tensors: dict[str, Tensor], normalizers: tuple[float, float], device: torch.device
) -> MicroBatch:
    own = {name.partition(".")[2]: t for name, t in tensors.items() if name.partition(".")[0] == str(number)}
    logprobs = (own.get(name) for name in ("old_logprobs", "ref_logprobs", "sampling_logprobs"))
    return MicroBatch(
        Sequences(
            _ragged(own["prompt_ids"], own["prompt_lengths"]), _ragged(own["completion_ids"], own["completion_lengths"])
        ),
        own["advantages"],
        own["cu_seqlens"],
        TokenLogprobs(*(None if tensor is None else tensor.to(device) for tensor in logprobs)),
        *normalizers,
    )


def _flat(rows: list[list[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def _lengths(rows: list[list[int]]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)


def _ragged(flat: Tensor, lengths: Tensor) -> list[list[int]]:
    return [part.tolist() for part in flat.split(lengths.tolist())]
