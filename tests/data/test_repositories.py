"""Data sets of repositories, fetched from a server on this machine: verified, built, and refused in one message."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_jax import load_rows
from rlhf_jax.data import fetch, repositories
from rlhf_jax.main import main
from rlhf_jax.types import RlhfError
from tests.support.disk import left_in
from tests.support.http_server import Quiet, listening

TOPICS = {
    "tables/tea-or-coffee_tea.csv": (
        "#id\tlabel\ta1\ta2\n"
        "arg1_arg2\ta2\tI like tea.\tTea has less caffeine.<br/> It keeps nobody awake.\n"
        "arg2_arg3\ta1\tTea has less caffeine.<br/> It keeps nobody awake.\tThé & “scones”\n"
    ),
    "tables/tea or coffee_coffee.csv": "#id\tlabel\ta1\ta2\narg9_arg8\ta1\tCoffee wakes me up.\tmeh\n",
}
SOLUTIONS = json.dumps({"question": "1 + 1?", "6b_finetuning": {"is_correct": True, "solution": "2"}}) + "\n"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def files() -> dict[str, bytes]:
    """The server's files by their paths; a test may change them."""
    tables = {f"/{repositories.CONVARG}/{path.replace(' ', '%20')}": text.encode() for path, text in TOPICS.items()}
    return tables | {f"/{repositories.GSM8K}/{repositories.GSM8K_SOLUTIONS}": SOLUTIONS.encode()}


@pytest.fixture
def data(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty place for fetched data, with the server as GitHub and the hashes of its files as the known ones."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(files.get(f"size of {self.path}", body or b""))))
            self.end_headers()
            self.wfile.write(body or b"")

    hashes = tmp_path / "hashes"
    hashes.write_text("".join(f"{digest(text)}  {path}\n" for path, text in TOPICS.items()))
    monkeypatch.setattr(repositories, "CONVARG_HASHES", hashes)
    monkeypatch.setattr(repositories, "GSM8K_SOLUTIONS_HASH", digest(SOLUTIONS))
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with listening(Handler) as url:
        monkeypatch.setenv("RLHF_JAX_GITHUB", url)
        yield tmp_path / "data"


def test_pairs_of_arguments_are_preference_rows(data: Path):
    rows = load_rows(fetch.fetch("convarg") / "pairs.jsonl")
    tea, coffee = "tea-or-coffee_tea", "tea or coffee_coffee"
    caffeine = "Tea has less caffeine.\n It keeps nobody awake."
    assert rows == [
        {"topic": tea, "id": "arg1_arg2", "prompt": "", "chosen": caffeine, "rejected": "I like tea."},
        {"topic": tea, "id": "arg2_arg3", "prompt": "", "chosen": caffeine, "rejected": "Thé & “scones”"},
        {"topic": coffee, "id": "arg9_arg8", "prompt": "", "chosen": "Coffee wakes me up.", "rejected": "meh"},
    ]


def test_solutions_are_the_file_unchanged(data: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["fetch", "gsm8k_solutions"]) == 0
    place = Path(capsys.readouterr().out.strip())
    assert place == data / "gsm8k_solutions" / "1"
    assert (place / "solutions.jsonl").read_text() == SOLUTIONS


def test_the_known_hashes_are_of_32_topics_and_one_file():
    lines = [line.split("  ") for line in repositories.CONVARG_HASHES.read_text().splitlines()]
    assert len({path for _, path in lines}) == 32
    assert all(re.fullmatch(r"data/UKPConvArg1Strict-CSV/.+_.+\.csv", path) for _, path in lines)
    hashes = [sha256 for sha256, _ in lines] + [repositories.GSM8K_SOLUTIONS_HASH]
    assert len(set(hashes)) == 33 and all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)


def test_a_directory_takes_the_place_of_github(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "mirror" / repositories.GSM8K / repositories.GSM8K_SOLUTIONS
    file.parent.mkdir(parents=True)
    file.write_text(SOLUTIONS)
    monkeypatch.setenv("RLHF_JAX_GITHUB", (tmp_path / "mirror").as_uri())
    assert (fetch.fetch("gsm8k_solutions") / "solutions.jsonl").read_text() == SOLUTIONS


def test_an_altered_file_is_not_kept(data: Path, files: dict[str, bytes]):
    path = f"/{repositories.CONVARG}/tables/tea-or-coffee_tea.csv"
    files[path] = files[path].replace(b"a2", b"a1")
    with pytest.raises(RlhfError, match=r"tea-or-coffee_tea.csv is not the file .*SHA-256 differs.*another server"):
        fetch.fetch("convarg")
    assert left_in(data) == []


def test_a_missing_file(data: Path, files: dict[str, bytes]):
    files.clear()
    with pytest.raises(RlhfError, match=r"solutions.jsonl could not be downloaded: HTTP 404 Not Found. Check"):
        fetch.fetch("gsm8k_solutions")
    assert left_in(data) == []


def test_a_connection_that_ends_early(data: Path, files: dict[str, bytes]):
    path = f"/{repositories.GSM8K}/{repositories.GSM8K_SOLUTIONS}"
    files |= {f"size of {path}": files[path], path: files[path][:10]}
    with pytest.raises(RlhfError, match=r"the connection ended before the file did"):
        fetch.fetch("gsm8k_solutions")
    assert left_in(data) == []


@pytest.mark.parametrize(
    ("server", "reason"),
    [("http://127.0.0.1:9", "refused"), ("nowhere", "unknown url type"), ("file:///nowhere", "No such file")],
)
def test_no_server(data: Path, monkeypatch: pytest.MonkeyPatch, server: str, reason: str):
    monkeypatch.setenv("RLHF_JAX_GITHUB", server)
    with pytest.raises(RlhfError, match=rf"could not be downloaded: .*{reason}.*Check the network and the address"):
        fetch.fetch("gsm8k_solutions")
    assert left_in(data) == []
