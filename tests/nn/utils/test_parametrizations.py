import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torchs

from benchmarks.spectra import gaussian
from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern
from tscnc_kernels.nn import MaskedConv2d, MaskedLinear
from tscnc_kernels.nn.utils.parametrizations import spectral_norm


def linear(rows=6, cols=9, seed=0):
    layer = nn.Linear(cols, rows)
    layer.weight = nn.Parameter(gaussian(rows, cols, seed))
    return layer


def norm(weight):
    return torch.linalg.svdvals(weight.detach().double().flatten(1))[0].item()


def test_call_is_the_one_of_torch():
    ours = inspect.signature(spectral_norm).parameters.values()
    theirs = inspect.signature(torchs.spectral_norm).parameters.values()
    positional = [p for p in ours if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize(
    "module",
    [nn.Linear(5, 7), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.Conv1d(2, 5, 3)],
    ids=lambda module: type(module).__name__,
)
def test_weight_is_what_torch_converges_to(module):
    twin = copy.deepcopy(module)
    assert spectral_norm(module) is module
    torchs.spectral_norm(twin, n_power_iterations=2000)
    twin.eval()
    check_close(module.weight, twin.weight, 1e-5, "weight")
    dim = 1 if isinstance(module, nn.ConvTranspose2d) else 0
    assert norm(module.weight.movedim(dim, 0)) == pytest.approx(1, rel=1e-5)


def test_gradient_is_that_of_the_quotient():
    layer = spectral_norm(linear().double())
    loss = layer(gaussian(3, 9, 1, torch.float64)).square().sum()
    weight = layer.parametrizations.weight.original
    (gradient,) = torch.autograd.grad(loss, weight)
    exact = weight.detach().clone().requires_grad_()
    quotient = exact / torch.linalg.svdvals(exact)[0]
    bias = layer.bias.detach()
    outputs = nn.functional.linear(gaussian(3, 9, 1, torch.float64), quotient, bias)
    check_close(gradient, torch.autograd.grad(outputs.square().sum(), exact)[0], 1e-6, "gradient")


def test_warm_start_moves_in_training_only_and_is_saved():
    layer = spectral_norm(linear())
    state = layer.parametrizations.weight[0].state
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(gaussian(6, 9, 5))
    before = state.clone()
    layer.eval()
    assert norm(layer.weight) == pytest.approx(1, rel=1e-3)
    assert torch.equal(state, before)
    layer.train()
    assert norm(layer.weight) == pytest.approx(1, rel=1e-3)
    assert not torch.equal(state, before)
    fresh = spectral_norm(linear(seed=3))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.parametrizations.weight[0].state, state)
    check_close(fresh.weight, layer.weight, 1e-6, "weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_module_may_be_cast(dtype):
    layer = spectral_norm(linear()).to(dtype)
    assert layer.weight.dtype == dtype
    assert norm(layer.weight) == pytest.approx(1, rel=1e-2)


def test_compiles_to_one_graph_and_copies():
    layer = spectral_norm(linear())
    x = gaussian(3, 9, 1)
    expected = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    check_close(compiled(x), expected, 1e-5, "value")


def test_two_forwards_before_a_backward():
    layer = spectral_norm(linear())
    x = gaussian(3, 9, 1)
    (layer(x).sum() + layer(2 * x).sum()).backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["dense", "values"])
def test_pruned_weights_stay_pruned_through_training(mode):
    mask = gaussian(8, 12, 4) > 0.5
    layer = MaskedLinear.from_linear(linear(8, 12), mask, mode=mode)
    spectral_norm(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    x = gaussian(5, 12, 1)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    dense = layer.dense_weight
    assert torch.equal(dense != 0, mask)
    assert norm(dense) == pytest.approx(1, rel=1e-3)
    original = layer.parametrizations.weight.original
    assert original.shape == ((8, 12) if mode == "dense" else (int(mask.sum()),))
    if mode == "dense":
        assert torch.equal(original != 0, mask)
    with pytest.raises(ValueError, match="computed weight"):
        layer.set_mask(~mask)


def test_masked_convolutions_work_too():
    mask = gaussian(4, 18, 4).reshape(4, 2, 3, 3) > 0.5
    layer = spectral_norm(MaskedConv2d.from_conv(nn.Conv2d(2, 4, 3), mask, mode="values"))
    assert norm(layer.dense_weight) == pytest.approx(1, rel=1e-5)
    layer(torch.ones(1, 2, 5, 5)).square().sum().backward()
    assert layer.parametrizations.weight.original.grad.shape == (int(mask.sum()),)


def test_pattern_is_applied_to_any_module():
    mask = gaussian(4, 27, 4) > 0.5
    pattern = SparsityPattern.from_mask(mask.reshape(4, 3, 3, 3))
    for module, dim in ((nn.Conv2d(3, 4, 3), 0), (nn.ConvTranspose2d(4, 3, 3), 1)):
        spectral_norm(module, pattern=pattern)
        assert torch.equal(module.weight != 0, pattern.mask)
        assert norm(module.weight.movedim(dim, 0)) == pytest.approx(1, rel=1e-5)
        module(torch.ones(1, module.in_channels, 5, 5)).square().sum().backward()
        gradient = module.parametrizations.weight.original.grad
        assert torch.equal(gradient != 0, pattern.mask)


def test_an_overflow_does_not_spoil_the_steps_after_it():
    layer = spectral_norm(linear())
    weight = layer.parametrizations.weight.original
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = math.inf
    assert layer.weight.isnan().any()
    with torch.no_grad():
        weight.copy_(kept)
    assert norm(layer.weight) == pytest.approx(1, rel=1e-3)


def test_zero_weight_stays_zero_with_a_finite_gradient():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    spectral_norm(layer, eps=1e-3)
    assert torch.equal(layer.weight, torch.zeros(2, 3))
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_vectors_and_removal():
    layer = spectral_norm(nn.Linear(3, 4), "bias")
    assert layer.bias.norm().item() == pytest.approx(1, rel=1e-5)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "bias")
    assert isinstance(layer.bias, nn.Parameter)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spectral_norm(3), TypeError, "got int"),
        (lambda: spectral_norm(nn.ReLU()), ValueError, "named 'weight'"),
        (lambda: spectral_norm(nn.Linear(2, 2), n_power_iterations=0), ValueError, "got 0"),
        (lambda: spectral_norm(nn.Linear(2, 2), dim=2), ValueError, "2 dimensions, got 2"),
        (lambda: spectral_norm(nn.LazyLinear(2)), ValueError, "lazy or meta"),
        (lambda: spectral_norm(nn.Linear(2, 2), pattern=torch.eye(2)), TypeError, "got Tensor"),
        (
            lambda: spectral_norm(
                nn.Linear(2, 2), pattern=SparsityPattern.from_mask(torch.eye(3) > 0)
            ),
            ValueError,
            r"shape \(2, 2\), got \(3, 3\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
