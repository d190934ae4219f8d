"""Finds methods of a user's own class that would keep ours from running, or that ours would keep from running.

A class of the user's stands before ours, ``class Mine(MaestroGRPOTrainer)``, or behind it, ``class
Mine(MaestroGRPOMixin, MyGRPOTrainer)``. What stands before ours has to call on, or ours never runs. Ours calls on for
what stands behind it, with two exceptions: another loss than TRL's replaces ``_compute_loss``, and a profile that is
not TRL's replaces the advantages. ``refuse`` refuses both.

| method of TRL | what ours does | a user's before ours | a user's behind ours |
|---|---|---|---|
| ``_generate_and_score_completions`` | calls it, then sets advantages | has to call on | is called; see above |
| ``_calculate_rewards`` | calls it, then asks for weights | has to call on | is called |
| ``_save_checkpoint``, ``_load_optimizer_and_scheduler`` | adds the policy | has to call on | is called |
| ``_generate`` | calls it and keeps the token ids for hidden states | has to call on for these | is called |
| ``_get_per_token_logps_and_entropies`` | calls it, reading hidden states | costs a forward | is called |
| ``_prepare_inputs`` | calls it, then regroups the micro-batches, see ``sharing`` | they stay TRL's | the same |
| ``compute_loss`` | nothing; TRL's calls ``_compute_loss`` | has to call on for a loss of ours | the same |
| ``_compute_loss`` | calls it with ``loss="trl"`` | has to call on for a loss of ours | refused with a loss of ours |

The methods that only TRL's ``_compute_loss`` calls (``get_high_entropy_mask``, ``get_off_policy_mask``,
``get_gamma_weights``, ``compute_liger_loss``) serve settings that a loss of ours refuses. That loss does not go by
``_get_per_token_logps_and_entropies`` where it reads hidden states, so a user's own one keeps it from doing so.
"""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

_OURS = "maestro_fast."
_KNOWN = (_OURS, "trl.trainer.", "transformers.")
_READS = ("BINARY_SUBSCR", "BINARY_OP", "CALL")  # what follows a key that is read


class Override(NamedTuple):
    """A method of a class that is neither TRL's trainer nor ours.

    Attributes:
        name: the class and the method, for messages.
        before_ours: whether its class stands before ours among the bases.
        words: the names and the strings in its code.
        sets_advantages: whether its code, or that of another method of the user's that it calls, may change the entry
            "advantages" of a batch. What functions outside the class do is not seen.
    """

    name: str
    before_ours: bool
    words: frozenset[str]
    sets_advantages: bool


def overrides(trainer: Any, method: str) -> list[Override]:
    """The methods of this name in classes that are neither TRL's trainer nor ours, in the order in which they run."""
    bases = type(trainer).__mro__
    ours = next(i for i, base in enumerate(bases) if base.__module__.startswith(_OURS))
    return [
        _override(f"{base.__name__}.{method}", i < ours, vars(base)[method], type(trainer))
        for i, base in enumerate(bases)
        if method in vars(base) and not f"{base.__module__}.".startswith(_KNOWN)
    ]


def _override(name: str, before_ours: bool, method: Any, owner: type) -> Override:
    codes = list(_codes(method))
    words = frozenset(word for code in codes for word in _words(code))
    helpers = [code for word in words for code in _codes(getattr(owner, word, None)) if not _is_known(owner, word)]
    reached = words.union(*map(_words, helpers))
    return Override(name, before_ours, words, "advantages" in reached and any(map(_may_change, [*codes, *helpers])))


def _is_known(owner: type, name: str) -> bool:
    """Whether a method stands in TRL's trainer, in transformers' or here."""
    return f"{getattr(getattr(owner, name), '__module__', '')}.".startswith(_KNOWN)


def hides_ours(trainer: Any, *methods: str) -> str | None:
    """The first of these methods that stands before ours and does not call on, or None.

    A method calls on if its code has its own name in it, as ``super()._generate(prompts)`` has.
    """
    for method in methods:
        for found in overrides(trainer, method):
            if found.before_ours and method not in found.words:
                return found.name
    return None


def other_loss(trainer: Any) -> str | None:
    """The user's method that is the loss in the place of ours, or that ours would replace; None if there is none."""
    for found in overrides(trainer, "compute_loss"):
        if found.words.isdisjoint({"compute_loss", "_compute_loss"}):
            return found.name
    replaced = (found.name for found in overrides(trainer, "_compute_loss") if not found.before_ours)
    return hides_ours(trainer, "_compute_loss") or next(replaced, None)


def other_advantages(trainer: Any) -> str | None:
    """The user's method behind ours that changes the advantages, which TRL alone would have left as it made them.

    A method that only reads them, for a log of its own, is none.
    """
    for found in overrides(trainer, "_generate_and_score_completions"):
        if not found.before_ours and found.sets_advantages:
            return found.name
    return None


def _codes(method: Any) -> Iterator[CodeType]:
    """The code of a method and of the functions inside it; none of what is no function."""
    codes: list[Any] = [getattr(inspect.unwrap(method), "__code__", None)] if callable(method) else []
    while codes:
        code = codes.pop()
        if isinstance(code, CodeType):
            codes.extend(code.co_consts)
            yield code


def _words(code: CodeType) -> Iterator[str]:
    """The names and the strings in a code."""
    yield from code.co_names
    for constant in code.co_consts:
        for item in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(item, str):
                yield item


def _may_change(code: CodeType) -> bool:
    """Whether a code does more with a batch than to read entries of it.

    It does if it stores an entry, has an operator such as ``*=`` or a tensor method such as ``mul_``, or uses the name
    "advantages" in another way than ``batch["advantages"]`` or ``batch.get("advantages")``. In doubt the answer is yes.
    """
    if any("advantages" in constant for constant in code.co_consts if isinstance(constant, tuple)):
        return True  # It is the name of a keyword argument, or one of several keys.
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]
    for step, following in itertools.pairwise(steps):
        if step.opname == "STORE_SUBSCR" or (step.opname == "BINARY_OP" and step.argrepr.endswith("=")):
            return True
        if step.argval == "advantages" and following.opname not in _READS:
            return True
    return any(name.endswith("_") and not name.startswith("_") for name in code.co_names)
