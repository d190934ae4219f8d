"""A generation batch gives the same numbers wherever log-probs and hidden states come from."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from maestro_fast.ops import cpp, token_logprobs
from maestro_fast.records import PolicyOutputs
from maestro_fast.training import MaestroTrainer
from maestro_fast.training.batches import Processes
from maestro_fast.training.step import Step
from tests.training.test_trainer import parameters, run

CASES = {
    "training": {"batch": {"micro_batch": 16}},
    "an extra forward": {"batch": {"micro_batch": 8}},
    "2 updates per batch": {"batch": {"micro_batch": 8, "updates_per_batch": 2}},
}


def case(raw: dict[str, Any], name: str, **sections: dict[str, Any]) -> tuple[MaestroTrainer, Any]:
    raw = copy.deepcopy(raw) | {"run_dir": f"{raw['run_dir']}-{name}"}
    for section, values in {**CASES[name], **sections}.items():
        raw[section] = {**raw.get(section, {}), **values}
    return run(raw)


def test_the_three_cases_give_the_same_numbers(steady: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs, entropies, contexts, weights and advantages of the first batch, to 1e-5."""
    seen: list[PolicyOutputs] = []
    prepare = Step.prepare

    def spy(step: Step, model: Any, sampled: Any, outputs: PolicyOutputs, learn: Any) -> Any:
        seen.append(outputs)
        return prepare(step, model, sampled, outputs, learn)

    monkeypatch.setattr(Step, "prepare", spy)
    results = []
    for name in CASES:
        seen.clear()
        _, records = case(steady, name, trainer={"max_steps": 1})
        results.append((seen[0], records[0]))
    (outputs, record), *others = results

    assert outputs.context_Bd is not None and outputs.context_Bd.std() > 0.1
    for other, other_record in others:
        for key in ("logprobs_C", "entropies_C", "context_Bd"):
            torch.testing.assert_close(getattr(other, key), getattr(outputs, key), rtol=1e-5, atol=1e-5, msg=key)
        for key in ("rewards_BK", "weights_BK", "advantages_B"):
            ours, theirs = getattr(other_record, key), getattr(record, key)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=key)


def test_policy_and_conductor_learn_the_same_from_either_forward(steady: dict[str, Any]) -> None:
    """The perplexity reward scores texts in a forward of its own, between the training forward and its backward."""
    steady["rewards"].append({"name": "perplexity", "require_format": False})
    both = [case(steady, name)[0] for name in ("training", "an extra forward")]
    one, other = (trainer.step.weights.state_dict() for trainer in both)

    assert one["weight"].abs().max() > 1e-3
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-4, msg=key)
    for (key, ours), theirs in zip(parameters(both[0]).items(), parameters(both[1]).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=key)


def test_the_policy_is_scored_with_the_bits_of_its_training_forward(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference may be scored in the way that is fastest, since none of its bits is compared."""
    seen = Counter[tuple[str, bool]]()

    def spy(states: Any, weight: Any, *given: Any, strategy: str, **options: Any) -> Any:
        seen[strategy, torch.is_grad_enabled()] += 1
        return token_logprobs(states, weight, *given, strategy=strategy, **options)

    monkeypatch.setattr("maestro_fast.model.forward.token_logprobs", spy)
    case(raw_config, "2 updates per batch", loss={"kl_coef": 0.1}, trainer={"max_steps": 2})
    assert seen.keys() == {("chunked", False), ("auto", False)} and len(set(seen.values())) == 1


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_logits_goes_through_cpp(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On a CPU, forward and back, in each way that a batch may be scored. PyTorch's rows are not called."""
    calls = Counter[str]()

    def count(function: str) -> None:
        run = getattr(cpp._C, function)

        def counted(*given: Any) -> Any:
            calls[function] += 1
            return run(*given)

        monkeypatch.setattr(cpp._C, function, counted)

    count("row_statistics")
    count("dlogits")
    monkeypatch.delattr("maestro_fast.ops.head_rows._block_statistics")
    monkeypatch.delattr("maestro_fast.ops.head_rows._block_dlogits")
    case(raw_config, name, loss={"kl_coef": 0.1}, trainer={"max_steps": 2})
    assert calls["row_statistics"] > calls["dlogits"] >= 2


def test_one_forward_per_step_is_one(raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    from maestro_fast.model import forward
    from maestro_fast.training import trainer

    original = forward.last_hidden

    def spy(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(forward, "last_hidden", spy)
    monkeypatch.setattr(trainer, "last_hidden", spy)
    case(raw_config, "training", trainer={"max_steps": 3})

    assert len(calls) == 3


def test_texts_are_scored_in_as_many_forwards_as_on_the_process_with_most(
    raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sharded model needs the same number of forwards on every process, even on one without a text to score."""
    trainer, _ = case(raw_config, "an extra forward", trainer={"max_steps": 1})
    texts = (["Name a colour.", "Sing."], ["it is", ""], [" red", "la la"])
    alone = trainer.step.judges.text_scorer(trainer.model)(*texts)
    calls: list[int] = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(Processes, "gather", lambda processes, own: torch.cat([own, torch.tensor([17])]))
    together = trainer.step.judges.text_scorer(trainer.model)(*texts)

    assert len(calls) == 3  # for 17 rows, 8 at a time
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert trainer.step.judges.text_scorer(trainer.model)([], [], []) == []
    assert len(calls) == 6
