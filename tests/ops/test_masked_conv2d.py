import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import OpSpec, OpSuite, check_close
from tests.ops.test_masked_linear import make_mask
from tscnc_kernels import SparsityPattern, masked_conv2d, use_backend
from tscnc_kernels.ops import masked_conv2d as op

MASKS = ["random", "full", "none", "empty_rows", "empty_columns", "one_row", "skewed"]
SPARSE = ["plane", "batch"]


def pattern(*shape: int, kind: str = "random") -> SparsityPattern:
    mask = make_mask(kind, shape[0], shape[1] * shape[2] * shape[3])
    return SparsityPattern.from_mask(mask.reshape(shape))


def reference(input, weight, pattern, *args, dense_grad=False, algorithm=None, **kwargs):
    pattern = pattern.to(input.device)
    return op.reference(input, weight, pattern, *args, dense_grad=dense_grad, **kwargs)


def sample(size, shape, values=False, kind="random", bias=True, **kwargs):
    """The scale keeps outputs of order one, on which the suite's tolerances are stated."""

    def arguments(make):
        kept = pattern(*shape, kind=kind).to(make(1).device)
        scale = max(1.0, kept.nnz / shape[0]) ** -0.5
        weight = make(kept.nnz) if values else make(*shape)
        return (make(*size), weight * scale, kept, make(shape[0]) if bias else None), kwargs

    return arguments


def raw_calls():
    kept = pattern(4, 3, 3, 2)
    geometry = [3, 2, 2, 1, 1, 1, 0, 1, 1, 2, 1]
    input, weight, bias = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 2), torch.randn(4)
    last = input.contiguous(memory_format=torch.channels_last)
    grad_output, none = torch.randn(2, 4, 4, 5), torch.empty(0, 4, 4, 5)
    ops = torch.ops.tscnc_kernels
    index = kept.row_pointers, kept.columns
    forward, backward = ops.masked_conv2d.default, ops.masked_conv2d_backward.default
    return [
        (forward, (input, weight, bias, *index, geometry, 1, 0, False, False)),
        (forward, (last, kept.gather(weight), None, *index, geometry, 2, 1, True, True)),
        (
            backward,
            (grad_output, none, input, weight, *index, geometry, 0, 0, 1, False, True, True, True),
        ),
        (
            backward,
            (
                *(grad_output, grad_output, last, kept.gather(weight), *index, geometry),
                *(2, 1, 0, True, True, True, False),
            ),
        ),
    ]


class TestMaskedConv2d(OpSuite):
    spec = OpSpec(
        name="masked_conv2d",
        public=masked_conv2d,
        reference=reference,
        samples={
            # The rule takes "plane" for few images and "batch" for sixteen.
            "plane": sample((2, 3, 4, 5), (4, 3, 3, 3), padding=1),
            "batch": sample((16, 2, 2, 3), (3, 2, 2, 2), values=True, activation="gelu"),
            "stride": sample((2, 4, 5, 4), (6, 2, 3, 3), stride=2, padding=(1, 0), groups=2),
            "dilation": sample(
                *((3, 2, 4, 7), (3, 2, 2, 3)),
                **{"padding": "same", "dilation": (1, 2), "activation": "relu", "bias": False},
            ),
            "one_image": sample((3, 6, 5), (4, 3, 1, 1), activation="relu"),
            "empty_batch": sample((0, 2, 4, 4), (3, 2, 3, 3), values=True),
            "empty_pattern": sample((2, 2, 4, 4), (3, 2, 3, 3), kind="none"),
        },
        raw_calls=raw_calls,
        # A gradient of the weight sums 120 products, one of which rounds to 1e-3 of their largest.
        tolerances={torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2},
    )

    def test_same_bits_every_run_and_for_any_thread_count(self):
        """Of the kernels: torch's convolution, which some samples run, promises nothing."""

        def sparse(*args, **kwargs):
            return masked_conv2d(*args, **{**kwargs, "algorithm": "plane"})

        self.spec = dataclasses.replace(self.spec, public=sparse)
        super().test_same_bits_every_run_and_for_any_thread_count()


