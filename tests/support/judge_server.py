"""An OpenAI-compatible server on this machine, which answers as a test tells it to."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from rlhf_jax.rewards.http_judge import TEMPLATE
from tests.support.http_server import Quiet, listening


class Answer(NamedTuple):
    """Response of the server: a status, the reply or another body, and further headers."""

    content: str | None = "A"
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes | None = None
    usage: Mapping[str, int] | None = MappingProxyType({"prompt_tokens": 100, "completion_tokens": 2})

    def encoded(self) -> bytes:
        if self.body is not None:
            return self.body
        answer: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": self.content}}]}
        return json.dumps(answer | ({} if self.usage is None else {"usage": dict(self.usage)})).encode()


class Server(NamedTuple):
    """Address of the server, and the questions it received, in order."""

    url: str
    asked: list[dict[str, Any]]


def shown(question: dict[str, Any]) -> tuple[str, str, str]:
    """The prompt and the two answers of a question by the usual template."""
    pattern = f"{re.escape(TEMPLATE[:-1])}[.!]"
    pattern = pattern.replace(r"\{prompt\}", "(.*)").replace(r"\{a\}", "(.*)").replace(r"\{b\}", "(.*)")
    match = re.fullmatch(pattern, question["body"]["messages"][0]["content"], re.DOTALL)
    assert match, question
    return match[1], match[2], match[3]


def likes_longer(question: dict[str, Any]) -> Answer:
    """The verdict of a judge that prefers the longer answer, and the first of two equally long ones."""
    _, a, b = shown(question)
    return Answer("A" if len(a) >= len(b) else "B")


@contextlib.contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[Server]:
    """A server for as long as the context lasts. A question is `path, headers, body, number` (from 0)."""
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(Quiet):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                question = {"path": self.path, "headers": dict(self.headers), "body": body, "number": len(asked)}
                asked.append(question)
            found = answer(question)
            with contextlib.suppress(ConnectionError):
                self.send_response(found.status)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(found.encoded())

    with listening(Handler) as url:
        yield Server(f"{url}/v1", asked)
