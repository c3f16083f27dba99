"""An OpenAI-compatible chat endpoint over HTTP: one question, one reply, asked again where the failure may pass."""

import dataclasses
import email.utils
import http.client
import json
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.request
from typing import Any, NamedTuple

from rlhf_jax.types import RlhfError

PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses after which the same question may succeed."""

LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
SHOWN = 300  # characters of what a server says that a message repeats

logger = logging.getLogger(__name__)


class Reply(NamedTuple):
    """What the model said, and the tokens that it is paid for; None where the server does not say."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Stopped(Exception):
    """A question that was not asked, or not once more, because another one's failure ends them all."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where questions go, and how patiently. The key is sent to this address alone, and written nowhere."""

    url: str  # up to and without /chat/completions
    key: str | None = dataclasses.field(repr=False)
    timeout: float  # seconds an attempt may take
    retries: int  # attempts after the first
    backoff: float  # seconds before the first of them, doubled every time

    def ask(self, question: dict[str, Any], stopped: threading.Event) -> Reply:
        """The first choice of a chat completion; nothing is waited for once `stopped` is set.

        An attempt that fails in passing (a limit of the rate, a failing server, no answer in time) is followed by
        another after min(60, backoff * 2^k) seconds times a random number in 0.5 .. 1, or after `Retry-After`, if that
        is longer.

        Raises: RlhfError where it fails for good, or has failed `retries` + 1 times; `Stopped`.
        """
        if stopped.is_set():
            raise Stopped
        for attempt in range(self.retries + 1):
            try:
                return self._reply(self._post(question))
            except _Passing as error:
                if attempt == self.retries:
                    raise RlhfError(
                        f"{self.url} failed {attempt + 1} times, the last time with: {error.reason}; start the same "
                        "command again later: what was answered so far is kept"
                    ) from error
                pause = min(LONGEST_WAIT, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)
                pause = max(pause, error.after)
                logger.warning("%s: %s; another attempt in %.1f s", self.url, error.reason, pause)
                if stopped.wait(pause):
                    raise Stopped from error
        raise AssertionError("unreachable")

    def _post(self, question: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(question).encode(), headers, method="POST")
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, question) from None
        except (OSError, http.client.HTTPException) as error:  # no connection, no answer in time, half an answer
            raise _Passing(f"{getattr(error, 'reason', None) or error or type(error).__name__}", 0.0) from error
        try:
            return json.loads(body)
        except ValueError as error:
            raise _Passing(f"an answer that is no JSON: {self._shown(body)}", 0.0) from error

    def _refusal(self, error: urllib.error.HTTPError, question: dict[str, Any]) -> Exception:
        try:
            said = self._shown(error.read())
        except (OSError, http.client.HTTPException):
            said = ""
        if error.code in PASSING and "insufficient_quota" not in said:
            return _Passing(f"HTTP {error.code} {said}", _retry_after(error.headers.get("Retry-After")))
        if error.code in (401, 403):  # what it says may repeat a part of the key
            return RlhfError(
                f"{self.url} does not let this key in (HTTP {error.code}): set the environment variable that "
                "api_key_env names to a key that is valid there"
            )
        if error.code == 404:
            return RlhfError(
                f"{self.url} has no chat/completions, or no model {question['model']!r} (HTTP 404 {said}): mend url, "
                "which ends before /chat/completions, or model"
            )
        return RlhfError(f"{self.url} refuses the question (HTTP {error.code} {said})")

    def _reply(self, answer: Any) -> Reply:
        try:
            text, usage = answer["choices"][0]["message"]["content"] or "", answer.get("usage") or {}
            return Reply(str(text), usage.get("prompt_tokens"), usage.get("completion_tokens"))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise RlhfError(
                f"{self.url} gives no chat completion but {self._shown(json.dumps(answer).encode())}: is it an "
                "OpenAI-compatible endpoint?"
            ) from error

    def _shown(self, body: bytes) -> str:
        text = " ".join(body.decode(errors="replace").split())
        return (text if self.key is None else text.replace(self.key, "***"))[:SHOWN]


def key_of(variable: str | None) -> str | None:
    """The key in an environment variable; None where none is named. Raises RlhfError where there is no usable one."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RlhfError(f"the environment variable {variable}, which api_key_env names, is not set: put the key in it")
    if not (key.isascii() and key.isprintable()):
        raise RlhfError(f"the environment variable {variable} holds what no header can carry: put the key alone in it")
    return key


class _Passing(Exception):
    """A failure that may pass, and the least seconds until then, if the server says so."""

    def __init__(self, reason: str, after: float) -> None:
        super().__init__(reason)
        self.reason, self.after = reason, after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected question would lose its body, and carry the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _retry_after(value: str | None) -> float:
    """Seconds until the time that the header names, as seconds or as a date; 0 where it names none."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
