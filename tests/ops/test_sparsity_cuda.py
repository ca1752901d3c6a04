"""Patterns of masks on a GPU, beside those that the CPU builds."""

import pytest
import torch

from tests.ops.test_masked_linear import MASKS, make_mask
from tscnc_kernels import SparsityPattern

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def check(mask):
    expected = SparsityPattern.from_mask(mask)
    found = SparsityPattern.from_mask(mask.to("cuda"))
    again = SparsityPattern.from_bits(found.bits, mask.shape)
    for pattern in (found, again):
        assert pattern.device.type == "cuda"
        for tensor, wanted in zip(pattern.tensors, expected.tensors, strict=True):
            assert torch.equal(tensor.cpu(), wanted)


@needs_gpu
@pytest.mark.parametrize("kind", MASKS)
def test_cuda_builds_the_index_of_the_cpu(kind):
    for shape in ((1, 1), (67, 45), (130, 700), (2000, 300)):
        check(make_mask(kind, *shape))


@needs_gpu
def test_cuda_builds_from_masks_with_other_strides_and_of_convolutions():
    generator = torch.Generator().manual_seed(4)
    check((torch.rand(90, 50, generator=generator) < 0.2).t())
    check(torch.rand(12, 5, 3, 3, generator=generator) < 0.3)
