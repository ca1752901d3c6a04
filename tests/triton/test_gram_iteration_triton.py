"""The Triton step of gram_iteration under the interpreter: the reference's numbers, and a bound."""

from fractions import Fraction

import pytest
import torch

from benchmarks.spectra import gaussian
from tests.ops.test_gram_iteration import hard_matrices, is_positive, schatten
from tscnc_kernels import _backend, use_backend
from tscnc_kernels.ops.gram_iteration import gram_iteration, reference

kernels = pytest.importorskip("tscnc_kernels.triton.gram_iteration")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Tall and wide, around the side of a tile.
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 40), (33, 33), (50, 65)])
def test_bounds_are_the_references(shape: tuple[int, int]) -> None:
    check_bounds(gaussian(*shape, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_every_dtype_are_computed_in_float64(dtype: torch.dtype) -> None:
    check_bounds(gaussian(7, 12).to(dtype))


def check_bounds(weight: torch.Tensor) -> None:
    for n_iter in (0, 1, 2):
        found = kernels.bound(weight.to(DEVICE), n_iter).cpu()
        expected = reference(weight, n_iter)
        assert found.dtype == torch.float64 and found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        assert found.item() >= schatten(weight, n_iter)[0].item() * (1 - 1e-15)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("width", [31, 64, 70])
def test_step_is_symmetric_to_the_bit_and_counts_its_squares(
    side: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "tile_for", lambda *_: kernels.Tile(side, 16, 4, 4))
    batch = torch.stack([gaussian(37, width, seed, torch.float64) for seed in range(2)])
    scales = torch.tensor([0.5, 3.0], dtype=torch.float64)
    products, squares = kernels.gram_step(batch.to(DEVICE), scales.to(DEVICE))
    assert torch.equal(products, products.mT)
    expected = batch.mT @ batch * scales[:, None, None]
    torch.testing.assert_close(products.cpu(), expected, rtol=1e-12, atol=1e-12)
    wanted = expected.square().sum((1, 2))
    torch.testing.assert_close(squares.cpu(), wanted, rtol=1e-12, atol=0)


def test_batches_and_their_shape() -> None:
    weight = torch.stack([gaussian(6, 9, seed) for seed in range(6)]).reshape(2, 3, 6, 9)
    weight[1, 1] = 0
    found = kernels.bound(weight.to(DEVICE), 3).cpu()
    assert found[1, 1] == 0
    torch.testing.assert_close(found, reference(weight, 3), rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_size_of_the_weights_does_not_matter(scale: float) -> None:
    weight = gaussian(20, 10, dtype=torch.float64) * scale
    found = kernels.bound(weight.to(DEVICE), 4).cpu()
    torch.testing.assert_close(found, reference(weight, 4), rtol=1e-13, atol=0)


def test_only_the_matrix_that_is_not_finite_is_nan() -> None:
    weight = torch.ones(3, 4, 4)
    weight[1, 2, 0] = torch.inf
    assert kernels.bound(weight.to(DEVICE), 2).isnan().tolist() == [False, True, False]


def test_bound_is_proven_by_exact_elimination() -> None:
    """B² I − WᵀW has no negative eigenvalue; after many steps only the charge keeps B above σ_1."""
    matrices = list(hard_matrices(1))
    bounds = kernels.bound(torch.stack(matrices).to(DEVICE), 24).tolist()
    for matrix, bound in zip(matrices, bounds, strict=True):
        columns = [[Fraction(entry) for entry in column] for column in matrix.T.tolist()]
        shifted = [
            [
                (i == j) * Fraction(bound) ** 2 - sum(x * y for x, y in zip(a, b, strict=True))
                for j, b in enumerate(columns)
            ]
            for i, a in enumerate(columns)
        ]
        assert is_positive(shifted)


def test_op_runs_it_where_triton_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(9, 6).to(DEVICE).requires_grad_()
    expected = gram_iteration(weight, 2)
    called = []
    real = kernels.bound
    monkeypatch.setattr(kernels, "bound", lambda *given: called.append(1) or real(*given))
    with use_backend("triton"):
        bound = gram_iteration(weight, 2)
    assert called
    torch.testing.assert_close(bound, expected)
    found, wanted = (torch.autograd.grad(value, weight)[0] for value in (bound, expected))
    torch.testing.assert_close(found, wanted)
    called.clear()
    with use_backend("reference"):
        gram_iteration(weight, 2)
    with use_backend("triton"):
        mapped = torch.func.vmap(lambda w: gram_iteration(w, 2))(weight.detach()[None])
    assert not called
    torch.testing.assert_close(mapped[0], expected.detach())


def test_triton_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "why_no_triton", lambda device: "no GPU in this test")
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"gram_iteration: .* no GPU in"):
        gram_iteration(torch.eye(2), 1)
