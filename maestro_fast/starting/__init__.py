"""Starting a run: ``maestro-fast init`` writes a config for a model and data, ``maestro-fast check`` tries one."""

from __future__ import annotations
