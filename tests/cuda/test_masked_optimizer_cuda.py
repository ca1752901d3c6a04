"""The CUDA kernels of the optimizer steps, run on the CPU by the emulation, against float64."""

import ctypes
from ctypes import c_bool, c_double, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_emulation.library import (
    EmulatedLibrary,
    EmulationError,
    GuardedTensor,
    same_bits,
)
from tscnc_kernels import SparsityPattern
from tscnc_kernels.ops.masked_optimizer import (
    AdamwConstants,
    SgdConstants,
    reference_adamw,
    reference_sgd,
)

DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
DTYPES = list(DTYPE_CODES)
# One rounding to the storage type, of numbers of order one, on top of arithmetic in float32.
TOLERANCES = {
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
    torch.float32: 1e-6,
    torch.float64: 1e-13,
}
# Shapes and densities of weights with a pattern, and of whole tensors.
MASKED = [((1, 1), 1.0), ((5, 9), 0.0), ((63, 5), 0.1), ((6, 3, 3, 3), 0.3), ((40, 90), 0.5)]
WHOLE = [(67,), (3, 0), (1030,)]


class StepTensor(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("param", "grad", "first", "second", "max_second")),
        *(("pointers", c_void_p), ("columns", c_void_p), ("width", c_int64)),
    )


class StepItem(ctypes.Structure):
    _fields_ = (
        *(("tensor", StepTensor), ("rows", c_int64), ("count", c_int64), ("dtype", c_int32)),
    )


class StepCount(ctypes.Structure):
    _fields_ = (
        *(("counter", c_void_p), ("is_double", c_bool)),
        *(("step_size", c_double), ("inverse_root", c_double)),
    )


