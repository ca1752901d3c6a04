import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern
from tscnc_kernels.nn import MaskedConv2d, MaskedLinear

MODES = ["dense", "values"]
SHAPE = 6, 4, 3, 3


def pattern(shape=SHAPE, density=0.3, seed=0) -> SparsityPattern:
    generator = torch.Generator().manual_seed(seed)
    return SparsityPattern.from_mask(torch.rand(shape, generator=generator) < density)


def layer(mode, seed=0, padding=1, **kwargs) -> MaskedConv2d:
    return MaskedConv2d(4, 6, 3, padding=padding, pattern=pattern(seed=seed), mode=mode, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_conv_with_masked_weight(mode, bias):
    masked = layer(mode, bias=bias)
    assert masked.weight.shape == (SHAPE if mode == "dense" else (masked.pattern.nnz,))
    assert (masked.bias is not None) == bias
    input = torch.randn(3, 4, 8, 7)
    expected = F.conv2d(input, masked.dense_weight, masked.bias, padding=1)
    check_close(masked(input), expected, 1e-5, "value")
    check_close(masked(input[0]), expected[0], 1e-5, "one image")
    assert not masked.dense_weight[~masked.pattern.mask].any()
    assert masked.weight.abs().max() <= 36**-0.5


CONVS = {
    "plain": nn.Conv2d(4, 6, 3),
    "stride": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "same": nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2),
    "groups": nn.Conv2d(4, 6, (3, 1), groups=2, bias=False),
    "pointwise": nn.Conv2d(4, 6, 1, stride=(1, 2)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONVS)
def test_from_conv_and_back(mode, name):
    conv = copy.deepcopy(CONVS[name]).eval()
    conv.weight.requires_grad_(False)
    kept = pattern(tuple(conv.weight.shape))
    wanted = conv.weight * kept.mask
    weight, bias = conv.weight, conv.bias
    masked = MaskedConv2d.from_conv(conv, kept.mask, mode)
    assert torch.equal(masked.dense_weight, wanted)
    assert (masked.weight is weight) == (mode == "dense") and masked.bias is bias
    assert not masked.training and not masked.weight.requires_grad
    back = masked.to_conv()
    assert type(back) is nn.Conv2d and back.bias is bias and not back.training
    assert torch.equal(back.weight, wanted) and not back.weight.requires_grad
    assert repr(back) == repr(conv)
    input = torch.randn(2, 4, 9, 8)
    check_close(masked(input), back(input), 1e-5, "value")


def test_values_off_the_mask_are_dropped_even_if_not_finite():
    conv = nn.Conv2d(4, 6, 3)
    conv.weight.data.masked_fill_(~pattern().mask, torch.nan)
    masked = MaskedConv2d.from_conv(conv, pattern(), "dense")
    assert torch.isfinite(masked.weight).all()


def train(model, optimizer, steps=4, amp=False):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        input = torch.randn(3, 4, 5, 5, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(input).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
def test_zeros_survive_optimizer_steps(amp):
    masked = layer("dense")
    before = masked.weight.detach().clone()
    train(masked, torch.optim.AdamW(masked.parameters(), 0.1, weight_decay=0.1), amp=amp)
    mask = masked.pattern.mask
    assert (masked.weight[~mask] == 0).all()
    assert (masked.weight[mask] != before[mask]).all()


def test_both_modes_train_to_the_same_weights():
    dense, values = layer("dense"), layer("values")
    values.load_state_dict(dense.state_dict())
    for module in (dense, values):
        train(module, torch.optim.SGD(module.parameters(), 0.1, momentum=0.9))
    check_close(values.dense_weight, dense.weight, 1e-5, "weight")
    check_close(values.bias, dense.bias, 1e-5, "bias")


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_independent(mode):
    masked = layer(mode)
    buffer = io.BytesIO()
    torch.save(masked, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(masked), torch.load(buffer, weights_only=False)):
        assert twin.pattern == masked.pattern and twin.mode == mode
        assert torch.equal(twin.weight, masked.weight)
        train(twin, torch.optim.SGD(twin.parameters(), 0.1))
        assert not torch.equal(twin.weight, masked.weight)


@pytest.mark.parametrize("stored", MODES)
@pytest.mark.parametrize("loading", MODES)
def test_states_load_into_either_mode_with_their_mask(stored, loading):
    source, target = layer(stored), layer(loading, seed=5)
    parameter = target.weight
    target.load_state_dict(source.state_dict())
    assert target.pattern == source.pattern and target.weight is parameter
    assert torch.equal(target.dense_weight, source.dense_weight)


def test_dense_state_loads_into_a_plain_conv():
    masked, plain = layer("dense"), nn.Conv2d(4, 6, 3, padding=1)
    result = plain.load_state_dict(masked.state_dict(), strict=False)
    assert result.unexpected_keys == ["mask_bits"] and result.missing_keys == []
    input = torch.randn(2, 4, 5, 5)
    check_close(plain(input), masked(input), 1e-5, "value")


@pytest.mark.parametrize("mode", MODES)
def test_set_mask_keeps_kept_weights_and_the_parameter(mode):
    masked = layer(mode)
    parameter, old = masked.weight, masked.pattern.mask
    before = masked.dense_weight.detach().clone()
    masked(torch.randn(2, 4, 5, 5)).sum().backward()
    new = pattern(seed=5).mask
    masked.set_mask(new)
    assert masked.weight is parameter and torch.equal(masked.pattern.mask, new)
    assert torch.equal(masked.dense_weight, before * old * new)
    assert masked.weight.grad.shape == masked.weight.shape


@pytest.mark.parametrize("mode", MODES)
def test_backward_through_a_mask_that_has_changed_is_refused(mode):
    masked = layer(mode)
    output = masked(torch.randn(2, 4, 5, 5, requires_grad=True))
    masked.set_mask(masked.pattern.mask.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_channels_last_models_stay_channels_last(mode):
    model = nn.Sequential(layer(mode), nn.ReLU()).to(memory_format=torch.channels_last)
    input = torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    output = model(input)
    assert output.is_contiguous(memory_format=torch.channels_last)
    check_close(output, model(input.contiguous()), 1e-5, "value")


@pytest.mark.parametrize("mode", MODES)
def test_dtype_and_device_moves(mode):
    masked = layer(mode).double()
    assert masked(torch.zeros(1, 4, 3, 3, dtype=torch.float64)).dtype == torch.float64
    assert masked.pattern == pattern()
    lazy = layer(mode, device="meta")
    assert lazy.weight.is_meta and lazy.pattern.device.type == "cpu"
    lazy.to_empty(device="cpu").reset_parameters()
    lazy.load_state_dict(layer(mode).state_dict())
    assert torch.isfinite(lazy(torch.zeros(1, 4, 3, 3))).all()


@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph(mode):
    torch._dynamo.reset()
    masked = layer(mode)
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 4, 6, 6)
    check_close(compiled(input), masked(input), 1e-5, "value")
    (found,) = torch.autograd.grad(compiled(input).sum(), masked.weight)
    check_close(found, torch.autograd.grad(masked(input).sum(), masked.weight)[0], 1e-5, "gradient")


@pytest.mark.parametrize("mode", MODES)
def test_export_sees_standard_ops_alone(mode):
    masked = layer(mode)
    input = torch.randn(2, 4, 6, 6)
    program = torch.export.export(masked, (input,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith("aten.") for target in targets)
    check_close(program.module()(input), masked(input), 1e-5, "value")


def test_per_sample_gradients():
    masked = layer("values")
    parameters = {name: p.detach() for name, p in masked.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(masked, parameters, (sample,)).square().sum()

    samples = torch.randn(3, 4, 5, 5)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for index, sample in enumerate(samples):
        expected = torch.func.grad(loss)(parameters, sample)
        check_close(found["weight"][index], expected["weight"], 1e-4, "gradient")


def test_all_pruned_layer_gives_the_bias_and_trains():
    empty = SparsityPattern.from_mask(torch.zeros(SHAPE, dtype=torch.bool))
    for mode in MODES:
        masked = MaskedConv2d(4, 6, 3, pattern=empty, mode=mode)
        expected = masked.bias[:, None, None].expand(2, 6, 1, 1)
        assert torch.equal(masked(torch.randn(2, 4, 3, 3)), expected)
        train(masked, torch.optim.AdamW(masked.parameters()))


def test_repr_shows_geometry_sparsity_and_nnz():
    kept = SparsityPattern.from_mask(torch.eye(4, dtype=torch.bool)[:, :, None, None])
    assert repr(MaskedConv2d(4, 4, 1, 2, padding=1, pattern=kept, mode="values")) == (
        "MaskedConv2d(4, 4, kernel_size=(1, 1), stride=(2, 2), padding=(1, 1), bias=True, "
        "mode='values', sparsity=75.00%, nnz=4)"
    )


@pytest.mark.parametrize(
    ("conv", "error", "message"),
    [
        (nn.Linear(8, 6), TypeError, "a nn.Conv2d, got Linear"),
        (nn.ConvTranspose2d(4, 6, 3), TypeError, "got ConvTranspose2d"),
        (nn.Conv2d(4, 6, 3, device="meta"), ValueError, "meta device"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), ValueError, "got 'reflect'"),
        (weight_norm(nn.Conv2d(4, 6, 3)), ValueError, "got a computed weight"),
    ],
)
def test_what_cannot_be_taken_over_is_named(conv, error, message):
    with pytest.raises(error, match=message):
        MaskedConv2d.from_conv(conv, pattern())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"pattern": pattern().mask}, TypeError, "SparsityPattern, got Tensor"),
        ({"pattern": pattern((4, 6, 3, 3))}, ValueError, r"\(6, 4, 3, 3\), got \(4, 6, 3, 3\)"),
        ({"pattern": pattern(), "mode": "csr"}, ValueError, "dense, values, got 'csr'"),
        ({"pattern": pattern(), "groups": 4}, ValueError, "divide 4 and 6 channels, got 4"),
        ({"pattern": pattern(), "stride": 0}, ValueError, "stride of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        MaskedConv2d(4, 6, 3, **kwargs)


def test_a_matrix_is_no_kernel():
    kept = SparsityPattern.from_mask(torch.ones(6, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(6, 4, 3, 3\), got \(6, 4\)"):
        MaskedConv2d(4, 6, 3, pattern=kept)
    with pytest.raises(ValueError, match=r"\(6, 4\), got \(6, 4, 3, 3\)"):
        MaskedLinear(4, 6, pattern=pattern())
