"""Says where a reward failed: in which step, and at the responses to which prompts.

A reward judges a whole batch at once, so its error alone does not say which response it stumbled over. Code that goes
through the responses one by one still holds that response, or its prompt, in a variable where it failed, and there it
is looked for. Otherwise all prompts of the batch are named, or the first of them.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

from maestro_fast.records import RewardBatch, Text, plain_text

E = TypeVar("E", bound=BaseException)
_PACKAGE = str(Path(__file__).parent.parent) + os.sep
_NOT_OWN = (_PACKAGE, "<", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))
_NAMED = "prompts_at_fault"  # the attribute of an error that knows them
_PROMPTS = 4  # the number of prompts that a message names
_LONGEST = 60  # characters of each


def whereabouts(batch: RewardBatch, prompts: Sequence[Text] = ()) -> str:
    """Such as "in step 3, at a response to 'Name a colour.'".

    Args:
        batch: what was judged.
        prompts: those whose responses are known, or likely, to have caused the failure; without any it may be each.
    """
    named = list(dict.fromkeys(map(shown, prompts or batch.prompts)))
    at = f"{'at a response' if len(named) == 1 else 'among the responses'} to {first_of(named)}"
    return f"in {batch.place}, {at}" if batch.place else at


def first_of(named: Sequence[str]) -> str:
    """The first few of some prompts, as ``shown`` gives them, and how many there are besides."""
    more = len(named) - _PROMPTS
    return ", ".join(named[:_PROMPTS]) + (f" and {more} more prompt{'s' if more > 1 else ''}" if more > 0 else "")


def shown(prompt: Text) -> str:
    """The beginning of a prompt on one line, in quotes; of a conversation the beginning of its last message."""
    text = " ".join(plain_text(prompt if isinstance(prompt, str) else prompt[-1:]).split())
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + " ...")


def prompts_of_error(batch: RewardBatch, error: BaseException) -> list[Text]:
    """The prompts of the responses that the code which raised ``error`` was at; [] where that cannot be told.

    Our own frames know the batch alone, and names that a completion may happen to be.
    """
    if _NAMED in vars(error):
        return list(vars(error)[_NAMED])
    return _prompts_in(batch, reversed([*_frames(error.__traceback__)]))


def with_prompts(error: E, prompts: Sequence[Text]) -> E:
    """The same error, of which ``prompts_of_error`` will say that responses to these prompts caused it."""
    vars(error)[_NAMED] = prompts
    return error


def prompts_of_call(batch: RewardBatch, frame: FrameType | None) -> list[Text]:
    """The same of a call that still goes on, by its innermost frame."""
    return _prompts_in(batch, _outwards(frame))


def own_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of code that is neither ours nor of an installed package, from ``frame`` outwards."""
    return next((each for each in _outwards(frame) if not each.f_code.co_filename.startswith(_NOT_OWN)), None)


def _prompts_in(batch: RewardBatch, frames: Iterator[FrameType]) -> list[Text]:
    """The prompts of the rows whose texts are variables of the innermost of the frames that holds any of them.

    A frame that holds a completion alone, or a prompt alone, names the rows that have it.
    """
    for frame in frames:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            continue
        held = [value for value in frame.f_locals.values() if type(value) in (str, list, dict) and value]
        completions, prompts = _rows_with(batch.completions, held), _rows_with(batch.prompts, held)
        if found := completions & prompts or completions or prompts:
            return [batch.prompts[row] for row in sorted(found)]
    return []


def _rows_with(texts: Sequence[Text], held: Sequence[Any]) -> set[int]:
    """The rows whose text, or whose only message, is among the values that a frame holds."""
    rows = set()
    for row, text in enumerate(texts):
        message = text[0] if isinstance(text, list) and len(text) == 1 else text
        if any(_equal(value, text) or _equal(value, message) for value in held):
            rows.add(row)
    return rows


def _equal(value: Any, text: Any) -> bool:
    """Whether a variable is this text. One that holds tensors, say, may be no truth value, and is another one."""
    try:
        return type(value) is type(text) and bool(value == text)
    except Exception:
        return False


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
