import copy
import io
import pickle

import pytest
import torch

from tests.ops.test_masked_linear import MASKS, make_mask
from tscnc_kernels import SparsityPattern, masked_linear
from tscnc_kernels.sparsity import remap, unpack_reference

# [[1, 0, 1], [0, 0, 0], [0, 1, 1]]
SMALL = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])


def test_hand_worked_index():
    pattern = SparsityPattern.from_mask(SMALL)
    assert pattern.shape == (3, 3) and pattern.nnz == 4
    assert pattern.density == pytest.approx(4 / 9)
    # Bits 0, 2, 7 of the first byte and bit 0 of the second.
    assert pattern.bits.tolist() == [1 + 4 + 128, 1]
    assert pattern.row_pointers.tolist() == [0, 2, 2, 4]
    assert pattern.columns.tolist() == [0, 2, 1, 2]
    assert pattern.column_pointers.tolist() == [0, 1, 2, 4]
    assert pattern.column_rows.tolist() == [0, 2, 0, 2]
    assert pattern.permutation.tolist() == [0, 2, 1, 3]
    assert pattern.row_counts.tolist() == [2, 0, 2]
    assert repr(pattern) == "SparsityPattern(shape=(3, 3), nnz=4, density=0.4444)"


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (64, 64), (63, 131)])
def test_index_lists_every_kept_entry_in_both_orders(kind, size):
    mask = make_mask(kind, *size)
    pattern = SparsityPattern.from_mask(mask)
    assert torch.equal(pattern.mask, mask)
    assert torch.equal(unpack_reference(pattern.bits, size), mask)
    rows, columns = mask.nonzero(as_tuple=True)
    assert torch.equal(pattern.columns.long(), columns)
    assert torch.equal(pattern.row_pointers.diff().long(), mask.sum(1))
    assert torch.equal(pattern.column_pointers.diff().long(), mask.sum(0))
    order = pattern.permutation.long()
    assert torch.equal(pattern.column_rows.long(), rows[order])
    by_column = torch.stack([columns[order], rows[order]], 1)
    assert torch.equal(by_column, mask.t().nonzero())


def test_convolution_mask_keeps_its_shape():
    mask = torch.rand(6, 3, 3, 3) < 0.3
    pattern = SparsityPattern.from_mask(mask)
    weight = torch.randn(6, 3, 3, 3)
    assert pattern.shape == (6, 3, 3, 3) and pattern.matrix_shape == (6, 27)
    assert torch.equal(pattern.mask, mask)
    assert torch.equal(pattern.gather(weight), weight[mask])
    assert torch.equal(pattern.scatter(weight[mask]), weight * mask)


@pytest.mark.parametrize("kind", MASKS)
def test_gather_and_scatter_are_row_major_and_differentiable(kind):
    mask = make_mask(kind, 9, 11)
    pattern = SparsityPattern.from_mask(mask)
    weight = torch.randn(9, 11, dtype=torch.float64, requires_grad=True)
    values = torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True)
    assert torch.equal(pattern.gather(weight), weight[mask])
    assert torch.equal(pattern.scatter(values)[mask], values)
    assert not pattern.scatter(values)[~mask].any()
    for function, input in ((pattern.gather, weight), (pattern.scatter, values)):
        if input.numel():
            assert torch.autograd.gradcheck(function, input)
            assert torch.autograd.gradgradcheck(lambda t, f=function: f(t).square(), input)


def test_gather_takes_any_dtype_and_strides():
    pattern = SparsityPattern.from_mask(SMALL)
    steps = torch.arange(9).reshape(3, 3).t()
    assert pattern.gather(steps).tolist() == [0, 6, 5, 8]
    assert pattern.scatter(torch.tensor([True] * 4)).tolist() == SMALL.tolist()


def test_non_contiguous_mask():
    mask = make_mask("random", 31, 17)
    assert torch.equal(SparsityPattern.from_mask(mask.t()).mask, mask.t())


def test_true_is_any_non_zero_byte():
    odd = torch.tensor([[0, 2, 255], [7, 0, 128]], dtype=torch.uint8).view(torch.bool)
    pattern = SparsityPattern.from_mask(odd)
    assert pattern.mask.view(torch.uint8).tolist() == [[0, 1, 1], [1, 0, 1]]
    assert pattern.columns.tolist() == [1, 2, 0, 2]


def test_update_maps_kept_dropped_and_grown_entries():
    pattern = SparsityPattern.from_mask(SMALL)
    changed = torch.tensor([[True, True, False], [False, False, True], [False, True, True]])
    new, mapping = pattern.update(changed)
    assert mapping.tolist() == [0, -1, -1, 2, 3]
    assert remap(torch.tensor([10.0, 20.0, 30.0, 40.0]), mapping).tolist() == [10, 0, 0, 30, 40]
    assert torch.equal(new.mask, changed)
    assert torch.equal(pattern.mask, SMALL), "the old pattern is unchanged"


