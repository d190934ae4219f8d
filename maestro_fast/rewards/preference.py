"""A pretrained reward model scores prompt and completion. It may be any sequence-classification model.

The model is frozen and separate from the policy: it has its own tokenizer, its own chat template and its own device.
Each process of a run holds a whole copy and scores its own rows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from maestro_fast.records import Message, RewardBatch, Text, content_text, plain_text
from maestro_fast.settings import SettingsError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PreferenceConfig:
    """The score that a reward model gives to prompt and completion; the model is loaded when the reward is built.

    Attributes:
        model: the reward model, as a local directory or a hub name, for ``AutoModelForSequenceClassification`` and
            ``AutoTokenizer``.
        batch_size: the number of rows in a forward.
        max_length: the largest number of tokens in a conversation; longer ones lose tokens at their beginning. Where
            the model has fewer positions (BERT has 512), these are the limit, and longer conversations are warned of.
        dtype: the dtype of the weights; "auto" keeps that of the checkpoint. Scores are float32.
        device: the model's device, such as "cuda:1" or "cpu"; null takes the device on which the process trains its
            policy (outside training, the CPU).
        label: the output to take, by index or by its name in the checkpoint; a model with several outputs needs it.
        separator: the text between prompt and completion where the tokenizer has no chat template.
        name: the reward's name.

    Raises:
        ValueError: an option is out of its range.
        TypeError: an option is of the wrong type.
    """

    model: str
    batch_size: int = 16
    max_length: int = 2048
    dtype: Dtype = "auto"
    device: str | None = None
    label: int | str | None = None
    separator: str = "\n"
    name: str = "preference"

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, Path)) or not str(self.model):
            raise TypeError(f"model: {self.model!r}, expected a directory or a hub name")
        _check_count("batch_size", self.batch_size, 1)
        _check_count("max_length", self.max_length, 2)
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype: {self.dtype!r}, expected one of {get_args(Dtype)}")
        if not isinstance(self.separator, str):
            raise TypeError(f"separator: {self.separator!r}, expected a string")
        if self.device is not None:
            _device(self.device)

    def build(self, path: str, base_dir: str | Path) -> PreferenceReward:
        """Loads the model. ``path`` is the dotted name of the entry. ``base_dir`` has no effect on ``model``."""
        del base_dir
        try:
            return PreferenceReward(**vars(self))
        except (ValueError, TypeError) as error:
            raise SettingsError(f"{path}.{error}") from error


class PreferenceReward(PreferenceConfig):
    """The raw score (a logit, unbounded) that a reward model gives the conversation of prompt and completion.

    The model is loaded when the reward is made, on the CPU, so that a wrong path or an unsuitable model is found before
    anything is trained. At the first batch it moves to its device. A conversation is the prompt (a string is one user
    message) and the completion as the assistant's message, in the chat template of the reward model's tokenizer.
    Without a template it is prompt, ``separator`` and completion in one text, with the special tokens that the
    tokenizer adds.

    Rows are scored longest first, ``batch_size`` at a time, and padded on the right, whatever the tokenizer's own side
    is: a causal model never sees such padding, and an encoder masks it. So a score does not depend on the rest of the
    batch, beyond rounding.

    A conversation of more than ``max_length`` tokens, or of more than the model has positions for, loses tokens at its
    beginning, behind the special tokens that open it. The end of the completion, the template's closing tokens and an
    encoder's first token, where its score is read, stay. The first such conversation is logged.

    Args:
        model, batch_size, max_length, dtype, device, label, separator, name: as in ``PreferenceConfig``.

    Raises:
        ValueError: an option is out of its range, the path holds no such model, the model has several outputs and
            ``label`` is missing, the checkpoint lacks weights (a language model has no score head), there is no padding
            token, or the tokenizer has more tokens than the model. When called: a score is not finite; its row is
            named.
        TypeError: an option is of the wrong type.
    """

    needs_entropy: ClassVar[bool] = False
    needs_policy: ClassVar[bool] = False
    reads_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._device = None if self.device is None else _device(self.device)
        self._model, self._tokenizer, self._column = self._load()
        self._limit = self._limited(positions_of(self._model))
        self._special = frozenset(self._tokenizer.all_special_ids)
        self._warned = False

    def __call__(self, batch: RewardBatch) -> Tensor:
        """float32 [B] on the CPU."""
        rows = [self._ids(*row) for row in zip(batch.prompts, batch.completions, strict=True)]
        device = self._device or batch.device or torch.device("cpu")
        self._model.to(device)
        scores_B = torch.empty(len(rows), dtype=torch.float32)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        for start in range(0, len(rows), self.batch_size):
            members = order[start : start + self.batch_size]
            scores_B[members] = self._score([rows[row] for row in members], device)
        for row, score in enumerate(scores_B.tolist()):
            if score - score != 0:  # inf or NaN
                raise ValueError(f"reward {self.name!r}: row {row} was scored {score}, expected a finite number")
        return scores_B

    def _ids(self, prompt: Text, completion: Text) -> list[int]:
        ids = conversation_ids(self._tokenizer, prompt, completion, self.separator)
        if len(ids) <= self._limit:
            return ids
        if not self._warned:
            self._warned = True
            logger.warning(
                "reward %r: a conversation has %d tokens, more than %s %d, and loses the beginning of its prompt. "
                "This is said once.",
                self.name,
                len(ids),
                "max_length" if self._limit == self.max_length else "the model's positions,",
                self._limit,
            )
        return truncate(ids, self._limit, self._special)

    def _limited(self, positions: int | None) -> int:
        """``max_length``, or the model's positions if these are fewer."""
        if positions is None or self.max_length <= positions:
            return self.max_length
        logger.info(  # ``_ids`` warns if a conversation is longer.
            "reward %r: max_length is %d, but the model has %d positions; longer conversations lose their beginning",
            self.name,
            self.max_length,
            positions,
        )
        return positions

    @torch.inference_mode()
    def _score(self, rows: Sequence[list[int]], device: torch.device) -> Tensor:
        """float32 [B] on the CPU."""
        width = max(len(ids) for ids in rows)
        pad = self._model.config.get_text_config().pad_token_id
        ids_BT = torch.tensor([ids + [pad] * (width - len(ids)) for ids in rows], device=device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows], device=device)
        logits = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits
        scores: Tensor = logits[:, self._column].float().cpu()
        return scores

    def _load(self) -> tuple[Any, Any, int]:
        """The model, its tokenizer and the column of its output. The cheap checks come first."""
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        path = str(Path(self.model).expanduser()) if str(self.model).startswith("~") else str(self.model)
        if (Path(path).is_absolute() or path.startswith(".")) and not Path(path).is_dir():
            raise ValueError(f"model: there is no directory {path}")
        with _loading(path):
            config = AutoConfig.from_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(path)
        # A checkpoint without a score head has no outputs to choose from: its complaint is that it lacks weights.
        if any("SequenceClassification" in name for name in config.architectures or ()):
            _label_column(config, self.label)
        with _loading(path):
            model, found = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=self.dtype if self.dtype == "auto" else getattr(torch, self.dtype),
                output_loading_info=True,
            )
        _check_model(path, model, tokenizer, sorted(found["missing_keys"]))
        return model.eval().requires_grad_(False), tokenizer, _label_column(config, self.label)


