"""The networks that are known by name."""

import pytest
import torch
from torch import nn

from tscnc import models


def test_lenet_has_its_layers_and_maps_images_to_logits() -> None:
    model = models.build("lenet-300-100", (1, 28, 28), 10)
    shapes = [tuple(layer.weight.shape) for layer in model if isinstance(layer, nn.Linear)]
    assert shapes == [(300, 784), (100, 300), (10, 100)]
    assert model(torch.rand(5, 1, 28, 28)).shape == (5, 10)


def test_the_generator_alone_decides_the_weights() -> None:
    first = models.build("mlp-8-4", (3, 3), 2, generator=torch.Generator().manual_seed(1))
    torch.rand(100)
    second = models.build("mlp-8-4", (3, 3), 2, generator=torch.Generator().manual_seed(1))
    other = models.build("mlp-8-4", (3, 3), 2, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first[1].weight, second[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)


@pytest.mark.parametrize("name", ["mlp", "mlp-", "mlp-0", "mlp-8-x", "resnet", "", "mlp--8"])
def test_unknown_names_are_quoted(name: str) -> None:
    with pytest.raises(ValueError, match="unknown model") as caught:
        models.build(name, (1, 8, 8), 10)
    assert repr(name) in str(caught.value)


def test_an_empty_input_and_no_class_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(0, 8\)"):
        models.build("mlp-4", (0, 8), 10)
    with pytest.raises(ValueError, match="0 classes"):
        models.build("mlp-4", (8,), 0)
