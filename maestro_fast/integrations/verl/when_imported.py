"""Runs a function when a module of verl is imported for the first time, without importing it now.

verl loads its plugins in every one of its processes, most of which never need them. So the plugin waits until verl
imports the module that it extends. Only the standard library is used here: whatever is missing in an environment, the
plugin itself can be loaded, and can say later what is missing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Hook = Callable[[ModuleType], None]
_waiting: dict[str, Hook] = {}
_sought: set[str] = set()  # the names that the finder is asking the other finders for


def when_imported(name: str, hook: Hook) -> None:
    """Calls ``hook(module)`` once, right after the module ``name`` has run, or now if it has been imported already.

    A second hook for the same name replaces one that still waits, so it does no harm to register twice. What the hook
    raises fails the import.
    """
    if name in sys.modules and not getattr(sys.modules[name].__spec__, "_initializing", False):
        hook(sys.modules[name])
        return
    _waiting[name] = hook
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds a module that somebody waits for as all other finders would, and wraps its loader."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _waiting or name in _sought:
            return None
        _sought.add(name)  # The search comes through here again.
        try:
            spec = importlib.util.find_spec(name)
        finally:
            _sought.remove(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs a module by its own loader, and the hook that waits for it after that."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # Readers of sources and resources ask this one.
        self._loader.exec_module(module)
        hook = _waiting.get(module.__name__)
        if hook is not None:
            hook(module)
            _waiting.pop(module.__name__, None)  # Not before: if the hook fails, so does the next import.
