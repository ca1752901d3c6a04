"""Masked products by Triton kernels: those of its own backend, and blocks on CUDA.

On CUDA the native backend's algorithms "block" and "epilogue" (the dense gradient of a weight,
masked or gathered as it is stored) are Triton's as well: tensor-core tiles are written there.
`Sequence[Tensor | None]` are the gradients of input, weight and bias.
"""

from collections.abc import Sequence

from torch import Tensor

from tscnc_kernels._activation import ACTIVATIONS, activation_gradient
from tscnc_kernels._autotune import DENSE
from tscnc_kernels._feature_major import in_layout, is_feature_major
from tscnc_kernels._masked_algorithms import BLOCK
from tscnc_kernels._masked_cuda import EPILOGUE
from tscnc_kernels._masked_native import native_gradients
from tscnc_kernels._masked_weight import masked_weight
from tscnc_kernels.sparsity import SparsityPattern


def runs_in_triton(backend: str, algorithm: str, input: Tensor) -> bool:
    """Whether the algorithm of a backend is a Triton kernel."""
    is_ours = algorithm in (BLOCK, EPILOGUE)
    return backend == "triton" or (is_ours and backend == "native" and input.is_cuda)


def triton_product(
    algorithm: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: SparsityPattern,
    activation: int,
    save: bool,
    feature_major: bool,
) -> tuple[Tensor, Tensor]:
    """Y for a 2-d input, and Z if it has to be saved (else a tensor of no rows)."""
    if algorithm == BLOCK:
        from tscnc_kernels.triton import block_sparse

        return block_sparse.product(
            *(input, weight, pattern, bias, activation), save=save, feature_major=feature_major
        )
    from tscnc_kernels.triton import masked_linear

    dense = masked_weight(weight, pattern) if weight.ndim == 1 else weight
    y, z = masked_linear.product(input, dense, pattern, bias, activation, save=save)
    return in_layout(y, feature_major), in_layout(z, feature_major)


def triton_gradients(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    activation: str,
    dense_grad: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by the backend's dense algorithm; `saved` is Y for relu and Z for gelu."""
    from tscnc_kernels.triton import masked_linear

    return masked_linear.gradients(
        grad_output, saved, input, weight, pattern, activation, dense_grad, needs
    )


def _own_gradients(
    for_weight: str,
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    activation: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    from tscnc_kernels.triton import block_sparse, masked_linear

    gradient = activation_gradient(grad_output, saved, activation)
    found: list[Tensor | None] = [None, None, gradient.sum(0) if needs[2] else None]
    if needs[0]:
        features = is_feature_major(input)
        found[0], _ = block_sparse.product(
            gradient, weight, pattern, transposed=True, feature_major=features
        )
    if needs[1]:
        kernels = masked_linear if for_weight == EPILOGUE else block_sparse
        found[1] = kernels.weight_gradient(gradient, input, pattern, values=weight.ndim == 1)
    return found


def sparse_gradients(
    backend: str,
    algorithms: tuple[str, str],
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    activation: str,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The gradients by sparse algorithms, the input's and the weight's; those not needed are empty
    or None.
    """
    tensors = grad_output, saved, input, weight
    each = algorithms[0], algorithms[1], algorithms[1]
    is_ours = [name != DENSE and runs_in_triton(backend, name, input) for name in each]
    ours = [need and here for need, here in zip(needs, is_ours, strict=True)]
    others = [need and not here for need, here in zip(needs, is_ours, strict=True)]
    if True not in ours:
        code = ACTIVATIONS[activation]
        return native_gradients(*algorithms, *tensors, pattern, code, needs)
    found = _own_gradients(algorithms[1], *tensors, pattern, activation, ours)
    if True not in others:
        return found
    rest = native_gradients(*algorithms, *tensors, pattern, ACTIVATIONS[activation], others)
    return [a if here else b for a, b, here in zip(found, rest, ours, strict=True)]
