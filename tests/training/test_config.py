"""Settings from a file and the command line; each mistake is named."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from maestro_fast.generation import ColocateConfig, TransformersConfig
from maestro_fast.rewards import (
    AnchorConfig,
    FormatReward,
    FunctionRewardConfig,
    GateConfig,
    LabelsConfig,
    PreferenceConfig,
    RewardConfig,
)
from maestro_fast.settings import SettingsError
from maestro_fast.specs import FunctionLoss, PolicyLossConfig
from maestro_fast.training import parse_config, read_config, train
from maestro_fast.training.arguments import training_arguments
from maestro_fast.weighting import POLICIES, GuardConfig, WeightsConfig

RandomConfig, Exp3Config = POLICIES["random"], POLICIES["exp3"]

MINIMAL = "run_dir: out\nmodel: {path: m}\ndata: {path: p.jsonl}\nrewards: [format]\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_defaults_are_a_working_run(config_file: Path) -> None:
    config = parse_config(read_config(config_file))

    assert config.weights == WeightsConfig()
    assert config.rewards == [RewardConfig(FormatReward())]
    assert config.generation == TransformersConfig()
    assert config.loss == PolicyLossConfig()
    assert config.anchor is None
    assert config.method.profile == "maestro"
    assert config.method.sampling.group_size == 8


def test_overrides_reach_nested_settings(config_file: Path) -> None:
    words = [
        "--sampling.group_size",
        "4",
        "--trainer.learning_rate=1e-5",
        "--weights",
        "random",
        "--model.lora",
        "{r: 2}",
    ]
    config = parse_config(read_config(config_file, words))

    assert config.sampling.group_size == 4
    assert config.weights == WeightsConfig(RandomConfig())
    assert config.model.lora is not None
    assert config.model.lora.r == 2


def test_every_section_is_read_into_its_dataclass(config_file: Path) -> None:
    """Nothing is loaded yet, neither models nor files."""
    words = ["--anchor", "{function: '/j/judge.py:utility', labels: {share: 0.25}, where: family}"]
    words += ["--generation", "{type: vllm, tensor_parallel: 2}", "--weights", "{type: exp3, guard: {window: 3}}"]
    words += ["--rewards", "[{type: preference, model: m, gate: {on: format, threshold: 1}}]"]
    config = parse_config(read_config(config_file, words))

    utility = FunctionRewardConfig("/j/judge.py:utility")
    assert config.anchor == AnchorConfig(utility, where="family", labels=LabelsConfig(0.25))
    assert config.generation == ColocateConfig(tensor_parallel=2)
    assert config.weights == WeightsConfig(Exp3Config(), GuardConfig(window=3))
    (reward,) = config.rewards
    assert isinstance(reward.reward, PreferenceConfig)
    assert reward.gate == GateConfig(RewardConfig(FormatReward()), 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run_dir", "''"], r"^run_dir: is empty, expected a directory"),
        (["--data.path", "''"], r"^data\.path: is empty, expected a file, a folder or the name of a data set"),
        (["--model.lora", "{r: 0}"], r"^model\.lora\.r: 0, expected at least 1"),
        (["--model.lora", "{alpha: -5}"], r"^model\.lora\.alpha: -5, expected at least 1"),
        (["--model.lora", "{dropout: 2}"], r"^model\.lora\.dropout: 2(\.0)?, expected 0 <= dropout < 1"),
        (["--sampling.temperature", ".inf"], r"^sampling\.temperature: inf, expected a finite positive number"),
    ],
)
def test_values_that_no_run_can_have_are_named(config_file: Path, words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_config(read_config(config_file, words))


OLD = """
run_dir: out
model: {path: m}
data: {path: p.jsonl}
rewards:
  - format
  - {name: brevity, kind: length, target: 12, gate: {on: format, threshold: 1}, where: {family: [poem, 3]}}
  - {name: entropy, direction: maximise}
  - {name: rich, function: "my_rewards.py:richness", scale: 2}
