"""Client for an OpenAI-compatible chat endpoint, with retries for transient failures."""

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

TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""HTTP status codes after which the same request may succeed later."""

LONGEST_WAIT = 60.0  # maximum seconds between two attempts, unless the server asks for more
SHOWN = 300  # maximum number of characters of a server's response in an error message

logger = logging.getLogger(__name__)


class Reply(NamedTuple):
    """Text of a reply and its token counts; None if the server does not report them."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class Stopped(Exception):
    """Raised for a request that was not sent or retried because another request failed permanently."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Address of an endpoint and its retry policy. The key is sent only to this address and never stored."""

    url: str  # without /chat/completions
    key: str | None = dataclasses.field(repr=False)
    timeout: float  # seconds per attempt
    retries: int  # attempts after the first
    backoff: float  # seconds before the first retry; doubled for each further one

    def ask(self, question: dict[str, Any], stopped: threading.Event) -> Reply:
        """Request a chat completion and return its first choice.

        A transient failure (rate limit, server error, timeout) is retried after min(60, backoff * 2^k) seconds times a
        uniform random number in 0.5 .. 1, or after `Retry-After` if that is longer.

        Raises: RlhfError for a permanent failure or after `retries` + 1 attempts; Stopped once `stopped` is set.
        """
        if stopped.is_set():
            raise Stopped
        for attempt in range(self.retries + 1):
            try:
                return self._reply(self._post(question))
            except _TransientError as error:
                if attempt == self.retries:
                    raise RlhfError(
                        f"{self.url} failed {attempt + 1} times, most recently with: {error.reason}; run the same "
                        "command again later: the replies so far are kept"
                    ) from error
                pause = min(LONGEST_WAIT, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)
                pause = max(pause, error.after)
                logger.warning("%s: %s; retrying in %.1f s", self.url, error.reason, pause)
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
        except (OSError, http.client.HTTPException) as error:  # no connection, timeout, truncated response
            raise _TransientError(f"{getattr(error, 'reason', None) or error or type(error).__name__}", 0.0) from error
        try:
            return json.loads(body)
        except ValueError as error:
            raise _TransientError(f"response is not JSON: {self._shown(body)}", 0.0) from error

    def _refusal(self, error: urllib.error.HTTPError, question: dict[str, Any]) -> Exception:
        try:
            content = self._shown(error.read())
        except (OSError, http.client.HTTPException):
            content = ""
        if error.code in TRANSIENT and "insufficient_quota" not in content:
            return _TransientError(f"HTTP {error.code} {content}", _retry_after(error.headers.get("Retry-After")))
        if error.code in (401, 403):  # the content is not shown, because it may include a part of the key
            return RlhfError(
                f"{self.url} rejects the API key (HTTP {error.code}): set the environment variable that api_key_env "
                "names to a valid key"
            )
        if error.code == 404:
            return RlhfError(
                f"{self.url} has no chat/completions, or no model {question['model']!r} (HTTP 404 {content}): correct "
                "model, or url, which must not include /chat/completions"
            )
        return RlhfError(f"{self.url} rejects the request (HTTP {error.code} {content})")

    def _reply(self, answer: Any) -> Reply:
        try:
            text, usage = answer["choices"][0]["message"]["content"] or "", answer.get("usage") or {}
            return Reply(str(text), usage.get("prompt_tokens"), usage.get("completion_tokens"))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise RlhfError(
                f"{self.url} did not return a chat completion but {self._shown(json.dumps(answer).encode())}: is it "
                "an OpenAI-compatible endpoint?"
            ) from error

    def _shown(self, body: bytes) -> str:
        text = " ".join(body.decode(errors="replace").split())
        return (text if self.key is None else text.replace(self.key, "***"))[:SHOWN]


def key_of(variable: str | None) -> str | None:
    """Read an API key from an environment variable; None without a variable. Raises RlhfError for an invalid key."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RlhfError(f"the environment variable {variable}, which api_key_env names, is not set: set it to the key")
    if not (key.isascii() and key.isprintable()):
        raise RlhfError(f"the environment variable {variable} is not a valid HTTP header: set it to the key alone")
    return key


class _TransientError(Exception):
    """Transient failure, with the minimum wait in seconds that the server asks for."""

    def __init__(self, reason: str, after: float) -> None:
        super().__init__(reason)
        self.reason, self.after = reason, after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Rejects redirects, which would drop the request body and send the key to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _retry_after(value: str | None) -> float:
    """Parse a Retry-After header, given in seconds or as a date; 0 if it is missing or invalid."""
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
