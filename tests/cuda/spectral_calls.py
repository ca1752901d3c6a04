"""Calls of the CUDA launchers that csrc/cuda/extreme_singular_values.h declares."""

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_bool, c_double, c_int, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from tests.cuda.masked_calls import DTYPE_CODES
from tests.cuda_emulation.library import EmulatedLibrary, GuardedTensor, guarded_copy, pointers
from tscnc_kernels import SparsityPattern
from tscnc_kernels._spectral import MAX_TIES, Raw


class Job(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("data", "mask", "structure")),
        *(("rows", c_int32), ("cols", c_int32), ("dtype", c_int32)),
    )


class Settings(ctypes.Structure):
    _fields_ = (
        ("tie_tolerance", c_double),
        *((name, c_bool) for name in ("structural", "power", "certify", "largest_only")),
    )


OUTPUTS = ("sigma", "left", "right", "block", "state", "rank", "residual", "flags", "ties")
SIZES = ("count", "rows", "cols", "smaller")


class Outputs(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in (*OUTPUTS, "bounds")),
        *((name, c_int64) for name in SIZES),
    )


class Results(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("grad_sigma", "sigma", "left", "right", "block", "ties")),
        *((name, c_int64) for name in SIZES),
    )


class Problem(NamedTuple):
    """The matrices and masks of a call between guards, and the table that points to them."""

    held: list[GuardedTensor]
    jobs: ctypes.Array[Job]
    sizes: tuple[int, int, int, int]


def make_problem(
    matrices: Sequence[Tensor], patterns: Sequence[SparsityPattern | None] | None = None
) -> Problem:
    held: list[GuardedTensor] = []
    jobs = (Job * len(matrices))()
    for job, matrix, pattern in zip(
        jobs, matrices, patterns or [None] * len(matrices), strict=True
    ):
        held.append(guarded_copy(matrix))
        job.data = held[-1].tensor.data_ptr()
        job.rows, job.cols = matrix.shape
        job.dtype = DTYPE_CODES[matrix.dtype]
        if pattern is not None:
            structure = torch.ops.tscnc_kernels.structural_rank(pattern.mask)
            held += [guarded_copy(pattern.mask), guarded_copy(structure)]
            job.mask, job.structure = (guarded.tensor.data_ptr() for guarded in held[-2:])
    rows, cols = (sum(matrix.shape[side] for matrix in matrices) for side in (0, 1))
    sizes = len(matrices), rows, cols, sum(min(matrix.shape) for matrix in matrices)
    return Problem(held, jobs, sizes)


class RawOutputs:
    """The raw op's outputs between guards, and the table that points to them."""

    def __init__(self, problem: Problem, certify: bool) -> None:
        count, rows, cols, smaller = problem.sizes
        self.shapes = {
            "sigma": (2, count),
            "left": (2, rows),
            "right": (2, cols),
            "block": (2 * MAX_TIES, smaller),
            "state": (4, smaller),
            "rank": (count,),
            "residual": (count, 2),
            "flags": (count,),
            "ties": (count, 2),
            "bounds": (count if certify else 0, 3, 2),
        }
        self.held = {}
        for name, shape in self.shapes.items():
            is_count = name in ("rank", "flags", "ties")
            dtype = torch.int64 if is_count else torch.float64
            self.held[name] = GuardedTensor(torch.Size(shape).numel(), dtype)
        addresses = (self.held[name].tensor.data_ptr() for name in (*OUTPUTS, "bounds"))
        self.table = Outputs(*addresses, *problem.sizes)

    def read(self, problem: Problem) -> list[Tensor]:
        """The outputs, after checking the guards around them and around the inputs."""
        for guarded in (*self.held.values(), *problem.held):
            guarded.check()
        return [self.held[name].tensor.view(shape) for name, shape in self.shapes.items()]


