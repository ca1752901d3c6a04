"""Random calls of the masked products and of SparsityPattern, shrunk to the smallest that fails.

The products are compared with float64 torch, each result within the rounding that its own sums can
reach: u n (|x| |W| + |b|) for n terms of unit roundoff u, and roundings to the stored dtype.
"""

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import runnable_isas
from tscnc_kernels import SparsityPattern, _conv_algorithms, masked_conv2d, masked_linear
from tscnc_kernels._build import C
from tscnc_kernels._conv_geometry import conv_geometry
from tscnc_kernels._masked_algorithms import ALGORITHMS
from tscnc_kernels.sparsity import remap

# The fixtures of every test (poisoned allocations) may stay as they are between examples.
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
# Round-off of the sums, and of a result that is stored.
ROUNDING = {
    torch.float64: (2**-53, 2**-53),
    torch.float32: (2**-24, 2**-24),
    torch.bfloat16: (2**-24, 2**-9),
    torch.float16: (2**-24, 2**-12),
}
SUBNORMAL = {torch.float16: 2**-24}
ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu}
# Bounds on the first and second derivatives of all three.
SLOPE, CURVATURE = 1.13, 0.8


def fuzz(examples: int) -> Callable:
    return settings(
        derandomize=True,
        deadline=None,
        max_examples=examples,
        database=None,
        suppress_health_check=QUIET,
    )


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    previous = C.active_isa()
    C.set_isa(name)
    try:
        yield
    finally:
        C.set_isa(previous)


# Rows, columns and batches around the kernels' panels, tiles and blocks, and far from them.
SIZES = st.one_of(st.integers(1, 20), st.integers(1, 300))
GENERATORS = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def masks(draw, rows: int, width: int) -> Tensor:
    generator, density = draw(GENERATORS), draw(st.sampled_from([0.02, 0.1, 0.3, 0.6, 1.0]))
    noise = torch.rand(rows, width, generator=generator)
    kind = draw(st.sampled_from(["random", "skewed", "gaps", "fan_in", "blocks", "none"]))
    if kind == "skewed":
        return noise < density * torch.linspace(0, 1, rows)[:, None] ** 4
    if kind == "gaps":
        kept_rows = torch.rand(rows, 1, generator=generator) < 0.5
        return (noise < density) & kept_rows & (torch.rand(width, generator=generator) < 0.5)
    if kind == "fan_in":
        least = noise.argsort(1)[:, : max(1, round(density * width))]
        return torch.zeros(rows, width, dtype=torch.bool).scatter(1, least, True)
    if kind == "blocks":
        height, across = draw(st.sampled_from([(4, 1), (4, 4), (16, 2), (8, 32)]))
        blocks = noise[::height, ::across] < density
        spread = blocks.repeat_interleave(height, 0).repeat_interleave(across, 1)
        return spread[:rows, :width]
    return noise < (0.0 if kind == "none" else density)


