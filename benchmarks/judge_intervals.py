"""Judge the certified intervals on random and adversarial matrices.

`python -m benchmarks.judge_intervals [--matrices 10000] [--seed 0] [--save [--overwrite]]`

The matrices come from the families of `spectra.py`: sides from 1 to 64 in either orientation,
stored in any dtype, some pruned, some started from the state of another matrix. `interval_judge.py`
says how a verdict is reached. The same calls show whether the values keep their promise: how many
matrices with κ ≤ 1e6 were flagged `CAP_REACHED`, and how many values (κ ≤ 1e7) were off by more
than promised without it, against a float64 SVD.

Matrix k of a family depends on nothing but the family, k and the seed, and the counts are saved
every few matrices, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import interval_judge, machine, results
from benchmarks.spectra import FAMILIES
from tscnc_kernels import SparsityPattern, extreme_singular_values
from tscnc_kernels._spectral import CAP_REACHED, ExtremeSingularValues

FILE = "interval_judgement.csv"
SAVE_EVERY = 25
DTYPES = (torch.float32,) * 4 + (torch.float64,) * 2 + (torch.bfloat16, torch.float16)
# Of σ_max, and of σ_min up to each κ.
PROMISED_LARGEST, PROMISED_SMALLEST = 1e-3, ((1e6, 1e-3), (1e7, 1e-2))


@dataclass(frozen=True)
class Count:
    """What was found on one family's matrices.

    `exact`: decided in integers, the others in extended precision. `positive`: with a positive
    lower bound of σ_min. `moderate`: with κ ≤ 1e6, of which `capped` are flagged. `missed`: values
    off by more than promised without the flag.
    """

    family: str
    seed: int
    matrices: int = 0
    wrong: int = 0
    exact: int = 0
    positive: int = 0
    moderate: int = 0
    capped: int = 0
    missed: int = 0
    device: str = ""
    commit: str = ""
    date: str = ""


@dataclass(frozen=True)
class Drawn:
    """One matrix to judge and the arguments of the call."""

    matrix: Tensor
    pattern: SparsityPattern | None
    state: Tensor | None
    rank: str

    def call(self) -> ExtremeSingularValues:
        """The certified ends."""
        patterns = None if self.pattern is None else [self.pattern]
        rank = "structural" if self.rank == "structural" else "full"
        return extreme_singular_values([self.matrix], patterns, self.state, rank=rank, certify=True)

    def judged(self) -> Tensor:
        """The float64 matrix that the intervals speak of."""
        matrix = self.matrix.double()
        if self.pattern is None:
            return matrix
        mask = self.pattern.mask
        matrix = torch.where(mask, matrix, 0.0)
        return matrix[mask.any(1)][:, mask.any(0)] if self.rank == "structural" else matrix


def draw(family: str, index: int, seed: int) -> Drawn:
    """Matrix `index` of a family."""
    key = zlib.crc32(f"{family}/{index}/{seed}".encode())
    generator = torch.Generator().manual_seed(key)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    side = integer(1, 12) if integer(1, 10) <= 7 else integer(13, 64)
    sides = [side, side + (integer(0, 100) if integer(0, 3) else 0)]
    rows, cols = sides if integer(0, 1) else sides[::-1]
    matrix = FAMILIES[family](rows, cols, generator)
    dtype = DTYPES[integer(0, len(DTYPES) - 1)]
    most = torch.finfo(dtype).max / 4
    matrix = (matrix * min(1.0, most / max(matrix.abs().max().item(), 1e-300))).to(dtype)
    pattern, state, rank = None, None, "full"
    if integer(1, 10) <= 3:
        density = 0.2 + 0.8 * torch.rand((), generator=generator)
        mask = torch.rand(rows, cols, generator=generator) < density
        mask[0, 0] = True
        pattern, rank = SparsityPattern.from_mask(mask), ("full", "structural")[integer(0, 1)]
    if integer(1, 10) <= 2:
        state = torch.randn(4, min(rows, cols), generator=generator, dtype=torch.float64)
    return Drawn(matrix, pattern, state, rank)


def _kept_promise(drawn: Drawn, found: ExtremeSingularValues) -> tuple[bool, bool, bool]:
    """Whether κ ≤ 1e6, whether the flag is set, and whether the values are as promised."""
    values = torch.linalg.svdvals(drawn.judged())
    rank = int(found.rank[0])
    largest, smallest = float(values[0]), float(values[rank - 1]) if rank else 0.0
    capped = bool(int(found.flags[0]) & CAP_REACHED)
    promise = next((e for most, e in PROMISED_SMALLEST if largest <= most * smallest), None)
    kept = abs(float(found.sigma_max[0]) - largest) <= PROMISED_LARGEST * largest
    if promise is not None:
        kept = kept and abs(float(found.sigma_min[0]) - smallest) <= promise * smallest
    return 0 < largest <= 1e6 * smallest, capped, kept


def judge_one(count: Count, drawn: Drawn) -> tuple[Count, tuple[str, ...]]:
    """The counts with one more matrix, and the claims that are wrong."""
    found = drawn.call()
    assert found.bounds is not None
    largest, smallest, kappa = (bound[0].tolist() for bound in found.bounds)
    verdict = interval_judge.judge(drawn.judged().numpy(), largest, smallest, kappa)
    moderate, capped, kept = _kept_promise(drawn, found)
    after = replace(
        count,
        matrices=count.matrices + 1,
        wrong=count.wrong + bool(verdict.wrong),
        exact=count.exact + verdict.is_exact,
        positive=count.positive + (smallest[0] > 0),
        moderate=count.moderate + moderate,
        capped=count.capped + (moderate and capped),
        missed=count.missed + (not kept and not capped),
    )
    return after, verdict.wrong


def judge_family(start: Count, matrices: int) -> Iterator[Count]:
    """The counts after every matrix, up to `matrices` of them."""
    count = start
    while count.matrices < matrices:
        drawn = draw(count.family, count.matrices, count.seed)
        count, wrong = judge_one(count, drawn)
        if wrong:
            print(f"WRONG {', '.join(wrong)}: {count.family}, matrix {count.matrices - 1}")
        yield count


def main(argv: Sequence[str] | None = None) -> list[Count]:
    """Judge all families and print the counts; see `--help`."""
    parser = argparse.ArgumentParser(description="Judge certified intervals.")
    parser.add_argument("--matrices", type=int, default=10000, help="over all families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write the counts, and go on from them")
    parser.add_argument("--overwrite", action="store_true", help="forget the counts saved before")
    options = parser.parse_args(argv)
    device = machine.device_name(torch.device("cpu"))
    path = results.FOLDER / device / "accuracy" / FILE
    goes_on = options.save and not options.overwrite
    saved = results.read_table(path, Count) if goes_on else []
    counts = {count.family: count for count in saved if count.seed == options.seed}
    facts = {"device": device, "commit": machine.commit()}
    today = datetime.date.today().isoformat()
    for place, family in enumerate(FAMILIES):
        wanted = (options.matrices + place) // len(FAMILIES)
        start = counts.get(family, Count(family, options.seed))
        counts[family] = start
        for count in judge_family(start, wanted):
            counts[family] = replace(count, **facts, date=today)
            if options.save and count.matrices % SAVE_EVERY in (0, wanted % SAVE_EVERY):
                results.write_table(path, list(counts.values()), Count)
        print(counts[family], flush=True)
    print(*lines(list(counts.values())), sep="\n")
    return list(counts.values())


def lines(counts: Sequence[Count]) -> Iterator[str]:
    """The counts as the issue's targets have them, reached/target."""
    total = sum(count.matrices for count in counts)
    wrong, missed = sum(c.wrong for c in counts), sum(c.missed for c in counts)
    moderate, capped = sum(c.moderate for c in counts), sum(c.capped for c in counts)
    yield f"wrong intervals on {total} random and adversarial matrices: {wrong}/0" + " !" * (
        wrong > 0
    )
    yield f"unflagged values off by more than promised: {missed}/0" + " !" * (missed > 0)
    share = capped / max(moderate, 1)
    yield f"CAP_REACHED at kappa <= 1e6: {share:.2%}/1 %" + " !" * (share > 0.01)


def load(folder: Path) -> list[Count]:
    """The saved counts of a device's folder."""
    return results.read_table(folder / "accuracy" / FILE, Count)


if __name__ == "__main__":
    main()
