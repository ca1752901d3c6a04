"""Errors, flags and interval widths of extreme singular values, of ours and of everyone else.

`python -m benchmarks.bench_spectral_errors [--essential] [--save]`: a row per method and spectrum,
the worst over its matrices, against a float64 SVD of the matrix as it is stored.

    errors    |found / true − 1|; σ_min of a singular matrix: found / σ_max; an infinite κ that is
              found finite: ∞; of matrices flagged `CAP_REACHED` none
    widths    upper / lower − 1 of the certified intervals
    ms        median over the matrices of one call each, to see error and time side by side; the
              timings that are held against targets are those of `bench_extreme_singular_values`

"ours, warm" has walked four steps of a relative 1e-3 to the matrix and knows nothing but the state.
Peers get their good, tall orientation. What needs minutes, or is never right, runs on the smaller
matrices alone.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine, networks, results, spectra, spectral_peers
from benchmarks.spectral_peers import Ends, Matrix
from tscnc_kernels import SparsityPattern

FILE = "spectral_errors.csv"
# As (out, in · kh · kw), and square; and the one that the targets of the widths are for.
SHAPES, LARGE = ((128, 1152), (256, 256)), (512, 4608)
SEEDS = 3
NETWORKS = ("vgg-16", "resnet-18", "wrn-28-10")
_UNIT = 2.0**-53


@dataclass(frozen=True)
class Row:
    """One method on the matrices of one spectrum; nan where it does not say."""

    method: str
    spectrum: str
    shape: str
    matrices: int
    kappa: float
    capped: int
    sigma_max_error: float
    sigma_min_error: float
    kappa_error: float
    sigma_max_width: float
    sigma_min_width: float
    kappa_width: float
    ms: float
    device: str
    torch: str
    commit: str
    date: str


@dataclass(frozen=True)
class Spectrum:
    """Matrices to measure every method on; `matrices` makes them."""

    name: str
    shape: str
    matrices: Callable[[], list[Matrix]]
    small: bool = True


def _dense(make: Callable[[int], Tensor]) -> list[Matrix]:
    return [Matrix(make(seed)) for seed in range(SEEDS)]


def _masked(weight: Tensor, sparsity: float, seed: int) -> Matrix:
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) >= sparsity
    return Matrix(weight * mask, SparsityPattern.from_mask(mask))


def _pruned(rows: int, cols: int, sparsity: float) -> list[Matrix]:
    return [
        _masked(spectra.gaussian(rows, cols, seed), sparsity, seed + SEEDS) for seed in range(SEEDS)
    ]


def _of_shape(rows: int, cols: int) -> Iterator[Spectrum]:
    shape, count = f"{rows}x{cols}", min(rows, cols)

    def spectrum(name: str, make: Callable[[int], Tensor]) -> Spectrum:
        return Spectrum(name, shape, partial(_dense, make))

    def known(name: str, sigma: Tensor) -> Spectrum:
        return spectrum(name, partial(spectra.with_spectrum, rows, cols, sigma))

    yield spectrum("gaussian", partial(spectra.gaussian, rows, cols))
    for percent in (90, 95, 99):
        make = partial(_pruned, rows, cols, percent / 100)
        yield Spectrum(f"pruned {percent} %", shape, make)
    for power in range(3, 8):
        yield known(f"geometric 1e{power}", spectra.geometric(count, 10.0**power))
    for power in (3, 6):
        yield known(f"clustered 1e{power}", spectra.clustered(count, 10.0**power))
        yield known(f"one small 1e{power}", spectra.one_small(count, 10.0**power))
        yield known(f"flat with tail 1e{power}", spectra.flat_with_tail(count, 10.0**power))
    yield spectrum("rank deficient", partial(spectra.rank_deficient, rows, cols, count - 3))


def _network(name: str, sparsity: float) -> list[Matrix]:
    """One layer of every shape, with the weights that the network starts from."""
    torch.manual_seed(0)
    model = networks.Network(name, networks.CIFAR, 1).build()
    weights = [p.detach().flatten(1) for p in model.parameters() if p.dim() > 1]
    layers = list({weight.shape: weight for weight in weights}.values())
    if not sparsity:
        return [Matrix(layer) for layer in layers]
    return [_masked(layer, sparsity, seed) for seed, layer in enumerate(layers)]


def _large(sigma: Tensor) -> list[Matrix]:
    return [Matrix(spectra.with_spectrum(*LARGE, sigma))]


LARGE_SPECTRA = [
    Spectrum(
        f"{name} 1e{power}",
        "x".join(map(str, LARGE)),
        partial(_large, make(min(LARGE), 10.0**power)),
        small=False,
    )
    for power in (3, 4)
    for name, make in (("geometric", spectra.geometric), ("flat with tail", spectra.flat_with_tail))
]
LAYERS = [
    Spectrum(
        f"{name}, {100 * sparsity:g} % pruned" if sparsity else name,
        "layers",
        partial(_network, name, sparsity),
        small=False,
    )
    for name in NETWORKS
    for sparsity in (0.0, 0.95)
]
SMALL_SPECTRA = [spectrum for shape in SHAPES for spectrum in _of_shape(*shape)]
SPECTRA = [*SMALL_SPECTRA, *LARGE_SPECTRA, *LAYERS]
QUICK = [*_of_shape(48, 96)]


def _true_ends(matrix: Matrix) -> tuple[float, float]:
    values = spectra.exact(matrix.weight)
    floor = max(matrix.weight.shape) * 2 * _UNIT * float(values[0])
    return float(values[0]), float(values[-1]) if float(values[-1]) > floor else 0.0


def _relative(found: float, true: float, scale: float) -> float:
    if math.isnan(found):
        return math.nan
    if math.isinf(true):
        return 0.0 if found == true else math.inf
    return abs(found - true) / true if true > 0 else found / scale


def _worst(values: Sequence[float]) -> float:
    """The largest; nan where there is nothing to compare."""
    return max((value for value in values if not math.isnan(value)), default=math.nan)


def _width(interval: Sequence[float]) -> float:
    lower, upper = interval
    return math.inf if lower == 0 or upper == math.inf else upper / lower - 1


def _ratio(largest: float, smallest: float) -> float:
    if math.isnan(largest) or math.isnan(smallest):
        return math.nan
    return largest / smallest if smallest > 0 else math.inf


def _errors(ends: Ends, true: tuple[float, float]) -> tuple[float, float, float]:
    largest, smallest = true
    kappa = _ratio(ends.largest, ends.smallest) if ends.kappa is None else ends.kappa
    return (
        _relative(ends.largest, largest, largest),
        _relative(ends.smallest, smallest, largest),
        _relative(kappa, _ratio(largest, smallest), 1.0),
    )


def _worst_of(rows: Sequence[Sequence[float]]) -> list[float]:
    """The worst of each of three columns."""
    return [_worst(column) for column in zip(*rows, strict=True)] or [math.nan] * 3


def measure(
    name: str, method: spectral_peers.Method, spectrum: Spectrum, matrices: Sequence[Matrix]
) -> Row | None:
    """The worst of one method on these matrices, or None where it cannot run on them."""
    found, seconds = [], []
    for matrix in matrices:
        call = method(matrix)
        if call is None:
            return None
        call()
        start = time.process_time()
        found.append(call())
        seconds.append(time.process_time() - start)
    truths = [_true_ends(matrix) for matrix in matrices]
    pairs = zip(found, truths, strict=True)
    errors = [_errors(ends, true) for ends, true in pairs if not ends.capped]
    widths = [[_width(bound) for bound in ends.bounds] for ends in found if ends.bounds]
    return Row(
        name,
        spectrum.name,
        spectrum.shape,
        len(found),
        max(_ratio(*truth) for truth in truths),
        sum(ends.capped for ends in found),
        *_worst_of(errors),
        *_worst_of(widths),
        ms=statistics.median(seconds) * 1e3,
        **_facts(),
    )


@cache
def _facts() -> dict[str, str]:
    """What every row of a run carries, as it was when the run began."""
    return {
        "device": machine.device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "commit": machine.commit(),
        "date": datetime.date.today().isoformat(),
    }


def load(folder: Path) -> list[Row]:
    """The saved rows of a device's folder."""
    return results.read_table(folder / "accuracy" / FILE, Row)