@pytest.mark.parametrize("algorithm", SPARSE)
def test_hand_worked_forward_and_gradients(algorithm, isa):
    # One image [[1, 2], [3, 4]] and a 2 x 2 kernel of which [[5, .], [., 7]] is kept: with padding
    # 1 on every side the results are 3 x 3, y[i, j] = 5 x[i-1, j-1] + 7 x[i, j].
    mask = torch.tensor([[[[True, False], [False, True]]]])
    weight = torch.tensor([[[[5.0, 9.0], [9.0, 7.0]]]], requires_grad=True)
    input = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True)
    bias = torch.tensor([-20.0], requires_grad=True)
    kept = SparsityPattern.from_mask(mask)
    output = masked_conv2d(input, weight, kept, bias, padding=1, algorithm=algorithm)
    assert output.tolist() == [[[[-13.0, -6.0, -20.0], [1.0, 13.0, -10.0], [-20.0, -5.0, 0.0]]]]
    output.backward(torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]]))
    # dx[i, j] = 5 g[i+1, j+1] + 7 g[i, j]; the kept weights meet g[1:, 1:] and g[:2, :2].
    assert input.grad.tolist() == [[[[32.0, 44.0], [68.0, 80.0]]]]
    assert weight.grad.tolist() == [[[[77.0, 0.0], [0.0, 37.0]]]]
    assert bias.grad.tolist() == [45.0]
    relu = masked_conv2d(
        input, weight, kept, bias, padding=1, activation="relu", algorithm=algorithm
    )
    assert relu.tolist() == [[[[0.0, 0.0, 0.0], [1.0, 13.0, 0.0], [0.0, 0.0, 0.0]]]]


def gradients(function, *tensors):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*tensors)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    return output.detach(), torch.autograd.grad(output, tensors, weights)


def compare(input, shape, kind="random", tolerance=1e-12, activation="none", **kwargs):
    """Every algorithm, weight and values, against torch's convolution with W ∘ M."""
    generator = torch.Generator().manual_seed(5)
    kept = pattern(*shape, kind=kind)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    act = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu}[activation]
    expected, wanted = gradients(
        lambda x, w, b: act(F.conv2d(x, w * kept.mask, b, **kwargs)), input, weight, bias
    )
    for algorithm in (*SPARSE, "dense"):
        for dense in (True, False):
            actual, found = gradients(
                lambda x, w, b, algorithm=algorithm: masked_conv2d(
                    x, w, kept, b, **kwargs, activation=activation, algorithm=algorithm
                ),
                *(input, weight if dense else kept.gather(weight), bias),
            )
            check_close(actual, expected, tolerance, "value")
            check_close(found[0], wanted[0], tolerance, "input gradient")
            grad_weight = found[1] if dense else kept.scatter(found[1])
            check_close(grad_weight, wanted[1], tolerance, "weight gradient")
            check_close(found[2], wanted[2], tolerance, "bias gradient")


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_equals_masked_dense_for_every_mask_and_batch(kind, batch, isa):
    input = torch.randn(batch, 5, 6, 7, dtype=torch.float64)
    compare(input, (9, 5, 3, 3), kind, activation="gelu", padding=1)


@pytest.mark.parametrize(
    "size", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 9), (7, 7), (8, 8), (11, 17), (1, 40), (23, 2)]
)
def test_images_of_any_size(size, isa):
    input = torch.randn(5, 2, *size, dtype=torch.float64)
    compare(input, (3, 2, 3, 3), padding=1, activation="relu")


def test_images_are_cut_into_bands(isa):
    input = torch.randn(2, 16, 130, 127, dtype=torch.float64)
    compare(input, (2, 16, 3, 3), padding=1, tolerance=1e-10)
    compare(input, (2, 8, 3, 3), stride=2, groups=2, tolerance=1e-10)


