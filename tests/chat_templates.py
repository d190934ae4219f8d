"""Chat templates in the style of well-known models, written for the tests."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

# As DeepSeek-R1: the prompt opens the reasoning; what an earlier turn reasoned is dropped.
R1 = (
    "{{ '<|begin|>' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)

# As Qwen3: the last turn shows an empty block of reasoning, an earlier one none; enable_thinking: false prefills it.
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}"
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for m in messages %}{% if m.content is string %}{% set content = m.content %}{% else %}{% set content = '' %}"
    "{% endif %}{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>' + content + '</tool_response><|im_end|>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)

# As GLM-4.5: even an earlier turn shows an empty block of reasoning.
GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think></think>\\n' }}{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)

# As ChatML of SmolLM2: it joins texts, so a message without content, or with parts, makes it fail.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# As Gemma: no system message. Without a generation prompt it ends the text, as Phi-3 does.
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% else %}{{ '<|end|>' }}{% endif %}"
)

# It refuses all but one question, so the header of the assistant's message cannot be read off an earlier turn.
ONE_TURN = (
    "{% if messages | length != 1 %}{{ raise_exception('One message\\nonly') }}{% endif %}"
    "Q: {{ messages[0]['content'] }} A: {% if add_generation_prompt %}<think> {% endif %}"
)


# The header of an earlier reply is written in another way than the one at the end of the prompt.
TWO_HEADERS = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant (think first): <think>\\n' }}{% endif %}"
)


def chat_tokenizer(template: str | None, *special: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with another template, and with special tokens more. The tiny model has no rows for these."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer
