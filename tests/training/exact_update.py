"""The gradient of an optimiser step in float64, from the formula alone: no micro-batches, no padding, no processes.

The policy runs on each response by itself. Autograd gives J_t, the gradient of the log-prob of each token, and E_t,
that of its entropy. ``ops.policy_loss`` gives a_t = dL / dlog p_t and e_t = dL / dH_t over the whole step at once. So

    g = sum_t a_t J_t + e_t E_t          S = sum_t |a_t| |J_t| + |e_t| |E_t|

S says how large the numbers are that g is added up from, which the error of any sum of them is proportional to.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from maestro_fast.ops import PolicyLossConfig, policy_loss
from maestro_fast.records import cumulative
from tests.training.divided_batches import GROUP, LENGTHS, PROMPTS, TRUNCATED, Variant, completion, sampling_logprobs


class Tokens(NamedTuple):
    """Log-probs and entropies of the n tokens of a response, [n], and their gradients by all parameters, [n, P]."""

    logprobs: Tensor
    entropies: Tensor
    of_logprobs: Tensor
    of_entropies: Tensor


class Policy:
    """A policy in float64, with the tokens of every response of the batch by prompt and place.

    Args:
        model: a language model in float64.
        prompts: the tokens of each prompt.
        parameters: by name, those of the policy; None takes the model as it is.
    """

    def __init__(self, model: Any, prompts: list[list[int]], parameters: dict[str, Tensor] | None = None) -> None:
        self.model, self.prompts = model, prompts
        with torch.no_grad():
            for name, value in (parameters or {}).items():
                model.get_parameter(name).copy_(value)
        self.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.tokens = {
            (prompt, place): self._of(ids, completion(prompt, place))
            for prompt, ids in enumerate(prompts)
            for place in range(GROUP)
        }

    @staticmethod
    def load(checkpoint: Path) -> Policy:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa").double()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        return Policy(model, [tokenizer(f"prompt {prompt}")["input_ids"] for prompt in range(PROMPTS)])

    def at(self, parameters: dict[str, Tensor]) -> Policy:
        """The policy with other parameters."""
        return Policy(self.model, self.prompts, parameters)

    def _of(self, prompt_ids: list[int], ids: list[int]) -> Tokens:
        size = sum(p.numel() for p in self.parameters.values())
        if not ids:
            return Tokens(*torch.zeros(2, 0, dtype=torch.float64), *torch.zeros(2, 0, size, dtype=torch.float64))
        logits = self.model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
        every = logits.log_softmax(-1)
        values = torch.cat([every[range(len(ids)), ids], -(every.exp() * every).sum(-1)])
        found = torch.autograd.grad(
            values, [*self.model.parameters()], torch.eye(len(values), dtype=torch.float64), is_grads_batched=True
        )
        jacobian = torch.cat([each.flatten(1) for each in found], 1)
        n = len(ids)
        return Tokens(values[:n].detach(), values[n:].detach(), jacobian[:n], jacobian[n:])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a vector [P] by parameter."""
        parts = flat.split([p.numel() for p in self.parameters.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(self.parameters.items(), parts, strict=True)}

    @property
    def float_order(self) -> float:
        """By how many units of rounding a sum of terms of size 1 may be off, that are computed in some other order.

        A sum of n products has an error of at most lambda sqrt(n) u in relation to the sum of their absolute values,
        with a probability of 1 - 2 n exp(-lambda^2 / 2), if roundings are independent (N. Higham and T. Mary, "A new
        approach to probabilistic rounding error analysis", 2019, theorem 2.4). Here n counts the additions on the
        longest way through forward and backward, and over the tokens of the batch; lambda is 8.
        """
        config, tokens = self.model.config, sum(map(sum, LENGTHS))
        width = config.hidden_size
        row = max(map(max, LENGTHS)) + 8  # the tokens of a sequence
        # Two norms; the products for q, k, v, for the output, and in and out of the MLP; the scores and their softmax.
        layer = 2 * width + width + width + width + 4 * width + width // config.num_attention_heads + 2 * row
        n = 2 * (config.num_hidden_layers * layer + 2 * width + config.vocab_size) + tokens
        return 8.0 * math.sqrt(n)


class Step(NamedTuple):
    """The gradient of an optimiser step, the sizes S of its terms, both by parameter; its loss and its metrics."""

    gradient: dict[str, Tensor]
    sizes: dict[str, Tensor]
    loss: float
    metrics: dict[str, float]


def live_cut(variant: Variant, found: dict[str, Any]) -> list[list[list[int]]]:
    """The responses that are in the loss, of each micro-batch of each update, over all processes."""
    places = _places(found)
    silent = found["silent"].tolist() if variant.drops else [False] * len(places)
    live = [not silent[i] and not (variant.masks and place in TRUNCATED) for i, place in enumerate(places)]
    n = len(found["cut"][0]) // variant.updates  # micro-batches of a process and an update
    return [
        [[i for i in members if live[i]] for own in found["cut"] for members in own[update * n : (update + 1) * n]]
        for update in range(variant.updates)
    ]


def exact_step(
    variant: Variant,
    found: dict[str, Any],
    update: int,
    policies: dict[str, Policy],
) -> Step:
    """What optimiser step ``update`` of a run has to give, from its responses and advantages.

    Args:
        variant: the loss and its options.
        found: what the run gave for it; its cut, its advantages and its prompts are read.
        policies: those before this step ("now"), before the first one ("old"), and the reference ("reference").
    """
    terms, config = variant.terms, variant.terms.function
    places = _places(found)
    micro_batches = live_cut(variant, found)[update]
    live = sum(len(members) for each in live_cut(variant, found) for members in each)
    members = [i for each in micro_batches for i in each]
    micro_batches = [part for part in micro_batches if any(_length(places[i]) for i in part)]
    tokens = sum(_length(places[i]) for i in members)
    kept = len(places) - (int(found["silent"].sum()) if variant.drops else 0)
    responses = kept * len(members) / live
    bnpo = isinstance(config, PolicyLossConfig) and config.normalization == "bnpo"

    coefficients: list[Tensor] = []
    losses: list[float] = []
    metrics: dict[str, float] = {}
    for part in micro_batches if bnpo else [members]:
        own = sum(_length(places[i]) for i in part)

        def of(name: str, field: str, part: list[int] = part) -> Tensor:
            return torch.cat([getattr(policies[name].tokens[places[i]], field) for i in part])

        logprobs, entropies = (of("now", field).requires_grad_() for field in ("logprobs", "entropies"))
        sampling = torch.tensor([x for i in part for x in sampling_logprobs(completion(*places[i]))]).double()
        result = policy_loss(
            logprobs,
            found["advantages"][part].double(),
            cumulative(torch.tensor([_length(places[i]) for i in part])),
            old_logprobs=of("old", "logprobs") if variant.updates > 1 else None,
            ref_logprobs=of("reference", "logprobs") if terms.needs_reference else None,
            sampling_logprobs=sampling if terms.wants_sampling else None,
            entropies=entropies,
            normalizer=own * len(micro_batches) if bnpo else tokens if terms.normalization == "dapo" else responses,
            entropy_normalizer=tokens,
            config=config,
        )
        grads = torch.autograd.grad(result.loss, [logprobs, entropies], allow_unused=True, materialize_grads=True)
        coefficients.append(torch.stack(grads))
        losses.append(result.loss.item())
        for name, value in result.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value.item() * own / tokens
    a, e = torch.cat(coefficients, 1)
    now = [policies["now"].tokens[places[i]] for i in members]
    of_logprobs, of_entropies = torch.cat([t.of_logprobs for t in now]), torch.cat([t.of_entropies for t in now])
    gradient = a @ of_logprobs + e @ of_entropies
    sizes = a.abs() @ of_logprobs.abs() + e.abs() @ of_entropies.abs()
    split = policies["now"].split
    return Step(split(gradient), split(sizes), sum(losses), metrics)


def _places(found: dict[str, Any]) -> list[tuple[int, int]]:
    """The prompt and the place of each response of a run."""
    return [(int(text.split()[-1]), i % GROUP) for i, text in enumerate(found["prompts"])]


def _length(place: tuple[int, int]) -> int:
    return LENGTHS[place[0]][place[1]]