anchor: {name: truth, kind: length, target: 3, labels: {share: 0.25}}
weights: {policy: callable, function: "my_weights.py:f", guard: {window: 3}}
generation: {engine: vllm, mode: server, url: "http://h:1"}
"""
NEW = """
run_dir: out
model: {path: m}
data: {path: p.jsonl}
rewards:
  - {type: format}
  - {type: length, name: brevity, target: 12, gate: {on: format, threshold: 1}, where: {family: [poem, 3]}}
  - {type: entropy, direction: maximise}
  - {type: function, name: rich, function: "my_rewards.py:richness", scale: 2}
anchor: {type: length, name: truth, target: 3, labels: {share: 0.25}}
weights: {type: function, function: "my_weights.py:f", guard: {window: 3}}
generation: {type: vllm_server, url: "http://h:1"}
loss: {type: policy_loss}
"""


def test_a_config_of_release_0_1_means_the_same_as_in_todays_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maestro_fast.settings._said", set())
    (tmp_path / "new.yaml").write_text(NEW, encoding="utf-8")
    (tmp_path / "old.yaml").write_text(OLD, encoding="utf-8")
    new = parse_config(read_config(tmp_path / "new.yaml"))
    assert not caplog.messages

    assert parse_config(read_config(tmp_path / "old.yaml")) == new
    old_keys = ("rewards: the key `kind`", "rewards[2]: a reward's type", "anchor: the key `kind`", "weights: the key")
    others = ("weights.type: `callable`", "generation: the key `engine`", "generation.mode: is part of the type")
    assert [next(words for words in (*old_keys, *others) if line.startswith(words)) for line in caplog.messages] == [
        *old_keys,
        *others,
    ]
    caplog.clear()
    changed = read_config(tmp_path / "old.yaml", ["--weights.policy", "equal", "--generation.engine", "transformers"])
    assert (changed["weights"]["type"], changed["generation"]["type"]) == ("equal", "transformers")
    assert "policy" not in changed["weights"] and "engine" not in changed["generation"]


LOSS = """
from maestro_fast.specs import PolicyLossConfig

def mine(inputs):
    return (inputs.logprobs * 2).sum(), {"tokens": inputs.logprobs.numel()}

def with_entropies(inputs):
    return inputs.entropies.sum(), {}

with_entropies.entropies = with_entropies.row_wise = True

def with_others(logprobs, advantages, **others):
    return logprobs.sum(), {}

not_a_function = 3
"""


@pytest.mark.parametrize(
    "section",
    [
        "{type: function, function: 'FOLDER/my_loss.py:mine', needs_reference: true}",
        "{function: 'FOLDER/my_loss.py:mine', needs_reference: true}",
    ],
)
def test_a_loss_of_ones_own(section: str, config_file: Path) -> None:
    (config_file.parent / "my_loss.py").write_text(LOSS, encoding="utf-8")
    words = ["--loss", section.replace("FOLDER", str(config_file.parent))]
    config = parse_config(read_config(config_file, words))
    assert config.loss == FunctionLoss(f"{config_file.parent}/my_loss.py:mine", needs_reference=True)
    with pytest.raises(TypeError, match=r"^function: is the name '.*my_loss.py:mine', expected the function"):
        config.loss(None)  # type: ignore[operator]

    loss: Any = config.method.loss
    assert isinstance(loss, FunctionLoss) and loss.needs_reference and not loss.needs_entropy
    assert not loss.entropies and not loss.row_wise
    value, metrics = loss(SimpleNamespace(logprobs=torch.tensor([1.0, 2.0])))
    assert value.item() == 6.0 and metrics == {"tokens": 2}


DAPO = """
import torch

