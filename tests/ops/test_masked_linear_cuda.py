"""What masked_linear chooses on CUDA; where a GPU is, every algorithm of it beside float64."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import TOLERANCES, check_capture, check_close
from tests.ops.test_masked_linear import MASKS, pattern
from tscnc_kernels import SparsityPattern, _backend, _masked_cuda, _masked_triton, masked_linear
from tscnc_kernels._autotune import fastest
from tscnc_kernels._masked_algorithms import DIRECTIONS, Algorithms, Call, check_forced
from tscnc_kernels._masked_native import columns_for
from tscnc_kernels.ops import masked_linear as op

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ALGORITHMS = ["panel", "small_batch", "spmv", "bitmap", "dense"]


def predicted(batch, density, direction="forward", dtype=torch.bfloat16, **call):
    shape = 4096, 4096
    nnz = round(density * 4096**2)
    kind = Call(batch, dtype=dtype, **call)
    return fastest(_masked_cuda.predict("masked_linear", shape, nnz, kind, direction))


def test_half_precision_is_dense_below_the_crossover_and_sparse_above():
    for direction in DIRECTIONS:
        assert predicted(4096, 0.1, direction, values=True) in ("dense", "epilogue")
        assert predicted(4096, 0.005, direction, values=True) == "panel"


def test_the_dense_gradient_of_a_weight_is_masked_as_it_is_stored_where_triton_is(monkeypatch):
    for values in (True, False):
        monkeypatch.setattr(_backend, "why_no_triton", lambda device: None)
        assert predicted(1024, 0.1, "grad_weight", values=values) == "epilogue"
        for direction in DIRECTIONS[:2]:
            assert predicted(1024, 0.1, direction, values=values) == "dense"
        assert predicted(1024, 0.9, "grad_weight", torch.float32, values=values) == "dense"
        monkeypatch.setattr(_backend, "why_no_triton", lambda device: "the package is missing")
        assert predicted(1024, 0.1, "grad_weight", values=values) == "dense"


@pytest.mark.parametrize("values", [True, False])
def test_a_pass_for_both_gradients_takes_each_by_its_own_algorithm(values):
    """The epilogue's kernel beside the native one, under Triton's interpreter where no GPU is."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept = pattern(40, 24).to(device)
    input, weight, _ = layer(50, 40, 24, kept, torch.float32, device)
    gradient = torch.linspace(-1, 1, 50 * 40, device=device).view(50, 40)
    held = kept.gather(weight) if values else weight * kept.mask
    found = _masked_triton._own_gradients(
        *("epilogue", gradient, gradient, input, held, kept, "none", (False, True, True))
    )
    dense = gradient.t() @ input * kept.mask
    assert found[0] is None
    check_close(found[1], kept.gather(dense) if values else dense, 1e-5, "weight")
    check_close(found[2], gradient.sum(0), 1e-5, "bias")


@needs_gpu
@pytest.mark.parametrize("values", [True, False])
def test_cuda_steps_run_the_epilogue_where_it_is_chosen(values, monkeypatch):
    monkeypatch.setattr(op, "choose", lambda *_: Algorithms("dense", "dense", "epilogue"))
    kept = pattern(130, 72).to("cuda")
    problem = layer(64, 130, 72, kept, torch.bfloat16, "cuda")
    problem[1] = kept.gather(problem[1]) if values else problem[1] * kept.mask
    found = results(lambda x, w, b: masked_linear(x, w, kept, b, "gelu"), problem)
    exact = [tensor.double() for tensor in problem]
    expected = results(lambda x, w, b: op.reference(x, w, kept, b, "gelu"), exact)
    for actual, wanted in zip(found, expected, strict=True):
        check_close(actual, wanted, 40 * TOLERANCES[torch.bfloat16], "epilogue")


def test_strict_float32_is_sparse_from_lower_sparsities_on():
    assert predicted(4096, 0.05, dtype=torch.float32) == "panel"
    assert predicted(4096, 0.9, dtype=torch.float32) == "dense"


def test_few_samples_have_kernels_of_their_own():
    assert predicted(1, 0.05, values=True) == "spmv"
    assert predicted(8, 0.05, values=True) == "small_batch"
    assert predicted(16, 1.0) == "dense"


def test_where_most_columns_are_kept_the_mask_is_read_as_bits():
    for dtype in (torch.bfloat16, torch.float32):
        assert predicted(8, 0.4, dtype=dtype, values=True) == "bitmap"
        assert predicted(8, 0.01, dtype=dtype, values=True) == "small_batch"
    # A dense weight is as quickly multiplied as it is read, and the index of gradients is another.
    assert predicted(8, 0.4) == "dense"
    for direction in DIRECTIONS[1:]:
        assert predicted(8, 0.4, direction, values=True) != "bitmap"
    assert predicted(8, 0.4, dtype=torch.float64, values=True) != "bitmap"


def test_a_weight_that_is_masked_already_costs_nothing_to_mask():
    shape, nnz = (4096, 4096), 1 << 20
    call = Call(4096, dtype=torch.bfloat16, held=True)
    held, unknown = (
        _masked_cuda.predict("masked_linear", shape, nnz, kind, "forward")["dense"]
        for kind in (call, call._replace(held=False))
    )
    assert held < unknown