class SgdOptions(ctypes.Structure):
    _fields_ = (
        *((name, c_double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        *((name, c_bool) for name in ("nesterov", "maximize", "first_step")),
    )


class AdamwOptions(ctypes.Structure):
    _fields_ = (
        *((name, c_double) for name in ("beta1", "beta2", "eps", "step_size", "inverse_root")),
        *(("decay", c_double), ("l2", c_double), ("maximize", c_bool)),
    )


@dataclass
class Problem:
    """Parameters, their gradients and `states` kinds of state, of one entry per stepped weight."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)
    patterns: list[SparsityPattern | None] = field(default_factory=list)

    def to(self, dtype: torch.dtype) -> "Problem":
        """A copy in another dtype."""

        def copy(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.to(dtype, copy=True) for tensor in tensors]

        states = [copy(state) for state in self.states]
        return Problem(copy(self.params), copy(self.grads), states, self.patterns)


def problem(states: int, dtype: torch.dtype, repeat: int = 1) -> Problem:
    """Random weights, some with a pattern; a state is positive, as a second moment is."""
    generator = torch.Generator().manual_seed(5)
    found = Problem(states=[[] for _ in range(states)])
    for shape, density in [*MASKED, *((shape, None) for shape in WHOLE)] * repeat:
        pattern, size = None, shape
        if density is not None:
            mask = torch.rand(shape, generator=generator) < density
            pattern = SparsityPattern.from_mask(mask)
            size = (pattern.nnz,)
        found.patterns.append(pattern)
        for tensors in (found.params, found.grads):
            tensors.append(torch.randn(shape, generator=generator).to(dtype))
        for state in found.states:
            state.append((torch.rand(size, generator=generator) + 0.1).to(dtype))
    return found


class Kernels:
    """The launchers; results are the same in every order of the threads."""

    def __init__(self, library: EmulatedLibrary) -> None:
        self.library = library

    def run(self, case: Problem, name: str, *arguments: object, counters: object = None) -> Problem:
        """The parameters and states after a step; `counters` makes its StepCounts."""

        def guarded(tensors: list[Tensor]) -> list[GuardedTensor]:
            held = [GuardedTensor(tensor.numel(), tensor.dtype) for tensor in tensors]
            for copy, tensor in zip(held, tensors, strict=True):
                copy.tensor.copy_(tensor.reshape(-1))
            return held

        def step() -> list[Tensor]:
            lists = [guarded(tensors) for tensors in (case.params, case.grads, *case.states)]
            items = [
                item_of([held[i].tensor for held in lists], case.patterns[i])
                for i in range(len(case.params))
            ]
            given = (StepItem * len(items))(*items)
            counts, kept = counters() if callable(counters) else ([], [])
            function = self.library.function(name, c_int, *types_of(name))
            self.library.call(function, given, *counts, len(items), *arguments)
            for held in lists:
                for copy in held:
                    copy.check()
            return [copy.tensor for held in lists for copy in held] + kept

        results = list(self.library.run_in_every_order(step))
        found = case.to(case.params[0].dtype)
        for tensors in (found.params, found.grads, *found.states):
            for tensor in tensors:
                tensor.copy_(results.pop(0).view(tensor.shape))
        assert all(same_bits(a, b) for a, b in zip(found.grads, case.grads, strict=True))
        return found

    def sgd(self, case: Problem, constants: SgdConstants) -> Problem:
        """One step of SGD."""
        return self.run(case, "sgd_step", ctypes.byref(SgdOptions(*constants)))

    def adamw(self, case: Problem, constants: AdamwConstants, on_device: bool) -> Problem:
        """The third step of AdamW, counted on the device or on the host."""
        lr, beta1, beta2, eps, decay, decoupled, maximize = constants
        options = AdamwOptions(
            *(beta1, beta2, eps, 0, 0),
            *((1 - lr * decay, 0) if decoupled else (1, decay)),
            maximize,
        )
        count = len(case.params)
        workspace = GuardedTensor(2 * count, torch.float64)

        def counters() -> tuple[list[object], list[Tensor]]:
            dtypes = [(torch.float32, torch.float64)[i % 2] for i in range(count)]
            steps = [torch.full((), 2, dtype=dtype) for dtype in dtypes]
            host = lr / (1 - beta1**3), (1 - beta2**3) ** -0.5
            rows = [
                StepCount(step.data_ptr(), step.dtype == torch.float64, 0, 0)
                if on_device
                else StepCount(None, False, *host)
                for step in steps
            ]
            return [(StepCount * count)(*rows)], steps if on_device else []

        address = workspace.tensor.data_ptr()
        found = self.run(case, "adamw_step", lr, ctypes.byref(options), address, counters=counters)
        workspace.check()
        return found


def types_of(name: str) -> list[type]:
    """The C types of a launcher's arguments."""
    if name == "sgd_step":
        return [c_void_p, c_int64, c_void_p]
    return [c_void_p, c_void_p, c_int64, c_double, c_void_p, c_void_p]


def item_of(tensors: list[Tensor], pattern: SparsityPattern | None) -> StepItem:
    """The launchers' view of a parameter, its gradient and its states."""
    addresses = [tensor.data_ptr() for tensor in tensors] + [None] * (5 - len(tensors))
    code = DTYPE_CODES[tensors[0].dtype]
    if pattern is None:
        return StepItem(StepTensor(*addresses, None, None, 0), 0, tensors[0].numel(), code)
    index = pattern.row_pointers.data_ptr(), pattern.columns.data_ptr()
    rows, width = pattern.matrix_shape
    return StepItem(StepTensor(*addresses, *index, width), rows, pattern.nnz, code)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    source = Path(__file__).parent / "masked_optimizer_emulated.cpp"
    return Kernels(EmulatedLibrary(source, tmp_path_factory.mktemp("masked_optimizer")))


def check(found: Problem, case: Problem, exact: Problem) -> None:
    """Stepped entries against float64; those that are pruned keep their bits."""
    tolerance = TOLERANCES[case.params[0].dtype]
    for tensors, expected in zip(
        (found.params, *found.states), (exact.params, *exact.states), strict=True
    ):
        for tensor, wanted in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor.double(), wanted, rtol=tolerance, atol=tolerance)
    for param, before, pattern in zip(found.params, case.params, case.patterns, strict=True):
        if pattern is not None:
            assert torch.equal(param[~pattern.mask], before[~pattern.mask])


SGD = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True, "maximize": True},
    "first_step": {"momentum": 0.9, "first_step": True},
}
ADAMW = {
    "plain": {},
    "adamw": {"weight_decay": 0.1, "maximize": True},
    "adam": {"weight_decay": 0.1, "decoupled_weight_decay": False},
}


