"""The tree of a batch: prompts that several responses share stand in it once, and so go through the model once.

The G responses of a group have their prompt in common, and groups may have the beginning of their prompts in common (a
system prompt). A row of the layout ``shared`` holds one or more trees. A tree's node is a piece of a prompt, its leaves
are completions, and its tokens stand in the row in preorder:

    [system | prompt A | completion 1 | completion 2 | prompt B | completion 3 | completion 4]

So all that descends from a token follows it without a gap. If ``end[j]`` is where the descendants of token j end,
token i descends from j exactly if ``j <= i < end[j]``. That is the whole attention mask: a token sees itself and the
tokens it descends from, which are those that come before it in its own sequence. The position of a token counts from
the beginning of its sequence, as it does without sharing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MIN_COMMON = 16  # Two different prompts share a beginning of at least so many tokens; a shorter one saves nothing.

Ids = list[int]


@dataclass
class Node:
    """A piece of one or more prompts.

    Attributes:
        tokens: the token ids of the piece.
        position: the position of its first token.
        completions: the indices of the sequences whose prompt ends with this piece.
        children: the nodes that go on from here.
    """

    tokens: Ids
    position: int
    completions: list[int] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)

    def size(self, completion_ids: Sequence[Ids]) -> int:
        """The number of tokens of the node and all that descends from it."""
        own = len(self.tokens) + sum(len(completion_ids[i]) for i in self.completions)
        return own + sum(child.size(completion_ids) for child in self.children)


@dataclass(frozen=True)
class Tree:
    """The tokens of a tree in preorder, U of them.

    Attributes:
        ids, positions: the token ids, and their positions in their sequences.
        ends: where the descendants of each token end.
        starts, parents: the first token of each piece (a node or a completion that is not empty), in preorder, and the
            index of the piece that it goes on from; -1 for the root.
        places: for each sequence of the tree, by its index, where its tokens stand, int64 [prompt + completion].
    """

    ids: Ids
    positions: Ids
    ends: Ids
    starts: Ids
    parents: Ids
    places: dict[int, Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def depth(self) -> int:
        """The largest number of pieces from the root to a leaf; a prompt with its completions has 2."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return max(depths, default=0)


def common_prefix(one: Ids, other: Ids) -> int:
    """The number of tokens with which both begin."""
    shortest = min(len(one), len(other))
    if one[:shortest] == other[:shortest]:
        return shortest
    return next(i for i in range(shortest) if one[i] != other[i])


