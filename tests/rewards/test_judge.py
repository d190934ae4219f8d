"""A judge as a reward: what is asked, what its answers are worth, and what happens where it lies, hangs or dies."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maestro_fast.records import RewardBatch
from maestro_fast.rewards import build_rewards
from maestro_fast.rewards.config import AnchorConfig
from maestro_fast.rewards.judge import JudgeConfig, JudgeReward
from maestro_fast.settings import SettingsError, build
from tests.rewards.judge_server import HANG, RESET, JudgeServer, Reply, asked, completion, serving, values

MakeBatch = Callable[..., RewardBatch]
SECRET = "secret-of-the-test"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    """Its number is the last one in the question."""
    with serving(lambda body: f"Score: {re.findall('[0-9]+', asked(body))[-1]}") as server:
        yield server


def made(server: JudgeServer, **options: Any) -> JudgeReward:
    settings = {"url": server.url, "model": "small-judge", "prompt": "{completion}", "cache": None, "retries": 0}
    return JudgeConfig(**(settings | options)).build("rewards[0]", ".")


def test_what_is_asked(server: JudgeServer, make_batch: MakeBatch) -> None:
    """Braces in what is put in are no places, and the places of the system message are filled, too."""
    reward = made(
        server,
        prompt='Q: {prompt} A: {completion} Ref: {reference} {{kept}} {"json": 1} 4',
        system="Topic {topic}",
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        max_tokens=50,
    )
    columns = {"reference": ["{completion} 5"], "topic": [{"a": [1]}], "unused": [None]}
    batch = make_batch(["{prompt} {x"], prompts=["Why {reference}?"], columns=columns)

    assert values(reward, batch) == [round(3 / 9, 6)] and reward.needs_columns == ("reference", "topic")
    assert server.bodies == [
        {
            "model": "small-judge",
            "messages": [
                {"role": "system", "content": 'Topic {"a": [1]}'},
                {
                    "role": "user",
                    "content": 'Q: Why {reference}? A: {prompt} {x Ref: {completion} 5 {kept} {"json": 1} 4',
                },
            ],
            "temperature": 0.0,
            "max_tokens": 50,
            "seed": 0,
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ]
    with pytest.raises(ValueError, match=r"^reward 'judge': no column 'reference', the columns are topic"):
        values(reward, make_batch(["a"], columns={"topic": ["b"]}))


def test_conversations_are_transcripts_and_a_prefilled_reply_is_whole(
    server: JudgeServer, make_batch: MakeBatch
) -> None:
    reward = made(
        server, prompt="{prompt}|{completion}", after="</think>", temperature=None, max_tokens=None, seed=None
    )
    batch = RewardBatch(
        [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]] * 2,
        [[{"role": "assistant", "content": text}] for text in ("no end 3", "so </think> maybe</think>10")],
        [[1], [1]],
        prefills=["<think>", "<think>"],
    )

    assert values(reward, batch) == [None, 1.0]
    (body,) = server.bodies
    assert body["messages"] == [{"role": "user", "content": "system: Be brief.\n\nuser: Why?|10"}]
    assert body.keys() == {"model", "messages"}

    assert values(made(server, prompt="{prompt}|{completion}"), make_batch(["10"], chat=True)) == [1.0]
    assert asked(server.bodies[-1]) == "Why?|10", "a single message needs no role"


def test_equal_questions_are_asked_once_and_requests_are_bounded(server: JudgeServer, make_batch: MakeBatch) -> None:
    server.pause = 0.03
    reward = made(server, scale=(0, 20), concurrency=3)

    found = values(reward, make_batch([*map(str, range(12)), "3", "3", "21"]))

    assert found == [round(i / 20, 6) for i in range(12)] + [0.15, 0.15, None]
    assert len(server.bodies) == 13 and server.most == 3
    figures = reward.metrics()
    assert figures.pop("cost/seconds") > 0.03
    assert figures == {
        "malformed": 1,
        "failed": 0,
        "cost/requests": 13,
        "cost/cached": 0,
        "cost/retries": 0,
        "cost/prompt_tokens": 13 * 7,
        "cost/completion_tokens": 13 * 3,
    }
    assert not any(reward.metrics().values())


def test_votes_have_seeds_of_their_own_and_one_fails_alone(server: JudgeServer, make_batch: MakeBatch) -> None:
    server.answer = lambda body: ["no idea", "4", "8"][body["seed"] - 5] if asked(body) == "a" else RESET
    reward = made(server, votes=3, temperature=0.7, seed=5, scale=(0, 10))

    assert values(reward, make_batch(["a", "b"])) == [0.6, None]
    assert sorted(body["seed"] for body in server.bodies) == [5, 5, 6, 6, 7, 7]
    assert (reward.metrics() | {"cost/seconds": 0.0}).items() >= {"malformed": 1, "failed": 3}.items()


@pytest.mark.parametrize(
    ("answer", "value", "bias"),
    [
        (lambda a, b: "[[A]]", 0.5, 1.0),
        (lambda a, b: "[[B]]", 0.5, -1.0),
        (lambda a, b: "[[A]]" if len(a) > len(b) else "[[B]]", 1.0, 0.0),
        (lambda a, b: "[[A]]" if len(a) < len(b) else "[[B]]", 0.0, 0.0),
        (lambda a, b: "[[A]]" if len(a) > len(b) else "tie", 0.75, 0.5),
        (lambda a, b: "[[A]]" if len(a) > len(b) else "who knows", None, None),
    ],
)
def test_comparisons_are_made_in_both_orders(
    server: JudgeServer, make_batch: MakeBatch, answer: Callable[..., str], value: float | None, bias: float | None
) -> None:
    server.answer = lambda body: answer(*asked(body).split("|"))
    reward = made(server, prompt="{answer_a}|{answer_b}", against="other")

    assert values(reward, make_batch(["long one", "x"], columns={"other": ["short", None]})) == [value, None]
    assert sorted(map(asked, server.bodies)) == ["long one|short", "short|long one"]
    assert reward.metrics().get("position_bias") == bias


def test_lies_abstain_and_are_counted(
    server: JudgeServer, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    lies = {
        "malformed": "It is fine.",
        "too high": "Score: 11",
        "empty": "",
        "tool": Reply(completion(None, tool_calls=[{"id": "1", "type": "function", "function": {"name": "f"}}])),
        "refusal": Reply(completion(None, refusal="I will not.")),
        "garbage": Reply(b"<html>", headers={"Content-Type": "text/html"}),
        "broken json": Reply(b'{"choices": ['),
        "no choices": Reply({"choices": []}),
        "a list": Reply([1]),
        "a number": Reply(completion(5)),
    }
    server.answer = lambda body: lies.get(asked(body), "Score: 10")
    reward = made(server)
    odd = {
        "parts": Reply({**completion([{"type": "text", "text": "Score: 1"}]), "usage": None}),
        "usage": Reply({**completion("Score: 1"), "usage": {"prompt_tokens": "many"}}),
    }

    with caplog.at_level(logging.WARNING):
        assert values(reward, make_batch([*lies, "true"])) == [None] * len(lies) + [1.0]
    assert reward.metrics()["malformed"] == len(lies)
    lies |= odd
    assert values(reward, make_batch([*odd])) == [0.0, 0.0] and reward.metrics()["cost/prompt_tokens"] == 0
    (said,) = [text for text in caplog.messages if "malformed" in text]
    assert server.url in said and "This is said once" in said


def test_what_fails_for_a_moment_is_tried_again(server: JudgeServer, make_batch: MakeBatch) -> None:
    quick = {"retry-after-ms": "1"}
    first = {
        "busy": [Reply({}, 429, {"Retry-After": "0.3"})],
        "fault": [Reply({}, 500, quick), Reply({}, 503, quick)],
        "reset": [RESET],
        "half": [Reply(completion("Score: 3"), sent=20)],
    }
    server.answer = lambda body: first[asked(body)].pop(0) if first[asked(body)] else "Score: 10"
    reward = made(server, retries=2)

    assert values(reward, make_batch([*first])) == [1.0] * 4
    came = [time for time, body in zip(server.times, server.bodies, strict=True) if asked(body) == "busy"]
    assert came[1] - came[0] >= 0.3
    assert reward.metrics()["cost/retries"] == 5


def test_the_retries_of_a_question_that_fails_count_too(server: JudgeServer, make_batch: MakeBatch) -> None:
    server.answer = lambda body: RESET if asked(body) == "bad" else "Score: 10"
    reward = made(server, retries=1)

    assert values(reward, make_batch(["bad", "good"])) == [None, 1.0]
    figures = reward.metrics()
    assert (figures["failed"], figures["cost/retries"]) == (1, 1)


def test_a_late_answer_is_asked_for_again(server: JudgeServer, make_batch: MakeBatch) -> None:
    server.answer = lambda body: HANG if len(server.bodies) == 1 else "Score: 10"
    assert values(made(server, retries=4, request_timeout=1), make_batch(["a"])) == [1.0]
    assert server.times[1] - server.times[0] < 20, "the server itself would have given up after 30 seconds"


def test_what_fails_for_good_abstains(
    server: JudgeServer, make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = {
        "late": HANG,
        "dead": RESET,
        "long": Reply({"error": {"message": "the context has 10 tokens"}}, 400),
        "fault": Reply({}, 500),
    }
    server.answer = lambda body: refused.get(asked(body), "Score: 1")
    reward = made(server, request_timeout=1.5)

    assert values(reward, make_batch([*refused, "true"])) == [None] * 4 + [0.0]
    assert reward.metrics()["failed"] == 4
    assert sum("counts it as rewards/judge/failed" in text for text in caplog.messages) == 1


def test_an_answer_that_trickles_in_is_given_up(make_batch: MakeBatch) -> None:
    """The client's own time-out begins anew with every byte."""
    with serving(lambda body: HANG) as server:

        def slow(handler: Any) -> None:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            while not server.over.wait(0.05):
                handler.wfile.write(b" ")

        server.RequestHandlerClass = type("Slow", (server.RequestHandlerClass,), {"do_POST": slow})
        with pytest.raises(ConnectionError, match=r"none of the 1 questions of a batch: no answer within 0\.3 s"):
            values(made(server, request_timeout=0.3), make_batch(["a"]))


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_at_once_and_stands_nowhere(
    server: JudgeServer,
    make_batch: MakeBatch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    status: int,
) -> None:
    monkeypatch.setenv("MY_KEY", f" {SECRET}\n")
    server.answer = lambda body: Reply({"error": {"message": f"{SECRET} is no key"}}, status)
    path = tmp_path / "judge.sqlite"
    reward = made(server, api_key_env="MY_KEY", retries=4, name="help", concurrency=2, cache=str(path))

    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(ConnectionError, match=rf"^reward 'help': the judge 'small-judge' at {server.url} ") as caught,
    ):
        values(reward, make_batch([*map(str, range(20))]))
    text = str(caught.value)
    assert f"refused a question: {status} " in text and "*** is no key" in text and "api_key_env" in text
    assert len(server.bodies) <= 6 and set(server.keys) == {f"Bearer {SECRET}"}

    server.answer = lambda body: f"{SECRET} {SECRET} Score: 10"
    assert values(reward, make_batch(["a"])) == [1.0]
    files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    shown = [caplog.text, text, repr(caught.value.__notes__), repr(reward), repr(reward.config), repr(reward._endpoint)]
    assert not any(SECRET in words for words in shown) and SECRET.encode() not in files and b"*** *** Score" in files
    seen: BaseException | None = caught.value
    while seen is not None:
        assert SECRET not in str(seen)
        seen = seen.__cause__ or seen.__context__


