"""The options of sampling."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from maestro_fast.generation import SamplingConfig


def test_defaults_sample_from_the_policy_itself() -> None:
    config = SamplingConfig()
    assert (config.temperature, config.top_p, config.top_k, config.stop) == (1.0, 1.0, 0, [])
    assert config.group_size >= 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 1}, "group_size: 1, expected at least 2"),
        ({"group_size": 0}, "group_size: 0, expected at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0, expected at least 1"),
        ({"temperature": 0.0}, "temperature: 0.0, expected a positive number"),
        ({"temperature": math.nan}, "temperature: nan, expected a positive number"),
        ({"top_p": 0.0}, "top_p: 0.0, expected 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p: 1.1, expected 0 < top_p <= 1"),
        ({"top_p": math.nan}, "top_p: nan, expected 0 < top_p <= 1"),
        ({"top_k": -1}, "top_k: -1, expected at least 0"),
        ({"stop": ["x", ""]}, "stop: holds an empty string"),
    ],
)
def test_errors_name_the_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        SamplingConfig(**options)
