"""This package's masked layers as providers: each parameter mode, each algorithm, the raw op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Timed, UnavailableError
from benchmarks.peers import Layer, Problem, inference, training
from tscnc_kernels import SparsityPattern

Op = Callable[..., Tensor]
DENSE_PRODUCTS = ("mm", "addmm", "bmm", "convolution", "mkldnn_linear", "linear")


def layer(op: Op, values: bool, algorithm: str | None, problem: Problem) -> Layer:
    """`masked_linear` or `masked_conv2d`; `algorithm` None is the automatic choice.

    Raises:
        UnavailableError: the algorithm does not compute this case.
    """
    pattern = SparsityPattern.from_mask(problem.mask)
    weight = (pattern.gather(problem.weight) if values else problem.weight).requires_grad_()
    bias = problem.bias.requires_grad_()
    geometry = (problem.stride, problem.padding) if problem.is_convolution else ()
    names = ("stride", "padding")[: len(geometry)]
    options: dict[str, Any] = {"assume_masked": True, "algorithm": algorithm}
    options |= dict(zip(names, geometry, strict=True))

    def apply(input: Tensor) -> Tensor:
        return op(input, weight, pattern, bias, **options)

    try:
        with torch.no_grad():
            apply(problem.input)
    except (RuntimeError, ValueError) as error:
        raise UnavailableError(str(error).splitlines()[0]) from error
    kept = (lambda g: g) if values else (lambda g: g[problem.mask])
    return Layer(apply, weight, bias, kept)


def timed(mode: str, problem: Problem, layer: Layer) -> Timed:
    """The call that a mode times: "forward", else forward and backward."""
    return inference(problem, layer) if mode == "forward" else training(problem, layer)


class _Recorder(TorchDispatchMode):
    """Keeps the calls of this package's ops, and notes dense products among the others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.is_dense = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        name = func._schema.name
        if name.startswith("tscnc_kernels::masked_"):
            self.calls.append(lambda: func(*args, **given))
        self.is_dense |= name.removeprefix("aten::") in DENSE_PRODUCTS
        return func(*args, **given)


def raw_ops(mode: str, problem: Problem, layer: Layer) -> Callable[[], list[Any]]:
    """The kernels alone, without Python checks and autograd; layout conversions are inside.

    Runs the layer twice, so that the second run, which is recorded, has nothing left to tune.

    Raises:
        UnavailableError: some product of this case runs dense.
    """
    call = timed(mode, problem, layer).call
    call()
    with _Recorder() as recorder:
        call()
    if recorder.is_dense or not recorder.calls:
        raise UnavailableError("the automatic choice is dense here")
    calls = recorder.calls
    return lambda: [call() for call in calls]