def run(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    parser = argparse.ArgumentParser(description="Errors of extreme singular values.")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--essential", action="store_true", help="ours and two peers")
    parser.add_argument("--save", action="store_true", help="write rows to benchmarks/results")
    parser.add_argument("--overwrite", action="store_true", help="replace rows saved before")
    options, _ = parser.parse_known_args(argv)
    machine.pin(1)
    folder = results.FOLDER / _facts()["device"]
    rows = {(r.method, r.spectrum, r.shape): r for r in load(folder)} if options.save else {}
    skipped = set() if options.overwrite else set(rows)
    for spectrum in QUICK if options.quick else SPECTRA:
        chosen = spectral_peers.METHODS if spectrum.small else spectral_peers.FAST
        if options.essential:
            chosen = {n: m for n, m in chosen.items() if n in spectral_peers.ESSENTIAL}
        keys = {name: (name, spectrum.name, spectrum.shape) for name in chosen}
        wanted = {name: method for name, method in chosen.items() if keys[name] not in skipped}
        matrices = spectrum.matrices() if wanted else []
        for name, method in wanted.items():
            row = measure(name, method, spectrum, matrices)
            if row is not None:
                rows[keys[name]] = row
                print(describe(row), flush=True)
        if options.save and wanted:
            results.write_table(folder / "accuracy" / FILE, [rows[k] for k in sorted(rows)], Row)


def describe(row: Row) -> str:
    """One line."""
    errors = f"{row.sigma_max_error:8.1e} {row.sigma_min_error:8.1e} {row.kappa_error:8.1e}"
    widths = f"{row.sigma_max_width:8.1e} {row.sigma_min_width:8.1e} {row.kappa_width:8.1e}"
    return (
        f"{row.spectrum:<24} {row.shape:<9} {row.method:<24} kappa {row.kappa:8.1e}  errors "
        f"{errors}  widths {widths}  capped {row.capped}/{row.matrices}  {row.ms:.3g} ms"
    )


if __name__ == "__main__":
    run()
