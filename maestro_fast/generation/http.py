"""Sends JSON over HTTP to an inference server, with time-outs, retries with back-off, and complete error messages."""

from __future__ import annotations

import http.client
import json
import logging
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

# The server, or a proxy before it, answers with these statuses while it is starting or overloaded.
REPEATED = (429, 502, 503, 504)
LONGEST_PAUSE = 30.0  # seconds


class ServerGone(ConnectionError):
    """The server did not answer, however often it was asked."""


class ServerRefused(ConnectionError):
    """The server answered that it cannot or will not do it, so that a retry would not help.

    Attributes:
        status: The status of the HTTP answer.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Lost(Exception):
    """One attempt failed and may be repeated; the message says why it failed."""


class HttpClient:
    """Calls one server. Every call opens its own connection, so several threads may use one client.

    Proxies that the environment names are ignored, because an inference server stands beside its trainer.
    """

    def __init__(self, url: str, *, timeout: float, retries: int, pause: float = 1.0) -> None:
        """
        Args:
            url: The server's address, ``http://host:port``. If a path follows the port, every route is appended to it.
            timeout: The number of seconds that one call may take.
            retries: How often a call is repeated, if it may be repeated.
            pause: The seconds before the first retry. The pause doubles with every further retry, up to 30 seconds.

        Raises:
            ValueError: ``url`` is not of this form.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: {url!r}, expected http://HOST:PORT")
        self.url = url.rstrip("/")
        self._parts = parts
        self._timeout, self._retries, self._pause = timeout, retries, pause

    def get(self, route: str, *, retries: int | None = None) -> Any:
        """Returns the decoded answer to a GET request, or None if it is empty. Errors are those of ``post``."""
        return self._call("GET", route, None, self._retries if retries is None else retries, _accept)

    def post(
        self,
        route: str,
        body: dict[str, Any] | None = None,
        *,
        repeat: bool,
        accept: Callable[[Any], str | None] | None = None,
    ) -> Any:
        """Returns the decoded answer to a POST request, or None if it is empty.

        Args:
            route: The route, which begins with a slash.
            body: The body, which is sent as JSON.
            repeat: Whether the call may be made again while it is not known to have succeeded.
            accept: A function of the answer. It returns None if the answer will do, and otherwise says what is wrong
                with it; then the attempt counts as failed.

        Raises:
            ServerGone: No attempt brought an acceptable answer.
            ServerRefused: The server answered with a status of 400 or more that a retry would not change.
        """
        return self._call("POST", route, body, self._retries if repeat else 0, accept or _accept)

    def _call(self, method: str, route: str, body: Any, retries: int, accept: Callable[[Any], str | None]) -> Any:
        start, pause = time.monotonic(), self._pause
        for attempt in range(retries + 1):
            try:
                answer = self._once(method, route, body)
                if (wrong := accept(answer)) is not None:
                    raise _Lost(wrong)
                return answer
            except _Lost as lost:
                if attempt == retries:
                    raise ServerGone(self._story(method, route, lost, attempt, time.monotonic() - start)) from None
                logger.warning("%s %s%s: %s; again in %.0f s", method, self.url, route, lost, pause)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("unreachable")

    def _story(self, method: str, route: str, lost: _Lost, attempt: int, seconds: float) -> str:
        tried = "once" if attempt == 0 else f"{attempt + 1} times in {seconds:.0f} s"
        return f"vLLM server {self.url}: tried {method} {route} {tried}, the last time: {lost}"

    def _once(self, method: str, route: str, body: Any) -> Any:
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection = self._connection()
        try:
            connection.request(method, self._parts.path.rstrip("/") + route, _encoded(body), headers)
            response = connection.getresponse()
            text, status = response.read().decode("utf-8", "replace"), response.status
        except TimeoutError:
            raise _Lost(f"no answer within {self._timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Lost(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if status >= 400:
            told = f"status {status}: {_message(text)}"
            if status in REPEATED:
                raise _Lost(told)
            raise ServerRefused(f"vLLM server {self.url}: answered {method} {route} with {told}", status)
        return _decoded(text)

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None
        return kind(self._parts.hostname, self._parts.port, timeout=self._timeout)


def _accept(answer: Any) -> None:
    del answer


def _encoded(body: Any) -> bytes | None:
    return None if body is None else json.dumps(body).encode()


def _decoded(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except json.JSONDecodeError:
        raise _Lost(f"the answer is not JSON: {text[:200]!r}") from None


def _message(text: str) -> str:
    """Extracts the explanation from an error answer. vLLM's routes put it in several places."""
    try:
        answer = json.loads(text)
    except json.JSONDecodeError:
        return text[:500].strip() or "no explanation"
    if isinstance(answer, dict):
        answer = answer.get("error", answer.get("detail", answer))
    if isinstance(answer, dict):
        answer = answer.get("message", answer)
    return str(answer)[:500]
