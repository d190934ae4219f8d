"""The fused adaptive step equals the ops that it is made of, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_fast.kernels import conductor_weights, group_advantages, pool_hidden
from maestro_fast.kernels import maestro_advantages as kernel
from maestro_fast.ops import PROFILES, Groups
from maestro_fast.ops.maestro_advantages import maestro_advantages as reference
from maestro_fast.specs import ConductorChoice, ContextSource, ScoreInputs
from tests.kernels.helpers import DEVICE, DTYPES, INTERPRETED, RUNS, assert_close, counted_launches, on_device, runs
from tests.kernels.test_conductor_weights import head, moved
from tests.kernels.test_group_advantages import RAGGED, inputs

EPSILON = 4e-6  # the error of the Conductor's forward, after two normalisations
SETTINGS: dict[str, Any] = {"tau": 0.7, "min_prob": 0.02, "alpha": 0.3, "seed": 11, "step": 2, "offset": 5}
SIZE = 72


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (pool_hidden, "CHUNK_TOKENS", 8),
        (pool_hidden, "_COLUMNS", 128),
        (conductor_weights, "_LINEAR_SPLIT", 64),
        (conductor_weights, "_HIDDEN_SPLIT", 64),
        (conductor_weights, "_LINEAR_INNER", 32),
        (conductor_weights, "_HIDDEN", 16),
        (conductor_weights, "UNITS", 16),
    ):
        monkeypatch.setattr(module, name, value)


def hidden_states(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Makes packed states [T, d] and lengths [B]. One sequence is empty, and one has three chunks."""
    generator = torch.Generator().manual_seed(batch)
    length_B = torch.randint(1, 12, (batch,), generator=generator)
    length_B[0], length_B[batch // 2] = 19, 0
    flat = torch.randn(int(length_B.sum()), SIZE, generator=generator) * 2 + 0.5
    return flat.to(dtype), length_B


def check(
    source: str, units: int | None, groups: Any, *, name: str = "maestro", soft: bool = False, **options: Any
) -> None:
    batch = 20 if groups == RAGGED else 2 * groups if groups > 4 else 5 * groups
    rewards_BK, _, kl, lengths = inputs(batch, options.get("rewards", 3))
    profile = PROFILES[name]
    params = head(SIZE, rewards_BK.shape[1], units)
    flat, length_B = hidden_states(batch, options.get("dtype", torch.float32))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), length_B.cumsum(0)])
    x = flat[:batch] if source == "context" else flat
    kl_used = kl if profile.kl_in == "score" else None
    counts = lengths if profile.needs_lengths else None
    arguments = on_device(rewards_BK, Groups.of(groups, batch).index_NG, x, bounds, kl_used, counts)
    ours, *others = runs(lambda: launched(arguments, params, profile, source, soft), *arguments)

    def expected(dtype: torch.dtype) -> list[Tensor]:
        more: dict[str, Any] = {} if kl_used is None else {"kl": kl.to(dtype), "beta": 0.1}
        where: dict[str, Any] = (
            {"h": x.to(dtype)}
            if source == "context"
            else {"hidden": flat.to(dtype), "cu_seqlens": bounds, "pool": source}
        )
        mode = "soft" if soft else "sample"
        sample, out = reference(
            rewards_BK.to(dtype),
            moved(params, dtype=dtype),
            groups,
            **where,
            **more,
            **SETTINGS,
            mode=mode,
            profile=profile,
            lengths=counts,
        )
        return [*sample, *out]

    names = [*ours[0]._fields, *ours[1]._fields]
    results = [*ours[0], *ours[1]]
    for what, mine, truth, plain in zip(names, results, expected(torch.float64), expected(torch.float32), strict=True):
        assert_close(mine, truth, plain, epsilon=EPSILON, what=what)
    for again in others:
        for what, mine, same in zip(names, results, [*again[0], *again[1]], strict=True):
            assert torch.equal(mine, same), f"{what} differs between two runs"


def launched(arguments: list[Tensor | None], params: Any, profile: Any, source: Any, soft: bool) -> Any:
    rewards_BK, index_NG, x, bounds, kl, lengths = arguments
    assert rewards_BK is not None and index_NG is not None and x is not None
    return kernel.maestro_advantages(
        rewards_BK,
        moved(params, device=DEVICE),
        ConductorChoice(**SETTINGS, mode="soft" if soft else "sample"),
        index_NG,
        ContextSource(x, source, None if source == "context" else bounds),
        ScoreInputs(kl, 0.0 if kl is None else 0.1, lengths),
        profile,
    )


