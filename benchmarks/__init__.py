"""Microbenchmarks: `python -m benchmarks` for all, `python -m benchmarks.bench_<op>` for one."""

import os

# torch's profiler counts the peak memory; without this it writes its own stages to stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
