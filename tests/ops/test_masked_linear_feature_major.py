"""masked_linear with matrices whose samples, not features, lie next to each other."""

import functools

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import OpSpec, OpSuite, check_close
from tests.ops.test_masked_linear import pattern, reference, sample
from tscnc_kernels import masked_linear
from tscnc_kernels._masked_algorithms import SPARSE

ACTIVATIONS = ["none", "relu", "gelu"]
ops = torch.ops.tscnc_kernels


def features(matrix):
    """The same matrix, feature-major."""
    return matrix.t().contiguous().t()


def is_features(matrix):
    return matrix.stride() == (1, matrix.shape[0])


def raw_calls():
    kept, calls = pattern(5, 7), []
    index = kept.row_pointers, kept.columns
    for code in (0, 2, 3, 4):
        input, grad_output = features(torch.randn(4, 7)), features(torch.randn(4, 5))
        values = torch.randn(kept.nnz)
        how = 2, code, True, True
        calls.append((ops.masked_linear.default, (input, values, torch.randn(5), *index, *how)))
        backward = grad_output, grad_output, input, values, *kept.tensors[1:], 2, code, code
        calls.append((ops.masked_linear_backward.default, (*backward, True, True, True)))
    blocked = (
        kept.row_pointers,
        kept.blocked_rows,
        kept.column_pointers,
        kept.blocked_columns,
        kept.blocked_permutation,
    )
    calls.append(
        (
            ops.masked_linear.default,
            (input, values, None, kept.row_pointers, kept.blocked_rows, 1, 1, False, True),
        )
    )
    backward = grad_output, grad_output, input, values, *blocked, 2, 1, 1, True, True, True
    return [*calls, (ops.masked_linear_backward.default, backward)]


class TestFeatureMajor(OpSuite):
    spec = OpSpec(
        name="masked_linear",
        public=functools.partial(masked_linear, feature_major=True),
        reference=reference,
        samples={
            "dense_weight": sample((5,), 9, 7),
            "values": sample((2, 3), 9, 7, values=True, activation="gelu"),
            "panels": sample((67,), 17, 13, activation="relu"),
            "dense_algorithm": sample((3,), 6, 5, activation="gelu", algorithm="dense"),
            "one": sample((), 1, 1, kind="full"),
            "empty_batch": sample((0,), 5, 4),
            "empty_pattern": sample((3,), 5, 4, kind="none", values=True),
        },
        raw_calls=raw_calls,
        # As for row-major results.
        tolerances={torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2},
    )


def run(algorithm, activation, tensors, kept, grad_output, feature_major):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = masked_linear(
        *(leaves[0], leaves[1], kept, leaves[2], activation),
        feature_major=feature_major,
        algorithm=algorithm,
    )
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [2, 13, 32, 70])
@pytest.mark.parametrize("algorithm", SPARSE)
def test_layouts_change_no_bit(algorithm, batch, dtype, isa):
    kept = pattern(63, 37)
    tensors = [
        torch.randn(size, dtype=dtype) for size in ((batch, 37), (kept.nnz,), (63,), (batch, 63))
    ]
    input, values, bias, gradient = tensors
    for activation in ACTIVATIONS:
        wanted = run(algorithm, activation, (input, values, bias), kept, gradient, False)
        assert wanted[0].is_contiguous() and wanted[1].is_contiguous()
        for x, g, major in (
            (features(input), features(gradient), True),
            (features(input), gradient, True),
            (input, features(gradient), True),
            (features(input), gradient, False),
        ):
            found = run(algorithm, activation, (x, values, bias), kept, g, major)
            assert is_features(found[0]) == major
            assert is_features(found[1]) == (x is not input)
            for a, e in zip(found, wanted, strict=True):
                assert torch.equal(a, e)


@pytest.mark.parametrize("algorithm", [*SPARSE, "dense"])
@pytest.mark.parametrize("size", [(1, 1), (63, 1), (1, 129), (129, 63)])
def test_odd_sizes(algorithm, size):
    kept = pattern(*size)
    for batch in (1, 13, 33):
        input, weight = torch.randn(batch, size[1]).double(), torch.randn(size).double()
        bias, gradient = torch.randn(size[0]).double(), torch.randn(batch, size[0]).double()
        found = run(algorithm, "relu", (features(input), weight, bias), kept, gradient, True)
        check_close(found[0], F.relu(F.linear(input, weight * kept.mask, bias)), 1e-12, "value")
        wanted = run("dense", "relu", (input, weight, bias), kept, gradient, False)
        for a, e in zip(found[1:], wanted[1:], strict=True):
            check_close(a, e, 1e-12, "gradient")


@pytest.mark.parametrize("algorithm", [*SPARSE, "dense"])
def test_second_derivatives(algorithm):
    kept, batch = pattern(5, 4), 3

    def layer(x, values, bias):
        return masked_linear(
            *(x.t().contiguous().t(), values, kept, bias, "gelu"),
            feature_major=True,
            algorithm=algorithm,
        )

    shapes = (batch, 4), (kept.nnz,), (5,)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradgradcheck(layer, leaves)


@pytest.mark.parametrize("algorithm", [*SPARSE, "dense"])
def test_a_dense_result_and_gradient_have_the_layout_too(algorithm):
    kept = pattern(6, 9)
    input = features(torch.randn(8, 9)).requires_grad_()
    output = masked_linear(
        input, torch.randn(6, 9), kept, None, "relu", feature_major=True, algorithm=algorithm
    )
    assert is_features(output)
    assert is_features(torch.autograd.grad(output, input, torch.ones_like(output))[0])


@pytest.mark.parametrize("algorithm", [*SPARSE, "dense"])
def test_layers_under_compile(algorithm):
    torch._dynamo.reset()
    first, second = pattern(11, 7), pattern(5, 11)

    def chain(x, a, b):
        how = {"algorithm": algorithm}
        hidden = masked_linear(x, a, first, None, "gelu", feature_major=True, **how)
        return masked_linear(torch.tanh(hidden), b, second, **how)

    shapes = (6, 7), (first.nnz,), (second.nnz,)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*leaves), chain(*leaves)
    check_close(actual, expected, 1e-6, "value")
    for a, e in zip(
        torch.autograd.grad(actual.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        check_close(a, e, 1e-5, "gradient")


def test_batch_dimensions_are_samples():
    kept, input = pattern(6, 10), torch.randn(3, 5, 10)
    values = torch.randn(kept.nnz)
    output = masked_linear(input, values, kept, feature_major=True, algorithm="panel")
    assert output.stride() == (5, 1, 15)
    assert torch.equal(output, masked_linear(input, values, kept, algorithm="panel"))
    again = masked_linear(output, torch.randn(10, 6), pattern(10, 6), algorithm="panel")
    assert again.shape == (3, 5, 10) and again.is_contiguous()
