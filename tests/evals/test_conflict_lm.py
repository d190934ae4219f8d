"""The small language: what its sentences are like, what an answer is worth, and that its worlds are files of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from maestro_fast.evals import conflict_lm as lm


def words(ids: torch.Tensor) -> list[str]:
    return [lm.VOCABULARY[i] for i in ids.tolist()]


def test_sentences_are_what_the_module_says() -> None:
    prompts, answers = lm.sentences(4000, torch.Generator().manual_seed(3))

    assert prompts.shape == (4000, 3) and answers.shape == (4000, lm.LONGEST)
    end, pad = lm.VOCABULARY.index(lm.END), lm.VOCABULARY.index(lm.PAD)
    assert ((answers == end).sum(1) == 1).all(), "every sentence ends once"
    behind = (answers == end).cumsum(1).bool() & (answers != end)
    assert ((answers == pad) == behind).all(), "padding stands behind the end and nowhere else"
    brackets = (answers == lm.VOCABULARY.index(lm.LEFT)).any(1).float().mean().item()
    assert brackets == pytest.approx(0.3, abs=0.03)
    own = [
        sum(word.startswith(f"{topic}-") for word in text) / max(1, sum("-" in word for word in text))
        for (_, topic, _), text in zip(map(words, prompts[:500]), map(words, answers[:500]), strict=True)
        if any("-" in word for word in text)
    ]
    # 0.6 of the facts are taken from the topic, and of the others one in twelve is, too.
    assert sum(own) / len(own) == pytest.approx(0.6 + 0.4 / 12, abs=0.05)


def test_utilities_by_hand() -> None:
    def utility(text: str, family: str) -> float:
        return lm.utility([text], family=[family], topic=["moon"])[0]

    assert utility("moon-one", "fact") == pytest.approx(1.0)
    assert utility("moon-one sea-one", "fact") == pytest.approx(0.6 * 0.5 + 0.4)
    assert utility("moon-one and then it was as", "fact") == pytest.approx(0.6 + 0.4 * math.exp(-1))
    assert utility("[ moon-one moon-two moon-three ]", "report") == pytest.approx(1.0)
    assert utility("[ moon-one moon-two ] ]", "report") == pytest.approx(0.5 * 2 / 3)
    assert utility("golden silent gentle burning ancient", "poem") == pytest.approx(1.0)
    assert utility("[ golden golden ]", "poem") == pytest.approx(0.6 / 5 + 0.25)
    long = "moon-one moon-two moon-three " + "and then it was as they were so " * 2
    assert 0.7 < utility(long.strip(), "essay") < 1.0


@pytest.mark.parametrize("text", ["", "and", "[ ]", "moon : verse", " ".join(lm.PLAIN * 2), " ".join(lm.FINE)])
def test_no_constant_answer_serves_all_families(text: str) -> None:
    found = [lm.utility([text], family=[family], topic=["moon"])[0] for family in lm.CUES]

    assert sum(found) / len(found) < 0.45


def test_what_helps_one_family_harms_another() -> None:
    """Brevity orders the same two answers as the utility of a fact does, and against that of an essay."""
    short, long = "moon-one", "moon-one moon-two moon-three and then it was as they were so and then it"
    cheap = lm.brevity([short, long])
    fact = lm.utility([short, long], family=["fact"] * 2, topic=["moon"] * 2)
    essay = lm.utility([short, long], family=["essay"] * 2, topic=["moon"] * 2)

    assert cheap[0] > cheap[1] and fact[0] > fact[1] and essay[0] < essay[1]


def test_labels_are_the_utility_with_noise_that_is_the_same_every_time() -> None:
    texts = [f"moon-one {a} {b} {c}" for a in lm.PLAIN for b in lm.PLAIN for c in lm.FINE]
    columns = {"family": ["fact"] * len(texts), "topic": ["moon"] * len(texts), "cue": ["who"] * len(texts)}
    noisy = torch.tensor(lm.label(texts, **columns))
    noise = noisy - torch.tensor(lm.utility(texts, columns["family"], columns["topic"]))

    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.std().item() == pytest.approx(lm.LABEL_NOISE, rel=0.1)
    assert noisy.tolist() == pytest.approx(lm.label(texts, **columns))


def test_a_preference_knows_the_topic_and_likes_length() -> None:
    texts = [f"{a} {b}" for a in lm.PLAIN for b in lm.FINE]
    facts = lm.preference([f"moon-one {text}" for text in texts], topic=["moon"] * len(texts))
    others = lm.preference([f"sea-one {text}" for text in texts], topic=["moon"] * len(texts))
    none = lm.preference(texts, topic=["moon"] * len(texts))

    mean = [sum(values) / len(values) for values in (facts, others, none)]
    assert mean[0] - mean[2] == pytest.approx(0.55, abs=0.2) and mean[1] - mean[2] == pytest.approx(-0.2, abs=0.2)


def test_fluency_prefers_the_order_of_the_language() -> None:
    ordered, reversed_ = " ".join(lm.PLAIN), " ".join(reversed(lm.PLAIN))

    assert lm.fluency([ordered])[0] > lm.fluency([reversed_])[0] + 1
    table = torch.tensor(lm._bigrams())
    assert torch.allclose(table.exp().sum(1), torch.ones(len(table)), atol=1e-4)


def test_a_world_is_the_files_of_a_run_and_its_held_out_topics_are_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain = lm.pretrain
    monkeypatch.setattr(lm, "pretrain", lambda seed: pretrain(seed, steps=2, batch=8))
    lm.write_world(tmp_path, 5, prompts=48)

    rows = {
        split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in lm.SPLITS
    }
    topics = {split: {row["topic"] for row in found} for split, found in rows.items()}
    assert topics["train"].isdisjoint(topics["test"]) and topics["validation"].isdisjoint(topics["test"])
    assert len(rows["train"]) == 48 and len(rows["test"]) == 36
    assert {row["family"] for row in rows["test"]} == set(lm.CUES)
    tokenizer = lm.tokenizer()
    for row in rows["train"] + rows["test"]:
        ids = tokenizer(row["prompt"])["input_ids"]
        assert len(ids) == 3 and tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == row["prompt"]