@pytest.mark.parametrize("before", MASKS)
@pytest.mark.parametrize("after", MASKS)
def test_update_carries_the_weight(before, after):
    old, new = make_mask(before, 12, 13), make_mask(after, 12, 13).flip(1)
    pattern = SparsityPattern.from_mask(old)
    weight = torch.randn(12, 13)
    updated, mapping = pattern.update(new)
    carried = updated.scatter(remap(pattern.gather(weight), mapping))
    assert torch.equal(carried, weight * old * new)


def test_copies_and_pickles_are_equal_and_small():
    pattern = SparsityPattern.from_mask(make_mask("random", 200, 300))
    stored = pickle.dumps(pattern)
    assert pickle.loads(stored) == pattern
    assert len(stored) < 200 * 300 / 8 + 2000
    buffer = io.BytesIO()
    torch.save({"pattern": pattern}, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)["pattern"] == pattern
    assert copy.deepcopy(pattern) == pattern
    assert len({pattern, copy.copy(pattern)}) == 1
    assert pattern != SparsityPattern.from_mask(~pattern.mask)
    assert pattern != SparsityPattern.from_mask(pattern.mask.reshape(300, 200))
    assert pattern != "pattern"


def test_bits_round_trip_whatever_the_padding_holds():
    pattern = SparsityPattern.from_mask(SMALL)
    padded = pattern.bits.clone()
    padded[1] |= 0b11111110
    assert SparsityPattern.from_bits(padded, (3, 3)) == pattern
    assert torch.equal(SparsityPattern.from_bits(padded, (3, 3)).bits, pattern.bits)


def test_pattern_is_immutable():
    pattern = SparsityPattern.from_mask(SMALL)
    with pytest.raises(AttributeError):
        pattern.shape = (9, 1)
    assert pattern.to("cpu") is pattern


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 2), TypeError, "torch.bool, got torch.float32"),
        (torch.ones(2, 2, dtype=torch.uint8), TypeError, "torch.bool, got torch.uint8"),
        ([[True]], TypeError, "boolean tensor, got list"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"got shape \(3,\)"),
        (torch.ones(1, 1, 1, dtype=torch.bool), ValueError, r"got shape \(1, 1, 1\)"),
        (torch.ones(0, 3, dtype=torch.bool), ValueError, r"one entry, got shape \(0, 3\)"),
        (torch.ones(2, 2).bool().to_sparse(), ValueError, "got torch.sparse_coo"),
        (torch.ones(2, 2, dtype=torch.bool, device="meta"), ValueError, "meta device"),
    ],
)
def test_bad_masks_are_named(mask, error, message):
    with pytest.raises(error, match=message):
        SparsityPattern.from_mask(mask)


def test_wrong_shapes_are_named():
    pattern = SparsityPattern.from_mask(SMALL)
    with pytest.raises(ValueError, match=r"\(3, 3\), got \(3, 4\)"):
        pattern.gather(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"\(4,\), got \(5,\)"):
        pattern.scatter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"\(3, 3\), got \(9, 1\)"):
        pattern.update(SMALL.reshape(9, 1))
    with pytest.raises(ValueError, match=r"2 bytes .* got shape \(3,\)"):
        SparsityPattern.from_bits(torch.zeros(3, dtype=torch.uint8), (3, 3))
    with pytest.raises(ValueError, match=r"at least one entry, got shape \(3, -3\)"):
        SparsityPattern.from_bits(torch.zeros(2, dtype=torch.uint8), (3, -3))
    with pytest.raises(ValueError, match="device cpu, got meta"):
        pattern.gather(torch.zeros(3, 3, device="meta"))
    with pytest.raises(ValueError, match="device cpu, got meta"):
        pattern.scatter(torch.zeros(4, device="meta"))


def test_wrong_types_are_named():
    pattern = SparsityPattern.from_mask(SMALL)
    with pytest.raises(TypeError, match="weight to be a tensor, got NoneType"):
        pattern.gather(None)
    with pytest.raises(TypeError, match="values to be a tensor, got list"):
        pattern.scatter([1.0])
    with pytest.raises(TypeError, match="bits to be a tensor, got NoneType"):
        SparsityPattern.from_bits(None, (3, 3))
    with pytest.raises(TypeError, match=r"sequence of integers, got \(3.0, 3\)"):
        SparsityPattern.from_bits(torch.zeros(2, dtype=torch.uint8), (3.0, 3))
    with pytest.raises(TypeError, match=r"torch.uint8, got torch.int64"):
        SparsityPattern.from_bits(torch.zeros(2, dtype=torch.int64), (3, 3))


