"""The most tensor memory that is alive at once, counted operation by operation; the same on every device."""

from __future__ import annotations

from maestro_fast.starting.activations import LiveMemory

__all__ = ["LiveMemory"]
