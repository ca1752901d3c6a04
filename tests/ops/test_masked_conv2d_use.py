"""masked_conv2d as its users meet it: memory, masks, types, rules and errors."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import check_close
from tests.ops.test_masked_conv2d import SPARSE, pattern
from tscnc_kernels import SparsityPattern, masked_conv2d, use_backend
from tscnc_kernels._conv_algorithms import choose
from tscnc_kernels._conv_geometry import pattern_geometry


@pytest.mark.parametrize("algorithm", [*SPARSE, "dense"])
def test_results_lie_in_memory_as_the_input(algorithm):
    kept, weight = pattern(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        input = torch.randn(2, 4, 6, 7).contiguous(memory_format=layout).requires_grad_()
        output = masked_conv2d(input, weight, kept, padding=1, algorithm=algorithm)
        assert output.is_contiguous(memory_format=layout)
        (found,) = torch.autograd.grad(output.square().sum(), input)
        assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("algorithm", [*SPARSE, "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_the_weight_holds_off_the_mask_is_never_seen(algorithm, bad):
    kept = pattern(6, 3, 3, 3)
    weight = torch.randn(6, 3, 3, 3).masked_fill(~kept.mask, bad).requires_grad_()
    input = torch.randn(2, 3, 5, 5, requires_grad=True)
    output = masked_conv2d(input, weight, kept, padding=1, algorithm=algorithm)
    grads = torch.autograd.grad(output.sum(), (input, weight), create_graph=True)
    second = torch.autograd.grad(grads[0].square().sum(), weight)
    for result in (output, *grads, *second):
        assert torch.isfinite(result).all()
    assert (grads[1][~kept.mask] == 0).all()


@pytest.mark.parametrize("algorithm", [*SPARSE, "dense"])
def test_dense_grad_is_the_gradient_without_mask(algorithm):
    kept = pattern(6, 3, 3, 3)
    input, weight = torch.randn(2, 3, 5, 5), torch.randn(6, 3, 3, 3, requires_grad=True)
    masked = (weight.detach() * kept.mask).requires_grad_()
    (expected,) = torch.autograd.grad(
        F.relu(F.conv2d(input, masked, padding=1)).square().sum(), masked
    )
    output = masked_conv2d(
        *(input, weight, kept),
        padding=1,
        activation="relu",
        dense_grad=True,
        algorithm=algorithm,
    )
    (actual,) = torch.autograd.grad(output.square().sum(), weight)
    assert (expected[~kept.mask] != 0).any()
    check_close(actual, expected, 1e-5, "gradient")


def test_dense_algorithm_trusts_assume_masked_and_still_masks_the_gradient():
    kept = pattern(4, 2, 3, 3)
    weight = torch.ones(4, 2, 3, 3, requires_grad=True)
    output = masked_conv2d(
        torch.ones(1, 2, 3, 3), weight, kept, assume_masked=True, algorithm="dense"
    )
    assert output.flatten().tolist() == [18.0] * 4
    output.sum().backward()
    assert torch.equal(weight.grad != 0, kept.mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("algorithm", SPARSE)
def test_half_types_are_summed_in_float32(dtype, algorithm, isa):
    # 4096 + 1 + ... + 1 stays 4096 when a half type is summed one by one.
    kept = SparsityPattern.from_mask(torch.ones(1, 1025, 1, 1, dtype=torch.bool))
    input = torch.ones(1, 1025, 1, 1, dtype=dtype)
    input[0, 0] = 4096
    weight = torch.ones(1, 1025, 1, 1, dtype=dtype)
    output = masked_conv2d(input, weight, kept, algorithm=algorithm)
    assert output.item() == torch.tensor(5120.0, dtype=dtype).item()


def test_rule_is_sparse_below_the_stated_density():
    kept = pattern(8, 8, 3, 3)
    geometry = pattern_geometry(kept, 1, 1, 1, 1)
    size = 8, 9, 9
    assert choose(kept, geometry, "native", (1, *size), None) == ("plane",) * 3
    assert choose(kept, geometry, "native", (64, *size), None) == ("batch",) * 3
    assert choose(kept, geometry, "reference", (64, *size), None) == ("dense",) * 3
    full = pattern(8, 8, 3, 3, kind="full")
    assert choose(full, geometry, "native", (64, *size), None) == ("dense",) * 3
    assert choose(full, geometry, "native", (64, *size), None, "plane") == ("plane",) * 3


def test_depthwise_runs_dense():
    kept = pattern(8, 1, 3, 3)
    geometry = pattern_geometry(kept, 1, 1, 1, 8)
    assert choose(kept, geometry, "native", (64, 8, 9, 9), None) == ("dense",) * 3


def test_backward_keeps_only_the_input_for_itself():
    kept = pattern(8, 6, 3, 3)
    input = torch.randn(2, 6, 7, 7, requires_grad=True)
    values = torch.randn(kept.nnz, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (input, values, *kept.tensors)}
    extra = []

    def pack(tensor):
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in known:
            extra.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        masked_conv2d(input, values, kept, algorithm="plane")
    assert extra == []


def test_autocast_casts_as_conv2d_does():
    kept = pattern(6, 4, 3, 3)
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = masked_conv2d(torch.randn(3, 4, 5, 5), weight, kept)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert weight.grad.dtype == torch.float32


GOOD = {
    "input": torch.zeros(2, 6, 5, 5),
    "weight": torch.zeros(4, 3, 3, 3),
    "bias": torch.zeros(4),
    "pattern": SparsityPattern.from_mask(torch.ones(4, 3, 3, 3, dtype=torch.bool)),
    "groups": 2,
}
MATRIX = SparsityPattern.from_mask(torch.ones(4, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pattern": torch.ones(4, 3, 3, 3)}, TypeError, "SparsityPattern, got Tensor"),
        ({"pattern": MATRIX}, ValueError, r"kh, kw\), got \(4, 6\)"),
        ({"input": [1.0]}, TypeError, "input to be a tensor, got list"),
        ({"input": torch.zeros(2, 6, 5, 5).long()}, TypeError, "got torch.int64"),
        ({"input": torch.zeros(2, 6, 5, 5).double()}, TypeError, "float64, got torch.float32"),
        ({"weight": torch.zeros(4, 3, 3, 3).half()}, TypeError, "float32, got torch.float16"),
        ({"input": torch.zeros(2, 3, 5, 5)}, ValueError, r"\(B, 6, H, W\) .*got \(2, 3, 5, 5\)"),
        ({"input": torch.zeros(6, 5)}, ValueError, r"got \(6, 5\)"),
        ({"input": torch.zeros(2, 6, 2, 5)}, ValueError, r"fits into, got \(2, 5\)"),
        ({"input": torch.zeros(2, 6, 0, 5), "padding": 3}, ValueError, r"got \(0, 5\)"),
        ({"weight": torch.zeros(3, 4, 3, 3)}, ValueError, r"\(108,\), got \(3, 4, 3, 3\)"),
        ({"weight": torch.zeros(107)}, ValueError, r"\(108,\), got \(107,\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"\(4,\), got \(3,\)"),
        ({"groups": 3, "input": torch.zeros(2, 9, 5, 5)}, ValueError, "4 output .*got 3"),
        ({"groups": 0}, ValueError, "groups of at least 1, got 0"),
        ({"groups": 2.0}, TypeError, "groups of integers, got float"),
        ({"stride": 0}, ValueError, "stride of at least 1, got 0"),
        ({"stride": (1, 2, 3)}, ValueError, r"stride to be .*got \(1, 2, 3\)"),
        ({"stride": "2"}, TypeError, "stride to be .*got str"),
        ({"dilation": (1, -1)}, ValueError, "dilation of at least 1, got -1"),
        ({"padding": -1}, ValueError, "padding of at least 0, got -1"),
        ({"padding": "full"}, ValueError, "'same' or 'valid', got 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, r"stride 1 .*got \(2, 2\)"),
        ({"input": torch.zeros(2, 6, 5, 5, device="meta")}, ValueError, "device cpu, got meta"),
        ({"weight": torch.zeros(4, 27).to_sparse()}, ValueError, "got torch.sparse_coo"),
        ({"activation": "tanh"}, ValueError, "none, relu, gelu, got 'tanh'"),
        ({"algorithm": "fast"}, ValueError, "plane, batch, direct, dense, got 'fast'"),
        ({"weight": torch.zeros(108), "dense_grad": True}, ValueError, "values of shape"),
        ({"algorithm": "plane", "backend": "reference"}, RuntimeError, "got 'reference'"),
        ({"algorithm": "direct", "stride": 2}, RuntimeError, r"got stride \(2, 2\)"),
        ({"backend": "triton"}, RuntimeError, "only native, reference"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        masked_conv2d(**{**GOOD, **change})


def test_sparse_algorithms_are_refused_where_the_backend_is_forced_to_reference():
    with use_backend("reference"), pytest.raises(RuntimeError, match="needs the native backend"):
        masked_conv2d(**GOOD, algorithm="batch")
