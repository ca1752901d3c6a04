"""Hard concrete gates: the smoothing distribution of TSC, a [0, 1] gate with mass at both ends.

Formula, with u uniform noise in [0, 1]:

    s        = sigmoid((log u − log(1 − u) + log_alpha) / β)      a sample
    s        = sigmoid(log_alpha)                                 at test time
    z        = clip(s (ζ − γ) + γ, 0, 1)
    gradient = grad_output · (ζ − γ) s (1 − s) / β,   0 where z is clipped; no β at test time
    P(z ≠ 0) = sigmoid(log_alpha − β log(−γ/ζ))

The noise is an argument, so that every backend computes the same function; no gradient flows to it.

Source: Louizos, Welling, Kingma, arXiv 1712.01312, eqs. 10–13; as used in arXiv 2503.20454 with β =
2/3, γ = −0.1, ζ = 1.1.
"""

import math

import torch
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._checks import LARGEST, SMALLEST, check_floating, check_number
from tscnc_kernels._vmap import register_elementwise_vmap

# Native first: benchmarks/results/*/hard_concrete.csv.
BACKENDS = ("native", "reference")
_backend.register("hard_concrete", BACKENDS)

# A gate opens fully only if the stretched range passes 1.
_LEAST_ZETA = 1.000001

# u = 0 and u = 1 give an infinite logit. Bounded by this, it still decides against any finite
# log_alpha, and an infinite log_alpha decides against it.
_LOGIT_BOUND = 1e30


def _check_constants(beta: float, gamma: float, zeta: float) -> None:
    check_number("beta", beta, SMALLEST)
    check_number("gamma", gamma, -LARGEST, -SMALLEST)
    check_number("zeta", zeta, _LEAST_ZETA)


def _check(
    log_alpha: Tensor, uniform: Tensor | None, beta: float, gamma: float, zeta: float
) -> None:
    check_floating("log_alpha", log_alpha)
    if uniform is not None:
        check_floating("uniform", uniform)
        if uniform.shape != log_alpha.shape:
            raise ValueError(
                f"expected uniform of log_alpha's shape {tuple(log_alpha.shape)}, "
                f"got {tuple(uniform.shape)}"
            )
        if uniform.dtype != log_alpha.dtype:
            raise TypeError(
                f"expected uniform of log_alpha's dtype {log_alpha.dtype}, got {uniform.dtype}"
            )
        if uniform.device != log_alpha.device:
            raise ValueError(
                f"expected uniform on log_alpha's device {log_alpha.device}, got {uniform.device}"
            )
    _check_constants(beta, gamma, zeta)


def _sigmoid_argument(log_alpha: Tensor, uniform: Tensor | None, beta: float) -> Tensor:
    dtype = torch.float64 if log_alpha.dtype == torch.float64 else torch.float32
    log_alpha = log_alpha.to(dtype)
    if uniform is None:
        return log_alpha
    noise = uniform.detach().to(dtype)
    logit = (noise.log() - torch.log1p(-noise)).clamp(-_LOGIT_BOUND, _LOGIT_BOUND)
    return (log_alpha + logit) / beta


