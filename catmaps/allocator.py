"""The C library's allocator on CPUs: freed memory is kept for the next tensor instead of handed back.

A block that was handed back comes again page by page, each zeroed by the kernel, which takes longer than what is then
written there. glibc hands back blocks above 32 MiB always, and smaller ones when much is free at the heap's end.
"""

import ctypes
import sys

LARGEST_KEPT = 32 * 2**20
"""Bytes; of one tensor. glibc takes no larger threshold."""
KEPT = 512 * 2**20
"""Bytes free at the heap's end from which they are handed back after all."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """From now on in this process; does nothing where the C library is not glibc."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
            mallopt(M_TRIM_THRESHOLD, KEPT)


def hand_back_freed_memory() -> None:
    """Once, now: so that what is resident afterwards is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
