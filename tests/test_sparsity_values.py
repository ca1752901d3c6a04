"""The compiled loops between a weight and its kept values."""

import pytest
import torch

from tscnc_kernels import SparsityPattern
from tscnc_kernels._masked_weight import kept_values, masked, masked_weight

ops = torch.ops.tscnc_kernels


def pattern(*shape, density=0.3):
    generator = torch.Generator().manual_seed(0)
    return SparsityPattern.from_mask(torch.rand(*shape, generator=generator) < density)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (63, 129), (5, 3, 2, 3), (400, 300)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_they_move_the_same_numbers_as_torch(dtype, shape, density):
    kept = pattern(*shape, density=density)
    weight = torch.randn(shape).to(dtype)
    values = kept_values(weight, kept)
    assert torch.equal(values, weight[kept.mask])
    assert torch.equal(masked_weight(values, kept), weight.where(kept.mask, weight.new_zeros(())))


def test_strided_matrices_are_read_as_they_are():
    kept, weight = pattern(6, 9), torch.randn(9, 12)[:, ::2].t()
    assert torch.equal(kept_values(weight, kept), weight[kept.mask])
    values = torch.randn(2 * kept.nnz)[::2]
    assert torch.equal(masked_weight(values, kept)[kept.mask], values)


def test_gradients_still_flow_through_torch():
    kept = pattern(6, 9)
    weight = torch.randn(6, 9, requires_grad=True)
    (found,) = torch.autograd.grad(kept_values(weight, kept).sum(), weight)
    assert torch.equal(found, kept.mask.float())
    values = torch.randn(kept.nnz, requires_grad=True)
    (found,) = torch.autograd.grad(masked_weight(values, kept).sum(), values)
    assert torch.equal(found, torch.ones(kept.nnz))


def test_the_ops_have_fakes():
    kept = pattern(6, 9)
    index = kept.row_pointers, kept.columns
    torch.library.opcheck(ops.sparsity_gather.default, (torch.randn(6, 9), *index))
    torch.library.opcheck(ops.sparsity_scatter.default, (torch.randn(kept.nnz), *index, 9))
    torch.library.opcheck(ops.sparsity_mask.default, (torch.randn(6, 9), kept.bits))
    torch.library.opcheck(ops.sparsity_mask_.default, (torch.randn(6, 9), kept.bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (8, 16), (400, 301)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_packed_masks_clear_what_they_do_not_keep(dtype, shape, density):
    kept = pattern(*shape, density=density)
    weight = torch.randn(shape).to(dtype)
    weight[~kept.mask] = torch.nan
    expected = weight.where(kept.mask, weight.new_zeros(()))
    assert torch.equal(ops.sparsity_mask(weight, kept.bits), expected)
    assert torch.equal(masked(weight, kept), expected)
    assert weight.isnan().sum() == (~kept.mask).sum()
    ops.sparsity_mask_(weight, kept.bits)
    assert torch.equal(weight, expected)


def test_a_weight_of_one_s_own_is_masked_in_place():
    kept, weight = pattern(6, 9), torch.randn(6, 9)
    assert masked(weight, kept, own=True) is weight
    assert torch.equal(weight != 0, kept.mask)


def test_an_index_that_does_not_fit_is_refused():
    kept = pattern(6, 9)
    index = kept.row_pointers, kept.columns
    with pytest.raises(RuntimeError, match="expected 5 rows in the index, got 6"):
        ops.sparsity_gather(torch.randn(5, 9), *index)
    with pytest.raises(RuntimeError, match="columns from 0 to 3"):
        ops.sparsity_gather(torch.randn(6, 4), *index)
    with pytest.raises(RuntimeError, match="columns from 0 to 3"):
        ops.sparsity_scatter(torch.randn(kept.nnz), *index, 4)
    with pytest.raises(RuntimeError, match="7 bytes of mask"):
        ops.sparsity_mask(torch.randn(6, 9), kept.bits[1:])
    with pytest.raises(RuntimeError, match="contiguous CPU tensor"):
        ops.sparsity_mask_(torch.randn(9, 6).t(), kept.bits)
    with pytest.raises(RuntimeError, match="contiguous values"):
        ops.sparsity_scatter(torch.randn(kept.nnz + 1), *index, 9)
