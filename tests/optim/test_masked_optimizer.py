"""The optimizers against torch.optim's on the same model, and their life beside a training loop."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.op_suite import check_close
from tscnc_kernels import nn as tnn
from tscnc_kernels.optim import MaskedAdamW, MaskedSGD, parameter_patterns

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"lr": 0.05, "weight_decay": 0.1}
KINDS = {"SGD": (MaskedSGD, torch.optim.SGD, SGD), "AdamW": (MaskedAdamW, torch.optim.AdamW, ADAMW)}


def masks_of(seed, density=0.3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "0.weight": torch.rand(13, 9, generator=generator) < density,
        "2.weight": torch.rand(4, 13, generator=generator) < density,
    }


def model_of(mode="dense", seed=0):
    """Two masked layers and a dense one."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 4), nn.Linear(4, 3))
    tnn.sparsify(model, masks_of(seed), mode=mode)
    return model


def train(model, optimizer, steps, seed=1, scheduler=None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 9, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return model


def dense_parameters(model):
    dense = copy.deepcopy(model)
    tnn.densify(dense)
    return [p.detach() for p in dense.parameters()]


def assert_same(model, twin, tolerance=0.0):
    for a, b in zip(dense_parameters(model), dense_parameters(twin), strict=True):
        if tolerance:
            check_close(a, b, tolerance, "parameter")
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["dense", "values"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_torch(kind, mode):
    ours, theirs, options = KINDS[kind]
    model, twin = model_of(mode), model_of("dense")
    optimizer = ours(model.parameters(), **options, model=model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    train(model, optimizer, 6, scheduler=scheduler)
    reference = theirs(twin.parameters(), **options, foreach=False)
    train(twin, reference, 6, scheduler=torch.optim.lr_scheduler.StepLR(reference, 2, gamma=0.5))
    assert_same(model, twin, 2e-5)


def test_adam_with_amsgrad_equals_torch():
    model, twin = model_of(), model_of()
    options = {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True}
    ours = MaskedAdamW(model.parameters(), **options, decoupled_weight_decay=False, model=model)
    train(model, ours, 5)
    train(twin, torch.optim.Adam(twin.parameters(), **options), 5)
    assert_same(model, twin, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_state_has_one_entry_per_kept_weight(kind):
    ours, _, options = KINDS[kind]
    model = model_of()
    optimizer = ours(model.parameters(), **options, model=model)
    train(model, optimizer, 1)
    for weight, pattern in parameter_patterns(model).items():
        sizes = {
            v.numel() for k, v in optimizer.state[weight].items() if k not in ("step", "pattern")
        }
        assert sizes == {pattern.nnz}


def test_groups_keep_their_own_options():
    model, twin = model_of(), model_of()

    def groups(of):
        weights = [p for p in of.parameters() if p.dim() > 1]
        biases = [p for p in of.parameters() if p.dim() == 1]
        return [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.2}]

    ours = MaskedSGD(groups(model), **SGD, model=model)
    train(model, ours, 3)
    train(twin, torch.optim.SGD(groups(twin), **SGD), 3)
    assert_same(model, twin, 1e-5)
    with pytest.raises(ValueError, match=r"lr <= 1e.15, got -1"):
        ours.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": -1})


@pytest.mark.parametrize("mode", ["dense", "values"])
@pytest.mark.parametrize("told", [True, False], ids=["told", "not_told"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_mask_is_followed(kind, mode, told):
    ours, theirs, options = KINDS[kind]
    model, twin = model_of(mode), model_of("dense")
    optimizer = ours(model.parameters(), **options, model=model)
    reference = theirs(twin.parameters(), **options, foreach=False)
    train(model, optimizer, 3)
    train(twin, reference, 3)
    tnn.update_masks(model, masks_of(5), optimizer if told else None)
    tnn.update_masks(twin, masks_of(5), reference)
    train(model, optimizer, 3, seed=2)
    train(twin, reference, 3, seed=2)
    assert_same(model, twin, 2e-5)
    pruned = ~masks_of(5)["0.weight"]
    assert dense_parameters(model)[0][pruned].abs().max() == 0


def test_layers_swapped_after_the_optimizer_was_made_are_found():
    torch.manual_seed(0)
    model, masks = nn.Sequential(nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 4)), masks_of(3)
    twin = copy.deepcopy(model)
    optimizer = MaskedAdamW(model.parameters(), **ADAMW, model=model)
    reference = torch.optim.AdamW(twin.parameters(), **ADAMW)
    for network, its in ((model, optimizer), (twin, reference)):
        train(network, its, 2)
        tnn.sparsify(network, masks, mode="dense")
    # torch's moments off the mask would make the twin's pruned weights grow again.
    for index, name in ((0, "0.weight"), (2, "2.weight")):
        for key in ("exp_avg", "exp_avg_sq"):
            reference.state[twin[index].weight][key].masked_fill_(~masks[name], 0)
    train(model, optimizer, 2, seed=2)
    train(twin, reference, 2, seed=2)
    assert_same(model, twin, 2e-5)
    tnn.densify(model)
    tnn.densify(twin)
    train(model, optimizer, 2, seed=3)
    train(twin, reference, 2, seed=3)
    assert_same(model, twin, 2e-5)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (13, 9)


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("mode", ["dense", "values"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_bits(kind, mode, optimizer_first):
    ours, _, options = KINDS[kind]
    model = model_of(mode)
    optimizer = ours(model.parameters(), **options, model=model)
    train(model, optimizer, 2)
    tnn.update_masks(model, masks_of(8), optimizer)
    train(model, optimizer, 2)
    saved = through_file(model.state_dict()), through_file(optimizer.state_dict())
    train(model, optimizer, 3, seed=4)

    # The fresh model still has its first masks.
    resumed = model_of(mode)
    second = ours(resumed.parameters(), lr=1.0, model=resumed)
    if optimizer_first:
        second.load_state_dict(saved[1])
        resumed.load_state_dict(saved[0])
    else:
        resumed.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
    train(resumed, second, 3, seed=4)
    assert_same(model, resumed)


def test_a_state_fits_the_other_mode():
    model = model_of("dense")
    optimizer = MaskedAdamW(model.parameters(), **ADAMW, model=model)
    train(model, optimizer, 3)
    other = model_of("values")
    other.load_state_dict(model.state_dict())
    second = MaskedAdamW(other.parameters(), lr=1.0, model=other)
    second.load_state_dict(through_file(optimizer.state_dict()))
    train(model, optimizer, 2, seed=3)
    train(other, second, 2, seed=3)
    # The two modes may choose other algorithms, which round differently.
    assert_same(model, other, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_states_go_to_torch_and_back(kind):
    ours, theirs, options = KINDS[kind]
    model = model_of()
    optimizer = theirs(model.parameters(), **options)
    train(model, optimizer, 2)
    second = ours(model.parameters(), lr=1.0, model=model)
    second.load_state_dict(through_file(optimizer.state_dict()))
    twin, third = copy.deepcopy((model, optimizer))
    train(model, second, 2, seed=2)
    train(twin, third, 2, seed=2)
    assert_same(model, twin, 2e-5)
    third.load_state_dict(through_file(second.dense_state_dict()))
    train(model, second, 2, seed=3)
    train(twin, third, 2, seed=3)
    assert_same(model, twin, 4e-5)


def test_a_state_of_another_shape_is_refused():
    model = model_of()
    optimizer = MaskedSGD(model.parameters(), **SGD, model=model)
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    state["state"][0]["mask_bits"] = state["state"][0]["mask_bits"][:-1]
    with pytest.raises(ValueError, match="expected 15 bytes of mask bits"):
        optimizer.load_state_dict(state)


def test_copies_live_on_their_own():
    model = model_of()
    optimizer = MaskedAdamW(model.parameters(), **ADAMW, model=model)
    train(model, optimizer, 2)
    twin, second = copy.deepcopy((model, optimizer))
    train(twin, second, 2, seed=2)
    tnn.update_masks(twin, masks_of(9), second)
    assert parameter_patterns(model)[model[0].weight].mask.equal(masks_of(0)["0.weight"])
    train(model, optimizer, 2, seed=2)
    tnn.update_masks(model, masks_of(9), optimizer)
    assert_same(model, twin)


def test_closure_gives_the_loss():
    model = model_of()
    optimizer = MaskedSGD(model.parameters(), **SGD, model=model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 9)).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[0]


def test_parameters_without_gradient_stay():
    model = model_of()
    frozen = [model[2].weight, model[3].bias]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [p.clone() for p in frozen]
    optimizer = MaskedAdamW(model.parameters(), **ADAMW, model=model)
    train(model, optimizer, 2)
    assert all(map(torch.equal, frozen, before))
    assert not any(p in optimizer.state for p in frozen)


def test_grad_scaler_skips_steps_of_infinite_gradients():
    model = model_of()
    optimizer = MaskedSGD(model.parameters(), **SGD, model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x = torch.randn(4, 9)
    moved = []
    for scale in (1.0, float("inf"), 1.0):
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(model(x).square().sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, model[0].weight))
        assert model[0].weight.isfinite().all()
    assert moved == [True, False, True]


def test_half_precision_trains():
    model = model_of().to(torch.bfloat16)
    optimizer = MaskedAdamW(model.parameters(), **ADAMW, model=model)
    x = torch.randn(32, 9, dtype=torch.bfloat16)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.bfloat16


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = MaskedAdamW(embedding.parameters(), model=embedding)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"MaskedAdamW does not support sparse gradients, got torch\.sp"
    ):
        optimizer.step()


def test_layers_that_share_a_weight_share_a_mask():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tnn.sparsify(model, {"0": torch.eye(3).bool(), "1": torch.ones(3, 3).bool()}, mode="dense")
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"share a weight of shape \(3, 3\) under different masks"):
        MaskedSGD(model.parameters(), model=model)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p, m: MaskedSGD(p, lr=-1, model=m), ValueError, "lr <= 1e.15, got -1"),
        (lambda p, m: MaskedSGD(p, nesterov=True, model=m), ValueError, "got momentum 0.0"),
        (lambda p, m: MaskedSGD(p, dampening="1", model=m), TypeError, "dampening to be a number"),
        (lambda p, m: MaskedAdamW(p, betas=(1, 0), model=m), ValueError, r"betas\[0\] <= 1, got 1"),
        (lambda p, m: MaskedAdamW(p, lr=torch.ones(())), TypeError, "model"),
        (lambda p, m: MaskedAdamW(p, lr=torch.ones(()), model=m), TypeError, "number, got Tensor"),
        (lambda p, m: MaskedAdamW(p, model=p), TypeError, "an nn.Module, got list"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    model = model_of()
    with pytest.raises(error, match=message):
        make(list(model.parameters()), model)


@pytest.mark.parametrize("mode", ["dense", "values"])
def test_masked_convolutions_are_stepped_alike(mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3)
    mask = torch.rand(6, 3, 3, 3) < 0.3
    model = nn.Sequential(tnn.MaskedConv2d.from_conv(copy.deepcopy(conv), mask, mode))
    twin = nn.Sequential(tnn.MaskedConv2d.from_conv(conv, mask, "dense"))
    ours = MaskedAdamW(model.parameters(), **ADAMW, model=model)
    for network, optimizer in (
        (model, ours),
        (twin, torch.optim.AdamW(twin.parameters(), **ADAMW)),
    ):
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.randn(2, 3, 7, 7, generator=generator)).square().mean().backward()
            optimizer.step()
    assert ours.state[model[0].weight]["exp_avg"].shape == (int(mask.sum()),)
    check_close(model[0].dense_weight, twin[0].dense_weight, 2e-5, "weight")
