"""Calls of the CUDA launchers of masked_linear, which csrc/cuda/masked_linear.h declares."""

import ctypes
from ctypes import c_bool, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda_emulation.library import EmulatedLibrary, GuardedTensor
from tscnc_kernels import SparsityPattern
from tscnc_kernels._activation import ACTIVATIONS, activation_gradient

DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
DTYPES = list(DTYPE_CODES)
# One rounding to the storage type, of results of order one, on top of sums in float.
TOLERANCES = {
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-12,
}
MASKS = ["random", "full", "none", "empty_rows", "empty_columns", "one_row", "skewed"]


class KeptEntries(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("pointers", "columns")),
        *((name, c_int64) for name in ("rows", "width", "kept")),
    )


class KeptValues(ctypes.Structure):
    _fields_ = (
        *(("data", c_void_p), ("permutation", c_void_p), ("is_dense", c_bool)),
        *(("row_stride", c_int64), ("column_stride", c_int64)),
    )


class SampleMatrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("count", "width", "sample_stride", "feature_stride")),
        *(("saved", c_void_p), ("activation", c_int64)),
    )


class ProductCall(ctypes.Structure):
    _fields_ = (
        *(("entries", KeptEntries), ("values", KeptValues), ("input", SampleMatrix)),
        *(("bias", c_void_p), ("activation", c_int64)),
        *(("output", c_void_p), ("preactivation", c_void_p), ("dtype", c_int32)),
        ("narrow_columns", c_void_p),
    )


class WeightGradientCall(ctypes.Structure):
    _fields_ = (
        *(("entries", KeptEntries), ("input", SampleMatrix), ("gradient", SampleMatrix)),
        *(("result", c_void_p), ("is_dense", c_bool), ("dtype", c_int32)),
    )


@dataclass
class Problem:
    """A masked layer with the gradient of its output; all tensors of one dtype, any strides."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    gradient: Tensor
    pattern: SparsityPattern
    activation: str = "none"

    def double(self) -> "Problem":
        """The same in float64."""
        bias = None if self.bias is None else self.bias.double()
        tensors = (self.input.double(), self.weight.double(), bias, self.gradient.double())
        return Problem(*tensors, self.pattern, self.activation)

    def preactivation(self) -> Tensor:
        """Z of the masked layer."""
        return F.linear(self.input, self.weight * self.pattern.mask, self.bias)

    def scaled_gradient(self) -> Tensor:
        """G = dY ∘ act'(Z)."""
        return activation_gradient(self.gradient, self.preactivation(), self.activation)


