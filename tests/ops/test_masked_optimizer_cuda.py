"""Optimizer steps on a GPU, beside those of the CPU, and replayed from a graph."""

import pytest
import torch

from tests.op_suite import TOLERANCES, check_close
from tests.ops.test_masked_optimizer import (
    ADAM,
    SGD,
    masked_problem,
    run_adamw,
    run_sgd,
    state_like,
)
from tscnc_kernels import masked_adamw_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(params, patterns):
    moved = [None if pattern is None else pattern.to("cuda") for pattern in patterns]
    return [param.to("cuda") for param in params], moved


def compare(run, dtype, options):
    torch.manual_seed(0)
    params, patterns = masked_problem(dtype)
    gradients = [[torch.randn(p.shape).to(dtype) for p in params] for _ in range(3)]
    there, moved = on_gpu(params, patterns)
    run(params, patterns, gradients, "native", lr=0.05, **options)
    run(
        there,
        moved,
        [[g.to("cuda") for g in grads] for grads in gradients],
        "native",
        lr=0.05,
        **options,
    )
    for found, expected in zip(there, params, strict=True):
        check_close(found.cpu(), expected, 4 * TOLERANCES[dtype], str(options))


@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", SGD)
def test_cuda_sgd_takes_the_steps_of_the_cpu(name, dtype):
    compare(run_sgd, dtype, SGD[name])


@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ADAM)
def test_cuda_adamw_takes_the_steps_of_the_cpu(name, dtype):
    compare(run_adamw, dtype, ADAM[name])


@needs_gpu
def test_cuda_graphs_count_the_steps_of_adamw():
    torch.manual_seed(0)
    params, patterns = on_gpu(*masked_problem())
    grads = [torch.randn_like(param) for param in params]
    twins = [param.clone() for param in params]

    def stepper(weights, device):
        moments = [state_like(weights, patterns) for _ in range(2)]
        steps = [torch.zeros((), device=device) for _ in weights]
        return lambda: masked_adamw_step(weights, grads, *moments, [], steps, patterns, lr=0.1)

    eager, captured = stepper(twins, "cpu"), stepper(params, "cuda")
    for _ in range(4):
        eager()
    captured()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    for _ in range(3):
        graph.replay()
    for param, twin in zip(params, twins, strict=True):
        check_close(param, twin, 1e-5, "four steps")
