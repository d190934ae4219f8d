"""Lets accelerate shard a model over processes of a CPU, as it does over GPUs.

accelerate looks at its FSDP plugin only where the processes have accelerators. On a CPU it wraps the model in DDP,
whatever the plugin says. All that comes after that choice (``fully_shard``, gloo, the states of checkpoints) runs on a
CPU as well.
"""

from __future__ import annotations

from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState


def shard_on_cpu() -> None:
    """Makes accelerate take its FSDP plugin on a CPU, in this process and for the rest of its life."""
    init = AcceleratorState.__init__

    def with_plugin(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_plugin  # type: ignore[method-assign]
