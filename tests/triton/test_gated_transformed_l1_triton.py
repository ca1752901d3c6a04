"""The Triton kernels of gated_transformed_l1 beside the reference in float64."""

import pytest
import torch
from torch import Tensor

from tests.op_suite import TOLERANCES, check_close
from tscnc_kernels import _backend, gated_transformed_l1, use_backend
from tscnc_kernels.ops.gated_transformed_l1 import Constants, reference

launchers = pytest.importorskip("tscnc_kernels.triton.gated_transformed_l1")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("a", "rho", "lambda_", "repo_compat", "beta", "gamma", "zeta")
USUAL = Constants(5.0, 2.0, 0.1, False, 2 / 3, -0.1, 1.1)
# Rows of whole blocks and not, in one launch each.
SHAPES = [(3, 2, 2), (2, launchers.BLOCK + 5), (5, 16), (1, 2 * launchers.BLOCK), (2,)]

pytestmark = pytest.mark.skipif(
    _backend.why_no_triton(DEVICE) is not None, reason="Triton runs on no device here"
)


def problem(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, gates: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [(draw(*shape) * 0.3).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    found = [draw(shape[0]).to(DEVICE, gates or dtype).requires_grad_() for shape in shapes]
    return weights, found


def value_and_gradients(function, weights, log_alphas):
    value = function(weights, log_alphas)
    return [value.detach(), *torch.autograd.grad(value, [*weights, *log_alphas])]


def by_triton(constants: Constants):
    def call(weights, log_alphas):
        with use_backend("triton"):
            return gated_transformed_l1(
                weights, log_alphas, **dict(zip(NAMES, constants, strict=True))
            )

    return call


def check(weights, log_alphas, constants: Constants = USUAL) -> None:
    found = value_and_gradients(by_triton(constants), weights, log_alphas)
    exact = [
        [t.detach().double().cpu().requires_grad_() for t in tensors]
        for tensors in (weights, log_alphas)
    ]
    expected = value_and_gradients(lambda w, g: reference(w, g, constants), *exact)
    for actual, wanted in zip(found, expected, strict=True):
        tolerance = 1e-5 if actual.dtype == torch.float32 else TOLERANCES[actual.dtype]
        check_close(actual, wanted, tolerance, "value or gradient")


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_value_and_gradients_are_the_references(dtype: torch.dtype, published: bool) -> None:
    check(*problem(SHAPES, dtype), USUAL._replace(a=500.0, repo_compat=published))


def test_other_constants() -> None:
    check(*problem([(4, 9)], torch.float64), Constants(0.7, 0.0, 3.0, False, 0.5, -0.3, 1.4))


def test_weights_and_gates_of_several_dtypes() -> None:
    weights, gates = problem([(3, 16), (2, 7)], torch.bfloat16, torch.float32)
    more, of_more = problem([(4, 5)], torch.float64)
    check(weights, gates)
    check([*weights, *more], [*gates, *of_more])


def test_more_weights_than_one_launch_takes() -> None:
    check(*problem([(1 + index % 3, 3 + index) for index in range(37)], torch.float32))


def test_strided_weights() -> None:
    weights, gates = problem([(6, 4), (8, 3)], torch.float32)
    turned = [weight.detach().t().contiguous().t().requires_grad_() for weight in weights]
    check(turned, gates)


def test_empty_weights_and_closed_gates() -> None:
    weights, gates = problem([(2, 3), (2, 0), (0, 3)], torch.float32)
    with torch.no_grad():
        gates[0].fill_(-200.0)
    value, *gradients = value_and_gradients(by_triton(USUAL), weights, gates)
    assert value.item() == 0.0
    assert not any(gradient.any() for gradient in gradients)


def test_probabilities_that_the_published_code_clamps_have_no_slope() -> None:
    weights, gates = problem([(3, 4)], torch.float64)
    with torch.no_grad():
        gates[0].copy_(torch.tensor([-60.0, 0.0, 60.0]))
    check(weights, gates, USUAL._replace(repo_compat=True))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_squares_that_overflow_give_nan() -> None:
    (weight,), gates = problem([(2, 3)], torch.float32)
    with torch.no_grad():
        weight[0, 0] = 1e30
    assert by_triton(USUAL)([weight], gates).isnan()


def test_second_derivatives() -> None:
    weights, gates = problem([(2, 3), (1, 2)], torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        return by_triton(USUAL)(tensors[:2], tensors[2:])

    assert torch.autograd.gradcheck(function, (*weights, *gates))
    assert torch.autograd.gradgradcheck(function, (*weights, *gates))


def test_only_what_needs_a_gradient_gets_one() -> None:
    weights, gates = problem([(2, 3), (1, 2)], torch.float32)
    weights[1].requires_grad_(False)
    value = by_triton(USUAL)(weights, gates)
    value.backward()
    assert weights[1].grad is None and weights[0].grad is not None
    expected = value_and_gradients(lambda w, g: reference(w, g, USUAL), weights[:1], gates[:1])
    torch.testing.assert_close(weights[0].grad, expected[1])