def test_native_ops_have_fakes_and_refuse_what_would_read_out_of_bounds():
    ops = torch.ops.tscnc_kernels
    pattern = SparsityPattern.from_mask(SMALL)
    index = pattern.row_pointers, pattern.columns
    torch.library.opcheck(ops.sparsity_pack.default, (SMALL,))
    torch.library.opcheck(ops.sparsity_build.default, (pattern.bits, 3, 3))
    torch.library.opcheck(ops.sparsity_block.default, (*index, 3))
    blocked = pattern.blocked_columns, pattern.permutation
    torch.library.opcheck(ops.sparsity_block_order.default, (*blocked, 3, 3))
    torch.library.opcheck(ops.sparsity_unpack.default, (pattern.bits, 3, 3))
    torch.library.opcheck(ops.sparsity_mapping.default, (pattern.bits, pattern.bits))
    torch.library.opcheck(ops.sparsity_places.default, (pattern.bits,))
    torch.library.opcheck(ops.sparsity_remap.default, (torch.ones(4), torch.tensor([3, -1])))
    for op in (ops.sparsity_unpack, ops.sparsity_build):
        with pytest.raises(RuntimeError, match="bits for 30 x 3 entries, got 2 bytes"):
            op(pattern.bits, 30, 3)
        with pytest.raises(RuntimeError, match="zeros behind the last of 9 bits"):
            op(pattern.bits | 0b10, 3, 3)
    with pytest.raises(RuntimeError, match="got 1 bytes"):
        ops.sparsity_mapping(pattern.bits, pattern.bits[:1])
    with pytest.raises(RuntimeError, match="contiguous boolean CPU mask"):
        ops.sparsity_pack(SMALL.t())


@pytest.mark.parametrize("place", [-2, 4, 10**12])
def test_values_are_carried_from_no_place_outside(place):
    with pytest.raises(RuntimeError, match="places from -1 to 3"):
        remap(torch.ones(4), torch.tensor([0, place, 1]))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex128, torch.uint8]
)
def test_values_of_any_dtype_and_stride_are_carried(dtype):
    values = torch.arange(1, 13).to(dtype)[::2]
    mapping = torch.tensor([5, -1, 0, -1, 2])
    assert remap(values, mapping).tolist() == [11, 0, 1, 0, 5]
    assert remap(values, mapping).dtype == dtype


