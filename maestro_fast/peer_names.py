"""What TRL and verl call the settings of a run, and what they are called here, for messages about unknown settings.

TRL's names are the fields of its ``GRPOConfig`` and the arguments of its trainer (tests compare them with the installed
TRL), and verl's are the last parts of the dotted names in its ``ppo_trainer.yaml``.
"""

from __future__ import annotations

from typing import Any

TRL: dict[str, str] = {
    "reward_funcs": "rewards",
    "train_dataset": "data.path",
    "eval_dataset": "evaluation.data.path",
    "peft_config": "model.lora",
    "model_init_kwargs": "model.dtype or model.attention",
    "num_generations": "sampling.group_size",
    "num_generations_eval": "evaluation.samples",
    "max_completion_length": "sampling.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens, with data.too_long",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "per_device_train_batch_size": "batch.micro_batch, a number of responses",
    "gradient_accumulation_steps": "batch.prompts_per_batch, all prompts of a batch, next to batch.micro_batch",
    "generation_batch_size": "batch.prompts_per_batch, a number of prompts",
    "steps_per_generation": "batch.updates_per_batch, a number of optimiser steps",
    "beta": "loss.kl_coef",
    "epsilon": "loss.clip_low and loss.clip_high",
    "epsilon_high": "loss.clip_high (with loss.objective: cispo it is loss.clip_max)",
    "delta": "loss.clip_max",
    "importance_sampling_level": "loss.ratio",
    "loss_type": "loss.normalization (for cispo, loss.objective)",
    "entropy_coef": "loss.entropy_coef",
    "vllm_importance_sampling_correction": "loss.sampler_correction",
    "vllm_importance_sampling_mode": "loss.sampler_correction",
    "vllm_importance_sampling_clip_max": "loss.sampler_cap",
    "vllm_importance_sampling_cap": "loss.sampler_cap",
    "scale_rewards": "advantages.profile: grpo for group, grpo_batch for batch, dr_grpo for none",
    "multi_objective_aggregation": "advantages.profile: grpo for sum_then_normalize, gdpo for normalize_then_sum",
    "use_bias_correction_kl": "loss.kl_bias_correction",
    "chat_template_kwargs": "chat.template_kwargs",
    "reward_weights": "weights: {type: static, values: {NAME OF THE REWARD: WEIGHT}}",
    "use_vllm": "generation: vllm",
    "vllm_mode": "generation.type: vllm for colocate, vllm_server for server",
    "vllm_server_base_url": "generation.url",
    "vllm_server_host": "generation.url",
    "vllm_server_port": "generation.url",
    "vllm_server_timeout": "generation.start_timeout",
    "vllm_group_port": "generation.port",
    "vllm_gpu_memory_utilization": "generation.gpu_memory_share",
    "vllm_max_model_length": "generation.max_tokens",
    "vllm_tensor_parallel_size": "generation.tensor_parallel",
    "vllm_enable_sleep_mode": "generation.sleep",
    "log_completions": "console.every or trackers.every: rollouts.jsonl in the run directory has all of them anyway",
    "num_completions_to_print": "console.samples",
    "log_unique_prompts": "always on: rollouts.jsonl in the run directory",
    "mask_truncated_completions": "batch.truncated: mask",
    "num_iterations": "batch.updates_per_batch, by which a batch is divided: each response is trained on once",
}
# These have no equal here.
TRL_ALONE = {
    "cache_implementation", "cast_lm_head_to_fp32", "disable_dropout",
    "ds3_gather_for_generation", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min", "entropy_target",
    "generation_kwargs", "log_completions_hub_repo", "log_multimodal",
    "max_tool_calling_iterations", "min_p", "off_policy_mask_threshold",
    "pad_to_multiple_of", "ref_model_mixup_alpha", "ref_model_sync_steps", "repetition_penalty",
    "router_aux_loss_coef", "sapo_temperature_neg", "sapo_temperature_pos", "shuffle_dataset", "sync_ref_model",
    "top_entropy_quantile", "transformers_continuous_batching_config", "trust_remote_code", "use_adaptive_entropy",
    "use_liger_loss", "use_transformers_continuous_batching", "use_transformers_paged",
    "vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos", "vllm_importance_sampling_clip_min",
    "vllm_model_impl", "vllm_structured_outputs_regex",
}  # fmt: skip

