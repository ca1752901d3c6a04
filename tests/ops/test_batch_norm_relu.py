import math

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import OpSpec, OpSuite, check_close
from tscnc_kernels.ops.batch_norm_relu import batch_norm_relu, reference

BACKENDS = ["native", "reference"]


class Statistics:
    """Hides running statistics from the suite, which differentiates every tensor it finds."""

    def __init__(self, mean: list[float], variance: list[float]) -> None:
        self.values = mean, variance

    def like(self, tensor):
        return [torch.tensor(v, dtype=tensor.dtype, device=tensor.device) for v in self.values]


def public(input, weight=None, bias=None, given=None, **kwargs):
    running = (None, None) if given is None else given.like(input)
    return batch_norm_relu(input, *running, weight, bias, given is None, **kwargs)


def exact(input, weight=None, bias=None, given=None, **kwargs):
    return reference(input, weight, bias, *(() if given is None else given.like(input)), **kwargs)


GIVEN = Statistics([0.3, -0.2, 1.0], [0.5, 2.0, 1.5])


def raw_calls():
    ops = torch.ops.tscnc_kernels
    x, g = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    w, b, mean, variance = torch.rand(3), torch.randn(3), torch.randn(3), torch.rand(3)
    exact_mean, exact_variance = mean.double(), variance.double()
    statistics = exact_mean, exact_variance, 1e-5
    return [
        (ops.batch_norm_relu.default, (x, w, b, None, None, 1e-5, True)),
        (ops.batch_norm_relu.default, (x, None, None, mean, variance, 1e-5, False)),
        (ops.batch_norm_relu_backward.default, (g, x, w, b, *statistics, True, True, True, True)),
        (
            ops.batch_norm_relu_backward.default,
            (g, x, None, None, *statistics, False, False, False, False),
        ),
    ]


class TestBatchNormReLU(OpSuite):
    spec = OpSpec(
        name="batch_norm_relu",
        public=public,
        reference=exact,
        samples={
            "planes": lambda make: ((make(3, 3, 5, 7), make(3), make(3)), {}),
            "short_planes": lambda make: ((make(4, 3, 2, 2), make(3), make(3)), {}),
            "features": lambda make: ((make(9, 3), make(3), make(3)), {}),
            "odd": lambda make: ((make(2, 2, 37),), {}),
            "no_relu": lambda make: ((make(4, 3, 5), make(3), make(3)), {"relu": False}),
            "given": lambda make: ((make(2, 3, 33), make(3), make(3)), {"given": GIVEN}),
            "given_rows": lambda make: ((make(4, 3), make(3), make(3)), {"given": GIVEN}),
        },
        raw_calls=raw_calls,
        # The gradient of the input is a difference of terms up to three times its size.
        tolerances={torch.float16: 4e-3, torch.bfloat16: 3e-2},
    )


def close_to_torch(x, g, tolerance, relu=True, layout=None):
    """Output, gradients and running statistics against float64."""
    channels = x.shape[1]
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    results = []
    for function, kind in ((batch_norm_relu, x.dtype), (F.batch_norm, torch.float64)):
        inputs = [t.detach().clone().to(kind).requires_grad_() for t in (x, weight, bias)]
        running = torch.full((channels,), 0.5).to(kind), torch.full((channels,), 2.0).to(kind)
        y = function(inputs[0], *running, *inputs[1:], True, 0.2, 1e-3)
        if function is F.batch_norm and relu:
            y = F.relu(y)
        gradients = torch.autograd.grad(y, inputs, g.to(kind))
        results.append((y, *running, *gradients))
    for name, ours, theirs in zip(
        ("y", "running_mean", "running_var", "dx", "dw", "db"), *results, strict=True
    ):
        scale = max(1.0, theirs.abs().max().item())
        check_close(ours / scale, theirs / scale, tolerance, name)
    return results[0]


SHAPES = [
    (4, 3, 5, 7),
    (2, 5, 33, 31),
    (3, 4, 2, 2),
    (130, 3, 1, 1),
    (7, 9),
    (2, 3, 5000),
    (5, 2, 3, 4, 5),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_keeps_its_own(shape, isa):
    x, g = torch.randn(shape), torch.randn(shape)
    y, *_, dx, _, _ = close_to_torch(x, g, 1e-5)
    assert y.is_contiguous() and dx.is_contiguous()
    if len(shape) == 2:
        across = torch.empty(shape[::-1]).t().copy_(x)
    else:
        across = torch.empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1).copy_(x)
    y, *_, dx, _, _ = close_to_torch(across, g, 1e-5)
    assert y.stride() == across.stride() and dx.stride() == across.stride()
    close_to_torch(x.flip(1)[:, ::2], g[:, ::2], 1e-5)


@pytest.mark.parametrize("layout", ["planes", "rows", "feature_major"])
@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_a_mean_far_above_the_deviation_costs_no_digits(mean, layout, isa):
    shape = {"planes": (16, 3, 20, 20), "rows": (6000, 3), "feature_major": (3, 6000)}[layout]
    x = torch.randn(shape) + mean
    x = x.t() if layout == "feature_major" else x
    # The samples themselves are multiples of 2^-7 at a mean of 1e5; float64 sees the same ones.
    close_to_torch(x, torch.randn(x.shape), 2e-5)