def test_an_unknown_model_ends_the_run_at_once(
    server: JudgeServer, make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key of the environment that the config does not name goes nowhere."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.answer = lambda body: Reply({"error": {"message": "no such model"}}, 404)
    with pytest.raises(ConnectionError) as caught:
        values(made(server, model="smal-judge", retries=4), make_batch(["a"]))
    assert str(caught.value).endswith(
        "refused a question: 404 Not Found: no such model; the server has the models small-judge; did you mean "
        "'small-judge'?"
    )
    assert server.keys == ["Bearer none"]


def test_a_server_that_is_down_ends_the_run(server: JudgeServer, make_batch: MakeBatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    reward = made(server, url=f"http://127.0.0.1:{port}/v1")
    message = rf"at http://127.0.0.1:{port}/v1 answered none of the 2 questions of a batch: no connection: "
    with pytest.raises(ConnectionError, match=message):
        values(reward, make_batch(["a", "b"]))

    server.answer = lambda body: Reply({"error": {"message": "unknown field"}}, 400)
    with pytest.raises(ConnectionError, match=r"none of the 1 questions .*: 400 Bad Request: unknown field"):
        values(made(server, retries=4), make_batch(["a"]))
    assert len(server.bodies) == 1


def test_on_error_abstain_lets_the_run_go_on(server: JudgeServer, make_batch: MakeBatch) -> None:
    server.answer = lambda body: Reply({}, 401)
    entry = {"type": "judge", "url": server.url, "model": "m", "cache": None, "on_error": "abstain"}
    rewards = build_rewards(
        [entry, {**entry, "name": "gated", "model": "gated", "gate": {"on": "format", "threshold": 1}}]
    )

    assert rewards(make_batch(["a", "b"])).isnan().all()
    # The first refusal ends the batch, so whether the second question is still asked depends on who is faster.
    assert {body["model"] for body in server.bodies} == {"m"}, "the judge behind the closed gate is not asked"


def test_as_an_anchor_with_labels_and_where(server: JudgeServer, make_batch: MakeBatch) -> None:
    entry = {
        "type": "judge",
        "url": server.url,
        "model": "m",
        "prompt": "{completion}",
        "cache": None,
        "where": {"family": "fact"},
        "labels": {"share": 1.0, "early": 1},
    }
    anchor = build(AnchorConfig, entry, "anchor").build("anchor")

    batch = make_batch(["1", "10"], columns={"family": ["fact", "poem"]}, step=0)
    assert values(anchor, batch) == [0.0, None] and len(server.bodies) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url: 'localhost:8000', expected the base of the addresses"),
        ({"url": "http://a/v1/chat/completions"}, "url: .*expected the base of the addresses"),
        ({"url": "http://[a/v1"}, "url: is no address"),
        ({"url": f"http://me:{SECRET}@a/v1"}, "url: holds a user, a password or a query, expected it in an"),
        ({"url": f"http://a/v1?key={SECRET}"}, "url: holds a user, a password or a query"),
        ({"model": ""}, "model: is empty"),
        ({"scale": [5, 5]}, r"scale: \[5.0, 5.0\], expected the lowest and the highest"),
        ({"scale": [1]}, "scale: got 1 items, expected 2"),
        ({"votes": 0}, "votes: 0, expected a whole number, at least 1"),
        ({"votes": 2}, "votes: 2, which would be alike at temperature 0"),
        ({"temperature": -1}, "temperature: -1.0, expected at least 0"),
        ({"request_timeout": 0}, "request_timeout: 0.0, expected a number of seconds above 0"),
        ({"retries": -1}, "retries: -1, expected a whole number, at least 0"),
        ({"pattern": "("}, r"pattern: '\(' is no regular expression"),
        ({"pattern": "(a)(b)"}, "pattern: .* has 2 groups, expected one at most"),
        ({"prompt": "Rate {prompt}."}, "prompt: has no place {completion}"),
        ({"prompt": "{answer_a} {completion}"}, "prompt: has the place {answer_a}, expected against"),
        ({"against": "ref", "prompt": "{answer_a} {completion}"}, "prompt: has no place {answer_b}"),
        ({"against": "ref", "scale": [0, 1]}, "scale: .*, but against asks for a comparison"),
        ({"extra_body": {"seed": 3}}, "extra_body: sets 'seed', which is a setting of its own"),
        ({"extra_body": {"a": [{"api_key": SECRET}]}}, "extra_body: 'api_key' looks like a key"),
        ({"extra_body": {"a": "sk-" + "x" * 20}}, "extra_body: 'a' looks like a key"),
        ({"api_key": SECRET}, "api_key: unknown setting, .*did you mean 'api_key_env'"),
        ({"api_key_env": SECRET}, "api_key_env: is no name of an environment variable in capital letters"),
        ({"api_key_env": "sk-" + "x" * 20}, "api_key_env: holds what looks like a key"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env: the environment variable NO_SUCH_KEY is not set"),
    ],
)
def test_wrong_settings_are_named_and_no_key_is_repeated(options: dict[str, Any], message: str) -> None:
    entry = {"type": "judge", "url": "http://a/v1", "model": "m", "cache": None, **options}
    with pytest.raises(SettingsError, match=rf"^rewards\[0\]\.{message}") as caught:
        build_rewards([entry])
    assert SECRET not in str(caught.value) and "xxxxx" not in str(caught.value)


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maestro_fast.rewards.judge.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"^rewards\[0\]\.type: judge needs .*pip install 'maestro-fast\[judge\]'"):
        build_rewards([{"type": "judge", "url": "http://a/v1", "model": "m"}])
