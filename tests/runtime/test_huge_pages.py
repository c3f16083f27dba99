"""Commands start again with huge pages, once, and only if the user has not set the allocator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.runtime import huge_pages

PROGRAM = """
import os
from rlhf_jax.runtime.huge_pages import restart_with_huge_pages

print("started", flush=True)
restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), __import__("sys").argv[1:])
"""


def lines(tmp_path: Path, **variables: str) -> list[str]:
    """Run the program with an argument, and return what it printed."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    own = {name: value for name, value in os.environ.items() if name not in (huge_pages.VARIABLE, huge_pages.TUNABLES)}
    environment = own | {"PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    command = [sys.executable, "-W", "error", str(program), "a b"]
    ran = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return ran.stdout.splitlines()


@pytest.mark.skipif(
    not huge_pages.KERNEL.exists() or "[madvise]" not in huge_pages.KERNEL.read_text(),
    reason="this kernel gives huge pages to all processes, or to none",
)
def test_process_starts_again_with_the_same_arguments(tmp_path):
    assert lines(tmp_path) == ["started", "started", "glibc.malloc.hugetlb=1 ['a b']"]


@pytest.mark.parametrize("variables", [{huge_pages.VARIABLE: "off"}, {huge_pages.TUNABLES: "glibc.malloc.check=0"}])
def test_process_goes_on_if_the_user_decided(tmp_path, variables):
    found = lines(tmp_path, **variables)
    assert found == ["started", f"{variables.get(huge_pages.TUNABLES)} ['a b']"]


def test_process_goes_on_if_the_kernel_has_no_huge_pages(tmp_path, monkeypatch):
    kernel = tmp_path / "enabled"
    kernel.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "KERNEL", kernel)
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    monkeypatch.setattr(os, "execv", lambda *args: pytest.fail("the process was started again"))
    huge_pages.restart_with_huge_pages()
