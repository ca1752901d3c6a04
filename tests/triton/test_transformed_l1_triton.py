"""The Triton launchers of transformed_l1 beyond what the suite of the op covers."""

import pytest
import torch
from torch import Tensor

launchers = pytest.importorskip("tscnc_kernels.triton.transformed_l1")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_tensors(sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    exact = [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]
    return [tensor.to(DEVICE, dtype) for tensor in exact]


def exact_value(tensors: list[Tensor], a: float) -> float:
    magnitudes = torch.cat([tensor.double() for tensor in tensors]).abs()
    return float(((a + 1) * magnitudes / (a + magnitudes)).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_a_block(dtype: torch.dtype) -> None:
    block = launchers.block_size(dtype)
    tensors = random_tensors([block - 1, block, block + 1, 2 * block + 7], dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert launchers.transformed_l1(tensors, 0.7).item() == pytest.approx(
        exact_value(tensors, 0.7), rel=tolerance
    )


def test_view_that_starts_between_two_packs() -> None:
    (whole,) = random_tensors([3000], torch.float32)
    view = whole[3:2900]
    assert launchers.transformed_l1([view], 2.0).item() == pytest.approx(
        exact_value([view], 2.0), rel=1e-6
    )
    (grad,) = launchers.transformed_l1_backward(torch.tensor(1.0, device=DEVICE), [view], 2.0)
    expected = view.double().sign() * 2 * 3 / (2 + view.double().abs()) ** 2
    torch.testing.assert_close(grad.double(), expected, rtol=1e-6, atol=1e-6)


def test_one_pass_gives_the_bits_of_value_and_gradient_alone() -> None:
    tensors = random_tensors([5000, 0, 33], torch.float32)
    value, grads = launchers.transformed_l1_value_and_grad(tensors, 0.4)
    assert torch.equal(value, launchers.transformed_l1(tensors, 0.4))
    alone = launchers.transformed_l1_backward(torch.tensor(1.0, device=DEVICE), tensors, 0.4)
    assert all(torch.equal(a, b) for a, b in zip(alone, grads, strict=True))


def test_only_empty_tensors() -> None:
    value, (grad,) = launchers.transformed_l1_value_and_grad(
        [torch.empty(0, 3, device=DEVICE)], 1.0
    )
    assert value.item() == 0
    assert grad.shape == (0, 3)


@pytest.mark.parametrize("count", [15, 16, 17, 40])
def test_more_tensors_than_one_launch_takes(count: int) -> None:
    sizes = [(37 * index * index) % 5000 * (index % 5 != 0) for index in range(count)]
    tensors = random_tensors(sizes, torch.float32)
    value, grads = launchers.transformed_l1_value_and_grad(tensors, 1.3)
    assert value.item() == pytest.approx(exact_value(tensors, 1.3), rel=1e-6)
    for tensor, grad in zip(tensors, grads, strict=True):
        expected = tensor.double().sign() * 1.3 * 2.3 / (1.3 + tensor.double().abs()) ** 2
        torch.testing.assert_close(grad.double(), expected, rtol=1e-6, atol=1e-6)


def test_sizes_never_ask_for_a_kernel_of_their_own() -> None:
    codes = [launchers.odd(number) for number in range(200)]
    assert not any(code == 1 or code % 16 == 0 for code in codes)
