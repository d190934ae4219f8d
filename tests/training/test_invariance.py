"""The same batch gives the same update, however it is divided into micro-batches and processes, under every loss.

Every gradient is compared with the exact one of ``exact_update``, which knows of no division. Float order: an element
may be off by ``Policy.float_order`` units of rounding of its tensor's largest sum of absolute terms. That is about
3e-14 of these terms in float64 and 2e-5 in float32. Wrong divisors were off by 5e-3 and more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from maestro_fast.training.metrics import LOSS_METRICS
from tests.tiny import tiny_tokenizer
from tests.training.divided_batches import DIVISIONS, GROUP, LEARNING_RATE, PROMPTS, VARIANTS, Variant, moved
from tests.training.exact_update import Policy, Step, exact_step, live_cut

ROOT = Path(__file__).resolve().parents[2]
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}  # of rounding
DTYPES = tuple(UNIT)
LOSS_FIGURES = {"loss", "grad_norm", *LOSS_METRICS.values()}


class Runs(NamedTuple):
    """What the runs gave, and the policies that they start from and refer to.

    Attributes:
        found: by dtype, processes, micro-batches per update and process, and name of the variant.
        digests: the digests of all processes, by the same.
        start, reference: the policies.
        known: the steps that ``exact_steps`` has computed.
    """

    found: dict[tuple[torch.dtype, int, int, str], dict[str, Any]]
    digests: dict[tuple[torch.dtype, int, int, str], list[str]]
    start: Policy
    reference: Policy
    known: dict[Any, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    checkpoint, out = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("divided")
    torch.manual_seed(0)
    config = GPT2Config(  # its LayerNorm computes in the dtype of the weights, where an RMSNorm computes in float32
        vocab_size=320,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    script = str(Path(__file__).with_name("divided_batches.py"))
    done = subprocess.run(
        [sys.executable, script, str(checkpoint), str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, digests = {}, {}
    for processes in {processes for processes, _ in DIVISIONS}:
        ranks = [torch.load(out / f"{processes}-{rank}.pt", weights_only=True) for rank in range(processes)]
        for dtype, micro_batches in ((d, m) for d in DTYPES for p, m in DIVISIONS if p == processes):
            for name, each in ranks[0][str(dtype), micro_batches]["found"].items():
                key = dtype, processes, micro_batches, name
                found[key] = each
                digests[key] = [rank[str(dtype), micro_batches]["digests"][name] for rank in ranks]
    reference = Policy.load(checkpoint)
    return Runs(found, digests, reference.at(moved(reference.parameters)), reference, {})


def of_variant(runs: Runs, name: str) -> Iterator[tuple[torch.dtype, tuple[int, int], dict[str, Any]]]:
    """The dtype, the division and the results of each run under a variant; the undivided batch comes first."""
    for (dtype, processes, micro_batches, variant), found in runs.found.items():
        if variant == name:
            yield dtype, (processes, micro_batches), found


def undivided(runs: Runs, name: str, dtype: torch.dtype) -> dict[str, Any]:
    return runs.found[dtype, 1, 1, name]


def composition(variant: Variant, found: dict[str, Any]) -> list[list[int]]:
    """The responses in the loss of each update, over all processes."""
    return [sorted(i for members in each for i in members) for each in live_cut(variant, found)]


def exact_steps(runs: Runs, name: str, dtype: torch.dtype, found: dict[str, Any]) -> list[Step]:
    """The exact steps for the cut of a run.

    The second starts from the policy that the first left in the undivided run, or in this one if it trained on others.
    """
    variant, whole = VARIANTS[name], undivided(runs, name, dtype)
    key = name, dtype, str(found["cut"]), found["advantages"].numpy().tobytes()
    if key not in runs.known:
        now, steps = runs.start, []
        for update in range(variant.updates):
            if update:
                same = composition(variant, found) == composition(variant, whole)
                now = policy_after(runs, name, dtype, whole if same and not is_bnpo(name) else found)
            policies = {"now": now, "old": runs.start, "reference": runs.reference}
            steps.append(exact_step(variant, found, update, policies))
        runs.known[key] = steps
    return runs.known[key]


def policy_after(runs: Runs, name: str, dtype: torch.dtype, found: dict[str, Any]) -> Policy:
    """The policy that the first update of a run left."""
    key = name, dtype, str(found["cut"])
    if key not in runs.known:
        runs.known[key] = runs.start.at(found["policies"][0])
    return runs.known[key]


def off(ours: Tensor, truth: Tensor, sizes: Tensor) -> float:
    """The largest difference in relation to the largest size of a term."""
    largest = sizes.max()
    return 0.0 if largest == 0 and torch.equal(ours, truth) else float((ours.double() - truth).abs().max() / largest)


def same_updates(variant: Variant, processes: int) -> bool:
    """Whether each update has to train on the responses that it trains on in one process.

    Of two updates it need not where silent groups are dropped, since a process deals evenly what is left; nor where a
    process has less than a group for each update.
    """
    return variant.updates == 1 or not (variant.drops or PROMPTS % (processes * variant.updates))


def is_bnpo(name: str) -> bool:
    return getattr(VARIANTS[name].loss, "normalization", None) == "bnpo"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_division_gives_the_exact_gradient(runs: Runs, name: str) -> None:
    """So do the loss and its metrics, and the parameters follow from the gradient."""
    errors = []
    for dtype, division, found in of_variant(runs, name):
        u = runs.start.float_order * UNIT[dtype]
        before = runs.start.parameters
        for update, step in enumerate(exact_steps(runs, name, dtype, found)):
            where = f"{dtype}, processes and micro-batches {division}, update {update}"
            for parameter, gradient in found["gradients"][update].items():
                error = off(gradient, step.gradient[parameter], step.sizes[parameter])
                errors.append(error / u)
                assert error <= u, f"{where}: {parameter} is off by {error:.2g}, expected at most {u:.2g}"
                after = found["policies"][update][parameter]
                expected = before[parameter].to(after) - LEARNING_RATE * gradient
                torch.testing.assert_close(after, expected, rtol=4 * UNIT[dtype], atol=UNIT[dtype], msg=where)
            before = found["policies"][update]
            line = found["logs"][update]
            single = runs.start.float_order * UNIT[torch.float32]  # transformers adds up losses in float32
            assert line["loss"] == pytest.approx(step.loss, rel=single, abs=single), where
            for metric, value in step.metrics.items():
                logged = LOSS_METRICS.get(metric, f"loss/{metric}")
                assert line[logged] == pytest.approx(value, rel=u, abs=u), f"{where}: {logged}"
    assert max(errors) > 1e-4, "the float order is too coarse to show anything"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_division_gives_the_update_of_the_undivided_batch(runs: Runs, name: str) -> None:
    """The same responses share an update, and gradients, policy, Conductor and all figures of the log agree."""
    variant = VARIANTS[name]
    for dtype, division, found in of_variant(runs, name):
        whole, where = undivided(runs, name, dtype), f"{dtype}, processes and micro-batches {division}"
        u = 2 * runs.start.float_order * UNIT[dtype]
        single = 2 * runs.start.float_order * UNIT[torch.float32]  # the Conductor reads float32
        assert found["prompts"] == whole["prompts"]
        torch.testing.assert_close(found["advantages"], whole["advantages"], rtol=single, atol=single, msg=where)
        for key, value in whole["conductor"].items():
            largest = value.double().abs().max().item() if value.numel() else 0.0
            torch.testing.assert_close(found["conductor"][key], value, rtol=0, atol=single * largest, msg=where)
        shares = composition(variant, found)
        agree = shares == composition(variant, whole)
        assert agree or not same_updates(variant, division[0]), where
        compared = agree and not is_bnpo(name)
        for update, line in enumerate(found["logs"]):
            assert line.keys() == whole["logs"][update].keys()
            for figure, value in whole["logs"][update].items():
                if compared or figure not in LOSS_FIGURES:
                    rough = figure == "loss" or figure.startswith("conductor/")
                    allowed = single if rough else u
                    assert line[figure] == pytest.approx(value, rel=allowed, abs=allowed), f"{where}: {figure}"
            if not compared:
                continue
            step = exact_steps(runs, name, dtype, whole)[update]
            for parameter, gradient in whole["gradients"][update].items():
                ours = found["gradients"][update][parameter]
                assert off(ours, gradient.double(), step.sizes[parameter]) <= u, f"{where}: {parameter}"


def test_all_processes_hold_the_same_bits(runs: Runs) -> None:
    """Gradients, policy, Conductor and log."""
    assert {len(digests) for digests in runs.digests.values()} == {1, 2, 4}
    for key, digests in runs.digests.items():
        assert len({*digests}) == 1, key


def test_no_group_is_split_across_processes(runs: Runs) -> None:
    """Each process trains on its own groups, every response once."""
    for (dtype, processes, *_, name), found in runs.found.items():
        per_process = PROMPTS // processes * GROUP
        for rank, own in enumerate(found["cut"]):
            trained = [i for members in own for i in members]
            assert {i // per_process for i in trained} == {rank}, (dtype, processes, name)
            if not (VARIANTS[name].drops or VARIANTS[name].masks):
                assert sorted(trained) == [*range(rank * per_process, (rank + 1) * per_process)]


def test_bnpo_follows_the_size_of_the_micro_batches_alone(runs: Runs) -> None:
    """It averages the means of micro-batches, as TRL's bnpo does, so that 1 x 16, 2 x 8 and 4 x 4 are three losses."""
    gradients = {
        division: torch.cat([x.flatten() for x in found["gradients"][0].values()])
        for dtype, division, found in of_variant(runs, "bnpo")
        if dtype is torch.float64
    }
    whole = gradients[1, 1].abs().max()
    for halves in ((1, 2), (1, 4)):
        assert (gradients[halves] - gradients[1, 1]).abs().max() > 0.01 * whole
    for groups in ((2, 2), (4, 1)):  # a group to a micro-batch, as in (1, 4)
        torch.testing.assert_close(gradients[groups], gradients[1, 4], rtol=0, atol=1e-12 * float(whole))