def check_sgd(kernels: Kernels, case: Problem, constants: SgdConstants) -> None:
    exact = case.to(torch.float64)
    reference_sgd(
        exact.params, exact.grads, exact.states[0] if exact.states else [], case.patterns, constants
    )
    check(kernels.sgd(case, constants), case, exact)


def check_adamw(
    kernels: Kernels, case: Problem, constants: AdamwConstants, on_device: bool
) -> None:
    exact = case.to(torch.float64)
    maxima = exact.states[2] if len(exact.states) > 2 else []
    steps = [torch.full((), 2.0) for _ in exact.params]
    reference_adamw(
        exact.params, exact.grads, *exact.states[:2], maxima, steps, case.patterns, constants
    )
    check(kernels.adamw(case, constants, on_device), case, exact)


@pytest.mark.parametrize("options", SGD.values(), ids=list(SGD))
def test_sgd_steps(kernels: Kernels, options: dict[str, float]) -> None:
    case = problem(1 if "momentum" in options else 0, torch.float32)
    check_sgd(kernels, case, SgdConstants(0.05, **options))


@pytest.mark.parametrize("on_device", [True, False], ids=["device_step", "host_step"])
@pytest.mark.parametrize("states", [2, 3], ids=["adam", "amsgrad"])
@pytest.mark.parametrize("options", ADAMW.values(), ids=list(ADAMW))
def test_adamw_steps(
    kernels: Kernels, options: dict[str, float], states: int, on_device: bool
) -> None:
    constants = AdamwConstants(0.05, 0.6, 0.8, **options)
    check_adamw(kernels, problem(states, torch.float32), constants, on_device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(kernels: Kernels, dtype: torch.dtype) -> None:
    check_sgd(kernels, problem(1, dtype), SgdConstants(0.05, 0.9, weight_decay=0.1))
    check_adamw(kernels, problem(3, dtype), AdamwConstants(0.05, 0.6, 0.8), False)


def test_more_tensors_than_one_launch_takes(kernels: Kernels) -> None:
    check_sgd(kernels, problem(0, torch.float32, 6), SgdConstants(0.05))
    check_adamw(kernels, problem(2, torch.float32, 17), AdamwConstants(0.05), True)


def test_steps_on_the_device_are_counted(kernels: Kernels) -> None:
    case = problem(2, torch.float32)
    steps = torch.tensor([4.0, 9.0]), torch.tensor(1.0, dtype=torch.float64)
    counts = (StepCount * 3)(
        StepCount(steps[0][:1].data_ptr(), False, 0, 0),
        StepCount(None, False, 1, 1),
        StepCount(steps[1].data_ptr(), True, 0, 0),
    )
    items = (StepItem * 3)(
        *[
            item_of([case.params[i], case.grads[i], *(s[i] for s in case.states)], None)
            for i in (5, 6, 7)
        ]
    )
    workspace = torch.zeros(6, dtype=torch.float64)
    run = kernels.library.function("adamw_step", c_int, *types_of("adamw_step"))
    options = ctypes.byref(AdamwOptions(0.5, 0.75, 1e-8, 0, 0, 1, 0, False))
    kernels.library.call(run, items, counts, 3, 0.1, options, workspace.data_ptr())
    assert steps[0].tolist() == [5, 9]
    assert steps[1].item() == 2
    assert workspace.tolist() == pytest.approx(
        [0.1 / (1 - 0.5**5), (1 - 0.75**5) ** -0.5, 0, 0, 0.1 / 0.75, (1 - 0.75**2) ** -0.5]
    )


def test_a_nan_stays_in_amsgrads_maximum(kernels: Kernels) -> None:
    case = problem(3, torch.float32)
    case.grads[5][0] = case.states[2][5][1] = torch.nan
    found = kernels.adamw(case, AdamwConstants(0.1), False)
    assert found.states[2][5].isnan().nonzero().flatten().tolist() == [0, 1]


def test_a_launch_too_large_for_the_grid_is_an_error(kernels: Kernels) -> None:
    item = StepItem(StepTensor(*[None] * 7, 0), 0, 1 << 42, 6)
    options = ctypes.byref(SgdOptions(*SgdConstants(0.1)))
    run = kernels.library.function("sgd_step", c_int, *types_of("sgd_step"))
    with pytest.raises(EmulationError, match="cudaError 9"):
        kernels.library.call(run, ctypes.byref(item), 1, options)