def test_channels_are_cut_into_blocks(isa):
    input = torch.randn(9, 60, 12, 9, dtype=torch.float64)
    compare(input, (33, 60, 3, 3), "skewed", padding=1, tolerance=1e-10)


CONVOLUTIONS = {
    "1x1": ((4, 6, 1, 1), {}),
    "1x1_stride": ((4, 6, 1, 1), {"stride": (2, 3)}),
    "wide_kernel": ((4, 6, 1, 5), {"padding": (0, 2)}),
    "even_kernel": ((4, 6, 4, 2), {"padding": (3, 1)}),
    "even_kernel_same": ((4, 6, 4, 2), {"padding": "same"}),
    "valid": ((4, 6, 3, 3), {"padding": "valid"}),
    "stride_two": ((4, 6, 3, 3), {"stride": 2, "padding": 1}),
    "stride_beyond_kernel": ((4, 6, 2, 2), {"stride": 3}),
    "uneven_stride": ((4, 6, 3, 3), {"stride": (1, 3), "padding": (1, 0)}),
    "dilation": ((4, 6, 3, 3), {"dilation": 2, "padding": 2}),
    "dilation_and_stride": ((4, 6, 3, 2), {"dilation": (2, 3), "stride": (3, 2), "padding": 1}),
    "padding_beyond_kernel": ((4, 6, 2, 2), {"padding": 3}),
    "groups": ((4, 3, 3, 3), {"groups": 2, "padding": 1}),
    "groups_and_stride": ((6, 2, 3, 3), {"groups": 3, "stride": 2, "padding": (0, 1)}),
    "depthwise": ((12, 1, 3, 3), {"groups": 6}),
    "whole_image": ((4, 6, 9, 10), {}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_kind_of_convolution(name, isa):
    shape, kwargs = CONVOLUTIONS[name]
    compare(torch.randn(5, 6, 9, 10, dtype=torch.float64), shape, **kwargs)


def draw(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


@pytest.mark.parametrize("seed", range(40))
def test_random_convolutions(seed):
    """Seeded random shapes and parameters, whatever they combine to."""
    generator = torch.Generator().manual_seed(seed)

    def two(low: int, high: int) -> tuple[int, int]:
        return draw(generator, low, high), draw(generator, low, high)

    groups, kernel = draw(generator, 1, 3), two(1, 4)
    shape = (groups * draw(generator, 1, 9), draw(generator, 1, 9), *kernel)
    kwargs = {"stride": two(1, 3), "padding": two(0, 3), "dilation": two(1, 3), "groups": groups}
    least = [d * (k - 1) + 1 for d, k in zip(kwargs["dilation"], kernel, strict=True)]
    size = [n + draw(generator, 0, 20) for n in least]
    images = (draw(generator, 1, 18), shape[1] * groups, *size)
    input = torch.randn(images, generator=generator, dtype=torch.float64)
    if draw(generator, 0, 1):
        input = input.contiguous(memory_format=torch.channels_last)
    kind = MASKS[draw(generator, 0, len(MASKS) - 1)]
    activation = ("none", "relu", "gelu")[draw(generator, 0, 2)]
    compare(input, shape, kind, 1e-11, activation, **kwargs)


@pytest.mark.parametrize("batch", [3, 20])
def test_same_bits_for_any_thread_count_where_threads_are_used(batch):
    kept = pattern(48, 40, 3, 3)
    input, weight, bias = torch.randn(batch, 40, 9, 9), torch.randn(48, 40, 3, 3), torch.randn(48)
    threads = torch.get_num_threads()
    for algorithm in SPARSE:
        runs = []
        try:
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                output, found = gradients(
                    lambda x, w, b, algorithm=algorithm: masked_conv2d(
                        x, w, kept, b, padding=1, activation="relu", algorithm=algorithm
                    ),
                    *(input, weight, bias),
                )
                runs.append([output, *found])
        finally:
            torch.set_num_threads(threads)
        expected = F.relu(F.conv2d(input, weight * kept.mask, bias, padding=1))
        check_close(runs[0][0], expected, 1e-4, "value")
        for run in runs[1:]:
            for a, b in zip(run, runs[0], strict=True):
                assert torch.equal(a, b)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "image_innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every_other_pixel": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "every_other_channel": lambda t: torch.stack([t, t + 1], 2).flatten(1, 2)[:, ::2],
    "expanded_images": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_the_same_bits_as_contiguous(layout, algorithm, dtype, isa):
    kept = pattern(11, 10, 3, 3)
    input, weight = torch.randn(9, 10, 6, 7, dtype=dtype), torch.randn(11, 10, 3, 3, dtype=dtype)
    grad_output = torch.randn(9, 11, 6, 7, dtype=dtype)
    strided = [LAYOUTS[layout](t) for t in (input, weight, grad_output)]
    results = []
    for x, w, g in (strided, [t.contiguous() for t in strided]):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        output = masked_conv2d(x, w, kept, padding=1, activation="relu", algorithm=algorithm)
        results.append([output, *torch.autograd.grad(output, (x, w), g)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("algorithm", [*SPARSE, "dense"])
def test_results_lie_in_memory_as_the_input(algorithm):
    kept, weight = pattern(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        input = torch.randn(2, 4, 6, 7).contiguous(memory_format=layout).requires_grad_()
        output = masked_conv2d(input, weight, kept, algorithm=algorithm)
        assert output.is_contiguous(memory_format=layout)
        (found,) = torch.autograd.grad(output.square().sum(), input)
        assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("algorithm", [*SPARSE, "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_the_weight_holds_off_the_mask_is_never_seen(algorithm, bad):
    kept = pattern(6, 3, 3, 3)
    weight = torch.randn(6, 3, 3, 3).masked_fill(~kept.mask, bad).requires_grad_()
    input = torch.randn(2, 3, 5, 5, requires_grad=True)
    output = masked_conv2d(input, weight, kept, algorithm=algorithm)
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
    (expected,) = torch.autograd.grad(F.relu(F.conv2d(input, masked)).square().sum(), masked)
    output = masked_conv2d(
        input, weight, kept, activation="relu", dense_grad=True, algorithm=algorithm
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
    geometry = op._geometry(kept, 1, 1, 1, 1)
    size = 8, 9, 9
    assert op.choose(kept, geometry, "native", (1, *size), None) == ("plane",) * 3
    assert op.choose(kept, geometry, "native", (64, *size), None) == ("batch",) * 3
    assert op.choose(kept, geometry, "reference", (64, *size), None) == ("dense",) * 3
    full = pattern(8, 8, 3, 3, kind="full")
    assert op.choose(full, geometry, "native", (64, *size), None) == ("dense",) * 3
    assert op.choose(full, geometry, "native", (64, *size), None, "plane") == ("plane",) * 3


def test_depthwise_runs_dense():
    kept = pattern(8, 1, 3, 3)
    geometry = op._geometry(kept, 1, 1, 1, 8)
    assert op.choose(kept, geometry, "native", (64, 8, 9, 9), None) == ("dense",) * 3


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
        ({"algorithm": "fast"}, ValueError, "plane, batch, dense, got 'fast'"),
        ({"weight": torch.zeros(108), "dense_grad": True}, ValueError, "values of shape"),
        ({"algorithm": "plane", "backend": "reference"}, RuntimeError, "got 'reference'"),
        ({"backend": "triton"}, RuntimeError, "only native, reference"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        masked_conv2d(**{**GOOD, **change})


def test_sparse_algorithms_are_refused_where_the_backend_is_forced_to_reference():
    with use_backend("reference"), pytest.raises(RuntimeError, match="needs the native backend"):
        masked_conv2d(**GOOD, algorithm="batch")
