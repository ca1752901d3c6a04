"""Chains of masked layers that hand their results over feature-major."""

import pytest
import torch
from torch import nn

from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern, explain
from tscnc_kernels.nn import MaskedLinear, densify, sparsify

WIDTH = 256


def linear(seed, density=0.05):
    layer = nn.Linear(WIDTH, WIDTH)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(WIDTH, WIDTH, generator=generator) < density)
    return layer


def chosen(model, **options):
    """Names of the layers that hand their result over feature-major."""
    report = sparsify(model, **options)
    found = [layer.name for layer in report.layers if layer.feature_major]
    assert found == [n for n, m in model.named_modules() if getattr(m, "feature_major", False)]
    assert str(report).count("feature-major") == len(found)
    return found


@pytest.mark.parametrize("fuse", [True, False])
def test_sparsify_joins_layers_through_elementwise_modules(fuse):
    model = nn.Sequential(
        *(linear(0), nn.ReLU(), linear(1), nn.Tanh(), nn.Dropout(0.5), linear(2), linear(3)),
    ).eval()
    input = torch.randn(70, WIDTH, requires_grad=True)
    expected = model(input)
    (wanted,) = torch.autograd.grad(expected.sum(), input)
    assert chosen(model, fuse=fuse) == ["0", "2", "5"]
    layouts = []
    for layer in model:
        layer.register_forward_hook(lambda _, __, y: layouts.append(y.stride() == (1, 70)))
    output = model(input)
    assert layouts == [True] * 6 + [False]
    check_close(output, expected, 1e-5, "value")
    check_close(torch.autograd.grad(output.sum(), input)[0], wanted, 1e-4, "gradient")
    assert "feature-major" in explain(model)
    densify(model)
    check_close(model(input), expected, 1e-5, "value")


def test_nested_sequentials_are_one_chain():
    inner = nn.Sequential(nn.ReLU(), linear(0), nn.Sigmoid())
    assert chosen(nn.Sequential(linear(1), inner, linear(2))) == ["0", "1.1"]


def test_what_might_look_at_the_layout_ends_a_chain():
    class Custom(nn.Module):
        def forward(self, input):
            return input.view(-1)

    for between in (nn.BatchNorm1d(WIDTH), nn.Flatten(), Custom(), nn.LayerNorm(WIDTH)):
        assert chosen(nn.Sequential(linear(0), between, linear(1))) == []
    assert chosen(nn.Sequential(linear(0), nn.ReLU(), nn.Linear(WIDTH, WIDTH))) == []
    assert chosen(nn.ModuleList([linear(0), linear(1)])) == []
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    assert chosen(nn.Sequential(linear(0), hooked, linear(1))) == []


def test_a_layer_with_other_readers_stays_row_major():
    shared = linear(0)
    model = nn.ModuleDict(
        {"chain": nn.Sequential(shared, linear(1)), "other": nn.Sequential(shared, nn.Flatten())}
    )
    assert chosen(model) == []
    inner = nn.Sequential(linear(2))
    model = nn.ModuleDict({"chain": nn.Sequential(inner, linear(3)), "inner": inner})
    assert chosen(model) == []


def test_it_can_be_declined():
    assert chosen(nn.Sequential(linear(0), linear(1)), feature_major=False) == []


def test_the_layer_takes_the_option():
    pattern = SparsityPattern.from_mask(torch.eye(4).bool())
    layer = MaskedLinear(4, 4, pattern=pattern, feature_major=True)
    assert "feature_major=True" in repr(layer)
    assert layer(torch.randn(3, 4)).stride() == (1, 3)
    assert layer(torch.randn(2, 3, 4)).shape == (2, 3, 4)
    plain = layer.to_linear()
    assert not MaskedLinear.from_linear(plain, pattern).feature_major
    assert MaskedLinear.from_linear(plain, pattern, feature_major=True).feature_major
