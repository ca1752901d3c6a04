"""What the C library's allocator does with freed memory."""

import ctypes

# Parameters of mallopt, in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# glibc allows no larger one.
_LARGEST_KEPT = 32 << 20


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for what it allocates next.

    glibc gives freed memory back to the system at levels that depend on all that was allocated
    before, and a tensor of a few MiB is then mapped page by page anew in every call: where few
    weights are kept, that takes longer than the layer. From here on nothing is given back, and
    tensors of up to 32 MiB come from memory that is there. The process stays as large as it once
    was. Other allocators (jemalloc, tcmalloc) keep freed memory by themselves.

    Returns:
        Whether the C library has such a setting and took it; elsewhere nothing happens.

    Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    kept = mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    return bool(kept and mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT))
