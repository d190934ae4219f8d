"""What a run of verl asks of maestro_fast: the section ``algorithm.maestro``, and what is refused before Ray starts.

    algorithm.adv_estimator=maestro
    '+algorithm.gdpo_reward_keys=[correct,brief]'           verl's own name for the rewards that compute_score returns
    '+algorithm.maestro.weights={type: conductor, ...}'     optional, like all of algorithm.maestro

Everything here works on the config as verl's trainer gets it. ``refusals()`` is the table of what is refused, and
``refusal_table()`` prints it for the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from maestro_fast.integrations.refusals import Refusal, as_table
from maestro_fast.integrations.verl.batch import ESTIMATORS
from maestro_fast.integrations.verl.contexts import KINDS
from maestro_fast.rewards.conditional import LabelsConfig
from maestro_fast.settings import SettingsError, build, near
from maestro_fast.specs import PROFILES, resolve_profile
from maestro_fast.weighting import ConductorConfig, WeightPolicy, WeightsConfig, check_profile

SECTION = "algorithm.maestro"
ENGINES = ("fsdp", "fsdp2", "megatron")  # The engines that hand out hidden states, see engine.py.


# --- the section algorithm.maestro ---


@dataclass(frozen=True)
class UtilityConfig:
    """The known utility of responses, from which ``anchored`` weights and a guard learn.

    Attributes:
        key: the name under which compute_score returns it, beside the rewards and as none of them; None there means
            that it is unknown.
        labels: the rule that says for which prompts it counts as known; null means for all.
    """

    key: str
    labels: LabelsConfig | None = None


@dataclass(frozen=True)
class MaestroConfig:
    """The section ``algorithm.maestro`` of a run with ``adv_estimator=maestro``.

    Attributes:
        weights: the weight policy, as in the section ``weights`` of our own trainer.
        profile: the name of an advantage profile, a key of ``ops.PROFILES``.
        utility: where the utility of a response stands.
    """

    weights: WeightsConfig = field(default_factory=lambda: WeightsConfig(ConductorConfig()))
    profile: str = "maestro"
    utility: UtilityConfig | None = None

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            known = ", ".join(PROFILES)
            raise SettingsError(
                f"{SECTION}.profile: {self.profile!r}, expected one of {known}{near(self.profile, PROFILES)}"
            )
        if self.utility is None and (needing := self.weights.needs_utility):
            raise SettingsError(
                f"{SECTION}.utility: missing, {needing} needs a known utility, expected the key of one, such as "
                "{key: judge}"
            )


@dataclass(frozen=True)
class RunSettings:
    """What is decided about a run before it starts.

    Attributes:
        estimator: the name of our estimator.
        reward_names: the K rewards; none where the estimator reads verl's scores alone.
        maestro: the section ``algorithm.maestro``; None with the other estimators.
    """

    estimator: str
    reward_names: tuple[str, ...]
    maestro: MaestroConfig | None

    def policy(self, context_size: int) -> WeightPolicy:
        """Builds the weight policy for hidden states of this width.

        Raises:
            SettingsError: an option does not fit the rewards.
        """
        assert self.maestro is not None
        weights = self.maestro.weights
        if isinstance(weights.policy, ConductorConfig) and weights.policy.device == "auto":
            # verl's driver has no GPU of its own. Where it sees some, they are its workers'.
            weights = replace(weights, policy=replace(weights.policy, device="cpu"))
        return weights.build(self.reward_names, context_size, f"{SECTION}.weights")


def run_settings(config: Mapping[str, Any]) -> RunSettings | None:
    """Reads and checks verl's config; returns None if the run has none of our estimators.

    Args:
        config: the config of verl's trainer, its values plain (no OmegaConf inside ``algorithm.maestro``).

    Raises:
        SettingsError: a setting is wrong, or ``refusals`` lists it.
    """
    estimator = str(value_of(config, "algorithm.adv_estimator"))
    if estimator not in ESTIMATORS:
        return None
    section = value_of(config, SECTION)
    if section is not None and estimator != "maestro":
        raise SettingsError(f"{SECTION}: is set, but adv_estimator is {estimator}; expected adv_estimator=maestro")
    names = _reward_names(config) if estimator in ("maestro", "fast_gdpo") else ()
    maestro = build(MaestroConfig, section or {}, SECTION) if estimator == "maestro" else None
    settings = RunSettings(estimator, names, maestro)
    if maestro is not None and maestro.utility is not None and maestro.utility.key in names:
        raise SettingsError(
            f"{SECTION}.utility.key: {maestro.utility.key!r} is in algorithm.gdpo_reward_keys, expected another"
        )
    policy = None if maestro is None else settings.policy(context_size=1)
    if policy is not None and maestro is not None:
        try:
            check_profile(policy, resolve_profile(maestro.profile))
        except ValueError as error:
            raise SettingsError(str(error).replace("advantages.profile", f"{SECTION}.profile", 1)) from error
    used = _concerned(settings, policy)
    for refusal in _REFUSALS:
        if refusal.where in used and (found := refusal.applies(config, settings)):
            raise SettingsError(refusal.message(found))
    return settings


def _reward_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    name = "algorithm.gdpo_reward_keys"
    keys = value_of(config, name)
    if not keys or isinstance(keys, str | Mapping):
        raise SettingsError(
            f"{name}: {'missing' if not keys else repr(keys)}, expected the names of the rewards in compute_score's "
            f"dict, such as '+{name}=[correct,brief]'"
        )
    names = tuple(str(key) for key in keys)
    if len({*names}) < len(names):
        raise SettingsError(f"{name}: {', '.join(names)}, expected each name once")
    return names


def value_of(config: Mapping[str, Any], dotted: str, default: Any = None) -> Any:
    """The value of a dotted name in nested mappings; ``default`` where a part of the name is missing or null."""
    found: Any = config
    for part in dotted.split("."):
        if not hasattr(found, "get"):
            return default
        found = found.get(part)
    return default if found is None else found


# --- what is refused ---


MAESTRO = "adv_estimator=maestro"
OURS = "our estimators that read K rewards (maestro, fast_gdpo)"
GDPO = "adv_estimator=fast_gdpo"
CONTEXT = "a weight policy that reads hidden states"


def _concerned(settings: RunSettings, policy: WeightPolicy | None) -> set[str]:
    """The parts of maestro_fast that a run uses."""
    uses = {
        MAESTRO: settings.estimator == "maestro",
        OURS: bool(settings.reward_names),
        GDPO: settings.estimator == "fast_gdpo",
        CONTEXT: policy is not None and policy.needs_context,
    }
    return {part for part, used in uses.items() if used}


def _profile_has_kl_in_loss(config: Mapping[str, Any], settings: RunSettings) -> bool:
    assert settings.maestro is not None
    in_loss = resolve_profile(settings.maestro.profile).kl_in == "loss"
    return in_loss and bool(value_of(config, "algorithm.use_kl_in_reward", False))


def _bypasses_the_forward(config: Mapping[str, Any], settings: RunSettings) -> bool:
    bypasses = bool(value_of(config, "algorithm.rollout_correction.bypass_mode", False))
    return bypasses and settings.policy(1).context_kind != "reference_prompt_mean"


def _other_engine(config: Mapping[str, Any], _settings: RunSettings) -> bool | str:
    strategy = str(value_of(config, "actor_rollout_ref.actor.strategy", "fsdp"))
    return strategy if strategy not in ENGINES else False


def _megatron_without_states(config: Mapping[str, Any], _settings: RunSettings) -> bool | str:
    if value_of(config, "actor_rollout_ref.actor.strategy") != "megatron":
        return False
    names = ("model.use_fused_kernels", "model.mtp.enable", "actor.megatron.dynamic_context_parallel")
    return ", ".join(name for name in names if value_of(config, f"actor_rollout_ref.{name}", False)) or False


def _reads_missing_reference(config: Mapping[str, Any], settings: RunSettings) -> bool:
    kl = ("algorithm.use_kl_in_reward", "actor_rollout_ref.actor.use_kl_loss")
    reads = settings.policy(1).context_kind == "reference_prompt_mean"
    return reads and not any(value_of(config, name, False) for name in kl)


def _ulysses_without_flash(config: Mapping[str, Any], _settings: RunSettings) -> bool | str:
    attention = value_of(config, "actor_rollout_ref.model.override_config.attn_implementation", "flash_attention_2")
    name = "ulysses_sequence_parallel_size"  # The one beside fsdp_config is deprecated in verl.
    sharded = max(
        int(value_of(config, f"actor_rollout_ref.{part}.{within}{name}", 1))
        for part in ("actor", "ref")
        for within in ("", "fsdp_config.")
    )
    return str(attention) if sharded > 1 and not str(attention).startswith("flash_attention") else False


_REFUSALS = (
    Refusal(
        "trainer.use_v1=False",
        OURS,
        "verl's legacy trainer hands an estimator neither K rewards nor hidden states: leave trainer.use_v1=True",
        lambda config, _settings: not value_of(config, "trainer.use_v1", True),
    ),
    Refusal(
        "algorithm.gdpo_reward_weights",
        MAESTRO,
        "the weights are the policy's: write '+algorithm.maestro.weights={type: static, values: {...}}' for fixed ones",
        lambda config, _settings: value_of(config, "algorithm.gdpo_reward_weights") is not None,
    ),
    Refusal(
        "actor_rollout_ref.rollout.n below 2",
        MAESTRO,
        "a response is compared with the others to its prompt, and there are none (data with __rollout_n__ set their "
        "own number for each prompt: any n of 2 or more will do)",
        lambda config, _settings: int(value_of(config, "actor_rollout_ref.rollout.n", 1)) < 2,
    ),
    Refusal(
        "algorithm.use_kl_in_reward under a profile whose KL is in the loss",
        MAESTRO,
        "the KL must enter once, and this profile's scores take none: use actor_rollout_ref.actor.use_kl_loss, or the "
        "profile maestro, which subtracts verl's penalty from the score",
        _profile_has_kl_in_loss,
    ),
    Refusal(
        "algorithm.use_kl_in_reward",
        GDPO,
        "the K rewards take the place of the scores that hold verl's penalty, so it would be lost (verl's own gdpo "
        "loses it, too): use actor_rollout_ref.actor.use_kl_loss",
        lambda config, _settings: bool(value_of(config, "algorithm.use_kl_in_reward", False)),
    ),
    Refusal(
        "algorithm.rollout_correction.bypass_mode",
        CONTEXT,
        "verl then makes no forward of the policy before the rewards are weighed, from which its states could be read",
        _bypasses_the_forward,
    ),
    Refusal(
        "an actor_rollout_ref.actor.strategy other than fsdp, fsdp2, megatron",
        CONTEXT,
        "only these engines hand out hidden states; policies that read none (static, saw, dvao, exp3, ...) are served",
        _other_engine,
    ),
    Refusal(
        "use_fused_kernels, mtp or dynamic_context_parallel with the strategy megatron",
        CONTEXT,
        "the layer of the LM head is then not called with the states of the log-probs: set it to False",
        _megatron_without_states,
    ),
    Refusal(
        "context: response_first_layer",
        CONTEXT,
        "verl's engines hand out states of the last layer alone: set context to one of " + ", ".join(KINDS),
        lambda _config, settings: settings.policy(1).context_kind == "response_first_layer",
    ),
    Refusal(
        "no reference policy, where the context is reference_prompt_mean",
        CONTEXT,
        "there is no reference to read: set actor_rollout_ref.actor.use_kl_loss=True (a kl_loss_coef of 0 will do), or "
        "context: prompt_mean",
        _reads_missing_reference,
    ),
    Refusal(
        "ulysses_sequence_parallel_size above 1 with an attention other than flash attention",
        CONTEXT,
        "verl gathers sequences for flash attention alone; with another one, log-probs and states are wrong without a "
        "word",
        _ulysses_without_flash,
    ),
)


def refusals() -> tuple[Refusal, ...]:
    """All refusals, in the order in which a run is checked for them."""
    return _REFUSALS


def refusal_table() -> str:
    """The refusals as a table in Markdown, for the documentation."""
    return as_table(_REFUSALS)
