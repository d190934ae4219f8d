"""The built-in rewards by their ``type:``, and the two smallest of them: length and entropy.

The others have files of their own. To add a reward, write its class, here or in a new file, and put it into
``REWARD_TYPES``. Its dataclass fields are its options in a config, and its ``Attributes`` their documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from maestro_fast.records import RewardBatch, plain_text
from maestro_fast.rewards.first_batches import Look
from maestro_fast.rewards.format import FormatReward
from maestro_fast.rewards.function import FunctionRewardConfig
from maestro_fast.rewards.judge import JudgeConfig
from maestro_fast.rewards.nover import NoverReward
from maestro_fast.rewards.perplexity import PerplexityReward
from maestro_fast.rewards.preference import PreferenceConfig

LengthUnit = Literal["tokens", "words"]
Direction = Literal["minimise", "maximise"]
Estimate = Literal["exact", "sampled"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class LengthReward:
    """A penalty on length: 0 up to a target, and beyond it a straight line down to a floor.

        r(n) = 0 for n <= target,  max(floor, -(n - target) / scale) beyond

    Attributes:
        target: the length up to which nothing is lost, in ``unit``.
        unit: "tokens" counts completion_ids, the end-of-sequence token among them, and "words" what whitespace
            separates.
        scale: the number of units beyond the target that cost 1; by default it is the target.
        floor: the lowest reward, at most 0; -inf stands for none.
        name: the reward's name.

    Raises:
        ValueError: a number is out of its range, or the unit is unknown.
    """

    target: float
    unit: LengthUnit = "tokens"
    scale: float | None = None
    floor: float = -1.0
    name: str = "length"

    needs_entropy: ClassVar[bool] = False
    needs_policy: ClassVar[bool] = False
    reads_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (_is_number(self.target) and self.target >= 0):
            raise ValueError(f"target: {self.target!r}, expected a number of {self.unit}, at least 0")
        if self.unit not in get_args(LengthUnit):
            raise ValueError(f"unit: {self.unit!r}, expected one of {get_args(LengthUnit)}")
        if not (_is_number(self._scale) and self._scale > 0):
            raise ValueError(f"scale: {self._scale!r}, expected a positive number (it is the target by default)")
        if not (_is_number(self.floor) and self.floor <= 0):
            raise ValueError(f"floor: {self.floor!r}, expected a number, at most 0")

    def __call__(self, batch: RewardBatch) -> list[float]:
        if self.unit == "tokens":
            lengths = [len(ids) for ids in batch.completion_ids]
        else:
            lengths = [len(plain_text(completion).split()) for completion in batch.completions]
        return [max(self.floor, -max(0.0, n - self.target) / self._scale) for n in lengths]

    def why_silent(self, look: Look) -> str:
        """The likely reason why all lengths cost the same, see ``first_batches``."""
        texts = look.completions
        lengths = look.lengths if self.unit == "tokens" else [len(text.split()) for text in texts]
        if look.value == 0.0:
            return f"no completion is beyond the target of {self.target:g} {self.unit}, the longest has {max(lengths)}"
        if look.value == self.floor:
            return f"every completion is so long that it gets the floor, the shortest has {min(lengths)} {self.unit}"
        return f"all responses to a prompt are of the same length, {min(lengths)} to {max(lengths)} {self.unit}"

    @property
    def _scale(self) -> float:
        return self.target if self.scale is None else self.scale


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class OverlongReward:
    """DAPO's soft overlong punishment: a penalty on responses that come near the token limit.

        r(n) = 0 for n <= limit - buffer,  (limit - buffer - n) / buffer up to the limit,  -1 beyond

    n counts the tokens of the response. This is equation 13 of DAPO (arXiv 2503.14476), which adds it to the reward of
    a correct answer with the factor 1; here it is a reward of its own, with a weight of its own.

    Attributes:
        limit: the token limit, mostly ``sampling.max_new_tokens``.
        buffer: the number of tokens before the limit over which the penalty grows to 1; 0 penalises nothing up to it.
        name: the reward's name.

    Raises:
        ValueError: a number is out of its range.
    """

    limit: int
    buffer: int
    name: str = "overlong"

    needs_entropy: ClassVar[bool] = False
    needs_policy: ClassVar[bool] = False
    reads_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit: {self.limit}, expected a number of tokens, at least 1")
        if not 0 <= self.buffer <= self.limit:
            raise ValueError(f"buffer: {self.buffer}, expected 0 to the limit of {self.limit} tokens")

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [self._penalty(len(ids)) for ids in batch.completion_ids]

    def _penalty(self, tokens: int) -> float:
        free = self.limit - self.buffer
        if tokens <= free:
            return 0.0
        return (free - tokens) / self.buffer if tokens <= self.limit else -1.0

    def why_silent(self, look: Look) -> str:
        """The likely reason why no response is penalised more than others, see ``first_batches``."""
        free = self.limit - self.buffer
        if look.value == 0.0:
            return f"no response has more than {free} tokens (limit - buffer), the longest has {max(look.lengths)}"
        return f"all responses to a prompt are of the same length, {min(look.lengths)} to {max(look.lengths)} tokens"


@dataclass(frozen=True)
class EntropyReward:
    """The policy's own uncertainty: -H or +H, where H is its entropy over the tokens of the response, in nats.

        exact:    H = mean_t H(pi(. | y_<t)), the entropy of each token's distribution
        sampled:  H = mean_t -log pi(y_t | y_<t), its estimate from the tokens that were sampled

    With ``reduction="sum"`` H is the sum over t. EM-GRPO, as the MAESTRO paper (arXiv 2601.07208) names its baseline,
    minimises the mean; for creative tasks it may be maximised. The sums are those of EM-RL (arXiv 2505.15134): "exact"
    is its EM-RL-token, and "sampled", the log-probability of the whole response, its EM-RL-sequence. A completion
    without tokens abstains.

    Attributes:
        direction: "minimise" gives -H, and "maximise" +H.
        estimate: "exact" takes the entropy of each token's distribution, and "sampled" the log-probs of the tokens.
        reduction: "mean" or "sum" over the tokens of the response.
        name: the reward's name.

    Raises:
        ValueError: the direction, estimate or reduction is unknown. When called: the batch has no mean_entropies_B [B],
            or for "sampled" no mean_logprobs_B [B].
    """

    direction: Direction = "minimise"
    estimate: Estimate = "exact"
    reduction: Reduction = "mean"
    name: str = "entropy"

    needs_entropy: ClassVar[bool] = True
    needs_policy: ClassVar[bool] = False
    reads_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, allowed in (("direction", Direction), ("estimate", Estimate), ("reduction", Reduction)):
            if getattr(self, option) not in get_args(allowed):
                raise ValueError(f"{option}: {getattr(self, option)!r}, expected one of {get_args(allowed)}")

    def __call__(self, batch: RewardBatch) -> list[float | None]:
        sign = -1.0 if self.direction == "minimise" else 1.0
        return [
            sign * entropy * (len(ids) if self.reduction == "sum" else 1) if ids else None
            for entropy, ids in zip(self._mean_entropies(batch), batch.completion_ids, strict=True)
        ]

    def _mean_entropies(self, batch: RewardBatch) -> list[float]:
        field = "mean_entropies_B" if self.estimate == "exact" else "mean_logprobs_B"
        means_B = getattr(batch, field)
        if means_B is None or means_B.shape != (len(batch),):
            got = "missing" if means_B is None else f"of shape {tuple(means_B.shape)}"
            raise ValueError(f"reward {self.name!r}: {field} is {got}, expected ({len(batch)},)")
        values: list[float] = (means_B if self.estimate == "exact" else -means_B).tolist()
        return values


# The class of each type: the reward itself, or a config of its own. A reward has a config of its own if making it takes
# long, as loading a model does, since all of a run's config is read before anything slow is done.
REWARD_TYPES: dict[str, type[Any]] = {
    "entropy": EntropyReward,
    "format": FormatReward,
    "length": LengthReward,
    "nover": NoverReward,
    "overlong": OverlongReward,
    "perplexity": PerplexityReward,
    "preference": PreferenceConfig,
    "judge": JudgeConfig,
    "function": FunctionRewardConfig,
}
KINDS = REWARD_TYPES  # The table had this name in release 0.1.
