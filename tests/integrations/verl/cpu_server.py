"""The rollout server: samples with transformers, one response after another.

The class stands in a module of its own, which imports verl first. Ray imports it in a bare process, and if the first
import there were a module that verl itself loads, that module would be imported before the verl that it needs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import verl  # noqa: F401
from transformers import AutoModelForCausalLM
from verl.workers.rollout.replica import TokenOutput

STOP = 12  # A token whose id this divides ends a response. So responses of a random model differ in length.


class Server:
    """A policy model of its own, whose weights the trainer replaces.

    What it samples depends on the trainer's step, the prompt, and how often it has been asked for this prompt in this
    step, and on nothing else. So a run that is resumed samples what the first one would have sampled.
    """

    def __init__(self, path: str, response_tokens: int) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", dtype=torch.float32).eval()
        self.response_tokens, self.step = response_tokens, 0
        self.asked: Counter[tuple[int, ...]] = Counter()

    def load_weights(self, state: dict[str, torch.Tensor], step: int | None) -> None:
        """Takes all weights. A tied head is no weight of its own."""
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        self.model.tie_weights()
        self.step = self.step if step is None else step
        self.asked.clear()

    @torch.no_grad()
    def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        """Samples one response; the log-probs are those of the distribution that was sampled from."""
        prompt = tuple(prompt_ids)
        key = (self.step, self.asked[prompt], *prompt)
        self.asked[prompt] += 1
        generator = torch.Generator().manual_seed(hash(key) % 2**63)  # A tuple of ints has the same hash everywhere.
        temperature = float(sampling_params.get("temperature", 1.0))
        tokens: list[int] = []
        logprobs: list[float] = []
        step, cache = torch.tensor([prompt]), None
        for _ in range(int(sampling_params.get("max_tokens") or self.response_tokens)):
            output = self.model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logprobs_V = (output.logits[0, -1].float() / temperature).log_softmax(-1)
            step = torch.multinomial(logprobs_V.exp(), 1, generator=generator)[None]
            tokens.append(int(step))
            logprobs.append(float(logprobs_V[tokens[-1]]))
            if tokens[-1] % STOP == 0:
                break
        return TokenOutput(
            token_ids=tokens, log_probs=logprobs, stop_reason="completed", extra_fields={"global_steps": self.step}
        )

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """Answers a call that concerns memory, other requests or a profiler."""

    wake_up = sleep = abort_all_requests = resume_generation = _nothing
    clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = _nothing
