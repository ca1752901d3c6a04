"""Pruning scores: how much each weight matters, the higher the more.

All share one signature, ``score(model, *, masks, batches, example_input, generator)``, and return
``{parameter name: score}`` for every prunable layer, detached, in the weight's shape. Each ignores
the arguments it has no use for. Weights that `masks` prunes already count as 0 and score -inf, so
that pruning again from these scores never brings one back. The model is not changed; where a score
runs it, batch statistics and dropout follow the mode (train or eval) that the model is in.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tscnc.pruning.layers import complete_masks, plain_copy, prunable
from tscnc.pruning.linearise import linear_responses

Masks = Mapping[str, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


def magnitude(
    model: nn.Module,
    *,
    masks: Masks | None = None,
    batches: Batches | None = None,
    example_input: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The score |w|.

    Args:
        model: the model to prune.
        masks: bool masks by name of what is pruned already.
        batches: not used.
        example_input: not used.
        generator: not used.

    Returns:
        Scores by parameter name.

    Raises:
        ValueError: no prunable layer, or masks that do not fit the model.
        TypeError: a mask is not a bool tensor.
    """
    masks = complete_masks(model, masks)
    return _pruned_last(
        {name: weight.detach().abs() for name, weight in prunable(model).items()}, masks
    )


def lamp(
    model: nn.Module,
    *,
    masks: Masks | None = None,
    batches: Batches | None = None,
    example_input: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The score w_i² / sum of w_j² over the layer's weights with w_j² >= w_i².

    The largest weight of every layer scores 1 (over the number of weights it ties with), so ranking
    all layers together never removes a whole layer before the others.

    Args:
        model: the model to prune.
        masks: bool masks by name of what is pruned already.
        batches: not used.
        example_input: not used.
        generator: not used.

    Returns:
        float64 scores by parameter name.

    Raises:
        ValueError: no prunable layer, or masks that do not fit the model.
        TypeError: a mask is not a bool tensor.

    Source: Lee et al., "Layer-Adaptive Sparsity for the Magnitude-Based Pruning"
    (arXiv 2010.07611), eq. 4; equal weights, which the paper orders by index, share one score.
    """
    masks = complete_masks(model, masks)
    scores = {}
    for name, weight in prunable(model).items():
        squares = (weight.detach().double() * masks[name]).square().flatten()
        ascending = squares.sort().values
        sum_from_here = ascending.flip(0).cumsum(0).flip(0)
        at_least_as_large = sum_from_here[torch.searchsorted(ascending, squares)]
        score = squares / at_least_as_large.where(at_least_as_large > 0, 1)
        scores[name] = score.view(weight.shape)
    return _pruned_last(scores, masks)


def snip(
    model: nn.Module,
    *,
    masks: Masks | None = None,
    batches: Batches | None = None,
    example_input: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The score |g·w|, g the gradient of a batch's mean cross-entropy, averaged over the batches.

    Args:
        model: a classifier, from inputs to logits (N, classes).
        masks: bool masks by name of what is pruned already.
        batches: (inputs, int64 targets) pairs; at least one.
        example_input: not used.
        generator: not used.

    Returns:
        Scores by parameter name.

    Raises:
        ValueError: no batches, no prunable layer, masks that do not fit, or a gradient not finite.
        TypeError: a mask is not a bool tensor.

    Source: Lee et al., "SNIP: Single-shot Network Pruning Based on Connection Sensitivity"
    (arXiv 1810.02340).
    """
    masks = complete_masks(model, masks)
    network, weights = _masked_copy(model, masks)
    data = _collected(batches, "snip")
    scores = [torch.zeros_like(weight) for weight in weights]
    for input, target in data:
        gradients = _gradients(network, weights, input, target)
        for score, gradient, weight in zip(scores, gradients, weights, strict=True):
            score += (gradient * weight.detach()).abs() / len(data)
    return _pruned_last(_finite(dict(zip(masks, scores, strict=True)), "snip"), masks)


def grasp(
    model: nn.Module,
    *,
    masks: Masks | None = None,
    batches: Batches | None = None,
    example_input: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The score w·(H g), g and H the gradient and Hessian of the batches' average cross-entropy.

    The paper removes the weights of highest -w·(H g); the sign is turned here so that, as for every
    score, the highest are kept. Its softmax temperature is 1 here. All batches count equally.

    Args:
        model: a twice differentiable classifier, from inputs to logits (N, classes).
        masks: bool masks by name of what is pruned already.
        batches: (inputs, int64 targets) pairs; at least one.
        example_input: not used.
        generator: not used.

    Returns:
        Scores of either sign by parameter name.

    Raises:
        ValueError: no batches, no prunable layer, masks that do not fit, or a gradient not finite.
        TypeError: a mask is not a bool tensor.

    Source: Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow"
    (arXiv 2002.07376), eq. 8.
    """
    masks = complete_masks(model, masks)
    network, weights = _masked_copy(model, masks)
    data = _collected(batches, "grasp")
    average = [torch.zeros_like(weight) for weight in weights]
    for input, target in data:
        for total, gradient in zip(
            average, _gradients(network, weights, input, target), strict=True
        ):
            total += gradient / len(data)
    scores = [torch.zeros_like(weight) for weight in weights]
    for input, target in data:
        gradients = _gradients(network, weights, input, target, create_graph=True)
        inner = torch.stack([(g * a).sum() for g, a in zip(gradients, average, strict=True)]).sum()
        products = torch.autograd.grad(inner, weights, materialize_grads=True)
        for score, product, weight in zip(scores, products, weights, strict=True):
            score += weight.detach() * product / len(data)
    return _pruned_last(_finite(dict(zip(masks, scores, strict=True)), "grasp"), masks)


def synflow(
    model: nn.Module,
    *,
    masks: Masks | None = None,
    batches: Batches | None = None,
    example_input: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The score |w|·∂R/∂|w|, R the sum of the linearised model's outputs for an input of ones.

    See `linear_responses` for what linearised means. Prune in many small steps
    (`iterative_masks`); a single step removes whole layers.

    Args:
        model: any model that `linear_responses` can trace.
        masks: bool masks by name of what is pruned already.
        batches: not used.
        example_input: (N, ...) float tensor; only its shape and device matter.
        generator: not used.

    Returns:
        float64 scores >= 0 by parameter name.

    Raises:
        ValueError: no example input, no prunable layer, masks that do not fit, an operation that
            cannot be linearised, or scores that overflow float64.
        TypeError: a mask is not a bool tensor, or the example input is not a float tensor.

    Source: Tanaka et al., "Pruning Neural Networks Without Any Data by Iteratively Conserving
    Synaptic Flow" (arXiv 2006.05467), eq. 5.
    """
    masks = complete_masks(model, masks)
    if example_input is None:
        raise ValueError("synflow needs an example_input, got None")
    weights = {
        name: weight.detach().double().abs() * masks[name]
        for name, weight in prunable(model).items()
    }
    responses = linear_responses(model, weights, example_input)
    scores = {name: weights[name] * responses[name] for name in weights}
    return _pruned_last(_finite(scores, "synflow"), masks)


def random(
    model: nn.Module,
    *,
    masks: Masks | None = None,
    batches: Batches | None = None,
    example_input: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """A score drawn uniformly from [0, 1).

    Args:
        model: the model to prune.
        masks: bool masks by name of what is pruned already.
        batches: not used.
        example_input: not used.
        generator: CPU generator to draw from; None is torch's own.

    Returns:
        float64 scores by parameter name, drawn layer by layer; equal generators, equal scores.

    Raises:
        ValueError: no prunable layer, or masks that do not fit the model.
        TypeError: a mask is not a bool tensor.
    """
    masks = complete_masks(model, masks)
    scores = {
        name: torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        for name, weight in prunable(model).items()
    }
    return _pruned_last(scores, masks)


def _pruned_last(scores: dict[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    return {name: score.masked_fill(~masks[name], -math.inf) for name, score in scores.items()}


def _finite(scores: dict[str, Tensor], score: str) -> dict[str, Tensor]:
    for name, values in scores.items():
        if not values.isfinite().all():
            raise ValueError(f"the {score} score of {name!r} is not finite")
    return scores


def _collected(batches: Batches | None, score: str) -> list[tuple[Tensor, Tensor]]:
    data = [] if batches is None else list(batches)
    if not data:
        raise ValueError(f"{score} needs at least one batch (inputs, targets), got none")
    return data


def _masked_copy(model: nn.Module, masks: Masks) -> tuple[nn.Module, list[Tensor]]:
    """A plain copy of the model with masked weights, and those weights: its own parameters."""
    network = plain_copy(model)
    weights = prunable(network)
    for name, weight in weights.items():
        with torch.no_grad():
            weight.mul_(masks[name])
        weight.requires_grad_(True)
    return network, list(weights.values())


def _gradients(
    network: nn.Module,
    weights: list[Tensor],
    input: Tensor,
    target: Tensor,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        loss = F.cross_entropy(network(input), target)
        return torch.autograd.grad(loss, weights, create_graph=create_graph, materialize_grads=True)
