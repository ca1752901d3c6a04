import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tscnc_kernels
from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern
from tscnc_kernels.nn import MaskedLinear, densify, sparsify, update_masks
from tscnc_kernels.nn._fuse import FusedActivation


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 4))


def mask_for(linear, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(linear.weight.shape, generator=generator) < density


def masked_forward(model, masks, input):
    model = copy.deepcopy(model)
    for name, mask in masks.items():
        model.get_submodule(name).weight.data *= mask
    return model(input)


@pytest.mark.parametrize("mode", ["dense", "values", None])
def test_swaps_exactly_the_named_layers_and_keeps_the_function(mode):
    model, input = mlp(), torch.randn(5, 8)
    masks = {"0": mask_for(model[0]), "2": mask_for(model[2], 0.8)}
    expected = masked_forward(model, masks, input)
    report = sparsify(model, {"0.weight": masks["0"], "2": masks["2"]}, mode=mode)
    assert report.swapped == ["0", "2"]
    assert [type(m) for m in model] == [MaskedLinear, FusedActivation, MaskedLinear, nn.Linear]
    assert (model[0].mode, model[2].mode) == ((mode,) * 2 if mode else ("values", "dense"))
    check_close(model(input), expected, 1e-5, "value")
    assert report.layers[2].reason == "no mask was given"
    densify(model)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    check_close(model(input), expected, 1e-5, "value")


def test_report_prints_one_line_per_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    report = sparsify(model, {"0": torch.eye(4, dtype=torch.bool)})
    gain = f"{report.layers[0].gain:.1f}x predicted"
    assert str(report).splitlines() == [
        "layer  shape  density  now                  gain            reason",
        f"0      4 x 4  25.00%   MaskedLinear values  {gain}  mask given",
        "1      2 x 4  100.00%  Linear, unchanged                    no mask was given",
    ]


def test_existing_zeros_and_prune_state_are_found():
    model = nn.Sequential(
        nn.Linear(256, 320), nn.ReLU(), nn.Linear(320, 12), nn.Linear(12, 4), nn.Linear(4, 64)
    )
    model[0].weight.data *= mask_for(model[0], 0.05)
    prune.random_unstructured(model[2], "weight", 0.4)
    nn.init.zeros_(model[3].weight)
    model[4].weight.data *= mask_for(model[4], 0.9)
    input = torch.randn(5, 256)
    expected = model(input)
    report = sparsify(model)
    assert report.swapped == ["0", "2"]
    reasons = [layer.reason for layer in report.layers]
    assert reasons[:2] == ["existing zeros", "mask of torch.nn.utils.prune"]
    assert reasons[2].startswith("all of its weights are zero")
    assert reasons[3].startswith("dense is as fast with 9")
    assert report.layers[0].gain > 1.05 > report.layers[3].gain
    check_close(model(input), expected, 1e-5, "value")
    assert list(model[2].state_dict()) == ["weight", "bias", "mask_bits"]
    assert model[2].pattern.nnz == round(0.6 * 320 * 12)


def test_dense_layers_stay_dense():
    report = sparsify(model := mlp())
    assert report.swapped == [] and not any(isinstance(m, MaskedLinear) for m in model)
    assert report.layers[0].reason == "none of its weights is zero"


def test_optimizer_made_before_keeps_working_in_dense_mode():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    sparsify(model, {"0": mask_for(model[0])}, mode="dense")
    before = model[0].weight.detach().clone()
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    mask = model[0].pattern.mask
    assert (model[0].weight[~mask] == 0).all() and (model[0].weight[mask] != before[mask]).all()


def test_convolutions_are_swapped_fused_and_taken_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model.append(nn.Conv2d(1, 1, 1, padding_mode="circular"))
    masks = {"0.weight": torch.rand(4, 3, 3, 3) < 0.3, "3": mask_for(model[3])}
    masks["4"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    input = torch.randn(2, 3, 4, 4)
    expected = masked_forward(model[:4], {"0": masks["0.weight"], "3": masks["3"]}, input)
    report = sparsify(model, masks)
    assert report.swapped == ["0", "3"] and report.layers[0].activation == "relu"
    assert "MaskedConv2d values + relu" in str(report)
    assert report.layers[2].reason == "its padding is circular, not of zeros"
    check_close(model[:4](input), expected, 1e-5, "value")
    update_masks(model, {"0": torch.ones(4, 3, 3, 3, dtype=torch.bool)})
    check_close(model[:4](input), expected, 1e-5, "value")
    densify(model)
    assert [type(m) for m in model[:4]] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    check_close(model[:4](input), expected, 1e-5, "value")


def test_layers_that_cannot_be_swapped_say_why():
    shared, hooked, biased = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    twin = nn.Linear(4, 4)
    twin.weight = shared.weight
    hooked.register_forward_hook(lambda module, input, output: None)
    prune.random_unstructured(biased, "bias", 1)

    class Special(nn.Linear):
        pass

    model = nn.Sequential(shared, twin, hooked, biased, Special(4, 4))
    report = sparsify(model, {str(i): torch.eye(4).bool() for i in range(5)})
    assert report.swapped == []
    reasons = [layer.reason for layer in report.layers]
    assert "shared" in reasons[0] and "shared" in reasons[1]
    assert "hooks" in reasons[2] and "pruned bias" in reasons[3]
    assert reasons[4] == "Special is a class of its own"


def test_a_module_used_twice_stays_one_module():
    linear = nn.Linear(6, 6)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    sparsify(model, {"2.weight": torch.eye(6).bool()})
    assert isinstance(model[0], MaskedLinear) and model[0] is model[2]


def test_transformer_layer_keeps_working():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = nn.Sequential(layer)
    masks = {"0.linear1": mask_for(layer.linear1), "0.linear2": mask_for(layer.linear2)}
    input = torch.randn(2, 3, 8)
    expected = masked_forward(model, masks, input)
    assert sparsify(model, masks).swapped == ["0.linear1", "0.linear2"]
    with torch.no_grad():
        check_close(model(input), expected, 1e-5, "value")


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"0.wieght": torch.ones(12, 8).bool()}, ValueError, r"'0.wieght'; close names: 0.weight"),
        ({"encoder": torch.ones(12, 8).bool()}, ValueError, r"known names: 0.weight, 2.weight, 3"),
        ({"1.weight": torch.ones(12, 8).bool()}, ValueError, "no weight .* '1.weight'"),
        ({"0.bias": torch.ones(12).bool()}, ValueError, "'0.bias'"),
        ({"0": torch.ones(8, 12).bool()}, ValueError, r"'0': expected shape \(12, 8\), got \(8"),
        ({"0": torch.ones(12, 8)}, TypeError, r"mask of '0': .*torch.bool, got torch.float32"),
        (
            {"0": torch.ones(12, 8).bool(), "0.weight": torch.ones(12, 8).bool()},
            ValueError,
            "'0' is named twice",
        ),
        ({"2": torch.ones(12, 12).bool(), "3": torch.ones(1, 1).bool()}, ValueError, "'3'"),
    ],
)
def test_bad_masks_leave_the_model_unchanged(masks, error, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        sparsify(model, masks)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.Linear(4, 4, device="meta")])
def test_a_mask_for_a_weight_without_data_is_refused(layer):
    with pytest.raises(ValueError, match="'0': expected a weight with data"):
        sparsify(nn.Sequential(layer), {"0": torch.eye(4).bool()})


