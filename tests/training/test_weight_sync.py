"""What is sent to an engine, when, and the proof that it arrived."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from maestro_fast.generation import ProbeConfig
from maestro_fast.generation.shared_process import TorchSettings
from maestro_fast.model.forward import score
from maestro_fast.model.head import head_of, whole
from maestro_fast.model.rows import Sequences
from maestro_fast.training import weight_sync
from maestro_fast.training.weight_sync import (
    StaleWeightsError,
    SyncedGenerator,
    SyncProbe,
    Thresholds,
    build_probe,
    check_syncable,
    checkpoint_weights,
    fingerprint,
)
from tests.generation.helpers import prompts, same
from tests.tiny import tiny_model
from tests.training.copy_engine import CopyEngine


def policy_logprobs(model: nn.Module, token_ids: list[list[int]]) -> list[Tensor]:
    sequences = Sequences([ids[:1] for ids in token_ids], [ids[1:] for ids in token_ids])
    outputs = score(model, sequences, head_of(model), layout="padded", micro_batch=2, temperature=1.0)
    return list(outputs.logprobs_C.split([len(ids) - 1 for ids in token_ids]))


class NoClock:
    def stage(self, name: str) -> Any:
        return contextlib.nullcontext()


def generator(engine: CopyEngine, **probe: Any) -> SyncedGenerator:
    built = build_probe(ProbeConfig(**probe), engine, [[5, 6, 7], [8, 9]], policy_logprobs)
    return SyncedGenerator(engine, built, NoClock())


def nudge(model: nn.Module, by: float = 0.05) -> None:
    """Changes the weights as an optimiser does, but through ``data``, which no version counter sees."""
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=random), alpha=by)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_that_save_pretrained_writes(tmp_path: Path, family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    model.save_pretrained(tmp_path)
    saved, sent = load_file(tmp_path / "model.safetensors"), dict(checkpoint_weights(model))
    assert sent.keys() == saved.keys() and ("lm_head.weight" in sent) is (not tied)
    assert all(torch.equal(saved[name], tensor) for name, tensor in sent.items())
    assert not any(tensor.requires_grad for tensor in sent.values())
    assert {tensor.dtype for _, tensor in checkpoint_weights(model, torch.bfloat16)} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["v_proj"], "use_rslora": True, "lora_dropout": 0.5},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["all", "dora", "rslora and dropout", "a module of its own"],
)
def test_adapters_are_merged_into_copies(tmp_path: Path, options: dict[str, Any]) -> None:
    """What is sent equals PEFT's own merge of a copy. The trained model keeps its bits, modes and random state."""
    model = get_peft_model(tiny_model(), LoraConfig(r=4, task_type="CAUSAL_LM", **options)).train()
    nudge(model)
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    sent = dict(checkpoint_weights(model))
    assert sent.keys() == expected.keys()
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert gradients == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert any((tensor != tiny_model().state_dict()[name]).any() for name, tensor in sent.items())


def test_other_adapters_that_can_be_merged() -> None:
    model = get_peft_model(tiny_model(), IA3Config(task_type="CAUSAL_LM"))
    nudge(model)
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint_weights(model))


def test_adapters_on_tied_embeddings_reach_every_weight() -> None:
    """Merged copies come and go, so tied weights are recognised by the weights that stay."""
    model = get_peft_model(tiny_model(tied=True), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert [name for name, _ in checkpoint_weights(model)] == [n for n, _ in tiny_model(tied=True).named_parameters()]


@pytest.fixture
def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process group of one process, over a file."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lora", [False, True])
def test_sharded_weights_are_gathered(mesh: Any, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        nudge(model)
    expected = {name: tensor.clone() for name, tensor in checkpoint_weights(model)}
    for layer in (model.get_base_model() if lora else model).model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    sent = dict(checkpoint_weights(model))
    assert sent.keys() == expected.keys()
    assert all(type(t) is Tensor and torch.equal(t, expected[name]) for name, t in sent.items())
    gathered: list[Any] = []
    monkeypatch.setattr(weight_sync, "whole", lambda tensor: gathered.append(tensor) or whole(tensor))
    for name, tensor in checkpoint_weights(model, torch.bfloat16):
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
    plain = [t for t in gathered if hasattr(t, "full_tensor")]
    assert lora or (len(plain) == len(expected) and all(t.dtype == torch.bfloat16 for t in plain))
    monkeypatch.undo()
    first = fingerprint(model)
    assert fingerprint(model) == first
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1e-6)
    assert fingerprint(model) != first


