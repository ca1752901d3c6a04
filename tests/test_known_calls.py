"""What a pattern remembers of earlier calls never lets a bad one pass."""

import pytest
import torch

from tscnc_kernels import SparsityPattern, masked_conv2d, masked_linear, use_backend
from tscnc_kernels._known_calls import MOST, call_key

ROWS, WIDTH, BATCH = 6, 10, 4


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, SparsityPattern, torch.Tensor]:
    """Tensors that have passed all checks once, as values with a bias."""
    torch.manual_seed(0)
    pattern = SparsityPattern.from_mask(torch.rand(ROWS, WIDTH) < 0.4)
    found = torch.randn(BATCH, WIDTH), torch.randn(pattern.nnz), pattern, torch.randn(ROWS)
    masked_linear(*found)
    return found


def test_a_call_like_an_earlier_one_is_known(layer) -> None:
    input, values, pattern, bias = layer
    known = pattern.__dict__["_known_calls"]
    assert len(known) == 1
    masked_linear(torch.randn(BATCH, WIDTH), values + 1, pattern, bias)
    assert len(known) == 1
    masked_linear(torch.randn(BATCH + 1, WIDTH), values, pattern, bias)
    masked_linear(input, values, pattern)
    masked_linear(input, values, pattern, bias, "relu")
    masked_linear(input.t().contiguous().t(), values, pattern, bias)
    assert len(known) == 5


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda x, w, b: (x.double(), w, b), TypeError),
        (lambda x, w, b: (x, w.double(), b), TypeError),
        (lambda x, w, b: (x, w, b.half()), TypeError),
        (lambda x, w, b: (x.int(), w.int(), b.int()), TypeError),
        (lambda x, w, b: (x.tolist(), w, b), TypeError),
        (lambda x, w, b: (x, None, b), TypeError),
        (lambda x, w, b: (x[:, 1:], w, b), ValueError),
        (lambda x, w, b: (x, w[1:], b), ValueError),
        (lambda x, w, b: (x, w, b[1:]), ValueError),
        (lambda x, w, b: (x.to_sparse(), w, b), ValueError),
        (lambda x, w, b: (x, w, b.to("meta")), ValueError),
        (lambda x, w, b: (x.to("meta"), w, b), ValueError),
    ],
)
def test_a_bad_call_after_a_good_one_raises(layer, change, error) -> None:
    input, values, pattern, bias = layer
    input, values, bias = change(input, values, bias)
    for _ in range(2):
        with pytest.raises(error, match="expected"):
            masked_linear(input, values, pattern, bias)
    assert len(pattern.__dict__["_known_calls"]) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"activation": "tanh"}, ValueError),
        ({"activation": ["relu"]}, ValueError),
        ({"algorithm": "fast"}, ValueError),
        ({"dense_grad": True}, ValueError),
        ({"backend": "cuda"}, RuntimeError),
    ],
)
def test_a_bad_setting_after_a_good_call_raises(layer, options, error) -> None:
    input, values, pattern, bias = layer
    for _ in range(2):
        with pytest.raises(error):
            masked_linear(input, values, pattern, bias, **options)


def test_what_a_call_depends_on_outside_makes_it_another(layer) -> None:
    input, values, _, bias = layer
    before = call_key(input, values, bias, ())
    with use_backend("reference"):
        assert call_key(input, values, bias, ()) != before
        assert torch.allclose(
            masked_linear(*layer), masked_linear(*layer, algorithm="dense"), atol=1e-5
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert call_key(input, values, bias, ()) is None
        assert masked_linear(*layer).dtype == torch.bfloat16
    assert masked_linear(*layer).dtype == torch.float32
    assert call_key(input, values, bias, ()) == before


def test_batches_of_ever_new_sizes_are_forgotten(layer) -> None:
    _, values, pattern, bias = layer
    for batch in range(1, MOST + 20):
        masked_linear(torch.zeros(batch, WIDTH), values, pattern, bias)
    assert len(pattern.__dict__["_known_calls"]) <= MOST


def test_a_call_that_is_traced_is_not_known(layer) -> None:
    input, values, _, bias = layer
    keys = [call_key(input, values, bias, ())]

    def look(x: torch.Tensor) -> torch.Tensor:
        keys.append(call_key(x, values, bias, ()))
        return x + 1

    torch.jit.trace(look, input, check_trace=False)
    assert keys[0] is not None and keys[1:] == [None]


@pytest.fixture
def convolution() -> tuple[torch.Tensor, torch.Tensor, SparsityPattern, torch.Tensor]:
    """As `layer`, for a convolution of 4 channels."""
    torch.manual_seed(0)
    pattern = SparsityPattern.from_mask(torch.rand(5, 4, 3, 3) < 0.4)
    found = torch.randn(2, 4, 6, 7), torch.randn(pattern.nnz), pattern, torch.randn(5)
    masked_conv2d(*found)
    return found


def test_a_convolution_like_an_earlier_one_is_known(convolution) -> None:
    images, values, pattern, bias = convolution
    known = pattern.__dict__["_known_calls"]
    masked_conv2d(images + 1, values, pattern, bias, [1, 1], (0, 0))
    assert len(known) == 1
    masked_conv2d(images, values, pattern, bias, padding=1)
    masked_conv2d(images, values, pattern, bias, padding="same", dilation=2)
    masked_conv2d(images[0], values, pattern, bias)
    masked_conv2d(images.to(memory_format=torch.channels_last), values, pattern, bias)
    masked_conv2d(images, values, pattern, bias, stride=2)
    assert len(known) == 6


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"stride": 0}, ValueError),
        ({"stride": 1.0}, TypeError),
        ({"stride": True}, TypeError),
        ({"padding": -1}, ValueError),
        ({"padding": [0, 0, 0]}, ValueError),
        ({"dilation": 4}, ValueError),
        ({"groups": 2}, ValueError),
        ({"activation": ["relu"]}, ValueError),
        ({"algorithm": "direct"}, RuntimeError),
        ({"dense_grad": True}, ValueError),
    ],
)
def test_a_bad_convolution_after_a_good_one_raises(convolution, options, error) -> None:
    for _ in range(2):
        with pytest.raises(error):
            masked_conv2d(*convolution, **options)
    images, values, pattern, bias = convolution
    for bad in (images[:, 1:], images[:, :, :2], images[None], images.int()):
        with pytest.raises((ValueError, TypeError), match="expected"):
            masked_conv2d(bad, values, pattern, bias)
    assert len(pattern.__dict__["_known_calls"]) == 1
