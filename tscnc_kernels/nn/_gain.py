"""How much faster a layer gets by its swap: predicted, or measured on random input."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tscnc_kernels import _autotune
from tscnc_kernels._autotune import DENSE
from tscnc_kernels._masked_algorithms import DIRECTIONS, Call, predict, predict_step, usual_call

# A swap has to pay for the trouble: as much as dense is given in every decision.
WORTHWHILE = _autotune.HYSTERESIS


def predicted_gain(
    op: str, shape: Sequence[int], nnz: int, values: bool, batch: int | None = None
) -> float:
    """Time of the plain layer over that of the masked one, forward and both gradients."""
    call = usual_call(shape, values)
    call = call if batch is None else call._replace(batch=batch)
    plain = predict_plain(op, shape, call)
    return plain / predict_step(op, shape, nnz, call)


def predict_plain(op: str, shape: Sequence[int], call: Call) -> float:
    """Seconds of the three products of a layer without a mask."""
    held, size = call._replace(values=False, held=True), math.prod(shape)
    times = [predict(op, shape, size, held, direction)[DENSE] for direction in DIRECTIONS[:2]]
    return times[0] + 2 * times[1]


def break_even(op: str, shape: Sequence[int], batch: int | None = None) -> float:
    """The largest density, in hundredths, at which a swap is predicted to pay; 0 if none is."""
    size = math.prod(shape)
    for step in range(99, 0, -1):
        if predicted_gain(op, shape, round(step / 100 * size), True, batch) >= WORTHWHILE:
            return step / 100
    return 0.0


def measured_gain(plain: nn.Module, masked: nn.Module, batch: int) -> float:
    """The same ratio, timed: forward, backward and all gradients, on random input."""
    weight = next(plain.parameters())
    generator = torch.Generator().manual_seed(0)
    size = _input_size(plain, batch)
    input = torch.randn(size, generator=generator).to(weight.device, weight.dtype)
    input.requires_grad_()
    layers = {DENSE: plain, "masked": masked}

    def step(name: str) -> Sequence[Tensor]:
        layer = layers[name]
        wanted = [input, *(p for p in layer.parameters() if p.requires_grad)]
        with torch.enable_grad():
            return torch.autograd.grad(layer(input).sum(), wanted)

    times = _autotune.measure(list(layers), step, _autotune.clock_for(weight.device))
    return times[DENSE] / times["masked"]


def _input_size(layer: nn.Module, batch: int) -> tuple[int, ...]:
    if isinstance(layer, nn.Conv2d):
        side = max(math.isqrt(batch), 1)
        return 1, layer.in_channels, side, side
    assert isinstance(layer, nn.Linear)
    return batch, layer.in_features
