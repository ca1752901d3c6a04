"""What masked_conv2d chooses on CUDA; where a GPU is, its kernels beside float64."""

import pytest
import torch

from tests.op_suite import TOLERANCES, check_capture, check_close
from tests.ops.test_masked_conv2d import pattern
from tscnc_kernels import _masked_cuda, masked_conv2d
from tscnc_kernels._autotune import fastest
from tscnc_kernels._conv_algorithms import choose
from tscnc_kernels._conv_geometry import conv_geometry
from tscnc_kernels._masked_algorithms import DIRECTIONS, Call, check_forced
from tscnc_kernels.ops.masked_conv2d import reference

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GEOMETRIES = {
    "plain": {"padding": 1},
    "stride": {"padding": 1, "stride": (2, 3)},
    "dilation": {"padding": (2, 1), "dilation": (2, 1)},
    "groups": {"groups": 3},
    "same": {"padding": "same"},
}


def predicted(density, direction="forward", dtype=torch.bfloat16, **call):
    shape = 640, 640, 3, 3
    nnz = round(density * 640 * 640 * 9)
    kind = Call(128 * 8 * 8, dtype=dtype, **call)
    return fastest(_masked_cuda.predict("masked_conv2d", shape, nnz, kind, direction))


def test_cuda_is_dense_below_the_crossover_and_sparse_above():
    for direction in DIRECTIONS:
        assert predicted(0.1, direction, values=True) == "dense"
        assert predicted(0.0005, direction, values=True) == "plane"


@pytest.mark.parametrize(("precision", "name"), [("ieee", "plane"), ("tf32", "dense")])
def test_tensor_cores_move_the_crossover_of_float32(precision, name):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        assert predicted(0.01, dtype=torch.float32) == name
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


class OnCuda:
    """As much of a pattern on a GPU as the choice of an algorithm looks at."""

    device = torch.device("cuda")
    shape = 64, 64, 3, 3

    def __init__(self, density=0.5):
        self.density = density


def test_the_choice_without_a_call_takes_what_cuda_has():
    geometry = conv_geometry((3, 3), 1, 1, 1, 1)
    patterns = OnCuda(0.1), OnCuda(0.001)
    found = [choose(kept, geometry, "native", (64, 64, 8, 8), None) for kept in patterns]
    assert [set(algorithms) for algorithms in found] == [{"dense"}, {"plane"}]


def test_an_algorithm_that_cuda_lacks_is_refused():
    with pytest.raises(RuntimeError, match="expected algorithm plane or dense on CUDA"):
        check_forced("masked_conv2d", OnCuda(), "native", "batch")
    check_forced("masked_conv2d", OnCuda(), "native", "plane")


def layer(kept, dtype, device, groups=1):
    generator = torch.Generator().manual_seed(5)
    sizes = (3, kept.shape[1] * groups, 9, 11), kept.shape, kept.shape[:1]
    exact = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    exact[1] *= max(1.0, kept.nnz / kept.shape[0]) ** -0.5
    return [tensor.to(device, dtype) for tensor in exact]


def results(function, problem):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in problem]
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights.view_as(output))]


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_native_cuda_plane_matches_float64_reference(name, dtype, channels_last):
    geometry = GEOMETRIES[name]
    groups = geometry.get("groups", 1)
    kept = pattern(12, 4, 3, 3)
    problem = layer(kept, dtype, "cuda", groups)
    exact = [tensor.double().cpu() for tensor in problem]
    if channels_last:
        problem[0] = problem[0].contiguous(memory_format=torch.channels_last)
    options = {**geometry, "activation": "gelu"}
    expected = results(lambda x, w, b: reference(x, w, kept, b, **options), exact)
    on_gpu = kept.to("cuda")
    found = results(
        lambda x, w, b: masked_conv2d(x, w, on_gpu, b, algorithm="plane", **options), problem
    )
    for actual, wanted in zip(found, expected, strict=True):
        check_close(actual, wanted, 40 * TOLERANCES[dtype], name)


@needs_gpu
def test_cuda_steps_never_wait_and_replay_from_a_graph():
    kept = pattern(16, 8, 3, 3).to("cuda")
    problem = layer(kept, torch.bfloat16, "cuda")

    def step():
        def call(x, w, b):
            options = {"assume_masked": True, "algorithm": "plane"}
            return masked_conv2d(x, w, kept, b, activation="relu", **options)

        return results(call, problem)

    check_capture(step)
