def pack_sequences(lengths: int, count: int, max_tokens: int) -> list[list[int]]:
    """First-fit decreasing over ``count`` int64 at address ``lengths``; see ``ops/pack_sequences.py``."""
