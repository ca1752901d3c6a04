"""sparsify on whole networks: fusion and its limits, measured gains, convolutions' masks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.op_suite import check_close
from tscnc_kernels.nn import (
    FusedActivation,
    MaskedConv2d,
    MaskedLinear,
    densify,
    sparsify,
    update_masks,
)


def mask(*shape, density=0.3, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


class Block(nn.Module):
    """A residual block whose one ReLU module serves twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, input):
        return self.relu(input + self.second(self.relu(self.norm(self.first(input)))))


def resnet():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), Block(), Block()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 5)),
    )


def test_a_residual_network_is_pruned_swapped_and_taken_back():
    model, input = resnet().eval(), torch.randn(2, 3, 8, 8)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.random_unstructured(module, "weight", 0.8)
    expected = model(input)
    report = sparsify(model)
    assert len(report.swapped) == 7
    fused = {layer.name: layer.activation for layer in report.layers if layer.activation}
    assert fused == {"0": "relu", "6": "gelu"}
    assert all(layer.gain is not None and not layer.measured for layer in report.layers)
    check_close(model(input), expected, 1e-5, "value")
    twin = copy.deepcopy(model)
    densify(model)
    masked = MaskedLinear, MaskedConv2d, FusedActivation
    assert sum(isinstance(m, masked) for m in twin.modules()) == 9
    assert not any(isinstance(m, masked) for m in model.modules())
    assert [type(m) for m in model[:2]] == [nn.Conv2d, nn.ReLU] and model[1].inplace
    for network in (model, twin):
        check_close(network(input), expected, 1e-5, "value")


def mlp(activation):
    return nn.Sequential(nn.Linear(8, 12), activation, nn.Linear(12, 4))


@pytest.mark.parametrize(
    "activation", [nn.Tanh(), nn.GELU("tanh"), nn.LeakyReLU(), nn.Dropout(0.0), nn.ReLU6()]
)
def test_other_activations_stay_modules(activation):
    model = mlp(activation)
    assert sparsify(model, {"0": mask(12, 8)}).layers[0].activation is None
    assert model[1] is activation


def test_what_somebody_watches_is_not_fused():
    hooked, shared = mlp(nn.ReLU()), mlp(nn.ReLU())
    hooked[1].register_forward_hook(lambda module, input, output: None)
    shared.append(shared[1])
    for model in (hooked, shared, mlp(nn.ReLU())):
        report = sparsify(model, {"0": mask(12, 8)}, fuse=model in (hooked, shared))
        assert report.layers[0].activation is None and isinstance(model[1], nn.ReLU)


def test_a_fused_activation_of_the_users_own_is_not_lost_by_densify():
    layer = MaskedLinear.from_linear(nn.Linear(8, 12), mask(12, 8), activation="relu")
    model = nn.Sequential(layer, nn.Linear(12, 4))
    with pytest.raises(ValueError, match=r"'0' computes relu itself.*to_linear\(\)"):
        densify(model)
    assert model[0] is layer


def test_gains_are_measured_when_a_batch_is_given():
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    masks = {"0": mask(4, 3, 3, 3), "6": mask(12, 16)}
    report = sparsify(copy.deepcopy(model), masks, batch=16)
    found = {layer.name: layer for layer in report.layers if layer.mode}
    assert set(found) == {"0", "6"}
    assert all(layer.measured and layer.gain > 0 for layer in found.values())
    assert "measured" in str(report)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match="batch of at least 1, got 0"):
        sparsify(model, masks, batch=0)


@pytest.mark.parametrize("mode", ["dense", "values"])
def test_update_masks_carries_a_convolutions_weights_and_moments(mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    old, new = mask(4, 3, 3, 3), mask(4, 3, 3, 3, seed=1)
    sparsify(model, {"0": old}, mode=mode)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    layer = model[0]
    weight = layer.dense_weight.detach().clone()
    state = optimizer.state[layer.weight]["exp_avg"]
    moment = state.clone() if mode == "dense" else layer.pattern.scatter(state)
    update_masks(model, {"0.weight": new}, optimizer)
    assert torch.equal(layer.pattern.mask, new)
    assert torch.equal(layer.dense_weight, weight * (old & new))
    carried = optimizer.state[layer.weight]["exp_avg"]
    carried = carried if mode == "dense" else layer.pattern.scatter(carried)
    assert torch.equal(carried, moment * (old & new))
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "plain", "shape"),
    [
        (MaskedLinear.from_linear, nn.Linear(6, 5), (3, 6)),
        (MaskedConv2d.from_conv, nn.Conv2d(2, 3, 3), (2, 2, 5, 5)),
    ],
    ids=["linear", "conv"],
)
def test_dense_grad_gives_gradients_where_weights_are_pruned(make, plain, shape):
    kept = mask(*plain.weight.shape)
    layer = make(copy.deepcopy(plain), kept, dense_grad=True)
    plain.weight.data *= kept
    input = torch.randn(shape)
    for module in (layer, plain):
        module.zero_grad()
        module(input).square().sum().backward()
    check_close(layer.weight.grad, plain.weight.grad, 1e-4, "gradient")
    assert (layer.weight.grad[~kept] != 0).any() and "dense_grad=True" in repr(layer)
    with pytest.raises(ValueError, match="needs mode 'dense', got 'values'"):
        make(plain, kept, "values", dense_grad=True)
    with pytest.raises(ValueError, match="none, relu, gelu, got 'tanh'"):
        make(plain, kept, activation="tanh")


@pytest.mark.parametrize("off_before_the_update", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_update_masks_clears_a_dense_gradient_everywhere(off_before_the_update, layout):
    kept = torch.rand(6, 4, 3, 3) < 0.3
    convolution = nn.Conv2d(4, 6, 3).to(memory_format=layout)
    layer = MaskedConv2d.from_conv(convolution, kept, dense_grad=True)
    layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
    weight, gradient = layer.weight.detach().clone(), layer.weight.grad.clone()
    layer.dense_grad = not off_before_the_update
    new = torch.rand(6, 4, 3, 3) < 0.3
    update_masks(nn.Sequential(layer), {"0.weight": new})
    assert torch.equal(layer.weight.detach(), weight * (kept & new))
    assert torch.equal(layer.weight.grad, gradient * (kept & new))
