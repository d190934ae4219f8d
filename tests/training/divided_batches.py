"""test_invariance.py runs this: one batch of 16 responses, divided in several ways, under every loss.

A run has one trainer for each way to divide the batch and each number of updates. It takes the losses of ``VARIANTS``
in turn, each from the same policy and the same Conductor, and notes the gradients, the policies and the figures that
come out. The processes of a run are forked, so that PyTorch is imported once for all.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import start_processes

from maestro_fast.ops import AdvantageProfile, LossInputs, PolicyLossConfig, loss_function
from maestro_fast.records import Prompts, Rollouts, StepRecord
from maestro_fast.specs import FunctionLoss, resolve_profile
from maestro_fast.training import MaestroTrainer
from maestro_fast.training.batches import MicroBatch
from maestro_fast.training.plan import LossTerms
from tests.training.two_processes import GROUP, build, policy

PROMPTS = 4
# Two responses are empty. The group of prompt 2 is silent, since its rewards are equal.
LENGTHS = ((0, 0, 3, 7), (6, 2, 8, 4), (4, 4, 4, 4), (1, 9, 5, 6))
TRUNCATED = ((1, 0), (1, 2), (3, 1))  # prompt and place of the responses that the token limit ended
LEARNING_RATE = 0.05
# Processes, and micro-batches per update and process.
DIVISIONS = ((1, 1), (1, 2), (1, 4), (2, 2), (4, 1))
FEW = ((1, 2), (4, 1))  # under these, only some variants make two updates, to save time
SECONDS = 600  # after which a process ends itself


KL_IN_LOSS = replace(resolve_profile("maestro"), kl_in="loss")


@dataclass(frozen=True)
class Variant:
    """A loss, how many updates the batch serves, a profile, what is left out, and whether float32 is tried, too."""

    loss: PolicyLossConfig | FunctionLoss
    updates: int = 1
    profile: AdvantageProfile = KL_IN_LOSS
    drops: bool = False
    masks: bool = False
    float32: bool = False

    def tried(self, dtype: torch.dtype, processes: int, micro_batches: int) -> bool:
        """Whether it is tried with this dtype under this division."""
        few = self.updates > 1 and (processes, micro_batches) in FEW
        return self.float32 or (dtype is torch.float64 and (self.drops or not few))

    @property
    def terms(self) -> LossTerms:
        return LossTerms.of(self.loss, self.profile)


@loss_function(row_wise=True, entropies=True)
def row_wise(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE with k3 and an entropy bonus."""
    assert inputs.ref_logprobs is not None and inputs.entropies is not None
    live = torch.ones_like(inputs.logprobs) if inputs.token_mask is None else inputs.token_mask.to(inputs.logprobs)
    gap = inputs.ref_logprobs - inputs.logprobs
    terms = -_of_tokens(inputs) * inputs.logprobs + 0.1 * (gap.expm1() - gap)
    loss = (live * terms).sum() / inputs.normalizer - 0.1 * (live * inputs.entropies).sum() / inputs.entropy_normalizer
    return loss, {"gap": (live * gap).sum() / live.sum().clamp(min=1)}


