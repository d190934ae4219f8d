"""A rollout engine named ``hf_cpu``: verl's trainer sends its weights to a Ray actor, which samples with transformers.

verl knows a rollout by two classes: an adapter in the trainer's workers, which hands over the weights, and a replica
in the driver, which starts the servers. One server serves all ranks: ``tensor_model_parallel_size`` is their number.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import wrapt

from tests.integrations.verl.names import ROLLOUT


def _server_name(replica: int) -> str:
    return f"{ROLLOUT}_server_{replica}"


def _register_adapter(base: ModuleType) -> None:
    base._ROLLOUT_REGISTRY[(ROLLOUT, "async")] = f"{__name__}.Adapter"


def _register_replica(replica: ModuleType) -> None:
    import ray

    class Replica(replica.RolloutReplica):
        """Starts the server of a replica."""

        async def launch_servers(self) -> None:
            from tests.integrations.verl.cpu_server import Server

            name, response_tokens = _server_name(self.replica_rank), self.config.response_length
            actor = ray.remote(Server).options(name=name, num_cpus=0)
            self.servers = [actor.remote(self.model_config["path"], response_tokens)]
            self._server_handle, self._server_address = self.servers[0], name  # The address is a mere name.

    replica.RolloutReplicaRegistry.register(ROLLOUT, lambda: Replica)


wrapt.register_post_import_hook(_register_adapter, "verl.workers.rollout.base")
wrapt.register_post_import_hook(_register_replica, "verl.workers.rollout.replica")


def __getattr__(name: str) -> Any:
    """Makes ``Adapter`` when verl asks for it: its base class must not be imported in every process."""
    if name != "Adapter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import ray
    import torch
    from verl.workers.rollout.base import BaseRollout

    class Adapter(BaseRollout):
        """Hands a worker's weights to the server. The first rank of the server's ranks sends them."""

        @property
        def server(self) -> Any:
            return ray.get_actor(_server_name(torch.distributed.get_rank() // self.config.tensor_model_parallel_size))

        async def resume(self, tags: list[str]) -> None:
            """The server never sleeps."""

        async def release(self) -> None:
            """The server never sleeps."""

        async def update_weights(
            self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None, **kwargs: Any
        ) -> None:
            state = {name: tensor.detach().cpu().clone() for name, tensor in weights}  # All ranks gather them.
            if torch.distributed.get_rank() % self.config.tensor_model_parallel_size == 0:
                await self.server.load_weights.remote(state, global_steps)

    return Adapter