def dapo(inputs):
    assert (inputs.ref_logprobs is not None) == WANTED and (inputs.entropies is not None or not WANTED)
    old = inputs.logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    ratio = (inputs.logprobs - old).exp()
    advantages = inputs.advantages.repeat_interleave(inputs.cu_seqlens.diff().long())
    tokens = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return tokens.sum() / inputs.normalizer, {"own_ratio": ratio.mean()}
"""


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("micro_batch", [8, 16])
def test_a_loss_of_ones_own_trains_as_the_built_in_one(
    raw_config: dict[str, Any], tmp_path: Path, wanted: bool, micro_batch: int
) -> None:
    """DAPO's loss from a file, with several micro-batches (scored before) and with one (judged in the forward)."""
    (tmp_path / "own.py").write_text(DAPO.replace("WANTED", str(wanted)), encoding="utf-8")
    own = {"function": f"{tmp_path}/own.py:dapo", "needs_reference": wanted, "needs_entropy": wanted}
    trained = []
    for name, loss in (("own", own), ("built_in", {"normalization": "dapo"})):
        raw = raw_config | {"run_dir": str(tmp_path / name), "loss": loss}
        raw["batch"] = raw["batch"] | {"micro_batch": micro_batch}
        trained.append(train(parse_config(raw), raw))

    one, other = (dict(trainer.model.named_parameters()) for trainer in trained)
    for name, parameter in one.items():
        torch.testing.assert_close(parameter, other[name], rtol=1e-4, atol=1e-6)
    assert trained[0].state.log_history[0]["loss/own_ratio"] == pytest.approx(1.0)


