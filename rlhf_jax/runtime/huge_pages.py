"""Huge pages for the intermediate arrays of programs on CPUs."""

import os
import platform
import sys
from pathlib import Path

VARIABLE = "RLHF_JAX_HUGE_PAGES"
"""Environment variable that leaves the C library's allocator as it is if it is "off"."""

TUNABLES = "GLIBC_TUNABLES"
"""Environment variable that glibc reads when a process starts."""

KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""File with the kernel's choice in brackets."""


def restart_with_huge_pages() -> None:
    """Start this process again, with huge pages for large arrays, unless it has them or the user set the allocator.

    XLA allocates a program's intermediate arrays for every call, and the kernel clears each of their pages at its first
    use. Pages of 2 MiB take a fraction of the time of pages of 4 KiB. Call this before anything else.
    """
    if os.environ.get(VARIABLE) == "off" or TUNABLES in os.environ or platform.libc_ver()[0] != "glibc":
        return
    if not KERNEL.exists() or "[madvise]" not in KERNEL.read_text():
        return
    os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"  # the allocator asks for them by madvise; from glibc 2.35 on
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
