"""What a checkpoint is, and how it becomes the policy: its dtype, its attention, its adapters, its tokenizer.

``model.path`` holds a whole model, or an adapter that was trained on one (a folder with adapter_config.json, such as
the ``final/`` of a LoRA run). An adapter goes on training, or is merged into its base and the result trains:

path      lora      adapter      what trains
model     -         -            all weights
model     {...}     -            a new adapter
adapter   -         continue     the adapter of the path
adapter   -         merge        all weights of base + adapter
adapter   {...}     merge        a new adapter on base + adapter

Weights that train are float32, unless ``model.dtype`` says otherwise: ``model/trained.py`` says why.
"""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from maestro_fast.model.attention import Attention, Layout, attention_choice, use_attention
from maestro_fast.model.layouts import Sharing
from maestro_fast.model_path import loading_model
from maestro_fast.settings import SettingsError

logger = logging.getLogger(__name__)
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the files of a whole model, by the names of transformers


# --- settings ---


@dataclass(frozen=True)
class LoraSettings:
    """LoRA adapters, which need the extra ``peft``.

    Attributes:
        r: the rank of the adapters.
        alpha: the scale of the adapters, as ``lora_alpha`` of ``peft.LoraConfig``.
        dropout: the dropout of the adapters' inputs, as ``lora_dropout`` of ``peft.LoraConfig``.
        target_modules: the modules that get adapters, as in ``peft.LoraConfig``.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        for name in ("r", "alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: {self.dropout}, expected 0 <= dropout < 1")


@dataclass(frozen=True)
class ModelConfig:
    """The policy.

    Attributes:
        path: a local directory or a hub name, for ``AutoModelForCausalLM`` and ``AutoTokenizer``; it may hold a trained
            adapter of ``peft``, such as the ``final/`` of a LoRA run.
        dtype: the dtype of the weights; "auto" is float32 if all weights train or an adapter is merged, because half
            precision rounds small steps away, and else the checkpoint's for the frozen weights; adapters are float32.
        attention: "auto" takes torch's varlen kernel, else flash-attn if it can be imported, both on CUDA devices and
            in half precision only (of the weights or of ``trainer.bf16``), else sdpa, and the responses of a group
            share their prompt's computation where that costs less; "shared" has them always share it; any other is
            used, with no sharing, or refused, and ``maestro-fast info`` shows which can serve.
        adapter: what becomes of an adapter in ``path``: "continue" trains it on, "merge" adds it to its base, and then
            all weights train, or a new adapter if there is ``lora``.
        lora: the adapters; null trains all weights, or the adapter in ``path``.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Attention = "auto"
    adapter: Literal["continue", "merge"] = "continue"
    lora: LoraSettings | None = None

    @property
    def sharing(self) -> Sharing:
        """Whether responses share their prompt's computation."""
        modes: dict[str, Sharing] = {"auto": "auto", "shared": "always"}
        return modes.get(self.attention, "never")

    @property
    def layout(self) -> Layout | None:
        """The layout that has to serve the model; None for any."""
        return "varlen" if self.attention == "varlen" else None


# --- what a checkpoint is ---


@dataclass(frozen=True)
class Checkpoint:
    """What a path or hub name holds.

    Attributes:
        path: the path or hub name. A local path is absolute, so that it means the same from any working directory.
        base: where the whole model is: ``path``, or the model that the adapter was trained on.
        adapter: the contents of adapter_config.json; None for a whole model.
    """

    path: str
    base: str
    adapter: dict[str, Any] | None

    @staticmethod
    def at(path: str) -> Checkpoint:
        """Finds out what ``path`` holds, without reading weights.

        Raises:
            SettingsError: the path is an adapter whose base is not known or not there, or it is both kinds at once.
        """
        path = _absolute(path)
        adapter = _adapter_config(path)
        if adapter is None:
            return Checkpoint(path, path, None)
        if any(next(Path(path).glob(pattern), None) for pattern in _WEIGHTS):
            raise SettingsError(f"model.path: {path} holds a whole model and an adapter, expected one of the two")
        return Checkpoint(path, _base_of(path, adapter), adapter)


def trains_adapter(config: ModelConfig) -> bool:
    """Whether an adapter trains, and the weights below it stay as they are.

    It does not ask the hub, so it knows of an adapter there once ``load_policy`` has loaded it.

    Raises:
        SettingsError: the path is no folder, and cannot be the name of a model on the hub.
    """
    if config.lora is not None:
        return True
    return config.adapter == "continue" and _adapter_file(config.path, local_files_only=True) is not None


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def _adapter_file(path: str, *, local_files_only: bool) -> str | None:
    try:
        found: str | None = find_adapter_config_file(path, local_files_only=local_files_only)
    except OSError as error:  # The hub's client refuses what cannot be a name there.
        raise SettingsError(f"model.path: {path!r} is no folder here, and no name of a model on the hub") from error
    return found


