"""Settings that the tests of the verl plugin share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def verl_config() -> Callable[..., Any]:
    """Makes the config that ``main_ppo`` makes of a command, by Hydra from verl's own files."""
    import verl
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    def make(*command: str) -> Any:
        with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
            found = compose("ppo_trainer", ["actor_rollout_ref.rollout.n=4", *command])
        OmegaConf.resolve(found)
        return found

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets verl and Ray warn of what they will: they do so at their first import in a process."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("verl"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
