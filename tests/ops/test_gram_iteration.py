import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch

from benchmarks.spectra import gaussian, with_spectrum
from tests.op_suite import check_close
from tscnc_kernels.ops.gram_iteration import gram_iteration

GOLDEN = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
BOUNDS = [9.539392014169456, 9.52553832831968, 9.525518091651094, 9.525518091565106]


def schatten(matrix: torch.Tensor, n_iter: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The Schatten norm that the bound is, and its gradient, from a float64 SVD."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    order = 2.0 ** (n_iter + 1)
    norm = s[0] * (s / s[0]).pow(order).sum() ** (1 / order)
    return norm, u @ torch.diag((s / norm) ** (order - 1)) @ vh


def test_golden_values():
    for n_iter, value in enumerate([*BOUNDS, 9.525518091565104]):
        assert gram_iteration(GOLDEN, n_iter).item() == pytest.approx(value, rel=1e-13)
        assert gram_iteration(GOLDEN.T, n_iter).item() == pytest.approx(value, rel=1e-13)


@pytest.mark.parametrize("shape", [(50, 30), (17, 64), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("n_iter", [0, 1, 3, 6, 20, 60])
def test_value_and_gradient_are_the_schatten_norms(shape, n_iter):
    weight = gaussian(*shape, dtype=torch.float64).requires_grad_()
    bound = gram_iteration(weight, n_iter)
    norm, slope = schatten(weight.detach(), n_iter)
    assert bound.item() == pytest.approx(norm.item(), rel=1e-12)
    check_close(torch.autograd.grad(bound, weight)[0], slope, 1e-10, "gradient")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_iter", [0, 1, 2, 6, 20])
def test_bound_holds_and_is_as_tight_as_promised(dtype, n_iter):
    flat_tail = with_spectrum(60, 40, torch.cat([torch.ones(20), torch.full((20,), 1e-6)]))
    for matrix in (gaussian(60, 40), gaussian(8, 200, seed=1), flat_tail):
        stored = matrix.to(dtype)
        largest = torch.linalg.svdvals(stored.double())[0].item()
        rank = min(stored.shape)
        bound = gram_iteration(stored, n_iter)
        assert bound.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # LAPACK's own error is far below the charge, but not 0.
        assert bound.item() >= largest * (1 - 1e-15)
        assert bound.item() <= largest * rank ** (0.5 ** (n_iter + 1)) * (1 + 2e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bound_is_never_below_in_exact_arithmetic(dtype):
    """Rank one, where the exact B is the norm itself, judged by rational numbers."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        column, row = (torch.randint(-99, 100, (k,), generator=generator) for k in (37, 23))
        matrix = torch.outer(column, row).to(dtype)
        square = int((column**2).sum()) * int((row**2).sum())
        for n_iter in (0, 1, 6, 25):
            bound = gram_iteration(matrix, n_iter).item()
            assert Fraction(bound) ** 2 >= square
            assert bound == pytest.approx(math.sqrt(square), rel=2e-7)


def is_positive(matrix: list[list[Fraction]]) -> bool:
    """Whether a symmetric matrix of rational numbers is positive semidefinite, by elimination."""
    while matrix:
        pivot, *rest = matrix[0]
        if pivot < 0 or (pivot == 0 and any(rest)):
            return False
        tails = [row[1:] for row in matrix[1:]]
        if pivot:
            tails = [
                [entry - x * y / pivot for entry, y in zip(row, rest, strict=True)]
                for row, x in zip(tails, rest, strict=True)
            ]
        matrix = tails
    return True


def hard_matrices(count: int) -> Iterator[torch.Tensor]:
    """Gaussian, repeated, steep and nearly equal spectra, and entries of very different size."""
    for seed in range(count):
        plain = gaussian(6, 4, seed, torch.float64)
        yield plain
        yield plain * torch.logspace(0, -12, 4, dtype=torch.float64)
        yield torch.linalg.qr(plain)[0]
        yield torch.linalg.qr(plain)[0] * (1 + 1e-15 * torch.arange(4))
        yield plain.exp() ** 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bound_is_proven_by_exact_elimination(dtype):
    """B² I − WᵀW has no negative eigenvalue, with W and B taken as the rational numbers they are.

    After 60 steps the exact B is σ_1 but for rounding: only the charge makes the bound hold.
    """
    for matrix in hard_matrices(12):
        stored = matrix.to(dtype)
        square = Fraction(gram_iteration(stored, 60).item()) ** 2
        columns = [[Fraction(entry) for entry in column] for column in stored.T.tolist()]
        shifted = [
            [
                (i == j) * square - sum(x * y for x, y in zip(left, right, strict=True))
                for j, right in enumerate(columns)
            ]
            for i, left in enumerate(columns)
        ]
        assert is_positive(shifted)


def test_bound_falls_with_every_step():
    weight = gaussian(40, 40, dtype=torch.float64)
    bounds = [gram_iteration(weight, n_iter).item() for n_iter in range(9)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_size_of_the_weights_does_not_matter(scale):
    weight = (GOLDEN * scale).requires_grad_()
    bound = gram_iteration(weight, 4)
    assert bound.item() / scale == pytest.approx(9.525518091565104, rel=1e-12)
    check_close(torch.autograd.grad(bound, weight)[0], schatten(GOLDEN, 4)[1], 1e-12, "gradient")


def test_batch_is_every_matrix_alone():
    weight = torch.stack([gaussian(6, 9, seed) for seed in range(6)]).reshape(2, 3, 6, 9)
    bounds = gram_iteration(weight)
    assert bounds.shape == (2, 3)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        alone = gram_iteration(weight[tuple(index)])
        assert bounds[tuple(index)].item() == pytest.approx(alone.item(), rel=1e-6)


@pytest.mark.parametrize("n_iter", [0, 1, 4])
def test_derivatives_of_first_and_second_order(n_iter):
    weight = torch.stack([gaussian(4, 3, seed, torch.float64) for seed in (0, 1)])
    weight.requires_grad_()

    def function(w):
        return gram_iteration(w, n_iter)

    assert torch.autograd.gradcheck(function, weight)
    assert torch.autograd.gradgradcheck(function, weight)


def test_repeated_singular_values_have_a_gradient():
    weight = (2 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    bound = gram_iteration(weight, 3)
    assert bound.item() == pytest.approx(2 * 4 ** (1 / 16), rel=1e-12)
    gradient = torch.autograd.grad(bound, weight)[0]
    check_close(gradient, torch.eye(4).double() * 4 ** (1 / 16 - 1), 1e-12, "gradient")


def test_matrix_of_zeros_is_0_and_flat():
    weight = torch.zeros(3, 5, requires_grad=True)
    bound = gram_iteration(weight)
    assert bound.item() == 0
    assert torch.equal(torch.autograd.grad(bound, weight)[0], torch.zeros(3, 5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_the_matrix_that_is_not_finite_is_nan(bad):
    weight = torch.ones(3, 4, 4)
    weight[1, 2, 0] = bad
    assert gram_iteration(weight).isnan().tolist() == [False, True, False]


def test_vmap_of_grad_is_the_gradient_of_each():
    batch = torch.stack([gaussian(5, 4, seed, torch.float64) for seed in range(3)])
    mapped = torch.func.vmap(torch.func.grad(gram_iteration))(batch)
    for weight, gradient in zip(batch, mapped, strict=True):
        check_close(gradient, schatten(weight, 6)[1], 1e-10, "gradient")


def test_compiles_to_one_graph_and_ignores_autocast():
    weight = gaussian(6, 4).requires_grad_()
    expected = gram_iteration(weight)
    torch._dynamo.reset()
    compiled = torch.compile(gram_iteration, fullgraph=True, backend="aot_eager")(weight)
    torch.testing.assert_close(compiled, expected)
    gradients = [torch.autograd.grad(b, weight)[0] for b in (compiled, expected)]
    torch.testing.assert_close(*gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gram_iteration(weight), expected)


@pytest.mark.parametrize(
    ("weight", "n_iter", "error", "message"),
    [
        ([[1.0]], 6, TypeError, "got list"),
        (torch.eye(2).int(), 6, TypeError, "got torch.int32"),
        (torch.ones(3), 6, ValueError, r"got shape \(3,\)"),
        (torch.ones(2, 0, 3), 6, ValueError, r"got shape \(2, 0, 3\)"),
        (torch.eye(2), -1, ValueError, "got -1"),
        (torch.eye(2), 61, ValueError, "n_iter <= 60, got 61"),
        (torch.eye(2), 2.0, TypeError, "got float"),
        (torch.eye(2).to_sparse(), 6, ValueError, "torch.sparse_coo"),
    ],
)
def test_bad_input_is_named(weight, n_iter, error, message):
    with pytest.raises(error, match=message):
        gram_iteration(weight, n_iter)
