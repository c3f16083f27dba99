"""Data sets in public GitHub repositories: files at a pinned commit, each verified by its SHA-256."""

import hashlib
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.types import RlhfError

CONVARG_VERSION, GSM8K_SOLUTIONS_VERSION = 1, 1  # of the files that the functions below write

GITHUB = "https://raw.githubusercontent.com"
TIMEOUT = 60.0  # seconds without an answer

CONVARG = "UKPLab/acl2016-convincing-arguments/ca9d24e41b8805ff2e1d3585d552b49bb64a65f7"
CONVARG_HASHES = Path(__file__).with_name("convarg.sha256")  # as sha256sum prints them

GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
GSM8K_SOLUTIONS = "grade_school_math/data/example_model_solutions.jsonl"
GSM8K_SOLUTIONS_HASH = "4bc62db838f8418365d51c627bd66294cbdca9fb7f01519cb13f0dce8c51580b"


def build_convarg(directory: Path) -> Path:
    """Write `pairs.jsonl`: UKPConvArg1Strict, pairs of arguments that people ranked (Habernal & Gurevych 2016).

    11,650 pairs on 32 topics, under CC BY 4.0. Columns: `topic`, the debate and the side that both arguments take;
    `id`, the ids of the two arguments; `prompt`, empty; `chosen`, the more convincing argument; `rejected`. The
    source's `<br/>` become newlines; nothing else is changed.

    Raises: RlhfError as `download` does.
    """
    rows = []
    for line in CONVARG_HASHES.read_text("utf-8").splitlines():
        sha256, path = line.split(maxsplit=1)
        rows.extend(_pairs(download(CONVARG, path, sha256).decode("utf-8"), topic=Path(path).stem))
    built = directory / "convarg"
    built.mkdir()
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (built / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return built


def _pairs(table: str, topic: str) -> Iterator[dict[str, str]]:
    header, *lines = table.rstrip("\n").split("\n")
    assert header == "#id\tlabel\ta1\ta2"  # the file's hash is known
    for line in lines:
        pair, label, *arguments = line.replace("<br/>", "\n").split("\t")
        first, second = arguments if label == "a1" else reversed(arguments)
        yield {"topic": topic, "id": pair, "prompt": "", "chosen": first, "rejected": second}


def build_gsm8k_solutions(directory: Path) -> Path:
    """Write `solutions.jsonl`: GSM8K's 1,319 test problems with solutions of four systems (Cobbe et al. 2021).

    The file of the source, unchanged, under the MIT licence. Columns: `question`; `ground_truth`, the reference
    solution; `6b_finetuning`, `6b_verification`, `175b_finetuning` and `175b_verification`, each with `solution` and
    `is_correct`. The verified solutions are those that a verifier of the generator's size chose among 100.

    Raises: RlhfError as `download` does.
    """
    built = directory / "gsm8k_solutions"
    built.mkdir()
    (built / "solutions.jsonl").write_bytes(download(GSM8K, GSM8K_SOLUTIONS, GSM8K_SOLUTIONS_HASH))
    return built


def download(commit: str, path: str, sha256: str) -> bytes:
    """Download a file of a repository, and verify it.

    It comes from GitHub, or from the address in `$RLHF_JAX_GITHUB`: a mirror, or a directory as `file:///DIR`, with
    files at OWNER/NAME/COMMIT/PATH.

    Args: commit as OWNER/NAME/COMMIT; sha256 in hex.
    Raises: RlhfError if the server cannot be reached, lacks the file or has another one.
    """
    server = os.environ.get("RLHF_JAX_GITHUB") or GITHUB
    address = f"{server.rstrip('/')}/{commit}/{urllib.parse.quote(path)}"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            content = response.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RlhfError(
            f"{address} could not be downloaded: {_reason(error)}. Check the network and the address in "
            "RLHF_JAX_GITHUB, if it is set, then fetch again"
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RlhfError(
            f"{address} is not the file that this version of rlhf_jax expects (its SHA-256 differs). It was not kept: "
            "fetch from another server (RLHF_JAX_GITHUB)"
        )
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended before the file did"
    return f"{getattr(error, 'reason', None) or error or type(error).__name__}"
