"""One adversarial training step, end to end: PGD-10, then the gradient of the weights and SGD.

Every linear and convolution layer is pruned at random to the same sparsity. A step is 10 forward
and backward passes for the attack, whose weights are frozen, one for the loss, and the optimizer
(SGD with momentum and weight decay). Batch norm is in training mode throughout.

- "ours": `nn.sparsify(model, masks)` in values mode, whose optimizer state is nnz-sized, and
  `nn.fuse_batch_norm_relu`; "ours, torch's batch norm" leaves out the latter.
- "dense, masked": torch's layers, the gradients of the weights masked.
- "SparseProp": its layers in the places of torch's, its own choice between its two convolutions.
- "free convolutions": the dense, masked step whose convolutions cost nothing. They return tensors
  made beforehand, forward and backward, and all else is done: batch norm, ReLU, linear layers,
  attack, masks and optimizer. The ceiling of what sparse convolutions can give is therefore

      ceiling = T(dense, masked) / T(free convolutions).

The gate compares the logits and the gradient of the input, of a small batch before any step, with
those of the dense model in float64; PGD's sign would turn a rounding error into another example.
Work is counted as in the layers' benchmarks: flops on the kept weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness, networks, peers
from benchmarks.harness import Case, Provider, Timed, UnavailableError
from benchmarks.networks import CLASSES, NETWORKS, Network
from tscnc.attacks import ThreatModel, pgd
from tscnc_kernels import nn as masked_nn

SPARSITIES = (0.9, 0.95, 0.99)
PGD_STEPS = 10
# Forward products, then gradients of the input (needed by PGD down to the image) and of weights.
PRODUCTS = (PGD_STEPS + 1) + (PGD_STEPS + 1) + 1
GATE_BATCH = 8
# Rounding flips a ReLU here and there, which a deep network amplifies.
TOLERANCE = 2e-3

UNFUSED = "ours, torch's batch norm"

Masks = dict[str, Tensor]
Prepare = Callable[[nn.Module, Masks, Tensor], nn.Module]


def _layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, nn.Linear | nn.Conv2d)}


def inputs(
    network: Network, sparsity: float, generator: torch.Generator, device: torch.device
) -> tuple[nn.Module, Masks, Tensor, Tensor]:
    """A pruned network, whose kept weights grow by what the pruned ones leave, and a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.build().train()
    masks = {}
    for name, layer in _layers(model).items():
        mask = torch.rand(layer.weight.shape, generator=generator) >= sparsity
        with torch.no_grad():
            layer.weight.mul_(mask).mul_((1 - sparsity) ** -0.5)
        masks[f"{name}.weight"] = mask.to(device)
    images = torch.rand(network.batch, *network.input_shape, generator=generator)
    labels = torch.randint(CLASSES, (network.batch,), generator=generator)
    return model.to(device), masks, images.to(device), labels.to(device)


def _seen(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """What the gate compares."""
    image = images[:GATE_BATCH].to(next(model.parameters()).dtype).requires_grad_()
    logits = model(image)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels[:GATE_BATCH]), image)
    # A mean over the batch makes gradients small; the gate's scale is 1.
    return [logits.detach(), gradient / gradient.square().mean().sqrt()]


def _expected(model: nn.Module, masks: Masks, images: Tensor, labels: Tensor) -> list[Tensor]:
    return _seen(model.double(), images, labels)


def _step(
    model: nn.Module, images: Tensor, labels: Tensor, masks: dict[nn.Parameter, Tensor]
) -> Callable[[], Tensor]:
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    threat = ThreatModel("Linf", 8 / 255)
    generator = torch.Generator(images.device).manual_seed(0)

    def call() -> Tensor:
        adversarial = pgd(
            model,
            images,
            labels,
            threat,
            steps=PGD_STEPS,
            step_size=2 / 255,
            generator=generator,
        )
        optimizer.zero_grad()
        loss = F.cross_entropy(model(adversarial), labels)
        loss.backward()
        for parameter, mask in masks.items():
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        optimizer.step()
        return loss.detach()

    return call


def _provide(
    name: str,
    prepare: Prepare,
    is_masked: bool,
    case: Case,
    model: nn.Module,
    masks: Masks,
    images: Tensor,
    labels: Tensor,
) -> Timed:
    dense = {f"{name}.weight": layer for name, layer in _layers(model).items()}
    model = prepare(model, masks, images)
    found = _seen(model, images, labels)
    masked = {dense[name].weight: mask for name, mask in masks.items()} if is_masked else {}
    call = _step(model, images, labels, masked)

    def outputs(_: Any) -> list[Tensor]:
        print(f"  {name:<24} {shares(call)}")
        return found

    return Timed(call, outputs)


def _dense(model: nn.Module, masks: Masks, images: Tensor) -> nn.Module:
    return model


def _ours_unfused(model: nn.Module, masks: Masks, images: Tensor) -> nn.Module:
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        raise UnavailableError("the network has no batch norm")
    return _sparsified(model, masks)