def test_what_a_loss_is_marked_with_reaches_the_trainer(config_file: Path) -> None:
    (config_file.parent / "my_loss.py").write_text(LOSS, encoding="utf-8")
    config = parse_config(read_config(config_file, ["--loss", f"{config_file.parent}/my_loss.py:with_entropies"]))
    loss: Any = config.method.loss
    assert loss.needs_entropy and loss.entropies and loss.row_wise and not loss.needs_reference
    assert FunctionLoss(print, needs_entropy=True).entropies and not FunctionLoss(print).entropies


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nothing", r"^loss\.function: .*my_loss.py has no 'nothing'; its callables are PolicyLossConfig, mine, with"),
        ("not_a_function", r"^loss\.function: .* is a int, expected a callable"),
        (
            "with_others",
            r"^loss\.function: .*with_others takes \(logprobs, advantages, \*\*others\), expected a",
        ),
    ],
)
def test_a_loss_that_cannot_be_loaded_is_named(config_file: Path, name: str, complaint: str) -> None:
    (config_file.parent / "my_loss.py").write_text(LOSS, encoding="utf-8")
    config = parse_config(read_config(config_file, ["--loss", f"{config_file.parent}/my_loss.py:{name}"]))
    with pytest.raises((ValueError, TypeError), match=complaint):
        _ = config.method


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sampling.group_size", "1"], r"^sampling\.group_size: 1, expected at least 2"),
        (["--sampling.groups", "4"], r"^sampling\.groups: unknown setting, expected one of group_size"),
        (["--sampling.temperature", "hot"], r"^sampling\.temperature: got str 'hot', expected float"),
        (["--loss.normalization", "mean"], r"^loss\.normalization: got str 'mean', expected one of grpo"),
        (["--batch.micro_batch", "0"], r"^batch\.micro_batch: 0, expected at least 1"),
        (["--data.limit", "-1"], r"^data\.limit: -1, expected at least 1 or null"),
        (["--data.max_prompt_tokens", "0"], r"^data\.max_prompt_tokens: 0, expected at least 1 or null"),
        (["--rewards", "[{type: length}]"], r"^rewards\[0\]\.target: missing, it has no default"),
        (["--rewards", "format"], r"^rewards: got str 'format', expected a list"),
        (["--rewards", "[{type: lenght}]"], r"^rewards\[0\]\.type: 'lenght', expected one of entropy, format, length"),
        (["--weights.type", "best"], r"^weights\.type: 'best', expected one of equal, static"),
        (["--weights.guard", "{windw: 3}"], r"^weights\.guard\.windw: unknown setting, expected one of action"),
        (["--anchor", "{type: format, labels: {share: 2}}"], r"^anchor\.labels\.share: 2\.0, expected 0 < share <= 1"),
        (["--generation.type", "sglang"], r"^generation\.type: 'sglang', expected one of transformers, vllm"),
        (["--loss", "{type: ppo}"], r"^loss\.type: 'ppo', expected one of policy_loss, function"),
        (["--loss.function", "3"], r"^loss\.function: got int 3, expected str or a function"),
        (["--loss", "{function: 'a:b', clip_low: 1}"], r"^loss\.clip_low: unknown setting, expected one of function"),
        (
            ["--loss", "{type: policy_loss, function: 'a:b'}"],
            r"^loss\.function: unknown setting, expected one of clip_",
        ),
        (["--seed", "-1"], r"^seed: -1, expected 0 <= seed < 2\*\*32"),
        (["--advantages.profile", "gdop"], r"^advantages\.profile: 'gdop', expected one of maestro, .*'gdpo'\?$"),
        (["--sampling.temprature", "1"], r"^sampling\.temprature: unknown setting, .*; did you mean 'temperature'\?$"),
        (["--num_generations", "8"], r"^num_generations: unknown setting; here TRL's num_generations is sampling\."),
        (["--loss.beta", "0.1"], r"^loss\.beta: unknown setting; here TRL's beta is loss\.kl_coef"),
        (
            ["--max_completion_length", "9"],
            r"^max_completion_length: .*TRL's max_completion_length is sampling\.max_new",
        ),
        (["--rollout.n", "8"], r"^rollout: unknown setting; here verl's rollout\.n is sampling\.group_size"),
        (["--algorithm.gamma", "1"], r"^algorithm: unknown setting; algorithm is a section of verl's config"),
        (["--learning_rate", "1"], r"^learning_rate: unknown setting; it is trainer\.learning_rate"),
        (["--batch.group_size", "8"], r"^batch\.group_size: unknown setting; it is sampling\.group_size"),
        (["--sampling.seed", "8"], r"^sampling\.seed: unknown setting; it is seed"),
        (["--mask_truncated_completions", "true"], r"; here TRL's mask_truncated_completions is batch\.truncated"),
        (["--algorithm.filter_groups.enable", "true"], r"^algorithm: .*filter_groups\.enable is batch\.no_signal"),
        (
            ["--rewards", "[{type: overlong, limit: 999, buffer: 9}]"],
            r"^rewards\[0\]\.limit: 999, but no response gets",
        ),
        (["--seed"], r"^seed: missing its value"),
        (["--seed", "--final", "last"], r"^seed: missing its value"),
        (["seed", "3"], r"^seed: expected --section\.setting VALUE"),
    ],
)
def test_a_wrong_setting_is_named(config_file: Path, words: list[str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        parse_config(read_config(config_file, words))


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: out\n", encoding="utf-8")

    with pytest.raises(SettingsError, match=r"^model: missing"):
        parse_config(read_config(path))
    with pytest.raises(SettingsError, match="config: no file"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"learnin_rate": 1e-5}, r"^trainer\.learnin_rate: transformers\.TrainingArguments has no such field"),
        ({"gradient_accumulation_steps": 4}, r"^trainer\.gradient_accumulation_steps: is set by batch\.micro_batch"),
        ({"output_dir": "x"}, r"^trainer\.output_dir: is set by run_dir"),
        (
            {"lr_scheduler_type": "cosin"},
            r"^trainer\.lr_scheduler_type: 'cosin', expected one of linear, .*'cosine'\?$",
        ),
        ({"max_grad_norm": "high"}, r"^trainer\.max_grad_norm: got str 'high', expected float"),
        ({"max_steps": 1.5}, r"^trainer\.max_steps: got float 1\.5, expected int"),
        ({"bf16": "yes"}, r"^trainer\.bf16: got str 'yes', expected bool"),
        ({"learning_rate": None}, r"^trainer\.learning_rate: got nothing, expected float"),
        ({"learning_rate": -1}, r"^trainer\.learning_rate: -1, expected a finite number of at least 0"),
        ({"learning_rate": math.inf}, r"^trainer\.learning_rate: inf, expected a finite number of at least 0"),
        (
            {"dataloader_num_workers": -1},
            r"^trainer\.dataloader_num_workers: -1, expected a finite number of at least 0",
        ),
        ({"adam_beta2": 1.0}, r"^trainer\.adam_beta2: 1\.0, expected a number below 1"),
        ({"max_steps": 0}, r"^trainer\.max_steps: 0, expected at least 1, or -1 to train for num_train_epochs"),
        ({"max_steps": -5}, r"^trainer\.max_steps: -5, expected at least 1, or -1"),
        ({"report_to": ["none", "wandbb"]}, r"^trainer\.report_to: 'none', expected one of none, all, .*"),
        ({"report_to": "wandbb"}, r"^trainer\.report_to: 'wandbb', expected one of none, all, .*'wandb'\?$"),
        ({"eval_steps": 5}, r"^trainer\.eval_steps: there are no prompts for it, expected a section evaluation"),
        ({"learing_rate": 1}, r"^trainer\.learing_rate: .* has no such field; did you mean 'learning_rate'\?"),
        ({"beta": 0.1}, r"^trainer\.beta: .* has no such field; here TRL's beta is loss\.kl_coef"),
        ({"group_size": 4}, r"^trainer\.group_size: .* has no such field; it is sampling\.group_size"),
        ({"total_epochs": 2}, r"^trainer\.total_epochs: .*; here verl's trainer\.total_epochs is trainer\.num_train"),
        ({"save_only_model": True}, r"^trainer\.save_only_model: True is not supported: .*optimiser"),
        ({"ignore_data_skip": True}, r"^trainer\.ignore_data_skip: True is not supported"),
        ({"auto_find_batch_size": True}, r"^trainer\.auto_find_batch_size: .*batch\.micro_batch"),
        ({"push_to_hub": True}, r"^trainer\.push_to_hub: True is not supported"),
    ],
)
def test_trainer_settings_are_checked(config_file: Path, values: dict[str, Any], complaint: str) -> None:
    config = parse_config({**read_config(config_file), "trainer": values})

    with pytest.raises(SettingsError, match=complaint):
        training_arguments(config)


