"""Memory on CPUs: what is freed is kept for the next tensor instead of handed back, and few compiled products are kept.

A block that was handed back comes again page by page, each zeroed by the kernel, which takes longer than what is then
written there. glibc hands back blocks above 32 MiB always, and smaller ones when much is free at the heap's end.
"""

import ctypes
import os
import sys

LARGEST_KEPT = 32 * 2**20
"""Bytes; of one tensor. glibc takes no larger threshold."""
KEPT = 512 * 2**20
"""Bytes free at the heap's end from which they are handed back after all."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KERNELS = 128
"""Products in bf16, of one shape each, that stay compiled. Each holds 0.3 MB in each of two stores, the second of which
every thread has for itself; left alone, a store takes 1,024. A network makes about eight of a batch's shape, and to
compile one takes a millisecond."""
STORES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


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


def keep_few_kernels() -> None:
    """For a process that has not multiplied yet and will in ever new shapes; what the environment says goes before."""
    for store in STORES:
        os.environ.setdefault(store, str(KERNELS))
