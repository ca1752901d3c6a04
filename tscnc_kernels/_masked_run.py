"""The products of a masked layer, each by the algorithm chosen for it."""

from collections.abc import Callable, Sequence

from torch import Tensor

from tscnc_kernels._autotune import DENSE
from tscnc_kernels._masked_algorithms import BACKWARD, SEPARATE, Choice

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Product = Callable[[str], tuple[Tensor, Tensor]]
Sparse = Callable[[str, str, Sequence[bool]], Sequence[Tensor | None]]
Dense = Callable[[Sequence[bool]], Gradients]


def run_product(
    choice: Choice, product: Product, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`product(algorithm)` of the forward pass, for the algorithm that `choice` picks."""
    return product(choice.pick("forward", product, tensors))


def run_gradients(
    choice: Choice,
    sparse: Sparse,
    dense: Dense,
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    dense_grad: bool,
) -> Gradients:
    """The gradients of input, weight and bias, None where they are not needed.

    Args:
        choice: picks the algorithms of the first two, or one that computes both in one pass; the
            bias's comes with the weight's.
        sparse: (algorithm of the input's, of the weight's, which ones) -> gradients.
        dense: which ones -> gradients.
        tensors: what these compute on.
        needs: which gradients are needed.
        dense_grad: the weight's is needed off the mask too, hence dense.
    """

    def gradients(for_input: str, for_weight: str, needs: Sequence[bool]) -> Gradients:
        sparse_weight = for_weight != DENSE
        by = needs[0] and for_input != DENSE, needs[1] and sparse_weight, needs[2] and sparse_weight
        found: Sequence[Tensor | None] = (None, None, None)
        if True in by:
            found = sparse(for_input, for_weight, by)
        left = needs[0] and not by[0], needs[1] and not by[1], needs[2] and not by[2]
        rest = dense(left) if True in left else (None, None, None)
        return (
            found[0] if by[0] else rest[0],
            found[1] if by[1] else rest[1],
            found[2] if by[2] else rest[2],
        )

    def separate() -> tuple[str, str]:
        for_input = for_weight = DENSE
        if needs[0]:
            alone = True, False, False
            for_input = choice.pick("grad_input", lambda a: gradients(a, DENSE, alone), tensors)
        if needs[1] and not dense_grad:
            both = False, True, needs[2]
            for_weight = choice.pick("grad_weight", lambda a: gradients(DENSE, a, both), tensors)
        return for_input, for_weight

    def together(name: str) -> Gradients:
        return gradients(*(separate() if name == SEPARATE else (name, name)), needs)

    name = SEPARATE
    if needs[0] and needs[1] and not dense_grad:
        name = choice.pick(BACKWARD, together, tensors)
    return together(name)
