"""The C++ kernels. Arrays come as addresses, 0 for one that is not there; ``maestro_fast/ops`` checks them."""

class AdvantageProfile:
    def __init__(
        self,
        reward_center: int,
        reward_scale: int,
        score_center: int,
        score_scale: int,
        reward_eps: float,
        score_eps: float,
        ddof: int,
        raw_singleton: bool,
        renormalize: bool,
        eps_in_variance: bool,
        /,
    ) -> None:
        """Scopes by the numbers of ``enum class Scope`` in ``csrc/group_advantages.hpp``."""

class Partition:
    def __init__(self, groups: int, batch: int, size: int, offsets: int, order: int, /) -> None:
        """Consecutive groups of ``size``, or with size 0: int64 [groups + 1] and [batch] at these addresses."""

def group_advantages(
    rewards: int,
    bfloat16: bool,
    K: int,
    weights: int,
    weights_per_row: bool,
    kl: int,
    beta: float,
    lengths: int,
    groups: Partition,
    profile: AdvantageProfile,
    advantages: int,
    scores: int,
    normalized: int,
    mean: int,
    std: int,
    degenerate: int,
    threads: int,
    /,
) -> None:
    """Rewards [B, K] float32 or bfloat16, all else float32; see ``ops/group_advantages.py``."""

def balance_sequences(lengths: int, count: int, parts: int, equal_size: bool, /) -> list[list[int]]:
    """Karmarkar-Karp over ``count`` int64 at address ``lengths``; see ``ops/pack_sequences.py``."""

def conductor_weights(
    h: int,
    bfloat16: bool,
    batch: int,
    size: int,
    actions: int,
    mean: int,
    rstd: int,
    weight: int,
    bias: int,
    tau: float,
    min_prob: float,
    alpha: float,
    soft: bool,
    seed: int,
    step: int,
    offset: int,
    weights: int,
    chosen: int,
    log_probs: int,
    entropy: int,
    probs: int,
    threads: int,
    /,
) -> None:
    """h [batch, size] float32 or bfloat16, a linear head; see ``ops/conductor_weights.py``."""

def counterfactual_advantages(
    rewards: int,
    bfloat16: bool,
    K: int,
    weights: int,
    weights_per_row: bool,
    kl: int,
    beta: float,
    action_weights: int,
    actions: int,
    groups: Partition,
    profile: AdvantageProfile,
    out: int,
    threads: int,
    /,
) -> None:
    """Writes [B, actions] float32; see ``ops/counterfactual_advantages.py``."""

def pack_sequences(lengths: int, count: int, max_tokens: int) -> list[list[int]]:
    """First-fit decreasing over ``count`` int64 at address ``lengths``; see ``ops/pack_sequences.py``."""

def number_keys(keys: list[object], group: int, /) -> int:
    """Writes int64 [B], and returns how many different keys there are, or -1 if some are no str."""

def number_session_keys(keys: list[str], skip: int, group: int, session: int, output: int, /) -> tuple[int, int]:
    """Writes three times int64 [B], and returns the number of groups and of sessions; see ``ops/groups.py``.

    ``skip`` is a bool [B], or 0.
    """

def order_by_group(ids: int, batch: int, groups: int, order: int, offsets: int, /) -> int:
    """Writes int64 [batch] and [groups + 1], and returns the size of the largest group; see ``ops/groups.py``."""

def examine_mask(mask: int, type: int, rows: int, width: int, count: int, prefix: int, threads: int, /) -> bool:
    """Writes int64 [rows] and bool [rows]; see ``ops/token_mask.py``."""

def spread_over_tokens(
    values: int, mask: int, type: int, rows: int, width: int, count: int, prefix: int, out: int, threads: int, /
) -> None:
    """Writes [rows, width] float32; see ``ops/token_mask.py``."""

def sum_over_tokens(values: int, rows: int, width: int, out: int, threads: int, /) -> None:
    """Writes [rows] float32; see ``ops/token_mask.py``."""

class LogitRows:
    """Logits [rows, columns] float32 at address ``x``, with targets int64 [rows]; see ``ops/head_rows.py``."""

    def __init__(self, x: int, rows: int, columns: int, stride: int, targets: int, /) -> None: ...

class HeadNumbers:
    """The steps from logits to log-probs. A bias of 0 and a softcap of 0 stand for none."""

    def __init__(self, bias: int, scale: float, softcap: float, temperature: float, ignore_index: int, /) -> None: ...

def row_statistics(
    logits: LogitRows, head: HeadNumbers, logprobs: int, peaks: int, totals: int, entropies: int, threads: int, /
) -> None:
    """Writes float32 [rows] each; ``entropies`` may be 0."""

def dlogits(
    logits: LogitRows,
    head: HeadNumbers,
    peaks: int,
    totals: int,
    entropies: int,
    dlogprobs: int,
    dentropies: int,
    threads: int,
    /,
) -> None:
    """Overwrites the logits with their gradient; ``dentropies`` may be 0, and then ``entropies`` is not read."""
