"""Asks a judge over HTTP, many questions at once: any server with OpenAI's chat completions.

The ``openai`` client makes the requests. It tries again where a connection breaks, an answer is late, or the server is
busy or at fault (408, 409, 429, 5xx), and waits in between, longer each time or as long as the server says in
``Retry-After``. What fails for good is an outcome like an answer. Only a server that refuses the key or does not know
the model ends a batch at once, since it will answer nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from maestro_fast.rewards.judge_cache import Answer
from maestro_fast.settings import near

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

_HOPELESS = (401, 403, 404)  # No request will fare better.
_LONGEST_WAIT = 130.0  # seconds between two tries: the client obeys a Retry-After of up to two minutes
_SHOWN = 300  # characters of a server's words that a message shows


@dataclass(frozen=True)
class Failure:
    """A question that was not answered.

    Attributes:
        reason: what happened, in words.
        malformed: whether the server replied, but with something that is no chat completion.
        hopeless: whether every other question would fail, too.
    """

    reason: str
    malformed: bool = False
    hopeless: bool = False


@dataclass
class Endpoint:
    """A judge's server.

    Attributes:
        url: the base of its addresses, up to /v1.
        key: the key of the API, which stands in no message; None for servers that need none.
        concurrency: the number of requests at once.
        request_timeout: the seconds after which a request is given up, and tried again.
        retries: how often a request is tried again.
        repeated: the number of requests that were tried again, counted up.
    """

    url: str
    key: str | None = field(repr=False)
    concurrency: int
    request_timeout: float
    retries: int
    repeated: int = 0

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """A client for one batch. It is closed behind it, so nothing depends on the loop or the process that began."""
        from openai import AsyncOpenAI

        async with AsyncOpenAI(
            base_url=self.url,
            api_key=self.key or "none",  # Without one the client would take a key from the environment.
            timeout=self.request_timeout,
            max_retries=self.retries,
        ) as client:
            yield Session(self, client, asyncio.Semaphore(self.concurrency))


class Session:
    """The requests of one batch."""

    def __init__(self, endpoint: Endpoint, client: AsyncOpenAI, free: asyncio.Semaphore) -> None:
        self._endpoint, self._client, self._free = endpoint, client, free

    async def ask(self, body: Mapping[str, Any]) -> Answer | Failure:
        """Asks one question, as soon as one of the requests at once is free.

        Args:
            body: the JSON of the request, with "model" and "messages" in it.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        tries = self._endpoint.retries + 1
        late = Failure(
            f"no answer within {self._endpoint.request_timeout:g} s" + (f", {tries} times" if tries > 1 else "")
        )
        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
        async with self._free:
            try:
                # The client's time-out is one of silence. This one also ends an answer that trickles in for ever.
                async with asyncio.timeout(self._endpoint.request_timeout * tries + _LONGEST_WAIT * (tries - 1)):
                    response = await self._client.chat.completions.with_raw_response.create(
                        model=body["model"], messages=body["messages"], extra_body=rest
                    )
            except TimeoutError:
                return late
            except APITimeoutError:
                self._endpoint.repeated += tries - 1
                return late
            except APIStatusError as error:
                if error.status_code in (408, 409, 429) or error.status_code >= 500:  # The client repeats these.
                    self._endpoint.repeated += tries - 1
                return await self._refused(error, str(body["model"]))
            except APIConnectionError as error:
                self._endpoint.repeated += tries - 1
                cause = error.__cause__ or error
                return Failure(self._said(f"no connection: {type(cause).__name__} {cause}"))
        self._endpoint.repeated += getattr(response, "retries_taken", 0)
        return self._answer(response.content)

    def _answer(self, content: bytes) -> Answer | Failure:
        """Reads the JSON of a chat completion. An answer without text, such as a refusal or a call of a tool, is ""."""
        try:
            reply = json.loads(content)
            message = reply["choices"][0]["message"]
            text, usage = message.get("content") or "", reply.get("usage") or {}
            if isinstance(text, list):  # Some servers split the text in parts.
                text = "".join(part.get("text") or "" for part in text)
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            if not isinstance(text, str):
                raise TypeError("content")
        except (ValueError, TypeError, LookupError, AttributeError):
            shown = content[: 2 * _SHOWN].decode("utf-8", "replace")
            return Failure(self._said(f"the server replied with no chat completion: {shown!r}"), malformed=True)
        text = text.encode("utf-8", "replace").decode()
        return Answer(self._redacted(text), *(count if isinstance(count, int) else 0 for count in counts))

    async def _refused(self, error: APIStatusError, model: str) -> Failure:
        status = error.status_code
        name = next((known.phrase for known in HTTPStatus if known == status), "")
        inner = error.body.get("message") if isinstance(error.body, dict) else None
        words = self._said(f"{status} {name}: {inner or error.response.text or 'no message'}")
        if status in (401, 403):
            words += "; the key of the API is read from the environment variable that api_key_env names"
        if status == 404:
            words += await self._served(model)
        return Failure(words, hopeless=status in _HOPELESS)

    async def _served(self, model: str) -> str:
        """What may be wrong where the server knows no such address or model."""
        from openai import OpenAIError

        try:
            async with asyncio.timeout(self._endpoint.request_timeout):
                names = [str(found.id) for found in (await self._client.models.list()).data]
        except (OpenAIError, TimeoutError, ValueError, TypeError, AttributeError):
            return "; does the url end where the server's addresses begin, mostly in /v1?"
        return self._said(f"; the server has the models {', '.join(names) or 'none'}") + near(model, names)

    def _said(self, words: str) -> str:
        words = self._redacted(" ".join(words.split()))
        return words if len(words) <= _SHOWN else words[:_SHOWN] + " ..."

    def _redacted(self, text: str) -> str:
        """Takes the key out of a server's words, since some repeat it."""
        key = self._endpoint.key
        return text.replace(key, "***") if key else text
