import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from benchmarks.spectra import gaussian
from tscnc_kernels import conv_singular_values, extreme_singular_values, spectral_report
from tscnc_kernels.nn import sparsify
from tscnc_kernels.nn.spectral_report import renyi_numbers

GOLDEN = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def layer_of(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight)
    return linear


def test_golden_values():
    (layer,) = spectral_report(layer_of(GOLDEN)).layers
    assert (layer.name, layer.operator, layer.shape) == ("weight", "matrix", (3, 2))
    assert layer.sigma_max == pytest.approx(9.52551809, rel=1e-8)
    assert layer.sigma_min_full == pytest.approx(0.51430058, rel=1e-7)
    assert layer.kappa_full == layer.kappa_structural == pytest.approx(18.52130534, rel=1e-8)
    assert layer.stable_rank == pytest.approx(1.00291512, rel=1e-8)
    largest = 1 + 0.51430058 / 9.52551809
    assert layer.effective_rank == pytest.approx((1.22398223, 1.10766988, largest), rel=1e-8)
    assert layer.effective_sparsity == pytest.approx((5.27182688, 4.84615385, 21 / 6), rel=1e-8)


def test_effective_numbers_count_equal_entries_and_ignore_zeros():
    for count in (1, 3, 17):
        values = torch.cat([torch.full((count,), 2.5), torch.zeros(5)])
        assert renyi_numbers(values) == pytest.approx((count, count, count), rel=1e-12)
    assert renyi_numbers(torch.zeros(3)) == (0, 0, 0)
    numbers = renyi_numbers(torch.tensor([5.0, 2.0, 1.0, 1.0]))
    assert numbers.one > numbers.two > numbers.infinity


def test_pruned_layers_of_every_kind_are_measured_alike():
    weight = torch.tensor([[2.0, 9.0, 0.0], [0.0, 9.0, 5.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, False, False], [False, False, True], [False, False, False]])
    named = nn.Sequential(layer_of(weight.clone()))
    swapped = nn.Sequential(layer_of(weight.clone()))
    sparsify(swapped, {"0": mask}, mode="values")
    pruned = nn.Sequential(layer_of(weight.clone()))
    prune.custom_from_mask(pruned[0], "weight", mask)
    reports = [
        spectral_report(named, {"0.weight": mask}),
        spectral_report(swapped),
        spectral_report(pruned),
    ]
    for (layer,) in (report.layers for report in reports):
        assert (layer.dead_rows, layer.dead_columns, layer.structural_rank) == (1, 1, 2)
        assert layer.density == pytest.approx(2 / 9)
        assert layer.sigma_max == pytest.approx(5.0)
        assert layer.sigma_min_full == 0 and layer.kappa_full == math.inf
        assert layer.kappa_structural == pytest.approx(2.5)
        assert layer.stable_rank == pytest.approx(29 / 25)
        assert layer.effective_sparsity.infinity == pytest.approx(7 / 5)


def test_structural_ends_are_those_of_extreme_singular_values():
    mask = gaussian(40, 40, 7) > 1.8
    model = nn.Sequential(layer_of(gaussian(40, 40)))
    sparsify(model, {"0": mask})
    (layer,) = spectral_report(model).layers
    found = extreme_singular_values([model[0].dense_weight], [model[0].pattern], rank="structural")
    assert layer.structural_rank == int(found.rank) < 40
    assert layer.sigma_max == pytest.approx(found.sigma_max.item(), rel=1e-5)
    assert layer.sigma_min_structural == pytest.approx(found.sigma_min.item(), rel=1e-4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.deep(self.norm(self.conv(x))).mean(dim=(2, 3)))


@pytest.mark.parametrize("operator", ["circular", "zeros"])
def test_convolutions_get_a_line_on_their_operator(operator):
    model = Net().train()
    means = model.norm.running_mean.clone()
    report = spectral_report(model, operator=operator, example_input=torch.randn(2, 3, 8, 12))
    assert [(layer.name, layer.operator) for layer in report.layers] == [
        ("conv.weight", "matrix"),
        ("conv.weight", operator),
        ("deep.weight", "matrix"),
        ("deep.weight", operator),
        ("head.weight", "matrix"),
    ]
    first = conv_singular_values(model.conv.weight, (8, 12), operator, 2)
    deep = conv_singular_values(model.deep.weight, (4, 6), operator, groups=2)
    for layer, found in ((report.layers[1], first), (report.layers[3], deep)):
        assert layer.sigma_max == found.sigma_max.item()
        assert layer.kappa_full == pytest.approx((found.sigma_max / found.sigma_min).item())
        assert layer.effective_rank is None and math.isnan(layer.kappa_structural)
    assert model.training and model.norm.training
    assert torch.equal(model.norm.running_mean, means)


def test_masked_convolutions_are_measured_as_the_dense_ones_they_stand_for():
    mask = gaussian(4, 18, 3).reshape(4, 2, 3, 3) > 0.8
    model, input = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1)), torch.randn(1, 2, 6, 6)
    expected = spectral_report(model, {"0": mask}, operator="zeros", example_input=input).layers
    assert sparsify(model, {"0": mask}).swapped == ["0"]
    found = spectral_report(model, operator="zeros", example_input=input).layers
    assert found == expected
    assert found[0].density == pytest.approx(mask.double().mean().item())


def test_table_has_a_line_per_entry_of_equal_length_and_never_says_nan():
    model = Net()
    nn.init.zeros_(model.head.weight)
    report = spectral_report(model, operator="circular", example_input=torch.randn(1, 3, 8, 8))
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report.layers)
    assert len({len(line) for line in lines}) == 1
    assert "4 x 3 x 3 x 3" in lines[2] and "circular" in lines[3] and "∞" in lines[-1]
    assert "nan" not in str(report)


def test_a_model_without_layers_has_an_empty_report():
    assert spectral_report(nn.ReLU()).layers == ()
    assert spectral_report(nn.ReLU(), operator="zeros").layers == ()


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (3, {}, TypeError, "got int"),
        (layer_of(torch.tensor([[1.0, math.nan]])), {}, ValueError, "'weight' holds NaN"),
        (nn.LazyLinear(3), {}, ValueError, "lazy or meta"),
        (nn.Linear(2, 2, device="meta"), {}, ValueError, "lazy or meta"),
        (nn.Linear(2, 2), {"operator": "same"}, ValueError, "got 'same'"),
        (nn.Conv2d(2, 2, 3), {"operator": "zeros"}, ValueError, "got None"),
        (nn.Linear(2, 2), {"masks": {"fc": torch.ones(2, 2) > 0}}, ValueError, "'fc'"),
        (nn.Linear(2, 2), {"masks": {"weight": torch.ones(2, 3) > 0}}, ValueError, r"\(2, 3\)"),
        (nn.Linear(2, 2), {"masks": {"weight": torch.ones(2, 2)}}, TypeError, "torch.float32"),
        (
            nn.Conv2d(1, 1, 2),
            {"operator": "zeros", "example_input": torch.ones(1, 1, 4, 4)},
            ValueError,
            "operator of 'weight': expected an odd kernel",
        ),
    ],
)
def test_bad_input_is_named(model, options, error, message):
    with pytest.raises(error, match=message):
        spectral_report(model, **options)
