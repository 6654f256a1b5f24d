"""Telling glibc's allocator and Python's collector how a relay uses memory.

A relay allocates and frees a buffer of up to 256 KiB for each read. By default glibc gives such buffers back to the
kernel at once and fetches fresh, zeroed pages for the next; measured, that was a third of the CPU of a bulk transfer.
"""

from __future__ import annotations

import ctypes
import gc

# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES = 64 * 1024 * 1024
"""Free memory kept by the process rather than given back."""
_PAD_BYTES = 16 * 1024 * 1024
_OWN_MAPPING_BYTES = 8 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Set the allocator up for this process; False when it is not glibc's. Harmless to repeat."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, _PAD_BYTES))
    return bool(sum(mallopt(name, value) for name, value in settings) == len(settings))


def give_back_freed_memory() -> bool:
    """Give the kernel back what start-up used and freed; False when the allocator is not glibc's."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return False
    return bool(trim(0))


def calm_collector() -> None:
    """Make the cyclic collector run seldom: live connections are many small objects, and few of ours form cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
