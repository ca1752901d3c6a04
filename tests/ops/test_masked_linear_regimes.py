"""The algorithms of masked_linear for one sample, for few samples and for block patterns."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import OpSpec, OpSuite, check_close
from tests.ops.test_masked_linear import (
    LAYOUTS,
    MASKS,
    gradients,
    pattern,
    reference,
    sample,
)
from tscnc_kernels import SparsityPattern, _backend, masked_linear
from tscnc_kernels._masked_algorithms import DIRECTIONS, SPARSE, Call, plan_for, predict

REGIMES = ["small_batch", "spmv", "block"]
ops = torch.ops.tscnc_kernels


def block_mask(rows: int, width: int, shape: tuple[int, int], density: float = 0.3) -> torch.Tensor:
    height, across = shape
    generator = torch.Generator().manual_seed(5)
    blocks = torch.rand(rows // height, width // across, generator=generator) < density
    blocks[0, 0], blocks[-1, -1] = True, False
    return blocks.repeat_interleave(height, 0).repeat_interleave(across, 1)


def forcing(algorithm):
    """masked_linear with the algorithm wherever the native backend runs."""

    def public(input, *args, backend=None, **kwargs):
        native = _backend.select("masked_linear", input.device, backend) == "native"
        forced = algorithm if native else None
        return masked_linear(input, *args, backend=backend, algorithm=forced, **kwargs)

    return public


def raw_calls(algorithm):
    def calls():
        code, kept = SPARSE[algorithm], pattern(5, 7)
        input, values, grad_output = torch.randn(4, 7), torch.randn(kept.nnz), torch.randn(4, 5)
        index = kept.row_pointers, kept.columns
        backward = grad_output, grad_output, input, values, *kept.tensors[1:], 2, code, code
        return [
            (ops.masked_linear.default, (input, values, torch.randn(5), *index, 1, code, False)),
            (ops.masked_linear.default, (input, torch.randn(5, 7), None, *index, 2, code, True)),
            (ops.masked_linear_backward.default, (*backward, True, True, True)),
            (ops.masked_linear_backward.default, (*backward, False, False, True)),
        ]

    return calls


def spec(algorithm):
    return OpSpec(
        name="masked_linear",
        public=forcing(algorithm),
        reference=reference,
        samples={
            "dense_weight": sample((5,), 9, 7),
            "one_sample": sample((1,), 9, 7, values=True, activation="gelu"),
            "values": sample((2, 3), 9, 7, values=True, activation="gelu"),
            "groups": sample((19,), 5, 6, activation="relu"),
            "blocks": sample((4,), 16, 6, kind="block", bias=False),
            "empty_batch": sample((0,), 5, 4),
            "empty_pattern": sample((3,), 5, 4, kind="none", values=True),
        },
        raw_calls=raw_calls(algorithm),
        # As for the panels: a gradient of the weight sums up to 19 products.
        tolerances={torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2},
    )


class TestSmallBatch(OpSuite):
    spec = spec("small_batch")


class TestSpmv(OpSuite):
    spec = spec("spmv")


class TestBlock(OpSuite):
    spec = spec("block")


def compare(kept, batch, algorithm, activation="gelu"):
    rows, width = kept.shape
    input, weight, bias = (torch.randn(s).double() for s in ((batch, width), kept.shape, (rows,)))
    activate = {"gelu": F.gelu, "relu": F.relu}[activation]
    expected, wanted = gradients(
        lambda x, w, b: activate(F.linear(x, w * kept.mask, b)), input, weight, bias
    )
    actual, found = gradients(
        lambda x, v, b: masked_linear(x, v, kept, b, activation, algorithm=algorithm),
        *(input, kept.gather(weight), bias),
    )
    check_close(actual, expected, 1e-12, "value")
    check_close(found[0], wanted[0], 1e-12, "input gradient")
    check_close(kept.scatter(found[1]), wanted[1], 1e-12, "weight gradient")
    check_close(found[2], wanted[2], 1e-12, "bias gradient")


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch", [1, 2, 5, 9, 16, 17, 66])
@pytest.mark.parametrize("algorithm", REGIMES)
def test_equal_to_masked_dense_for_every_mask_and_batch(algorithm, batch, kind, isa):
    compare(pattern(63, 37, kind), batch, algorithm)


@pytest.mark.parametrize("size", [(1, 1), (63, 1), (1, 129), (129, 63), (131, 257)])
@pytest.mark.parametrize("algorithm", REGIMES)
def test_odd_sizes(algorithm, size, isa):
    for batch in (1, 13):
        compare(pattern(*size), batch, algorithm, "relu")


SHAPES = [(4, 1), (4, 4), (8, 1), (8, 8), (16, 1), (16, 16), (64, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [3, 16, 70])
def test_block_kernel_on_blocks(shape, batch, isa):
    compare(SparsityPattern.from_mask(block_mask(128, 96, shape)), batch, "block", "relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_block_kernel_on_blocks_of_every_dtype(dtype, isa):
    kept = SparsityPattern.from_mask(block_mask(64, 48, (4, 4)))
    input, weight = torch.randn(21, 48).to(dtype), (torch.randn(64, 48) / 4).to(dtype)
    expected, wanted = gradients(
        lambda x, w: F.linear(x, w * kept.mask), input.double(), weight.double()
    )
    actual, found = gradients(
        lambda x, w: masked_linear(x, w, kept, algorithm="block"), input, weight
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    check_close(actual, expected, tolerance, "value")
    for a, e in zip(found, wanted, strict=True):
        check_close(a, e, tolerance, "gradient")


def test_rows_that_agree_at_odd_places_are_grouped_rightly(isa):
    mask = torch.zeros(13, 9, dtype=torch.bool)
    mask[1:6, 2:7] = True
    mask[6:7, ::2] = True
    mask[8:12, 1:] = True
    compare(SparsityPattern.from_mask(mask), 11, "block", "relu")


@pytest.mark.parametrize("algorithm", REGIMES)
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_same_bits_for_any_thread_count_where_threads_are_used(algorithm, batch):
    kept = pattern(400, 2100, "skewed")
    input, values, bias = torch.randn(batch, 2100), torch.randn(kept.nnz), torch.randn(400)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            output, found = gradients(
                lambda x, v, b: masked_linear(x, v, kept, b, "relu", algorithm=algorithm),
                *(input, values, bias),
            )
            runs.append([output, *found])
    finally:
        torch.set_num_threads(threads)
    check_close(runs[0][0], F.relu(F.linear(input, kept.scatter(values), bias)), 1e-4, "value")
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", REGIMES)
def test_any_strides_give_the_same_bits_as_contiguous(algorithm, layout, dtype, isa):
    kept = pattern(21, 35)
    for batch in (1, 19):
        input, weight = torch.randn(batch, 35, dtype=dtype), torch.randn(21, 35, dtype=dtype)
        grad_output = torch.randn(batch, 21, dtype=dtype)
        strided = [LAYOUTS[layout](t) for t in (input, weight, grad_output)]
        results = []
        for x, w, g in (strided, [t.contiguous() for t in strided]):
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            output = masked_linear(x, w, kept, activation="relu", algorithm=algorithm)
            results.append([output, *torch.autograd.grad(output, (x, w), g)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("algorithm", REGIMES)
def test_inputs_that_no_weight_multiplies_are_not_seen(algorithm, isa):
    """Row 0 ends in the middle of a vector that reads on into row 1's columns."""
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, :3], mask[1, 3:] = True, True
    kept = SparsityPattern.from_mask(mask)
    input = torch.ones(1, 40)
    input[0, 3:] = torch.nan
    output = masked_linear(input, torch.ones(kept.nnz), kept, algorithm=algorithm)
    assert output[0, 0] == 3 and output[0, 1].isnan()