def test_a_fused_optimiser_and_writes_through_data_are_noticed() -> None:
    model = tiny_model()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    first = fingerprint(model)
    model(torch.tensor([[5, 6]])).logits.sum().backward()
    assert fingerprint(model) == first
    optimiser.step()
    second = fingerprint(model)
    assert second != first
    nudge(model, 1e-6)
    assert fingerprint(model) != second


def test_the_fingerprint_copies_no_weights() -> None:
    """Torch's own sum of bfloat16 bits in int64 would first make a copy of four times the size."""
    model = nn.Sequential(nn.Linear(511, 2051, dtype=torch.bfloat16), nn.Linear(1024, 1024, bias=False))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        fingerprint(model)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profiled.key_averages())
    assert 0 < allocated < 2**16 < sum(parameter.nbytes for parameter in model.parameters()) / 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", ["whole", "odd offset", "transposed"])
def test_every_element_counts_in_the_fingerprint(dtype: torch.dtype, layout: str) -> None:
    """Also in a tensor whose bytes do not divide by 8, and in a shard that begins anywhere in its storage."""
    values = torch.randn(1 + 7 * 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    shard = values[1:].view(7, 3) if layout == "odd offset" else values[:21].view(7, 3)
    shard = shard.t() if layout == "transposed" else shard
    module = nn.Module()
    module.weight = nn.Parameter(shard, requires_grad=False)
    found = {tuple(fingerprint(module))}
    for row in range(shard.shape[0]):
        for column in range(shard.shape[1]):
            shard[row, column] = 3.0
            found.add(tuple(fingerprint(module)))
    assert len(found) == 22 and fingerprint(module) == fingerprint(module)
    module.weight = nn.Parameter(shard[:0], requires_grad=False)  # a process without a share of it
    assert fingerprint(module) == [0]


def test_syncs_when_the_policy_has_changed_and_only_then() -> None:
    model = tiny_model()
    engine = CopyEngine(tiny_model(seed=1))
    synced, asked = generator(engine), prompts("the", times=2)
    sample = ["prompt_logprobs", "sample", "sleep"]
    renew = ["load_weights", "reset_prefix_cache", *sample]
    first = synced.generate(model, asked, seed=0)
    assert engine.calls == renew
    again = synced.generate(model, asked, seed=0)
    assert engine.calls == [*renew, *sample] and same(first, again)
    nudge(model)
    changed = synced.generate(model, asked, seed=0)
    assert engine.calls[len(renew + sample) :] == ["prompt_logprobs", *renew]  # scored with the old weights before
    assert not same(first, changed)
    assert set(first.metrics) == {"sync/probe_mean", "sync/probe_max"} and first.metrics["sync/probe_max"] < 1e-5


def test_an_engine_that_lost_its_weights_in_its_sleep_gets_them_again() -> None:
    engine = CopyEngine(tiny_model())
    engine.keeps_weights = False
    synced = generator(engine)
    for _ in range(2):
        synced.generate(tiny_model(), prompts("the"), seed=0)
    assert engine.calls.count("load_weights") == 2


@pytest.mark.parametrize("fault", ["load_weights", "reset_prefix_cache", "fingerprint"])
def test_a_sync_that_did_not_take_ends_the_run(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Weights are not sent, a prefix cache is kept, or a change goes unnoticed."""
    model = tiny_model()
    engine = CopyEngine(model)
    synced = generator(engine)
    synced.generate(model, prompts("the"), seed=0)
    if fault == "fingerprint":
        monkeypatch.setattr("maestro_fast.training.weight_sync.fingerprint", lambda model: synced._sent)
    else:
        monkeypatch.setattr(engine, fault, lambda *args: None)
    nudge(model)
    with pytest.raises(StaleWeightsError, match=r"^weight sync: log-prob of token \d+ at position \d+ of probe seq"):
        synced.generate(model, prompts("the"), seed=0)
    assert engine.calls.count("sample") == 1


def test_the_worst_token_is_named() -> None:
    engine = CopyEngine(tiny_model())
    probe = SyncProbe([[5, 6, 7], [8, 9, 10, 11]], policy_logprobs, Thresholds(mean=0.15, largest=0.25))
    theirs = engine.prompt_logprobs(probe.sequences)
    theirs[0][1] += 0.2
    theirs[1][1] -= 0.5
    theirs[1][2] += 0.05
    ours = policy_logprobs(engine.model, [[8, 9, 10, 11]])[0][1].item()
    words = (
        f"log-prob of token 10 at position 2 of probe sequence 1 is {ours - 0.5:.6g} in the engine and {ours:.6g} in "
        "the trainer, expected a difference of at most 0.25 (generation.probe.threshold); the mean over 5 tokens is 0"
    )
    with pytest.raises(StaleWeightsError, match=re.escape(words)):
        probe.check(engine, engine.model)
    theirs[0][0] = torch.nan
    with pytest.raises(StaleWeightsError, match="log-prob of token 6 at position 1 of probe sequence 0 is nan in the"):
        probe.check(engine, engine.model)


def test_probe_sequences_are_real_prompts_that_fill_blocks_of_the_cache() -> None:
    engine = CopyEngine(tiny_model())
    asked = [[5, 6, 7], [8, 9]]

    def sequences(**config: Any) -> list[list[int]]:
        return build_probe(ProbeConfig(**config), engine, asked, policy_logprobs).sequences

    assert sequences(tokens=2, sequences=3) == [
        ([5, 6, 7, 8, 9] * 8)[:40],
        ([8, 9, 5, 6, 7] * 8)[:40],
        ([5, 6, 7, 8, 9] * 8)[:40],
    ]
    assert [len(ids) for ids in sequences(tokens=50)] == [50, 50]
    # whole blocks and one token: all that comes from the cache would be scored without it
    assert [len(ids) for ids in sequences(tokens=49)] == [48, 48]
    assert [len(ids) for ids in sequences(tokens=4000)] == [255, 255]
    engine.cache_block = 0
    assert [len(ids) for ids in sequences(tokens=2)] == [2, 2]


@pytest.mark.parametrize("token", ["one", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_may_be_far_off_but_not_all(dtype: torch.dtype, token: str) -> None:
    """Rounding in half precision gives a rare token another log-prob; other weights give most tokens another one."""
    engine = CopyEngine(tiny_model())
    engine.dtype = dtype
    probe = build_probe(ProbeConfig(), engine, [[5, 6, 7], [8, 9]], policy_logprobs)
    off = 0.9 * probe.thresholds.largest
    for logprobs in engine.prompt_logprobs(probe.sequences):
        logprobs[-1 if token == "one" else slice(None)] += off
    if token == "one":
        found = probe.check(engine, engine.model)
        assert found["sync/probe_max"] == pytest.approx(off, abs=1e-3) and found["sync/probe_mean"] < off / 30
    else:
        with pytest.raises(
            StaleWeightsError, match=rf"expected at most {probe.thresholds.mean:g} \(generation\.probe\.m"
        ):
            probe.check(engine, engine.model)


def test_thresholds_of_the_config_and_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CopyEngine(tiny_model())

    def thresholds(**config: Any) -> tuple[float, float]:
        return build_probe(ProbeConfig(**config), engine, [[5]], policy_logprobs).thresholds

    assert thresholds() == (2e-4, 2e-3)
    assert thresholds(threshold=0.25) == (2e-4, 0.25) and thresholds(mean_threshold=0.1) == (0.1, 2e-3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(TorchSettings, "now", lambda: TorchSettings(1, "high", "tf32", "tf32"))
    assert thresholds() == (0.03, 0.3)


def test_what_cannot_be_sent_is_refused() -> None:
    tuned = get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"^generation: adapters of type PROMPT_TUNING add to the prompt"):
        check_syncable(tuned)
    quantised = tiny_model()
    weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    quantised.model.layers[0].mlp.up_proj.weight = weight
    with pytest.raises(ValueError, match=r"^generation: model\.layers\.0\.mlp\.up_proj\.weight is quantised \(torch\."):
        check_syncable(quantised)
    rows = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    with pytest.raises(ValueError, match=r"^generation: trainable_token_indices makes .*, expected modules_to_save"):
        check_syncable(rows)
    check_syncable(tiny_model())
