"""A script as a user of TRL has it; test_trl_user_script.py runs it as it is, and with two lines changed."""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment, think_format_reward


def colour_reward(completions, colour, **kwargs):
    return [content[0]["content"].count(letter[0]) for content, letter in zip(completions, colour, strict=True)]


async def patience_reward(completion_ids, trainer_state, **kwargs):
    return [None if len(ids) < 3 else float(len(set(ids))) for ids in completion_ids]


def main(model: str, output_dir: str):
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"Name a {c} thing."}], "colour": c} for c in ("red", "blue") * 8]
    )
    args = GRPOConfig(
        output_dir,
        per_device_train_batch_size=4,
        steps_per_generation=2,
        num_generations=4,
        max_completion_length=8,
        max_steps=10,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[think_format_reward, get_soft_overlong_punishment(8, 6), colour_reward, patience_reward],
        args=args,
        train_dataset=dataset,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
