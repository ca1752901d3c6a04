"""The CUDA builder of patterns, run on the CPU by the emulation, against the builder of the CPU."""

import ctypes
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.masked_calls import MASKS, make_mask
from tests.cuda_emulation.library import EmulatedLibrary, GuardedTensor, guarded_copy
from tscnc_kernels import SparsityPattern

# Around the sizes of a byte, of a group of columns, of a block, and of a range of rows.
SHAPES = [(1, 1), (3, 7), (5, 33), (9, 64), (2, 1100), (130, 5), (67, 300), (200, 40)]


class PatternIndex(ctypes.Structure):
    _fields_ = (
        *(("bits", c_void_p), ("rows", c_int64), ("width", c_int64)),
        *((name, c_void_p) for name in ("row_pointers", "column_pointers", "columns")),
        *((name, c_void_p) for name in ("column_rows", "permutation", "workspace")),
    )


class Kernels:
    """The launchers; results are the same in every order of the threads."""

    def __init__(self, library: EmulatedLibrary) -> None:
        self.library = library
        self._pack = library.function("pack_mask", c_int, c_void_p, c_int64, c_void_p)
        self._length = library.function("workspace_length", c_int64, c_int64, c_int64)
        self._counts = library.function("pattern_counts", c_int, c_void_p, c_void_p)
        self._lists = library.function("pattern_lists", c_int, c_void_p, c_int64)

    def pack(self, mask: Tensor) -> Tensor:
        """The bits of a mask."""
        source = guarded_copy(mask)

        def run() -> list[Tensor]:
            bits = GuardedTensor((mask.numel() + 7) // 8, torch.uint8)
            self.library.call(
                self._pack, source.tensor.data_ptr(), mask.numel(), bits.tensor.data_ptr()
            )
            bits.check()
            return [bits.tensor]

        return self.library.run_in_every_order(run)[0]

    def build(self, bits: Tensor, rows: int, width: int) -> list[Tensor]:
        """The index, in the order of a pattern's tensors."""
        source = guarded_copy(bits)

        def run() -> list[Tensor]:
            kept = GuardedTensor(1, torch.int64)
            sizes = rows + 1, width + 1, self._length(rows, width)
            pointers, column_pointers, workspace = (GuardedTensor(n, torch.int32) for n in sizes)
            index = PatternIndex(
                *(source.tensor.data_ptr(), rows, width, pointers.tensor.data_ptr()),
                *(column_pointers.tensor.data_ptr(), None, None, None, workspace.tensor.data_ptr()),
            )
            self.library.call(self._counts, ctypes.byref(index), kept.tensor.data_ptr())
            nnz = int(kept.tensor)
            lists = [GuardedTensor(nnz, torch.int32) for _ in range(3)]
            index.columns, index.column_rows, index.permutation = (
                guarded.tensor.data_ptr() for guarded in lists
            )
            self.library.call(self._lists, ctypes.byref(index), nnz)
            found = pointers, lists[0], column_pointers, *lists[1:]
            for guarded in (kept, workspace, *found):
                guarded.check()
            return [guarded.tensor for guarded in found]

        return list(self.library.run_in_every_order(run))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    source = Path(__file__).parent / "sparsity_emulated.cpp"
    return Kernels(EmulatedLibrary(source, tmp_path_factory.mktemp("sparsity")))


def check(kernels: Kernels, mask: Tensor) -> None:
    """Bits and index of a mask, entry by entry."""
    expected = SparsityPattern.from_mask(mask)
    bits = kernels.pack(mask)
    assert torch.equal(bits, expected.bits)
    found = kernels.build(bits, *mask.shape)
    for tensor, wanted in zip(found, expected.tensors[1:], strict=True):
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(kernels: Kernels, shape: tuple[int, int]) -> None:
    check(kernels, make_mask("random", *shape))


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kernels: Kernels, kind: str) -> None:
    check(kernels, make_mask(kind, 70, 45))


def test_more_rows_than_ranges(kernels: Kernels) -> None:
    check(kernels, make_mask("random", 4200, 3, 0.4))


def test_more_counts_than_one_round_of_prefix_sums(kernels: Kernels) -> None:
    check(kernels, make_mask("random", 70, 1100, 0.1))


def test_a_hand_worked_pattern(kernels: Kernels) -> None:
    mask = torch.tensor([[True, False, True], [False, False, True], [True, True, False]])
    bits = kernels.pack(mask)
    assert bits.tolist() == [0b11100101, 0b0]
    index = [tensor.tolist() for tensor in kernels.build(bits, 3, 3)]
    assert index == [[0, 2, 3, 5], [0, 2, 2, 0, 1], [0, 2, 3, 5], [0, 2, 2, 0, 1], [0, 3, 4, 1, 2]]
