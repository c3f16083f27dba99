"""The judge that is asked over HTTP, against a server on this machine."""

import dataclasses
import email.utils
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.rewards.http_judge import TEMPLATE, HTTPJudge, HTTPJudgeConfig, Pair, verdict
from rlhf_jax.types import RlhfError
from tests.support.judge_server import Answer, likes_longer, serving, shown

PAIRS = [Pair(f"question {i}", "long " * (i + 1), "short") for i in range(5)]
KEY = "sk-0123456789abcdef"


def config_for(server, **changes) -> HTTPJudgeConfig:
    return dataclasses.replace(HTTPJudgeConfig(url=server.url, model="tiny", backoff=0.001), **changes)


def after(*first: Answer):
    """A server that gives these answers to the first questions, and then judges by length."""
    return lambda question: first[question["number"]] if question["number"] < len(first) else likes_longer(question)


def test_every_pair_is_asked_in_both_orders_and_disagreement_is_a_tie(tmp_path):
    pairs = [
        Pair("which?", "much longer", "short"),
        Pair("which?", "short", "much longer"),
        Pair("which?", "here", "tied"),  # equally long: the judge prefers whatever it is shown first
        Pair("which?", "the same", "the same"),
    ]
    with serving(likes_longer) as server:
        judge = HTTPJudge(config_for(server), tmp_path)
        np.testing.assert_array_equal(judge.prefer(pairs), [1, 0, 0.5, 0.5])
        orders = sorted(shown(question)[1:] for question in server.asked)
    assert orders == [("here", "tied"), ("much longer", "short"), ("short", "much longer"), ("tied", "here")]
    body = server.asked[0]["body"]
    assert server.asked[0]["path"] == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0, 16)
    summary = judge.summary()
    assert summary["judge_agreement"] == pytest.approx(2 / 3)
    assert summary["judge_first"] == 0.75


def test_braces_of_an_answer_are_its_own(tmp_path):
    with serving(likes_longer) as server:
        HTTPJudge(config_for(server), tmp_path).prefer([Pair("{b}", "{a} and {prompt} ", "{b}\\1")])
        assert shown(server.asked[0])[0] == "{b}"
        assert {shown(question)[1] for question in server.asked} == {"{a} and {prompt} ", "{b}\\1"}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A", 1),
        (" **B**.\n", 0),
        ("(b)", 0),
        ("Answer: A", 1),
        ("[[A]] at first, but after all [[B]]", 0),
        ("A is better", None),
        ("AB", None),
        ("C", None),
        ("", None),
    ],
)
def test_a_verdict_is_a_letter_alone_or_in_double_brackets(reply, expected):
    assert verdict(reply) == expected


@pytest.mark.parametrize(
    "failure",
    [
        Answer(status=429),
        Answer(status=500),
        Answer(status=503, body=b"<html>"),
        Answer(body=b"{half an ans"),
    ],
    ids=["rate_limit", "server_error", "unavailable", "no_json"],
)
def test_what_fails_in_passing_is_asked_again(failure, tmp_path):
    with serving(after(failure, failure)) as server:
        np.testing.assert_array_equal(HTTPJudge(config_for(server), tmp_path).prefer(PAIRS[1:2]), [1])
        assert len(server.asked) == 4


def test_a_server_that_does_not_answer_in_time_is_asked_again(tmp_path):
    def slow_at_first(question):
        if question["number"] == 0:
            time.sleep(1.5)
        return likes_longer(question)

    with serving(slow_at_first) as server:
        judge = HTTPJudge(config_for(server, timeout=1.0, concurrency=1), tmp_path)
        np.testing.assert_array_equal(judge.prefer(PAIRS[1:2]), [1])
        assert len(server.asked) >= 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_is_left_alone_for_as_long_as_it_asks(form, tmp_path):
    times = []

    def limit(question):
        times.append(time.time())
        if question["number"]:
            return likes_longer(question)
        after = "1" if form == "seconds" else email.utils.formatdate(times[0] + 2, usegmt=True)  # whole seconds
        return Answer(status=429, headers={"Retry-After": after})

    with serving(limit) as server:
        HTTPJudge(config_for(server, concurrency=1), tmp_path).prefer(PAIRS[1:2])
    assert times[1] - times[0] > 0.95