def _adapter_config(path: str) -> dict[str, Any] | None:
    file = _adapter_file(path, local_files_only=True)
    if file is None and not Path(path).is_dir() and not _has_file(path, "config.json", local_files_only=True):
        file = _adapter_file(path, local_files_only=False)
    if file is None:
        return None
    adapter: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    return adapter


def _base_of(path: str, adapter: dict[str, Any]) -> str:
    """The model that the adapter in ``path`` was trained on: a path as it stands, one below ``path``, or a hub name."""
    named = adapter.get("base_model_name_or_path")
    setting = f"model.path: {path} is an adapter, whose adapter_config.json has base_model_name_or_path {named!r}"
    if not named:
        raise SettingsError(f"{setting}, expected the model that it was trained on")
    for candidate in (Path(named), Path(path) / named):
        if candidate.is_dir():
            named = str(candidate.absolute())
            break
    else:
        if named.startswith((".", "/", "~")) or named.count("/") > 1:
            raise SettingsError(
                f"{setting}: there is no such folder; if that model was moved, write its new path into that file"
            )
    if _adapter_config(named) is not None:
        raise SettingsError(f"{setting}, which is an adapter itself, expected a whole model; merge that one first")
    return str(named)


def _loading(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    """Says in one sentence why the model cannot be loaded, and whether it is the base of an adapter."""
    if checkpoint.adapter is None:
        return loading_model(checkpoint.base)
    return loading_model(checkpoint.base, f"model.path: base_model_name_or_path of the adapter {checkpoint.path}")


# --- the policy ---


def load_policy(
    config: ModelConfig,
    device: torch.device | None = None,
    *,
    mixed: torch.dtype | None = None,
    merged: Path | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Loads the model into host memory, with the adapters that are configured or in ``path``, and its tokenizer.

    Args:
        config: the section ``model`` of the run.
        device: the device on which the model is going to run, which decides on its attention.
        mixed: the dtype of mixed precision in which it is going to run; None without mixed precision.
        merged: the folder into which base + adapter are written where a new adapter trains on them, which names that
            folder as its base. None writes nothing.

    Raises:
        SettingsError: the path holds no model that can be loaded; ``model.attention`` cannot serve on the device, in
            this dtype, or this model; or ``model.lora`` contradicts the adapter in the path.
        ImportError: there are adapters, and ``peft`` is not installed.
    """
    attention_choice(config.attention, device)  # This raises before the weights are read.
    checkpoint = Checkpoint.at(config.path)
    _check_adapter(config, checkpoint)
    tokenizer = _tokenizer(checkpoint)
    with _loading(checkpoint):
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.base,
            dtype=_dtype(config, checkpoint),
            attn_implementation=None if config.attention in ("auto", "shared", "varlen") else config.attention,
        )
    _set_attention(model, config.attention, device, mixed)
    if checkpoint.adapter is not None:
        model = _with_trained_adapter(model, checkpoint, config)
        if config.adapter == "continue":
            return model, tokenizer
    if config.lora is None:
        return model, tokenizer
    if checkpoint.adapter is not None and merged is not None:
        _save_merged(model, tokenizer, merged)
        model.name_or_path = str(merged.absolute())  # peft writes this name into the adapter's config.
    return _peft().get_peft_model(model, _lora_config(config.lora)), tokenizer


def _dtype(config: ModelConfig, checkpoint: Checkpoint) -> torch.dtype | Literal["auto"]:
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    merges = checkpoint.adapter is not None and config.adapter == "merge"
    frozen = not merges and (config.lora is not None or checkpoint.adapter is not None)
    return "auto" if frozen else torch.float32


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter, or else that of its base."""
    own = checkpoint.adapter is None or _has_file(checkpoint.path, "tokenizer_config.json")
    with _loading(checkpoint):
        return AutoTokenizer.from_pretrained(checkpoint.path if own else checkpoint.base)


def _has_file(path: str, name: str, *, local_files_only: bool = False) -> bool:
    found = cached_file(
        path,
        name,
        local_files_only=local_files_only,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def _set_attention(model: Any, wanted: str, device: torch.device | None, mixed: torch.dtype | None) -> None:
    """Chooses the attention again, now that the model and the dtype in which it computes are known."""
    loaded, refused = model.config._attn_implementation, dict[str, str]()
    windows = getattr(model.config.get_text_config(), "sliding_window", None) is not None
    while True:
        implementation, reason = attention_choice(
            wanted, device, mixed or model.dtype, windows=windows, refused=refused
        )
        if implementation in (loaded, "sdpa"):  # A model without SDPA keeps eager attention.
            break
        try:
            use_attention(model, implementation)
            break
        except (ValueError, ImportError) as error:
            if wanted not in ("auto", "shared"):
                raise SettingsError(f"model.attention: {wanted} cannot serve: {error}") from error
            refused[implementation] = f"{implementation} was the choice, but {error}"
    logger.info("attention: %s, %s", model.config._attn_implementation, reason)


# --- adapters ---


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError('model: adapters need peft, pip install "maestro-fast[peft]"') from error
    return peft


def _lora_config(lora: LoraSettings) -> Any:
    return _peft().LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def _check_adapter(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Checks the settings against the adapter in the path, before the weights are read.

    Raises:
        SettingsError: the adapter is of a kind that adds tokens to the prompt; there is none to merge; or it goes on
            training and ``model.lora`` says something else than it is.
    """
    adapter = checkpoint.adapter
    if adapter is None:
        if config.adapter == "merge":
            raise SettingsError(f"model.adapter: merge, but {checkpoint.path} holds a whole model, expected an adapter")
        return
    kind = adapter.get("peft_type")
    known = _peft().PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is None:
        raise SettingsError(
            f"model.path: {checkpoint.path} is an adapter of type {kind!r}, which this peft does not know"
        )
    if issubclass(known, _peft().PromptLearningConfig):
        raise SettingsError(f"model.path: {checkpoint.path} is an adapter of type {kind}, which adds to the prompt")
    if config.lora is None or config.adapter == "merge":
        return
    advice = "expected the same or no section lora; adapter: merge puts a new adapter on top of it"
    if kind != "LORA":
        raise SettingsError(f"model.lora: given, but {checkpoint.path} is an adapter of type {kind}, {advice}")
    for name, key in (("r", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout")):
        if (wanted := getattr(config.lora, name)) != adapter.get(key):
            raise SettingsError(
                f"model.lora.{name}: {wanted}, but the adapter {checkpoint.path} has {adapter.get(key)}, {advice}"
            )
    given, found = (_targets(checkpoint, x) for x in (config.lora.target_modules, adapter.get("target_modules")))
    if given != found:
        raise SettingsError(
            f"model.lora.target_modules: {config.lora.target_modules}, but the adapter {checkpoint.path} has "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in found}))} in {len(found)} modules and not "
            f"{len(given)}, {advice}"
        )


def _targets(checkpoint: Checkpoint, modules: Any) -> set[str]:
    """The names of the modules that get LoRA, by peft's own rules, on a model without memory for its weights."""
    peft = _peft()
    with _loading(checkpoint), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.base))
    lora = peft.LoraConfig(r=1, target_modules=modules, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(skeleton, lora, low_cpu_mem_usage=True)
    return {name for name, module in tuned.named_modules() if hasattr(module, "lora_A") and hasattr(module, "merge")}


def _with_trained_adapter(model: Any, checkpoint: Checkpoint, config: ModelConfig) -> Any:
    """Puts the adapter in the path on its base, trainable; or merges the two."""
    if config.adapter == "continue":
        tuned = _peft().PeftModel.from_pretrained(model, checkpoint.path, is_trainable=True)
        for own in tuned.peft_config.values():
            own.base_model_name_or_path = checkpoint.base
        logger.info("model: the adapter %s on %s goes on training", checkpoint.path, checkpoint.base)
        return tuned
    if model.dtype in (torch.bfloat16, torch.float16):
        logger.warning(
            "model.adapter: merge into %s weights, which rounds small changes of the adapter away; dtype: auto or "
            "float32 keeps them",
            str(model.dtype).removeprefix("torch."),
        )
    logger.info("model: the adapter %s is merged into %s", checkpoint.path, checkpoint.base)
    whole = _peft().PeftModel.from_pretrained(model, checkpoint.path).merge_and_unload()
    return whole.requires_grad_(True)  # peft has frozen the base, which trains if no new adapter comes.


def _save_merged(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes base + adapter into ``folder``, which gets its name when it is complete."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)  # A run that is resumed writes the same again.
    unfinished.rename(folder)
