"""Files that PyTorch has pickled. A pickle may run code where it is loaded, so all are checked before any is.

transformers and peft load with ``weights_only``, and refuse such a file in words of their own. The states of a sharded
policy (``pytorch_model_fsdp_0`` and ``optimizer_0``, with FSDP's SHARDED_STATE_DICT) are loaded by torch.distributed's
own code, which unpickles whatever they hold: an index in the file ``.metadata``, and beside the tensors the numbers of
the optimiser.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals

_INDEX = ".metadata"  # the index of a folder of torch.distributed.checkpoint
_SHARDS = ("pytorch_model_fsdp_", "optimizer_")  # what the names of such folders begin with
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
        ValueError: a file holds something else, it is damaged, or it is a link.
    """
    for path in _files(checkpoint):
        if path.name == TRAINING_ARGS_NAME:  # It is never read.
            continue
        try:
            if path.suffix in (".pt", ".pth", ".bin"):
                with safe_globals():
                    torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            elif path.name == _INDEX:
                _check_shards(path)
            elif path.name.endswith(_INDEX):  # torch.distributed takes such a file where it finds no index.
                raise pickle.UnpicklingError("it is the index of one process")
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"resume_from_checkpoint: {path} holds more than tensors and numbers, or is damaged; it is not loaded, "
                "because it could run code of whoever wrote it"
            ) from error
        except Exception as error:  # A damaged file may raise anything.
            raise ValueError(f"resume_from_checkpoint: {path} is damaged: {type(error).__name__}: {error}") from error


def _files(checkpoint: Path) -> Iterator[Path]:
    """All files of a checkpoint, in order.

    Raises:
        ValueError: there is a link, which a run does not write, or sharded states without an index.
    """
    for name, folders, files in os.walk(checkpoint):
        folder = Path(name)
        for path in sorted(folder / each for each in (*folders, *files)):
            if path.is_symlink():
                raise ValueError(f"resume_from_checkpoint: {path} is a link, expected a file or folder of a checkpoint")
        if folder.name.startswith(_SHARDS) and _INDEX not in files:
            raise ValueError(f"resume_from_checkpoint: {folder} holds no {_INDEX}, it is incomplete")
        yield from sorted(folder / each for each in files)


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles the index of sharded states into objects that only hold what they are given.

    A pickle may also set the attributes of a class that it names. These classes refuse it, and are none of torch's own.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.made: dict[str, type[Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _OF_AN_INDEX:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.made.setdefault(name, type(name, (_Held,), {}))


class _Held:
    """An object of an index."""

    def __new__(cls, *args: Any) -> _Held:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if type(state) is dict else {})


def _check_shards(path: Path) -> None:
    """Reads the index of sharded states, and by it whatever stands beside the tensors in the files of the shards."""
    with path.open("rb") as file:
        unpickler = _IndexUnpickler(file)
        index = unpickler.load()
    if type(index) is not unpickler.made.get("Metadata"):
        raise pickle.UnpicklingError("it is no index")
    kinds, places = vars(index)["state_dict_metadata"], vars(index)["storage_data"]
    if type(kinds) is not dict or type(places) is not dict:
        raise pickle.UnpicklingError("it is no index")
    for key, place in places.items():
        kind = kinds[vars(key)["fqn"]]
        if type(kind) is unpickler.made.get("TensorStorageMetadata"):
            continue  # torch.distributed loads tensors with weights_only.
        if type(kind) is not unpickler.made.get("BytesStorageMetadata") or vars(place).get("transform_descriptors"):
            raise pickle.UnpicklingError("it is no index of a run's")
        with (path.parent / vars(place)["relative_path"]).open("rb") as shard:
            shard.seek(vars(place)["offset"])
            torch.load(io.BytesIO(shard.read(vars(place)["length"])), map_location="cpu", weights_only=True)
