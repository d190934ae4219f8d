"""Runs TRL's own tests of ``GRPOTrainer`` with ``MaestroGRPOTrainer`` in its place, without a network.

    git clone https://github.com/huggingface/trl
    python tests/integrations/trl_own_tests.py path/to/trl                             # TRL's own class
    python tests/integrations/trl_own_tests.py path/to/trl --trainer trl_loss          # our class
    python tests/integrations/trl_own_tests.py path/to/trl --trainer maestro_fast      # our class with our loss

What follows goes to pytest. A test that ends in one of our refusals counts as skipped, with the refusal as the reason.

TRL's tests load tiny models from the hub. This script puts models of the same architectures, with random weights and a
tokenizer of its own, into a cache that the hub's client reads offline. The data are made by TRL's own scripts. What
needs an image processor, a GPU, or token ids of a real tokenizer fails here with TRL's own class, too.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 1024,
    "vocab_size": 4096,  # Large enough that a random model hardly ever ends a response.
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# For each model of TRL's tests: the model type, and what its config has beside the sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Cohere2ForCausalLM": ("cohere2", {"logit_scale": 1.0}),
    "tiny-Gemma2ForCausalLM": ("gemma2", {}),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", {**EXPERTS, "n_routed_experts": 4}),
    "tiny-GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny-LlamaForCausalLM-3.2": ("llama", {}),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", {"num_labels": 1}),
    "tiny-MistralForCausalLM-0.2": ("mistral", {}),
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", {"num_labels": 1}),
    "tiny-Qwen3ForCausalLM": ("qwen3", {}),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", {"num_labels": 1}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {**EXPERTS, "num_experts": 4}),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]


# --- the script ---


def main(checkout: Path, trainer: str, arguments: list[str]) -> int:
    """Starts pytest in the checkout, with this file as a plugin and an empty cache; returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as hub:
        offline = {"HF_HUB_CACHE": hub, "HF_HUB_OFFLINE": "1", "MAESTRO_TRL_TRAINER": trainer}
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        tests = ["tests/test_grpo_trainer.py", "--rootdir", str(checkout), "-q", "-rs", *arguments]
        command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=checkout, env={**os.environ, **offline, "PYTHONPATH": path}).returncode


# --- the plugin ---


def pytest_configure(config: pytest.Config) -> None:
    """Fills the cache, and puts our class and the data in the place of TRL's before TRL's tests import them."""
    import datasets
    import trl
    from trl import import_utils

    import_utils.__getattr__ = lambda name: lambda: False  # TRL's tests may ask for packages of another version.
    hub = Path(os.environ["HF_HUB_CACHE"])
    for name, (model_type, changes) in MODELS.items():
        make_checkpoint(hub, name, model_type, changes)
    made = {name: zen(config.rootpath, name) for name in ("zen", "zen_image", "zen_multi_image")}

    def load_dataset(path: str, name: str, split: str | None = None, streaming: bool = False) -> Any:
        splits = made[path.rpartition("/")[2].replace("-", "_")][name]
        if streaming:
            splits = datasets.IterableDatasetDict({key: rows.to_iterable_dataset() for key, rows in splits.items()})
        return splits if split is None else splits[split]

    datasets.load_dataset = load_dataset
    if os.environ["MAESTRO_TRL_TRAINER"] != "trl":
        trl.GRPOTrainer = our_class("trl" if os.environ["MAESTRO_TRL_TRAINER"] == "trl_loss" else "maestro_fast")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Reports a test that ends in one of our refusals as skipped."""
    report: Any = yield
    if call.excinfo is not None and is_refusal(call.excinfo.value):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"refused: {call.excinfo.value}")
    return report


def is_refusal(error: BaseException) -> bool:
    from maestro_fast.integrations.trl import refusals

    said = str(error)
    return isinstance(error, ValueError) and any(said.startswith(f"{row.setting}: not with") for row in refusals())


def our_class(chosen: str) -> type:
    from maestro_fast.integrations.trl import MaestroGRPOTrainer

    class Ours(MaestroGRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, loss=chosen, **kwargs)

    return Ours


# --- what stands in for the hub ---


def make_checkpoint(hub: Path, name: str, model_type: str, changes: dict[str, Any]) -> None:
    """Writes a model with random weights, and a tokenizer, where the hub's client looks for a downloaded snapshot."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    repository = hub / f"models--trl-internal-testing--{name}"
    snapshot = repository / "snapshots" / "0"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0")
    text = tokenizer("qwen3" if model_type.startswith("qwen3") else "qwen2_5")
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    kind = AutoModelForSequenceClassification if "Sequence" in name else AutoModelForCausalLM
    kind.from_config(config).to(torch.bfloat16).save_pretrained(snapshot)
    text.save_pretrained(snapshot)


def tokenizer(template: str) -> Any:
    """A token for each byte, none for words, and one of the chat templates that TRL installs."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<{i}>" for i in range(len(names), SIZES["vocab_size"])]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    bpe.add_special_tokens(SPECIAL)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    chat = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat
    )


def zen(checkout: Path, name: str) -> dict[str, Any]:
    """The data sets that TRL's script of this name would push to the hub, by the names of their configs."""
    import datasets

    pushed: dict[str, Any] = {}
    push, datasets.DatasetDict.push_to_hub = (
        datasets.DatasetDict.push_to_hub,
        lambda splits, _repository, config_name: pushed.update({config_name: splits}),
    )
    try:
        script = runpy.run_path(str(checkout / "scripts" / f"generate_{name}_dataset.py"))
        script["main"](test_size=0.1, push_to_hub=True, repo_id="")
    finally:
        datasets.DatasetDict.push_to_hub = push
    return pushed


if __name__ == "__main__":
    rest = sys.argv[2:]
    wanted = "trl"
    if rest[:1] == ["--trainer"]:
        wanted, rest = rest[1], rest[2:]
    raise SystemExit(main(Path(sys.argv[1]).resolve(), wanted, rest))
