"""Which layout serves a batch: the one that costs least, by the tokens that it computes and the pairs that it compares.

What a forward costs is counted in tokens. A token costs 1 in the linear layers. A pair of a query and a key that the
attention computes costs ``pair_cost``, see ``cost_of_a_pair``. So a prompt of P tokens and its G completions of R
tokens each, in SDPA with a mask, cost

    padded    G (P + R) tokens and, as no row has padding, G (P + R)^2 / 2 pairs
    packed    the same; but (P + R)^2 pairs a row where rows hold several sequences, as a mask then keeps these apart
    shared    P + G R tokens and (P + G R)^2 pairs

and kernels that skip the pairs which do not see each other count only those that do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from maestro_fast.model.attention import Layout
from maestro_fast.model.rows import Rows, Sequences, rows_of

Sharing = Literal["auto", "always", "never"]


@dataclass
class TokenCount:
    """How many tokens the forwards of a run have computed.

    Attributes:
        computed: the tokens of the models' inputs, without padding.
        of_sequences: the tokens of the sequences, each with a prompt of its own. It is larger by what is shared.
    """

    computed: int = 0
    of_sequences: int = 0

    def pop(self) -> TokenCount:
        """Returns the count and begins again at 0."""
        found = TokenCount(self.computed, self.of_sequences)
        self.computed = self.of_sequences = 0
        return found


@dataclass(frozen=True)
class Layouts:
    """The layouts that serve a model, and what decides between them.

    Attributes:
        plain: the layout in which each sequence has a prompt of its own.
        sharing: whether the layout ``shared`` serves where it costs less ("auto"), always, or never.
        pair_cost: what a pair of query and key costs, in tokens.
        kernel: whether the attention takes ``shared`` rows as one row and skips the pairs that do not see each other.
        count: the tokens of all forwards so far.
    """

    plain: Layout
    sharing: Sharing = "never"
    pair_cost: float = 0.0
    kernel: bool = False
    count: TokenCount = field(default_factory=TokenCount, compare=False)

    def rows_of(self, sequences: Sequences) -> Rows:
        """Lays sequences out as rows of the layout that serves them best."""
        if self.sharing == "never" or (self.sharing == "auto" and len(sequences) == 1):
            rows = rows_of(sequences, self.plain)
        else:
            rows = rows_of(sequences, "shared", one_row=self.kernel, pair_cost=0.0 if self.kernel else self.pair_cost)
            if self.sharing == "auto":
                plain = rows_of(sequences, self.plain)
                rows = min(plain, rows, key=self.cost)
        of_sequences = sum(sequences.lengths)
        self.count.of_sequences += of_sequences
        self.count.computed += of_sequences if rows.trees is None else rows.trees.tokens
        return rows

    def cost(self, rows: Rows) -> float:
        """What a forward of these rows costs, in tokens."""
        count, width = rows.input_ids.shape
        if rows.trees is not None:
            pairs = rows.trees.pairs if self.kernel else count * width**2
        elif rows.bounds:
            lengths = rows.bounds["cu_seq_lens_q"].diff().double()
            pairs = int((lengths**2).sum() / 2)
        elif _each_row_is_one_sequence(rows):
            pairs = count * width**2 // 2
        else:
            pairs = count * width**2
        return count * width + self.pair_cost * pairs


def _each_row_is_one_sequence(rows: Rows) -> bool:
    """Whether no row has padding or a second sequence. SDPA then gets no mask and skips the pairs that are not seen."""
    if rows.attention_mask is not None:
        return bool(rows.attention_mask.all())
    return bool((rows.position_ids == torch.arange(rows.position_ids.shape[1])).all())


def cost_of_a_pair(config: Any) -> float:
    """What a pair of query and key costs in the attention of a model, in tokens, from the model's text config.

    In a layer with H heads of D, H_kv of them for keys, a hidden size of d and an MLP of width I, a pair costs 4 H D
    operations, and a token 2 for each weight of its linear layers: 2 d D (H + H_kv) of the attention and 3 d I of the
    MLP (of the experts that a token sees). The operations of the attention are slower than those of a large product, by
    the factor ``_SLOWER``.
    """

    def number(name: str, default: float) -> float:
        return float(getattr(config, name, None) or default)

    size = number("hidden_size", 1024)
    heads = number("num_attention_heads", max(1.0, size / 64))
    head = number("head_dim", size / heads)
    attention = 2 * size * head * (heads + number("num_key_value_heads", heads))
    width = number("moe_intermediate_size", number("intermediate_size", 4 * size)) * number("num_experts_per_tok", 1)
    return _SLOWER * 4 * heads * head / (2 * (attention + 3 * size * width))


# Fitted to the processor time of SmolLM2-135M in 12 groups of up to 2,112 tokens a row, one thread (torch 2.13).
_SLOWER = 1.1
