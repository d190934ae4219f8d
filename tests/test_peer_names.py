"""The table of TRL's and verl's names: no field of TRL's config is missing, and all lead to settings of ours."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest
from transformers import TrainingArguments

from maestro_fast.config_reference import sections
from maestro_fast.peer_names import TRL, TRL_ALONE, VERL, our_name
from maestro_fast.settings import SettingsError
from maestro_fast.training.config import parse_config


def test_trls_config_has_no_field_that_the_table_lacks() -> None:
    trl = pytest.importorskip("trl")
    shared = {item.name for item in fields(TrainingArguments)}
    own = {item.name for item in fields(trl.GRPOConfig)} - shared

    assert own <= TRL.keys() | TRL_ALONE
    assert not TRL.keys() & TRL_ALONE


def test_the_names_lead_to_settings_that_there_are() -> None:
    ours = {row.name for section in sections() for row in section.rows}
    ours |= {"generation.type"} | {f"evaluation.{name}" for name in ours if name.startswith("data.")}
    ours |= {f"trainer.{item.name}" for item in fields(TrainingArguments)}
    for peer in (TRL, VERL):
        for name, words in peer.items():
            named = re.findall(r"\b(?:run_dir|(?:[a-z]+\.)+[a-z_]+)\b", words.partition(":")[0])
            for setting in named:
                assert setting in ours, f"{name}: there is no {setting} here"
            assert named or re.match(r"rewards|weights|generation|always|torchrun|--resume", words), name


def test_names_are_found_in_sections_and_in_mappings() -> None:
    assert our_name("beta") == our_name("loss.beta") == "here TRL's beta is loss.kl_coef"
    assert our_name("min_p") == "TRL's min_p has no equal here"
    assert our_name("use_bias_correction_kl", False) == "here TRL's use_bias_correction_kl is loss.kl_bias_correction"
    kwargs = our_name("chat_template_kwargs", {"enable_thinking": False})
    assert kwargs == "here TRL's chat_template_kwargs is chat.template_kwargs"
    whole = our_name("actor_rollout_ref", {"rollout": {"n": 8}, "actor": {"kl_loss_coef": 1}})
    assert whole == "here verl's rollout.n is sampling.group_size; here verl's actor.kl_loss_coef is loss.kl_coef"
    assert our_name("critic", {"x": 1}).startswith("critic is a section of verl's config")
    assert our_name("samplin.temprature") == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", ["tools.py:look_up"]),
        ("environment_factory", "game.py:Game"),
        ("max_tool_calling_iterations", 3),
        ("sampling.max_turns", 2),
        ("multi_turn", {"enable": True, "max_assistant_turns": 3}),
        ("actor_rollout_ref", {"rollout": {"multi_turn": {"enable": True}}}),
    ],
)
def test_several_turns_lead_to_trls_trainer(name: str, value: Any) -> None:
    hint = our_name(name, value)
    assert hint.count("a rollout here is a single turn") == 1 and "integrations.trl.MaestroGRPOTrainer" in hint
    section, _, own = name.rpartition(".")
    raw: dict[str, Any] = {"run_dir": "run", "model": {"path": "m"}, "data": {"path": "d"}, "rewards": ["format"]}
    with pytest.raises(SettingsError, match=f"^{name}: unknown setting; a rollout here is a single turn"):
        parse_config({**raw, **({section: {own: value}} if section else {own: value})})
