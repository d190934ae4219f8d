"""A small language in which rewards conflict and the true utility is known, and a transformer that has learnt it.

A prompt is a cue and a topic, "verse moon :". The cue belongs to one of four families, and each family wants something
else of an answer:

    fact      0.6 * precision, if there is a fact       + 0.4 * exp(-(n - 2)+ / 4), if it ends
    essay     0.4 * precision * recall                  + 0.3 * min(n / 14, 1)   + 0.3 * fluency in [0, 1]
    report    0.5 * precision * recall                  + 0.5, if the answer is one whole pair of brackets
    poem      0.6 * min(fine words / 5, 1)              + 0.25 * exp(-(n - 6)+ / 4) + 0.15, if there are no brackets

n is the number of words; precision is the share of facts that are of the topic, recall the share of the topic's three
facts that occur, and fine words count once each. The five rewards are cheap, and none of them is the utility: fluency,
partial credit for brackets, the policy's entropy, brevity, and a preference model that is noisy and likes length.

The transformer has two layers of width 64. It is trained from scratch on sentences of this language, so its hidden
states are those of a real model, and it is then trained with GRPO by ``training.train`` like any other policy. Topics
are split: those of the held-out prompts never occur in the GRPO training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END, UNKNOWN, COLON, LEFT, RIGHT = "<pad>", "<end>", "<unk>", ":", "[", "]"
CUES = {
    "fact": ("who", "what", "when"),
    "essay": ("explain", "discuss", "essay"),
    "report": ("report", "list", "table"),
    "poem": ("poem", "verse", "song"),
}
TOPICS = ("moon", "sea", "fire", "tree", "bird", "stone", "bread", "wheel", "clock", "river", "glass", "snow")
FACTS = {topic: tuple(f"{topic}-{part}" for part in ("one", "two", "three")) for topic in TOPICS}
PLAIN = ("and", "then", "it", "was", "as", "they", "were", "so")  # each is mostly followed by the next one
FINE = ("golden", "silent", "gentle", "burning", "ancient", "velvet", "hollow", "radiant", "drifting", "tender")
SPLITS = {"train": TOPICS[:8], "validation": TOPICS[8:9], "test": TOPICS[9:]}
REWARDS = ("fluency", "brackets", "richness", "brevity", "preference")
LONGEST = 20  # tokens of an answer
LABEL_NOISE = 0.15  # the standard deviation of the noise in a label

_FACT_FAMILY = {fact: topic for topic, facts in FACTS.items() for fact in facts}
_WORDS = (*(w for cues in CUES.values() for w in cues), *TOPICS, *_FACT_FAMILY, *PLAIN, *FINE)
VOCABULARY = (PAD, END, UNKNOWN, COLON, LEFT, RIGHT, *_WORDS)
_ID = {word: i for i, word in enumerate(VOCABULARY)}


# --- the language ---


def sentences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws prompts and answers as token ids, int64 [count, 3] and [count, LONGEST]; PAD follows END.

    The answers suit no family well: most are long, mix facts of several topics and leave brackets open.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def choice(words: Sequence[str], *shape: int) -> Tensor:
        ids = torch.tensor([_ID[word] for word in words])
        return ids[torch.randint(len(words), shape, generator=generator)]

    cues = [cue for family in CUES.values() for cue in family]
    cue, topic = choice(cues, count), torch.randint(len(TOPICS), (count,), generator=generator)
    is_poem = (cue >= _ID[CUES["poem"][0]]) & (cue <= _ID[CUES["poem"][-1]])
    own = torch.tensor([[_ID[fact] for fact in FACTS[name]] for name in TOPICS])[topic]
    own = own.gather(1, torch.randint(3, (count, LONGEST), generator=generator))
    facts = torch.where(uniform(count, LONGEST) < 0.6, own, choice(list(_FACT_FAMILY), count, LONGEST))
    kind = uniform(count, LONGEST)
    is_fact = kind < torch.where(is_poem, 0.15, 0.25)[:, None]
    is_fine = kind > torch.where(is_poem, 0.7, 0.85)[:, None]
    answers = torch.where(is_fact, facts, torch.where(is_fine, choice(FINE, count, LONGEST), 0))
    first = _ID[PLAIN[0]]
    fresh, follows = choice(PLAIN, count, LONGEST), uniform(count, LONGEST) < 0.7
    for t in range(LONGEST):
        after = answers[:, t - 1] - first
        next_one = first + (after + 1) % len(PLAIN)
        chained = follows[:, t] & (after >= 0) & (after < len(PLAIN)) if t else torch.zeros(count, dtype=torch.bool)
        answers[:, t] = torch.where(answers[:, t] == 0, torch.where(chained, next_one, fresh[:, t]), answers[:, t])
    length = torch.randint(4, LONGEST - 1, (count, 1), generator=generator)
    opens, closes = uniform(count, 1) < 0.3, uniform(count, 1) < 0.5
    place = torch.arange(LONGEST)
    answers = torch.where(opens & (place == 0), _ID[LEFT], answers)
    answers = torch.where(opens & closes & (place == length - 1), _ID[RIGHT], answers)
    answers = torch.where(place == length, _ID[END], torch.where(place > length, _ID[PAD], answers))
    prompts = torch.stack([cue, topic + _ID[TOPICS[0]], torch.full((count,), _ID[COLON])], 1)
    return prompts, answers


def pretrain(seed: int, steps: int = 500, batch: int = 128, learning_rate: float = 3e-3) -> LlamaForCausalLM:
    """Trains the transformer on sentences, with the loss on the answers alone."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            pad_token_id=_ID[PAD],
            eos_token_id=_ID[END],
            bos_token_id=None,
            tie_word_embeddings=False,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        prompts, answers = sentences(batch, generator)
        ids = torch.cat([prompts, answers], 1)
        logits = model(input_ids=ids[:, :-1]).logits[:, prompts.shape[1] - 1 :]
        loss = functional.cross_entropy(logits.transpose(1, 2), answers, ignore_index=_ID[PAD])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; words are separated by spaces."""
    words = Tokenizer(models.WordLevel(_ID, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=PAD, unk_token=UNKNOWN)


# --- what an answer is worth ---


@cache
def _bigrams() -> list[list[float]]:
    """log p(next | word) of the language's answers, by ids, from 20,000 sentences with one more count for each pair.

    The colon, which ends the prompt, comes before the first word.
    """
    prompts, answers = sentences(20_000, torch.Generator().manual_seed(0))
    ids = torch.cat([prompts[:, -1:], answers], 1)
    counts = torch.ones(len(VOCABULARY), len(VOCABULARY))
    before, after = ids[:, :-1].flatten(), ids[:, 1:].flatten()
    real = after != _ID[PAD]
    counts.index_put_((before[real], after[real]), torch.ones(int(real.sum())), accumulate=True)
    return (counts / counts.sum(1, keepdim=True)).log().tolist()


def _fluency(words: Sequence[str]) -> float:
    """The mean log-prob of the words, and of the end if there is one, under the bigrams, in nats."""
    ids = [_ID[COLON], *(_ID.get(word, _ID[UNKNOWN]) for word in words), *([_ID[END]] if len(words) < LONGEST else [])]
    table = _bigrams()
    found = [table[a][b] for a, b in pairwise(ids)]
    return sum(found) / len(found)


def _brackets(words: Sequence[str]) -> tuple[bool, bool, bool]:
    """Whether the answer begins with [, ends with ], and is one whole pair of brackets that has come to its end."""
    opens, closes = words[:1] == [LEFT], words[-1:] == [RIGHT]
    whole = opens and closes and len(words) < LONGEST and sum(word in (LEFT, RIGHT) for word in words) == 2
    return opens, closes, whole


def _true_utility(words: Sequence[str], family: str, topic: str) -> float:
    n = len(words)
    facts = [word for word in words if word in _FACT_FAMILY]
    own = [word for word in facts if _FACT_FAMILY[word] == topic]
    precision, recall = len(own) / max(1, len(facts)), len(set(own)) / 3
    if family == "fact":
        return 0.6 * precision + 0.4 * math.exp(-max(0, n - 2) / 4) * (n < LONGEST)
    if family == "essay":
        fluent = 1 / (1 + math.exp(-2 * (_fluency(words) + 2.5)))
        return 0.4 * precision * recall + 0.3 * min(n / 14, 1) + 0.3 * fluent
    if family == "report":
        return 0.5 * precision * recall + 0.5 * _brackets(words)[2]
    fine = len({word for word in words if word in FINE})
    plain = not any(word in (LEFT, RIGHT) for word in words)
    return 0.6 * min(fine / 5, 1) + 0.25 * math.exp(-max(0, n - 6) / 4) + 0.15 * plain


def _normal(*parts: object) -> float:
    """A standard normal number that follows from the parts alone, by the Box-Muller transform of their hash."""
    digest = blake2b(json.dumps(parts).encode(), digest_size=16).digest()
    u, v = ((int.from_bytes(half, "big") + 0.5) / 2**64 for half in (digest[:8], digest[8:]))
    return math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)


def fluency(completions: list[str], **_: Any) -> list[float]:
    """Reward: the mean log-prob of the words under a bigram model of the language, in nats."""
    return [_fluency(text.split()) for text in completions]


def brackets(completions: list[str], **_: Any) -> list[float]:
    """Reward: 0.3 for a bracket at the beginning, 0.3 for one at the end, 0.4 for one whole pair."""
    found = [_brackets(text.split()) for text in completions]
    return [0.3 * opens + 0.3 * closes + 0.4 * whole for opens, closes, whole in found]


def richness(completions: list[str], **_: Any) -> list[float]:
    """Reward: the number of different words, up to twelve, over twelve."""
    return [min(len(set(text.split())), 12) / 12 for text in completions]


def brevity(completions: list[str], **_: Any) -> list[float]:
    """Reward: -0.1 for each word beyond four."""
    return [-max(0, len(text.split()) - 4) / 10 for text in completions]


def preference(completions: list[str], topic: list[str], **_: Any) -> list[float]:
    """Reward: half a point for each fact of the topic, up to four, a quarter less for other facts, more with length.

    Its noise, of standard deviation 0.4, follows from the topic and the answer, as that of a real reward model does.
    """
    found = []
    for text, about in zip(completions, topic, strict=True):
        words = text.split()
        own = sum(_FACT_FAMILY.get(word) == about for word in words)
        others = sum(word in _FACT_FAMILY for word in words) - own
        found.append(0.5 * min(own, 4) - 0.25 * others + 0.05 * len(words) + 0.4 * _normal(about, text))
    return found


def utility(completions: list[str], family: list[str], topic: list[str], **_: Any) -> list[float]:
    """The true utility, between 0 and 1; the module gives the formulas."""
    rows = zip(completions, family, topic, strict=True)
    return [_true_utility(text.split(), kind, about) for text, kind, about in rows]


def label(completions: list[str], family: list[str], topic: list[str], cue: list[str], **_: Any) -> list[float]:
    """What a judge would say: the true utility with noise of standard deviation 0.15."""
    true = utility(completions, family, topic)
    parts = zip(true, completions, topic, cue, strict=True)
    return [value + LABEL_NOISE * _normal("label", text, about, word) for value, text, about, word in parts]


# --- a run ---


def write_world(folder: Path, seed: int, *, prompts: int = 1920) -> None:
    """Writes model/, train.jsonl, validation.jsonl and test.jsonl of one seed; the families are equally frequent."""
    model = pretrain(seed)
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(seed)
    families = list(CUES)

    def draw(items: Sequence[str]) -> str:
        return items[int(torch.randint(len(items), (), generator=generator))]

    train = [_row(f := families[i % len(families)], draw(CUES[f]), draw(SPLITS["train"])) for i in range(prompts)]
    every = {
        split: [_row(f, cue, topic) for topic in SPLITS[split] for f in families for cue in CUES[f]]
        for split in ("validation", "test")
    }
    for name, rows in {"train": train, **every}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _row(family: str, cue: str, topic: str) -> dict[str, str]:
    return {"prompt": f"{cue} {topic} {COLON}", "family": family, "topic": topic, "cue": cue}
