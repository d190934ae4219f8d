"""Settings that the tests of the verl plugin share."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets verl and Ray warn of what they will: they do so at their first import in a process."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("verl"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
