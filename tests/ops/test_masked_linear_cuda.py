"""What masked_linear chooses on CUDA; where a GPU is, every algorithm of it beside float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import TOLERANCES, check_close
from tests.ops.test_masked_linear import MASKS, pattern
from tscnc_kernels import _masked_cuda, masked_linear
from tscnc_kernels._autotune import fastest
from tscnc_kernels._masked_algorithms import DIRECTIONS, Call, check_forced

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ALGORITHMS = ["panel", "small_batch", "spmv", "dense"]


def predicted(batch, density, direction="forward", dtype=torch.bfloat16, **call):
    shape = 4096, 4096
    nnz = round(density * 4096**2)
    kind = Call(batch, dtype=dtype, **call)
    return fastest(_masked_cuda.predict("masked_linear", shape, nnz, kind, direction))


def test_half_precision_is_dense_below_the_crossover_and_sparse_above():
    for direction in DIRECTIONS:
        assert predicted(4096, 0.1, direction, values=True) == "dense"
        assert predicted(4096, 0.005, direction, values=True) == "panel"


def test_strict_float32_is_sparse_from_lower_sparsities_on():
    assert predicted(4096, 0.05, dtype=torch.float32) == "panel"
    assert predicted(4096, 0.9, dtype=torch.float32) == "dense"


def test_few_samples_have_kernels_of_their_own():
    assert predicted(1, 0.05, values=True) == "spmv"
    assert predicted(8, 0.05, values=True) == "small_batch"
    assert predicted(16, 1.0) == "dense"


def test_a_weight_that_is_masked_already_costs_nothing_to_mask():
    shape, nnz = (4096, 4096), 1 << 20
    call = Call(4096, dtype=torch.bfloat16, held=True)
    held, unknown = (
        _masked_cuda.predict("masked_linear", shape, nnz, kind, "forward")["dense"]
        for kind in (call, call._replace(held=False))
    )
    assert held < unknown


def test_algorithms_that_cuda_lacks_are_refused():
    class OnCuda:
        device = torch.device("cuda")

    for name in ("blocked", "block"):
        with pytest.raises(RuntimeError, match=f"got {name!r}"):
            check_forced("masked_linear", OnCuda(), "native", name)
    check_forced("masked_linear", OnCuda(), "native", "panel")


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
    shapes = (1, 63, 37), (13, 129, 600), (130, 131, 257), (520, 96, 4100)
    for shape, kind in itertools.product(shapes, MASKS):
        compare_with_float64(kind, shape, dtype, algorithm)


def compare_with_float64(kind, shape, dtype, algorithm):
    kept = pattern(*shape[1:], kind)
    problem = layer(*shape, kept, dtype, "cuda")
    exact = [tensor.double().cpu() for tensor in problem]
    expected = results(lambda x, w, b: F.gelu(F.linear(x, w * kept.mask, b)), exact)
    on_gpu = kept.to("cuda")
    # Sums of up to 520 products of order one, and one rounding of each to the dtype.
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
def test_cuda_steps_replay_from_a_graph_with_the_same_bits(algorithm):
    kept = pattern(130, 70).to("cuda")
    problem = layer(40, 130, 70, kept, torch.bfloat16, "cuda")

    def step():
        def call(x, w, b):
            return masked_linear(x, w, kept, b, "relu", assume_masked=True, algorithm=algorithm)

        return results(call, problem)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for actual, wanted in zip(captured, expected, strict=True):
        assert torch.equal(actual, wanted)
