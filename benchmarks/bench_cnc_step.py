"""The price of the TSC and CNC penalties in a training step: forward, backward and SGD, dense.

The step is that of a classifier on 32x32 images at batch 128, and at 16, where it is cheapest
beside them. CNC is the sum of log kappa = log(sigma_max / sigma_min) over the weights of all linear
and convolution layers as matrices, its singular values from a warm start, with its gradient; TSC
the transformed l1 norm of the same weights. The weights move by SGD between the calls, so that
nothing is remembered but the `state` that training keeps. "scale invariant" is CNC in the form that
takes no singular values, and the default of `condition_number_penalty`.

Flops counted: three products of the forward pass's size. The gate compares both penalties of the
first step with their float64 values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness, networks
from benchmarks.harness import Case, Provider, Timed
from benchmarks.networks import CLASSES, NETWORKS, Network
from tscnc_kernels import condition_number_penalty, extreme_singular_values, transformed_l1

TSC, CNC = 1e-5, 1e-4
BATCHES = (128, 16)
TOLERANCE = 1e-3
PLAIN, WARM, ALONE = "step", "step with TSC + CNC", "TSC + CNC alone"
SCALE_INVARIANT = "step with TSC + CNC, scale invariant"
# Sum of TSC, sum of CNC.
Penalties = Callable[[], tuple[Tensor, Tensor]]


def _inputs(
    network: Network, generator: torch.Generator, device: torch.device
) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.build().train()
    images = torch.rand(network.batch, *network.input_shape, generator=generator)
    labels = torch.randint(CLASSES, (network.batch,), generator=generator)
    return model.to(device), images.to(device), labels.to(device)


def _weights(model: nn.Module) -> list[Tensor]:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return [layer.weight for layer in layers]


def _expected(model: nn.Module, *_: Any) -> list[Tensor]:
    weights = [w.detach().double() for w in _weights(model)]
    norms = sum((2 * w.abs() / (1 + w.abs())).sum() for w in weights)
    values = [torch.linalg.svdvals(w.flatten(1).mT) for w in weights]
    return [torch.as_tensor(norms), torch.stack([(s[0] / s[-1]).log() for s in values]).sum()]


def _log_kappa(weights: Sequence[Tensor]) -> Penalties:
    """Both penalties, the state of each call kept for the next."""
    state: Tensor | None = None

    def call() -> tuple[Tensor, Tensor]:
        nonlocal state
        found = extreme_singular_values([w.flatten(1) for w in weights], state=state)
        state = found.state
        return transformed_l1(weights), (found.sigma_max.log() - found.sigma_min.log()).sum()

    return call


def _scale_invariant(weights: Sequence[Tensor]) -> Penalties:
    return lambda: (transformed_l1(weights), condition_number_penalty(weights))


def _prepare(
    penalize: Callable[[Sequence[Tensor]], Penalties] | None,
    is_step: bool,
    case: Case,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
) -> Timed:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    penalties = None if penalize is None else penalize(_weights(model))

    def call() -> list[Tensor]:
        optimizer.zero_grad()
        loss, terms = torch.zeros(()), []
        if is_step:
            loss = F.cross_entropy(model(images), labels)
        if penalties is not None:
            terms = list(penalties())
            loss = loss + TSC * terms[0] + CNC * terms[1]
        loss.backward()
        if is_step:
            optimizer.step()
        return [term.detach() for term in terms]

    return Timed(call, lambda terms: terms)


def _case(network: Network) -> Case:
    with torch.random.fork_rng(devices=[]):
        flops = 2.0 * networks.macs(network.build(), network.input_shape)
    return Case(
        op="cnc_step",
        mode="training_step",
        shape=network.label,
        dtype=torch.float32,
        inputs=partial(_inputs, network),
        expected=_expected,
        work=3 * network.batch * flops,
        unit="GF/s",
        tolerance=TOLERANCE,
    )


CASES = [
    _case(replace(network, batch=batch))
    for network in NETWORKS
    if network.name in ("vgg-16", "resnet-18")
    for batch in BATCHES
]
QUICK = [_case(network) for network in NETWORKS if network.name == "lenet-300-100"]
PROVIDERS = [
    Provider(PLAIN, partial(_prepare, None, True), gated=False),
    Provider(WARM, partial(_prepare, _log_kappa, True)),
    Provider(ALONE, partial(_prepare, _log_kappa, False)),
    Provider(SCALE_INVARIANT, partial(_prepare, _scale_invariant, True), gated=False),
]


def essential(case: Case, provider: Provider) -> bool:
    """The step without and with the penalties."""
    return case in QUICK or (case.shape.endswith("-b128") and provider.name != SCALE_INVARIANT)


def shares(rows: Sequence[harness.results.Row]) -> list[str]:
    """What each provider adds to the plain step, and the penalties alone, in per cent of it."""
    lines = []
    for row in rows:
        plain = [r.p50 for r in rows if r.backend == PLAIN and r.shape == row.shape]
        if plain and row.backend != PLAIN:
            added = row.p50 - (0 if row.backend == ALONE else plain[0])
            lines.append(f"{row.shape}: {row.backend}: {100 * added / plain[0]:+.1f} % of a step")
    return lines


def run(argv: Sequence[str] | None = None) -> list[harness.results.Row]:
    """Measure and print, the shares of the step last; see `--help`."""
    rows = harness.main(CASES, PROVIDERS, QUICK, argv, essential)
    print(*shares(rows), sep="\n")
    return rows


if __name__ == "__main__":
    run()