def test_waits_double_with_jitter_and_end_after_the_last_attempt(tmp_path):
    times = []

    def failing(question):
        times.append(time.monotonic())
        return Answer(status=502)

    with serving(failing) as server:
        judge = HTTPJudge(config_for(server, retries=4, backoff=0.05, concurrency=1), tmp_path)
        with pytest.raises(RlhfError, match=r"failed 5 times, most recently with: HTTP 502.*the replies so far"):
            judge.prefer(PAIRS[1:2])
    waits = np.diff(times)
    assert len(waits) == 4
    assert np.all(waits >= 0.5 * 0.05 * 2.0 ** np.arange(4))


def test_no_more_questions_are_under_way_than_allowed(tmp_path):
    now, most, change = 0, 0, threading.Condition()

    def counting(question):
        nonlocal now, most
        with change:
            now += 1
            most = max(most, now)
            change.notify_all()
            change.wait_for(lambda: most >= 3, timeout=10)
        time.sleep(0.03)  # for a fourth to come
        with change:
            now -= 1
        return likes_longer(question)

    with serving(counting) as server:
        HTTPJudge(config_for(server, concurrency=3), tmp_path).prefer(PAIRS)
    assert most == 3


def test_what_was_answered_is_never_asked_again_and_its_price_is_counted_once(tmp_path):
    with serving(likes_longer) as server:
        config = config_for(server, prompt_price=2.0, completion_price=10.0)
        first = HTTPJudge(config, tmp_path)
        expected = first.prefer(PAIRS)
        np.testing.assert_array_equal(first.prefer([*PAIRS, *PAIRS]), [*expected, *expected])
        assert len(server.asked) == 10
        again = HTTPJudge(dataclasses.replace(config, concurrency=1, timeout=5.0), tmp_path)
        np.testing.assert_array_equal(again.prefer(PAIRS), expected)
        assert len(server.asked) == 10, "neither the number at once nor the patience makes it another question"
        summaries = [judge.summary() for judge in (first, again)]
        assert [summary.pop("time/judge_asked") for summary in summaries] == [10, 0]
        assert summaries[0] == summaries[1]
        assert summaries[0]["judge_prompt_tokens"] == 1000
        assert summaries[0]["judge_completion_tokens"] == 20
        assert summaries[0]["judge_cost"] == pytest.approx((1000 * 2 + 20 * 10) / 1e6)
        others = [
            dataclasses.replace(config, model="other"),
            dataclasses.replace(config, template=TEMPLATE[:-1] + "!"),
            dataclasses.replace(config, max_tokens=5),
        ]
        for number, other in enumerate(others, start=1):
            HTTPJudge(other, tmp_path).prefer(PAIRS[:1])
            assert len(server.asked) == 10 + 2 * number, "another question"


def test_replies_without_a_number_of_tokens_are_counted(tmp_path):
    with serving(lambda question: Answer(usage=None)) as server:
        judge = HTTPJudge(config_for(server, prompt_price=1.0), tmp_path)
        judge.prefer(PAIRS[:1])
    assert (judge.summary()["judge_uncounted"], judge.summary()["judge_cost"]) == (2, 0)


