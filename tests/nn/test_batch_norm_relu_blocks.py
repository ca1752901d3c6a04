"""BatchNorm and ReLU inside the forward of residual blocks, found by tracing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.op_suite import check_close
from tscnc_kernels.nn import BatchNormReLU, fuse_batch_norm_relu, split_batch_norm_relu


def conv(channels, width, stride=1, kernel=3):
    return nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """A ResNet's block, with one ReLU module for two places."""

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(conv(channels, width, stride, 1), nn.BatchNorm2d(width))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Network(nn.Module):
    """Two blocks with a stem and a head, as in torchvision."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layers = nn.Sequential(Block(4, 4), Block(4, 6, 2))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.layers(self.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def network():
    torch.manual_seed(0)
    model = Network()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model


PAIRS = ["bn1", "layers.0.bn1", "layers.1.bn1"]


def run(model, x):
    """The result, and all gradients by name."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {"output": y.detach(), "input": x.grad} | found


def test_outputs_and_gradients_of_a_residual_network_stay():
    model, twin = network(), network()
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert fuse_batch_norm_relu(model) == PAIRS
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for step in range(2):
        x = torch.randn(4, 3, 9, 9)
        ours, theirs = run(model, x), run(twin, x)
        for name, tensor in theirs.items():
            check_close(ours[name], tensor, 5e-5, f"{name}, step {step}")
    for name, tensor in twin.state_dict().items():
        check_close(model.state_dict()[name], tensor, 1e-5, name)
    x = torch.randn(2, 3, 9, 9)
    check_close(model.eval()(x), twin.eval()(x), 5e-5, "evaluation")


def test_the_relu_behind_a_fused_norm_computes_nothing(monkeypatch):
    model, calls = network(), []
    relu = F.relu
    fuse_batch_norm_relu(model)
    monkeypatch.setattr(F, "relu", lambda *args: calls.append(args) or relu(*args))
    model(torch.randn(4, 3, 9, 9))
    assert len(calls) == 2


def test_splitting_undoes_it():
    model = network()
    text = repr(model)
    fuse_batch_norm_relu(model)
    twin = copy.deepcopy(model)
    split_batch_norm_relu(twin)
    assert repr(twin) == text
    x = torch.randn(4, 3, 9, 9)
    check_close(model(x), twin(x), 1e-5, "output")


def test_without_tracing_sequences_alone_are_looked_at():
    model = nn.Sequential(network(), nn.BatchNorm1d(5), nn.ReLU())
    assert fuse_batch_norm_relu(model, trace=False) == ["1"]
    assert fuse_batch_norm_relu(model) == [f"0.{name}" for name in PAIRS]


def test_a_compiled_block_is_one_graph_and_gives_the_same():
    torch._dynamo.reset()
    model, twin = network(), network()
    fuse_batch_norm_relu(model)
    x = torch.randn(4, 3, 9, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    check_close(compiled(x), twin(x), 5e-5, "output")


class Chain(nn.Module):
    """Something between a norm and a ReLU, and their modules."""

    def __init__(self, between):
        super().__init__()
        self.norm, self.relu, self.between = nn.BatchNorm2d(3), nn.ReLU(), between

    def forward(self, x):
        return self.between(self, x)


def data_dependent(self, x):
    return self.relu(self.norm(x)) if x.sum() > 0 else self.norm(x)


def of_the_mode(self, x):
    return self.relu(self.norm(x)) if self.training else self.norm(x)


def read_twice(self, x):
    y = self.norm(x)
    return self.relu(y) + y


def returned(self, x):
    y = self.norm(x)
    return self.relu(y), y


def called_twice(self, x):
    return self.norm(self.relu(self.norm(x)))


def functional(self, x):
    return F.relu(self.norm(x))


@pytest.mark.parametrize(
    "forward",
    [data_dependent, of_the_mode, read_twice, returned, called_twice, functional],
    ids=lambda forward: forward.__name__,
)
def test_a_norm_that_a_relu_does_not_always_follow_alone_stays(forward):
    model = Chain(forward).train(forward is not of_the_mode)
    text, training = repr(model), model.training
    assert fuse_batch_norm_relu(model) == []
    assert repr(model) == text and model.training == training


def test_a_forward_that_keeps_what_it_computes_keeps_no_trace():
    def keeps(self, x):
        self.kept = self.relu(self.norm(x))
        return self.kept

    model = Chain(keeps)
    assert fuse_batch_norm_relu(model) == ["norm"]
    assert not hasattr(model, "kept")
    assert type(model.norm) is BatchNormReLU


def test_a_relu_computes_what_was_changed_in_place_behind_another():
    def adds(self, x):
        out = self.relu(self.norm(x))
        out -= 1
        return self.relu(out)

    model = Chain(adds)
    twin = copy.deepcopy(model)
    assert fuse_batch_norm_relu(model) == ["norm"]
    x = torch.randn(4, 3, 5, 5)
    check_close(model(x), twin(x), 1e-5, "output")
