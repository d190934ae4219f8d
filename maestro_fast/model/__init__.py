"""Reads hidden states and log-probs off a policy network, its LM head and its reference, without a trainer.

Example:

    model = AutoModelForCausalLM.from_pretrained(path)
    layouts, head = choose_layout(model, "auto"), head_of(model)
    check_head(model, head)
    out = score(model, Sequences(prompt_ids, completion_ids), head, layout=layouts, micro_batch=8, temperature=1.0)
"""

from maestro_fast.model.attention import (
    VARLEN,
    Attention,
    AttentionPath,
    Layout,
    attention_choice,
    attention_paths,
    register_varlen,
    use_attention,
)
from maestro_fast.model.chat import ChatConfig, encode_prompt, prefilled
from maestro_fast.model.forward import completion_logprobs, last_hidden, prompt_mean, response_contexts, score
from maestro_fast.model.head import LanguageHead, backbone_of, causal_lm, check_head, head_of, product_dtype
from maestro_fast.model.hidden_states import HiddenStates
from maestro_fast.model.layout_trial import choose_layout
from maestro_fast.model.layouts import Layouts, Sharing
from maestro_fast.model.load import Checkpoint, LoraSettings, ModelConfig, load_policy
from maestro_fast.model.reference import PromptContexts, Reference, frozen_copy, reference_policy
from maestro_fast.model.rows import Sequences
from maestro_fast.model.text_scorer import text_scorer
from maestro_fast.model.trained import check_trainable, warn_of_half_precision

__all__ = [
    "VARLEN",
    "Attention",
    "AttentionPath",
    "ChatConfig",
    "Checkpoint",
    "HiddenStates",
    "LanguageHead",
    "Layout",
    "Layouts",
    "LoraSettings",
    "ModelConfig",
    "PromptContexts",
    "Reference",
    "Sequences",
    "Sharing",
    "attention_choice",
    "attention_paths",
    "backbone_of",
    "causal_lm",
    "check_head",
    "check_trainable",
    "choose_layout",
    "completion_logprobs",
    "encode_prompt",
    "frozen_copy",
    "head_of",
    "last_hidden",
    "load_policy",
    "prefilled",
    "product_dtype",
    "prompt_mean",
    "reference_policy",
    "register_varlen",
    "response_contexts",
    "score",
    "text_scorer",
    "use_attention",
    "warn_of_half_precision",
]
