import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern
from tscnc_kernels.nn import MaskedLinear

MODES = ["dense", "values"]


def pattern(rows=6, width=8, density=0.3, seed=0) -> SparsityPattern:
    generator = torch.Generator().manual_seed(seed)
    return SparsityPattern.from_mask(torch.rand(rows, width, generator=generator) < density)


def layer(mode, seed=0, **kwargs) -> MaskedLinear:
    return MaskedLinear(8, 6, pattern=pattern(seed=seed), mode=mode, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_linear_with_masked_weight(mode, bias):
    masked = layer(mode, bias=bias)
    assert masked.weight.shape == ((6, 8) if mode == "dense" else (masked.pattern.nnz,))
    assert (masked.bias is not None) == bias
    input = torch.randn(3, 4, 8)
    expected = F.linear(input, masked.dense_weight, masked.bias)
    check_close(masked(input), expected, 1e-6, "value")
    assert not masked.dense_weight[~masked.pattern.mask].any()
    assert masked.weight.abs().max() <= 8**-0.5


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(
        p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=True
    ),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "fused_adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1),
}


def train(model, optimizer, steps=4, amp=False):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        input = torch.randn(16, 8, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(input).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
def test_zeros_survive_optimizer_steps(name, amp):
    masked = layer("dense")
    before = masked.weight.detach().clone()
    train(masked, OPTIMIZERS[name](masked.parameters()), amp=amp)
    mask = masked.pattern.mask
    assert (masked.weight[~mask] == 0).all()
    assert (masked.weight[mask] != before[mask]).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_modes_train_to_the_same_weights(name):
    dense, values = layer("dense"), layer("values")
    values.load_state_dict(dense.state_dict())
    for module in (dense, values):
        train(module, OPTIMIZERS[name](module.parameters()))
    check_close(values.dense_weight, dense.weight, 1e-5, "weight")
    check_close(values.bias, dense.bias, 1e-5, "bias")


def test_zeros_survive_averaging_and_copies():
    masked = layer("dense")
    average = torch.optim.swa_utils.AveragedModel(
        masked,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9),
        use_buffers=True,
    )
    optimizer = torch.optim.AdamW(masked.parameters(), 0.1)
    for _ in range(3):
        train(masked, optimizer, steps=1)
        average.update_parameters(masked)
    assert average.module.pattern == masked.pattern
    assert (average.module.weight[~masked.pattern.mask] == 0).all()
    assert not torch.equal(average.module.weight, masked.weight)


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


