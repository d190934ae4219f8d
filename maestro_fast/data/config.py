"""The section ``data`` of a config: one data set, or a list of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from maestro_fast.settings import SettingsError

TooLong = Literal["error", "drop", "cut"]


@dataclass(frozen=True)
class DataConfig:
    """Where the prompts are. A list of these is a mixture.

    Attributes:
        path: a .jsonl, .json, .csv, .tsv or .parquet file (all but the last may have .gz behind that), a folder of
            ``Dataset.save_to_disk``, or a name or folder for ``datasets.load_dataset``.
        split: the split that datasets loads.
        prompt_column: the column with the prompts, each a string or a list of {"role", "content"} messages, to which
            the chat template is applied. A string that is the JSON of such a list counts as one. Null means "prompt"
            where there is such a column, else "messages". In a column that is not called "prompt", a last message of
            the assistant is no part of the prompt; it becomes the column "reference" where a row has none.
        family_column: the column with the task family of each prompt, for logs and reports; null means "family" where
            there is such a column.
        family: the task family of the rows that name none.
        share: the share of this data set in every generation batch, relative to the sum of the shares; null in all
            sets of a list means that they are shuffled as one.
        system_prompt: as ``chat.system_prompt``, for this data set; null means that one.
        max_prompt_tokens: the largest number of tokens of a prompt; null means no limit.
        too_long: what happens to a longer prompt: "error" ends the run before it trains, "drop" leaves the row out, and
            "cut" takes away the oldest messages but the system's, and then the beginning of the text.
        limit: how many of the first rows are used; null means all.
        streaming: whether rows are read as they are needed, in place of all at the start; this needs
            trainer.max_steps and max_prompt_tokens.
        shuffle_buffer: how many rows of a stream are shuffled, and held, at a time.
    """

    path: str
    split: str = "train"
    prompt_column: str | None = None
    family_column: str | None = None
    family: str | None = None
    share: float | None = None
    system_prompt: str | None = None
    max_prompt_tokens: int | None = None
    too_long: TooLong = "error"
    limit: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: is empty, expected a file, a folder or the name of a data set")
        for name in ("max_prompt_tokens", "limit", "shuffle_buffer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                or_null = "" if name == "shuffle_buffer" else " or null"
                raise ValueError(f"{name}: {value}, expected at least 1{or_null}")
        if self.share is not None and not 0 < self.share < float("inf"):
            raise ValueError(f"share: {self.share}, expected a finite number above 0, or null")
        if self.family is not None and not self.family:
            raise ValueError("family: '', expected the name of a task family, or null")
        if self.max_prompt_tokens is None and self.too_long != "error":
            raise ValueError(f"too_long: {self.too_long}, but max_prompt_tokens is null, expected a limit there")
        if self.max_prompt_tokens is None and self.streaming:
            raise ValueError(
                "streaming: true, but max_prompt_tokens is null, expected a limit there: the longest prompt of a "
                "stream is not known before the run"
            )


Data = DataConfig | list[DataConfig]


def named_sets(data: Data, field: str = "data") -> list[tuple[str, DataConfig]]:
    """Each data set with the dotted name of its section: "data", or "data[0]", "data[1]" and so on for a list."""
    if isinstance(data, DataConfig):
        return [(field, data)]
    return [(f"{field}[{i}]", each) for i, each in enumerate(data)]


def check_training_data(data: Data, trainer: Mapping[str, Any]) -> None:
    """Checks what the data sets of a training have to have in common.

    Args:
        data: the section ``data``.
        trainer: the section ``trainer``.

    Raises:
        SettingsError: there is no data set, only some have a share, or a stream cannot be served.
    """
    sets = named_sets(data)
    _check_some(sets, "data")
    shares = {name: each.share for name, each in sets}
    given = [name for name, share in shares.items() if share is not None]
    if given and isinstance(data, DataConfig):
        raise SettingsError(f"data.share: {data.share}, but there is one data set, expected a list of them")
    without = [name for name, share in shares.items() if share is None]
    if given and without:
        raise SettingsError(
            f"{without[0]}.share: missing, but {given[0]} has one, expected a share for every set, or for none"
        )
    for name, each in sets:
        if not each.streaming:
            continue
        if not isinstance(data, DataConfig):
            raise SettingsError(f"{name}.streaming: true in a list, expected one data set under data, or no stream")
        steps, workers = trainer.get("max_steps", -1), trainer.get("dataloader_num_workers", 0)
        if not isinstance(steps, int) or steps < 1:
            raise SettingsError(
                f"trainer.max_steps: {'missing' if steps == -1 else steps}, and data.streaming is true, expected the "
                "number of steps, because a stream has no known end"
            )
        if workers:
            raise SettingsError(
                f"trainer.dataloader_num_workers: {workers}, and data.streaming is true, expected 0: each worker would "
                "read the whole stream"
            )


def check_held_out_data(data: Data, field: str = "evaluation.data") -> None:
    """Checks the data sets of an evaluation, which reads every prompt of them each time.

    Args:
        data: the data sets.
        field: the name of their section, for errors.

    Raises:
        SettingsError: there is no data set, or one has a share or is a stream.
    """
    sets = named_sets(data, field)
    _check_some(sets, field)
    for name, each in sets:
        if each.share is not None:
            raise SettingsError(f"{name}.share: {each.share}, but an evaluation reads every prompt, expected null")
        if each.streaming:
            raise SettingsError(
                f"{name}.streaming: true, but an evaluation reads the same prompts each time, expected false, with a "
                "limit perhaps"
            )


def _check_some(sets: Sequence[object], field: str) -> None:
    if not sets:
        raise SettingsError(f"{field}: an empty list, expected at least one data set")
