import pytest
import torch
from torch import nn

import tscnc_kernels
from tscnc_kernels import _autotune, explain
from tscnc_kernels.nn import sparsify


def mask(*shape, density=0.1):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(*shape, generator=generator) < density


def network(density=0.05, mode=None):
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
    sparsify(model, {"0": mask(256, 512, density=density)}, mode=mode)
    return model


def test_before_any_call_everything_is_predicted():
    lines = explain(network()).splitlines()
    header = ("layer", "product", "runs", "predicted", "measured", "dense", "reason")
    assert tuple(lines[0].split()) == header
    assert lines[1].startswith("0: 256 x 512, ") and "kept, values" in lines[1]
    assert "batch 128, float32" in lines[2]
    for line, product in zip(lines[1:3], ("forward", "both gradients"), strict=True):
        assert product in line and " panel " in line and line.count(" ms") == 2
        assert line.endswith("predicted, autotuning is off")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("separate", "products"),
    [(3e-3, ["forward", "both gradients"]), (0.5e-3, ["forward", "grad_input", "grad_weight"])],
)
def test_after_a_call_measured_times_are_shown(separate, products, tuner, monkeypatch):
    def measure(names, compute, clock):
        for name in names:
            compute(name)
        times = {"dense": 4e-3, "panel": 1e-3, "separate": separate}
        return {name: times.get(name, 9e-3) for name in names}

    monkeypatch.setattr(_autotune, "measure", measure)
    model = network()
    input = torch.randn(32, 512, requires_grad=True)
    model(input).sum().backward()
    lines = explain(model).splitlines()
    assert "batch 32" in lines[2]
    for line, product in zip(lines[1:], products, strict=True):
        dense = "8 ms" if product == "both gradients" else "4 ms"
        assert product in line and "  1 ms  " in line and f"  {dense}  " in line
        assert line.endswith("measured")


def test_what_would_make_it_faster_is_said():
    assert "mode='values' would take about" in explain(network(0.05, "dense"))
    text = explain(network(0.98))
    assert "dense" in text.splitlines()[1]
    assert "0: sparse kernels are expected to win once at most" in text
    with tscnc_kernels.use_backend("reference"):
        assert "the backend 'reference' has no sparse kernel" in explain(network())


def test_convolutions_are_explained():
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
    sparsify(model, {"0": mask(64, 32, 3, 3)})
    before = explain(model)
    assert "0: 64 x 32 x 3 x 3" in before and "batch 4096" in before
    model(torch.randn(2, 32, 8, 8))
    assert "batch 128" in explain(model)


def test_models_without_masked_layers_say_so():
    assert explain(nn.ReLU()) == "no masked layer"
    with pytest.raises(TypeError, match=r"nn\.Module, got NoneType"):
        explain(None)