def conversation_ids(tokenizer: Any, prompt: Text, completion: Text, separator: str = "\n") -> list[int]:
    """Token ids of a prompt and its completion as ``PreferenceReward`` scores them. Train its model on these.

    Args:
        tokenizer: the reward model's tokenizer. Its chat template is used if it has one.
        prompt, completion: a string, or a list of {"role", "content"} messages.
        separator: stands between the two where there is no template.

    Raises:
        ValueError: the template refuses the conversation, for example one with a system message.
    """
    if tokenizer.chat_template is None:
        text = plain_text(prompt) + separator + plain_text(completion)
        return list(tokenizer(text, verbose=False)["input_ids"])  # ``truncate`` does what its warning asks for
    messages = [*_messages(prompt, "user"), *_messages(completion, "assistant")]
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    except Exception as error:  # A template is a program of its own, which may fail in any way.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the chat template of the reward model refuses a conversation: {reason}") from error


def positions_of(model: Any) -> int | None:
    """The greatest number of tokens that a model has positions for, or None if it does not say.

    Models of RoBERTa's kind count positions from behind the padding token's, so a table of 514 serves 512 tokens.
    """
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if positions is not None and name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            positions = min(positions, module.num_embeddings - before)
    return positions


def truncate(ids: list[int], limit: int, special: frozenset[int]) -> list[int]:
    """Shortens ``ids`` to ``limit`` tokens. The special tokens that open it stay, and behind them its last tokens."""
    opening = next((i for i, token in enumerate(ids) if token not in special), 0)
    opening = min(opening, limit - 1)
    return ids if len(ids) <= limit else ids[:opening] + ids[opening - limit :]


def _messages(text: Text, role: str) -> list[Message]:
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    return [message | {"content": content_text(message)} for message in text]


def _label_column(config: Any, label: int | str | None) -> int:
    """The column of the model's output that is the score."""
    names = {int(column): str(name) for column, name in config.id2label.items()}
    listed = ", ".join(f"{column} ({name})" for column, name in sorted(names.items()))
    if label is None:
        if len(names) == 1:
            return 0
        raise ValueError(f"label: missing, the model has {len(names)} outputs: expected one of {listed}")
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError(f"label: {label!r}, expected one of {listed}")
    found = [column for column, name in names.items() if label in (column, name)]
    if len(found) != 1:
        raise ValueError(f"label: {label!r}, expected one of {listed}")
    return found[0]


def _check_model(path: str, model: Any, tokenizer: Any, missing: list[str]) -> None:
    """Refuses an unsuitable model. One that names no padding token gets its tokenizer's."""
    if missing:
        raise ValueError(
            f"model: {path} lacks the weights {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} of a "
            f"{type(model).__name__}: its scores would be random. Expected a reward model, whose score head is trained"
        )
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    tokens = model.get_input_embeddings().num_embeddings
    if config.pad_token_id is None or not 0 <= config.pad_token_id < tokens:
        raise ValueError(
            f"model: {path} has the padding token {config.pad_token_id}, expected one of its {tokens} tokens in the "
            "config's pad_token_id or the tokenizer's pad_token; a score is read at the last token that is not it"
        )
    if len(tokenizer) > tokens:
        raise ValueError(f"model: {path} has {tokens} tokens but its tokenizer {len(tokenizer)}")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{name}: {value}, expected at least {least}")


def _device(name: object) -> torch.device:
    try:
        return torch.device(name)  # type: ignore[call-overload,no-any-return]
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: {name!r}, expected a name such as 'cuda:1' or 'cpu'") from error


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Names the option in transformers' errors, and has every process load all weights.

    Under FSDP transformers may load weights on the first process alone, and FSDP then shares them. It would not share
    those of a reward model.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    os.environ[name] = "False"
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {path!r} gives no sequence-classification model: {error}") from error
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
