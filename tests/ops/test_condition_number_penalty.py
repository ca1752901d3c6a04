import math

import pytest
import torch

from tests.op_suite import check_close
from tscnc_kernels.ops.condition_number_penalty import condition_number_penalty
from tscnc_kernels.ops.conv_singular_values import conv_singular_values
from tscnc_kernels.sparsity import SparsityPattern

GOLDEN = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
FORMS = ["scale_invariant", "logdet", "log_kappa", "nenov"]


def with_singular_values(*sigma: float, rows: int = 7, seed: int = 0) -> torch.Tensor:
    """A (rows, len(sigma)) float64 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = len(sigma)
    left = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return left @ torch.tensor(sigma, dtype=torch.float64).diag() @ right


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("scale_invariant", 4.45737082),
        ("logdet", 1.79175947**2),
        ("log_kappa", math.log(18.52130534)),
        ("nenov", 22.61774746),
    ],
)
def test_golden_values(form, value, dtype):
    penalty = condition_number_penalty([GOLDEN.to(dtype)], form=form, ridge=0.0)
    assert penalty.item() == pytest.approx(value, rel=1e-5)
    transposed = condition_number_penalty([GOLDEN.T.to(dtype)], form=form, ridge=0.0)
    assert transposed.item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("kappa", "value"), [(1.0, 0.0), (2.0, 1.115), (10.0, 10.61), (100.0, 32.25)]
)
def test_scale_invariant_golden_values_of_a_geometric_spectrum(kappa, value):
    sigma = torch.logspace(0, -math.log10(kappa), 12, dtype=torch.float64).tolist()
    matrix = with_singular_values(*sigma, rows=12)
    assert condition_number_penalty([matrix], ridge=0.0).item() == pytest.approx(
        value, rel=1e-3, abs=1e-9
    )


def test_published_form_golden_value_and_its_vanishing_gradient():
    value = condition_number_penalty([GOLDEN], form="logdet", repo_compat=True)
    assert value.item() == pytest.approx(3.21040797, rel=1e-5)  # float32
    # 640 features, 100 classes at initialisation: the determinant is 0 in float32. The Cholesky
    # form still acts.
    head = (torch.randn(640, 100) * (2 / 640) ** 0.5).requires_grad_()
    published = condition_number_penalty([head], form="logdet", repo_compat=True)
    assert published.item() == pytest.approx(math.log(1e-5) ** 2, rel=1e-5)
    assert torch.autograd.grad(published, head)[0].abs().max() == 0
    ours = condition_number_penalty([head], form="logdet")
    assert torch.autograd.grad(ours, head)[0].abs().max() > 1


@pytest.mark.parametrize("form", ["scale_invariant", "log_kappa", "nenov"])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2])
def test_zero_where_all_singular_values_are_equal(form, ridge):
    matrix = 3 * with_singular_values(1.0, 1.0, 1.0, 1.0)
    assert condition_number_penalty([matrix], form=form, ridge=ridge).item() == pytest.approx(
        0, abs=1e-9
    )


@pytest.mark.parametrize("form", ["scale_invariant", "log_kappa"])
def test_scale_does_not_matter(form):
    matrix = torch.randn(9, 5, dtype=torch.float64)
    value = condition_number_penalty([matrix], form=form)
    assert condition_number_penalty([1e-4 * matrix], form=form).item() == pytest.approx(
        value.item(), rel=1e-8
    )


def test_scale_invariant_bounds_the_condition_number():
    for seed in range(50):
        sigma = (
            torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-3
        )
        penalty = condition_number_penalty(
            [with_singular_values(*sigma.tolist(), seed=seed)], ridge=0.0
        )
        assert (sigma.max() / sigma.min()).log() <= math.log(2) + penalty / 2 + 1e-9


def test_list_adds_up_and_mixes_kernels_with_matrices():
    matrices = [torch.randn(8, 3), torch.randn(4, 2, 3, 3), torch.randn(5, 5)]
    flat = [matrix.flatten(1) for matrix in matrices]
    for form in FORMS:
        total = condition_number_penalty(matrices, form=form)
        alone = sum(condition_number_penalty([matrix], form=form).item() for matrix in flat)
        assert total.item() == pytest.approx(alone, rel=1e-5)
        assert total.dtype == torch.float32


def test_floored_log_kappa_by_hand():
    # σ = (2, 0), t = 0.1 · 2: ½ log((4 + 0.04) / 0.04); nothing pulls on a σ that is 0.
    matrix = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    penalty = condition_number_penalty([matrix], form="log_kappa", tau=0.1)
    assert penalty.item() == pytest.approx(0.5 * math.log(101), rel=1e-9)
    # σ = (2, 1), t = 1: ∂σ₁ = 1/(2·2), ∂σ₂ = −1/2.
    matrix = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)).requires_grad_()
    penalty = condition_number_penalty([matrix], form="log_kappa", tau=0.5)
    (gradient,) = torch.autograd.grad(penalty, matrix)
    check_close(gradient, torch.diag(torch.tensor([0.25, -0.5])), 1e-6, "gradient")


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_first_and_second_order(form):
    matrices = (
        with_singular_values(3.0, 2.0, 1.0).requires_grad_(),
        GOLDEN.clone().requires_grad_(),
    )

    def function(*inputs):
        return condition_number_penalty(inputs, form=form, ridge=1e-2, tau=1e-2)

    assert torch.autograd.gradcheck(function, matrices, atol=1e-4)
    assert torch.autograd.gradgradcheck(function, matrices, atol=1e-3)


def pruned():
    """A weight with rubbish off its mask, and its live part: row 1 and column 2 are dead."""
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=torch.bool)
    weight = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(4, 3)
    live = torch.tensor([[1.0, 0.0], [7.0, 8.0], [0.0, 11.0]], dtype=torch.float64)
    return weight.requires_grad_(), SparsityPattern.from_mask(mask), live


@pytest.mark.parametrize("form", FORMS)
def test_pattern_keeps_the_live_part_only(form):
    weight, pattern, live = pruned()
    penalty = condition_number_penalty([weight, live], [pattern, None], form=form)
    expected = 2 * condition_number_penalty([live], form=form)
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-7)
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert torch.equal(gradient != 0, pattern.mask)


def test_pattern_of_a_convolution_may_have_either_shape():
    weight = torch.randn(4, 2, 3, 3)
    mask = torch.rand(4, 2, 3, 3) < 0.5
    values = [
        condition_number_penalty([weight], [SparsityPattern.from_mask(m)])
        for m in (mask, mask.flatten(1))
    ]
    assert torch.equal(*values)


def test_log_kappa_is_taken_at_the_structural_rank():
    # Two live columns that share one row: structural rank 1, σ = ‖(3, 4)‖, κ = 1.
    mask = torch.tensor([[1, 1], [0, 0]], dtype=torch.bool)
    weight = torch.tensor([[3.0, 4.0], [9.0, 9.0]])
    pattern = SparsityPattern.from_mask(mask)
    assert condition_number_penalty([weight], [pattern], form="log_kappa").item() == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("form", FORMS)
def test_matrix_that_is_pruned_whole_adds_nothing(form):
    weight = torch.randn(3, 4, requires_grad=True)
    nothing = SparsityPattern.from_mask(torch.zeros(3, 4, dtype=torch.bool))
    alone = condition_number_penalty([weight], [nothing], form=form)
    assert alone.item() == 0
    assert torch.equal(torch.autograd.grad(alone, weight)[0], torch.zeros(3, 4))
    other = torch.randn(5, 2)
    both = condition_number_penalty([weight, other], [nothing, None], form=form)
    assert both.item() == pytest.approx(condition_number_penalty([other], form=form).item())


def test_rank_deficiency_is_finite_with_a_ridge_and_infinite_without():
    matrix = torch.ones(3, 2, dtype=torch.float64)
    assert 0 < condition_number_penalty([matrix]).item() < math.inf
    assert condition_number_penalty([matrix], ridge=0.0).item() == math.inf


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_give_nan(form, bad):
    assert condition_number_penalty([torch.tensor([[1.0, bad], [0.0, 1.0]])], form=form).isnan()


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form):
    matrices = [torch.randn(6, 4)]
    expected = condition_number_penalty(matrices, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(condition_number_penalty(matrices, form=form), expected)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph(form):
    matrices = [torch.randn(6, 4), torch.randn(3, 5)]
    expected = condition_number_penalty(matrices, form=form)
    torch._dynamo.reset()
    compiled = torch.compile(condition_number_penalty, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(matrices, form=form), expected)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_call_follows_a_changed_pattern(form):
    weight = torch.randn(6, 4)
    torch._dynamo.reset()
    compiled = torch.compile(condition_number_penalty, fullgraph=True, backend="aot_eager")
    for dead in (1, 2, 5):
        mask = torch.ones(6, 4, dtype=torch.bool)
        mask[dead:] = False
        arguments = [weight], [SparsityPattern.from_mask(mask)]
        expected = condition_number_penalty(*arguments, form=form)
        torch.testing.assert_close(compiled(*arguments, form=form), expected)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_of_grad_is_the_gradient_of_each(form):
    batch = torch.randn(3, 5, 4, dtype=torch.float64)

    def penalty(weight):
        return condition_number_penalty([weight], form=form)

    mapped = torch.func.vmap(torch.func.grad(penalty))(batch)
    for weight, gradient in zip(batch, mapped, strict=True):
        leaf = weight.clone().requires_grad_()
        check_close(gradient, torch.autograd.grad(penalty(leaf), leaf)[0], 1e-9, "gradient")


def test_gradient_descent_lowers_the_condition_number():
    for form in FORMS:
        matrix = with_singular_values(4.0, 2.0, 1.0, 0.25).requires_grad_()
        optimizer = torch.optim.SGD([matrix], lr=1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            condition_number_penalty([matrix], form=form).backward()
            optimizer.step()
        sigma = torch.linalg.svdvals(matrix.detach())
        assert sigma[0] / sigma[-1] < 15


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_log_kappa_of_float64_matrices_does_not_depend_on_their_size(scale):
    matrix = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    value = condition_number_penalty([matrix * scale], form="log_kappa")
    assert value.item() == pytest.approx(math.log(4.0), rel=1e-9)


PATTERN = SparsityPattern.from_mask(torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("matrices", "kwargs", "error", "message"),
    [
        ([], {}, ValueError, "got an empty list"),
        (torch.eye(2), {}, TypeError, "got Tensor"),
        ([torch.eye(2).int()], {}, TypeError, "got torch.int32"),
        ([3.0], {}, TypeError, "got float"),
        ([torch.ones(3)], {}, ValueError, r"got shape \(3,\)"),
        ([torch.ones(0, 3)], {}, ValueError, r"got shape \(0, 3\)"),
        ([torch.eye(2), torch.eye(2, device="meta")], {}, ValueError, "cpu and meta"),
        ([torch.eye(2)], {"form": "kappa"}, ValueError, "got 'kappa'"),
        ([torch.eye(2)], {"form": "nenov", "repo_compat": True}, ValueError, "got form 'nenov'"),
        ([torch.eye(2)], {"ridge": -1.0}, ValueError, "ridge <= 1e.15, got -1.0"),
        ([torch.eye(2)], {"tau": math.nan}, ValueError, "tau <= 1e.15, got nan"),
        ([torch.eye(2)], {"tau": "1"}, TypeError, "tau to be a number, got str"),
        ([torch.eye(2).to_sparse()], {}, ValueError, "torch.sparse_coo"),
        ([torch.eye(2)], {"patterns": PATTERN}, TypeError, "got SparsityPattern"),
        ([torch.eye(2)], {"patterns": []}, ValueError, "got 0 patterns for 1 matrices"),
        ([torch.eye(2)], {"patterns": [torch.eye(2)]}, TypeError, "got Tensor"),
        ([torch.eye(2)], {"patterns": [PATTERN]}, ValueError, r"shape \(2, 2\), got \(2, 3\)"),
    ],
)
def test_bad_input_is_named(matrices, kwargs, error, message):
    with pytest.raises(error, match=message):
        condition_number_penalty(matrices, **kwargs)


KERNEL = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("operator", ["circular", "zeros"])
def test_log_kappa_of_operators_is_that_of_their_ends(operator):
    kernel, matrix = KERNEL.clone().requires_grad_(), GOLDEN.clone().requires_grad_()
    penalty = condition_number_penalty(
        [kernel, matrix, kernel],
        form="log_kappa",
        operator=operator,
        input_sizes=[(6, 4), None, 5],
        strides=[2, 1, 1],
        tau=0.0,
    )
    ends = [
        conv_singular_values(kernel, (6, 4), operator, 2),
        conv_singular_values(kernel, 5, operator),
    ]
    expected = sum((end.sigma_max / end.sigma_min).log() for end in ends) + math.log(18.52130534)
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-7)
    found = torch.autograd.grad(penalty, [kernel, matrix])
    check_close(found[0], torch.autograd.grad(expected, kernel)[0], 1e-9, "gradient")
    assert found[1].norm() > 0


def test_operators_leave_out_pruned_channels_and_take_groups_and_states():
    mask = torch.rand(KERNEL.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[1], mask[:, 2] = False, False
    options = {"form": "log_kappa", "operator": "circular", "input_sizes": [6]}
    pattern = SparsityPattern.from_mask(mask)
    penalty = condition_number_penalty([KERNEL], [pattern], **options)
    live = (KERNEL * mask)[[0, 2, 3]][:, :2]
    assert penalty == condition_number_penalty([live], **options)
    state = conv_singular_values(live, 6).state
    warm = condition_number_penalty([KERNEL], [pattern], [state], **options)
    assert warm.item() == pytest.approx(penalty.item(), rel=1e-6)
    grouped = condition_number_penalty([KERNEL], groups=[2], **options)
    ends = conv_singular_values(KERNEL, 6, groups=2)
    assert grouped.item() == pytest.approx((ends.sigma_max / ends.sigma_min).log().item(), rel=1e-6)
    nothing = SparsityPattern.from_mask(torch.zeros_like(mask))
    assert condition_number_penalty([KERNEL], [nothing], **options) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"operator": "torus"}, ValueError, "got 'torus'"),
        ({"operator": "circular", "form": "nenov"}, ValueError, "got form 'nenov'"),
        ({"operator": "circular"}, ValueError, r"input_sizes\[0\] is missing"),
        ({"operator": "zeros", "input_sizes": [None]}, ValueError, r"shape \(4, 3, 3, 3\)"),
        ({"operator": "circular", "input_sizes": [4, 4]}, ValueError, "got 2 for 1"),
        ({"operator": "circular", "input_sizes": [4], "groups": []}, ValueError, "got 0 for 1"),
        ({"operator": "circular", "input_sizes": [5], "strides": [2]}, ValueError, "divides"),
        ({"operator": "zeros", "input_sizes": [300]}, ValueError, "has no bound"),
        ({"input_sizes": [4]}, ValueError, "input_sizes belong to convolutions"),
        ({"state": [None]}, TypeError, "got list"),
    ],
)
def test_bad_operators_are_named(options, error, message):
    with pytest.raises(error, match=message):
        condition_number_penalty([KERNEL], **{"form": "log_kappa", **options})