# In the interpreter, which is slow, ragged groups meet one source.
@pytest.mark.parametrize("units", [None, 24])
@pytest.mark.parametrize(
    ("source", "groups"),
    [
        (x, groups)
        for x in ("context", "last", "mean")
        for groups in (4, RAGGED)
        if not INTERPRETED or x == "mean" or groups == 4
    ],
)
def test_sources_and_heads(source: str, units: int | None, groups: Any) -> None:
    check(source, units, groups)


@pytest.mark.parametrize("groups", [1, 2, 17, 65])
def test_sizes_of_groups(groups: int) -> None:
    check("context", None, groups)


@pytest.mark.parametrize("name", ["grpo", "gdpo", "verl_gdpo", "rloo"])
def test_profiles(name: str) -> None:
    check("context", None, RAGGED, name=name)


@pytest.mark.parametrize("rewards", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_rewards_and_dtypes(rewards: int, dtype: torch.dtype) -> None:
    check("mean", None, 5, rewards=rewards, dtype=dtype)


@pytest.mark.parametrize(
    ("source", "units", "expected"),
    [("context", None, 2), ("last", None, 2), ("last", 24, 3), ("mean", None, 3), ("mean", 24, 4)],
)
def test_launches(source: str, units: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = counted_launches(monkeypatch)
    check(source, units, 4)
    assert len(launches) == RUNS * expected, launches


BATCHES = [
    (80, 5, False, "maestro", 5),
    (80, 16, True, "maestro", 5),
    (40, 20, False, "grpo", 5),
    (80, 40, False, "maestro", 5),
    (80, 5, True, "gdpo", 5),
    (8, 8, False, "maestro", 32),
]


# In the interpreter, which is slow, each batch meets one of the two heads.
@pytest.mark.parametrize(
    ("batch", "groups", "soft", "name", "rewards", "units"),
    [
        (*case, units)
        for i, case in enumerate(BATCHES)
        for j, units in enumerate((24, None))
        if not INTERPRETED or i % 2 == j
    ],
)
def test_the_bits_are_those_of_the_single_launches(
    batch: int, groups: Any, soft: bool, name: str, rewards: int, units: int | None
) -> None:
    """Nobody can tell from the bits which launches were fused."""
    rewards_BK, _, kl, _ = inputs(batch, rewards)
    kl = kl if PROFILES[name].kl_in == "score" else None
    index_NG = Groups.of(groups, batch).index_NG
    profile, params = PROFILES[name], moved(head(SIZE, rewards, units), device=DEVICE)
    x = torch.randn(batch, SIZE, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    rewards_BK, index_NG, kl = on_device(rewards_BK, index_NG, kl)
    assert rewards_BK is not None and index_NG is not None
    choice, beta = ConductorChoice(**SETTINGS, mode="soft" if soft else "sample"), 0.0 if kl is None else 0.1
    sample, out = kernel.maestro_advantages(
        rewards_BK, params, choice, index_NG, ContextSource(x), ScoreInputs(kl, beta, None), profile
    )
    alone = conductor_weights.conductor_weights(x, params, choice)
    after = group_advantages.group_advantages(rewards_BK, alone.weights, index_NG, profile=profile, kl=kl, beta=beta)
    for field, fused, single in zip((*sample._fields, *out._fields), (*sample, *out), (*alone, *after), strict=True):
        assert torch.equal(fused, single), field


@pytest.mark.parametrize(("source", "units"), [("context", None), ("last", 24), ("mean", None)])
def test_a_compiled_step_is_one_graph_with_the_same_bits(source: Any, units: int | None) -> None:
    batch = 20
    rewards_BK, _, kl, _ = inputs(batch, 3)
    flat, length_B = hidden_states(batch)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), length_B.cumsum(0)])
    rewards_BK, kl, flat, bounds = (x.to(DEVICE) for x in (rewards_BK, kl, flat, bounds))
    where = {"h": flat[:batch]} if source == "context" else {"hidden": flat, "cu_seqlens": bounds, "pool": source}
    params, groups = moved(head(SIZE, 3, units), device=DEVICE), Groups.of(4, batch)
    groups.to(torch.device(DEVICE))

    def step() -> Any:
        options = {**where, **SETTINGS, "kl": kl, "beta": 0.1, "mode": "sample"}
        return reference(rewards_BK, params, groups, **options, backend="triton")

    found, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(), step()
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs)
        for name, one, other in zip(theirs._fields, ours, theirs, strict=True):
            assert torch.equal(one, other), name
