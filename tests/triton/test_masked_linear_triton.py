"""The Triton products of masked_linear under the interpreter, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda.masked_calls import (
    LAYOUTS,
    MASKS,
    Problem,
    check_close,
    make_mask,
    problem,
    strided,
)
from tscnc_kernels import SparsityPattern
from tscnc_kernels._activation import ACTIVATIONS

launchers = pytest.importorskip("tscnc_kernels.triton.masked_linear")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def on_device(case: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, SparsityPattern]:
    assert case.bias is not None
    tensors = [t.to(DEVICE) for t in (case.input, case.weight, case.bias, case.gradient)]
    return *tensors, case.pattern.to(DEVICE)


def check_all(case: Problem) -> None:
    """Every product of a layer; the weight holds NaN off its mask."""
    exact = case.double()
    case.weight = case.weight.where(case.pattern.mask, case.weight.new_tensor(torch.nan))
    input, weight, bias, gradient, pattern = on_device(case)
    z = exact.preactivation()
    y = {"none": z, "relu": z.relu(), "gelu": F.gelu(z)}[case.activation]
    code = ACTIVATIONS[case.activation]
    output, preactivation = launchers.product(input, weight, pattern, bias, code, save=True)
    check_close(output.cpu(), y)
    check_close(preactivation.cpu(), z)
    grad_input, _ = launchers.product(gradient, weight, pattern, transposed=True)
    check_close(grad_input.cpu(), exact.gradient @ (exact.weight * case.pattern.mask))
    expected = exact.gradient.t() @ exact.input * case.pattern.mask
    check_close(launchers.weight_gradient(gradient, input, pattern, values=False).cpu(), expected)
    values = launchers.weight_gradient(gradient, input, pattern, values=True)
    check_close(values.cpu(), expected[case.pattern.mask])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_products_in_every_dtype(dtype: torch.dtype, activation: str) -> None:
    check_all(problem((70, 37, 56), dtype, activation=activation))


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask(kind: str) -> None:
    check_all(problem((33, 41, 24), kind=kind))


# Widths in whole bytes of mask and not, around the tiles' sizes.
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (16, 65, 8), (17, 64, 129), (129, 3, 160), (66, 130, 200)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_all(problem(shape, dtype, density=0.4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    changed, plain = strided(problem((41, 21, 35)), layout)
    changed.pattern = plain.pattern
    check_all(changed)


def test_no_samples() -> None:
    input, weight, bias, gradient, pattern = on_device(problem((0, 5, 9)))
    assert launchers.product(input, weight, pattern, bias)[0].shape == (0, 5)
    assert not launchers.weight_gradient(gradient, input, pattern, values=False).any()


def test_tile_starts_count_what_is_kept_before() -> None:
    mask = make_mask("random", 6, 40)
    starts = launchers.tile_starts(SparsityPattern.from_mask(mask), 16)
    flat = torch.cat([torch.zeros(1), mask.flatten().cumsum(0)])
    expected = torch.tensor([[flat[40 * row + 16 * t] for t in range(3)] for row in range(6)])
    assert torch.equal(starts.float(), expected)
