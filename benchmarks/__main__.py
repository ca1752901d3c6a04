"""`python -m benchmarks [op …] [options]`: every op's benchmark in its quick form, in turn."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """Run the named ops' benches (default: all) with `--quick` and the remaining options."""
    known = sorted(path.stem.removeprefix("bench_") for path in _FOLDER.glob("bench_*.py"))
    first_option = next((i for i, text in enumerate(argv) if text.startswith("-")), len(argv))
    names, options = argv[:first_option], argv[first_option:]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"no benchmark named {', '.join(unknown)}; known: {', '.join(known)}")
    for name in names or known:
        importlib.import_module(f"benchmarks.bench_{name}").run(["--quick", *options])


_FOLDER = Path(__file__).parent

if __name__ == "__main__":
    main(sys.argv[1:])