def of_responses(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The advantage times the square of a response's log-prob, so that the gradient reads whole responses."""
    sizes = inputs.cu_seqlens.diff()
    sums = torch.stack([part.sum() for part in inputs.logprobs.split(sizes.tolist())])
    return -(inputs.advantages * sums.square()).sum() / (10.0 * inputs.normalizer), {}


def _of_tokens(inputs: LossInputs) -> Tensor:
    return inputs.advantages.repeat_interleave(inputs.cu_seqlens.diff())


def _config(normalization: str = "dapo", **options: Any) -> PolicyLossConfig:
    """Options under which some tokens of a second update are clipped, since its ratios are close to 1."""
    return PolicyLossConfig(
        normalization,  # type: ignore[arg-type]
        **{"clip_low": 0.02, "clip_high": 0.03, "max_completion_length": 12, **options},
    )


_BATCH_WIDE = ("gdpo", "verl_gdpo", "grpo_batch")  # profiles with a mean or a standard deviation of the whole batch
VARIANTS: dict[str, Variant] = {
    # On-policy: every ratio is 1.
    "grpo": Variant(_config("grpo")),
    "dapo": Variant(_config("dapo"), float32=True),
    "dr_grpo": Variant(_config("dr_grpo")),
    "bnpo": Variant(_config("bnpo")),
    "KL": Variant(_config("grpo", kl_coef=0.3), float32=True),
    "KL in the score": Variant(_config(kl_coef=0.3), profile=resolve_profile("maestro"), float32=True),
    "entropy": Variant(_config("dr_grpo", entropy_coef=0.2)),
    "token_truncate": Variant(_config(sampler_correction="token_truncate", sampler_cap=1.3)),
    "sequence_mask": Variant(_config("grpo", sampler_correction="sequence_mask", sampler_cap=1.3)),
    "row-wise function": Variant(FunctionLoss(row_wise, needs_reference=True), masks=True),
    "function": Variant(FunctionLoss(of_responses)),
    "mask": Variant(_config("grpo"), masks=True),
    "mask, entropy": Variant(_config(entropy_coef=0.2, kl_coef=0.3), masks=True, float32=True),
    "drop": Variant(_config("grpo", kl_coef=0.3), drops=True),
    "drop, mask, bnpo": Variant(_config("bnpo", kl_coef=0.3), drops=True, masks=True),
    **{name: Variant(_config(), profile=resolve_profile(name)) for name in _BATCH_WIDE},
    # Two updates: the ratios of the second are not 1, and some tokens are clipped. Those that are tried under all
    # divisions come first, so that a variant has the same batch under each.
    "clip": Variant(_config("grpo"), 2, float32=True),
    "gspo": Variant(_config("grpo", ratio="sequence"), 2, float32=True),
    "drop, mask": Variant(_config("grpo", kl_coef=0.3), 2, drops=True, masks=True),
    "two-sided clip": Variant(_config("dr_grpo", clip_max=1.05), 2),
    "clip, bnpo": Variant(_config("bnpo"), 2),
    "cispo": Variant(_config(objective="cispo", clip_max=1.01), 2),
    "corrected KL": Variant(_config(kl_coef=0.3, kl_bias_correction=True), 2),
    "gspo, corrected KL": Variant(_config("grpo", kl_coef=0.3, kl_bias_correction=True, ratio="sequence"), 2),
    "token_mask": Variant(_config(sampler_correction="token_mask", sampler_cap=1.3), 2),
    "sequence_truncate": Variant(_config(sampler_correction="sequence_truncate", sampler_cap=1.3), 2),
    "entropy, mask": Variant(_config("grpo", entropy_coef=0.2), 2, masks=True),
}


def completion(prompt: int, place: int) -> list[int]:
    return [20 + (7 * prompt + 5 * place + 3 * t) % 200 for t in range(LENGTHS[prompt][place])]


def sampling_logprobs(ids: list[int]) -> list[float]:
    return [-5.0 - 0.25 * (token % 7) for token in ids]


class FixedBatch:
    """The responses of the batch; none depends on the process."""

    concurrent_parts = 0

    def generate(self, model: Any, prompts: Prompts, *, seed: int) -> Rollouts:
        del model, seed
        places = [(int(str(text).split()[-1]), i % GROUP) for i, text in enumerate(prompts.texts)]
        completions = [completion(*place) for place in places]
        return Rollouts(
            prompts,
            completions,
            [" ".join(map(str, ids)) for ids in completions],
            torch.tensor([place in TRUNCATED for place in places]),
            torch.tensor([value for ids in completions for value in sampling_logprobs(ids)]),
        )


def parity(completion_ids: list[list[int]], prompts: list[str], **columns: object) -> list[float]:
    return [float(sum(ids) % 5) * (text != "prompt 2") for ids, text in zip(completion_ids, prompts, strict=True)]


def brevity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def moved(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The policy from which every variant starts, away from the reference so that there is a KL."""
    generator = torch.Generator().manual_seed(1)
    return {  # added up in float32, so that both dtypes start from the same numbers
        name: (value.float() + 0.02 * torch.randn(value.shape, generator=generator)).to(value)
        for name, value in parameters.items()
    }


class Divided(MaestroTrainer):
    """Trains on one batch under the variants in turn, and notes what comes out of each in ``found``."""

    start: dict[str, Tensor]
    conductor: dict[str, Tensor]
    names: tuple[str, ...]
    found: list[dict[str, Any]]

    def _next_batch(self, model: Any, rows: Any) -> Any:
        variant = VARIANTS[self.names[len(self.found)]]
        with torch.no_grad():
            for name, parameter in self.accelerator.unwrap_model(model).named_parameters():
                parameter.copy_(self.start[name])
        self.step.weights.load_state_dict(self.conductor)
        plan = replace(self.step.plan, drops_silent=variant.drops, masks_truncated=variant.masks)
        self.step = replace(self.step, plan=plan, profile=variant.profile, terms=variant.terms)
        self.found.append({"gradients": [], "policies": []})
        return super()._next_batch(model, rows)

    def _prepared(self, *args: Any) -> list[MicroBatch]:
        batches = super()._prepared(*args)
        first = self.step.processes.rank * self.step.plan.responses
        own = [[first + i for i in batch.members] for batch in batches]
        cut = self.step.processes.gather_objects([own])  # of each process, the responses of each micro-batch
        self.found[-1] |= {"cut": cut, "conductor": self.step.weights.state_dict()}
        return batches

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        named = self.accelerator.unwrap_model(model).named_parameters()
        self.found[-1]["gradients"].append({name: p.grad.clone() for name, p in named})
        return super()._get_grad_norm(model, grad_norm)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.found[-1]["policies"].append(policy(self))


def run(
    checkpoint: str, run_dir: Path, dtype: torch.dtype, updates: int, micro_batches: int
) -> dict[str, dict[str, Any]]:
    """What each variant of ``updates`` gives with ``micro_batches`` per update and process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    tried = (name for name, variant in VARIANTS.items() if variant.tried(dtype, processes, micro_batches))
    names = tuple(name for name in tried if VARIANTS[name].updates == updates)
    records: list[StepRecord] = []
    trainer = build(
        checkpoint,
        run_dir,
        updates * micro_batches,
        records,
        batch={"updates_per_batch": updates},
        rewards=(parity, brevity),
        prompts=PROMPTS,
        generator=FixedBatch(),
        dtype=dtype,
        kind=Divided,
        max_steps=updates * len(names),
        max_grad_norm=0.0,
    )
    assert isinstance(trainer, Divided)
    trainer.start, trainer.conductor = moved(policy(trainer)), trainer.step.weights.state_dict()
    trainer.conductor["weight"] = 0.3 * torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    trainer.names, trainer.found = names, []
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for i, found in enumerate(trainer.found):
        found["logs"] = lines[i * updates : (i + 1) * updates]
        if records:  # on the main process
            record = records[i]
            found |= {"prompts": record.prompts, "advantages": record.advantages_B, "silent": record.degenerate_B}
    return dict(zip(names, trainer.found, strict=True))


def digest(found: dict[str, Any]) -> str:
    """The bits of policies, gradients and Conductor, and the figures of the log, as one short text."""
    tensors = [*found["conductor"].values()]
    tensors += [x for each in (*found["gradients"], *found["policies"]) for x in each.values()]
    sha = hashlib.sha256(repr(found["logs"]).encode())
    for x in tensors:
        sha.update(x.contiguous().numpy().tobytes())
    return sha.hexdigest()


def process(rank: int, processes: int, port: int, checkpoint: str, out: Path) -> None:
    """One of ``processes``: it takes all divisions over so many, and saves what came out, or only its digest."""
    signal.alarm(SECONDS)
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in (names | {"MASTER_PORT": port}).items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    results = {}
    for dtype in (torch.float64, torch.float32):
        for micro_batches in (m for p, m in DIVISIONS if p == processes):
            found: dict[str, Any] = {}
            for updates in (1, 2):
                found |= run(checkpoint, out / "run", dtype, updates, micro_batches)
            kept = found if rank == 0 else {}
            digests = {name: digest(each) for name, each in found.items()}
            results[str(dtype), micro_batches] = {"found": kept, "digests": digests}
    torch.save(results, out / f"{processes}-{rank}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


def main(checkpoint: str, out: Path) -> None:
    for processes in sorted({processes for processes, _ in DIVISIONS}):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        start_processes(process, (processes, port, checkpoint, out), processes, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