def test_arguments_of_other_types_are_named():
    for call in (sparsify, densify, tscnc_kernels.explain, lambda model: update_masks(model, {})):
        with pytest.raises(TypeError, match=r"nn\.Module, got NoneType"):
            call(None)
    with pytest.raises(TypeError, match="mapping, got list"):
        sparsify(mlp(), [torch.eye(4).bool()])
    with pytest.raises(TypeError, match="strings, got 0"):
        sparsify(mlp(), {0: torch.ones(12, 8).bool()})
    with pytest.raises(TypeError, match="Optimizer or None, got str"):
        update_masks(mlp(), {}, "sgd")


def test_roots_and_modes_are_checked():
    kept = SparsityPattern.from_mask(torch.eye(4).bool())
    with pytest.raises(ValueError, match="got a Linear itself"):
        sparsify(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"use to_linear\(\)"):
        densify(MaskedLinear(4, 4, pattern=kept))
    with pytest.raises(ValueError, match="got 'csr'"):
        sparsify(mlp(), mode="csr")
    with pytest.raises(ValueError, match="has no Linear or Conv2d"):
        sparsify(nn.Sequential(nn.ReLU()), {"0": torch.eye(4).bool()})
    model = nn.Sequential(MaskedLinear(4, 4, pattern=kept))
    with pytest.raises(ValueError, match=r"MaskedLinear already; use nn.update_masks"):
        sparsify(model, {"0": torch.eye(4).bool()})


def trained(mode, optimizer_class, **options):
    torch.manual_seed(3)
    model = mlp()
    sparsify(model, {"0": mask_for(model[0]), "2": mask_for(model[2])}, mode=mode)
    optimizer = optimizer_class(model.parameters(), lr=0.05, **options)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 40).reshape(5, 8)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("optimizer_class", "options", "states"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, ["momentum_buffer"]),
        (torch.optim.AdamW, {"weight_decay": 0.1}, ["exp_avg", "exp_avg_sq"]),
    ],
)
def test_update_masks_carries_weights_and_optimizer_state(optimizer_class, options, states):
    models = {mode: trained(mode, optimizer_class, **options) for mode in ("dense", "values")}
    dense, values = models["dense"][0], models["values"][0]
    old, new = dense[0].pattern.mask, mask_for(dense[0], seed=9)
    both = old & new
    weight = dense[0].weight.detach().clone()
    before = {key: models["dense"][1].state[dense[0].weight][key].clone() for key in states}
    assert (new & ~old).any() and (old & ~new).any()
    for model, optimizer in models.values():
        update_masks(model, {"0.weight": new}, optimizer)
    assert torch.equal(dense[0].weight, weight * both)
    check_close(values[0].dense_weight, weight * both, 1e-5, "weight")
    for key in states:
        carried = models["dense"][1].state[dense[0].weight][key]
        assert torch.equal(carried, before[key] * both)
        packed = models["values"][1].state[values[0].weight][key]
        check_close(values[0].pattern.scatter(packed), carried, 1e-5, key)
    for model, optimizer in models.values():
        step(model, optimizer)
        step(model, optimizer)
    check_close(values[0].dense_weight, dense[0].weight, 1e-4, "weight after more steps")
    assert (dense[0].weight[~new] == 0).all() and (dense[0].weight[new & ~old] != 0).any()


def test_update_masks_checks_everything_first():
    model, optimizer = trained("values", torch.optim.SGD)
    before = copy.deepcopy(model.state_dict())
    good = mask_for(model[0], seed=4).new_ones(12, 8)
    for bad, error, message in (
        ({"3": torch.ones(4, 12).bool()}, ValueError, "'3' to be a masked layer, got Linear"),
        ({"2": torch.ones(4, 12).bool()}, ValueError, r"'2': expected shape \(12, 12\)"),
        ({"2": torch.ones(12, 12)}, TypeError, r"'2': .* got torch.float32"),
        ({"9": good}, ValueError, "known names"),
    ):
        with pytest.raises(error, match=message):
            update_masks(model, {"0": good, **bad}, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
