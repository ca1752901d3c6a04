"""Extreme singular values and vectors of a list of matrices of any shapes, in one call.

Formula, with A = W or W∘M seen tall (m × n, n ≤ m), its singular values σ_1 ≥ … ≥ σ_n and the rank
r asked for:

    v_max, v_min   leading eigenvectors of AᵀA and of (AᵀA)⁻¹, by block Lanczos in float64
    σ = ‖A v‖,  u = A v / σ
    ∂σ = u vᵀ, averaged over the vectors tied with σ; 0 off the mask and where σ = 0

AᵀA has σ² as its eigenvalues and loses all below √u·σ_1, but its eigenvectors are good to u·κ² and
‖A v‖ on A itself squares that error: float64 gives σ_min to 1e-6 up to κ = 1e6. Beyond, the inverse
takes its factor from Householder reflections of A instead. `method="power"` replaces Lanczos by
power iteration and inverse power iteration.

Up to n = 256 both ends come from the tridiagonal form of AᵀA instead, and go the way above where
the vectors' residuals say that the promised error may be missed. Matrices narrower than float64
(32 ≤ n ≤ 640, m ≥ 1.3 n) do so in float32, and keep the result if κ ≤ 20: an error of u·κ² in v is
about 1e-5 there, its square in σ nothing. `certify=True` has AᵀA and ‖A v‖ in float64. From n = 257
on, a few Lanczos steps on the first rows tell beforehand whether κ is too large for that.

Square matrices narrower than float64 need no AᵀA (from n = 257 on, or from a state from n = 16 on):
σ_max comes from Lanczos by reads of A, σ_min from Lanczos on (AᵀA)⁻¹ through a float32 elimination
L U = P A, an error of u·κ instead of u·κ². One step of iterative refinement with float64 residuals
measures what the elimination lost; where that is too much, or values are tied, the ways above.

Two shortcuts form neither AᵀA nor a factor. Each of their steps, Aᵀ(A X) for a few vectors, reads A
once, in float32 unless A is float64:

    from a state    both ends in one block Krylov space of the state's four vectors; where |r|²/gap
                    of its Ritz pairs, an estimate of the error, stays large for a few steps, or
                    pairs are tied, the way above (CUDA: see _spectral_cuda.py)
    ends="max"      block Lanczos on AᵀA alone

Source: Golub & Van Loan, Matrix Computations, chapters 8 and 10 (tridiagonal form, Lanczos, inverse
iteration, Rayleigh quotients); Dhillon & Parlett 2004 (vectors of a tridiagonal matrix); Golub &
Underwood 1977 (block Lanczos); Toledo 1997 (recursive elimination); Hopcroft & Karp 1973
(structural rank); Demmel 1989 and Rump 2006 (certificates by Cholesky factorisation). The gradient
of a repeated singular value is the minimum-norm subgradient.

Letters: L matrices; matrix i is (rows_i, cols_i).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels import _spectral_cuda as _spectral_cuda  # registers the op for CUDA
from tscnc_kernels._checks import check_floating_list, check_number, check_patterns
from tscnc_kernels._spectral import (
    MAX_TIES,
    ExtremeSingularValues,
    Raw,
    RawLists,
    check_state,
    index_of,
    mean_outer_product,
    output_dtype,
    pack_reference,
    split_lists,
    unpack,
    without_smallest,
)
from tscnc_kernels._vmap import register_loop_vmap
from tscnc_kernels.sparsity import SparsityPattern

# Native first: benchmarks/results/*/extreme_singular_values.csv.
BACKENDS = ("native", "reference")
_backend.register("extreme_singular_values", BACKENDS)

_UNIT = 2.0**-53
# At 1 every singular value would be tied with the largest.
_LARGEST_TIE = 0.999999


class _Settings(NamedTuple):
    structural: bool
    tie_tol: float
    power: bool
    certify: bool
    largest_only: bool
    passes: bool


def _check(
    matrices: Sequence[Tensor],
    patterns: Sequence[SparsityPattern | None] | None,
    state: Tensor | None,
    rank: str,
    tie_tol: float,
    method: str,
    ends: str,
    certify: bool,
) -> None:
    check_floating_list("matrices", matrices)
    for index, matrix in enumerate(matrices):
        if matrix.dim() != 2 or matrix.numel() == 0:
            raise ValueError(
                f"expected matrices[{index}] to have 2 dimensions and no empty one, "
                f"got shape {tuple(matrix.shape)}"
            )
    if rank not in ("full", "structural"):
        raise ValueError(f'expected rank to be "full" or "structural", got {rank!r}')
    if method not in ("auto", "passes", "power"):
        raise ValueError(f'expected method to be "auto", "passes" or "power", got {method!r}')
    if ends not in ("both", "max"):
        raise ValueError(f'expected ends to be "both" or "max", got {ends!r}')
    if certify and ends == "max":
        raise ValueError('certify=True bounds both ends: got ends="max"')
    check_number("tie_tol", tie_tol, 0, _LARGEST_TIE)
    if patterns is None and rank == "structural":
        raise ValueError('rank="structural" needs patterns: got patterns=None')
    if patterns is not None:
        check_patterns(patterns, matrices)
    if state is not None:
        check_state(state, matrices)


def _masked(index: int, matrices: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    matrix = matrices[index].double()
    if not masks or masks[index].numel() == 0:
        return matrix
    return torch.where(masks[index], matrix, 0.0)


def _last(index: int, matrix: Tensor, structures: Sequence[Tensor], structural: bool) -> Tensor:
    """(1,) index of σ_r; -1 where r = 0."""
    if structural and structures and structures[index].numel() > 0:
        return structures[index][:1] - 1
    return torch.full((1,), min(matrix.shape) - 1, device=matrix.device)


def _ends(values: Tensor, last: Tensor, shape: torch.Size) -> Tensor:
    """(2,) largest and r-th of the descending values; what is below rounding is 0."""
    floor = max(shape) * 2 * _UNIT * values[0]
    smallest = values.index_select(0, last.clamp(min=0)).squeeze(0)
    smallest = torch.where((smallest > floor) & (last[0] >= 0), smallest, 0.0)
    finite = torch.isfinite(values[0])
    return torch.stack([values[0], torch.where(finite, smallest, values[0])])


def reference(
    matrices: Sequence[Tensor],
    masks: Sequence[Tensor] = (),
    structures: Sequence[Tensor] = (),
    structural: bool = False,
) -> Tensor:
    """(2, L) σ_max and σ_min by a float64 SVD, differentiable where the values are simple."""
    columns = []
    for index in range(len(matrices)):
        w = _masked(index, matrices, masks)
        finite = torch.isfinite(w).all()
        values = torch.linalg.svdvals(torch.where(finite, w, 0.0))
        values = torch.where(finite, values, torch.nan)
        last = _last(index, w, structures, structural)
        columns.append(_ends(values, last, w.shape))
    return torch.stack(columns, dim=1)


def reference_backward(
    grad_sigma: Tensor,
    matrices: Sequence[Tensor],
    masks: Sequence[Tensor],
    structures: Sequence[Tensor],
    structural: bool,
    tie_tol: float,
) -> list[Tensor]:
    """Gradient of `reference` with ties averaged, itself differentiable once."""
    gradients = []
    for index, matrix in enumerate(matrices):
        w = _masked(index, matrices, masks)
        tall = w if w.shape[0] >= w.shape[1] else w.mT
        finite = torch.isfinite(w.detach()).all()
        svd = torch.linalg.svd(torch.where(finite, tall.detach(), 0.0), full_matrices=False)
        ends = _ends(svd.S, _last(index, w, structures, structural), w.shape)
        gradient = torch.zeros_like(tall)
        for end in (0, 1):
            mean = mean_outer_product(tall, ends[end], svd, tie_tol)
            gradient = gradient + grad_sigma[end, index] * mean
        gradient = gradient if w.shape[0] >= w.shape[1] else gradient.mT
        gradient = torch.where(finite, gradient, torch.nan)
        if masks and masks[index].numel() > 0:
            gradient = torch.where(masks[index], gradient, 0.0)
        gradients.append(gradient.to(matrix.dtype))
    return gradients


@torch.library.register_fake("tscnc_kernels::structural_rank")
def _(mask: Tensor) -> Tensor:
    return mask.new_empty((1 + mask.shape[0] + mask.shape[1],), dtype=torch.int64)


@torch.library.register_fake("tscnc_kernels::extreme_singular_values")
def _(
    matrices: list[Tensor],
    masks: list[Tensor],
    structures: list[Tensor],
    row_pointers: list[Tensor],
    columns: list[Tensor],
    state: Tensor | None,
    structural: bool,
    tie_tol: float,
    power: bool,
    certify: bool,
    largest_only: bool,
    passes: bool = False,
) -> Raw:
    count = len(matrices)
    rows, cols = (sum(matrix.shape[side] for matrix in matrices) for side in (0, 1))
    smaller = sum(min(matrix.shape) for matrix in matrices)

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return matrices[0].new_empty(shape, dtype=dtype)

    dtype = output_dtype(matrices)
    return (
        empty(2, count, dtype=dtype),
        empty(2, rows, dtype=dtype),
        empty(2, cols, dtype=dtype),
        empty(2 * MAX_TIES, smaller),
        empty(4, smaller),
        empty(count, dtype=torch.int64),
        empty(count, 2),
        empty(count, dtype=torch.int64),
        empty(count, 2, dtype=torch.int64),
        empty(count if certify else 0, 3, 2),
    )


@torch.library.register_fake("tscnc_kernels::extreme_singular_values_backward")
def _(
    grad_sigma: Tensor,
    matrices: list[Tensor],
    masks: list[Tensor],
    sigma: Tensor,
    left: Tensor,
    right: Tensor,
    block: Tensor,
    ties: Tensor,
) -> list[Tensor]:
    return [torch.empty_like(matrix) for matrix in matrices]


_native = torch.ops.tscnc_kernels
for _name in ("extreme_singular_values", "extreme_singular_values_backward"):
    register_loop_vmap(_name, getattr(_native, _name))


def _run(lists: RawLists, state: Tensor | None, settings: _Settings, backend: str) -> Raw:
    if backend == "native":
        raw: Raw = _native.extreme_singular_values(*lists, state, *settings)
        return raw
    matrices, masks, structures = lists[:3]
    masked = [_masked(index, matrices, masks) for index in range(len(matrices))]
    lasts = [_last(i, w, structures, settings.structural) for i, w in enumerate(masked)]
    sigma = reference(matrices, masks, structures, settings.structural)
    dtype = output_dtype(matrices)
    packed = pack_reference(masked, sigma, lasts, settings.tie_tol, settings.certify, dtype)
    return without_smallest(packed) if settings.largest_only else packed


class ExtremeSingularValuesFunction(torch.autograd.Function):
    """Differentiates sigma alone; the vectors and all else come out without gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        settings: _Settings, backend: str, count: int, state: Tensor | None, *tensors: Tensor
    ) -> Raw:
        return _run(split_lists(tensors, count), state, settings, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.settings, ctx.backend, ctx.count, _, *tensors = inputs
        sigma, left, right, block, *rest = output
        ctx.tensors = len(tensors)
        ctx.save_for_backward(*tensors[: 3 * ctx.count], sigma, left, right, block, rest[4])
        ctx.mark_non_differentiable(left, right, block, *rest)

    @staticmethod
    def backward(ctx, grad_sigma, *_):  # type: ignore[no-untyped-def]
        inputs, forward = ctx.saved_tensors[:-5], ctx.saved_tensors[-5:]
        matrices, masks, structures = split_lists(inputs, ctx.count)[:3]
        if ctx.backend == "reference" or torch.is_grad_enabled():
            structural, tie_tol, *_ = ctx.settings
            gradients = reference_backward(
                grad_sigma, matrices, masks, structures, structural, tie_tol
            )
        else:
            gradients = _native.extreme_singular_values_backward(
                grad_sigma.contiguous(), matrices, masks, *forward
            )
        return None, None, None, None, *gradients, *([None] * (ctx.tensors - ctx.count))


def extreme_singular_values(
    matrices: Sequence[Tensor],
    patterns: Sequence[SparsityPattern | None] | None = None,
    state: Tensor | None = None,
    *,
    rank: Literal["full", "structural"] = "full",
    tie_tol: float = 1e-4,
    method: Literal["auto", "passes", "power"] = "auto",
    certify: bool = False,
    ends: Literal["both", "max"] = "both",
    backend: str | None = None,
) -> ExtremeSingularValues:
    """Largest and smallest singular value, with their vectors, of every matrix of a list.

    σ_max = max ‖A v‖ and σ_min = σ_r over ‖v‖ = 1, A = W or W∘M; κ = σ_max / σ_min is infinite
    where σ_min is 0. The promised relative error is 1e-3 for σ_max, and for σ_min up to κ = 1e6
    (1e-2 at 1e7); from a state, 1e-5 for σ_max. The vectors, and with them the gradient, are exact
    for a value within that error of the extreme one (an ε-subgradient).

    Args:
        matrices: L tensors of shapes (rows_i, cols_i), each float32, float64, bfloat16 or float16,
            on one device.
        patterns: one `SparsityPattern` or None per matrix; W∘M is computed, whatever W holds off
            the mask. A pattern of more dimensions is taken as (shape[0], rest). None: the matrices
            as they are.
        state: the `state` of an earlier call on matrices of these shapes, a warm start: (4, Σ
            min(rows_i, cols_i)) float64, two vectors per end. It is not changed. Where the matrices
            have moved little, a well-conditioned one costs one to three reads. The start of another
            matrix costs time, not accuracy, as long as its vectors are not singular vectors of this
            one by accident of structure: those of a block of a block-diagonal matrix may hide the
            others for some calls, until the random part of the start has found them. On CUDA it may
            cost accuracy of σ_max above a smaller side of 128, with CAP_REACHED: nothing else
            follows there after a few reads.
        rank: "full": σ_min at r = min(rows_i, cols_i), 0 when the matrix is rank deficient.
            "structural": dead rows and columns are removed and r is the structural rank, the
            largest that the pattern allows.
        tie_tol: singular values within this relative distance of the extreme one count as tied with
            it, and the gradient is the mean over them (at most 16).
        method: "auto"; "passes" for σ_min from a state on CUDA by passes over the matrix alone,
            where "auto" factors a matrix whose smaller side is above 128: one launch for the whole
            list, but CAP_REACHED where that proves too little, as for square and badly conditioned
            matrices; or "power" for power iteration and inverse power iteration, the classic
            baseline.
        certify: also compute `bounds`, which costs up to a few more factorisations, and the Gram
            matrix even from a state.
        ends: "both", or "max" for σ_max alone, which needs neither Gram matrix nor factor:
            `sigma_min` and its residual are then NaN without gradient, `u_min` and `v_min` empty,
            and `flags` tell of σ_max.
        backend: "native" or "reference"; None chooses.

    Returns:
        NamedTuple of
        sigma_max, sigma_min: (L,) float64 if any matrix is float64, else float32; NaN where a
            matrix holds NaN or infinite entries.
        u_max, v_max, u_min, v_min: L vectors of length rows_i or cols_i in that dtype, zero at dead
            rows and columns under rank="structural". Where σ is zero, u is zero, and v is a null
            vector if rows_i ≥ cols_i, else zero.
        rank: (L,) int64, the rank r whose σ_r is `sigma_min`.
        residual: (L, 2) float64, √(‖Wv − σu‖² + ‖Wᵀu − σv‖²) at both ends: some singular value
            lies this close to σ.
        flags: (L,) int64 bits RANK_DEFICIENT = 1, SHIFTED = 2, CAP_REACHED = 4 (the promised error
            may be missed), REFACTORED = 8 (for information).
        state: start for the next call, new.
        bounds: None, or certified intervals of sigma_max, sigma_min and kappa, each (L, 2) float64.

    Raises:
        ValueError: empty list or matrix, not 2 dimensions, several devices, a pattern or state of
            another shape, rank="structural" without patterns, unknown rank, method or ends, tie_tol
            outside [0, 0.999999], certify with ends="max".
        TypeError: not a list of tensors, a dtype that is not supported.
        RuntimeError: the backend cannot run here.

    Autograd: sigma_max and sigma_min, to second order; the vectors carry no gradient. Autocast
    changes nothing.

    Determinism: start vectors are counter-based; equal inputs give equal bits for any number of
    threads.
    """
    _check(matrices, patterns, state, rank, tie_tol, method, ends, certify)
    chosen = _backend.select("extreme_singular_values", matrices[0].device, backend)
    dense = [matrix.contiguous() for matrix in matrices]
    lists = RawLists(dense, [], [], [], [])
    if patterns is not None:
        found = [index_of(p, w) for p, w in zip(patterns, dense, strict=True)]
        lists = RawLists(dense, *map(list, zip(*found, strict=True)))
    settings = _Settings(
        rank == "structural",
        float(tie_tol),
        method == "power",
        bool(certify),
        ends == "max",
        method == "passes",
    )
    start = None if state is None else state.detach().contiguous()
    if torch.is_grad_enabled() and any(matrix.requires_grad for matrix in dense):
        tensors = [tensor for column in lists for tensor in column]
        raw = ExtremeSingularValuesFunction.apply(  # type: ignore[no-untyped-call]
            settings, chosen, len(dense), start, *tensors
        )
    else:
        raw = _run(lists, start, settings, chosen)
    return unpack(raw, dense, settings.largest_only)
