import math

import pytest
import torch
from torch.nn import functional

from benchmarks.spectra import gaussian
from tests.op_suite import check_close
from tscnc_kernels import _convolution, _symbol_search, use_backend
from tscnc_kernels._spectral import CAP_REACHED, RANK_DEFICIENT
from tscnc_kernels.ops.conv_singular_values import conv_singular_values


def kernel_of(*shape, seed=0, dtype=torch.float64):
    return gaussian(shape[0], math.prod(shape[1:]), seed, dtype).reshape(shape)


def operator(kernel, size, padding="circular", stride=1, groups=1):
    """The operator as a matrix, by convolving every unit image."""
    inputs, (h, w) = kernel.shape[1] * groups, size
    units = torch.eye(inputs * h * w, dtype=kernel.dtype).reshape(-1, inputs, h, w)
    rows, cols = kernel.shape[2:]
    if padding == "zeros":
        border = (rows // 2, cols // 2)
        return functional.conv2d(
            units, kernel, stride=stride, padding=border, groups=groups
        ).flatten(1)
    wrapped = units.repeat(1, 1, 1 + -(-rows // h), 1 + -(-cols // w))
    wrapped = wrapped[:, :, : h + rows - 1, : w + cols - 1]
    return functional.conv2d(wrapped, kernel, stride=stride, groups=groups).flatten(1)


def ends(matrix):
    values = torch.linalg.svdvals(matrix)
    return values[0], values[-1]


# Shape of the kernel, size, stride, groups.
CIRCULAR = {
    "square": ((4, 3, 3, 3), (6, 6), 1, 1),
    "wide, odd size": ((3, 5, 3, 3), (7, 6), 1, 1),
    "strides, groups, even kernel": ((4, 2, 5, 2), (6, 9), (3, 3), 2),
    "depthwise": ((6, 1, 3, 3), (4, 4), 1, 6),
    "kernel larger than the image": ((4, 2, 7, 7), (4, 4), 2, 1),
    "kernel as large as the image": ((3, 3, 7, 7), (7, 7), 1, 1),
    "1 x 1 kernel": ((2, 2, 1, 1), (3, 3), 1, 1),
    "1 x 1 image": ((2, 2, 2, 2), (1, 1), 1, 1),
    "two strides": ((6, 3, 3, 3), (8, 6), (2, 1), 1),
    "one channel": ((1, 1, 3, 3), (5, 8), 1, 1),
}
ZEROS = {
    "square": ((4, 3, 3, 3), (6, 6), 1, 1),
    "strides do not divide": ((4, 2, 5, 3), (7, 5), (2, 3), 1),
    "depthwise": ((4, 1, 3, 3), (4, 6), 1, 4),
    "kernel larger than the image": ((2, 2, 7, 7), (4, 3), 1, 1),
}
CASES = [
    *[pytest.param("circular", *case, id=f"circular: {name}") for name, case in CIRCULAR.items()],
    *[pytest.param("zeros", *case, id=f"zeros: {name}") for name, case in ZEROS.items()],
]


@pytest.mark.parametrize(("padding", "shape", "size", "stride", "groups"), CASES)
def test_values_gradients_and_intervals_are_the_operators(padding, shape, size, stride, groups):
    kernel = kernel_of(*shape).requires_grad_()
    found = conv_singular_values(kernel, size, padding, stride, groups, certify=True)
    largest, smallest = ends(operator(kernel, size, padding, stride, groups))
    assert found.sigma_max.item() == pytest.approx(largest.item(), rel=1e-12)
    assert found.sigma_min.item() == pytest.approx(smallest.item(), rel=1e-9)
    for value, exact in ((found.sigma_max, largest), (found.sigma_min, smallest)):
        gradients = [torch.autograd.grad(v, kernel, retain_graph=True)[0] for v in (value, exact)]
        check_close(*gradients, 1e-8, "gradient")
    kappa = largest / smallest
    for interval, exact in zip(found.bounds, (largest, smallest, kappa), strict=True):
        lower, upper = interval.tolist()
        assert lower <= exact.item() * (1 + 1e-14) and exact.item() * (1 - 1e-14) <= upper
        assert upper - lower <= 1e-3 * upper
    assert found.flags.item() == 0


# Shape of the kernels (groups, out, in, rows, cols), grid.
SCREENED = {
    "square": ((1, 20, 20, 3, 3), (7, 8)),
    "tall": ((2, 19, 5, 3, 1), (6, 5)),
    "wide, groups": ((3, 4, 9, 2, 4), (10, 9)),
    "one channel": ((5, 1, 1, 3, 3), (8, 8)),
    "more than a strip": ((1, 33, 40, 1, 2), (3, 4)),
}


@pytest.mark.parametrize(("shape", "grid"), SCREENED.values(), ids=SCREENED)
def test_native_screening_finds_the_ends_of_every_symbol(isa, shape, grid):
    kernels = kernel_of(*shape)
    blocks = _symbol_search.Symbols(kernels, _convolution.half_spectrum(grid), grid)
    grams = _symbol_search.gram_symbols(blocks)
    assert grams is not None
    waves = blocks.waves(blocks.frequencies)[:, None]
    values = torch.linalg.svdvals(torch.complex(*_convolution.symbols(kernels, waves)))
    found = torch.stack(_symbol_search.screen_all(blocks, grams)[:2])
    check_close(found, torch.stack([values[..., 0], values[..., -1]]).flatten(1), 1e-10, "ends")
    places = torch.tensor([3, 0, 3, blocks.shape[1] * shape[0] - 1])
    some = torch.ops.tscnc_kernels.symbol_extremes(grams.terms, grams.waves, places, grams.n)
    assert torch.equal(some, found[:, places])
    bounds = _symbol_search.step_bounds(kernels, grams, blocks.shape[1])
    schatten = values.pow(4).sum(dim=-1).pow(0.25).flatten()
    assert (bounds >= schatten).all() and (bounds <= 1.05 * schatten).all()


def test_native_screening_of_extreme_kernels(isa):
    def ends_of(kernel, size):
        found = conv_singular_values(kernel, size)
        return found.sigma_max.item(), found.sigma_min.item()

    delta = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    delta[range(4), range(4), 1, 1] = 3.0
    assert ends_of(delta, 8) == pytest.approx((3.0, 3.0), rel=1e-12)
    assert ends_of(torch.zeros(4, 4, 3, 3), 8) == (0.0, 0.0)
    constant = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    assert ends_of(constant, 9) == pytest.approx((9.0, 0.0), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("step", [0.0, 1e-3, 1e-1])
def test_backends_agree(step):
    kernel = kernel_of(6, 4, 3, 3)
    state = conv_singular_values(kernel, (8, 10), stride=2).state
    moved = kernel + step * kernel_of(6, 4, 3, 3, seed=1)
    for warm in (None, state):
        native = conv_singular_values(moved, (8, 10), stride=2, state=warm)
        with use_backend("reference"):
            reference = conv_singular_values(moved, (8, 10), stride=2, state=warm)
        assert native.sigma_max.item() == pytest.approx(reference.sigma_max.item(), rel=1e-9)
        assert native.sigma_min.item() == pytest.approx(reference.sigma_min.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("terms", "waves", "places", "message"),
    [
        (torch.zeros(1, 1, 1, 2, 4), torch.zeros(2, 3, 1), torch.zeros(1).int(), "int64"),
        (torch.zeros(1, 1, 1, 2, 4), torch.zeros(2, 3, 1), torch.tensor([3]), "place 3"),
        (torch.zeros(1, 1, 1, 2, 4), torch.zeros(2, 3, 1), torch.tensor([-1]), "place -1"),
        (torch.zeros(1, 2, 1, 2, 4), torch.zeros(2, 3, 1), torch.tensor([0]), "gram_terms"),
        (torch.zeros(1, 1, 1, 2, 4), torch.zeros(2, 3, 2), torch.tensor([0]), "gram_terms"),
    ],
)
def test_the_raw_op_refuses_what_would_read_outside(terms, waves, places, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tscnc_kernels.symbol_extremes(terms.double(), waves.double(), places, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", ["circular", "zeros"])
def test_low_precision_kernels_are_taken_as_stored(padding, dtype):
    kernel = kernel_of(4, 4, 3, 3, dtype=dtype)
    found = conv_singular_values(kernel, 5, padding)
    largest, smallest = ends(operator(kernel.double(), (5, 5), padding))
    assert found.sigma_max.dtype == found.sigma_min.dtype == torch.float32
    assert found.sigma_max.item() == pytest.approx(largest.item(), rel=1e-6)
    assert found.sigma_min.item() == pytest.approx(smallest.item(), rel=1e-6)


@pytest.mark.parametrize("padding", ["circular", "zeros"])
def test_derivatives_of_first_and_second_order(padding):
    kernel = kernel_of(2, 2, 3, 3).requires_grad_()

    def function(k):
        found = conv_singular_values(k, 4, padding)
        return found.sigma_max, found.sigma_min

    assert torch.autograd.gradcheck(function, kernel, atol=1e-5)
    assert torch.autograd.gradgradcheck(function, kernel, atol=1e-4)


def test_shift_of_the_image_has_all_singular_values_1():
    kernel = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    kernel[range(3), [2, 0, 1], 0, 1] = 2.0
    kernel.requires_grad_()
    found = conv_singular_values(kernel, 6)
    assert found.sigma_max.item() == pytest.approx(2.0, rel=1e-12)
    assert found.sigma_min.item() == pytest.approx(2.0, rel=1e-12)
    gradient = torch.autograd.grad(found.sigma_max, kernel)[0]
    # All are tied: the mean over a block, and ⟨K, ∂σ⟩ = σ.
    assert (gradient * kernel.detach()).sum().item() == pytest.approx(2.0, rel=1e-12)


def test_the_groups_are_operators_of_their_own():
    kernel = torch.cat([kernel_of(3, 2, 3, 3), 5 * kernel_of(3, 2, 3, 3, seed=1)])
    parts = [conv_singular_values(part, 6) for part in kernel.chunk(2)]
    both = conv_singular_values(kernel, 6, groups=2)
    largest = max(part.sigma_max.item() for part in parts)
    smallest = min(part.sigma_min.item() for part in parts)
    assert both.sigma_max.item() == pytest.approx(largest, rel=1e-12)
    assert both.sigma_min.item() == pytest.approx(smallest, rel=1e-12)


@pytest.mark.parametrize("kappa", [1e4, 1e6])
def test_smallest_singular_value_of_an_ill_conditioned_operator(kappa):
    kernel = kernel_of(5, 5, 3, 3)
    kernel[2] /= kappa
    found = conv_singular_values(kernel, (6, 5))
    smallest = ends(operator(kernel, (6, 5)))[1].item()
    assert found.sigma_min.item() == pytest.approx(smallest, rel=1e-6)


@pytest.mark.parametrize("step", [1e-6, 1e-3, 1e-1, 3.0])
def test_warm_start_is_as_exact_as_a_cold_one(step):
    kernel = kernel_of(5, 5, 3, 3, seed=3)
    found = conv_singular_values(kernel, (9, 8))
    for seed in range(6):
        kernel = kernel + step * kernel_of(5, 5, 3, 3, seed=10 + seed)
        before = found.state.clone()
        warm = conv_singular_values(kernel, (9, 8), state=found.state)
        assert torch.equal(found.state, before)
        cold = conv_singular_values(kernel, (9, 8))
        assert warm.sigma_max.item() == pytest.approx(cold.sigma_max.item(), rel=1e-5)
        assert warm.sigma_min.item() == pytest.approx(cold.sigma_min.item(), rel=1e-5)
        found = warm


def test_warm_start_of_nan_finds_all():
    kernel = kernel_of(3, 3, 3, 3)
    cold = conv_singular_values(kernel, 12)
    warm = conv_singular_values(kernel, 12, state=cold.state * math.nan)
    assert warm.sigma_max == cold.sigma_max and warm.sigma_min == cold.sigma_min


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_warm_start_looks_at_few_frequencies(monkeypatch, backend):
    kernel = kernel_of(4, 4, 3, 3)
    counts = []
    whole = _symbol_search.screen_warm

    def counted(*args):
        intervals, exact = whole(*args)
        counts.append(exact.sum().item())
        return intervals, exact

    monkeypatch.setattr("tscnc_kernels.ops.conv_singular_values.screen_warm", counted)
    with use_backend(backend):
        state = conv_singular_values(kernel, 32).state
        for seed in range(4):
            kernel = kernel + 1e-4 * kernel_of(4, 4, 3, 3, seed=seed)
            state = conv_singular_values(kernel, 32, state=state).state
    assert len(counts) == 4 and 0 < max(counts) < (32 * 32 // 2 + 2) / 4


def direct_kernel_gram(kernel, steps):
    """The bound by correlating the kernel with itself, which the op does in Fourier space."""
    if kernel.shape[0] > kernel.shape[1]:
        kernel = kernel.transpose(0, 1).flip(2, 3)
    for _ in range(steps):
        border = (kernel.shape[2] - 1, kernel.shape[3] - 1)
        kernel = functional.conv2d(kernel, kernel, padding=border)
    return kernel.abs().sum(dim=(1, 2, 3)).max() ** (0.5**steps)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (2, 6, 5, 3), (3, 3, 1, 1), (1, 1, 3, 3)])
def test_kernel_gram_bound_is_the_correlations(shape):
    kernel = kernel_of(*shape)
    bounds = []
    for steps in (1, 2, 3, 4):
        bounds.append(_convolution.kernel_gram_bound(kernel[None], steps).item())
        exact = direct_kernel_gram(kernel, steps).item()
        assert exact <= bounds[-1] <= exact * (1 + 1e-8)
    assert bounds == sorted(bounds, reverse=True)
    largest = ends(operator(kernel, (12, 12)))[0].item()
    assert bounds[-1] >= largest


def test_large_zero_padded_operators_are_bounded_from_above():
    kernel = kernel_of(3, 5, 3, 3).requires_grad_()
    found = conv_singular_values(kernel, 200, "zeros", certify=True)
    for size in (1, 3, 6, 9):
        exact = ends(operator(kernel.detach(), (size, size), "zeros"))[0]
        assert found.sigma_max.item() >= exact.item()
    assert found.sigma_max.item() <= direct_kernel_gram(kernel.detach(), 3).item() * (1 + 1e-8)
    assert found.sigma_min.isnan() and found.flags.item() == CAP_REACHED
    assert found.bounds.sigma_max.tolist() == [0.0, found.sigma_max.item()]
    assert found.bounds.kappa.tolist() == [1.0, math.inf]
    few = kernel_of(2, 1, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: _convolution.kernel_gram_bound(k[None], 2), few)
    assert torch.autograd.grad(found.sigma_max, kernel)[0].isfinite().all()


@pytest.mark.parametrize(("shape", "size", "stride", "groups"), ZEROS.values(), ids=ZEROS)
def test_kernel_gram_bound_holds_with_strides_and_groups(shape, size, stride, groups):
    for seed in range(5):
        kernel = kernel_of(*shape, seed=seed)
        step = stride if isinstance(stride, tuple) else (stride, stride)
        bounds = _convolution.kernel_gram_bound(_convolution.split(kernel, groups, step), 4)
        exact = ends(operator(kernel, size, "zeros", stride, groups))[0]
        assert bounds.shape == (groups,) and bounds.amax() >= exact


def test_the_bound_takes_the_smaller_channel_side():
    kernel = kernel_of(2, 9, 3, 3)
    adjoint = kernel.transpose(0, 1).flip(2, 3)
    values = [conv_singular_values(k, 100, "zeros").sigma_max.item() for k in (kernel, adjoint)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_zero_padding_is_below_the_larger_circle():
    kernel = kernel_of(3, 3, 3, 3)
    for size in (3, 5, 8):
        padded = conv_singular_values(kernel, size, "zeros").sigma_max
        assert padded <= conv_singular_values(kernel, size + 2).sigma_max * (1 + 1e-12)


def test_a_kernel_of_zeros_and_a_dead_channel_are_rank_deficient():
    kernel = kernel_of(3, 3, 3, 3)
    kernel[1] = 0
    for padding in ("circular", "zeros"):
        found = conv_singular_values(kernel, 4, padding, certify=True)
        assert found.sigma_min == 0 and found.flags.item() & RANK_DEFICIENT
        assert found.bounds.kappa[1].item() == math.inf
        nothing = conv_singular_values(torch.zeros(3, 3, 3, 3), 4, padding)
        assert nothing.sigma_max == 0 and nothing.sigma_min == 0
    assert conv_singular_values(torch.zeros(3, 3, 3, 3), 100, "zeros").sigma_max == 0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize(("padding", "size"), [("circular", 4), ("zeros", 4), ("zeros", 200)])
def test_size_of_the_weights_does_not_matter(padding, size, scale):
    kernel = kernel_of(3, 3, 3, 3)
    expected = conv_singular_values(kernel, size, padding)
    found = conv_singular_values(kernel * scale, size, padding, state=None)
    assert found.sigma_max.item() / scale == pytest.approx(expected.sigma_max.item(), rel=1e-9)
    if size == 4:
        assert found.sigma_min.item() / scale == pytest.approx(expected.sigma_min.item(), rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("padding", "size"), [("circular", 4), ("zeros", 4), ("zeros", 200)])
def test_non_finite_kernels_give_nan(padding, size, bad):
    kernel = torch.ones(3, 3, 3, 3)
    kernel[0, 1, 2, 0] = bad
    kernel.requires_grad_()
    found = conv_singular_values(kernel, size, padding, certify=True)
    assert found.sigma_max.isnan() and found.sigma_min.isnan()
    assert found.bounds.sigma_max.isnan().all()
    assert torch.autograd.grad(found.sigma_max, kernel)[0].isnan().all()


@pytest.mark.parametrize("padding", ["circular", "zeros"])
def test_same_bits_twice_compiled_and_under_autocast(padding):
    kernel = kernel_of(3, 3, 3, 3, dtype=torch.float32)
    first = conv_singular_values(kernel, 6, padding)
    assert torch.equal(conv_singular_values(kernel, 6, padding).state, first.state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv_singular_values(kernel, 6, padding).sigma_min, first.sigma_min)
    torch._dynamo.reset()
    compiled = torch.compile(conv_singular_values, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(kernel, 6, padding).sigma_min, first.sigma_min)


def test_vmap_of_grad_is_the_gradient_of_each():
    batch = torch.stack([kernel_of(2, 2, 3, 3, seed=seed) for seed in range(3)])

    def largest(kernel):
        return conv_singular_values(kernel, 4).sigma_max

    mapped = torch.func.vmap(torch.func.grad(largest))(batch)
    for kernel, gradient in zip(batch, mapped, strict=True):
        leaf = kernel.clone().requires_grad_()
        check_close(gradient, torch.autograd.grad(largest(leaf), leaf)[0], 1e-9, "gradient")


KERNEL = torch.ones(4, 2, 3, 3)


@pytest.mark.parametrize(
    ("kernel", "size", "options", "error", "message"),
    [
        ([1.0], 4, {}, TypeError, "got list"),
        (KERNEL.int(), 4, {}, TypeError, "got torch.int32"),
        (torch.ones(3, 3), 4, {}, ValueError, r"got shape \(3, 3\)"),
        (torch.ones(0, 2, 3, 3), 4, {}, ValueError, r"got shape \(0, 2, 3, 3\)"),
        (KERNEL, 4, {"padding": "same"}, ValueError, "got 'same'"),
        (KERNEL, 4.0, {}, TypeError, "input_size to be an int or two of them, got 4.0"),
        (KERNEL, True, {}, TypeError, "got True"),
        (KERNEL, (4, 4, 4), {}, ValueError, r"got \(4, 4, 4\)"),
        (KERNEL, 0, {}, ValueError, "at least 1, got 0"),
        (KERNEL, 4, {"stride": (1, -1)}, ValueError, r"stride .* got \(1, -1\)"),
        (KERNEL, 4, {"stride": 3}, ValueError, r"stride divides, got \(4, 4\) and \(3, 3\)"),
        (KERNEL, 4, {"groups": 3}, ValueError, "4 output channels, got 3"),
        (KERNEL, 4, {"groups": 1.0}, TypeError, "got float"),
        (torch.ones(4, 2, 2, 2), 4, {"padding": "zeros"}, ValueError, "odd kernel"),
        (KERNEL, 4, {"state": torch.zeros(3)}, TypeError, "got torch.float32"),
        (KERNEL, 4, {"state": torch.zeros(3).double()}, ValueError, r"got \(3,\)"),
        (KERNEL, 4, {"padding": "zeros", "state": torch.zeros(3).double()}, ValueError, r"\(4, "),
        (KERNEL, 99, {"padding": "zeros", "state": KERNEL.double()}, ValueError, r"shape \(0,\)"),
    ],
)
def test_bad_input_is_named(kernel, size, options, error, message):
    with pytest.raises(error, match=message):
        conv_singular_values(kernel, size, **options)
