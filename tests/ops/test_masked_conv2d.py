import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import OpSpec, OpSuite, check_close
from tests.ops.test_masked_linear import make_mask
from tscnc_kernels import SparsityPattern, _conv_algorithms, masked_conv2d
from tscnc_kernels._conv_geometry import pattern_geometry
from tscnc_kernels.ops import masked_conv2d as op

MASKS = ["random", "full", "none", "empty_rows", "empty_columns", "one_row", "skewed"]
SPARSE = ["plane", "batch", "direct"]


def runnable(kept, input, stride=1, padding=0, dilation=1, groups=1):
    """The sparse algorithms that can compute a convolution."""
    geometry = pattern_geometry(kept, stride, padding, dilation, groups)
    keeps = _conv_algorithms.keeps_size(geometry, input.shape)
    return [name for name in SPARSE if keeps or name != "direct"]


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
            (
                *(grad_output, none, input, weight, *kept.tensors[1:], geometry),
                *(0, 0, 1, False, True, True, True),
            ),
        ),
        (
            backward,
            (
                *(grad_output, grad_output, last, kept.gather(weight), *kept.tensors[1:], geometry),
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


@pytest.mark.parametrize("algorithm", ["plane", "batch"])
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
    for algorithm in (*runnable(kept, input, **kwargs), "dense"):
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
