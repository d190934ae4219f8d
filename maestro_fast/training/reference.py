"""The reference policy of the KL: a frozen copy of the model, or the model with its adapters off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from torch import nn

from maestro_fast.training.head import LanguageHead, head_of

Reference = Callable[[], contextlib.AbstractContextManager[tuple[nn.Module, LanguageHead]]]


def frozen_copy(model: Any) -> nn.Module | None:
    """A copy as the model is now; None where adapters can be switched off instead."""
    if hasattr(model, "disable_adapter"):
        return None
    frozen: nn.Module = copy.deepcopy(model).requires_grad_(False).eval()
    return frozen


def reference_policy(model: Any, frozen: nn.Module | None, accelerator: Accelerator) -> Reference:
    """Opens to the reference model and its head."""
    if frozen is not None:
        prepared = accelerator.prepare_model(frozen.to(accelerator.device), evaluation_mode=True)
        opened = (prepared, head_of(prepared))
        return lambda: contextlib.nullcontext(opened)

    @contextlib.contextmanager
    def without_adapter() -> Iterator[tuple[nn.Module, LanguageHead]]:
        with model.disable_adapter():
            yield model, head_of(model)

    return without_adapter
