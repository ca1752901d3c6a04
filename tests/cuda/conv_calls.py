"""Calls of the CUDA launchers of masked_conv2d, which csrc/cuda/masked_conv2d.h declares."""

import ctypes
from ctypes import c_bool, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tests.cuda.masked_calls import (
    DTYPE_CODES,
    KeptEntries,
    KeptValues,
    column_entries,
    make_mask,
    row_entries,
)
from tests.cuda_emulation.library import EmulatedLibrary, GuardedTensor, guarded_copy
from tscnc_kernels import SparsityPattern
from tscnc_kernels._activation import ACTIVATIONS
from tscnc_kernels._conv_geometry import ConvGeometry, conv_geometry

HERE = Path(__file__).parent


class ConvAxis(ctypes.Structure):
    _fields_ = tuple(
        (name, c_int64) for name in ("size", "results", "kernel", "stride", "before", "dilation")
    )


class ConvCall(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("images", "in_channels", "out_channels", "groups")),
        *(("height", ConvAxis), ("width", ConvAxis)),
        *(("entries", KeptEntries), ("transposed", KeptEntries), ("values", KeptValues)),
        ("dtype", c_int32),
    )


@dataclass
class Problem:
    """A masked convolution with the gradient of its output."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    gradient: Tensor
    pattern: SparsityPattern
    geometry: ConvGeometry

    def double(self) -> "Problem":
        """The same in float64."""
        tensors = {name: getattr(self, name).double() for name in ("input", "weight", "bias")}
        return replace(self, **tensors, gradient=self.gradient.double())

    def preactivation(self) -> Tensor:
        """Z of the layer."""
        return self.geometry.convolve(self.input, self.weight * self.pattern.mask, self.bias)

    def call(self, held: Tensor) -> ConvCall:
        """The launchers' view; `held` is the dense weight or its values."""
        sizes = self.input.shape[2:]
        axes = [
            ConvAxis(
                *(sizes[i], self.gradient.shape[2 + i], self.geometry.kernel[i]),
                *(self.geometry.stride[i], self.geometry.padding[2 * i], self.geometry.dilation[i]),
            )
            for i in range(2)
        ]
        is_dense, width = held.dim() > 1, self.pattern.matrix_shape[1]
        return ConvCall(
            *(*self.input.shape[:2], len(self.weight), self.geometry.groups, *axes),
            *(row_entries(self.pattern), column_entries(self.pattern)),
            KeptValues(held.data_ptr(), self.pattern.permutation.data_ptr(), is_dense, width, 1),
            DTYPE_CODES[self.input.dtype],
        )


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; `kind` is one of the masks of masked_calls."""

    images: int = 2
    channels: int = 4
    out: int = 5
    size: tuple[int, int] = (6, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    kind: str = "random"
    dtype: torch.dtype = torch.float32


GEOMETRIES = {
    "plain": Shape(),
    "one_pixel": Shape(size=(1, 1), kernel=(1, 1), padding=(0, 0), kind="full"),
    "no_padding": Shape(padding=(0, 0)),
    "wide_padding": Shape(padding=(3, 2), kernel=(2, 3)),
    "stride": Shape(stride=(2, 2), size=(8, 7)),
    "long_stride": Shape(stride=(3, 2), kernel=(2, 2), padding=(0, 1)),
    "dilation": Shape(dilation=(2, 3), size=(9, 11), padding=(2, 3)),
    "stride_and_dilation": Shape(stride=(2, 3), dilation=(3, 2), size=(11, 9)),
    "groups": Shape(channels=6, out=4, groups=2),
    "depthwise": Shape(channels=5, out=10, groups=5, kind="skewed", stride=(2, 1)),
    "same": Shape(padding="same", kernel=(2, 4)),
    "long_rows": Shape(channels=30, out=3, kind="full", images=1),
    "many_pixels": Shape(images=3, channels=2, out=2, size=(30, 31)),
    "many_small_images": Shape(images=90, channels=2, out=2, size=(3, 3)),
}


def problem(shape: Shape) -> Problem:
    """Random numbers whose products are of order one."""
    generator = torch.Generator().manual_seed(7)
    geometry = conv_geometry(
        shape.kernel, shape.stride, shape.padding, shape.dilation, shape.groups
    )
    weight_shape = shape.out, shape.channels // shape.groups, *shape.kernel
    mask = make_mask(shape.kind, shape.out, weight_shape[1] * shape.kernel[0] * shape.kernel[1])
    pattern = SparsityPattern.from_mask(mask.view(weight_shape))
    results = shape.images, shape.out, *geometry.output_size(*shape.size)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    pixels = shape.images * results[2] * results[3]
    tensors = (
        draw(shape.images, shape.channels, *shape.size),
        draw(*weight_shape) * max(1.0, pattern.nnz / shape.out) ** -0.5,
        draw(shape.out),
        draw(*results) * max(1.0, pixels) ** -0.5,
    )
    return Problem(*(tensor.to(shape.dtype) for tensor in tensors), pattern, geometry)


class Kernels:
    """The launchers of one emulated source; results are the same in every order of the threads."""

    def __init__(self, source: str, folder: Path) -> None:
        self.library = EmulatedLibrary(HERE / f"{source}_emulated.cpp", folder)

    def _run(
        self,
        name: str,
        call: ConvCall,
        given: list[object],
        sizes: list[int],
        workspace: int | None,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        count = 1 + len(given) + len(sizes) + (workspace is not None)
        types = [c_int64 if isinstance(one, int) else c_void_p for one in given]
        function = self.library.function(
            name, c_int, c_void_p, *types, *[c_void_p] * (count - 1 - len(given))
        )
        held = [guarded_copy(one) if isinstance(one, Tensor) else one for one in given]

        def run() -> list[Tensor]:
            results = [GuardedTensor(size, dtype) for size in sizes]
            scratch = [] if workspace is None else [GuardedTensor(workspace, torch.uint8)]
            arguments = [
                one.tensor.data_ptr() if isinstance(one, GuardedTensor) else one
                for one in (*held, *results, *scratch)
            ]
            self.library.call(function, ctypes.byref(call), *arguments)
            for guarded in (*results, *scratch):
                guarded.check()
            return [result.tensor for result in results]

        return list(self.library.run_in_every_order(run))

    def _product_workspace(self, call: ConvCall, is_gradient: bool) -> int:
        size_of = self.library.function("product_workspace", c_int64, c_void_p, c_bool)
        return size_of(ctypes.byref(call), is_gradient)

    def forward(self, case: Problem, held: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """Y and Z."""
        call, size = case.call(held), case.gradient.numel()
        output, preactivation = self._run(
            *("product", call, [case.input, case.bias, ACTIVATIONS[activation]]),
            *([size, size], self._product_workspace(call, False), case.input.dtype),
        )
        return output.view_as(case.gradient), preactivation.view_as(case.gradient)

    def grad_input(self, case: Problem, held: Tensor) -> Tensor:
        """DX."""
        call = case.call(held)
        (result,) = self._run(
            *("input_gradient", call, [case.gradient], [case.input.numel()]),
            *(self._product_workspace(call, True), case.input.dtype),
        )
        return result.view_as(case.input)

    def grad_weight(self, case: Problem) -> Tensor:
        """The gradient of the kept values."""
        call = case.call(case.weight)
        size_of = self.library.function("weight_workspace", c_int64, c_void_p)
        (result,) = self._run(
            *("weight_gradient", call, [case.gradient, case.input]),
            *([case.pattern.nnz], size_of(ctypes.byref(call)), case.input.dtype),
        )
        return result

    def grad_bias(self, case: Problem) -> Tensor:
        """Db."""
        (result,) = self._run(
            *("bias_gradient", case.call(case.weight), [case.gradient]),
            *([len(case.bias)], None, case.input.dtype),
        )
        return result
