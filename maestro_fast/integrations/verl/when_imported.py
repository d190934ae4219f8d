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
        hook = _waiting.pop(name, None)  # Taken out first: the search below comes through here again.
        if hook is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            _waiting[name] = hook
            return spec
        spec.loader = _Loader(spec.loader, hook)
        return spec


class _Loader(Loader):
    """Runs a module by its own loader, and the hook after it."""

    def __init__(self, loader: Loader, hook: Hook) -> None:
        self._loader, self._hook = loader, hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # Readers of sources and resources ask this one.
        self._loader.exec_module(module)
        self._hook(module)
