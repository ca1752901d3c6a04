"""Layer-wise quotas: the golden densities, the budget, and what is refused."""

import math

import pytest

from tscnc.pruning import quotas

LENET = [(300, 784), (100, 300), (10, 100)]
VGG16 = [
    *[(o, i, 3, 3) for o, i in ((64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256))],
    *[(o, i, 3, 3) for o, i in ((256, 256), (512, 256), (512, 512), (512, 512), (512, 512))],
    *[(512, 512, 3, 3)] * 2,
    (10, 512),
]
QUOTAS = [quotas.uniform, quotas.uniform_plus, quotas.erk, quotas.igq]


@pytest.mark.parametrize(
    ("sparsity", "densities"),
    [
        (0.9, [0.064447, 0.350677, 0.941867]),
        (0.99, [0.00462, 0.035113, 0.521926]),
        (0.999, [0.000388, 0.003037, 0.083736]),
    ],
)
def test_igq_of_lenet(sparsity: float, densities: list[float]) -> None:
    assert quotas.igq(LENET, sparsity) == pytest.approx(densities, abs=6e-7)


def test_igq_of_vgg16() -> None:
    golden = [0.87812, 0.25246, 0.14447, 0.07786, 0.04051, 0.02067, 0.02067, 0.01044]
    golden += [0.00525] * 5 + [0.70859]
    assert quotas.igq(VGG16, 0.99) == pytest.approx(golden, abs=6e-6)


def test_erk_of_lenet_with_and_without_the_cap() -> None:
    assert quotas.erk(LENET, 0.9) == pytest.approx([0.079568, 0.230189, 1], abs=6e-7)
    assert quotas.erk(LENET, 0.99) == pytest.approx([0.007697, 0.022267, 0.183701], abs=6e-7)


def test_erk_follows_the_sum_of_all_dimensions() -> None:
    densities = quotas.erk([(8, 8, 3, 3), (64, 32, 1, 1), (100, 100)], 0.9)
    raw = [22 / 576, 98 / 2048, 200 / 10000]
    assert densities == pytest.approx([r * 1262.4 / 320 for r in raw])


def test_uniform_plus_keeps_the_first_convolution_and_a_fifth_of_the_last_layer() -> None:
    shapes = [(4, 2, 3, 3), (8, 4, 3, 3), (10, 100)]
    first, *_, last = quotas.uniform_plus(shapes, 0.8)
    assert (first, last) == (1, pytest.approx(0.2))
    assert quotas.uniform_plus(shapes, 0.5)[1] == quotas.uniform_plus(shapes, 0.5)[2] > 0.2


def test_uniform_plus_without_convolutions_is_uniform() -> None:
    assert quotas.uniform_plus(LENET, 0.97) == quotas.uniform(LENET, 0.97)


def test_uniform_plus_refuses_a_budget_below_what_stays_dense() -> None:
    with pytest.raises(ValueError, match=r"cannot reach sparsity 0\.9: .*take 227"):
        quotas.uniform_plus([(3, 1, 3, 3), (3, 3, 3, 3), (10, 100)], 0.9)
    with pytest.raises(ValueError, match="cannot reach sparsity"):
        quotas.uniform_plus([(3, 1, 3, 3)], 0.5)


@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.98])
@pytest.mark.parametrize("shapes", [LENET, VGG16, [(5, 7)]])
def test_the_whole_budget_is_spent(
    quota: quotas.Quota, sparsity: float, shapes: quotas.Shapes
) -> None:
    densities = quota(shapes, sparsity)
    sizes = [math.prod(shape) for shape in shapes]
    kept = math.fsum(d * n for d, n in zip(densities, sizes, strict=True))
    assert kept == pytest.approx((1 - sparsity) * sum(sizes), rel=1e-12)
    assert all(0 <= density <= 1 + 1e-12 for density in densities)


@pytest.mark.parametrize("sparsity", [1 - 1e-6, 1 - 1e-12])
def test_extreme_sparsities_stay_positive(sparsity: float) -> None:
    for quota in (quotas.uniform, quotas.erk, quotas.igq):
        densities = quota(LENET, sparsity)
        assert all(0 < density < 1e-3 for density in densities)


@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("sparsity", [1.0, -0.1, 99, math.nan])
def test_a_sparsity_outside_the_unit_interval_is_refused(
    quota: quotas.Quota, sparsity: float
) -> None:
    with pytest.raises(ValueError, match=rf"sparsity in \[0, 1\), got {sparsity}"):
        quota(LENET, sparsity)


@pytest.mark.parametrize("quota", QUOTAS)
def test_bad_shapes_are_refused(quota: quotas.Quota) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        quota([], 0.5)
    with pytest.raises(ValueError, match=r"positive dimensions, got \(0, 3\)"):
        quota([(4, 4), (0, 3)], 0.5)
    with pytest.raises(ValueError, match=r"positive dimensions, got \(\)"):
        quota([()], 0.5)
