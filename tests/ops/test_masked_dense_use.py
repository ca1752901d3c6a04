"""What the dense algorithm runs where a weight is zero off its mask already: torch's products."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.test_masked_linear import pattern
from tscnc_kernels import SparsityPattern, masked_conv2d, masked_linear

PRODUCTS = {"linear", "addmm", "mm"}
# What touches no element: views, and a tensor of no rows in place of Z.
FREE = {"t", "transpose", "detach", "view", "expand", "new_empty"}


def name_of(func) -> str:
    return func.name().split("::")[1].split(".")[0]


class Recorded(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(name_of(func))
        return func(*args, **(kwargs or {}))


def held_layer():
    kept = pattern(24, 32)
    assert kept.block_shape is None  # looked at once, and kept
    weight = torch.randn(24, 32).masked_fill(~kept.mask, 0.0)
    return kept, torch.randn(9, 32, requires_grad=True), weight, torch.randn(24)


def test_forward_and_input_gradient_are_the_products_of_a_dense_layer():
    kept, input, weight, bias = held_layer()
    gradient = torch.randn(9, 24)
    with Recorded() as recorded:
        output = masked_linear(input, weight, kept, bias, assume_masked=True, algorithm="dense")
        torch.autograd.grad(output, input, gradient)
    assert set(recorded.names) <= PRODUCTS | FREE
    assert sum(name in PRODUCTS for name in recorded.names) == 2


def test_without_the_promise_the_weight_is_masked():
    kept, input, weight, bias = held_layer()
    with Recorded() as recorded:
        masked_linear(input.detach(), weight, kept, bias, algorithm="dense")
    assert set(recorded.names) - PRODUCTS - FREE == {"sparsity_mask"}


@pytest.mark.parametrize("feature_major", [False, True])
def test_the_weight_itself_is_multiplied(feature_major, monkeypatch):
    """No copy of it, masked or not, is made for either product."""
    kept, input, weight, bias = held_layer()
    multiplied = []

    class Weights(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if name_of(func) in PRODUCTS:
                multiplied.append(weight.data_ptr() in {tensor.data_ptr() for tensor in args})
            return func(*args, **(kwargs or {}))

    with Weights():
        output = masked_linear(
            *(input, weight, kept, bias),
            assume_masked=True,
            algorithm="dense",
            feature_major=feature_major,
        )
        torch.autograd.grad(output, input, torch.ones_like(output))
    assert multiplied == [True, True]


def test_a_convolution_masks_nothing_either():
    mask = torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.3
    kept = SparsityPattern.from_mask(mask)
    weight = torch.randn(8, 4, 3, 3).masked_fill(~mask, 0.0)
    input = torch.randn(2, 4, 7, 7, requires_grad=True)
    with Recorded() as recorded:
        output = masked_conv2d(input, weight, kept, assume_masked=True, algorithm="dense")
        torch.autograd.grad(output, input, torch.ones_like(output))
    assert {name for name in recorded.names if "mask" in name or name in ("mul", "where")} == set()
    assert "convolution_backward" in recorded.names
