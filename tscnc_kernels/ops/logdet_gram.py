"""Log-determinant of the Gram matrix of each weight of a list, the core of the CNC penalties.

Formula, with A the weight W or Wᵀ, whichever has n = min(rows, columns) columns, and S = AᵀA:

    G        = S + ridge · (tr S / n) · I
    value    = logdet(G / n)
    gradient = grad_output · 2 A H,   H = G⁻¹ + ridge · (tr G⁻¹ / n) · I

The ridge is relative, so that the value of c W differs from that of W by 2 n log c whatever the
ridge; the second term of H is the ridge's own dependence on W. A Gram squares the condition number:
it is formed and factored in float64 for every dtype of weight.

Source: R_CNC of arXiv 2503.20454 as implemented, which takes torch.det in float32; that underflows
to 0 from 100 columns on, and the Cholesky factor does not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._checks import check_kernels, check_number
from tscnc_kernels._vmap import register_loop_vmap

# Native first: benchmarks/results/*/logdet_gram.csv.
BACKENDS = ("native", "reference")
_backend.register("logdet_gram", BACKENDS)


def _check(weights: Sequence[Tensor], ridge: float) -> None:
    check_kernels("weights", weights)
    check_number("ridge", ridge, 0)


def _value_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32


def _factor(weight: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """The tall float64 A, the Cholesky factor of G, and whether G is numerically definite."""
    tall = weight.flatten(1).double()
    tall = tall if tall.shape[0] >= tall.shape[1] else tall.mT
    m, n = tall.shape
    gram = tall.mT @ tall
    shift = ridge * gram.diagonal().sum() / n
    gram = gram + shift * torch.eye(n, dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram)
    # What rounding alone can leave of a pivot that is zero.
    floors = m * torch.finfo(torch.float64).eps * gram.diagonal()
    definite = (failed == 0) & (factor.diagonal() ** 2 > floors).all()
    return tall, factor, definite


def reference(weights: Tensor | Sequence[Tensor], ridge: float = 1e-6) -> Tensor:
    """Plain torch, differentiable to any order where G is definite."""
    if isinstance(weights, Tensor):
        return reference([weights], ridge)[0]
    return _reference_values(weights, ridge).to(_value_dtype(weights))


def _reference_values(weights: Sequence[Tensor], ridge: float) -> Tensor:
    return torch.stack([_value(*_factor(weight, ridge)) for weight in weights])


def _value(tall: Tensor, factor: Tensor, definite: Tensor) -> Tensor:
    value = 2 * (factor.diagonal() / tall.shape[1] ** 0.5).log().sum()
    singular = torch.where(tall.square().sum().isfinite(), -torch.inf, torch.nan)
    return torch.where(definite, value, singular)


def reference_backward(
    grad_output: Tensor, weights: Sequence[Tensor], ridge: float
) -> list[Tensor]:
    """Gradient of `reference` of a list for a float64 grad_output, itself differentiable."""
    gradients = []
    for grad, weight in zip(grad_output.unbind(), weights, strict=True):
        tall, factor, definite = _factor(weight, ridge)
        n = tall.shape[1]
        identity = torch.eye(n, dtype=factor.dtype, device=factor.device)
        inverse = torch.cholesky_inverse(torch.where(definite, factor, identity))
        h = inverse + ridge * inverse.diagonal().sum() / n * identity
        gradient = 2 * grad * torch.where(definite, tall @ h, torch.nan)
        oriented = gradient if weight.shape[0] == gradient.shape[0] else gradient.mT
        gradients.append(oriented.reshape(weight.shape).to(weight.dtype))
    return gradients


def _factor_sizes(weights: Sequence[Tensor]) -> list[int]:
    return [min(weight.shape) ** 2 for weight in weights]


@torch.library.register_fake("tscnc_kernels::logdet_gram")
def _(weights: list[Tensor], ridge: float) -> tuple[Tensor, Tensor]:
    values = weights[0].new_empty(len(weights), dtype=torch.float64)
    return values, values.new_empty(sum(_factor_sizes(weights)))


@torch.library.register_fake("tscnc_kernels::logdet_gram_backward")
def _(grad_output: Tensor, weights: list[Tensor], factors: Tensor, ridge: float) -> list[Tensor]:
    return [torch.empty_like(weight) for weight in weights]


def factor_on_device(weights: list[Tensor], ridge: float) -> tuple[Tensor, Tensor]:
    """The raw op by torch's own products and factorisations, which is all it needs on CUDA.

    The factors are NaN where G is singular. Nothing waits for the device.
    """
    values, factors = [], []
    for weight in weights:
        tall, factor, definite = _factor(weight, ridge)
        values.append(_value(tall, factor, definite))
        factors.append(torch.where(definite, factor, torch.nan).flatten())
    return torch.stack(values), torch.cat(factors)


def factor_on_device_backward(
    grad_output: Tensor, weights: list[Tensor], factors: Tensor, ridge: float
) -> list[Tensor]:
    """The gradient from what `factor_on_device` returned."""
    gradients = []
    pieces = factors.split(_factor_sizes(weights))
    for grad, weight, piece in zip(grad_output.unbind(), weights, pieces, strict=True):
        n = min(weight.shape)
        identity = torch.eye(n, dtype=piece.dtype, device=piece.device)
        inverted = torch.linalg.solve_triangular(piece.view(n, n), identity, upper=False)
        h = inverted.mT @ inverted
        h = h + ridge * h.diagonal().sum() / n * identity
        matrix = weight.double()
        gradient = matrix @ h if weight.shape[1] == n else h @ matrix
        gradients.append((2 * grad * gradient).to(weight.dtype))
    return gradients


_library = torch.library.Library("tscnc_kernels", "IMPL")
_library.impl("logdet_gram", factor_on_device, "CUDA")
_library.impl("logdet_gram_backward", factor_on_device_backward, "CUDA")

_native = torch.ops.tscnc_kernels
for _name in ("logdet_gram", "logdet_gram_backward"):
    register_loop_vmap(_name, getattr(_native, _name))


def _values(weights: list[Tensor], ridge: float, backend: str) -> tuple[Tensor, Tensor]:
    """The values in float64, and the Cholesky factors that the native backward takes."""
    if backend == "native":
        return _native.logdet_gram(weights, ridge)
    return _reference_values(weights, ridge), weights[0].new_empty(0)


class LogdetGramFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(ridge: float, backend: str, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return _values(list(weights), ridge, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.ridge, ctx.backend, *weights = inputs
        _, factors = output
        ctx.mark_non_differentiable(factors)
        ctx.save_for_backward(factors, *weights)

    @staticmethod
    def backward(ctx, grad_output, _grad_factors):  # type: ignore[no-untyped-def]
        factors, *weights = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        tensors = [weights[i] for i in wanted]
        if len(wanted) < len(weights):
            grad_output = torch.stack([grad_output[i] for i in wanted])
        if torch.is_grad_enabled() or ctx.backend == "reference":
            found = reference_backward(grad_output, tensors, ctx.ridge)
        else:
            if len(wanted) < len(weights):
                pieces = factors.split(_factor_sizes(weights))
                factors = torch.cat([pieces[i] for i in wanted])
            grad_output = grad_output.contiguous()
            found = _native.logdet_gram_backward(grad_output, tensors, factors, ctx.ridge)
        gradients: list[Tensor | None] = [None] * len(weights)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return None, None, *gradients


def logdet_gram(
    weights: Tensor | Sequence[Tensor], ridge: float = 1e-6, *, backend: str | None = None
) -> Tensor:
    """Log-determinant logdet(G/n) of the ridged Gram matrix of the small side of each weight.

    G = AᵀA + ridge · (tr AᵀA / n) · I with A = W or Wᵀ so that G is n x n, n = min(rows, columns).
    All of a list is one call.

    Args:
        weights: a (rows, cols) tensor or a list of them, of any shapes and floating dtypes
            (float32, float64, bfloat16, float16), on one device. An (out, in, …) convolution kernel
            counts as (out, in·…).
        ridge: relative ridge, in [0, 1e15].
        backend: "native" or "reference"; None chooses.

    Returns:
        0-d tensor for a tensor, (L,) for a list of L; float64 if any weight is, else float32. Where
        G is singular (a Cholesky pivot does not exceed what rounding can leave of zero, max(rows,
        columns) · 2⁻⁵² of its diagonal entry) the value is -inf and the gradient NaN; with the
        default ridge only a weight of zeros is, or one whose squares vanish in float64. NaN or
        infinite weights, or squares that overflow float64, give NaN.

    Raises:
        ValueError: empty list, a weight with fewer than two dimensions or without elements, several
            devices, or a ridge out of range.
        TypeError: not tensors, or a dtype that is not supported.
        RuntimeError: the backend cannot run here.

    Autograd: any order. Autocast does not change the dtype: the Gram matrix is float64.

    Source: arXiv 2503.20454 (R_CNC, by Cholesky instead of a float32 determinant).
    """
    if isinstance(weights, Tensor):
        _check([weights], ridge)
        return logdet_gram([weights], ridge, backend=backend)[0]
    return logdet_gram_float64(weights, ridge, backend=backend).to(_value_dtype(weights))


def logdet_gram_float64(
    weights: Sequence[Tensor], ridge: float, *, backend: str | None = None
) -> Tensor:
    """`logdet_gram` of a list before its (L,) values are rounded, for penalties built on them."""
    _check(weights, ridge)
    chosen = _backend.select("logdet_gram", weights[0].device, backend)
    dtype = _value_dtype(weights)
    matrices = [weight.flatten(1).to(dtype).contiguous() for weight in weights]
    if torch.is_grad_enabled() and any(matrix.requires_grad for matrix in matrices):
        values, _ = LogdetGramFunction.apply(  # type: ignore[no-untyped-call]
            ridge, chosen, *matrices
        )
        return values
    return _values(matrices, ridge, chosen)[0]