def _sparsified(model: nn.Module, masks: Masks) -> nn.Module:
    masked_nn.sparsify(model, masks, mode="values")
    left = [name for name in masks if name.removesuffix(".weight") in _layers(model)]
    if left:
        raise UnavailableError(f"sparsify left {', '.join(left[:3])}{'…' * (len(left) > 3)}")
    return model


def _ours(model: nn.Module, masks: Masks, images: Tensor) -> nn.Module:
    _sparsified(model, masks)
    masked_nn.fuse_batch_norm_relu(model)
    return model


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _input_shapes(model: nn.Module, images: Tensor) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, layer in _layers(model).items():

        def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            shapes[name] = tuple(args[0].shape)

        handles.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        model.eval()(images)
        model.train()
    for handle in handles:
        handle.remove()
    return shapes


def _sparseprop(model: nn.Module, masks: Masks, images: Tensor) -> nn.Module:
    swap = peers.sparseprop_swap()
    for name, shape in _input_shapes(model, images).items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            _replace(model, name, swap.linear(layer))
        elif isinstance(layer, nn.Conv2d):
            _replace(model, name, swap.conv(layer, shape))
    return model


class _FreeConvolutionFunction(torch.autograd.Function):
    """Hands out the tensors it is given: for the output and for both gradients."""

    @staticmethod
    def forward(ctx, input, weight, output, grad_input, grad_weight):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(grad_input, grad_weight)
        return output.detach()

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        return *ctx.saved_tensors, None, None, None


class _FreeConvolution(nn.Module):
    """A convolution that costs nothing; `weight` is there for masks and optimizer."""

    def __init__(self, layer: nn.Conv2d, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = layer.weight
        with torch.no_grad():
            self.grad_input = torch.randn(input_shape) * 1e-3
            self.output = torch.randn_like(layer(self.grad_input))
            self.grad_weight = torch.randn_like(layer.weight) * 1e-3

    def forward(self, input: Tensor) -> Tensor:
        size = len(input)
        return _FreeConvolutionFunction.apply(  # type: ignore[no-untyped-call, no-any-return]
            input, self.weight, self.output[:size], self.grad_input[:size], self.grad_weight
        )


def _free(model: nn.Module, masks: Masks, images: Tensor) -> nn.Module:
    shapes = _input_shapes(model, images)
    convolutions = {n: m for n, m in _layers(model).items() if isinstance(m, nn.Conv2d)}
    if not convolutions:
        raise UnavailableError("the network has no convolution")
    for name, layer in convolutions.items():
        _replace(model, name, _FreeConvolution(layer, shapes[name]))
    return model


# Kinds of work by the names of torch's profiler, the first that matches.
KINDS = {
    "convolution": r"conv|Conv",
    "linear": r"linear|Linear|addmm|::mm$|::bmm",
    "batch norm": r"batch_norm|BatchNorm",
    "relu": r"relu|threshold",
    "pooling": r"pool|mean",
    "optimizer": r"_foreach|Optimizer|zero_grad",
}


def shares(call: Callable[[], object]) -> str:
    """The share of a call's time per kind of layer, as a line of text."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    times = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profile.key_averages():
        kinds = (kind for kind, names in KINDS.items() if re.search(names, event.key))
        times[next(kinds, "other")] += event.self_cpu_time_total
    total = max(sum(times.values()), 1e-9)
    return ", ".join(f"{kind} {t / total:.0%}" for kind, t in times.items() if t >= 0.005 * total)


def case(network: Network, sparsity: float) -> Case:
    """One network at one sparsity."""
    # The default generator draws the weights, which do not matter here.
    with torch.random.fork_rng(devices=[]):
        flops = 2.0 * networks.macs(network.build(), network.input_shape)
    dense_work = PRODUCTS * network.batch * flops
    return Case(
        op="train_step",
        mode="pgd10_step",
        shape=network.label,
        dtype=torch.float32,
        inputs=partial(inputs, network, sparsity),
        expected=_expected,
        work=(1 - sparsity) * dense_work,
        dense_work=dense_work,
        unit="GF/s",
        sparsity=sparsity,
        tolerance=TOLERANCE,
    )


CASES = [case(network, s) for network in NETWORKS for s in SPARSITIES]
QUICK = [case(network, 0.99) for network in NETWORKS if network.name == "lenet-300-100"]
PROVIDERS = [
    Provider(name, partial(_provide, name, prepare, is_masked), gated=name != "free convolutions")
    for name, prepare, is_masked in (
        ("ours", _ours, False),
        (UNFUSED, _ours_unfused, False),
        ("dense, masked", _dense, True),
        ("SparseProp", _sparseprop, False),
        ("free convolutions", _free, True),
    )
]


def essential(case: Case, provider: Provider) -> bool:
    """The two networks with targets, at the sparsity of theirs."""
    return case.sparsity == 0.99 and case.shape.startswith(("mlp", "vgg"))


def run(argv: Sequence[str] | None = None) -> list[harness.results.Row]:
    """Measure and print; see `--help`."""
    return harness.main(CASES, PROVIDERS, QUICK, argv, essential)


if __name__ == "__main__":
    run()