VERL: dict[str, str] = {
    "rollout.n": "sampling.group_size",
    "rollout.temperature": "sampling.temperature",
    "rollout.top_p": "sampling.top_p",
    "rollout.top_k": "sampling.top_k",
    "rollout.response_length": "sampling.max_new_tokens",
    "rollout.name": "generation.type",
    "rollout.dtype": "generation.dtype",
    "rollout.gpu_memory_utilization": "generation.gpu_memory_share",
    "rollout.tensor_model_parallel_size": "generation.tensor_parallel",
    "rollout.max_model_len": "generation.max_tokens",
    "rollout.enforce_eager": "generation.enforce_eager",
    "rollout.free_cache_engine": "generation.sleep",
    "val_kwargs.n": "evaluation.samples",
    "actor.ppo_mini_batch_size": "batch.updates_per_batch, the number of optimiser steps from a batch",
    "actor.ppo_micro_batch_size": "batch.micro_batch",
    "actor.ppo_micro_batch_size_per_gpu": "batch.micro_batch",
    "actor.ppo_epochs": "batch.updates_per_batch, by which a batch is divided: each response is trained on once",
    "actor.clip_ratio": "loss.clip_low and loss.clip_high",
    "actor.clip_ratio_low": "loss.clip_low",
    "actor.clip_ratio_high": "loss.clip_high",
    "actor.clip_ratio_c": "loss.clip_max",
    "actor.loss_agg_mode": "loss.normalization",
    "actor.entropy_coeff": "loss.entropy_coef",
    "actor.use_kl_loss": "loss.kl_coef",
    "actor.kl_loss_coef": "loss.kl_coef",
    "actor.grad_clip": "trainer.max_grad_norm",
    "optim.lr": "trainer.learning_rate",
    "optim.weight_decay": "trainer.weight_decay",
    "optim.lr_warmup_steps": "trainer.warmup_steps",
    "optim.lr_warmup_steps_ratio": "trainer.warmup_steps, a share of all steps if it is below 1",
    "actor_rollout_ref.model.path": "model.path",
    "model.lora_rank": "model.lora.r",
    "model.lora_alpha": "model.lora.alpha",
    "model.enable_gradient_checkpointing": "trainer.gradient_checkpointing",
    "data.train_files": "data.path",
    "data.val_files": "evaluation.data.path",
    "data.prompt_key": "data.prompt_column",
    "data.max_prompt_length": "data.max_prompt_tokens",
    "data.filter_overlong_prompts": "data.too_long: drop",
    "data.truncation": "data.too_long: cut for left, error for error",
    "data.apply_chat_template_kwargs": "chat.template_kwargs",
    "data.train_max_samples": "data.limit",
    "data.val_max_samples": "evaluation.prompts",
    "data.dataloader_num_workers": "trainer.dataloader_num_workers",
    "data.max_response_length": "sampling.max_new_tokens",
    "data.train_batch_size": "batch.prompts_per_batch",
    "algorithm.adv_estimator": "advantages.profile, such as verl_grpo for grpo",
    "algorithm.norm_adv_by_std_in_grpo": "advantages.profile: verl_grpo for true, verl_dr_grpo for false",
    "filter_groups.enable": "batch.no_signal: refill",
    "filter_groups.max_num_gen_batches": "batch.max_refills",
    "overlong_buffer.len": "rewards: [{type: overlong, limit: TOKENS, buffer: TOKENS}]",
    "algorithm.use_kl_in_reward": "loss.kl_coef, with an advantages.profile such as maestro",
    "kl_ctrl.kl_coef": "loss.kl_coef",
    "custom_reward_function.path": "rewards: ['file.py:function']",
    "custom_reward_function.name": "rewards: ['file.py:function']",
    "reward_model.model.path": "rewards: [{type: preference, model: PATH}]",
    "trainer.total_epochs": "trainer.num_train_epochs",
    "trainer.total_training_steps": "trainer.max_steps",
    "trainer.save_freq": "trainer.save_steps",
    "trainer.test_freq": "trainer.eval_steps",
    "trainer.logger": "trainer.report_to",
    "trainer.project_name": "trainer.project",
    "trainer.experiment_name": "trainer.run_name",
    "trainer.default_local_dir": "run_dir",
    "trainer.n_gpus_per_node": "torchrun --nproc_per_node, outside the config",
    "trainer.nnodes": "torchrun --nnodes, outside the config",
    "trainer.resume_mode": "--resume on the command line",
}
# These make a rollout of several turns, which this trainer does not, but TRL's does.
SEVERAL_TURNS = {
    "agent", "environment", "environment_factory", "environments", "max_assistant_turns", "max_tool_calling_iterations",
    "max_turns", "max_user_turns", "multi_turn", "rollout_func", "tool_config_path", "tools",
}  # fmt: skip
_TO_TRL = (
    "a rollout here is a single turn, and maestro_fast.integrations.trl.MaestroGRPOTrainer trains on several, with "
    "TRL's tools, environments and rollout functions (schemas of tools for the prompt stand in a column tools of the "
    "data)"
)
_VERL_SECTIONS = {name.split(".")[-2] for name in VERL} - {"trainer", "data", "model"} | {"actor_rollout_ref", "critic"}


def our_name(name: str, value: Any = None) -> str:
    """Says what a setting of TRL or verl is called here.

    Args:
        name: the dotted name of a setting that there is not.
        value: its value. If it is a mapping, the settings in it are looked up too.

    Returns:
        Words such as "here TRL's beta is loss.kl_coef", or where to go with a setting that this trainer does not serve;
        "" if neither library has such a setting.
    """
    leaves = [name] if name.rpartition(".")[2] in TRL else _leaves(name, value)  # Some of TRL's values are mappings.
    found = [words for leaf in leaves if (words := _words(leaf))]
    if found or not _VERL_SECTIONS & set(name.split(".")):
        return "; ".join([*dict.fromkeys(found)][:4])
    return f"{name} is a section of verl's config, see CONFIG.md of maestro_fast.training for the sections here"


def _leaves(name: str, value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(f"{name}.{key}", item)]
    return [name]


def _words(name: str) -> str:
    parts = name.split(".")
    for count in (3, 2):
        tail = ".".join(parts[-count:])
        if len(parts) >= count and tail in VERL:
            return f"here verl's {tail} is {VERL[tail]}"
    if SEVERAL_TURNS & set(parts):
        return _TO_TRL
    last = parts[-1]
    if last in TRL:
        return f"here TRL's {last} is {TRL[last]}"
    return f"TRL's {last} has no equal here" if last in TRL_ALONE else ""
