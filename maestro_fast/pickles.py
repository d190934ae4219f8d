"""Files that PyTorch has pickled. A pickle may run code where it is loaded, so all are checked before any is.

transformers and peft load with ``weights_only``, and refuse such a file in words of their own. The states of a sharded
policy (``pytorch_model_fsdp_0`` and ``optimizer_0``, with FSDP's SHARDED_STATE_DICT) are loaded by torch.distributed's
own code, which unpickles whatever they hold: an index in the file ``.metadata``, and beside the tensors the numbers of
the optimiser.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals

_INDEX = ".metadata"  # the index of a folder of torch.distributed.checkpoint
_METADATA = "torch.distributed.checkpoint.metadata"
_NAMES = (
    *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
    *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
_OF_AN_INDEX = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((_METADATA, name) for name in _NAMES),
}


def check_pickles(checkpoint: Path) -> None:
    """Checks that what PyTorch has pickled in a checkpoint holds nothing but tensors and numbers.

    Tensors are mapped into memory, not read.

    Raises:
        ValueError: a file holds something else, or it is damaged.
    """
    for path in sorted(checkpoint.rglob("*")):
        if path.name == TRAINING_ARGS_NAME:  # It is never read.
            continue
        try:
            if path.suffix in (".pt", ".pth", ".bin"):
                with safe_globals():
                    torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            elif path.name == _INDEX:
                _check_shards(path)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"resume_from_checkpoint: {path} holds more than tensors and numbers, or is damaged; it is not loaded, "
                "because it could run code of whoever wrote it"
            ) from error
        except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError, IndexError) as error:
            raise ValueError(f"resume_from_checkpoint: {path} is damaged: {error}") from error


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles the index of sharded states, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OF_AN_INDEX or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _check_shards(path: Path) -> None:
    """Reads the index of sharded states, and by it whatever stands beside the tensors in the files of the shards."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    with path.open("rb") as file:
        index = _IndexUnpickler(file).load()
    for key, place in index.storage_data.items():
        if not isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata):
            continue  # torch.distributed loads tensors with weights_only.
        with (path.parent / place.relative_path).open("rb") as shard:
            torch.load(_part(shard, place.offset, place.length), map_location="cpu", weights_only=True)


def _part(file: BinaryIO, offset: int, length: int) -> io.BytesIO:
    file.seek(offset)
    return io.BytesIO(file.read(length))
