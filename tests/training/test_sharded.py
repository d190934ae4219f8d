"""FSDP2 over two processes trains as DDP does, resumes bit by bit, and leaves a whole policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from maestro_fast.model.head import LanguageHead
from maestro_fast.model.sharding import check_sharding
from tests.training.sharded_processes import CASES, STATES
from tests.training.test_distributed import launch


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, tied in (("tied", True), ("untied", False)):
        (folder / name).symlink_to(checkpoint(tied=tied))
    return folder


def run(checkpoints: Path, out: Path, scenario: str) -> list[dict[str, Any]]:
    """What both processes found."""
    launch(2, checkpoints, out, scenario, script="sharded_processes.py", timeout=400)
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def found(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(checkpoints, tmp_path_factory.mktemp("sharded") / "out", "equal")


@pytest.mark.long
@pytest.mark.parametrize("case", [name for name in CASES if name != "bf16"])
def test_fsdp_trains_as_ddp_does(found: list[dict[str, Any]], case: str) -> None:
    """Two processes add up two gradients, in whatever order, so only the rounding inside a kernel may differ."""
    ddp, fsdp = found[0][f"ddp: {case}"], found[0][f"fsdp: {case}"]
    assert ddp["completions"] == fsdp["completions"] and len(ddp["completions"]) == 3
    for name, value in ddp["policy"].items():
        torch.testing.assert_close(fsdp["policy"][name], value, rtol=1e-5, atol=1e-7, msg=name)
    for name, value in ddp["conductor"].items():
        torch.testing.assert_close(fsdp["conductor"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert len(ddp["logs"]) == len(fsdp["logs"])
    for theirs, ours in zip(ddp["logs"], fsdp["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        assert ours.get("sync/probe_max", 0.0) < 1e-5
    assert any("sync/probe_max" in line for line in fsdp["logs"]) == ("engine" in case)
    assert any("eval_rewards/parity/mean" in line for line in fsdp["logs"]) == ("evaluated" in case)
    for name, value in fsdp["policy"].items():
        assert torch.equal(found[1][f"fsdp: {case}"]["policy"][name], value), name
    for name, value in fsdp["conductor"].items():
        assert torch.equal(found[1][f"fsdp: {case}"]["conductor"][name], value), name


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_half_of_the_policy_and_of_its_reference(found: list[dict[str, Any]], case: str) -> None:
    assert found[0][f"ddp: {case}"]["share"] == 1.0 and found[0][f"fsdp: {case}"]["share"] == 0.5
    assert found[0].get(f"reference: {case}", 0.5) == 0.5
    assert (f"reference: {case}" in found[0]) == ("lora" not in case)


@pytest.mark.long
def test_bf16_under_fsdp_is_as_near_to_float32_as_under_ddp(found: list[dict[str, Any]]) -> None:
    exact = found[0]["ddp: full weights"]["policy"]

    def error(wrapping: str) -> float:
        ours = found[0][f"{wrapping}: bf16"]["policy"]
        assert all(value.dtype == torch.float32 for value in ours.values())
        return sum(float((value - exact[name]).square().sum()) for name, value in ours.items()) ** 0.5

    assert 0.0 < error("fsdp") < 2.0 * error("ddp")


@pytest.mark.long
def test_a_killed_run_resumes_bit_by_bit_and_saves_a_whole_policy(checkpoints: Path, tmp_path: Path) -> None:
    ranks = run(checkpoints, tmp_path / "out", "resume")
    for state in STATES:
        for lora in (False, True):
            for rank in ranks:
                whole, resumed = (rank[f"{name}: {state} {lora}"] for name in ("whole", "resumed"))
                assert [line["step"] for line in resumed["logs"]] == [1, 2, 3, 4] and whole["logs"] == resumed["logs"]
                for part in ("policy", "conductor"):
                    for name, value in whole[part].items():
                        assert torch.equal(resumed[part][name], value), (state, lora, name)
            run_dir = tmp_path / "out" / f"{state} {lora}" / "killed"
            shards = [path for path in (run_dir / "checkpoint-4").iterdir() if path.is_dir()]
            assert bool(shards) == (state == "SHARDED_STATE_DICT")
            base = AutoModelForCausalLM.from_pretrained(checkpoints / "untied" if lora else run_dir / "final")
            final = PeftModel.from_pretrained(base, str(run_dir / "final")) if lora else base
            for name, parameter in final.named_parameters():
                assert torch.equal(parameter, ranks[0][f"resumed: {state} {lora}"]["policy"][name]), (state, name)


# --- what is refused ---


class Plugin:
    """What ``check_sharding`` reads of a plugin of accelerate's."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__ |= {"fsdp_version": 2, "cpu_ram_efficient_loading": False} | settings


@pytest.mark.parametrize(
    ("kind", "plugins", "words"),
    [
        ("FSDP", {"fsdp_plugin": Plugin(fsdp_version=1)}, r"trainer\.fsdp_config\.version: 1, .* expected 2"),
        (
            "FSDP",
            {"fsdp_plugin": Plugin(cpu_ram_efficient_loading=True)},
            r"trainer\.fsdp_config\.cpu_ram_efficient_loading: true, .* expected false",
        ),
        (
            "MULTI_CPU",
            {},
            r"trainer\.fsdp: accelerate shards over GPUs alone, on cpu it would train with 2 whole copies",
        ),
        ("DEEPSPEED", {"deepspeed_plugin": Plugin(zero_stage=3)}, r"trainer\.deepspeed: ZeRO stage 3, .* expected"),
    ],
)
def test_what_cannot_be_sharded_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, kind: str, plugins: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    accelerator = Accelerator(cpu=True)
    check_sharding(accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(kind == "MULTI_CPU"))
    state = SimpleNamespace(
        distributed_type=DistributedType[kind], device=torch.device("cpu"), num_processes=2, **plugins
    )
    monkeypatch.setattr(accelerator, "state", state)
    with pytest.raises(ValueError, match=words):
        check_sharding(accelerator)


def test_a_head_that_is_sharded_again_before_its_gradient_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        head = LanguageHead(fully_shard(nn.Linear(2, 3, bias=False), mesh=init_device_mesh("cpu", (1,))), 1.0, None)
        with pytest.raises(
            ValueError, match=r"trainer\.fsdp: the LM head is sharded again .* accelerate of at least 1\.14"
        ):
            _ = head.weight
        with torch.no_grad():
            assert head.weight.shape == (3, 2)
        head.module.requires_grad_(False)
        assert head.weight.shape == (3, 2)
    finally:
        torch.distributed.destroy_process_group()
