"""``generation.ahead: 1``: who samples a batch, what overlaps, and that a run goes on bit by bit."""

from __future__ import annotations

import copy
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from maestro_fast.data.order import ShuffledOrder
from maestro_fast.generation import GenerationConfig, SamplingConfig, Served, ServerConfig
from maestro_fast.generation.sampling import completion_texts
from maestro_fast.records import Prompts, Rollouts
from maestro_fast.reporting.recorded_run import recorded_train
from maestro_fast.rewards import FunctionReward, RewardSet
from maestro_fast.settings import SettingsError
from maestro_fast.training import MaestroTrainer, Method, parse_config, train
from maestro_fast.training.batches import GroupSampler
from maestro_fast.training.checkpoint import StepState, load_step_state, save_step_state
from maestro_fast.training.overlap import Ahead, Started, check_ahead
from maestro_fast.training.weight_sync import Renewed
from tests.tiny import tiny_tokenizer
from tests.training.copy_engine import CopyEngine
from tests.training.test_checkpoint import KillAt, Killed, assert_same_run, killed_and_resumed
from tests.training.test_trainer import run

PATIENCE = 60.0  # seconds; only a test that fails waits for all of them
SERVER = {"type": "vllm_server", "url": "http://h"}


class AheadEngine(CopyEngine):
    """Stands for a server: it samples in threads, from weights of its own, and draws from a generator of its own.

    Attributes:
        weights: for each call of ``sample``, the engine's weights as one vector.
        rollouts: what it returned.
        before: called at the beginning of ``sample`` with the number of the call.
    """

    concurrent_parts = 1

    def __init__(self, model: PreTrainedModel, sampling: SamplingConfig, ahead: int) -> None:
        super().__init__(model, sampling)
        self.ahead, self._length = ahead, sampling.max_new_tokens
        self.weights: list[Tensor] = []
        self.rollouts: list[Rollouts] = []
        self.before: Callable[[int], None] = lambda call: None
        self._busy = threading.Lock()

    @torch.no_grad()
    def sample(self, prompts: Prompts, *, seed: int) -> Rollouts:
        with self._busy:  # ``load_weights`` fails while this is held.
            self.weights.append(vector(self.model))
            self.before(len(self.weights))
            ids: list[list[int]] = [[] for _ in prompts.token_ids]
            logprobs: list[list[float]] = [[] for _ in prompts.token_ids]
            for own in sorted({tuple(ids) for ids in prompts.token_ids}):
                rows = [row for row, prompt in enumerate(prompts.token_ids) if tuple(prompt) == own]
                generator, text = torch.Generator().manual_seed(seed % 2**62), torch.tensor([own] * len(rows))
                for _ in range(self._length):
                    logprobs_BV = self.model(text).logits[:, -1].log_softmax(-1)
                    chosen_B1 = torch.multinomial(logprobs_BV.exp(), 1, generator=generator)
                    text = torch.cat([text, chosen_B1], 1)
                    for row, token, value in zip(rows, chosen_B1[:, 0], logprobs_BV.gather(1, chosen_B1), strict=True):
                        ids[row].append(int(token))
                        logprobs[row].append(float(value))
        flat = torch.tensor([value for row in logprobs for value in row])
        texts = completion_texts(tiny_tokenizer(), prompts, ids)
        self.rollouts.append(Rollouts(prompts, ids, texts, torch.tensor([True] * len(ids)), flat))
        return self.rollouts[-1]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        assert not self._busy.locked(), "the weights change under a batch that is being sampled"
        super().load_weights(weights)


def vector(model: torch.nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().clone() for value in model.parameters()])


