"""`python -m benchmarks [op …] [options]`: every op's benchmark in its quick form, in turn.

Ends with the table of targets for the cells that were measured; `python -m benchmarks.summary`
prints the whole one from the committed results.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks import summary

# Minutes per network: on request only.
SLOW = {"train_step"}


def main(argv: list[str]) -> None:
    """Run the named ops' benches (default: all quick ones) with `--quick` and the options."""
    known = sorted(path.stem.removeprefix("bench_") for path in _FOLDER.glob("bench_*.py"))
    first_option = next((i for i, text in enumerate(argv) if text.startswith("-")), len(argv))
    names, options = argv[:first_option], argv[first_option:]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"no benchmark named {', '.join(unknown)}; known: {', '.join(known)}")
    rows = []
    for name in names or sorted(set(known) - SLOW):
        bench = importlib.import_module(f"benchmarks.bench_{name}")
        rows += bench.run(["--quick", *[o for o in options if o != "--quick"]]) or []
    print("", *summary.report(rows, only_measured=True), sep="\n")


_FOLDER = Path(__file__).parent

if __name__ == "__main__":
    main(sys.argv[1:])
