"""A hub on this machine: what huggingface_hub asks of one to download a model, and how one refuses."""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from tests.support.http_server import Quiet, listening

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(NamedTuple):
    """Address of the server, and the requested paths in order."""

    url: str
    asked: list[str]


@contextlib.contextmanager
def serving(models: dict[str, Path], refused: dict[str, tuple[int, str]]) -> Iterator[Hub]:
    """A hub that has these models, by their ids; others it refuses with a status and a code of the hub's."""
    asked: list[str] = []

    class Handler(Quiet):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).removeprefix("/")
            asked.append(f"{self.command} {path}")
            name = "/".join(path.removeprefix("api/models/").split("/")[:2])
            status, code = refused.get(name, (404, "RepoNotFound"))
            headers = {"X-Error-Code": code, "X-Error-Message": code}
            body = b""
            if name in models:
                status, headers, body = self.found(models[name], path, name)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def found(self, directory: Path, path: str, name: str) -> tuple[int, dict[str, str], bytes]:
            files = sorted(file for file in directory.iterdir() if file.is_file())
            if path == f"api/models/{name}/revision/main":
                listed = [{"rfilename": file.name} for file in files]
                return 200, {}, json.dumps({"id": name, "sha": REVISION, "siblings": listed}).encode()
            if path == f"api/models/{name}/tree/{REVISION}":
                listed = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid(file)} for file in files
                ]
                return 200, {}, json.dumps(listed).encode()
            assert path.startswith(f"{name}/resolve/{REVISION}/"), path
            file = directory / path.rpartition("/")[2]
            return 200, {"ETag": f'"{oid(file)}"', "X-Repo-Commit": REVISION}, file.read_bytes()

    with listening(Handler) as url:
        yield Hub(url, asked)


class Upload(NamedTuple):
    """Requests of an upload."""

    created: list[dict]  # the requests for repositories
    files: dict[str, bytes]  # by path in the repository
    token: list[str]  # headers of the commits


@contextlib.contextmanager
def receiving(*, refused: int | None = None) -> Iterator[tuple[str, Upload]]:
    """A hub that takes the files of a commit, or refuses a repository with a status; its address and what it has."""
    got = Upload([], {}, [])

    class Handler(Quiet):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(404, {"error": "nothing here yet"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = unquote(urlsplit(self.path).path)
            if refused is not None:
                self.answer(refused, {"error": "not yours"})
            elif path == "/api/repos/create":
                got.created.append(json.loads(body))
                self.answer(200, {"url": f"http://{self.headers['Host']}/me/mine", "id": "me/mine"})
            elif path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif path == "/api/models/me/mine/preupload/main":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.answer(200, {"files": files})
            else:
                assert path == "/api/models/me/mine/commit/main", path
                lines = [json.loads(line) for line in body.splitlines()]
                sent = [line["value"] for line in lines if line["key"] == "file"]
                got.files.update({file["path"]: base64.b64decode(file["content"]) for file in sent})
                got.token.append(self.headers["Authorization"])
                url = f"http://{self.headers['Host']}/me/mine/commit/{REVISION}"
                self.answer(200, {"commitUrl": url, "commitOid": REVISION, "success": True})

        def answer(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with listening(Handler) as url:
        yield url, got


def oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