def test_replies_without_a_verdict_are_ties_until_there_are_too_many(tmp_path):
    def undecided(question):
        time.sleep(0.1 * (question["number"] > 4))  # until it is noticed that there are too many
        return Answer("I cannot say")

    with serving(undecided) as server:
        judge = HTTPJudge(config_for(server, max_unparseable=4, concurrency=1), tmp_path)
        np.testing.assert_array_equal(judge.prefer(PAIRS[:2]), [0.5, 0.5])
        assert judge.summary()["judge_unparseable"] == 4 and judge.summary()["judge_agreement"] is None
        with pytest.raises(RlhfError, match=r"returned 5 replies without a verdict, the last one 'I cannot say'"):
            judge.prefer(PAIRS)
        assert len(server.asked) < 10, "and it stops there"
        assert HTTPJudge(config_for(server, max_unparseable=4), tmp_path).prefer(PAIRS[:1]) == [0.5]
    with serving(after(Answer(None), Answer("A"))) as server:
        judge = HTTPJudge(config_for(server, concurrency=1), tmp_path)
        np.testing.assert_array_equal(judge.prefer([Pair("", "x", "y")]), [0.5])  # one vote is not two


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(status=401, body=f"Incorrect API key: {KEY}".encode()), r"\(HTTP 401\): set the environment variable"),
        (
            Answer(status=404, body=b'{"error": "no such model"}'),
            r"no model 'tiny' \(HTTP 404 .*no such model.*correct",
        ),
        (Answer(status=400, body=f"too long, {KEY}".encode()), r"rejects the request \(HTTP 400 too long, \*\*\*"),
        (Answer(status=429, body=b'{"code": "insufficient_quota"}'), "insufficient_quota"),
        (Answer(status=302, headers={"Location": "http://127.0.0.1:1/steal"}), "HTTP 302"),
        (Answer(body=b'{"object": "nothing"}'), "did not return a chat completion but .*nothing"),
        (Answer(body=b"[]"), "did not return a chat completion"),
    ],
    ids=["key", "address", "refusal", "quota", "redirect", "another_protocol", "list"],
)
def test_what_fails_for_good_is_asked_once_and_said_in_one_message(answer, message, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda question: answer) as server:
        judge = HTTPJudge(config_for(server, api_key_env="JUDGE_KEY", concurrency=1), tmp_path)
        with pytest.raises(RlhfError, match=message) as error:
            judge.prefer(PAIRS)
        assert len(server.asked) == 1
    assert server.asked[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(error.value) + caplog.text


def test_the_key_is_written_nowhere_and_without_one_nothing_begins(tmp_path, monkeypatch):
    with serving(likes_longer) as server:
        config = config_for(server, api_key_env="JUDGE_KEY")
        monkeypatch.delenv("JUDGE_KEY", raising=False)
        with pytest.raises(RlhfError, match="environment variable JUDGE_KEY, which api_key_env names, is not set"):
            HTTPJudge(config, tmp_path)
        monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n{KEY}")
        with pytest.raises(RlhfError, match="not a valid HTTP header"):
            HTTPJudge(config, tmp_path)
        monkeypatch.setenv("JUDGE_KEY", KEY)
        judge = HTTPJudge(config, tmp_path)
        judge.prefer(PAIRS)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written and written.count(b"\n") == 10
    assert KEY not in repr(vars(judge)) + str(judge.summary())


def test_a_killed_judgement_goes_on_where_it_stood(tmp_path):
    """The process dies while its sixth question is under way; a seventh line was begun when it died."""
    child: list[subprocess.Popen] = []
    started = threading.Event()

    def deadly(question):
        if question["number"] == 5:
            started.wait()
            child[0].send_signal(signal.SIGKILL)
        return likes_longer(question)

    with serving(deadly) as server:
        script = (
            "from pathlib import Path\n"
            "from rlhf_jax.rewards.http_judge import HTTPJudge, HTTPJudgeConfig, Pair\n"
            f"pairs = [Pair(*pair) for pair in {[tuple(pair) for pair in PAIRS]}]\n"
            f"config = HTTPJudgeConfig(url={server.url!r}, model='tiny', backoff=0.001, concurrency=1)\n"
            f"HTTPJudge(config, Path({str(tmp_path)!r})).prefer(pairs)\n"
        )
        child.append(subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()}))
        started.set()
        assert child[0].wait(60) == -signal.SIGKILL
        (kept,) = Path(tmp_path).glob("*.jsonl")
        assert kept.read_bytes().count(b"\n") == 5
        with kept.open("ab") as file:
            file.write(b'{"key": "0123", "repl')
        np.testing.assert_array_equal(HTTPJudge(config_for(server), tmp_path).prefer(PAIRS), [0.5, 1, 1, 1, 1])
        assert len(server.asked) == 6 + 5
        HTTPJudge(config_for(server), tmp_path).prefer(PAIRS)
        assert len(server.asked) == 6 + 5, "what follows a line that was cut off is whole"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "localhost:8000"}, "must start with http"),
        ({"template": "{prompt} {a}"}, "must contain {b} exactly once"),
        ({"concurrency": 0}, "concurrency = 0 must be at least 1"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"timeout": 0.0}, "timeout = 0.0 must be above 0"),
        ({"retries": -1}, "retries = -1"),
        ({"max_unparseable": -1}, "max_unparseable = -1"),
        ({"completion_price": -1.0}, "completion_price = -1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HTTPJudgeConfig(url="http://localhost/v1", model="tiny"), **change)
