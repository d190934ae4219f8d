"""A reward of one's own: any function with the signature of TRL's reward functions."""

import re


def richness(completions: list[str], **columns: object) -> list[float]:
    """Different words of four letters or more in a completion, up to 12, over 12."""
    words = [set(re.findall(r"[a-z]{4,}", text.lower())) for text in completions]
    return [min(len(found), 12) / 12 for found in words]
