"""The networks whose training step is measured, in their usual shapes for 32x32 colour images.

Source: VGG, arXiv 1409.1556 (configuration D with batch norm, one linear layer); ResNet, arXiv
1512.03385 (3x3 stem); Wide ResNet, arXiv 1605.07146.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tscnc import models

CIFAR, MNIST = (3, 32, 32), (1, 28, 28)
CLASSES = 10
VGG_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


@dataclass(frozen=True)
class Network:
    """A network, the size of its input, and a batch that fits a CPU."""

    name: str
    input_shape: tuple[int, int, int]
    batch: int

    @property
    def label(self) -> str:
        """Name and batch, such as "vgg-16-b32"."""
        return f"{self.name}-b{self.batch}"

    def build(self) -> nn.Module:
        """The network with random weights, in training mode."""
        if self.name == "vgg-16":
            return vgg16()
        if self.name == "resnet-18":
            return ResNet(Basic, (64, 128, 256, 512), 2, 64)
        if self.name == "wrn-28-10":
            return ResNet(Preactivated, (160, 320, 640), 4, 16)
        if self.name == "wrn-28-4":
            return ResNet(Preactivated, (64, 128, 256), 4, 16)
        hidden = {"mlp-2048": "mlp-2048-2048-2048"}.get(self.name, self.name)
        return models.build(hidden, self.input_shape, CLASSES)


NETWORKS = (
    Network("mlp-2048", MNIST, 128),
    Network("lenet-300-100", MNIST, 128),
    Network("vgg-16", CIFAR, 32),
    Network("resnet-18", CIFAR, 16),
    Network("wrn-28-4", CIFAR, 16),
)


def vgg16() -> nn.Sequential:
    """Thirteen convolutions, each with batch norm and ReLU, and one linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG_WIDTHS:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [_conv(channels, width), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, CLASSES))


class Basic(nn.Module):
    """Convolution, norm, ReLU, convolution, norm; the sum with the shortcut; ReLU."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv(channels, width, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _conv(width, width),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(_conv(channels, width, stride, 1), nn.BatchNorm2d(width))

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, width, H / stride, W / stride)."""
        return F.relu(self.branch(input) + self.shortcut(input))


class Preactivated(nn.Module):
    """Norm and ReLU before each convolution; the shortcut starts after the first pair."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.branch = nn.Sequential(
            _conv(channels, width, stride), nn.BatchNorm2d(width), nn.ReLU(), _conv(width, width)
        )
        changes = stride > 1 or channels != width
        self.shortcut = _conv(channels, width, stride, 1) if changes else None

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, width, H / stride, W / stride)."""
        entered = self.entry(input)
        shortcut = input if self.shortcut is None else self.shortcut(entered)
        return torch.add(self.branch(entered), shortcut)


class ResNet(nn.Sequential):
    """A 3x3 stem, stages of blocks of which all but the first halve the size, mean, linear."""

    def __init__(
        self,
        block: type[Basic] | type[Preactivated],
        widths: tuple[int, ...],
        depth: int,
        stem: int,
    ) -> None:
        layers: list[nn.Module] = [_conv(3, stem)]
        if block is Basic:
            layers += [nn.BatchNorm2d(stem), nn.ReLU()]
        channels = stem
        for stage, width in enumerate(widths):
            for index in range(depth):
                layers.append(block(channels, width, 2 if stage and not index else 1))
                channels = width
        if block is Preactivated:
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
        super().__init__(*layers)


def _conv(channels: int, width: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)


def macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of the linear and convolution layers for one sample."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        total += weight.numel() * (output.numel() // weight.shape[0])

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    was_training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, *input_shape))
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return total
