"""The reward of the runs, which verl loads from this file: a dict of named rewards beside the score."""

from __future__ import annotations

from typing import Any

NAMES = ("digits", "letters", "brief", "gated")


def compute_score(data_source: str, solution_str: str, ground_truth: str, **kwargs: Any) -> dict[str, float | None]:
    """Three rewards that a random model gets some of, one that abstains from about half of the responses, a utility."""
    size = max(1, len(solution_str))
    named = {
        "digits": sum(c.isdigit() for c in solution_str) / size,
        "letters": sum(c.isalpha() for c in solution_str) / size,
        "brief": 1.0 / size,
        "gated": sum(c.isupper() for c in solution_str) / size if size % 2 else None,
    }
    utility = named["digits"] + 0.1 * named["letters"]
    return {"score": sum(value or 0.0 for value in named.values()), **named, "judge": utility}
