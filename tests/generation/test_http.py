"""Calls to an inference server: which are retried, for how long, and what the error says when the server is gone."""

from __future__ import annotations

import re
import socket
import threading
from typing import Any

import pytest

from maestro_fast.generation.http import HttpClient, ServerGone, ServerRefused
from tests.generation.http_server import Answer, http_server


def client(url: str, **options: Any) -> HttpClient:
    return HttpClient(url, **{"timeout": 30.0, "retries": 3, "pause": 0.01, **options})


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every pause; the tests do not really wait."""
    seen: list[float] = []
    monkeypatch.setattr("maestro_fast.generation.http.time.sleep", seen.append)
    return seen


def first(*answers: Answer) -> Any:
    """Gives these answers in turn, and then the last one for ever."""
    left = list(answers)
    return lambda route, body: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize("lost", [(503, "starting"), (429, ""), (502, ""), (504, ""), None, (200, "half an ans")])
def test_a_lost_call_is_made_again(lost: Answer, pauses: list[float]) -> None:
    with http_server(first(lost, lost, (200, {"n": 1}))) as calls:
        assert client(calls.url).post("/route", {"a": [1]}, repeat=True) == {"n": 1}
    assert calls.seen == [("/route", {"a": [1]})] * 3
    assert pauses == [0.01, 0.02]


def test_pauses_grow_up_to_half_a_minute(pauses: list[float]) -> None:
    with http_server(first((503, ""))) as calls, pytest.raises(ServerGone):
        client(calls.url, retries=7, pause=1.0).get("/route")
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_what_may_not_be_repeated_is_not(pauses: list[float]) -> None:
    with (
        http_server(first((503, {"error": {"message": "busy"}}), (200, {}))) as calls,
        pytest.raises(ServerGone, match=r"tried POST /route once, the last time: status 503: busy$"),
    ):
        client(calls.url).post("/route", repeat=False)
    assert calls.routes() == ["/route"] and not pauses


@pytest.mark.parametrize(
    ("status", "told", "message"),
    [
        (400, {"error": {"message": "no such token"}}, "no such token"),
        (404, {"detail": "Not Found"}, "Not Found"),
        (500, {"error": "engine dead"}, "engine dead"),
        (405, "plain words", "plain words"),
        (400, "", "no explanation"),
        (400, ["list"], r"\['list'\]"),
    ],
)
def test_a_refusal_is_final_and_says_why(status: int, told: Any, message: str, pauses: list[float]) -> None:
    with (
        http_server(first((status, told), (200, {}))) as calls,
        pytest.raises(
            ServerRefused, match=rf"^vLLM server http://127.*: answered POST /r with status {status}: {message}$"
        ) as caught,
    ):
        client(calls.url).post("/r", {}, repeat=True)
    assert caught.value.status == status and calls.routes() == ["/r"] and not pauses


def test_an_answer_that_will_not_do_is_asked_for_again(pauses: list[float]) -> None:
    def accept(answer: Any) -> str | None:
        return None if answer == "good" else f"got {answer}"

    with http_server(first((200, '"bad"'), (200, '"good"'))) as calls:
        assert client(calls.url).post("/r", repeat=True, accept=accept) == "good"
    with http_server(first((200, '"bad"'))) as calls, pytest.raises(ServerGone, match=r"the last time: got bad$"):
        client(calls.url).post("/r", repeat=True, accept=accept)
    assert calls.routes() == ["/r"] * 4


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            ServerGone, match=rf"^vLLM server {re.escape(url)}: tried GET /health 4 times in 0 s, the"
        ) as e:
            client(url).get("/health")
    assert "ConnectionRefusedError" in str(e.value)


def test_no_answer_in_time() -> None:
    over = threading.Event()

    def hang(route: str, body: Any) -> Answer:
        over.wait(20)
        return None

    with http_server(hang) as calls:
        with pytest.raises(ServerGone, match=r"tried GET /r 2 times in \d s, the last time: no answer within 0.2 s$"):
            client(calls.url, timeout=0.2, retries=1).get("/r")
        over.set()


def test_an_empty_answer_and_a_path_before_the_routes() -> None:
    with http_server(lambda route, body: (200, "")) as calls:
        assert client(f"{calls.url}/behind/").get("/health") is None
    assert calls.routes() == ["/behind/health"]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", ""])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match=rf"^url: '{url}', expected http://HOST:PORT"):
        client(url)


def test_the_environments_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with http_server(lambda route, body: (200, {})) as calls:
        assert client(calls.url).get("/r") == {}
