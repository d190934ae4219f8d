"""Prompts that responses share: how the sequences of TRL's micro-batches are laid out, and in which they stand.

TRL pads each response to a row of its own. The forwards of ours take the token ids out of these rows and lay them out
anew, with each prompt once for all responses to it where that costs less, see ``model.layouts``.

TRL shuffles a generation batch before it cuts it into micro-batches, so the responses to a prompt are scattered. Where
the loss of an update is a sum over its responses, it does not matter in which of its micro-batches a response stands.
There ``regrouped`` brings the responses to each prompt together again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maestro_fast.integrations.trl.overrides import overrides
from maestro_fast.model import Layouts, Sequences, choose_layout
from maestro_fast.ops import LossFunction, PolicyLossConfig
from maestro_fast.records import cumulative

logger = logging.getLogger(__name__)

# The methods that decide which micro-batches an update has and what is computed of each.
_OF_MICRO_BATCHES = ("_prepare_inputs", "get_train_dataloader", "_get_train_sampler", "compute_loss", "_compute_loss")


# --- when the trainer is made, or with FSDP2 when the model is sharded ---


def shards_unseen(trainer: Any) -> bool:
    """Whether the model is sharded in a way in which its parameters are no modules' own outside their forward."""
    return bool(trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2))


def layouts_of(trainer: Any) -> Layouts:
    """Tries which layouts serve the trainer's model, in the precision of its training.

    Raises:
        ValueError: the model cannot compute even padded rows.
    """
    with trainer.accelerator.autocast():
        return choose_layout(trainer.model, "auto")


def regroups(trainer: Any, config: PolicyLossConfig | LossFunction | None, layouts: Layouts) -> bool:
    """Whether the responses to a prompt are brought together. The log says so, or says why not."""
    if layouts.sharing == "never" or trainer.args.steps_per_generation == 1:
        return False
    reason = _why_scattered(trainer, config)
    if trainer.accelerator.is_main_process:
        if reason is None:
            logger.info("micro-batches: the responses to a prompt stand together, so that they share it")
        else:
            logger.info("micro-batches: the responses to a prompt stay scattered as TRL shuffles them: %s", reason)
    return reason is None


def _why_scattered(trainer: Any, config: PolicyLossConfig | LossFunction | None) -> str | None:
    if not isinstance(config, PolicyLossConfig):
        return "a loss of your own may have means over a micro-batch"
    if config.normalization == "bnpo":
        return "loss_type bnpo is a mean over the tokens of each micro-batch"
    if config.entropy_coef:
        return "entropy_coef has a mean over the tokens of each micro-batch"
    found = [override.name for method in _OF_MICRO_BATCHES for override in overrides(trainer, method)]
    return f"{found[0]} is overridden" if found else None


# --- for each batch ---


def sequences_to_read(inputs: Mapping[str, Tensor], counted_BC: Tensor) -> tuple[Sequences, Tensor]:
    """What the model has to read for the loss of a micro-batch.

    Of a completion that is all that stands before its last counted token: what comes later changes no state that the
    loss reads. So the model reads nothing of a completion that ``mask_truncated_completions`` leaves out.

    Args:
        inputs: TRL's micro-batch. Its prompts are padded on the left, its completions on the right.
        counted_BC: the tokens that the loss counts, bool [B, C] on the CPU.

    Returns:
        The sequences, and which of their tokens predict the counted ones, int64 [N] on the CPU, in the order of
        ``counted_BC``. Tokens are numbered sequence after sequence, as ``HiddenStates.take`` numbers them.

    Raises:
        ValueError: a mask hides a token that is no padding. Later tokens would not see it, as TRL uses its masks.
    """
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    prompts_BP, prompt_mask_BP, completions_BC, completion_mask_BC = (inputs[name].cpu() for name in names)
    place_C = torch.arange(counted_BC.shape[1])
    read_B = (counted_BC * place_C).amax(1) if len(place_C) else counted_BC.sum(1)
    _check_masks(prompt_mask_BP.bool(), completion_mask_BC.bool(), place_C < read_B[:, None])
    own_B = prompt_mask_BP.sum(1)
    sequences = Sequences(
        [ids[-own:].tolist() for ids, own in zip(prompts_BP, own_B.tolist(), strict=True)],
        [ids[:read].tolist() for ids, read in zip(completions_BC, read_B.tolist(), strict=True)],
    )
    row_N, place_N = counted_BC.nonzero(as_tuple=True)
    first_B = cumulative(own_B + read_B)[:-1] + own_B - 1  # The prompt's last token predicts the first one.
    return sequences, first_B[row_N] + place_N


def _check_masks(prompt_mask_BP: Tensor, completion_mask_BC: Tensor, read_BC: Tensor) -> None:
    """Checks that the masks leave out nothing but padding of what the model reads."""
    left = prompt_mask_BP[:, -1] & (prompt_mask_BP.sort(1).values == prompt_mask_BP).all(1)
    if not bool(left.all()):
        row = int((~left).nonzero()[0])
        raise ValueError(
            f"prompt_mask: {prompt_mask_BP[row].int().tolist()} in row {row}, expected zeros on the left only, and a 1"
        )
    seen = (completion_mask_BC | ~read_BC).all(1)
    if not bool(seen.all()):
        row = int((~seen).nonzero()[0])
        raise ValueError(
            f"completion_mask: hides a token of row {row} from later ones that the loss counts, expected zeros on the "
            "right only; tool_mask leaves tokens out of the loss alone"
        )


def regrouped(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sorts the responses of micro-batches by their prompts, and cuts them into as many micro-batches again.

    What belongs to a response moves with it, as where TRL shuffles: lists, and tensors with an axis.
    """
    prompts, mask = (torch.cat([batch[name] for batch in batches]).cpu() for name in ("prompt_ids", "prompt_mask"))
    keys = [ids[own].tolist() for ids, own in zip(prompts, mask.bool(), strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    size = len(order) // len(batches)
    return [
        {name: _taken([batch[name] for batch in batches], order[start : start + size]) for name in batches[0]}
        for start in range(0, len(order), size)
    ]


def _taken(parts: Sequence[Any], members: list[int]) -> Any:
    """What belongs to some responses; ``parts`` has what belongs to those of each micro-batch, or to all at once."""
    if parts[0] is None or (isinstance(parts[0], Tensor) and parts[0].ndim == 0):
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))[torch.tensor(members, device=parts[0].device)]
    whole = [value for part in parts for value in part]
    return [whole[i] for i in members]
