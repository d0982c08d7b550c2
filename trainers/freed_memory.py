"""Settings of malloc that keep freed memory in the process.

A training step on CPUs frees its tensors, and the next step allocates as many
again. In between, glibc returns most of the memory to the system, which then
maps and clears every page again. In `configs/mt_demo.py` this takes a third of
the processor time, and half of the speed.
"""

import ctypes
import os

_M_TOP_PAD, _M_MMAP_THRESHOLD = -2, -3  # of glibc's malloc.h
_HEAP_BYTES = 64 * 2**20  # the most that a heap of a thread can have


def keep_freed_memory() -> None:
    """Lets every heap keep up to 64 MiB of freed memory at its end.

    Blocks below 32 MiB, the largest threshold of glibc, then come from a
    heap. Nothing happens with another C library, or where the environment has
    settings for glibc's malloc.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    chosen |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or os.name != "posix":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TOP_PAD, _HEAP_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES // 2)
