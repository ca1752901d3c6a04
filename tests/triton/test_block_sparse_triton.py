"""The Triton products of block patterns under the interpreter, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda.masked_calls import LAYOUTS, Problem, check_close, problem, strided
from tests.triton.test_masked_linear_triton import DTYPES, on_device
from tscnc_kernels import SparsityPattern, masked_linear
from tscnc_kernels._activation import ACTIVATIONS
from tscnc_kernels._block_index import block_edge, block_index

launchers = pytest.importorskip("tscnc_kernels.triton.block_sparse")

EDGES = [16, 32, 64, 128]


def block_pattern(edge: int, rows: int, columns: int, kind: str = "random") -> SparsityPattern:
    """A mask of so many rows and columns of blocks, whose smallest blocks are of this edge."""
    blocks = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) < 0.5
    blocks[0, 0], blocks[-1, 0] = True, False
    if kind == "full":
        blocks[:] = True
    if kind == "empty_lines":
        blocks[1::2], blocks[:, 1::2] = False, False
    if kind == "one_row":
        blocks[1:] = False
    return SparsityPattern.from_mask(blocks.repeat_interleave(edge, 0).repeat_interleave(edge, 1))


def block_problem(
    pattern: SparsityPattern,
    count: int = 19,
    dtype: torch.dtype = torch.float32,
    activation: str = "none",
) -> Problem:
    drawn = problem((count, *pattern.matrix_shape), dtype, "random", activation, pattern.density)
    drawn.pattern = pattern
    return drawn


def check_all(case: Problem) -> None:
    """Every product of a layer from a dense weight that is NaN off its mask, and from values."""
    exact, mask = case.double(), case.pattern.mask
    case.weight = case.weight.where(mask, case.weight.new_tensor(torch.nan))
    input, dense, bias, gradient, pattern = on_device(case)
    z = exact.preactivation()
    y = {"none": z, "relu": z.relu(), "gelu": F.gelu(z)}[case.activation]
    grad_input = exact.gradient @ (exact.weight * mask)
    grad_weight = exact.gradient.t() @ exact.input * mask
    code = ACTIVATIONS[case.activation]
    for values in (False, True):
        weight = pattern.gather(dense) if values else dense
        output, preactivation = launchers.product(input, weight, pattern, bias, code, save=True)
        check_close(output.cpu(), y)
        check_close(preactivation.cpu(), z)
        found, nothing = launchers.product(gradient, weight, pattern, transposed=True)
        check_close(found.cpu(), grad_input)
        assert nothing.shape[0] == 0
        found = launchers.weight_gradient(gradient, input, pattern, values=values).cpu()
        check_close(found, grad_weight[mask] if values else grad_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_products_in_every_dtype(dtype: torch.dtype, activation: str) -> None:
    check_all(block_problem(block_pattern(16, 2, 2), dtype=dtype, activation=activation))


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_edge(edge: int, dtype: torch.dtype) -> None:
    pattern = block_pattern(edge, 2, 3)
    assert block_edge(pattern) == edge
    check_all(block_problem(pattern, 5, dtype))


@pytest.mark.parametrize("kind", ["full", "empty_lines", "one_row"])
def test_lines_of_blocks_that_are_full_or_empty(kind: str) -> None:
    check_all(block_problem(block_pattern(16, 5, 3, kind)))


@pytest.mark.parametrize("count", [1, 16, 17, 63, 130])
def test_any_number_of_samples(count: int) -> None:
    check_all(block_problem(block_pattern(32, 2, 3), count, torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    changed, plain = strided(block_problem(block_pattern(16, 3, 2)), layout)
    changed.weight = plain.weight
    check_all(changed)
    input, weight, bias, _, pattern = on_device(plain)
    weight = LAYOUTS["transposed"](weight)
    output, _ = launchers.product(input, weight, pattern, bias, feature_major=True)
    assert output.stride() == (1, len(input))
    check_close(output.cpu(), plain.double().preactivation())


def test_no_samples_give_no_rows_and_a_gradient_of_zeros() -> None:
    input, weight, bias, gradient, pattern = on_device(block_problem(block_pattern(16, 2, 2), 0))
    assert launchers.product(input, weight, pattern, bias)[0].shape == (0, 32)
    found = launchers.weight_gradient(gradient, input, pattern, values=True)
    assert found.shape == (pattern.nnz,) and not found.any()


def test_index_finds_every_block_in_both_orders() -> None:
    edge, pattern = 16, block_pattern(16, 5, 7)
    index = block_index(pattern)
    assert block_index(pattern) is index
    weight = torch.arange(pattern.mask.numel()).view(pattern.shape)
    values = pattern.gather(weight)
    blocks = pattern.mask[::edge, ::edge]
    assert torch.equal(torch.stack([index.rows, index.columns], 1).long(), blocks.nonzero())
    places = zip(*(tensor.tolist() for tensor in index[6:8]), index.column_widths, strict=True)
    by_column = [(column, row) for column, row in blocks.t().nonzero().tolist()]
    for (column, row), (found_row, start, width) in zip(by_column, places, strict=True):
        assert found_row == row
        rows = [values[(start + line * width) * edge :][:edge] for line in range(edge)]
        expected = weight[row * edge :, column * edge :][:edge, :edge]
        assert torch.equal(torch.stack(rows), expected)
    lengths = blocks.sum(1)[index.row_order.long()]
    assert torch.equal(lengths, lengths.sort(descending=True).values)


@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (1, 1)])
def test_patterns_of_smaller_blocks_are_refused(shape: tuple[int, int]) -> None:
    blocks = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = blocks.repeat_interleave(shape[0], 0).repeat_interleave(shape[1], 1)
    pattern = SparsityPattern.from_mask(mask)
    with pytest.raises(RuntimeError, match="blocks of 16x16 or larger, got block_shape"):
        block_index(pattern)


def test_blocks_that_are_not_square_are_read_as_squares() -> None:
    blocks = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    pattern = SparsityPattern.from_mask(blocks.repeat_interleave(16, 0).repeat_interleave(32, 1))
    assert pattern.block_shape == (16, 32)
    check_all(block_problem(pattern))


def step(
    case: Problem, values: bool, algorithm: str | None, dense_grad: bool = False
) -> list[Tensor]:
    """Y and the gradients of input, weight and bias by the public op."""
    input, weight, bias, gradient, pattern = on_device(case)
    weight = pattern.gather(weight) if values else weight
    leaves = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    how = {"algorithm": algorithm, "dense_grad": dense_grad, "backend": "triton"}
    output = masked_linear(leaves[0], leaves[1], pattern, leaves[2], case.activation, **how)
    found = [output.detach(), *torch.autograd.grad(output, leaves, gradient)]
    if values:
        found[2] = pattern.scatter(found[2])
    return [tensor.cpu() for tensor in found]


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_op_computes_blocks_and_their_gradients(activation: str, values: bool) -> None:
    case = block_problem(block_pattern(16, 2, 2), 5, activation=activation)
    exact = case.double()
    leaves = [tensor.requires_grad_() for tensor in (exact.input, exact.weight, exact.bias)]
    z = F.linear(leaves[0], leaves[1] * exact.pattern.mask, leaves[2])
    y = z.relu() if activation == "relu" else F.gelu(z)
    expected = [y.detach(), *torch.autograd.grad(y, leaves, exact.gradient)]
    forced, chosen = step(case, values, "block"), step(case, values, None)
    for found, same, wanted in zip(forced, chosen, expected, strict=True):
        check_close(found, wanted)
        assert torch.equal(found, same)


def test_dense_gradients_off_the_blocks_are_computed() -> None:
    case = block_problem(block_pattern(16, 2, 2))
    (_, _, grad_weight, _) = step(case, False, "block", dense_grad=True)
    exact = case.double()
    check_close(grad_weight, exact.gradient.t() @ exact.input)


def test_op_says_what_blocks_it_needs() -> None:
    case = problem((4, 24, 16))
    with pytest.raises(RuntimeError, match="blocks of 16x16 or larger here, got block_shape None"):
        step(case, False, "block")
