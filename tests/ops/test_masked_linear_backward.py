"""Both gradients of masked_linear in one pass, beside a pass for each."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern, _autotune, masked_linear
from tscnc_kernels import _masked_algorithms as algorithms
from tscnc_kernels._masked_algorithms import BACKWARD, SEPARATE, Call, predict

DENSITIES = {"empty": 0.0, "sparse": 0.02, "half": 0.5, "full": 1.0}


def case(batch, rows, width, density, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + batch)
    mask = torch.rand(rows, width, generator=generator) < density
    mask[:, : width // 3] &= torch.rand(rows, 1, generator=generator) < 0.5
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in ((batch, width), rows)]
    values = torch.randn(int(mask.sum()), generator=generator).to(dtype)
    return SparsityPattern.from_mask(mask), *tensors, values


def gradients(pattern, input, bias, weight, needs, activation="none"):
    leaves = [
        tensor.clone().requires_grad_(need)
        for tensor, need in zip((input, weight, bias), needs, strict=True)
    ]
    output = masked_linear(leaves[0], leaves[1], pattern, leaves[2], activation, algorithm="panel")
    scale = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    return torch.autograd.grad(output, wanted, scale)


@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
@pytest.mark.parametrize("size", [(1, 3, 5), (9, 129, 67), (33, 64, 64), (130, 67, 131)])
@pytest.mark.parametrize("form", ["values", "dense"])
def test_one_pass_gives_the_gradients_of_two(size, density, form, isa):
    pattern, input, bias, weight = case(*size, density)
    weight = pattern.scatter(weight) if form == "dense" else weight
    together = gradients(pattern, input, bias, weight, (True, True, True), "relu")
    (alone,) = gradients(pattern, input, bias, weight, (True, False, False), "relu")
    apart = gradients(pattern, input, bias, weight, (False, True, True), "relu")
    for found, expected in zip(together, (alone, *apart), strict=True):
        check_close(found, expected, 1e-5, "gradient")
    assert form == "values" or not together[1][~pattern.mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_pass_agrees_with_the_reference(dtype, isa):
    pattern, input, bias, values = case(77, 63, 129, 0.3, dtype)
    found = gradients(pattern, input, bias, values, (True, True, True), "gelu")
    leaves = [tensor.double().requires_grad_() for tensor in (input, values, bias)]
    output = F.gelu(F.linear(leaves[0], pattern.scatter(leaves[1]), leaves[2]))
    scale = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    expected = torch.autograd.grad(output, leaves, scale.to(dtype).double())
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 2e-2)
    for a, e in zip(found, expected, strict=True):
        check_close(a, e, tolerance, "gradient")


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads):
    inputs = case(200, 300, 257, 0.2)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(gradients(*inputs, (True, True, True), "relu"))
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_strided_gradients_and_inputs_are_read_as_they_are():
    pattern, input, bias, values = case(40, 50, 60, 0.3)
    expected = gradients(pattern, input, bias, values, (True, True, True))
    wide = torch.zeros(60, 80)
    wide[:, ::2] = input.t()
    strided = wide[:, ::2].t()
    assert not strided.is_contiguous()
    found = gradients(pattern, strided, bias, values, (True, True, True))
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e)


def test_the_faster_way_is_predicted():
    """One pass where the panels' algorithm is the best for both, two where another one is."""
    shape, call = (2048, 2048), Call(128)
    for density, best in ((0.01, "panel"), (1.0, SEPARATE)):
        times = predict("masked_linear", shape, round(density * 2048**2), call, BACKWARD)
        assert _autotune.fastest(times) == best
        assert set(times) == {"panel", SEPARATE} and min(times.values()) > 0


def test_without_a_known_call_the_density_decides():
    """As under compilation, where the kind of call must not enter the graph."""
    ranges = [0.01, 0.1, 0.5, 0.99]
    chosen = [
        algorithms.choose(
            "masked_linear", SparsityPattern.from_mask(torch.rand(64, 64) < d), "native", None
        )
        for d in ranges
    ]
    assert chosen[0].pick(BACKWARD, None, ()) == "panel"
    for choice, way in itertools.product(chosen, algorithms.DIRECTIONS):
        assert choice.pick(way, None, ()) in algorithms.ALGORITHMS
