"""Judge of pairs that asks a language model over HTTP: Zheng et al. 2023 (arXiv:2306.05685).

Each pair is judged in both orders, and an answer wins only if it is preferred in both, because judges have a position
bias (section 3.4 of the paper). Replies are stored on disk as they arrive, so that no request is paid for twice.
"""

import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rlhf_jax import processes
from rlhf_jax.config import Count, CountOrZero, NonNegative, Positive, check_ranges
from rlhf_jax.rewards.endpoint import Endpoint, Reply, Stopped, key_of
from rlhf_jax.types import RlhfError

TEMPLATE = """Which of two answers to the same prompt is better?

Prompt:
{prompt}

Answer A:
{a}

Answer B:
{b}

Reply with one letter and nothing else: A or B."""

PLACEHOLDERS = ("prompt", "a", "b")


@dataclasses.dataclass(frozen=True)
class HTTPJudgeConfig:
    """OpenAI-compatible endpoint, prompt template (used at temperature 0), and token prices.

    A reply is the letter A or B, or contains a verdict [[A]] or [[B]] if the template asks for an explanation.
    """

    url: str  # base address of an OpenAI-compatible API, without /chat/completions: http://localhost:8000/v1
    model: str  # name of the model at the endpoint
    template: str = TEMPLATE  # question, containing {prompt}, {a} and {b} once each
    api_key_env: str | None = None  # environment variable with the API key; None: no key
    max_tokens: Count = 16  # maximum tokens per reply
    concurrency: Count = 8  # simultaneous requests
    timeout: Positive = 60.0  # seconds per attempt
    retries: CountOrZero = 6  # further attempts after a transient failure
    backoff: NonNegative = 1.0  # seconds before the first retry, doubled for each further one
    max_unparseable: CountOrZero = 10  # maximum number of replies without a verdict; each counts as a tie
    prompt_price: NonNegative = 0.0  # price per million prompt tokens, in any currency
    completion_price: NonNegative = 0.0  # price per million tokens of replies

    def __post_init__(self) -> None:
        if not re.match(r"https?://\w", self.url):
            raise ValueError(f"url = {self.url!r} must start with http:// or https:// and name a server")
        for place in PLACEHOLDERS:
            if self.template.count(f"{{{place}}}") != 1:
                raise ValueError(f"template = {self.template!r} must contain {{{place}}} exactly once")
        check_ranges(self)


class Pair(NamedTuple):
    """A prompt and two answers to it."""

    prompt: str
    first: str
    second: str


