"""The attacks stay where they may, and go where it hurts."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tscnc import models
from tscnc.attacks import ThreatModel, divergence, pgd, trades_loss


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    model = models.build("mlp-32", (1, 5, 5), 4, generator=generator)
    images = torch.rand(16, 1, 5, 5, generator=generator)
    images[0], images[1] = 0.0, 1.0
    return model, images, torch.randint(4, (16,), generator=generator)


def distance(norm: str, delta: Tensor) -> float:
    flat = delta.flatten(1)
    return float((flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)).max())


def attack(threat: ThreatModel, **changes: object) -> Tensor:
    model, images, labels = problem()
    options: dict[str, object] = {"steps": 5, "step_size": 0.5 * threat.epsilon + 1e-3}
    options["generator"] = torch.Generator().manual_seed(0)
    return pgd(model, images, labels, threat, **{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.7, 5.0])
def test_pgd_stays_in_the_ball_and_in_the_unit_cube(norm: str, epsilon: float) -> None:
    _, images, _ = problem()
    for steps in (0, 5):
        adversarial = attack(ThreatModel(norm, epsilon), steps=steps)
        assert adversarial.min() >= 0 and adversarial.max() <= 1
        assert distance(norm, adversarial - images) <= epsilon + 1e-6


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_pgd_increases_the_loss_of_every_image(norm: str) -> None:
    model, images, labels = problem()
    adversarial = attack(ThreatModel(norm, 0.3 if norm == "L2" else 0.1), steps=10)
    before = F.cross_entropy(model(images), labels, reduction="none")
    after = F.cross_entropy(model(adversarial), labels, reduction="none")
    assert (after > before).all()


def test_pgd_finds_the_worst_point_of_a_linear_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    adversarial = pgd(
        model,
        torch.full((1, 3), 0.5),
        torch.tensor([0]),
        ThreatModel("Linf", 0.25),
        steps=10,
        step_size=0.1,
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(adversarial, torch.tensor([[0.25, 0.75, 0.25]]))


def test_pgd_leaves_no_gradient_and_no_frozen_parameter() -> None:
    model, images, labels = problem()
    model[1].bias.requires_grad_(False)
    pgd(
        model,
        images,
        labels,
        ThreatModel("Linf", 0.1),
        steps=2,
        step_size=0.1,
        generator=None,
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    assert trainable == [True, False, True, True]


def test_the_generator_alone_decides_the_attack() -> None:
    threat = ThreatModel("L2", 0.5)
    first, again = attack(threat), attack(threat)
    other = attack(threat, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_empty_batch_gives_an_empty_batch(norm: str) -> None:
    model, images, labels = problem()
    result = pgd(
        model,
        images[:0],
        labels[:0],
        ThreatModel(norm, 0.1),
        steps=2,
        step_size=0.1,
        generator=None,
    )
    assert result.shape == (0, 1, 5, 5)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_inputs_outside_the_unit_cube_are_refused(bad: float) -> None:
    model, images, labels = problem()
    images[2, 0, 1, 1] = bad
    with pytest.raises(ValueError, match=r"expected inputs in \[0, 1\]"):
        pgd(model, images, labels, ThreatModel("Linf", 0.1), steps=1, step_size=1, generator=None)


def test_bad_threats_and_steps_are_quoted() -> None:
    with pytest.raises(ValueError, match="'L1'"):
        ThreatModel("L1", 0.1)
    for epsilon in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=str(epsilon)):
            ThreatModel("L2", epsilon)
    with pytest.raises(ValueError, match="got -1 and"):
        attack(ThreatModel("Linf", 0.1), steps=-1)
    with pytest.raises(ValueError, match="and 0"):
        attack(ThreatModel("Linf", 0.1), step_size=0)


def test_divergence_of_two_hand_worked_distributions() -> None:
    target = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    logits = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    # KL of the first pair: 0.5 ln 2 + 0.5 ln (2/3); of the second: 0; averaged over two.
    expected = 0.5 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    torch.testing.assert_close(divergence(logits, target), torch.tensor(expected))


def test_trades_loss_is_its_formula_at_the_point_it_found() -> None:
    model, images, labels = problem()
    threat, beta = ThreatModel("Linf", 0.1), 3.0
    parts = trades_loss(
        model,
        images,
        labels,
        threat,
        beta=beta,
        steps=4,
        step_size=0.05,
        generator=torch.Generator().manual_seed(5),
    )
    clean = model(images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5))
    found = pgd(
        model,
        images,
        clean.detach().log_softmax(1),
        threat,
        steps=4,
        step_size=0.05,
        generator=None,
        loss=divergence,
        start=images + 1e-3 * noise,
    )
    p, q = clean.softmax(1), model(found).softmax(1)
    robust = (p * (p / q).log()).sum(1).mean()
    natural = -p[torch.arange(16), labels].log().mean()
    torch.testing.assert_close(parts["robust"], robust, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts["natural"], natural)
    torch.testing.assert_close(parts["loss"], natural + beta * robust, rtol=1e-4, atol=1e-6)
    assert torch.equal(parts["output"], clean)


def test_trades_sends_gradients_through_both_arguments_of_the_divergence() -> None:
    model, images, labels = problem()
    parts = trades_loss(
        model,
        images,
        labels,
        ThreatModel("Linf", 0.2),
        beta=1.0,
        steps=3,
        step_size=0.1,
        generator=torch.Generator().manual_seed(5),
    )
    gradient = torch.autograd.grad(parts["robust"], parts["output"], retain_graph=True)[0]
    assert gradient.abs().max() > 0
