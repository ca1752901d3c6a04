"""16-bit types: conversions of every number, and bfloat16's dot products of pairs."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.ops.test_masked_linear import make_mask
from tscnc_kernels import SparsityPattern, build_info, masked_linear
from tscnc_kernels.ops import masked_linear as op

ROOT = Path(__file__).resolve().parent.parent.parent
HALF = [torch.float16, torch.bfloat16]
SMALLEST = torch.finfo(torch.bfloat16).tiny
WITH_DOTS = {"wide", "avx512_bf16"}


def every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def without_subnormals(numbers: torch.Tensor, isa: str) -> torch.Tensor:
    """The dot products take subnormal operands for zeros."""
    flushed = numbers.dtype == torch.bfloat16 and isa in WITH_DOTS
    return torch.where(numbers.abs() < SMALLEST, 0, numbers) if flushed else numbers


def row_sums(input: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(1, input.shape[1], dtype=torch.bool)
    weight = torch.ones(1, input.shape[1], dtype=input.dtype)
    return masked_linear(input, weight, SparsityPattern.from_mask(mask), algorithm="panel")[:, 0]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_number_is_read_and_written_unchanged(isa, dtype):
    numbers = every_number(dtype)
    result = row_sums(numbers[:, None])
    torch.testing.assert_close(
        result, without_subnormals(numbers, isa), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_are_rounded_to_nearest_even(isa, dtype):
    numbers = every_number(dtype)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(5))
    pairs = torch.stack([numbers, numbers[order]], dim=1)
    exact = without_subnormals(pairs, isa).float().sum(1)
    result = row_sums(pairs)
    torch.testing.assert_close(
        result, without_subnormals(exact.to(dtype), isa), rtol=0, atol=0, equal_nan=True
    )


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(*shape, generator=generator).bfloat16()


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> None:
    """Within half a place of bfloat16 and the errors of float sums of terms of this size."""
    error = (actual.detach().double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + 2e-6 * size).all(), error.max()


@pytest.mark.parametrize("kind", ["random", "full", "none", "empty_rows", "skewed", "one_row"])
@pytest.mark.parametrize("batch", [1, 17, 33, 64, 67, 130])
def test_bfloat16_products_are_rounded_once(isa, kind, batch):
    rows, width = 9, 601  # rows of a full mask are longer than the weights narrowed at a time
    mask = make_mask(kind, rows, width)
    input, weight, bias = draw(batch, width), draw(rows, width), draw(rows)
    pattern = SparsityPattern.from_mask(mask)
    leaf = input.clone().requires_grad_()
    output = masked_linear(leaf, weight, pattern, bias, algorithm="panel")
    exact = op.reference(input.double(), weight.double(), pattern, bias.double())
    kept = torch.where(mask, weight, 0).double()
    assert_rounded_once(output, exact, input.double().abs() @ kept.abs().T + bias.abs().double())

    grad_output = draw(batch, rows)
    (gradient,) = torch.autograd.grad(output, leaf, grad_output)
    grad_output = grad_output.double()
    assert_rounded_once(gradient, grad_output @ kept, grad_output.abs() @ kept.abs())


@pytest.mark.parametrize("batch", [5, 40, 64])
def test_infinities_stay_with_their_sample_and_their_feature(isa, batch):
    mask = make_mask("random", 8, 31)
    mask[:, 3] = False
    pattern = SparsityPattern.from_mask(mask)
    input, weight = draw(batch, 31), draw(8, 31)
    expected = masked_linear(input, weight, pattern, algorithm="panel")
    input[:, 3] = math.inf
    input[1] = math.nan
    result = masked_linear(input, weight, pattern, algorithm="panel")
    others = torch.arange(batch) != 1
    assert torch.equal(result[others], expected[others])
    assert result[1][mask.any(1)].isnan().all()


def test_native_dot_products_are_compiled():
    objects = sorted(ROOT.glob("build/native-*/cpu_*_bf16.avx512_bf16.o"))
    if not objects or not shutil.which("objdump"):
        pytest.skip("no object files of an in-place build, or no objdump")
    assert "avx512_bf16" in build_info()["cpu_isas"]
    for path in objects:
        code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True)
        assert "vdpbf16ps" in code.stdout, path.name