def solve(
    library: EmulatedLibrary,
    problem: Problem,
    *,
    state: Tensor | None = None,
    tie_tol: float = 1e-4,
    structural: bool = False,
    power: bool = False,
    certify: bool = False,
    largest_only: bool = False,
    every_order: bool = False,
    settled: Sequence[bool] | None = None,
) -> Raw:
    """The raw op's outputs; every_order: checked to be the same in every order of the threads.

    settled: what a warm launch would have settled, whose outputs are not written.
    """
    count = problem.sizes[0]
    size = library.function("workspace", c_int64, c_void_p, c_int64)(problem.jobs, count)
    launch = library.function("extreme_singular_values", c_int, *(c_void_p,) * 6)
    settings = Settings(tie_tol, structural, power, certify, largest_only)
    counters = None
    if settled is not None:
        counters = torch.zeros(count, library.function("warm_counters", c_int)()).int()
        counters[:, library.function("settled_counter", c_int)()] = torch.tensor(settled).int()

    def once() -> list[Tensor]:
        outputs = RawOutputs(problem, certify)
        workspace = GuardedTensor(size, torch.float64)
        warm = None if state is None else state.data_ptr()
        address = workspace.tensor.data_ptr()
        table = byref(outputs.table)
        kept = None if counters is None else counters.data_ptr()
        library.call(launch, problem.jobs, byref(settings), warm, table, address, kept)
        workspace.check()
        return outputs.read(problem)

    found = library.run_in_every_order(once) if every_order else once()
    return tuple(found)  # type: ignore[return-value]


def solve_warm(
    library: EmulatedLibrary,
    problem: Problem,
    state: Tensor,
    *,
    tie_tol: float = 1e-4,
    structural: bool = False,
    largest_only: bool = False,
    every_order: bool = False,
) -> tuple[Raw, list[bool]]:
    """The outputs of the warm launch, and which matrices it settled; the others' are unwritten."""
    count = problem.sizes[0]
    size = library.function("warm_workspace", c_int64, c_void_p, c_int64)(problem.jobs, count)
    stride = library.function("warm_counters", c_int)()
    place = library.function("settled_counter", c_int)()
    launch = library.function("warm_singular_values", c_int, *(c_void_p,) * 6)
    settings = Settings(tie_tol, structural, False, False, largest_only)

    def once() -> list[Tensor]:
        outputs = RawOutputs(problem, False)
        workspace = GuardedTensor(size, torch.float64)
        counters = GuardedTensor(count * stride, torch.int32)
        addresses = workspace.tensor.data_ptr(), counters.tensor.data_ptr()
        table = byref(outputs.table)
        library.call(launch, problem.jobs, byref(settings), state.data_ptr(), table, *addresses)
        workspace.check()
        counters.check()
        return [*outputs.read(problem), counters.tensor.view(count, stride)[:, place].clone()]

    *raw, done = library.run_in_every_order(once) if every_order else once()
    return tuple(raw), (done != 0).tolist()  # type: ignore[return-value]


def gradients(
    library: EmulatedLibrary,
    problem: Problem,
    matrices: Sequence[Tensor],
    grad: Tensor,
    raw: Raw,
    every_order: bool = False,
) -> list[Tensor]:
    """The matrices' gradients for a (2, L) gradient of sigma; every_order: as in `solve`."""
    sigma, left, right, block, _, _, _, _, ties, _ = raw
    count = problem.sizes[0]
    size = library.function("backward_workspace", c_int64, c_void_p, c_int64)(problem.jobs, count)
    launch = library.function("backward", c_int, *(c_void_p,) * 4)
    wide = [tensor.double() for tensor in (grad, sigma, left, right)]
    inputs = [tensor.contiguous() for tensor in (*wide, block, ties)]
    table = Results(*(tensor.data_ptr() for tensor in inputs), *problem.sizes)

    def once() -> list[Tensor]:
        outputs = [GuardedTensor(matrix.numel(), matrix.dtype) for matrix in matrices]
        workspace = GuardedTensor(size, torch.float64)
        targets = pointers([guarded.tensor for guarded in outputs])
        address = workspace.tensor.data_ptr()
        library.call(launch, problem.jobs, byref(table), targets, address)
        for guarded in (workspace, *outputs):
            guarded.check()
        return [
            guarded.tensor.view(matrix.shape)
            for guarded, matrix in zip(outputs, matrices, strict=True)
        ]

    return list(library.run_in_every_order(once)) if every_order else once()
