"""What an attention that skips the pairs which do not see each other is told of a row of ``shared`` prompts.

transformers hands a keyword of the model's forward that it does not know down to the attention of every layer. So a
``SharedRow`` goes there instead of a mask, and each layer chooses by what it asks for:

1. two merged calls of torch's varlen kernel, where a layer sees whole sequences and trees are prompts with completions;
2. FlexAttention for sliding windows and capped scores, and where torch's kernel cannot be merged.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maestro_fast.model.flex_tree import FlexTree, flex_tree_attention
from maestro_fast.model.merged_attention import Pieces, merged_attention

__all__ = ["SharedRow"]


@dataclass(frozen=True)
class SharedRow:
    """A row of trees, for one forward.

    Attributes:
        pieces: the row for two merged calls; None where FlexAttention has to serve all layers.
        tree: the row for FlexAttention.
        window: the length of the model's sliding window now, in tokens; None if it has none.
        longest: the tokens of the longest sequence.
    """

    pieces: Pieces | None
    tree: FlexTree
    window: int | None
    longest: int

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, *, windowed: bool, softcap: float | None
    ) -> Tensor:
        """Attention of one layer.

        Args:
            query: [1, H, T, D]; key and value are [1, H_kv, T, D], and H is a multiple of H_kv.
            windowed: whether the layer has the model's sliding window.
            softcap: at what the layer caps its scores; None if it does not.

        Returns:
            The output [1, T, H, D].

        Raises:
            ValueError: the layer has a window, and the model's config does not say how long it is.
        """
        if windowed and self.window is None:
            raise ValueError("sliding_window: a layer has one, expected its length in the config's sliding_window")
        # A window as long as the longest sequence hides nothing.
        window = self.window if windowed and self.window is not None and self.window < self.longest else None
        if self.pieces is not None and window is None and softcap is None:
            q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
            return merged_attention(q_THD, k_THD, v_THD, self.pieces, scale)[None]
        return flex_tree_attention(query, key, value, self.tree, window, softcap, scale).transpose(1, 2).contiguous()