class HTTPJudge:
    """Judge that compares pairs over HTTP. Identical questions are asked only once."""

    def __init__(self, config: HTTPJudgeConfig, directory: Path) -> None:
        """Read earlier replies from `directory`. Raises RlhfError if the API key is missing."""
        self._config = config
        self._endpoint = Endpoint(
            config.url, key_of(config.api_key_env), config.timeout, config.retries, config.backoff
        )
        settings = {name: getattr(config, name) for name in ("url", "model", "template", "max_tokens")}
        self._replies = _Replies(directory / f"{_hash(settings)[:16]}.jsonl")
        self._verdicts: dict[str, float | None] = {}  # of the replies used, by the question's key
        self._decided: dict[Pair, tuple[float | None, float | None]] = {}  # votes for the first answer in both orders
        self._asked = 0

    def prefer(
        self, pairs: Sequence[Pair], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Float[np.ndarray, "N"]:
        """Compare pairs: 1 if the first answer is preferred in both orders, 0 if the second is, otherwise 1/2 (a tie).

        Equal answers are a tie and cost no request. A reply without a verdict makes its pair a tie. The first of
        several processes asks.

        Args: progress is called with the numbers of answered questions and of all questions.
        Raises: RlhfError if the endpoint fails, or returns more than `max_unparseable` replies without a verdict.
            Earlier replies are kept and not requested again.
        """
        return processes.from_first(lambda: self._preferences(pairs, progress))

    def _preferences(self, pairs: Sequence[Pair], progress: Callable[[int, int], None]) -> Float[np.ndarray, "N"]:
        distinct = [pair for pair in pairs if pair.first != pair.second]
        self._ask_all(list(dict.fromkeys(order for pair in distinct for order in (pair, _swapped(pair)))), progress)
        for pair in distinct:
            swapped = self._verdicts[_key(_swapped(pair))]
            self._decided[pair] = (self._verdicts[_key(pair)], None if swapped is None else 1 - swapped)
        return np.array([0.5 if pair.first == pair.second else _preference(*self._decided[pair]) for pair in pairs])

    def summary(self) -> dict[str, Any]:
        """Statistics of all replies used, new or stored: number, consistency, tokens and cost.

        `judge_agreement` is the share of pairs with the same verdict in both orders; `judge_first` the share of
        verdicts for the answer shown first (1/2 means no position bias); `judge_uncounted` the number of replies
        without token counts; `time/judge_asked` the number of new requests.
        """
        replies = [self._replies.by_key[key] for key in self._verdicts]
        verdicts = [vote for vote in self._verdicts.values() if vote is not None]
        prompt = sum(reply.prompt_tokens or 0 for reply in replies)
        completion = sum(reply.completion_tokens or 0 for reply in replies)
        cost = prompt * self._config.prompt_price + completion * self._config.completion_price
        agreed = [first == second for first, second in self._decided.values() if None not in (first, second)]
        return {
            "judge_replies": len(replies),
            "judge_unparseable": len(replies) - len(verdicts),
            "judge_uncounted": sum(None in (reply.prompt_tokens, reply.completion_tokens) for reply in replies),
            "judge_agreement": float(np.mean(agreed)) if agreed else None,
            "judge_first": float(np.mean(verdicts)) if verdicts else None,
            "judge_prompt_tokens": prompt,
            "judge_completion_tokens": completion,
            "judge_cost": cost / 1e6,
            "time/judge_asked": self._asked,
        }

    def _ask_all(self, questions: list[Pair], progress: Callable[[int, int], None]) -> None:
        """Use stored replies and request the missing ones concurrently."""
        answered = [question for question in questions if _key(question) in self._replies.by_key]
        for question in answered:
            self._use(question)
        done, stopped = len(answered), threading.Event()
        with ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="judge") as pool:
            try:
                missing = [question for question in questions if _key(question) not in self._verdicts]
                futures = {pool.submit(self._ask, question, stopped): question for question in missing}
                for future in as_completed(futures):
                    if isinstance(future.exception(), Stopped):
                        continue  # the failure that caused it is raised by its own future
                    future.result()
                    self._asked += 1
                    self._use(futures[future])
                    done += 1
                    progress(done, len(questions))
            finally:  # after an error or Ctrl-C too, wait for pending requests: they will be paid for
                stopped.set()
                pool.shutdown(cancel_futures=True)

    def _ask(self, question: Pair, stopped: threading.Event) -> None:
        texts = dict(zip(PLACEHOLDERS, question, strict=True))
        # One pass, so that braces in an answer are not replaced.
        content = re.sub("{(prompt|a|b)}", lambda match: texts[match[1]], self._config.template)
        body = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self._config.max_tokens,
        }
        try:
            self._replies.add(_key(question), self._endpoint.ask(body, stopped))
        except Exception:
            stopped.set()  # before this thread takes the next question
            raise

    def _use(self, question: Pair) -> None:
        reply = self._replies.by_key[_key(question)]
        self._verdicts[_key(question)] = verdict(reply.text)
        unparseable = list(self._verdicts.values()).count(None) if verdict(reply.text) is None else 0
        if unparseable > self._config.max_unparseable:
            raise RlhfError(
                f"{self._config.model} at {self._config.url} returned {unparseable} replies without a verdict, the "
                f"last one {reply.text[:200]!r}: correct template, raise max_tokens = {self._config.max_tokens} if the "
                f"reply was cut off, or raise max_unparseable = {self._config.max_unparseable}"
            )


def verdict(reply: str) -> float | None:
    """Parse a reply, either its last [[A]] or [[B]] or a single letter: 1 for A, 0 for B, None without a verdict."""
    marked = re.findall(r"\[\[([AB])\]\]", reply)
    alone = re.fullmatch(r"\W*(?:answer\W+)?([AB])\W*", reply, re.IGNORECASE)
    letter = marked[-1] if marked else alone[1].upper() if alone else None
    return None if letter is None else float(letter == "A")


class _Replies:
    """Replies by the hash of their question, written to disk as they arrive."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.by_key: dict[str, Reply] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
                self.by_key[row["key"]] = Reply(row["reply"], row["prompt_tokens"], row["completion_tokens"])
            except ValueError:  # partial line of a killed process: its question is asked again
                continue

    def add(self, key: str, reply: Reply) -> None:
        row = {"key": key, "reply": reply.text, **dict(zip(Reply._fields[1:], reply[1:], strict=True))}
        line = json.dumps(row) + "\n"
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Reopened and written in one call, so that several processes can append to one file.
            with self._path.open("a+b", buffering=0) as file:
                file.write(line.encode() if _ends_in_newline(file) else b"\n" + line.encode())
                os.fsync(file.fileno())
            self.by_key[key] = reply


def _ends_in_newline(file: Any) -> bool:
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
    return not size or file.read(1) == b"\n"


def _preference(vote: float | None, swapped_vote: float | None) -> float:
    return 0.5 if vote is None or vote != swapped_vote else vote


def _swapped(pair: Pair) -> Pair:
    return Pair(pair.prompt, pair.second, pair.first)


def _key(question: Pair) -> str:
    return _hash(list(question))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