@pytest.mark.parametrize("shape", [(64, 2, 40, 8), (5000, 2)], ids=str)
def test_outliers_and_trends_keep_the_variance(shape, isa):
    x = torch.randn(shape)
    x[0] += 1e4
    close_to_torch(x, torch.randn(shape), 2e-5)
    close_to_torch(
        x + torch.linspace(0, 1e4, shape[0]).reshape(-1, *(1,) * (len(shape) - 1)),
        torch.randn(shape),
        2e-5,
    )


def test_many_rows_and_wide_rows(isa):
    close_to_torch(torch.randn(9001, 5), torch.randn(9001, 5), 2e-5)
    close_to_torch(torch.randn(6, 1031), torch.randn(6, 1031), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_worked_values(backend):
    # Per channel the mean is 2 and the variance 1; then 1 and 4.
    x = torch.tensor([[1.0, -1.0], [3.0, 3.0]], dtype=torch.float64, requires_grad=True)
    weight, bias = torch.tensor([2.0, 0.5]).double(), torch.tensor([0.5, 1.0]).double()
    running = torch.zeros(2).double(), torch.ones(2).double()
    y = batch_norm_relu(x, *running, weight, bias, True, 0.5, 0.0, backend=backend)
    assert y.flatten().tolist() == pytest.approx([0.0, 0.5, 2.5, 1.5])
    assert running[0].tolist() == pytest.approx([1.0, 0.5])
    assert running[1].tolist() == pytest.approx([1.5, 4.5])
    # With two samples normalisation leaves their order alone: no gradient passes.
    (gradient,) = torch.autograd.grad(y[1, 1], x)
    assert gradient.flatten().tolist() == pytest.approx([0.0] * 4)
    fixed = batch_norm_relu(x, *running, weight, bias, False, eps=0.0, backend=backend)
    (gradient,) = torch.autograd.grad(fixed.sum(), x)
    scales = 2 / math.sqrt(1.5), 0.5 / math.sqrt(4.5)
    assert fixed[1].tolist() == pytest.approx([2 * scales[0] + 0.5, 2.5 * scales[1] + 1])
    assert gradient.flatten().tolist() == pytest.approx([scales[0], scales[1]] * 2)


def test_saves_the_input_and_two_numbers_per_channel():
    x = torch.randn(8, 4, 16, 16, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        batch_norm_relu(x, None, None, training=True)
    assert sorted(sizes) == [4, 4, x.numel()]


def test_parameters_may_have_another_dtype_than_the_input():
    x = torch.randn(6, 4, 5, 5).bfloat16().requires_grad_()
    weight, bias = torch.rand(4).requires_grad_(), torch.randn(4).requires_grad_()
    y = batch_norm_relu(x, None, None, weight, bias, True)
    gradients = torch.autograd.grad(y.float().sum(), (x, weight, bias))
    assert [t.dtype for t in (y, *gradients)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    expected = F.relu(F.batch_norm(x.float(), None, None, weight, bias, True))
    check_close(y, expected, 2e-2, "y")


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (3, 2)], ids=str)
def test_nan_stays_in_its_channel(shape, isa):
    x = torch.randn(shape)
    x[0, 0] = math.nan
    y = batch_norm_relu(x, None, None, training=True)
    assert y[:, 0].isnan().all() and y[:, 1].isfinite().all()


def test_a_constant_channel_is_its_bias(isa):
    x = torch.full((4, 2, 9), 1234.5, requires_grad=True)
    bias = torch.tensor([0.25, -0.25])
    y = batch_norm_relu(x, None, None, None, bias, True)
    assert torch.equal(y, torch.tensor([0.25, 0.0])[:, None].expand(4, 2, 9))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.abs().max() < 1e-3


def test_no_gradient_is_computed_that_is_not_wanted():
    x, weight = torch.randn(4, 3, 40, requires_grad=True), torch.ones(3, requires_grad=True)
    y = batch_norm_relu(x, None, None, weight, None, True)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (both, _) = torch.autograd.grad(y.square().sum(), (x, weight))
    assert torch.equal(gradient, both)


X, C = torch.randn(4, 3, 5), torch.ones(3)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((1.0, C, C), {}, TypeError, "input to be a tensor, got float"),
        ((X.int(), C, C), {}, TypeError, "got torch.int32"),
        ((X[0, 0], C, C), {}, ValueError, r"2 to 5 dimensions, got shape \(5,\)"),
        ((X, C[:2], C), {}, ValueError, r"running_mean of shape \(3,\), got \(2,\)"),
        ((X, C, C, C[:2]), {}, ValueError, r"weight of shape \(3,\), got \(2,\)"),
        ((X, C, C, C, C.to("meta")), {}, ValueError, "bias on the input's device cpu, got meta"),
        ((X, None, None), {}, ValueError, "without training, got None"),
        ((X, C, None), {"training": True}, ValueError, "running_mean and running_var, or neither"),
        ((X[:1, :, :1], C, C), {"training": True}, ValueError, "more than one value per channel"),
        ((X, C, C), {"momentum": 1.5}, ValueError, "momentum <= 1, got 1.5"),
        ((X, C, C), {"eps": -1e-5}, ValueError, "eps <= .* got -1e-05"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        batch_norm_relu(*args, **kwargs)
