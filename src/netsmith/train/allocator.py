"""Keep the memory that a training step frees.

glibc gives large blocks back to the system as soon as they are free, and fetches them again in the next step: a page
fault for every 4 kB of every activation. Six MBConvs of expansion 6 on 64 images of 32 px, whose activations take up to
25 MB each: 128 ms a step, and 69 without; the supernets of `benchmarks/supernet_step.py`: a tenth less; networks so
small that glibc keeps their blocks anyway: no difference.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4
"""Names of mallopt(3)'s parameters; they have no others in C either."""


def keep_freed_memory() -> None:
    """From now on freed memory stays with this process, for its next allocation. Only glibc needs it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_MAX, 0)  # no block gets a mapping of its own
        libc.mallopt(TRIM_THRESHOLD, -1)  # the heap never shrinks
