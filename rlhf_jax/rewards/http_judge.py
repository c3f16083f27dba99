"""A language model as a judge of pairs, asked over HTTP: Zheng et al. 2023 (arXiv:2306.05685).

Every pair is shown in both orders, and an answer wins only if it is preferred in both (the paper's section 3.4: judges
favour a place). Every reply is kept on disk as it comes, so that what was paid for is never asked again.
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

PLACES = ("prompt", "a", "b")


@dataclasses.dataclass(frozen=True)
class HTTPJudgeConfig:
    """An OpenAI-compatible endpoint, the question that it is asked at temperature 0, and what it costs.

    A reply is the letter A or B, or ends in a verdict [[A]] or [[B]] where the template lets the model explain itself.
    """

    url: str  # base address of an OpenAI-compatible API, without /chat/completions: http://localhost:8000/v1
    model: str  # name of the model at the endpoint
    template: str = TEMPLATE  # question, with {prompt}, {a} and {b} once each
    api_key_env: str | None = None  # environment variable that holds the key; None: no key
    max_tokens: Count = 16  # most tokens of a reply
    concurrency: Count = 8  # questions asked at the same time
    timeout: Positive = 60.0  # seconds that an attempt may take
    retries: CountOrZero = 6  # attempts after a first one that failed for a reason that may pass
    backoff: NonNegative = 1.0  # seconds before the first retry, doubled for each further one
    max_unparseable: CountOrZero = 10  # replies without a verdict, each counted as a tie, after which the stage stops
    prompt_price: NonNegative = 0.0  # price of a million tokens of prompts, in any currency
    completion_price: NonNegative = 0.0  # price of a million tokens of replies

    def __post_init__(self) -> None:
        if not re.match(r"https?://\w", self.url):
            raise ValueError(f"url = {self.url!r} must begin with http:// or https:// and name a server")
        for place in PLACES:
            if self.template.count(f"{{{place}}}") != 1:
                raise ValueError(f"template = {self.template!r} must have {{{place}}} once: the judge has to see it")
        check_ranges(self)


class Pair(NamedTuple):
    """A prompt and two answers to it."""

    prompt: str
    first: str
    second: str


class HTTPJudge:
    """A judge that is asked over HTTP. Questions are asked once, whatever the number of pairs they decide."""

    def __init__(self, config: HTTPJudgeConfig, directory: Path) -> None:
        """Reads what was answered before, from `directory`. Raises RlhfError where there is no key to ask with."""
        self._config = config
        self._endpoint = Endpoint(
            config.url, key_of(config.api_key_env), config.timeout, config.retries, config.backoff
        )
        asked = {"url": config.url, "model": config.model, "template": config.template, "max_tokens": config.max_tokens}
        self._replies = _Replies(directory / f"{_hash(asked)[:16]}.jsonl")
        self._verdicts: dict[str, float | None] = {}  # of the replies that were used, by their question
        self._decided: dict[Pair, tuple[float | None, float | None]] = {}  # the votes of both orders for the first
        self._asked = 0

    def prefer(
        self, pairs: Sequence[Pair], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Float[np.ndarray, "N"]:
        """1 where the first answer is preferred in both orders, 0 where the second is, else 1/2: a tie.

        Two equal answers are a tie that nobody is asked about. A reply without a verdict is a vote for neither.

        Args: progress is told how many of the questions are answered.
        Raises: RlhfError where the endpoint fails, or gives more than `max_unparseable` replies without a verdict. What
            was answered until then is kept, and not asked again.
        """
        unlike = [pair for pair in pairs if pair.first != pair.second]
        self._ask_all(list(dict.fromkeys(order for pair in unlike for order in (pair, _swapped(pair)))), progress)
        for pair in unlike:
            back = self._verdicts[_key(_swapped(pair))]
            self._decided[pair] = (self._verdicts[_key(pair)], None if back is None else 1 - back)
        return np.array([0.5 if pair.first == pair.second else _preference(*self._decided[pair]) for pair in pairs])

    def summary(self) -> dict[str, Any]:
        """Replies that were used, whenever they were paid for: how many, how sure, their tokens and their price.

        `judge_agreement` is the share of pairs with the same verdict in both orders, `judge_first` the share of
        verdicts for the answer that was shown first (1/2 is no bias), `judge_uncounted` the replies that came without a
        number of tokens, and `time/judge_asked` the questions that were asked now.
        """
        replies = [self._replies.found[key] for key in self._verdicts]
        verdicts = [found for found in self._verdicts.values() if found is not None]
        prompt = sum(reply.prompt_tokens or 0 for reply in replies)
        completion = sum(reply.completion_tokens or 0 for reply in replies)
        cost = prompt * self._config.prompt_price + completion * self._config.completion_price
        agreed = [forth == back for forth, back in self._decided.values() if None not in (forth, back)]
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
        """Asks what was not answered before, several at once; what was answered counts all the same."""
        answered = [question for question in questions if _key(question) in self._replies.found]
        for question in answered:
            self._use(question)
        done, stopped = len(answered), threading.Event()
        with ThreadPoolExecutor(self._config.concurrency, thread_name_prefix="judge") as pool:
            try:
                left = [question for question in questions if _key(question) not in self._verdicts]
                futures = {pool.submit(self._ask, question, stopped): question for question in left}
                for future in as_completed(futures):
                    if isinstance(future.exception(), Stopped):
                        continue  # the failure that stopped it comes too
                    future.result()
                    self._asked += 1
                    self._use(futures[future])
                    done += 1
                    progress(done, len(questions))
            finally:  # by an error or Ctrl-C too: what is under way will be paid for, and is waited for
                stopped.set()
                pool.shutdown(cancel_futures=True)

    def _ask(self, question: Pair, stopped: threading.Event) -> None:
        texts = dict(zip(PLACES, question, strict=True))
        # In one pass: braces in an answer are its own.
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
            stopped.set()  # here, before this thread takes the next question
            raise

    def _use(self, question: Pair) -> None:
        reply = self._replies.found[_key(question)]
        self._verdicts[_key(question)] = verdict(reply.text)
        garbage = list(self._verdicts.values()).count(None) if verdict(reply.text) is None else 0
        if garbage > self._config.max_unparseable:
            raise RlhfError(
                f"{self._config.model} at {self._config.url} gave {garbage} replies that say neither A nor B, the last "
                f"one {reply.text[:200]!r}: mend template, raise max_tokens = {self._config.max_tokens} if it was cut "
                f"off, or raise max_unparseable = {self._config.max_unparseable}"
            )


def verdict(reply: str) -> float | None:
    """1 for A, 0 for B, None for anything else: the last [[A]] or [[B]] of a reply, or the letter that is all of it."""
    marked = re.findall(r"\[\[([AB])\]\]", reply)
    alone = re.fullmatch(r"\W*(?:answer\W+)?([AB])\W*", reply, re.IGNORECASE)
    letter = marked[-1] if marked else alone[1].upper() if alone else None
    return None if letter is None else float(letter == "A")


class _Replies:
    """Replies by the hash of their question, on disk as soon as they come; a killed process leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self.found: dict[str, Reply] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
                self.found[row["key"]] = Reply(row["reply"], row["prompt_tokens"], row["completion_tokens"])
            except ValueError:  # a line that a killed process began: its question is asked again
                continue

    def add(self, key: str, reply: Reply) -> None:
        row = {"key": key, "reply": reply.text, **dict(zip(Reply._fields[1:], reply[1:], strict=True))}
        line = json.dumps(row) + "\n"
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Opened anew and in one write, so that several processes may add to one file.
            with self._path.open("a+b", buffering=0) as file:
                file.write(line.encode() if _ends_in_line(file) else b"\n" + line.encode())
                os.fsync(file.fileno())
            self.found[key] = reply


def _ends_in_line(file: Any) -> bool:
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
    return not size or file.read(1) == b"\n"


def _preference(forth: float | None, back: float | None) -> float:
    return 0.5 if forth is None or forth != back else forth


def _swapped(pair: Pair) -> Pair:
    return Pair(pair.prompt, pair.second, pair.first)


def _key(question: Pair) -> str:
    return _hash(list(question))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