@pytest.fixture
def engines(raw_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[AheadEngine]:
    """The engines of the runs of a test, whose policy changes much in every step."""
    made: list[AheadEngine] = []

    def build_engine(config: GenerationConfig, served: Served) -> AheadEngine:
        assert isinstance(config, ServerConfig)
        model = AutoModelForCausalLM.from_pretrained(served.path)
        made.append(AheadEngine(model, served.sampling, config.ahead))
        return made[-1]

    def letters(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def codes(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 97) for text in completions]

    rewards = RewardSet([FunctionReward(letters, name="letters"), FunctionReward(codes, name="codes")])
    monkeypatch.setattr("maestro_fast.training.run.build_rewards", lambda _: rewards)
    monkeypatch.setattr("maestro_fast.training.run.build_engine", build_engine)
    folder = str(tmp_path / "weights")
    raw_config |= {
        "generation": SERVER | {"weights": "folder", "folder": folder, "ahead": 1},
        "loss": {"sampler_correction": "token_truncate"},
    }
    raw_config["sampling"]["max_new_tokens"] = 4
    raw_config["trainer"] |= {"max_steps": 4, "learning_rate": 0.02, "logging_steps": 1, "save_steps": 1}
    return made


class Notes(TrainerCallback):
    """Keeps the policy after every optimiser step, the first entry being the one before."""

    def __init__(self) -> None:
        self.policies: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.policies.append(vector(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.policies.append(vector(model))


def logged(raw: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (Path(raw["run_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def noted(raw: dict[str, Any], *callbacks: TrainerCallback) -> tuple[MaestroTrainer, list[Tensor]]:
    notes = Notes()
    return train(parse_config(raw), raw, callbacks=[notes, *callbacks]), notes.policies


@pytest.mark.parametrize("updates", [1, 2])
def test_a_batch_is_sampled_by_the_policy_before_the_steps_of_the_batch_before(
    raw_config: dict[str, Any], engines: list[AheadEngine], updates: int
) -> None:
    raw_config["batch"] |= {"updates_per_batch": updates}
    trainer, policies = noted(raw_config)
    batches = 4 // updates
    assert len(engines[0].weights) == batches  # nothing is sampled beyond the last step
    for number, weights in enumerate(engines[0].weights):
        expected = policies[max(0, number - 1) * updates]
        assert torch.equal(weights, expected), number
        assert number == 0 or not torch.equal(weights, policies[number * updates])
    lines = [line for line in trainer.state.log_history if "sampling/staleness" in line]
    assert [line["sampling/staleness"] for line in lines] == [0.0, *[float(updates)] * (batches - 1)]
    gaps = [line["sampling/logprob_gap_mean"] for line in lines]
    assert gaps[0] < 1e-5 < 1e-3 < min(gaps[1:])
    assert all(line["sync/probe_max"] < 1e-4 for line in lines)  # the probe saw the policy that was sent


def test_the_loss_weights_each_token_by_policy_over_sampler(
    raw_config: dict[str, Any], engines: list[AheadEngine]
) -> None:
    """The ratio that is logged, against log-probs of the policy that trains, computed here token by token."""
    raw_config["weights"] = "equal"
    raw_config["loss"]["sampler_cap"] = 1.05
    trainer, policies = noted(raw_config)
    model = copy.deepcopy(engines[0].model)
    rollouts = engines[0].rollouts[2]
    torch.nn.utils.vector_to_parameters(policies[2], model.parameters())
    ours = []
    for prompt, completion in zip(rollouts.prompts.token_ids, rollouts.completion_ids, strict=True):
        with torch.no_grad():
            logprobs_LV = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        ours += [float(logprobs_LV[len(prompt) - 1 + t, token]) for t, token in enumerate(completion)]
    ratio = (torch.tensor(ours) - rollouts.sampling_logprobs_C).exp()  # type: ignore[operator]
    line = [line for line in trainer.state.log_history if "loss" in line][2]
    assert (ratio > 1.05).any(), "nothing is capped: this shows less"
    mean = line["sampling/importance_sampling_ratio/mean"]
    assert mean == pytest.approx(ratio.mean().item(), rel=1e-4) or mean == pytest.approx(
        ratio.clamp(max=1.05).mean().item(), rel=1e-4
    )


def test_a_batch_is_sampled_while_the_one_before_is_judged_and_trained_on(
    raw_config: dict[str, Any], engines: list[AheadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch comes only once a step has been trained on the first."""
    stepped = threading.Event()

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stepped.set()

    def waiting(call: int) -> None:
        assert call != 2 or stepped.wait(PATIENCE)

    raw_config["trainer"] |= {"max_steps": 2, "save_strategy": "no"}
    init = AheadEngine.__init__

    def patient(self: AheadEngine, *args: Any) -> None:
        init(self, *args)
        self.before = waiting

    monkeypatch.setattr(AheadEngine, "__init__", patient)
    noted(raw_config, Steps())
    assert len(engines[0].weights) == 2


@pytest.mark.parametrize(
    ("changes", "step", "left"),
    [({}, 3, 1), ({"updates_per_batch": 2}, 2, 0), ({"micro_batch": 16}, 3, 1)],
    ids=["plain", "in the middle of a batch", "judged in the training forward"],
)
def test_a_killed_run_goes_on_bit_by_bit(
    raw_config: dict[str, Any], engines: list[AheadEngine], changes: dict[str, int], step: int, left: int
) -> None:
    raw_config["batch"] |= changes
    whole = copy.deepcopy(raw_config) | {"run_dir": raw_config["run_dir"] + "-whole"}
    recorded_train(whole)
    killed_and_resumed(raw_config, step)
    assert_same_run(whole["run_dir"], raw_config["run_dir"])
    assert len(engines[2].weights) == left  # the batch in flight is not sampled again


def test_a_reward_that_fails_costs_no_response(
    raw_config: dict[str, Any], engines: list[AheadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that could not be judged is saved as it was sampled, and the one after it is sampled again."""
    whole = copy.deepcopy(raw_config) | {"run_dir": raw_config["run_dir"] + "-whole"}
    raw_config["trainer"]["save_steps"] = 50
    recorded_train(whole)
    calls: list[int] = []

    def failing(completions: Sequence[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no judge")
        return [float(len(text)) for text in completions]

    def codes(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 97) for text in completions]

    rewards = RewardSet([FunctionReward(failing, name="letters"), FunctionReward(codes, name="codes")])
    monkeypatch.setattr("maestro_fast.training.run.build_rewards", lambda _: rewards)
    with pytest.raises(RuntimeError, match="no judge"):
        recorded_train(raw_config)
    assert engines[1].calls[-1] == "close" and len(engines[1].rollouts) == len(engines[1].weights) == 4
    recorded_train(raw_config, resume=True)
    assert_same_run(whole["run_dir"], raw_config["run_dir"])
    assert torch.equal(engines[2].weights[0], engines[1].weights[3])


def test_responses_that_a_server_took_with_it_are_sampled_anew(
    raw_config: dict[str, Any],
    engines: list[AheadEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def gone(call: int) -> None:
        if call == 3 and len(engines) == 1:
            raise ConnectionError("the server is gone")

    init = AheadEngine.__init__

    def mortal(self: AheadEngine, *args: Any) -> None:
        init(self, *args)
        self.before = gone

    monkeypatch.setattr(AheadEngine, "__init__", mortal)
    with pytest.raises(ConnectionError) as caught:
        recorded_train(raw_config)
    assert "The run as it was after step 2 is in " in caught.value.__notes__[-1]
    recorded_train(raw_config, resume=True)
    words = "batch 2 is sampled anew, by the policy as it is now, because the run was saved without its responses: "
    assert words + "ConnectionError: the server is gone" in caplog.text
    assert [line["sampling/staleness"] for line in logged(raw_config)] == [0.0, 1.0, 0.0, 1.0]


def test_an_evaluation_waits_for_the_batch_and_leaves_its_responses(
    raw_config: dict[str, Any], engines: list[AheadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``AheadEngine`` refuses other weights while it samples; with evaluations the run is the same as without."""
    init = AheadEngine.__init__

    def slow(self: AheadEngine, *args: Any) -> None:
        init(self, *args)
        self.before = lambda call: time.sleep(0.5 * (call == 2))  # This batch is being sampled at the evaluation.

    monkeypatch.setattr(AheadEngine, "__init__", slow)
    without = copy.deepcopy(raw_config) | {"run_dir": raw_config["run_dir"] + "-without"}
    recorded_train(without)
    raw_config["evaluation"] = {"data": raw_config["data"]}
    raw_config["trainer"] |= {"eval_strategy": "steps", "eval_steps": 1}
    recorded_train(raw_config)
    ours, theirs = ((Path(raw["run_dir"]) / "rollouts.jsonl").read_bytes() for raw in (raw_config, without))
    assert ours == theirs
    assert len(engines[1].weights) == 4 + 4 * 4  # an evaluation asks for four prompts at a time


def test_a_run_that_stops_waits_for_what_it_does_not_use(
    raw_config: dict[str, Any], engines: list[AheadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == 2

    init, close, there = AheadEngine.__init__, AheadEngine.close, []

    def slow(self: AheadEngine, *args: Any) -> None:
        init(self, *args)
        self.before = lambda call: time.sleep(0.5 * (call == 3))  # This batch is of no use any more.

    def closed(self: AheadEngine) -> None:
        there.append(len(self.rollouts))
        close(self)

    monkeypatch.setattr(AheadEngine, "__init__", slow)
    monkeypatch.setattr(AheadEngine, "close", closed)
    raw_config["trainer"]["save_strategy"] = "no"
    noted(raw_config, Ends())
    assert len(engines[0].weights) == 3 and there == [3]


def test_a_policy_that_asks_to_stop_has_nothing_sampled_ahead(
    raw_config: dict[str, Any], engines: list[AheadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maestro_fast.weighting.conductor.Conductor.should_stop", True, raising=False)
    trainer, _ = noted(raw_config)
    assert trainer.state.global_step == 1 and len(engines[0].weights) == 1


# ---- what is refused, saved and dealt ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"loss": {}},
            "generation.ahead: 1 with loss.sampler_correction: none: each batch is sampled by the policy of",
        ),
        ({"sampling": {"top_p": 0.9}}, "loss.sampler_correction: token_truncate with sampling.top_p: 0.9"),
        ({"generation": {"type": "vllm", "ahead": 1}}, "generation.ahead: 1 with type: vllm, which samples on the"),
        ({"generation": {"ahead": 1}}, "generation.ahead: 1 with type: transformers, which samples on the devices"),
        (
            {"generation": {"type": "vllm_server", "url": "http://h", "ahead": 2}},
            "generation.ahead: got int 2, expected one of 0, 1",
        ),
        ({"generation": SERVER | {"ahead": 1, "parts": 2}}, "generation.parts: 2 with ahead: 1, expected 1"),
    ],
)
def test_what_is_refused(
    raw_config: dict[str, Any], engines: list[AheadEngine], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(words)):
        parse_config(raw_config | changes)
    assert parse_config(raw_config | {"generation": {"type": "transformers", "ahead": 0}})


def test_an_engine_that_samples_in_parts_is_refused(
    raw_config: dict[str, Any], engines: list[AheadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AheadEngine, "concurrent_parts", 2)
    with pytest.raises(SettingsError, match=r"generation\.ahead: 1 with concurrent_parts 2, expected 1"):
        recorded_train(raw_config)


def test_a_loss_of_ones_own_needs_the_log_probs_of_the_sampler() -> None:
    check_ahead(1, SamplingConfig(), lambda inputs: None)
    with pytest.raises(SettingsError, match=r"^generation.ahead: 1 with sampling.top_k: 5 and a loss of your own"):
        check_ahead(1, SamplingConfig(top_k=5), lambda inputs: None)


def test_each_process_samples_for_the_prompts_that_it_is_dealt() -> None:
    """The data loader's own way to deal batches to processes says which prompts these are."""
    sampler = GroupSampler(ShuffledOrder(16, block=4, seed=5), repeat=3)
    for rank in range(2):
        dealt = list(BatchSamplerShard(BatchSampler(sampler, 2, drop_last=False), 2, rank))
        step: Any = SimpleNamespace(
            plan=SimpleNamespace(prompts=2),
            processes=SimpleNamespace(rank=rank),
            sampler=SimpleNamespace(generator=None),
        )
        ahead = Ahead(step, sampler.rows, lambda rows: Prompts([str(row) for row in rows], []), Method())
        assert [ahead._own_prompts(i // 3).texts for i in range(12)] == [[str(row) for row in rows] for rows in dealt]


@pytest.mark.parametrize("logprobs", [torch.tensor([-0.1, -0.2, -0.3]), None])
def test_a_batch_comes_back_from_a_checkpoint_as_it_was(tmp_path: Path, logprobs: Tensor | None) -> None:
    prompts = Prompts(["a", [{"role": "user", "content": "b"}]], [[1, 2], [3]])
    texts: list[Any] = ["\u00e4\n", [{"role": "assistant", "content": "x"}]]
    rollouts = Rollouts(prompts, [[5], [6, 7]], texts, torch.tensor([True, False]), logprobs, {"sync/probe_max": 0.1})
    save_step_state(tmp_path, StepState(ahead=Started.done(rollouts, 3, 7, 2)), 0, 1)
    state = load_step_state(tmp_path, 0, 1, torch.device("cpu"))
    assert state is not None and state.ahead is not None
    back = state.ahead.responses()
    assert (state.ahead.number, state.ahead.step, state.ahead.staleness) == (3, 7, 2)
    assert (back.prompts.token_ids, back.completion_ids, back.completions, back.metrics) == (
        prompts.token_ids,
        rollouts.completion_ids,
        texts,
        rollouts.metrics,
    )
    assert back.truncated_B.tolist() == [True, False] and back.truncated_B.dtype == torch.bool
    assert (back.sampling_logprobs_C is None) if logprobs is None else torch.equal(back.sampling_logprobs_C, logprobs)


@pytest.mark.parametrize("change", ["prompts", "ahead"])
def test_responses_that_belong_to_the_run_no_more_are_not_used(
    raw_config: dict[str, Any], engines: list[AheadEngine], caplog: pytest.LogCaptureFixture, change: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maestro_fast.training.trainer.MaestroTrainer.log", lambda *args: None)
        with pytest.raises(Killed):
            noted(raw_config, KillAt(2))
    if change == "prompts":
        data = Path(raw_config["data"]["path"])
        data.write_text(data.read_text(encoding="utf-8").replace("colour", "number"), encoding="utf-8")
    else:
        raw_config["generation"]["ahead"] = 0
    run(raw_config, resume=True, trainer__max_steps=3)
    why = "the prompts of the run have changed" if change == "prompts" else "generation.ahead is 0 now"
    assert f"the responses of batch 1, sampled ahead, are not used: {why}" in caplog.text
    assert len(engines[1].weights) == 2


def test_a_call_that_needs_other_weights_waits_for_the_batch(
    raw_config: dict[str, Any], engines: list[AheadEngine]
) -> None:
    raw_config["trainer"] |= {"max_steps": 1, "save_strategy": "no"}
    trainer, _ = noted(raw_config)
    synced: Any = trainer.step.sampler.generator
    model: Any = trainer.model
    prompts = Prompts(["a"] * 4, [[5, 6]] * 4)
    ahead, done = synced.renewed(model), threading.Event()
    assert isinstance(ahead, Renewed)
    with torch.no_grad():
        model.lm_head.weight[0] += 1.0
    sent = vector(engines[0].model)

    def other() -> None:
        synced.generate(model, prompts, seed=1)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert not done.wait(0.2) and torch.equal(vector(engines[0].model), sent)
    sampler = threading.Thread(target=lambda: ahead.generate(model, prompts, seed=2))
    sampler.start()
    assert done.wait(PATIENCE)
    for each in (thread, sampler):
        each.join(PATIENCE)
    assert torch.equal(engines[0].weights[-2], sent) and torch.equal(engines[0].weights[-1], vector(model))
