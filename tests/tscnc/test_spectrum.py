"""Spectra of layers whose singular values are known by hand."""

import math

import pytest
import torch
from torch import nn

from tscnc import spectrum
from tscnc_kernels.nn import sparsify


def layer(weight: list[list[float]]) -> nn.Sequential:
    matrix = torch.tensor(weight)
    linear = nn.Linear(matrix.shape[1], matrix.shape[0])
    linear.weight = nn.Parameter(matrix)
    return nn.Sequential(linear)


def test_a_diagonal_matrix_has_its_diagonal_as_spectrum() -> None:
    model = layer([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])
    assert spectrum.singular_values(model)["0.weight"].tolist() == pytest.approx([4.0, 3.0])
    found = spectrum.layer_spectra(model, {})["0.weight"]
    assert (found.shape, found.density, found.structural_rank) == ((2, 3), 1.0, 2)
    assert (found.dead_rows, found.dead_columns) == (0, 0)
    assert found.sigma_max == pytest.approx(4.0)
    assert found.kappa_full == found.kappa_structural == pytest.approx(4 / 3)


@pytest.mark.parametrize("swapped", [False, True])
def test_dead_rows_and_columns_count_for_the_full_condition_only(swapped: bool) -> None:
    model = layer([[2.0, 9.0, 0.0], [0.0, 9.0, 5.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, False, False], [False, False, True], [False, False, False]])
    if swapped:
        sparsify(model, {"0.weight": mask}, mode="values")
    found = spectrum.layer_spectra(model, {"0.weight": mask})["0.weight"]
    assert (found.dead_rows, found.dead_columns, found.structural_rank) == (1, 1, 2)
    assert found.density == pytest.approx(2 / 9)
    assert found.sigma_min_full == 0 and found.kappa_full == math.inf
    assert found.sigma_max == pytest.approx(5.0)
    assert found.kappa_structural == pytest.approx(2.5)


def test_the_spectrum_is_of_the_whole_masked_matrix() -> None:
    model = layer([[2.0, 9.0], [9.0, 5.0]])
    sparsify(model, {"0.weight": torch.eye(2, dtype=torch.bool)}, mode="values")
    assert spectrum.singular_values(model)["0.weight"].tolist() == pytest.approx([5.0, 2.0])


def test_a_layer_without_weights_is_infinite_and_never_nan() -> None:
    model = layer([[1.0, 2.0], [3.0, 4.0]])
    mask = torch.zeros(2, 2, dtype=torch.bool)
    found = spectrum.layer_spectra(model, {"0.weight": mask})["0.weight"]
    assert (found.sigma_max, found.structural_rank) == (0.0, 0)
    assert found.kappa_full == found.kappa_structural == math.inf
    text = spectrum.table(model, {"0.weight": mask})
    assert text.count("∞") == 2 and "nan" not in text


def test_the_table_has_a_line_per_layer_of_equal_length() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    lines = spectrum.table(model, {}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["0.weight", "2.weight"]
    assert "3 x 4" in lines[2] and "100 %" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = layer([[1.0, math.nan]])
    with pytest.raises(ValueError, match=r"'0\.weight' holds NaN"):
        spectrum.singular_values(model)
    with pytest.raises(ValueError, match=r"'0\.weight' holds NaN"):
        spectrum.layer_spectra(model, {})


def test_a_model_without_prunable_layers_has_no_spectrum() -> None:
    assert spectrum.layer_spectra(nn.ReLU(), {}) == {}
    assert spectrum.singular_values(nn.ReLU()) == {}
