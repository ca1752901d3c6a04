"""What a process does with the memory that it frees."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Page faults of calls that allocate and free three tensors of 12 MiB, after a while of it.
FAULTS = """
import resource, torch, tscnc_kernels as tk
assert tk.keep_freed_memory()
def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        kept = [torch.ones(3 << 20) for _ in range(3)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(30)
print(faults(10))
"""


@pytest.mark.skipif(
    not (sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION")),
    reason="glibc's allocator is not this system's",
)
def test_kept_memory_is_not_mapped_again():
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, "PYTHONPATH": str(ROOT)},
    )
    # Mapped anew, each tensor takes 3072 pages.
    assert int(result.stdout) < 3072
