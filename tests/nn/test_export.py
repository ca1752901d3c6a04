"""Exported graphs hold standard ops only, whatever runs in eager mode."""

import pytest
import torch
from torch import nn

from tests.op_suite import check_close
from tscnc_kernels.nn import densify, sparsify


def network(mode):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.GELU()
    )
    masks = {name: torch.rand(model.get_submodule(name).weight.shape) < 0.2 for name in ("0", "3")}
    report = sparsify(model, masks, mode=mode)
    assert [layer.activation for layer in report.layers] == ["relu", "gelu"]
    return model.eval(), torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize("mode", ["dense", "values"])
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_gives_standard_ops_and_the_same_values(mode, strict):
    model, input = network(mode)
    program = torch.export.export(model, (input,), strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and not [name for name in called if "tscnc" in name]
    check_close(program.module()(input), model(input), 1e-5, "value")


@pytest.mark.parametrize("mode", ["dense", "values"])
def test_torchscript_tracing_sees_standard_ops(mode):
    model, input = network(mode)
    with pytest.warns(DeprecationWarning):
        traced = torch.jit.trace(model, input)
    assert "tscnc_kernels::" not in str(traced.inlined_graph)
    check_close(traced(input), model(input), 1e-5, "value")


@pytest.mark.parametrize("mode", ["dense", "values"])
def test_onnx_export_of_a_densified_model_holds_standard_ops(mode, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, input = network(mode)
    densify(model)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (input,), str(path), dynamo=True)
    assert {node.domain for node in onnx.load(str(path)).graph.node} == {""}


@pytest.mark.parametrize("mode", ["dense", "values"])
def test_a_densified_copy_exports_like_any_model(mode):
    model, input = network(mode)
    expected = model(input)
    densify(model)
    program = torch.export.export(model, (input,))
    check_close(program.module()(input), expected, 1e-5, "value")
