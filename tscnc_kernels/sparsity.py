"""SparsityPattern: which entries of a weight are kept, in the form that the kernels read.

The canonical form is the mask as packed bits. Everything else is an index built from it once per
mask: the kept entries row by row, and column by column for the transposed product with a
permutation from one order to the other. A weight of more than two dimensions is indexed as the
matrix (shape[0], product of the rest).

Letters: N rows, K columns, nnz kept entries.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tscnc_kernels import _sparsity_native as _sparsity_native  # registers the native ops

_native = torch.ops.tscnc_kernels
_has_key = torch._C._dispatch_has_kernel_for_dispatch_key
# Where the native builder runs. On CUDA it waits once, for the number of kept entries.
_BUILDERS = {"cpu", "cuda"} if _has_key("tscnc_kernels::sparsity_build", "CUDA") else {"cpu"}


def _check_mask(mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"expected mask to be a boolean tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"expected mask of dtype torch.bool, got {mask.dtype}")
    if mask.layout != torch.strided:
        raise ValueError(f"expected a strided mask, got {mask.layout}")
    if mask.is_meta:
        raise ValueError("expected a mask with data, got one on the meta device")
    _check_shape(mask.shape)


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) not in (2, 4):
        raise ValueError(
            f"expected a mask of 2 dimensions (linear) or 4 (convolution), got shape {tuple(shape)}"
        )
    if any(size < 1 for size in shape):
        raise ValueError(f"expected a mask with at least one entry, got shape {tuple(shape)}")


@dataclass(frozen=True, eq=False, repr=False)
class SparsityPattern:
    """The kept entries of a weight: an immutable mask with its index.

    Build it with `SparsityPattern.from_mask(mask)`. A changed mask is a new pattern (`update`),
    because a pattern that changed between forward and backward would corrupt gradients silently.
    Copies share the tensors, which must not be written to. Two patterns are equal when their
    shapes and masks are.

    Attributes:
        shape: shape of the mask and of the dense weight.
        bits: (⌈numel / 8⌉,) uint8, the mask in row-major order, entry i in bit i % 8 of byte i //
            8.
        row_pointers: (N + 1,) int32; row n holds the kept entries row_pointers[n] to
            row_pointers[n + 1] - 1.
        columns: (nnz,) int32, the column of each kept entry in row-major order.
        column_pointers: (K + 1,) int32, as row_pointers for the entries in column-major order.
        column_rows: (nnz,) int32, the row of each kept entry in column-major order.
        permutation: (nnz,) int32, the row-major place of each kept entry in column-major order.
    """

    shape: tuple[int, ...]
    bits: Tensor
    row_pointers: Tensor
    columns: Tensor
    column_pointers: Tensor
    column_rows: Tensor
    permutation: Tensor
    _built: dict[str, Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def from_mask(cls, mask: Tensor) -> "SparsityPattern":
        """The pattern that keeps the entries where `mask` is true.

        On a GPU the index is built there; the call waits once, for the number of kept entries.

        Args:
            mask: (N, K) bool tensor, or (out, in / groups, kh, kw) for a convolution. Rows,
                columns or all entries may be pruned.

        Returns:
            The pattern, on the mask's device.

        Raises:
            TypeError: the mask is not a boolean tensor.
            ValueError: not 2 or 4 dimensions, or no entries.
        """
        _check_mask(mask)
        bits = _native.sparsity_pack(_for_builder(mask).contiguous())
        return cls._from_packed(bits, tuple(mask.shape)).to(mask.device)

    @classmethod
    def from_bits(cls, bits: Tensor, shape: Sequence[int]) -> "SparsityPattern":
        """The pattern of a packed mask, as stored in a `state_dict`.

        Args:
            bits: (⌈numel / 8⌉,) uint8 tensor, see the attribute `bits`.
            shape: shape of the mask.

        Returns:
            The pattern, on the device of `bits`.

        Raises:
            TypeError: bits are not a uint8 tensor, or shape is not a sequence of integers.
            ValueError: the number of bytes does not fit the shape.
        """
        if not isinstance(bits, Tensor):
            raise TypeError(f"expected mask bits to be a tensor, got {type(bits).__name__}")
        if not isinstance(shape, Sequence) or not all(isinstance(size, int) for size in shape):
            raise TypeError(f"expected shape to be a sequence of integers, got {shape!r}")
        _check_shape(shape)
        if bits.dtype != torch.uint8:
            raise TypeError(f"expected mask bits of dtype torch.uint8, got {bits.dtype}")
        size = -(-math.prod(shape) // 8)
        if bits.shape != (size,):
            raise ValueError(
                f"expected {size} bytes of mask bits for shape {tuple(shape)}, "
                f"got shape {tuple(bits.shape)}"
            )
        packed = _for_builder(bits).clone(memory_format=torch.contiguous_format)
        packed[-1:] &= 0xFF >> (8 * size - math.prod(shape))
        return cls._from_packed(packed, tuple(shape)).to(bits.device)

    @classmethod
    def _from_packed(cls, bits: Tensor, shape: tuple[int, ...]) -> "SparsityPattern":
        return cls(shape, bits, *_native.sparsity_build(bits, shape[0], math.prod(shape[1:])))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K) of the indexed matrix."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def nnz(self) -> int:
        """Number of kept entries."""
        return self.columns.shape[0]

    @property
    def density(self) -> float:
        """Share of the entries that are kept, in [0, 1]."""
        return self.nnz / math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the index is."""
        return self.bits.device

    @property
    def mask(self) -> Tensor:
        """Bool tensor of `shape`, unpacked anew on every call."""
        return _unpack(self.bits, self.shape)

    @property
    def row_counts(self) -> Tensor:
        """(N,) int32, kept entries per row."""
        return self.row_pointers.diff()

    @property
    def blocked_rows(self) -> Tensor:
        """uint8 buffer with the kept entries in the order of the cache-blocked products (layout:
        csrc/include/blocked_index.h), built when it is first asked for.
        """
        return self._blocked("rows")

    @property
    def blocked_columns(self) -> Tensor:
        """As blocked_rows for the transposed matrix."""
        return self._blocked("columns")

    @property
    def blocked_permutation(self) -> Tensor:
        """As permutation in the order of blocked_columns."""
        return self._blocked("permutation")

    @property
    def is_blocked(self) -> bool:
        """Whether blocked_rows, blocked_columns and blocked_permutation are built."""
        return {"rows", "columns", "permutation"} <= self._built.keys()

    @property
    def narrow_columns(self) -> Tensor:
        """`columns` as uint16, made when first asked for; as they are where K > 65536, and while a
        CUDA graph is captured, whose memory does not outlive it.
        """
        found = self._built.get("narrow")
        if found is not None:
            return found
        if self.matrix_shape[1] > 1 << 16:
            return self.columns
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self.columns
        found = self.columns.to(torch.uint16)
        if not torch.compiler.is_compiling():
            self._built["narrow"] = found
        return found

    def _blocked(self, order: str) -> Tensor:
        found = self._built.get(order)
        if found is None:
            rows, width = self.matrix_shape
            if order == "rows":
                found = _native.sparsity_block(self.row_pointers, self.columns, width)
            elif order == "columns":
                found = _native.sparsity_block(self.column_pointers, self.column_rows, rows)
            else:
                found = _native.sparsity_block_order(
                    self.blocked_columns, self.permutation, width, rows
                )
            if not torch.compiler.is_compiling():
                self._built[order] = found
        return found

    @functools.cached_property
    def block_shape(self) -> tuple[int, int] | None:
        """(r, c) of the blocks that the mask is made of, or None where r would be under 4.

        Both are powers of two up to 128 that divide the mask's sides. Looked at when it is first
        asked for; in a mask without blocks the first rows tell.
        """
        index = self.row_pointers.cpu(), self.columns.cpu()
        rows, columns = _native.sparsity_block_shape(*index, self.matrix_shape[1]).tolist()
        return (rows, columns) if rows >= 4 else None

    def gather(self, weight: Tensor) -> Tensor:
        """The kept entries weight[mask], differentiable.

        Args:
            weight: tensor of `shape`, any dtype.

        Returns:
            (nnz,) values in row-major order.

        Raises:
            TypeError: not a tensor.
            ValueError: another shape or device.
        """
        self._check_fits("weight", weight, self.shape)
        return weight.reshape(-1).gather(0, self._positions())

    def scatter(self, values: Tensor) -> Tensor:
        """The dense weight that holds `values` at the kept entries and zero elsewhere,
        differentiable.

        Args:
            values: (nnz,) tensor in row-major order, any dtype.

        Returns:
            Tensor of `shape`.

        Raises:
            TypeError: not a tensor.
            ValueError: another shape or device.
        """
        self._check_fits("values", values, (self.nnz,))
        flat = values.new_zeros(math.prod(self.shape))
        return flat.scatter(0, self._positions(), values).reshape(self.shape)

    def update(self, mask: Tensor) -> tuple["SparsityPattern", Tensor]:
        """The pattern of a changed mask, and where its values come from.

        The packed bits of both masks are compared 64 at a time. The index is built anew from them:
        a moved entry shifts the places of others in both orders, so that copying the index with the
        changes put in takes as long.

        Args:
            mask: bool tensor of `shape`.

        Returns:
            The new pattern, and the mapping: (new nnz,) int64, for each kept entry of the new
            pattern its index among this pattern's values, or -1 where the entry was pruned before.
            `remap(values, mapping)` applies it.

        Raises:
            TypeError: the mask is not a boolean tensor.
            ValueError: another shape.
        """
        _check_mask(mask)
        if tuple(mask.shape) != self.shape:
            raise ValueError(f"expected mask of shape {self.shape}, got {tuple(mask.shape)}")
        pattern = SparsityPattern.from_mask(mask.to(self.device))
        return pattern, self.mapping_to(pattern)

    def mapping_to(self, pattern: "SparsityPattern") -> Tensor:
        """Where the values of another pattern of this shape come from, see `update`.

        Of the old entries it reads the packed bits only, 64 at a time.
        """
        mapping: Tensor = _native.sparsity_mapping(self.bits.cpu(), pattern.bits.cpu())
        return mapping.to(self.device)

    def changes_to(self, pattern: "SparsityPattern") -> tuple[Tensor, ...]:
        """Where another pattern of this shape differs: an int64 index per dimension."""
        differing = self.bits.cpu() ^ pattern.bits.cpu()
        places = _native.sparsity_places(differing).long().to(self.device)
        return torch.unravel_index(places, self.shape)

    def to(self, device: torch.device | str) -> "SparsityPattern":
        """The pattern on a device; itself if it is there already."""
        if self.bits.device == torch.empty(0, device=device).device:
            return self
        moved = SparsityPattern(self.shape, *(tensor.to(device) for tensor in self.tensors))
        if self.device.type == "cpu":
            # Here nobody has to wait for a GPU, which a captured graph could not.
            moved.__dict__["block_shape"] = self.block_shape
        return moved

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All tensors, in the order of the constructor."""
        return (
            self.bits,
            self.row_pointers,
            self.columns,
            self.column_pointers,
            self.column_rows,
            self.permutation,
        )

    def _check_fits(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"expected {name} of shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != self.device:
            raise ValueError(
                f"expected {name} on the pattern's device {self.device}, got {tensor.device}"
            )

    def _positions(self) -> Tensor:
        """(nnz,) int64, the kept entries' places in the flattened weight."""
        rows, width = self.matrix_shape
        starts = torch.arange(rows, device=self.device) * width
        counts = self.row_counts.long()
        return starts.repeat_interleave(counts, output_size=self.nnz) + self.columns

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsityPattern):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.bits.cpu(), other.bits.cpu())

    def __hash__(self) -> int:
        return hash((self.shape, self.nnz))

    def __repr__(self) -> str:
        return f"SparsityPattern(shape={self.shape}, nnz={self.nnz}, density={self.density:.4g})"

    def __copy__(self) -> "SparsityPattern":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "SparsityPattern":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SparsityPattern.from_bits, (self.bits, self.shape)


def _for_builder(tensor: Tensor) -> Tensor:
    """The tensor where a native builder can read it."""
    return tensor.detach() if tensor.device.type in _BUILDERS else tensor.detach().cpu()


def remap(values: Tensor, mapping: Tensor) -> Tensor:
    """Carry values over to a changed pattern: values[mapping], and zero where the mapping is -1.

    Args:
        values: (nnz,) tensor of the old pattern, any dtype.
        mapping: (new nnz,) int64 from `SparsityPattern.update`.

    Returns:
        (new nnz,) tensor of the new pattern.
    """
    if values.device.type == "cpu" and not values.requires_grad:
        return _native.sparsity_remap(values.contiguous(), mapping)  # type: ignore[no-any-return]
    return torch.cat([values, values.new_zeros(1)])[mapping]


def _unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    if bits.device.type != "cpu":
        return unpack_reference(bits, shape)
    mask: Tensor = _native.sparsity_unpack(bits.contiguous(), shape[0], math.prod(shape[1:]))
    return mask.reshape(shape)


def unpack_reference(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask of packed bits in plain torch, for any device."""
    spread = bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (spread & 1).bool().flatten()[: math.prod(shape)].reshape(shape)