def test_what_yaml_reads_otherwise_reaches_the_trainer(config_file: Path) -> None:
    values = {"save_strategy": False, "learning_rate": "1e-5", "warmup_steps": 10, "report_to": None}
    args = training_arguments(parse_config({**read_config(config_file), "trainer": values}))

    assert (args.save_strategy, args.learning_rate, args.warmup_steps) == ("no", 1e-5, 10)


@pytest.mark.parametrize(
    ("section", "missing"),
    [
        ("anchored", "weights: anchored"),
        ("{type: conductor, objective: first_order}", r"weights\.objective: first_order"),
        ("{type: equal, guard: {}}", r"weights\.guard"),
    ],
)
def test_a_policy_that_learns_from_a_utility_needs_an_anchor(config_file: Path, section: str, missing: str) -> None:
    with pytest.raises(SettingsError, match=f"^anchor: missing, {missing} needs a known utility"):
        parse_config(read_config(config_file, ["--weights", section]))
    parse_config(read_config(config_file, ["--weights", section, "--anchor", "format"]))


def test_one_process_takes_one_gpu(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(read_config(config_file))
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)

    with pytest.raises(SettingsError, match=r"sees 2 GPUs, .* torchrun --nproc_per_node=2, .* CUDA_VISIBLE_DEVICES"):
        training_arguments(config)
