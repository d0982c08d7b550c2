"""Freed memory that stays with the process.

Each training step on CPUs frees what it computed, and asks for as much again.
glibc gives most of it back to the system in between, which then has to map and
to clear every page anew: a third of the processor time of `configs/mt_demo.py`,
and half of its speed.
"""

import ctypes
import os

_M_TOP_PAD, _M_MMAP_THRESHOLD = -2, -3  # of glibc's malloc.h
_HEAP_BYTES = 64 * 2**20  # the most that a heap of a thread can have


def keep():
    """Has every heap keep up to 64 MiB of what is freed at its end.

    What is smaller than 32 MiB, the most that glibc takes, then comes from a
    heap. With another C library nothing happens, nor where the environment
    has settings for glibc's malloc.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    chosen |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or os.name != "posix":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TOP_PAD, _HEAP_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES // 2)
