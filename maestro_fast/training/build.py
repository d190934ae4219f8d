"""Builds the parts of every generation batch from what the user gave the trainer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from maestro_fast.data.dataset import PromptDataset
from maestro_fast.generation import Engine, Generator, ProbeConfig, TransformersGenerator
from maestro_fast.model.reference import PromptContexts, Reference
from maestro_fast.rewards import RewardSet
from maestro_fast.specs import resolve_profile
from maestro_fast.training.batches import BatchPlan, Processes
from maestro_fast.training.metrics import StageClock
from maestro_fast.training.parts import Judges, Sampler, Scorer
from maestro_fast.training.plan import LossTerms, Method, choose_scoring
from maestro_fast.training.step import Step
from maestro_fast.training.weight_sync import synced_generator
from maestro_fast.weighting import WeightPolicy, check_profile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """What the user gave the trainer, as ``MaestroTrainer`` documents it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    dataset: PromptDataset
    rewards: RewardSet
    anchor: RewardSet | None
    weights: WeightPolicy
    method: Method
    generator: Generator | None = None
    engine: Engine | None = None
    probe: ProbeConfig | None = None


def build_step(
    given: Given, plan: BatchPlan, reference: Reference | None, accelerator: Accelerator, clock: StageClock
) -> Step:
    """Builds the parts of every generation batch.

    Args:
        given: what the user gave.
        plan: the share of a batch that this process has.
        reference: gives the reference policy; None where nothing reads it.
        accelerator: transformers' own, which knows the processes and the precision.
        clock: adds up the seconds of each stage.

    Raises:
        ValueError: the weight policy cannot serve the profile, or the engine cannot get the model's weights.
    """
    method, weights, profile = given.method, given.weights, resolve_profile(given.method.profile)
    terms = LossTerms.of(method.loss, profile)
    check_profile(weights, profile)
    refills = method.batch.no_signal == "refill"
    scoring = choose_scoring(given.model, plan, given.rewards, weights, terms, refills=refills)
    logger.info("log-probs and hidden states: %s, %s", scoring.source, scoring.reason)
    processes = Processes(accelerator)
    scorer = Scorer.of(given.model, plan.micro_batch, method, accelerator)
    generator = _generator(given, scorer, accelerator, clock)
    return Step(
        plan=plan,
        terms=terms,
        profile=profile,
        scoring=scoring,
        sampler=replace(Sampler.of(generator, method.sampling, method.seed, processes), updates=plan.updates),
        scorer=scorer,
        judges=Judges(
            given.rewards, given.anchor, given.tokenizer, scorer, processes, given.dataset.chat, plan.updates
        ),
        weights=weights,
        reference=reference,
        prompt_contexts=PromptContexts(lambda: scorer.layouts, processes.gather, processes.device),
        processes=processes,
        clock=clock,
    )


def _generator(given: Given, scorer: Scorer, accelerator: Accelerator, clock: StageClock) -> Generator:
    """The generator that was given, or one for the engine that is probed on the first prompts, or transformers' own."""
    if given.generator is not None:
        return given.generator
    if given.engine is None:
        sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None
        sampling, autocast = given.method.sampling, accelerator.autocast
        return TransformersGenerator(given.tokenizer, sampling, synced_gpus=sharded, autocast=autocast)
    probe, data = given.probe or ProbeConfig(), given.dataset
    rows = [data[i] for i in range(min(len(data), max(8, probe.sequences)))]
    prompt_ids = data.prompts(rows, given.tokenizer).token_ids
    return synced_generator(given.engine, probe, prompt_ids, scorer, accelerator, clock)
