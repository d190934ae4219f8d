"""Runs verl's own ``main_ppo`` on a CPU, in processes that a test can wait for and end.

A run is Ray, verl's V1 trainer with its workers, FSDP2 on gloo, and a rollout server on transformers, see
``cpu_platform`` and ``cpu_rollout``. It sees no network but 127.0.0.1, see ``loopback``. Everything that it starts
shares a network namespace, by which it is found and ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas

from tests.integrations.verl.loopback import namespace_of
from tests.integrations.verl.names import DUMPS, HOLD, ROLLOUT, dump_name
from tests.tiny import tiny_model, tiny_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LIMIT = 900  # seconds after which a run is ended even if no test is left that would end it
PROMPTS_A_STEP, RESPONSES_A_PROMPT, RESPONSE_TOKENS = 3, 4, 16
MODULES = ("tests.integrations.verl.cpu_platform", "tests.integrations.verl.cpu_rollout")
# The variables of the machine that started the tests, and of the tests, which would change what a run does.
UNWANTED = ("PYTHONDONTWRITEBYTECODE", "PYTEST_", "VERL_", "RAY_", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE")


def make_ingredients(folder: Path) -> tuple[Path, Path]:
    """Writes a tiny model with its tokenizer, and data with prompts of several lengths; returns their paths."""
    model, tokenizer = folder / "model", tiny_tokenizer()
    tokenizer.add_tokens("<|im_end|>", special_tokens=True)  # verl looks its id up in any Qwen tokenizer.
    tokenizer.save_pretrained(model)
    tiny_model().save_pretrained(model)
    rows = [
        {
            "data_source": "sums" if i % 2 else "colours",
            "prompt": [{"role": "user", "content": f"{i}+{7 * i}=" if i % 2 else f"Name a colour{' now' * (i % 5)}."}],
            "ability": "any",
            "reward_model": {"style": "rule", "ground_truth": str(8 * i)},
            "extra_info": {"index": i},
        }
        for i in range(6 * PROMPTS_A_STEP)
    ]
    data = folder / "data.parquet"
    pandas.DataFrame(rows).to_parquet(data)
    return model, data


def plain_command(model: Path, data: Path, out: Path, *, ranks: int, steps: int) -> dict[str, Any]:
    """The overrides of verl's config for a run of GRPO, as a user would write them for a tiny model on CPUs."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    float32 = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
    return {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": data,
        "data.val_files": data,
        "data.train_batch_size": PROMPTS_A_STEP,
        "data.max_prompt_length": 64,
        "data.max_response_length": RESPONSE_TOKENS,
        "data.dataloader_num_workers": 0,
        "data.filter_overlong_prompts": False,
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        f"{actor}.strategy": "fsdp2",
        f"{actor}.optim.lr": 1e-2,
        f"{actor}.ppo_mini_batch_size": PROMPTS_A_STEP,
        f"{actor}.ppo_micro_batch_size_per_gpu": 4,
        f"{actor}.use_kl_loss": False,
        f"{actor}.fsdp_config.use_torch_compile": False,
        f"+{actor}.fsdp_config.mixed_precision": float32,
        "actor_rollout_ref.ref.fsdp_config.use_torch_compile": False,
        "+actor_rollout_ref.ref.fsdp_config.mixed_precision": float32,
        f"{rollout}.name": ROLLOUT,
        f"{rollout}.n": RESPONSES_A_PROMPT,
        f"{rollout}.tensor_model_parallel_size": ranks,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": 4,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.load_format": "safetensors",
        f"{rollout}.agent.num_workers": 1,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": HERE / "rewards.py",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": ranks,
        "trainer.logger": ["console", "file"],
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.total_training_steps": steps,
        "trainer.default_local_dir": out / "checkpoints",
        "ray_kwargs.ray_init.num_cpus": 10,
        "+ray_kwargs.ray_init.num_gpus": ranks,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init._node_ip_address": "127.0.0.1",
        "+ray_kwargs.ray_init.object_store_memory": 200_000_000,
    }


def written(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as words of a command."""

    def value(x: Any) -> str:
        if isinstance(x, Mapping):
            return "{" + ",".join(f"{key}: {value(item)}" for key, item in x.items()) + "}"
        if isinstance(x, Sequence) and not isinstance(x, str):
            return "[" + ",".join(map(value, x)) + "]"
        return str(x)

    return [f"{name}={value(setting)}" for name, setting in overrides.items()]


class Run:
    """One run of ``main_ppo``.

    Attributes:
        out: what the run leaves: its log, its metrics, its checkpoints and the dumps of its steps.
    """

    def __init__(self, out: Path, overrides: Mapping[str, Any], *, hold: int | None = None) -> None:
        """Starts the run in the folder ``out``. After the advantages of step ``hold`` it waits to be ended."""
        self.out = out
        out.mkdir(exist_ok=True)
        self._log, self._metrics, self._namespace = out / "log.txt", out / "metrics.jsonl", out / "namespace.txt"
        # The path of a Unix socket has 107 characters at most, and Ray adds 70 to this.
        self._ray = Path(tempfile.mkdtemp(prefix="ray_"))
        overrides = {**overrides, "+ray_kwargs.ray_init._temp_dir": self._ray}
        command = [sys.executable, str(HERE / "loopback.py"), str(LIMIT), str(self._namespace)]
        command += [sys.executable, "-m", "verl.trainer.main_ppo", *written(overrides), f"hydra.run.dir={out}/hydra"]
        environment = self._environment(hold)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=out, env=environment, start_new_session=True
            )

    def _environment(self, hold: int | None) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(UNWANTED)}
        return kept | {
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "VERL_PLATFORM": "cpu",
            "VERL_USE_EXTERNAL_MODULES": ",".join((*MODULES, "tests.integrations.verl.dump")),
            "VERL_FILE_LOGGER_PATH": str(self._metrics),
            "VERL_LOGGING_LEVEL": "INFO",
            DUMPS: str(self.out),
            HOLD: "" if hold is None else str(hold),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
        }

    # --- how a run ends ---

    def finish(self, seconds: float) -> None:
        """Waits until the run has ended by itself.

        Raises:
            AssertionError: it failed, or took longer than ``seconds``; the end of its log is in the message.
        """
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        self.end()
        assert code == 0, f"{'it took too long' if code is None else f'exit code {code}'}\n{self.log[-8000:]}"

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        """Waits until something is true while the run goes on; else like ``finish``."""
        end = time.monotonic() + seconds
        while not condition():
            if self._process.poll() is not None or time.monotonic() > end:
                self.finish(0)
                raise AssertionError(f"the run ended too early\n{self.log[-8000:]}")
            time.sleep(0.1)

    def end(self) -> None:
        """Kills every process of the run, as when a machine is switched off, and removes Ray's files."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        end = time.monotonic() + 30
        while processes := self.processes():
            assert time.monotonic() < end, f"processes of the run cannot be ended: {processes}"
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self._ray, ignore_errors=True)

    def processes(self) -> list[int]:
        """The processes of the run that are there: all in its network namespace."""
        namespace, found = self._namespace.read_text() if self._namespace.exists() else "", []
        assert namespace != namespace_of("self"), "the run shares the network of the tests"
        for process in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
            with contextlib.suppress(OSError):
                if namespace_of(process) == namespace:
                    found.append(process)
        return found

    # --- what a run leaves ---

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        """What verl's file logger wrote, by step."""
        lines = [json.loads(line) for line in self._metrics.read_text().splitlines()]
        return {line["step"]: line["data"] for line in lines}

    def dump(self, step: int) -> Path:
        return self.out / dump_name(step)