@pytest.mark.parametrize("algorithm", ["small_batch", "spmv"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_column_outside_leads_to_memory_of_the_same_call(algorithm, batch, isa):
    kept = SparsityPattern.from_mask(torch.ones(2, 8, dtype=torch.bool))
    columns, code = kept.columns.clone(), SPARSE[algorithm]
    columns[3], columns[12] = 2**30 + 3, -4
    input, values, gradient = torch.randn(batch, 8), torch.randn(16), torch.randn(batch, 2)
    index = kept.tensors[3:]
    for found in (columns, kept.columns):
        output, _ = ops.masked_linear(input, values, None, kept.row_pointers, found, 0, code, False)
        backward = ops.masked_linear_backward(
            *(gradient, output, input, values, kept.row_pointers, found, *index, 0, code, code),
            *(True, True, True),
        )
        if found is columns:
            strange = output, *backward
    for a, b in zip(strange, (output, *backward), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("algorithm", REGIMES)
def test_half_types_are_summed_in_float32(algorithm, isa):
    kept = SparsityPattern.from_mask(torch.ones(1, 1025, dtype=torch.bool))
    input = torch.ones(1, 1025, dtype=torch.bfloat16)
    input[0, 0] = 4096  # 4096 + 1 + ... + 1 stays 4096 when summed in bfloat16
    output = masked_linear(input, torch.ones(1, 1025).bfloat16(), kept, algorithm=algorithm)
    assert output.item() == 5120


@pytest.mark.parametrize("shape", [(4, 1), (4, 4), (8, 1), (16, 8), (64, 64), (32, 2)])
def test_block_shape_is_found(shape):
    mask = block_mask(256, 192, shape, 0.4)
    kept = SparsityPattern.from_mask(mask)
    assert kept.block_shape == shape
    assert kept.block_shape is kept.block_shape


@pytest.mark.parametrize(
    "mask",
    [
        torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.1,
        block_mask(64, 64, (2, 8)),
        block_mask(60, 64, (4, 4))[1:],
        torch.zeros(8, 8, dtype=torch.bool),
        torch.ones(6, 8, dtype=torch.bool),
    ],
    ids=["random", "two_rows", "shifted", "empty", "height_no_multiple"],
)
def test_masks_without_blocks_have_no_block_shape(mask):
    assert SparsityPattern.from_mask(mask).block_shape is None


def test_block_shape_of_a_convolution_is_of_its_matrix():
    mask = torch.zeros(16, 2, 3, 3, dtype=torch.bool)
    mask[:8, 0], mask[8:, 1] = True, True  # columns 0 to 8 of 18, and 9 to 17
    assert SparsityPattern.from_mask(mask).block_shape == (8, 1)
    assert SparsityPattern.from_mask(torch.ones(8, 4, 3, 3).bool()).block_shape == (8, 4)


def test_candidates_follow_the_batch_and_the_blocks():
    def names(batch, direction, blocks=None):
        return set(predict("masked_linear", (64, 64), 400, Call(batch, True), direction, blocks))

    for direction in DIRECTIONS:
        for batch, expected in ((1, {"spmv"}), (2, {"small_batch"}), (16, {"small_batch"})):
            assert names(batch, direction) & set(REGIMES) == expected
        assert names(17, direction) & set(REGIMES) == set()
    assert "block" in names(128, "forward", (4, 1)) & names(128, "grad_input", (4, 4))
    assert "block" not in names(128, "grad_input", (8, 1)) | names(128, "grad_weight", (8, 8))


def test_a_plan_knows_the_blocks_of_its_pattern():
    blocks, none = SparsityPattern.from_mask(block_mask(64, 64, (8, 1))), pattern(64, 64)
    for kept, expected in ((blocks, True), (none, False)):
        plan = plan_for("masked_linear", kept, "native", Call(128, True))
        assert ("block" in plan.preview("forward").predicted) == expected


@pytest.mark.parametrize("width", [1, 37, 4096, 65536])
def test_columns_of_one_sample_take_16_bits_and_give_the_same_bits(width):
    generator = torch.Generator().manual_seed(0)
    kept = SparsityPattern.from_mask(torch.rand(29, width, generator=generator) < 0.3)
    values, input = (torch.randn(n, generator=generator) for n in (kept.nnz, width))
    assert kept.narrow_columns.dtype == torch.uint16
    product = torch.ops.tscnc_kernels.masked_linear.default
    code = 0, SPARSE["spmv"], False, False
    narrow, wide = (
        product(input[None], values, None, kept.row_pointers, columns, *code)[0]
        for columns in (kept.narrow_columns, kept.columns)
    )
    assert torch.equal(narrow, wide)
    assert torch.equal(narrow, masked_linear(input[None], values, kept, algorithm="spmv"))


def test_columns_beyond_16_bits_stay_whole():
    kept = SparsityPattern.from_mask(torch.arange(70000)[None] % 7 == 0)
    assert kept.narrow_columns is kept.columns
    values, input = torch.rand(kept.nnz), torch.rand(70000)
    found = masked_linear(input, values, kept, algorithm="spmv")
    torch.testing.assert_close(found, (input[::7] @ values)[None], rtol=1e-4, atol=0)


@pytest.mark.parametrize("algorithm", ["panel", "small_batch"])
def test_other_algorithms_refuse_narrow_columns(algorithm):
    kept = SparsityPattern.from_mask(torch.ones(3, 5, dtype=torch.bool))
    tensors = torch.zeros(1, 5), torch.zeros(15), None, kept.row_pointers, kept.narrow_columns
    with pytest.raises(RuntimeError, match="columns to be 15 contiguous int32 entries"):
        torch.ops.tscnc_kernels.masked_linear.default(*tensors, 0, SPARSE[algorithm], False, False)


def test_a_narrow_column_outside_reads_nothing_outside():
    kept = SparsityPattern.from_mask(torch.ones(3, 5, dtype=torch.bool))
    columns = torch.full((15,), 65535, dtype=torch.int32).to(torch.uint16)
    tensors = torch.ones(1, 5), torch.zeros(15), None, kept.row_pointers, columns
    code = 0, SPARSE["spmv"], False, False
    found, _ = torch.ops.tscnc_kernels.masked_linear.default(*tensors, *code)
    assert found.shape == (1, 3)