def test_few_samples_of_half_types_read_narrow_columns():
    kept, wide = pattern(8, 64), pattern(2, (1 << 15) + 1)

    def columns(algorithm="small_batch", dtype=torch.bfloat16, of=kept):
        input = SimpleNamespace(is_cuda=True, dtype=dtype)
        return columns_for(algorithm, input, torch.empty(of.nnz, dtype=dtype), of)

    narrow = columns()
    assert narrow.dtype == torch.uint16 and torch.equal(narrow.int(), kept.columns)
    assert columns("spmv") is narrow
    for other in (columns("panel"), columns(dtype=torch.float32)):
        assert other is kept.columns
    assert columns(of=wide) is wide.columns
    values, input = torch.empty(kept.nnz), torch.ones(2, 64)
    assert columns_for("small_batch", input, values, kept) is kept.columns
    assert columns_for("spmv", input, torch.empty(8, 64), kept) is kept.columns


class OnCuda:
    """A pattern as far as the choice of an algorithm looks at it."""

    device = torch.device("cuda")
    block_shape = None


def test_algorithms_that_cuda_lacks_are_refused():
    with pytest.raises(RuntimeError, match="got 'blocked'"):
        check_forced("masked_linear", OnCuda(), "native", "blocked")
    check_forced("masked_linear", OnCuda(), "native", "panel")
    check_forced("masked_linear", OnCuda(), "native", "bitmap")


def test_algorithms_of_a_gpu_alone_are_refused_elsewhere():
    kept = pattern(8, 64)
    for backend, message in (("native", "needs a GPU, got cpu"), ("reference", "needs the native")):
        with pytest.raises(RuntimeError, match=f"algorithm 'bitmap' {message}"):
            masked_linear(
                torch.ones(2, 64), torch.ones(8, 64), kept, backend=backend, algorithm="bitmap"
            )


def test_blocks_run_on_cuda_where_triton_is_and_the_pattern_has_some(monkeypatch):
    monkeypatch.setattr(_backend, "why_no_triton", lambda device: None)
    with pytest.raises(RuntimeError, match="16x16 or larger here, got block_shape None"):
        check_forced("masked_linear", OnCuda(), "native", "block")
    kept = OnCuda()
    kept.block_shape = 32, 16
    check_forced("masked_linear", kept, "native", "block")
    monkeypatch.setattr(_backend, "why_no_triton", lambda device: "the package is missing")
    with pytest.raises(RuntimeError, match="'block' cannot run here: the package is missing"):
        check_forced("masked_linear", kept, "native", "block")


def test_wide_blocks_are_predicted_to_beat_dense_and_random_masks_from_lower_sparsities_on():
    call = Call(4096, values=True, dtype=torch.bfloat16)

    def best(density, blocks):
        arguments = (4096, 4096), round(density * 4096**2), call
        return fastest(_masked_cuda.predict("masked_linear", *arguments, "forward", blocks))

    assert best(0.2, (128, 128)) == best(0.1, (64, 64)) == "block"
    assert best(0.2, (16, 16)) == best(0.2, None) == best(0.2, (8, 64)) == "dense"


def results(function, problem):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in problem]
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights.view_as(output))]


def layer(batch, rows, width, kept, dtype, device):
    generator = torch.Generator().manual_seed(5)
    sizes = (batch, width), (rows, width), (rows,)
    exact = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    exact[1] *= max(1.0, kept.nnz / rows) ** -0.5
    return [tensor.to(device, dtype) for tensor in exact]


@needs_gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_native_cuda_algorithms_match_float64_reference(dtype, algorithm):
    shapes = (1, 63, 37), (13, 129, 640), (130, 131, 257), (520, 96, 4100), (5, 90, 4480)
    for shape, kind in itertools.product(shapes, MASKS):
        compare_with_float64(kind, shape, dtype, algorithm)


@needs_gpu
@pytest.mark.parametrize("edge", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_blocks_on_cuda_match_float64_reference(dtype, edge):
    blocks = torch.rand(3, 5, generator=torch.Generator().manual_seed(edge)) < 0.4
    kept = SparsityPattern.from_mask(blocks.repeat_interleave(edge, 0).repeat_interleave(edge, 1))
    for batch in (1, 37, 200, 2100):
        compare(kept, batch, dtype, "block")


def compare_with_float64(kind, shape, dtype, algorithm):
    compare(pattern(*shape[1:], kind), shape[0], dtype, algorithm)


def compare(kept, batch, dtype, algorithm):
    shape = batch, *kept.shape
    problem = layer(*shape, kept, dtype, "cuda")
    exact = [tensor.double().cpu() for tensor in problem]
    expected = results(lambda x, w, b: F.gelu(F.linear(x, w * kept.mask, b)), exact)
    on_gpu = kept.to("cuda")
    # Sums of many products of order one, and one rounding of each to the dtype.
    tolerance = 40 * TOLERANCES[dtype]
    for is_dense in (True, False):
        weight = problem[1] if is_dense else on_gpu.gather(problem[1])
        found = results(
            lambda x, w, b: masked_linear(x, w, on_gpu, b, "gelu", algorithm=algorithm),
            [problem[0], weight, problem[2]],
        )
        if not is_dense:
            found[2] = on_gpu.scatter(found[2])
        for actual, wanted in zip(found, expected, strict=True):
            check_close(actual, wanted, tolerance, algorithm)


@needs_gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_cuda_steps_never_wait_and_replay_from_a_graph(algorithm):
    count = 40 if algorithm in ("panel", "dense") else 5
    kept = pattern(130, 128).to("cuda")
    problem = layer(count, 130, 128, kept, torch.bfloat16, "cuda")

    def step():
        def call(x, w, b):
            return masked_linear(x, w, kept, b, "relu", assume_masked=True, algorithm=algorithm)

        return results(call, problem)

    check_capture(step)
