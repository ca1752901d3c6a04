"""Layer-wise quotas: how one overall sparsity is divided among the layers.

Every function takes the weights' shapes in torch's layout (out, in, ...) and the fraction of all
weights to remove, and returns the fraction that each layer keeps. With n_l weights in layer l and
P = sum n_l, every quota spends the whole budget: sum d_l n_l = (1 - sparsity) P.

Source: Vysogorets and Kempe, "Connectivity Matters: Neural Network Pruning Through the Lens of
Effective Sparsity" (arXiv 2107.02306) for uniform_plus and IGQ; Evci et al., "Rigging the Lottery"
(arXiv 1911.11134) for ERK and its capped redistribution.
"""

import math
from collections.abc import Callable, Sequence

Shapes = Sequence[Sequence[int]]
Quota = Callable[[Shapes, float], list[float]]

_MAX_LAST_LAYER_SPARSITY = 0.8


def uniform(shapes: Shapes, sparsity: float) -> list[float]:
    """Densities of the uniform quota, d_l = 1 - sparsity.

    Args:
        shapes: the weights' shapes, each (out, in, ...).
        sparsity: fraction of all weights to remove, in [0, 1).

    Returns:
        One density in (0, 1] per layer.

    Raises:
        ValueError: no shapes, an empty or non-positive shape, or a sparsity outside [0, 1).
    """
    sizes = _checked_sizes(shapes, sparsity)
    return [1 - sparsity] * len(sizes)


def uniform_plus(shapes: Shapes, sparsity: float) -> list[float]:
    """Densities of uniform+: the first convolution dense, the last layer at least 20 % dense.

    The remaining layers share what is left at one density. Without convolutions it is `uniform`.

    Args:
        shapes: the weights' shapes, each (out, in, ...); convolutions have more than 2 dimensions.
        sparsity: fraction of all weights to remove, in [0, 1).

    Returns:
        One density in [0, 1] per layer.

    Raises:
        ValueError: as in `uniform`; or the budget cannot pay for what must stay dense.
    """
    sizes = _checked_sizes(shapes, sparsity)
    convolutions = [layer for layer, shape in enumerate(shapes) if len(shape) > 2]
    if not convolutions:
        return uniform(shapes, sparsity)
    first, last = convolutions[0], len(sizes) - 1
    fixed = {first: 1.0}
    budget = (1 - sparsity) * sum(sizes)
    density = _density_of_the_rest(sizes, budget, fixed, sparsity)
    if last != first and density < 1 - _MAX_LAST_LAYER_SPARSITY:
        fixed[last] = 1 - _MAX_LAST_LAYER_SPARSITY
        density = _density_of_the_rest(sizes, budget, fixed, sparsity)
    return [fixed.get(layer, density) for layer in range(len(sizes))]


def erk(shapes: Shapes, sparsity: float) -> list[float]:
    """Densities of the Erdős–Rényi kernel quota, d_l = k · sum(shape_l) / prod(shape_l).

    A layer whose density would exceed 1 becomes dense, and k is solved again over the others.

    Args:
        shapes: the weights' shapes, each (out, in, ...).
        sparsity: fraction of all weights to remove, in [0, 1).

    Returns:
        One density in (0, 1] per layer.

    Raises:
        ValueError: as in `uniform`.
    """
    sizes = _checked_sizes(shapes, sparsity)
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    budget = (1 - sparsity) * sum(sizes)
    dense: set[int] = set()
    while len(dense) < len(sizes):
        rest = [layer for layer in range(len(sizes)) if layer not in dense]
        left = budget - sum(sizes[layer] for layer in dense)
        k = left / sum(raw[layer] * sizes[layer] for layer in rest)
        overfull = {layer for layer in rest if k * raw[layer] > 1}
        if not overfull:
            return [1.0 if layer in dense else k * raw[layer] for layer in range(len(sizes))]
        dense |= overfull
    return [1.0] * len(sizes)


def igq(shapes: Shapes, sparsity: float) -> list[float]:
    """Densities of the ideal gas quota, d_l = 1 / (F n_l + 1).

    The layers are gases in cylinders of length n_l and cross-section 1 / n_l, compressed by one
    common force F, which the budget fixes.

    Args:
        shapes: the weights' shapes, each (out, in, ...).
        sparsity: fraction of all weights to remove, in [0, 1).

    Returns:
        One density in (0, 1] per layer.

    Raises:
        ValueError: as in `uniform`.
    """
    sizes = _checked_sizes(shapes, sparsity)
    budget = (1 - sparsity) * sum(sizes)

    def kept(force: float) -> float:
        return sum(size / (force * size + 1) for size in sizes)

    # kept(F) falls from P at F = 0 and is below L / F, so the root lies in [0, L / budget].
    low, high = 0.0, len(sizes) / budget
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if kept(middle) > budget else (low, middle)
    force = low if sparsity == 0 else high
    return [1 / (force * size + 1) for size in sizes]


def _checked_sizes(shapes: Shapes, sparsity: float) -> list[int]:
    if not 0 <= sparsity < 1:
        raise ValueError(f"expected a sparsity in [0, 1), got {sparsity}")
    if not shapes:
        raise ValueError("expected the shape of at least one layer, got none")
    for shape in shapes:
        if len(shape) == 0 or any(dim < 1 for dim in shape):
            raise ValueError(f"expected shapes of positive dimensions, got {tuple(shape)}")
    return [math.prod(shape) for shape in shapes]


def _density_of_the_rest(
    sizes: list[int], budget: float, fixed: dict[int, float], sparsity: float
) -> float:
    """One density for the layers that are not fixed, such that the budget is spent."""
    spent = sum(density * sizes[layer] for layer, density in fixed.items())
    rest = sum(size for layer, size in enumerate(sizes) if layer not in fixed)
    if rest == 0 and math.isclose(spent, budget):
        return 1.0
    if rest == 0 or spent > budget:
        raise ValueError(
            f"uniform_plus cannot reach sparsity {sparsity}: of {sum(sizes)} weights "
            f"{budget:.6g} may stay, but the first convolution and a fifth of the last layer "
            f"take {spent:.6g}"
        )
    return (budget - spent) / rest
