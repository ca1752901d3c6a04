import copy

import pytest
import torch
from torch import nn

from tests.op_suite import check_close
from tscnc_kernels.nn import BatchNormReLU, fuse_batch_norm_relu, split_batch_norm_relu


def model_of():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 8), nn.BatchNorm1d(8), nn.ReLU(True))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), block, head)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model


def train(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}], ids=str)
@pytest.mark.parametrize("tracked", [True, False])
def test_the_module_is_batch_norm_and_relu(options, tracked):
    ours = BatchNormReLU(3, track_running_stats=tracked, **options)
    theirs = nn.BatchNorm2d(3, track_running_stats=tracked, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for index in range(3):
        x = torch.randn(4, 3, 6, 6) * (index + 1) + index
        check_close(ours(x), theirs(x).relu(), 1e-5, f"step {index}")
    for key, value in theirs.state_dict().items():
        check_close(ours.state_dict()[key], value, 1e-5, key)
    x = torch.randn(2, 3, 6, 6)
    check_close(ours.eval()(x), theirs.eval()(x).relu(), 1e-5, "evaluation")


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (2, 3, 4, 4, 4)], ids=str)
def test_inputs_of_any_dimension(shape):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}[len(shape)]
    x = torch.randn(shape)
    check_close(BatchNormReLU(3)(x), kind(3)(x).relu(), 1e-5, str(shape))


def test_states_load_into_batch_norm_and_back():
    norm, fused = nn.BatchNorm2d(3), BatchNormReLU(3)
    norm(torch.randn(4, 3, 5, 5) * 3 + 1)
    fused.load_state_dict(norm.state_dict())
    other = nn.BatchNorm2d(3)
    other.load_state_dict(fused.state_dict())
    for key, value in norm.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


def test_fusing_changes_neither_training_nor_names():
    model, twin = model_of(), model_of()
    before, parameters = list(model.state_dict()), list(model.parameters())
    assert fuse_batch_norm_relu(model) == ["1", "3.1", "4.2"]
    assert list(model.state_dict()) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    train(model)
    train(twin)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        check_close(a, b, 5e-5, name)
    x = torch.randn(3, 3, 8, 8)
    check_close(model.eval()(x), twin.eval()(x), 5e-5, "evaluation")


def test_splitting_undoes_it():
    model = model_of().eval()
    kinds = [type(module) for module in model.modules()]
    fuse_batch_norm_relu(model)
    train(model, steps=1)
    expected = model(torch.ones(2, 3, 8, 8))
    split_batch_norm_relu(model)
    assert [type(module) for module in model.modules()] == kinds
    assert model[4][3].inplace and not model[2].inplace
    assert not model[1].training
    check_close(model(torch.ones(2, 3, 8, 8)), expected, 1e-5, "output")
    alone = nn.Sequential(BatchNormReLU(3))
    split_batch_norm_relu(alone)
    assert type(alone[0]) is BatchNormReLU


def test_what_cannot_be_fused_stays():
    class OwnNorm(nn.BatchNorm2d):
        pass

    shared, hooked = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(
        nn.Sequential(OwnNorm(4), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6()),
        nn.Sequential(shared, nn.ReLU(), shared),
        nn.Sequential(hooked, nn.ReLU()),
        nn.ModuleList([nn.BatchNorm2d(4), nn.ReLU()]),
    )
    text = repr(model)
    assert fuse_batch_norm_relu(model) == []
    assert repr(model) == text


def test_a_relu_used_in_several_places():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), relu, nn.Linear(4, 4), relu)
    twin = copy.deepcopy(model)
    assert fuse_batch_norm_relu(model) == ["1"]
    x = torch.randn(6, 4)
    check_close(model(x), twin(x), 1e-5, "output")


def test_copies_and_synchronised_batch_norm_keep_the_relu():
    model = model_of()
    fuse_batch_norm_relu(model)
    twin = copy.deepcopy(model)
    split_batch_norm_relu(twin)
    assert isinstance(twin[1], nn.BatchNorm2d)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted[1], BatchNormReLU)


def test_only_modules_are_fused():
    with pytest.raises(TypeError, match=r"an nn\.Module, got list"):
        fuse_batch_norm_relu([nn.BatchNorm2d(3), nn.ReLU()])
