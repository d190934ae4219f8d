"""Every kernel compiles for the GPUs that we name, without one, and no register is spilled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from maestro_fast.ops import PROFILES, ConductorParams, Groups, PolicyLossConfig
from maestro_fast.specs import (
    ConductorBatch,
    ConductorChoice,
    ConductorState,
    ConductorUpdateConfig,
    ContextSource,
    HeadSpec,
    LossInputs,
    RowStatistics,
    ScoreInputs,
    SourceKind,
)
from tests.kernels.helpers import INTERPRETED

if not INTERPRETED:
    from tests.kernels.aot import Resources, compiled, recorded

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter takes the place of the compiler")
ARCHITECTURES = [80, 90, 100]  # A100, H100 and H200, B200


def group_advantages() -> Iterator[Callable[[], Any]]:
    from maestro_fast.kernels.group_advantages import group_advantages as launch

    for name, batch, size in [("maestro", 4096, 16), ("gdpo", 512, 8), ("gdpo", 4096, 16), ("verl_gdpo", 4096, 256)]:
        rewards_BK, profile = torch.zeros(batch, 8), PROFILES[name]
        kl = torch.zeros(batch) if profile.kl_in == "score" else None
        lengths = torch.zeros(batch, dtype=torch.int64) if profile.needs_lengths else None
        index_NG = Groups.of(size, batch).index_NG
        yield lambda r=rewards_BK, i=index_NG, p=profile, k=kl, n=lengths: launch(
            r, r, i, profile=p, kl=k, beta=0.5, lengths=n
        )


def pool_hidden() -> Iterator[Callable[[], Any]]:
    from maestro_fast.kernels.pool_hidden import mask_segments
    from maestro_fast.kernels.pool_hidden import pool_hidden as launch

    bounds, limit_B = torch.arange(65) * 16, torch.full((64,), 16)
    for dtype in (torch.bfloat16, torch.float32):
        flat = torch.zeros(1024, 4096, dtype=dtype)
        for where, limit, width in ((bounds, None, None), (bounds, limit_B, 256), (None, limit_B, 512)):
            for mean in (False, True):
                yield lambda x=flat, b=where, n=limit, w=width, m=mean: launch(x, b, n, mean=m, width=w)
    for prompt_B in (None, limit_B):
        yield lambda p=prompt_B: mask_segments(torch.ones(64, 2048, dtype=torch.int64), p)


def head(size: int, rewards: int, units: int | None) -> ConductorParams:
    last = torch.zeros(rewards, size if units is None else units)
    first = (None, None) if units is None else (torch.zeros(units, size), torch.zeros(units))
    return ConductorParams(torch.zeros(size), torch.ones(size), last, torch.zeros(rewards), *first)


def conductor_weights() -> Iterator[Callable[[], Any]]:
    from maestro_fast.kernels.conductor_weights import conductor_weights as launch

    for dtype, units, soft in (
        (torch.bfloat16, None, False),
        (torch.float32, None, True),
        (torch.bfloat16, 256, False),
    ):
        h = torch.zeros(512, 4096, dtype=dtype)
        choice = ConductorChoice(tau=1.0, min_prob=0.05, alpha=0.3, mode="soft" if soft else "sample", seed=2**40)
        yield lambda h=h, u=units, c=choice: launch(h, head(4096, 8, u), c)


def maestro_advantages() -> Iterator[Callable[[], Any]]:
    from maestro_fast.kernels.maestro_advantages import maestro_advantages as launch

    choice, bounds = ConductorChoice(tau=1.0, min_prob=0.05, alpha=0.3), torch.arange(513)
    sources: tuple[tuple[SourceKind, int | None, int, str], ...] = (
        ("context", None, 8, "maestro"),
        ("context", None, 32, "gdpo"),
        ("last", 256, 16, "maestro"),
        ("mean", None, 16, "maestro"),
        ("mean", 256, 16, "maestro"),
    )
    x = torch.zeros(512, 4096, dtype=torch.bfloat16)
    for kind, units, size, name in sources:
        contexts = ContextSource(x, kind, None if kind == "context" else bounds)
        yield lambda c=contexts, u=units, g=size, p=name: launch(
            torch.zeros(512, 8),
            head(4096, 8, u),
            choice,
            Groups.of(g, 512).index_NG,
            c,
            ScoreInputs(None, 0.0, None),
            PROFILES[p],
        )


def counterfactual_advantages() -> Iterator[Callable[[], Any]]:
    from maestro_fast.kernels.counterfactual_advantages import counterfactual_advantages as launch

    for size, actions in ((8, 8), (64, 5), (1024, 8)):
        rewards_BK, index_NG = torch.zeros(1024, 8), Groups.of(size, 1024).index_NG
        yield lambda r=rewards_BK, i=index_NG, a=actions: launch(
            r, r, torch.zeros(a, 8), i, profile=PROFILES["maestro"]
        )


def policy_loss() -> Iterator[Callable[[], Any]]:
    from maestro_fast.kernels.policy_loss import policy_loss as launch

    cu_seqlens, advantages = torch.arange(0, 131073, 256), torch.zeros(512)
    x, mask = torch.zeros(131072), torch.ones(131072, dtype=torch.bool)
    everything = {"old_logprobs": x, "ref_logprobs": x, "sampling_logprobs": x, "entropies": x, "token_mask": mask}
    for config, given in (
        (PolicyLossConfig("grpo"), {"old_logprobs": x}),
        (PolicyLossConfig("bnpo", kl_coef=0.1, clip_max=2.0), {"ref_logprobs": x, "token_mask": mask}),
        (PolicyLossConfig("grpo", kl_coef=0.1, kl_bias_correction=True), {"old_logprobs": x, "ref_logprobs": x}),
        (
            PolicyLossConfig(
                "bnpo",
                ratio="sequence",
                kl_coef=0.1,
                kl_bias_correction=True,
                entropy_coef=0.1,
                sampler_correction="token_truncate",
            ),
            everything,
        ),
    ):
        yield lambda c=config, g=given: launch(LossInputs(x, advantages, cu_seqlens, **g), c)


def conductor_update() -> Iterator[Callable[[], Any]]:
    from maestro_fast.kernels import conductor_update as kernel

    actions, meta = torch.zeros(2560, dtype=torch.int64), torch.zeros(2560)
    everything: dict[str, Any] = {"meta": torch.zeros(2560, 8), "live": actions.bool()}
    drawn: dict[str, Any] = {"meta": meta, "actions": actions, "live": actions.bool()}
    before = {**drawn, "drawn_probs": meta}
    for dtype, units, given in (
        (torch.float32, None, drawn),
        (torch.bfloat16, 256, drawn),
        (torch.bfloat16, None, everything),
        (torch.bfloat16, 256, everything),
        (torch.bfloat16, 256, before),
    ):
        params, h = head(4096, 8, units), torch.zeros(2560, 4096, dtype=dtype)
        state, batch = ConductorState(params, params.learned, params.learned, 1), ConductorBatch(h, **given)
        yield lambda s=state, b=batch: kernel.conductor_update(
            s, b, ConductorUpdateConfig(), kernel.activations(b.h, s.params)
        )


def spec(entropy: Any, **options: Any) -> HeadSpec:
    return HeadSpec(
        **{"scale": 1.0, "softcap": None, "temperature": 1.0, **options}, ignore_index=-100, entropy=entropy
    )


EVERYTHING: dict[str, Any] = {"scale": 0.5, "softcap": 30.0, "temperature": 0.7}


def head_rows() -> Iterator[Callable[[], Any]]:
    from maestro_fast.kernels import head_rows as kernel

    x, targets, slopes = torch.zeros(8, 151_936), torch.zeros(8, dtype=torch.int64), torch.zeros(8)
    stats = RowStatistics(slopes, slopes, slopes, slopes)
    for s, bias in ((spec("none"), None), (spec("grad"), None), (spec("grad", **EVERYTHING), x[0])):
        dentropies = slopes if s.entropy == "grad" else None
        yield lambda s=s, b=bias: kernel.row_statistics(x, targets, b, s)
        for out in (x, x.bfloat16(), x.half()):
            yield lambda s=s, b=bias, e=dentropies, o=out: kernel.dlogits(x, targets, b, stats, slopes, e, s, o)


def head_product(arch: int) -> Iterator[Callable[[], Any]]:
    """The fused forward with the tiles of this architecture."""
    from maestro_fast.kernels import token_logprobs as kernel

    targets = torch.zeros(2048, dtype=torch.int64)
    for dtype, s, biased in (
        (torch.bfloat16, spec("none"), False),
        (torch.bfloat16, spec("grad"), False),
        (torch.bfloat16, spec("grad", **EVERYTHING), True),
        (torch.float32, spec("grad"), False),
    ):
        h, w = torch.zeros(2048, 1024, dtype=dtype), torch.zeros(151_936, 1024, dtype=dtype)
        bias, by = torch.zeros(151_936) if biased else None, kernel.tiles(h, w, (arch // 10, 0))
        yield lambda h=h, w=w, b=bias, s=s, by=by: kernel.token_logprobs(h, w, targets, b, s, by)


OPS = [
    group_advantages,
    counterfactual_advantages,
    pool_hidden,
    conductor_weights,
    maestro_advantages,
    policy_loss,
    conductor_update,
    head_rows,
]


# Every variant compiles for sm_90, a third of them for the others; `make gpu-rehearsal` compiles all for sm_100, too.
# The counterfactual advantages take long to compile, and are made of what the advantages are made of.
@pytest.mark.parametrize(
    ("op", "arch"),
    [(op, arch) for op in OPS for arch in ((90,) if op is counterfactual_advantages else ARCHITECTURES)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_compiles_without_spills(op: Callable[[], Iterator[Callable[[], Any]]], arch: int) -> None:
    launchers = [*op()]
    compile_all(launchers if arch == 90 else launchers[::-3], arch)


def compile_all(launchers: Iterable[Callable[[], Any]], arch: int) -> dict[str, list[Resources]]:
    """What every kernel needs, by its name."""
    spilled, found = [], defaultdict(list)
    for launcher in launchers:
        for launch in recorded(launcher):
            needs = compiled(launch, arch)
            found[launch.name].append(needs)
            line = f"sm_{arch} {launch.name} grid {launch.grid} {launch.options}: {needs}"
            print(line)
            if needs.stack:
                spilled.append(line)
    assert not spilled, "\n".join(spilled)
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_mean_of_hidden_states_loads_ahead(arch: int) -> None:
    """Two steps are in shared memory on their way, and registers let four programs of 128 threads run at once."""
    step = 64 * 128  # tokens and columns
    for size, needs in zip((2, 4), compile_all(pool_means(), arch)["pool_hidden._sums"], strict=True):
        assert needs.shared >= 2 * step * size and needs.registers <= 128


def pool_means() -> Iterator[Callable[[], Any]]:
    from maestro_fast.kernels.pool_hidden import pool_hidden as launch

    for dtype in (torch.bfloat16, torch.float32):
        yield lambda d=dtype: launch(torch.zeros(1024, 4096, dtype=d), torch.arange(65) * 16, mean=True)


@pytest.mark.parametrize(
    ("arch", "product", "by_descriptor"), [(80, "HMMA", False), (90, "HGMMA", True), (100, "UTCHMMA", True)]
)
def test_products_are_those_of_the_tensor_cores(arch: int, product: str, by_descriptor: bool) -> None:
    """In the machine code: the instructions of a warp on sm_80, of a warp group on sm_90, and loads by descriptor."""
    *half_precision, single = compile_all(head_product(arch), arch)["token_logprobs._scores"]

    assert len(half_precision) == 3 and product not in single.instructions
    for needs in half_precision:
        assert product in needs.instructions and ("UTMALDG" in needs.instructions) == by_descriptor


def test_a_program_of_one_warp_has_no_barriers() -> None:
    """They cost the advantages more than the arithmetic did. One is left in the fused step: weights are stored there,
    then loaded by other threads."""
    group = compiled(recorded(next(group_advantages()))[0], 90)
    _, fused = (compiled(launch, 90) for launch in recorded(next(maestro_advantages())))

    assert group.instructions.get("BAR", 0) == 0
    assert fused.instructions.get("BAR", 0) <= 1
