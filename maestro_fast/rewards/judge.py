"""A language model behind a server judges completions: it gives each a number, or compares it with another answer.

    rewards:
      - {type: judge, name: helpfulness, url: "http://localhost:8000/v1", model: Qwen/Qwen3-8B}
    anchor: {type: judge, url: "https://api.openai.com/v1", model: gpt-4.1, api_key_env: OPENAI_API_KEY, votes: 3, ...}

What is asked and how an answer is read stands in ``judge_answers``, the requests in ``judge_requests``, and the answers
on disk in ``judge_cache``. Judges have known faults (arXiv 2306.05685): they prefer the answer that comes first, so a
comparison is made in both orders, and they are noisy, so several votes may be taken.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import SplitResult, urlsplit

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import judge_answers
from maestro_fast.rewards.first_batches import Look
from maestro_fast.rewards.judge_cache import Answer, JudgeCache, OpenCache
from maestro_fast.rewards.judge_requests import Endpoint, Failure, Session
from maestro_fast.rewards.whereabouts import whereabouts
from maestro_fast.settings import SettingsError

logger = logging.getLogger(__name__)

Body = dict[str, Any]  # the JSON of a request
Outcome = Answer | Failure

_OWN = ("model", "messages", "temperature", "max_tokens", "seed", "n", "stream")  # what ``extra_body`` must not set
_SECRET_NAME = re.compile(r"(?i)api_?(key|token|secret)|authorization|password|secret")
_SECRET = re.compile(r"\b(?:sk|gsk|xai|pplx|hf|nvapi)[-_][\w-]{16,}|\bAIza[\w-]{30,}|(?i:\bbearer\s+[\w.-]{16,})")
_COSTS = ("requests", "cached", "retries", "prompt_tokens", "completion_tokens", "seconds")


@dataclass(frozen=True)
class JudgeConfig:
    """What a language model behind an OpenAI-compatible server thinks of a completion, from 0 to 1.

    Attributes:
        url: the base of the server's addresses, such as "http://localhost:8000/v1".
        model: the model's name on that server.
        prompt: what the judge is asked, with places for {prompt}, {completion} and any column, such as {reference}; in
            a comparison {answer_a} and {answer_b} stand for the two answers; null takes a general question.
        system: the system message, which may have places, too; null sends none.
        scale: the lowest and the highest number that the judge may give, which become 0 and 1.
        against: the column with another answer; the judge then says which is better, in both orders, instead of giving
            a number, and the reward is the share of comparisons that the completion won, where a tie is half a win.
        pattern: a regular expression for the number, or for A, B or tie, in the judge's answer, of which the last match
            counts and in it the first group; null finds the usual forms.
        after: a text, such as ``</think>``, behind whose last occurrence in the reply the judge begins to read; replies
            without it abstain; null has all of the reply judged.
        votes: how often each question is asked, with another seed each time; the mean of the valid answers counts.
        temperature: the judge's sampling temperature; null leaves it to the server.
        max_tokens: the greatest number of tokens of an answer; null leaves it to the server.
        seed: the seed of the first vote; null sends none.
        extra_body: further fields of the request, such as {chat_template_kwargs: {enable_thinking: false}}.
        concurrency: the number of requests at once, in each process of the run.
        request_timeout: the seconds of silence after which a request is given up and tried again.
        retries: how often a request is tried again, after a pause that grows.
        cache: the file in which answers are kept, for this and for later runs; null keeps none.
        api_key_env: the name of the environment variable that holds the key of the API; null sends none.
        name: the reward's name.

    Raises:
        ValueError: an option is out of its range, a place is missing in the prompt, or an option looks like a key.
        TypeError: an option is of the wrong type.
    """

    url: str
    model: str
    prompt: str | None = None
    system: str | None = None
    scale: tuple[float, float] = (1.0, 10.0)
    against: str | None = None
    pattern: str | None = None
    after: str | None = None
    votes: int = 1
    temperature: float | None = 0.0
    max_tokens: int | None = 1024
    seed: int | None = 0
    extra_body: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 32
    request_timeout: float = 60.0
    retries: int = 5
    cache: str | None = "~/.cache/maestro_fast/judge.sqlite"
    api_key_env: str | None = None
    name: str = "judge"

    def __post_init__(self) -> None:
        address = self._check_secrets()
        if address.scheme not in ("http", "https") or not address.hostname or self.url.endswith("/chat/completions"):
            raise ValueError(
                f"url: {self.url!r}, expected the base of the addresses, such as 'http://localhost:8000/v1'"
            )
        if not self.model:
            raise ValueError("model: is empty, expected the model's name on the server")
        low, high = self.scale
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"scale: {[low, high]}, expected the lowest and the highest number, the lowest first")
        if self.against is not None and (low, high) != (1.0, 10.0):
            raise ValueError(f"scale: {[low, high]}, but against asks for a comparison, which has no numbers")
        for name, least in (("votes", 1), ("concurrency", 1), ("retries", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: {value!r}, expected a whole number, at least {least}")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature}, expected at least 0")
        if self.votes > 1 and (self.temperature == 0 or self.seed is None):
            raise ValueError(
                f"votes: {self.votes}, which would be alike at temperature 0 or without a seed, expected a temperature "
                "above 0 and a seed"
            )
        if not 0 < self.request_timeout < math.inf:
            raise ValueError(f"request_timeout: {self.request_timeout}, expected a number of seconds above 0")
        if taken := sorted(self.extra_body.keys() & {*_OWN}):
            raise ValueError(f"extra_body: sets {taken[0]!r}, which is a setting of its own or none of a judge")
        self._check_pattern()
        self._check_places()

    def _check_secrets(self) -> SplitResult:
        """Refuses what looks like a key, without repeating it: a config is written to the run's directory.

        Returns:
            The url in its parts.
        """
        where = "expected it in an environment variable, whose name is api_key_env"
        for name in ("url", "model", "prompt", "system", "cache", "api_key_env"):
            if _SECRET.search(str(getattr(self, name))):
                raise ValueError(f"{name}: holds what looks like a key, {where}")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            raise ValueError(
                "api_key_env: is no name of an environment variable in capital letters, expected one such as "
                "'OPENAI_API_KEY'; the key itself must not stand in a config"
            )
        try:
            address = urlsplit(self.url)
        except ValueError as error:
            raise ValueError(f"url: is no address: {error}") from error
        if address.username or address.password or address.query:
            raise ValueError(f"url: holds a user, a password or a query, {where}")
        for name, value in _leaves(self.extra_body):
            if _SECRET_NAME.fullmatch(name) or _SECRET.search(str(value)):
                raise ValueError(f"extra_body: {name!r} looks like a key, {where}")
        return address

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from error
        if groups > 1:
            raise ValueError(f"pattern: {self.pattern!r} has {groups} groups, expected one at most")

    def _check_places(self) -> None:
        found = judge_answers.places(self.template)
        wanted = {"completion"} if self.against is None else {"answer_a", "answer_b"}
        if missing := sorted(wanted - found):
            raise ValueError(f"prompt: has no place {{{missing[0]}}}, without which the judge does not see the answer")
        other = {"answer_a", "answer_b"} if self.against is None else {"completion"}
        if wrong := sorted(other & (found | judge_answers.places(self.system or ""))):
            expected = (
                "against, the column with the other answer" if self.against is None else "{answer_a} and {answer_b}"
            )
            raise ValueError(f"prompt: has the place {{{wrong[0]}}}, expected {expected}")

    @property
    def template(self) -> str:
        """The prompt with its places."""
        if self.prompt is not None:
            return self.prompt
        if self.against is not None:
            return judge_answers.COMPARISON_PROMPT
        low, high = self.scale
        return judge_answers.SCORE_PROMPT.replace("LOW", f"{low:g}").replace("HIGH", f"{high:g}")

    def build(self, path: str, base_dir: str | Path) -> JudgeReward:
        """Reads the key and opens the cache. The server is first asked at the first batch.

        Args:
            path: the dotted name of the entry, for messages.
            base_dir: where a relative path of the cache starts.

        Raises:
            SettingsError: the package openai or the key is missing, or the cache cannot be used.
        """
        if find_spec("openai") is None:
            raise SettingsError(f"{path}.type: judge needs the package openai: pip install 'maestro-fast[judge]'")
        key = None if self.api_key_env is None else os.environ.get(self.api_key_env, "").strip()
        if key is not None and not (key.isascii() and key.isprintable() and key):
            raise SettingsError(
                f"{path}.api_key_env: the environment variable {self.api_key_env} is not set, or holds what no key can"
            )
        try:
            cache = (
                None if self.cache is None else JudgeCache(Path(base_dir).absolute() / Path(self.cache).expanduser())
            )
        except ValueError as error:
            raise SettingsError(f"{path}.{error}") from error
        return JudgeReward(self, key, cache)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested mappings and lists, each with the nearest name above it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, name)
    else:
        yield name, value


class JudgeReward:
    """The judge that a ``JudgeConfig`` describes. It is asynchronous: ``RewardSet`` awaits it.

    Equal questions of a batch are asked once. A response abstains if none of its votes is valid, because requests
    failed or answers were malformed, and if its data have no value in a column that the prompt reads. Such failures are
    counted, and the first of each kind is logged.

    Raises:
        ConnectionError: when called: no question of the batch was answered, or the server refuses the key or does not
            know the model.
        ValueError: when called: the cache cannot be used, or a column is missing.
    """

    needs_entropy: ClassVar[bool] = False
    needs_policy: ClassVar[bool] = False
    reads_only: ClassVar[bool] = True

    def __init__(self, config: JudgeConfig, key: str | None, cache: JudgeCache | None) -> None:
        self.config, self.name, self._cache = config, config.name, cache
        self._endpoint = Endpoint(config.url, key, config.concurrency, config.request_timeout, config.retries)
        self._pattern = None if config.pattern is None else re.compile(config.pattern)
        self._columns = _columns(config)
        self._counts: dict[str, float] = defaultdict(float)
        self._positions: list[float] = []
        self._told: dict[str, str] = {}

    @property
    def needs_columns(self) -> tuple[str, ...]:
        """The columns that the data have to have."""
        return self._columns

    def __call__(self, batch: RewardBatch) -> Coroutine[Any, Any, list[float | None]]:
        for name in self._columns:
            if name not in batch.columns:
                listed = ", ".join(sorted(batch.columns)) or "none"
                raise ValueError(f"reward {self.name!r}: no column {name!r}, the columns are {listed}")
        return self._judge(batch, [self._questions(batch, row, reply) for row, reply in enumerate(batch.replies)])

    def metrics(self) -> dict[str, float]:
        """The figures since the last call, which are then forgotten.

        Returns:
            malformed and failed, the numbers of questions without a valid answer; with ``against`` position_bias, from
            -1 (the second answer always wins) over 0 to 1 (the first one does); and costs, which depend on what the
            cache knows: the requests, the questions that were ``cached``, retries, tokens and seconds.
        """
        counts, positions = self._counts, self._positions
        self._counts, self._positions = defaultdict(float), []
        figures = {name: counts[name] for name in ("malformed", "failed")}
        figures |= {"position_bias": sum(positions) / len(positions)} if positions else {}
        return figures | {f"cost/{name}": counts[name] for name in _COSTS}

    def why_silent(self, look: Look) -> str:
        """The likely reason why it taught nothing, see ``first_batches``."""
        if look.abstained and self._told:
            return "; ".join(self._told.values())
        if look.abstained:
            return (
                f"no reply has {self.config.after!r}, or a column that it reads is empty" if self.config.after else ""
            )
        return "the judge gave the same number every time; does its prompt say what makes a response better?"

    def _questions(self, batch: RewardBatch, row: int, reply: str) -> list[tuple[Body, ...]]:
        """The questions about one response: one, or one in each order, for every vote; [] if it cannot be judged."""
        config = self.config
        if config.after is not None:
            _, found, reply = reply.rpartition(config.after)
            if not found:
                return []
        values = {name: batch.columns[name][row] for name in self._columns}
        if any(value is None for value in values.values()):
            return []
        texts = {name: judge_answers.as_text(value) for name, value in values.items()}
        texts["prompt"] = judge_answers.transcript(batch.prompts[row])
        if config.against is None:
            orders = [texts | {"completion": reply}]
        else:
            pair = (reply, texts[config.against])
            orders = [texts | dict(zip(("answer_a", "answer_b"), both, strict=True)) for both in (pair, pair[::-1])]
        return [tuple(self._body(order, vote) for order in orders) for vote in range(config.votes)]

    def _body(self, texts: Mapping[str, str], vote: int) -> Body:
        config = self.config
        messages = [] if config.system is None else [{"role": "system", "content": config.system}]
        messages.append({"role": "user", "content": config.template})
        own = {
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "seed": None if config.seed is None else config.seed + vote,
        }
        return {
            "model": config.model,
            "messages": [message | {"content": judge_answers.fill(message["content"], texts)} for message in messages],
            **{name: value for name, value in own.items() if value is not None},
            **config.extra_body,
        }

    async def _judge(self, batch: RewardBatch, rows: list[list[tuple[Body, ...]]]) -> list[float | None]:
        began = time.perf_counter()
        keyed = [[tuple(self._key(body) for body in vote) for vote in votes] for votes in rows]
        bodies = {
            key: body
            for votes, keys in zip(rows, keyed, strict=True)
            for vote, of_vote in zip(votes, keys, strict=True)
            for body, key in zip(vote, of_vote, strict=True)
        }
        outcomes = await self._outcomes(bodies)
        row_of = {key: row for row, votes in enumerate(keyed) for vote in votes for key in vote}
        values = {key: self._read(outcome, batch, row_of[key]) for key, outcome in outcomes.items()}
        self._counts["seconds"] += time.perf_counter() - began
        return [self._value([tuple(values[key] for key in vote) for vote in votes]) for votes in keyed]

    def _key(self, body: Body) -> str:
        """A hash of all that decides an answer. Equal questions have equal keys."""
        text = json.dumps([self.config.url.rstrip("/"), body], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    async def _outcomes(self, bodies: Mapping[str, Body]) -> dict[str, Outcome]:
        """The answers to questions by their keys, from the cache where it knows them."""
        if not bodies:
            return {}
        if self._cache is None:
            return await self._ask(bodies, None)
        with self._cache.opened() as cache:
            known = cache.find([*bodies])
            self._counts["cached"] += len(known)
            rest = {key: body for key, body in bodies.items() if key not in known}
            return {**known, **(await self._ask(rest, cache, alone=not known) if rest else {})}

    async def _ask(self, bodies: Mapping[str, Body], cache: OpenCache | None, alone: bool = True) -> dict[str, Outcome]:
        """Asks the server, and keeps each answer as it comes.

        Args:
            bodies: the questions by their keys.
            cache: where the answers are kept.
            alone: whether these are all questions of the batch.
        """
        repeated = self._endpoint.repeated
        async with self._endpoint.session() as session:
            tasks = [asyncio.ensure_future(self._one(session, key, body, cache)) for key, body in bodies.items()]
            try:
                outcomes = dict(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._counts["retries"] += self._endpoint.repeated - repeated
        failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
        if alone and len(failures) == len(bodies):
            raise self._error(f"answered none of the {len(bodies)} questions of a batch", failures[-1])
        return outcomes

    async def _one(self, session: Session, key: str, body: Body, cache: OpenCache | None) -> tuple[str, Outcome]:
        outcome = await session.ask(body)
        self._counts["requests"] += 1
        if isinstance(outcome, Failure):
            if outcome.hopeless:
                raise self._error("refused a question", outcome)
            return key, outcome
        self._counts["prompt_tokens"] += outcome.prompt_tokens
        self._counts["completion_tokens"] += outcome.completion_tokens
        return key, outcome if cache is None else cache.put(key, outcome)

    def _error(self, what: str, failure: Failure) -> ConnectionError:
        config = self.config
        return ConnectionError(
            f"reward {self.name!r}: the judge {config.model!r} at {config.url} {what}: {failure.reason}"
        )

    def _read(self, outcome: Outcome, batch: RewardBatch, row: int) -> float | None:
        """The number from 0 to 1 in an answer on a row of the batch; None, counted, if there is none."""
        if isinstance(outcome, Failure):
            self._count("malformed" if outcome.malformed else "failed", outcome.reason, batch, row)
            return None
        if self.config.against is None:
            value = judge_answers.read_score(outcome.text, self.config.scale, self._pattern)
            wanted = "a number from {:g} to {:g}".format(*self.config.scale)
        else:
            value, wanted = judge_answers.read_verdict(outcome.text, self._pattern), "A, B or tie"
        if value is None:
            end = outcome.text[-200:]
            words = f"an answer of {outcome.completion_tokens} tokens lacks {wanted}, its end is {end!r}"
            self._count("malformed", words, batch, row)
        return value

    def _count(self, kind: str, reason: str, batch: RewardBatch, row: int) -> None:
        self._counts[kind] += 1
        if kind not in self._told:
            self._told[kind], where = reason, whereabouts(batch, batch.prompts[row : row + 1])
            logger.warning(
                "reward %r: the judge %r at %s, %s: %s. Without a valid vote a response abstains. This is said once; "
                "the log counts it as rewards/%s/%s.",
                *(self.name, self.config.model, self.config.url, where, reason, self.name, kind),
            )

    def _value(self, votes: Sequence[tuple[float | None, ...]]) -> float | None:
        """The mean of the valid votes. In a comparison a vote is valid if both of its orders are."""
        found: list[float] = []
        for vote in votes:
            numbers = [number for number in vote if number is not None]
            if len(numbers) < len(vote):
                continue
            if len(numbers) == 1:
                found.append(numbers[0])
            else:
                first, second = numbers  # the share of the win of whichever answer came first
                found.append((first + 1.0 - second) / 2.0)
                self._positions.append(first + second - 1.0)
        return sum(found) / len(found) if found else None


def _columns(config: JudgeConfig) -> tuple[str, ...]:
    """The columns of the data that a judge's prompts read."""
    found = judge_answers.places(config.template) | judge_answers.places(config.system or "")
    given = {"prompt"} | ({"completion"} if config.against is None else {"answer_a", "answer_b"})
    return tuple(sorted((found - given) | ({config.against} if config.against is not None else set())))