def reference(
    log_alpha: Tensor,
    uniform: Tensor | None = None,
    *,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> Tensor:
    """Plain torch, differentiable to any order inside the clipping range."""
    s = torch.sigmoid(_sigmoid_argument(log_alpha, uniform, beta))
    return (s * (zeta - gamma) + gamma).clamp(0, 1).to(log_alpha.dtype)


def reference_backward(
    grad_output: Tensor,
    log_alpha: Tensor,
    uniform: Tensor | None,
    beta: float,
    gamma: float,
    zeta: float,
) -> Tensor:
    """Gradient of `reference`, itself differentiable."""
    s = torch.sigmoid(_sigmoid_argument(log_alpha, uniform, beta))
    stretched = s * (zeta - gamma) + gamma
    slope = (zeta - gamma) * s * (1 - s) / (1 if uniform is None else beta)
    clipped = (stretched <= 0) | (stretched >= 1)
    return (grad_output * torch.where(clipped, 0, slope)).to(log_alpha.dtype)


@torch.library.register_fake("tscnc_kernels::hard_concrete")
def _(log_alpha: Tensor, uniform: Tensor | None, beta: float, gamma: float, zeta: float) -> Tensor:
    return torch.empty_like(log_alpha)


@torch.library.register_fake("tscnc_kernels::hard_concrete_backward")
def _(
    grad_output: Tensor,
    log_alpha: Tensor,
    uniform: Tensor | None,
    beta: float,
    gamma: float,
    zeta: float,
) -> Tensor:
    return torch.empty_like(log_alpha)


_native = torch.ops.tscnc_kernels


for _name in ("hard_concrete", "hard_concrete_backward"):
    register_elementwise_vmap(_name, getattr(_native, _name))


class HardConcreteFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        log_alpha: Tensor,
        uniform: Tensor | None,
        beta: float,
        gamma: float,
        zeta: float,
        backend: str,
    ) -> Tensor:
        return _gates(log_alpha, uniform, beta, gamma, zeta, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        log_alpha, uniform, *ctx.constants, ctx.backend = inputs
        ctx.save_for_backward(log_alpha, uniform)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        log_alpha, uniform = ctx.saved_tensors
        if torch.is_grad_enabled() or ctx.backend == "reference":
            gradient = reference_backward(grad_output, log_alpha, uniform, *ctx.constants)
        else:
            gradient = _native.hard_concrete_backward(
                grad_output.contiguous(), log_alpha, uniform, *ctx.constants
            )
        return gradient, None, None, None, None, None


def _gates(
    log_alpha: Tensor,
    uniform: Tensor | None,
    beta: float,
    gamma: float,
    zeta: float,
    backend: str,
) -> Tensor:
    if backend == "native":
        return _native.hard_concrete(log_alpha, uniform, beta, gamma, zeta)
    return reference(log_alpha, uniform, beta=beta, gamma=gamma, zeta=zeta)


def hard_concrete(
    log_alpha: Tensor,
    uniform: Tensor | None = None,
    *,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
    backend: str | None = None,
) -> Tensor:
    """Hard concrete gates z = clip(sigmoid(x) (ζ − γ) + γ, 0, 1).

    x = (log u − log(1 − u) + log_alpha) / β with noise u, and x = log_alpha without: the test-time
    gate.

    Args:
        log_alpha: floating tensor of any shape (float32, float64, bfloat16, float16).
        uniform: noise in [0, 1] of log_alpha's shape, dtype and device, or None. At u = 0 the gate
            is closed and at u = 1 open, whatever a finite log_alpha says.
        beta: temperature, in [1e-15, 1e15].
        gamma: lower end of the stretched range, in [-1e15, -1e-15].
        zeta: upper end, in [1.000001, 1e15].
        backend: "native" or "reference"; None chooses.

    Returns:
        Gates of log_alpha's shape and dtype; half types are computed in float32. NaN, or noise
        outside [0, 1], gives NaN.

    Raises:
        ValueError: shapes or devices that differ, or constants out of range.
        TypeError: not tensors, a dtype that is not supported, or two dtypes.
        RuntimeError: the backend cannot run here.

    Autograd: any order in log_alpha, 0 where the gate is clipped; none in the noise. Autocast does
        not change the dtype.

    Source: arXiv 1712.01312, eqs. 10, 11 and 13.
    """
    _check(log_alpha, uniform, beta, gamma, zeta)
    chosen = _backend.select("hard_concrete", log_alpha.device, backend)
    log_alpha = log_alpha.contiguous()
    noise = None if uniform is None else uniform.contiguous()
    if torch.is_grad_enabled() and log_alpha.requires_grad:
        return HardConcreteFunction.apply(  # type: ignore[no-untyped-call]
            log_alpha, noise, beta, gamma, zeta, chosen
        )
    return _gates(log_alpha, noise, beta, gamma, zeta, chosen)


def hard_concrete_active_probability(
    log_alpha: Tensor, *, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1
) -> Tensor:
    """Probability sigmoid(log_alpha − β log(−γ/ζ)) that a hard concrete gate is not closed.

    Args:
        log_alpha: floating tensor of any shape.
        beta: temperature, in [1e-15, 1e15].
        gamma: lower end of the stretched range, in [-1e15, -1e-15].
        zeta: upper end, in [1.000001, 1e15].

    Returns:
        Probabilities of log_alpha's shape and dtype; half types are computed in float32.

    Raises:
        ValueError: constants out of range.
        TypeError: not a tensor, or a dtype that is not supported.

    Source: arXiv 1712.01312, eq. 12.
    """
    check_floating("log_alpha", log_alpha)
    _check_constants(beta, gamma, zeta)
    exact = _sigmoid_argument(log_alpha, None, beta)
    return torch.sigmoid(exact - beta * math.log(-gamma / zeta)).to(log_alpha.dtype)