@pytest.mark.parametrize("source", MODES)
@pytest.mark.parametrize("target", MODES)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_carries_weight_and_mask_between_modes(source, target, assign):
    saved, loaded = layer(source, seed=1), layer(target, seed=3)
    assert saved.pattern.nnz != loaded.pattern.nnz
    state = saved.state_dict()
    assert list(state) == ["weight", "bias", "mask_bits"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert loaded.mode == target and loaded.pattern == saved.pattern
    assert torch.equal(loaded.dense_weight, saved.dense_weight)
    train(loaded, torch.optim.SGD(loaded.parameters(), 0.1))


def test_dense_state_loads_into_a_plain_linear():
    masked, plain = layer("dense"), nn.Linear(8, 6)
    result = plain.load_state_dict(masked.state_dict(), strict=False)
    assert result.unexpected_keys == ["mask_bits"] and result.missing_keys == []
    input = torch.randn(5, 8)
    check_close(plain(input), masked(input), 1e-6, "value")


@pytest.mark.parametrize("mode", MODES)
def test_plain_weight_is_masked_on_loading(mode):
    masked, plain = layer(mode), nn.Linear(8, 6)
    with pytest.raises(RuntimeError, match="mask_bits"):
        masked.load_state_dict(plain.state_dict())
    result = masked.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys == ["mask_bits"]
    assert torch.equal(masked.dense_weight, plain.weight * masked.pattern.mask)


def test_corrupt_states_are_refused():
    masked = layer("values")
    state = masked.state_dict()
    for bits, message in (
        (torch.zeros(5, dtype=torch.uint8), "6 bytes"),
        (torch.zeros(6), "torch.uint8, got torch.float32"),
        (state["mask_bits"].numpy(), "a tensor, got ndarray"),
    ):
        with pytest.raises(RuntimeError, match=f"mask_bits: expected .*{message}"):
            masked.load_state_dict({**state, "mask_bits": bits})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        masked.load_state_dict({**state, "weight": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        masked.load_state_dict({**state, "other": torch.zeros(3)})


@pytest.mark.parametrize("mode", MODES)
def test_a_state_with_a_mask_alone_prunes_the_present_weight(mode):
    masked, other = layer(mode), pattern(seed=5)
    wanted = masked.dense_weight.detach() * other.mask
    masked.load_state_dict({"mask_bits": other.bits}, strict=False)
    assert masked.pattern == other
    assert torch.equal(masked.dense_weight, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_without_data_takes_a_mask(mode):
    masked, other = layer(mode, device="meta"), pattern(seed=5)
    masked.load_state_dict({"mask_bits": other.bits}, strict=False)
    assert masked.pattern == other and masked.weight.is_meta
    assert masked.weight.shape == ((6, 8) if mode == "dense" else (other.nnz,))


@pytest.mark.parametrize("mode", MODES)
def test_set_mask_keeps_kept_weights_and_the_parameter(mode):
    masked = layer(mode)
    parameter, old = masked.weight, masked.pattern.mask
    before = masked.dense_weight.detach().clone()
    masked(torch.randn(4, 8)).sum().backward()
    new = pattern(seed=5).mask
    masked.set_mask(new)
    assert masked.weight is parameter and torch.equal(masked.pattern.mask, new)
    assert torch.equal(masked.dense_weight, before * old * new)
    assert masked.weight.grad.shape == masked.weight.shape
    train(masked, torch.optim.SGD(masked.parameters(), 0.1))
    if mode == "dense":
        assert (masked.weight[~new] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_backward_through_a_mask_that_has_changed_is_refused(mode):
    masked = layer(mode)
    output = masked(torch.randn(2, 8, requires_grad=True))
    masked.set_mask(masked.pattern.mask.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_from_linear_and_back(mode):
    linear = nn.Linear(8, 6).eval()
    linear.weight.requires_grad_(False)
    wanted = linear.weight * pattern().mask
    weight, bias = linear.weight, linear.bias
    masked = MaskedLinear.from_linear(linear, pattern().mask, mode)
    assert torch.equal(masked.dense_weight, wanted)
    assert (masked.weight is weight) == (mode == "dense") and masked.bias is bias
    assert not masked.training and not masked.weight.requires_grad
    back = masked.to_linear()
    assert type(back) is nn.Linear and back.bias is bias and not back.training
    assert torch.equal(back.weight, wanted) and not back.weight.requires_grad


def test_values_off_the_mask_are_dropped_even_if_not_finite():
    linear = nn.Linear(8, 6)
    linear.weight.data.masked_fill_(~pattern().mask, torch.nan)
    masked = MaskedLinear.from_linear(linear, pattern(), "dense")
    assert torch.isfinite(masked.weight).all()


@pytest.mark.parametrize("mode", MODES)
def test_dtype_and_device_moves(mode):
    masked = layer(mode).double()
    assert masked(torch.zeros(1, 8, dtype=torch.float64)).dtype == torch.float64
    assert masked.pattern == pattern()
    lazy = layer(mode, device="meta")
    assert lazy.weight.is_meta and lazy.pattern.device.type == "cpu"
    lazy.to_empty(device="cpu").reset_parameters()
    lazy.load_state_dict(layer(mode).state_dict())
    assert torch.isfinite(lazy(torch.zeros(1, 8))).all()


@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph(mode):
    torch._dynamo.reset()
    masked = layer(mode)
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    input = torch.randn(5, 8)
    check_close(compiled(input), masked(input), 1e-6, "value")
    (found,) = torch.autograd.grad(compiled(input).sum(), masked.weight)
    check_close(found, torch.autograd.grad(masked(input).sum(), masked.weight)[0], 1e-6, "gradient")


def test_functional_call_and_per_sample_gradients():
    masked = layer("values")
    parameters = {name: p.detach() for name, p in masked.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(masked, parameters, (sample,)).square().sum()

    samples = torch.randn(3, 8)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for index, sample in enumerate(samples):
        expected = torch.func.grad(loss)(parameters, sample)
        check_close(found["weight"][index], expected["weight"], 1e-5, "gradient")


def test_all_pruned_layer_gives_the_bias_and_trains():
    empty = SparsityPattern.from_mask(torch.zeros(6, 8, dtype=torch.bool))
    for mode in MODES:
        masked = MaskedLinear(8, 6, pattern=empty, mode=mode)
        assert torch.equal(masked(torch.randn(2, 8)), masked.bias.expand(2, 6))
        train(masked, torch.optim.AdamW(masked.parameters()))


def test_repr_shows_sparsity_and_nnz():
    kept = SparsityPattern.from_mask(torch.eye(4, dtype=torch.bool))
    assert repr(MaskedLinear(4, 4, pattern=kept, mode="values")) == (
        "MaskedLinear(in_features=4, out_features=4, bias=True, mode='values', "
        "sparsity=75.00%, nnz=4)"
    )


@pytest.mark.parametrize(
    ("linear", "error", "message"),
    [
        (nn.Conv2d(8, 6, 1), TypeError, "nn.Linear, got Conv2d"),
        (nn.Linear(8, 6, device="meta"), ValueError, "meta device"),
        (weight_norm(nn.Linear(8, 6)), ValueError, "got a computed weight"),
    ],
)
def test_what_cannot_be_taken_over_is_named(linear, error, message):
    with pytest.raises(error, match=message):
        MaskedLinear.from_linear(linear, pattern())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"pattern": pattern().mask}, TypeError, "SparsityPattern, got Tensor"),
        ({"pattern": pattern(8, 6)}, ValueError, r"shape \(6, 8\), got \(8, 6\)"),
        ({"pattern": pattern(), "mode": "csr"}, ValueError, "dense, values, got 'csr'"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        MaskedLinear(8, 6, **kwargs)