def prompt_families(prompt_ids: Sequence[Ids]) -> tuple[list[list[int]], int]:
    """Puts sequences together whose prompts are equal, or begin alike for at least half of the shorter one.

    Returns:
        The indices of the sequences of each family, those with equal prompts one after another; and the number of
        prompt tokens that a sequence has in common with the one before it in its family.
    """
    order = sorted(range(len(prompt_ids)), key=lambda i: prompt_ids[i])
    families: list[list[int]] = []
    shared = 0
    for i in order:
        own, before = prompt_ids[i], prompt_ids[families[-1][-1]] if families else []
        common = common_prefix(own, before)
        if families and common >= min(len(own), len(before), max(MIN_COMMON, min(len(own), len(before)) // 2)):
            families[-1].append(i)
            shared += common
        else:
            families.append([i])
    return families, shared


def forest(
    prompt_ids: Sequence[Ids], completion_ids: Sequence[Ids], *, pair_cost: float, across_prompts: bool = True
) -> list[Tree]:
    """Builds the trees of a batch: one for each prompt, or for several prompts that begin alike, or for some responses.

    Where every token of a row is compared with every other, the pairs count, too. So prompts join if the tokens that
    they have in common outweigh the pairs by which their common row is larger than two rows, and the completions of a
    prompt are dealt to several trees if the pairs that this saves outweigh the tokens of the prompt.

    Args:
        prompt_ids, completion_ids: those of each sequence. A completion may be empty.
        pair_cost: what a pair of query and key costs, in tokens. 0 if pairs that do not see each other cost nothing.
        across_prompts: whether different prompts may share their beginning.
    """
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompt_ids):
        members[tuple(prompt)].append(i)
    prompts = [list(prompt) for prompt in sorted(members)]
    sizes = [len(p) + sum(len(completion_ids[i]) for i in members[tuple(p)]) for p in prompts]
    trees: list[list[Ids]] = []
    size = 0
    for prompt, own in zip(prompts, sizes, strict=True):
        common = common_prefix(trees[-1][0], prompt) if trees and across_prompts else 0
        joined = size + own - common
        if common >= MIN_COMMON and common > pair_cost * (joined**2 - size**2 - own**2):
            trees[-1].append(prompt)
            size = joined
        else:
            trees.append([prompt])
            size = own
    placed: list[Tree] = []
    for tree in trees:
        parts = [members]
        if len(tree) == 1:
            parts = [
                {tuple(tree[0]): part} for part in _parts(tree[0], members[tuple(tree[0])], completion_ids, pair_cost)
            ]
        placed += [_placed(_node(tree, part, 0), completion_ids) for part in parts]
    return placed


def _parts(prompt: Ids, members: list[int], completion_ids: Sequence[Ids], pair_cost: float) -> list[list[int]]:
    """Deals the completions of a prompt to as many trees, each with the prompt, as cost least together.

    With the prompt's P tokens in each of k trees and S tokens of completions, k equal trees have k P + S tokens and
    (k P + S)^2 / k pairs. That is least at k = S sqrt(c / (P + c P^2)) for a cost c of a pair. Trees are seldom equal,
    and each takes a row as long as the longest. So the numbers around k are compared by what such rows cost.
    """
    own, total = len(prompt), sum(len(completion_ids[i]) for i in members)
    best = round(total * math.sqrt(pair_cost / (own + pair_cost * own**2))) if own else 1
    counts = sorted({max(1, min(len(members), best + step)) for step in (-1, 0, 1)})

    def cost(parts: list[list[int]]) -> float:
        width = own + max(sum(len(completion_ids[i]) for i in part) for part in parts)
        return len(parts) * (width + pair_cost * width**2)

    return min((_dealt(members, completion_ids, count) for count in counts), key=cost)


def _dealt(members: list[int], completion_ids: Sequence[Ids], count: int) -> list[list[int]]:
    """Deals completions to ``count`` parts of about as many tokens; the longest go first, to the lightest part."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in sorted(members, key=lambda i: -len(completion_ids[i])):
        lightest = min(range(count), key=lambda part: (loads[part], len(parts[part])))
        parts[lightest].append(i)
        loads[lightest] += len(completion_ids[i])
    return [sorted(part) for part in parts if part]


def _node(prompts: list[Ids], members: dict[tuple[int, ...], list[int]], position: int) -> Node:
    """The node of sorted, distinct prompts that have their first ``position`` tokens in common, and its descendants."""
    stop = common_prefix(prompts[0], prompts[-1])  # In sorted order these two have the least in common.
    node = Node(prompts[0][position:stop], position)
    branches: dict[int, list[Ids]] = defaultdict(list)
    for prompt in prompts:
        if len(prompt) == stop:
            node.completions = members[tuple(prompt)]
        else:
            branches[prompt[stop]].append(prompt)
    node.children = [_node(branch, members, stop) for branch in branches.values()]
    return node


def _placed(root: Node, completion_ids: Sequence[Ids]) -> Tree:
    tree = Tree([], [], [], [], [], {})
    _place(tree, root, -1, torch.empty(0, dtype=torch.int64), completion_ids)
    return tree


def _place(tree: Tree, node: Node, parent: int, path: Tensor, completion_ids: Sequence[Ids]) -> None:
    """Appends a node and its descendants to the tree. ``path`` has the places of the tokens that it goes on from."""
    piece, path = _append(tree, node.tokens, node.position, parent, path)
    start = len(tree) - len(node.tokens)
    after = node.position + len(node.tokens)
    for i in node.completions:
        _, tree.places[i] = _append(tree, completion_ids[i], after, piece, path)
    for child in node.children:
        _place(tree, child, piece, path, completion_ids)
    tree.ends[start : start + len(node.tokens)] = [len(tree)] * len(node.tokens)


def _append(tree: Tree, tokens: Ids, position: int, parent: int, path: Tensor) -> tuple[int, Tensor]:
    """Appends a piece, whose end is its own. Returns its index, and the places of its sequence up to its end."""
    if not tokens:
        return parent, path
    start = len(tree)
    stop = start + len(tokens)
    tree.ids.extend(tokens)
    tree.positions.extend(range(position, position + len(tokens)))
    tree.ends.extend([stop] * len(tokens))
    tree.starts.append(start)
    tree.parents.append(parent)
    return len(tree.starts) - 1, torch.cat([path, torch.arange(start, stop)])
