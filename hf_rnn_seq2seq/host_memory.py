"""
Memory that one step frees and the next one wants again, kept by the process in between.

glibc gives memory at the end of its heap back to the system once there is more than a threshold of it, and asks the
system for every large piece. Pages that come anew are cleared and mapped one by one, which takes microseconds each:
of a tensor of 10 MB there are 2,500, which can take longer than what is computed with it.
"""

import ctypes
import os
import platform

import torch

# Of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 2**31 - 1  # bytes, the largest int
LARGEST_PIECE = 2**28  # bytes

# The largest piece, in bytes, that makes glibc raise its own threshold when it is freed, to twice the piece's size.
ADAPTS_TO = 2**25 - 2**13


def keep_for_steps(device: torch.device) -> None:
    """
    For steps on a CPU, let glibc keep 64 MB: it learns what a program needs from the pieces that are freed, so one
    is, untouched. It changes nothing where the allocator is another one or the user has set its thresholds.
    """
    if device.type == "cpu":
        torch.empty(ADAPTS_TO, dtype=torch.uint8)


def keep_for_training() -> bool:
    """
    Have glibc keep 2 GB of what is freed, and take pieces of up to 256 MB from what it keeps, for as long as the
    process lives. The user's own settings (`MALLOC_..._`, `GLIBC_TUNABLES`) stay.

    Returns:
        Whether it was done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_PIECE)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
