"""OPUS-Books: sentences of old books, to be translated, and scored by BLEU and chrF.

The data set is Helsinki-NLP/opus_books, with a config for each pair of languages in alphabetical order, such as en-fr,
and one split. A row has an id and a mapping ``translation`` from language to text. Both are documented in the catalogue
of TensorFlow Datasets, from the data set's own description. The paper does not say which pairs it used.

A sentence's score is its sentence BLEU, from 0 to 1. The mean of these is not the BLEU of the whole, which papers
report, so ``figures`` gives that, and chrF, from 0 to 100. All three are sacrebleu's, with its standard settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from maestro_fast.data.files import Row
from maestro_fast.evals.benchmarks.benchmark import ONE_SPLIT, Benchmark, asked, final_answer
from maestro_fast.records import Message

LANGUAGES = {
    "ca": "Catalan",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "eo": "Esperanto",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "hu": "Hungarian",
    "it": "Italian",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "sv": "Swedish",
}


@dataclass(frozen=True)
class TranslationScorer:
    """Scores translations by sacrebleu.

    Attributes:
        reference: The translation in the data.

    Raises:
        ImportError: When it scores: sacrebleu is not installed.
    """

    reference: Callable[[Row], str]

    def score(self, prompts: Sequence[list[Message]], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        sacrebleu = _sacrebleu()
        return [
            sacrebleu.sentence_bleu(_line(reply), [self.reference(row)]).score / 100
            for reply, row in zip(completions, rows, strict=True)
        ]

    def figures(self, completions: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        """``bleu`` and ``chrf`` of all sentences together, from 0 to 100."""
        sacrebleu = _sacrebleu()
        lines, references = [_line(reply) for reply in completions], [[self.reference(row) for row in rows]]
        return {
            "bleu": float(sacrebleu.corpus_bleu(lines, references).score),
            "chrf": float(sacrebleu.corpus_chrf(lines, references).score),
        }


def opus_books(source: str = "en", target: str = "fr") -> Benchmark:
    """OPUS-Books in one direction.

    Args:
        source, target: Two of the languages in ``LANGUAGES``, by their codes. Not every pair has a config.

    Raises:
        ValueError: A language is unknown, or both are the same.
    """
    for name, code in (("source", source), ("target", target)):
        if code not in LANGUAGES:
            raise ValueError(f"{name}: {code!r}, expected one of {', '.join(LANGUAGES)}")
    if source == target:
        raise ValueError(f"target: {target!r}, which is the source, expected another language")

    def text(row: Row, code: str) -> str:
        texts = row["translation"]
        if not isinstance(texts, dict) or not texts.get(code):
            got = ", ".join(texts) if isinstance(texts, dict) else type(texts).__name__
            raise ValueError(f"opus_books: the column 'translation' has no {code!r}, it has {got}")
        return str(texts[code]).strip()

    def prompt(row: Row) -> list[Message]:
        question = f"Translate from {LANGUAGES[source]} into {LANGUAGES[target]}:\n\n{text(row, source)}"
        return asked(question, "only the translation")

    def reference(row: Row) -> str:
        return text(row, target)

    return Benchmark(
        name="opus_books",
        home="huggingface.co/datasets/Helsinki-NLP/opus_books",
        dataset="Helsinki-NLP/opus_books",
        configs=("-".join(sorted((source, target))),),
        splits=ONE_SPLIT,
        columns=(("translation",),),
        prompt=prompt,
        reference=reference,
        scorer=TranslationScorer(reference),
        unit=lambda row: text(row, source),
    )


def _line(reply: str) -> str:
    """The answer on one line, as sacrebleu reads it."""
    return " ".join(final_answer(reply).split())


def _sacrebleu() -> ModuleType:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError('opus_books: needs sacrebleu, pip install "maestro-fast[eval]"') from error
    return sacrebleu