@pytest.mark.parametrize("density", [0.0, 0.004, 0.03, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("size", [(1, 3), (64, 256), (130, 127), (65, 513), (500, 9), (300, 192)])
def test_every_density_and_size_is_listed_in_both_orders(density, size, isa):
    """From a few set bits per row to many per byte, and rows that begin within a byte."""
    mask = torch.rand(size) < density
    pattern = SparsityPattern.from_mask(mask)
    rows, columns = mask.nonzero(as_tuple=True)
    order = columns.argsort(stable=True)
    counts = mask.sum(1).cumsum(0), mask.sum(0).cumsum(0)
    assert torch.equal(pattern.row_pointers[1:].long(), counts[0])
    assert torch.equal(pattern.column_pointers[1:].long(), counts[1])
    assert torch.equal(pattern.columns.long(), columns)
    assert torch.equal(pattern.permutation.long(), order)
    assert torch.equal(pattern.column_rows.long(), rows[order])
    assert torch.equal(pattern.mask, mask)
    assert SparsityPattern.from_bits(pattern.bits, size) == pattern
    changed = mask.roll(1, 1) | (torch.rand(size) < 0.01)
    new, mapping = pattern.update(changed)
    places = torch.full(size, -1)
    places[mask] = torch.arange(pattern.nnz)
    assert torch.equal(mapping, places[changed])
    assert new == SparsityPattern.from_mask(changed)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("swaps", [0, 1, 3])
def test_an_update_has_the_index_of_a_new_pattern(density, swaps):
    """Entries of every row change places, as in RigL, so that the counts of the rows stay."""
    noise = torch.rand(65, 300)
    kept = round(density * 300)
    order = noise.argsort(1)
    mask = torch.zeros(65, 300, dtype=torch.bool).scatter(1, order[:, :kept], True)
    changed = mask.scatter(1, order[:, :swaps], False)
    changed = changed.scatter(1, order[:, kept : kept + swaps], True)
    pattern = SparsityPattern.from_mask(mask)
    before = [tensor.clone() for tensor in (*pattern.tensors, pattern.blocked_rows)]
    updated, mapping = pattern.update(changed)
    rebuilt = SparsityPattern.from_mask(changed)
    assert torch.equal(updated.row_counts, pattern.row_counts)
    assert int((mapping < 0).sum()) == 65 * swaps
    for name in ("blocked_rows", "blocked_columns", "blocked_permutation"):
        assert torch.equal(getattr(updated, name), getattr(rebuilt, name))
    for found, expected in zip(updated.tensors, rebuilt.tensors, strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip((*pattern.tensors, pattern.blocked_rows), before, strict=True):
        assert torch.equal(found, expected), "the old pattern is unchanged"


FAR = 10**8


@pytest.mark.parametrize(
    "name", ["row_pointers", "columns", "column_pointers", "column_rows", "permutation"]
)
@pytest.mark.parametrize("step", [FAR, -FAR, 1, -1])
@pytest.mark.parametrize("values", [False, True])
def test_an_index_that_was_written_to_is_refused(name, step, values):
    pattern = SparsityPattern.from_mask(SMALL)
    weight = torch.ones(4) if values else torch.ones(3, 3)
    getattr(pattern, name).add_(step)
    with pytest.raises(RuntimeError, match=f"{name} .*must not be written to"):
        output = masked_linear(
            torch.ones(2, 3, requires_grad=True),
            weight.requires_grad_(),
            pattern,
            algorithm="panel",
        )
        output.sum().backward()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [(1, 1), (63, 131), (300, 129), (257, 96), (521, 7)])
def test_blocked_index_lists_the_kept_entries_tile_by_tile(kind, size):
    mask = make_mask(kind, *size)
    pattern = SparsityPattern.from_mask(mask)
    for buffer, kept in ((pattern.blocked_rows, mask), (pattern.blocked_columns, mask.t())):
        _, rows, width, step, nnz = buffer[:40].view(torch.int64).tolist()
        assert (rows, width, nnz) == (*kept.shape, int(mask.sum()))
        expected = [
            block.nonzero() for tile in kept.split(256) for block in tile.split(step, dim=1)
        ]
        assert buffer[len(buffer) - nnz :].tolist() == torch.cat(expected)[:, 1].tolist()
        tiles, blocks = -(-rows // 256), -(-width // step)
        offsets = buffer[40 : 40 + 4 * (tiles * blocks + 1)].view(torch.int32)
        assert offsets.diff().tolist() == [len(block) for block in expected]
    places = torch.zeros(size, dtype=torch.int32)
    places[mask] = torch.arange(pattern.nnz, dtype=torch.int32)
    step = int(pattern.blocked_columns[24:32].view(torch.int64))
    tiles = zip(mask.t().split(256), places.t().split(256), strict=True)
    expected = [
        values[kept]
        for tile, inside in tiles
        for kept, values in zip(tile.split(step, dim=1), inside.split(step, dim=1), strict=True)
    ]
    assert torch.equal(pattern.blocked_permutation, torch.cat(expected))
    assert pattern.blocked_rows is pattern.blocked_rows


def test_columns_that_do_not_ascend_cannot_be_blocked():
    block = torch.ops.tscnc_kernels.sparsity_block
    pointers = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="ascend in every row"):
        block(pointers, torch.tensor([200, 3], dtype=torch.int32), 300)
    with pytest.raises(RuntimeError, match="columns from 0 to 1"):
        block(pointers, torch.tensor([3, 200], dtype=torch.int32), 2)


@pytest.mark.parametrize("place", [0, 8, 16, 32, 40, 44, 48])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_blocked_index_that_was_written_to_is_refused(place, transposed):
    pattern = SparsityPattern.from_mask(SMALL)
    buffer = pattern.blocked_columns if transposed else pattern.blocked_rows
    input = torch.ones(2, 3, requires_grad=True)
    output = masked_linear(input, torch.ones(4), pattern, algorithm="blocked")
    buffer[place] += 1
    with pytest.raises(RuntimeError, match="must not be written to"):
        if transposed:
            output.sum().backward()
        else:
            masked_linear(input, torch.ones(4), pattern, algorithm="blocked")


def test_columns_of_a_blocked_index_that_was_written_to_lead_nowhere_else():
    pattern = SparsityPattern.from_mask(SMALL)
    pattern.blocked_rows[-4:] = 255
    input, weight = torch.ones(2, 3), torch.ones(3, 3, requires_grad=True)
    output = masked_linear(input, weight, pattern, algorithm="blocked")
    output.sum().backward()
    assert output.shape == (2, 3) and weight.grad.shape == (3, 3)


@pytest.mark.parametrize("code", [-1, 3])
def test_the_native_op_refuses_an_unknown_activation_code(code):
    pattern = SparsityPattern.from_mask(SMALL)
    index = pattern.row_pointers, pattern.columns
    with pytest.raises(RuntimeError, match=f"from 0 to 2, got {code}"):
        torch.ops.tscnc_kernels.masked_linear(
            torch.ones(1, 3), torch.ones(4), None, *index, code, 0, False
        )