def make_mask(kind: str, rows: int, width: int, density: float = 0.2) -> Tensor:
    """A mask of one of `MASKS`."""
    noise = torch.rand(rows, width, generator=torch.Generator().manual_seed(3))
    mask = noise < density
    if kind in ("full", "none"):
        mask = torch.full((rows, width), kind == "full")
    elif kind == "empty_rows":
        mask[::2] = False
    elif kind == "empty_columns":
        mask[:, ::3] = False
    elif kind == "one_row":
        mask = torch.zeros(rows, width, dtype=torch.bool)
        mask[rows // 2] = True
    elif kind == "skewed":
        mask = noise < torch.linspace(0, 1, rows)[:, None] ** 4
    return mask


def problem(
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    kind: str = "random",
    activation: str = "none",
    density: float = 0.2,
) -> Problem:
    """Random numbers whose products are of order one. `shape` is (samples, rows, width)."""
    count, rows, width = shape
    generator = torch.Generator().manual_seed(11)
    pattern = SparsityPattern.from_mask(make_mask(kind, rows, width, density))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weight = draw(rows, width) * max(1.0, pattern.nnz / rows) ** -0.5
    gradient = draw(count, rows) * max(1.0, count, pattern.nnz / width) ** -0.5
    tensors = (draw(count, width), weight, draw(rows), gradient)
    return Problem(*(tensor.to(dtype) for tensor in tensors), pattern, activation)


def sample_matrix(matrix: Tensor, saved: Tensor | None = None, activation: int = 0) -> SampleMatrix:
    """The launchers' view of a (samples, features) matrix."""
    address = None if saved is None else saved.data_ptr()
    return SampleMatrix(matrix.data_ptr(), *matrix.shape, *matrix.stride(), address, activation)


def row_entries(pattern: SparsityPattern) -> KeptEntries:
    """The kept entries row by row."""
    index = pattern.row_pointers.data_ptr(), pattern.columns.data_ptr()
    return KeptEntries(*index, *pattern.matrix_shape, pattern.nnz)


def column_entries(pattern: SparsityPattern) -> KeptEntries:
    """The kept entries of the transposed matrix."""
    index = pattern.column_pointers.data_ptr(), pattern.column_rows.data_ptr()
    return KeptEntries(*index, *reversed(pattern.matrix_shape), pattern.nnz)


class Kernels:
    """The launchers of one emulated source; results are the same in every order of the threads."""

    def __init__(self, source: str, folder: Path) -> None:
        path = Path(__file__).parent / f"{source}_emulated.cpp"
        self.library = EmulatedLibrary(path, folder)

    def _call(self, name: str, call: ctypes.Structure, results: list[GuardedTensor]) -> None:
        """Runs a launcher with a workspace full of NaN of exactly the size it asks for."""
        size_of = self.library.function(f"{name.split('_')[0]}_workspace", c_int64, c_void_p)
        workspace = GuardedTensor(size_of(ctypes.byref(call)), torch.uint8)
        workspace.tensor.fill_(0xFF)
        function = self.library.function(name, c_int, c_void_p, c_void_p)
        self.library.call(function, ctypes.byref(call), workspace.tensor.data_ptr())
        for guarded in (workspace, *results):
            guarded.check()

    def _product(self, call: ProductCall, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shape = count, call.entries.rows

        def run() -> list[Tensor]:
            results = [GuardedTensor(shape[0] * shape[1], dtype) for _ in range(2)]
            call.output, call.preactivation = (result.tensor.data_ptr() for result in results)
            self._call("product", call, results)
            return [result.tensor for result in results]

        output, preactivation = self.library.run_in_every_order(run)
        return output.view(shape), preactivation.view(shape)

    def forward(
        self,
        case: Problem,
        values: bool,
        held: Tensor | None = None,
        narrow: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Y and Z; `held`: values that are somewhere special; `narrow`: 16-bit columns."""
        if held is None:
            held = case.pattern.gather(case.weight) if values else case.weight
        strides = (0, 0) if values else case.weight.stride()
        call = ProductCall(
            row_entries(case.pattern),
            KeptValues(held.data_ptr(), None, not values, *strides),
            sample_matrix(case.input),
            None if case.bias is None else case.bias.data_ptr(),
            ACTIVATIONS[case.activation],
            *(None, None, DTYPE_CODES[case.input.dtype]),
            None if narrow is None else narrow.data_ptr(),
        )
        if narrow is not None:
            call.entries.columns = None
        return self._product(call, len(case.input), case.input.dtype)

    def _gradient(self, case: Problem) -> tuple[SampleMatrix, Tensor]:
        """The gradient of the output, and what has to live as long."""
        saved = case.preactivation() if case.activation == "gelu" else case.preactivation().relu()
        saved = saved.contiguous()
        code = ACTIVATIONS[case.activation]
        return sample_matrix(case.gradient, saved if code else None, code), saved

    def grad_input(self, case: Problem, values: bool) -> Tensor:
        """dX, from the transposed index."""
        held = case.pattern.gather(case.weight) if values else case.weight
        strides = (0, 0) if values else reversed(case.weight.stride())
        gradient, _saved = self._gradient(case)
        call = ProductCall(
            column_entries(case.pattern),
            KeptValues(held.data_ptr(), case.pattern.permutation.data_ptr(), not values, *strides),
            *(gradient, None, 0, None, None, DTYPE_CODES[case.input.dtype]),
        )
        return self._product(call, len(case.input), case.input.dtype)[0]

    def grad_weight(self, case: Problem, values: bool) -> Tensor:
        """dW, of the shape of the weight or of its values."""
        gradient, _saved = self._gradient(case)
        index = row_entries(case.pattern)
        size = case.pattern.nnz if values else case.weight.numel()

        def run() -> list[Tensor]:
            result = GuardedTensor(size, case.input.dtype)
            call = WeightGradientCall(
                *(index, sample_matrix(case.input), gradient, result.tensor.data_ptr()),
                *(not values, DTYPE_CODES[case.input.dtype]),
            )
            self._call("weight_gradient", call, [result])
            return [result.tensor]

        (result,) = self.library.run_in_every_order(run)
        return result if values else result.view(case.weight.shape)

    def grad_bias(self, case: Problem) -> Tensor:
        """Db."""
        gradient, _saved = self._gradient(case)
        code = DTYPE_CODES[case.input.dtype]
        size_of = self.library.function("bias_workspace", c_int64, c_void_p, c_int)
        launch = self.library.function("bias_gradient", c_int, c_void_p, c_void_p, c_int, c_void_p)

        def run() -> list[Tensor]:
            workspace = GuardedTensor(size_of(ctypes.byref(gradient), code), torch.uint8)
            result = GuardedTensor(case.gradient.shape[1], case.input.dtype)
            addresses = result.tensor.data_ptr(), code, workspace.tensor.data_ptr()
            self.library.call(launch, ctypes.byref(gradient), *addresses)
            for guarded in (workspace, result):
                guarded.check()
            return [result.tensor]

        return self.library.run_in_every_order(run)[0]


def check_forward(kernels: Kernels, case: Problem, values: bool) -> None:
    """Y and Z against float64."""
    exact = case.double()
    z = exact.preactivation()
    y = {"none": z, "relu": z.relu(), "gelu": F.gelu(z)}[case.activation]
    output, preactivation = kernels.forward(case, values)
    check_close(preactivation, z)
    check_close(output, y)


def check_grad_input(kernels: Kernels, case: Problem, values: bool) -> None:
    """DX against float64."""
    exact = case.double()
    expected = exact.scaled_gradient() @ (exact.weight * case.pattern.mask)
    check_close(kernels.grad_input(case, values), expected)


def check_grad_weight(kernels: Kernels, case: Problem, values: bool) -> None:
    """DW against float64, zero off the mask."""
    exact = case.double()
    expected = exact.scaled_gradient().t() @ exact.input * case.pattern.mask
    found = kernels.grad_weight(case, values)
    if not values:
        assert not found[~case.pattern.mask].any()
    check_close(found, case.pattern.gather(expected) if values else expected)


def check_close(found: Tensor, expected: Tensor) -> None:
    """Within the tolerance of the dtype found."""
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every_other_column": lambda t: torch.stack([t, t + 1], -1).reshape(t.shape[0], -1)[:, ::2],
    "every_other_row": lambda t: torch.stack([t, t + 1], 1).reshape(-1, t.shape[1])[::2],
    "expanded_rows": lambda t: t[:1].expand_as(t),
}


def strided(case: Problem, layout: str) -> tuple[Problem, Problem]:
    """The problem with other strides, and the same numbers contiguous."""
    change = LAYOUTS[layout]
    changed = replace(
        case,
        input=change(case.input),
        weight=change(case.weight),
        gradient=change(case.gradient),
    )
    plain = replace(
        changed,
        input=changed.input.contiguous(),
        weight=changed.weight.contiguous(),
        gradient=changed.gradient.contiguous(),
    )
    return changed, plain