def every_other(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


def behind_an_entry(tensor: Tensor) -> Tensor:
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return room[1:].view(tensor.shape).copy_(tensor)


def reversed_storage(tensor: Tensor) -> Tensor:
    order = range(tensor.dim() - 1, -1, -1)
    return tensor.permute(*order).contiguous().permute(*order)


def last_dimension_inside(tensor: Tensor) -> Tensor:
    """Channels last, for images."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 1 else tensor


LAYOUTS = [torch.clone, every_other, behind_an_entry, reversed_storage, last_dimension_inside]


class Operands:
    """Input, weight, bias and pattern, printed in a few words."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __repr__(self) -> str:
        x, w, b, pattern = self.tensors
        strided = [None if t is None else (tuple(t.shape), t.stride()) for t in (x, w, b)]
        return f"{x.dtype} {strided} {pattern.shape} keeps {pattern.nnz}"


@st.composite
def operands(draw, input: tuple[int, ...], weight: tuple[int, ...], assume_masked: bool):
    """Input, weight (dense, or values of the mask), bias and pattern; other layouts too."""
    generator, dtype = draw(GENERATORS), draw(st.sampled_from(list(ROUNDING)))
    mask = draw(masks(weight[0], math.prod(weight[1:]))).reshape(weight)
    x, w, b = (
        draw(st.sampled_from(LAYOUTS))(torch.randn(size, generator=generator).to(dtype))
        for size in (input, weight, weight[:1])
    )
    # Whatever a dense weight holds off the mask.
    w = w.masked_fill(~mask, 0.0 if assume_masked else float("nan"))
    pattern = SparsityPattern.from_mask(mask)
    values = draw(st.booleans())
    return Operands(x, w[mask] if values else w, b if draw(st.booleans()) else None, pattern)


@st.composite
def options(draw, algorithms: tuple[str, ...]):
    return {
        "activation": draw(st.sampled_from(list(ACTIVATIONS))),
        "algorithm": draw(st.sampled_from([*algorithms, None])),
        "dense_grad": draw(st.booleans()),
        "assume_masked": draw(st.booleans()),
    }


def gradients(product, tensors, cotangent):
    return torch.autograd.grad(product(*tensors), tensors, cotangent)


def check(actual: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    excess = (actual.double() - expected).abs() - tolerance
    # A NaN is no excess that is at most zero.
    assert bool((excess <= 0).all()), f"{what} is wrong by up to {excess.max():.3g} too much"


def compare(op, product, x, w, b, pattern, settings, layout) -> None:
    """The op and its gradients against `product`, torch's op, on W ∘ M in float64."""
    settings["dense_grad"] &= w.dim() > 1
    unit, stored = ROUNDING[x.dtype]
    smallest = SUBNORMAL.get(x.dtype, 0.0)
    kept = pattern.mask
    dense = pattern.scatter(w) if w.dim() == 1 else w
    bias = torch.zeros(pattern.shape[0]) if b is None else b
    exact = [t.double() for t in (x, dense.masked_fill(~kept, 0), bias)]
    sizes = [t.abs().requires_grad_() for t in exact]
    exact = [t.clone().requires_grad_() for t in exact]

    z = product(*exact).detach()
    # The longest sums are those of a result, or of the gradient of an input or a weight.
    rows, *fan_in = pattern.shape
    taps = math.prod(fan_in[1:])
    terms = max(math.prod(fan_in), rows * taps, z.numel() // rows) + 8
    magnitude = product(*sizes).detach()
    # torch's own products round more than once to the stored dtype.
    z_error = (unit * terms + stored) * magnitude + stored * z.abs() + smallest
    activate = ACTIVATIONS[settings["activation"]]
    y = activate(z)
    # relu's slope jumps: results that rounding takes across zero get no gradient.
    clear = (z.abs() > 2 * z_error) | (settings["activation"] != "relu")
    grad_output = layout((torch.linspace(-1, 1, z.numel()).reshape(z.shape) * clear).to(x.dtype))
    wanted = gradients(lambda *t: activate(product(*t)), exact, grad_output.double())
    if not settings["dense_grad"]:
        wanted = wanted[0], wanted[1] * kept, wanted[2]
    slope_error = CURVATURE * z_error + SLOPE * (4 * stored + 16 * unit)
    cotangent = (slope_error + SLOPE * unit * terms) * grad_output.double().abs() + smallest
    allowed = gradients(product, sizes, cotangent)

    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    output = op(*leaves[:2], pattern, leaves[2] if b is not None else None, **settings)
    assert output.dtype == x.dtype
    check(output.detach(), y, SLOPE * z_error + 2 * stored * y.abs() + smallest, "the value")
    found = torch.autograd.grad(output, leaves, grad_output)
    for i, (gradient, what) in enumerate(zip(found, ("input", "weight", "bias"), strict=False)):
        if what == "weight" and w.dim() == 1:
            gradient = pattern.scatter(gradient)
        tolerance = allowed[i] + 2 * stored * wanted[i].abs() + smallest
        if what == "weight" and not settings["dense_grad"]:
            tolerance = tolerance * kept
        check(gradient, wanted[i], tolerance, f"the gradient of {what}")


@fuzz(220)
@given(data=st.data(), batch=st.one_of(st.integers(0, 20), SIZES), rows=SIZES, width=SIZES)
def test_masked_linear(data, batch, rows, width):
    settings = data.draw(options(ALGORITHMS))
    leading = data.draw(st.sampled_from([(batch,), (1, batch), (batch, 2), ()]))
    held = settings["assume_masked"]
    tensors = data.draw(operands((*leading, width), (rows, width), held)).tensors
    layout = data.draw(st.sampled_from(LAYOUTS))
    with instruction_set(data.draw(st.sampled_from(runnable_isas()))):
        compare(masked_linear, F.linear, *tensors, settings, layout)


@st.composite
def convolutions(draw):
    """Shapes of images and weight, and the arguments of F.conv2d, in which the kernel fits."""
    pairs = {
        name: draw(st.tuples(st.integers(low, high), st.integers(low, high)))
        for name, low, high in (
            ("kernel", 1, 4),
            ("stride", 1, 3),
            ("padding", 0, 3),
            ("dilation", 1, 3),
        )
    }
    groups, kernel = draw(st.integers(1, 3)), pairs.pop("kernel")
    if draw(st.booleans()):  # results of the images' size
        kernel = [k - 1 + k % 2 for k in kernel]
        pairs["stride"] = 1, 1
        pairs["padding"] = tuple(
            d * (k - 1) // 2 for k, d in zip(kernel, pairs["dilation"], strict=True)
        )
    weight = (groups * draw(st.integers(1, 9)), draw(st.integers(1, 9)), *kernel)
    needed = [
        max(1, d * (k - 1) + 1 - 2 * p)
        for k, d, p in zip(kernel, pairs["dilation"], pairs["padding"], strict=True)
    ]
    size = [n + draw(st.integers(0, 20)) for n in needed]
    images = draw(st.one_of(st.integers(0, 3), st.integers(1, 18)))
    return (images, weight[1] * groups, *size), weight, {**pairs, "groups": groups}


def keeps_size(images, shape, kwargs) -> bool:
    """Whether a convolution has the stride and size that "direct" needs."""
    numbers = kwargs["stride"], kwargs["padding"], kwargs["dilation"], kwargs["groups"]
    geometry = conv_geometry(tuple(shape[2:]), *numbers)
    return _conv_algorithms.keeps_size(geometry, images)


@fuzz(150)
@given(data=st.data(), convolution=convolutions())
def test_masked_conv2d(data, convolution):
    images, shape, kwargs = convolution
    settings = data.draw(options(_conv_algorithms.ALGORITHMS))
    if settings["algorithm"] == "direct" and not keeps_size(images, shape, kwargs):
        settings["algorithm"] = None
    tensors = data.draw(operands(images, shape, settings["assume_masked"])).tensors
    layout = data.draw(st.sampled_from(LAYOUTS))
    with instruction_set(data.draw(st.sampled_from(runnable_isas()))):
        compare(
            lambda *args, **named: masked_conv2d(*args, **kwargs, **named),
            lambda x, w, b: F.conv2d(x, w, b, **kwargs),
            *(*tensors, settings, layout),
        )


@st.composite
def changed(draw, mask: Tensor) -> Tensor:
    """Another mask, or one of which as many entries of each row are grown as are dropped."""
    if draw(st.booleans()):
        return draw(masks(*mask.shape))
    noise = torch.rand(mask.shape, generator=draw(GENERATORS))
    swaps = min(int(mask.sum(1).min()), int((~mask).sum(1).min()), draw(st.integers(0, 3)))
    dropped = noise.masked_fill(~mask, -1).topk(swaps, 1).indices
    grown = noise.masked_fill(mask, -1).topk(swaps, 1).indices
    return mask.scatter(1, dropped, False).scatter(1, grown, True)


@fuzz(200)
@given(data=st.data(), rows=SIZES, width=SIZES)
def test_patterns(data, rows, width):
    mask = data.draw(masks(rows, width))
    new = data.draw(changed(mask))
    strided = data.draw(st.sampled_from([torch.clone, reversed_storage]))
    with instruction_set(data.draw(st.sampled_from(runnable_isas()))):
        pattern = SparsityPattern.from_mask(strided(mask))
        found_rows, columns = mask.nonzero(as_tuple=True)
        order = columns.argsort(stable=True)
        ends = mask.sum(1).cumsum(0), mask.sum(0).cumsum(0)
        expected = ends[0], columns, ends[1], found_rows[order], order
        starts = pattern.row_pointers[1:], pattern.column_pointers[1:]
        index = starts[0], pattern.columns, starts[1], pattern.column_rows, pattern.permutation
        for found, wanted in zip(index, expected, strict=True):
            assert torch.equal(found.long(), wanted)
        assert torch.equal(pattern.mask, mask)
        for copy in (
            pickle.loads(pickle.dumps(pattern)),
            SparsityPattern.from_bits(pattern.bits, mask.shape),
        ):
            pairs = zip(copy.tensors, pattern.tensors, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)

        updated, mapping = pattern.update(new)
        weight = torch.arange(1.0, mask.numel() + 1).reshape(mask.shape)
        carried = updated.scatter(remap(pattern.gather(weight), mapping))
        assert torch.equal(carried, weight * mask * new)
        rebuilt = SparsityPattern.from_mask(new)
        pairs = zip(updated.tensors, rebuilt.tensors, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        places = torch.zeros_like(mask)
        places[pattern.changes_to(updated)] = True
        assert torch.equal(places, mask ^ new)
