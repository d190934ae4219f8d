"""Shared prompts by kernels that skip the pairs which do not see each other: merged varlen calls, and FlexAttention.

No CPU runs the varlen kernel: SDPA's own stands in for the two ops behind it (``PlainOps``), forward and backward. The
tests marked ``gpu`` run the kernels themselves.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from maestro_fast.model import merged_attention as merged_page
from maestro_fast.model.attention import VARLEN, attention_paths, bounds_mask, use_attention, varlen_attention
from maestro_fast.model.flex_tree import FlexTree, flex_tree_attention
from maestro_fast.model.forward import last_hidden
from maestro_fast.model.layout_trial import choose_layout
from maestro_fast.model.layouts import Layouts
from maestro_fast.model.merged_attention import Pieces, merged_attention
from maestro_fast.model.rows import Sequences, Trees, rows_of
from maestro_fast.model.shared_attention import shared_inputs, tree_mask
from tests.model.plain_kernels import PlainKernels, PlainOps
from tests.model.shared_cases import MIXED, SMALL, WINDOW, batch, errors, found, lively, model_of, truth

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNEL = Layouts("varlen", "always", kernel=True)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
HEADS, KEY_HEADS, SIZE, SCALE = 4, 2, 8, 0.4


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> PlainOps:
    return PlainOps.installed(monkeypatch)


def groups(*lengths: tuple[int, list[int]]) -> Sequences:
    """For each (prompt, completions), in tokens, a group of responses to a prompt of its own."""
    prompts = [[1 + i] * prompt for i, (prompt, completions) in enumerate(lengths) for _ in completions]
    return Sequences(prompts, [[90 + i] * n for _, completions in lengths for i, n in enumerate(completions)])


RAGGED = groups((9, [5, 0, 1, 12]), (1, [3]), (6, [0]), (17, [0, 2, 2]), (4, [1]))
BATCHES = {
    "ragged": RAGGED,
    "one group": groups((7, [3, 4, 2])),
    "no completions": groups((5, [0]), (3, [0])),
    "single tokens": groups((1, [1, 1]), (1, [1])),
}


def row_of(sequences: Sequences) -> tuple[Trees, Tensor]:
    """The trees of a row, and the place of each token."""
    rows = rows_of(sequences, "shared", one_row=True)
    assert rows.trees is not None and rows.place_T is not None and len(rows.input_ids) == 1
    return rows.trees, rows.place_T


def pieces_of(trees: Trees, device: torch.device = CPU) -> Pieces:
    return Pieces.of(trees.starts, trees.parents, trees.ends_RL.shape[1], device)


def tensors(tokens: int, dtype: torch.dtype, size: int = SIZE, device: torch.device = CPU) -> list[Tensor]:
    """Queries, keys and values [T, H, D]."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, size) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def dense(query: Tensor, key: Tensor, value: Tensor, sees_TT: Tensor, softcap: float | None = None) -> Tensor:
    """Attention of all pairs, [T, H, D]."""
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 0) for x in (k, v))
    scores = q @ k.mT * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~sees_TT, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def padded(query: Tensor, key: Tensor, value: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """SDPA over each sequence alone, one after the other."""
    out = []
    for place in places:
        q, k, v = (x[place].transpose(0, 1)[None] for x in (query, key, value))
        attend = nn.functional.scaled_dot_product_attention
        out.append(attend(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


def outputs(attend: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    """What an attention gives for all tokens of the sequences, and the gradients of a weighted sum of it."""
    out_THD = attend(*inputs)
    weights = torch.arange(out_THD.numel(), device=out_THD.device).cos().view_as(out_THD)
    gradients = torch.autograd.grad((out_THD * weights.to(out_THD.dtype)).sum(), inputs)
    return {"out": out_THD.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}


def gaps(values: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, relative to the largest value of the exact one."""
    worst = {name: (value.double() - exact[name]).abs().max() for name, value in values.items()}
    return {name: (gap / exact[name].abs().max().clamp(min=1e-30)).item() for name, gap in worst.items()}


def assert_as_exact_as_padded(sequences: Sequences, dtype: torch.dtype, size: int, device: torch.device) -> None:
    """Compares with float64: the error of merged calls is at most twice that of padded sequences, plus a rounding."""
    trees, place_T = row_of(sequences)
    place_T = place_T.to(device)
    places, pieces = place_T.split(sequences.lengths), pieces_of(trees, device)
    inputs = tensors(trees.ends_RL.shape[1], dtype, size, device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    sees_TT = tree_mask(trees, device)[0, 0]
    expected = outputs(lambda *qkv: dense(*qkv, sees_TT)[place_T], exact)
    ours = gaps(outputs(lambda *qkv: merged_attention(*qkv, pieces, SCALE)[place_T], inputs), expected)
    theirs = gaps(outputs(lambda *qkv: padded(*qkv, places), inputs), expected)

    for name, error in ours.items():
        assert error <= 2 * theirs[name] + torch.finfo(dtype).eps / 2, (name, error, theirs[name])


# --- two merged calls ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BATCHES)
def test_merged_calls_are_as_exact_as_padded_sequences(ops: PlainOps, name: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_padded(BATCHES[name], dtype, SIZE, CPU)
    assert {call[1:3] for call in ops.calls} == {(HEADS, KEY_HEADS if merged_page._TAKES_GROUPS else HEADS)}


def test_one_call_takes_every_piece_and_the_other_prompts_that_have_completions(ops: PlainOps) -> None:
    trees, _ = row_of(RAGGED)
    out = merged_attention(*tensors(trees.ends_RL.shape[1], torch.float32), pieces_of(trees), SCALE)
    out.sum().backward()

    # In the order of the row: its prompts have 9, 1, 6, 17 and 4 tokens.
    own = [9, 5, 1, 12, 1, 3, 6, 17, 2, 2, 4, 1]
    bounds = torch.tensor([0, *own]).cumsum(0).tolist()
    over = [0, 18, 21, 25, 26], [0, 9, 10, 27, 31]
    assert [call[3:] for call in ops.calls] == [(bounds, bounds), over] * 2
    assert [call[0] for call in ops.calls] == ["forward"] * 2 + ["backward"] * 2


def test_a_kernel_without_grouped_heads_gets_as_many_key_heads(ops: PlainOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_page, "_TAKES_GROUPS", False)
    assert_as_exact_as_padded(BATCHES["one group"], torch.float32, SIZE, CPU)
    assert {call[1:3] for call in ops.calls} == {(HEADS, HEADS)}


def test_compilers_and_checkpointing_take_the_ops_as_they_are(ops: PlainOps) -> None:
    trees, _ = row_of(RAGGED)
    inputs, pieces = tensors(trees.ends_RL.shape[1], torch.float32), pieces_of(trees)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (*inputs, pieces.tables, pieces.lengths, SCALE)
    torch.library.opcheck(merged_page._merged, given, test_utils=checks)
    compiled: Any = torch.compile(merged_attention, backend="aot_eager", fullgraph=True)

    expected = outputs(lambda *qkv: merged_attention(*qkv, pieces, SCALE), inputs)
    for name, value in outputs(lambda *qkv: compiled(*qkv, pieces, SCALE), inputs).items():
        assert torch.equal(value, expected[name]), name


# --- whole models ---


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements of a tensor that an op returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def with_kernel(name: str) -> Any:
    model = model_of(name)
    use_attention(model, VARLEN)
    return model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["eval", "checkpointing"])
@pytest.mark.parametrize("name", ["qwen3", "llama, tied"])
def test_models_are_as_exact_as_with_padded_rows(ops: PlainOps, name: str, checkpointing: bool) -> None:
    model = with_kernel(name)
    if checkpointing:
        model.train().activation_checkpointing_enable()
    expected = truth(model_of(name), batch())
    theirs = errors(found(model_of(name), batch(), "padded"), expected)

    for value, error in errors(found(model, batch(), KERNEL), expected).items():
        assert error <= 2 * theirs[value] + 2**-21, (value, error, theirs[value])
    forwards = [call for call in ops.calls if call[0] == "forward"]
    assert len(forwards) == (8 if checkpointing else 4)  # Two layers make two calls each, and again when recomputed.


def test_no_mask_of_all_pairs_is_built(ops: PlainOps) -> None:
    sequences = groups((150, [40, 60, 30]), (90, [20]))
    with torch.no_grad(), LargestTensor() as largest:
        last_hidden(with_kernel("llama, tied"), sequences, KERNEL)
        tokens = rows_of(sequences, "shared", one_row=True).input_ids.numel()
        assert largest.numel < tokens**2 // 2
        last_hidden(model_of("llama, tied"), sequences, Layouts("padded", "always", kernel=True))  # SDPA needs one.
    assert largest.numel >= tokens**2


def test_no_response_sees_another(ops: PlainOps) -> None:
    model, one, other = with_kernel("qwen3"), batch(), batch()
    other.completion_ids[5] = [3 + (token + 1) % 90 for token in one.completion_ids[5]]
    with torch.no_grad():
        before, after = (last_hidden(model, each, KERNEL).packed().split(one.lengths) for each in (one, other))

    for i in range(len(one)):
        same = torch.equal(before[i], after[i])
        assert same == (i != 5), i
    start = len(one.prompt_ids[5])
    assert torch.equal(before[5][:start], after[5][:start])


@pytest.mark.parametrize("name", ["mistral, window", "qwen3, mixed"])
def test_layers_with_a_window_are_served_by_flex_attention(ops: PlainOps, name: str) -> None:
    expected = truth(model_of(name), batch())["states"]
    with torch.no_grad():
        states = {
            "ours": last_hidden(with_kernel(name), batch(), KERNEL).packed(),
            "padded": last_hidden(model_of(name), batch(), "padded").packed(),
        }
    error = gaps(states, dict.fromkeys(states, expected))
    assert error["ours"] <= 2 * error["padded"] + 2**-21
    # All of Mistral's layers have the window, and one of the other model's two.
    assert len(ops.calls) == (0 if name.startswith("mistral") else 2)


def test_a_window_that_hides_nothing_needs_no_flex_attention(ops: PlainOps) -> None:
    model, longest = with_kernel("mistral, window"), max(batch().lengths)
    for window, calls in ((longest, 4), (longest - 1, 0)):
        ops.calls.clear()
        model.config.sliding_window = window
        with torch.no_grad():
            last_hidden(model, batch(), KERNEL)
        assert len(ops.calls) == calls


def test_the_trial_confirms_the_kernels_or_says_what_they_cannot_do(
    ops: PlainOps, kernels: PlainKernels, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "maestro_fast"):
        layouts = choose_layout(with_kernel("qwen3"), "auto")
        assert (layouts.plain, layouts.sharing, layouts.kernel) == ("varlen", "auto", True)
        # Without a GPU, FlexAttention has no backward.
        assert choose_layout(with_kernel("mistral, window"), "auto").sharing == "never"
    assert "cannot: NotImplementedError: FlexAttention does not support backward on CPU" in caplog.text


def test_rows_side_by_side_are_served_by_sdpa() -> None:
    sequences, layouts = groups((9, [5, 4]), (9, [4, 5])), Layouts("padded", "always")
    assert len(layouts.rows_of(sequences).input_ids) == 2
    states = last_hidden(with_kernel("qwen3"), sequences, layouts).packed()
    torch.testing.assert_close(states, last_hidden(model_of("qwen3"), sequences, layouts).packed(), rtol=0, atol=0)


# --- FlexAttention ---


def long_row() -> Trees:
    """A row of several blocks: prompts and completions of less and of more than a block, and of whole blocks."""
    return row_of(groups((300, [200, 7, 150]), (128, [256, 128]), (3, [1, 40])))[0]


def flex_tree(trees: Trees) -> FlexTree:
    return FlexTree(trees.ends_RL[0].int(), trees.positions_RL[0].int())


@pytest.mark.parametrize("window", [None, 1, 40, 200])
def test_blocks_hold_all_pairs_that_see_each_other(window: int | None) -> None:
    trees = long_row()
    sees_TT = tree_mask(trees, CPU, window)[0, 0]
    mask = flex_tree(trees).mask(window)
    own = create_block_mask(lambda b, h, q, k: sees_TT[q, k], None, None, *sees_TT.shape, device="cpu")

    def listed(counts: Tensor, indices: Tensor) -> Tensor:
        found = torch.zeros(counts.shape[-1], indices.shape[-1], dtype=torch.bool)
        for row, count in enumerate(counts[0, 0].tolist()):
            found[row, indices[0, 0, row, :count].long()] = True
        return found

    def of(mask: Any) -> tuple[Tensor, Tensor]:
        return listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)

    some, every = of(mask)
    needed, full = of(own)
    assert not (every & ~full).any()  # All pairs of a block without a mask see each other.
    assert not ((needed | full) & ~(some | every)).any() and not (some & every).any()
    if window is None:
        assert torch.equal(every, full) and torch.equal(some, needed)
    else:  # Where pieces meet in a block, a few blocks are computed for nothing.
        assert (some | every).sum() < (8 * (needed | full).sum() + 30) // 4


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 1.5), (40, 1.5)])
def test_flex_attention_equals_a_dense_mask(window: int | None, softcap: float | None) -> None:
    trees = row_of(groups((50, [40, 7, 50]), (3, [1, 4])))[0]
    inputs = [x.detach() for x in tensors(trees.ends_RL.shape[1], torch.float32)]
    query, key, value = (x.transpose(0, 1)[None] for x in inputs)
    out = flex_tree_attention(query, key, value, flex_tree(trees), window, softcap, SCALE)[0].transpose(0, 1)

    sees_TT = tree_mask(trees, CPU, window)[0, 0]
    torch.testing.assert_close(out, dense(*inputs, sees_TT, softcap), rtol=0, atol=2e-6)


def test_deeper_trees_are_served_by_flex_attention() -> None:
    stem = list(range(3, 40))
    rows = rows_of(Sequences([[*stem, 41, 42], [*stem, 43], [*stem, 43]], [[44, 45], [46], [47, 48]]), "shared")
    assert rows.trees is not None and rows.trees.depth == 3 and len(rows.input_ids) == 1
    given = shared_inputs(rows.trees, model_of("qwen3").config, VARLEN, torch.float32, CPU, kernel=True)
    inputs = [x.detach() for x in tensors(rows.input_ids.numel(), torch.float32)]
    query, key, value = (x.transpose(0, 1)[None] for x in inputs)
    out, _ = varlen_attention(nn.Linear(1, 1), query, key, value, scaling=SCALE, **given)

    torch.testing.assert_close(out[0], dense(*inputs, tree_mask(rows.trees, CPU)[0, 0]), rtol=0, atol=2e-6)


# --- what is refused, and what is said ---


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dropout": 0.1}, "Linear asks for dropout, which maestro_varlen does not do"),
        ({"s_aux": torch.zeros(4)}, "asks for s_aux,"),
        ({"is_causal": False}, "asks for is_causal=False,"),
        ({"sliding_window": 4}, "sliding_window: a layer has one, expected its length in the config's sliding_window"),
        ({"attention_mask": None}, r"got sequence bounds without bounds_mask\(\), or that mask"),
        ({"shared_row": None}, r"got sequence bounds without bounds_mask\(\), or that mask"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused(ops: PlainOps, change: dict[str, Any], complaint: str) -> None:
    trees, _ = row_of(RAGGED)
    given = shared_inputs(trees, model_of("qwen3").config, VARLEN, torch.float32, CPU, kernel=True)
    query, key, value = (x.transpose(0, 1)[None] for x in tensors(trees.ends_RL.shape[1], torch.float32))
    given |= {"query": query, "key": key, "value": value}
    assert torch.equal(given["attention_mask"], bounds_mask())
    assert varlen_attention(nn.Linear(1, 1), **given)[0].shape == (1, trees.ends_RL.shape[1], HEADS, SIZE)
    with pytest.raises(ValueError, match=complaint):
        varlen_attention(nn.Linear(1, 1), **{**given, **change})


def test_a_kernel_with_other_arguments_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def shared_path(device: torch.device) -> str:
        path = next(path for path in attention_paths(device) if path.name == "shared")
        assert path.obstacle is None
        return path.what

    assert "SDPA, a mask of every row" in shared_path(CPU)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    assert "two calls merged; FlexAttention for sliding windows" in shared_path(CUDA)
    monkeypatch.setattr(merged_page, "_inputs_of", lambda name: ["query", "new"])
    assert "FlexAttention, one row (torch_attn::_varlen_attn of torch" in shared_path(CUDA)
    assert "takes query, new)" in shared_path(CUDA)
    given = shared_inputs(row_of(RAGGED)[0], model_of("qwen3").config, VARLEN, torch.float32, CPU, kernel=True)
    assert given["shared_row"].pieces is None


# --- the kernels themselves ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BATCHES)
def test_the_real_kernel_is_as_exact_as_padded_sequences(name: str) -> None:
    assert_as_exact_as_padded(BATCHES[name], torch.bfloat16, 64, CUDA)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16)),
        lambda: MistralForCausalLM(MistralConfig(**SMALL, **WINDOW, head_dim=16)),
        lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, **MIXED, head_dim=16)),
    ],
    ids=["full", "windows", "mixed"],
)
def test_models_on_a_gpu_share_prompts(make: Callable[[], Any]) -> None:
    """A head of 16 numbers is the smallest that FlexAttention's kernel takes."""
    rounded = lively(make()).to(torch.bfloat16)
    model, plain = copy.deepcopy(rounded).to(CUDA), copy.deepcopy(rounded).to(CUDA)
    use_attention(model, VARLEN)
    layouts = choose_layout(model, "always")
    assert layouts.kernel
    expected = truth(rounded, batch())
    ours, theirs = found(model, batch(), layouts), found(plain, batch(), "padded")
    padded_errors = errors({name: value.cpu() for name, value in theirs.items()}, expected)
    for name, error in errors({name: value.cpu() for name, value in ours.items()}, expected).items():
        assert error <= 2 * padded_errors[name] + 2**-7, (name, error, padded_errors[name])
